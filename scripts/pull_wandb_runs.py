"""Runs of Weights & Biases as a table: one line a run, and on request one a step and quantity.

    python scripts/pull_wandb_runs.py --out runs.csv [--group GROUP]      # of the project in settings.ini, or TOMAT_WANDB_PROJECT
    python scripts/pull_wandb_runs.py FOLDER --out runs.csv               # of offline runs below a folder; no account is needed
    python scripts/pull_wandb_runs.py FOLDER --out runs.csv --history steps.csv

A run that cannot be read is left out, with a message. Where none remains, nothing is written and the exit status is 2.
"""
import argparse
import sys

from tomat.io.remote import TomatError
from tomat.study.pull import collecting, offline_runs, online_runs, run_of, write_history
from tomat.study.scaling import write_runs


def pull(args: argparse.Namespace,
         left_out: list[TomatError],  # gets what is wrong with single runs
         ) -> str:  # what was written
    logged = offline_runs(args.folder, left_out) if args.folder else online_runs(args.group)
    kept, runs = [], []
    for one in logged:
        with collecting(left_out):
            runs.append(run_of(one))
            kept.append(one)
    if not runs:
        raise TomatError(f"No run remains for {args.out}, so it is not written: name a folder or a project with runs of tomat.")
    write_runs(runs, args.out)
    lines = write_history(kept, args.history) if args.history else 0
    return (f"{len(runs)} runs in {args.out}" + (f", {len(left_out)} left out" if left_out else "")
            + (f", {lines:,} numbers in {args.history}" if args.history else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="where offline runs are, at any depth; the project online if not given")
    parser.add_argument("--out", required=True, help=".csv, a line a run")
    parser.add_argument("--history", help=".csv, a line a run, step and quantity")
    parser.add_argument("--group", default="", help="online: only runs of this group")
    args = parser.parse_args()
    left_out: list[TomatError] = []
    message = ""
    with collecting(left_out):
        message = pull(args, left_out)
    for err in left_out:
        print(err, file=sys.stderr)
    if message:
        print(message)
    return 0 if message else 2


if __name__ == "__main__":
    sys.exit(main())
