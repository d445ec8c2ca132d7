"Metrics: hand-worked values, and what no metric may depend on."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pymatgen.core import Lattice, Structure
from scipy.special import erf

from tomat.atoms.sad import sad_density
from tomat.density.store import sample_store
from tomat.io.remote import TomatError
from tomat.density.metrics import (COULOMB, METRICS, atom_spheres, chi_sq, electron_error, hartree_potential, hellinger,
                                   jensen_shannon, nmae, potential_error, rmse, sphere_error, touching_radii, weighted_mae)

CELL = Lattice.from_parameters(3, 4, 5, 80, 95, 105).matrix


def potential(predicted, true):
    "The potential error in one oblique cell."
    return potential_error(predicted, true, CELL)


quick = settings(derandomize=True, deadline=None, max_examples=100)
DISTANCES = (chi_sq, jensen_shannon, hellinger)
shapes = hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)


@st.composite
def pairs(draw, low=-100.0):
    "A prediction and a truth on one small grid, the truth not zero everywhere."
    shape = draw(shapes)
    predicted, true = (draw(hnp.arrays(np.float64, shape, elements=st.floats(low, 1000, width=16))) for _ in range(2))
    true.flat[0], predicted.flat[0] = 1.0, 2.0  # each is positive somewhere
    return predicted, true


def test_hand_worked():
    true, predicted = np.array([[[4.0, 2.0], [1.0, 1.0]]]), np.array([[[3.0, 3.0], [1.0, 2.0]]])
    assert nmae(predicted, true) == 3 / 8
    assert rmse(predicted, true) == pytest.approx(np.sqrt(3 / 4))
    assert electron_error(predicted, true) == 0.25
    assert weighted_mae(predicted, true) == (4 + 2 + 0 + 1) / 8
    assert nmae(-true, true) == 2 and nmae(true, -true) == 2


@quick
@given(pairs(), st.integers(-7, 7), st.integers(-7, 7), st.integers(-7, 7))
def test_the_origin_does_not_matter(pair, i, j, k):
    moved = [np.roll(v, (i, j, k), (0, 1, 2)) for v in pair]
    for metric in METRICS.values():
        assert metric(*moved) == pytest.approx(metric(*pair), rel=1e-9, abs=1e-9)


@quick
@given(pairs(), st.floats(1e-3, 1e3))
def test_units(pair, factor):
    scaled = [factor * v for v in pair]
    assert nmae(*scaled) == pytest.approx(nmae(*pair), rel=1e-9)
    assert rmse(*scaled) == pytest.approx(factor * rmse(*pair), rel=1e-9)
    assert weighted_mae(*scaled) == pytest.approx(factor * weighted_mae(*pair), rel=1e-9)
    for distance in DISTANCES:
        assert distance(*scaled) == pytest.approx(distance(*pair), rel=1e-9, abs=1e-12)
    assert electron_error(*scaled) == pytest.approx(factor * electron_error(*pair), rel=1e-9, abs=1e-9)


@quick
@given(pairs())
def test_a_supercell_is_the_same_material(pair):
    doubled = [np.tile(v, (1, 2, 1)) for v in pair]
    for metric in METRICS.values():
        assert metric(*doubled) == pytest.approx(metric(*pair), rel=1e-9, abs=1e-9)


@quick
@given(pairs(low=0.0))
def test_electrons_are_bounded_by_nmae(pair):
    predicted, true = pair
    assert abs(electron_error(predicted, true)) <= nmae(predicted, true) * true.mean() * (1 + 1e-9) + 1e-9


@quick
@given(pairs())
def test_zero_only_for_the_truth(pair):
    predicted, true = pair
    for metric in (nmae, rmse):  # the others forgive what lies where the true density is zero, or a factor
        assert metric(true, true) == 0 and (metric(predicted, true) > 0) == bool((predicted != true).any())
        assert isinstance(metric(predicted, true), float)


def test_float32_is_summed_in_float64():
    true = np.full((64, 64, 64), 16777216.0, np.float32)
    assert electron_error(true, true - np.float32(1)) == 1.0


@pytest.mark.parametrize("metric", [*METRICS.values(), potential])
def test_refusals(metric):
    ones = np.ones((2, 2, 2))
    empty = np.ones((0, 2, 2))
    shapes = [(ones, np.ones((2, 2, 1))), (np.ones(8), ones), (empty, empty)]
    contents = [(ones * np.nan, ones), (ones, ones + np.inf), (ones * 1j, ones), (ones, ones.astype(str))]
    for predicted, true in shapes + contents:
        with pytest.raises(TomatError) as caught:
            metric(predicted, true)
        assert "\n" not in str(caught.value)


def test_a_true_density_of_zeros_has_no_nmae():
    with pytest.raises(TomatError, match="zero everywhere"):
        nmae(np.ones((2, 2, 2)), np.zeros((2, 2, 2)))


def test_distances_by_hand():
    "Two coins: (3/4, 1/4) against (1/4, 3/4)."
    p, q = np.array([3.0, 1.0]), np.array([1.0, 3.0])
    assert chi_sq(p, q) == pytest.approx(0.5 * 2 * 0.25 / 1)
    assert jensen_shannon(p, q) == pytest.approx(1 - (-0.75 * np.log2(0.75) - 0.25 * np.log2(0.25)))
    assert hellinger(p, q) == pytest.approx((np.sqrt(3) - 1) / 2)


@quick
@given(pairs(low=0.0))
def test_distances_are_symmetric_bounded_and_in_topsoes_order(pair):
    for distance in DISTANCES:
        assert -1e-12 <= distance(*pair) <= 1 + 1e-9
        assert distance(*pair) == pytest.approx(distance(*pair[::-1]), rel=1e-9, abs=1e-12)
    c, j, h2 = chi_sq(*pair), jensen_shannon(*pair), hellinger(*pair) ** 2
    assert h2 <= c * (1 + 1e-9) + 1e-15 and c <= 2 * h2 * (1 + 1e-9) + 1e-15
    assert c / (2 * np.log(2)) <= j * (1 + 1e-9) + 1e-15 and j <= c * (1 + 1e-9) + 1e-15


@quick
@given(pairs(low=0.0), st.floats(0.01, 0.99))
def test_hellinger_keeps_the_triangle_inequality(pair, share):
    p, q = pair
    between = share * p / p.sum() + (1 - share) * q / q.sum()
    assert hellinger(p, q) <= hellinger(p, between) + hellinger(between, q) + 1e-9


def test_small_differences_are_not_lost_to_rounding():
    q = np.random.default_rng(0).random(1000) + 0.5
    p = q * (1 + 1e-7 * np.random.default_rng(1).normal(size=1000))
    assert jensen_shannon(p, q) == pytest.approx(chi_sq(p, q) / (2 * np.log(2)), rel=1e-3)
    assert chi_sq(p, q) == pytest.approx(2 * hellinger(p, q) ** 2, rel=1e-3)


def test_no_distribution():
    with pytest.raises(TomatError, match="no distribution"):
        chi_sq(np.zeros(3), np.ones(3))
    with pytest.raises(TomatError, match="zero everywhere"):
        weighted_mae(np.ones(3), np.zeros(3))
    negative = np.where(np.arange(27).reshape(3, 3, 3) == 13, -5.0, 0.3)
    for true, message in ((-np.ones((3, 3, 3)), "no electrons"), (negative, "negative where")):
        with pytest.raises(TomatError, match=message):
            potential(true + (negative < 0), true)


def test_spheres_of_caesium_chloride():
    "By hand: the nearest neighbour is half a space diagonal away, and the spheres fill π√3/8 of the cell."
    cell = Structure.from_spacegroup("Pm-3m", Lattice.cubic(4.0), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(touching_radii(cell), np.sqrt(3))
    spheres = atom_spheres(cell, (48, 48, 48))
    assert sum(map(len, spheres)) / 48**3 == pytest.approx(np.pi * np.sqrt(3) / 8, rel=0.01)
    assert len(np.unique(np.concatenate(spheres))) == sum(map(len, spheres))
    true = np.ones((48, 48, 48))
    wrong = true.copy()
    wrong.flat[spheres[0]] = 3.0
    assert sphere_error(wrong, true, spheres) == pytest.approx(2 * len(spheres[0]) / 48**3 / 2)  # the other atom has no error


@quick
@given(st.floats(60, 120), st.floats(60, 120), st.integers(0, 2**32 - 1))
def test_spheres_in_skewed_cells(alpha, beta, seed):
    "Against pymatgen's search over images; a lone atom's sphere touches its own image."
    rng = np.random.default_rng(seed)
    cell = Structure(Lattice.from_parameters(3, 4, 5, alpha, beta, 90), ["Na"], [rng.random(3)])
    shape = (9, 10, 11)
    points = np.stack(np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij"), -1).reshape(-1, 3)
    found = cell.lattice.get_points_in_sphere(points, cell.cart_coords[0], touching_radii(cell)[0] - 1e-9, zip_results=False)
    assert set(atom_spheres(cell, shape)[0]) >= set(np.array(found[2], int))
    assert len(atom_spheres(cell, shape)[0]) <= len(found[2]) + 2  # points on the surface itself
    images = cell.get_sites_in_sphere(cell.cart_coords[0], 6.0)
    assert touching_radii(cell)[0] == pytest.approx(min(image.nn_distance for image in images if image.nn_distance > 1e-6) / 2)


def test_a_sphere_smaller_than_the_grid_has_its_nearest_point():
    h2 = Structure(Lattice.cubic(8.0), ["H", "H"], [[0, 0, 0], [0.01, 0, 0]])
    assert [len(inside) for inside in atom_spheres(h2, (8, 8, 8))] == [1, 1]


@quick
@given(pairs(low=0.0), st.tuples(*[st.integers(-7, 7)] * 3), st.floats(1e-3, 1e3))
def test_the_potential_is_that_of_the_crystal(pair, steps, factor):
    "Not of its origin, or of the number of its cells; and it is linear in the density."
    found = pytest.approx(potential(*pair), rel=1e-6, abs=1e-6)
    assert potential(*(np.roll(v, steps, (0, 1, 2)) for v in pair)) == found
    doubled = [2 * np.tile(v, (1, 2, 1)) for v in pair]  # `total` is density × volume
    assert potential_error(*doubled, CELL * [[1], [2], [1]]) == found
    assert potential(*(factor * v for v in pair)) == pytest.approx(factor * potential(*pair), rel=1e-6, abs=1e-6)


def clouds(lattice, shape, centre, widths):
    "A narrow Gaussian electron minus a wide one at the same place, e/Å³, and distances to it."
    fractions = np.stack(np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij"), -1) - centre
    r = np.linalg.norm((fractions - np.round(fractions)) @ lattice, axis=-1)
    narrow, wide = (np.exp(-r**2 / (2 * s**2)) / (2 * np.pi * s**2) ** 1.5 for s in widths)
    return narrow - wide, r


@pytest.mark.parametrize("angles", [(90, 90, 90), (75, 100, 110)])
def test_the_potential_of_gaussian_charges(angles):
    "A neutral pair of clouds has no field outside, so that the formula holds in a whole periodic cell, whatever its shape."
    lattice, widths = Lattice.from_parameters(14, 15, 16, *angles).matrix, (0.5, 0.9)
    rho_xyz, r = clouds(lattice, (56, 60, 64), (0.3, 0.6, 0.1), widths)
    alone = [np.sqrt(2 / np.pi) / s if r_ == 0 else erf(r_ / (np.sqrt(2) * s)) / r_ for r_ in r.flat[::61] for s in widths]
    narrow, wide = np.reshape(alone, (-1, 2)).T
    background = 2 * np.pi * (widths[1] ** 2 - widths[0] ** 2) / abs(np.linalg.det(lattice))  # the mean of the formula
    np.testing.assert_allclose(hartree_potential(rho_xyz, lattice).flat[::61], COULOMB * (narrow - wide - background), atol=2e-4)


def test_the_potential_wave_by_wave():
    "Against a plain sum over the waves of a small grid, in an oblique cell."
    rng, shape = np.random.default_rng(0), (3, 5, 3)
    true, predicted = rng.random(shape) + 0.5, rng.random(shape)
    b, points = 2 * np.pi * np.linalg.inv(CELL).T, [np.array(p) for p in np.ndindex(shape)]
    error = (predicted - true) / Lattice(CELL).volume
    v = np.zeros(shape)
    for wave in (p - np.array(shape) // 2 for p in points):
        if g2 := ((wave @ b) ** 2).sum():
            phases = np.array([np.exp(2j * np.pi * (wave @ (p / shape))) for p in points]).reshape(shape)
            v += (4 * np.pi * COULOMB * (error * phases.conj()).mean() / g2 * phases).real
    mean = (true * v).sum() / true.sum()
    assert potential(predicted, true) == pytest.approx(1000 * np.sqrt((true * (v - mean) ** 2).sum() / true.sum()), rel=1e-9)
    assert v.mean() == pytest.approx(0, abs=1e-9) and abs(mean) > 0.01


def test_the_choice_of_lattice_vectors_does_not_matter():
    "The same points and values under a, b - a, c; the clouds are resolved by both grids."
    lattice, n = Lattice.from_parameters(8, 8, 9, 85, 95, 100).matrix, 40
    rho_xyz, r = clouds(lattice, (n, n, n), (0.5, 0.5, 0.5), (0.5, 0.8))
    true_xyz = np.exp(-r) + 0.1
    i, j, k = np.meshgrid(*[np.arange(n)] * 3, indexing="ij")
    total = [values_xyz * abs(np.linalg.det(lattice)) for values_xyz in (true_xyz + rho_xyz, true_xyz)]
    skewed = [values_xyz[(i - j) % n, j, k] for values_xyz in total]
    found = potential_error(*total, lattice)
    assert found > 500
    assert potential_error(*skewed, [[1, 0, 0], [-1, 1, 0], [0, 0, 1]] @ lattice) == pytest.approx(found, rel=1e-6)


def test_a_charge_on_the_wrong_atom_costs_more_than_noise():
    "Of the same NMAE, in titanium monoxide: a few hundredths of an electron moved from one atom to the other, and noise."
    store = sample_store()
    true = next(d for d in map(store.read, store.split("validation")) if d.formula == "TiO")
    lattice = true.structure.lattice.matrix
    ti, o = (sad_density(Structure.from_sites(true.structure[site:site + 1]), true.shape) for site in (0, 1))
    transfer = o / o.mean() - ti / ti.mean()
    noise = true.total * np.random.default_rng(0).normal(size=true.shape)
    cost = [potential_error(true.total + error * (0.01 / nmae(true.total + error, true.total)), true.total, lattice)
            for error in (transfer, noise)]
    assert cost[0] > 15 * cost[1]
