"""A crystal, its origin and its unit may change; what is counted stays."""

import io

import numpy as np
import pytest
from crystals import noise, quick
from hypothesis import given, settings, strategies as st
from pymatgen.core import Element, Lattice, Structure

from tomat.density import RHO, TOTAL, Density, check_density, formula_of, plot_slice
from tomat.files import TomatError


@quick
@given(seed=st.integers(0, 10**6), steps=st.tuples(*[st.integers(-9, 9)] * 3))
def test_rolling_moves_everything_together(seed, steps):
    rng = np.random.default_rng(seed)
    first = noise(rng, spin=("diff",), baseline=True)
    moved = first.rolled(steps)
    assert moved.n_electrons == pytest.approx(first.n_electrons, abs=1e-6)
    i, j, k = rng.integers(0, first.shape)
    place = tuple((np.array([i, j, k]) + steps) % first.shape)
    for of in (lambda d: d.values, lambda d: d.spin["diff"], lambda d: d.baseline):
        assert of(moved)[place] == of(first)[i, j, k]
    shift = moved.structure.frac_coords - first.structure.frac_coords - np.divide(steps, first.shape)
    np.testing.assert_allclose(shift, shift.round(), atol=1e-12)
    back = moved.rolled([-s for s in steps])
    np.testing.assert_array_equal(back.values, first.values)


@settings(quick, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_units_and_electrons(tmp_path_factory, seed):
    first = noise(np.random.default_rng(seed), spin=("diff",), baseline=True)
    other = first.as_units(RHO)
    assert other.n_electrons == pytest.approx(first.n_electrons, rel=1e-5)
    np.testing.assert_allclose(other.as_units(TOTAL).spin["diff"], first.spin["diff"], rtol=1e-5)
    np.testing.assert_allclose(other.values * first.volume, first.values, rtol=1e-5)
    path = tmp_path_factory.mktemp("units")
    for name in ("x.vasp", "x.zarr", "x.cube", "x.json"):
        write_density(other, path / name)
        assert read_density(path / name).n_electrons == pytest.approx(first.n_electrons, rel=1e-4)


def test_a_slice_is_drawn_the_right_way_round():
    import matplotlib
    matplotlib.use("Agg")
    values_xyz = np.arange(24.0).reshape(2, 3, 4)
    ax = plot_slice(values_xyz, axis=1, index=2)
    np.testing.assert_array_equal(ax.images[0].get_array(), values_xyz[:, 2, :].T)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "c")
    ax.figure.savefig(io.BytesIO())
