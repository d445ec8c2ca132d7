"""Materials of the Materials Project: their tasks are asked for once, and densities come from a bucket on loopback."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from tomat.density.convert import store_all
from tomat.density.formats import write_density
from tomat.density.source import open_source
from tomat.density.store import RawStore, sample_store
from tomat.io import catalogue
from tomat.io.catalogue import known_tasks, plain_id, static_tasks
from tomat.io.fetch import BASE_URL, fetch
from tomat.io.files import read_json
from tomat.io.remote import TomatError
from tomat.train.start import data_kind

STATIC, RELAXED = "GGA Static", "GGA Structure Optimization"


class Api:
    "The two addresses of the API that are asked, in the form of its documents; `wrong` takes the place of the next answers."

    def __init__(self):
        self.types = {"mp-149": {"mp-149": RELAXED, "mp-3001": STATIC, "mp-3002": "GGA+U Static", "mp-3003": STATIC},
                      "mp-13": {"mp-13": STATIC, "mp-3010": "R2SCAN Static"},
                      "mp-542535": {"mp-633688": RELAXED, "mp-3020": STATIC}}
        self.dates = {"mp-3001": "2018-05-01T00:00:00", "mp-3002": {"$date": "2022-10-05T22:00:26.1Z"}, "mp-3003": "2023-01-01",
                      "mp-13": "2019-01-01T00:00:00", "mp-3020": "2020-01-01T00:00:00"}
        self.questions, self.keys, self.wrong = [], [], []
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                address = urlsplit(self.path)
                asked = {name: words[0].split(",") for name, words in parse_qs(address.query).items()}
                outer.questions.append((address.path, asked))
                outer.keys.append(self.headers["X-API-KEY"])
                status, headers, body = outer.wrong.pop(0) if outer.wrong else (200, {}, outer.documents(address.path, asked))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps({"data": body, "meta": {}}).encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def documents(self, path, asked):
        if path == "/materials/tasks/":
            found = [{"task_id": id, "last_updated": self.dates[id]} for id in asked["task_ids"] if id in self.dates]
        else:
            ids, tasks = asked.get("material_ids", ()), set(asked.get("task_ids", ()))
            found = [{"material_id": id, "calc_types": types, "task_ids": list(types), "formula_pretty": "X"}
                     for id, types in self.types.items() if id in ids or tasks & set(types)]
        return [{name: doc[name] for name in asked["_fields"] if name in doc} for doc in found]

    def asked_for(self):
        return [id for path, asked in self.questions if path == "/materials/core/" for id in asked.get("material_ids", ())]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def three():
    "Small crystals of the sample, whose electrons are those of the packaged atoms."
    store = sample_store()
    return sorted(map(store.read, store.ids), key=lambda density: density.values.size)[:3]


@pytest.fixture
def api(monkeypatch, tmp_path):
    running = Api()
    for name, value in {"MP_API_ENDPOINT": running.url, "MP_API_KEY": "k" * 32, "TOMAT_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    yield running
    running.stop()


@pytest.fixture
def bucket(s3, three):
    "Materials Project's bucket: the newest static calculation of mp-149 has no density in it, the others have."
    import s3fs
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    if fs.exists("materialsproject-parsed"):
        fs.rm("materialsproject-parsed", recursive=True)
    fs.mkdir("materialsproject-parsed", acl="public-read")
    for task, density in zip(("mp-3001", "mp-3002", "mp-3020"), three, strict=True):
        write_density(density, f"{BASE_URL}/{task}.json.gz")
    fs.chmod("materialsproject-parsed", "public-read", recursive=True)
    return fs


def test_a_material_is_its_newest_density_and_a_second_run_asks_nothing(api, bucket, three, tmp_path):
    source = open_source("mp-149,mp-633688")  # the second was a material once
    for id, density in {"mp-149": three[1], "mp-633688": three[2]}.items():
        np.testing.assert_allclose(source.read(id).values, density.values, rtol=1e-6)
        assert source.read(id).id == id
    assert source.version_tag("mp-149") == f"{BASE_URL}/mp-3002"
    assert known_tasks(BASE_URL) == {"mp-149": "mp-3002", "mp-633688": "mp-3020"}
    assert set(api.keys) == {"k" * 32} and len(api.questions) == 3
    api.stop()
    again = open_source("mp-149,mp-633688")  # from the cache
    assert again.read("mp-149").formula == three[1].formula and again.version_tag("mp-149") == source.version_tag("mp-149")
    [path] = fetch(["mp-149"], tmp_path / "elsewhere")  # from the bucket and the table
    assert path.name == "mp-149.json.gz" and len(api.questions) == 3


@pytest.mark.parametrize("command", ["convert", "tokenize", "prepare", "fetch", "predict"])
def test_every_command_takes_materials(api, bucket, three, tomat, tmp_path, command):
    out = tmp_path / "out"
    words = {"convert": ["convert", "mp-149,mp-633688", out, "--workers", 1],
             "tokenize": ["tokenize", "mp-149,mp-633688", "--out", out, "--patch-size", 6, "--workers", 1],
             "prepare": ["prepare", "mp-149,mp-633688", "--out", out, "--kept", 9, "--workers", 1, "--atoms", "packaged"],
             "fetch": ["fetch", "mp-149", "mp-633688", "--out", out],
             "predict": ["predict", "mp-149", "mp-633688", "--out", f"{out}/"]}[command]
    done = tomat(*words)
    assert done.code == 0, done.err
    names = {"convert": RawStore(out).ids if command == "convert" else None,
             "fetch": sorted(p.name for p in out.glob("*.gz")), "predict": sorted(p.name for p in out.iterdir())}
    expected = {"convert": ["mp-149", "mp-633688"], "fetch": ["mp-149.json.gz", "mp-633688.json.gz"],
                "predict": ["mp-149.CHGCAR", "mp-633688.CHGCAR"]}
    assert names.get(command) == expected.get(command)
    if command in ("tokenize", "prepare"):
        meta = read_json(out / "meta.json")
        assert {*meta["materials"], *meta["skipped"]} == {"mp-149", "mp-633688"}
    assert data_kind("mp-149") == "densities"


def test_all_ids_without_a_density_are_in_one_sentence(api, bucket, tomat, tmp_path):
    done = tomat("convert", "mp-13,mp-149,mp-5,mp-6", tmp_path / "store")
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "store").exists()
    assert "there is no density of mp-13 at s3://materialsproject-parsed/chgcars, and the Materials Project does not know " \
           "mp-5, mp-6: leave these ids out." in done.err
    done = tomat("fetch", "mp-13,mp-149,mp-5", "--out", tmp_path / "out")
    assert done.code == 2 and "mp-13 at" in done.err and "mp-5:" in done.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mp-149.json.gz", "mp-149.json.gz.md5"]
    with pytest.raises(TomatError, match="mp-1049 and 1 others: leave"):
        fetch([f"mp-{1000 + i}" for i in range(51)], tmp_path)


def test_without_a_key_nothing_is_asked_and_the_sentence_names_the_key(api, bucket, monkeypatch, tmp_path):
    monkeypatch.delenv("MP_API_KEY")
    assert fetch(["mp-3001"], tmp_path)
    with pytest.raises(TomatError, match=r"no density of mp-149, mp-13 at .*: set MP_API_KEY"):
        open_source("mp-3001,mp-149,mp-13")
    assert api.questions == []
    monkeypatch.setenv("TOMAT_MP_API_KEY", "from the settings")
    assert fetch(["mp-149"], tmp_path) and set(api.keys) == {"from the settings"}


def test_a_run_that_was_interrupted_asks_for_the_rest(api, bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue, "BATCH", 1)
    api.types |= {"mp-7": {"mp-3001": STATIC}, "mp-8": {"mp-3020": STATIC}}
    wrong = Late([(500, {}, b"")], after=6)  # one question for a material, and one for each of its static tasks
    monkeypatch.setattr(api, "wrong", wrong)
    with pytest.raises(TomatError, match="answers with status 500: run it again later"):
        fetch(["mp-7", "mp-149", "mp-8"], tmp_path)
    assert known_tasks(BASE_URL) == {"mp-7": "mp-3001", "mp-149": "mp-3002"} and api.asked_for() == ["mp-7", "mp-149", "mp-8"]
    api.questions.clear()
    assert len(fetch(["mp-7", "mp-149", "mp-8"], tmp_path)) == 3 and api.asked_for() == ["mp-8"]


class Late(list):
    "Wrong answers that come after some right ones."

    def __init__(self, answers, after):
        super().__init__(answers)
        self.after = after

    def __bool__(self):
        self.after -= 1
        return len(self) > 0 and self.after < 0


def test_too_many_questions_are_asked_again(api, bucket, tmp_path):
    api.wrong = [(429, {"Retry-After": "0"}, b"slow down"), (503, {"Retry-After": "0"}, b"")]
    assert fetch(["mp-149"], tmp_path) and len(api.questions) == 4


@pytest.mark.parametrize("wrong, words", [
    ((401, {}, b'{"message":"Invalid authentication credentials"}'), "refuses the key in MP_API_KEY"),
    ((403, {}, b""), "refuses the key in MP_API_KEY"),
    ((404, {}, b""), "answers with status 404"),
    ((302, {"Location": "http://127.0.0.1:9/"}, b""), "answers with status 302"),
    ((200, {}, b"<html>"), "the answer of http.*is not valid JSON"),
    ((200, {}, b'{"detail": []}'), "answers without a list of documents"),
    ((200, {}, b'{"data": ["mp-149"]}'), "answers without a list of documents")])
def test_wrong_answers_are_one_sentence(api, bucket, tmp_path, wrong, words):
    api.wrong = [wrong]
    with pytest.raises(TomatError, match=words) as raised:
        fetch(["mp-149"], tmp_path)
    assert "\n" not in str(raised.value) and known_tasks(BASE_URL) == {}


def test_no_network_and_a_damaged_table(api, bucket, tmp_path):
    api.stop()
    with pytest.raises(TomatError, match="cannot be reached, check the network"):
        fetch(["mp-149"], tmp_path)
    (tmp_path / "cache" / "tasks.json").parent.mkdir(exist_ok=True)
    for damaged in ("[]", '{"s3://x": {"mp-1": 1}}', "{"):
        (tmp_path / "cache" / "tasks.json").write_text(damaged)
        with pytest.raises(TomatError, match=r"tasks.json is no.*(remove it|write it again)"):
            fetch(["mp-149"], tmp_path)


def test_a_task_that_has_gone_is_looked_up_again(api, bucket, three, tmp_path):
    fetch(["mp-149"], tmp_path / "a")
    bucket.rm(f"{BASE_URL[5:]}/mp-3002.json.gz")
    [path] = fetch(["mp-149"], tmp_path / "b")
    assert known_tasks(BASE_URL) == {"mp-149": "mp-3001"} and path.is_file()


def test_ids_in_letters(api, bucket, three, tmp_path):
    api.types["mp-aaaaft"] = {plain_id("mp-149"): RELAXED, "mp-aaaelp": STATIC}  # answers may have either form
    del api.types["mp-149"]
    assert [plain_id(f"mp-{word}") for word in ("ft", "aaaaft", "aaaelp", "hkybv")] == ["mp-149", "mp-149", "mp-3005", "mp-hkybv"]
    write_density(replace(three[0], id="x"), f"{BASE_URL}/mp-3005.json.gz")
    bucket.chmod("materialsproject-parsed", "public-read", recursive=True)
    api.dates["mp-3005"] = "2024-01-01"
    assert static_tasks(["mp-149"]) == {"mp-149": ["mp-3005"]}
    source = open_source("mp-aaaaft")
    assert source.ids == ["mp-aaaaft"] and source.read("mp-aaaaft").formula == three[0].formula


def test_a_store_of_materials_is_resumed(api, bucket, tmp_path):
    source = open_source("mp-149,mp-633688")
    assert [store_all(source, tmp_path / "store") for _ in range(2)] == [2, 0]
    assert store_all(open_source("mp-149,mp-633688"), tmp_path / "store") == 0
