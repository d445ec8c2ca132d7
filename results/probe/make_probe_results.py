"""Train the probe networks of the results, package one, and measure them: results/probe/ and the model card.

    python results/probe/make_probe_results.py split STORE
    python results/probe/make_probe_results.py calibrate STORE RUNS
    python results/probe/make_probe_results.py train STORE RUNS [--size S] [--seed 0] [--steps 48000 --name S-0-48000]
    python results/probe/make_probe_results.py folds STORE RUNS --steps 1500 [--only H F]
    python results/probe/make_probe_results.py trust STORE RUNS
    python results/probe/make_probe_results.py package RUNS
    python results/probe/make_probe_results.py evaluate MORE
    python results/probe/make_probe_results.py seeds STORE RUNS
    python results/probe/make_probe_results.py more STORE RUNS
    python results/probe/make_probe_results.py curve STORE RUNS --steps 2000

STORE is a raw store, MORE that of make_more_data.py. The packaged checkpoint is trained on MORE: such runs have names in -more;
all else is that of the data set.
split: held_out.csv, a tenth of the chemical systems of the training split. calibrate: a run without these materials, measured on
their whole grids. It finds the factor of the expected errors and the best way to make electrons exact: held_out.json and
electrons.csv. train: a run on all of the training split; a stopped run is resumed. package: the run of seed 0 with the factor that
calibrate found, copied to tomat/data/probe. evaluate: the packaged checkpoint on the whole grids of the validation split, as a user
predicts them: validation.csv, validation.json, calibration.csv and the card. seeds: the runs of all sizes and seeds there are that
the table lacks: seeds.csv. more: the first run with and without the materials of make_more_data.py: more_scores.csv. curve: short
runs on growing parts of the training split: curve.csv. folds: for each element in FOLDS a run without the materials that have it,
measured on these: folds.csv. trust: the runs of folds with other shares of the difference kept, near the unknown atoms or in the
whole crystal, on every second point along each axis: trust.csv.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch
from zlib import crc32

import numpy as np
import torch
from pymatgen.core import Element
from scipy.stats import spearmanr

from tomat.atoms.hirshfeld import charge_error
from tomat.density.classify import classify
from tomat.io.remote import TomatError
from tomat.io.files import read_json, read_text, write_json, write_text
from tomat.dataset.prepare import prepare
from tomat.dataset.voxels import PrepareConfig
from tomat.train.config import ProbeTrainConfig, RunConfig
from tomat.train.probe import train_voxels
from tomat.density.metrics import nmae, potential_error
from tomat.models.card import Metric, with_metrics
from tomat.models.messages import PROBE_SIZES
from tomat.models.trust import Trust
from tomat.models.probe import ProbeNet, load_probe, predict_field, save_probe
from tomat.prediction.core import shift_to_mean
from tomat.prediction.predictors import ProbePredictor, load_predictor
from tomat.io.progress import track
from tomat.atoms.sad import with_sad
from tomat.train.log import read_log
from tomat.density.store import RawStore
from tomat.run.launch import sentences
from tomat.study.site import read_table, write_table

RESULTS = Path(__file__).resolve().parent
PACKAGED = RESULTS.parents[1] / "tomat" / "data" / "probe"
STEPS = 16_000
AVERAGE = 0.999  # of the weights: a longer memory than that of `tomat train`, for more steps
PARTS = (0.25, 0.5, 1.0)
FOLDS = ("Ne", "H", "F", "La", "Bi")
NOMINAL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NEWER = "gp-06000"  # from this id on, training materials are of another kind than the validation materials
MORE = "more-"  # how the ids of make_more_data.py begin
RARE = 5  # an element in fewer materials is named in the card
COMMAND = "python results/probe/make_probe_results.py evaluate MORE"


def systems(store: RawStore) -> dict[str, str]:
    "The elements of each training material, as in Li-O."
    return {id: store.read(id).structure.composition.chemical_system for id in track(store.split("train"), "look")}


def named(store: RawStore, name: str) -> str:
    "The name of a run or of its voxels, which tells whether the store holds the materials of make_more_data.py."
    return name + "-more" * any(id.startswith(MORE) for id in store.ids)


def split(store: RawStore) -> None:
    "A tenth of the chemical systems, by a checksum of their names, which holds when the store grows."
    write_table(RESULTS / "held_out.csv", [{"id": id, "formula": store.read(id).formula} for id, system in systems(store).items()
                                           if crc32(system.encode()) % 10 == 0])


def fold(store: RawStore) -> tuple[list[str], list[str]]:
    "The training split in two: a part to train on, and the materials of held_out.csv, whole chemical systems."
    held_out, training = {row["id"] for row in read_table(RESULTS / "held_out.csv")}, store.split("train")
    if missing := sorted(held_out - set(training)):
        raise TomatError(f"{store} lacks {', '.join(missing)} in its part train, which results/probe/held_out.csv names: give the "
                         "store of these results.")
    return [id for id in training if id not in held_out], [id for id in training if id in held_out]


def train(store: RawStore, run: Path, voxels: str, ids: Sequence[str], steps: int, size: str = "S", seed: int = 0) -> Path:
    "The checkpoint of a run, which is trained unless it is there; runs of one folder share the voxels of a name."
    if not (run / "model").exists():
        prepare(store, run.parent / "voxels" / voxels, PrepareConfig(), ids)
        train_voxels(run.parent / "voxels" / voxels, run, ProbeTrainConfig(size=size, steps=steps, seed=seed, average=AVERAGE),
                     RunConfig(save_every=500))
    return run / "model"


def inside(ratio: np.ndarray) -> list[float]:
    "The share of voxels inside the intervals of nominal probabilities, from errors over expected errors."
    return [float(x) for x in np.searchsorted(np.sort(ratio), -np.log1p(-np.array(NOMINAL))) / ratio.size]


def corrections(raw: np.ndarray,    # predicted density, e/Å³
                exact: float,       # mean of the result
                sad: np.ndarray,    # sum of atomic densities
                width: np.ndarray,  # expected error
                ) -> dict[str, np.ndarray]:
    "Ways to make electrons exact."
    excess = raw.mean() - exact
    root = np.sqrt(np.maximum(sad, 0) + 0.02)
    shape = {"like the root of the SAD": root, "like the expected error": width,
              "like its square": width.astype(np.float64) ** 2}
    return {"none": raw, "one factor": raw * (exact / raw.mean()), "one shift": raw - excess,
            "one shift, none below zero": shift_to_mean(raw, exact),
            **{name: raw - excess * x / x.mean() for name, x in shape.items()}}


def calibrate(store: RawStore, runs: Path, steps: int) -> None:
    training, held_out = fold(store)
    model = load_probe(train(store, runs / "calibrate", "calibrate", training, steps))
    metadata = model.training_metadata
    scores: list[dict[str, float]] = []
    ratios, below = [], Counter[str]()
    for id in track(held_out, "measure", unit="materials"):
        density = with_sad(store.read(id)).as_units("e/Å³")
        assert density.sad is not None
        sad = density.sad.astype(np.float64)
        difference, width = predict_field(model, density.structure, density.shape, sad)
        made = corrections(sad + difference, sad.mean(), sad, width)
        scores.append({name: nmae(x, density.values) for name, x in [("SAD", sad), *made.items()]})
        lowest = min(0.0, float((sad + difference).min()))
        below.update(name for name, x in made.items() if x.min() < lowest)
        ratios.append((np.abs(made["one shift, none below zero"] - density.values) / width).ravel())
    columns = {name: [s[name] for s in scores] for name in scores[0]}
    write_table(RESULTS / "electrons.csv", [{"correction": name, "materials": len(held_out), "nmae_mean": float(np.mean(column)),
                                 "nmae_median": float(np.median(column)), "made_lower": below[name]}
                                for name, column in columns.items()])
    drawn = [np.random.default_rng(0).choice(ratio, 4000) for ratio in ratios]  # each material counts the same
    factor_all = float(np.median(drawn) / np.log(2))
    likes = [id < NEWER for id in held_out]
    factor = float(np.median([part for part, like in zip(drawn, likes, strict=True) if like]) / np.log(2))
    ratios = [ratio for ratio, like in zip(ratios, likes, strict=True) if like]
    write_json(RESULTS / "held_out.json", {
        "calibration_scale": factor, "calibration_scale_of_all": factor_all, "like_validation": sum(likes),
        "materials": len(training), "held_out_materials": len(held_out), "steps": metadata["steps"],
        "cpu_seconds": metadata["cpu_seconds"],
        "nmae_mean": float(np.mean(columns["one shift, none below zero"])),
        "nmae_median": float(np.median(columns["one shift, none below zero"])),
        "sad_mean": float(np.mean(columns["SAD"])),
        "inside_before": dict(zip(map(str, NOMINAL), np.mean([inside(ratio) for ratio in ratios], 0), strict=True)),
        "inside_after": dict(zip(map(str, NOMINAL), np.mean([inside(ratio / factor) for ratio in ratios], 0), strict=True))})
    print(read_json(RESULTS / "held_out.json"))


def package(run: Path) -> None:
    model, found = load_probe(run / "model"), read_json(RESULTS / "held_out.json")
    scale = found["calibration_scale"]
    with torch.no_grad():
        model.head.bias[1] += np.log(scale / model.training_metadata["calibration_scale"])
    held_out = {"materials": found["like_validation"], "inside_90": found["inside_after"]["0.9"]}
    save_probe(model, PACKAGED, model.training_metadata | {"calibration_scale": scale, "held_out": held_out})
    log, metadata = read_log(run), read_json(run / "config.json")
    write_table(RESULTS / "log.csv", [{"step": line["step"], "nmae": line["loss"], "lr": line["lr"],
                           "cpu_seconds": line["time"]["cpu_seconds"]} for line in log[9::20]])
    metadata["data"].pop("ids", None)
    write_json(RESULTS / "fit.json", metadata)


def scores_of(store: RawStore, id: str, predictor: Any) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    "The scores of a material, as a user would predict it; its errors and its expected errors."
    density = with_sad(store.read(id)).as_units("e/Å³")
    busy = process_time()
    made = predictor.predict(density.structure, density.shape)
    seconds = process_time() - busy
    assert density.sad is not None and made.expected_error_xyz is not None
    error = np.abs(made.density.rho - density.values).ravel()
    expected = made.expected_error_xyz.ravel()
    cell, true_xyz, sad_xyz = density.structure, density.total, density.sad * density.volume
    row = {"id": id, "formula": density.formula, "class": classify(density.structure), "atoms": len(density.structure),
           "voxels": error.size, "nmae": nmae(made.density.rho, density.values), "distance": made.distance, "unlike": made.unlike,
           "sad": nmae(density.sad, density.values), "expected": float(expected.sum() / np.abs(density.values).sum()),
           "potential": potential_error(made.density.total, true_xyz, cell.lattice.matrix),
           "potential_sad": potential_error(sad_xyz, true_xyz, cell.lattice.matrix),
           "charges": charge_error(made.density.total, true_xyz, sad_xyz, cell),
           "charges_sad": charge_error(sad_xyz, true_xyz, sad_xyz, cell),
           "rank_correlation": float(spearmanr(error[::17], expected[::17])[0]),
           "inside_50": float((error < expected * np.log(2)).mean()), "inside_90": float((error < expected * np.log(10)).mean()),
           "electrons_before": made.electrons_before, "electrons": made.density.n_electrons,
           "electrons_true": float(density.n_electrons), "lowest": float(made.density.rho.min()), "cpu_seconds": seconds}
    return row, (error, expected)


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def over(key: str, how: Any = np.mean) -> float:
        return float(how([row[key] for row in rows]))
    return {"materials": len(rows),
            "nmae_mean": over("nmae"), "nmae_median": over("nmae", np.median), "nmae_worst": over("nmae", max),
            "sad_mean": over("sad"), "sad_median": over("sad", np.median),
            "ratio_of_means": over("nmae") / over("sad"),
            **{f"{key}_mean": over(key) for key in ("potential", "potential_sad", "charges", "charges_sad")},
            "better_potential_than_sad": sum(row["potential"] < row["potential_sad"] for row in rows),
            "better_than_sad": sum(row["nmae"] < row["sad"] for row in rows),
            "expected_mean": over("expected"), "rank_of_materials": float(spearmanr([row["expected"] for row in rows],
                                                                                    [row["nmae"] for row in rows])[0]),
            "unlike": sum(row["unlike"] for row in rows), "rank_correlation_median": over("rank_correlation", np.median),
            "inside_50_mean": over("inside_50"), "inside_90_mean": over("inside_90"),
            "electron_error_before_mean": float(np.mean([abs(r["electrons_before"] / r["electrons"] - 1) for r in rows])),
            "voxels_per_cpu_s": sum(row["voxels"] for row in rows) / sum(row["cpu_seconds"] for row in rows)}


def evaluate(store: RawStore) -> None:
    rows, before, after, predictor = [], [], [], load_predictor()
    assert isinstance(predictor, ProbePredictor)
    metadata = predictor.model.training_metadata
    for id in track(store.split("validation"), "evaluate", unit="materials"):
        row, (error, expected) = scores_of(store, id, predictor)
        rows.append(row)
        after.append(inside(error / expected))
        before.append(inside(error / expected * metadata["calibration_scale"]))
    write_table(RESULTS / "validation.csv", rows)
    write_table(RESULTS / "calibration.csv", [{"nominal": p, "before": float(x), "after": float(y)} for p, x, y in
                                  zip(NOMINAL, np.mean(before, 0), np.mean(after, 0), strict=True)])
    learned = [store.read(id).structure for id in track(metadata["materials"], "look")]
    counts = Counter(element.symbol for structure in learned for element in structure.composition.elements)
    kinds = {kind: [row for row in rows if row["class"] == kind] for kind in sorted({row["class"] for row in rows})}
    summary = {
        "command": COMMAND, **summary_of(rows),
        "inside_50_before": float(np.mean([row[NOMINAL.index(0.5)] for row in before])),
        "inside_90_before": float(np.mean([row[NOMINAL.index(0.9)] for row in before])),
        "classes": {kind: {"materials": len(some), "nmae_mean": float(np.mean([r["nmae"] for r in some])),
                           "sad_mean": float(np.mean([r["sad"] for r in some]))} for kind, some in kinds.items()},
        "training": {key: metadata[key] for key in ("steps", "seconds", "cpu_seconds", "threads", "seed", "parameters",
                                                    "calibration_scale")},
        "materials_learned": len(metadata["materials"]), "elements_learned": len(metadata["elements"]),
        "materials_drawn": sum(id.startswith(MORE) for id in metadata["materials"]),
        "most_atoms": max(map(len, learned)),
        "rare_elements": {symbol: counts[symbol] for symbol in metadata["elements"] if counts[symbol] < RARE}}
    write_json(RESULTS / "validation.json", summary)
    write_text(PACKAGED / "README.md", card(summary, rows, metadata["elements"]))
    print(summary)


def card(summary: dict[str, Any], rows: list[dict[str, Any]], elements: list[str]) -> str:
    "The model card: card.md with the numbers of the validation set."
    ours, sad = (" | ".join(f"{how([row[key] for row in rows]):.2%}" for how in (np.mean, np.median, max))
                 for key in ("nmae", "sad"))
    kinds = "\n".join(f"| {kind} | {x['materials']} | {x['nmae_mean']:.2%} | {x['sad_mean']:.2%} |"
                      for kind, x in summary["classes"].items())
    worst = ", ".join(f"{row['formula']} ({row['nmae']:.2%})" for row in sorted(rows, key=lambda row: -row["nmae"])[:5])
    low, high = (how(row["inside_90"] for row in rows) for how in (min, max))
    left_out, vacuum = read_table(RESULTS / "folds.csv"), read_table(RESULTS / "vacuum.csv")
    fixed = read_table(RESULTS.parent / "gpaw" / "materials.csv")
    bands = {start: [row[f"eigenvalues_{start}"] for row in fixed] for start in ("atoms", "predicted")}
    text = read_text(RESULTS / "card.md").format(
        summary=summary, minutes=summary["training"]["cpu_seconds"] / 60, ours=ours, sad=sad, kinds=kinds, worst=worst, low=low,
        folds=len(left_out), fold_worst=max(row["nmae"] / row["sad"] for row in left_out),
        vacuum=", ".join(f"{row['crystal']} {row['nmae_predicted']:.1%} ({row['nmae_sad']:.1%})" for row in vacuum),
        bands={name: float(np.median(values)) for name, values in bands.items()}, bands_worst=max(bands["predicted"]),
        n_bands=len(fixed), fold_inside=float(np.mean([row["inside_90"] for row in left_out])),
        fold_potential=max(row["potential"] / row["potential_sad"] for row in left_out), high=high, few=RARE,
        rare=", ".join(s for s in elements if s in summary["rare_elements"]), elements=" ".join(elements))
    data = f"{len(rows)} materials of GPAW, validation: whole grids"
    scores = [Metric("nmae", "mean NMAE, %", 100 * summary["nmae_mean"], data),
              Metric("nmae-median", "median NMAE, %", 100 * summary["nmae_median"], data),
              Metric("potential", "mean error of the potential, meV", summary["potential_mean"], data)]
    return with_metrics(text.replace("%", " %"), "tomat-probe", scores)


def measured(store: RawStore, checkpoint: Path, ids: Sequence[str], scale: float) -> list[dict[str, Any]]:
    "The scores of a run's checkpoint on some materials, with the expected errors multiplied by one number."
    model: ProbeNet = load_probe(checkpoint)
    with torch.no_grad():
        model.head.bias[1] += np.log(scale)
    predictor = ProbePredictor(model)
    return [scores_of(store, id, predictor)[0] for id in track(ids, checkpoint.parent.name, unit="materials")]


def of_runs(store: RawStore, found: Sequence[Path]) -> list[dict[str, Any]]:
    "A row for each run, with its scores on the validation split."
    rows, scale = [], read_json(RESULTS / "held_out.json")["calibration_scale"]
    for run in found:
        metadata = load_probe(run / "model").training_metadata
        summary = summary_of(measured(store, run / "model", store.split("validation"), scale))
        rows.append({"run": run.name, "materials": len(metadata["materials"]), "elements": len(metadata["elements"]),
                     **{key: metadata[key] for key in ("seed", "steps", "parameters", "cpu_seconds")},
                     **{key: summary[key] for key in (
                         "nmae_mean", "nmae_median", "nmae_worst", "sad_mean", "potential_mean", "potential_sad_mean",
                         "better_than_sad", "better_potential_than_sad", "inside_50_mean", "inside_90_mean", "rank_of_materials",
                         "unlike", "voxels_per_cpu_s")}})
        print(rows[-1], flush=True)
    return rows


def seeds(store: RawStore, runs: Path) -> None:
    names = [f"{size}-{seed}{more}" for more in ("", "-48000", "-more") for size in PROBE_SIZES for seed in range(10)]
    table = RESULTS / "seeds.csv"
    known = {row["run"]: row for row in read_table(table)}
    new = [runs / name for name in names if name not in known and (runs / name / "model").exists()]
    known |= {row["run"]: row for row in of_runs(store, new)}
    write_table(table, [known[name] for name in names if name in known])


def more(store: RawStore, runs: Path) -> None:
    ids, scale = store.split("validation"), read_json(RESULTS / "held_out.json")["calibration_scale"]
    before, after = (measured(store, runs / name / "model", ids, scale) for name in ("S-0", "S-0-more"))
    write_table(RESULTS / "more_scores.csv", [
        {"id": a["id"], "formula": a["formula"], **{f"{key}_{name}": row[key] for name, row in (("before", b), ("after", a))
                                                    for key in ("nmae", "potential", "charges")}}
        for b, a in zip(before, after, strict=True)])


def curve(store: RawStore, runs: Path, steps: int) -> None:
    ids = store.split("train")
    drawn = [ids[i] for i in np.random.default_rng(1).permutation(len(ids))]
    for part in PARTS:
        train(store, runs / f"part-{part:g}", f"part-{part:g}", sorted(drawn[:round(part * len(ids))], key=ids.index), steps)
    write_table(RESULTS / "curve.csv", of_runs(store, [runs / f"part-{part:g}" for part in PARTS]))


def folds(store: RawStore, runs: Path, steps: int, only: Sequence[str]) -> None:
    ids, scale, table = store.split("train"), read_json(RESULTS / "held_out.json")["calibration_scale"], RESULTS / "folds.csv"
    elements = {id: system.split("-") for id, system in systems(store).items()}
    rows = [row for row in read_table(table) if row["element"] not in only]
    for element in only:
        left_out = [id for id in ids if element in elements[id]]
        others, name = [id for id in ids if element not in elements[id]], f"without-{element}"
        checkpoint = train(store, runs / name, name, others, steps)
        rows += [{"element": element, "steps": steps, **row} for row in measured(store, checkpoint, left_out, scale)]
        write_table(table, rows)


def near_atoms(self: Trust, state_AxW: torch.Tensor, number_A: torch.Tensor) -> torch.Tensor:
    "What `Trust` would give if each atom were doubted by itself."
    doubt_A = 1 - self.element_Z[number_A]
    return torch.stack([doubt_A, torch.zeros_like(doubt_A)], 1)


def trust(store: RawStore, runs: Path) -> None:
    rows, crystals = [], {id: system.split("-") for id, system in systems(store).items()}
    ways = list(product(("Ne", "H", "F", "Bi"), (1.0, 0.75, 0.5, 0.25, 0.0), ("atoms", "crystal")))
    for element, kept, where in track(ways, "trust"):
        model, scores = load_probe(runs / f"without-{element}" / "model"), []
        assert model.trust is not None
        model.trust.element_Z[Element(element).Z] = kept
        with patch.object(Trust, "forward", near_atoms) if where == "atoms" else nullcontext():
            for id in (id for id, elements in crystals.items() if element in elements):
                density = with_sad(store.read(id)).as_units("e/Å³")
                assert density.sad is not None
                half = tuple(slice(None, None, 1 + (n % 2 == 0)) for n in density.shape)
                sad, true = (np.ascontiguousarray(x[half], np.float64) for x in (density.sad, density.values))
                made = shift_to_mean(sad + predict_field(model, density.structure, sad.shape, sad)[0], sad.mean())
                lattice, volume = density.structure.lattice.matrix, density.volume
                worth = [potential_error(x * volume, true * volume, lattice) for x in (made, sad)]
                scores.append((nmae(made, true) / nmae(sad, true), worth[0] / worth[1]))
        of_sad, potential = np.array(scores).T
        rows.append({"element": element, "kept": kept, "where": where, "nmae_mean": float(of_sad.mean()),
                     "nmae_max": float(of_sad.max()), "potential_mean": float(potential.mean()),
                     "potential_max": float(potential.max())})
    write_table(RESULTS / "trust.csv", rows)


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices="split calibrate train package evaluate seeds more curve folds trust".split())
    parser.add_argument("path", help="a raw store; for package the folder of the runs")
    parser.add_argument("runs", nargs="?", help="folder of the runs")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", default="S", choices=list(PROBE_SIZES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="folder of the run in RUNS; SIZE-SEED if not given")
    parser.add_argument("--only", nargs="*", default=FOLDS, choices=FOLDS)
    args = parser.parse_args()
    if args.what not in ("split", "package", "evaluate") and not args.runs:
        parser.error("name a folder for the runs")
    if args.what == "package":
        return package(Path(args.path, "S-0-more"))
    store, runs, steps = RawStore(args.path), Path(args.runs or ""), args.steps
    if args.what == "train":
        name = args.name or named(store, f"{args.size}-{args.seed}")
        train(store, runs / name, named(store, "part-1"), store.split("train"), steps, args.size, args.seed)
    elif args.what == "folds":
        folds(store, runs, steps, args.only)
    elif args.what in ("calibrate", "curve"):
        {"calibrate": calibrate, "curve": curve}[args.what](store, runs, steps)
    elif args.what in ("seeds", "more", "trust"):
        {"seeds": seeds, "more": more, "trust": trust}[args.what](store, runs)
    else:
        {"split": split, "evaluate": evaluate}[args.what](store)


if __name__ == "__main__":
    main()
