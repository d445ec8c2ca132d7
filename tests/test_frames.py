"""Databases of ase and XYZ files: many structures in one file are many predictions."""

import gzip
import sqlite3

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write

import tomat as package
from tomat.density.formats import read_density
from tomat.density.frames import holds_frames, read_frames
from tomat.io.remote import TomatError, remote_fs
from tomat.prediction.crystals import find_crystals, read_crystal

SALTS = [bulk("NaCl", "rocksalt", a=5.6), bulk("MgO", "rocksalt", a=4.2), bulk("Li", "bcc", a=3.4)]
GRID = ("--grid", 8, 8, 8)


def save(path, frames):
    if path.name.endswith(".db"):
        with connect(path) as database:
            for frame in frames:
                database.write(frame)
    else:
        write(path, frames, format="extxyz")
    return path


@pytest.mark.parametrize("name, numbers", [("set.db", "123"), ("set.xyz", "012"), ("set.extxyz", "012"), ("SET.XYZ", "012")])
def test_many_structures_are_many_predictions(tmp_path, tomat, name, numbers):
    path = save(tmp_path / name, SALTS)
    done = tomat("predict", path, "--out", f"{tmp_path}/out/", *GRID)
    assert done.code == 0, done.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{path.stem}-{n}.CHGCAR" for n in numbers]
    for n, salt in zip(numbers, SALTS, strict=True):
        density = read_density(tmp_path / "out" / f"{path.stem}-{n}.CHGCAR")
        assert sorted(s.specie.symbol for s in density.structure) == sorted(salt.get_chemical_symbols())
        np.testing.assert_allclose(density.volume, salt.cell.volume, rtol=1e-6)
    done = tomat("predict", path, "--out", tmp_path / "CHGCAR", *GRID)
    assert done.code == 2 and "names one file" in done.err and not (tmp_path / "CHGCAR").exists()


def test_one_structure_is_like_any_other_file(tmp_path, tomat):
    path = save(tmp_path / "salt.xyz", SALTS[:1])
    done = tomat("predict", path, "--out", tmp_path / "CHGCAR", *GRID)
    assert done.code == 0, done.err
    assert read_crystal(path).name == "salt" and package.predict(path, (8, 8, 8)).id == "salt"
    with pytest.raises(TomatError, match=r"two.db holds 2 structures, and one is read here"):
        package.predict(save(tmp_path / "two.db", SALTS[:2]))


def test_a_folder_may_hold_them(tmp_path, tomat):
    folder = tmp_path / "cells"
    folder.mkdir()
    save(folder / "a.xyz", SALTS[:2])
    save(folder / "b.db", SALTS[2:])
    write(folder / "POSCAR_c", SALTS[0], format="vasp")
    (folder / "bad.xyz").write_text("2\nno structure\nNa 0 0\n")
    (folder / "Thumbs.db").write_bytes(b"of Windows")
    found, skipped = find_crystals([folder])
    assert [crystal.name for crystal in found] == ["c", "a-0", "a-1", "b"]
    assert list(skipped) == ["Thumbs.db", "bad.xyz"] and "this XYZ file is no structure file" in skipped["bad.xyz"]
    done = tomat("predict", folder, "--out", f"{tmp_path}/out/", *GRID)
    assert done.code == 1 and "passed over bad.xyz" in done.err and "skipped Thumbs.db" in done.err
    assert len([*(tmp_path / "out").iterdir()]) == 4


def test_what_cannot_be_predicted_is_passed_over_and_named(tmp_path, tomat):
    close = Atoms("Na2", [[0, 0, 0], [0.1, 0, 0]], cell=[5, 5, 5], pbc=True)
    flat = Atoms("C", cell=[3, 3, 0], pbc=(True, True, False))
    frames = [SALTS[0], molecule("H2O"), close, Atoms("X", cell=[3, 3, 3], pbc=True), flat, SALTS[1]]
    done = tomat("predict", save(tmp_path / "mixed.xyz", frames), "--out", f"{tmp_path}/out/", *GRID)
    assert done.code == 1 and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mixed-0.CHGCAR", "mixed-5.CHGCAR"]
    for n, why in [(1, "no atoms or no cell"), (2, "Å apart"), (3, "X"), (4, "no atoms or no cell")]:
        [line] = [line for line in done.err.splitlines() if f"passed over mixed-{n}:" in line]
        assert f"mixed.xyz, structure {n}: " in line and why in line
    with pytest.raises(TomatError, match=r"There is no structure in .*water.xyz.*structure 0: H2O has no atoms or no cell"):
        find_crystals([save(tmp_path / "water.xyz", molecule("H2O"))])


def test_a_plain_xyz_file_has_no_cell(tmp_path):
    (tmp_path / "plain.xyz").write_text("1\njust a comment\nNa 0 0 0\n")
    with pytest.raises(TomatError, match=r"plain.xyz, structure 0: Na has no atoms or no cell"):
        read_crystal(tmp_path / "plain.xyz")


def test_results_of_calculations_beside_the_structures_do_no_harm(tmp_path):
    salt = SALTS[0].copy()
    salt.set_initial_magnetic_moments([1.0, -1.0])
    salt.calc = SinglePointCalculator(salt, energy=-1.0, forces=np.ones((2, 3)), stress=np.zeros(6))
    for name in ("a.xyz", "a.db"):
        [crystal] = find_crystals([save(tmp_path / name, [salt])])[0]
        assert crystal.structure.composition.formula == "Na1 Cl1"


def test_packed_and_remote_files(tmp_path, s3):
    path = save(tmp_path / "salts.xyz", SALTS)
    (tmp_path / "packed.xyz.gz").write_bytes(gzip.compress(path.read_bytes()))
    fs, key = remote_fs(f"{s3}/salts.db")
    fs.pipe_file(key, save(tmp_path / "salts.db", SALTS).read_bytes())
    for name in (path, tmp_path / "packed.xyz.gz", f"{s3}/salts.db"):
        found, skipped = find_crystals([name])
        assert [c.structure.composition.reduced_formula for c in found] == ["NaCl", "MgO", "Li"] and not skipped
    assert len({c.name for c in found}) == 3


def test_more_than_ten_frames_sort_as_they_come(tmp_path):
    names = [c.name for c in find_crystals([save(tmp_path / "md.xyz", SALTS * 4)])[0]]
    assert names[0] == "md-00" and names == sorted(names) and len(names) == 12


@pytest.mark.parametrize("name, content, words", [
    ("x.xyz", b"", "holds no structure"), ("x.xyz", b"Dear reader", "no structure file"),
    ("x.xyz", b"\xff\xfe\x00", "no structure file"),
    ("x.xyz", b"3\nLattice=\"1 2\"\nNa 0 0 0\n", "no structure file"), ("x.db", b"", "no database of SQLite"),
    ("x.db", b"SQLite format 3\0" + b"x" * 200, "no structure file"), ("x.db", b"Dear reader", "no database of SQLite")])
def test_files_that_are_none_are_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TomatError, match=rf"{name}: .*this .*{words}") as raised:
        read_frames(tmp_path / name)
    assert "\n" not in str(raised.value) and (tmp_path / name).read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_a_database_of_another_program_stays_as_it_is(tmp_path):
    with sqlite3.connect(tmp_path / "x.db") as other:
        other.execute("CREATE TABLE accounts (name TEXT)")
    other.close()
    before = (tmp_path / "x.db").read_bytes()
    with pytest.raises(TomatError, match="no table of ase's systems"):
        read_frames(tmp_path / "x.db")
    assert (tmp_path / "x.db").read_bytes() == before
    with pytest.raises(TomatError, match="does not exist"):
        read_frames(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists() and holds_frames("none.db") and not holds_frames("x.cif")
