"Hirshfeld charges: no electron is lost, and waves give what each atom alone on the grid gives."

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from tomat.atoms.hirshfeld import VACUUM, charge_error, hirshfeld_electrons
from tomat.atoms.sad import FreeAtom, FreeAtoms, packaged_atoms, sad_density
from tomat.io.remote import TomatError

quick = settings(derandomize=True, deadline=None, max_examples=15)
ATOMS = packaged_atoms()


def crystal(seed, shape=(9, 12, 10)):
    "Four atoms of three elements in an oblique cell, their SAD, and a density with as many electrons."
    rng = np.random.default_rng(seed)
    corners = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    structure = Structure(Lattice.from_parameters(*rng.uniform(3.5, 5, 3), *rng.uniform(70, 110, 3)), ["Na", "O", "Ti", "O"],
                          corners + rng.uniform(-0.05, 0.05, (4, 3)))
    sad_xyz = sad_density(structure, shape)
    moved = rng.normal(0, 1, shape)
    return structure, sad_xyz, sad_xyz + moved - moved.mean()


def valence_of(structure, atoms=ATOMS):
    return np.array([atoms[site.specie.symbol].n_valence for site in structure])


@quick
@given(st.integers(0, 999))
def test_no_electron_is_lost(seed):
    "On a coarse grid, too, which misses more of an atom than its table does."
    structure, sad_xyz, total_xyz = crystal(seed)
    found = hirshfeld_electrons(total_xyz, sad_xyz, structure)
    assert found.sum() == pytest.approx(total_xyz.mean(), rel=1e-6)
    assert np.abs(found - valence_of(structure)).max() > 0.005


@quick
@given(st.integers(0, 999))
def test_against_each_atom_alone_on_the_grid(seed):
    "Only the scale differs: each atom alone has its exact electrons, and the sum is scaled as a whole."
    structure, sad_xyz, total_xyz = crystal(seed, (27, 30, 32))
    alone = [sad_density(Structure.from_sites([site]), sad_xyz.shape) for site in structure]
    direct = [(total_xyz / sad_xyz * one_xyz).mean() for one_xyz in alone]
    np.testing.assert_allclose(hirshfeld_electrons(total_xyz, sad_xyz, structure), direct, rtol=1e-3)
    np.testing.assert_allclose(hirshfeld_electrons(sad_xyz, sad_xyz, structure), valence_of(structure), rtol=1e-3)


def test_another_description_of_the_crystal():
    structure, sad_xyz, total_xyz = crystal(1)
    found = hirshfeld_electrons(total_xyz, sad_xyz, structure)
    order = [2, 0, 3, 1]
    shuffled = Structure.from_sites([structure[i] for i in order])
    np.testing.assert_allclose(hirshfeld_electrons(total_xyz, sad_xyz, shuffled), found[order], rtol=1e-9)
    steps, moved = (2, 5, 3), structure.copy()
    moved.translate_sites(range(4), np.divide(steps, sad_xyz.shape))
    rolled = [np.roll(values_xyz, steps, (0, 1, 2)) for values_xyz in (total_xyz, sad_xyz)]
    np.testing.assert_allclose(hirshfeld_electrons(*rolled, moved), found, rtol=1e-6)
    double = structure * (1, 1, 2)
    twice = [2 * np.tile(values_xyz, (1, 1, 2)) for values_xyz in (total_xyz, sad_xyz)]
    np.testing.assert_allclose(hirshfeld_electrons(*twice, double), np.repeat(found, 2), rtol=1e-6)


def test_other_atoms():
    "Atoms with other electrons, as fitted ones have: the shares and the numbers are theirs."
    structure, *_ = crystal(2)
    r = np.arange(0, 5, 0.05)
    bells = {s: FreeAtom.of(s, n, 0.05, n * np.exp(-r**2 / (2 * w**2)) / (2 * np.pi * w**2) ** 1.5)
             for s, n, w in (("Na", 1, 0.9), ("O", 6, 0.5), ("Ti", 4, 0.7))}
    atoms = FreeAtoms(bells, "bells")
    sad_xyz = sad_density(structure, (30, 30, 30), atoms)
    np.testing.assert_allclose(hirshfeld_electrons(sad_xyz, sad_xyz, structure, atoms), valence_of(structure, atoms), rtol=1e-3)
    with pytest.raises(TomatError, match="no free atom for Ti"):
        hirshfeld_electrons(sad_xyz, sad_xyz, structure, replace(atoms, atoms={s: bells[s] for s in ("Na", "O")}))


def test_the_error_of_a_transfer_is_the_transfer():
    "A tenth of an electron from each oxygen to titanium, in the shapes of the free atoms, far apart."
    structure = Structure(Lattice.tetragonal(6, 12), ["Ti", "O"], [[0, 0, 0], [0, 0, 0.5]])
    shape = (36, 36, 72)
    ti, o = (sad_density(Structure.from_sites([site]), shape) for site in structure)
    wrong = ti + o + 0.1 * (ti / ti.mean() - o / o.mean())
    assert charge_error(wrong, ti + o, ti + o, structure) == pytest.approx(0.1, abs=0.01)
    assert charge_error(ti + o, ti + o, ti + o, structure) == 0


def test_electrons_far_from_all_atoms_belong_to_none():
    "Where the SAD is ripples about zero, a ratio to it would put any charge on any atom."
    structure = Structure(Lattice.cubic(14), ["O", "O"], [[0.5, 0.5, 0.46], [0.5, 0.5, 0.54]])
    sad_xyz = sad_density(structure, (70, 70, 70))
    far_xyz = np.where(np.abs(sad_xyz) < VACUUM * structure.volume, 1e-3 * structure.volume, 0)
    assert far_xyz.mean() > 1 and charge_error(sad_xyz + far_xyz, sad_xyz, sad_xyz, structure) == 0
