"""Data sets in Parquet files: every form of their columns, from a disk, a bucket and a hub, a few rows at a time."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crystals import a_density
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density import table
from tomat.density.convert import store_all
from tomat.density.formats import UnreadableFile
from tomat.density.source import Source, Table, open_source
from tomat.density.store import RawStore, sample_store
from tomat.density.table import Columns, columns_from
from tomat.io.remote import TomatError, remote_fs
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.start import data_kind


def lemat(density, **other):
    "A row with LeMat-Rho's columns, of which its fetcher writes more; grids are JSON there."
    s = density.structure
    return {"immutable_id": density.id, "nsites": len(s), "lattice_vectors": s.lattice.matrix.tolist(),
            "cartesian_site_positions": s.cart_coords.tolist(), "species_at_sites": [site.specie.symbol for site in s],
            "functional": "r2scan", "compressed_charge_density": json.dumps(density.total.tolist()),
            "charge_density_grid_shape": list(density.shape), "bader_charges": None, **other}


def write(path, rows, group=2, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return path


@pytest.fixture
def five():
    return [a_density(seed, (5, 4, 6), 2 + seed % 2, id=f"agm00{seed}") for seed in range(5)]


@pytest.fixture
def data(five, tmp_path):
    "Two files, as a data set has shards: three rows in two groups, and two in one."
    write(tmp_path / "data" / "chunk_000001.parquet", [lemat(density) for density in five[3:]])
    write(tmp_path / "data" / "chunk_000000.parquet", [lemat(density) for density in five[:3]])
    return tmp_path / "data"


def assert_same(one, other, rtol=1e-5):
    np.testing.assert_allclose(one.total, other.total, rtol=rtol)
    np.testing.assert_allclose(one.structure.lattice.matrix, other.structure.lattice.matrix)
    assert [s.specie.symbol for s in one.structure] == [s.specie.symbol for s in other.structure]
    far = (one.structure.frac_coords - other.structure.frac_coords + 0.5) % 1 - 0.5
    assert abs(far).max() < 1e-8 and one.id == other.id


FORMS = {
    "as in LeMat-Rho": (lemat, ""),
    "nested lists": (lambda d: lemat(d, rho=d.rho.tolist()), "density=rho,unit=e/A3"),
    "fixed lists": (lambda d: lemat(d, rho=d.total.tolist()), "density=rho"),
    "flat, atomic units": (lambda d: lemat(d, rho=(d.rho * 0.529177210903 ** 3).ravel().tolist(), n=list(d.shape)),
                           "density=rho,shape=n,unit=e/bohr3"),
    "flat, as in a CHGCAR": (lambda d: lemat(d, rho=d.total.ravel(order="F").tolist(), n=list(d.shape)),
                             "density=rho,shape=n,order=F"),
    "flat JSON": (lambda d: lemat(d, rho=json.dumps(d.total.ravel().tolist())), "density=rho,shape=charge_density_grid_shape"),
    "numbers and fractions": (lambda d: {"name": d.id, "z": [s.specie.Z for s in d.structure],
                                         "x": d.structure.frac_coords.tolist(), "rho": d.total.tolist(),
                                         "cell": d.structure.lattice.matrix.ravel().tolist()},
                              "id=name,species=z,fractions=x,lattice=cell,density=rho"),
    "a structure": (lambda d: {"name": d.id, "s": json.dumps(d.structure.as_dict()), "rho": d.total.tolist()},
                    "id=name,structure=s,density=rho")}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row(five, tmp_path, form):
    row, columns = FORMS[form]
    rows = pa.Table.from_pylist([row(density) for density in five])
    if form == "fixed lists":
        fixed = pa.list_(pa.list_(pa.list_(pa.float32(), 6), 4), 5)
        rows = rows.set_column(rows.column_names.index("rho"), "rho", pa.array([d.total.tolist() for d in five], fixed))
    pq.write_table(rows, tmp_path / "x.parquet", row_group_size=3)
    source = open_source(tmp_path / "x.parquet", columns=columns_from(columns))
    assert isinstance(source, Table) and isinstance(source, Source) and source.ids == [density.id for density in five]
    for density in five:
        assert_same(source.read(density.id), density)


def test_rows_in_any_order_and_in_threads(five, data):
    source, by_id = open_source(data), {density.id: density for density in five}
    assert source.ids == [density.id for density in five]
    order = [five[i].id for i in np.random.default_rng(0).integers(0, 5, 60)]
    with ThreadPoolExecutor(4) as pool:
        for id, density in zip(order, pool.map(source.read, order), strict=True):
            assert_same(density, by_id[id])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_of_a_table_is_resumed_and_follows_it(five, data, tmp_path, workers):
    def convert(**columns):
        return store_all(open_source(data, columns=Columns(**columns)), tmp_path / "store", workers)
    assert [convert(), convert()] == [5, 0]
    for density in five:
        assert_same(RawStore(tmp_path / "store").read(density.id), density)
    write(data / "chunk_000001.parquet", [lemat(replace(density, values=2 * density.values)) for density in five[3:]])
    assert [convert(), convert()] == [2, 0]
    np.testing.assert_allclose(RawStore(tmp_path / "store").read(five[4].id).total, 2 * five[4].total, rtol=1e-5)
    assert [convert(unit="e/A3"), convert(unit="e/A3")] == [5, 0]  # the same bytes mean another density


def test_a_table_in_a_bucket(five, data, s3, tmp_path):
    fs, key = remote_fs(f"{s3}/set/data")
    for path in data.iterdir():
        fs.pipe_file(f"{key}/{path.name}", path.read_bytes())
    for name in (f"{s3}/set/data", f"{s3}/set/data/chunk_000000.parquet"):
        source = open_source(name)
        assert isinstance(source, Table) and source.ids == [density.id for density in five][:len(source.ids)]
        assert_same(source.read(five[2].id), five[2])
    assert [store_all(open_source(f"{s3}/set/data"), tmp_path / "store") for _ in range(2)] == [5, 0]
    tok = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=3, pad_to=None)
    remote, local = (tokenize(open_source(name), tok, tmp_path / f"rows{i}", TokenizeConfig(4))["shards"]
                     for i, name in enumerate([f"{s3}/set/data", data]))
    assert remote == local


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "One row group of 256 grids, 28 MB that nothing shrinks."
    grids = np.random.default_rng(0).random((256, 24 ** 3))
    rows = pa.Table.from_pylist([lemat(a_density(1), immutable_id=f"m-{i}", n=[24, 24, 24]) for i in range(len(grids))])
    flat = pa.ListArray.from_arrays(np.arange(0, grids.size + 1, 24 ** 3, dtype=np.int32), grids.ravel())
    path = tmp_path_factory.mktemp("large") / "x.parquet"
    pq.write_table(rows.append_column("rho", flat), path, use_dictionary=False)
    return path, grids[5]


WANTED = "density=rho,shape=n,unit=e/A3"


def test_one_row_of_a_large_group_moves_a_part_of_it(large, s3, line, monkeypatch):
    path, sixth = large
    fs, key = remote_fs(f"{s3}/x.parquet")
    fs.pipe_file(key, path.read_bytes())
    monkeypatch.setattr(table, "_BUFFER", 1 << 18)
    wire = line(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
    source = open_source(f"{s3}/x.parquet", columns=columns_from(WANTED))
    np.testing.assert_allclose(source.read("m-5").rho.ravel(), sixth, rtol=1e-6)
    assert wire.came < path.stat().st_size / 4
    first = wire.came
    for i in range(6, 256):
        source.read(f"m-{i}")
    assert wire.came - first < 1.2 * path.stat().st_size  # the rest came once


def test_a_group_is_never_held_whole(large):
    path, _ = large
    code = f"""
import pyarrow as pa
from tomat.density import table
from tomat.density.source import open_source
table._BUFFER = 1 << 18
source = open_source({str(path)!r}, columns=table.columns_from({WANTED!r}))
for id in source.ids:
    source.read(id)
print(pa.default_memory_pool().max_memory())"""
    most = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert most < path.stat().st_size / 2


class Hub(BaseHTTPRequestHandler):
    "The addresses of the Hugging Face Hub that its file system asks for, with one data set."
    folder = None
    commit = "0123456789abcdef0123456789abcdef01234567"

    def answer(self, body, **headers):
        start, end = 0, len(body) - 1
        if wanted := self.headers["Range"]:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or end), end)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
        self.send_header("Content-Length", str(end - start + 1))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:end + 1])

    def entry(self, path):
        return {"type": "file", "path": f"data/{path.name}", "size": path.stat().st_size, "oid": "f" * 40}

    def do_GET(self):
        path = urlsplit(self.path).path
        if "/resolve/" in path:
            return self.answer((self.folder / path.rsplit("/", 1)[1]).read_bytes(), ETag='"one"', X_Repo_Commit=self.commit,
                               Accept_Ranges="bytes")
        files = [self.entry(file) for file in sorted(self.folder.iterdir())]
        root = path.rstrip("/").endswith(("/tree/main", self.commit))
        found = [{"type": "directory", "path": "data", "oid": "e" * 40}] if root else files
        if "/tree/" not in path:
            found = {"id": "user/set", "sha": self.commit, "siblings": [], "private": False, "tags": [], "downloads": 0, "likes": 0}
        self.answer(json.dumps(found).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def do_POST(self):
        wanted = dict(part.split("=") for part in self.rfile.read(int(self.headers["Content-Length"])).decode().split("&"))
        name = wanted.get("paths", "").replace("%2F", "/")
        found = [{"type": "directory", "path": "data", "oid": "e" * 40}] if name == "data" else \
            [self.entry(file) for file in self.folder.iterdir() if f"data/{file.name}" == name]
        self.answer(json.dumps(found).encode(), Content_Type="application/json")

    def log_message(self, *args):
        pass


def test_a_data_set_of_the_hub(five, data, tmp_path):
    "hf:// in a process of its own, since the hub's client reads its address when it is imported."
    pytest.importorskip("huggingface_hub")
    Hub.folder = data
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    def convert():
        words = ["convert", "hf://datasets/user/set/data", str(tmp_path / "store"), "--workers", "1"]
        return subprocess.run([sys.executable, "-m", "tomat.cli", *words], env=env, capture_output=True, text=True)
    done = convert()
    assert done.returncode == 0, done.stderr
    for density in five:
        assert_same(RawStore(tmp_path / "store").read(density.id), density)
    hub.shutdown()
    hub.server_close()
    done = convert()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be reached, check the network" in done.stderr


def test_the_commands_take_tables(tomat, tmp_path, monkeypatch):
    densities = sorted(map(sample_store().read, sample_store().ids), key=lambda density: density.values.size)[:2]
    rows = [lemat(density, rho=density.total.tolist()) for density in densities]
    path = write(tmp_path / "x.parquet", [{**row, "compressed_charge_density": None} for row in rows])
    option = ["--columns", "density=rho", "--workers", 1]
    for words in (["convert", path, tmp_path / "store"], ["tokenize", path, "--out", tmp_path / "rows", "--patch-size", 6],
                  ["prepare", path, "--out", tmp_path / "voxels", "--kept", 9, "--atoms", "packaged"],
                  ["convert", path, tmp_path / "files", "--format", "cube"]):
        assert (done := tomat(*words, *option)).code == 0, done.err
    monkeypatch.setenv("TOMAT_COLUMN_DENSITY", "rho")
    assert tomat("convert", path, tmp_path / "again").code == 0 and data_kind(path) == "densities"
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == sorted([*(f"{d.id}.cube" for d in densities), "sources.json"])
    for words, why in [(["convert", tmp_path / "store", tmp_path / "x", "--columns", "density=rho"], "leave --columns out"),
                       (["convert", path, tmp_path / "x", "--columns", "rho"], "give pairs such as density=rho"),
                       (["convert", path, tmp_path / "x", "--columns", "density=charge"], "has no column charge: name the columns"),
                       (["convert", tmp_path / "rows", tmp_path / "x"], "holds no density")]:
        done = tomat(*words)
        assert done.code == 2 and why in done.err and done.err.count("\n") == 1, done.err


ODD = {
    "no density": ({"compressed_charge_density": None}, "has nothing in its column compressed_charge_density"),
    "no JSON": ({"compressed_charge_density": "[1, 2"}, "the grid is not valid JSON"),
    "ragged": ({"compressed_charge_density": "[[[1, 2], [3]]]"}, "is no density with its crystal"),
    "flat": ({"compressed_charge_density": "[1, 2, 3]"}, "its grid has 1 axes: give nested lists"),
    "words": ({"compressed_charge_density": '[[["a"]]]'}, "is no density with its crystal"),
    "not finite": ({"compressed_charge_density": "[[[NaN]]]"}, "NaN or infinite"),
    "no element": ({"species_at_sites": ["Xx", "Li"]}, "is no density with its crystal"),
    "too few atoms": ({"species_at_sites": ["Li"]}, "is no density with its crystal"),
    "no volume": ({"lattice_vectors": [[1.0, 0, 0], [2, 0, 0], [3, 0, 0]]}, "(no cell volume|no density with its crystal)"),
    "no atoms": ({"species_at_sites": [], "cartesian_site_positions": []}, "(no atoms|no density with its crystal)")}


@pytest.mark.parametrize("odd", ODD)
def test_a_row_that_is_no_density_is_passed_over(five, tmp_path, tomat, odd):
    changed, words = ODD[odd]
    schema = pa.Table.from_pylist([lemat(five[0])]).schema
    path = write(tmp_path / "x.parquet", [lemat(five[0]), lemat(five[2], **changed), lemat(five[4])], schema=schema)
    with pytest.raises(UnreadableFile, match=words) as raised:
        open_source(path).read(five[2].id)
    assert "\n" not in str(raised.value) and f"{path}, row 1 of group 0" in str(raised.value)
    done = tomat("convert", path, tmp_path / "store", "--workers", 1)
    assert done.code == 1 and f"passed over {five[2].id}: {path}, row 1" in done.err
    assert RawStore(tmp_path / "store").ids == [five[0].id, five[4].id]


def test_flat_grids_that_do_not_fit_their_shape(five, tmp_path):
    for shape in ([5, 4, 7], [120], None, [0, 4, 6]):
        path = write(tmp_path / "x.parquet", [lemat(five[0], rho=five[0].total.ravel().tolist(), n=shape)],
                     schema=pa.Table.from_pylist([lemat(five[0], rho=[1.0], n=[1])]).schema)
        with pytest.raises(UnreadableFile, match=r"(its grid has 120 values, and its shape is|has nothing in its column n)"):
            open_source(path, columns=columns_from("density=rho,shape=n")).read(five[0].id)


def test_tables_that_cannot_be_opened(five, tmp_path):
    rows = [lemat(density) for density in five]
    for other, why in [([*rows, rows[0]], "both have the id 'agm000', or one has it twice"),
                       ([*rows, {**rows[0], "immutable_id": None}], "row 5, has None as its immutable_id"),
                       ([{**rows[0], "immutable_id": "../x"}], r"row 0, has '../x' as its immutable_id"),
                       ([{"a": 1}], "has no column immutable_id: name the columns as in .* of a")]:
        with pytest.raises(TomatError, match=why):
            open_source(write(tmp_path / "x.parquet", other)).ids  # noqa: B018
    whole = write(tmp_path / "x.parquet", rows).read_bytes()
    for content in (b"PAR1", whole[:-100], b"", b"Dear reader"):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(TomatError, match=r"x.parquet is no Parquet file that can be read: copy it again\.$"):
            open_source(tmp_path / "x.parquet").ids  # noqa: B018
    torn = bytearray(whole)
    torn[4:400] = bytes(396)
    (tmp_path / "x.parquet").write_bytes(torn)
    with pytest.raises(TomatError, match="is no Parquet file that can be read"):
        for _ in range(2):  # a stream that failed is not continued
            open_source(tmp_path / "x.parquet").read(five[0].id)
