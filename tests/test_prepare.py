"""Drawn voxels on disk: the draw of before, the same bytes by any way, little memory, and batches without a repetition."""

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import numpy as np
import polars
import pyarrow as pa
import pytest
from crystals import a_density, with_any_sad
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pymatgen.core import Structure

from tomat.atoms.sad import FreeAtom, FreeAtoms, packaged_atoms, with_sad
from tomat.dataset.meta import ROWS, VOXELS, form_of, read_meta
from tomat.dataset.order import hash_keys
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.prepare import VoxelSet, balanced_order, batch_materials, prepare
from tomat.dataset.shards import tokenize
from tomat.dataset.sync import sync
from tomat.dataset.verify import verify
from tomat.dataset.voxels import PrepareConfig, draw_voxels, read_voxel_footer, read_voxels, saved_form
from tomat.density.classify import CLASSES, classify
from tomat.density.core import Density
from tomat.density.source import InMemory
from tomat.density.store import sample_store
from tomat.io.files import read_json
from tomat.io.remote import TomatError
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.tokenizer import Tokenizer

TOKENIZER = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=3, pad_to=None)
CONFIG = PrepareConfig(kept=100, voxels_per_shard=200)  # two materials a shard


@cache
def noisy(n, shape=(6, 7, 8)):
    "Densities with a SAD, of cells of 1 to 5 atoms."
    return [with_any_sad(a_density(seed, shape, n_atoms=1 + seed % 5)) for seed in range(n)]


def contents(folder):
    "Every file of a data set; partial ones are left out."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".partial-")}


class Failing(InMemory):
    "One material cannot be read."

    def read(self, id):
        if id == "m-2":
            raise TomatError("the disk is gone.")
        return super().read(id)


def half_made(folder):
    with pytest.raises(TomatError, match="the disk is gone"):
        prepare(Failing(noisy(4)), folder, CONFIG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Seven materials in four shards."
    out = tmp_path_factory.mktemp("whole") / "voxels"
    prepare(noisy(7), out, CONFIG)
    return out


# The draw


@pytest.mark.parametrize("kept", [500, 20_000])
def test_the_draw_is_the_one_of_before(tmp_path, kept):
    """Runs that began with voxels in memory go on from a file: the rule is written out again here, to the bit."""
    store = sample_store()
    ids = [*store.split("validation")[:2], *store.split("train")[:2]]
    prepare(store, tmp_path / "set", PrepareConfig(kept, seed=3), ids)
    found = VoxelSet(tmp_path / "set")
    assert found.ids == ids and found.n_voxels.tolist() == [min(kept, store.read(id).values.size) for id in ids]
    for i, id in enumerate(ids):
        density = with_sad(store.read(id)).as_units("e/Å³")
        n = density.values.size
        index = np.random.default_rng([3, *id.encode()]).choice(n, kept, replace=False) if n > kept else np.arange(n)
        index_V, sad_V, rho_V = found.columns(i)
        assert (index_V.dtype, sad_V.dtype, rho_V.dtype) == (np.int32, np.float32, np.float32)
        np.testing.assert_array_equal(index_V, index)
        np.testing.assert_array_equal(sad_V, density.sad.reshape(-1)[index].astype(np.float32))
        np.testing.assert_array_equal(rho_V, density.values.reshape(-1)[index].astype(np.float32))
        assert found.mean(i) == float(np.abs(density.values).mean(dtype=np.float64)) and found.shape(i) == density.shape


def test_the_numbers_of_a_draw_are_what_they_were():
    """A change here changes every data set made from now on, and the runs that go on."""
    drawn = draw_voxels(noisy(1)[0], "mp-2282417", 5, 42)
    assert drawn.index_V.tolist() == [76, 318, 172, 151, 285]


def test_structures_come_back_to_the_last_bit(whole):
    found = VoxelSet(whole)
    for i, density in enumerate(noisy(7)):
        lattice, frac, symbols = found.structure(i)
        assert lattice.tobytes() == density.structure.lattice.matrix.tobytes()
        assert frac.tobytes() == density.structure.frac_coords.tobytes()
        assert symbols == [site.specie.symbol for site in density.structure] and found.as_structure(i) == density.structure
        kind = CLASSES.index(classify(density.structure))
        assert found.strata[i] == 16 * kind + int(np.log2(len(symbols))) and found.shape(i) == density.shape
    assert len(found) == 7 and len(set(found.strata.tolist())) > 2


def test_any_reader_of_arrow_reads_a_shard(whole):
    frame = polars.read_ipc(whole / "voxels-00001.arrow")
    assert frame.columns == ["index", "sad", "rho"] and frame.dtypes == [polars.Int32, polars.Float32, polars.Float32]
    np.testing.assert_array_equal(frame["rho"].to_numpy()[:100], VoxelSet(whole).columns(2)[2])


# Atoms


def doubled(atoms):
    "Atoms with twice the density, whose tables have more digits than a file."
    tables = {s: (atom.n_valence, atom.density_r) for s, atom in atoms.atoms.items()}
    return FreeAtoms({s: FreeAtom.of(s, 2 * n, float(r.x[1]), 2.0000000001 * r(r.x)) for s, (n, r) in tables.items()}, "doubled")


def test_the_atoms_of_the_set_are_those_of_its_sad(tmp_path):
    store = sample_store()
    ids = store.split("train")[:2]
    densities = [replace(store.read(id), sad=None, values=2 * store.read(id).values) for id in ids]
    prepare(densities, tmp_path / "set", CONFIG, atoms=doubled(packaged_atoms()))
    found = VoxelSet(tmp_path / "set")
    assert found.atoms["Na"].n_valence == 2 * packaged_atoms()["Na"].n_valence
    for i, density in enumerate(densities):
        index_V, sad_V, _ = found.columns(i)
        np.testing.assert_array_equal(sad_V, with_sad(density, found.atoms).as_units("e/Å³").sad.reshape(-1)[index_V].astype("f4"))
    with pytest.raises(TomatError, match="other materials or settings"):
        prepare(densities, tmp_path / "set", CONFIG)
    (tmp_path / "set" / "atoms.json").unlink()
    assert "atoms.json is missing" in "".join(verify(tmp_path / "set"))
    with pytest.raises(TomatError, match=r"atoms\.json is missing"):
        VoxelSet(tmp_path / "set")
    prepare(densities, tmp_path / "set", CONFIG, atoms=found.atoms)
    assert verify(tmp_path / "set") == []


def test_packaged_atoms_are_used_as_they_are(tmp_path):
    """A file rounds their smallest numbers, and the draw of before does not."""
    assert saved_form(None) is packaged_atoms()
    prepare(noisy(1), tmp_path / "set", CONFIG)
    assert VoxelSet(tmp_path / "set").atoms is packaged_atoms()


# Materials that are left out


def test_materials_without_a_draw_are_skipped(tmp_path):
    good = noisy(1)[0]
    cell = good.structure.lattice
    mixed = Structure(cell, [{"Fe": 0.5, "Na": 0.5}], [[0, 0, 0]])
    bad = [Density(good.values, mixed, id="mixed", sad=good.sad), replace(good, id="empty", values=good.values * 0),
           replace(good, id="other electrons", sad=None),
           Density(good.values, Structure(cell, ["Fm"], [[0, 0, 0]]), id="no atom")]
    meta = prepare([*bad[:2], good, *bad[2:]], tmp_path / "set", CONFIG)
    assert list(meta["materials"]) == ["m-0"] and list(meta["skipped"]) == [density.id for density in bad]
    for id, reason in {"mixed": "partly occupied", "empty": "no electrons", "no atom": "There is no free atom for Fm"}.items():
        assert reason in meta["skipped"][id]
    assert VoxelSet(tmp_path / "set").ids == ["m-0"] and verify(tmp_path / "set") == []
    meta = prepare([replace(good, sad=None)], tmp_path / "other", part=(0, 1))
    assert "electrons" in meta["skipped"]["m-0"]
    with pytest.raises(TomatError, match="holds no voxels"):
        VoxelSet(tmp_path / "other")
    for nothing in ([], bad[:2]):
        with pytest.raises(TomatError, match=r"no material to prepare|partly occupied"):
            prepare(nothing, tmp_path / "nothing", CONFIG)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("bad", [{"kept": 0}, {"voxels_per_shard": 0}, {"seed": -1}])
def test_settings_that_make_no_sense(bad):
    with pytest.raises(TomatError, match=f"{next(iter(bad)).split('_')[0]}.* is {next(iter(bad.values()))}"):
        PrepareConfig(**bad)


# The same bytes


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(whole, tmp_path, workers):
    prepare(noisy(7), tmp_path / "set", replace(CONFIG, workers=workers))
    assert contents(tmp_path / "set") == contents(whole)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_parts_make_the_whole(whole, tmp_path, n):
    for i in reversed(range(n)):
        prepare(noisy(7), tmp_path / "set", CONFIG, part=(i, n))
        if i:
            with pytest.raises(TomatError, match=f"lacks worker-0{i - 1}|lacks worker-00"):
                VoxelSet(tmp_path / "set")
    shards = {p.name: p.read_bytes() for p in tmp_path.rglob("*.arrow")}
    assert shards == {name: content for name, content in contents(whole).items() if name.endswith(".arrow")}
    found, want = VoxelSet(tmp_path / "set"), VoxelSet(whole)
    assert found.ids == want.ids and verify(tmp_path / "set") == [] and form_of(tmp_path / "set") is VOXELS
    for i in range(7):
        assert all(map(np.array_equal, found.columns(i), want.columns(i)))


@pytest.mark.parametrize("when", ["finished", "unfinished"])
def test_any_flipped_byte_heals(tmp_path, when):
    out = tmp_path / "set"
    prepare(noisy(4), tmp_path / "sound", CONFIG)
    prepare(noisy(4), out, CONFIG) if when == "finished" else half_made(out)
    shard = out / "voxels-00000.arrow"
    content = shard.read_bytes()
    for place in np.random.default_rng(5).choice(len(content), 40, replace=False):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1:])
        if when == "finished":
            assert verify(out)
            prepare(noisy(4), out, CONFIG)
        else:
            half_made(out)
        assert shard.read_bytes() == content
    prepare(noisy(4), out, CONFIG)
    assert contents(out) == contents(tmp_path / "sound") and verify(out) == []


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", [{"kept": 99}, {"seed": 1}, {"label": "x"}, {"voxels_per_shard": 100}, {"ids": ["m-0", "m-1"]},
                                   {"part": (0, 2)}], ids=str)
def test_a_folder_belongs_to_one_job(tmp_path, other, finished):
    out = tmp_path / "set"
    prepare(noisy(4), out, CONFIG) if finished else half_made(out)
    before, more = contents(out), {key: other[key] for key in ("ids", "part") if key in other}
    config = replace(CONFIG, **{key: value for key, value in other.items() if key not in more})
    with pytest.raises(TomatError, match=r"voxels of other materials or settings|not made in parts"):
        prepare(noisy(4), out, config, **more)
    assert contents(out) == before


def test_changed_densities_are_noticed(tmp_path):
    prepare(noisy(4), tmp_path / "set", CONFIG)
    changed = [replace(density, sad=density.sad * 2) for density in noisy(4)]
    with pytest.raises(TomatError, match="m-0 has changed since the voxels in the folder were made"):
        prepare(changed, tmp_path / "set", CONFIG)
    prepare(changed, tmp_path / "set", replace(CONFIG, overwrite=True))
    np.testing.assert_allclose(VoxelSet(tmp_path / "set").columns(1)[1], 2 * noisy(4)[1].as_units("e/Å³").sad.reshape(-1)[
        VoxelSet(tmp_path / "set").columns(1)[0]], rtol=1e-6)


# The manifest, and folders of the other kind


def test_rows_and_voxels_are_told_apart(whole, tmp_path):
    tokenize(noisy(2), TOKENIZER, tmp_path / "rows", TokenizeConfig(2))
    with pytest.raises(TomatError, match="holds rows of tokens, not drawn voxels: give a folder that `tomat prepare` wrote"):
        VoxelSet(tmp_path / "rows")
    with pytest.raises(TomatError, match="holds drawn voxels, not rows of tokens: give a folder that `tomat tokenize` wrote"):
        read_meta(whole)
    with pytest.raises(TomatError, match="other files, such as rows-00000"):
        prepare(noisy(2), tmp_path / "rows", CONFIG)
    with pytest.raises(TomatError, match="other files, such as voxels-00000"):
        tokenize(noisy(2), TOKENIZER, whole, TokenizeConfig(2))
    assert form_of(whole) is VOXELS and form_of(tmp_path / "rows") is ROWS and verify(tmp_path / "rows") == []
    half_made(tmp_path / "half")
    with pytest.raises(TomatError, match="is not finished: run the same `tomat prepare` again"):
        VoxelSet(tmp_path / "half")
    with pytest.raises(TomatError, match=r"holds no meta\.json: give a folder that `tomat prepare` wrote"):
        VoxelSet(tmp_path / "nowhere")


CHANGES = {"seed": ("seed", 1), "kept": ("kept", 99), "label": ("label", "other"), "voxels": ("voxels", 9), "atoms": ("atoms", "0"),
           "material": ("materials m-0", None), "count": ("materials m-1 voxels", 3), "source": ("materials m-1 source", ""),
           "one more": ("materials x", {"voxels": 2, "source": ""}), "shard": ("shards voxels-00001.arrow", None),
           "shard's voxels": ("shards voxels-00001.arrow voxels", 1), "plan": ("plan", 64 * "0")}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest_is_found(tmp_path, change):
    prepare(noisy(4), tmp_path / "set", CONFIG)
    assert verify(tmp_path / "set") == []
    path = tmp_path / "set" / "meta.json"
    meta = place = read_json(path)  # without its checksum, as a data set of before
    keys, value = CHANGES[change]
    *way, last = keys.split()
    for key in way:
        place = place[key]
    place[last] = value
    if value is None:
        del place[last]
    path.write_text(json.dumps(meta))
    assert verify(tmp_path / "set")


def rewritten(path, change):
    "A shard whose columns were changed, with a footer and an MD5 that fit."
    batches = [batch.to_pydict() for batch in read_voxels(path)]
    change(batches[0])
    schema = read_voxels(path)[0].schema.with_metadata({"tomat": json.dumps(read_voxel_footer(path), sort_keys=True)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(batch, schema=schema))
    content = path.read_bytes()
    meta = read_json(path.with_name("meta.json"))
    meta["shards"][path.name] |= {"bytes": len(content), "md5": hashlib.md5(content).hexdigest()}
    path.with_name("meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("fault, change", [
    ("1 values that are not finite", lambda columns: columns["rho"].__setitem__(3, float("nan"))),
    ("1 values that are not finite", lambda columns: columns["sad"].__setitem__(3, float("inf"))),
    ("1 indices outside its grid", lambda columns: columns["index"].__setitem__(3, 336)),
    ("1 repeated indices", lambda columns: columns["index"].__setitem__(3, columns["index"][4]))])
def test_verify_reads_every_value(tmp_path, fault, change):
    prepare(noisy(4), tmp_path / "set", CONFIG)
    rewritten(tmp_path / "set" / "voxels-00001.arrow", change)
    assert verify(tmp_path / "set") == [f"voxels-00001.arrow: m-2: {fault}"]


def test_the_manifest_stays_small(tmp_path):
    """Less than 200 bytes a material, so 77,498 materials are 16 MB at most."""
    densities = [replace(noisy(5)[i % 5], id=f"mp-{1_000_000 + i}") for i in range(200)]
    sizes = []
    for n in (100, 200):
        prepare(densities[:n], tmp_path / str(n), PrepareConfig(kept=50, voxels_per_shard=5000))
        sizes.append((tmp_path / str(n) / "meta.json").stat().st_size)
    assert sizes[1] - sizes[0] < 100 * 200


# Reading


def digest(found):
    "A number that depends on every kept voxel."
    return hash(tuple(column.tobytes() for i in range(len(found)) for column in found.columns(i)))


def digest_elsewhere(found, queue):
    queue.put([digest_bytes(found.columns(i)) for i in range(len(found))])


def digest_bytes(columns):
    return hash_keys(*(column.tobytes().hex() for column in columns))[0].item()


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_a_set_goes_to_other_processes(whole, way):
    found, context = VoxelSet(whole), multiprocessing.get_context(way)
    found.columns(0)  # a map is open
    queue = context.Queue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process = context.Process(target=digest_elsewhere, args=(found, queue))
        process.start()
    assert queue.get(timeout=60) == [digest_bytes(found.columns(i)) for i in range(7)]
    process.join()
    assert not pickle.loads(pickle.dumps(found))._maps and found._maps


def test_few_files_are_open_and_views_outlive_them(whole):
    found = VoxelSet(whole)
    found._most_maps = 2
    views = [found.columns(i) for i in (0, 2, 4, 6, 0)]
    assert len(found._maps) == 2
    for i, view in zip((0, 2, 4, 6, 0), views, strict=True):
        assert all(map(np.array_equal, view, VoxelSet(whole).columns(i))) and not view[0].flags.writeable
    assert all(np.shares_memory(a, b) for a, b in zip(views[4], found.columns(0), strict=True)), "columns were copied"


@pytest.mark.parametrize("harm", ["gone", "cut", "another", "footer"])
def test_a_damaged_shard_gets_a_sentence(tmp_path, harm):
    prepare(noisy(4), tmp_path / "set", CONFIG)
    shard, other = tmp_path / "set" / "voxels-00001.arrow", tmp_path / "set" / "voxels-00000.arrow"
    content = shard.read_bytes()
    if harm == "gone":
        shard.unlink()
    else:
        shard.write_bytes({"cut": content[:-100], "another": other.read_bytes(), "footer": content[:-12] + b"x" * 12}[harm])
    with pytest.raises(TomatError, match=r"voxels-00001\.arrow is missing or damaged: copy it again, or run the same `tomat prep"):
        VoxelSet(tmp_path / "set")
    assert verify(tmp_path / "set")


def test_a_bucket_is_written_copied_and_read(s3, whole, tmp_path):
    prepare(noisy(7), f"{s3}/set", CONFIG)
    assert verify(f"{s3}/set") == []
    found, want = VoxelSet(f"{s3}/set", tmp_path / "cache"), VoxelSet(whole)
    assert contents(tmp_path / "cache") == contents(whole)
    assert found.ids == want.ids and digest(found) == digest(want)
    assert sync(f"{s3}/set", tmp_path / "cache", check=True)["copied"] == 0
    tokenize(noisy(2), TOKENIZER, f"{s3}/rows", TokenizeConfig(2))
    with pytest.raises(TomatError, match="holds rows of tokens"):
        VoxelSet(f"{s3}/rows", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_sync_refuses_another_set_and_a_missing_shard(whole, tmp_path):
    sync(whole, tmp_path / "copy")
    (tmp_path / "copy" / "voxels-00009.arrow").write_bytes((whole / "voxels-00000.arrow").read_bytes())
    with pytest.raises(TomatError, match=r"holds shards that .* lacks, such as voxels-00009\.arrow"):
        sync(whole, tmp_path / "copy")
    assert verify(tmp_path / "copy") == ["voxels-00009.arrow: meta.json does not name it, remove it"]
    prepare(noisy(7), tmp_path / "other", replace(CONFIG, seed=1))
    with pytest.raises(TomatError, match="holds another data set"):
        sync(whole, tmp_path / "other")
    (tmp_path / "other" / "voxels-00002.arrow").unlink()
    with pytest.raises(TomatError, match=r"lacks voxels-00002\.arrow.* `tomat prepare`"):
        sync(tmp_path / "other", tmp_path / "elsewhere")


# Balanced batches

strata = st.lists(st.sampled_from([0, 1, 1, 1, 1, 5, 5, 40]), min_size=1, max_size=300).map(np.array)
quick = settings(derandomize=True, deadline=None, max_examples=100)


@quick
@example(strata=np.repeat([0, 1, 2, 3], [600, 250, 120, 30]), seed=0, epoch=0)
@given(strata=strata, seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_each_stratum_is_spread_evenly(strata, seed, epoch):
    """In the first L of M materials are L/M of each stratum, give or take a few."""
    order = balanced_order(strata, seed, epoch)
    assert sorted(order.tolist()) == list(range(len(strata)))
    assert np.array_equal(order, balanced_order(strata.copy(), seed, epoch))
    values, counts = np.unique(strata, return_counts=True)
    for value, n in zip(values, counts, strict=True):
        so_far = np.cumsum(strata[order] == value)
        expected = n * np.arange(1, len(order) + 1) / len(order)
        assert (np.abs(so_far - expected) <= 1 + len(values) * n / len(order)).all()


def test_orders_are_random():
    """Other epochs and other seeds have other orders, and every material comes at every place."""
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    orders = [balanced_order(labels, seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len({order.tobytes() for order in orders}) == 400
    place = np.array([np.flatnonzero(order == 0)[0] for order in orders])
    assert abs(place.mean() - 49.5) < 6 and place.std() > 20  # uniform: 49.5 and 28.9


@quick
@given(strata=strata, per_batch=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_a_batch_holds_no_material_twice(strata, per_batch, seed, epoch):
    size = min(per_batch, len(strata))
    n = len(strata) // size
    batches = [batch_materials(step, strata, per_batch, seed) for step in range(epoch * n, (epoch + 1) * n)]
    assert all(len(batch) == size == len(set(batch)) for batch in batches)
    seen = Counter(i for batch in batches for i in batch)
    assert set(seen.values()) == {1} and len(seen) == n * size


def test_a_step_depends_on_its_number_alone():
    labels = np.arange(103) % 7
    forwards = [batch_materials(step, labels, 24, 3) for step in range(40)]
    assert [batch_materials(step, labels, 24, 3) for step in reversed(range(40))][::-1] == forwards
    left_out = [set(range(103)) - {i for batch in forwards[e * 4:e * 4 + 4] for i in batch} for e in range(10)]
    assert all(len(out) == 7 for out in left_out) and len({tuple(sorted(out)) for out in left_out}) == 10
    assert batch_materials(5, labels.astype(np.int8), 24, 3) == forwards[5]
    other = np.random.default_rng(0).permutation(labels)
    assert batch_materials(0, other, 24, 3) != forwards[0]


# Memory

MANY = """
import resource, sys
from pathlib import Path
import numpy as np
from pymatgen.core import Lattice, Structure
from tomat.dataset.prepare import PrepareConfig, VoxelSet, batch_materials, prepare
from tomat.density.core import Density
from tomat.density.source import Unsplit

class Made(Unsplit):
    ids = [f"made-{i}" for i in range(5000)]
    def read(self, id):
        rng = np.random.default_rng(int(id[5:]))
        structure = Structure(Lattice.cubic(3 + rng.random()), ["Na", "Cl"], rng.random((2, 3)))
        values = rng.random((12, 12, 12), np.float32)
        return Density(values, structure, id=id, sad=values + np.float32(0.01))

def data():
    "Memory of this process that the limit counts, bytes."
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024

what, out = sys.argv[1:]
limit = 2 << 30 if what == "train" else min(2 << 30, data() + (64 << 20))  # all voxels are 104 MB
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if what == "prepare":
    prepare(Made(), out, PrepareConfig())
elif what == "read":
    found = VoxelSet(out)
    for step in range(300):
        rng = np.random.default_rng(step)
        batch = [found.columns(i)[2][rng.integers(1728, size=100)] for i in batch_materials(step, found.strata, 24, 0)]
        assert len(batch) == 24 and all(0 <= rho.min() <= rho.max() < 1 for rho in batch)
    print(len(found), int(found.n_voxels.sum()))
elif what == "train":
    from tomat.train.config import ProbeTrainConfig
    from tomat.train.log import read_log
    from tomat.train.probe import train_voxels
    train_voxels(out, out + "-run", ProbeTrainConfig(steps=30))
    print([line["tokens"] for line in read_log(out + "-run")][-1])
else:
    found = VoxelSet(out)
    kept = [column.copy() for i in range(len(found)) for column in found.columns(i)]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_five_thousand_materials_on_little_memory(tmp_path):
    """64 MB beside the libraries, of at most 2 GB: killed and resumed they give the same bytes, and batches are read from them.
    A network trains on them with 2 GB in all."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    run = partial(subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def line(what, out):
        return [sys.executable, "-c", MANY, what, str(tmp_path / out)]

    killed = run(line("prepare", "killed"))
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("voxels-*.json"))) < 9 and killed.poll() is None:
        assert time.monotonic() < deadline, "no shard came"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "meta.json").exists()
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("voxels-*.arrow") if p.with_suffix(".json").exists()}
    for out in ("killed", "straight"):
        said = run(line("prepare", out)).communicate()
        assert (tmp_path / out / "meta.json").exists(), said
    assert times and {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in times} == times
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    said = run(line("read", "straight")).communicate()
    assert said[0].split() == ["5000", str(5000 * 12**3)], said
    said = run(line("train", "straight")).communicate()
    assert said[0].split() == [str(30 * 24 * 100)], said
    assert "MemoryError" in run(line("copy all", "straight")).communicate()[1], "the limit limits nothing"
