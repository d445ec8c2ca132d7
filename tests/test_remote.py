"""The whole way in object stores, on servers on loopback: fetch, convert, tokenize, verify, sync; and the way back."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from crystals import read_rows

from tomat.io.fetch import fetch
from tomat.io.remote import TomatError, list_folder
from tomat.io.files import read_json, read_text
from tomat.density.formats import read_density, write_density
from tomat.dataset.verify import verify
from tomat.dataset.meta import read_meta
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.source import Folder, InMemory, open_source
from tomat.density.convert import store_all
from tomat.dataset.sync import sync
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.tokenizer import Tokenizer

# a file of the open bucket may be named here, to go the same way with it
NACL = Path(__file__).parent / "files" / "CHGCAR.NaCl.gz"
REAL = os.environ.get("TOMAT_TEST_MP_JSON", "")
ID = "mp-2680643"


@pytest.fixture
def open_bucket(s3, tmp_path, monkeypatch):
    "The open bucket of the Materials Project, as far as one density goes."
    import s3fs
    here = tmp_path / f"{ID}.json.gz"
    shutil.copy(REAL, here) if REAL else write_density(read_density(NACL), here)
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], use_listings_cache=False)
    if not fs.exists("materialsproject-parsed"):
        fs.mkdir("materialsproject-parsed", acl="public-read")
    fs.pipe_file(f"materialsproject-parsed/chgcars/{ID}.json.gz", here.read_bytes(), ACL="public-read")
    monkeypatch.setenv("TOMAT_CACHE", str(tmp_path / "cache"))
    return here


def small_rows():
    return Tokenizer("anchored", PUBLISHED_DENSITY)


def test_from_the_open_bucket_to_checked_rows_elsewhere(open_bucket, s3, tmp_path):
    [file] = fetch([ID])
    assert file.read_bytes() == open_bucket.read_bytes()
    assert store_all(Folder(file), f"{s3}/densities") == 1
    assert store_all(Folder(file), f"{s3}/densities") == 0
    store = open_source(f"{s3}/densities")
    want = read_density(open_bucket).total
    np.testing.assert_allclose(store.read(ID).total, want, rtol=1e-6, atol=1e-4)
    tokenize(store, small_rows(), f"{s3}/rows", TokenizeConfig(4))
    assert verify(f"{s3}/rows") == []
    tokenize(store, small_rows(), tmp_path / "local", TokenizeConfig(4))
    assert read_json(f"{s3}/rows/meta.json") == read_json(tmp_path / "local" / "meta.json")
    assert sync(f"{s3}/rows", tmp_path / "copy")["copied"] == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()} == \
        {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir()}
    assert sync(f"{s3}/rows", tmp_path / "copy")["copied"] == 0


def test_an_id_is_a_source(open_bucket, tmp_path):
    """`tomat tokenize mp-… --out rows` fetches what it needs; two processes do as well."""
    for workers in (1, 2):
        meta = tokenize(open_source(ID), small_rows(), tmp_path / f"rows{workers}", TokenizeConfig(4, workers=workers))
        assert list(meta["materials"]) == [ID]
    assert (tmp_path / "rows1" / "meta.json").read_bytes() == (tmp_path / "rows2" / "meta.json").read_bytes()
    with pytest.raises(TomatError, match="mp-999"):
        tokenize(open_source("mp-999"), small_rows(), tmp_path / "none", TokenizeConfig(4))
    assert not (tmp_path / "none").exists()


def test_an_unfinished_data_set_in_a_bucket_is_finished(s3, tmp_path, three):
    tok = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=3, pad_to=None)
    class Lost(InMemory):
        def read(self, id):
            if id == three[1].id:
                raise TomatError("the line is dead.")
            return super().read(id)
    with pytest.raises(TomatError, match="the line is dead"):
        tokenize(Lost(three), tok, f"{s3}/rows", TokenizeConfig(4, rows_per_shard=4))
    assert list_folder(f"{s3}/rows") == ["rows-00000.json", "rows-00000.parquet", "unfinished.json"]
    with pytest.raises(TomatError, match="not finished"):
        read_meta(f"{s3}/rows")
    import s3fs
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], use_listings_cache=False)
    stamp = fs.info(f"{s3}/rows/rows-00000.parquet")["LastModified"]
    meta = tokenize(three, tok, f"{s3}/rows", TokenizeConfig(4, rows_per_shard=4))
    assert fs.info(f"{s3}/rows/rows-00000.parquet")["LastModified"] == stamp
    assert meta["shards"] == tokenize(three, tok, tmp_path / "rows", TokenizeConfig(4, rows_per_shard=4))["shards"]
    assert list_folder(f"{s3}/rows") == ["meta.json", *meta["shards"]] and verify(f"{s3}/rows") == []
    with pytest.raises(TomatError, match="other materials or settings"):
        tokenize(three, tok, f"{s3}/rows", TokenizeConfig(5, rows_per_shard=5))


def test_parts_in_a_bucket(s3, three):
    tok = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=3, pad_to=None)
    for i in range(2):
        tokenize(three, tok, f"{s3}/rows", TokenizeConfig(4, rows_per_shard=4), part=(i, 2))
    assert len(read_rows(f"{s3}/rows").ids) == 12 and verify(f"{s3}/rows") == []


def test_calculations_in_a_bucket_are_a_source(s3, three, tmp_path):
    for density in three:
        write_density(density, f"{s3}/runs/{density.id}/CHGCAR.gz")
    source = open_source(f"{s3}/runs")
    assert source.ids == ["m-1", "m-2", "m-3"]
    assert store_all(source, tmp_path / "store") == 3
    assert read_text(tmp_path / "store" / "mp_filelist.txt").split() == source.ids
