"""Measure what forecasts need: the seconds that tokenizing takes, and the held-out loss of four small models.

    OMP_NUM_THREADS=1 python results/scaling/make_scaling_results.py STORE [--only rates sizes] [--work FOLDER]

tokenize_rates.csv: CPU seconds for one shard of one material, read, cut and written, by voxels and rows, the best of three.
Materials are those of STORE, every eighth, and repetitions of some, so that grids reach four million voxels.
small_runs.csv: models of four sizes at a constant learning rate on rows that are never seen twice; the loss on held-out
materials along the way. Rows are as in make_train_results.py. One thread; with --work, what was stopped goes on.
"""
import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.density.core import Density
from tomat.tokens.fit_codec import fit_histogram, histogram_of
from tomat.density.formats import write_density
from tomat.models.sizes import MODELS, ModelSize, n_parameters
from tomat.dataset.parquet import TokenizeConfig, shard_rows, write_shard
from tomat.train.config import RunConfig, TrainConfig
from tomat.io.progress import track
from tomat.atoms.sad import with_sad
from tomat.train.log import read_log
from tomat.dataset.meta import read_meta
from tomat.dataset.shards import tokenize
from tomat.density.source import Folder
from tomat.density.store import RawStore
from tomat.study.site import write_table
from tomat.tokens.tokenizer import Tokenizer, tokenizer_from_dict
from tomat.train.causal import train

SIZES = {"w24": ModelSize(24, 2, 2, 96), "w32": ModelSize(32, 2, 2, 128), "w48": ModelSize(48, 3, 3, 192),
         "w64": ModelSize(64, 4, 4, 256)}
STEPS, BATCH = 320, 16
SCORED = (20, 40, 80, 160, 240, 320)  # steps


def repeated(density: Density, n: int) -> Density:
    "A crystal whose cell is n × n × n of another's, with noise so small that it is no other density, and packs no better."
    rng = np.random.default_rng(n)
    values = np.tile(density.values, (n, n, n)) * n**3
    noisy = (values * (1 + 1e-3 * rng.standard_normal(values.shape))).astype(np.float32)
    return replace(density, values=noisy, structure=density.structure.make_supercell(n, in_place=False), id=f"{density.id}-{n}",
                   sad=None)


def groups(store: RawStore, folder: str) -> Iterator[str]:
    "Zarr groups of all sizes."
    for id in store.ids[::8]:
        yield f"{store.root}/label/{id}.zarr"
    large = sorted((store.read(id) for id in store.ids[::8]), key=lambda density: density.total.size)
    for density, n in [(large[len(large) // 2], 2), (large[-8], 2), (large[-1], 2), (large[len(large) // 2], 3), (large[-4], 3)]:
        write_density(repeated(density, n), f"{folder}/{density.id}-{n}.zarr")
        yield f"{folder}/{density.id}-{n}.zarr"


def rates(store: RawStore) -> list[dict[str, Any]]:
    "Lines of tokenize_rates.csv."
    tokenizer, lines = Tokenizer("anchored", PUBLISHED_DENSITY), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for path in track(list(groups(store, folder)), "rates", unit="materials"):
            source = Folder(path)
            for n in (8, 32, 128):
                seconds = []
                for _ in range(3):
                    start = process_time()
                    tables, notes = shard_rows(source.read, source.ids, tokenizer, TokenizeConfig(n))
                    if tables:
                        write_shard(tables, notes, f"{folder}/rows.parquet", durable=False)
                    seconds.append(process_time() - start)
                if tables:
                    voxels = source.read(source.ids[0]).total.size
                    lines.append({"voxels": voxels, "rows": n, "cpu_seconds": f"{min(seconds):.6f}"})
    return sorted(lines, key=lambda line: (line["rows"], line["voxels"]))


def small_runs(store: RawStore, work: str) -> list[dict[str, Any]]:
    "Lines of small_runs.csv."
    ids, lines = store.split("train"), list[dict[str, Any]]()
    if not Path(work, "val", "meta.json").exists():
        codec = fit_histogram(histogram_of(ids, store.read, "difference", prepare=with_sad), 256)
        tokenizer = Tokenizer("framed", codec, patch_size=4, pad_to=None, target="difference")
        tokenize(store, tokenizer, f"{work}/train", TokenizeConfig(24, label="train", prepare=with_sad), ids=ids)
        tokenize(store, tokenizer, f"{work}/val", TokenizeConfig(4, label="val", prepare=with_sad), ids=store.split("validation"))
    n_ids = tokenizer_from_dict(read_meta(f"{work}/train")["tokenizer"]).vocab.size
    for name, size in SIZES.items():
        MODELS[name] = size
        config = TrainConfig(name, STEPS, BATCH, 3e-3, 20, "constant", eval_every=20)
        train(f"{work}/train", f"{work}/{name}", config, RunConfig(save_every=40, device="cpu"), val=f"{work}/val")
        for line in (line for line in read_log(f"{work}/{name}") if line["step"] in SCORED):
            lines.append({"model": name, "vocab_size": n_ids, "parameters": n_parameters(size, n_ids), "tokens": line["tokens"],
                          "flops": f"{line['flops']:.4g}", "loss": f"{line['val']['loss']:.5f}"})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store in a local folder, with the parts train and validation")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--only", choices=("rates", "sizes"), nargs="+", default=("rates", "sizes"))
    parser.add_argument("--work", help="folder for rows and runs; a new one if not given")
    args = parser.parse_args()
    os.environ["TOMAT_PROGRESS"] = "0"
    torch.set_num_threads(1)
    store = RawStore(args.store)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            name = {"rates": "tokenize_rates", "sizes": "small_runs"}[part]
            lines = rates(store) if part == "rates" else small_runs(store, args.work or folder)
            write_table(args.out / f"{name}.csv", lines)


if __name__ == "__main__":
    main()
