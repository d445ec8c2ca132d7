"""A disk that is full, two writers of one output, and readers beside a writer."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from crystals import ROOT, is_sentence, noise, refused

from tomat.dataset.verify import verify
from tomat.density import zarr_group as group
from tomat.density.convert import store_all
from tomat.density.formats import read_density, write_density
from tomat.density.source import open_source
from tomat.density.store import sample_store, write_store
from tomat.io import files
from tomat.io.remote import TomatError

ROWS = Path(__file__).parent / "files" / "before" / "rows"
TOMAT = Path(sys.executable).with_name("tomat")
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Four densities as a store and as calculations, and one crystal."
    folder = tmp_path_factory.mktemp("made")
    densities = sorted(map(sample_store().read, sample_store().ids), key=lambda density: density.values.size)[:4]
    ids = [density.id for density in densities]
    write_store(densities, {"train": ids[:3], "validation": ids[3:]}, folder / "store")
    for density in densities:
        (folder / "calculations" / density.id).mkdir(parents=True)
        write_density(density, folder / "calculations" / density.id / "CHGCAR")
    densities[0].structure.to(str(folder / "POSCAR"), fmt="poscar")
    return folder


# A full disk

# a command, with STORE, CALCULATIONS and POSCAR for what it reads → regular expression of what it may leave on a full disk
WRITERS = {
    "convert CALCULATIONS disk/a/b --workers 1": r"a|a/b|a/b/sources\.json|a/b/label(/.*)?",
    "convert CALCULATIONS disk/x.zip": "",
    "convert CALCULATIONS/gp-00026/CHGCAR disk/a/x.cube": "",
    "tokenize STORE --out disk/x --workers 1 --atoms packaged --patch-size 6 --pad-to 0":
        r"x|x/unfinished\.json|x/rows-\d+\.(parquet|json)",
    "prepare STORE --out disk/x --workers 1 --atoms packaged --kept 500": r"x|x/unfinished\.json|x/voxels-\d+\.(arrow|json)",
    "sync ROWS disk/x": r"x|x/(\.partial-\w+-)?(rows-\d+\.parquet|meta\.json)",  # a copy that was cut goes on in the partial file
    "fit-codec STORE --out disk/x.npz --save-histogram disk/h.npz --levels 64": r"x\.npz",
    "fit-atoms STORE --out disk/x.json --workers 1 --voxels 500": "",
    "fidelity STORE --out disk/x.csv --only coarse --workers 1 --materials 2": r"x\.csv\.parts(/.*)?",
    "predict POSCAR --out disk/x.cube --expected-error disk/e.cube --grid 20 20 20": r"x\.cube",
    "evaluate STORE --split train --out disk/x --pictures 1": r"x|x/(materials|pictures)(/[\w.-]+)*",
    "train ROWS --out disk/x --steps 2 --batch-size 2": r"x|x/config\.json|x/log\.jsonl|x/states(/atoms\.json)?",
}
VOLATILE = (".jsonl", "scores.csv", "scores.json", "report.html", "state.pt", "md5.json", "x.csv")  # hold seconds


@pytest.fixture(scope="module")
def full(made):
    "What each command left on a disk of its own, where the machine lets the user mount one."
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs disk && exec "$@"', "sh"]
    (made / "disk").mkdir()
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], cwd=made, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    names = {"STORE": made / "store", "CALCULATIONS": made / "calculations", "POSCAR": made / "POSCAR", "ROWS": ROWS}
    lines = []
    for line in WRITERS:
        for name, path in names.items():
            line = line.replace(name, str(path))
        command, *words = line.split()
        lines.append([command, *words, *(CPU if command in ("predict", "evaluate", "train") else ())])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable if word == "PYTHON" else word for word in [*mount, "PYTHON"]] +
                         [str(Path(__file__).with_name("full_disk.py")), json.dumps(lines)], cwd=made, env=env,
                         capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    return {line: found[2 * i:2 * i + 2] for i, line in enumerate(WRITERS)}


def same(name, files, others):
    return files.get(name) == others.get(name) or name.endswith(VOLATILE) or "/materials/" in name


@pytest.mark.parametrize("line", WRITERS)
def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(full, line):
    for run in full[line]:
        whole, there = run["whole"]["files"], run["full"]["files"]
        assert run["whole"]["code"] == 0 and run["full"]["code"] in (0, 2), run
        if run["full"]["code"] == 0:  # everything fits
            assert there.keys() == whole.keys()
        else:
            *_, sentence = run["full"]["err"].splitlines()
            assert is_sentence(sentence) and "disk/" in sentence and "Traceback" not in run["full"]["err"], run["full"]["err"]
            assert [name for name in there if not re.fullmatch(WRITERS[line], name)] == [], sentence
            left = [name for name in there if name in whole and not same(name, whole, there)]
            assert [name for name in left if not name.endswith("sources.json")] == []  # where each density is from; none is done
        again = run["again"]["files"]
        assert run["again"]["code"] == 0 and again.keys() == whole.keys(), run["again"]["err"]
        assert all(same(name, whole, again) for name in whole)
    assert full[line][0]["full"]["code"] == 2


def test_a_store_of_nothing_is_not_left_behind(tmp_path, monkeypatch):
    (tmp_path / "calculations" / "a").mkdir(parents=True)
    (tmp_path / "calculations" / "a" / "CHGCAR").write_text("no density")
    source = open_source(str(tmp_path / "calculations"))
    for faults in (None, {}):
        with pytest.raises(TomatError, match="CHGCAR"):
            store_all(source, tmp_path / "new" / "store", faults=faults)
        assert os.listdir(tmp_path) == ["calculations"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(TomatError, match="CHGCAR"):
        store_all(source, tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


# Two writers


@pytest.mark.parametrize("line", ["convert CALCULATIONS OUT --workers 1 --validation 0.3", "prepare STORE --out OUT --workers 1",
                                  "sync ROWS OUT", "evaluate STORE --out OUT --pictures 0 --device cpu"])
def test_two_writers_leave_one_whole_output(tmp_path, made, line):
    names = {"STORE": made / "store", "CALCULATIONS": made / "calculations", "ROWS": ROWS, "OUT": tmp_path / "out"}
    words = [str(names.get(word, word)) for word in line.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([TOMAT, *words], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in "ab"]
    texts = [run.communicate(timeout=120)[1] for run in both]
    codes = [run.returncode for run in both]
    assert 0 in codes and all(code == 0 or is_sentence(text.splitlines()[-1]) for code, text in zip(codes, texts, strict=True))
    assert "Traceback" not in "".join(texts) and not list(tmp_path.rglob(".partial-*"))
    if words[0] == "evaluate":
        assert {path.name for path in (tmp_path / "out").iterdir()} >= {"scores.csv", "scores.json", "report.html", "materials"}
    else:
        assert verify(tmp_path / "out") == []


# A reader beside a writer


@pytest.mark.parametrize("name", ["x.zarr", "x.zarr.zip", "CHGCAR.gz"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_reader_beside_a_writer_gets_one_writing(tmp_path, monkeypatch, name, exchange):
    "Never the crystal of one with the values of the other; a folder is missing for a moment where names cannot be exchanged."
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda aside, target: False)
    first = noise(np.random.default_rng(0), (6, 7, 8))
    second = replace(first, values=first.values + 1, structure=first.structure.copy().scale_lattice(50))
    path, ended = tmp_path / name, threading.Event()
    write_density(first, path)
    def write():
        for number in range(10**6):
            write_density((second, first)[number % 2], path)
            if ended.is_set():
                return
    writer = threading.Thread(target=write)
    writer.start()
    found = Counter()
    try:
        for _ in range(300):
            try:
                got = read_density(path)
            except TomatError as err:
                found[str(err)] += 1
                continue
            like = second if abs(got.structure.volume - 50) < 0.01 else first
            same_values = np.allclose(got.values, like.values, rtol=1e-5)
            found["whole" if same_values else "mixed"] += 1
    finally:
        ended.set()
        writer.join()
    assert not found["mixed"] and found["whole"] > 250
    assert exchange is False or found["whole"] == 300, found
    assert all(is_sentence(sentence) for sentence in found.keys() - {"whole", "mixed"})


def test_a_group_that_never_rests_is_one_sentence(tmp_path, monkeypatch):
    write_density(noise(np.random.default_rng(0)), tmp_path / "a.zarr")
    whole = group._files_in
    def beside(folder, prefix=""):
        yield from whole(folder, prefix)
        if not prefix:
            shutil.copytree(folder, f"{folder}.new")
            shutil.rmtree(folder)
            Path(f"{folder}.new").rename(folder)
    monkeypatch.setattr(group, "_files_in", beside)
    refused(tmp_path / "a.zarr", "is being written by another process")
