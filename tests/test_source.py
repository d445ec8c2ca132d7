"""Nothing that looks like a density is dropped without a word, and a store holds what its source holds now."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from crystals import assert_same

from tomat.io.remote import TomatError, list_folder
from tomat.io.files import read_json, write_json, write_text
from tomat.density.formats import read_density, write_density
from tomat.density.source import Fetched, Folder, InMemory, Source, open_source
from tomat.density.convert import store_all
from tomat.density.store import RawStore, write_store


@pytest.fixture
def runs(tmp_path, three):
    "A folder of calculations, one CHGCAR each."
    for density in three:
        write_density(density, tmp_path / "runs" / density.id / "CHGCAR")
    return tmp_path / "runs"


def tree(folder):
    "Content of every file, by its path."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def doubled(density):
    return replace(density, values=2 * density.values)


# What a folder holds


def test_sub_folders_with_dots_and_odd_names_are_read(runs, three):
    for name, file in [("mp-1.2", "CHGCAR"), ("v1.0.gz", "CHGCAR.gz"), ("x.cube", "CHGCAR"), ("relaxed", "CHGCAR.relaxed"),
                       ("first", "CHGCAR_1"), ("CHGCAR", "chgcar")]:
        write_density(three[0], runs / name / file)
    source = Folder(runs)
    assert source.ids == ["CHGCAR", "first", "m-1", "m-2", "m-3", "mp-1.2", "relaxed", "v1.0.gz", "x.cube"]
    assert source.skipped == {} and all(source.read(id).id == id for id in source.ids)


def test_what_is_skipped_has_a_reason(runs, three):
    write_density(three[0], runs / "nested" / "relax" / "CHGCAR")
    for name in ("CHGCAR.1", "CHGCAR.2"):
        write_density(three[0], runs / "two" / name)
    write_density(three[0], runs / "m-1" / "CHGCAR.old")
    write_density(three[0], runs / "CHGCAR.good")
    write_density(three[0], runs / "AECCAR0.good")
    (runs / "custodian.json").write_text('[{"job": {"data": {}}}]')
    (runs / "custodian.json.gz").write_bytes(gzip.compress(b'{"corrections": []}'))
    (runs / "POSCAR.vasp").write_text(three[0].structure.to(fmt="poscar"))
    (runs / "INCAR").write_text("NSW = 0")
    source = Folder(runs)
    assert source.ids == ["good", "m-1", "m-2", "m-3"]
    assert source.skipped == {
        "AECCAR0.good": "a part of the density beside it", "INCAR": "a name of no known format",
        "POSCAR.vasp": "no density by its first lines", "custodian.json": "no density by its first lines",
        "custodian.json.gz": "no density by its first lines", "m-1/CHGCAR.old": "beside a CHGCAR",
        "nested": "no CHGCAR of its own", "two": "several CHGCARs in it, none of them with that name alone"}


def test_pipes_and_broken_links_are_skipped(runs, three):
    (runs / "pipes").mkdir()
    for name in ("p.cube", "p.json", "CHGCAR.p", "p.zarr", "p.txt", "pipes/CHGCAR", "m-1/CHGCAR.p"):
        os.mkfifo(runs / name)
    (runs / "lost.cube").symlink_to(runs / "nowhere")
    (runs / "CHGCAR.linked").symlink_to(runs / "m-1" / "CHGCAR")
    (runs / "m-4").symlink_to(runs / "m-2")
    write_density(three[0], runs / "g.zarr")
    os.mkfifo(runs / "g.zarr" / "pipe")
    source, no = Folder(runs), "a pipe, a device or a broken link"
    assert source.ids == ["linked", "g", "m-1", "m-2", "m-3", "m-4"]
    assert source.skipped == {
        "CHGCAR.p": no, "lost.cube": no, "m-1/CHGCAR.p": no, "p.cube": no, "p.json": no, "p.txt": "a name of no known format",
        "p.zarr": no, "pipes": "no CHGCAR of its own", "pipes/CHGCAR": no}
    assert store_all(source, runs.parent / "store") == 6 and store_all(source, runs.parent / "store") == 0
    for name in ("p.cube", "p.json", "CHGCAR.p", "p.zarr"):
        with pytest.raises(TomatError, match=rf"{name} is a pipe or a device: give a file\.$"):
            open_source(runs / name).read(open_source(runs / name).ids[0])


def test_names_that_are_no_text_are_skipped(runs, three):
    def odd(name):
        return os.fsdecode(b"\xff" + name)
    for name in (odd(b".cube"), odd(b"/CHGCAR"), odd(b".zarr"), f"m-1/CHGCAR.{odd(b'')}"):
        write_density(three[0], runs / name)
    (runs / odd(b".txt")).write_text("")
    source, no = Folder(runs), "a name that is not UTF-8"
    assert source.ids == ["m-1", "m-2", "m-3"]
    assert source.skipped == {r"'\udcff.cube'": no, r"'\udcff'": no, r"'\udcff.zarr'": no, r"'\udcff.txt'": no,
                                  r"'m-1/CHGCAR.\udcff'": no}
    assert store_all(source, runs.parent / "store") == 3
    with pytest.raises(TomatError, match=r"udcff\.cube' gives a name that is not UTF-8: rename it\.$") as raised:
        open_source(runs / odd(b".cube")).ids  # noqa: B018
    assert str(raised.value).isascii()
    with pytest.raises(TomatError, match="not UTF-8"):  # the folder would give its name to the CHGCAR in it
        open_source(runs / odd(b"")).ids  # noqa: B018


def test_the_folder_of_one_calculation(tmp_path, three):
    run = tmp_path / "Fe O.2"
    for name in ("CHGCAR", "AECCAR0", "AECCAR2", "PARCHG.0001"):
        write_density(three[0], run / name)
    (run / "custodian.json").write_text("[]")
    source = Folder(run)
    assert source.ids == ["Fe O.2"] and source.paths["Fe O.2"].endswith("/CHGCAR")
    assert sorted(source.skipped) == ["AECCAR0", "AECCAR2", "PARCHG.0001", "custodian.json"]
    (run / "CHGCAR").unlink()
    with pytest.raises(TomatError, match=r"AECCAR2 and \S.*AECCAR0 are both called 'Fe O.2': .*\.$"):
        Folder(run).ids  # noqa: B018
    (run / "AECCAR2").unlink()
    assert Folder(run).ids == ["Fe O.2"]  # alone an AECCAR is a density as any; some bands never are
    assert Folder(run).skipped["PARCHG.0001"] == "the density of some bands, no density"


def test_a_chgcar_and_its_packed_copy_are_refused(runs, three):
    write_density(doubled(three[1]), runs / "m-2" / "CHGCAR.gz")
    for folder, words in [(runs, r"m-2 holds CHGCAR and CHGCAR\.gz: "), (runs / "m-2", r"CHGCAR\.gz and \S+CHGCAR are both")]:
        with pytest.raises(TomatError, match=rf"{words}.*\.$"):
            open_source(folder).ids  # noqa: B018


def test_a_damaged_density_is_not_skipped(runs, three):
    write_density(three[0], runs / "task.json")
    content = (runs / "task.json").read_bytes()
    (runs / "task.json").write_bytes(content[:len(content) // 2])
    assert "task" in Folder(runs).ids
    with pytest.raises(TomatError, match=r"task\.json: this is no whole JSON"):
        Folder(runs).read("task")


def test_calculations_in_a_bucket_with_strays(s3, three):
    for i, density in enumerate(three):
        write_density(density, f"{s3}/runs/v{i}.0/CHGCAR.gz")
    write_density(three[0], f"{s3}/runs/task.json.gz")
    write_density(three[0], f"{s3}/runs/x.zarr")
    write_density(three[0], f"{s3}/runs/deep/er/CHGCAR")
    write_text(f"{s3}/runs/custodian.json", "[]")
    source = open_source(f"{s3}/runs/")
    assert source.ids == ["task", "v0.0", "v1.0", "v2.0", "x"]
    assert source.skipped == {"custodian.json": "no density by its first lines", "deep": "no CHGCAR of its own"}
    for id in ("task", "x", "v0.0"):
        assert_same(replace(three[0], id=id), replace(source.read(id), sad=None))


def test_a_bucket_whose_name_begins_as_a_density(s3, three):
    """The open bucket of the Materials Project is a folder called chgcars."""
    for density in three:
        write_density(density, f"{s3}/chgcars/{density.id}.json.gz")
    source = open_source(f"{s3}/chgcars")
    assert source.ids == ["m-1", "m-2", "m-3"] and not source.single


# Whatever the user names


def test_every_name_opens(tmp_path, runs, three, monkeypatch):
    for name in ("one.cube", "one.zarr", "one.zarr.zip", "CHGCAR.one", "one.json"):
        write_density(three[0], tmp_path / name)
        for path in (name, f"{tmp_path}/{name}") + ((f"{name}/",) if name == "one.zarr" else ()):
            monkeypatch.chdir(tmp_path)
            source = open_source(path)
            assert isinstance(source, Folder) and source.single and source.ids == ["one"] and source.skipped == {}
            assert source.read("one").formula == three[0].formula
    write_store(three, {"train": ["m-1"]}, tmp_path / "store.zarr")  # a store, whatever its name
    write_store(three, {}, tmp_path / "store.zip")
    assert all(isinstance(open_source(tmp_path / name), RawStore) for name in ("store.zarr", "store.zip"))
    assert not open_source(runs).single and isinstance(open_source(runs), Source)
    shutil.move(runs, tmp_path / "runs.txt")  # a folder, whatever its name
    assert open_source(tmp_path / "runs.txt").ids == ["m-1", "m-2", "m-3"]


@pytest.mark.parametrize("name, words", [
    ("nowhere", "does not exist"), ("nowhere.cube", "does not exist"), ("no-such-file.gz", "does not exist"),
    ("density.dat", "no known format"), ("letter.txt", "no known format"), ("empty", "holds no density"),
    ("mp-1,mp-", "does not exist")])
def test_what_cannot_be_opened_is_one_sentence(tmp_path, name, words):
    (tmp_path / "density.dat").write_text("1 2 3")
    (tmp_path / "letter.txt").write_text("Dear reader")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TomatError, match=rf"{name} .*{words}.*\.$") as raised:
        open_source(tmp_path / name).ids  # noqa: B018
    assert "\n" not in str(raised.value)


def test_ids_come_from_the_mirror_of_the_environment(tmp_path, three, monkeypatch):
    for density in three:
        write_density(density, tmp_path / "mirror" / f"mp-{density.id[-1]}.json.gz")
    monkeypatch.setenv("TOMAT_MP_BASE_URL", f"{tmp_path}/mirror/")
    monkeypatch.setenv("TOMAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wanted.ids").write_text("mp-3\nmp-1\n")
    for name in ("mp-3,mp-1", tmp_path / "wanted.ids"):
        source = open_source(name)
        assert isinstance(source, Fetched) and source.ids == ["mp-3", "mp-1"]
        np.testing.assert_allclose(source.read("mp-3").values, three[2].values, rtol=1e-6)
    assert store_all(source, tmp_path / "store") == 2 and store_all(source, tmp_path / "store") == 0
    assert RawStore(tmp_path / "store").ids == ["mp-3", "mp-1"]
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "mirror")
    with pytest.raises(TomatError, match="no density of mp-3"):
        source.read("mp-3")


# A store out of any source


def changes(runs, three):
    "Other content of the same size, later; another size; another content with an older time."
    path = runs / "m-2" / "CHGCAR"
    size, old = path.stat().st_size, path.stat().st_mtime
    write_density(replace(three[1], values=three[1].values[::-1]), path)
    assert path.stat().st_size == size
    yield
    path.write_text(path.read_text() + "\n")
    yield
    write_density(three[1], path)
    os.utime(path, (old - 1e6, old - 1e6))
    yield


def test_what_changed_is_written_anew_and_nothing_else(runs, tmp_path, three):
    store = tmp_path / "store"
    groups = [store / "label" / f"m-{n}.zarr" / "zarr.json" for n in (1, 2, 3)]
    assert [store_all(Folder(runs), store) for _ in range(2)] == [3, 0]
    for _ in changes(runs, three):
        before = [path.stat().st_mtime_ns for path in groups]
        assert [store_all(Folder(runs), store) for _ in range(2)] == [1, 0]
        assert [path.stat().st_mtime_ns != at for path, at in zip(groups, before, strict=True)] == [False, True, False]
        np.testing.assert_allclose(RawStore(store).read("m-2").values, Folder(runs).read("m-2").values, rtol=1e-6)


def test_the_groups_do_not_depend_on_times_or_workers(runs, tmp_path, three):
    for name in ("a", "b"):  # b becomes another, and then the same again
        assert store_all(Folder(runs), tmp_path / name) == 3
    write_density(doubled(three[1]), runs / "m-2" / "CHGCAR")
    assert store_all(Folder(runs), tmp_path / "b") == 1
    write_density(three[1], runs / "m-2" / "CHGCAR")
    for path in runs.rglob("CHGCAR"):
        os.utime(path, (1e9, 1e9))
    assert store_all(Folder(runs), tmp_path / "b", workers=2) == 3
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == ["sources.json"]
    assert set(read_json(tmp_path / "a" / "sources.json")) == {"m-1", "m-2", "m-3"}


class Stops(Folder):
    "Killed, as far as its user can see, when it comes to the last material."

    def read(self, id):
        if id == "m-3":
            raise KeyboardInterrupt
        return super().read(id)


def test_a_stopped_run_goes_on_and_forgets_no_change(runs, tmp_path, three):
    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        store_all(Stops(runs), store)
    assert list_folder(store / "label") == ["m-1.zarr", "m-2.zarr"] and not (store / "mp_filelist.txt").exists()
    assert store_all(Folder(runs), store) == 1
    for id in (1, 3):
        write_density(doubled(three[id - 1]), runs / f"m-{id}" / "CHGCAR")
    with pytest.raises(KeyboardInterrupt):
        store_all(Stops(runs), store)
    assert read_json(store / "sources.json")["m-3"] is None
    assert store_all(Folder(runs), store) == 2 and store_all(Folder(runs), store) == 0
    for id in ("m-1", "m-2", "m-3"):
        np.testing.assert_allclose(RawStore(store).read(id).values, Folder(runs).read(id).values, rtol=1e-6)


def test_a_run_that_is_killed_goes_on(tmp_path, three):
    """Two processes, and no time to tidy up."""
    for i in range(40):
        write_density(three[i % 3], tmp_path / "runs" / f"a{i:02}.json")
    code = ("from tomat.density.convert import store_all; from tomat.density.source import Folder; "
            f"store_all(Folder({str(tmp_path / 'runs')!r}), {str(tmp_path / 'store')!r}, 2)")
    running = subprocess.Popen([sys.executable, "-c", code])
    label = tmp_path / "store" / "label"
    while not label.is_dir() or len(list_folder(label)) < 5:
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    time.sleep(0.5)  # its children notice
    there = len(list_folder(label))
    assert 0 < store_all(Folder(tmp_path / "runs"), tmp_path / "store") <= 40 - there
    store_all(Folder(tmp_path / "runs"), tmp_path / "once")
    assert tree(tmp_path / "store") == tree(tmp_path / "once")  # nothing unfinished lies about


def test_sources_without_version_tags_are_written_each_time(tmp_path, three, runs):
    store = tmp_path / "store"
    assert [store_all(InMemory(three), store) for _ in range(2)] == [3, 3]
    assert store_all(InMemory([doubled(one) for one in three]), store) == 3
    np.testing.assert_allclose(RawStore(store).read("m-1").values, 2 * three[0].values, rtol=1e-6)
    assert store_all(Folder(runs), store) == 3
    np.testing.assert_allclose(RawStore(store).read("m-1").values, three[0].values, rtol=1e-6)


def test_densities_of_unknown_origin_are_not_touched(tmp_path, three):
    write_store(three, {}, tmp_path / "published")
    before = tree(tmp_path / "published")
    for source in (InMemory(three), RawStore(tmp_path / "published")):
        with pytest.raises(TomatError, match=r"published has no sources\.json, so .*unknown origin.*\.$"):
            store_all(source, tmp_path / "published")
    assert tree(tmp_path / "published") == before
    (tmp_path / "published" / "sources.json").write_text("[]")
    with pytest.raises(TomatError, match=r"sources\.json is damaged"):
        store_all(InMemory(three), tmp_path / "published")


@pytest.mark.parametrize("name", ["x.cube", "x.json", "x.vasp", "x.zarr", "x.cube.gz", "CHGCAR", "chgcar.all", "AECCAR0"])
def test_a_store_is_not_called_as_a_density(tmp_path, runs, name):
    with pytest.raises(TomatError, match=rf"{name} is a name for one density, and \S+runs makes a store of many: .*\.$"):
        store_all(Folder(runs), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_names_that_are_no_densities(tmp_path, runs):
    for name in ("chgcars", "CHGCARs.2024", "x.zip", "parchgs", "store/"):
        assert store_all(Folder(runs), f"{tmp_path}/{name}") == 3
        assert open_source(f"{tmp_path}/{name}").ids == ["m-1", "m-2", "m-3"]


def test_other_peoples_places_are_refused(tmp_path, runs, three):
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for name, words in [("file", "is a file: give the name of a folder"), ("home", r"holds other files, such as thesis\.tex")]:
        with pytest.raises(TomatError, match=rf"{name} {'' if name == 'file' else 'is a folder that '}{words}"):
            store_all(Folder(runs), tmp_path / name)
    assert list_folder(tmp_path / "home") == ["thesis.tex"]
    with pytest.raises(TomatError, match="ids are names"):
        store_all(InMemory([replace(three[0], id="two words")]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_group_without_an_entry_is_written_again(runs, tmp_path, three):
    """The origins were cut, or come from another store."""
    store = tmp_path / "store"
    for density in three:
        write_density(doubled(density), tmp_path / "other" / density.id / "CHGCAR")
    assert store_all(Folder(tmp_path / "other"), store) == 3
    entries = read_json(store / "sources.json")
    for origins, n in [({}, 3), ({**entries, "m-2": "12 34"}, 1), ({**entries, "m-2": {"written": None}}, 1)]:
        write_json(store / "sources.json", origins)
        assert [store_all(Folder(tmp_path / "other"), store) for _ in range(2)] == [n, 0]
    write_json(store / "sources.json", {"m-1": read_json(store / "sources.json")["m-1"]})
    assert store_all(Folder(runs), store) == 3
    for id in ("m-1", "m-2", "m-3"):
        np.testing.assert_allclose(RawStore(store).read(id).values, Folder(runs).read(id).values, rtol=1e-6)


def test_a_chunk_that_changed_in_the_source_is_noticed(tmp_path, three):
    for density in three:
        write_density(density, tmp_path / "groups" / f"{density.id}.zarr")
    write_store(three, {}, tmp_path / "raw")
    for source, group in [(Folder(tmp_path / "groups"), "m-2.zarr"), (RawStore(tmp_path / "raw"), "label/m-2.zarr")]:
        store, root = tmp_path / f"of {source.root.name}", source.root / group
        assert [store_all(source, store) for _ in range(2)] == [3, 0]
        write_density(doubled(three[1]), tmp_path / "doubled.zarr")
        chunk = root / "charge_density_total" / "c" / "0" / "0" / "0"
        shutil.copy(tmp_path / "doubled.zarr" / chunk.relative_to(root), chunk)
        assert [store_all(source, store) for _ in range(2)] == [1, 0]
        np.testing.assert_allclose(RawStore(store).read("m-2").values, 2 * three[1].values, rtol=1e-6)


def damage(root):
    "Ways a group comes to harm, one after the other; each begins with a whole one."
    chunk = root / "charge_density_total" / "c" / "0" / "0" / "0"
    chunk.unlink()
    yield
    content, details = chunk.read_bytes(), chunk.stat()
    chunk.write_bytes(bytes(len(content)))
    os.utime(chunk, ns=(details.st_atime_ns, details.st_mtime_ns))
    yield
    shutil.rmtree(root / "charge_density_total")
    yield
    (root / "zarr.json").unlink()
    yield
    (root / "charge_density_total" / "zarr.json").write_text("{")
    yield
    shutil.rmtree(root)
    yield
    (root / "charge_density_total" / "stray").write_text("")
    yield


def test_a_damaged_group_is_healed(runs, tmp_path):
    store = tmp_path / "store"
    store_all(Folder(runs), store)
    before = tree(store)
    for _ in damage(store / "label" / "m-2.zarr"):
        assert tree(store) != before
        assert store_all(Folder(runs), store) == 1
        assert tree(store) == before
    for id in ("m-1", "m-3"):
        next(damage(store / "label" / f"{id}.zarr"))
    assert store_all(Folder(runs), store, workers=2) == 2
    assert tree(store) == before


def test_what_a_stopped_run_left_is_looked_at(runs, tmp_path):
    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        store_all(Stops(runs), store)
    (store / "label" / "m-1.zarr" / "charge_density_total" / "c" / "0" / "0" / "0").unlink()
    assert [store_all(Folder(runs), store) for _ in range(2)] == [2, 0]
    assert [RawStore(store).read(id).id for id in ("m-1", "m-2", "m-3")] == ["m-1", "m-2", "m-3"]


def test_other_things_in_a_group_stay(runs, tmp_path):
    store_all(Folder(runs), tmp_path / "store")
    (tmp_path / "store" / "label" / "m-2.zarr" / "notes").write_text("mine")
    with pytest.raises(TomatError, match=r"m-2\.zarr is a folder that holds other files, such as notes: .*\.$"):
        store_all(Folder(runs), tmp_path / "store")
    assert (tmp_path / "store" / "label" / "m-2.zarr" / "notes").read_text() == "mine"


def test_a_group_in_a_bucket_is_followed_and_healed(s3, three):
    from tomat.io.remote import remote_fs
    fs, root = remote_fs(s3)
    chunk = "charge_density_total/c/0/0/0"
    for density in three:
        write_density(density, f"{s3}/groups/{density.id}.zarr")
    source, store = open_source(f"{s3}/groups"), f"{s3}/store"
    assert [store_all(source, store) for _ in range(2)] == [3, 0]
    write_density(doubled(three[1]), f"{s3}/doubled.zarr")
    fs.copy(f"{root}/doubled.zarr/{chunk}", f"{root}/groups/m-2.zarr/{chunk}")
    assert [store_all(source, store) for _ in range(2)] == [1, 0]
    fs.rm_file(f"{root}/store/label/m-1.zarr/{chunk}")
    fs.rm_file(f"{root}/store/label/m-2.zarr/zarr.json")
    fs.pipe_file(f"{root}/store/label/m-3.zarr/{chunk}", b"x")
    assert [store_all(source, store) for _ in range(2)] == [3, 0]
    for id, times in [("m-1", 1), ("m-2", 2), ("m-3", 1)]:
        values = times * three[int(id[-1]) - 1].values
        np.testing.assert_allclose(RawStore(store).read(id).values, values, rtol=1e-5)


def test_what_changed_in_a_bucket_is_written_anew(s3, three):
    for density in three:
        write_density(density, f"{s3}/runs/{density.id}/CHGCAR.gz")
    assert [store_all(open_source(f"{s3}/runs"), f"{s3}/store") for _ in range(2)] == [3, 0]
    write_density(doubled(three[1]), f"{s3}/runs/m-2/CHGCAR.gz")
    assert [store_all(open_source(f"{s3}/runs"), f"{s3}/store") for _ in range(2)] == [1, 0]
    store = open_source(f"{s3}/store")
    np.testing.assert_allclose(store.read("m-2").values, 2 * three[1].values, rtol=1e-5)
    write_text(f"{s3}/file", "x")
    with pytest.raises(TomatError, match="is a file"):
        store_all(open_source(f"{s3}/runs"), f"{s3}/file")


def test_a_store_out_of_a_store_follows_it(tmp_path, three):
    for name in ("a", "a.zip"):
        write_store(three, {"train": ["m-2"]}, tmp_path / name)
        copy = tmp_path / f"{name} unpacked"
        assert [store_all(RawStore(tmp_path / name), copy) for _ in range(2)] == [3, 0]
        assert json.loads((copy / "split.json").read_text()) == {"train": [1]}
        write_store([three[0], doubled(three[1]), three[2]], {"train": ["m-2", "m-3"]}, tmp_path / name)
        assert store_all(RawStore(tmp_path / name), copy) == 3
        assert RawStore(copy).splits == {"train": ["m-2", "m-3"]}
        assert read_density(copy / "label" / "m-2.zarr").values.max() == pytest.approx(2 * three[1].values.max(), rel=1e-6)


def test_sources_without_a_split_have_one_part(runs, three):
    for source in (Folder(runs), InMemory(three), Fetched(["mp-1"])):
        assert isinstance(source, Source) and source.split("all") == source.ids
        with pytest.raises(TomatError, match=r"is not split, so it has no part 'train': .*\.$"):
            source.split("train")
