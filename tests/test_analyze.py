"`tomat analyze`: charges, dipoles and potentials follow the physics, and every wrong input is one sentence."

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from tomat.atoms.charges import density_atoms, error_bounds, hirshfeld_charges, sphere_electrons
from tomat.atoms.electrostatics import dipole, electrostatic_potential, planar_average, potential_bound, vacuum_cuts
from tomat.atoms.hirshfeld import core_radius, hirshfeld_electrons
from tomat.atoms.sad import FreeAtom, FreeAtoms, packaged_atoms, sad_density, valence_numbers
from tomat.density.core import Density
from tomat.density.formats import read_density, write_density
from tomat.density.metrics import COULOMB
from tomat.io.remote import TomatError
from tomat.prediction.analysis import analyze
from tomat.prediction.batch import write_prediction
from tomat.prediction.predictors import load_predictor

NACL = Path(__file__).parent / "files" / "CHGCAR.NaCl.gz"
ATOMS = packaged_atoms()
quick = settings(derandomize=True, deadline=None, max_examples=10)


def changed(**electrons):
    "The packaged atoms with other numbers of electrons, in the same shape."
    r = {symbol: ATOMS[symbol].density_r.x for symbol in electrons}
    return FreeAtoms({symbol: FreeAtom.of(symbol, n, r[symbol][1], ATOMS[symbol].density_r(r[symbol]) * n / ATOMS[symbol].n_valence)
                      for symbol, n in electrons.items()}, "changed atoms")


def crystal(seed, elements=("Na", "S", "Ti", "O"), shape=(18, 20, 24)):
    "Four atoms in an oblique cell, and a density with as many electrons as they have."
    rng = np.random.default_rng(seed)
    corners = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    structure = Structure(Lattice.from_parameters(*rng.uniform(4, 5.5, 3), *rng.uniform(75, 105, 3)), elements,
                          corners + rng.uniform(-0.05, 0.05, (4, 3)))
    sad_xyz, moved_xyz = sad_density(structure, shape), rng.normal(0, 1, shape)
    return Density(sad_xyz + moved_xyz - moved_xyz.mean(), structure), np.abs(rng.normal(0, 1e-3, shape))


def molecule(electrons, turn=0.0, shift=(0.5, 0.5, 0.5), cell=(11, 12, 13)):
    "Carbon monoxide in a box, turned in the plane of b and c, with some electrons of C on O."
    bond = 1.13 * np.array([0, np.sin(turn), np.cos(turn)])
    lattice = Lattice.orthorhombic(*cell)
    structure = Structure(lattice, ["C", "O"], [shift, np.array(shift) + bond / cell])
    total_xyz = sad_density(structure, (66, 72, 78), changed(C=4 - electrons, O=6 + electrons))
    return Density(total_xyz, structure), -electrons * bond


# Charges


@quick
@given(st.integers(0, 99))
def test_charges_add_up_to_zero(seed):
    "Also with the core of sulfur, where the sum of atomic densities is negative."
    density, error_xyz = crystal(seed)
    assert core_radius(ATOMS["S"]) > 0.2
    found = analyze(density, ATOMS, error_xyz)
    assert found.charge_N.sum() == pytest.approx(0, abs=1e-6)
    assert found.electrons_of_no_atom == pytest.approx(0, abs=1e-6)
    assert (found.charge_at_most_N >= 0).all() and (found.sphere_at_most_N >= 0).all()


@quick
@given(st.integers(0, 99), st.tuples(*[st.integers(-30, 30)] * 3))
def test_another_origin(seed, steps):
    density, error_xyz = crystal(seed)
    still = analyze(density, ATOMS, error_xyz)
    moved = analyze(density.rolled(steps), ATOMS, np.roll(error_xyz, steps, (0, 1, 2)))
    for name in ("charge_N", "charge_at_most_N", "sphere_N", "sphere_at_most_N"):
        np.testing.assert_allclose(getattr(moved, name), getattr(still, name), atol=2e-4)
    for axis, step in zip("abc", steps, strict=True):
        for name in ("rho_n", "potential_n", "at_most_n"):
            expected_n = np.roll(getattr(still.planes[axis], name), step)
            np.testing.assert_allclose(getattr(moved.planes[axis], name), expected_n, atol=1e-3)


def test_the_order_of_atoms_and_of_axes():
    density, error_xyz = crystal(3)
    found = analyze(density, ATOMS, error_xyz)
    order = [2, 0, 3, 1]
    shuffled = analyze(replace(density, structure=Structure.from_sites([density.structure[i] for i in order])), ATOMS, error_xyz)
    np.testing.assert_allclose(shuffled.charge_N, found.charge_N[order], atol=1e-9)
    turned = analyze(density.permute_axes((1, 2, 0), (False,) * 3), ATOMS, error_xyz.transpose(1, 2, 0))
    np.testing.assert_allclose(turned.charge_N, found.charge_N, atol=1e-9)
    for new, old in zip("abc", "bca", strict=True):
        np.testing.assert_allclose(turned.planes[new].potential_n, found.planes[old].potential_n, atol=1e-9)
        np.testing.assert_allclose(turned.planes[new].at_most_n, found.planes[old].at_most_n, atol=1e-9)


def test_charges_of_ions():
    "A tenth of an electron that moves with the shape of the atom is a tenth of the charge; half the cell is no further away."
    density, _ = crystal(1, ("Na", "F", "Na", "F"))
    structure, shape = density.structure, density.shape
    ions = Density(sad_density(structure, shape, changed(Na=6.9, F=7.1)), structure)
    charges = hirshfeld_charges(ions, sad_density(structure, shape))
    assert (charges[[0, 2]] > 0.02).all() and (charges[[1, 3]] < -0.02).all() and charges.sum() == pytest.approx(0, abs=1e-6)
    double = replace(ions, structure=structure * (1, 1, 2), values=2 * np.tile(ions.values, (1, 1, 2)))
    of_double = hirshfeld_charges(double, sad_density(double.structure, double.shape))
    np.testing.assert_allclose(of_double, np.repeat(charges, 2), atol=1e-5)


@quick
@given(st.integers(0, 99))
def test_a_bound_holds_where_the_error_is_known(seed):
    density, _ = crystal(seed)
    sad_xyz = sad_density(density.structure, density.shape)
    wrong_xyz = density.total - sad_xyz
    found = analyze(density, ATOMS, np.abs(wrong_xyz) / density.volume)
    assert (np.abs(hirshfeld_electrons(wrong_xyz, sad_xyz, density.structure)) <= found.charge_at_most_N + 1e-2).all()
    assert (np.abs(sphere_electrons(wrong_xyz, density.structure)) <= found.sphere_at_most_N + 1e-9).all()
    for i, plane in enumerate(found.planes.values()):
        error_n = plane.potential_n - planar_average(electrostatic_potential(Density(sad_xyz, density.structure), ATOMS), i)
        assert (np.abs(error_n) <= plane.at_most_n * (1 + 1e-3) + 1e-9).all()


def test_one_atom_has_no_charge_and_no_error():
    iron = Structure(Lattice.cubic(3), ["Fe"], [[0.1, 0.2, 0.3]])
    total_xyz = sad_density(iron, (20, 20, 20)) * (1 + 0.1 * np.random.default_rng(0).random((20, 20, 20)))
    total_xyz *= ATOMS["Fe"].n_valence / total_xyz.mean()
    found = analyze(Density(total_xyz, iron), ATOMS, np.full((20, 20, 20), 0.01))
    assert found.charge_N[0] == pytest.approx(0, abs=1e-6) and found.charge_at_most_N[0] == pytest.approx(0, abs=1e-9)
    assert found.dipole is None
    np.testing.assert_allclose(error_bounds(np.array([0.3, 0.1]), 0.4), [0.1, 0.1])


# Dipoles and potentials


@quick
@given(st.floats(-0.5, 0.5), st.floats(0, 2 * np.pi), st.tuples(*[st.floats(0, 1)] * 3))
def test_the_dipole_of_a_molecule(electrons, turn, shift):
    "Charge times distance, in any direction and anywhere in the box, also across its faces."
    density, expected = molecule(electrons, turn, shift)
    found = dipole(density, valence_numbers(density.structure))
    assert found.axes == "abc"
    np.testing.assert_allclose(found.vector, expected, atol=2e-4)
    assert found.debye == pytest.approx(4.803204 * abs(electrons) * 1.13, abs=2e-3)


def test_the_bound_of_a_dipole():
    density, _ = molecule(0.2)
    rng = np.random.default_rng(0)
    wrong_xyz = rng.normal(0, 1e-3, density.shape)
    wrong_xyz -= wrong_xyz.mean()
    valence = valence_numbers(density.structure)
    right = dipole(density, valence, np.abs(wrong_xyz))
    wrong = dipole(replace(density, values=density.values + wrong_xyz * density.volume), valence)
    assert 0 < np.linalg.norm(wrong.vector - right.vector) < right.at_most


@pytest.mark.parametrize("skew", [0, 1.5])
def test_the_dipole_of_a_slab_is_the_step_of_its_potential(skew):
    matrix = [[3.2, 0, 0], [0.4, 3.3, 0], [skew, -skew, 18]]
    layers = Structure(Lattice(matrix), ["Na", "F"], [[0.2, 0.1, 0.93], [0.5, 0.5, 0.05]])
    density = Density(sad_density(layers, (32, 32, 180), changed(Na=6.7, F=7.3)), layers)
    found = dipole(density, valence_numbers(layers))
    np.testing.assert_allclose(found.vector, [0, 0, -0.3 * 0.12 * 18], atol=1e-3)
    assert found.axes == "c" and [cut is None for cut in vacuum_cuts(density)] == [True, True, False]
    potential_n = planar_average(electrostatic_potential(density, ATOMS), 2)
    slope = np.polyfit(np.arange(70, 110) * 0.1, potential_n[70:110], 1)[0]
    assert slope == pytest.approx(4 * np.pi * COULOMB * found.vector[2] / (3.2 * 3.3) / 18, rel=1e-3)


def test_a_wire_has_a_dipole_across_it():
    wire = Structure(Lattice.orthorhombic(12, 13, 2.5), ["C", "O"], [[0.5, 0.5, 0], [0.5, 0.5 + 1.13 / 13, 0.4]])
    found = dipole(Density(sad_density(wire, (72, 78, 20), changed(C=3.9, O=6.1)), wire), valence_numbers(wire))
    assert found.axes == "ab"
    np.testing.assert_allclose(found.vector, [0, -0.1 * 1.13, 0], atol=1e-3)


def test_an_electron_goes_to_the_positive_ion():
    "Its potential energy is low there, high at the negative ion, and the same at all points half way."
    cell = Structure(Lattice.cubic(16), ["Na", "F"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    density = Density(sad_density(cell, (64, 64, 64), changed(Na=6, F=8)), cell)
    potential_xyz = electrostatic_potential(density, ATOMS)
    assert potential_xyz.mean() == pytest.approx(0, abs=1e-9)
    assert potential_xyz[0, 0, 0] < 0 < potential_xyz[32, 32, 32]
    half = potential_xyz[16, 16, 16]
    assert half == pytest.approx((potential_xyz[16, 16, 48] + potential_xyz[48, 48, 48]) / 2, abs=1e-6)


def test_no_expected_error_gives_no_bound():
    density, _ = crystal(2)
    found = analyze(density, ATOMS)
    assert found.charge_at_most_N is found.sphere_at_most_N is found.planes["a"].at_most_n is None
    assert (potential_bound(np.zeros(8), 5.0) == 0).all()


def test_atoms_of_a_file():
    nacl = read_density(NACL)
    assert valence_numbers(nacl.structure, density_atoms(nacl)).tolist() == [1, 7]
    with pytest.raises(TomatError, match=r"holds 8\.00 electrons, and the packaged free atoms Na 7, Cl 7 give 14\.00"):
        density_atoms(nacl, "packaged")
    for factor in (0, -1):
        with pytest.raises(TomatError, match="a density holds more than 0"):
            density_atoms(replace(nacl, values=factor * nacl.values))


# The command


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A structure, its prediction as a Zarr group and as two cubes, and damaged files."
    folder = tmp_path_factory.mktemp("analyze")
    magnesia = Structure(Lattice.cubic(4.2), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    magnesia.to(str(folder / "POSCAR"), fmt="poscar")
    made = load_predictor().predict(magnesia, (24, 24, 24))
    write_prediction(made, str(folder / "both.zarr"), str(folder / "both.zarr"))
    write_prediction(made, str(folder / "one.cube"), str(folder / "error.cube"))
    text = gzip.decompress(NACL.read_bytes()).decode()
    (folder / "empty.CHGCAR").write_text("")
    (folder / "truncated.CHGCAR").write_text(text[:len(text) // 2])
    (folder / "nan.CHGCAR").write_text(text.replace(text.split("\n")[12].split()[0], "NaN", 1))
    (folder / "LOCPOT").write_text(text)
    write_density(replace(made.density, values=-made.density.values), folder / "negative.cube")
    (folder / "unknown.vasp").write_text((folder / "POSCAR").read_text().replace("Mg", "Xx"))
    (folder / "plutonium.cif").write_text("data_x\n_cell_length_a 4\n_cell_length_b 4\n_cell_length_c 4\n_cell_angle_alpha 90\n"
                                          "_cell_angle_beta 90\n_cell_angle_gamma 90\nloop_\n_atom_site_type_symbol\n"
                                          "_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\nPu 0 0 0\n")
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("args", "words"), [
    (["nowhere.cube"], "nowhere.cube does not exist"),
    (["empty.CHGCAR"], "empty.CHGCAR is empty"),
    (["truncated.CHGCAR"], "truncated.CHGCAR"),
    (["nan.CHGCAR"], "nan.CHGCAR"),
    (["negative.cube"], "holds -16 electrons"),
    (["LOCPOT"], "a potential"),
    (["unknown.vasp"], "unknown.vasp"),
    (["plutonium.cif"], "no free atom for Pu"),
    (["other"], "other is of no known format"),
    (["one.cube", "--atoms", "nowhere.json"], "nowhere.json"),
    (["one.cube", "--zval", "Mg=8"], "--zval, such as Na=1,Cl=7"),
    (["one.cube", "--zval", "Mg=2,O=4"], "Mg 2, O 4 give 6.00"),
    (["one.cube", "--zval", "magnesium"], "--zval must give"),
    (["one.cube", "--expected-error", "nowhere.cube"], "nowhere.cube"),
    (["one.cube", "--expected-error", "one.cube"], "holds no expected error"),
    (["one.cube", "--expected-error", str(NACL)], "is the error of NaCl"),
    (["one.cube", "--checkpoint", "nowhere"], "--checkpoint is for structures"),
    (["one.cube", "--grid", "8,8,8"], "--grid is for structures"),
    (["POSCAR", "--expected-error", "error.cube"], "--expected-error is for densities"),
    (["POSCAR", "--zval", "Mg=2,O=6"], "--zval is for densities"),
    (["POSCAR", "--checkpoint", "nowhere"], "nowhere"),
    (["POSCAR", "--grid", "9999,9999,9999"], "9,999"),
    (["POSCAR", "--out", "other"], "other is a folder that holds other files"),
    (["POSCAR", "--out", "one.cube"], "one.cube is a file"),
    (["POSCAR", "--picture", "charges.jpg"], "charges.jpg is written as a PNG"),
    (["POSCAR", "--out", "/proc/analysis"], "/proc/analysis"),
    (["POSCAR", "--radius", "0"], "--radius is 0 Å"),
])
def test_a_wrong_input_is_one_sentence(tomat, here, monkeypatch, args, words):
    monkeypatch.chdir(here)
    before = files(here)
    results = [] if "--out" in args or "--picture" in args else ["--out", "new", "--picture", "new.png"]
    code, out, err = tomat("analyze", *args, *results)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("tomat: ") and err.endswith(".\n"), err
    assert words in err and not err.endswith("..\n"), err
    assert files(here) == before


def test_a_prediction_and_its_files_say_the_same(tomat, here, tmp_path):
    code, out, err = tomat("analyze", here / "both.zarr", "--json")
    assert (code, err) == (0, "")
    zarr = json.loads(out)
    cube = json.loads(tomat("analyze", here / "one.cube", "--expected-error", here / "error.cube", "--json")[1])
    code, out, err = tomat("analyze", here / "POSCAR", "--grid", "24,24,24", "--out", tmp_path / "x", "--json")
    made = json.loads(out)
    assert made["predicted"] and not zarr["predicted"] and made["expected_nmae"] > 0
    for found in (zarr, cube):
        assert len(found["atoms"]) == 2 and sum(atom["charge"] for atom in found["atoms"]) == pytest.approx(0, abs=1e-4)
        for one, two in zip(found["atoms"], made["atoms"], strict=True):
            for name in ("charge", "charge_error", "charge_at_most", "sphere_electrons"):
                assert one[name] == pytest.approx(two[name], abs=1e-3) and two["charge_error"] > 0
    assert json.loads((tmp_path / "x" / "analysis.json").read_text())["atoms"] == made["atoms"]
    with (tmp_path / "x" / "atoms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["charge"]) for row in rows] == [atom["charge"] for atom in made["atoms"]]


def test_from_one_atom_to_three_hundred_and_a_skewed_cell(tomat, tmp_path):
    iron = Structure(Lattice.cubic(2.4), ["Fe"], [[0, 0, 0]])
    skewed = Structure(Lattice.from_parameters(4, 5, 6, 35, 40, 50), ["Na", "Cl"], [[0, 0, 0], [0.4, 0.5, 0.6]])
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    many = salt * (4, 3, 3)
    for structure, grid in ((iron, "16,16,16"), (skewed, "20,24,28"), (many, "48,36,36")):
        path = tmp_path / f"{len(structure)}.cif"
        structure.to(str(path))
        total_xyz = sad_density(structure, tuple(map(int, grid.split(","))))
        write_density(Density(total_xyz, structure), tmp_path / "x.zarr.zip")
        code, out, err = tomat("analyze", tmp_path / "x.zarr.zip", "--out", tmp_path / "out")
        assert (code, err) == (0, "") and out.count("\n") >= len(structure) + 3
        with (tmp_path / "out" / "atoms.csv").open() as file:
            charges = [float(row["charge"]) for row in csv.DictReader(file)]
        assert len(charges) == len(structure) and np.abs(charges).max() < 0.05
