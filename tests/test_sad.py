"The sum of atomic densities: against a sum point by point, against Gaussians, and under changes that leave the physics alone."
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from crystals import crystal, quick
from hypothesis import example, given
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from tomat.density.core import Density
from tomat.io.remote import TomatError
from tomat.density.metrics import nmae
from tomat.atoms.neighbours import periodic_images
from tomat.atoms.sad import (FreeAtom, FreeAtoms, free_atom, load_atoms, own_digest, packaged_atoms, sad_density, save_atoms,
                             valence_electrons, with_sad)
from tomat.density.store import sample_store

seeds = st.integers(0, 10_000)
WIDTH = 0.5
R = np.arange(0, 5, 0.05)
GAUSSIANS = FreeAtoms({s: FreeAtom.of(s, n, 0.05, n * np.exp(-R**2 / (2 * WIDTH**2)) / (2 * np.pi * WIDTH**2)**1.5)
                       for s, n in (("Fe", 8.0), ("O", 6.0), ("Na", 1.0))}, "Gaussians")


def sum_at(points, structure, atoms):
    "The sum as it is defined, e/Å³: the spline at the distance of each image of each atom."
    total = np.zeros(len(points))
    for i, site in enumerate(structure):
        atom, images = atoms[site.specie.symbol], periodic_images(structure, atoms[site.specie.symbol].cutoff)
        for position in images.position_Jx3[images.atom_J == i]:
            r = np.linalg.norm(points - position, axis=1)
            total += np.where(r < atom.cutoff, atom.density_r(np.minimum(r, atom.cutoff)), 0)
    return total


def point_by_point(structure, shape, atoms):
    "The same on a grid."
    grid = np.stack(np.meshgrid(*[np.arange(n) / n for n in shape], indexing="ij"), -1) @ structure.lattice.matrix
    return sum_at(grid.reshape(-1, 3), structure, atoms).reshape(shape)


@quick
@given(seeds, st.integers(1, 3), st.tuples(*[st.integers(1, 7)] * 3))
@example(1, 1, (1, 1, 2)).via("both points lie 700,000 times below the mean, so errors are multiplied by as much")
@example(8466, 1, (1, 3, 1))
@example(5037, 1, (1, 3, 1))
def test_gaussians_on_any_grid_of_any_cell(seed, n_atoms, shape):
    "Coarse grids too: a grid of one point holds the density at that point, up to the scale."
    structure = crystal(np.random.default_rng(seed), n_atoms)
    truth_xyz = point_by_point(structure, shape, GAUSSIANS)
    truth_xyz *= valence_electrons(structure, GAUSSIANS) / truth_xyz.mean()
    np.testing.assert_allclose(sad_density(structure, shape, GAUSSIANS), truth_xyz, rtol=1e-5, atol=1e-4 * truth_xyz.max())


@pytest.mark.parametrize("symbol", ["H", "O", "F", "Ne", "Na", "Cl", "Cr", "Fe", "Cu", "Cs", "Au"])
def test_packaged_atoms_as_their_spline_says(symbol):
    structure = Structure(Lattice.from_parameters(2.6, 3.1, 3.4, 75, 95, 110), [symbol], [[0.31, 0.42, 0.97]])
    shape = (9, 10, 11)
    truth_xyz = point_by_point(structure, shape, packaged_atoms())
    assert nmae(sad_density(structure, shape), truth_xyz * free_atom(symbol).n_valence / truth_xyz.mean()) < 2e-4


def test_the_stored_sums():
    store = sample_store()
    for id in store.split("validation"):
        density = store.read(id)
        total_xyz = sad_density(density.structure, density.shape)
        assert nmae(total_xyz, density.sad) < 1e-4
        assert total_xyz.mean() == pytest.approx(valence_electrons(density.structure), abs=1e-9)
        assert total_xyz.mean() == pytest.approx(density.n_electrons, rel=1e-6)


@quick
@given(seeds, st.tuples(*[st.integers(-9, 9)] * 3), st.tuples(*[st.integers(3, 8)] * 3))
def test_the_origin_moves_the_density_with_it(seed, steps, shape):
    structure = crystal(np.random.default_rng(seed))
    before_xyz = sad_density(structure, shape)
    structure.translate_sites(range(len(structure)), np.divide(steps, shape), to_unit_cell=seed % 2 == 0)
    np.testing.assert_allclose(sad_density(structure, shape), np.roll(before_xyz, steps, (0, 1, 2)), atol=1e-9 * before_xyz.max())


@quick
@given(seeds, st.permutations([1, 1, 2]))
def test_a_supercell_repeats_the_density(seed, times):
    structure, shape = crystal(np.random.default_rng(seed)), (5, 4, 6)
    once_xyz = sad_density(structure, shape)
    many_xyz = sad_density(structure * times, tuple(np.multiply(shape, times)))
    np.testing.assert_allclose(many_xyz / 2, np.tile(once_xyz, times), atol=1e-8 * once_xyz.max())


@quick
@given(seeds, st.floats(0, 6.28), st.floats(0, 3.14))
def test_a_rotated_crystal_has_the_same_density(seed, phi, theta):
    structure = crystal(np.random.default_rng(seed))
    z = np.array([[np.cos(phi), np.sin(phi), 0], [-np.sin(phi), np.cos(phi), 0], [0, 0, 1]])
    x = np.array([[1, 0, 0], [0, np.cos(theta), np.sin(theta)], [0, -np.sin(theta), np.cos(theta)]])
    rotated = Structure(Lattice(structure.lattice.matrix @ z @ x), structure.species, structure.frac_coords)
    total_xyz = sad_density(structure, (4, 5, 6))
    # a wave at the very limit may fall on either side of it
    np.testing.assert_allclose(sad_density(rotated, (4, 5, 6)), total_xyz, atol=1e-6 * total_xyz.max())


@quick
@given(seeds, st.integers(-4, 4), st.integers(-4, 4))
def test_other_lattice_vectors_of_the_same_crystal(seed, p, q):
    "Skewed up to a few degrees; the points of the grid are the same in another order."
    structure, n = crystal(np.random.default_rng(seed)), 6
    cell = np.array([[1, 0, 0], [p, 1, 0], [q, 0, 1]]) @ structure.lattice.matrix
    skewed = Structure(Lattice(cell), structure.species, structure.cart_coords, coords_are_cartesian=True)
    i, j, k = np.meshgrid(*[np.arange(n)] * 3, indexing="ij")
    total_xyz = sad_density(structure, (n, n, n))
    same_xyz = total_xyz[(i + p * j + q * k) % n, j, k]
    np.testing.assert_allclose(sad_density(skewed, (n, n, n)), same_xyz, atol=1e-6 * total_xyz.max())


@pytest.mark.parametrize(("edges", "n_atoms", "shape"), [((1.2, 1.3, 1.1), 1, (8, 8, 8)), ((25, 24, 26), 1, (30, 30, 30)),
                                                         ((2, 2, 60), 2, (6, 6, 120)), ((15, 14, 13), 200, (40, 36, 36))])
def test_tiny_huge_long_and_full_cells(edges, n_atoms, shape):
    rng = np.random.default_rng(1)
    structure = Structure(Lattice.orthorhombic(*edges), sorted(rng.choice(["Fe", "O", "Na"], n_atoms)), rng.random((n_atoms, 3)))
    total_xyz = sad_density(structure, shape, GAUSSIANS)
    assert total_xyz.mean() == pytest.approx(valence_electrons(structure, GAUSSIANS), rel=1e-9)
    some = rng.choice(total_xyz.size, 20, replace=False)  # those and their neighbours, against the definition
    points = np.stack(np.unravel_index(some, shape), 1) / shape @ structure.lattice.matrix
    truth = sum_at(points, structure, GAUSSIANS)
    np.testing.assert_allclose(total_xyz.ravel()[some] / structure.volume, truth, rtol=0.02, atol=1e-5)


def test_form_factors_of_gaussians():
    g = np.linspace(0, 30, 50)
    np.testing.assert_allclose(GAUSSIANS["Na"].form_factor(g), np.exp(-g**2 * WIDTH**2 / 2), atol=1e-5)


def test_atoms_from_a_file(tmp_path):
    save_atoms(GAUSSIANS, tmp_path / "atoms.json")
    again = load_atoms(tmp_path / "atoms.json")
    structure = crystal(np.random.default_rng(3))
    one, other = sad_density(structure, (5, 6, 7), again), sad_density(structure, (5, 6, 7), GAUSSIANS)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    filled = with_sad(Density(other, structure), again)
    np.testing.assert_array_equal(filled.sad, one)
    assert with_sad(filled) is filled  # a stored sum is kept for the packaged atoms, and made again for others
    np.testing.assert_array_equal(with_sad(replace(filled, sad=0 * other), again).sad, one)
    assert again.digest == GAUSSIANS.digest == own_digest(again) and own_digest(packaged_atoms()) is None


def test_units_of_a_density_are_kept():
    structure = crystal(np.random.default_rng(4))
    density = Density(sad_density(structure, (5, 6, 7)), structure)
    np.testing.assert_allclose(with_sad(density.as_units("e/Å³")).sad * density.volume, density.values)


TABLE = {"n_valence": 1.0, "dr": 0.05, "rho": list(GAUSSIANS["Na"].density_r(R))}


@pytest.mark.parametrize("held", [[], {}, {"atoms": {}}, {"atoms": []}, {"atoms": {"Na": 3}}, {"atoms": {"Xx": TABLE}},
                                  {"atoms": {"Na": TABLE | {"dr": 0}}}, {"atoms": {"Na": TABLE | {"dr": "wide"}}},
                                  {"atoms": {"Na": TABLE | {"n_valence": 2}}}, {"atoms": {"Na": TABLE | {"n_valence": -1}}},
                                  {"atoms": {"Na": TABLE | {"rho": [1, 2]}}}, {"atoms": {"Na": TABLE | {"rho": [TABLE["rho"]]}}},
                                  {"atoms": {"Na": {"rho": TABLE["rho"]}}}, {"atoms": {"Na": TABLE | {"rho": [float("nan")] * 9}}}])
def test_a_file_without_atoms_is_refused(tmp_path, held):
    path = tmp_path / "atoms.json"
    path.write_text(json.dumps(held))
    with pytest.raises(TomatError, match=re.escape(str(path))) as caught:
        load_atoms(path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("structure", "words"), [
    (Structure(Lattice.cubic(3), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]]), "partly occupied"),
    (Structure(Lattice.cubic(3), [{"Cu": 0.5}], [[0, 0, 0]]), "partly occupied"),
    (Structure(Lattice.cubic(3), [], []), "no atoms"),
    (Structure(Lattice.cubic(3), ["Tc"], [[0, 0, 0]]), "no free atom for Tc"),
    (Structure(Lattice.cubic(3), ["X"], [[0, 0, 0]]), "unknown elements"),
    (Structure(Lattice.cubic(3), ["Cu"], [[0, np.nan, 0]]), "not finite")])
def test_a_structure_without_a_sum_is_refused(structure, words):
    for refused in (lambda: sad_density(structure, (4, 4, 4)), lambda: valence_electrons(structure)):
        with pytest.raises(TomatError, match=words):
            refused()


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 4), (-1, 4, 4)])
def test_a_shape_that_is_no_grid_is_refused(shape):
    with pytest.raises(TomatError, match="no shape of a grid"):
        sad_density(crystal(np.random.default_rng(0)), shape)


def test_charged_species_count_as_their_elements():
    ions = Structure(Lattice.cubic(5.6), ["Na+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    atoms = Structure(Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(sad_density(ions, (6, 6, 6)), sad_density(atoms, (6, 6, 6)))


def test_densities_of_other_setups_are_refused():
    structure = crystal(np.random.default_rng(2))
    density = Density(np.full((3, 3, 3), 2.0), structure, id="mp-7")
    with pytest.raises(TomatError, match=r"mp-7 holds 2.00 electrons and the packaged free atoms .*% fewer: .*same setups"):
        with_sad(density)
    with pytest.raises(TomatError, match=r"Gaussians"):
        with_sad(density, GAUSSIANS)
