"""Draw loss against compute, and MFU against devices, of one or more tables of runs.

    python scripts/make_scaling_plot_png.py results/scaling/published_runs.csv [MORE.csv …] --out scaling.png
"""
import argparse
import sys

from tomat.io.remote import TomatError
from tomat.io.files import atomic_write
from tomat.study.scaling import plot_runs, read_runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", help="written by pull_wandb_runs.py, or of the same columns")
    parser.add_argument("--out", required=True, help=".png")
    args = parser.parse_args()
    try:
        if not args.out.endswith(".png"):
            raise TomatError(f"{args.out} would be a PNG under another name: give a name that ends in .png.")
        runs = [run for table in args.tables for run in read_runs(table)]
        if not runs:
            raise TomatError(f"There is no run in {' or '.join(args.tables)}: give a table with a line or more below its header.")
        figure = plot_runs(runs)
        with atomic_write(args.out) as aside:
            figure.savefig(aside, format="png", dpi=150)
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
