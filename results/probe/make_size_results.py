"""Compare shapes of the probe network on materials that are held out of the training split: results/probe/sizes.csv.

    python results/probe/make_size_results.py STORE WORK [--steps 1500] [--only NAME…]

Each shape is trained on the training split without the materials of held_out.csv, with the same draws, on one thread, and scored
on drawn voxels of those materials. The validation split is not used. A stopped run is resumed.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tomat.dataset.prepare import prepare
from tomat.dataset.voxels import PrepareConfig
from tomat.density.store import RawStore
from tomat.models.messages import PROBE_SIZES, ProbeConfig
from tomat.models.probe import ProbeNet
from tomat.run.launch import sentences
from tomat.study.site import read_table, write_table
from tomat.train.config import ProbeTrainConfig, RunConfig
from tomat.train.log import read_log
from tomat.train.probe import train_voxels

RESULTS = Path(__file__).resolve().parent
S, M = PROBE_SIZES["S"], PROBE_SIZES["M"]
WIDE = ProbeConfig(64, 2, (32, 16, 16), (48, 24, 24), 96, 2)
SHAPES: dict[str, ProbeConfig] = {
    "S": S,
    "S, cutoff 5 Å": replace(S, cutoff=5.0),
    "S, one layer": replace(S, n_layers=1),
    "S, l = 0 and 1": replace(S, atom_channels=(16, 8, 0), voxel_channels=(32, 16, 0)),
    "atoms 64, voxels 48, readout 96": WIDE,
    "atoms 64, voxels 48, readout 96, cutoff 5 Å": replace(WIDE, cutoff=5.0),
    "atoms 64, voxels 48, readout 64": replace(WIDE, readout_width=64),
    "atoms 32, voxels 48, readout 96": replace(WIDE, width=32, atom_channels=S.atom_channels),
    "atoms 32, voxels 64, readout 128": replace(M, width=32),
    "M": M,
    "atoms 32, voxels 96, readout 128, three blocks": replace(M, width=32, voxel_channels=(96, 48, 48), readout_blocks=3),
}


def measured(name: str, network: ProbeConfig, data: tuple[Path, Path], run: Path, steps: int) -> dict[str, object]:
    config = ProbeTrainConfig(network, steps=steps, eval_every=max(1, steps // 3))
    train_voxels(data[0], run, config, RunConfig(save_every=250, keep=1), data[1])
    log = read_log(run)
    scores, last = log[-1]["val"], log[-max(1, steps // 10):]
    return {"shape": name, "parameters": sum(p.numel() for p in ProbeNet(network).parameters()), "steps": steps,
            "held_out": round(scores["loss"], 5), "held_out_median": round(scores["median"], 5),
            "learned_from": round(float(np.mean([line["loss"] for line in last])), 5),
            "cpu_ms_a_step": round(1000 * float(np.median([line["time"]["cpu_seconds"] for line in log])), 1)}


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=RawStore)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", nargs="*", choices=[*SHAPES], default=[*SHAPES])
    args = parser.parse_args()
    torch.set_num_threads(1)
    held_out = {row["id"] for row in read_table(RESULTS / "held_out.csv")}
    training = args.store.split("train")
    parts = {"train": [id for id in training if id not in held_out], "held-out": [id for id in training if id in held_out]}
    for part, ids in parts.items():
        prepare(args.store, args.work / part, PrepareConfig(), ids)
    table = RESULTS / "sizes.csv"
    rows = {row["shape"]: row for row in read_table(table)} if table.exists() else {}
    for name in args.only:
        run = args.work / f"{name.replace(' ', '-')}-{args.steps}"
        rows[name] = measured(name, SHAPES[name], (args.work / "train", args.work / "held-out"), run, args.steps)
        write_table(table, list(rows.values()))
        print(rows[name], flush=True)


if __name__ == "__main__":
    main()
