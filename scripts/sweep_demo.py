"""Run each half of the demo in several settings and write what each reached, one line a setting.

    python scripts/sweep_demo.py --out results/demo/variants.csv
"""
import argparse
import csv
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tomat.demo import DemoConfig, demo_causal, demo_parallel
from tomat.evaluate import evaluate
from tomat.files import write_aside
from tomat.report import summary
from tomat.store import sample_store

BASE = DemoConfig(threads=1)  # several of these may share a machine
STEPS = BASE.train.steps
CAUSAL = {
    "the demo": BASE,
    "tokens of the density itself": replace(BASE, target="total"),
    "argmax instead of median": replace(BASE, choose="argmax"),
    "half the learning rate": replace(BASE, train=replace(BASE.train, lr=BASE.train.lr / 2)),
    "64 levels": replace(BASE, levels=64),
    "patches of 4": replace(BASE, patch_size=4, patches=256, train=replace(BASE.train, batch_size=20)),
    "patches of 8": replace(BASE, patch_size=8, train=replace(BASE.train, batch_size=4)),
    "three times the steps": replace(BASE, train=replace(BASE.train, steps=3 * STEPS)),
    "another seed of the weights": replace(BASE, train=replace(BASE.train, seed=1)),
}
PARALLEL = {
    "the demo": BASE,
    "half the steps": replace(BASE, fit=replace(BASE.fit, steps=BASE.fit.steps // 2)),
    "twice the steps": replace(BASE, fit=replace(BASE.fit, steps=2 * BASE.fit.steps)),
    "another seed of the weights": replace(BASE, fit=replace(BASE.fit, seed=1)),
}


def line(decoder: str, name: str, config: DemoConfig) -> dict[str, str | int | float]:
    "Run one setting of one decoder."
    store, train = sample_store(), demo_causal if decoder == "causal" else demo_parallel
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        predictor = train(store, Path(folder), config)
        seconds = time.process_time() - start
        found = summary(evaluate(store, store.split("validation"), {decoder: predictor}, folder).scores)
    own = {"causal, free-running": "nmae_free_running", "causal, teacher-forced": "nmae_teacher_forced",
           "causal, codec floor": "nmae_codec_floor", "parallel": "nmae_free_running", "sum of free atoms": "nmae_free_atoms"}
    scores = {column: round(found[entry]["nmae"]["mean"], 6) for entry, column in own.items() if entry in found}
    setting = {"target": config.target, "patch_size": config.patch_size, "levels": config.levels, "steps": config.train.steps,
               "batch_size": config.train.batch_size, "lr": config.train.lr, "choose": config.choose}
    if decoder == "parallel":
        setting = {"steps": config.fit.steps, "batch_size": config.fit.materials, "lr": config.fit.lr}
    return {"decoder": decoder, "setting": name, **setting, "training_cpu_seconds": round(seconds), **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/demo/variants.csv"))
    out = parser.parse_args().out
    os.environ["TOMAT_PROGRESS"] = "0"
    lines = []
    for decoder, variants in (("parallel", PARALLEL), ("causal", CAUSAL)):
        for name, config in variants.items():
            lines.append(line(decoder, name, config))
            print(lines[-1], flush=True)
    with write_aside(out) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[-1].keys(), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
