"""Damaged input: a reader gives a value or one sentence, and nothing else, within seconds and a gigabyte.

The readers and the mutations are those of `fuzzing`; `scripts/fuzz.py` runs more of them.
"""

import time
from pathlib import Path

import numpy as np
import pytest

import fuzzing
from fuzzing import READERS, Fuzzer, Reader
from tomat.io.remote import TomatError

N = 2000                                     # mutations of each reader
SLOW = {"rows": 500, "causal_by_hand": 200}  # fewer of those that take several milliseconds


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path, name):
    outcome = Fuzzer(name, tmp_path).run(SLOW.get(name, N))
    assert outcome.unexpected == []
    assert 0 < outcome.refused and outcome.slowest_s < fuzzing.LONGEST_S and outcome.peak_bytes < fuzzing.LARGEST_BYTES


# The fuzzer sees what it looks for


def refuse(path: Path) -> None:
    raise TomatError(f"{path} is refused: give another.")


def reader(read, make=lambda path: path.write_bytes(b"sound"), **options):
    return Reader(make, read, sound=False, **options)


@pytest.mark.parametrize("read, words", [
    (lambda path: [][1], "IndexError"),
    (lambda path: refuse(Path("other")), "not one sentence"),
    (lambda path: np.ones(fuzzing.LARGEST_BYTES // 4), "MemoryError"),
    (lambda path: time.sleep(1), "TooSlow"),
    (lambda path: path.with_name("left").touch(), "files are left")])
def test_a_faulty_reader_is_seen(tmp_path, monkeypatch, read, words):
    monkeypatch.setattr(fuzzing, "LONGEST_S", 0.5)
    assert words in Fuzzer("x", tmp_path, reader(read)).run(1).unexpected[0]


def test_a_fault_that_a_reader_hides_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "LONGEST_S", 0.5)
    def hidden(fault):
        def read(path):
            try:
                fault()
            except (MemoryError, OSError):
                refuse(path)
        return read
    for fault, words in ((lambda: np.ones(fuzzing.LARGEST_BYTES // 4), "MemoryError"), (lambda: time.sleep(1), "TooSlow")):
        assert words in Fuzzer("x", tmp_path, reader(hidden(fault))).run(1).unexpected[0]


def test_another_value_is_seen_and_the_sound_file_comes_back(tmp_path):
    fuzzer = Fuzzer("x", tmp_path, Reader(lambda path: path.write_bytes(b"sound"), Path.read_bytes, checked=True))
    outcome = fuzzer.run(20)
    assert outcome.read == 20 and len(outcome.unexpected) > 15 and "another value is accepted" in outcome.unexpected[0]
    assert (tmp_path / "x").read_bytes() == b"sound"


def test_memory_is_counted(tmp_path):
    outcome = Fuzzer("x", tmp_path, reader(lambda path: np.ones(10_000_000).sum())).run(2)
    assert 70e6 < outcome.peak_bytes < 100e6 and outcome.unexpected == []


def test_mutations_are_the_same_in_every_run(tmp_path):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        fuzzer = Fuzzer("POSCAR", folder)
        found.append([fuzzer.damage(i)[1] for i in range(50)])
    assert found[0] == found[1] and len(set(found[0])) > 40
