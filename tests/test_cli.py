"""The command line as a stranger uses it: every command works, and every wrong input is one sentence and exit code 2."""

import gzip
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from crystals import Done, limited
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp.outputs import Chgcar

from tomat import cli
from tomat.density import formats
from tomat.tokens.levels import fit_levels, save_levels
from tomat.density.core import Density
from tomat.io.files import read_json
from tomat.io.remote import TomatError
from tomat.density.grids import espresso_grid, gpaw_grid, vasp_grid
from tomat.density.formats import read_density, write_density
from tomat.models.causal import load_checkpoint, make_model, save_checkpoint
from tomat.models.sizes import MODELS
from tomat.atoms.sad import valence_electrons
from tomat.density.store import RawStore, sample_store, write_store
from tomat.tokens.tokenizer import tokenizer_from_dict

NACL = Path(__file__).parent / "files" / "CHGCAR.NaCl.gz"
TOMAT = Path(sys.executable).parent / "tomat"
COMMANDS = ("info", "convert", "regrid", "fetch", "tokenize", "prepare", "verify", "sync", "fit-codec", "fit-atoms", "fidelity",
            "show-tokens", "runs", "train", "predict", "analyze", "serve", "evaluate", "push", "demo")
ROWS = ("--patch-size", "3", "--pad-to", "0", "--patches-per-material", "4")  # small rows
GRID = ("--grid", "4", "4", "4")


def process(*args, **options):
    "Start the installed command."
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    env = os.environ | quiet | options.pop("env", {})
    return subprocess.Popen([TOMAT, *map(str, args)], env=env, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finished(started):
    "Wait for a process."
    out, err = started.communicate(timeout=120)
    return Done(started.returncode, out, err)


def tree(folder):
    "Everything below a folder, partial paths included, with what would change if it were touched."
    return {p.relative_to(folder).as_posix(): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")
            if not p.is_dir() or p.is_symlink()} | {p.relative_to(folder).as_posix(): None for p in folder.rglob("*/")}


def is_one_sentence(done, *words):
    "Exit code 2, and one line with all of `words` on standard error."
    assert done.code == 2, done
    assert done.err.count("\n") == 1 and done.err.startswith("tomat: "), done.err
    assert done.err.endswith(".\n") and not done.err.endswith("..\n"), done.err
    assert all(str(word) in done.err for word in words), (words, done.err)
    assert done.out == ""


def a_material(seed, id, elements, shape=(6, 7, 8)):
    "Noise over a few decades in a skewed cell, with the electrons of its atoms."
    rng = np.random.default_rng(seed)
    values = rng.lognormal(0, 2, shape)
    cell = Lattice.from_parameters(4, 5, 6, 80, 95, 105)
    structure = Structure(cell, elements, rng.random((len(elements), 3)))
    values *= valence_electrons(structure) / values.mean()
    return Density(values.astype(np.float32), structure, id=id)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A store, rows and a checkpoint, made by the command line; tests read them and write elsewhere."
    folder = tmp_path_factory.mktemp("made")
    densities = [a_material(0, "salt", ["Na", "Cl"]), a_material(1, "metal", ["Li"]), a_material(2, "oxide", ["Fe", "O"])]
    write_store(densities, {"train": ["salt", "metal"], "validation": ["oxide"], "test": []}, folder / "store")
    for density in densities:
        write_density(density, folder / f"CHGCAR.{density.id}")
    densities[0].structure.to(str(folder / "POSCAR"), fmt="poscar")
    for line in (["tokenize", folder / "store", "--out", folder / "rows", *ROWS],
                 ["train", folder / "rows", "--out", folder / "run", "--steps", "3", "--batch-size", "2"]):
        cli.app([str(word) for word in line], standalone_mode=False)
    return folder


@contextmanager
def nothing_changes(*folders):
    "What is in the folders stays as it is."
    before = [tree(folder) for folder in folders]
    yield
    for folder, was in zip(folders, before, strict=True):
        now = tree(folder)
        assert now == was, f"left behind or touched: {sorted(now.items() ^ was.items(), key=str)}"


# What works


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(tomat, command):
    done = tomat(command, "--help")
    assert done.code == 0 and done.err == ""
    assert f"tomat {command}" in done.out.split("Example:")[1]


def test_help_lists_every_command(tomat):
    done = tomat("--help")
    assert done.code == 0 and all(f" {command} " in done.out for command in COMMANDS)
    assert {info.name or info.callback.__name__.replace("_", "-") for info in cli.app.registered_commands} == set(COMMANDS)


def test_the_installed_command(tmp_path, made):
    "The real thing: exit code 0 and JSON; exit code 2 and one sentence; a prediction in a process that never trained."
    lines = (["info", NACL, "--json"], ["info", NACL.with_name("CHGCAR.nowhere")],
             ["predict", made / "POSCAR", *GRID, "--checkpoint", made / "run/model", "--out", tmp_path / "x.cube"])
    good, bad, predicted = map(finished, [process(*line) for line in lines])
    assert good.code == 0 and good.err == "" and f"{json.loads(good.out)['electrons']:.3f}" == "8.000"
    is_one_sentence(bad, "CHGCAR.nowhere", "does not exist")
    assert predicted == Done(0, f"{tmp_path}/x.cube: 14 electrons on 4 × 4 × 4 voxels\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["x.cube"]


def test_info(tomat):
    facts = json.loads(tomat("info", NACL, "--json").out)
    assert facts["formula"] == "NaCl" and facts["grid"] == [56, 56, 56] and f"{facts['electrons']:.3f}" == "8.000"
    assert {"spacing", "min", "max", "negative_share"} <= facts.keys() and facts["min"] < facts["max"]
    lines = tomat("info", NACL).out.splitlines()
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    assert shown["formula"] == ["NaCl"] and shown["grid"] == ["56"] * 3
    assert [float(x) for x in shown["electrons"]] == pytest.approx([8], abs=5e-4)
    assert float(shown["max"][0]) == pytest.approx(facts["max"], rel=1e-5)


def test_convert_chains(tomat, tmp_path):
    first = read_density(NACL)
    chain = [NACL, tmp_path / "x.zarr", tmp_path / "CHGCAR", tmp_path / "y.zarr.zip", tmp_path / "z.vasp"]
    for source, target in pairwise(chain):
        assert tomat("convert", source, target) == Done(0, "", "")
        got = read_density(target)
        np.testing.assert_array_equal(got.values.astype(np.float32), first.values.astype(np.float32))
        np.testing.assert_array_equal(got.structure.lattice.matrix, first.structure.lattice.matrix)
        np.testing.assert_array_equal(got.structure.frac_coords, first.structure.frac_coords)
        assert got.structure.species == first.structure.species and f"{got.n_electrons:.3f}" == "8.000"
        assert list(got.augmentation) == list(first.augmentation)
    assert (tmp_path / "CHGCAR").read_bytes() == (tmp_path / "z.vasp").read_bytes()
    assert tomat("convert", tmp_path / "x.zarr", tmp_path / "NaCl.cube.gz").code == 0
    cube = read_density(tmp_path / "NaCl.cube.gz")
    assert cube.n_electrons == pytest.approx(8, abs=1e-3)
    np.testing.assert_allclose(cube.total, first.total, rtol=1e-4, atol=1e-3)
    assert tomat("convert", NACL, tmp_path / "density", "--format", "zarr").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CHGCAR", "NaCl.cube.gz", "density", "x.zarr", "y.zarr.zip", "z.vasp"]


def test_a_folder_becomes_a_store_with_a_split(tomat, tmp_path, made):
    for id in sample_store().ids[:4]:
        write_density(sample_store().read(id), tmp_path / f"calculations/{id}.zarr")
    done = tomat("convert", tmp_path / "calculations", tmp_path / "store", "--validation", 0.25, "--workers", 1)
    assert done.code == 0, done.err
    parts = RawStore(tmp_path / "store").splits
    assert sorted(map(len, parts.values())) == [1, 3] and len(parts["validation"]) == 1
    assert tomat("tokenize", tmp_path / "store", "--split", "train", "--out", tmp_path / "rows", *ROWS).code == 0
    is_one_sentence(tomat("convert", NACL, tmp_path / "x.zarr", "--validation", 0.1), "--validation")


@pytest.mark.parametrize("layout", ["framed", "anchored"])
@pytest.mark.parametrize("target", ["total", "difference"])
def test_tokenize_a_store(tomat, tmp_path, made, layout, target):
    done = tomat("tokenize", made / "store", "--out", tmp_path / "rows", "--layout", layout, "--target", target,
                 "--label", "small", "--seed", 7, *ROWS)
    said = "tomat: The packaged atoms are used: they have the electrons of all 2 materials.\n"
    assert done.code == 0 and done.err == (said if target == "difference" else "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows"]
    meta = read_json(tmp_path / "rows" / "meta.json")
    assert (meta["label"], meta["seed"], meta["rows"], list(meta["materials"])) == ("small", 7, 8, ["metal", "salt"])
    tokenizer = tokenizer_from_dict(meta["tokenizer"])
    assert (tokenizer.layout, tokenizer.target, tokenizer.size, tokenizer.pad_to) == (layout, target, (3, 3, 3), None)
    shown = tomat("show-tokens", tmp_path / "rows", "--row", 7)
    assert shown.code == 0 and shown.out.startswith("[BOS]\n[GRID_START] 6 7 8 [GRID_END]\n") and "] Li [" in shown.out
    assert ("[LATTICE_START]" in shown.out, "[OFFSET_START]" in shown.out) == (layout == "framed", layout == "anchored")


def test_tokenize_one_file_with_fitted_levels(tomat, tmp_path, made):
    save_levels(fit_levels(read_density(made / "CHGCAR.salt").total, 64), tmp_path / "levels.npz")
    done = tomat("tokenize", made / "CHGCAR.salt", "--out", tmp_path / "deep" / "rows", "--density-codec",
                 tmp_path / "levels.npz", *ROWS)
    assert done.code == 0
    meta = read_json(tmp_path / "deep" / "rows" / "meta.json")
    assert list(meta["materials"]) == ["salt"] and meta["tokenizer"]["density_codec"]["codec"] == "levels"
    again = tomat("tokenize", made / "CHGCAR.metal", "--out", tmp_path / "deep" / "rows", "--overwrite", *ROWS)
    assert again.code == 0
    assert list(read_json(tmp_path / "deep" / "rows" / "meta.json")["materials"]) == ["metal"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["rows"]


def test_tokenize_the_packaged_sample(tomat, tmp_path):
    done = tomat("tokenize", sample_store().root, "--split", "validation", "--out", tmp_path / "rows", "--target",
                 "difference", "--patch-size", 4, "--pad-to", 256, "--patches-per-material", 2)
    assert done.code == 0
    table = pq.read_table(tmp_path / "rows" / "rows-00000.parquet")
    assert table.num_rows == 16 and set(map(len, table["input_ids"].to_pylist())) == {256}


def test_show_tokens_of_everything(tomat, made):
    sheet = tomat("show-tokens", NACL, "--offset", 5, 9, 44).out.splitlines()
    assert sheet[:2] == ["[BOS]", "[GRID_START] 56 56 56 [GRID_END]"] and "[ATOMS_START] Na Cl [ATOMS_END]" in sheet
    assert sheet[-1].startswith("[PAD] × ")
    anchored = tomat("show-tokens", NACL, "--offset", 5, 9, 50, "--layout", "anchored").out.splitlines()
    assert "[OFFSET_START] 5 9 50 [OFFSET_END]" in anchored and "[HI_START] 18 22 7 [HI_END]" in anchored
    full = tomat("show-tokens", NACL, "--patch-size", 5, "--full").out
    assert "…" not in full and sum(word.startswith("d") for word in full.split()) == 250
    rows, shard = (tomat("show-tokens", made / name, "--row", 5) for name in ("rows", "rows/rows-00000.parquet"))
    assert rows == shard and rows.code == 0 and "[ATOMS_START] Li [ATOMS_END]" in rows.out
    assert tomat("show-tokens", made / "rows", "--row", 6) != rows


def test_train_predict_evaluate(tomat, tmp_path, made):
    """A structure and a density of the same grid give the same prediction, in any format."""
    assert tomat("train", made / "rows", "--out", tmp_path / "run", "--steps", 3, "--batch-size", 2) == Done(
        0, f"{tmp_path}/run/model\n", "")
    weights = [folder / "model" / "model.safetensors" for folder in (tmp_path / "run", made / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    model = ("--checkpoint", made / "run" / "model")
    assert tomat("predict", made / "POSCAR", "--grid", 6, 7, 8, *model, "--out", tmp_path / "a.zarr") == Done(
        0, f"{tmp_path}/a.zarr: 14 electrons on 6 × 7 × 8 voxels\n", "")
    assert "CHGCAR.b holds no PAW occupancies" in tomat("predict", made / "CHGCAR.salt", *model, "--out", tmp_path / "CHGCAR.b").err
    assert tomat("predict", made / "store/label/salt.zarr", *model, "--out", tmp_path / "c.cube").code == 0
    ours, (a, b, c) = Chgcar.from_file(tmp_path / "CHGCAR.b"), map(read_density, (
        tmp_path / "a.zarr", tmp_path / "CHGCAR.b", tmp_path / "c.cube"))
    np.testing.assert_array_equal(a.values, b.values.astype(np.float32))
    np.testing.assert_allclose(c.total, a.total, rtol=1e-4, atol=1e-3)
    assert ours.dim == a.shape == (6, 7, 8) and ours.structure.formula == "Na1 Cl1"
    assert a.n_electrons == pytest.approx(valence_electrons(ours.structure), abs=1e-4)
    done = tomat("evaluate", made / "store", *model, "--out", tmp_path / "scores", "--json")
    assert done.code == 0 and done.err == ""
    means, scores = json.loads(done.out), json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert means == scores["summary"] and {m["id"] for m in scores["materials"]} == {"oxide"}
    assert {entry: s["reads"] for entry, s in means.items()} == {
        "SAD": "structure", "causal, free-running": "structure", "causal, teacher-forced": "truth",
        "causal, codec floor": "truth", "copy the previous true voxel": "truth"}
    assert means["causal, codec floor"]["nmae"]["mean"] < 1e-4 < means["causal, free-running"]["nmae"]["mean"]
    assert "codec floor" in (tmp_path / "scores" / "report.html").read_text()
    assert {p.name for p in (tmp_path / "scores").iterdir()} == {"report.html", "scores.csv", "scores.json", "materials",
                                                                 "pictures"}
    again = tomat("evaluate", made / "store", *model, "--out", tmp_path / "scores", "--json")
    assert again.out == done.out  # the same seconds too: nothing was done twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CHGCAR.b", "a.zarr", "c.cube", "run", "scores"]


def test_predict_on_the_grid_of_a_code(tomat, tmp_path, made):
    """A cutoff gives the grid of a code; a grid may be written with commas; settings of two codes are refused."""
    (tmp_path / "INCAR").write_text("ENCUT = 40\nPREC = Accurate\n")
    (tmp_path / "INCAR.grid").write_text("NGXF = 6\nNGYF = 8\nNGZF = 10\n")
    (tmp_path / "INCAR.none").write_text("PREC = Accurate\n")
    salt = read_density(made / "CHGCAR.salt").structure
    grids = {("--grid", "4,5,6"): (4, 5, 6), ("--grid=4,5,6",): (4, 5, 6), ("--encut", "40"): vasp_grid(salt, 40),
             ("--incar", tmp_path / "INCAR"): vasp_grid(salt, 40, "Accurate"), ("--incar", tmp_path / "INCAR.grid"): (6, 8, 10),
             ("--ecut", "40"): gpaw_grid(salt, 40), ("--ecutrho", "12"): espresso_grid(salt, 12)}
    line = ("predict", made / "CHGCAR.salt", "--checkpoint", made / "run/model", "--out", tmp_path / "x.cube")
    for words, grid in grids.items():
        assert tomat(*line, *words).code == 0 and read_density(tmp_path / "x.cube").shape == grid, words
    for words in (("--encut", "40", "--ecut", "40"), ("--grid", "4,4,4", "--encut", "40"), ("--prec", "Normal")):
        is_one_sentence(tomat(*line, *words), "a grid follows from one of", "--" + words[-2].strip("-"))
    is_one_sentence(tomat(*line, "--incar", tmp_path / "INCAR.none"), "INCAR.none has no ENCUT")
    is_one_sentence(tomat(*line, "--encut", "40", "--prec", "High"), "PREC = High")


def test_predict_many(tomat, tmp_path, made):
    """A folder in, a folder out; what is no structure is named on standard error."""
    inside = tmp_path / "in"
    inside.mkdir()
    shutil.copy(made / "POSCAR", inside / "POSCAR.one")
    shutil.copy(made / "CHGCAR.metal", inside / "CHGCAR.two")
    (inside / "letter.txt").write_text("Dear reader")
    line = ["predict", inside, "--grid", 4, 4, 4, "--checkpoint", made / "run/model"]
    done = tomat(*line, "--out", tmp_path / "out", "--format", "cube", "--json")
    assert done.code == 0 and done.err.count("\n") == 1 and "letter.txt" in done.err, done
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one.cube", "two.cube"]
    assert [f["name"] for f in json.loads(done.out)["predicted"]] == ["two", "one"]
    for file in (tmp_path / "out").iterdir():
        density = read_density(file)
        assert density.n_electrons == pytest.approx(valence_electrons(density.structure), rel=1e-4)


def test_predict_uncertainty_and_picture(tomat, tmp_path, made):
    """A model with one token a value gives an expected error; one with two is refused before the work."""
    line = ["predict", made / "POSCAR", "--grid", 4, 4, 4, "--out", tmp_path / "x.zarr", "--expected-error", tmp_path / "x.zarr",
            "--picture", tmp_path / "x.png"]
    with nothing_changes(tmp_path):
        is_one_sentence(tomat(*line, "--checkpoint", made / "run/model"), "expected error")
    _, tokenizer = load_checkpoint(made / "run/model")
    levels = replace(tokenizer, density_codec=fit_levels(np.random.default_rng(0).lognormal(0, 2, 2000), 64))
    save_checkpoint(make_model(MODELS["nano"], levels.vocab), levels, tmp_path / "model", {"elements": ["Na"]})
    done = tomat(*line, "--checkpoint", tmp_path / "model")
    assert done.code == 0 and done.err.count("\n") == 1 and "Cl" in done.err and "Na" not in done.err, done.err
    names = set(zarr.open_group(tmp_path / "x.zarr", mode="r").array_keys())
    assert names == {"charge_density_total", "charge_density_spread"} and (tmp_path / "x.png").stat().st_size > 1000
    assert read_density(tmp_path / "x.zarr").metadata["elements_never_seen"] == ["Cl"]


def test_the_values_of_a_density_do_not_reach_its_prediction(tomat, tmp_path, made):
    density = read_density(made / "CHGCAR.salt")
    other = Density(np.ones_like(density.values), density.structure, id="salt")
    write_density(other, tmp_path / "CHGCAR.salt")
    for name, source in (("a", made), ("b", tmp_path)):
        done = tomat("predict", source / "CHGCAR.salt", "--checkpoint", made / "run/model", "--out", tmp_path / f"{name}.zarr.zip")
        assert done.code == 0
    assert (tmp_path / "a.zarr.zip").read_bytes() == (tmp_path / "b.zarr.zip").read_bytes()


# What is refused: a file that is not what it should be


@pytest.fixture(scope="module")
def bad(made, tmp_path_factory):
    "One wrong file of every kind."
    folder = tmp_path_factory.mktemp("bad")
    whole = (made / "CHGCAR.salt").read_text()
    packed, lines = gzip.compress(whole.encode()), whole.splitlines(keepends=True)
    (folder / "CHGCAR.empty").write_text("")
    (folder / "CHGCAR.cut").write_text(whole[:len(whole) // 2])
    (folder / "CHGCAR.cut.gz").write_bytes(packed[:len(packed) // 2])
    (folder / "CHGCAR.nan").write_text("".join([*lines[:14], lines[14].replace(lines[14].split()[0], "NaN", 1), *lines[15:]]))
    (folder / "CHGCAR.poscar").write_text((made / "POSCAR").read_text())
    (folder / "CHGCAR.text").write_text("Dear reader,\n" * 20)
    (folder / "CHGCAR.unknown").write_text(whole.replace("Na", "Xx"))
    (folder / "letter.txt").write_text("Dear reader,\n")
    (folder / "nothing.json").write_text('{"a": 1}')
    (folder / "POSCAR").write_text((made / "POSCAR").read_text())
    (folder / "CHGCAR.folder").mkdir()
    shutil.copytree(made / "store/label/salt.zarr", folder / "nan.zarr")
    array = zarr.open_group(folder / "nan.zarr")["charge_density_total"]
    array[0, 0, 0] = np.nan
    write_density(Density(np.ones((1, 1, 1200)), read_density(made / "CHGCAR.metal").structure, id="long"), folder / "long.zarr")
    (folder / "text.npz").write_text("Dear reader,\n")
    (folder / "empty.npz").write_bytes(b"")
    np.savez(folder / "other.npz", a=np.ones(3))
    for name, species in (("shared", {"Fe": 0.5, "Ni": 0.5}), ("Tc", "Tc")):
        structure = Structure(Lattice.cubic(4), [species], [[0, 0, 0]])
        write_density(Density(np.ones((4, 4, 4)), structure, id=name), folder / f"{name}.zarr")
        structure.to(str(folder / f"{name}.cif"))
    return folder


# file → what the sentence says beside its name
BAD = {"CHGCAR.empty": "empty", "CHGCAR.cut": "copy it again", "CHGCAR.cut.gz": "unpacked", "CHGCAR.nan": "NaN", "nan.zarr": "NaN",
       "CHGCAR.poscar": "holds no density", "CHGCAR.text": "line 2", "CHGCAR.unknown": "Xx", "nothing.json": "no density",
       "CHGCAR.missing": "does not exist", "missing.zarr": "does not exist", "CHGCAR.folder": "CHGCAR",
       "letter.txt": "no known format", "POSCAR": ""}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_density_is_refused_by_every_command_that_reads_one(tomat, tmp_path, made, bad, name):
    model = ("--checkpoint", made / "run/model")
    for command in (["info", bad / name], ["convert", bad / name, tmp_path / "x.zarr"], ["show-tokens", bad / name],
                    ["tokenize", bad / name, "--out", tmp_path / "new" / "rows"],
                    ["predict", bad / name, *model, "--out", tmp_path / "x.cube"]):
        if name == "POSCAR" and "predict" in command:
            continue  # a structure is what it takes
        with nothing_changes(tmp_path, bad):
            is_one_sentence(tomat(*command), name, BAD[name])
    for command in (["evaluate", bad / name, *model, "--out", tmp_path / "scores"],
                    ["train", bad / name, "--out", tmp_path / "run"],
                    ["predict", made / "POSCAR", *GRID, "--checkpoint", bad / name, "--out", tmp_path / "x.cube"]):
        with nothing_changes(tmp_path, bad):
            is_one_sentence(tomat(*command), name)


# command | words of its one sentence
WRONG = """
tokenize {bad}/long.zarr --out {tmp}/rows | 1200 Li 1,023
show-tokens {bad}/long.zarr | 1200 Li 1,023
predict {bad}/long.zarr --checkpoint {run}/model --out {tmp}/x.cube | 1,200 Li 600
tokenize {salt} --out {tmp}/rows --pad-to 100 | 5,529 pad_to
show-tokens {salt} --pad-to 100 | 5,529 pad_to
tokenize {bad}/shared.zarr --out {tmp}/rows | Fe shared
show-tokens {bad}/shared.zarr | Fe shared
convert {bad}/shared.zarr {tmp}/CHGCAR | Fe shared
convert {bad}/shared.zarr {tmp}/x.cube | Fe shared
convert {bad}/shared.zarr {tmp}/x.json | Fe shared
predict {bad}/shared.zarr --checkpoint {run}/model --out {tmp}/x.cube | shared.zarr Fe
predict {bad}/shared.cif --grid 4 4 4 --checkpoint {run}/model --out {tmp}/x.cube | shared.cif Fe
tokenize {bad}/Tc.zarr --out {tmp}/rows --pad-to 0 --patch-size 3 --target difference --atoms packaged | Tc
predict {bad}/Tc.cif --grid 4 4 4 --checkpoint {run}/model --out {tmp}/x.cube | Tc

tokenize {salt} --out {tmp}/rows --patch-size 0 | patch 0
tokenize {salt} --out {tmp}/rows --patch-size -1 | patch -1
tokenize {salt} --out {tmp}/rows --patch-size 2000 | patch 2000
tokenize {salt} --out {tmp}/rows --patch-size 1000 | pad_to
show-tokens {salt} --patch-size 0 | patch 0
show-tokens {salt} --patch-size -1 | patch -1
show-tokens {salt} --patch-size 2000 | patch 2000
tokenize {salt} --out {tmp}/rows --pad-to -5 | pad_to
tokenize {salt} --out {tmp}/rows --patches-per-material 0 | patch
tokenize {salt} --out {tmp}/rows --patches-per-material -3 | patch
tokenize {salt} --out {tmp}/rows --seed -3 | seed -3
tokenize {salt} --out {tmp}/rows --layout spiral | spiral framed
tokenize {salt} --out {tmp}/rows --target spin | spin difference
tokenize {salt} --out {tmp}/rows --density-codec mp3 | mp3 fp16_1token
tokenize {salt} --out {tmp}/rows --density-codec {bad}/text.npz | text.npz
tokenize {salt} --out {tmp}/rows --density-codec {bad}/empty.npz | empty.npz
tokenize {salt} --out {tmp}/rows --density-codec {bad}/other.npz | other.npz boundaries
tokenize {salt} --out {tmp}/rows --density-codec {bad}/missing.npz | missing.npz
show-tokens {salt} --offset 1 2 99999999999999999999 | ffset
show-tokens {made}/rows --row -1 | rows
show-tokens {made}/rows --row 8 | rows 8
show-tokens {made}/rows/rows-00000.parquet --row -1 | rows-00000.parquet
show-tokens {made}/rows/rows-00001.parquet | rows-00001.parquet

train {made}/rows --out {tmp}/run --steps 0 | step
train {made}/rows --out {tmp}/run --steps -1 | step
train {made}/rows --out {tmp}/run --batch-size 0 | batch
train {made}/rows --out {tmp}/run --lr -1 | lr -1
train {made}/rows --out {tmp}/run --lr nan | lr
train {made}/rows --out {tmp}/run --lr inf |
train {made}/rows --out {tmp}/run --seed -1 | seed -1
train {made}/rows --out {tmp}/run --seed 99999999999999999999 | seed
train {made}/rows --out {tmp}/run --size 7T | 7T nano
train {made}/rows --out {tmp}/run --model 7T | 7T nano
train {made}/rows --out {tmp}/run --loss-on luck | luck

predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --grid 0 4 4 | 0 points
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --grid -4 4 4 | -4 points
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --grid 4 4 1200 | 1,200 600
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --grid 4 4 4 --choose luck | luck median
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --grid 4 4 4 --choose median | median argmax
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --grid 4 4 4 --overlap -1 | overlap -1
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --grid 4 4 4 --overlap 3 | overlap 3
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.xyz --grid 4 4 4 | x.xyz format
predict {made}/POSCAR --checkpoint {made}/store --out {tmp}/x.cube --grid 4 4 4 | store checkpoint
predict {made}/POSCAR --checkpoint {made}/rows --out {tmp}/x.cube --grid 4 4 4 | rows checkpoint
predict {made}/POSCAR --checkpoint {made}/nowhere --out {tmp}/x.cube --grid 4 4 4 | nowhere
predict {made}/POSCAR {made}/CHGCAR.salt --checkpoint {run}/model --out {tmp}/x.cube --grid 4 4 4 | x.cube folder
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --spread {tmp}/x.cube --grid 4 4 4 | x.cube Zarr
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --spread {tmp}/x.xyz --grid 4 4 4 | x.xyz format
predict {made}/POSCAR --checkpoint {run}/model --out {tmp}/x.cube --format cube --grid 4 4 4 | format
predict {made}/POSCAR {made}/CHGCAR.salt --checkpoint {run}/model --out {tmp}/new/ --format xyz --grid 4 4 4 | xyz chgcar
predict {bad}/letter.txt --checkpoint {run}/model --out {tmp}/x.cube --grid 4 4 4 | letter.txt
evaluate {made}/store --checkpoint {run}/model --checkpoint {run}/model --out {tmp}/scores | Two causal
fit-atoms {made}/store --out {tmp}/a.json --seed -1 | seed -1
fidelity {made}/store --out {tmp}/t.parquet | t.parquet .csv
fidelity {made}/store --out {tmp}/t.csv --only nothing | nothing fourier
fidelity {made}/store --out {tmp}/t.csv --split none | none
fidelity {made}/store --out {tmp}/t.csv --materials 0 | --materials
fidelity {made}/store --out {tmp}/t.csv --levels {tmp}/missing.npz | missing.npz
fidelity {tmp}/missing --out {tmp}/t.csv | missing

convert {salt} {tmp}/x.xyz | x.xyz format
convert {salt} {tmp}/x --format xyz | xyz cube
convert {salt} {made}/store --format zarr | store other
convert {salt} {bad}/letter.txt/x.zarr | letter.txt/x.zarr
convert {salt} {bad}/letter.txt/x.cube | letter.txt/x.cube
tokenize {salt} --out {bad}/letter.txt/rows | letter.txt/rows
tokenize {salt} --out {made}/rows | rows other settings
tokenize {salt} --out {made}/store | store other files
tokenize {salt} --out {made}/store --overwrite | store other
tokenize {salt} --out {tmp}/rows --worker 2 | worker 3/16
tokenize {salt} --out {tmp}/rows --worker 2/2 | worker 2 from 0
tokenize {salt} --out {tmp}/rows --worker 0/0 | worker from 0
tokenize {salt} --out {tmp}/rows --materials -1 | materials -1
tokenize {salt} --out {tmp}/rows --label val-smok | val-smok val-smoke
tokenize {salt} --out {tmp}/rows --density-codec fitted | fitted
tokenize {salt} --out {tmp}/rows --workers 0 | workers
tokenize {salt} --out {tmp}/rows --label val-smoke | split all
tokenize {salt} --out {tmp}/rows --label val-smoke --split all | 128 --materials
tokenize {made}/store --out {tmp}/rows --materials 99 | store 99
tokenize mp-1,mp- --out {tmp}/rows | mp-1,mp- exist
fetch mp-1 --out {tmp}/cache --base-url {bad} | mp-1 task
fetch ../x --out {tmp}/cache --base-url {bad} | ../x
sync {tmp}/nowhere {tmp}/there | nowhere
sync {made}/rows {made}/rows/inside | inside
fit-codec {made}/store --out {tmp}/c.npz --objective l3 | l1 l3
fit-codec {made}/store --out {tmp}/c.npz --levels 0 | level
fit-codec {made}/store --out {tmp}/c.npz --unit eV | eV electrons
fit-codec {made}/store --out {tmp}/c.npz --split none | none
convert {made}/store {made}/rows | rows other
convert {bad} {tmp}/store | cut rename
tokenize {salt} --out . --overwrite --patch-size 3 | .
train {made}/rows --out {bad}/letter.txt/run | letter.txt/run
train {made}/rows --out {run} --steps 9 | run another
train {made}/rows --out {made}/rows --steps 1 | rows
train {made}/store --out {tmp}/run --decoder causal | store tokenize
train {made}/rows --out {tmp}/run --decoder probe | rows densities
train {made}/rows --out {tmp}/run --decoder nerf | nerf causal
train {made}/store --out {tmp}/run --batch-size 4 | --batch-size language
train {made}/rows --out {tmp}/run --voxels 4 | --voxels probe
train {made}/store --out {tmp}/run --size nano | nano XL
train {made}/rows --out {tmp}/run --size XL | XL nano
train {made}/rows --out {tmp}/run --atoms packaged | --atoms densities
train {made}/rows --out {tmp}/run --first 1 | --first densities
train {made}/store --out {tmp}/run --split test | test
train {made}/store --out {tmp}/run --first 3 | 3 fewer
train {made}/store --out {tmp}/run --first -1 | fewer
train {made}/store --out {tmp}/run --val {made}/rows | rows prepare
train {made}/store --out {tmp}/run --atoms {tmp}/none.json | none.json
train {made}/store --out {tmp}/run --eval-store {made}/store | --eval-store --val
train {made}/store --out {tmp}/run --shard | shard
train {made}/store --out {tmp}/run --device mps | mps cpu
train {tmp}/none --out {tmp}/run | none rows voxels
prepare {made}/store --out {tmp}/voxels --worker 1/2 | --worker --atoms
prepare {made}/store --out {tmp}/voxels --kept 0 | kept
prepare {made}/store --out {tmp}/voxels --split nothing | nothing
prepare {made}/rows --out {tmp}/voxels | rows
predict {made}/POSCAR --checkpoint {run}/model --out {bad}/letter.txt/x.cube --grid 4 4 4 | letter.txt/x.cube
evaluate {made}/store --checkpoint {run}/model --out {bad}/letter.txt | letter.txt
evaluate {made}/rows --checkpoint {run}/model --out {tmp}/scores | rows
demo --out {bad}/letter.txt | letter.txt

tokenize {made}/store --out {tmp}/rows --split holiday | holiday validation
tokenize {made}/store --out {tmp}/rows --split test | test
evaluate {made}/store --checkpoint {run}/model --out {tmp}/scores --split holiday | holiday validation
evaluate {made}/store --checkpoint {run}/model --out {tmp}/scores --split test | test
train --out {tmp}/run | DATA --label
train {made}/rows | --out
train {made}/rows --out s3://bucket/run | remote
train {made}/rows --out {tmp}/run --schedule linear | linear
train {made}/rows --out {tmp}/run --optimizer sgd | sgd
train {made}/rows --out {tmp}/run --emd 2 | emd 1
train {made}/rows --out {tmp}/run --val-seqs 7000 | 7000
train {made}/rows --out {tmp}/run --device tpu | tpu
train {made}/rows --out {tmp}/run --shard | torchrun
"""


@pytest.mark.parametrize("line", [line for line in WRONG.splitlines() if line])
def test_a_wrong_word_is_one_sentence(tomat, tmp_path, made, bad, monkeypatch, line):
    command, words = line.split("|")
    names = {"made": made, "bad": bad, "tmp": tmp_path / "new", "run": made / "run", "salt": made / "CHGCAR.salt"}
    monkeypatch.chdir(tmp_path)
    with nothing_changes(tmp_path, made, bad):
        is_one_sentence(tomat(*[word.format(**names) for word in command.split()]), *words.split())


@pytest.mark.parametrize("package, extra, line", [
    ("pyarrow", "train", "tokenize {store} --out {out}"), ("transformers", "train", "train {rows} --out {out} --size nano"),
    ("granian", "serve", "serve --port 1")])
def test_a_missing_extra_is_named(tmp_path, made, package, extra, line):
    "`pip install tomat` alone predicts; what the other commands need comes with an extra."
    words = line.format(out=tmp_path / "out", rows=made / "rows", store=made / "store").split()
    code = f"import sys; sys.modules['{package}'] = None; sys.argv[1:] = {words}; from tomat.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (
        2, f"tomat: {package} is not installed: pip install 'tomat[{extra}]'."), done.stderr
    assert not (tmp_path / "out").exists()


def test_numbers_are_read_without_pyarrow(tmp_path):
    "More slowly, and to the same bytes."
    write_density(sample_store().read("gp-00545"), tmp_path / "CHGCAR")
    code = "import tomat; from hashlib import md5; print(md5(tomat.read('CHGCAR').total.tobytes()).hexdigest())"
    sums = [subprocess.check_output([sys.executable, "-c", f"import sys; {hidden}{code}"], text=True, cwd=tmp_path)
            for hidden in ("", "sys.modules['pyarrow'] = None; ")]
    assert sums[0] == sums[1] and len(sums[0]) == 33


@pytest.mark.parametrize("line", ["paint", "info", "info a b", "info a --colour", "tokenize x", "predict x", "train x",
                                  "predict POSCAR --grid 4 4", "tokenize x --out y --patch-size three",
                                  "train x --out y --lr fast"])
def test_a_wrong_command_has_exit_code_2(tomat, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    done = tomat(*line.split())
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


# What is refused: damaged folders


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def zeros(path, at):
    "Twenty zeros somewhere in a file, counted from its end where negative."
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at:at + 20] = bytes(20)
    path.write_bytes(content)


def edited(path, **changes):
    "Change entries of a JSON file; None removes one."
    old = read_json(path) | changes
    path.write_text(json.dumps({key: value for key, value in old.items() if value is not None}))


def with_rows(path, ids):
    "Replace the rows of a shard."
    table = pq.read_table(path)
    pq.write_table(table.set_column(4, table.schema.field(4), pa.array([ids] * len(table), pa.list_(pa.int32()))), path)


SHARD = "rows-00000.parquet"
ROWS_DAMAGE: dict[str, Any] = {
    "cut": lambda f: cut(f / SHARD), "empty": lambda f: (f / SHARD).write_bytes(b""), "missing": lambda f: (f / SHARD).unlink(),
    "header": lambda f: zeros(f / SHARD, 100), "page": lambda f: zeros(f / SHARD, 300), "footer": lambda f: zeros(f / SHARD, -300),
    "end": lambda f: zeros(f / SHARD, -10), "columns": lambda f: pq.write_table(pa.table({"a": [1]}), f / SHARD),
    "fewer rows": lambda f: pq.write_table(pq.read_table(f / SHARD).slice(0, 5), f / SHARD),
    "ids": lambda f: with_rows(f / SHARD, [1, 99_999_999, 2]), "no ids": lambda f: with_rows(f / SHARD, []),
    "null ids": lambda f: with_rows(f / SHARD, None),
    **{f"meta {text or 'empty'}": lambda f, text=text: (f / "meta.json").write_text(text) for text in ("", "{", "[]", "{}", "3")},
    **{f"no {key}": lambda f, key=key: edited(f / "meta.json", **{key: None}) for key in ("format", "shards", "tokenizer", "rows")},
    "form": lambda f: edited(f / "meta.json", format="tomat-rows-9"), "no shards": lambda f: edited(f / "meta.json", shards=[]),
    "tokenizer": lambda f: edited(f / "meta.json", tokenizer=3), "settings": lambda f: edited(f / "meta.json", tokenizer={}),
}


@pytest.mark.parametrize("damage", ROWS_DAMAGE)
def test_damaged_rows_are_refused(tomat, tmp_path, made, damage):
    shutil.copytree(made / "rows", tmp_path / "rows")
    ROWS_DAMAGE[damage](tmp_path / "rows")
    for command in (["show-tokens", tmp_path / "rows", "--row", 6], ["show-tokens", tmp_path / "rows" / SHARD, "--row", 6],
                    ["train", tmp_path / "rows", "--out", tmp_path / "run", "--steps", 1]):
        if command[0] == "show-tokens" and damage == "no shards" and str(command[1]).endswith(SHARD):
            continue  # a shard can be shown where meta.json does not list it
        with nothing_changes(tmp_path):
            is_one_sentence(tomat(*command), "rows")
    with nothing_changes(tmp_path):
        seen = tomat("verify", tmp_path / "rows")
    assert seen.code in (1, 2) and seen.out + seen.err and "all is well" not in seen.out


def test_a_folder_of_calculations_goes_all_the_way(tomat, tmp_path, made):
    """CHGCARs in folders, to a store, to levels, to rows, to a checked copy."""
    for name in ("salt", "metal"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(made / f"CHGCAR.{name}", tmp_path / "runs" / name / "CHGCAR")
    done = tomat("convert", tmp_path / "runs", tmp_path / "store")
    assert done.code == 0 and "2" in done.out, done.err
    assert (tmp_path / "store" / "mp_filelist.txt").read_text().split() == ["metal", "salt"]
    fit = tomat("fit-codec", tmp_path / "store", "--levels", 64, "--unit", "e/Å³", "--out", tmp_path / "c.npz", "--json")
    assert fit.code == 0 and json.loads(fit.out)["levels"] == 64, fit.err
    for source in ("runs", "store"):
        done = tomat("tokenize", tmp_path / source, "--density-codec", tmp_path / "c.npz", "--out", tmp_path / f"{source}-rows",
                     *ROWS, "--json")
        assert done.code == 0 and json.loads(done.out)["materials"] == 2, done.err
    meta = read_json(tmp_path / "store-rows" / "meta.json")
    assert meta["tokenizer"]["unit"] == "e/Å³"
    for i in range(2):
        assert tomat("tokenize", tmp_path / "store", "--out", tmp_path / "parts", "--worker", f"{i}/2", *ROWS).code == 0
    assert tomat("verify", tmp_path / "parts") == Done(0, f"{tmp_path}/parts: all is well\n", "")
    assert json.loads(tomat("sync", tmp_path / "parts", tmp_path / "copy", "--json").out)["copied"] > 0
    assert tomat("sync", tmp_path / "parts", tmp_path / "copy").code == 0 and tomat("verify", tmp_path / "copy").code == 0
    is_one_sentence(tomat("tokenize", tmp_path / "store", "--density-codec", tmp_path / "c.npz", "--target", "difference", "--out",
                          tmp_path / "no", *ROWS), "c.npz", "total", "difference")


def test_verify(tomat, made):
    assert tomat("verify", made / "rows") == Done(0, f"{made}/rows: all is well\n", "")
    assert json.loads(tomat("verify", made / "rows", "--json").out)["faults"] == []
    assert tomat("verify", made / "store") == Done(0, f"{made}/store: all is well\n", "")
    is_one_sentence(tomat("verify", made / "run"), "run", "tokenize")


MODEL_DAMAGE: dict[str, Any] = {
    "weights cut": lambda f: cut(f / "model.safetensors"), "weights empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "weights of text": lambda f: (f / "model.safetensors").write_text("Dear reader,\n" * 20),
    "weights gone": lambda f: (f / "model.safetensors").unlink(), "weights header": lambda f: zeros(f / "model.safetensors", 9),
    "weights NaN": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4000] + b"\xff" * 4000),
    **{f"{name} {text or 'empty'}": lambda f, name=name, text=text: (f / f"{name}.json").write_text(text)
       for name in ("tomat", "config") for text in ("", "{", "[]", "{}", "3")},
    "tomat.json gone": lambda f: (f / "tomat.json").unlink(), "config.json gone": lambda f: (f / "config.json").unlink(),
    "tokenizer": lambda f: edited(f / "tomat.json", tokenizer=3), "settings": lambda f: edited(f / "tomat.json", tokenizer={}),
    "layout": lambda f: edited(f / "tomat.json", tokenizer=read_json(f / "tomat.json")["tokenizer"] | {"layout": "anchored"}),
    "layers": lambda f: edited(f / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2),
    "width": lambda f: edited(f / "config.json", hidden_size=64), "type": lambda f: edited(f / "config.json", head_dim="wide"),
}


@pytest.mark.parametrize("damage", MODEL_DAMAGE)
def test_a_damaged_checkpoint_is_refused(tomat, tmp_path, made, damage, monkeypatch):
    shutil.copytree(made / "run/model", tmp_path / "model")
    MODEL_DAMAGE[damage](tmp_path / "model")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, in_use + 2**31):  # without its config.json it would be a model of 8 B parameters
        line = ["predict", made / "POSCAR", *GRID, "--checkpoint", tmp_path / "model", "--out", tmp_path / "x.cube"]
        with nothing_changes(tmp_path):
            is_one_sentence(tomat(*line), "model")


STATE = "states/step-00000003/state.pt"


@pytest.mark.parametrize("name, text", [(STATE, None), (STATE, ""), (STATE, "Dear reader,\n"), (STATE, "{}"), ("config.json", "{"),
                                        ("log.jsonl", "Dear reader,\n"), ("log.jsonl", "{}\n"), ("log.jsonl", "")])
def test_a_damaged_run_is_refused(tomat, tmp_path, made, name, text):
    shutil.copytree(made / "run", tmp_path / "run")
    cut(tmp_path / "run" / name) if text is None else (tmp_path / "run" / name).write_text(text)
    before = tree(tmp_path / "run" / "model")
    is_one_sentence(tomat("train", made / "rows", "--out", tmp_path / "run", "--steps", 3, "--batch-size", 2), f"run/{name}")
    assert tree(tmp_path / "run" / "model") == before and not list(tmp_path.rglob(".partial-*"))


def test_a_damaged_material_of_a_store_is_named(tomat, tmp_path, made):
    shutil.copytree(made / "store", tmp_path / "store")
    cut(next((tmp_path / "store/label/metal.zarr/charge_density_total").rglob("c/0/0/0")))
    done = tomat("tokenize", tmp_path / "store", "--out", tmp_path / "rows", *ROWS)
    assert done.code == 1 and "passed over metal: " in done.err and "metal.zarr" in done.err and "Traceback" not in done.err
    (tmp_path / "store/split.json").write_text('{"train": [7]}')
    with nothing_changes(tmp_path):
        is_one_sentence(tomat("tokenize", tmp_path / "store", "--out", tmp_path / "rows", *ROWS), "store", "split")


def test_what_a_row_cannot_hold_is_skipped_and_named(tomat, tmp_path, made):
    good = read_density(made / "CHGCAR.salt")
    cell = Lattice.cubic(4)
    others = [Density(np.ones((1, 1, 1200)), good.structure, id="long"),
              Density(np.ones((4, 4, 4)), Structure(cell, [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]]), id="shared"),
              Density(np.ones((4, 4, 4)), Structure(cell, ["Tc"], [[0, 0, 0]]), id="no-atom")]
    ids = ["long", "shared", "no-atom", "salt"]
    write_store([*others, good], {"train": ids}, tmp_path / "store")
    for target, skipped in (("total", ids[:2]), ("difference", ids[:3])):
        done = tomat("tokenize", tmp_path / "store", "--out", tmp_path / target, "--target", target, "--atoms", "packaged", *ROWS)
        assert done.code == 0, done.err
        meta = read_json(tmp_path / target / "meta.json")
        assert sorted(meta["skipped"]) == sorted(skipped) and "1200" in meta["skipped"]["long"] and "salt" in meta["materials"]


def test_a_run_that_failed_can_be_started_again_with_better_options(tomat, tmp_path, made):
    train = ("train", made / "rows", "--out", tmp_path / "run", "--steps", 3, "--batch-size", 2)
    is_one_sentence(tomat(*train, "--lr", "1e10"), "learning rate")
    assert tomat(*train, "--lr", "1e-3").code == 0


# A machine that does not do what it should


@pytest.mark.parametrize("limit", [20_000, 5_000_000])
def test_a_file_that_cannot_grow_is_one_sentence(tomat, tmp_path, made, limit):
    """20 kB stop every writer; 5 MB let the model of a training run pass, and stop the state beside it."""
    place = tmp_path / "new"
    lines = [["convert", NACL, place / "x.zarr"], ["convert", NACL, place / "CHGCAR"],
             ["tokenize", NACL, "--atoms", "packaged", "--out", place / "rows"]]
    lines += [["train", made / "rows", "--out", place / "run", "--steps", 1, "--batch-size", 1]]
    for line in lines[3 * (limit > 100_000):]:
        with limited(resource.RLIMIT_FSIZE, limit):
            done = tomat(*line)
        is_one_sentence(done, place)
    assert {p.relative_to(place).as_posix() for p in place.rglob("*")} <= {
        "run", "run/config.json", "run/log.jsonl", "run/states", "run/states/atoms.json"}


def test_weights_that_do_not_fit_are_one_sentence(tmp_path, made):
    model, tokenizer = load_checkpoint(made / "run/model")
    with limited(resource.RLIMIT_FSIZE, 1_000_000), pytest.raises(TomatError, match=r"model cannot be written.*[^.]\.$"):
        save_checkpoint(model, tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import contextlib, io, json, os, sys
from tomat import cli
done = []
for line in json.loads(sys.argv[1]):
    sys.argv, err, code = ["tomat", *line], io.StringIO(), 0
    with contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    done.append([code, err.getvalue(), os.listdir("disk")])
print(json.dumps(done))
"""


def test_a_full_disk_is_one_sentence(tmp_path, made):
    """On a file system of 64 kB, in a mount namespace of its own, where the machine lets the user have one."""
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs disk && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    names = ["x.zarr", "x.zarr.zip", "CHGCAR", "x.cube", "x.json.gz"]
    lines = [["convert", str(NACL), f"disk/{name}"] for name in names]
    lines += [["tokenize", str(NACL), "--atoms", "packaged", "--out", "disk/rows"]]
    run = subprocess.run([*mount, sys.executable, "-c", FULL_DISK, json.dumps(lines)], cwd=tmp_path, capture_output=True, text=True,
                         check=True)
    for (code, err, left), name in zip(json.loads(run.stdout), [*names, "rows"], strict=True):
        is_one_sentence(Done(code, "", err), f"disk/{name}", "No space left")
        assert left == []


def test_two_runs_into_one_folder_leave_one_whole_folder(tmp_path, made):
    options = ["--out", tmp_path / "rows", "--overwrite", "--patch-size", 8, "--pad-to", 0, "--patches-per-material", 100]
    runs = [process("tokenize", made / f"CHGCAR.{name}", *options) for name in ("salt", "oxide")]
    done = [finished(run) for run in runs]
    for one in done:
        assert one.code == 0 or is_one_sentence(one, "rows") is None
    assert 0 in [one.code for one in done]
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]
    meta = read_json(tmp_path / "rows" / "meta.json")
    assert set(pq.read_table(tmp_path / "rows" / SHARD)["task_id"].to_pylist()) == set(meta["materials"]) and meta["rows"] == 100


def test_a_folder_without_permission_is_one_sentence(tomat, tmp_path, made):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with nothing_changes(tmp_path):
        for line in (["convert", NACL, folder / "x.zarr"], ["tokenize", made / "CHGCAR.salt", "--out", folder / "rows", *ROWS]):
            is_one_sentence(tomat(*line), folder)


@pytest.mark.parametrize("name", ["a b.zarr", "ρ–Å³.vasp", "[x]{y}%s.json.gz", "-n.cube", "'quote\".zarr.zip", "tab\there.chgcar"])
def test_names_of_any_kind(tomat, tmp_path, made, name):
    electrons = read_density(made / "CHGCAR.salt").n_electrons
    for place in (tmp_path / name, tmp_path / "a folder [bold] {0} ß" / name):
        assert tomat("convert", made / "CHGCAR.salt", place) == Done(0, "", "")
        assert json.loads(tomat("info", place, "--json").out)["electrons"] == pytest.approx(electrons, rel=1e-4)
        is_one_sentence(tomat("info", f"{place}.missing.zarr"), name)


@pytest.mark.parametrize("raised, code, words", [
    (KeyboardInterrupt(), 130, "stopped"), (MemoryError("Unable to allocate 7.45 GiB for an array"), 2, "memory 7.45 GiB"),
    (OSError(5, "Input/output error", "x.cube"), 2, "x.cube Input/output"),
    (PermissionError(13, "Permission denied", "x.cube"), 2, "x.cube denied")])
def test_what_the_machine_raises_is_one_sentence(tomat, monkeypatch, raised, code, words):
    def fails(*args):
        raise raised
    monkeypatch.setattr(formats, "read_density", fails)
    done = tomat("info", "x.cube")
    assert done.code == code
    is_one_sentence(Done(2, done.out, done.err), *words.split())


def test_a_terminal_without_special_letters(made, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["tomat", "show-tokens", str(made / "CHGCAR.salt")])
    with suppress(SystemExit):
        cli.main()
    out.flush()
    assert out.buffer.getvalue().startswith(b"[BOS]\n") and b"[EOS]\n[PAD]" in out.buffer.getvalue()


def test_a_terminated_run_leaves_whole_shards(tmp_path, made):
    """As a batch system stops a job, or `timeout` a command."""
    place = tmp_path / "new"
    line = ["tokenize", sample_store().root, "--split", "all", "--out", place / "rows", "--patches-per-material", 1024]
    run = process(*line, "--pad-to", 0, "--patch-size", 8)
    while not list(place.glob("rows/rows-*.parquet")):
        assert run.poll() is None, finished(run)
    run.send_signal(signal.SIGTERM)
    done = finished(run)
    assert done.code == 143 and "Traceback" not in done.err
    left = {p.name for p in (place / "rows").iterdir()}
    shards = {name for name in left if name.endswith(".parquet")}
    notes = {name.replace("parquet", "json") for name in shards}
    assert shards and left <= {"unfinished.json"} | shards | notes and "unfinished.json" in left
    for name in shards:
        assert pq.read_table(place / "rows" / name).num_rows == 1024


def test_output_into_a_closed_pipe_is_no_traceback(made):
    read, write = os.pipe()
    os.close(read)
    line = [TOMAT, "show-tokens", made / "CHGCAR.salt", "--full"]
    started = subprocess.Popen(line, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert started.communicate(timeout=60)[1] == ""


def test_train_takes_its_options_from_variables(tomat, tmp_path, made, monkeypatch):
    for name, value in {"STEPS": 3, "BATCH_SIZE": 2, "SEED": 5, "MODEL": "nano", "VAL_SEQS": 2, "LR": 1e-3, "SCHEDULE": "wsd",
                        "LABEL": "rows", "RESULTS_LABEL": "first", "TOKEN_STORE": made}.items():
        monkeypatch.setenv(f"TOMAT_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    assert tomat("train") == Done(0, "runs/first/model\n", "")
    config = json.loads((tmp_path / "runs/first/config.json").read_text())["config"]
    assert [config[key] for key in ("steps", "batch_size", "seed", "val_seqs", "lr", "schedule")] == [3, 2, 5, 2, 1e-3, "wsd"]
    assert tomat("train", "--steps", 4, "--out", "other").code == 0  # what is given wins
    assert len((tmp_path / "other/log.jsonl").read_text().splitlines()) == 4
    monkeypatch.setenv("TOMAT_STEPS", "many")
    is_one_sentence(tomat("train"), "variable TOMAT_STEPS is 'many', ")
    monkeypatch.setenv("TOMAT_EVAL_MATERIALS", "few")
    is_one_sentence(tomat("train", "--steps", 4), "variable TOMAT_EVAL_MATERIALS is 'few', ")
    assert "--steps" in tomat("train", "--steps", "some").err  # given as an option


def test_a_damaged_run_is_passed_over_and_named(tomat, tmp_path, made):
    is_one_sentence(tomat("runs", made / "store"), made / "store", "holds no run")
    shutil.copytree(made / "run", tmp_path / "runs/good")
    shutil.copytree(made / "run", tmp_path / "runs/bad")
    (tmp_path / "runs/bad/log.jsonl").write_text('{"step": 7}\n')
    for form in ((), ("--json",)):
        done = tomat("runs", tmp_path / "runs", *form)
        assert done.code == 1 and "good" in done.out and "3/3" in done.out and "bad" not in done.out
        assert done.err.startswith(f"tomat: passed over {tmp_path}/runs/bad: ") and "damaged in line 1" in done.err


def test_info_counts_a_store_and_a_data_set(tomat, tmp_path, made):
    write_store([read_density(made / "CHGCAR.salt")], {}, tmp_path / "x.zip")
    found = {name: json.loads(tomat("info", path, "--json").out) for name, path in
             {"store": made / "store", "rows": made / "rows", "zip": tmp_path / "x.zip"}.items()}
    assert found["store"] == {"content": "densities", "materials": 3, "train": 2, "validation": 1, "test": 0}
    assert found["rows"]["content"] == "rows of tokens" and (found["rows"]["materials"], found["rows"]["rows"]) == (2, 8)
    assert found["zip"]["materials"] == 1
    is_one_sentence(tomat("info", made), made)


def test_a_worker_without_materials_says_so(tomat, tmp_path, made):
    said = [tomat("tokenize", made / "CHGCAR.salt", "--out", tmp_path / "rows", "--worker", f"{i}/2", *ROWS) for i in (0, 1)]
    assert [done.code for done in said] == [0, 0]
    assert sorted("has no material" in done.err for done in said) == [False, True]


PROBE = ("--steps", 3, "--materials", 2, "--voxels", 10, "--warmup", 1, "--levels", 16, "--kept", 100)


def test_densities_train_a_probe_network(tomat, tmp_path, made):
    "From a store by one command; resumed, listed, and read by predict."
    done = tomat("train", made / "store", "--out", tmp_path / "runs/probe", *PROBE)
    assert done == Done(0, f"{tmp_path}/runs/probe/model\n", done.err) and done.err.startswith("tomat: The packaged atoms are used")
    config = json.loads((tmp_path / "runs/probe/config.json").read_text())
    assert config["config"]["size"] == "S" and (config["data"]["ids"], config["data"]["held_out"]) == (["salt", "metal"], ["oxide"])
    log = (tmp_path / "runs/probe/log.jsonl").read_bytes()
    again = tomat("train", made / "store", "--out", tmp_path / "runs/probe", *PROBE, "--decoder", "probe")
    assert again == Done(0, done.out, "") and (tmp_path / "runs/probe/log.jsonl").read_bytes() == log  # no density was read again
    (run,) = json.loads(tomat("runs", tmp_path / "runs", "--json").out)["runs"]
    assert (run["decoder"], run["size"], run["unit"], run["count"]) == ("probe", "S", "voxels", 60) and run["finished"]
    done = tomat("runs", tmp_path / "runs")
    assert "60 voxels" in done.out and "tokens" not in done.out
    model = ("--checkpoint", tmp_path / "runs/probe/model")
    assert tomat("predict", made / "POSCAR", *GRID, *model, "--out", tmp_path / "CHGCAR").code == 0


def test_prepared_voxels_train_the_same_network(tomat, tmp_path, made):
    "As the run that draws its voxels itself; two workers of tomat prepare make the voxels of one."
    voxels = ("--kept", 100, "--atoms", "packaged", "--workers", 1)
    done = tomat("prepare", made / "store", "--out", tmp_path / "train", *voxels, "--json")
    result = json.loads(done.out)
    assert done.err == "" and (result["voxels"], result["materials"], result["skipped"]) == (200, 2, [])
    for worker in ("0/2", "1/2"):
        assert tomat("prepare", made / "store", "--out", tmp_path / "parts", *voxels, "--worker", worker).code == 0
    assert tomat("prepare", made / "store", "--out", tmp_path / "val", *voxels, "--split", "validation").code == 0
    options = [*PROBE[:-2], "--val", tmp_path / "val"]
    for name in ("train", "parts"):
        assert tomat("train", tmp_path / name, "--out", tmp_path / f"run-{name}", *options).code == 0
    assert tomat("train", made / "store", "--out", tmp_path / "run-store", *PROBE, "--atoms", "packaged").code == 0
    weights = {(tmp_path / f"run-{name}/model/model.safetensors").read_bytes() for name in ("train", "parts", "store")}
    assert len(weights) == 1
    is_one_sentence(tomat("train", tmp_path / "train", "--out", tmp_path / "x", "--kept", 7), "--kept", "tomat prepare")
    is_one_sentence(tomat("train", tmp_path / "train", "--out", tmp_path / "x", "--atoms", "fit"), "--atoms", "train")
    is_one_sentence(tomat("train", tmp_path / "train", "--out", tmp_path / "x", "--val", made / "store"), "store", "prepare")


def test_atoms_are_fitted_where_the_packaged_ones_are_wrong(tomat, tmp_path, made):
    "Sodium without its semicore electrons, as VASP has it: the sentence says so, and the fitted atoms lie beside the voxels."
    from tomat.atoms.sad import load_atoms
    store = RawStore(made / "store")
    salt = store.read("salt")
    write_store([replace(salt, values=salt.values * np.float32(8 / salt.n_electrons))], {}, tmp_path / "vasp")
    done = tomat("train", tmp_path / "vasp", "--out", tmp_path / "run", *PROBE)
    assert done.code == 0 and "fitted" in done.err, done.err
    atoms = load_atoms(tmp_path / "run/voxels/atoms.json")
    assert sum(atoms[symbol].n_valence for symbol in ("Na", "Cl")) == pytest.approx(8, abs=1e-3)
    assert tomat("train", tmp_path / "vasp", "--out", tmp_path / "run", *PROBE) == Done(0, done.out, "")


def test_two_processes_train_the_network_of_one(tmp_path, made):
    "Of densities: the first process chooses the atoms and draws the voxels, and says so once."
    store, losses = RawStore(made / "store"), []
    write_store([replace(store.read(id), values=store.read(id).values * np.float32(0.5)) for id in ("salt", "metal")], {},
                tmp_path / "half")  # with half the electrons, so that atoms are fitted
    for n in (1, 2):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, "-m", "tomat.cli", "train",
                tmp_path / "half", "--out", tmp_path / str(n), *PROBE, "--device", "cpu"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        for said in (1, 0):  # trained, then found finished by all processes
            done = subprocess.run(list(map(str, line)), env=env, text=True, capture_output=True, timeout=300)
            assert done.returncode == 0 and done.stdout == f"{tmp_path}/{n}/model\n", done.stderr
            assert done.stderr.count("were fitted to 2 materials") == said, done.stderr
        losses.append([json.loads(line)["loss"] for line in (tmp_path / str(n) / "log.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_validation_densities_come_from_another_source(tomat, tmp_path, made):
    (tmp_path / "train").mkdir()
    for name in ("salt", "metal"):
        shutil.copy(made / f"CHGCAR.{name}", tmp_path / "train" / f"CHGCAR.{name}")
    assert tomat("train", tmp_path / "train", "--out", tmp_path / "run", *PROBE, "--val", made / "store").code == 0
    data = json.loads((tmp_path / "run/config.json").read_text())["data"]
    assert (sorted(data["ids"]), data["held_out"]) == (["metal", "salt"], ["oxide"])
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert last["val"]["loss"] > 0
    is_one_sentence(tomat("train", made / "store", "--out", tmp_path / "x", *PROBE, "--val", made / "CHGCAR.salt"), "salt is in")


def test_a_probe_network_takes_its_options_from_variables(tomat, tmp_path, made, monkeypatch):
    for name, value in {"STEPS": 2, "MATERIALS": 1, "VOXELS": 5, "KEPT": 50, "LEVELS": 8, "DECODER": "probe", "SIZE": "S",
                        "ATOMS": "packaged"}.items():
        monkeypatch.setenv(f"TOMAT_{name}", str(value))
    assert tomat("train", made / "store", "--out", tmp_path / "run").code == 0
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert [config[key] for key in ("steps", "materials", "voxels", "kept")] == [2, 1, 5, 50]
    monkeypatch.setenv("TOMAT_EMD", "0.5")
    is_one_sentence(tomat("train", made / "store", "--out", tmp_path / "run"), "--emd", "TOMAT_EMD", "language model")


def test_a_dry_run_of_a_probe_network(tomat, tmp_path, made):
    from tomat.models.messages import PROBE_SIZES
    from tomat.models.probe import ProbeNet
    parameters = str(sum(p.numel() for p in ProbeNet(PROBE_SIZES["M"]).parameters()))
    with nothing_changes(tmp_path, made):
        done = tomat("train", made / "store", "--dry-run", "--size", "M", "--out", tmp_path / "run")
    assert done.code == 0 and all(word in done.out for word in (parameters, "FLOPs per voxel", "prepared voxels, GB", "M on cpu"))
    assert tomat("train", made / "store", "--out", tmp_path / "first", *PROBE).code == 0
    done = tomat("train", made / "store", "--dry-run", "--out", tmp_path / "run")
    assert done.code == 0 and f"the run in {tmp_path}/first" in done.out and "MFU" not in done.out


def test_a_dry_run_writes_nothing(tomat, tmp_path, made):
    with nothing_changes(tmp_path, made):
        done = tomat("train", made / "rows", "--size", "30M", "--steps", 100, "--dry-run", "--out", tmp_path / "run")
    assert done.code == 0 and all(word in done.out for word in ("parameters", "FLOPs", "memory, all", "tokens", "hours expected"))


def test_runs_are_listed(tomat, tmp_path, made):
    shutil.copytree(made / "run", tmp_path / "runs/one")
    done = tomat("runs", tmp_path / "runs")
    assert done.code == 0 and "one" in done.out and "3/3" in done.out and (tmp_path / "runs/one/loss.png").is_file()
    (run,) = json.loads(tomat("runs", tmp_path / "runs", "--json").out)["runs"]
    assert (run["run"], run["decoder"], run["size"], run["unit"], run["finished"]) == ("one", "causal", "nano", "tokens", True)
    log = tmp_path / "runs/one/log.jsonl"
    log.write_text(re.sub(r', "mfu_real": [^,}]*', "", log.read_text()))  # as of a probe network
    done = tomat("runs", tmp_path / "runs")
    assert done.code == 0 and "3/3" in done.out and "%" not in done.out
    log.write_text("")  # begun, and no step done
    assert tomat("runs", tmp_path / "runs").code == 0
    is_one_sentence(tomat("runs", tmp_path / "nothing"), "nothing")


def test_training_scores_free_running_predictions(tomat, tmp_path, made):
    assert tomat("train", made / "rows", "--out", tmp_path / "run", "--steps", 2, "--batch-size", 2, "--eval-every", 1,
                 "--judge", made / "store", "--judge-materials", 1).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    scores = [line["val"]["nmae"] for line in lines if "val" in line]  # none for a density without electrons
    assert len(lines) == 2 and scores and min(scores) > 0


def test_fit_atoms(tomat, tmp_path):
    "Atoms of rock salt fit it, and `load_atoms` reads the file."
    from tomat.density.metrics import nmae
    from tomat.atoms.sad import load_atoms, sad_density
    done = tomat("fit-atoms", NACL, "--out", tmp_path / "atoms.json", "--voxels", "2000", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["elements"] == 2 and result["materials"] == 1 and result["electrons not determined for"] == []
    atoms, nacl = load_atoms(tmp_path / "atoms.json"), read_density(NACL)
    assert nmae(sad_density(nacl.structure, nacl.shape, atoms), nacl.total) < 0.01
    assert atoms.metadata["source"] == str(NACL) and atoms.metadata["voxels"] == 2000


def test_fit_atoms_scores_held_out_materials_and_is_the_same_for_any_workers(tomat, tmp_path):
    store = sample_store()
    densities = [store.read(id) for id in [*store.split("train")[:4], store.split("train")[0]]]
    splits = {"train": [d.id for d in densities[:4]], "validation": ["held-out"]}
    write_store([*densities[:4], replace(densities[4], id="held-out")], splits, tmp_path / "store")
    texts = []
    for n in (1, 2):
        done = tomat("fit-atoms", tmp_path / "store", "--split", "train", "--out", tmp_path / f"{n}.json", "--voxels", "500",
                     "--workers", n)
        assert done.code == 0 and "held-out materials" in done.out, done.err
        texts.append((tmp_path / f"{n}.json").read_text())
    assert texts[0] == texts[1]


def test_fit_atoms_of_nothing(tomat, tmp_path):
    done = tomat("fit-atoms", tmp_path / "nowhere", "--out", tmp_path / "atoms.json")
    assert done.code == 2 and "does not exist" in done.err and not (tmp_path / "atoms.json").exists()


def test_fidelity_measures_schemes_and_prints_medians(tomat, tmp_path):
    out = tmp_path / "sweep.csv"
    made = tomat("fidelity", NACL, "--only", "fourier@", "--out", out, "--workers", 1)
    assert made.code == 0 and "fourier@25%" in made.out and str(out) in made.out
    head, *lines = out.read_text().splitlines()
    assert head.startswith("mp_id,category,config,tokens,nmae,chi_sq,hellinger,jsd,weighted_mae,seconds,grid,")
    assert {line.split(",")[1] for line in lines} == {"halide"} and all(",fourier@" in line for line in lines)
    result = json.loads(tomat("fidelity", NACL, "--only", "fourier@", "--out", out, "--json").out)
    errors = [line["nmae"] for line in result["schemes"]]
    assert result["lines"] == len(lines) and errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    assert not list(tmp_path.glob("*.parts"))


def test_fidelity_measures_fitted_levels_too(tomat, tmp_path):
    save_levels(fit_levels(read_density(NACL).total, 256), tmp_path / "levels.npz", {"target": "total", "unit": "electrons"})
    done = tomat("fidelity", NACL, "--levels", tmp_path / "levels.npz", "--only", "direct@levels", "--out", tmp_path / "t.csv",
                 "--json")
    (line,) = json.loads(done.out)["schemes"]
    assert line["config"] == "direct@levels" and line["nmae"] < 0.01 and line["tokens"] == 3 + 56**3


def test_fidelity_reports_what_it_could_not_measure(tomat, tmp_path):
    done = tomat("fidelity", NACL, "--only", "Δ table", "--out", tmp_path / "t.csv", "--json")
    assert done.code == 2 and "same setups" in done.err and (tmp_path / "t.csv").exists()
