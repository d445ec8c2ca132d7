"""Train the packaged parallel decoder, package it, and measure it: results/probe/ and its model card.

    python scripts/make_probe_results.py widen STORE RUN [--steps 3000]
    python scripts/make_probe_results.py train STORE RUN [--steps 3000] --widen X
    python scripts/make_probe_results.py package RUN
    python scripts/make_probe_results.py evaluate STORE
    python scripts/make_probe_results.py curve STORE RUNS --steps 800

widen: a fit to four fifths of the training split, judged on the whole grids of the rest, which are whole chemical systems. It says
by how much expected errors must be widened (hand that number to train) and how best to make electrons exact: held_out.json and
electrons.csv. train: the checkpoint, from all of the training split; a run that was stopped goes on. package: copy it to
tomat/data/probe. evaluate: the packaged checkpoint on the whole grids of the validation split, as a user predicts them:
validation.csv, validation.json, calibration.csv and the card. curve: the same for short fits to growing parts of the training
split: curve.csv.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
import csv
import shutil
import sys
import zlib
from collections import Counter
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from tomat.density.classify import classify
from tomat.io.files import TomatError, read_json, atomic_write, write_json, write_text
from tomat.train.probe import ProbeTrainConfig, train_probe
from tomat.density.metrics import nmae
from tomat.models.probe import ProbeNet, balanced, load_probe, predict_field
from tomat.prediction.predictors import ProbePredictor, load_predictor
from tomat.io.progress import track
from tomat.atoms.sad import with_sad
from tomat.train.log import read_log
from tomat.density.store import RawStore

ROOT = Path(__file__).resolve().parents[1]
PACKAGED, RESULTS = ROOT / "tomat" / "data" / "probe", ROOT / "results" / "probe"
SIZES = (39, 78, 156, 312)
NOMINAL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
RARE = 5  # an element in fewer materials is named in the card
COMMAND = "python scripts/make_probe_results.py evaluate STORE"


def write_csv(name: str, rows: list[dict[str, Any]]) -> None:
    with atomic_write(RESULTS / name) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)


def fold(store: RawStore) -> tuple[list[str], list[str]]:
    "The training split in two, by chemical system: to learn from, in a drawn order, and to judge by."
    ids = store.split("train")
    out = {id: zlib.crc32(store.read(id).structure.composition.chemical_system.encode()) % 5 == 3 for id in track(ids, "look")}
    learn = [id for id in ids if not out[id]]
    return [learn[i] for i in np.random.default_rng(1).permutation(len(learn))], [id for id in ids if out[id]]


def inside(ratio: np.ndarray) -> list[float]:
    "The share of voxels inside the intervals of nominal probabilities, from errors over those expected."
    return [float(x) for x in np.searchsorted(np.sort(ratio), -np.log1p(-np.array(NOMINAL))) / ratio.size]


def corrections(raw: np.ndarray,    # predicted density, e/Å³
                exact: float,       # mean that it should have
                free: np.ndarray,   # sum of free atoms
                width: np.ndarray,  # expected error
                ) -> dict[str, np.ndarray]:
    "Ways to make electrons exact."
    excess = raw.mean() - exact
    root = np.sqrt(np.maximum(free, 0) + 0.02)
    spread = {"like the root of the free atoms": root, "like the expected error": width,
              "like its square": width.astype(np.float64) ** 2}
    return {"none": raw, "one factor": raw * (exact / raw.mean()), "one shift": raw - excess,
            "one shift, none below zero": balanced(raw, exact),
            **{name: raw - excess * x / x.mean() for name, x in spread.items()}}


def calibration_scale(store: RawStore, run: Path, steps: int) -> None:
    learn, judge = fold(store)
    if not (run / "model").exists():
        train_probe(store, learn, run, ProbeTrainConfig(steps=steps), judge)
    model = load_probe(run / "model")
    facts = model.training_facts
    scores: list[dict[str, float]] = []
    ratios, below = [], Counter[str]()
    for id in track(judge, "judge", unit="materials"):
        density = with_sad(store.read(id)).as_units("e/Å³")
        assert density.sad is not None
        free = density.sad.astype(np.float64)
        difference, width = predict_field(model, density.structure, density.shape, free)
        width /= facts["widen"]  # the fit has had a look already, at drawn voxels, before electrons were exact
        made = corrections(free + difference, free.mean(), free, width)
        scores.append({name: nmae(x, density.values) for name, x in [("free atoms", free), *made.items()]})
        lowest = min(0.0, float((free + difference).min()))
        below.update(name for name, x in made.items() if x.min() < lowest)
        ratios.append((np.abs(made["one shift, none below zero"] - density.values) / width).ravel())
    columns = {name: [s[name] for s in scores] for name in scores[0]}
    write_csv("electrons.csv", [{"correction": name, "materials": len(judge), "nmae_mean": float(np.mean(column)),
                                 "nmae_median": float(np.median(column)), "made_lower": below[name]}
                                for name, column in columns.items()])
    factor = float(np.mean([ratio.mean() for ratio in ratios]))  # under which the errors that were found are most likely
    write_json(RESULTS / "held_out.json", {
        "widen": factor, "materials": len(learn), "held_out_materials": len(judge), "steps": facts["steps"],
        "seconds": facts["seconds"],
        "nmae_mean": float(np.mean(columns["one shift, none below zero"])),
        "nmae_median": float(np.median(columns["one shift, none below zero"])),
        "free_atoms_mean": float(np.mean(columns["free atoms"])),
        "inside_before": dict(zip(map(str, NOMINAL), np.mean([inside(ratio) for ratio in ratios], 0), strict=True)),
        "inside_after": dict(zip(map(str, NOMINAL), np.mean([inside(ratio / factor) for ratio in ratios], 0), strict=True))})
    print(read_json(RESULTS / "held_out.json"))


def package(run: Path) -> None:
    load_probe(run / "model")
    with atomic_write(PACKAGED) as aside:
        shutil.copytree(run / "model", aside)
    log, facts = read_log(run), read_json(run / "config.json")
    write_csv("log.csv", [{"step": line["step"], "nmae": line["loss"], "lr": line["lr"],
                           "cpu_seconds": line["time"]["cpu_seconds"]} for line in log[9::10]])
    del facts["data"]["ids"]
    write_json(RESULTS / "fit.json", facts)


def scores_of(store: RawStore, id: str, predictor: Any) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    "One material, as a user would predict it; its errors and those expected."
    density = with_sad(store.read(id)).as_units("e/Å³")
    busy = process_time()
    made = predictor.predict(density.structure, density.shape)
    seconds = process_time() - busy
    assert density.sad is not None and made.spread_xyz is not None
    error = np.abs(made.density.rho - density.values).ravel()
    spread = made.spread_xyz.ravel()
    row = {"id": id, "formula": density.formula, "class": classify(density.structure), "atoms": len(density.structure),
           "voxels": error.size, "nmae": nmae(made.density.rho, density.values),
           "free_atoms": nmae(density.sad, density.values), "expected": float(spread.sum() / np.abs(density.values).sum()),
           "rank_correlation": float(spearmanr(error[::17], spread[::17])[0]),
           "inside_50": float((error < spread * np.log(2)).mean()), "inside_90": float((error < spread * np.log(10)).mean()),
           "electrons_before": made.electrons_before, "electrons": made.density.n_electrons,
           "electrons_true": float(density.n_electrons), "lowest": float(made.density.rho.min()), "cpu_seconds": seconds}
    return row, (error, spread)


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def over(key: str, how: Any = np.mean) -> float:
        return float(how([row[key] for row in rows]))
    return {"materials": len(rows),
            "nmae_mean": over("nmae"), "nmae_median": over("nmae", np.median), "nmae_worst": over("nmae", max),
            "free_atoms_mean": over("free_atoms"), "free_atoms_median": over("free_atoms", np.median),
            "ratio_of_means": over("nmae") / over("free_atoms"),
            "better_than_free_atoms": sum(row["nmae"] < row["free_atoms"] for row in rows),
            "expected_mean": over("expected"), "rank_correlation_median": over("rank_correlation", np.median),
            "inside_50_mean": over("inside_50"), "inside_90_mean": over("inside_90"),
            "electron_error_before_mean": float(np.mean([abs(r["electrons_before"] / r["electrons"] - 1) for r in rows])),
            "voxels_per_cpu_s": sum(row["voxels"] for row in rows) / sum(row["cpu_seconds"] for row in rows)}


def evaluate(store: RawStore) -> None:
    rows, before, after, predictor = [], [], [], load_predictor()
    assert isinstance(predictor, ProbePredictor)
    facts = predictor.model.training_facts
    for id in track(store.split("validation"), "evaluate", unit="materials"):
        row, (error, spread) = scores_of(store, id, predictor)
        rows.append(row)
        after.append(inside(error / spread))
        before.append(inside(error / spread * facts["widen"]))
    write_csv("validation.csv", rows)
    write_csv("calibration.csv", [{"nominal": p, "before": float(x), "after": float(y)} for p, x, y in
                                  zip(NOMINAL, np.mean(before, 0), np.mean(after, 0), strict=True)])
    learned = [store.read(id).structure for id in track(facts["materials"], "look")]
    counts = Counter(element.symbol for structure in learned for element in structure.composition.elements)
    kinds = {kind: [row for row in rows if row["class"] == kind] for kind in sorted({row["class"] for row in rows})}
    summary = {
        "command": COMMAND, **summary_of(rows),
        "inside_50_before": float(np.mean([row[NOMINAL.index(0.5)] for row in before])),
        "inside_90_before": float(np.mean([row[NOMINAL.index(0.9)] for row in before])),
        "classes": {kind: {"materials": len(some), "nmae_mean": float(np.mean([r["nmae"] for r in some])),
                           "free_atoms_mean": float(np.mean([r["free_atoms"] for r in some]))} for kind, some in kinds.items()},
        "training": {key: facts[key] for key in ("steps", "seconds", "cpu_seconds", "threads", "seed", "parameters", "widen")},
        "materials_learned": len(facts["materials"]), "elements_learned": len(facts["elements"]),
        "most_atoms": max(map(len, learned)),
        "rare_elements": {symbol: counts[symbol] for symbol in facts["elements"] if counts[symbol] < RARE}}
    write_json(RESULTS / "validation.json", summary)
    write_text(PACKAGED / "README.md", card(summary, rows, facts["elements"]))
    print(summary)


def card(summary: dict[str, Any], rows: list[dict[str, Any]], elements: list[str]) -> str:
    "The model card."
    def percent(x: float) -> str:
        return f"{100 * x:.2f} %"
    training, worst = summary["training"], sorted(rows, key=lambda row: -row["nmae"])[:5]
    minutes = training["cpu_seconds"] / 60
    low, high = (100 * how(row["inside_90"] for row in rows) for how in (min, max))
    ours, free = (" | ".join(percent(how([row[key] for row in rows])) for how in (np.mean, np.median, max))
                  for key in ("nmae", "free_atoms"))
    kinds = "\n".join(f"| {kind} | {x['materials']} | {percent(x['nmae_mean'])} | {percent(x['free_atoms_mean'])} |"
                      for kind, x in summary["classes"].items())
    return f"""# The packaged parallel decoder

It predicts the valence electron density of a crystal from its structure, as the difference to the sum of free atoms, and how far
off that may be. `tomat predict STRUCTURE --out FILE` uses it unless another checkpoint is named.

## What it is

{training['parameters']:,} parameters. Every voxel gathers learned functions of distance and direction from all atoms within 4 Å,
each of which has done so within 6 Å before. Shifts, rotations, reflections, supercells and other lattice vectors change nothing.

- **Input**: a crystal with ordered sites; no starting density, no charge, no spin.
- **Output**: the density in electrons per cell volume as in a CHGCAR (density × volume of the cell), electrons exact; the expected
  absolute error of every voxel in e/Å³.
- **Data**: densities of {summary['materials_learned']} materials with {summary['elements_learned']} elements, PBE, GPAW, PAW
  pseudo-valence densities. Densities of other codes and setups differ near the nuclei, more than this model errs.
- **Training**: {training['steps']:,} steps, {minutes:.0f} minutes of CPU time on {training['threads']} thread,
  seed {training['seed']}.

## How good it is

Whole grids of {summary['materials']} validation materials, none of whose chemical systems was learned from, free-running:

    {summary['command']}

| NMAE | mean | median | worst |
|---|---|---|---|
| this model | {ours} |
| sum of free atoms | {free} |

The ratio of the means is {summary['ratio_of_means']:.3f}.
It is better than the free atoms for {summary['better_than_free_atoms']} of the {summary['materials']}.
Before they are made exact, electrons are off by {percent(summary['electron_error_before_mean'])} on average.

The expected error ranks voxels (Spearman's correlation with the true one: median {summary['rank_correlation_median']:.2f}).
Intervals that should hold 50 % and 90 % of the voxels hold {100 * summary['inside_50_mean']:.0f} % and
{100 * summary['inside_90_mean']:.0f} % of them on average over materials; of single materials they hold {low:.0f} to {high:.0f} %
instead of 90 %.

## Where not to trust it

By chemical class:

| class | materials | this model | sum of free atoms |
|---|---|---|---|
{kinds}

Classes that are not in the table have not been judged at all.

- The worst of validation: {", ".join(f"{row['formula']} ({percent(row['nmae'])})" for row in worst)}.
- Elements that it never saw are guessed from their free atoms and their place in the periodic table; `tomat predict` names them.
- Elements that it saw in fewer than {RARE} materials, hardly better: {", ".join(summary['rare_elements'])}.
- The data are bulk crystals of at most {summary['most_atoms']} atoms: no molecules, surfaces, defects, charged or disordered cells.
- Magnetism is not in the input: two magnetic states of one structure get one density.
- It does not replace a converged density where a percent matters, as in forces or band structures without further iterations.

Elements seen: {" ".join(elements)}.

## Licence

That of the project it comes with; the weights were trained by it, from scratch.
"""


def curve(store: RawStore, runs: Path, steps: int) -> None:
    ids = store.split("train")
    drawn, rows = [ids[i] for i in np.random.default_rng(1).permutation(len(ids))], []
    for size in SIZES:
        model: ProbeNet = load_probe(train_probe(store, drawn[:size], runs / str(size), ProbeTrainConfig(steps=steps)))
        predictor = ProbePredictor(model)
        validation = track(store.split("validation"), "evaluate", unit="materials")
        scores = [scores_of(store, id, predictor)[0] for id in validation]
        rows.append({**summary_of(scores), "materials": size, "steps": steps, "elements": len(model.training_facts["elements"]),
                     "cpu_seconds": model.training_facts["cpu_seconds"]})
        print(rows[-1], flush=True)
    kept = ("materials", "steps", "elements", "cpu_seconds", "nmae_mean", "nmae_median", "nmae_worst", "free_atoms_mean",
            "better_than_free_atoms")
    write_csv("curve.csv", [{key: row[key] for key in kept} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["widen", "train", "package", "evaluate", "curve"])
    parser.add_argument("place", help="a raw store; a run to package")
    parser.add_argument("run", nargs="?", help="where to train")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--widen", type=float, help="what expected errors are multiplied with")
    args = parser.parse_args()
    if args.what in ("curve", "widen", "train") and not args.run:
        parser.error("name a folder for the run")
    if args.what == "train" and args.calibration_scale is None:
        parser.error("say --widen X, the number that `calibration_scale` found")
    try:
        if args.what == "curve":
            curve(RawStore(args.place), Path(args.run), args.steps)
        elif args.what == "widen":
            calibration_scale(RawStore(args.place), Path(args.run), args.steps)
        elif args.what == "train":
            store = RawStore(args.place)
            train_probe(store, store.split("train"), args.run, ProbeTrainConfig(steps=args.steps), calibration_scale=args.calibration_scale)
        elif args.what == "package":
            package(Path(args.place))
        else:
            evaluate(RawStore(args.place))
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
