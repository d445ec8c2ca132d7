"""Made-up densities for the tests, each part of them different."""

import importlib.util
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from pymatgen.core import Lattice, Structure

from tomat.atoms.sad import sad_density
from tomat.tokens.codecs import PUBLISHED_DENSITY, log_codec
from tomat.tokens.levels import fit_levels
from tomat.density.core import Density, preparation
from tomat.io.remote import TomatError
from tomat.dataset.meta import read_meta, tokenizer_of
from tomat.dataset.parquet import read_shard
from tomat.density.formats import read_density
from tomat.io.files import local_copy
from tomat.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


class Done(NamedTuple):
    "What a command left behind."
    code: int
    out: str
    err: str


def real_looking(rng, shape):
    "Electrons over many decades, some of them below zero."
    return rng.lognormal(0, 2.5, shape) * np.where(rng.random(shape) < 0.1, -1, 1)


CODECS = {
    "two_token_9_12": PUBLISHED_DENSITY,
    "tomol_3byte": log_codec("tomol_3byte", -4.13, 4.97),
    "fp16_1token": log_codec("fp16_1token", -4.13, 4.97),
    "levels": fit_levels(real_looking(np.random.default_rng(7), 20_000), 256),
}
quick = settings(derandomize=True, deadline=None, max_examples=25)


def crystal(rng, n_atoms=2, elements=("Fe", "O", "Na")):
    "A skewed cell with atoms anywhere in it, like ones together."
    lattice = Lattice.from_parameters(*rng.uniform(2, 6, 3), *rng.uniform(70, 110, 3))
    species = sorted(str(e) for e in rng.choice(elements, n_atoms))
    return Structure(lattice, species, rng.random((n_atoms, 3)))


def skewed(rng, n_atoms=2, elements=("Li", "O", "Na", "Fe")):
    "A skewed cell of 3 to 9 Å with atoms anywhere in it, in any order."
    matrix = np.diag(rng.uniform(3, 9, 3)) + rng.uniform(-1.2, 1.2, (3, 3))
    return Structure(Lattice(matrix), rng.choice(elements, n_atoms).tolist(), rng.random((n_atoms, 3)))


def a_density(seed, shape=(6, 7, 8), n_atoms=2, positive=False, id=""):
    "Values over many decades in a skewed cell; `positive`: none of them is below zero."
    rng = np.random.default_rng(seed)
    structure = skewed(rng, n_atoms)
    values = rng.lognormal(0, 2, shape) if positive else real_looking(rng, shape)
    return Density(values.astype(np.float32), structure, id=id or f"m-{seed}")


@preparation("SAD, whatever its electrons")
def with_any_sad(density):
    "The density with its SAD; `with_sad` refuses noise, whose electrons are not as many as the atoms'."
    return replace(density, sad=sad_density(density.structure, density.shape))


def noise(rng, shape=(4, 3, 5), n_atoms=2, spin=(), augmented=False, sad=False):
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
                   sad=grid() if sad else None, metadata={"task_id": "noise-1", "comment": "noise"})


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


SPIN_FILE = """\
Fe  O
   1.00000000000000
     4.000000    0.000000    0.000000
     0.000000    4.000000    0.000000
     0.000000    0.000000    4.000000
   Fe   O
     1     1
Direct
  0.000000  0.000000  0.000000
  0.500000  0.500000  0.500000

    2    2    3
 0.10000000000E+02 0.20000000000E+02 0.30000000000E+02 0.40000000000E+02 0.50000000000E+02
 0.60000000000E+02 0.70000000000E+02 0.80000000000E+02 0.90000000000E+02 0.11000000000E+02
 0.12000000000E+02 0.13000000000E+02
augmentation occupancies   1   6
  0.2743786E+00 -0.3307158E-01  0.0000000E+00  0.1033253E-12 -0.1000000E+01
  0.5000000E+00
augmentation occupancies   2   1
  0.1000000E+01
  0.371234567890E+01 -0.100000000000E+00
    2    2    3
 -.10000000000E+01 0.20000000000E+00 0.30000000000E+00 0.40000000000E+00 0.50000000000E+00
 0.60000000000E+00 0.70000000000E+00 0.80000000000E+00 0.90000000000E+00 0.11000000000E+00
 0.12000000000E+00 0.13000000000E+00
augmentation occupancies   1   1
  0.4000000E+01
augmentation occupancies   2   1
  0.5000000E+01
"""


def is_sentence(text):
    "Whether an error is one sentence."
    return "\n" not in text and text.endswith(".") and not text.endswith("..")


def refused(path, *words, read=read_density):
    "Reading gives one sentence that names the file."
    with pytest.raises(TomatError) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text and is_sentence(text) and all(word in text for word in words), text


class Rows(NamedTuple):
    "A data set in memory."
    tokenizer: Tokenizer
    ids: list[np.ndarray]     # one int32 array a row, PAD taken off
    materials: list[str]      # id of each row's material
    offsets_Nx3: np.ndarray   # (N, 3) low corners, voxels


def read_rows(path):
    "All rows of a data set, local or remote."
    meta = read_meta(path)
    with local_copy(path) as folder:
        table = pa.concat_tables([read_shard(folder / name) for name in meta["shards"]])
    ids = [np.array(row, np.int32) for row in table["input_ids"].to_pylist()]
    offsets_Nx3 = np.stack([table[f"offset_{axis}"].to_numpy() for axis in "xyz"], axis=1)
    return Rows(tokenizer_of(path, meta), [row[:np.count_nonzero(row)] for row in ids], table["task_id"].to_pylist(), offsets_Nx3)


@contextmanager
def limited(what: int, amount: int) -> Iterator[None]:
    "Lower a limit of this process for a while, such as resource.RLIMIT_FSIZE: no file may grow beyond `amount` bytes."
    old = resource.getrlimit(what)
    resource.setrlimit(what, (amount, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, old)


def script(name: str) -> ModuleType:
    "A program of scripts/ as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
