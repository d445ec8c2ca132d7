"""Made-up densities for the tests, each part of them different."""

import numpy as np
import pytest
from hypothesis import settings
from pymatgen.core import Lattice, Structure

from tomat.density import Density
from tomat.files import TomatError
from tomat.formats import read_density

quick = settings(derandomize=True, deadline=None, max_examples=25)


def crystal(rng, n_atoms=2, elements=("Fe", "O", "Na")):
    "A skewed cell with atoms anywhere in it, like ones together."
    lattice = Lattice.from_parameters(*rng.uniform(2, 6, 3), *rng.uniform(70, 110, 3))
    species = sorted(str(e) for e in rng.choice(elements, n_atoms))
    return Structure(lattice, species, rng.random((n_atoms, 3)))


def noise(rng, shape=(4, 3, 5), n_atoms=2, spin=(), augmented=False, baseline=False):
    "A density of noise, each part of it different."
    def grid():
        return rng.normal(3, 2, shape).astype(np.float32)
    def paw(i):
        values = np.round(rng.normal(size=1 + 4 * i), 6)
        return values + 1j * np.round(rng.normal(size=values.size), 6) if i % 2 else values
    blocks = ("total", *spin) if augmented else ()
    return Density(grid(), crystal(rng, n_atoms), id="noise-1", spin={name: grid() for name in spin},
                   augmentation={name: {i + 1: paw(i) for i in range(n_atoms)} for name in blocks},
                   moments={name: np.round(rng.normal(size=n_atoms), 9) for name in spin},
                   baseline=grid() if baseline else None, metadata={"task_id": "noise-1", "comment": "noise"})


def assert_same(a, b):
    "Equal to the last bit of a float32, and of the structure's floats."
    assert a.id == b.id and a.structure.species == b.structure.species and a.units == b.units
    np.testing.assert_array_equal(a.structure.lattice.matrix, b.structure.lattice.matrix)
    np.testing.assert_array_equal(a.structure.frac_coords, b.structure.frac_coords)
    np.testing.assert_array_equal(a.values.astype(np.float32), b.values.astype(np.float32))
    for x, y in ((a.spin, b.spin), (a.moments, b.moments), (a.augmentation, b.augmentation)):
        assert list(x) == list(y)
    for name in a.spin:
        np.testing.assert_array_equal(a.spin[name].astype(np.float32), b.spin[name].astype(np.float32))
    for name in a.moments:
        np.testing.assert_array_equal(a.moments[name], b.moments[name])
    for name, atoms in a.augmentation.items():
        assert list(atoms) == list(b.augmentation[name])
        for atom in atoms:
            np.testing.assert_array_equal(atoms[atom], b.augmentation[name][atom])


def refused(path, *words):
    "Reading gives one sentence that names the file."
    with pytest.raises(TomatError) as caught:
        read_density(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and text.endswith(".") and all(word in text for word in words), text
