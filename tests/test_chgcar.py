"""Every line of VASP's file comes back, and every cut in it is seen."""

import gzip
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from crystals import SPIN_FILE, assert_same, noise
from pymatgen.core import Lattice, Structure

from tomat.density.core import Density
from tomat.io.remote import TomatError
from tomat.density.formats import read_density, write_density

FILES = Path(__file__).parent / "files"


def test_every_line_of_a_chgcar_comes_back(tmp_path):
    """Grid lines to the character, the others to the number."""
    write_density(read_density(FILES / "CHGCAR.NaCl.gz"), tmp_path / "CHGCAR")
    old = gzip.decompress((FILES / "CHGCAR.NaCl.gz").read_bytes()).decode().split("\n")
    new = (tmp_path / "CHGCAR").read_text().split("\n")
    assert len(old) == len(new)
    grid = slice(10, 11 + math.ceil(56**3 / 5))
    assert [line.split() for line in old[grid]] == [line.split() for line in new[grid]]
    def numbers(line):
        return [word if word.isalpha() else float(word) for word in line.split()]
    assert [numbers(line) for line in old[grid.stop:]] == [numbers(line) for line in new[grid.stop:]]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_spin_polarised_file_as_vasp_writes_it(tmp_path, end):
    (tmp_path / "CHGCAR").write_text(SPIN_FILE, newline=end)
    got = read_density(tmp_path / "CHGCAR")
    assert got.id == tmp_path.name and got.metadata["comment"] == "Fe  O"
    assert got.values[1, 0, 0] == 20 and got.values[0, 0, 2] == 90 and got.n_electrons == pytest.approx(486 / 12)
    assert got.spin["diff"][0, 0, 0] == -1
    np.testing.assert_array_equal(got.moments["diff"], [3.71234567890, -0.1])
    np.testing.assert_array_equal(got.augmentation["total"][1], [0.2743786, -0.03307158, 0, 1.033253e-13, -1, 0.5])
    np.testing.assert_array_equal(got.augmentation["diff"][2], [5])
    write_density(got, tmp_path / "again.vasp")
    lines = (tmp_path / "again.vasp").read_text().splitlines()
    index = [line.split() for line in lines].index(["2", "2", "3"], 12)
    assert [float(x) for x in lines[index - 1].split()] == [3.71234567890, -0.1]
    assert_same(got, replace(read_density(tmp_path / "again.vasp"), id=got.id))


def test_the_atom_counts_may_look_like_a_grid(tmp_path):
    rng = np.random.default_rng(1)
    structure = Structure(Lattice.cubic(4), ["Fe", "Fe", "O", "O", "Na", "Na"], rng.random((6, 3)))
    first = Density(rng.normal(size=(2, 2, 2)), structure, id="x", spin={"diff": rng.normal(size=(2, 2, 2))},
                    moments={"diff": np.arange(6.0)})
    write_density(first, tmp_path / "x.vasp")
    assert_same(first, read_density(tmp_path / "x.vasp"))


def test_minus_zero_can_be_written(tmp_path):
    first = replace(noise(np.random.default_rng(0)), values=np.full((2, 2, 2), -0.0))
    write_density(first, tmp_path / "CHGCAR")
    assert not np.signbit(read_density(tmp_path / "CHGCAR").values).any()


def test_every_truncation_is_refused_or_is_a_whole_smaller_file(tmp_path):
    """A cut between two blocks leaves a whole file of fewer blocks; every other cut is seen."""
    rng = np.random.default_rng(5)
    write_density(noise(rng, (2, 3, 2), spin=("diff",), augmented=True), tmp_path / "CHGCAR")
    whole = (tmp_path / "CHGCAR").read_text()
    passed = []
    for n in range(len(whole) - 1):
        (tmp_path / "CHGCAR.cut").write_text(whole[:n])
        try:
            read_density(tmp_path / "CHGCAR.cut")
            passed.append(n)
        except TomatError as err:
            assert "CHGCAR.cut" in str(err) and "\n" not in str(err)
    assert len(passed) < 20
    assert all(whole[n].isspace() or whole[n - 1].isspace() for n in passed), "a number was cut in two"
