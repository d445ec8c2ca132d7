"""Damaged files: a reader gives a density, a structure or one sentence, and nothing else, within seconds.

A format is one line of READERS: a file, and the function that reads it. Every run makes the same mutations.
"""

import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crystals import SPIN_FILE, noise
from pymatgen.core import Lattice, Structure

from tomat.density.formats import read_density, read_structure, write_density
from tomat.io.remote import TomatError

N = 300            # mutations of each format
LONGEST_S = 5      # of one read
FILES = Path(__file__).parent / "files" / "programs"
JUNK = [b"", b"\n", b" ", b"-", b"9", b"99999999999", b"1e999", b"nan", b"****", b"0.1-100", b"D", b"\0", b"\xff", b"\r\n",
        b"1 1 1\n", b"augmentation occupancies", b"{", b"#", b"%", b"," * 30]


def mutated(rng: np.random.Generator, content: bytes) -> bytes:
    "A file with one to three faults: a byte, a stretch that is cut, doubled, moved or replaced, or an early end."
    for _ in range(rng.integers(1, 4)):
        a, b = sorted(rng.integers(0, len(content) + 1, 2))
        if rng.random() < 0.7:
            b = min(b, a + int(rng.integers(1, 20)))
        part, junk = content[a:b], JUNK[rng.integers(len(JUNK))]
        shuffled = bytes(rng.permutation(np.array(list(part), np.uint8)))
        content = [content[:a] + bytes([rng.integers(256)]) + content[a + 1:], content[:a] + content[b:], content[:a],
                   content[:b] + part + content[b:], content[:a] + junk + content[b:], content[:a] + junk + content[a:],
                   content[:a] + shuffled + content[b:]][rng.integers(7)]
    return content


@contextmanager
def limited_time():
    "Raise `TimeoutError` in a block that takes too long."
    def stop(*_):
        raise TimeoutError(f"the reader took more than {LONGEST_S} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def as_written(name: str) -> Callable[[Path], bytes]:
    "A density in the format of a name, with all that the format can hold."
    def content(folder: Path) -> bytes:
        density = replace(noise(np.random.default_rng(1), (3, 2, 4), spin=("diff",), augmented=True), id="x")
        write_density(density, folder / name)
        return (folder / name).read_bytes()
    return content


def as_structure(kind: Any) -> Callable[[Path], bytes]:
    "A structure alone, as pymatgen writes it."
    salt = Structure(Lattice.rhombohedral(4, 70), ["Na", "Cl"], np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
    return lambda folder: salt.to(fmt=kind).encode()


def file(path: Path) -> Callable[[Path], bytes]:
    return lambda folder: path.read_bytes()


READERS: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], Any]]] = {  # name of the file → its content, and its reader
    "CHGCAR": (as_written("CHGCAR"), read_density),
    "spin.vasp": (lambda folder: SPIN_FILE.encode(), read_density),
    "short.chgcar": (file(FILES / "CHGCAR_exponent_without_E"), read_density),
    "CHG": (file(FILES / "CHG_two_steps.chgcar"), read_density),
    "CHGCAR.gz": (as_written("CHGCAR.gz"), read_density),
    "CHGCAR.bz2": (file(FILES / "CHGCAR.bz2"), read_density),
    "CHGCAR.xz": (file(FILES / "CHGCAR.xz"), read_density),
    "POSCAR": (file(FILES / "POSCAR_negative_scale_cartesian"), read_structure),
    "POSCAR.remarks": (file(FILES / "POSCAR_remarks"), read_structure),
    "CONTCAR": (file(FILES / "CHGCAR_latin1"), read_structure),
    "plain.cube": (file(FILES / "plain.cube"), read_density),
    "angstrom.cube": (file(FILES / "angstrom_all_counts_negative.cube"), read_density),
    "density.xsf": (file(FILES / "density.xsf"), read_density),
    "x.xsf": (as_written("x.xsf"), read_density),
    **{f"structure.{kind}": (as_structure(kind), read_structure) for kind in ("cif", "res", "cssr", "yaml", "json", "xsf")},
    "named_group.cif": (file(FILES / "named_group.cif"), read_structure),
    "summary.json": (file(FILES / "summary_document.json"), read_structure),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path, name):
    make, read = READERS[name]
    path, content = tmp_path / name, make(tmp_path)
    path.write_bytes(content)
    if name != "CHG":
        read(path)
    rng, n_read = np.random.default_rng(sum(name.encode())), 0
    for i in range(N):
        path.write_bytes(mutated(rng, content))
        try:
            with limited_time():
                read(path)
            n_read += 1
        except TomatError as err:
            assert "\n" not in str(err) and str(path) in str(err) and str(err).endswith("."), err
        except Exception as err:
            pytest.fail(f"mutation {i} of {name} gives {type(err).__name__}: {err}")
    assert n_read < N, "no mutation was noticed"
