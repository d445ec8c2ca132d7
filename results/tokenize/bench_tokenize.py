"""Rows a second of the tokenizer (cut + encode + row) on one core, beside the bare arithmetic of its codec.

    python results/tokenize/bench_tokenize.py [FILE] [--patches 32 1024] [--layouts framed anchored] [--repeats 20] [--json]
"""

import os

for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM"):
    os.environ[f"{name}_NUM_THREADS"] = "1"  # before numpy is imported: its pools read these once

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.density.core import Density
from tomat.io.remote import TomatError
from tomat.density.formats import read_density
from tomat.tokens.patches import cut, random_offsets
from tomat.tokens.tokenizer import Tokenizer

PUBLISHED_ROWS_PER_S = 92  # published, same kind of machine
NACL = Path(__file__).parents[2] / "tests/files/CHGCAR.NaCl.gz"


def bare_arithmetic(values: np.ndarray) -> np.ndarray:
    "The codec's formula over values that are already cut, with no checks, no rows and no blocks."
    codec = PUBLISHED_DENSITY
    m = np.abs(values)
    np.log10(np.maximum(m, 1e-15, out=m), out=m)
    np.clip(m, codec.log_min, codec.log_max, out=m)
    m -= codec.log_min
    m /= codec.log_max - codec.log_min
    m *= 2 ** sum(codec.bits) - 1
    b = m.astype(np.int32)
    return np.stack([(b >> codec.bits[1]) + (values < 0) * 2 ** codec.bits[0], b & 2 ** codec.bits[1] - 1], axis=-1)


def seconds(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    "Best and median of some repeats, after one that warms up."
    work()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times), median(times)


def measure(density: Density, layout: str, n: int, repeats: int) -> dict[str, Any]:
    "One line of the table."
    tok = Tokenizer(layout, PUBLISHED_DENSITY)
    offsets = random_offsets(density.shape, n, np.random.default_rng(42))
    best, middle = seconds(lambda: tok.encode(density, offsets), repeats)
    by_grid = n * np.prod(tok.size) > density.total.size
    values = density.total if by_grid else cut(density.total, offsets, tok.size)
    floor, _ = seconds(lambda: bare_arithmetic(values), repeats)
    real, padded = tok.row_length(len(density.structure)), tok.pad_to or 0
    return {"layout": layout, "patches": n, "best_s": best, "median_s": middle, "floor_s": floor,
            "encoded": "grid" if by_grid else "patches", "rows_per_s": n / best, "rows_per_s_median": n / middle,
            "tokens_per_s": n * real / best, "padded_tokens_per_s": n * padded / best,
            "times_published": n / best / PUBLISHED_ROWS_PER_S, "times_floor": best / floor}


COLUMNS = {  # heading: how a result is written under it
    "layout": "{layout}", "patches": "{patches:,}", "encoded": "{encoded}",
    "best ms": "{best_ms:.2f}", "median ms": "{median_ms:.2f}",
    "best rows/s": "{rows_per_s:,.0f}", "(median)": "({rows_per_s_median:,.0f})",
    "tokens/s": "{Mtokens:.1f} M", "padded": "{Mpadded:.1f} M", "× published": "{times_published:.0f}×",
    "arithmetic ms": "{floor_ms:.2f}", "× arithmetic": "{times_floor:.2f}×"}


def table(density: Density, results: list[dict[str, Any]]) -> str:
    "What a person reads."
    rows = [list(COLUMNS)]
    for r in results:
        shown = {**r, "best_ms": 1e3 * r["best_s"], "median_ms": 1e3 * r["median_s"], "floor_ms": 1e3 * r["floor_s"],
                 "Mtokens": r["tokens_per_s"] / 1e6, "Mpadded": r["padded_tokens_per_s"] / 1e6}
        rows.append([cell.format(**shown) for cell in COLUMNS.values()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    grid = " × ".join(map(str, density.shape))
    return "\n".join([
        f"{density.formula}, grid {grid}, P = 14, two_token_9_12, rows padded to 8,192, one core",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        f"× published: best against {PUBLISHED_ROWS_PER_S} rows/s (published, same kind of machine)",
        "arithmetic: best time of numpy's bare arithmetic of the codec on the values encoded, in the same run"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=NACL, help="any density file (default: the tests' rock salt)")
    parser.add_argument("--patches", type=int, nargs="+", default=[32, 1024])
    parser.add_argument("--layouts", nargs="+", default=["framed", "anchored"], choices=["framed", "anchored"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        density = read_density(args.file)
        results = [measure(density, layout, n, args.repeats) for layout in args.layouts for n in args.patches]
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    print(json.dumps(results, indent=1) if args.json else table(density, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
