"""Language models with and without guides beside the packaged network, on a whole part of a store: results/evaluation/.

    python results/evaluation/make_evaluation_results.py train STORE RUN [--steps 950]
    python results/evaluation/make_evaluation_results.py guided STORE RUN [--steps 5000]
    python results/evaluation/make_evaluation_results.py evaluate STORE RUN
    python results/evaluation/make_evaluation_results.py options STORE RUN [--materials 6]

train: framed rows of the part train (difference to the sum of atomic densities, fitted levels), then the nano model on one thread.
guided: the nano model on guided rows of fresh patches, hidden from every density, on one thread. evaluate: all on whole grids of
the part validation; each has a folder of its own in RUN/scores, so a new packaged checkpoint costs only its own predictions; of a
language model that RUN does not have, the scores stay as they are. options: overlapping patches, and predictions averaged over
the six orders of the lattice vectors, on the materials with the smallest grids.
A run that was stopped goes on.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from pymatgen.core import Lattice, Structure

from tomat.density.core import RHO
from tomat.tokens.fit_codec import fit_histogram, histogram_of
from tomat.tokens.levels import fit_levels
from tomat.prediction.evaluate import evaluate
from tomat.io.files import read_json, write_json
from tomat.density.metrics import nmae
from tomat.train.config import RunConfig, TrainConfig
from tomat.models.causal import load_checkpoint
from tomat.prediction.causal import CausalPredictor
from tomat.prediction.predictors import ProbePredictor, load_predictor
from tomat.prediction.core import Predictor
from tomat.io.progress import track
from tomat.atoms.sad import with_sad
from tomat.prediction.report import evaluation_summary, scores_csv
from tomat.train.log import read_log
from tomat.prediction.scores import Score, seam
from tomat.dataset.meta import read_meta
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.store import RawStore
from tomat.run.launch import sentences
from tomat.study.site import read_table, write_table
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.causal import train

RESULTS = Path(__file__).resolve().parent
COMMAND = "python results/evaluation/make_evaluation_results.py"
SEED = 42  # of the positions of patches
PATCH_SIZE, FRAMED_LEVELS, STRATEGY = 6, 256, "median"  # of the model on framed rows
PATCHES = 32  # rows a material
LEVELS = 1024  # of the guided model's codec
SOFT = 0.005   # e/Å³, width of its soft targets


def rounded(value: Any) -> Any:
    "Six digits of every float, at any depth."
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return type(value)(map(rounded, value)) if isinstance(value, list | tuple) else value


def tokenizer_for(store: RawStore) -> Tokenizer:
    "Levels fitted to every seventh voxel."
    def differences(id: str) -> np.ndarray:
        density = with_sad(store.read(id))
        assert density.sad is not None
        return (density.total - density.sad).ravel()[::7]
    values = np.concatenate([differences(id) for id in track(store.split("train"), "read", unit="materials")])
    return Tokenizer("framed", fit_levels(values, FRAMED_LEVELS), patch_size=PATCH_SIZE, pad_to=None, target="difference")


def make_causal(store: RawStore, run: Path, steps: int) -> None:
    rows, config = run / "rows", TrainConfig(steps=steps, batch_size=8, lr=4e-3)
    if not (rows / "meta.json").exists():
        patches = TokenizeConfig(PATCHES, seed=SEED, label="train", prepare=with_sad)
        tokenize(store, tokenizer_for(store), rows, patches, store.split("train"))
    start = process_time()
    train(rows, run / "causal", config)
    spent = process_time() - start  # of this call: too little for a run that was resumed
    log, meta = read_log(run / "causal"), read_meta(rows)
    losses = [line["loss"] for line in log]
    write_json(RESULTS / "train.json", rounded({
        "command": f"{COMMAND} train STORE RUN", **config.written(), "patch_size": PATCH_SIZE,
        "levels": FRAMED_LEVELS, "materials": len(meta["materials"]), "rows": meta["rows"], "rows_read": steps * config.batch_size,
        "tokens_read": log[-1]["tokens"], "loss_first": losses[0], "loss_last_100": float(np.mean(losses[-100:])),
        "seconds": sum(line["time"]["seconds"] for line in log), "cpu_seconds": spent, "threads": torch.get_num_threads()}))


def make_guided(store: RawStore, run: Path, steps: int) -> None:
    "As `tomat fit-codec`, `tomat tokenize` and `tomat train rows --fresh STORE` do."
    rows = run / "guided-rows"
    config = TrainConfig(steps=steps, batch_size=12, optimizer="muon", warmup=50, noise=1.0, soft=SOFT, schedule="cosine50")
    if not (rows / "meta.json").exists():
        codec = fit_histogram(histogram_of(store.split("train"), store.read, "difference", RHO, with_sad), LEVELS)
        tokenizer = Tokenizer("guided", codec, patch_size=4, pad_to=None, target="difference", unit=RHO)
        tokenize(store, tokenizer, rows, TokenizeConfig(2, seed=SEED, label="guided", prepare=with_sad), store.split("train"))
    train(rows, run / "guided", config, RunConfig(save_every=500), fresh=store)
    log, meta = read_log(run / "guided"), read_meta(rows)
    write_json(RESULTS / "guided.json", rounded({
        "command": f"{COMMAND} guided STORE RUN", **config.written(), "patch_size": 4, "levels": LEVELS,
        "materials": len(meta["materials"]), "rows_read": steps * config.batch_size, "tokens_read": log[-1]["tokens"],
        "seconds": sum(line["time"]["seconds"] for line in log), "cpu_seconds": sum(line["time"]["cpu_seconds"] for line in log),
        "threads": torch.get_num_threads()}))


def causal_of(run: Path) -> CausalPredictor:
    return CausalPredictor(*load_checkpoint(run / "causal" / "model"), STRATEGY)


def kept_scores(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    "The lines and the entries of a decoder in the tables there are."
    lines = [line for line in read_table(RESULTS / "scores.csv") if str(line["entry"]).startswith(name)]
    entries = read_json(RESULTS / "summary.json")["entries"]
    return lines, {entry: means for entry, means in entries.items() if entry.startswith(name)}


def make_scores(store: RawStore, run: Path) -> None:
    packaged = load_predictor()
    assert isinstance(packaged, ProbePredictor)
    predictors: dict[str, Predictor] = {"probe": packaged}
    lines, entries = list[dict[str, Any]](), dict[str, Any]()
    for name, strategy in (("causal", STRATEGY), ("guided", None)):
        if (run / name / "model").exists():
            predictors[name] = load_predictor(run / name / "model", strategy)
        else:
            kept, means = kept_scores(name)
            lines, entries = lines + kept, entries | means
    ids, skipped = store.split("validation"), dict[str, str]()
    found: dict[str, dict[str, Score]] = {id: {} for id in ids}
    for name, predictor in predictors.items():
        result = evaluate(store, ids, {name: predictor}, run / "scores" / name)
        skipped |= result.skipped
        for line in result.scores:
            found[line.id].setdefault(line.entry, Score(**rounded(asdict(line))))
    scores = [line for lines in found.values() for line in lines.values()]
    metadata, entries = packaged.model.training_metadata, evaluation_summary(scores) | entries
    order = {id: number for number, id in enumerate(ids)}
    table = sorted([*csv.DictReader(scores_csv(scores).splitlines()), *lines], key=lambda line: order[line["id"]])
    write_table(RESULTS / "scores.csv", [{name: line.get(name, "") for name in table[0]} for line in table])
    write_json(RESULTS / "summary.json", rounded({
        "command": f"{COMMAND} evaluate STORE RUN", "skipped": skipped,
        "probe": {"materials": len(metadata["materials"]), "weights": packaged.identity()["weights"],
                     **{key: metadata[key] for key in ("steps", "seconds", "parameters")}},
        "threads": torch.get_num_threads(), "entries": entries}))
    for entry, means in entries.items():
        print(f"{entry:30} {100 * means['nmae']['mean']:.3f} %")


def in_order(predictor: Predictor,
             structure: Structure,
             shape: Sequence[int],   # (nx, ny, nz)
             order: Sequence[int],   # of the lattice vectors
             ) -> np.ndarray:  # (nx, ny, nz) electrons
    "The prediction for the same crystal with its lattice vectors in another order."
    lattice = structure.lattice
    angles = [lattice.angles[i] for i in order]
    turned = Structure(Lattice.from_parameters(*(lattice.abc[i] for i in order), *angles), structure.species,
                       structure.frac_coords[:, list(order)])
    a, b, c = (shape[i] for i in order)
    return predictor.predict(turned, (a, b, c)).density.total.transpose(np.argsort(order))


def make_options(store: RawStore, run: Path, materials: int) -> None:
    everything = (with_sad(store.read(id)) for id in store.split("validation"))
    densities = sorted(everything, key=lambda d: d.values.size)[:materials]
    causal, probe = causal_of(run), load_predictor()
    lines: list[dict[str, Any]] = []
    def add(id: str, setting: str, total_xyz: np.ndarray, seconds: float, jump: float | None = None) -> None:
        lines.append(rounded({"id": id, "setting": setting, "nmae": nmae(total_xyz, by_id[id].total), "seam": jump,
                              "seconds": seconds}))
    by_id = {d.id: d for d in densities}
    for d in track(densities, "options", unit="materials"):
        for overlap in (0, 1, 2, 3):
            start = perf_counter()
            made = replace(causal, overlap=overlap).predict(d.structure, d.shape)
            assert made.borders is not None
            add(d.id, f"causal, overlap {overlap}", made.density.total, perf_counter() - start,
                seam(made.density.total - d.total, made.borders))
        for name, predictor in (("causal", causal), ("probe", probe)):
            start, totals = perf_counter(), []
            for order in permutations(range(3)):
                totals.append(in_order(predictor, d.structure, d.shape, order))
                if len(totals) in (1, 2, 6):
                    add(d.id, f"{name}, {len(totals)} orders", np.mean(totals, axis=0), perf_counter() - start)
        write_table(RESULTS / "options.csv", lines)


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "guided", "evaluate", "options"])
    parser.add_argument("store", help="a raw store with the parts train and validation")
    parser.add_argument("run", type=Path, help="a folder for rows, model and scores")
    parser.add_argument("--steps", type=int, default=0, help="950 for train, 5,000 for guided if not given")
    parser.add_argument("--materials", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = RawStore(args.store)
    if args.what == "train":
        make_causal(store, args.run, args.steps or 950)
    elif args.what == "guided":
        make_guided(store, args.run, args.steps or 5000)
    elif args.what == "evaluate":
        make_scores(store, args.run)
    else:
        make_options(store, args.run, args.materials)


if __name__ == "__main__":
    main()
