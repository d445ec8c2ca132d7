"Atoms of density functional theory: all elements of the packaged tables, and a heavy one outside of them."

import numpy as np
import pytest

from tomat.atoms.kohn_sham import computed_atom, kohn_sham_shells
from tomat.atoms.sad import packaged_atoms


@pytest.mark.parametrize("symbol", ["H", "Xe", "Gd", "Hg", "Lr"])
def test_every_shell_holds_its_electrons_and_is_bound(symbol):
    shells = kohn_sham_shells(symbol)
    assert all(shell.energy < 0 and shell.rho_R.min() >= 0 for shell in shells)
    assert [shell.radius for shell in shells] == sorted((shell.radius for shell in shells), reverse=True)


def test_shells_of_the_same_momentum_are_bound_in_their_order():
    energies = {shell.n: shell.energy for shell in kohn_sham_shells("Xe") if shell.momentum == 0}
    assert [energies[n] for n in (1, 2, 3, 4, 5)] == sorted(energies.values())


def test_computed_atoms_are_those_of_another_program_outside_of_the_core():
    "Another functional, another relativity and pseudopotentials make a difference of a few percent there."
    r = np.array([1.5, 2.0])
    ratios = [computed_atom(s, atom.n_valence).density_r(r) / atom.density_r(r) for s, atom in packaged_atoms().atoms.items()]
    assert np.median(np.abs(np.array(ratios) - 1)) < 0.02
