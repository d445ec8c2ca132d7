"""A store, or any source, becomes a folder of files: whole, resumed, and in step with its source."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from crystals import noise
from tomat.density.convert import store_all
from tomat.density.formats import FORMATS, SUFFIXES, read_density, write_density
from tomat.density.source import InMemory, open_source
from tomat.density.store import RawStore, write_store
from tomat.io.files import read_json
from tomat.io.remote import TomatError, list_folder


@pytest.fixture
def store(tmp_path, three):
    write_store(three, {"train": ["m-1", "m-2"], "validation": ["m-3"]}, tmp_path / "store")
    return tmp_path / "store"


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "sources.json"}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("format", SUFFIXES)
def test_every_format_comes_back_as_it_was(tmp_path, store, three, tomat, kind, format):
    if kind == "zip":
        write_store(three, {}, tmp_path / "store.zip")
        store = tmp_path / "store.zip"
    out = tmp_path / "out"
    for written in ("3", "0"):
        done = tomat("convert", store, out, "--format", format, "--workers", 1)
        assert done.code == 0 and f"written now {written}" in " ".join(done.out.split()), done
    assert sorted(os.listdir(out)) == [*(f"m-{n}{SUFFIXES[format]}" for n in (1, 2, 3)), "sources.json"]
    again = open_source(out)
    assert again.ids == ["m-1", "m-2", "m-3"] and again.skipped.keys() <= {"sources.json"}
    for density in three:
        found = again.read(density.id)
        np.testing.assert_allclose(found.total, density.total, rtol=1e-5, atol=1e-5 * abs(density.total).max())
        np.testing.assert_allclose(found.structure.lattice.matrix, density.structure.lattice.matrix, atol=1e-5)


def test_a_chgcar_keeps_spin_and_occupancies(tmp_path):
    density = replace(noise(np.random.default_rng(1), (4, 5, 6), 2, spin=("diff",), augmented=True), id="m-1", metadata={})
    write_store([density], {}, tmp_path / "store")
    store_all(RawStore(tmp_path / "store"), tmp_path / "out", format="chgcar")
    found = read_density(tmp_path / "out" / "m-1.CHGCAR")
    assert list(found.spin) == ["diff"] and found.augmentation.keys() == density.augmentation.keys() and density.augmentation


def test_a_source_that_changed_or_a_file_that_was_damaged_is_written_again(tmp_path, store, three):
    out, source = tmp_path / "out", RawStore(store)
    assert store_all(source, out, format="chgcar") == 3
    before = stamps(out)
    write_density(replace(three[1], values=2 * three[1].values), store / "label" / "m-2.zarr")
    (out / "m-3.CHGCAR").write_text((out / "m-3.CHGCAR").read_text()[:-40])
    os.remove(out / "m-1.CHGCAR")
    assert [store_all(source, out, format="chgcar") for _ in range(2)] == [3, 0]
    np.testing.assert_allclose(read_density(out / "m-2.CHGCAR").total, 2 * three[1].total, rtol=1e-5)
    assert all(now != before[name] for name, now in stamps(out).items())
    shutil.copytree(out, tmp_path / "moved")  # times change, the content does not
    assert store_all(source, tmp_path / "moved", format="chgcar") == 0


class Stops(RawStore):
    "Killed, as far as its user can see, when it comes to the last material."

    def read(self, id):
        if id == "m-3":
            raise KeyboardInterrupt
        return super().read(id)


def test_a_run_that_was_stopped_goes_on(tmp_path, store):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        store_all(Stops(store), out, format="chgcar")
    before = stamps(out)
    assert set(before) == {"m-1.CHGCAR", "m-2.CHGCAR"}
    (out / ".partial-new-01234567-m-3.CHGCAR").write_text("half a file")
    assert store_all(RawStore(store), out, format="chgcar") == 1
    assert {name: at for name, at in stamps(out).items() if name in before} == before
    with pytest.raises(KeyboardInterrupt):
        store_all(StopsAtOnce([RawStore(store).read("m-1")]), tmp_path / "new" / "out", format="chgcar")
    assert not (tmp_path / "new").exists()  # nothing is left where nothing was written


class StopsAtOnce(InMemory):
    def read(self, id):
        raise KeyboardInterrupt


def test_processes_write_the_same_bytes(tmp_path, store):
    for workers in (1, 2):
        store_all(RawStore(store), tmp_path / str(workers), workers, format="cube")
    assert {p.name: p.read_bytes() for p in (tmp_path / "1").glob("*.cube")} == \
        {p.name: p.read_bytes() for p in (tmp_path / "2").glob("*.cube")}


def test_a_bucket_takes_files_too(s3, store, three):
    assert [store_all(RawStore(store), f"{s3}/files", format="chgcar") for _ in range(2)] == [3, 0]
    assert list_folder(f"{s3}/files") == ["m-1.CHGCAR", "m-2.CHGCAR", "m-3.CHGCAR", "sources.json"]
    np.testing.assert_allclose(open_source(f"{s3}/files").read("m-2").total, three[1].total, rtol=1e-5)


def test_folders_that_must_not_be_written_into(tmp_path, store, three, tomat):
    source = RawStore(store)
    (tmp_path / "mine").mkdir()
    write_density(three[0], tmp_path / "mine" / "m-1.CHGCAR")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").write_text("x")
    store_all(InMemory([replace(three[0], id="other")]), tmp_path / "another", format="chgcar")
    for name, words in [("mine", "has no sources.json, so its densities are of unknown origin"), ("others", "such as thesis.tex"),
                        ("another", "holds densities of other materials"), ("store", "holds other files"),
                        ("x.CHGCAR", "a name for one")]:
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / name).rglob("*")}
        with pytest.raises(TomatError, match=words):
            store_all(source, tmp_path / name, format="chgcar")
        assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / name).rglob("*")}
    for words, why in [(["x.zip", "--format", "chgcar"], "x.zip is an archive, and files need a folder"),
                       (["x", "--format", "pdf"], "The format 'pdf' cannot be written: use one of chgcar, cube"),
                       (["x", "--format", "cube", "--validation", 0.1], "is a folder of files, so no share can be held out")]:
        done = tomat("convert", store, tmp_path / words[0], *words[1:])
        assert done.code == 2 and why in done.err and not (tmp_path / words[0]).exists()


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path, three, tomat):
    for density in three:
        write_density(density, tmp_path / "runs" / density.id / "CHGCAR")
    (tmp_path / "runs" / "m-2" / "CHGCAR").write_text("cut short\n1\n")
    done = tomat("convert", tmp_path / "runs", tmp_path / "out", "--format", "xsf", "--workers", 1)
    assert done.code == 1 and "passed over m-2" in done.err
    assert sorted(os.listdir(tmp_path / "out")) == ["m-1.xsf", "m-3.xsf", "sources.json"]
    assert read_json(tmp_path / "out" / "sources.json")["m-2"] is None
    write_density(three[1], tmp_path / "runs" / "m-2" / "CHGCAR")
    done = tomat("convert", tmp_path / "runs", tmp_path / "out", "--format", "xsf", "--workers", 1)
    assert done.code == 0 and (tmp_path / "out" / "m-2.xsf").exists()
    assert SUFFIXES.keys() == FORMATS.keys()
