"""Rows go round for any crystal, codec and layout; damaged rows never pass."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from crystals import CODECS, real_looking
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from tomat.tokens.codecs import POSITIONS, PUBLISHED_DENSITY
from tomat.density.core import RHO, TOTAL, Density
from tomat.io.remote import TomatError
from tomat.tokens.patches import as_size, cut, random_offsets
from tomat.tokens.rows import _SNAP
from tomat.tokens.tokenizer import Tokenizer, _cut_then_encode, _encode_then_cut, tokenizer_from_dict

ROOT = Path(__file__).parents[1]


def quick(n):
    return settings(derandomize=True, deadline=None, max_examples=n)


@cache
def tokenizer(layout, codec, size, pad_to=None):
    return Tokenizer(layout, CODECS[codec], patch_size=size, pad_to=pad_to)


def special_crystal(rng, shape, n_atoms):
    "A skewed cell; half of the coordinates on special places, voxels and cell borders among them."
    matrix = np.diag(rng.uniform(3, 20, 3)) + rng.uniform(-1.2, 1.2, (3, 3))
    special = np.array([0, 1 / 3, 0.25, 0.5, 2 / 3, 1, -1e-17, 0.1, *(i / shape[0] for i in range(shape[0]))])
    frac = np.where(rng.random((n_atoms, 3)) < 0.5, rng.choice(special, (n_atoms, 3)), rng.uniform(-1, 2, (n_atoms, 3)))
    return Structure(Lattice(matrix), rng.integers(1, 119, n_atoms).tolist(), frac)


def special_density(rng, shape, n_atoms):
    return Density(real_looking(rng, shape), special_crystal(rng, shape, n_atoms))


side = st.integers(1, 6)
sizes = st.one_of(side, st.tuples(side, side, side))
shapes = st.tuples(*[st.integers(1, 15)] * 3)
seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from(["anchored", "framed"])
codecs = st.sampled_from(sorted(CODECS))


@quick(120)
@given(layouts, codecs, shapes, sizes, st.one_of(st.integers(1, 200), st.sampled_from([1, 200])), seeds)
def test_a_row_decodes_to_what_went_in_within_the_codecs_bounds(layout, codec, shape, size, n_atoms, seed):
    rng = np.random.default_rng(seed)
    density, tok = special_density(rng, shape, n_atoms), tokenizer(layout, codec, size)
    offsets = random_offsets(shape, 3, rng)
    ids_NxL, _ = tok.encode(density, offsets)
    assert ids_NxL.dtype == np.int32 and ids_NxL.shape == (3, tok.row_length(n_atoms))
    for ids_L, offset, patch in zip(ids_NxL, offsets, cut(density.total, offsets, size), strict=True):
        row = tok.decode(ids_L)
        assert (row.layout, row.shape, row.size) == (layout, shape, as_size(size))
        assert row.species == tuple(site.specie.Z for site in density.structure)
        assert (np.abs(row.values - patch) <= CODECS[codec].bound(patch)).all()
        frac = density.structure.frac_coords - (offset / np.array(shape) if layout == "framed" else 0)
        off = row.frac_coords - frac
        assert (np.abs(off - np.rint(off)) <= POSITIONS.bound(frac % 1.0) + 1e-15).all()
        assert row.offset == (tuple(offset.tolist()) if layout == "anchored" else None)
        if layout == "framed":
            error = np.abs(np.array(row.lattice) - density.structure.lattice.parameters)
            assert (error <= np.repeat([0.025, 0.1], 3) + 1e-9).all()


@quick(120)
@given(shapes, sizes, st.integers(1, 30), seeds, st.tuples(*[st.integers(-40, 40)] * 3))
def test_a_whole_grid_step_does_not_change_a_framed_row(shape, size, n_atoms, seed, steps):
    rng = np.random.default_rng(seed)
    density, tok = special_density(rng, shape, n_atoms), tokenizer("framed", "two_token_9_12", size)
    offsets = random_offsets(shape, 4, rng)
    rolled, _ = tok.encode(density.rolled(steps), offsets + steps)
    assert np.array_equal(rolled, tok.encode(density, offsets)[0])


@quick(60)
@given(codecs, shapes, sizes, st.sampled_from([1, 20, 70]), seeds)
def test_both_ways_of_writing_densities_agree(codec, shape, size, count, seed):
    rng = np.random.default_rng(seed)
    tok, offsets = tokenizer("framed", codec, size), random_offsets(shape, count, rng)
    total_xyz = real_looking(rng, shape).astype(rng.choice([np.float32, np.float64]))
    one, other = (np.zeros((count, tok.n_density_tokens), np.int32) for _ in range(2))
    clipped_one = _cut_then_encode(tok, total_xyz, offsets, one)
    clipped_other = _encode_then_cut(tok, total_xyz, offsets, other)
    assert np.array_equal(one, other) and clipped_one == clipped_other


def by_the_sheet(density, offset, p, layout):
    "One row written token by token with nothing but the format sheet."
    shift = 0 if layout == "anchored" else 2
    n, element, integer, position, dense = density.shape, 18 + shift, 136 + shift, 1160 + shift, 2184 + shift

    def level(v, log_min, log_max, bits):
        m = min(max(math.log10(max(abs(v), 1e-15)), log_min), log_max)
        return 0 if abs(v) < 1e-15 else math.floor((m - log_min) / (log_max - log_min) * (2**bits - 1))

    row = [1, 7, *(integer + i for i in n), 8]
    if layout == "framed":
        a, b, c, *angles = density.structure.lattice.parameters
        row += [18, *(integer + round(x / 0.05) for x in (a, b, c)), *(integer + round(x / 0.2) for x in angles), 19]
    row += [3, *(element + site.specie.Z - 1 for site in density.structure), 4, 5]
    for frac in density.structure.frac_coords:
        for axis, x in enumerate(frac):
            b = level((x - (offset[axis] / n[axis] if layout == "framed" else 0)) % 1, -4, 0, 24)
            row += [position + (b >> 16), position + 512 + (b >> 8 & 255), position + 768 + (b & 255)]
    row += [6]
    if layout == "anchored":
        row += [9, *[integer + p] * 3, 10, 11, *(integer + o for o in offset), 12]
        row += [13, *(integer + (o + p - 1) % m for o, m in zip(offset, n, strict=True)), 14]
    row += [15]
    for i, j, k in np.ndindex(p, p, p):
        v = float(density.total[(offset[0] + i) % n[0], (offset[1] + j) % n[1], (offset[2] + k) % n[2]])
        b = level(v, -4.13, 4.97, 20)
        row += [dense + (b >> 12) + (256 if v < 0 else 0), dense + 512 + (b & 4095)]
    return [*row, 16, 2]


@pytest.mark.parametrize("layout", ["anchored", "framed"])
def test_rows_are_those_of_the_format_sheet(layout):
    rng = np.random.default_rng(3)
    cell = Lattice.from_parameters(4.3, 5.1, 6.2, 80, 95, 110)
    structure = Structure(cell, ["Y", "Si", "Ag", "O"], rng.random((4, 3)))
    density = Density(real_looking(rng, (10, 12, 9)), structure)
    offsets = [(0, 0, 0), (9, 11, 3), (5, 2, 8)]
    tok = tokenizer(layout, "two_token_9_12", 5, 500)
    ids_NxL, _ = tok.encode(density, offsets)
    for ids_L, offset in zip(ids_NxL.tolist(), offsets, strict=True):
        row = by_the_sheet(density, offset, 5, layout)
        assert ids_L == row + [0] * (500 - len(row))


def test_the_sheets_numbers():
    nine = Structure(Lattice.orthorhombic(4, 7, 7), ["Y", "Si", "Ag"] * 3, np.linspace(0, 0.9, 27).reshape(9, 3))
    tok = Tokenizer("anchored", PUBLISHED_DENSITY)
    assert (tok.vocab.size, Tokenizer("framed", PUBLISHED_DENSITY).vocab.size) == (6792, 6794)
    ids_L = tok.encode(Density(np.ones((64, 108, 108)), nine), [(5, 9, 44)])[0][0]
    assert (np.count_nonzero(ids_L), np.count_nonzero(ids_L == 0)) == (5606, 2586)
    assert "[HI_START] 18 22 57 [HI_END]" in tok.show(ids_L).splitlines()
    half = Structure(Lattice.cubic(4), ["Y"], [[0.5, 0.5, 0.5]])
    text = tok.show(tok.prompt(half, (64, 108, 108), [(5, 9, 44)])[0])
    assert f"[POS_START] ({' '.join(['p236 p699 p1003'] * 3)}) [POS_END]" in text.splitlines()


def sample_row(layout, seed=0, size=3):
    rng = np.random.default_rng(seed)
    length = tokenizer(layout, "two_token_9_12", size).row_length(3)
    tok = tokenizer(layout, "two_token_9_12", size, length + 3)
    density = special_density(rng, (7, 8, 9), 3)
    return tok, tok.encode(density, random_offsets((7, 8, 9), 1, rng))[0][0]


def structural_places(tok, ids_L):
    "Specials, padding, and the integers that other tokens determine."
    names = [tok.vocab.name(int(i)) for i in ids_L]
    places = set(np.flatnonzero(ids_L < tok.vocab.blocks["special"].stop).tolist())
    for name in ("SHAPE_START", "HI_START"):
        if name in names:
            places |= {names.index(name) + i for i in (1, 2, 3)}
    return sorted(places)


@pytest.mark.parametrize("size", [3, (2, 3, 4)])
@pytest.mark.parametrize("layout", ["anchored", "framed"])
def test_one_wrong_token_in_any_structural_place_is_refused(layout, size):
    tok, ids_L = sample_row(layout, size=size)
    tok.decode(ids_L)
    specials = set(tok.vocab.blocks["special"])
    ends = {i for ids in tok.vocab.blocks.values() for i in (ids.start, ids.stop - 1, ids.start + len(ids) // 2)}
    for place in structural_places(tok, ids_L):
        right = int(ids_L[place])
        for wrong in sorted((specials | ends | {-1, tok.vocab.size, right + 1}) - {right}):
            damaged = ids_L.copy()
            damaged[place] = wrong
            with pytest.raises(TomatError, match=r"^token \d+: expected .+, found .+"):
                tok.decode(damaged)


@pytest.mark.parametrize("layout", ["anchored", "framed"])
def test_a_negative_coordinate_is_refused(layout):
    tok, ids_L = sample_row(layout)
    place = int(np.flatnonzero(ids_L == tok.vocab.id("POS_START"))[0]) + 4
    ids_L[place] = tok.vocab.id("p300")  # the sign bit, and level 44
    with pytest.raises(TomatError, match=f"^token {place}: expected a coordinate that is not negative, found p300$"):
        tok.decode(ids_L)


def test_a_framed_cube_has_no_shape():
    tok, ids_L = sample_row("framed")
    place = int(np.flatnonzero(ids_L == tok.vocab.id("DENS_START"))[0])
    block = [tok.vocab.id(name) for name in ("SHAPE_START", "3", "3", "3", "SHAPE_END")]
    with pytest.raises(TomatError, match=f"^token {place}: expected DENS_START .*, found SHAPE_START$"):
        tok.decode(np.insert(ids_L, place, block))


@quick(300)
@given(layouts, st.integers(0, 3), st.data())
def test_a_token_of_another_kind_is_refused_wherever_it_stands(layout, seed, data):
    tok, ids_L = sample_row(layout, seed)
    place = data.draw(st.integers(0, len(ids_L) - 1))
    kind = next(ids for ids in tok.vocab.blocks.values() if ids_L[place] in ids)
    ids_L[place] = data.draw(st.integers(-5, tok.vocab.size + 5).filter(lambda i: i not in kind))
    with pytest.raises(TomatError, match=r"^token \d+: expected .+, found .+"):
        tok.decode(ids_L)


@quick(200)
@given(layouts, st.integers(0, 3), st.data())
def test_a_lost_or_doubled_token_is_refused(layout, seed, data):
    tok, ids_L = sample_row(layout, seed)
    n = tok.row_length(3)
    place = data.draw(st.integers(0, n - 1))
    for damaged in (np.delete(ids_L, place), np.insert(ids_L, place, ids_L[place])):
        with pytest.raises(TomatError, match="expected"):
            tok.decode(damaged)


@quick(60)
@given(layouts, codecs, sizes, seeds)
def test_any_legal_density_tokens_decode(layout, codec, size, seed):
    rng = np.random.default_rng(seed)
    tok = tokenizer(layout, codec, size)
    prompt_L = tok.prompt(special_crystal(rng, (9, 9, 9), 2), (9, 9, 9), random_offsets((9, 9, 9), 1, rng))[0]
    free = [rng.integers(*tok.legal_ids(place)) for place in range(tok.n_density_tokens)]
    row = tok.decode(np.array([*prompt_L, *free, tok.vocab.id("DENS_END"), tok.vocab.id("EOS")]))
    assert row.values.shape == as_size(size) and np.isfinite(row.values).all()


@pytest.mark.parametrize("layout", ["anchored", "framed"])
def test_the_prompt_is_the_rows_beginning_and_sees_no_density(layout):
    rng = np.random.default_rng(5)
    density, tok = special_density(rng, (7, 8, 9), 6), tokenizer(layout, "two_token_9_12", 4)
    offsets = random_offsets(density.shape, 5, rng)
    prompt_NxL = tok.prompt(density.structure, density.shape, offsets)
    assert prompt_NxL.shape == (5, tok.prompt_length(6))
    assert np.array_equal(prompt_NxL, tok.encode(density, offsets)[0][:, :prompt_NxL.shape[1]])


def test_units_do_not_matter():
    rng = np.random.default_rng(5)
    structure = Structure(Lattice.cubic(2), ["H"], [[0, 0, 0]])  # 8 Å³: dividing and multiplying are exact
    total_xyz, tok = real_looking(rng, (6, 6, 6)), tokenizer("framed", "two_token_9_12", 4)
    as_total, as_rho = Density(total_xyz, structure), Density(total_xyz / 8, structure, units=RHO)
    assert np.array_equal(tok.encode(as_total, [(1, 2, 3)])[0], tok.encode(as_rho, [(1, 2, 3)])[0])


def test_an_atom_just_below_the_patchs_corner_stands_on_it():
    for x in (0.0, -1e-17, _SNAP / 2, -_SNAP / 2, 1.0):
        structure = Structure(Lattice.cubic(4), ["H"], [[0.25 + x, 0.5, 0.5]])
        tok = tokenizer("framed", "two_token_9_12", 2)
        assert tok.decode(tok.encode(Density(np.ones((8, 8, 8)), structure), [(2, 0, 0)])[0][0]).frac_coords[0, 0] == 0


@pytest.mark.parametrize(("mend", "n", "shape", "kwargs"), [
    ("at most 1,023 points", 1, (4, 4, 1200), {}),
    ("raise it or cut smaller patches", 300, (4, 4, 4), {}),
    ("raise it or cut smaller patches", 1, (4, 4, 4), {"patch_size": 20}),
])
def test_what_a_row_cannot_hold_is_refused(mend, n, shape, kwargs):
    structure = special_crystal(np.random.default_rng(0), (4, 4, 4), n)
    with pytest.raises(TomatError, match=mend):
        Tokenizer("framed", PUBLISHED_DENSITY, **kwargs).prompt(structure, shape, [(0, 0, 0)])


@quick(30)
@given(layouts, codecs, sizes, st.sampled_from(["total", "difference"]), st.sampled_from([TOTAL, RHO]))
def test_settings_survive_json(layout, codec, size, target, unit):
    tok = replace(tokenizer(layout, codec, size), target=target, unit=unit)
    assert tokenizer_from_dict(json.loads(json.dumps(tok.to_dict()))) == tok


def test_rows_without_a_unit_are_in_electrons():
    tok = tokenizer("framed", "two_token_9_12", 3)
    older = {key: value for key, value in tok.to_dict().items() if key not in ("unit", "target")}
    assert tokenizer_from_dict(older) == tok and tok.unit == TOTAL
    with pytest.raises(TomatError, match="no unit 'hartree'"):
        tokenizer_from_dict({**older, "unit": "hartree"})


@quick(30)
@given(layouts, codecs, shapes, seeds)
def test_rows_in_electrons_per_volume_decode_to_the_density(layout, codec, shape, seed):
    rng = np.random.default_rng(seed)
    density, tok = special_density(rng, shape, 2), replace(tokenizer(layout, codec, 3), unit=RHO)
    offsets = random_offsets(shape, 2, rng)
    for ids_L, patch in zip(tok.encode(density, offsets)[0], cut(density.rho, offsets, 3), strict=True):
        assert (np.abs(tok.decode(ids_L).values - patch) <= CODECS[codec].bound(patch)).all()


def test_transformers_reads_the_vocabulary(tmp_path):
    from transformers import PreTrainedTokenizerFast
    tok, ids_L = sample_row("framed")
    tok.save_hf(tmp_path / "tokenizer.json")
    assert [f.name for f in tmp_path.iterdir()] == ["tokenizer.json"]
    hf = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]")
    words = " ".join(tok.vocab.word(int(i)) for i in ids_L)
    assert hf(words).input_ids == ids_L.tolist()
    assert hf.decode(ids_L.tolist()) == words


def test_the_benchmark_runs():
    file = ROOT / "tests/files/CHGCAR.NaCl.gz"
    command = [sys.executable, ROOT / "results/tokenize/bench_tokenize.py", file, "--patches", "2", "--layouts", "framed"]
    done = subprocess.run([*command, "--repeats", "1", "--json"], stdout=subprocess.PIPE, text=True, check=True)
    (result,) = json.loads(done.stdout)
    assert result["rows_per_s"] > 0 and result["encoded"] == "patches"
