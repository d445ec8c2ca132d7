"""Damaged input for every reader, more of it than the tests have time for.

    python scripts/fuzz.py [N] [--only NAME ...]

N mutations of each reader, 20,000 if not given. The lines of results/fuzz/fuzz.csv are written again, of the named readers alone
with --only. The readers, the mutations and what is expected are in tests/fuzzing.py. The exit code is 1 if anything unexpected was
found.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "results/fuzz/fuzz.csv"
sys.path.insert(0, str(ROOT / "tests"))

from fuzzing import READERS, Fuzzer

from tomat.study.site import write_table


def row_of(name: str, n: int) -> dict[str, object]:
    "The figures of a reader; what was unexpected is printed."
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = Fuzzer(name, Path(folder)).run(n)
    print(*outcome.unexpected, sep="\n", end="\n" if outcome.unexpected else "")
    return {"reader": name, "inputs": outcome.inputs, "read": outcome.read, "refused": outcome.refused,
            "slowest_ms": round(1000 * outcome.slowest_s, 1), "peak_mb": round(outcome.peak_bytes / 2**20, 1),
            "unexpected": len(outcome.unexpected), "seconds": round(time.monotonic() - begun)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, nargs="?", default=20_000)
    parser.add_argument("--only", nargs="*", choices=READERS)
    args = parser.parse_args()
    os.environ["TOMAT_PROGRESS"] = "0"
    warnings.simplefilter("error")  # as in the tests
    before = list(csv.DictReader(TABLE.read_text().splitlines())) if TABLE.exists() else []
    rows: dict[str, dict[str, object]] = {row["reader"]: dict(row) for row in before}
    names = args.only or list(READERS)
    for name in names:
        rows[name] = row_of(name, args.n)
        print(rows[name], flush=True)
        write_table(TABLE, [rows[name] for name in READERS if name in rows])
    if any(rows[name]["unexpected"] for name in names):
        raise SystemExit("something unexpected was found")


if __name__ == "__main__":
    main()
