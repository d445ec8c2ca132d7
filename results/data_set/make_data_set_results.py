"""Look at every material of a raw store and keep what the page about a data set shows: materials.csv and tokens.csv.

    python results/data_set/make_data_set_results.py STORE [--out results/data_set]

materials.csv has a line a material: part, formula, class, atoms, grid, cell, spacings, electrons, row lengths, clipped values.
tokens.csv counts density tokens of whole grids (two_token_9_12): all 512 first tokens, and the 4,096 second ones in bins of 64.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from tomat.density.classify import classify
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.density.core import Density
from tomat.io.progress import track
from tomat.density.store import RawStore
from tomat.run.launch import sentences
from tomat.study.site import write_table
from tomat.tokens.tokenizer import Tokenizer

FIRST, SECOND = PUBLISHED_DENSITY.vocab_sizes
BIN = 64  # second tokens of one line


def line_of(density: Density, part: str, clipped: int) -> dict[str, Any]:
    "The line of a material in materials.csv."
    sides, spacing = dict(zip(("nx", "ny", "nz"), density.shape, strict=True)), density.spacing
    lengths = {f"{layout}_tokens": Tokenizer(layout, PUBLISHED_DENSITY).row_length(len(density.structure))
               for layout in ("framed", "anchored")}
    return {"id": density.id, "part": part, "formula": density.formula, "class": classify(density.structure),
            "atoms": len(density.structure), **sides, "volume": str(round(density.volume, 3)),
            **{f"spacing_{axis}": round(step, 4) for axis, step in zip("abc", spacing, strict=True)},
            "electrons": str(round(density.n_electrons, 4)),
            "smallest": f"{density.rho.min():.4g}", "largest": f"{density.rho.max():.4g}",
            **lengths, "clipped": clipped}


def look(store: RawStore) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    "Lines of materials.csv, and for each part the count of each bin of tokens."
    lines, counts = [], {part: np.zeros(FIRST + SECOND // BIN, np.int64) for part in store.splits}
    for part, id in track([(part, id) for part, ids in store.splits.items() for id in ids], "look", unit="materials"):
        density = store.read(id)
        tokens_nx2, clipped = PUBLISHED_DENSITY.encode(density.total.reshape(-1))
        counts[part][:FIRST] += np.bincount(tokens_nx2[:, 0], minlength=FIRST)
        counts[part][FIRST:] += np.bincount(tokens_nx2[:, 1] // BIN, minlength=SECOND // BIN)
        lines.append(line_of(density, part, clipped))
    return lines, counts


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    args = parser.parse_args()
    lines, counts = look(RawStore(args.store))
    write_table(args.out / "materials.csv", lines)
    names = [("first", i) for i in range(FIRST)] + [("second", i * BIN) for i in range(SECOND // BIN)]
    values = zip(*(part.tolist() for part in counts.values()), strict=True)
    write_table(args.out / "tokens.csv", ({"token": token, "from": low} | dict(zip(counts, n, strict=True))
                                          for (token, low), n in zip(names, values, strict=True)))
    print(f"wrote {len(lines)} materials to {args.out}")


if __name__ == "__main__":
    main()
