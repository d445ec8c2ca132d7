"""Train on the rows of `tomat tokenize` with Levanter, on TPUs or anywhere JAX runs; the settings are TOMAT_* variables.

TOMAT_LABEL=val-full TOMAT_SIZE=200M TOMAT_STEPS=2000 python marin/train_tomat_tpu.py [--dry-run | --iris CLUSTER]
"""

import argparse
import json
import sys

from tomat.io.remote import TomatError

from tomat_marin.plan import iris_line, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the run as JSON, and stop")
    parser.add_argument("--iris", metavar="CLUSTER", nargs="?", const="CLUSTER",
                        help="print the `iris job run` line of this run on the TPUs of settings.ini, and stop")
    args = parser.parse_args()
    try:
        if args.iris:
            print(iris_line(args.iris))
            return
        if args.dry_run:
            print(json.dumps(plan().about(), indent=1))
            return
        from tomat_marin.run import distributed_config, train
        distributed_config().initialize()  # before anything that asks JAX for its devices
        train(plan())
    except TomatError as err:
        sys.exit(f"tomat: {err}")


if __name__ == "__main__":
    main()
