"""Stores come back whole, from a folder, an archive or a bucket, or not at all."""

import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from crystals import assert_same, refused

from tomat.io.remote import TomatError, list_folder
from tomat.io.files import write_text
from tomat.density.zarr_group import pack_folder
from tomat.density.formats import write_density
from tomat.density.store import RawStore, is_store, sample_store, write_store


@pytest.mark.parametrize("name", ["store", "store.zip"])
def test_a_store_comes_back(tmp_path, three, name):
    write_store(three, {"train": ["m-1", "m-3"], "validation": ["m-2"], "test": []}, tmp_path / name, readme="Made up.")
    store = RawStore(str(tmp_path / name))
    assert store.ids == ["m-1", "m-2", "m-3"] and store.split("train") == ["m-1", "m-3"] and store.split("test") == []
    for one in three:
        got = store.read(one.id)
        assert_same(one, got)
        np.testing.assert_array_equal(got.sad, one.sad)
    with pytest.raises(TomatError, match="m-9"):
        store.read("m-9")
    with pytest.raises(TomatError, match="it has test, train, validation"):
        store.split("dev")


def test_a_store_made_elsewhere(tmp_path, three):
    """Split under another name, other keys in it, everything inside one more folder of the archive."""
    write_store(three, {}, tmp_path / "a")
    assert not (tmp_path / "a" / "split.json").exists()  # there is no split
    (tmp_path / "a" / "split_limit_22M.json").write_text('{"seed": 42, "train": [2, 0], "validation": [1]}')
    assert RawStore(str(tmp_path / "a")).splits == {"train": ["m-3", "m-1"], "validation": ["m-2"]}
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in (tmp_path / "a").rglob("*"):
            packed.write(path, "top/" + path.relative_to(tmp_path / "a").as_posix())
    store = RawStore(str(tmp_path / "b.zip"))
    assert store.split("train") == ["m-3", "m-1"]
    assert_same(store.read("m-2"), three[1])
    refused(tmp_path / "b.zip", "RawStore")


def test_bad_stores(tmp_path, three):
    for splits, which, words in [({"train": ["m-8"]}, three, "m-8"), ({}, [three[0], three[0]], "used once"),
                                 ({}, [replace(three[0], id="a/b")], "ids are names"), ({}, [], "no density")]:
        for name in ("s", "s.zip"):
            with pytest.raises(TomatError, match=words):
                write_store(which, splits, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    write_store(three, {"train": ["m-1"]}, tmp_path / "s")
    for split, words in (*dict.fromkeys(('{"train": [3]}', '{"train": [-1]}', '{"train": ["m-1"]}', "[1]"), "does not fit").items(),
                         ("{", r"s/split\.json is not valid JSON.*[^.]\.$")):
        (tmp_path / "s" / "split.json").write_text(split)
        with pytest.raises(TomatError, match=words):
            RawStore(str(tmp_path / "s")).split("train")
    (tmp_path / "broken.zip").write_text("no zip")
    for root in ("missing", "broken.zip"):
        with pytest.raises(TomatError, match=root):
            RawStore(str(tmp_path / root)).split("train")


@pytest.mark.parametrize("name", ["s", "s.zip"])
def test_an_id_that_is_listed_twice_is_refused(tmp_path, three, name):
    """Read as it stands, it would be tokenized twice and counted twice in a score."""
    def with_file(file, text):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        write_store(three, {"train": ["m-1"], "validation": ["m-1"]}, tmp_path / "s")
        (tmp_path / "s" / file).write_text(text)
        if name == "s.zip":
            pack_folder(tmp_path / "s", tmp_path / "s.zip")
        return RawStore(tmp_path / name)
    assert with_file("README.md", "").splits == {"train": ["m-1"], "validation": ["m-1"]}  # parts may overlap
    with pytest.raises(TomatError, match=r"s(\.zip)?/mp_filelist\.txt lists m-2 twice: .*\.$"):
        with_file("mp_filelist.txt", "m-1\nm-2\nm-3\nm-2\n").split("all")
    with pytest.raises(TomatError, match=r"the part 'validation' in .*s(\.zip)?/split\.json lists m-3 twice: .*\.$"):
        with_file("split.json", '{"train": [0], "validation": [2, 1, 2]}').split("train")


def test_a_store_is_named_by_its_path(tmp_path):
    assert str(RawStore(tmp_path / "s")) == str(tmp_path / "s") and str(RawStore("s3://b/s")) == "s3://b/s"


def test_a_version_tag_changes_when_a_material_is_rewritten(tmp_path, three):
    write_store(three, {}, tmp_path / "s")
    store = RawStore(tmp_path / "s")
    before = {id: store.version_tag(id) for id in store.ids}
    write_density(three[1], tmp_path / "s/label/m-2.zarr")
    assert [id for id in store.ids if store.version_tag(id) != before[id]] == ["m-2"]
    (tmp_path / "s/label/m-3.zarr/charge_density_total/c/0/0/0").write_bytes(b"a chunk alone")
    assert [id for id in store.ids if store.version_tag(id) != before[id]] == ["m-2", "m-3"]
    with pytest.raises(TomatError, match=r"m-9.*does not exist"):
        store.version_tag("m-9")


def test_a_store_that_fails_on_the_way_leaves_nothing(tmp_path, three):
    def some():
        yield three[0]
        raise KeyboardInterrupt
    for name in ("s", "s.zip"):
        with pytest.raises(KeyboardInterrupt):
            write_store(some(), {}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["store", "store.zip"])
def test_a_store_in_s3(s3, three, name):
    write_store(three, {"train": ["m-1"], "validation": ["m-2", "m-3"]}, f"{s3}/{name}")
    store = RawStore(f"{s3}/{name}")
    assert store.ids == ["m-1", "m-2", "m-3"]
    for id in store.split("validation"):
        assert_same(store.read(id), three[int(id[-1]) - 1])
    with pytest.raises(TomatError, match="m-9"):
        store.read("m-9")


def test_other_things_in_a_bucket_stay(s3, three):
    write_text(f"{s3}/thesis.tex", "years of work")
    with pytest.raises(TomatError, match="holds other files"):
        write_store(three, {}, s3)
    assert list_folder(s3) == ["thesis.tex"]


def test_other_things_beside_a_store_stay(tmp_path, three):
    write_store(three, {"train": ["m-1"]}, tmp_path / "s", readme="Made up.")
    (tmp_path / "s" / "sources.json").write_text("{}")
    write_store(three[:2], {}, tmp_path / "s")
    assert list_folder(tmp_path / "s") == ["label", "mp_filelist.txt"] and len(list_folder(tmp_path / "s" / "label")) == 2
    (tmp_path / "s" / "other").mkdir()
    (tmp_path / "photos" / "label").mkdir(parents=True)
    (tmp_path / "photos" / "label" / "1.png").write_text("")
    for name in ("s", "photos"):
        other = "other" if name == "s" else "label"
        with pytest.raises(TomatError, match=rf"{name} is a folder that holds other files, such as {other}"):
            write_store(three, {}, tmp_path / name)
    assert list_folder(tmp_path / "photos" / "label") == ["1.png"] and (tmp_path / "s" / "other").is_dir()


def test_what_a_store_is(tmp_path, three):
    for name in ("s", "s.zip"):
        write_store(three, {}, tmp_path / name)
    for name in ("one.zarr", "one.zarr.zip", "one.vasp", "one.json"):
        write_density(three[0], tmp_path / name)
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "broken.zip").write_bytes((tmp_path / "s.zip").read_bytes()[:-30])
    with zipfile.ZipFile(tmp_path / "top.zip", "w") as packed:
        packed.writestr("top/mp_filelist.txt", "")
    yes = ["s", "s/", "s.zip", "top.zip"]
    no = ["one.zarr", "one.zarr.zip", "one.vasp", "one.json", "folder.zip", "broken.zip", "s/mp_filelist.txt", "s/label",
          "nothing", "nothing.zip", "."]
    assert [name for name in yes + no if is_store(f"{tmp_path}/{name}")] == yes and is_store(tmp_path / "s")


def test_what_a_store_is_in_s3(s3, three):
    for name in ("s", "deep/s", "s.zip"):
        write_store(three, {"train": ["m-1"]}, f"{s3}/{name}")
    write_density(three[0], f"{s3}/one.zarr")
    yes, no = ["s", "s/", "deep/s", "s.zip"], ["one.zarr", "nothing", "nothing.zip", "deep"]
    assert [name for name in yes + no if is_store(f"{s3}/{name}")] == yes
    slash = RawStore(f"{s3}/s/")
    assert slash.split("train") == ["m-1"] and slash.read("m-1").id == "m-1"
    assert not is_store("s3://no-such-bucket/s")


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(TomatError, match=r"has no file mp_filelist\.txt: give a raw store"):
        RawStore(tmp_path).ids  # noqa: B018
    (tmp_path / "mp_filelist.txt").write_text("m-1\n")
    assert RawStore(tmp_path).split("all") == ["m-1"]
    with pytest.raises(TomatError, match="has no part 'train': it has all"):
        RawStore(tmp_path).split("train")


def test_the_sample():
    """36 materials and 8 held out; electrons whole, the free atoms' too; no chemical system on both sides."""
    store = sample_store()
    assert is_store(store.root) and {part: len(ids) for part, ids in store.splits.items()} == {"train": 36, "validation": 8}
    systems = {"train": set(), "validation": set()}
    for part, ids in store.splits.items():
        for id in ids:
            one = store.read(id)
            assert one.id == id and one.n_electrons == pytest.approx(round(one.n_electrons), abs=1e-4)
            assert one.sad.mean(dtype=float) == pytest.approx(one.n_electrons, abs=1e-4)
            systems[part].add(one.structure.composition.chemical_system)
    assert not systems["train"] & systems["validation"]
