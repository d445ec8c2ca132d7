"""Files that other programs write, structures and fields on a grid: read right, or refused by the name of what is wrong."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.units import Bohr as BOHR
from crystals import a_density, noise, quick, refused
from hypothesis import given, strategies as st
from pymatgen.core import Lattice, Structure

from tomat.density.core import Density
from tomat.density.cube import without_end
from tomat.density.formats import FORMATS, may_be_density, read_density, read_structure, write_density
from tomat.io.remote import TomatError
from tomat.prediction.batch import SUFFIXES
from tomat.prediction.crystals import as_structure, default_grid

FILES = Path(__file__).parent / "files"
PROGRAMS = FILES / "programs"


# CIF and other structures

@pytest.mark.parametrize("name, words", [
    ("hydroxide.cif", "the site OH1 has the type 'OH', which is no element"),
    ("wat.cif", "the site Wat1 has the type 'Wat', which is no element"),
    ("ammonium.cif", "the site N1 has the type 'NH4', which is no element"),
    ("hydrogen_missing.cif", "H is 40.0% of the atoms in the formula 'H2 Mg O2', and 0.0% of those at the sites"),
    ("vacancy.cif", "the site Fe1 has the occupancy 0.5, so it is partly occupied"),
    ("coordinate_dot.cif", "the coordinate x of the site O1 is '.'"),
    ("label_OH2.cif", "the site OH2 has no type"), ("label_AlSi.cif", "the site AlSi1 has no type"),
    ("label_Va.cif", "the site Va1 has no type"), ("label_Du.cif", "the site Du1 has no type"),
    ("charged.json", "NaCl has the net charge 1"),
    ("unknown_line.res", "this RES file is no structure file"), ("short_cell.res", "this RES file is no structure file"),
    ("broken.yaml", "YAML file")])
def test_what_a_file_does_not_say_is_not_guessed(name, words):
    refused(PROGRAMS / name, words, read=read_structure)


def test_a_document_of_the_materials_project_is_its_structure():
    structure, grid = read_structure(PROGRAMS / "summary_document.json")
    assert grid is None and structure.formula == "Na1 Cl1" and structure.volume == pytest.approx(64)


def test_a_cell_too_long_for_a_grid_is_no_crash():
    """A length of 20 digits: a CIF of it is refused, of other formats when the grid is made."""
    refused(PROGRAMS / "huge_cell.cif", "1e+20", read=read_structure)
    structure, _ = read_structure(PROGRAMS / "huge_cell.cssr")
    with pytest.raises(TomatError, match="is 100,000,000,000,000,000,000 Å long"):
        default_grid(structure)


def test_the_command_line_says_one_line_of_its_own(tmp_path):
    """pymatgen's warnings were printed as Python prints them, and water without hydrogens was predicted."""
    line = [sys.executable, "-m", "tomat.cli", "predict", PROGRAMS / "wat.cif", "--out", tmp_path / "x.chgcar"]
    done = subprocess.run([*map(str, line), "--grid", "8", "8", "8"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and "the site Wat1 has the type 'Wat'" in done.stderr


SITES = """data_x
_cell_length_a 4.0
_cell_length_b 4.0
_cell_length_c 4.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Na1 Na+ 0 0 0 1
Cl1 Cl1- 0.5 0.5 0.5 1
"""


def changed(old, new):
    "The file with one change in every line that has it; of a whole word at its first place."
    return SITES.replace(old, new, 1 if old in ("data_x", "0.5 0.5 0.5") else -1)


@pytest.mark.parametrize("old, new, formula", [
    ("", "", "Na1 Cl1"), ("0.5 1", "0.5 .", "Na1 Cl1"), ("0.5 1", "0.5 0.9998(5)", "Na1 Cl1"), ("4.0", "4.0(2)", "Na1 Cl1"),
    ("_atom_site_fract", "_ATOM_SITE_Fract", "Na1 Cl1"), ("_atom_site_", "_atom_site.", "Na1 Cl1"),
    ("Cl1 Cl", "Wat1 Cl", "Na1 Cl1"),
    ("Cl1-", "D", "Na1 H1"), ("Cl1-", "?", "Na1 Cl1"), ("Na1 Na+ 0 0 0 1\n", "", "Cl1"), ("data_x", "# \xfc\ndata_x", "Na1 Cl1"),
    ("data_x", "data_x\n_chemical_formula_sum 'Cl Na'", "Na1 Cl1"), ("data_x", "data_x\n_chemical_formula_sum ?", "Na1 Cl1"),
    ("data_x", "data_x\n_symmetry_space_group_name_H-M 'P m -3 m'", "Na1 Cl1"),
    ("data_x", "data_x\n_symmetry_space_group_name_H-M 'F m -3 m'", "Na4 Cl4"),
    ("data_x", "data_x\nloop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n'1/2+x, 1/2+y, z'", "Na2 Cl2"),
    ("data_x", "data_x\nloop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\nloop_\n_space_group_symop_magn_centering.xyz\n"
               "x,y,z,+1\nx+1/2,y+1/2,z,-1", "Na2 Cl2")])
def test_a_cif_is_read_as_the_dictionary_says(tmp_path, old, new, formula):
    (tmp_path / "a.cif").write_bytes(changed(old, new).encode("latin-1"))
    assert read_structure(tmp_path / "a.cif")[0].formula == formula


@pytest.mark.parametrize("old, new, words", [
    ("0.5 1", "0.5 ?", "the occupancy of Cl1 is '?'"), ("0.5 1", "0.5 0", "the occupancy 0"),
    ("0.5 1", "0.5 1.2", "the occupancy 1.2"),
    ("Cl1-", "CL", "'CL'"), ("Cl1-", "Cl2", "'Cl2'"), ("0.5 0.5 0.5", "0.5 0.5 ?", "coordinate z of the site Cl1 is '?'"),
    ("0.5 0.5 0.5", "0 0 0.01", "1 (Na1) and 2 (Cl1) are one place"), ("_c 4.0", "_c 1e9", "1000000000.0"),
    ("_a 4.0", "_a 0.1", "thinner than 0.5"),
    ("gamma 90", "gamma 180", "thinner than 0.5"), ("_c 4.0", "_c four", "_cell_length_c is 'four'"),
    ("data_x", SITES.replace("data_x", "data_y") + "data_x", "holds 2 crystals"),
    ("data_x", "data_x\n_chemical_formula_sum 'Na2 Cl'", "Na2 Cl"),
    ("data_x", "data_x\nloop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\nx,y,x", "'x,y,x' is no symmetry operation"),
    ("data_x", "data_x\nloop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n-y,x-y,z", "does not have the symmetry"),
    ("data_x", "data_x\n_symmetry_space_group_name_H-M 'F d -3 m'", "has two settings"),
    ("data_x", "data_x\n_symmetry_space_group_name_H-M 'P 6/m'", "does not fit the cell"),
    ("data_x", "data_x\n_cell_modulation_dimension 1", "modulated"),
    ("_atom_site_occupancy", "_atom_site_attached_hydrogens", "the site Na1 has 1 attached hydrogens"),
    ("_atom_site_occupancy\n", "", "loop"), ("_atom_site_fract_x", "_atom_site_Cartn_x", "lists no sites")])
def test_a_cif_that_contradicts_itself_is_refused(tmp_path, old, new, words):
    (tmp_path / "a.cif").write_text(changed(old, new))
    refused(tmp_path / "a.cif", words, read=read_structure)


def test_points_are_zeros_where_no_zero_is_written(tmp_path):
    """Older files of the ICSD: rock salt at '. . .' and '.5 .5 .5'."""
    (tmp_path / "a.cif").write_text(SITES.replace("0 0 0 1", ". . . 1.").replace("0.5 0.5 0.5", ".5 .5 .5"))
    np.testing.assert_array_equal(read_structure(tmp_path / "a.cif")[0].frac_coords, [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_a_charge_is_refused_in_memory_as_well():
    structure = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]], charge=1)
    with pytest.raises(TomatError, match="has the net charge 1"):
        as_structure(structure)
    structure.set_charge(0)
    assert as_structure(structure).formula == "Na1 Cl1"


@pytest.mark.parametrize("name, content", [
    ("vasprun.xml", "<modeling>"), ("a.cssr", "4 4 4\n90 90 90\n2 0\n0\n1 Mg 0 0 0\n2 O+ 0.5 0.5 0.5\n"), ("a.cssr", "4 4\n"),
    ("a.yaml", "a: *b"), ("a.yaml", "- 1"), ("a.yaml", "a: 1\na: " + 200 * "."),
    ("a.json", '{"structure": {"lattice": 1, "sites": 2}}'), ("a.json", '{"structure": 1}'),
    ("a.res", "TITL\nCELL 1 4 4 4 90 90 90\nLATT 1\nSFAC Mg\nMg 1 0 0 0 1\nEND\n"), ("a.xsf", "CRYSTAL\n"),
    ("a.xsf", "CRYSTAL\nPRIMVEC\n1 0 0\n0 1 0\n0 0 1\nPRIMCOORD\n1000000000 1\nH 0 0 0\n")])
def test_what_other_parsers_raise_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, read=read_structure)


def test_a_json_that_is_none_is_called_a_file(tmp_path):
    (tmp_path / "a.json").write_text("{nothing")
    refused(tmp_path / "a.json", "this file is not valid JSON", read=read_structure)


# Fields on a grid

@pytest.mark.parametrize("name, electrons", [
    ("plain.cube", 45), ("D_exponent.cube", 45), ("latin1.cube", 45), ("ghost_atom.cube", 45),
    ("angstrom_all_counts_negative.cube", 45), ("exponent_without_E.cube", 45 - 0.06 * 360 / 24),
    ("density.xsf", 0.15 * 64 / BOHR**3)])
def test_electrons_of_small_files(name, electrons):
    """The cubes have 0.01, 0.02, …, 0.24 e/bohr³ in a cell of 360 bohr³; the XSF 0.1 and 0.2 in turns in 64 Å³."""
    density = read_density(PROGRAMS / name)
    assert density.n_electrons == pytest.approx(electrons, rel=1e-6) and density.formula == "NaCl"
    assert density.shape == ((2, 2, 2) if name.endswith("xsf") else (4, 3, 2))
    np.testing.assert_allclose(density.structure.frac_coords, [[0, 0, 0], [0.5, 0.5, 0.5]], atol=1e-6)
    if name == "exponent_without_E.cube":
        assert density.rho[0, 2, 1] * BOHR**3 == pytest.approx(3.3004e-102, rel=1e-9)
        assert density.rho[1, 0, 0] * BOHR**3 == pytest.approx(0.07, rel=1e-9)


@pytest.mark.parametrize("name, words", [
    ("two_orbitals.cube", "holds 2 fields, the orbitals 5, 6,"), ("one_orbital.cube", "the orbital 5")])
def test_orbitals_are_no_density(name, words):
    refused(PROGRAMS / name, words)


@quick
@given(seed=st.integers(0, 10**6), shape=st.tuples(*[st.integers(1, 6)] * 3), n_atoms=st.integers(1, 7))
def test_cube_and_xsf_hold_the_same_electrons(tmp_path_factory, seed, shape, n_atoms):
    folder, first = tmp_path_factory.mktemp("fields"), noise(np.random.default_rng(seed), shape, n_atoms)
    for name in ("x.cube", "x.xsf", "x.xsf.gz"):
        write_density(first, folder / name)
        again = read_density(folder / name)
        assert again.shape == first.shape and again.structure.species == first.structure.species
        assert again.n_electrons == pytest.approx(first.n_electrons, rel=1e-4, abs=1e-4)
        np.testing.assert_allclose(again.rho, first.rho, rtol=2e-6, atol=1e-9)
        np.testing.assert_allclose(again.structure.frac_coords, first.structure.frac_coords, atol=2e-6)


def as_pp_x(density: Density) -> str:
    "The file that pp.x of Quantum ESPRESSO writes of a density: columns 6e13.5, labels with numbers, no BEGIN_ before the grid."
    def rows(vectors, width, digits):
        return "".join("".join(f"{x:{width}.{digits}f}" for x in vector) + "\n" for vector in vectors)
    matrix, shape = density.structure.lattice.matrix, [n + 1 for n in density.shape]
    values = np.pad(density.rho * BOHR**3, (0, 1), mode="wrap").ravel(order="F")
    words = [f"{x:13.5E}" if abs(x) > 1e-99 or x == 0 else f"{x:13.5E}".replace("E", "") for x in values]
    lines = ["".join(words[i:i + 6]) for i in range(0, len(words), 6)]
    atoms = "".join(f"{site.specie.symbol}{i:<3d}" + rows([site.coords], 15, 9) for i, site in enumerate(density.structure, 1))
    return (f" CRYSTAL\n PRIMVEC\n{rows(matrix, 15, 9)} PRIMCOORD\n{len(density.structure):12d}{1:12d}\n{atoms}"
            "BEGIN_BLOCK_DATAGRID_3D\n3D_PWSCF\nDATAGRID_3D_UNKNOWN\n" + "".join(f"{n:12d}" for n in shape) + "\n"
            + rows([[0, 0, 0]], 10, 6) + rows(matrix, 12, 6) + "\n".join(lines) + "\nEND_DATAGRID_3D\nEND_BLOCK_DATAGRID_3D\n")


def test_a_file_of_quantum_espresso(tmp_path):
    """The number of electrons of rock salt, from the file's own numbers; an exponent of three digits has no E."""
    salt = read_density(FILES / "CHGCAR.NaCl.gz")
    total_xyz = salt.total[::4, ::4, ::4].copy()
    n_electrons, total_xyz[1, 2, 3] = total_xyz.mean() - total_xyz[1, 2, 3] / total_xyz.size, 1e-110
    (tmp_path / "pp.xsf").write_text(as_pp_x(replace(salt, values=total_xyz, augmentation={})))
    assert re.search(r"\d-1\d\d\b", (tmp_path / "pp.xsf").read_text())
    again = read_density(tmp_path / "pp.xsf")
    assert again.shape == (14, 14, 14) and again.n_electrons == pytest.approx(n_electrons, rel=1e-5)
    assert again.formula == "NaCl" and again.rho[1, 2, 3] < 1e-100
    structure, grid = read_structure(tmp_path / "pp.xsf")
    assert grid == (14, 14, 14) and structure.species == again.structure.species and may_be_density(tmp_path / "pp.xsf")


def test_the_origin_of_a_grid_moves_the_atoms(tmp_path):
    first = a_density(0, positive=True)
    write_density(first, tmp_path / "a.xsf")
    lines = (tmp_path / "a.xsf").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "DATAGRID_3D_density" in line) + 2
    lines[at] = "0.5 -0.25 1.0"
    (tmp_path / "b.xsf").write_text("\n".join(lines) + "\n")
    moved = read_density(tmp_path / "b.xsf").structure.cart_coords - first.structure.cart_coords
    np.testing.assert_allclose(moved, [[-0.5, 0.25, -1.0]] * len(first.structure), atol=1e-6)


@pytest.mark.parametrize("factor, n", [(1.0, 5), (4 / 5, 4), (5 / 4, 4)])
def test_three_spans_of_a_periodic_grid(tmp_path, factor, n):
    """The cell's vector with its end, (n - 1) / n of it without, and ASE's (n + 1) / n: four points in each period."""
    cell = np.eye(3) * 4
    values = np.arange(64.0).reshape(4, 4, 4)
    shown = np.pad(values, (0, n - 4), mode="wrap").ravel(order="F")
    factor = factor if n == 5 else (3 / 4 if factor < 1 else 5 / 4)
    vectors = "".join("{} {} {}\n".format(*vector) for vector in cell * factor)
    (tmp_path / "a.xsf").write_text("CRYSTAL\nPRIMVEC\n4 0 0\n0 4 0\n0 0 4\nPRIMCOORD\n1 1\n3 0 0 0\nBEGIN_BLOCK_DATAGRID_3D\nx\n"
                                    f"BEGIN_DATAGRID_3D_x\n{n} {n} {n}\n0 0 0\n{vectors}" + " ".join(map(str, shown))
                                    + "\nEND_DATAGRID_3D\nEND_BLOCK_DATAGRID_3D\n")
    np.testing.assert_allclose(read_density(tmp_path / "a.xsf").rho * BOHR**3, values, rtol=1e-6)


def test_a_grid_that_does_not_close_is_refused():
    closed = np.pad(np.random.default_rng(0).random((3, 4, 5)), (0, 1), mode="wrap")
    assert without_end(closed, [0, 1, 2]).shape == (3, 4, 5)
    for axis, place in enumerate([(-1, 1, 1), (1, -1, 1), (1, 1, -1)]):
        other = closed.copy()
        other[place] += 0.1
        with pytest.raises(TomatError, match=f"last points along {'abc'[axis]} are not the first"):
            without_end(other, [0, 1, 2])


def test_each_format_of_a_density_can_be_predicted_into():
    assert SUFFIXES.keys() == FORMATS.keys()


def test_a_coordinate_beyond_all_numbers_is_none(tmp_path):
    path = tmp_path / "far.cif"
    Structure(Lattice.cubic(4), ["Na"], [[0.25, 0, 0]]).to(filename=str(path))
    path.write_text(path.read_text().replace("0.25000000", "1e999"))
    with pytest.raises(TomatError, match="'1e999', which is no number"):
        read_structure(path)
