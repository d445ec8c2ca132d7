"""Densities of Quantum ESPRESSO, ABINIT and CP2K: their files are read, and a density is put into the file that two start from."""

import sys
from pathlib import Path

import numpy as np
import pytest
from ase.units import Bohr
from pymatgen.core import Lattice, Structure

from tomat.density.core import Density
from tomat.density.formats import read_density
from tomat.io.remote import TomatError

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "tests" / "files" / "programs"
sys.path.insert(0, str(ROOT / "scripts"))
from density_start import put, records

CELL = Structure(Lattice.from_parameters(3, 3.4, 4, 80, 95, 110), ["Si", "Si"], [[0.0, 0.0, 0.0], [0.3, 0.4, 0.45]])


@pytest.mark.parametrize("program", ["espresso", "abinit"])
def test_cube_and_xsf_of_a_program_hold_the_same_density(program):
    xsf, cube = (read_density(FILES / f"{program}.{format}.gz") for format in ("xsf", "cube"))
    assert xsf.shape == cube.shape == (15, 15, 15)
    assert xsf.n_electrons == pytest.approx(8, abs=1e-5) and cube.n_electrons == pytest.approx(8, abs=1e-4)
    np.testing.assert_allclose(xsf.rho, cube.rho, rtol=1e-4, atol=1e-5 * xsf.rho.max())
    np.testing.assert_allclose(xsf.structure.lattice.matrix, cube.structure.lattice.matrix, atol=1e-4)
    np.testing.assert_allclose(xsf.structure.frac_coords % 1, cube.structure.frac_coords % 1, atol=1e-5)
    assert not np.allclose(xsf.rho, xsf.rho.transpose(2, 1, 0), rtol=1e-2)


@pytest.mark.parametrize("name", ["espresso.xsf", "abinit.xsf", "cp2k.cube"])
def test_the_bond_of_silicon_is_where_the_atoms_are(name):
    density = read_density(FILES / f"{name}.gz")
    assert density.n_electrons == pytest.approx(8, abs=1e-4)
    top = np.unravel_index(density.rho.argmax(), density.shape)
    distances = density.structure.lattice.get_all_distances([np.array(top) / density.shape], density.structure.frac_coords)[0]
    assert distances.max() < 1.6 and distances.sum() < 2.5


def density_of(shape, electrons=8.0):
    rho = np.random.default_rng(0).random(shape) + 1
    return Density(np.float32(rho * electrons / rho.mean()), CELL)


def written(path, *rows):
    path.write_bytes(b"".join(np.int32(len(row)).tobytes() + row + np.int32(len(row)).tobytes() for row in rows))
    return path


def espresso_file(path, spins=1):
    waves = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in (1, 2, 3)], indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    waves = waves[np.abs(waves).sum(1).argsort(kind="stable")]
    old = np.zeros(len(waves), complex)
    old[0] = 8 / CELL.volume * Bohr**3
    head = np.array([0, len(waves), spins], np.int32)
    return written(path, head.tobytes(), np.eye(3).tobytes(), waves.tobytes(), old.tobytes()), waves


def test_a_density_becomes_waves_of_espresso(tmp_path):
    path, waves = espresso_file(tmp_path / "charge-density.dat")
    before, density = records(path), density_of((5, 6, 9))
    put(density, path)
    after = records(path)
    assert after[:3] == before[:3]
    found = np.frombuffer(after[3], complex)
    points = np.stack(np.meshgrid(*[np.arange(n) / n for n in density.shape], indexing="ij"), -1)
    for wave, value in zip(waves[::7], found[::7], strict=True):
        phases = np.exp(-2j * np.pi * points @ wave)
        assert value == pytest.approx((phases * density.rho).mean() * Bohr**3, rel=1e-5, abs=1e-8)


def test_a_density_becomes_values_of_abinit_with_the_first_axis_fastest(tmp_path):
    density, old = density_of((3, 4, 5)), np.full(60, 8 / CELL.volume * Bohr**3)
    path = written(tmp_path / "si_DEN", b"9.6.2   " + bytes(8), bytes(240), bytes(80), old.tobytes())
    before = records(path)
    put(density, path)
    after = records(path)
    assert after[:-1] == before[:-1]
    found = np.frombuffer(after[-1])
    np.testing.assert_allclose(found[:3], density.rho[:, 0, 0] * Bohr**3, rtol=1e-5)
    np.testing.assert_allclose(found.reshape(5, 4, 3).T, density.rho * Bohr**3, rtol=1e-5)


def test_what_does_not_fit_is_refused_and_the_file_stays(tmp_path):
    path, _ = espresso_file(tmp_path / "charge-density.dat")
    old = np.full(60, 8 / CELL.volume * Bohr**3)
    den = written(tmp_path / "si_DEN", b"9.6.2   " + bytes(8), bytes(240), bytes(80), old.tobytes())
    spin, _ = espresso_file(tmp_path / "spin.dat", spins=2)
    (tmp_path / "text").write_text("no records at all")
    (tmp_path / "empty").write_bytes(b"")
    for density, file, words in [(density_of((5, 6, 9), 10), path, "10.000 electrons"), (density_of((5, 4, 9)), path, "too coarse"),
                                 (density_of((3, 4, 4)), den, "60"), (density_of((5, 6, 9)), spin, "without spin"),
                                 (density_of((5, 6, 9)), tmp_path / "text", "unformatted"),
                                 (density_of((5, 6, 9)), tmp_path / "empty", "holds no density")]:
        before = file.read_bytes()
        with pytest.raises(TomatError, match=words):
            put(density, file)
        assert file.read_bytes() == before
