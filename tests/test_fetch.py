"""Fetching over lines that break, from stores of every kind, by several runs at once; nothing damaged is ever kept."""

import functools
import gzip
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from tomat.io.catalogue import read_ids
from tomat.io.fetch import (BASE_URL, _partial, base_of, cache_folder, fetch, has_md5, is_whole_gzip,
                            stored_md5)
from tomat.io.remote import TomatError, exists, list_folder
from tomat.io.remote import details, remote_fs

# gzip cannot shrink noise, so the file has about the size of its content
CONTENT = gzip.compress(np.random.default_rng(3).bytes(3_000_000), 1, mtime=0)
CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def parsed(s3):
    "Materials Project's bucket, open to all, with one task in it."
    import s3fs
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], use_listings_cache=False)
    if not fs.exists("materialsproject-parsed"):
        fs.mkdir("materialsproject-parsed", acl="public-read")
    put(fs, "mp-1", CONTENT)
    return fs


def put(fs, name, content, **how):
    fs.pipe_file(f"{BASE_URL[5:]}/{name}.json.gz", content, ACL="public-read", **how)


@pytest.fixture
def mirror(tmp_path):
    "A folder that a mirror would serve."
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "mp-1.json.gz").write_bytes(CONTENT)
    return tmp_path / "mirror"


@pytest.fixture
def web(mirror):
    "Python's own web server, which knows no ranges."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=mirror))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def good(path):
    sidecar = path.with_name(path.name + ".md5")
    return path.read_bytes() == CONTENT and sidecar.read_text() == f"{hashlib.md5(CONTENT).hexdigest()}  {path.name}\n"


def run(folder, base, piece, **env):
    "A process of its own that fetches, and ends with the sentence of what went wrong."
    code = f"""
import sys
from tomat.io.fetch import TomatError, fetch
try:
    fetch(["mp-1"], {str(folder)!r}, {base!r}, piece={piece})
except TomatError as err:
    sys.exit(str(err))"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env={**os.environ, **env})


def test_the_open_bucket_is_read_without_an_account(parsed, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("TOMAT_CACHE", str(tmp_path))
    [path] = fetch(["mp-1"])
    assert path == cache_folder() / "mp-1.json.gz" and good(path) and list_folder(path.parent) == [path.name, path.name + ".md5"]
    assert len(os.listdir(path.parent)) == 2


def test_a_private_mirror_is_read_with_the_account(s3, tmp_path, monkeypatch):
    fs, key = remote_fs(s3)
    fs.pipe_file(f"{key}/mp-1.json.gz", CONTENT)
    monkeypatch.setenv("TOMAT_MP_BASE_URL", s3)
    assert good(fetch(["mp-1"], tmp_path)[0])
    assert exists(f"{s3}/mp-1.json.gz")
    anonymous, key = remote_fs(f"{s3}/mp-1.json.gz", anon=True)
    with pytest.raises(PermissionError):
        details(anonymous, key)


def test_where_densities_come_from(monkeypatch, tmp_path):
    """What is given, else the environment, else the open bucket."""
    monkeypatch.delenv("TOMAT_MP_BASE_URL", raising=False)
    assert base_of() == BASE_URL and base_of("gs://b/") == "gs://b"
    monkeypatch.setenv("TOMAT_MP_BASE_URL", f"{tmp_path}/")
    assert base_of() == str(tmp_path) and base_of("gs://b") == "gs://b"


def test_google_a_web_server_and_a_folder_are_mirrors_too(gcs, web, mirror, tmp_path):
    fs, key = remote_fs(gcs)
    fs.pipe_file(f"{key}/mp-1.json.gz", CONTENT)
    for i, base in enumerate([gcs, web, mirror, f"{mirror}/"]):
        assert good(fetch(["mp-1"], tmp_path / str(i), str(base), piece=1_000_000)[0])


def test_ids_keep_their_order_and_a_missing_one_stops_no_other(parsed, tmp_path):
    put(parsed, "mp-2", gzip.compress(b"two"))
    assert [p.name for p in fetch(["mp-2", "mp-1", "mp-2"], tmp_path)] == ["mp-2.json.gz", "mp-1.json.gz", "mp-2.json.gz"]
    with pytest.raises(TomatError, match=r"no density of mp-149, mp-7, mp-8, mp-9 at s3://.*id of the task"):
        fetch(["mp-149", "mp-7", "mp-8", "mp-9", "mp-1"], tmp_path / "other")
    assert good(tmp_path / "other" / "mp-1.json.gz") and len(os.listdir(tmp_path / "other")) == 2


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_cut_line_costs_no_more_than_a_piece(kind, parsed, line, tmp_path, monkeypatch):
    wire = line(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
    base = BASE_URL if kind == "s3" else f"{wire.url}/materialsproject-parsed/chgcars"
    wire.left = 2_000_000
    with pytest.raises(TomatError, match=r"cannot be reached, check the network") as raised:
        fetch(["mp-1"], tmp_path, base, piece=300_000)
    assert "\n" not in str(raised.value)
    [part] = os.listdir(tmp_path)
    assert part.startswith(".partial-") and (tmp_path / part).stat().st_size == 1_800_000 and list_folder(tmp_path) == []
    wire.left, wire.came = 1 << 60, 0
    assert good(fetch(["mp-1"], tmp_path, base, piece=300_000)[0])
    assert len(CONTENT) - 1_800_000 < wire.came < len(CONTENT) - 1_800_000 + 50_000
    assert len(os.listdir(tmp_path)) == 2


def test_a_killed_run_is_continued(parsed, line, tmp_path, monkeypatch):
    wire = line(os.environ["AWS_ENDPOINT_URL"])
    wire.left, wire.silent = 2_000_000, True
    running = run(tmp_path, BASE_URL, 300_000, AWS_ENDPOINT_URL=wire.url)
    while not any(p.stat().st_size >= 1_500_000 for p in tmp_path.iterdir()):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert list_folder(tmp_path) == [] and len(os.listdir(tmp_path)) == 1
    direct = line(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", direct.url)
    assert good(fetch(["mp-1"], tmp_path)[0]) and direct.came < 1_600_000


def test_no_network_is_one_sentence_and_afterwards_it_goes_on(parsed, tmp_path):
    said = run(tmp_path, BASE_URL, 300_000, AWS_ENDPOINT_URL=CLOSED).communicate()[1]
    assert said.count("\n") == 1 and "mp-1.json.gz cannot be reached, check the network" in said
    assert good(fetch(["mp-1"], tmp_path)[0])


@pytest.mark.parametrize("base", ["s3://materialsproject-parsed/chgcars", "gs://bucket", CLOSED, "http://no.such.host.invalid"])
def test_no_network_says_so_whatever_the_store(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("AWS_ENDPOINT_URL", CLOSED)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", CLOSED)
    pytest.importorskip("gcsfs")
    with pytest.raises(TomatError, match=r"^\S+ cannot be reached, check the network and the endpoint") as raised:
        fetch([f"mp-{i}" for i in range(9)], tmp_path, base)
    assert "\n" not in str(raised.value) and capfd.readouterr().err == ""


def test_two_runs_at_once_do_not_meet(parsed, tmp_path):
    both = [run(tmp_path, BASE_URL, 100_000) for _ in range(2)]
    assert [p.communicate()[1] for p in both] == ["", ""] and [p.returncode for p in both] == [0, 0]
    assert good(tmp_path / "mp-1.json.gz") and len(os.listdir(tmp_path)) == 2


def test_an_object_that_changed_begins_again(parsed, line, tmp_path):
    wire = line(os.environ["AWS_ENDPOINT_URL"])
    put(parsed, "mp-1", gzip.compress(np.random.default_rng(4).bytes(3_000_000), 1))
    base = f"{wire.url}/materialsproject-parsed/chgcars"
    wire.left = 1_000_000
    with pytest.raises(TomatError):
        fetch(["mp-1"], tmp_path, base, piece=300_000)
    assert len(os.listdir(tmp_path)) == 1
    put(parsed, "mp-1", CONTENT)
    wire.left = 1 << 60
    assert good(fetch(["mp-1"], tmp_path, base)[0]) and len(os.listdir(tmp_path)) == 2  # the old part is gone


@settings(derandomize=True, deadline=None, max_examples=25)
@example(cut=35_000, flipped=False, piece=7_000)
@given(cut=st.integers(0, 40_000), flipped=st.booleans(), piece=st.sampled_from([1, 7_000, 1 << 22]))
def test_a_partial_file_of_any_length_is_continued_and_a_wrong_one_is_found(tmp_path_factory, cut, flipped, piece):
    folder = tmp_path_factory.mktemp("mirror")
    content = bytearray(gzip.compress(np.random.default_rng(1).bytes(30_000), mtime=0))
    (folder / "mp-1.json.gz").write_bytes(content)
    fs, key = remote_fs(str(folder / "mp-1.json.gz"))
    part = _partial(folder / "cache" / "mp-1.json.gz", key, details(fs, key))
    part.parent.mkdir()
    begun = bytearray(content + b"too much" * 2000)[:cut] if cut else bytearray()
    if flipped and cut > 100:
        begun[cut // 2] ^= 4
    part.write_bytes(begun)
    if piece == 1 and cut < len(content) - 200:
        return  # right, and slow
    bad = flipped and 100 < cut <= len(content)
    if bad:
        with pytest.raises(TomatError, match="arrived damaged"):
            fetch(["mp-1"], folder / "cache", str(folder), piece=piece)
        assert os.listdir(folder / "cache") == []
    assert fetch(["mp-1"], folder / "cache", str(folder), piece=piece)[0].read_bytes() == content


def test_a_flipped_bit_in_the_cache_is_mended_and_a_good_file_needs_no_network(parsed, tmp_path):
    [path] = fetch(["mp-1"], tmp_path)
    assert good(fetch(["mp-1"], tmp_path, CLOSED)[0])
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    with pytest.raises(TomatError, match="cannot be reached"):
        fetch(["mp-1"], tmp_path, CLOSED)
    assert good(fetch(["mp-1"], tmp_path)[0])
    path.with_name(path.name + ".md5").unlink()
    before = path.stat().st_ino
    assert good(fetch(["mp-1"], tmp_path)[0]) and path.stat().st_ino == before  # the store's MD5 is enough


def test_a_file_that_is_damaged_at_its_source_is_refused(parsed, tmp_path):
    put(parsed, "mp-3", CONTENT[:-5])
    with pytest.raises(TomatError, match=r"mp-3.json.gz arrived damaged: run it again"):
        fetch(["mp-3"], tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_etag_is_not_always_an_md5(parsed, s3):
    key, md5 = f"{BASE_URL[5:]}/mp-1.json.gz", hashlib.md5(CONTENT).hexdigest()
    fs, _ = remote_fs(s3)
    info = details(fs, key)
    assert stored_md5(fs, info) == md5 and has_md5(fs, key, info, md5) is True and has_md5(fs, key, info, "0" * 32) is False
    assert has_md5(fs, key, {"ETag": f'"{md5}-2"'}, md5) is None
    put(fs, "mp-4", b"x", ServerSideEncryption="aws:kms")
    assert has_md5(fs, key.replace("mp-1", "mp-4"), {"ETag": "0" * 32}, md5) is None


def test_a_place_that_cannot_be_written_is_named(mirror, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TomatError, match="cannot be written, choose another place"):
        fetch(["mp-1"], tmp_path / "file" / "cache", str(mirror))


def test_lists_of_ids(tmp_path):
    for text in ("mp-1\n# two\n\nmp-2 # again\nmp-1\n", '["mp-1", "mp-2"]', "mp-1,mp-2,mp-1", "mp-1 mp-2"):
        (tmp_path / "list.txt").write_text(text)
        assert read_ids(str(tmp_path / "list.txt")) == read_ids(text) == ["mp-1", "mp-2"]
    assert read_ids("mvc-12") == ["mvc-12"] and read_ids("x_1.2") == ["x_1.2"]
    for text, why in [("", "no id to fetch"), ("#", "no id to fetch"), ("a/b", "is no id"), ("mp-1,..", "is no id"),
                      ("[1]", "is no id"), ("[", "not valid JSON"), ("none.txt", "does not exist"),
                      ("mp-1," * 3000 + "-", "is no id")]:
        with pytest.raises(TomatError, match=why):
            read_ids(text)
    with pytest.raises(TomatError, match="no id to fetch"):
        fetch([])


def test_gzip_streams_of_other_kinds(tmp_path):
    for content, whole in [(CONTENT, True), (b"", False), (b"{}", False), (CONTENT + CONTENT, True), (CONTENT + b"x", False)]:
        (tmp_path / "a").write_bytes(content)
        assert is_whole_gzip(tmp_path / "a") == whole


@pytest.mark.parametrize("workers", [0, -3])
def test_no_worker_at_all_is_refused(tmp_path, workers):
    with pytest.raises(TomatError, match=rf"^{workers} workers can do nothing: give 1 or more\.$"):
        fetch(["mp-1"], tmp_path / "cache", base_url=str(tmp_path), workers=workers)
