"""Voxels a second of prepared sets, beside other ways to read the same draws, and materials a second of `prepare`.

    python results/prepare/bench_prepare.py STORE [--workers 2] [--seconds 2] [--repeats 3] [--out results/prepare/bench.json]

Every reader gets the same batches: materials in balanced random order, and random kept voxels of each. Of each voxel it gives
index, SAD and density, joined to arrays of the batch. One process, then two, which divide the steps.

shards                        as `prepare` writes them, by `VoxelSet`
shards, one material each     the same voxels in many small files, of which a process maps fewer than there are
Parquet, one row group each   the same voxels as Parquet, uncompressed or zstd as the rows of tokens are; files stay open
raw store                     the densities, without the SAD, which would have to be computed again

The files are in the system's cache, but for "cold", where they are dropped from it before one pass over all materials.
"""

import os

for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM"):
    os.environ[f"{name}_NUM_THREADS"] = "1"  # before numpy is imported: its pools read these once
os.environ["TOMAT_PROGRESS"] = "0"

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tomat.dataset.prepare import VoxelSet, batch_materials, prepare
from tomat.dataset.voxels import PrepareConfig, read_voxels
from tomat.density.source import Source
from tomat.density.store import RawStore
from tomat.io.files import write_json

BATCHES = {"24 x 100": (24, 100), "64 x 1024": (64, 1024)}  # materials, voxels of each
NEEDED = 5_000_000  # voxels a second with two processes
SMALL_MAPS = 64     # files that a process may map where each material has a file
Columns = Callable[[int, np.ndarray], list[np.ndarray]]  # material and picked voxels → their columns


def arrow_columns(folder: str) -> Columns:
    "From a prepared set."
    found = VoxelSet(folder)
    if len(found.shards) == len(found):
        found._most_maps = SMALL_MAPS
    return lambda i, pick: [column[pick] for column in found.columns(i)]


def parquet_columns(folder: str) -> Columns:
    "From row groups."
    places = [(file, group) for file in map(pq.ParquetFile, sorted(map(str, Path(folder).glob("*.parquet"))))
              for group in range(file.num_row_groups)]

    def columns(i: int, pick: np.ndarray) -> list[np.ndarray]:
        file, group = places[i]
        return [column.to_numpy()[pick] for column in file.read_row_group(group, use_threads=False).columns]
    return columns


def raw_columns(folder: str) -> Columns:
    "From the densities, in the order of the prepared set; the voxels are those that it kept."
    set_folder, store_folder = folder.split("|")
    found, store = VoxelSet(set_folder), RawStore(store_folder)

    def columns(i: int, pick: np.ndarray) -> list[np.ndarray]:
        index_N = found.columns(i)[0][pick]
        return [index_N, store.read(found.ids[i]).values.reshape(-1)[index_N]]
    return columns


KINDS = {"arrow": arrow_columns, "parquet": parquet_columns, "raw": raw_columns}


def memory() -> float:
    "Private memory of this process, MB; pages of mapped files belong to the system."
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1000


class Reading(NamedTuple):
    "What one process has read."
    voxels: int
    start: float   # s
    end: float     # s
    cpu: float     # s of its core
    memory: float  # private memory that it needed, MB


def read_steps(job: tuple[str, str, str], rank: int, ranks: int, limits: tuple[float, int], barrier: Any, queue: Any) -> None:
    "Read the batches of one process until the time is over or all steps are done."
    (kind, folder, set_folder), (seconds, steps) = job, limits
    (materials, voxels), before = BATCHES[os.environ["BENCH_BATCH"]], memory()
    columns, found = KINDS[kind](folder), VoxelSet(set_folder)
    strata, n_voxels, step, n = found.strata, found.n_voxels, rank, 0
    barrier.wait()
    start, cpu = perf_counter(), process_time()
    while perf_counter() < start + seconds and step < steps:
        rng = np.random.default_rng([0, 2, step])
        parts = [columns(i, rng.integers(n_voxels[i], size=voxels)) for i in batch_materials(step, strata, materials, 0)]
        batch = [np.concatenate(part) for part in zip(*parts, strict=True)]
        n, step = n + len(batch[0]), step + ranks
    queue.put(Reading(n, start, perf_counter(), process_time() - cpu, memory() - before))


def rate(job: tuple[str, str, str], ranks: int, batch: str, seconds: float, steps: int = 1 << 40) -> dict[str, float]:
    "Voxels a second of all processes together, from the first start to the last end."
    os.environ["BENCH_BATCH"] = batch
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(ranks), context.Queue()
    children = [context.Process(target=read_steps, args=(job, rank, ranks, (seconds, steps), barrier, queue))
                for rank in range(ranks)]
    for child in children:
        child.start()
    ends = [queue.get() for _ in children]
    for child in children:
        child.join()
    voxels = sum(end.voxels for end in ends)
    return {"voxels_per_s": voxels / (max(end.end for end in ends) - min(end.start for end in ends)),
            "voxels_per_cpu_s": voxels / sum(end.cpu for end in ends), "MB": max(end.memory for end in ends)}


def drop_caches(folder: Path) -> None:
    "Ask the system to forget the files of a folder."
    os.sync()
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def as_parquet(folder: str, compression: str) -> str:
    "The same shards as Parquet, a row group for each material."
    out = Path(f"{folder}-{compression}")
    out.mkdir()
    for shard in sorted(Path(folder).glob("*.arrow")):
        batches = read_voxels(shard)
        with pq.ParquetWriter(out / f"{shard.stem}.parquet", batches[0].schema, compression=compression, use_dictionary=False,
                              compression_level=1 if compression == "zstd" else None, write_statistics=False) as writer:
            for batch in batches:
                writer.write_table(pa.table(batch), row_group_size=batch.num_rows)
    return str(out)


def size_of(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).iterdir() if path.suffix in (".arrow", ".parquet"))


def made(store: Source, folder: str, config: PrepareConfig) -> dict[str, float]:
    "Prepare all materials against the clock."
    start = perf_counter()
    meta = prepare(store, folder, config)
    seconds = perf_counter() - start
    return {"materials": len(meta["materials"]), "voxels": meta["voxels"], "seconds": round(seconds, 2),
            "materials_per_s": round(len(meta["materials"]) / seconds, 1)}


def measure(jobs: dict[str, tuple[str, str, str]], args: argparse.Namespace) -> dict[str, Any]:
    "Every reader, every batch, one and two processes; the median of the repeats, which take turns."
    keys = [(way, batch, ranks) for way in jobs for batch in BATCHES for ranks in (1, 2)]
    runs = [{key: rate(jobs[key[0]], key[2], key[1], args.seconds) for key in keys} for _ in range(args.repeats)]
    results: dict[str, Any] = {way: {} for way in jobs}
    for way, batch, ranks in keys:
        rates = [run[way, batch, ranks] for run in runs]
        results[way][f"{batch}, {ranks} process{'es' * (ranks > 1)}"] = {
            "voxels_per_s": round(median(r["voxels_per_s"] for r in rates)),
            "all_voxels_per_s": [round(r["voxels_per_s"]) for r in rates],
            "voxels_per_cpu_s": round(median(r["voxels_per_cpu_s"] for r in rates)),
            "private_MB": round(max(r["MB"] for r in rates), 1)}
    return results


def report_of(store: RawStore, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    "All figures."
    load, kept, single, n = os.getloadavg(), f"{folder}/set", f"{folder}/single", args.workers
    config = PrepareConfig(workers=n)
    making = {"1 process": made(store, f"{folder}/one", replace(config, workers=1)), f"{n} processes": made(store, kept, config)}
    prepare(store, single, replace(config, voxels_per_shard=1))
    plain, zstd = (as_parquet(kept, name) for name in ("none", "zstd"))
    jobs = {"shards": ("arrow", kept, kept), "shards, one material each": ("arrow", single, kept),
            "Parquet, uncompressed": ("parquet", plain, kept), "Parquet, zstd": ("parquet", zstd, kept),
            "raw store, without SAD": ("raw", f"{kept}|{args.store}", kept)}
    start = perf_counter()
    found = VoxelSet(kept)
    seconds, results, cold = perf_counter() - start, measure(jobs, args), {}
    for batch, (materials, _) in BATCHES.items():
        drop_caches(Path(kept))
        cold[batch] = round(rate(jobs["shards"], 2, batch, 1e9, len(found) // materials)["voxels_per_s"])
    sizes = {"shards": size_of(kept), "Parquet, uncompressed": size_of(plain), "Parquet, zstd": size_of(zstd)}
    return {"cores": os.cpu_count(), "load_before": [round(x, 2) for x in load], "needed_voxels_per_s": NEEDED, "prepare": making,
            "bytes_per_voxel": {way: round(size / int(found.n_voxels.sum()), 3) for way, size in sizes.items()},
            "seconds_to_open": round(seconds, 3), "shards": len(found.shards), "cold, 2 processes": cold, "read": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store, a local folder")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare (default 2)")
    parser.add_argument("--seconds", type=float, default=2, help="of each reading (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is reported")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = report_of(RawStore(args.store), args, folder)
    options = f"--workers {args.workers} --seconds {args.seconds:g} --repeats {args.repeats}"
    report = {"command": f"python results/prepare/bench_prepare.py STORE {options}", **report}
    for way, figures in report["read"].items():
        for what, figure in figures.items():
            print(f"{way:28} {what:24} {figure['voxels_per_s'] / 1e6:7.2f} M voxels/s "
                  f"{figure['voxels_per_cpu_s'] / 1e6:7.2f} M a core-second {figure['private_MB']:7.1f} MB")
    print(*(f"{key}: {value}" for key, value in report.items() if key != "read"), sep="\n")
    if args.out:
        write_json(args.out, report)


if __name__ == "__main__":
    main()
