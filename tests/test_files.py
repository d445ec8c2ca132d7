"""Nothing half-written, whatever goes wrong and wherever it goes wrong; every refusal is one sentence."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings, strategies as st

from tomat.io.remote import TomatError, exists, is_remote, kind_of, list_folder
from tomat.io.files import (head_of, local_copy, open_binary, read_json, read_text, check_folder, version_tag,
                            atomic_write, write_json, write_text)
from tomat.io.remote import entries


@pytest.fixture
def bucket():
    "A folder in fsspec's store in memory, empty before and after."
    fs = fsspec.filesystem("memory")
    fs.rm("/", recursive=True) if fs.ls("/") else None
    yield "memory://bucket"
    fs.rm("/", recursive=True) if fs.ls("/") else None


def make(aside, *names):
    "Write a folder with these files, each holding its own name."
    for name in names:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_text(name)


def tree(folder):
    "Every path below a folder."
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("error", [ValueError, TomatError, KeyboardInterrupt, SystemExit, OSError, MemoryError])
@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_write_changes_nothing(tmp_path, error, as_folder, before):
    target = tmp_path / "out" / "x.zarr"
    if before:
        with atomic_write(target) as aside:
            make(aside, "zarr.json", "c/0") if as_folder else aside.write_text("old")
    old = tree(tmp_path)
    with pytest.raises(error), atomic_write(target) as aside:
        make(aside, "zarr.json", "c/1") if as_folder else aside.write_text("new")
        raise error
    assert tree(tmp_path) == old


@settings(derandomize=True, deadline=None, max_examples=30)
@given(steps=st.lists(st.tuples(st.sets(st.sampled_from("abcd"), min_size=1), st.booleans()), max_size=6))
def test_a_folder_is_always_the_last_one_that_succeeded(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("steps")
    expected = None
    for names, fails in steps:
        try:
            with atomic_write(folder / "x") as aside:
                make(aside, "meta.json", *names)
                if fails:
                    raise RuntimeError
            expected = sorted({"meta.json", *names})
        except RuntimeError:
            pass
        assert list_folder(folder) == ([] if expected is None else ["x"])
        assert len(os.listdir(folder)) == len(list_folder(folder))
        if expected is not None:
            assert list_folder(folder / "x") == expected


def test_the_partial_name_keeps_the_suffixes_and_the_folder(tmp_path):
    with atomic_write(tmp_path / "CHGCAR.x.gz") as aside:
        assert aside.parent == tmp_path and aside.suffixes[-2:] == [".x", ".gz"]
        assert aside.name.startswith(".partial-") and list_folder(tmp_path) == []
        aside.write_text("x")
        assert list_folder(tmp_path) == []
    assert tree(tmp_path) == ["CHGCAR.x.gz"]


def test_two_writers_do_not_meet(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second
        first.write_text("outer")
        second.write_text("inner")
    assert read_text(tmp_path / "a") == "outer" and tree(tmp_path) == ["a"]


def test_a_new_file_has_ordinary_rights(tmp_path):
    write_text(tmp_path / "a", "a")
    (tmp_path / "b").write_text("b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_overwrite_false_refuses_before_the_work(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(TomatError, match="exists already"), atomic_write(tmp_path / "a", overwrite=False):
        pytest.fail("the block ran")
    with pytest.raises(TomatError, match="exists already"), atomic_write(tmp_path / "b", overwrite=False) as aside:
        aside.write_text("mine")
        (tmp_path / "b").write_text("somebody was faster")
    assert read_text(tmp_path / "b") == "somebody was faster"


def test_other_peoples_folders_are_never_replaced(tmp_path):
    make(tmp_path / "home", "thesis.tex", "README.md")
    for write in (lambda p: make(p, "zarr.json", "README.md"), lambda p: p.write_text("a file")):
        with pytest.raises(TomatError, match="holds other files"), atomic_write(tmp_path / "home") as aside:
            write(aside)
    assert tree(tmp_path) == ["home", "home/README.md", "home/thesis.tex"]
    (tmp_path / "empty").mkdir()
    with atomic_write(tmp_path / "empty") as aside:
        make(aside, "zarr.json")
    assert tree(tmp_path / "empty") == ["zarr.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(TomatError, match=r"file.*cannot be written"):
        write_text(tmp_path / "file" / "below", "x")
    assert tree(tmp_path) == ["file"]


@pytest.mark.parametrize("name", [".", "..", "", "x/.."])
def test_a_place_without_a_name_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(TomatError, match="cannot be the name of a new file"), atomic_write(name) as aside:
        make(aside, "zarr.json")
    assert tree(tmp_path) == ["here"]


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_link_is_followed_and_stays(tmp_path, as_folder):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").mkdir()
    link = tmp_path / "home" / "x"
    link.symlink_to(tmp_path / "disk" / "y")
    for text in ("one", "two"):
        with atomic_write(link) as aside:
            make(aside, "zarr.json", text) if as_folder else aside.write_text(text)
    assert link.is_symlink() and os.listdir(tmp_path / "home") == ["x"] and os.listdir(tmp_path / "disk") == ["y"]
    assert tree(tmp_path / "disk" / "y") == ["two", "zarr.json"] if as_folder else read_text(tmp_path / "disk" / "y") == "two"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_full_disk_names_the_place(tmp_path, number):
    sentence = r"a cannot be written, choose another place or free some space: .+\.$"
    with pytest.raises(TomatError, match=sentence), atomic_write(tmp_path / "a") as aside:
        aside.write_text("half")
        raise OSError(number, os.strerror(number))
    assert tree(tmp_path) == []


def test_an_error_about_another_file_keeps_its_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a") as aside:
        aside.write_text((tmp_path / "missing").read_text())
    assert tree(tmp_path) == []


def test_remote_files_and_folders(bucket):
    write_text(f"{bucket}/a.txt", "ρ\n")
    assert read_text(f"{bucket}/a.txt") == "ρ\n" and exists(f"{bucket}/a.txt") and not exists(f"{bucket}/b.txt")
    for names in (["zarr.json", "c/0/0", "c/0/1"], ["zarr.json", "c/0/0"]):
        with atomic_write(f"{bucket}/x.zarr") as aside:
            make(aside, *names)
        with local_copy(f"{bucket}/x.zarr") as here:
            assert here.name == "x.zarr" and [n for n in tree(here) if (here / n).is_file()] == sorted(names)
    assert list_folder(bucket) == ["a.txt", "x.zarr"]
    with open_binary(f"{bucket}/a.txt") as file:
        file.seek(2)
        assert file.read() == b"\n"
    with pytest.raises(TomatError, match="exists already"), atomic_write(f"{bucket}/a.txt", overwrite=False):
        pass
    with pytest.raises(TomatError, match="no such file"), open_binary(f"{bucket}/b"):
        pass


def test_a_failed_remote_write_sends_nothing(bucket):
    with pytest.raises(RuntimeError), atomic_write(f"{bucket}/x.zarr") as aside:
        make(aside, "zarr.json")
        raise RuntimeError
    assert not exists(bucket)


def test_the_root_file_of_a_folder_is_sent_last(bucket, monkeypatch):
    sent = []
    fs = fsspec.filesystem("memory")
    put = type(fs).put_file
    def put_file(self, source, key, **kwargs):
        sent.append(key.split("/")[-1])
        put(self, source, key, **kwargs)
    monkeypatch.setattr(type(fs), "put_file", put_file)
    with atomic_write(f"{bucket}/data") as aside:
        make(aside, "meta.json", "worker-00/meta.json", "a.parquet", "z.parquet")
    assert sent[-1] == "meta.json" and len(sent) == 4 and sent[:3].count("meta.json") == 1


def test_a_missing_client_is_named(monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("no s3fs")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(TomatError, match=r"pip install 'tomat\[s3\]'"):
        read_text("s3://bucket/a")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    with pytest.raises(TomatError, match=r"pip install 'tomat\[gcs\]'"):
        exists("gs://bucket/a")


@settings(derandomize=True, deadline=None, max_examples=50)
@given(obj=st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                        | st.text(st.characters(exclude_categories=["Cs"])),
                        lambda inner: st.lists(inner) | st.dictionaries(st.text("abρ"), inner), max_leaves=8))
def test_json_comes_back_and_is_the_same_bytes(tmp_path_factory, obj):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, obj)
    first = path.read_bytes()
    assert read_json(path) == obj and first.endswith(b"\n")
    write_json(path, json.loads(first))
    assert path.read_bytes() == first


def test_what_is_remote():
    assert [is_remote(p) for p in ("s3://a", "gs://a/b", "/a/b", "C:\\a", "a:b")] == [True, True, False, False, False]


KILLED = """
import os, sys
from pathlib import Path
from tomat.io.files import atomic_write, write_text
with atomic_write(sys.argv[1]) as aside:
    if sys.argv[2] == "folder":
        aside.mkdir()
        write_text(aside / "zarr.json", "half")
    else:
        aside.write_text("half")
    print("writing", flush=True)
    if sys.argv[3] == "dies":
        os._exit(9)
    sys.stdin.read()
"""


def writer(target, kind, end):
    "Another process that has begun to write."
    running = subprocess.Popen([sys.executable, "-c", KILLED, target, kind, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout.readline() == b"writing\n"
    return running


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path, kind):
    live = writer(tmp_path / "live", kind, "lives")
    writer(tmp_path / "dead", kind, "dies").communicate()
    (tmp_path / ".partial-1234abcd-other").write_text("of a fetch that goes on there")
    write_text(tmp_path / "mine", "x")  # somebody is writing: nothing is swept
    assert len([name for name in os.listdir(tmp_path) if name.startswith(".partial-new-")]) == 2
    live.communicate(b"")
    assert live.returncode == 0 and list_folder(tmp_path) == ["live", "mine"]
    write_text(tmp_path / "mine", "y")  # nobody is: what the dead one left goes, whatever its name
    assert sorted(os.listdir(tmp_path)) == [".partial-1234abcd-other", "live", "mine"]
    assert (tmp_path / "live").is_dir() == (kind == "folder")


def test_a_terminated_live_run_is_swept_by_the_next_process(tmp_path):
    live = writer(tmp_path / "a", "file", "lives")
    live.kill()
    live.communicate()
    assert len(os.listdir(tmp_path)) == 1
    write_text(tmp_path / "a", "whole")
    assert os.listdir(tmp_path) == ["a"]


def test_the_old_one_stays_until_the_new_one_is_there(tmp_path):
    """Killed between the two renames of a folder: what stepped aside is the only whole one."""
    make(tmp_path / ".partial-old-1234abcd-x.zarr", "zarr.json")
    make(tmp_path / ".partial-old-1234abcd-y.zarr", "zarr.json")
    make(tmp_path / "y.zarr", "zarr.json")
    write_text(tmp_path / "a", "a")
    assert sorted(os.listdir(tmp_path)) == [".partial-old-1234abcd-x.zarr", "a", "y.zarr"]


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(TomatError, match=r"is a device or a pipe: give the name of a file\.$"):
            write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()


def test_what_is_at_a_place(tmp_path, bucket):
    for place in (tmp_path, bucket):
        write_text(f"{place}/a/b.txt", "ρ and more")
        assert [kind_of(f"{place}/{name}") for name in ("a", "a/b.txt", "c")] == ["folder", "file", None]
        write_text(f"{place}/c.txt", "")
        assert entries(place) == {"a": True, "c.txt": False} and list_folder(place) == ["a", "c.txt"]
        assert head_of(f"{place}/a/b.txt", 4) == "ρ a".encode() and head_of(f"{place}/a/b.txt", 99) == "ρ and more".encode()


def test_a_stamp_is_another_once_a_file_is_written_anew(tmp_path, bucket):
    for place in (tmp_path, bucket):
        write_text(f"{place}/a", "one")
        first = version_tag(f"{place}/a")
        assert version_tag(f"{place}/a") == first
        write_text(f"{place}/a", "two")
        assert version_tag(f"{place}/a") != first
        with pytest.raises(TomatError, match=r"/b .*(does not exist|no such file)"):
            version_tag(f"{place}/b")


def test_strangers_are_refused(tmp_path, bucket):
    for place in (tmp_path, bucket):
        assert check_folder(f"{place}/rows", "rows-.*") == []
        write_text(f"{place}/rows/rows-0", "x")
        assert check_folder(f"{place}/rows", "rows-.*") == ["rows-0"]
        write_text(f"{place}/rows/my-rows-0", "x")
        with pytest.raises(TomatError, match=r"rows is a folder that holds other files, such as my-rows-0: give another name\.$"):
            check_folder(f"{place}/rows", "rows-.*")
        with pytest.raises(TomatError, match=r"rows-0 is a file: give the name of a folder\.$"):
            check_folder(f"{place}/rows/rows-0", ".*")
