"""Train `nano` for one epoch on the training part of a store, once for each learning rate, and write the curves.

    OMP_NUM_THREADS=1 python scripts/make_train_results.py STORE --out results/train

Rows are framed and hold patches of 4 voxels a side, 8 of every training material and 4 of every validation material; their
tokens say the difference to the sum of free atoms in 256 levels fitted to the training part. The loss is on density tokens.
sweep.csv: every step of every run, the held-out loss twelve times. Also trains on four rows alone: overfit.csv.
"""
import argparse
import csv
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tomat.files import write_aside
from tomat.fit import fit_codec
from tomat.promolecule import with_promolecule
from tomat.runs import read_log
from tomat.shards import tokenize
from tomat.store import RawStore
from tomat.tokenizer import Tokenizer
from tomat.train import Setup, TrainConfig, train

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
BATCH, EVALUATIONS = 16, 12


def make_rows(store: RawStore, folder: str) -> int:
    "Rows of both parts, and four rows of one material; how many the training part has."
    train_ids, val_ids = store.split("train"), store.split("validation")
    codec, _ = fit_codec(train_ids, store.read, 256, "l1", "difference", prepare=with_promolecule)
    tokenizer = Tokenizer("framed", codec, patch_size=4, pad_to=None, target="difference")
    meta = tokenize(store, tokenizer, f"{folder}/train", 8, ids=train_ids, prepare=with_promolecule, label="train")
    tokenize(store, tokenizer, f"{folder}/val", 4, ids=val_ids, prepare=with_promolecule, label="validation")
    tokenize(store, tokenizer, f"{folder}/four", 4, ids=train_ids[:1], prepare=with_promolecule, label="four rows")
    return int(meta["rows"])


def curve(run: str, config: TrainConfig) -> list[dict[str, Any]]:
    "The log of a run as lines of a table."
    return [{"optimizer": config.optimizer, "lr_peak": config.lr, "step": line["step"], "tokens": line["tokens"],
             "lr": f"{line['lr']:.6g}", "loss": f"{line['loss']:.5f}", "grad_norm": f"{line['grad_norm']:.4f}",
             "val_loss": f"{line['val']['loss']:.5f}" if "val" in line else "", "seconds": f"{line['time']['seconds']:.3f}"}
            for line in read_log(run)]


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    with write_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store with the parts train and validation")
    parser.add_argument("--out", type=Path, default=Path("results/train"))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    args = parser.parse_args()
    os.environ["TOMAT_PROGRESS"] = "0"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        n_rows = make_rows(RawStore(args.store), folder)
        four = TrainConfig(steps=120, batch_size=4, lr=2e-3)
        train(f"{folder}/four", f"{folder}/overfit", four)
        write_csv(args.out / "overfit.csv", curve(f"{folder}/overfit", four))
        lines: list[dict[str, Any]] = []
        for lr in args.rates:
            steps = n_rows // BATCH
            config = TrainConfig(steps=steps, batch_size=BATCH, lr=lr, eval_every=steps // EVALUATIONS)
            start = time.perf_counter()
            train(f"{folder}/train", f"{folder}/{lr}", config, Setup(save_every=steps), val=f"{folder}/val")
            lines += curve(f"{folder}/{lr}", config)
            write_csv(args.out / "sweep.csv", lines)
            print({**asdict(config), "seconds": round(time.perf_counter() - start), "val": lines[-1]["val_loss"]}, flush=True)


if __name__ == "__main__":
    main()
