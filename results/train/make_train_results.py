"""Train `nano` on four rows, for an epoch at several learning rates, and on rows shuffled more or less; write the curves.

    OMP_NUM_THREADS=1 python results/train/make_train_results.py STORE

overfit.csv: four rows of one material, every step.
sweep.csv: one epoch of the training part of STORE at each learning rate, every step, the held-out loss
twelve times.
order.csv: the demo's language model on the packaged sample, with rows shuffled among some materials or among all.
Rows of the first two are framed and hold patches of 4 voxels a side, 8 of every training material and 4 of every validation
material; their tokens encode the difference to the sum of atomic densities, in 256 levels fitted to the training part. The loss
is on density tokens. One thread; `--only order` makes one file.
"""
import argparse
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tomat.tokens.codecs import POSITIONS
from tomat.tokens.levels import fit_levels
from tomat.tokens.fit_codec import fit_histogram, histogram_of
from tomat.density.metrics import nmae
from tomat.prediction.predictors import load_predictor
from tomat.atoms.sad import with_sad
from tomat.train.log import read_log
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.store import RawStore, sample_store
from tomat.dataset.stream import Batches, ParquetRows
from tomat.study.site import write_table
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.causal import RunConfig, TrainConfig, train

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
BATCH, EVALUATIONS = 16, 12
SWEEP_SEEDS = (0,)
WINDOWS, SEEDS = (1024, 8192), (0, 1, 2)


def make_rows(store: RawStore, folder: str) -> int:
    "Rows of both parts, and four rows of one material; how many the training part has."
    train_ids, val_ids = store.split("train"), store.split("validation")
    codec = fit_histogram(histogram_of(train_ids, store.read, "difference", prepare=with_sad), 256)
    tokenizer = Tokenizer("framed", codec, patch_size=4, pad_to=None, target="difference")
    meta = tokenize(store, tokenizer, f"{folder}/train", TokenizeConfig(8, label="train", prepare=with_sad), ids=train_ids)
    tokenize(store, tokenizer, f"{folder}/val", TokenizeConfig(4, label="validation", prepare=with_sad), ids=val_ids)
    tokenize(store, tokenizer, f"{folder}/four", TokenizeConfig(4, label="four rows", prepare=with_sad), ids=train_ids[:1])
    return int(meta["rows"])


def curve(run: str, config: TrainConfig) -> list[dict[str, Any]]:
    "The log of a run as lines of a table."
    return [{"seed": config.seed, "lr_peak": config.lr, "step": line["step"], "tokens": line["tokens"],
             "lr": f"{line['lr']:.6g}", "loss": f"{line['loss']:.5f}", "grad_norm": f"{line['grad_norm']:.4f}",
             "val_loss": f"{line['val']['loss']:.5f}" if "val" in line else "", "seconds": f"{line['time']['seconds']:.3f}"}
            for line in read_log(run)]


def overfit(folder: str) -> list[dict[str, Any]]:
    "A hundred and twenty steps on the same four rows."
    config = TrainConfig(steps=120, batch_size=4, lr=2e-3)
    train(f"{folder}/four", f"{folder}/overfit", config)
    return curve(f"{folder}/overfit", config)


def sweep(folder: str, n_rows: int) -> list[dict[str, Any]]:
    "An epoch at each learning rate, with each seed."
    lines, steps = list[dict[str, Any]](), n_rows // BATCH
    for seed, lr in product(SWEEP_SEEDS, RATES):
        config = TrainConfig(steps=steps, batch_size=BATCH, lr=lr, seed=seed, eval_every=steps // EVALUATIONS)
        train(f"{folder}/train", f"{folder}/{seed}-{lr}", config, RunConfig(save_every=steps), val=f"{folder}/val")
        lines += curve(f"{folder}/{seed}-{lr}", config)
        print(f"seed {seed}, peak rate {lr:g}: held-out loss {lines[-1]['val_loss']}", flush=True)
    return lines


def order(folder: str) -> list[dict[str, Any]]:
    "300 steps for each window and seed: the materials seen, and the scores."
    store, lines = sample_store(), list[dict[str, Any]]()
    training, validation = ([store.read(id) for id in store.split(part)] for part in ("train", "validation"))
    tokenizer = Tokenizer("framed", POSITIONS, patch_size=6, pad_to=None, target="difference")
    values = np.concatenate([tokenizer.target_of(density).ravel() for density in training])
    tokenizer = replace(tokenizer, density_codec=fit_levels(values, 256))
    tokenize(training, tokenizer, f"{folder}/demo", TokenizeConfig(96, seed=42, label="demo"))
    tokenize(validation, tokenizer, f"{folder}/validation", TokenizeConfig(8, seed=42, label="validation"))
    for seed in SEEDS:
        for window in WINDOWS:
            config = TrainConfig(steps=300, batch_size=8, lr=4e-3, window=window, seed=seed, eval_every=300)
            blocks = islice(Batches(ParquetRows(f"{folder}/demo", seed, window), config.batch_size), config.steps)
            seen = {material for block in blocks for material in block.materials.tolist()}
            start = time.process_time()
            model = train(f"{folder}/demo", f"{folder}/{seed}-{window}", config, val=f"{folder}/validation")
            seconds = time.process_time() - start
            causal, last = load_predictor(model, strategy="median"), read_log(model.parent)[-1]
            errors = [nmae(causal.predict(true.structure, true.shape).density.total, true.total) for true in validation]
            lines.append({"seed": seed, "window": window, "rows": config.steps * config.batch_size, "materials": len(training),
                          "materials_seen": len(seen), "val_loss": f"{last['val']['loss']:.5f}",
                          "nmae": f"{sum(errors) / len(errors):.6f}", "cpu_seconds": round(seconds)})
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store with the parts train and validation")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--only", choices=("overfit", "sweep", "order"), nargs="+", default=("overfit", "sweep", "order"))
    args = parser.parse_args()
    os.environ["TOMAT_PROGRESS"] = "0"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        n_rows = make_rows(RawStore(args.store), folder) if set(args.only) - {"order"} else 0
        for name, made in (("overfit", partial(overfit, folder)), ("sweep", partial(sweep, folder, n_rows)),
                           ("order", partial(order, folder))):
            if name in args.only:
                write_table(args.out / f"{name}.csv", made())


if __name__ == "__main__":
    main()
