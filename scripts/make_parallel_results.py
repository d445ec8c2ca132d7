"""Train the packaged parallel decoder, package it, and measure it: results/parallel/.

    python scripts/make_parallel_results.py curve STORE RUNS [--steps 700]
    python scripts/make_parallel_results.py widen STORE RUN [--steps 2000]
    python scripts/make_parallel_results.py train STORE RUN [--steps 2000] [--widen X]
    python scripts/make_parallel_results.py package RUN
    python scripts/make_parallel_results.py evaluate STORE

curve: fits to 62, 125 and 249 materials of the training split, judged by the other 63 (whole chemical systems) and by the
validation split, on drawn voxels. widen: a fit to 249 that is as long as the one to be packaged; its held-out materials say by
how much expected errors must be widened: hand that number to train.
train: the checkpoint, from all of the training split; a run that was stopped goes on. package: copy it to tomat/data/parallel.
evaluate: the packaged checkpoint on the whole grids of the validation split, free-running, electrons made exact.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
import csv
import shutil
import sys
import zlib
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from tomat.files import TomatError, read_json, write_aside, write_json
from tomat.fit_parallel import FitConfig, example_of, fit_parallel, judged, read_material
from tomat.metrics import nmae
from tomat.parallel import load_parallel
from tomat.predict import load_predictor
from tomat.progress import track
from tomat.promolecule import with_promolecule
from tomat.runs import read_log
from tomat.store import RawStore

ROOT = Path(__file__).resolve().parents[1]
PACKAGED, RESULTS = ROOT / "tomat" / "data" / "parallel", ROOT / "results" / "parallel"
SIZES = (62, 125, 249)


def write_csv(name: str, rows: list[dict[str, Any]]) -> None:
    with write_aside(RESULTS / name) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def fold(store: RawStore) -> tuple[list[str], list[str]]:
    "The training split in two, by chemical system: to learn from, in a drawn order, and to judge by."
    ids = store.split("train")
    out = {id: zlib.crc32(store.read(id).structure.composition.chemical_system.encode()) % 5 == 3 for id in track(ids, "look")}
    learn = [id for id in ids if not out[id]]
    return [learn[i] for i in np.random.default_rng(1).permutation(len(learn))], [id for id in ids if out[id]]


def curve(store: RawStore, runs: Path, steps: int) -> None:
    learn, judge = fold(store)
    config, rows = FitConfig(steps=steps), []
    validation = [example_of(read_material(id, store, 2000, 0), config.model) for id in store.split("validation")]
    free = np.mean([np.abs(e.material.free_V - e.material.rho_V).mean() / e.material.mean for e in validation])
    for size in SIZES:
        model = load_parallel(fit_parallel(store, learn[:size], runs / str(size), config, judge))
        held_out, scores = model.training_facts["held_out"], judged(model, validation)
        rows.append({"materials": len(learn[:size]), "steps": steps, "seconds": model.training_facts["seconds"],
                     "held_out": held_out["loss"], "held_out_median": held_out["median"], "validation": scores["loss"],
                     "validation_median": scores["median"], "validation_free_atoms": float(free), "widen": held_out["widen"]})
        write_csv("curve.csv", rows)
        print(rows[-1], flush=True)


def widen(store: RawStore, run: Path, steps: int) -> None:
    learn, judge = fold(store)
    facts = load_parallel(fit_parallel(store, learn, run, FitConfig(steps=steps), judge)).training_facts
    write_json(RESULTS / "held_out.json", {**facts["held_out"], "materials": len(learn), "held_out_materials": len(judge),
                                           "steps": steps, "seconds": facts["seconds"]})
    print(facts["held_out"])


def package(run: Path) -> None:
    load_parallel(run / "model")
    with write_aside(PACKAGED) as aside:
        shutil.copytree(run / "model", aside)
    log, facts = read_log(run), read_json(run / "config.json")
    write_csv("log.csv", [{"step": line["step"], "nmae": line["loss"], "lr": line["lr"], "seconds": line["time"]["seconds"]}
                          for line in log[9::10]])
    del facts["data"]["ids"]
    write_json(RESULTS / "fit.json", facts)


def scores_of(store: RawStore, id: str) -> dict[str, Any]:
    "One material, as a user would predict it."
    density = with_promolecule(store.read(id)).as_units("e/Å³")
    started = perf_counter()
    made = load_predictor().predict(density.structure, density.shape)
    seconds = perf_counter() - started
    assert density.baseline is not None and made.spread_xyz is not None
    error = np.abs(made.density.rho - density.values).ravel()
    spread = made.spread_xyz.ravel()
    return {"id": id, "formula": density.formula, "voxels": error.size, "nmae": nmae(made.density.rho, density.values),
            "free_atoms": nmae(density.baseline, density.values), "expected": float(spread.sum() / np.abs(density.values).sum()),
            "rank_correlation": float(spearmanr(error[::17], spread[::17])[0]),
            "inside_50": float((error < spread * np.log(2)).mean()), "inside_90": float((error < spread * np.log(10)).mean()),
            "electrons_before": made.electrons_before, "electrons": float(density.n_electrons), "seconds": seconds}


def evaluate(store: RawStore, command: str) -> None:
    rows = [scores_of(store, id) for id in track(store.split("validation"), "evaluate", unit="materials")]
    write_csv("validation.csv", [{key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows])
    def over(key: str, how: Any = np.mean) -> float:
        return float(how([row[key] for row in rows]))
    facts = load_parallel(PACKAGED).training_facts
    summary = {
        "command": command, "materials": len(rows), "nmae_mean": over("nmae"), "nmae_median": over("nmae", np.median),
        "nmae_worst": over("nmae", max), "free_atoms_mean": over("free_atoms"), "free_atoms_median": over("free_atoms", np.median),
        "ratio_of_means": over("nmae") / over("free_atoms"),
        "better_than_free_atoms": sum(row["nmae"] < row["free_atoms"] for row in rows),
        "expected_mean": over("expected"), "rank_correlation_median": over("rank_correlation", np.median),
        "inside_50_mean": over("inside_50"), "inside_90_mean": over("inside_90"),
        "voxels_per_s": sum(row["voxels"] for row in rows) / sum(row["seconds"] for row in rows), "load": os.getloadavg()[0],
        "training": {key: facts[key] for key in ("steps", "seconds", "threads", "seed", "parameters", "widen")},
        "materials_learned": len(facts["materials"])}
    write_json(RESULTS / "validation.json", summary)
    print(summary)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curve", "widen", "train", "package", "evaluate"])
    parser.add_argument("place", help="a raw store; a run to package")
    parser.add_argument("run", nargs="?", help="where to train")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--widen", type=float, default=1.0)
    args = parser.parse_args()
    if args.what in ("curve", "widen", "train") and not args.run:
        parser.error("name a folder for the run")
    try:
        if args.what == "curve":
            curve(RawStore(args.place), Path(args.run), args.steps or 700)
        elif args.what == "widen":
            widen(RawStore(args.place), Path(args.run), args.steps or 2000)
        elif args.what == "train":
            store = RawStore(args.place)
            fit_parallel(store, store.split("train"), args.run, FitConfig(steps=args.steps or 2000), widen=args.widen)
        elif args.what == "package":
            package(Path(args.place))
        else:
            evaluate(RawStore(args.place), "python scripts/make_parallel_results.py evaluate STORE")
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
