"""Files that VASP starts from: a template's parts survive, other programs read them, and their form is VASP's."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.calculators.vasp import VaspChargeDensity
from crystals import assert_same, noise, quick
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp.outputs import Chgcar
from typer.testing import CliRunner
from vasp_format import check_vasp_format

import tomat
from tomat.atoms.choose import choose_atoms
from tomat.atoms.sad import packaged_atoms, save_atoms, valence_electrons
from tomat.cli import app
from tomat.density.chgcar import write_chgcar
from tomat.density.regrid import regrid, supercell
from tomat.density.source import InMemory
from tomat.io.remote import TomatError
from tomat.models.messages import PROBE_SIZES
from tomat.models.probe import ProbeNet, save_probe
from tomat.prediction.crystals import Crystal
from tomat.prediction.starts import Start, on_template, parse_magmom, site_moments, spin_density

FILES = Path(__file__).parent / "files"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def nickel_oxide(tmp_path_factory):
    "A template: the real file with its four blocks, and occupancies in each of them."
    found = tomat.read(FILES / "CHGCAR.NiO_SOC.gz")
    rng = np.random.default_rng(1)
    paw = {block: {i + 1: np.round(rng.normal(size=33 if i < 2 else 8), 6) for i in range(4)} for block in ("total", *found.spin)}
    path = tmp_path_factory.mktemp("template") / "CHGCAR"
    write_chgcar(replace(found, augmentation=paw), path)
    return path


def test_the_checker_takes_files_of_vasp_and_nothing_else():
    with gzip.open(FILES / "CHGCAR.NaCl.gz", "rt") as file:
        text = file.read()
    assert check_vasp_format(text) == ((56, 56, 56), 1, [[33, 33]])
    lines = text.splitlines()
    for wrong in ([*lines[:12], lines[12][1:], *lines[13:]], [*lines[:11], "  56 56 56", *lines[12:]],
                  [line.replace("occupancies   2", "occupancies   3") for line in lines], lines[:-1], [*lines, "x"],
                  [*lines[:12], lines[12].replace("E+00", "e+00"), *lines[13:]]):
        with pytest.raises((AssertionError, StopIteration)):
            check_vasp_format("\n".join(wrong) + "\n")


def test_a_template_survives(nickel_oxide, tmp_path):
    "Four blocks, occupancies and order of atoms are kept, the total is replaced, electrons are exact; pymatgen and ase read it."
    before = tomat.read(nickel_oxide)
    turned = Structure.from_sites(before.structure.sites[::-1])
    turned.to(filename=str(tmp_path / "POSCAR"), fmt="poscar")
    done = run("predict", tmp_path / "POSCAR", "--template", nickel_oxide, "--out", tmp_path / "CHGCAR", "--json")
    assert done.exit_code == 0, done.output
    assert "PAW occupancies" not in done.stderr
    summary = json.loads(done.stdout)["predicted"][0]
    assert summary["paw_occupancies"] and summary["spin"] and summary["grid"] == [28, 28, 28]
    after = tomat.read(tmp_path / "CHGCAR")
    assert after.n_electrons == pytest.approx(valence_electrons(before.structure), abs=1e-6)
    assert abs(after.total - before.total).max() > 0.1
    assert_same(replace(before, values=after.values), replace(after, id=before.id))
    text = (tmp_path / "CHGCAR").read_text()
    assert check_vasp_format(text) == ((28, 28, 28), 4, [[33, 33, 8, 8]] * 4)
    assert text.splitlines()[0].endswith("total predicted by tomat, PAW occupancies and spin of CHGCAR")
    chgcar = Chgcar.from_file(str(tmp_path / "CHGCAR"))
    np.testing.assert_allclose(chgcar.data["total"], after.total, rtol=1e-9)
    assert [site.specie.symbol for site in chgcar.structure] == ["Ni", "Ni", "O", "O"]
    charge = VaspChargeDensity(str(tmp_path / "CHGCAR"))
    np.testing.assert_allclose(charge.chg[0], after.rho, rtol=1e-9)
    assert charge.atoms[0].get_chemical_symbols() == ["Ni", "Ni", "O", "O"]


def test_a_template_is_not_replaced(nickel_oxide):
    before = nickel_oxide.read_bytes()
    done = run("predict", nickel_oxide, "--template", nickel_oxide, "--out", nickel_oxide)
    assert isinstance(done.exception, TomatError) and "would replace it" in str(done.exception)
    tomat.read(nickel_oxide).structure.to(filename=str(nickel_oxide.with_name("POSCAR")), fmt="poscar")
    done = run("predict", nickel_oxide.with_name("POSCAR"), "--template", nickel_oxide, "--out", nickel_oxide)
    assert isinstance(done.exception, TomatError) and "would replace it" in str(done.exception)
    assert nickel_oxide.read_bytes() == before


def test_a_template_of_another_crystal_is_refused(nickel_oxide, tmp_path):
    "Another cell, other atoms, moved atoms, other electrons; also two structures, a grid beside it, and parts that it has itself."
    template = replace(tomat.read(nickel_oxide), id="CHGCAR")
    own = template.structure
    moved, wide = own.copy(), own.copy()
    moved.translate_sites([0], [0.02, 0, 0])
    wide.scale_lattice(own.volume * 1.1)
    other = Structure(own.lattice, ["Fe", "Fe", "O", "O"], own.frac_coords)
    doubled = Structure(own.lattice, own.species, own.frac_coords[[0, 0, 2, 3]])
    for crystal in (moved, wide, other, doubled):
        with pytest.raises(TomatError, match="another crystal"):
            on_template(Crystal("one", crystal, None), template, packaged_atoms())
    with pytest.raises(TomatError, match=r"holds 55.00 electrons and this checkpoint predicts 44"):
        on_template(Crystal("one", own, None), replace(template, values=template.values * 1.25), packaged_atoms())
    own.to(filename=str(tmp_path / "POSCAR.1"), fmt="poscar")
    own.to(filename=str(tmp_path / "POSCAR.2"), fmt="poscar")
    for words, sentence in ((["--grid", "8,8,8"], "leave the option of the grid out"), (["--magmom", "1,1,1,1"], "of its own"),
                            (["--occupancies", "mean"], "of its own"), ([tmp_path / "POSCAR.2"], "one at a time")):
        out = f"{tmp_path}/out/" if len(words) == 1 else tmp_path / "out.CHGCAR"
        done = run("predict", tmp_path / "POSCAR.1", "--template", nickel_oxide, "--out", out, *words)
        assert isinstance(done.exception, TomatError) and sentence in str(done.exception)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.CHGCAR").exists()


def test_mean_occupancies_travel_from_chgcars_to_a_file(tmp_path):
    "Atoms fitted to CHGCARs carry them through their file and the checkpoint; a checkpoint without them refuses."
    salt = tomat.read(FILES / "CHGCAR.NaCl.gz")
    shifted = replace(salt, id="two", augmentation={"total": {i: values + 1 for i, values in salt.augmentation["total"].items()}})
    atoms, _ = choose_atoms(InMemory([salt, shifted]), [salt.id, "two"])
    means = atoms.metadata["occupancies"]
    np.testing.assert_allclose(means["Cl"], salt.augmentation["total"][2] + 0.5, atol=1e-6)
    save_atoms(atoms, tmp_path / "atoms.json")
    model = ProbeNet(PROBE_SIZES["XS"]) if "XS" in PROBE_SIZES else ProbeNet(PROBE_SIZES["S"])
    model.atoms = tomat.atoms.sad.load_atoms(tmp_path / "atoms.json")
    save_probe(model, tmp_path / "model", {"elements": ["Cl", "Na"]})
    salt.structure.to(filename=str(tmp_path / "POSCAR"), fmt="poscar")
    done = run("predict", tmp_path / "POSCAR", "--checkpoint", tmp_path / "model", "--occupancies", "mean", "--grid", "20,20,20",
               "--out", tmp_path / "CHGCAR")
    assert done.exit_code == 0, done.output
    assert "no PAW occupancies" not in done.stderr
    text = (tmp_path / "CHGCAR").read_text()
    assert check_vasp_format(text) == ((20, 20, 20), 1, [[33, 33]])
    assert "mean PAW occupancies of the training data" in text.splitlines()[0]
    for i, symbol in enumerate(site.specie.symbol for site in tomat.read(tmp_path / "CHGCAR").structure):
        np.testing.assert_allclose(tomat.read(tmp_path / "CHGCAR").augmentation["total"][i + 1], means[symbol], atol=1e-7)
    done = run("predict", tmp_path / "POSCAR", "--occupancies", "mean", "--out", tmp_path / "other.CHGCAR")
    assert isinstance(done.exception, TomatError) and "it has those of no element" in str(done.exception)
    done = run("predict", tmp_path / "POSCAR", "--grid", "20,20,20", "--out", tmp_path / "CHGCAR.2")
    assert "holds no PAW occupancies" in done.stderr and done.exit_code == 0


def test_occupancies_of_two_potentials_are_no_mean():
    salt = tomat.read(FILES / "CHGCAR.NaCl.gz")
    short = replace(salt, id="two", augmentation={"total": {1: np.ones(8), 2: np.ones(33)}})
    complex_ones = replace(salt, id="three", augmentation={"total": {2: np.ones(33) * 1j}})
    atoms, _ = choose_atoms(InMemory([salt, short, complex_ones]), [salt.id, "two", "three"])
    assert list(atoms.metadata["occupancies"]) == ["Cl"]
    np.testing.assert_allclose(atoms.metadata["occupancies"]["Cl"], (salt.augmentation["total"][2] + 1) / 2, atol=1e-6)


def test_moments_make_a_block_of_spin(tmp_path):
    "By the option or the site property; moments of several directions, too many and too large ones are refused."
    rock = Structure(Lattice.cubic(3.0), ["Ni", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    rock.to(filename=str(tmp_path / "POSCAR"), fmt="poscar")
    rock.copy(site_properties={"magmom": [1.5, 0.25]}).to(filename=str(tmp_path / "spin.json"))
    for source, words in (("POSCAR", ["--magmom", "1.5 0.25"]), ("spin.json", [])):
        done = run("predict", tmp_path / source, *words, "--grid", "16,16,16", "--out", tmp_path / "CHGCAR")
        assert done.exit_code == 0, done.output
        found = tomat.read(tmp_path / "CHGCAR")
        assert found.spin["diff"].mean() == pytest.approx(1.75, abs=1e-6)
        np.testing.assert_allclose(found.moments["diff"], [1.5, 0.25])
        assert check_vasp_format((tmp_path / "CHGCAR").read_text())[1] == 2
        assert abs(found.spin["diff"]).max() < found.total.max()
    with pytest.raises(TomatError, match="several directions"):
        site_moments(rock.copy(site_properties={"magmom": [[1, 0, 0], [0, 1, 0]]}))
    assert site_moments(rock.copy(site_properties={"magmom": [0.0, None]})) is None
    for text, sentence in (("1", "2 atoms and there are 1 moments"), ("1 9", "6 valence electrons and a moment of 9"),
                           ("1 x", "'x'"), ("", "''"), ("nan 1", "'nan'"), ("2*", "'2*'")):
        with pytest.raises(TomatError) as err:
            Start(moments=parse_magmom(text)).check(rock, packaged_atoms())
        assert sentence in str(err.value)


@quick
@given(st.integers(0, 1000), st.tuples(*[st.integers(-3, 3)] * 3))
def test_spin_moves_with_the_atoms(seed, steps):
    "A translation by whole steps of the grid moves the block, and its mean is the sum of the moments."
    rng = np.random.default_rng(seed)
    cell = Lattice(np.diag(rng.uniform(4, 6, 3)) + rng.uniform(-1, 1, (3, 3)))
    structure, moments = Structure(cell, ["Fe", "O"], rng.random((2, 3))), tuple(rng.uniform(-4, 4, 2))
    shape = (10, 12, 11)
    moved = structure.copy()
    moved.translate_sites([0, 1], np.divide(steps, shape))
    before, after = (spin_density(one, moments, shape) for one in (structure, moved))
    np.testing.assert_allclose(np.roll(before, steps, (0, 1, 2)), after, atol=1e-9 * abs(before).max())
    assert before.mean() == pytest.approx(sum(moments), abs=1e-9)


@quick
@given(st.integers(0, 1000), st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 3)] * 3))
def test_grids_and_cells_keep_the_electrons(seed, shape, repeats):
    "A finer grid and back is the density itself; a supercell is the density again and again, with all that belongs to the atoms."
    density = noise(np.random.default_rng(seed), spin=("diff",), augmented=True, sad=True)
    fine = regrid(density, tuple(n + m for n, m in zip(density.shape, shape, strict=True)))
    assert fine.n_electrons == pytest.approx(density.n_electrons, rel=1e-5)
    np.testing.assert_allclose(regrid(fine, density.shape).spin["diff"], density.spin["diff"], atol=1e-4)
    large = supercell(density, repeats)
    n = int(np.prod(repeats))
    assert large.n_electrons == pytest.approx(n * density.n_electrons, rel=1e-5)
    assert large.volume == pytest.approx(n * density.volume)
    np.testing.assert_allclose(large.rho[:4, :3, :5], density.rho, rtol=1e-5)
    assert len(large.structure) == n * len(density.structure)
    for i in range(len(density.structure)):
        for copy in range(n):
            np.testing.assert_array_equal(large.augmentation["total"][i * n + copy + 1], density.augmentation["total"][i + 1])
            assert large.moments["diff"][i * n + copy] == density.moments["diff"][i]
            distance = large.structure[i * n + copy].coords - density.structure[i].coords
            np.testing.assert_allclose(distance @ density.structure.lattice.inv_matrix % 1 % (1 - 1e-9), 0, atol=1e-6)


def test_regrid_refuses_what_it_cannot_do(tmp_path):
    "One sentence, and nothing is written."
    source = FILES / "CHGCAR.Li.gz"
    for words, sentence in ((["--grid", "0,8,8"], "has no points"), (["--grid", "9999,9999,9999"], "voxels"), ([], "which grid"),
                            (["--supercell", "0,1,1"], "no cells"), (["--supercell", "99,99,99"], "atoms"),
                            (["--grid", "8,8,8", "--encut", "300"], "--grid and --encut"), (["--encut", "nan"], "cutoff above 0"),
                            (["--ecut-abinit", "0"], "cutoff above 0"), (["--ecutrho", "1e12"], "cutoff above 0")):
        done = run("regrid", source, "--out", tmp_path / "CHGCAR", *words)
        assert isinstance(done.exception, TomatError) and sentence in str(done.exception), (words, done.exception)
    for name, sentence in (("letter.txt", "no known format"), ("missing/", "no known format")):
        done = run("regrid", source, "--out", tmp_path / name, "--grid", "8,8,8")
        assert isinstance(done.exception, TomatError) and sentence in str(done.exception)
    done = run("regrid", tmp_path / "none", "--out", tmp_path / "CHGCAR", "--grid", "8,8,8")
    assert isinstance(done.exception, TomatError) and "none" in str(done.exception)
    assert list(tmp_path.iterdir()) == []
    copy = tmp_path / "CHGCAR"
    copy.write_bytes(source.read_bytes())
    done = run("regrid", copy, "--out", copy, "--grid", "8,8,8")
    assert isinstance(done.exception, TomatError) and "would replace it" in str(done.exception)
    assert copy.read_bytes() == source.read_bytes()


def test_people_write_what_they_predict(tmp_path):
    "`tomat.predict` returns a density that writes itself, and goes to pymatgen and ase."
    cell = Structure(Lattice.cubic(3.4), ["Li"], [[0, 0, 0]])
    density = tomat.predict(cell, (12, 12, 12))
    density.write(tmp_path / "CHGCAR")
    np.testing.assert_allclose(density.to_chgcar().data["total"], tomat.read(tmp_path / "CHGCAR").total, rtol=1e-6)
    atoms, rho_xyz = density.to_ase()
    assert atoms.get_chemical_formula() == "Li" and rho_xyz.sum() * atoms.get_volume() / 12**3 == pytest.approx(density.n_electrons)
    both = list(tomat.predict_all([cell, cell], workers=2))
    np.testing.assert_allclose(both[1].total, tomat.predict(cell).total, rtol=1e-5, atol=1e-6)
    calculator = tomat.DensityCalculator(shape=(12, 12, 12))
    atoms.calc = calculator
    np.testing.assert_allclose(atoms.calc.get_pseudo_density(), density.rho, rtol=1e-6)
