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
    energies = {n: shell.energy for shell in kohn_sham_shells("Xe") if shell.momentum == 0 for n in [shell.n]}
    assert [energies[n] for n in sorted(energies)] == sorted(energies.values()) and sorted(energies) == [1, 2, 3, 4, 5]


def test_computed_atoms_are_those_of_another_program_outside_of_the_core():
    "Another functional, another relativity and pseudopotentials make a difference of a few percent there."
    r = np.array([1.5, 2.0])
    ratios = [computed_atom(s, a.n_valence).density_r(r) / a.density_r(r) for s, a in packaged_atoms().atoms.items() if s not in ("H", "He")]
    assert np.median(np.abs(np.array(ratios) - 1)) < 0.02
