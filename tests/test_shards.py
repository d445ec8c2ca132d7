"""Rows on disk: the same bytes every time, each material by itself, nothing half-written, and exactly the published columns."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crystals import CODECS, a_density, read_rows, with_any_sad
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Structure

from tomat.tokens.codecs import POSITIONS, PUBLISHED_DENSITY
from tomat.density.core import Density
from tomat.io.files import read_json
from tomat.io.remote import TomatError
from tomat.tokens.patches import as_size, cut
from tomat.dataset.verify import verify
from tomat.dataset.meta import read_meta, row_of
from tomat.dataset.parquet import SCHEMA, TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.source import InMemory, material_rng
from tomat.io.settings import data_set
from tomat.density.store import RawStore, sample_store, write_store
from tomat.dataset.stream import ParquetRows
from tomat.tokens.tokenizer import Tokenizer, tokenizer_from_dict

TOMAT = Path(sys.executable).parent / "tomat"


@cache
def tokenizer(layout="framed", codec="two_token_9_12", size=3, pad_to=None, target="total"):
    return Tokenizer(layout, CODECS[codec], patch_size=size, pad_to=pad_to, target=target)


def tokenized(materials, tok, out, ids=None, part=None, **more):
    return tokenize(materials, tok, out, TokenizeConfig(**more), ids, part)


def contents(folder):
    "Every file of a data set."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_data_set_is_the_same_bytes(tmp_path):
    densities = [a_density(seed) for seed in range(5)]
    for name in ("one", "two"):
        tokenize(iter(densities), tokenizer(), tmp_path / name, TokenizeConfig(6, seed=3, label="x", rows_per_shard=12))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two and len(one) == 4
    tokenize(densities, tokenizer(), tmp_path / "other", TokenizeConfig(6, seed=4, label="x", rows_per_shard=12))
    assert all(contents(tmp_path / "other")[name] != content for name, content in one.items())


def rows_of(folder, id):
    rows = read_rows(folder)
    return [(ids.tolist(), offset.tolist()) for ids, whose, offset in zip(rows.ids, rows.materials, rows.offsets_Nx3, strict=True)
            if whose == id]


def test_a_material_does_not_feel_the_others(tmp_path):
    densities = [a_density(seed) for seed in range(4)]
    sets = {"all": densities, "reversed": densities[::-1], "alone": [densities[2]], "without": densities[2:]}
    for name, some in sets.items():
        tokenize(some, tokenizer(), tmp_path / name, TokenizeConfig(7, rows_per_shard=10))
    want = rows_of(tmp_path / "all", "m-2")
    assert len(want) == 7 and all(rows_of(tmp_path / name, "m-2") == want for name in sets)
    offsets = {id: str([offset for _, offset in rows_of(tmp_path / "all", id)]) for id in ("m-0", "m-1", "m-2", "m-3")}
    assert len(set(offsets.values())) == 4, "two materials share their random places"


def test_more_patches_begin_with_the_fewer(tmp_path):
    """Drawing more of them extends a data set, and leaves what was drawn."""
    for n in (4, 9):
        tokenize([a_density(1)], tokenizer(), tmp_path / str(n), TokenizeConfig(n))
    assert rows_of(tmp_path / "9", "m-1")[:4] == rows_of(tmp_path / "4", "m-1")


def test_seeds_are_what_they_were():
    """A change here changes every data set made from now on."""
    assert material_rng(42, "mp-2282417").integers(0, 1000, 6).tolist() == [21, 979, 338, 988, 64, 89]
    assert material_rng(42, "mp-2282417").integers(0, 10**9) != material_rng(43, "mp-2282417").integers(0, 10**9)


def test_the_columns_are_the_published_ones(tmp_path):
    meta = tokenize([a_density(seed) for seed in range(3)], tokenizer(), tmp_path / "rows", TokenizeConfig(4, rows_per_shard=8))
    assert list(meta["shards"]) == ["rows-00000.parquet", "rows-00001.parquet"]
    assert [shard["rows"] for shard in meta["shards"].values()] == [8, 4]
    published = pa.schema([("task_id", pa.string()), ("offset_x", pa.int32()), ("offset_y", pa.int32()), ("offset_z", pa.int32()),
                           ("input_ids", pa.list_(pa.int32()))])
    assert SCHEMA.equals(published)
    for name, groups in zip(meta["shards"], (2, 1), strict=True):
        file = pq.ParquetFile(tmp_path / "rows" / name)
        assert file.schema_arrow.equals(published) and file.num_row_groups == groups
        columns = [file.metadata.row_group(0).column(i) for i in range(5)]
        assert {column.compression for column in columns} == {"ZSTD"} and file.metadata.row_group(0).num_rows == 4
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["meta.json", *meta["shards"]]


def test_published_rows_have_8192_tokens(tmp_path):
    for layout in ("anchored", "framed"):
        meta = tokenize([a_density(0, n_atoms=9)], Tokenizer(layout, PUBLISHED_DENSITY), tmp_path / layout, TokenizeConfig(3))
        lists = pq.read_table(tmp_path / layout / "rows-00000.parquet")["input_ids"].to_pylist()
        assert [len(ids) for ids in lists] == [8192] * 3 and meta["tokens_padded"] == 3 * 8192
        assert meta["tokens"] == 3 * {"anchored": 5606, "framed": 5599}[layout] == sum(np.count_nonzero(ids) for ids in lists)


def test_meta_counts_what_is_there(tmp_path):
    long = Density(np.ones((1, 1, 1200)), a_density(0).structure, id="long")
    huge = Density(np.full((4, 4, 4), 1e7), a_density(0).structure, id="huge")  # above the published range: all clipped
    many = a_density(9, n_atoms=60, id="many")
    densities = [a_density(0), long, huge, many, a_density(1)]
    tok = tokenizer(pad_to=300)
    meta = tokenize(densities, tok, tmp_path / "rows", TokenizeConfig(5, seed=9, label="counted", rows_per_shard=20))
    assert meta == read_json(tmp_path / "rows" / "meta.json")
    tables = [pq.read_table(tmp_path / "rows" / name) for name in meta["shards"]]
    ids = [row for table in tables for row in table["input_ids"].to_pylist()]
    whose = [id for table in tables for id in table["task_id"].to_pylist()]
    assert whose == ["m-0"] * 5 + ["huge"] * 5 + ["m-1"] * 5 and [len(t) for t in tables] == [10, 5], tables
    assert (meta["rows"], meta["tokens_padded"]) == (15, 15 * 300) == (len(ids), sum(map(len, ids)))
    assert meta["tokens"] == sum(np.count_nonzero(row) for row in ids) == 15 * tok.row_length(2)
    assert list(meta["skipped"]) == ["long", "many"] and "1200" in meta["skipped"]["long"] and "300" in meta["skipped"]["many"]
    counts = {id: (material["rows"], material["clipped"]) for id, material in meta["materials"].items()}
    assert counts == {"m-0": (5, 0), "huge": (5, 5 * 27), "m-1": (5, 0)}
    assert (meta["seed"], meta["label"], meta["patches_per_material"]) == (9, "counted", 5)
    assert tokenizer_from_dict(meta["tokenizer"]) == tok


sides = st.integers(1, 6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(layout=st.sampled_from(["anchored", "framed"]), codec=st.sampled_from(sorted(CODECS)),
       shape=st.tuples(*[st.integers(1, 12)] * 3), size=st.one_of(sides, st.tuples(sides, sides, sides)),
       n_atoms=st.one_of(st.integers(1, 12), st.sampled_from([1, 60, 200])),
       target=st.sampled_from(["total", "total", "difference"]), seed=st.integers(0, 10**6))
def test_rows_decode_to_the_patches_they_were_cut_from(tmp_path_factory, layout, codec, shape, size, n_atoms, target, seed):
    """Any codec, layout, cell and patch; grids smaller than the patch among them. Read with pyarrow alone."""
    folder, density = tmp_path_factory.mktemp("rows"), a_density(seed, shape=shape, n_atoms=n_atoms)
    if target == "difference":
        density = with_any_sad(density)
    tok = tokenizer(layout, codec, size, target=target)
    tokenize([density], tok, folder / "rows", TokenizeConfig(3))
    table = pq.read_table(folder / "rows" / "rows-00000.parquet")
    reader = tokenizer_from_dict(read_json(folder / "rows" / "meta.json")["tokenizer"])
    offsets = np.stack([table[f"offset_{axis}"].to_numpy() for axis in "xyz"], axis=1)
    assert (offsets >= 0).all() and (offsets < shape).all()
    for ids, offset, patch in zip(table["input_ids"].to_pylist(), offsets, cut(tok.target_of(density), offsets, size), strict=True):
        row = reader.decode(ids)
        assert (row.shape, row.size) == (shape, as_size(size)) and len(ids) == tok.row_length(n_atoms)
        assert row.species == tuple(site.specie.Z for site in density.structure)
        assert (np.abs(row.values - patch) <= CODECS[codec].bound(patch)).all()
        frac = density.structure.frac_coords - (offset / np.array(shape) if layout == "framed" else 0)
        off = row.frac_coords - frac
        assert (np.abs(off - np.rint(off)) <= POSITIONS.bound(frac % 1.0) + 1e-15).all()


def test_the_sample_through_the_shards(tmp_path):
    store = sample_store()
    densities = [store.read(id) for id in store.split("validation")[:3]]
    tok = tokenizer(codec="levels", size=4, target="difference")
    tokenize(densities, tok, tmp_path / "rows", TokenizeConfig(5, rows_per_shard=6))
    rows = read_rows(tmp_path / "rows")
    assert len(rows.ids) == 15 and rows.tokenizer == tok and list(dict.fromkeys(rows.materials)) == [d.id for d in densities]
    for number in (0, 7, 14):
        reader, ids = row_of(tmp_path / "rows", number)
        assert ids.tolist() == rows.ids[number].tolist()
        density = next(d for d in densities if d.id == rows.materials[number])
        patch = cut(density.total - density.sad, rows.offsets_Nx3[[number]], 4)[0]
        assert (np.abs(reader.decode(ids).values - patch) <= tok.density_codec.bound(patch)).all()
    with pytest.raises(TomatError, match="the data set holds 15"):
        row_of(tmp_path / "rows", 15)


def test_materials_are_read_one_at_a_time(tmp_path):
    """The next one is asked for when the last one lies on disk."""
    asked = []
    class Watched(InMemory):
        def read(self, id):
            asked.append([p.stat().st_size > 100 for p in sorted(tmp_path.rglob("rows-*.parquet"))])
            return super().read(id)
    tokenize(Watched(a_density(seed) for seed in range(4)), tokenizer(), tmp_path / "rows", TokenizeConfig(2, rows_per_shard=2))
    assert [len(sizes) for sizes in asked] == [0, 1, 2, 3] and all(map(all, asked))


class Failing(InMemory):
    "One material cannot be read."

    def read(self, id):
        if id == "m-2":
            raise TomatError("the disk is gone.")
        return super().read(id)


def test_a_source_that_fails_leaves_whole_shards_or_nothing(tmp_path):
    densities = [a_density(seed) for seed in range(4)]
    with pytest.raises(TomatError, match="the disk is gone"):
        tokenize(Failing(densities), tokenizer(), tmp_path / "deep" / "rows", TokenizeConfig(2))
    for bad in ({"patches_per_material": 0}, {"rows_per_shard": 0}, {"seed": -1}, {"part": (3, 3)}):
        with pytest.raises(TomatError):
            tokenized([a_density(0)], tokenizer(), tmp_path / "rows", **bad)
    with pytest.raises(TomatError, match="no material"):
        tokenize([], tokenizer(), tmp_path / "rows", TokenizeConfig(2))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TomatError, match="the disk is gone"):
        tokenize(Failing(densities), tokenizer(), tmp_path / "rows", TokenizeConfig(2, rows_per_shard=2))
    assert [name for name in sorted(contents(tmp_path / "rows")) if name.endswith(".parquet")] == \
        ["rows-00000.parquet", "rows-00001.parquet"]
    with pytest.raises(TomatError, match="not finished"):
        read_meta(tmp_path / "rows")
    for name in ("rows", "whole"):
        tokenize(densities, tokenizer(), tmp_path / name, TokenizeConfig(2, rows_per_shard=2))
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")


def test_an_existing_folder_stays_unless_asked(tmp_path):
    tokenize([a_density(0)], tokenizer(), tmp_path / "rows", TokenizeConfig(2))
    before = contents(tmp_path / "rows")
    with pytest.raises(TomatError, match="other materials or settings"):
        tokenize([a_density(1)], tokenizer(), tmp_path / "rows", TokenizeConfig(2))
    with pytest.raises(TomatError, match="at most 1,023"):
        tokenize([Density(np.ones((1, 1, 1200)), a_density(0).structure)], tokenizer(), tmp_path / "rows",
                 TokenizeConfig(2, overwrite=True))
    assert contents(tmp_path / "rows") == before and [p.name for p in tmp_path.iterdir()] == ["rows"]
    tokenize([a_density(1)], tokenizer(), tmp_path / "rows", TokenizeConfig(2, overwrite=True))
    assert read_rows(tmp_path / "rows").materials == ["m-1", "m-1"] and [p.name for p in tmp_path.iterdir()] == ["rows"]


def harmed(content, harm):
    "Bytes of a shard after an accident."
    if harm == "not ours":
        sink = io.BytesIO()
        pq.write_table(SCHEMA.empty_table(), sink)
        return sink.getvalue()
    if harm == "flipped":
        return content[:150] + bytes([content[150] ^ 1]) + content[151:]
    return content[:200 if harm == "cut" else 0]


@pytest.mark.parametrize("when", ["finished", "unfinished", "without its note", "with half a note"])
@pytest.mark.parametrize("harm", ["cut", "empty", "not ours", "flipped"])
def test_a_damaged_shard_is_made_again(tmp_path, harm, when):
    """A footer that can be read is no proof: the bytes are compared with what was noted when they were written."""
    densities, out = [a_density(seed) for seed in range(4)], tmp_path / "rows"
    tokenize(densities, tokenizer(), tmp_path / "whole", TokenizeConfig(2, rows_per_shard=2))
    if when != "finished":
        with pytest.raises(TomatError, match="the disk is gone"):
            tokenize(Failing(densities), tokenizer(), out, TokenizeConfig(2, rows_per_shard=2))
    else:
        tokenize(densities, tokenizer(), out, TokenizeConfig(2, rows_per_shard=2))
    shard, note = out / "rows-00001.parquet", out / "rows-00001.json"
    shard.write_bytes(harmed(shard.read_bytes(), harm))
    if when == "without its note":
        note.unlink()
    elif when == "with half a note":
        note.write_text(note.read_text()[:20])
    if when == "finished":
        assert verify(out)
        with pytest.raises(TomatError, match=r"rows-00001\.parquet is missing or damaged"):
            ParquetRows(out)
    tokenize(densities, tokenizer(), out, TokenizeConfig(2, rows_per_shard=2))
    assert contents(out) == contents(tmp_path / "whole") and verify(out) == []


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", [{"ids": ["m-0", "m-1"]}, {"ids": [f"m-{i}" for i in range(6)]}, {"seed": 1},
                                   {"rows_per_shard": 4}, {"ids": ["m-3", "m-2", "m-1", "m-0"]}, {"prepare": with_any_sad},
                                   {"part": (0, 2)}], ids=str)
def test_a_folder_belongs_to_one_job(tmp_path, other, finished):
    """Fewer or more materials, other settings: neither shrunk nor mixed, whole or not."""
    densities, out = [a_density(seed) for seed in range(6)], tmp_path / "rows"
    first = {"patches_per_material": 2, "rows_per_shard": 2, "ids": [f"m-{i}" for i in range(4)]}
    if finished:
        tokenized(densities, tokenizer(), out, **first)
    else:
        with pytest.raises(TomatError, match="the disk is gone"):
            tokenized(Failing(densities), tokenizer(), out, **first)
    before = contents(out)
    with pytest.raises(TomatError, match=r"other materials or settings|not made in parts"):
        tokenized(densities, tokenizer(), out, **first | other)
    assert contents(out) == before
    tokenized(densities, tokenizer(), out, **first)
    assert verify(out) == [] and list(read_meta(out)["materials"]) == first["ids"]


def test_a_part_belongs_to_one_run(tmp_path):
    """Of three parts, none takes the place of a part of two; nor does one of another list of materials."""
    densities, out = [a_density(seed) for seed in range(6)], tmp_path / "rows"
    for i in (0, 1):
        tokenize(densities, tokenizer(), out, TokenizeConfig(2, rows_per_shard=2), part=(i, 2))
    before = contents(out)
    for bad in [{"part": (0, 3)}, {"part": (2, 3)}, {"part": (0, 2), "ids": ["m-0"]}, {"part": (1, 2), "seed": 1}]:
        with pytest.raises(TomatError, match=r"another run|other materials or settings"):
            tokenized(densities, tokenizer(), out, patches_per_material=2, rows_per_shard=2, **bad)
    assert contents(out) == before and verify(out) == []
    with pytest.raises(TomatError, match="m-1 is listed twice"):
        tokenize(densities, tokenizer(), tmp_path / "twice", TokenizeConfig(2), ids=["m-1", "m-0", "m-1"])


def test_two_runs_at_once_do_not_both_succeed(tmp_path):
    """The other one begins while the first is at work, and says so; the first finds its folder as it left it."""
    densities, out = [a_density(seed) for seed in range(4)], tmp_path / "rows"
    class Meanwhile(InMemory):
        def read(self, id):
            if id == "m-2":
                with pytest.raises(TomatError, match="other materials or settings"):
                    tokenize(densities, tokenizer(), out, TokenizeConfig(2, rows_per_shard=2), ids=["m-0", "m-1"])
                tokenize(densities, tokenizer(), out, TokenizeConfig(2, rows_per_shard=2))  # the same job is welcome
            return super().read(id)
    tokenize(Meanwhile(densities), tokenizer(), out, TokenizeConfig(2, rows_per_shard=2))
    assert verify(out) == [] and read_meta(out)["rows"] == 8
    class Taken(InMemory):
        def read(self, id):
            (tmp_path / "other" / "unfinished.json").write_text('{"plan": "of somebody else"}')
            return super().read(id)
    with pytest.raises(TomatError, match="changed by another run"):
        tokenize(Taken(densities), tokenizer(), tmp_path / "other", TokenizeConfig(2))


CHANGES = {  # where in meta.json, and what then stands there
    "settings": ("tokenizer density_codec log_max", 4.9), "seed": ("seed", 1), "label": ("label", "other"), "rows": ("rows", 9),
    "plan": ("plan", 64 * "0"),
    "tokens": ("tokens", 5), "padded": ("tokens_padded", 1), "patches": ("patches_per_material", 3),
    "clipped": ("materials m-1 clipped", 3), "material": ("materials m-0", None),
    "one more": ("materials x", {"rows": 2, "clipped": 0, "source": ""}),
    "skipped": ("skipped", {}), "shard": ("shards rows-00001.parquet", None), "shard rows": ("shards rows-00001.parquet rows", 1)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest_is_found(tmp_path, change):
    long = Density(np.ones((1, 1, 1200)), a_density(0).structure, id="long")
    tokenize([a_density(0), long, a_density(1), a_density(2)], tokenizer(), tmp_path / "rows", TokenizeConfig(2, rows_per_shard=4))
    assert verify(tmp_path / "rows") == []
    path = tmp_path / "rows" / "meta.json"
    meta = place = read_json(path)  # without its checksum, as a data set of before
    keys, value = CHANGES[change]
    *way, last = keys.split()
    for key in way:
        place = place[key]
    place[last] = value
    if value is None:
        del place[last]
    path.write_text(json.dumps(meta))
    assert verify(tmp_path / "rows")


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"format": "tomat-rows-1"}', "half", "shards", "materials", "bytes",
                                     "no shards"])
def test_a_damaged_manifest_gets_a_sentence(tmp_path, content):
    tokenize([a_density(0)], tokenizer(), tmp_path / "rows", TokenizeConfig(2))
    path = tmp_path / "rows" / "meta.json"
    meta = read_json(path)
    sound = json.dumps(meta)
    worse = {"half": sound[:len(sound) // 2], "shards": json.dumps(meta | {"shards": {"rows-00000.parquet": 3}}),
             "materials": json.dumps(meta | {"materials": {"m-0": {}}}), "no shards": json.dumps(meta | {"shards": {}, "rows": 0}),
             "bytes": sound.replace('"bytes": ', '"bytes": "many", "old": ')}
    path.write_text(worse.get(content, content))
    for read in (verify, ParquetRows, lambda path: row_of(path, 0)):
        if read is not verify or content != "no shards":
            with pytest.raises(TomatError, match="rows"):
                read(tmp_path / "rows")
    assert content != "no shards" or verify(tmp_path / "rows")


def test_other_densities_of_the_same_names_are_refused(tmp_path):
    """Finished or killed: rows from before and after a change of a density do not stand side by side."""
    densities, out = [a_density(seed) for seed in range(4)], tmp_path / "rows"
    changed = [replace(density, values=density.values * 1.5) for density in densities]
    moved = [replace(density, structure=Structure(density.structure.lattice, density.structure.species, [[0.1, 0, 0], [0, 0.5, 0]]))
             for density in densities]
    with pytest.raises(TomatError, match="the disk is gone"):
        tokenize(Failing(densities), tokenizer(), out, TokenizeConfig(2, rows_per_shard=2))
    for _ in ("unfinished", "finished"):
        before = contents(out)
        for others in (changed, moved):
            with pytest.raises(TomatError, match="m-0 has changed since the rows"):
                tokenize(others, tokenizer(), out, TokenizeConfig(2, rows_per_shard=2))
        assert contents(out) == before
        tokenize(densities, tokenizer(), out, TokenizeConfig(2, rows_per_shard=2))
    tokenize(changed, tokenizer(), out, TokenizeConfig(2, rows_per_shard=2, overwrite=True))
    assert verify(out) == [] and contents(out) != before


@pytest.mark.parametrize("finished", [True, False])
def test_any_flipped_byte_of_a_shard_heals(tmp_path, finished):
    """In the footer too, which every reader of Parquet believes."""
    densities, out = [a_density(seed) for seed in range(4)], tmp_path / "rows"
    tokenize(densities, tokenizer(), tmp_path / "whole", TokenizeConfig(2, rows_per_shard=4))
    if finished:
        shutil.copytree(tmp_path / "whole", out)
    else:
        with pytest.raises(TomatError, match="the disk is gone"):
            tokenize(Failing(densities), tokenizer(), out, TokenizeConfig(2, rows_per_shard=4))
    shard = out / "rows-00000.parquet"
    content = shard.read_bytes()
    for place in np.random.default_rng(5).choice(len(content), 40, replace=False):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1:])
        if finished:
            assert verify(out)
            tokenize(densities, tokenizer(), out, TokenizeConfig(2, rows_per_shard=4))
        else:
            with pytest.raises(TomatError, match="the disk is gone"):
                tokenize(Failing(densities), tokenizer(), out, TokenizeConfig(2, rows_per_shard=4))
        assert shard.read_bytes() == content


@pytest.mark.parametrize("place", ["a file", "a folder"])
def test_overwriting_takes_nothing_from_others(tmp_path, place):
    densities, out = [a_density(seed) for seed in range(2)], tmp_path / "rows"
    tokenize(densities, tokenizer(), out, TokenizeConfig(2))
    (out / "run").mkdir() if place == "a folder" else (out / "thesis.tex").write_text("x")
    before = contents(out)
    with pytest.raises(TomatError, match="holds other files"):
        tokenize(densities[:1], tokenizer(), out, TokenizeConfig(2, overwrite=True))
    assert contents(out) == before and (place == "a file" or (out / "run").is_dir())


def test_more_than_a_hundred_parts(tmp_path):
    for i in range(101):
        tokenize([a_density(0), a_density(1)], tokenizer(), tmp_path / "rows", TokenizeConfig(2, rows_per_shard=2), part=(i, 101))
    assert verify(tmp_path / "rows") == [] and read_meta(tmp_path / "rows")["rows"] == 4


def test_two_owners_at_the_same_moment(tmp_path):
    """Both find an empty folder; one of them gets it. Two processes wait for each other before they take it."""
    code = """import sys, time
from pathlib import Path
from tomat.dataset import shards
found = shards._owner_of
def waiting(folder):
    owner = found(folder)
    if owner is None:
        (Path(sys.argv[1]) / sys.argv[2]).touch()
        while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2: time.sleep(0.001)
    return owner
shards._owner_of = waiting
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.density.store import sample_store
from tomat.tokens.tokenizer import Tokenizer
store = sample_store()
shards.tokenize(store, Tokenizer("framed", PUBLISHED_DENSITY, patch_size=int(sys.argv[3]), pad_to=None), sys.argv[1] + "/rows",
                shards.TokenizeConfig(2), store.ids[:1])
"""
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"ready-{i}", str(3 + i)], stderr=subprocess.PIPE,
                             text=True) for i in range(2)]
    ends = [(run.communicate()[1], run.returncode) for run in runs]
    assert sorted(code for _, code in ends) == [0, 1], ends
    assert any("other materials or settings" in message for message, _ in ends)
    assert verify(tmp_path / "rows") == []


def test_a_damaged_part_gets_a_sentence(tmp_path):
    for i in range(2):
        tokenize([a_density(0), a_density(1)], tokenizer(), tmp_path / "rows", TokenizeConfig(2, rows_per_shard=2), part=(i, 2))
    path = tmp_path / "rows" / "worker-01" / "meta.json"
    sound = read_json(path)
    changes = [{"worker": w} for w in (None, 5, "x", [], {}, ["a", "b"], [0, None], [0, 2], [1, 3])] + \
        [{"label": "y"}, {"seed": 1}, {"patches_per_material": 3}, {"tokenizer": sound["tokenizer"] | {"pad_to": 99}}]
    for change in changes:
        path.write_text(json.dumps(sound | change))
        with pytest.raises(TomatError, match=r"worker-0[12]"):
            read_meta(tmp_path / "rows")
    whole = tmp_path / "whole"
    tokenize([a_density(0)], tokenizer(), whole, TokenizeConfig(2))
    sound = read_json(whole / "meta.json")
    for change in [{"layout": []}, {"patch_size": None}, {"patch_size": 1.5}, {"patch_size": ["x", 1, 1]}, {"density_codec": 3},
                   {"density_codec": sound["tokenizer"]["density_codec"] | {"bits": [1.5]}}]:
        (whole / "meta.json").write_text(json.dumps(sound | {"tokenizer": sound["tokenizer"] | change}))
        for read in (verify, ParquetRows, lambda path: row_of(path, 0)):
            with pytest.raises(TomatError, match=r"meta\.json"):
                read(whole)
    (whole / "meta.json").write_text("[" * 100_000)
    with pytest.raises(TomatError, match="not valid JSON"):
        verify(whole)


def test_a_stray_shard_is_named(tmp_path):
    tokenize([a_density(0)], tokenizer(), tmp_path / "rows", TokenizeConfig(2))
    shutil.copy(tmp_path / "rows" / "rows-00000.parquet", tmp_path / "rows" / "rows-00001.parquet")
    assert verify(tmp_path / "rows") == ["rows-00001.parquet: meta.json does not name it, remove it"]
    with pytest.raises(TomatError, match="other materials or settings"):
        tokenize([a_density(0)], tokenizer(), tmp_path / "rows", TokenizeConfig(2))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Twelve materials on disk, one of which no row can hold."
    densities = [a_density(seed, shape=(12, 12, 12)) for seed in range(11)]
    densities.insert(4, Density(np.ones((1, 1, 1200)), a_density(0).structure, id="long"))
    root = tmp_path_factory.mktemp("store") / "store"
    write_store(densities, {"train": [d.id for d in densities[:9]], "validation": [d.id for d in densities[9:]]}, root)
    return RawStore(root)


SETTINGS = {"patches_per_material": 6, "seed": 5, "label": "x", "rows_per_shard": 12}


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "rows"
    tokenized(store, tokenizer(pad_to=200), out, **SETTINGS)
    return out


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_processes_gives_the_same_bytes(store, whole, tmp_path, workers):
    tokenized(store, tokenizer(pad_to=200), tmp_path / "rows", workers=workers, **SETTINGS)
    assert contents(tmp_path / "rows") == contents(whole) and "long" in read_meta(whole)["skipped"]


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_parts_make_the_whole(store, whole, tmp_path, n):
    """Any scheduler may fan the work out; parts may come in any order, and there may be more of them than shards."""
    for i in reversed(range(n)):
        tokenized(store, tokenizer(pad_to=200), tmp_path / "rows", part=(i, n), **SETTINGS)
    shards = {p.name: p.read_bytes() for p in tmp_path.rglob("*.parquet")}
    assert shards == {name: content for name, content in contents(whole).items() if name != "meta.json"}
    got, want = read_meta(tmp_path / "rows"), read_meta(whole)
    assert [name.rpartition("/")[2] for name in got["shards"]] == list(want["shards"])
    assert list(got["shards"].values()) == list(want["shards"].values())
    same = want.keys() - {"shards"}
    assert {key: got[key] for key in same} == {key: want[key] for key in same} and got.keys() == want.keys()
    assert verify(tmp_path / "rows") == []
    one, two = read_rows(tmp_path / "rows"), read_rows(whole)
    assert one.materials == two.materials and all(map(np.array_equal, one.ids, two.ids))


@pytest.mark.parametrize("other", [{"seed": 6}, {"ids": ["m-0", "m-1", "m-2"]}])
def test_parts_of_two_runs_do_not_mix(store, tmp_path, other):
    tokenized(store, tokenizer(pad_to=200), tmp_path / "rows", part=(0, 2), **SETTINGS)
    with pytest.raises(TomatError, match="part of another run"):
        tokenized(store, tokenizer(pad_to=200), tmp_path / "rows", part=(1, 2), **SETTINGS | other)
    tokenized(store, tokenizer(pad_to=200), tmp_path / "rows", part=(1, 2), overwrite=True, **SETTINGS | other)
    with pytest.raises(TomatError, match="another run"):
        read_meta(tmp_path / "rows")


def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    """SIGKILL to the parent five times, at moments drawn from a seed; then the run finishes what is missing."""
    densities = [a_density(seed, shape=(16, 16, 16)) for seed in range(12)]
    write_store(densities, {"train": [d.id for d in densities]}, tmp_path / "store")
    out, rng = tmp_path / "out" / "rows", np.random.default_rng(11)
    line = ["tokenize", tmp_path / "store", "--out", out, "--patches-per-material", "600", "--patch-size", "10", "--workers", "2",
            "--atoms", "packaged"]
    ends, groups = [], []
    for wanted in sorted(rng.integers(0, 11, 5).tolist()):  # kill when so many shards are there
        run = subprocess.Popen([TOMAT, *map(str, line)], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, start_new_session=True)
        groups.append(run.pid)
        deadline = time.monotonic() + 120
        while run.poll() is None and len(list(out.glob("rows-*.parquet"))) < wanted:
            assert time.monotonic() < deadline, "no shard came"
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        run.send_signal(signal.SIGKILL)
        ends.append(run.wait())
        assert not (out / "meta.json").exists() or ends[-1] == 0
    assert -signal.SIGKILL in ends
    for group in groups:  # a worker finishes its shard after its parent's death: no file may change once its time has been read
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    # A shard that was killed between its file and its sidecar with the MD5 is made again.
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("rows-*.parquet") if p.with_suffix(".json").exists()}
    assert times
    for folder in (out, tmp_path / "whole"):
        tokenize(densities, Tokenizer("framed", PUBLISHED_DENSITY, patch_size=10), folder, TokenizeConfig(600))
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times, "a shard that was there was made again"
    made = {name: content for name, content in contents(out).items() if not name.startswith(".partial-")}
    assert made == contents(tmp_path / "whole")


def test_val_smoke_has_its_published_shape(tmp_path):
    """128 materials of 32 patches each: 4,096 rows of exactly 8,192 tokens, read by three libraries."""
    datasets = pytest.importorskip("datasets")
    named = data_set("val-smoke")
    densities = [a_density(seed, n_atoms=1 + seed % 9) for seed in range(named.materials)]
    tok = Tokenizer(named.layout, CODECS[named.density_codec], patch_size=named.patch_size, pad_to=named.pad_to)
    meta = tokenize(densities, tok, tmp_path / "rows", TokenizeConfig(named.patches, seed=named.seed, label=named.label))
    assert (meta["rows"], meta["tokens_padded"], tok.vocab.size) == (4096, 4096 * 8192, 6792)
    table = pq.read_table(sorted((tmp_path / "rows").glob("*.parquet")))
    lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
    assert (len(table), set(lengths)) == (4096, {8192}) and table.schema.equals(SCHEMA)
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows" / "*.parquet"), split="train", streaming=True)
    assert list(rows.features) == SCHEMA.names
    first = next(iter(rows))
    assert first["task_id"] == "m-0" and first["input_ids"] == table["input_ids"][0].as_py()


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    "Shared volumes of clouds have none; a folder is claimed there all the same, and refused to another job."
    import errno

    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    source = InMemory([a_density(1, id="a")])
    tokenizer = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=3, pad_to=None)
    tokenize(source, tokenizer, tmp_path / "rows", TokenizeConfig(4))
    assert verify(tmp_path / "rows") == [] and not list((tmp_path / "rows").glob(".partial*"))
    with pytest.raises(TomatError):
        tokenize(source, tokenizer, tmp_path / "rows", TokenizeConfig(5))
