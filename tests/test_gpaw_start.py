"""The tool that runs under GPAW's Python, as far as it goes without GPAW: files of tomat, and densities that do not fit."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase.units import Bohr
from pymatgen.core import Lattice, Structure

import tomat
from tomat.density.core import Density

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpaw_start.py"
sys.path.insert(0, str(SCRIPT.parent))
from gpaw_start import kpoints, on_grid, read

SALT = Structure(Lattice.from_parameters(3.9, 4.1, 4.3, 80, 95, 110), ["Na", "Cl"], [[1 / 3, 0.1, 0.2], [0.5, 0.6, 0.7]])


def test_a_chgcar_of_tomat_is_read_with_every_digit(tmp_path):
    density = Density(np.random.default_rng(0).random((4, 5, 6)), SALT)
    tomat.write(density, tmp_path / "CHGCAR")
    atoms, rho_xyz = read(tmp_path / "CHGCAR")
    assert atoms.get_chemical_symbols() == ["Na", "Cl"] and atoms.pbc.all()
    np.testing.assert_allclose(atoms.cell.array, SALT.lattice.matrix, atol=1e-14)
    np.testing.assert_allclose(atoms.get_scaled_positions(), SALT.frac_coords, atol=1e-14)
    np.testing.assert_allclose(rho_xyz, density.rho, rtol=1e-9)


def test_the_mesh_is_that_of_the_training_data(tmp_path):
    store = tomat.sample_store()
    for id in store.ids[:5]:
        density = store.read(id)
        tomat.write(density, tmp_path / "CHGCAR")
        assert list(kpoints(read(tmp_path / "CHGCAR")[0])["size"]) == density.metadata["kpts"]


def calculator(grid=(4, 5, 6), electrons=8, components=1, processes=1):
    density = SimpleNamespace(finegd=SimpleNamespace(N_c=np.array(grid)), ncomponents=components,
                              gd=SimpleNamespace(comm=SimpleNamespace(size=processes)))
    return SimpleNamespace(density=density, wfs=SimpleNamespace(nvalence=electrons), atoms=SimpleNamespace(get_volume=lambda: 40.0))


def test_a_density_gets_the_electrons_of_the_setups():
    rho_xyz = np.random.default_rng(1).random((4, 5, 6))
    rho_xyz *= 8.01 / (rho_xyz.mean() * 40)
    found = on_grid(calculator(), rho_xyz)
    assert found.mean() * 40 / Bohr**3 == pytest.approx(8)
    np.testing.assert_allclose(found / found.mean(), rho_xyz / rho_xyz.mean())


@pytest.mark.parametrize("given, words", [
    ({"grid": (4, 6, 6)}, "--grid 4,6,6"), ({"electrons": 9}, "8.00 electrons and the setups of this calculation 9"),
    ({"components": 2}, "spinpol=False"), ({"processes": 2}, "'domain': 1")])
def test_what_does_not_fit_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        on_grid(calculator(**given), np.full((4, 5, 6), 0.2))


def test_the_command_explains_itself_without_gpaw():
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "tomat predict POSCAR --ecut 500" in done.stdout
    wrong = subprocess.run([sys.executable, SCRIPT, "CHGCAR"], capture_output=True, text=True)
    assert wrong.returncode == 1 and (importlib.util.find_spec("gpaw") or "gpaw is missing" in wrong.stderr), wrong.stderr
