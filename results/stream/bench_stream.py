"""Tokens a second of the streams, from a raw store and from shards, beside other ways to read the same shards.

    python results/stream/bench_stream.py STORE [--workers 2] [--batch 32] [--patches 32] [--repeats 3] [--json]

Rows are framed, P = 14, two_token_9_12; tokens are counted without padding. Every timing includes the start of the workers.
cold: one visit to every material of the store, its files dropped from the system's file cache first.
warm: later visits, the densities kept in memory. Shards hold the same rows, `--patches` a material, padded to 8,192, and are
read three times over; by Hugging Face datasets once, which takes long enough. "pyarrow, plain" reads in the order of the files
and gives ids alone; the others shuffle.
"""

import os

for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM"):
    os.environ[f"{name}_NUM_THREADS"] = "1"  # before numpy is imported: its pools read these once
os.environ["TOMAT_PROGRESS"] = "0"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.io.remote import TomatError
from tomat.dataset.meta import read_meta
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.store import RawStore
from tomat.dataset.stream import Batches, Block, ParquetRows
from tomat.dataset.fresh import FreshPatches, PatchConfig
from tomat.tokens.tokenizer import Tokenizer

TOKENIZER = Tokenizer("framed", PUBLISHED_DENSITY)
CACHE = 8 << 30         # bytes: more than the store needs
READINGS = 3            # of the shards
WARM_UP, WARM = 5, 3    # visits: of two workers each has met all but a 32nd of the materials after five
NEEDED = 20             # M tokens a second


def drop_caches(folder: Path) -> None:
    "Ask the system to forget the files, where it has a way to."
    if hasattr(os, "posix_fadvise"):
        for path in (p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(batches: Iterable[Any], tokens_of: Callable[[Any], int]) -> dict[str, float]:
    "Exhaust an iterable of batches against the clock."
    start, tokens = perf_counter(), 0
    for batch in batches:
        tokens += tokens_of(batch)
    seconds = perf_counter() - start
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def real_tokens(block: Block) -> int:
    return int(block.lengths.sum())


def fresh(store: RawStore, args: argparse.Namespace, warm: bool, turn: bool) -> dict[str, float]:
    "Patches straight from the store."
    config = PatchConfig(args.patches, permute_axes=turn, cache_bytes=CACHE if warm else 0)
    stream = FreshPatches(store, store.ids, TOKENIZER, config, epochs=WARM_UP + WARM if warm else 1)
    batches = Batches(stream, args.batch, args.workers)
    rest = iter(batches)
    if warm:
        while batches.position < WARM_UP * stream.order.rows_per_epoch:
            next(rest)
    else:
        drop_caches(Path(store.root))
    return rate(rest, real_tokens)


class PlainRows(IterableDataset):
    "Shards by pyarrow, a worker its share of the files, rows one by one: what one writes in ten lines."

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        for file in self.files[info.id::info.num_workers] if info else self.files:
            for part in pq.ParquetFile(file).iter_batches(batch_size=32, columns=["input_ids"]):
                for row in part["input_ids"]:
                    yield torch.from_numpy(row.values.to_numpy().copy())


def others(files: list[str], args: argparse.Namespace) -> dict[str, Callable[[], Iterable[Any]]]:
    "Other readers of the same shards; each gives whole batches of padded rows."
    found: dict[str, Callable[[], Iterable[Any]]] = {
        "pyarrow, plain": lambda: DataLoader(PlainRows(files * READINGS), batch_size=args.batch, num_workers=args.workers)}
    try:
        import datasets
    except ImportError:
        return found
    datasets.disable_progress_bars()

    def streaming() -> Iterable[Any]:
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        rows = rows.select_columns(["input_ids"]).shuffle(seed=42, buffer_size=1024).with_format("torch")
        return (batch["input_ids"] for batch in DataLoader(rows, batch_size=args.batch, num_workers=args.workers))
    return {**found, f"Hugging Face datasets {datasets.__version__}, streaming": streaming}


def measure(store: RawStore, args: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    "Every way once."
    files = [f"{folder}/rows/{name}" for name in read_meta(f"{folder}/rows")["shards"]]
    results = {f"fresh patches{', turned' * turn}, {'warm' if warm else 'cold'}": fresh(store, args, warm, turn)
               for turn in (False, True) for warm in (False, True)}
    shards = Batches(ParquetRows(f"{folder}/rows", epochs=READINGS), args.batch, args.workers)
    results["shards, shuffled"] = rate(shards, real_tokens)
    for name, batches in others(files, args).items():
        results[name] = rate(batches(), lambda ids: int(torch.count_nonzero(ids)))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store, a local folder")
    parser.add_argument("--workers", type=int, default=2, help="processes that make rows (default 2)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--patches", type=int, default=32, help="rows a visit to a material gives (default 32)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is reported")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args()
    load = os.getloadavg()
    try:
        store = RawStore(args.store)
        with tempfile.TemporaryDirectory() as folder:
            tokenize(store, TOKENIZER, f"{folder}/rows", TokenizeConfig(args.patches, seed=42, rows_per_shard=1024))
            repeats = [measure(store, args, folder) for _ in range(args.repeats)]
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    results: dict[str, dict[str, Any]] = {way: {"tokens_per_s": round(median(r[way]["tokens_per_s"] for r in repeats)),
                     "all_tokens_per_s": [round(r[way]["tokens_per_s"]) for r in repeats],
                     "tokens": repeats[0][way]["tokens"]} for way in repeats[0]}
    opponent = max((way for way in results if not way.startswith(("fresh", "shards"))), key=lambda w: results[w]["tokens_per_s"])
    command = " ".join(["python results/stream/bench_stream.py STORE", *sys.argv[2:]])
    report: dict[str, Any] = {"command": command, "materials": len(store.ids), "workers": args.workers, "cores": os.cpu_count(),
              "load_before": [round(x, 2) for x in load], "needed_tokens_per_s": NEEDED * 1_000_000, "results": results,
              "fastest_other": opponent,
              "times_fastest_other": {way: round(r["tokens_per_s"] / results[opponent]["tokens_per_s"], 2)
                                      for way, r in results.items() if way.startswith(("fresh", "shards"))}}
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    for way, r in results.items():
        times = report["times_fastest_other"].get(way, "")
        print(f"{way:42} {r['tokens_per_s'] / 1e6:7.1f} M tokens/s  {times}{'×' if times else ''}")
    print(f"×: against {opponent}, same run. {args.workers} workers, {os.cpu_count()} cores, load before {load[0]:.2f}, "
          f"median of {args.repeats}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
