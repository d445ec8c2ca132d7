"""Run the demo in several settings and write what each reached, one line a setting.

    python scripts/sweep_demo.py --out results/demo/variants.csv
"""
import argparse
import csv
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tomat.demo import DemoConfig, demo
from tomat.files import write_aside

BASE = DemoConfig(threads=1)  # several of these may share a machine
VARIANTS = {
    "the demo": BASE,
    "tokens of the density itself": replace(BASE, target="total"),
    "argmax instead of median": replace(BASE, choose="argmax"),
    "half the learning rate": replace(BASE, train=replace(BASE.train, lr=BASE.train.lr / 2)),
    "64 levels": replace(BASE, levels=64),
    "patches of 4": replace(BASE, patch_size=4, patches=256, train=replace(BASE.train, batch_size=20)),
    "patches of 8": replace(BASE, patch_size=8, train=replace(BASE.train, batch_size=4)),
    "three times the steps": replace(BASE, train=replace(BASE.train, steps=3 * BASE.train.steps)),
}


def line(name: str, config: DemoConfig) -> dict[str, str | int | float]:
    "Run one setting."
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        mean = demo(folder, config)["summary"]
        seconds = time.perf_counter() - start
    return {"setting": name, "target": config.target, "patch_size": config.patch_size, "levels": config.levels,
            "steps": config.train.steps, "batch_size": config.train.batch_size, "lr": config.train.lr, "choose": config.choose,
            "seconds": round(seconds), "nmae_free_running": round(mean["mean_nmae_free_running"], 6),
            "nmae_free_atoms": round(mean["mean_nmae_free_atoms"], 6),
            "nmae_codec_floor": round(mean["mean_nmae_codec_floor"], 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/demo/variants.csv"))
    out = parser.parse_args().out
    os.environ["TOMAT_PROGRESS"] = "0"
    lines = []
    for name, config in VARIANTS.items():
        lines.append(line(name, config))
        print(lines[-1], flush=True)
    with write_aside(out) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
