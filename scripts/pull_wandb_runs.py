"""Runs of Weights & Biases as a table: one line a run, and on request one a step and quantity.

    python scripts/pull_wandb_runs.py --out runs.csv [--group GROUP]      # of the project in settings.ini, or TOMAT_WANDB_PROJECT
    python scripts/pull_wandb_runs.py FOLDER --out runs.csv               # of offline runs below a folder; no account is needed
    python scripts/pull_wandb_runs.py FOLDER --out runs.csv --history steps.csv
"""
import argparse
import sys

from tomat.files import TomatError
from tomat.pull import offline_runs, online_runs, run_of, write_history
from tomat.scaling import write_runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="where offline runs are, at any depth; the project online if not given")
    parser.add_argument("--out", required=True, help=".csv, a line a run")
    parser.add_argument("--history", help=".csv, a line a run, step and quantity")
    parser.add_argument("--group", default="", help="online: only runs of this group")
    args = parser.parse_args()
    try:
        logged = offline_runs(args.folder) if args.folder else online_runs(args.group)
        write_runs(map(run_of, logged), args.out)
        lines = write_history(logged, args.history) if args.history else 0
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    print(f"{len(logged)} runs in {args.out}" + (f", {lines:,} numbers in {args.history}" if args.history else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
