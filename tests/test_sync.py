"""Data sets on their way between disks, S3 and GCS: checked on both ends, repaired, and never half there."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from tomat.io.remote import TomatError, exists, list_folder
from tomat.io.files import local_copy, md5_of, open_binary, read_json, read_text, atomic_write, write_json, write_text
from tomat.io.remote import remote_fs
from tomat.dataset.sync import sync

CLOSED = "http://127.0.0.1:9"


def data_set(folder, workers=1, shards=2, rows=20_000, seed=0):
    "Shards of noise with their manifest, in the form that tokenizing gives them."
    rng = np.random.default_rng(seed)
    for worker in range(workers):
        part = folder / f"worker-{worker:02d}" if workers > 1 else folder
        part.mkdir(parents=True)
        said = {}
        for i in range(shards):
            path = part / f"rows-{i:05d}.parquet"
            pq.write_table(pa.table({"input_ids": rng.integers(0, 1 << 30, rows, np.int32)}), path, compression="zstd")
            said[path.name] = {"rows": rows, "bytes": path.stat().st_size, "md5": md5_of(path)}
        write_json(part / "meta.json", {"format": 1, "label": "noise", "shards": said})
    return folder


def files(folder):
    "Every file below a folder, local or remote, by its name from there."
    with local_copy(folder) as here:
        return {p.relative_to(here).as_posix(): p.read_bytes() for p in sorted(here.rglob("*")) if p.is_file()}


def flip(path, at=1234):
    "Flip a bit, locally or in a bucket."
    with open_binary(path) as file:
        content = bytearray(file.read())
    content[at] ^= 8
    fs, key = remote_fs(str(path))
    fs.pipe_file(key, bytes(content))


@pytest.mark.parametrize("workers", [1, 3])
def test_round_the_world(s3, gcs, tmp_path, workers):
    "Disk to S3 to GCS to disk, each leg repeated, and the first is the last."
    first = data_set(tmp_path / "first", workers)
    n, size = workers * 3, sum(map(len, files(first).values()))
    (first / ".partial-1234-rows").write_text("not finished")
    legs = [first, f"{s3}/a/set", f"{gcs}/b/set/", tmp_path / "last", tmp_path / "again"]
    for src, dst in pairwise(legs):
        assert sync(src, dst) == {"copied": n, "skipped": 0, "bytes": size}
        assert sync(src, dst, check=True) == sync(src, dst) == {"copied": 0, "skipped": n, "bytes": 0}
    (first / ".partial-1234-rows").unlink()
    assert all(files(leg) == files(first) for leg in legs)
    assert not list((tmp_path / "last").rglob(".partial*"))


@pytest.mark.parametrize("store", ["s3", "gcs", "disk"])
def test_a_flipped_bit_is_found_on_either_side(store, tmp_path, request):
    source = data_set(tmp_path / "source", workers=2)
    copy = f"{tmp_path}/copy" if store == "disk" else f"{request.getfixturevalue(store)}/copy"
    sync(source, copy)
    name = "worker-01/rows-00001.parquet"
    flip(f"{copy}/{name}")
    with pytest.raises(TomatError, match=rf"{copy} is not the same as .*source, {name} differ: run sync"):
        sync(source, copy, check=True)
    assert sync(source, copy)["copied"] == 1 and files(copy) == files(source)
    # what is flipped at the source is known by the manifest: from a disk, and from a store, whose MD5 is of the wrong bytes
    flip(f"{copy}/{name}")
    for there in (tmp_path / "elsewhere", f"{tmp_path}/other/"):
        with pytest.raises(TomatError, match=rf"{copy}/{name} has another MD5 than its meta.json says: make that shard again"):
            sync(copy, there)
    assert not (tmp_path / "elsewhere").exists()


def test_any_folder_and_any_name(s3, gcs, tmp_path):
    source = tmp_path / "source"
    for name in ("a b#c%41é?.txt", "deep/er/x[1]*.bin", "empty", "x.gz", "meta.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() if name != "empty" else b"")
    (source / "meta.json").write_text("[1, 2]")
    for src, dst in [(source, f"{s3}/x"), (f"{s3}/x", f"{gcs}/x"), (f"{gcs}/x", tmp_path / "x"), (f"{gcs}/x", f"{s3}/y")]:
        assert sync(src, dst)["copied"] == 5 and sync(src, dst)["skipped"] == 5
    assert files(tmp_path / "x") == files(source) == files(f"{s3}/y")


def test_an_object_in_parts_has_no_md5_and_is_read(s3, tmp_path):
    "S3 keeps no MD5 of an object that came in parts, so its bytes are compared."
    fs, key = remote_fs(f"{s3}/set/big")
    content = np.random.default_rng(0).bytes(11 << 20)
    (tmp_path / "part").write_bytes(content)
    fs.put_file(str(tmp_path / "part"), key, chunksize=5 << 20)
    assert "-" in fs.info(key)["ETag"]
    assert sync(f"{s3}/set", tmp_path / "copy")["copied"] == 1 and (tmp_path / "copy" / "big").read_bytes() == content
    assert sync(f"{s3}/set", tmp_path / "copy") == sync(tmp_path / "copy", f"{s3}/set") == {"copied": 0, "skipped": 1, "bytes": 0}
    flip(tmp_path / "copy" / "big")
    assert sync(f"{s3}/set", tmp_path / "copy")["copied"] == 1 and (tmp_path / "copy" / "big").read_bytes() == content


@pytest.mark.parametrize("up", [True, False])
def test_a_transfer_that_the_server_cuts_is_repaired(up, s3, line, tmp_path, monkeypatch):
    source, direct = data_set(tmp_path / "source", shards=8), os.environ["AWS_ENDPOINT_URL"]
    if not up:
        sync(source, f"{s3}/set")
    src, dst = (source, f"{s3}/set") if up else (f"{s3}/set", tmp_path / "copy")
    wire = line(direct)
    wire.left = 300_000
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
    with pytest.raises(TomatError, match=r"cannot be reached, check the network") as raised:
        sync(src, dst, workers=1)
    assert "\n" not in str(raised.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", direct)
    there = files(dst) if exists(dst) else {}
    assert "meta.json" not in there and all(files(source)[n] == got for n, got in there.items() if "partial" not in n)
    done = sync(src, dst)
    assert done["copied"] + done["skipped"] == 9 and files(dst) == files(source)


@pytest.mark.parametrize("up", [True, False])
def test_a_killed_run_is_repaired(up, s3, line, tmp_path):
    source = data_set(tmp_path / "source", shards=8)
    if not up:
        sync(source, f"{s3}/set")
    src, dst = (source, f"{s3}/set") if up else (f"{s3}/set", tmp_path / "copy")
    wire = line(os.environ["AWS_ENDPOINT_URL"])
    wire.left, wire.silent = 400_000, True
    code = f"from tomat.dataset.sync import sync; sync({str(src)!r}, {str(dst)!r}, workers=2)"
    running = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "AWS_ENDPOINT_URL": wire.url})
    while wire.left > 0:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert "meta.json" not in (list_folder(dst) if exists(dst) else [])
    assert 0 < sync(src, dst)["skipped"] < 9 and files(dst) == files(source)


def test_an_old_manifest_never_vouches_for_a_mixture(tmp_path, monkeypatch):
    old, new = data_set(tmp_path / "old", shards=4, seed=1), data_set(tmp_path / "new", shards=4, seed=2)
    bucket = "memory://old-manifest/set"
    sync(old, bucket)
    store, sent = type(remote_fs(bucket)[0]), []
    put_file = store.put_file
    def dying(self, path, key, **how):
        if len(sent) == 2:
            raise ConnectionError("the line went dead")
        sent.append(key)
        put_file(self, path, key, **how)
    with monkeypatch.context() as patch, pytest.raises(TomatError, match="the line went dead"):
        patch.setattr(store, "put_file", dying)
        sync(new, bucket, workers=1)
    assert list_folder(bucket) == [f"rows-0000{i}.parquet" for i in range(4)]
    assert sync(new, bucket) == {"copied": 3, "skipped": 2, "bytes": sum(len(c) for n, c in files(new).items()
                                                                         if f"/old-manifest/set/{n}" not in sent)}
    assert files(bucket) == files(new)


def test_what_others_put_at_the_destination_stays(tmp_path):
    source = data_set(tmp_path / "source")
    write_text(tmp_path / "copy" / "notes.txt", "mine")
    assert sync(source, tmp_path / "copy")["copied"] == 3
    assert files(tmp_path / "copy") == files(source) | {"notes.txt": b"mine"}


@settings(derandomize=True, deadline=None, max_examples=20)
@given(wrong=st.dictionaries(st.integers(0, 5), st.sampled_from(["gone", "cut", "flipped", "longer"])))
def test_whatever_is_wrong_is_repaired_and_nothing_else_is_copied(tmp_path_factory, wrong):
    folder = tmp_path_factory.mktemp("sync")
    source = data_set(folder / "source", shards=5, rows=100)
    sync(source, folder / "copy")
    for i, how in wrong.items():
        path = folder / "copy" / sorted(os.listdir(source))[i]
        content = path.read_bytes()
        path.write_bytes({"cut": content[:-1], "flipped": content[:-1] + b"?", "longer": content + b"?"}.get(how, b""))
        if how == "gone":
            path.unlink()
    assert sync(source, folder / "copy") == {"copied": len(wrong), "skipped": 6 - len(wrong),
                                             "bytes": sum(len(files(source)[sorted(os.listdir(source))[i]]) for i in wrong)}
    assert files(folder / "copy") == files(source)


def test_what_makes_no_sense_is_refused(s3, tmp_path):
    source = data_set(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(source)
    write_text(f"{s3}/set/a", "a")
    for src, dst, why in [(tmp_path / "empty", s3, "holds no files"), (tmp_path / "none", s3, "holds no files"),
                          (source, source, "the source itself"), (source, tmp_path / "link", "the source itself"),
                          (source, source / "x" / "y", "inside the source"), (f"{s3}/set", f"{s3}/set/x", "inside the source"),
                          (f"{s3}/set/", f"{s3}/set", "the source itself"), (source / "meta.json", s3, "is a file"),
                          (source, f"{s3}/set/a", "is a file"), (source, "s3://no-such-bucket/x", "there is no such bucket"),
                          ("s3://no-such-bucket/x", source, "holds no files"), ("https://a.example/x", source, "is a web page"),
                          (source, source / "meta.json" / "x", "cannot be written|inside the source")]:
        with pytest.raises(TomatError, match=why) as raised:
            sync(src, dst)
        assert "\n" not in str(raised.value)
    assert sync(f"{s3}/set", f"{s3}/settle")["copied"] == 1
    (source / "rows-00001.parquet").unlink()
    with pytest.raises(TomatError, match=r"source lacks rows-00001.parquet, which its meta.json lists"):
        sync(source, tmp_path / "copy")
    (source / "meta.json").write_text("{")
    with pytest.raises(TomatError, match=r"meta\.json is not valid JSON"):
        sync(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("pair", [("s3://b/x", "copy"), ("gs://b/x", "copy"), ("source", "s3://b/x"), ("source", "gs://b/x")])
def test_no_network_is_one_sentence(pair, tmp_path, monkeypatch, capfd):
    pytest.importorskip("s3fs")
    pytest.importorskip("gcsfs")
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, CLOSED)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    data_set(tmp_path / "source", rows=10)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TomatError, match=r"cannot be reached, check the network and the endpoint") as raised:
        sync(*pair)
    assert "\n" not in str(raised.value) and capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, about gcsfs
def test_files_in_a_bucket_of_google(gcs):
    "What `tomat.io.files` promises of every store holds for this one."
    write_json(f"{gcs}/a/x.json", {"a": 1})
    assert read_json(f"{gcs}/a/x.json") == {"a": 1} and md5_of(f"{gcs}/a/x.json") == "43e273b87da8cbbcbbeebfaf267fad8b"
    for names in (["meta.json", "c/0", "c/1"], ["meta.json", "c/0"]):
        with atomic_write(f"{gcs}/set") as aside:
            for name in names:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_bytes(b"7" * 7_000_000 if name == "c/0" else b"")
        assert list(files(f"{gcs}/set")) == sorted(names)
    assert list_folder(gcs) == ["a", "set"] and [exists(f"{gcs}/{n}") for n in ("a", "a/x.json", "b")] == [True, True, False]
    with open_binary(f"{gcs}/a/x.json") as file:
        file.seek(2)
        assert file.read(4) == b' "a"'
    for call in (lambda: list_folder(f"{gcs}/none"), lambda: read_text(f"{gcs}/none"), lambda: list_folder("gs://none/a"),
                 lambda: write_text("gs://none/a", "a")):
        with pytest.raises(TomatError, match=r"^gs://\S+ cannot be (read|written), check the name.*no such (file|bucket)\.$"):
            call()


def test_a_larger_data_set_is_not_overlaid(tmp_path):
    """Its shards would stay beside a meta.json that does not name them, and be read with it by a pattern."""
    small, large = data_set(tmp_path / "small", shards=1), data_set(tmp_path / "large", shards=3, seed=1)
    before = files(large)
    with pytest.raises(TomatError, match=r"large holds shards that .* lacks, such as rows-00001\.parquet"):
        sync(small, large)
    assert files(large) == before
    data_set(tmp_path / "parts", workers=2)
    sync(small, tmp_path / "parts" / "worker-09")  # another part beside them is nobody's business


def job(folder, plan, worker=None, done=True):
    "A folder that belongs to one job."
    data_set(folder, shards=1)
    meta = read_json(folder / "meta.json") | {"plan": plan} | ({"worker": worker} if worker else {})
    (folder / "meta.json").unlink()
    write_json(folder / ("meta.json" if done else "unfinished.json"), meta)


def test_another_data_set_is_not_mixed_in(tmp_path):
    job(tmp_path / "a", "A"), job(tmp_path / "b", "B"), job(tmp_path / "half", "B", done=False)
    for n in (2, 3):
        for i in range(n):
            job(tmp_path / f"parts-{n}" / f"worker-0{i}", "A", [i, n])
    for src, dst in [("a", "b"), ("half", "a"), ("parts-2", "parts-3"), ("parts-2", "a"), ("a", "parts-2"), ("parts-2", "b")]:
        before = files(tmp_path / dst)
        with pytest.raises(TomatError, match=f"{dst} holds another data set than"):
            sync(tmp_path / src, tmp_path / dst)
        assert files(tmp_path / dst) == before
    sync(tmp_path / "parts-2" / "worker-01", tmp_path / "c" / "worker-01")
    assert sync(tmp_path / "parts-2", tmp_path / "c")["copied"] == 2  # from two machines into one place
    sync(tmp_path / "b", tmp_path / "half")  # the same job, now finished


@pytest.mark.parametrize("content", ["[]", "{}", "null", "5", "[" * 100_000])
def test_a_damaged_manifest_is_not_copied(tmp_path, content):
    data_set(tmp_path / "set")
    (tmp_path / "set" / "meta.json").write_text(content)
    with pytest.raises(TomatError, match=r"set/meta\.json is"):
        sync(tmp_path / "set", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
