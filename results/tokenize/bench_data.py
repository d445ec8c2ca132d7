"""Rows a second of `tomat tokenize` end to end, beside the time that reading, zstd and the disk alone take.

    python results/tokenize/bench_data.py STORE [--workers 2] [--patches 32] [--repeats 3] [--out FILE.json]

The opponent, in the same run and with as many processes: read the bytes of the same Zarr groups and unpack their zstd
chunks; pack the rows' int32 tokens with zstd at the level of the shards; write the packed bytes and force them to disk.
No Parquet, no structure, no codec and no patch is in it.
"""

import os

for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM"):
    os.environ[f"{name}_NUM_THREADS"] = "1"  # before numpy is imported: its pools read these once

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

from numcodecs import Zstd

from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.io.remote import TomatError
from tomat.io.files import write_json
from tomat.io.progress import in_order
from tomat.dataset.parquet import material_rows
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.store import RawStore
from tomat.tokens.tokenizer import Tokenizer

TARGET_ROWS_PER_S, TARGET_SHARE = 8000, 0.7


def disk_and_zstd(job: tuple[int, list[str]], root: str, tokens: list[bytes], out: str) -> int:
    "What no tokenizer can avoid, for one shard's materials: returns the bytes written."
    number, ids = job
    read_zstd, write_zstd, packed = Zstd(), Zstd(level=3), []
    for id, rows in zip(ids, cycle(tokens)):
        for path in Path(f"{root}/label/{id}.zarr/charge_density_total").rglob("*"):
            if path.is_file() and path.name == "0":
                read_zstd.decode(path.read_bytes())
        packed.append(write_zstd.encode(rows))
    with open(f"{out}/{number}.zst", "wb") as file:
        file.writelines(packed)
        file.flush()
        os.fsync(file.fileno())
    return sum(map(len, packed))


def batches(ids: list[str], n: int) -> Iterator[tuple[int, list[str]]]:
    left = iter(ids)
    return enumerate(iter(lambda: list(islice(left, n)), []))


def seconds_of_tokenize(store: RawStore, tokenizer: Tokenizer, patches: int, workers: int) -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        meta = tokenize(store, tokenizer, f"{folder}/rows", TokenizeConfig(patches, workers=workers), ids=store.ids)
        return perf_counter() - start, meta


def seconds_of_limit(store: RawStore, tokenizer: Tokenizer, patches: int, workers: int) -> float:
    "The rows of 32 materials stand for those of all; making them is not timed."
    tables = [material_rows(store.read(id), tokenizer, patches, 42)[0] for id in store.ids[::len(store.ids) // 32][:32]]
    tokens = [table["input_ids"].chunk(0).values.to_numpy().tobytes() for table in tables]
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        work = partial(disk_and_zstd, root=str(store.root), tokens=tokens, out=folder)
        sum(in_order(work, batches(store.ids, max(1, 512 // patches)), workers))
        return perf_counter() - start


def measure(store: RawStore, layout: str, patches: int, workers: int, repeats: int) -> dict[str, Any]:
    tokenizer = Tokenizer(layout, PUBLISHED_DENSITY)
    ours, limits = [], []
    for _ in range(repeats):  # in turn, so that both see the same machine
        limits.append(seconds_of_limit(store, tokenizer, patches, workers))
        taken, meta = seconds_of_tokenize(store, tokenizer, patches, workers)
        ours.append(taken)
    rows, best, limit = meta["rows"], min(ours), min(limits)
    return {"layout": layout, "patches_per_material": patches, "workers": workers, "materials": len(meta["materials"]),
            "rows": rows, "seconds": ours, "limit_seconds": limits, "rows_per_s": rows / best,
            "rows_per_s_all": [rows / s for s in ours], "tokens_per_s": meta["tokens"] / best,
            "limit_rows_per_s": rows / limit, "share_of_limit": limit / best,
            "bytes_written": sum(shard["bytes"] for shard in meta["shards"].values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store in a local folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--patches", type=int, nargs="+", default=[32])
    parser.add_argument("--layouts", nargs="+", default=["framed", "anchored"], choices=["framed", "anchored"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="write the numbers as JSON")
    args = parser.parse_args()
    os.environ["TOMAT_PROGRESS"] = "0"
    try:
        store = RawStore(args.store)
        results = [measure(store, layout, patches, args.workers, args.repeats)
                   for layout in args.layouts for patches in args.patches]
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    for r in results:
        reached = r["rows_per_s"] >= TARGET_ROWS_PER_S or r["share_of_limit"] >= TARGET_SHARE
        print(f"{r['layout']}, {r['patches_per_material']} patches a material, {r['workers']} workers: "
              f"{r['rows_per_s']:,.0f} rows/s ({r['tokens_per_s'] / 1e6:.1f} M tokens/s); disk and zstd alone "
              f"{r['limit_rows_per_s']:,.0f} rows/s; ratio {r['share_of_limit']:.2f}; target {'reached' if reached else 'missed'}")
    if args.out:
        command = " ".join(["python results/tokenize/bench_data.py STORE", *sys.argv[2:]])
        write_json(args.out, {"command": command, "cores": os.cpu_count(), "load": os.getloadavg(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
