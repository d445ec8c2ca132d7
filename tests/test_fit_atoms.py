"Fitted atoms: made-up atoms are found again, sums add up, electrons are counted, and impossible fits are refused."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from crystals import crystal, quick
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from tomat.density.core import RHO, Density
from tomat.io.remote import TomatError
from tomat.atoms.fit_atoms import (COMPUTED_PRIOR, BASIS, ELECTRONS, KNOTS, N_BASIS, TABLE_R, FitSums, add_up, columns_of,
                                   count_electrons, fit_atoms, solve, sums_of)
from tomat.density.formats import read_density
from tomat.density.metrics import nmae
from tomat.atoms.kohn_sham import computed_atom
from tomat.atoms.sad import FreeAtom, FreeAtoms, load_atoms, packaged_atoms, sad_density, save_atoms, valence_electrons
from tomat.density.source import InMemory

NOBODY = FreeAtoms({}, "nobody")
FILES = Path(__file__).parent / "files"
COUNTS = {"Fe": 10.0, "O": 7.0, "Na": 5.0}
UNUSUAL = {"Fe": 17.0, "O": 9.0, "Na": 11.0}  # more than any number that a guess would try
WIDTHS = {"Fe": 0.25, "O": 0.3, "Na": 0.35}


def made_up_atom(symbol, n):
    "The tail of a computed atom around a smooth core of our own, which holds the rest of the electrons."
    tail = computed_atom(symbol, n).density_r(TABLE_R) / (1 + np.exp(np.minimum((0.7 - TABLE_R) / 0.08, 50)))
    core = np.exp(-TABLE_R**2 / (2 * WIDTHS[symbol]**2)) / (2 * np.pi * WIDTHS[symbol]**2)**1.5
    return FreeAtom.of(symbol, n, 0.05, tail + core * (n - 4 * np.pi * np.trapezoid(TABLE_R**2 * tail, TABLE_R)))


TRUTH = FreeAtoms({s: made_up_atom(s, n) for s, n in COUNTS.items()}, "made-up atoms")


def made_up(seed, n_atoms=3, shape=(12, 12, 12)):
    "A crystal that is a sum of spherical atoms and nothing else."
    structure = crystal(np.random.default_rng(seed), n_atoms)
    structure.scale_lattice(25.0 * n_atoms)
    return Density(sad_density(structure, shape, TRUTH), structure, id=f"m-{seed}")


@pytest.fixture(scope="module")
def crystals():
    return InMemory([made_up(seed, n) for n in (1, 2, 3) for seed in range(10 * n, 10 * n + 6)])


@pytest.fixture(scope="module")
def parts(crystals):
    return [sums_of(crystals.read(id), 1500) for id in crystals.ids]


def same(a, b, **near):
    assert list(a.atoms) == list(b.atoms)
    for symbol in a.atoms:
        np.testing.assert_allclose(a[symbol].density_r(TABLE_R), b[symbol].density_r(TABLE_R), **near)


def test_made_up_atoms_are_found_again_without_a_hint(parts):
    fitted = solve(add_up(parts), NOBODY)
    for symbol, n in COUNTS.items():
        assert fitted[symbol].n_valence == n
        r = np.linspace(0.3, 3, 50)
        truth = TRUTH[symbol].density_r(r)
        assert np.abs(fitted[symbol].density_r(r) - truth).max() < 0.02 * truth.max()
    unseen = made_up(99)
    assert nmae(sad_density(unseen.structure, unseen.shape, fitted), unseen.total) < 0.01


@quick
@given(st.permutations(range(6)), st.integers(1, 5))
def test_parts_in_any_order_and_grouping_give_the_same_atoms(parts, order, cut):
    chosen = [parts[i] for i in order]
    whole = add_up(parts[:6])
    other = add_up([add_up(chosen[:cut]), add_up(chosen[cut:])])
    assert whole.materials == other.materials and whole.pairs == other.pairs
    assert whole.charge == pytest.approx(other.charge) and whole.charge2 == pytest.approx(other.charge2)
    for key, block in whole.gram.items():
        np.testing.assert_allclose(other.gram[key], block, rtol=1e-9, atol=1e-12)


def test_adding_leaves_the_parts_as_they_were(parts):
    before = {key: block.copy() for key, block in parts[0].gram.items()}
    add_up([parts[0], parts[1], parts[0]])
    for key, block in before.items():
        np.testing.assert_array_equal(parts[0].gram[key], block)


def test_any_number_of_workers_gives_the_same_bits(crystals):
    ids = crystals.ids[:5]
    (one, _), (two, sums) = (fit_atoms(ids, crystals.read, NOBODY, voxels=200, workers=n) for n in (1, 2))
    same(one, two, rtol=0)
    (rest, _) = fit_atoms(crystals.ids[5:8], crystals.read, NOBODY, voxels=200, parts=[sums])
    (whole, _) = fit_atoms(crystals.ids[:8], crystals.read, NOBODY, voxels=200)
    same(rest, whole, atol=1e-6)


def test_units_do_not_matter_and_the_seed_does():
    density = made_up(1)
    one, other = sums_of(density, 300), sums_of(density.as_units(RHO), 300)
    for key, block in one.gram.items():
        np.testing.assert_allclose(other.gram[key], block, rtol=1e-9)
    assert any((sums_of(density, 300, seed=1).gram[key] != block).any() for key, block in one.gram.items())


@quick
@given(st.integers(0, 1000), st.integers(1, 4))
def test_columns_are_sums_over_all_images(seed, n_atoms):
    rng = np.random.default_rng(seed)
    structure = crystal(rng, n_atoms)
    points = rng.random((5, 3))
    columns = columns_of(structure, points)
    values = {s: np.zeros(5) for s in columns}
    atom = FreeAtom.of("H", 1, 0.05, BASIS @ (coefficients := rng.random(N_BASIS)))
    for i, point in enumerate(points):
        for site, distance, *_ in structure.get_sites_in_sphere(structure.lattice.get_cartesian_coords(point), KNOTS[-1] - 1e-6):
            values[site.specie.symbol][i] += atom.density_r(distance)
    for symbol, block in columns.items():
        np.testing.assert_allclose(block @ coefficients, values[symbol], rtol=1e-6, atol=1e-9)


counts = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(counts)
def test_electrons_are_known_where_the_cells_determine_them(cells):
    names, electrons = sorted(UNUSUAL), np.array([UNUSUAL[s] for s in sorted(UNUSUAL)])
    parts = []
    for cell in cells:
        held = {s: n for s, n in zip(names, cell, strict=True) if n}
        total = float(np.dot(cell, electrons))
        pairs = {(a, b): float(held[a] * held[b]) for a in held for b in held if a <= b}
        parts.append(FitSums({}, {s: np.zeros(1) for s in held}, pairs,
                             {s: n * total for s, n in held.items()}, total**2, dict.fromkeys(held, 1) | {"": 1}))
    found = count_electrons(add_up(parts), NOBODY)
    matrix = np.array(cells, float)[:, [names.index(s) for s in found.symbols]]
    rank = np.linalg.matrix_rank(matrix)
    assert found.unexplained < 1e-3
    np.testing.assert_allclose(matrix @ found.electrons, matrix @ [UNUSUAL[s] for s in found.symbols], atol=1e-6)
    for i, symbol in enumerate(found.symbols):
        unit = np.eye(len(found.symbols))[i]
        assert found.known[i] == (np.linalg.matrix_rank(np.vstack([matrix, unit])) == rank)
        assert not found.known[i] or found.electrons[i] == UNUSUAL[symbol]
    counts = count_electrons(add_up(parts), FreeAtoms({s: replace(TRUTH[s], n_valence=n) for s, n in UNUSUAL.items()}, "right"))
    assert counts.known.all() and list(counts.electrons) == [UNUSUAL[s] for s in counts.symbols]


def test_cells_that_contradict_each_other_leave_electrons_unexplained():
    densities = [made_up(seed, 1) for seed in (10, 11, 12, 13, 14, 15)]
    wrong = [replace(d, values=d.values * (1 + 0.1 * (i % 2))) for i, d in enumerate(densities)]
    assert count_electrons(add_up(sums_of(d, 50) for d in densities), NOBODY).unexplained < 1e-3
    assert count_electrons(add_up(sums_of(d, 50) for d in wrong), NOBODY).unexplained > 0.05


def test_a_file_of_another_code(tmp_path):
    "Rock salt alone says that sodium and chlorine have eight together, and their groups say how many each."
    nacl = read_density(FILES / "CHGCAR.NaCl.gz")
    fitted, _ = fit_atoms([0], lambda _: nacl)
    assert fitted.metadata["electrons_known"] == ["Cl", "Na"] and fitted["Na"].n_valence == 1
    assert valence_electrons(nacl.structure, fitted) == pytest.approx(8, abs=1e-4)
    save_atoms(fitted, tmp_path / "atoms.json")
    again = load_atoms(tmp_path / "atoms.json")
    assert again.metadata["materials"] == 1 and again.metadata["materials_of"] == {"Cl": 1, "Na": 1}
    total_xyz = sad_density(nacl.structure, nacl.shape, again)
    assert nmae(total_xyz, nacl.total) < 0.01 and total_xyz.mean() == pytest.approx(nacl.n_electrons, abs=1e-4)


def test_each_compound_finds_its_own_guess():
    "Rock salt of another code with groups' electrons, and titanium monoxide with the packaged ones, in one fit."
    nacl = read_density(FILES / "CHGCAR.NaCl.gz")
    tio = Density(sad_density(cell := Structure(Lattice.cubic(3), ["Ti", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]]), (12, 12, 12)), cell)
    fitted = solve(add_up([sums_of(nacl, 500), sums_of(tio, 500)]))
    assert {s: atom.n_valence for s, atom in fitted.atoms.items()} == {"Cl": 7, "Na": 1, "O": 6, "Ti": 12}


def test_electrons_that_nothing_tells():
    "Neither guess agrees with eleven electrons: the nearer one is bent, and the file says so."
    nacl = read_density(FILES / "CHGCAR.NaCl.gz")
    odd = replace(nacl, values=nacl.values * (11 / 8))
    fitted, _ = fit_atoms([0], lambda _: odd)
    assert fitted.metadata["electrons_known"] == [] and valence_electrons(odd.structure, fitted) == pytest.approx(11, abs=1e-4)
    assert nmae(sad_density(odd.structure, odd.shape, fitted), odd.total) < 0.01


def test_few_data_stay_near_the_free_atom():
    "One voxel says next to nothing."
    iron = Structure(Lattice.cubic(2.8), ["Fe"], [[0, 0, 0]])
    density = Density(sad_density(iron, (12, 12, 12)), iron, id="iron")
    fitted = solve(sums_of(density, 1))
    r = np.linspace(0.5, 3, 40)
    np.testing.assert_allclose(fitted["Fe"].density_r(r), packaged_atoms()["Fe"].density_r(r), atol=0.02)


def test_the_basis_ends_flat():
    atom = FreeAtom.of("H", 1, 0.05, BASIS @ np.arange(1, N_BASIS + 1))
    assert [atom.density_r(0, 1), *(atom.density_r(6, k) for k in range(3))] == pytest.approx([0] * 4, abs=1e-9)
    assert float(atom.form_factor(0)) == pytest.approx(ELECTRONS @ np.arange(1, N_BASIS + 1), rel=1e-6)


EMPTY = Density(np.zeros((3, 3, 3)), Structure(Lattice.cubic(3), ["Fe"], [[0, 0, 0]]), id="mp-9")
MIXED = Density(np.ones((3, 3, 3)), Structure(Lattice.cubic(3), [{"Fe": 0.5, "O": 0.5}], [[0, 0, 0]]), id="mp-9")


@pytest.mark.parametrize("density", [EMPTY, MIXED])
def test_what_cannot_be_fitted_is_refused(density):
    with pytest.raises(TomatError, match="mp-9 has partly occupied sites or no electrons"):
        sums_of(density)


def test_no_material_is_refused(crystals):
    with pytest.raises(TomatError, match="no material"):
        fit_atoms([], crystals.read)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"voxels": 0}])
def test_wrong_numbers_are_refused(crystals, wrong):
    with pytest.raises(TomatError, match="give a seed of 0 or more"):
        fit_atoms(crystals.ids, crystals.read, **wrong)


def test_an_element_without_electrons_is_refused(parts):
    sums = add_up(parts)
    wrong = replace(sums, charge=dict.fromkeys(sums.charge, 0.0))
    with pytest.raises(TomatError, match="electrons"):
        solve(wrong, NOBODY)


def test_a_computed_atom_does_not_pull_the_density_at_the_nucleus():
    """The computed atom of Bi has a cusp of thousands of e/Å³ at the nucleus, and a pseudo-density none."""
    structure = Structure(Lattice.cubic(4.0), ["Bi"], [[0, 0, 0]])
    density = Density(sad_density(structure, (44, 44, 44)), structure, "bismuth")
    fitted, free = solve(sums_of(density, 90_000), COMPUTED_PRIOR)["Bi"], packaged_atoms()["Bi"]
    r = np.array([0.0, 0.05, 0.1])
    np.testing.assert_allclose(fitted.density_r(r), free.density_r(r), rtol=0.1)
