"""One order of rows, whoever makes them: workers, ranks, a run that was killed, another description of the crystal."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import crystals
from crystals import CODECS, noise, quick, with_any_sad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tomat.density.core import AXIS_PERMUTATIONS
from tomat.io.remote import TomatError
from tomat.io.files import md5_of, write_json
from tomat.tokens.patches import cut
from tomat.atoms.sad import sad_density, with_sad
from tomat.dataset.meta import read_meta
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.store import RawStore, write_store
from tomat.dataset.stream import Batches, ParquetRows
from tomat.dataset.order import permuted
from tomat.dataset.fresh import FreshPatches, PatchConfig, streamable
from tomat.tokens.tokenizer import Tokenizer

turns = st.sampled_from(AXIS_PERMUTATIONS)
a_density = partial(crystals.a_density, shape=(4, 3, 5))


class InMemory:
    "Materials that count how often they are read."

    def __init__(self, densities):
        self.densities = {d.id: d for d in densities}
        self.reads = Counter()

    def read(self, id):
        self.reads[id] += 1
        return self.densities[id]


@cache
def tokenizer(size=2, pad_to=None, codec="two_token_9_12", target="total", layout="framed"):
    return Tokenizer(layout, CODECS[codec], patch_size=size, pad_to=pad_to, target=target)


@cache
def seven():
    return InMemory(a_density(seed, shape=(4, 3, 5 + seed), n_atoms=1 + seed % 3) for seed in range(7))


def fresh_patches(store, ids, tok, seed=42, window=1024, epochs=None, kind=FreshPatches, **config):
    return kind(store, ids, tok, PatchConfig(**config), seed, window, epochs)


def fresh(**more):
    options = {"patches": 5, "window": 11, "epochs": 3, "seed": 1} | more
    return fresh_patches(seven(), list(seven().densities), tokenizer(), **options)


def rows_of(blocks):
    "Everything of each row, to compare."
    return [(block.ids[i, :block.lengths[i]].tolist(), *(values[i].tolist() for values in block[2:5]))
            for block in blocks for i in range(len(block.ids))]


# Turns

@quick
@given(seed=st.integers(0, 10**6), turn=turns, then=turns)
def test_a_turn_moves_everything_together(seed, turn, then):
    first = noise(np.random.default_rng(seed), spin=("diff",), augmented=True, sad=True)
    turned = first.permute_axes(*turn)
    axes, flips = turn
    assert turned.n_electrons == pytest.approx(first.n_electrons, rel=1e-6)
    assert turned.volume == pytest.approx(first.volume) and turned.augmentation is first.augmentation
    np.testing.assert_allclose(turned.structure.distance_matrix, first.structure.distance_matrix, atol=1e-9)
    np.testing.assert_allclose(turned.structure.cart_coords, first.structure.cart_coords, atol=1e-9)  # nothing moves in space
    for index in np.ndindex(*turned.shape):
        old = [0, 0, 0]
        for i in range(3):
            old[axes[i]] = -index[i] % turned.shape[i] if flips[i] else index[i]
        for of in (lambda d: d.values, lambda d: d.spin["diff"], lambda d: d.sad):
            assert of(turned)[index] == of(first)[tuple(old)]
    back = np.argsort(axes)
    again = turned.permute_axes(back, np.array(flips)[back])
    assert again.structure == first.structure
    for of in (lambda d: d.values, lambda d: d.spin["diff"], lambda d: d.sad):
        np.testing.assert_array_equal(of(again), of(first))
    both = turned.permute_axes(*then)
    assert sum(np.array_equal(both.values, first.permute_axes(*other).values) for other in AXIS_PERMUTATIONS) == 1  # a group


@settings(quick, max_examples=12)
@given(seed=st.integers(0, 10**6), turn=turns)
def test_free_atoms_of_a_turned_crystal_are_turned_free_atoms(seed, turn):
    first = a_density(seed, shape=(6, 7, 8), n_atoms=3)
    turned = with_any_sad(first).permute_axes(*turn)
    np.testing.assert_allclose(turned.sad, sad_density(turned.structure, turned.shape), rtol=1e-6, atol=1e-9)


def test_turns_are_all_different_and_half_keep_the_handedness():
    density = a_density(0)
    assert len(set(AXIS_PERMUTATIONS)) == 48 and AXIS_PERMUTATIONS[0] == ((0, 1, 2), (False,) * 3)
    sign = [np.sign(np.linalg.det(density.permute_axes(*turn).structure.lattice.matrix)) for turn in AXIS_PERMUTATIONS]
    assert sign == [1.0] * 24 + [-1.0] * 24


def test_a_turn_keeps_what_belongs_to_the_sites():
    density = noise(np.random.default_rng(0))
    density.structure.add_site_property("magmom", [1.0, 2.0])
    turned = density.permute_axes((2, 0, 1), (True, False, True))
    assert turned.structure.site_properties == density.structure.site_properties and turned.metadata == density.metadata


@pytest.mark.parametrize("axes, flips", [((0, 1, 1), (False,) * 3), ((0, 1), (False,) * 3), ((0, 1, 2), (True,)),
                                         ((1, 2, 3), (True,) * 3)])
def test_what_is_no_turn(axes, flips):
    with pytest.raises(TomatError, match="give an order of 0, 1, 2"):
        a_density(0).permute_axes(axes, flips)


# Permutations

@settings(quick, max_examples=80)
@given(n=st.integers(1, 3000), name=st.lists(st.integers(0, 10**9) | st.text(max_size=5), max_size=3), data=st.data())
def test_a_permutation_holds_every_number_once(n, name, data):
    whole = permuted(np.arange(n), n, *name)
    assert np.array_equal(np.sort(whole), np.arange(n))
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=5)), int)
    assert np.array_equal(permuted(some, n, *name), whole[some])


def test_a_permutation_never_changes():
    "Positions in old runs mean something only while these numbers stay."
    assert permuted(np.arange(10), 10, 42, "mp-1").tolist() == PERMUTED_10
    assert permuted(np.arange(3), 10**9, 42, "mp-1").tolist() == PERMUTED_BILLION


PERMUTED_10 = [9, 8, 6, 2, 1, 4, 3, 0, 7, 5]
PERMUTED_BILLION = [583365362, 395148579, 98124063]


@pytest.mark.parametrize("n", [3, 5, 1000])
def test_every_place_gets_every_entry_equally_often(n):
    trials = 800
    for place in {0, n // 2, n - 1}:
        entries = np.array([permuted(np.array([place]), n, "trial", i)[0] for i in range(trials)])
        bins = min(n, 20)
        seen = np.bincount(entries * bins // n, minlength=bins)
        expected = trials * np.bincount(np.arange(n) * bins // n, minlength=bins) / n
        assert ((seen - expected) ** 2 / expected).sum() < bins - 1 + 5 * (2 * bins) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    entries = permuted(np.arange(10_000), 10_000, 7)
    assert abs(np.corrcoef(entries[:-1], entries[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(entries, np.arange(10_000))[0, 1]) < 0.05


# One order for workers and ranks

@cache
def reference():
    return rows_of(fresh(permute_axes=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_row_is_lost_or_doubled_over_ranks_and_workers(ranks, workers):
    size = 4
    shares = [rows_of(Batches(fresh(permute_axes=True), size, workers, rank, ranks)) for rank in range(ranks)]
    step = [row for at in range(0, len(reference()), size) for share in shares for row in share[at:at + size]]
    assert step == reference()
    assert len({str(row[1:]) for row in step}) > 100  # the rows differ, so that a doubled one would show


@settings(quick, max_examples=40)
@given(seed=st.integers(0, 99), size=st.integers(1, 9), ranks=st.integers(1, 4), start=st.integers(0, 110),
       window=st.integers(1, 40), patches=st.integers(1, 6), epochs=st.integers(1, 3))
def test_any_part_of_any_stream(seed, size, ranks, start, window, patches, epochs):
    stream = fresh(seed=seed, patches=patches, window=window, epochs=epochs)
    every = rows_of(stream)
    assert len(every) == stream.total == 7 * patches * epochs
    shares = [list(Batches(stream, size, rank=rank, ranks=ranks, start=start)) for rank in range(ranks)]
    steps = [rows_of([share[step]]) for step in range(max(map(len, shares))) for share in shares if step < len(share)]
    assert [row for step in steps for row in step] == every[start:]
    assert all(len(step) == size for step in steps[:-ranks])
    for epoch in range(epochs):  # each material as often as the others
        seen = Counter(row[1] for row in every[epoch * 7 * patches:(epoch + 1) * 7 * patches])
        assert seen == dict.fromkeys(range(7), patches)


def test_a_rank_makes_no_row_of_another():
    made = []

    class Counting(FreshPatches):
        def rows(self, unit, epoch, row_N):
            made.append(len(row_N))
            return super().rows(unit, epoch, row_N)
    stream = fresh_patches(seven(), list(seven().densities), tokenizer(), kind=Counting, patches=6, epochs=1)
    n = sum(len(batch.ids) for batch in Batches(stream, 3, rank=1, ranks=3, start=10))
    assert sum(made) == n == (42 - 10) // 9 * 3 + 2


def test_other_seeds_other_orders_and_the_same_seed_the_same():
    assert rows_of(fresh()) == rows_of(fresh())
    assert rows_of(fresh()) != rows_of(fresh(seed=2))
    assert sorted(map(str, rows_of(fresh()))) == sorted(map(str, rows_of(fresh(window=1000))))  # the order alone


def test_a_plain_loader_gives_the_windows_in_order():
    assert rows_of(DataLoader(fresh(), batch_size=None, num_workers=2)) == rows_of(fresh())


def test_an_endless_stream_goes_on():
    batches = Batches(fresh(epochs=None), 5)
    assert len(list(islice(batches, 100))) == 100 and batches.position == 500
    assert rows_of(islice(Batches(fresh(epochs=None), 5), 21)) == rows_of(Batches(fresh(), 5))


def test_ids_are_whole_and_padded_as_asked():
    wide = replace(tokenizer(), density_codec=CODECS["fp16_1token"])  # more than 2**16 ids
    for tok, narrow in ((tokenizer(), torch.uint16), (wide, torch.int32)):
        stream = fresh_patches(seven(), list(seven().densities), tok, patches=4, epochs=1)
        assert next(iter(stream)).ids.dtype == narrow
        for batch in Batches(stream, 6, pad_to=200, workers=1):
            assert batch.ids.shape[1] == 200 and batch.ids.dtype == torch.int64
            for ids, length, material, offset in zip(batch.ids, batch.lengths, batch.materials, batch.offsets, strict=True):
                density = seven().read(stream.names[material])
                expected = tok.encode(density, offset[None].numpy())[0][0]
                assert ids[:length].tolist() == expected.tolist() and not ids[length:].any()
    assert {batch.ids.shape[1] for batch in Batches(stream, 6)} <= {tok.row_length(n) for n in (1, 2, 3)}
    with pytest.raises(TomatError, match="raise pad_to"):
        list(Batches(stream, 6, pad_to=30))


def test_a_stream_can_be_sent_to_a_process_that_was_not_forked():
    sent = pickle.loads(pickle.dumps(fresh(permute_axes=True)))
    assert rows_of(Batches(sent, 4)) == reference() and sent.fingerprint == fresh(permute_axes=True).fingerprint


def test_a_store_that_was_read_before_is_read_by_workers(tmp_path):
    "Zarr and its threads are alive in the parent when the workers are forked."
    densities = [a_density(seed, shape=(5, 6, 7)) for seed in range(4)]
    write_store(densities, {"train": [d.id for d in densities]}, tmp_path / "store")
    store = RawStore(tmp_path / "store")
    stream = fresh_patches(store, store.split("train"), tokenizer(), patches=6, window=8, epochs=2)
    assert rows_of(Batches(stream, 5)) == rows_of(Batches(stream, 5, workers=2))


# Fresh patches

@settings(quick, max_examples=8)
@given(seed=st.integers(0, 99), patches=st.integers(3, 30), permute_axes=st.booleans())
def test_no_patch_twice_before_all_have_come(seed, patches, permute_axes):
    density = seven().read("m-0")  # 60 voxels
    stream = fresh_patches(seven(), ["m-0"], tokenizer(), seed, epochs=130 // patches, patches=patches, permute_axes=permute_axes)
    seen = [corner(density.shape, offset, turned, 2) for _, _, offset, turned in rows_of(in_order_of_visits(stream))]
    for start in range(0, len(seen), 60):
        assert len(set(seen[start:start + 60])) == len(seen[start:start + 60])


def in_order_of_visits(stream):
    "The same rows without the shuffle inside a window."
    from tomat.dataset.stream import _assembled
    for epoch in range(stream.epochs):
        part = stream.rows(0, epoch, np.arange(stream.config.patches))
        yield _assembled([part], [np.arange(stream.config.patches)], np.int32)


def corner(shape, offset, turn, size):
    "The low corner in the cell as it is stored."
    axes, flips = AXIS_PERMUTATIONS[turn]
    old = [0, 0, 0]
    for i in range(3):
        old[axes[i]] = (-(offset[i] + size - 1) if flips[i] else offset[i]) % shape[axes[i]]
    return tuple(old)


@settings(quick, max_examples=20)
@given(seed=st.integers(0, 10**6), layout=st.sampled_from(["framed", "anchored"]))
def test_a_turned_row_is_a_row_of_the_turned_crystal(seed, layout):
    density, tok = a_density(seed), tokenizer(3, layout=layout)
    part = fresh_patches(InMemory([density]), [density.id], tok, seed, patches=6, permute_axes=True).rows(0, seed, np.arange(6))
    turned = density.permute_axes(*AXIS_PERMUTATIONS[part.permutation])
    np.testing.assert_array_equal(part.ids_NxL, tok.encode(turned, part.offsets_Nx3)[0])
    stored = np.array([corner(density.shape, offset, part.permutation, 3) for offset in part.offsets_Nx3.tolist()])
    np.testing.assert_array_equal(np.sort(cut(density.total, stored, 3).reshape(6, -1)),
                                  np.sort(cut(turned.total, part.offsets_Nx3, 3).reshape(6, -1)))


def test_every_turn_comes():
    stream = fresh(permute_axes=True)
    seen = Counter(stream.rows(unit, epoch, np.arange(1)).permutation for unit in range(7) for epoch in range(70))
    assert len(seen) == 48 and max(seen.values()) < 40


def test_the_difference_to_free_atoms():
    tok = tokenizer(target="difference")
    density = a_density(3)
    density = replace(density, values=sad_density(density.structure, density.shape).astype(np.float32) + np.float32(0.01))
    ids = [density.id]
    with pytest.raises(TomatError, match=r"m-3 cannot be streamed.*with_sad"):
        list(Batches(FreshPatches(InMemory([density]), ids, tok), 4))
    stream = fresh_patches(InMemory([density]), ids, tok, patches=4, epochs=2, permute_axes=True, prepare=with_sad)
    for row, *_ in rows_of(Batches(stream, 4, workers=1)):
        np.testing.assert_allclose(tok.decode(row).values, 0.01, rtol=0.01, atol=1e-4)


def test_densities_are_kept_up_to_a_limit():
    density = seven().read("m-0")
    for limit, reads in ((0, 5), (density.values.nbytes, 1)):
        store = InMemory([density])
        list(Batches(fresh_patches(store, ["m-0"], tokenizer(), patches=3, window=3, epochs=5, cache_bytes=limit), 4))
        assert store.reads["m-0"] == reads
    store = InMemory(seven().densities.values())
    two = sum(sorted(d.values.nbytes for d in store.densities.values())[-2:])
    stream = fresh_patches(store, list(store.densities), tokenizer(), epochs=3, cache_bytes=two)
    assert rows_of(stream) == rows_of(FreshPatches(store, list(store.densities), tokenizer(), epochs=3))
    assert 0 < stream._cached_bytes <= two


def test_clipped_values_are_counted_by_row():
    density = a_density(5)
    values = np.ones(density.shape, np.float32)
    values[1, 1, 1] = 1e9
    stream = fresh_patches(InMemory([replace(density, values=values)]), [density.id], tokenizer(), patches=60, epochs=1)
    (batch,) = Batches(stream, 60)
    assert batch.clipped.sum() == 8 and batch.clipped.max() == 1  # 2³ of the 60 patches hold it


def test_a_material_that_does_not_fit_is_named_and_can_be_left_out():
    store, narrow = seven(), tokenizer(pad_to=tokenizer().row_length(2))
    ids = list(store.densities)
    for workers in (0, 2):
        with pytest.raises(TomatError, match=r"m-[25] cannot be streamed, leave it out") as caught:
            list(Batches(FreshPatches(store, ids, narrow), 4, workers))
        assert "\n" not in str(caught.value)
    kept, skipped = streamable(store, ids, narrow)
    assert list(skipped) == ["m-2", "m-5"] and all("raise it or cut smaller" in why for why in skipped.values())
    assert len(rows_of(fresh_patches(store, kept, narrow, patches=4, epochs=1))) == 20


@pytest.mark.parametrize("arguments, words", [
    ({"ids": []}, "needs rows"), ({"ids": ["m-0", "m-0"]}, "m-0 is listed twice"), ({"patches": 0}, "at least one patch"),
    ({"window": 0}, "a window")])
def test_what_is_no_stream(arguments, words):
    with pytest.raises(TomatError, match=words):
        fresh_patches(**{"store": seven(), "ids": ["m-0"], "tok": tokenizer()} | arguments)


@pytest.mark.parametrize("size, more", [(0, {}), (4, {"start": -1}), (4, {"rank": 2, "ranks": 2}), (4, {"rank": -1})])
def test_what_is_no_part(size, more):
    with pytest.raises(TomatError, match="has no part"):
        Batches(fresh(), size, **more)


# Going on

def test_a_place_is_refused_in_another_stream():
    state = Batches(fresh(), 4).state_dict()
    assert json.loads(json.dumps(state)) == state
    Batches(fresh(epochs=9), 9, workers=2).load_state_dict(state)  # none of these changes a row
    for other in (fresh(seed=2), fresh(permute_axes=True), fresh(patches=6), fresh(window=30), fresh(prepare=with_sad),
                  FreshPatches(seven(), ["m-0"], tokenizer()),
                  fresh_patches(seven(), list(seven().densities), tokenizer(3), 1, 11, patches=5)):
        with pytest.raises(TomatError, match="another stream"):
            Batches(other, 4).load_state_dict(state)


CHILD = """\
import json, sys
from tomat.io.files import write_json
from tomat.density.store import RawStore
from tomat.dataset.fresh import FreshPatches, PatchConfig
from tomat.dataset.stream import Batches
from tomat.tokens.tokenizer import Tokenizer
from tomat.tokens.codecs import PUBLISHED_DENSITY
store, out = RawStore(sys.argv[1]), sys.argv[2]
tokenizer = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=2, pad_to=None)
stream = FreshPatches(store, store.ids, tokenizer, PatchConfig(16, True), window=64)
batches = Batches(stream, 10, workers=2)
for n, batch in enumerate(batches):
    write_json(out, {"state": batches.state_dict(), "last": batch.ids[-1].tolist()})
"""


def test_killed_and_started_again_the_next_thousand_rows_are_the_same(tmp_path):
    densities = [a_density(seed, shape=(5, 6, 7)) for seed in range(9)]
    write_store(densities, {"train": [d.id for d in densities]}, tmp_path / "store")
    store = RawStore(tmp_path / "store")
    stream = fresh_patches(store, store.ids, tokenizer(), permute_axes=True, patches=16, window=64)
    saved = tmp_path / "saved.json"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(store.root), str(saved)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not (saved.exists() and json.loads(saved.read_text())["state"]["position"] >= 150):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    found = json.loads(saved.read_text())
    resumed = Batches(stream, 7, workers=1)
    resumed.load_state_dict(found["state"])
    place = found["state"]["position"]
    rows = rows_of(islice(resumed, 143))[:1000]
    never_killed = rows_of(islice(Batches(stream, place, start=0), 1)) + rows_of(islice(Batches(stream, 1000, start=place), 1))
    assert len(rows) == 1000 and rows == never_killed[place:]
    ids, *_ = never_killed[place - 1]
    assert found["last"][:len(ids)] == ids  # the last row before the kill is the one before the first row after it


# Shards

@pytest.fixture
def rows(tmp_path):
    densities = [a_density(seed, n_atoms=1 + seed % 2) for seed in range(6)]
    tokenize(iter(densities), tokenizer(pad_to=64), tmp_path / "rows", TokenizeConfig(6, seed=42, rows_per_shard=12))
    return tmp_path / "rows"


def written(folder):
    "All rows of all shards."
    found = []
    for name in read_meta(folder)["shards"]:
        found += pq.read_table(Path(folder) / name).to_pylist()
    return found


def key_of(row):
    return (row["task_id"], row["offset_x"], row["offset_y"], row["offset_z"], tuple(row["input_ids"]))


def keys_of(stream, batches):
    return [(stream.names[m], *offset.tolist(), *[tuple(ids.tolist())])
            for batch in batches for m, offset, ids in zip(batch.materials, batch.offsets, batch.ids, strict=True)]


@pytest.mark.parametrize("window, workers", [(12, 0), (1000, 2)])
def test_every_row_of_the_shards_once_an_epoch(rows, window, workers):
    stream = ParquetRows(rows, window=window, epochs=2)
    keys = keys_of(stream, Batches(stream, 5, workers, pad_to=64))
    every = sorted(map(key_of, written(rows)))
    assert len(every) == 36 and sorted(keys[:36]) == sorted(keys[36:]) == every
    assert keys[:36] != keys[36:] and keys[:36] != every
    assert keys_of(stream, Batches(stream, 9, start=20, pad_to=64)) == keys[20:]
    if window == 12:
        assert all(len({key[0] for key in keys[start:start + 12]}) == 2 for start in range(0, 72, 12))


def test_the_parts_of_several_workers_are_one_stream(rows, tmp_path):
    for part in range(2):
        tokenize([a_density(seed, n_atoms=1 + seed % 2) for seed in range(6)], tokenizer(pad_to=64), tmp_path / "parts",
                 TokenizeConfig(6, seed=42, rows_per_shard=12), part=(part, 2))
    stream = ParquetRows(tmp_path / "parts", epochs=1)
    assert {group.shard.split("/")[0] for group in stream.index.groups} == {"worker-00", "worker-01"}
    assert sorted(keys_of(stream, Batches(stream, 8, pad_to=64))) == sorted(map(key_of, written(rows)))


def test_rows_without_padding_and_ranks(tmp_path):
    tokenize((a_density(seed, n_atoms=1 + seed % 3) for seed in range(4)), tokenizer(), tmp_path / "rows",
             TokenizeConfig(5, seed=42, rows_per_shard=12))
    stream = ParquetRows(tmp_path / "rows", epochs=1)
    rows = rows_of(stream)
    assert sorted(row[0] for row in rows) == sorted(row["input_ids"] for row in written(tmp_path / "rows"))
    shares = [rows_of(Batches(stream, 3, rank=rank, ranks=2)) for rank in range(2)]
    assert [row for at in range(0, 20, 3) for share in shares for row in share[at:at + 3]] == rows


def test_another_place_is_the_same_stream_and_other_rows_are_not(rows, tmp_path):
    moved = rows.rename(tmp_path / "moved")
    state = Batches(ParquetRows(moved), 4).state_dict()
    Batches(ParquetRows(moved), 4).load_state_dict(state)
    tokenize((a_density(seed) for seed in range(6)), tokenizer(pad_to=64), tmp_path / "other",
             TokenizeConfig(6, seed=43, rows_per_shard=12))
    with pytest.raises(TomatError, match="another stream"):
        Batches(ParquetRows(tmp_path / "other"), 4).load_state_dict(state)


def vouch_for(rows, changes=()):
    "Let meta.json name the bytes that are there, whatever they are."
    shards = {name: said | {"bytes": (rows / name).stat().st_size, "md5": md5_of(rows / name)}
              for name, said in read_meta(rows)["shards"].items()}
    write_json(rows / "meta.json", read_meta(rows) | {"shards": shards} | dict(changes))


def test_damage_is_one_sentence_that_names_the_shard(rows):
    shard = rows / "rows-00001.parquet"
    content = bytearray(shard.read_bytes())
    stream = ParquetRows(rows, epochs=1)
    shard.write_bytes(content[:4] + bytes(len(content) // 2 - 4) + content[len(content) // 2:])
    for workers in (0, 1):
        with pytest.raises(TomatError, match=r"rows-00001.parquet cannot be read") as caught:
            list(Batches(stream, 4, workers))
        assert "\n" not in str(caught.value)
    shard.write_bytes(content[:100])
    with pytest.raises(TomatError, match=r"rows-00001.parquet is missing or damaged"):
        ParquetRows(rows)
    vouch_for(rows)
    with pytest.raises(TomatError, match=r"rows-00001.parquet cannot be read as Parquet"):
        ParquetRows(rows)
    shard.write_bytes((rows / "rows-00000.parquet").read_bytes())
    vouch_for(rows, {"rows": 35})
    with pytest.raises(TomatError, match="counts 35 rows and the shards hold 36"):
        ParquetRows(rows)


def test_ids_outside_the_vocabulary_do_not_wrap_around(rows):
    shard = rows / "rows-00000.parquet"
    table = pq.read_table(shard)
    ids = [[70_000, *row[1:]] for row in table["input_ids"].to_pylist()]
    pq.write_table(table.set_column(4, table.schema.field(4), pa.array(ids, table.schema.field(4).type)), shard, row_group_size=6)
    vouch_for(rows)
    with pytest.raises(TomatError, match="not in its vocabulary"):
        list(Batches(ParquetRows(rows, epochs=1), 4))


def test_shards_in_a_bucket(s3, rows):
    import s3fs
    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put(str(rows), f"{s3}/rows", recursive=True)
    here, there = ParquetRows(rows, epochs=1), ParquetRows(f"{s3}/rows", epochs=1)
    assert here.fingerprint == there.fingerprint
    assert rows_of(Batches(there, 8, workers=1)) == rows_of(Batches(here, 8))
