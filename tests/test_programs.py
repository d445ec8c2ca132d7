"""Files as other programs write them: each has its right value, or a sentence with the line, what is expected and what is there."""

import bz2
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from crystals import assert_same, noise, refused
from pymatgen.core import Lattice, Structure

from tomat.cli import app
from tomat.density.core import Density
from tomat.density.formats import find_format, known_format, read_density, read_structure, write_density
from tomat.density.store import RawStore
from tomat.io.remote import TomatError
from typer.testing import CliRunner

FILES = Path(__file__).parent / "files" / "programs"
VALUES = np.arange(20.0, 44).reshape(4, 3, 2, order="F")  # of every density, in the order of the file
COPY = "copy it again"


def with_value(number, value):
    "The values with one of them changed; numbers count from 1."
    values = VALUES.flatten(order="F")
    values[number - 1] = value
    return values.reshape(VALUES.shape, order="F")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name, values, occupancies", [
    ("CHGCAR_exponent_without_E", with_value(7, 1.2345678901e-101), {1: [.1, .2, .3, .4], 2: [.5, .6, .7, .8]}),
    ("CHGCAR_exponent_without_E_large", with_value(8, 1.2345678901e99), {1: [.1, .2, .3, .4], 2: [.5, .6, .7, .8]}),
    ("CHGCAR_exponent_without_E_in_augmentation", VALUES, {1: [.1, .2, .3, .4], 2: [.5, .6, 7e-101, .8]}),
    ("CHGCAR_aug_atom_1000", VALUES, {1: [.1, .2, .3, .4], 1000: [.5, .6, .7, .8]}),
    ("CHGCAR_latin1", VALUES, {}), ("CHGCAR.bz2", VALUES, None), ("CHGCAR.xz", VALUES, None), ("names/CHG", VALUES, None),
    ("names/Si_CHGCAR", VALUES, None), ("names/mp-23703_LiHCHGCAR", VALUES, None)])
def test_a_density_is_read_with_every_value_at_its_place(name, values, occupancies):
    density = read_density(FILES / name)
    np.testing.assert_array_equal(density.values, values)
    assert density.n_electrons == pytest.approx(values.mean()) and density.volume == pytest.approx(30)
    if occupancies is not None:
        found = {atom: list(numbers) for atom, numbers in density.augmentation.get("total", {}).items()}
        assert found == occupancies


@pytest.mark.parametrize("name, words", [
    ("CHGCAR_one_value_too_many", ["line 17", "25 numbers where the grid has 24 points"]),
    ("PARCHG_stars", ["line 14", "value 20 of 24 is '***********'", "too large"]),
    ("CHG_two_steps.chgcar", ["2 steps", "line 16", "give one"]), ("format2.zarr", ["a Zarr group of format 2"]),
    ("names/LOCPOT.vasp", ["a potential"])])
def test_a_density_is_refused_for_what_it_is(name, words):
    refused(FILES / name, *words)
    with pytest.raises(TomatError) as caught:
        read_density(FILES / name)
    assert COPY not in str(caught.value)  # a second copy would be the same


def test_only_a_file_that_ends_early_is_to_be_copied_again(tmp_path):
    whole = (FILES / "CHGCAR_exponent_without_E").read_bytes()
    grid = whole.index(b"   4   3   2")
    for cut in (10, grid - 60, grid + 5, grid + 100, whole.index(b"augmentation") - 3, len(whole) - 20, len(whole) - 3):
        (tmp_path / "CHGCAR").write_bytes(whole[:cut])
        refused(tmp_path / "CHGCAR", "ends", COPY)
    for old, new in [(b"0.21000000000E+02", b""), (b"0.21000000000E+02", b"0.21x"), (b"0.3000000E+00", b""), (b"1     1\n", b"1\n"),
                     (b"  4   3   2", b"  4   3   1"), (b"Direct", b"12"), (b"0.21000000000E+02", b"1.0-2.0"),
                     (b"occupancies   2   4", b"occupancies   2   x"), (b"   4   3   2", b"   0   3   2")]:
        assert old in whole
        (tmp_path / "CHGCAR").write_bytes(whole.replace(old, new, 1))
        with pytest.raises(TomatError) as caught:
            read_density(tmp_path / "CHGCAR")
        assert COPY not in str(caught.value) and "line " in str(caught.value), caught.value


CHLORINE = {"POSCAR_negative_scale_cartesian": 0.475}


@pytest.mark.parametrize("name", [
    "POSCAR_negative_scale_cartesian", "POSCAR_negative_scale_cartesian_refused", "POSCAR_three_scales", "POSCAR_remarks",
    "POSCAR_words_after", "POSCAR_latin1", "POSCAR_vasp4", "POSCAR_D_exponent", "calcs/a/POSCAR"])
def test_a_structure_is_read_as_vasp_reads_it(name):
    structure, grid = read_structure(FILES / name)
    np.testing.assert_allclose(structure.lattice.matrix, np.diag([4, 4, 4]), atol=1e-12)
    assert [site.specie.symbol for site in structure] == ["Na", "Cl"] and grid is None
    np.testing.assert_allclose(structure.frac_coords, [[0] * 3, [CHLORINE.get(name, 0.5)] * 3])


@pytest.mark.parametrize("name, words", [
    ("POSCAR_upper_case", ["line 6", "'NA', 'CL'", "write Na, Cl"]),
    ("POSCAR_more_symbols_than_counts", ["line 7", "2 numbers of atoms follow 3 elements"])])
def test_a_structure_is_refused_with_its_line(name, words):
    refused(FILES / name, *words, read=read_structure)


def test_as_many_atoms_as_a_number_can_say_are_not_believed(tmp_path):
    (tmp_path / "POSCAR").write_text("x\n1.0\n4 0 0\n0 4 0\n0 0 4\nNa\n1000000000\nDirect\n0 0 0\n")
    refused(tmp_path / "POSCAR", "line 7", "1,000,000,000 atoms", read=read_structure)
    whole = (FILES / "CHGCAR_latin1").read_bytes()
    (tmp_path / "CHGCAR").write_bytes(whole.replace(b"   4   3   2", b"  99999 99999 99999"))
    refused(tmp_path / "CHGCAR", "24 numbers", "999,970,000,299,999 points")


# Columns


def test_columns_hold_from_atom_1000_on_and_below_1e_99(tmp_path):
    """The lines that VASP reads by column, `5(1X,E17.11)`, `24X,2I4` and `5E15.7`, begin where it expects them."""
    n = 1001
    structure = Structure(Lattice.cubic(30), ["H"] * n, np.random.default_rng(0).random((n, 3)))
    values = np.random.default_rng(1).normal(size=(4, 3, 5))
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = 1.2345678901e-101, -3e-120, 0
    paw = {1: np.array([1e-104, -2.5]), 999: np.array([0.5]), 1000: np.array([-0.5j + 1]), 1001: np.full(7, -1e-101)}
    first = Density(values, structure, id="h", spin={"diff": values}, augmentation={"total": paw, "diff": paw},
                    moments={"diff": np.full(n, -1e-103)})
    write_density(first, tmp_path / "CHGCAR.h")
    again = read_density(tmp_path / "CHGCAR.h")
    np.testing.assert_allclose(again.values, values, rtol=1e-10)
    for block in ("total", "diff"):
        assert list(again.augmentation[block]) == list(paw)
        for atom, numbers in paw.items():
            np.testing.assert_allclose(again.augmentation[block][atom], numbers, rtol=1e-6)
    np.testing.assert_allclose(again.moments["diff"], first.moments["diff"], rtol=1e-11)
    lines = (tmp_path / "CHGCAR.h").read_text().splitlines()
    for line in lines[lines.index("    4    3    5") + 1:]:
        if line.startswith("augmentation occupancies"):
            label, columns = (line[:41], line[41:]) if "imag" in line else (line[:24], line[24:])
            assert len(columns) == 8 and int(columns[:4]) in paw and int(columns[4:]) and not label[-1].isdigit()
        elif line != "    4    3    5":
            width = next(width for width in (15, 18, 20) if len(line) % width == 0 and all(
                line[i] == " " and line[i + 1:i + width].strip() for i in range(0, len(line), width)))
            assert [float(with_e(line[i:i + width])) for i in range(0, len(line), width)]


def with_e(field):
    "A number without E, as Fortran reads it."
    return field if "E" in field else f"{field[:-4]}E{field[-4:]}"


# Names and packers


def test_content_goes_before_the_name(tmp_path):
    first = replace(noise(np.random.default_rng(0)), id="x")
    for written in ("x.cube", "x.vasp", "x.json", "x.zarr.zip", "x.xsf"):
        write_density(first, tmp_path / written)
        for name in ("x.dat", "other.cube", "CHGCAR.x", "x.json.gz", "download"):
            shutil.copy(tmp_path / written, tmp_path / "copy" if name == "copy" else tmp_path / f"as-{name}")
            assert find_format(tmp_path / f"as-{name}") == known_format(written)
            assert read_density(tmp_path / f"as-{name}").formula == first.formula


@pytest.mark.parametrize("pack, ending", [(gzip.compress, ""), (bz2.compress, ""), (gzip.compress, ".gz"), (bz2.compress, ".bz2")])
@pytest.mark.parametrize("name", ["x.cube", "CHGCAR", "x.json"])
def test_packed_files_are_told_by_their_bytes(tmp_path, pack, ending, name):
    first = noise(np.random.default_rng(0), shape=(20, 20, 30))
    write_density(first, tmp_path / name)
    whole = pack((tmp_path / name).read_bytes())
    (tmp_path / f"{name}{ending}").write_bytes(whole)
    np.testing.assert_allclose(read_density(tmp_path / f"{name}{ending}").rho, first.rho, rtol=1e-5, atol=1e-7)
    (tmp_path / f"{name}{ending}").write_bytes(whole[:len(whole) // 2])
    refused(tmp_path / f"{name}{ending}", "cannot be unpacked", COPY)


@pytest.mark.parametrize("name", ["LOCPOT", "LOCPOT.vasp", "Si_ELFCAR.gz", "PARCHG.0001", "PARCHG"])
def test_other_quantities_are_no_densities(tmp_path, name):
    write_density(noise(np.random.default_rng(0)), tmp_path / "CHGCAR")
    shutil.copy(tmp_path / "CHGCAR", tmp_path / name)
    refused(tmp_path / name, "rename it")
    result = run("info", tmp_path / name, "--from", "chgcar", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["format"] == "chgcar"
    assert run("convert", tmp_path, tmp_path.parent / f"{tmp_path.name}-store", "--workers", 1).exit_code == 0
    assert RawStore(tmp_path.parent / f"{tmp_path.name}-store").ids == [tmp_path.name]


def test_a_format_that_is_said_goes_before_everything(tmp_path):
    write_density(noise(np.random.default_rng(0)), tmp_path / "x.cube")
    with pytest.raises(TomatError, match=r"x\.cube: line \d"):
        read_density(tmp_path / "x.cube", format="chgcar")
    structure, _ = read_structure(FILES / "POSCAR_remarks", format="poscar")
    assert structure.formula == "Na1 Cl1"


# Batches


def test_convert_passes_a_bad_file_over_and_takes_it_up_again(tmp_path):
    shutil.copytree(FILES / "folder", tmp_path / "folder")
    store = tmp_path / "store"
    for n_new in (2, 0):
        result = run("convert", tmp_path / "folder", store, "--workers", 1)
        assert result.exit_code == 1 and "Traceback" not in result.output
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("tomat: passed over 2: ") and last.endswith(f"{COPY}.")
        assert f"written now  {n_new}" in result.stdout and "LOCPOT.vasp" in result.stderr
        assert RawStore(store).ids == ["1", "3"]
        np.testing.assert_array_equal(RawStore(store).read("3").values, VALUES)
    shutil.copy(tmp_path / "folder" / "CHGCAR_1", tmp_path / "folder" / "CHGCAR_2")
    assert run("convert", tmp_path / "folder", store, "--workers", 1).exit_code == 0
    assert RawStore(store).ids == ["1", "2", "3"]
    (tmp_path / "folder" / "CHGCAR_2").write_text("broken again")  # its old group must not come back
    assert run("convert", tmp_path / "folder", store, "--workers", 1).exit_code == 1
    assert run("convert", tmp_path / "folder", store, "--workers", 1).exit_code == 1
    assert RawStore(store).ids == ["1", "3"]
    result = run("convert", tmp_path / "folder", tmp_path / "store.zip")
    assert result.exit_code == 1 and RawStore(tmp_path / "store.zip").ids == ["1", "3"]


def test_a_folder_of_bad_files_alone_makes_no_store(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("CHGCAR_1", "CHGCAR_2"):
        shutil.copy(FILES / "folder" / "CHGCAR_2", tmp_path / "folder" / name)
    with pytest.raises(TomatError, match=f"CHGCAR_1: the file ends .*{COPY}"):
        app(["convert", str(tmp_path / "folder"), str(tmp_path / "store"), "--workers", "1"], standalone_mode=False)


@pytest.mark.parametrize("command", [("tokenize", "--patch-size", 2, "--pad-to", 0, "--patches-per-material", 2), ("prepare",)])
def test_rows_pass_a_bad_file_over_and_take_it_up_again(tmp_path, command):
    shutil.copytree(FILES / "folder", tmp_path / "folder")
    arguments = (command[0], tmp_path / "folder", "--out", tmp_path / "rows", "--workers", 1, *command[1:])
    for _ in range(2):
        result = run(*arguments)
        assert result.exit_code == 1 and result.stderr.strip().splitlines()[-1].startswith("tomat: passed over 2: ")
        assert list(json.loads((tmp_path / "rows" / "meta.json").read_text())["materials"]) == ["1", "3"]
    if command[0] == "prepare":
        return  # the atoms are fitted to all materials, so another one makes another data set
    shutil.copy(tmp_path / "folder" / "CHGCAR_1", tmp_path / "folder" / "CHGCAR_2")
    assert run(*arguments).exit_code == 0
    assert sorted(json.loads((tmp_path / "rows" / "meta.json").read_text())["materials"]) == ["1", "2", "3"]


def test_crystals_are_named_after_the_folders_of_calculations(tmp_path):
    calcs = FILES / "calcs"
    for sources in ([calcs / "a" / "POSCAR", calcs / "b" / "POSCAR"], [calcs]):
        out = tmp_path / str(len(sources))
        result = run("predict", *sources, "--out", f"{out}/", "--grid", 4, 4, 4)
        assert result.exit_code == 0 and sorted(path.name for path in out.iterdir()) == ["a.CHGCAR", "b.CHGCAR"]


def test_a_round_trip_keeps_every_part(tmp_path):
    first = noise(np.random.default_rng(3), (6, 5, 7), 5, spin=("diff_x", "diff_y", "diff_z"), augmented=True)
    write_density(first, tmp_path / "CHGCAR.x")
    assert_same(replace(first, id="x"), replace(read_density(tmp_path / "CHGCAR.x"), id="x"))
