"""Look at every material of a raw store and keep what the page about a data set shows: materials.csv and tokens.csv.

    python scripts/make_data_set_results.py STORE [--out results/data_set]

materials.csv has a line a material: part, formula, class, atoms, grid, cell, spacings, electrons, row lengths, clipped values.
tokens.csv counts density tokens of whole grids (two_token_9_12): all 512 first tokens, and the 4,096 second ones in bins of 64.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tomat.density.classify import classify
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.density.core import Density
from tomat.io.files import TomatError, atomic_write
from tomat.io.progress import track
from tomat.density.store import RawStore
from tomat.tokens.tokenizer import Tokenizer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "data_set"
FIRST, SECOND = PUBLISHED_DENSITY.vocab_sizes
BIN = 64  # second tokens of one line


def line_of(density: Density, part: str, clipped: int) -> dict[str, Any]:
    "What materials.csv says of a material."
    sides, spacing = dict(zip(("nx", "ny", "nz"), density.shape, strict=True)), density.spacing
    lengths = {f"{layout}_tokens": Tokenizer(layout, PUBLISHED_DENSITY).row_length(len(density.structure))
               for layout in ("framed", "anchored")}
    return {"id": density.id, "part": part, "formula": density.formula, "class": classify(density.structure),
            "atoms": len(density.structure), **sides, "volume": round(density.volume, 3),
            **{f"spacing_{axis}": round(step, 4) for axis, step in zip("abc", spacing, strict=True)},
            "electrons": round(density.n_electrons, 4),
            "smallest": f"{density.rho.min():.4g}", "largest": f"{density.rho.max():.4g}",
            **lengths, "clipped": clipped}


def look(store: RawStore) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    "Lines of materials.csv, and for each part how often each bin of tokens comes."
    lines, counts = [], {part: np.zeros(FIRST + SECOND // BIN, np.int64) for part in store.splits}
    for part, id in track([(part, id) for part, ids in store.splits.items() for id in ids], "look", unit="materials"):
        density = store.read(id)
        tokens_nx2, clipped = PUBLISHED_DENSITY.encode(density.total.reshape(-1))
        counts[part][:FIRST] += np.bincount(tokens_nx2[:, 0], minlength=FIRST)
        counts[part][FIRST:] += np.bincount(tokens_nx2[:, 1] // BIN, minlength=SECOND // BIN)
        lines.append(line_of(density, part, clipped))
    return lines, counts


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    "A table, whole or not at all."
    with atomic_write(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        lines, counts = look(RawStore(args.store))
        write_csv(args.out / "materials.csv", list(lines[0]), (list(line.values()) for line in lines))
        names = [("first", i) for i in range(FIRST)] + [("second", i * BIN) for i in range(SECOND // BIN)]
        values = zip(*(part.tolist() for part in counts.values()), strict=True)
        write_csv(args.out / "tokens.csv", ["token", "from", *counts], ([*name, *n] for name, n in zip(names, values, strict=True)))
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    print(f"wrote {len(lines)} materials to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
