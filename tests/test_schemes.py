"Schemes: what is read comes from the counted tokens and the structure, and keeping everything loses nothing."
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from crystals import crystal
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from tomat.atoms.analytic import ANALYTIC
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.levels import fit_levels, save_levels
from tomat.density.core import RHO, TOTAL
from tomat.io.remote import TomatError
from tomat.density.metrics import nmae
from tomat.atoms.sad import sad_density, valence_electrons
from tomat.study.schemes import (ONE, SCHEMES, Coarse, Difference, LargeWaves, LowWaves, PerVolume, fitted_schemes,
                                 from_waves, to_waves, wave_order)
from tomat.study.voxels import Direct, MassCap, Patches, Threshold, TopK, TopShare, read_indices, write_indices
from tomat.density.store import sample_store

quick = settings(derandomize=True, deadline=None, max_examples=25)
sides = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
ALL = [Direct(), TopShare(1.0), MassCap(1.0), Threshold(0.0), TopK(10**6), LowWaves(1.0), LargeWaves(1.0), Coarse(1.0),
       *(Difference(LowWaves(1.0), kind) for kind in ("table", *ANALYTIC)), PerVolume(Direct())]


@st.composite
def materials(draw):
    "A skewed crystal with noise on its grid, and as many electrons as its atoms bring."
    rng, shape = np.random.default_rng(draw(seeds)), (draw(sides), draw(sides), draw(sides))
    structure = crystal(rng, draw(st.integers(1, 3)))
    values = rng.lognormal(0, 1, shape) * np.where(rng.random(shape) < 0.05, -0.1, 1)
    values[0, 0, 0] = 1.0
    values = np.abs(values) if values.mean() < 0.1 else values
    return values * (valence_electrons(structure) / values.mean()), structure


@quick
@given(materials(), st.sampled_from(sorted(SCHEMES)))
def test_nothing_but_the_counted_tokens_is_read(material, name):
    "The bytes of the tokens and the structure's numbers go through; a copy that has seen nothing reads the same."
    values, structure = material
    tokens = SCHEMES[name].write(values, structure)
    assert tokens.ndim == 1 and tokens.dtype == np.uint32
    bytes_ = tokens.tobytes()
    assert len(bytes_) == 4 * len(tokens)
    fresh = pickle.loads(pickle.dumps(SCHEMES[name]))
    same = Structure(Lattice(structure.lattice.matrix.copy()), structure.species, structure.frac_coords.copy())
    back = fresh.read(np.frombuffer(bytes_, np.uint32), same)
    assert back.shape == values.shape and back.dtype == np.float64
    np.testing.assert_array_equal(back, SCHEMES[name].read(tokens, structure))
    assert 1 <= fresh.context(tokens) <= max(len(tokens), 6 + 2 * 14**3)


@quick
@given(materials(), st.sampled_from([name for name in SCHEMES if not name.endswith("@0%")]))
def test_every_token_counts(material, name):
    "One token less cannot be read, or says another density: none is padding."
    values, structure = material
    tokens = SCHEMES[name].write(values, structure)
    if len(tokens) <= 4:
        return
    back = SCHEMES[name].read(tokens, structure)
    try:
        shorter = SCHEMES[name].read(tokens[:-1], structure)
    except (ValueError, IndexError):
        return
    assert not np.array_equal(shorter, back) or as_last_zero(tokens)


def as_last_zero(tokens):
    "A last number that is zero says as much as none."
    return abs(tokens[-1:].view(np.float32)[0]) < 1e-6 or tokens[-1] in (0, 2**15)


@pytest.mark.parametrize("scheme", ALL, ids=repr)
@quick
@given(material=materials())
def test_keeping_all_is_lossless(scheme, material):
    values, structure = material
    assert nmae(scheme.read(scheme.write(values, structure), structure), values) < 1e-6


@quick
@given(materials())
def test_there_are_as_many_independent_waves_as_voxels(material):
    values, structure = material
    order = wave_order(structure, values.shape)
    assert len(order.where) == values.size
    assert len(set(zip(order.where, order.imag, strict=True))) == values.size
    back = from_waves(to_waves(values, order), slice(None), order, values.shape)
    np.testing.assert_allclose(back, values, atol=1e-9 * np.abs(values).max())


def test_every_single_wave_is_real_and_new():
    "The inverse transform of the unit vectors is a basis: no number repeats another."
    structure, shape = crystal(np.random.default_rng(3)), (4, 3, 6)
    order = wave_order(structure, shape)
    basis = np.array([from_waves(np.ones(1), np.array([i]), order, shape).ravel() for i in range(72)])
    assert np.linalg.matrix_rank(basis) == 72
    np.testing.assert_allclose(basis @ basis.T, np.diag(np.diag(basis @ basis.T)), atol=1e-9)


def test_waves_come_in_the_order_of_their_length():
    "Checked against the vectors themselves, in a skewed cell."
    structure, shape = crystal(np.random.default_rng(5)), (6, 5, 8)
    order = wave_order(structure, shape)
    index = np.array(np.unravel_index(order.where, (6, 5, 5))).T
    index = np.where(index > np.array(shape) // 2, index - shape, index)
    lengths = np.linalg.norm(index @ structure.lattice.reciprocal_lattice.matrix, axis=1)
    assert (np.diff(lengths) > -1e-6).all() and lengths[0] == 0


def test_low_waves_are_the_best_ball():
    "By Parseval: the squared error is that of the waves left out."
    rng = np.random.default_rng(0)
    values, structure = rng.normal(size=(6, 7, 8)), crystal(rng)
    order = wave_order(structure, values.shape)
    waves = to_waves(values, order)
    counts = np.where(np.bincount(order.where)[order.where] == 1, 1, 2)
    for scheme, left_out in ((LowWaves(0.3), slice(round(0.3 * values.size), None)), (LargeWaves(0.3), None)):
        back = scheme.read(scheme.write(values, structure), structure)
        strength = counts * waves**2
        missing = strength[left_out].sum() if left_out else np.sort(strength)[:values.size - round(0.3 * values.size)].sum()
        assert np.mean((back - values) ** 2) == pytest.approx(missing, rel=1e-5)


@quick
@given(st.integers(1, 300), seeds, st.floats(0, 1))
def test_indices(n, seed, share):
    indices = np.sort(np.random.default_rng(seed).permutation(n)[:round(share * n)])
    tokens = write_indices(indices, n)
    assert len(tokens) == 1 + min(len(indices), -(-n // 32))
    found, rest = read_indices(np.concatenate([tokens, tokens]), n)
    np.testing.assert_array_equal(found, indices)
    np.testing.assert_array_equal(rest, tokens)


def test_counts_by_hand():
    values, structure = np.arange(1.0, 65).reshape(4, 4, 4), crystal(np.random.default_rng(1))
    def count(scheme):
        return len(scheme.write(values, structure)) - 3
    assert count(Direct()) == 64 and count(Direct(PUBLISHED_DENSITY)) == 128 and count(Direct(ONE)) == 64
    assert count(TopK(2)) == 1 + 2 + 2      # how many, a list of 2, 2 values
    assert count(TopK(10)) == 1 + 2 + 10    # how many, a bitmap of 64, 10 values
    assert count(LowWaves(0.25)) == 16 and count(LowWaves(0.25, PUBLISHED_DENSITY)) == 32
    assert count(LargeWaves(0.25)) == 1 + 2 + 16
    assert count(Coarse(0.5)) == 8
    assert count(Patches(ONE, 3)) == 8 * 27 and Patches(ONE, 3).context(np.zeros(9)) == 33
    assert count(PerVolume(Direct())) == 64


def test_cutoffs_by_hand():
    values, structure = np.array([4.0, 3.0, 2.0, -1.0]).reshape(4, 1, 1), crystal(np.random.default_rng(1))
    def kept(scheme):
        return scheme.read(scheme.write(values, structure), structure).ravel().tolist()
    assert kept(TopK(1)) == [4, 0, 0, 0] and kept(TopShare(0.5)) == [4, 3, 0, 0]
    assert kept(Threshold(2 / structure.volume)) == [4, 3, 2, 0]
    assert kept(MassCap(0.69)) == [4, 3, 0, 0] and kept(MassCap(0.71)) == [4, 3, 2, 0]


def test_coarse_is_exact_for_what_fits():
    x, y, z = np.meshgrid(*(np.arange(12) / 12,) * 3, indexing="ij")
    values = 3 + np.cos(2 * np.pi * (2 * x + y)) + np.sin(4 * np.pi * z)
    structure = crystal(np.random.default_rng(2))
    np.testing.assert_allclose(Coarse(0.5).read(Coarse(0.5).write(values, structure), structure), values, atol=1e-5)
    assert nmae(Coarse(1 / 3).read(Coarse(1 / 3).write(values, structure), structure), values) > 0.05


def test_free_atoms_cost_no_token():
    structure = crystal(np.random.default_rng(2))
    values = sad_density(structure, (8, 8, 8))
    scheme = Difference(LowWaves(0.0))
    assert len(scheme.write(values, structure)) == 3
    assert nmae(scheme.read(scheme.write(values, structure), structure), values) < 1e-9


def test_free_atoms_of_other_setups_are_refused():
    structure = crystal(np.random.default_rng(2))
    with pytest.raises(TomatError, match="same setups"):
        Difference(Direct()).write(1.1 * sad_density(structure, (4, 4, 4)), structure)


@pytest.mark.parametrize("target, unit", [("total", TOTAL), ("total", RHO), ("difference", RHO)])
def test_fitted_levels(tmp_path, target, unit):
    "A file of levels that were fitted to this very density writes it well, in its unit."
    density = sample_store().read(sample_store().split("validation")[0])
    values, structure = density.total.astype(float), density.structure
    field = values - sad_density(structure, density.shape) if target == "difference" else values
    codec = fit_levels(field / (density.volume if unit == RHO else 1), 1024)
    save_levels(codec, tmp_path / "levels.npz", {"target": target, "unit": unit, "objective": "l1"})
    schemes = fitted_schemes(tmp_path / "levels.npz")
    assert [name.startswith("Δ table + ") for name in schemes] == [target == "difference"] * 2
    for name, scheme in schemes.items():
        tokens = scheme.write(values, structure)
        assert tokens[3:].max() < 1024
        assert nmae(scheme.read(tokens, structure), values) < 0.002
        assert scheme.context(tokens) == (len(tokens) if "direct" in name else 6 + 16**3)


def test_another_process_reads_the_same(tmp_path):
    "Tokens from a file, the structure from another, and nothing else; caches of this process cannot help."
    density = sample_store().read(sample_store().split("validation")[0])
    names = ["Δ slater + fourier@1%", "fourier largest@5%", "patches@one token", "cutoff@5%"]
    for i, name in enumerate(names):
        SCHEMES[name].write(density.total.astype(float), density.structure).tofile(tmp_path / f"{i}.tokens")
    density.structure.to(filename=str(tmp_path / "s.json"))
    code = f"""
import numpy as np
from pymatgen.core import Structure
from tomat.study.schemes import SCHEMES
structure = Structure.from_file("s.json")
for i, name in enumerate({names!r}):
    np.save(f"{{i}}.npy", SCHEMES[name].read(np.fromfile(f"{{i}}.tokens", np.uint32), structure))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for i, name in enumerate(names):
        again = SCHEMES[name].read(np.fromfile(tmp_path / f"{i}.tokens", np.uint32), density.structure)
        np.testing.assert_allclose(np.load(tmp_path / f"{i}.npy"), again, rtol=1e-9, atol=1e-9)


def test_schemes_are_described_by_registered_names():
    "Descriptions are JSON, differ from scheme to scheme, hold fitted levels in full, and do not depend on the class's name."
    class Renamed(LowWaves):
        "The same scheme under another name."
    assert Renamed(0.5).to_dict() == LowWaves(0.5).to_dict() == {"scheme": "fourier", "share": 0.5, "codec": None}
    assert len({json.dumps(scheme.to_dict()) for scheme in SCHEMES.values()}) == len(SCHEMES)
    one, other = (Difference(Direct(fit_levels(np.arange(9.0) + step, 4))).to_dict() for step in (0, 1e-9))
    assert one["inner"]["codec"]["name"] == other["inner"]["codec"]["name"] and one != other
