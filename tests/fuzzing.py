"""Damaged input for every reader: the same mutations each time, and what a reader may do with them.

A reader gives a value or one sentence within seconds and within a gigabyte, and leaves no file behind. Where its format has
checksums, it never gives another value than that of the sound input. `tests/test_fuzz.py` and `scripts/fuzz.py` run it.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast
from zlib import crc32

import numpy as np
import torch
from crystals import CODECS, SPIN_FILE, crystal, is_sentence, noise
from monty.json import MontyEncoder
from pymatgen.core import Lattice, Structure

from tomat.atoms.sad import load_atoms, packaged_atoms, sad_density
from tomat.dataset.meta import VOXELS, read_meta, tokenizer_of
from tomat.dataset.parquet import TokenizeConfig, read_footer, read_shard
from tomat.dataset.prepare import VoxelSet, prepare
from tomat.dataset.shards import tokenize
from tomat.dataset.verify import verify
from tomat.dataset.voxels import PrepareConfig, read_voxel_footer, read_voxels
from tomat.density.core import Density
from tomat.density.formats import read_density, read_structure, write_density
from tomat.density.store import RawStore, write_store
from tomat.io.files import md5_of, read_json, write_json
from tomat.io.remote import TomatError
from tomat.io.settings import data_set, labels
from tomat.models.causal import load_checkpoint, make_model, save_checkpoint, with_atoms
from tomat.models.probe import ProbeConfig, ProbeNet, load_probe, save_probe
from tomat.models.sizes import ModelSize
from tomat.prediction.worker import answer, service_limits
from tomat.run.service import parse_query
from tomat.study.fidelity import COLUMNS, read_sweep
from tomat.tokens.fit_codec import Histogram
from tomat.tokens.levels import LevelCodec, codec_from_dict, load_levels
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.checkpoints import load_state
from tomat.train.log import list_runs

LONGEST_S = 5            # of one read
LARGEST_BYTES = 1 << 30  # of memory, above what the process had before
FILES = Path(__file__).parent / "files"
PROGRAMS, BEFORE = FILES / "programs", FILES / "before"
JUNK = [b"", b"\n", b" ", b"-", b"9", b"99999999999", b"1e999", b"nan", b"****", b"0.1-100", b"D", b"\0", b"\xff", b"\r\n",
        b"1 1 1\n", b"augmentation occupancies", b"{", b"#", b"%", b"," * 30, b"null", b"[]", b"true", b"-1", b"\"", b"../x"]


def mutated(rng: np.random.Generator, content: bytes) -> bytes:
    "A file with one to three faults: a byte, a stretch that is cut, doubled, moved or replaced, or an early end."
    for _ in range(rng.integers(1, 4)):
        a, b = sorted(rng.integers(0, len(content) + 1, 2))
        if rng.random() < 0.7:
            b = min(b, a + int(rng.integers(1, 20)))
        part, junk, kind = content[a:b], JUNK[rng.integers(len(JUNK))], rng.integers(7)
        if kind == 6:
            junk = bytes(rng.permutation(list(part)).astype(np.uint8))
        content = [content[:a] + bytes([rng.integers(256)]) + content[a + 1:], content[:a] + content[b:], content[:a],
                   content[:b] + part + content[b:], content[:a] + junk + content[b:], content[:a] + junk + content[a:],
                   content[:a] + junk + content[b:]][kind]
    return content


# Readers


class Reader(NamedTuple):
    "A format: its sound input, and the function that reads it."
    make: Callable[[Path], Any]  # writes the input, a file or a folder
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ()  # patterns of the files to damage; none: the input is a file
    checked: bool = False        # whether checksums protect every value
    sound: bool = True           # False: the input is refused as it is
    named: bool = True           # whether each sentence names the input


IRON = replace(packaged_atoms(), atoms={"Fe": packaged_atoms()["Fe"]}, name="iron alone")


def density(id: str = "x") -> Density:
    "All that a format can hold."
    return replace(noise(np.random.default_rng(1), (3, 2, 4), spin=("diff",), augmented=True), id=id)


def as_written(path: Path) -> None:
    "A density in the format of a name."
    write_density(density(), path)


def as_structure(kind: Any) -> Callable[[Path], Any]:
    "A structure alone, as pymatgen writes it."
    salt = Structure(Lattice.rhombohedral(4, 70), ["Na", "Cl"], np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
    return lambda path: path.write_bytes(salt.to(fmt=kind).encode())


def copy_of(file: Path) -> Callable[[Path], Any]:
    "A file or a folder of the tests."
    return lambda path: (shutil.copytree if file.is_dir() else shutil.copyfile)(file, path)


def a_sweep(path: Path) -> None:
    path.write_text("".join(",".join(line) + "\n" for line in (COLUMNS, ["1.5"] * len(COLUMNS))))


def in_json(value: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_text(json.dumps(value, indent=1))


def a_store(path: Path) -> None:
    write_store([density("m-1"), density("m-2")], {"train": ["m-1"], "validation": ["m-2"]}, path)


def whole_store(path: Path) -> Any:
    store = RawStore(path)
    return store.ids, store.splits, [store.read(id) for id in store.ids]


def all_faults(path: Path) -> list[str]:
    "The faults of a data set or a store; the first is raised, as a command does."
    for fault in verify(path):
        raise TomatError(f"{path}: {fault.rstrip('.')}.")
    return []


def a_tokenizer(codec: str = "two_token_9_12") -> Tokenizer:
    return Tokenizer("anchored", CODECS[codec], patch_size=2, pad_to=None)


def some_rows(path: Path) -> None:
    tokenize([density("m-1"), density("m-2")], a_tokenizer("levels"), path, TokenizeConfig(2, rows_per_shard=2))


def some_voxels(path: Path) -> None:
    crystals = [crystal(np.random.default_rng(n), elements=("Fe",)) for n in (1, 2)]
    made = [Density(sad_density(one, (6, 7, 8), IRON), one, id=f"m-{n}") for n, one in enumerate(crystals)]
    prepare(made, path, PrepareConfig(kept=9), atoms=IRON)


def shard(make: Callable[[Path], None], pattern: str) -> Callable[[Path], Any]:
    "The first shard of a data set, alone."
    def copied(path: Path) -> None:
        make(path.with_name("whole"))
        shutil.move(min(path.with_name("whole").glob(pattern)), path)
        shutil.rmtree(path.with_name("whole"))
    return copied


def probe(path: Path) -> None:
    torch.manual_seed(0)
    config = ProbeConfig(width=4, n_layers=1, atom_channels=(2, 1, 1), voxel_channels=(2, 1, 1), readout_width=4, readout_blocks=1)
    model = ProbeNet(config, IRON)
    model.codec = cast(LevelCodec, CODECS["levels"])
    save_probe(model, path, {"elements": ["Fe"]})


def causal(path: Path) -> None:
    tokenizer = a_tokenizer()
    model = make_model(ModelSize(width=8, layers=1, heads=2, mlp=16, kv_heads=1), tokenizer.vocab, seed=0)
    save_checkpoint(with_atoms(model, IRON), tokenizer, path)


def without_checksums(make: Callable[[Path], None]) -> Callable[[Path], Any]:
    "A checkpoint whose tomat.json names no MD5, as of a hand that changed its config."
    def written(path: Path) -> None:
        make(path)
        write_json(path / "tomat.json", read_json(path / "tomat.json") | {"md5": {}})
    return written


def a_state(path: Path) -> None:
    path.mkdir()
    torch.save({"model": {"weight": torch.ones(3)}, "facts": {"step": 3}}, path / "state.pt")
    write_json(path / "md5.json", {"state.pt": md5_of(path / "state.pt")})


def runs(path: Path) -> None:
    with tarfile.open(BEFORE / "run.tar.xz") as archive:
        archive.extractall(path, filter="data")
    for file in path.rglob("*"):
        if file.is_file() and file.name not in ("config.json", "log.jsonl"):
            file.unlink()


class Reached(Exception):
    "A request was read."


class _Predictor:
    "Stands for a network."
    atoms, gives_error = packaged_atoms(), True

    def predict(self, structure: Structure, shape: tuple[int, int, int], **options: Any) -> NoReturn:
        raise Reached


def served(path: Path) -> Any:
    "A request: a line with its query, and a body."
    query, _, body = path.read_bytes().partition(b"\n")
    limits = service_limits()
    options = parse_query(query.decode("latin-1"), limits)
    file = path.parent / "request" / options.name
    file.parent.mkdir()
    try:
        file.write_bytes(body)
        return answer(_Predictor(), path.parent, options, limits)  # type: ignore[arg-type]
    except Reached:
        return None
    finally:
        shutil.rmtree(file.parent)


def with_settings(path: Path) -> Any:
    "All data sets in a file of settings."
    before = os.environ.get("TOMAT_SETTINGS")
    os.environ["TOMAT_SETTINGS"] = str(path)
    try:
        return [data_set(label) for label in labels()]
    finally:
        os.environ.pop("TOMAT_SETTINGS")
        if before is not None:
            os.environ["TOMAT_SETTINGS"] = before


REQUEST = (b"name=x.vasp&grid=8,8,8&format=cube\n"
           b"NaCl\n1\n0 2.82 2.82\n2.82 0 2.82\n2.82 2.82 0\nNa Cl\n1 1\ndirect\n0 0 0\n.5 .5 .5\n")

_CAUSAL = ("model.safetensors", "config.json", "tomat.json", "atoms.json")

READERS: dict[str, Reader] = {  # name of the input → its reader
    "CHGCAR": Reader(as_written, read_density),
    "spin.vasp": Reader(lambda path: path.write_text(SPIN_FILE), read_density),
    "short.chgcar": Reader(copy_of(PROGRAMS / "CHGCAR_exponent_without_E"), read_density),
    "CHG": Reader(copy_of(PROGRAMS / "CHG_two_steps.chgcar"), read_density, sound=False),
    "CHGCAR.gz": Reader(as_written, read_density, checked=True),
    "CHGCAR.bz2": Reader(copy_of(PROGRAMS / "CHGCAR.bz2"), read_density, checked=True),
    "CHGCAR.xz": Reader(copy_of(PROGRAMS / "CHGCAR.xz"), read_density, checked=True),
    "POSCAR": Reader(copy_of(PROGRAMS / "POSCAR_negative_scale_cartesian"), read_structure),
    "POSCAR.remarks": Reader(copy_of(PROGRAMS / "POSCAR_remarks"), read_structure),
    "CONTCAR": Reader(copy_of(PROGRAMS / "CHGCAR_latin1"), read_structure),
    "plain.cube": Reader(copy_of(PROGRAMS / "plain.cube"), read_density),
    "angstrom.cube": Reader(copy_of(PROGRAMS / "angstrom_all_counts_negative.cube"), read_density),
    "orbitals.cube": Reader(copy_of(PROGRAMS / "two_orbitals.cube"), read_density, sound=False),
    "density.xsf": Reader(copy_of(PROGRAMS / "density.xsf"), read_density),
    "x.xsf": Reader(as_written, read_density),
    "task.json": Reader(as_written, read_density),
    "task.json.gz": Reader(as_written, read_density, checked=True),
    "x.zarr": Reader(as_written, read_density, ("**/*",), checked=True),
    "x.zarr.zip": Reader(as_written, read_density, checked=True),
    "old.zarr": Reader(copy_of(BEFORE / "store.zarr/label/a.zarr"), read_density, ("**/*",)),
    **{f"structure.{kind}": Reader(as_structure(kind), read_structure) for kind in ("cif", "res", "cssr", "yaml", "json", "xsf")},
    "named_group.cif": Reader(copy_of(PROGRAMS / "named_group.cif"), read_structure),
    "summary.json": Reader(copy_of(PROGRAMS / "summary_document.json"), read_structure),
    "store": Reader(a_store, whole_store, ("label/**/*",), checked=True),
    "store_lists": Reader(a_store, whole_store, ("*.*",)),
    "store.zip": Reader(a_store, whole_store, checked=True),
    "rows": Reader(some_rows, all_faults, ("*",), checked=True),
    "rows.parquet": Reader(shard(some_rows, "*.parquet"), lambda path: (read_footer(path), read_shard(path))),
    "meta.json": Reader(copy_of(BEFORE / "rows/meta.json"), lambda path: tokenizer_of(path.parent, read_meta(path.parent)),
                        named=False),
    "voxels": Reader(some_voxels, all_faults, ("*",), checked=True),
    "voxel_set": Reader(some_voxels, lambda path: VoxelSet(path).columns(0), ("*",)),
    "voxels.arrow": Reader(shard(some_voxels, "*.arrow"), lambda path: (read_voxel_footer(path), read_voxels(path))),
    "voxels_meta.json": Reader(some_voxels, lambda path: read_meta(path, VOXELS), ("meta.json",), checked=True),
    "probe": Reader(probe, load_probe, ("*",), checked=True),
    "probe_by_hand": Reader(without_checksums(probe), load_probe, ("*.json",)),
    "causal": Reader(causal, load_checkpoint, _CAUSAL, checked=True),
    "causal_by_hand": Reader(without_checksums(causal), load_checkpoint, _CAUSAL[1:]),
    "old_probe": Reader(copy_of(BEFORE / "checkpoint_parallel"), load_probe, ("*.json",)),
    "state": Reader(a_state, load_state, ("*",), checked=True),
    "runs": Reader(runs, list_runs, ("**/*",)),
    "codec.json": Reader(in_json(CODECS["levels"].to_dict()), lambda path: codec_from_dict(read_json(path)), named=False),
    "log_codec.json": Reader(in_json(CODECS["two_token_9_12"].to_dict()), lambda path: codec_from_dict(read_json(path)),
                             named=False),
    "levels.npz": Reader(copy_of(BEFORE / "codec.npz"), load_levels),
    "histogram.npz": Reader(copy_of(BEFORE / "histogram.npz"), Histogram.load),
    "atoms.json": Reader(copy_of(BEFORE / "atoms.json"), load_atoms),
    "sweep.csv": Reader(a_sweep, read_sweep),
    "settings.ini": Reader(copy_of(FILES.parents[1] / "settings.ini"), with_settings),
    "request.txt": Reader(lambda path: path.write_bytes(REQUEST), served, named=False),
}


# What a reader does


class TooSlow(BaseException):
    "A read took too long; no reader catches it."


@contextmanager
def limited_time() -> Iterator[None]:
    "Raise `TooSlow` in a block that takes too long."
    def stop(*_: Any) -> NoReturn:
        raise TooSlow(f"the reader took more than {LONGEST_S} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def memory(what: str) -> int:
    "Bytes of memory of this process: VmRSS, the peak VmHWM, or VmData, all that it may write to."
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))


@contextmanager
def limited_memory() -> Iterator[None]:
    "Raise `MemoryError` in a block that takes more than its share, and count its peak from here on."
    Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + LARGEST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def facts(value: Any) -> Any:
    "A value in a form that can be compared."
    if isinstance(value, torch.nn.Module):
        return [(name, facts(tensor)) for name, tensor in value.state_dict().items()]
    if isinstance(value, Density):
        parts = value.spin, value.augmentation, value.moments, value.metadata
        return json.dumps([value.id, value.structure.as_dict(), value.units, *map(facts, (value.values, value.sad, *parts))],
                          cls=MontyEncoder)
    if isinstance(value, np.ndarray | torch.Tensor):
        return hashlib.md5(np.ascontiguousarray(value).tobytes()).hexdigest(), list(value.shape)
    if isinstance(value, dict):
        return {str(key): facts(part) for key, part in value.items()}
    return [facts(part) for part in value] if isinstance(value, list | tuple) else value


def fault_of(err: BaseException, path: Path, named: bool) -> str:
    "What is wrong with what a reader raises; \"\" for one sentence."
    chain: list[BaseException | None] = [err]
    while chain[-1] is not None:
        if isinstance(chain[-1], MemoryError | TooSlow):
            return f"{type(chain[-1]).__name__}: {chain[-1]}"
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    text = str(err)
    if not isinstance(err, TomatError):
        return f"{type(err).__name__}: {text[:300]}"
    return "" if is_sentence(text) and (str(path) in text or not named) else f"not one sentence that names its file: {text[:300]!r}"


@dataclass
class Outcome:
    "What a reader did with many inputs."
    inputs: int = 0
    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0  # above the memory before
    unexpected: list[str] = field(default_factory=list)


def _replace(file: Path, content: bytes) -> None:
    file.unlink()  # a file that is cut to nothing first is forced to disk by some file systems
    file.write_bytes(content)


class Fuzzer:
    "A reader, its sound input in a folder, and the mutations of a name."

    def __init__(self, name: str, folder: Path, reader: Reader | None = None) -> None:
        self.name, self.folder, self.path = name, folder, folder / name
        self.reader = reader or READERS[name]
        self.reader.make(self.path)
        found = [file for pattern in self.reader.files for file in sorted(self.path.glob(pattern))] or [self.path]
        self.sound = {file: file.read_bytes() for file in found if file.is_file()}
        self.files, self.damaged = sorted(folder.rglob("*")), cast(Path | None, None)
        self.value = facts(self.reader.read(self.path)) if self.reader.sound else None

    def repair(self) -> None:
        "Put the sound content back."
        if self.damaged:
            _replace(self.damaged, self.sound[self.damaged])
        self.damaged = None

    def damage(self, i: int) -> tuple[Path, bytes]:
        "The file that mutation i damages, and its content."
        rng = np.random.default_rng([crc32(self.name.encode()), i])
        file = list(self.sound)[i % len(self.sound)]
        return file, mutated(rng, self.sound[file])

    def once(self, i: int, outcome: Outcome) -> str:
        "Read mutation i; returns what is wrong with the answer, or \"\"."
        file, content = self.damage(i)
        if self.damaged != file:
            self.repair()
        _replace(file, content)
        self.damaged = file
        begun = time.perf_counter()
        try:
            with limited_time():
                value = self.reader.read(self.path)
            outcome.read += 1
            changed = self.reader.checked and facts(value) != self.value
            return "another value is accepted" if changed else ""
        except (Exception, TooSlow) as err:
            outcome.refused += 1
            return fault_of(err, self.path, self.reader.named)
        finally:
            outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - begun)

    def run(self, n: int) -> Outcome:
        "Read n mutations."
        outcome = Outcome(n)
        with limited_memory():
            before = memory("VmRSS")
            for i in range(n):
                if wrong := self.once(i, outcome):
                    outcome.unexpected.append(f"mutation {i} of {self.name}: {wrong}")
        outcome.peak_bytes = max(0, memory("VmHWM") - before)
        self.repair()
        if sorted(self.folder.rglob("*")) != self.files:
            outcome.unexpected.append(f"files are left beside {self.name}")
        return outcome
