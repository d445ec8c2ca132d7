"""Small language models with and without guides, with and without a history, three seeds each: results/guides/variants.csv.

    python results/guides/make_variant_results.py train STORE RUN [--steps 400]
    python results/guides/make_variant_results.py reads STORE CHECKPOINT

train: `nano` on fresh patches of 4³ voxels, on one thread; scored on 8 patches of each validation material, free-running and, where
the model reads densities, teacher-forced, as the mean of the materials' NMAE over these patches; SAD beside. A run that was stopped
goes on. reads: the loss of a guided model on validation rows as they are, with the heads of the rows and with the guides of other
materials: reads.csv.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tomat.atoms.sad import with_sad
from tomat.dataset.meta import read_meta, tokenizer_of
from tomat.dataset.noise import HistoryNoise
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.core import RHO, Density
from tomat.density.store import RawStore
from tomat.io.files import read_json
from tomat.io.progress import track
from tomat.models.causal import load_checkpoint
from tomat.models.loss import LossModule
from tomat.models.objective import objective_of
from tomat.prediction.causal import CausalPredictor, free_steps, true_steps
from tomat.prediction.decoding import patch_values
from tomat.prediction.predictors import load_predictor
from tomat.run.launch import sentences
from tomat.study.site import write_table
from tomat.tokens.fit_codec import fit_histogram, histogram_of
from tomat.tokens.patches import cut
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.causal import train
from tomat.train.config import RunConfig, TrainConfig
from tomat.train.log import read_log

RESULTS = Path(__file__).resolve().parent
SEEDS, PATCHES = (0, 1, 2), 8


def rows_of(store: RawStore, run: Path, layout: str) -> Path:
    rows = run / f"rows-{layout}"
    if not (rows / "meta.json").exists():
        others = [run / f"rows-{other}" for other in ("guided", "framed") if (run / f"rows-{other}" / "meta.json").exists()]
        codec = tokenizer_of(others[0], read_meta(others[0])).density_codec if others else fit_histogram(
            histogram_of(store.split("train"), store.read, "difference", RHO, with_sad), 256)
        tokenizer = Tokenizer(layout, codec, patch_size=4, pad_to=None, target="difference", unit=RHO)
        tokenize(store, tokenizer, rows, TokenizeConfig(2, label=layout, prepare=with_sad), store.split("train"))
    return rows


def patches_of(density: Density) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 20, (PATCHES, 3)) % np.array(density.shape)


def errors(causal: CausalPredictor, density: Density) -> dict[str, float]:
    "NMAE on some patches: free-running, teacher-forced where it means something, and of the SAD."
    assert density.sad is not None
    tokenizer, offsets = causal.tokenizer, patches_of(density)
    prompts = tokenizer.prompt(density.structure, density.shape, offsets)
    guides = tokenizer.guides(density.structure, density.sad, offsets) if tokenizer.layout == "guided" else None
    rho, sad = cut(density.values, offsets, tokenizer.size), cut(density.sad, offsets, tokenizer.size)

    def error(steps: Iterable[Any]) -> float:
        return float(np.abs(sad + patch_values(tokenizer, PATCHES, steps)[0] - rho).sum() / rho.sum())
    found = {"nmae": error(free_steps(causal, prompts, guides)), "sad": float(np.abs(sad - rho).sum() / rho.sum())}
    if causal.history:
        rows = torch.from_numpy(tokenizer.encode(density, offsets)[0]).long()
        found["forced"] = error(true_steps(causal, rows))
    return found


def make_variants(store: RawStore, run: Path, steps: int) -> None:
    true, lines = [with_sad(store.read(id)).as_units(RHO) for id in store.split("validation")], []
    for seed in SEEDS:
        for layout in ("framed", "guided"):
            for noise in (0.0, 1.0):
                config = TrainConfig(steps=steps, batch_size=12, optimizer="muon", schedule="cosine50", warmup=50, noise=noise,
                                     soft=0.005, seed=seed)
                out = run / f"{layout}-{noise:g}-{seed}"
                path = train(rows_of(store, run, layout), out, config, RunConfig(save_every=steps), fresh=store)
                causal, log = load_predictor(path), read_log(out)
                assert isinstance(causal, CausalPredictor)
                found = [errors(causal, density) for density in track(true, "score", unit="materials")]
                means = {name: float(np.mean([x[name] for x in found])) for name in found[0]}
                lines.append({"layout": layout, "noise": noise, "seed": seed, "steps": steps, "tokens": log[-1]["tokens"],
                              "cpu_seconds": sum(line["time"]["cpu_seconds"] for line in log), "nmae": means["nmae"],
                              "sad": means["sad"], "forced": means.get("forced", ""),
                              "better": sum(x["nmae"] < x["sad"] for x in found), "materials": len(found)})
                print(lines[-1], flush=True)
                write_table(RESULTS / "variants.csv", lines)


@torch.inference_mode()
def make_reads(store: RawStore, checkpoint: Path) -> None:
    model, tokenizer = load_checkpoint(checkpoint)
    training = read_json(checkpoint / "tomat.json")["training"]
    learner = LossModule(model, objective_of(tokenizer, soft=training["soft"]))
    noise = HistoryNoise(tokenizer, training["noise"], 0)
    found = [with_sad(store.read(id)).as_units(RHO) for id in store.split("validation")]
    rows = [tokenizer.encode(density, patches_of(density))[0] for density in found]
    heads = [x.shape[1] - tokenizer.n_block_tokens - 2 for x in rows]
    guides = np.setdiff1d(np.arange(tokenizer.n_block_tokens), tokenizer.places)
    losses: dict[str, list[float]] = {"as they are": [], "head of another material": [], "guides of another material": []}
    for number, (ids, head) in enumerate(zip(rows, heads, strict=True)):
        other, other_head = rows[number - 1], heads[number - 1]
        mixed = ids.copy()
        mixed[:, head + guides] = other[:, other_head + guides]
        for name, read in zip(losses, (ids, np.concatenate([other[:, :other_head], ids[:, head:]], 1), mixed), strict=True):
            true, seen = torch.from_numpy(read).long(), torch.from_numpy(noise(read, np.arange(len(read)))).long()
            places = learner.positions(true)
            losses[name].append(learner(true, places, seen).item() / len(places))
    plain = float(np.mean(losses["as they are"]))
    write_table(RESULTS / "reads.csv", [{"rows": name, "loss": float(np.mean(x)), "more": float(np.mean(x)) - plain,
                                         "materials_worse": sum(a > b for a, b in zip(x, losses["as they are"], strict=True)),
                                         "materials": len(x)} for name, x in losses.items()])


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "reads"])
    parser.add_argument("store", help="a raw store with the parts train and validation")
    parser.add_argument("run", type=Path, help="a folder for rows and runs; for reads the checkpoint")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = RawStore(args.store)
    if args.what == "train":
        make_variants(store, args.run, args.steps)
    else:
        make_reads(store, args.run)


if __name__ == "__main__":
    main()
