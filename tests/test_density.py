"""A crystal, its origin and its unit may change; what is counted stays."""

import io

from dataclasses import replace

import numpy as np
import pytest
from crystals import noise, quick
from hypothesis import given, settings, strategies as st
from pymatgen.core import Element, Lattice, Structure

from tomat.density.core import RHO, TOTAL, Density, check_density, formula_of, plot_slice
from tomat.io.remote import TomatError


@quick
@given(seed=st.integers(0, 10**6), steps=st.tuples(*[st.integers(-9, 9)] * 3))
def test_rolling_moves_everything_together(seed, steps):
    rng = np.random.default_rng(seed)
    first = noise(rng, spin=("diff",), sad=True)
    moved = first.rolled(steps)
    assert moved.n_electrons == pytest.approx(first.n_electrons, abs=1e-6)
    i, j, k = rng.integers(0, first.shape)
    index = tuple((np.array([i, j, k]) + steps) % first.shape)
    for of in (lambda d: d.values, lambda d: d.spin["diff"], lambda d: d.sad):
        assert of(moved)[index] == of(first)[i, j, k]
    shift = moved.structure.frac_coords - first.structure.frac_coords - np.divide(steps, first.shape)
    np.testing.assert_allclose(shift, shift.round(), atol=1e-12)
    back = moved.rolled([-s for s in steps])
    np.testing.assert_array_equal(back.values, first.values)


@settings(quick, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_units_and_electrons(seed):
    first = noise(np.random.default_rng(seed), spin=("diff",), sad=True)
    other = first.as_units(RHO)
    assert other.n_electrons == pytest.approx(first.n_electrons, rel=1e-5)
    np.testing.assert_allclose(other.as_units(TOTAL).spin["diff"], first.spin["diff"], rtol=1e-5)
    np.testing.assert_allclose(other.values * first.volume, first.values, rtol=1e-5)


def test_a_slice_is_drawn_the_right_way_round():
    import matplotlib
    matplotlib.use("Agg")
    values_xyz = np.arange(24.0).reshape(2, 3, 4)
    ax = plot_slice(values_xyz, axis=1, index=2)
    np.testing.assert_array_equal(ax.images[0].get_array(), values_xyz[:, 2, :].T)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "c")
    ax.figure.savefig(io.BytesIO())


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity")
@given(counts=st.dictionaries(st.sampled_from("H C O P S Fe Ca He Ne Ar Kr Og".split()), st.integers(1, 12),
                              min_size=1, max_size=5))
@settings(quick, max_examples=100)
def test_a_formula_is_the_one_pymatgen_writes(counts):
    sites = [symbol for symbol, n in counts.items() for _ in range(n)]
    structure = Structure(Lattice.cubic(9), sites, np.linspace(0, 0.9, 3 * len(sites)).reshape(-1, 3))
    assert formula_of(structure) == structure.composition.reduced_formula


@pytest.mark.filterwarnings("error")
def test_a_noble_gas_is_no_reason_to_warn():
    Element("Ne").__dict__.pop("X", None)  # pymatgen warns once
    neon = Density(np.ones((2, 2, 2)), Structure(Lattice.cubic(4), ["Ne", "Ne"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert neon.formula == "Ne"
    with pytest.raises(TomatError, match="of Ne is on a grid"):
        Density(np.ones((2, 2, 2)), neon.structure, spin={"diff": np.ones((1, 2, 2))})


def test_shared_sites_have_a_formula():
    mixed = Structure(Lattice.cubic(4), [{"He": 0.5, "Fe": 0.25}, "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert formula_of(mixed) == "Fe0.25O1He0.5"


def test_what_was_changed_in_place_is_seen_before_writing():
    first = noise(np.random.default_rng(0), sad=True)
    check_density(first)
    for block in (first.values, first.sad):
        kept, block[0, 0, 0] = block[0, 0, 0], np.inf
        with pytest.raises(TomatError, match="1 NaN or infinite"):
            check_density(first)
        block[0, 0, 0] = kept


def test_occupancies_and_moments_are_finite():
    sound = noise(np.random.default_rng(0), spin=("diff",), augmented=True)
    with pytest.raises(TomatError, match="occupancies in the block total of noise-1 are not all finite"):
        replace(sound, augmentation={"total": {1: np.array([1, np.inf])}})
    with pytest.raises(TomatError, match="moments in the block diff of noise-1 are not all finite"):
        replace(sound, moments={"diff": np.array([np.nan, 1])})


@pytest.mark.parametrize("species, coords, words", [
    ([], [], "no atoms"), (["H"], [[np.nan, 0, 0]], "not finite"), (["Xx", "He"], [[0, 0, 0], [0, 0, 0.5]], "unknown elements")])
def test_a_structure_that_is_none(species, coords, words):
    with pytest.raises(TomatError, match=words):
        Density(np.ones((2, 2, 2)), Structure(Lattice.cubic(4), species, coords))
