"Analytic atoms: electrons, textbook values, and what has no formula."
import numpy as np
import pytest
from pymatgen.core import Element

from tomat.atoms.analytic import ANALYTIC, analytic_atoms, radius_of, shielding, valence_shells
from tomat.io.remote import TomatError
from tomat.atoms.sad import packaged_atoms


@pytest.mark.parametrize("kind", ANALYTIC)
def test_every_element_keeps_its_electrons(kind):
    for symbol, atom in analytic_atoms(kind).atoms.items():
        assert atom.n_valence == packaged_atoms()[symbol].n_valence
        r = np.linspace(0, atom.cutoff, 20_000)
        rho = atom.density_r(r)
        assert np.trapezoid(4 * np.pi * r**2 * rho, r) == pytest.approx(atom.n_valence, rel=0.005), symbol
        assert rho.min() > -1e-3 * rho.max(), symbol


@pytest.mark.parametrize("symbol, shell, charge", [  # C, Fe and Zn are worked in textbooks of Slater's rules
    ("C", (2, "p"), 3.25), ("Fe", (4, "s"), 3.75), ("Fe", (3, "d"), 6.25), ("Zn", (4, "s"), 4.35), ("Zn", (3, "d"), 8.85)])
def test_slaters_rules(symbol, shell, charge):
    element = Element(symbol)
    assert element.Z - shielding(element.full_electronic_structure, *shell) == pytest.approx(charge)


def test_valence_shells_hold_the_valence():
    for symbol, atom in packaged_atoms().atoms.items():
        shells = valence_shells(symbol, atom.n_valence)
        assert sum(electrons for electrons, *_ in shells) == pytest.approx(atom.n_valence)
        assert all(zeta > 0 for *_, zeta in shells)


def test_refusals():
    with pytest.raises(TomatError, match="no analytic atoms called 'cube'"):
        analytic_atoms("cube")
    with pytest.raises(TomatError, match="No radius of Og"):
        radius_of("Og")
