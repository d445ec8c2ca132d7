"""From a folder of density files to a predictor, by the command line alone: results/own_data/.

    python results/own_data/make_own_data_results.py chgcars STORE WORK [--steps 3000] [--materials N] [--seeds 0 1]
    python results/own_data/make_own_data_results.py files WORK FILE… [--steps 200]

chgcars: the materials of STORE are written out as a folder of CHGCARs, with the packaged atoms hidden, and taken from there as a
user would take them: `tomat convert --validation`, `fit-atoms --prior computed`, `train`, `evaluate`, `predict`.  A second run
has the packaged atoms: chgcars.json compares both, as means over the seeds.
files: a few real files of VASP or of the Materials Project, the same commands.  Every step must run; files.csv holds, for each
material, the electrons of its file, of its fitted atoms and of its prediction.  They are scored on what they were trained on,
which says nothing about new materials.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tomat.atoms.sad import load_atoms, packaged_atoms
from tomat.density.formats import read_density, write_density
from tomat.density.store import RawStore
from tomat.io.files import write_json
from tomat.io.progress import track
from tomat.run.launch import sentences
from tomat.study.site import read_table, write_table

RESULTS = Path(__file__).resolve().parent
TOMAT = Path(sys.executable).with_name("tomat")


def tomat(*line: Any) -> str:
    "Run the command, and show it; returns what it printed."
    words = [str(word) for word in line]
    print("tomat", *words, flush=True)
    done = subprocess.run([TOMAT, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def scores(folder: Path) -> dict[str, dict[str, float]]:
    "NMAE of the probe network and of SAD, by material."
    rows = read_table(folder / "scores.csv")
    return {entry: {row["id"]: float(row["nmae"]) for row in rows if row["entry"] == entry} for entry in ("probe", "SAD")}


def write_chgcars(store: RawStore, folder: Path, most: int | None) -> None:
    "The densities of a store as a folder of calculations."
    for id in track(store.ids[:most], "write", unit="CHGCARs"):
        path = folder / id / "CHGCAR"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_density(store.read(id), path, "chgcar")


def scored(run: Path) -> Path:
    "The folder of a run's scores."
    return run.with_name(run.name.replace("run", "scores", 1))


def chgcars(store: RawStore, work: Path, steps: int, most: int | None, seeds: list[int]) -> None:
    write_chgcars(store, work / "calculations", most)
    densities = work / "densities"
    tomat("convert", work / "calculations", densities, "--validation", 0.1)
    tomat("fit-atoms", densities, "--split", "train", "--prior", "computed", "--out", work / "atoms.json")
    found: dict[str, Any] = {"steps": steps, "materials": {part: len(ids) for part, ids in RawStore(densities).splits.items()}}
    runs = {(name, seed): work / (f"run-{name}" + f"-seed-{seed}" * (seed > 0))
            for seed in seeds for name in ("fitted", "packaged")}
    for (name, seed), run in runs.items():
        atoms = work / "atoms.json" if name == "fitted" else "packaged"
        tomat("train", densities, "--out", run, "--atoms", atoms, "--steps", steps, "--seed", seed)
        tomat("evaluate", densities, "--checkpoint", f"probe={run}/model", "--out", scored(run), "--pictures", 0)
    by_run = {key: scores(scored(run)) for key, run in runs.items()}
    both = sorted(set.intersection(*(set(entries["probe"]) for entries in by_run.values())))
    found["scored"] = len(both)  # those whose elements are all in the training part, so that all have a fitted atom
    for name in ("fitted", "packaged"):
        of = [by_run[name, seed] for seed in seeds]
        found[name] = {f"{entry}_{kind}": float(np.mean([middle([entries[entry][id] for id in both]) for entries in of]))
                       for entry in ("probe", "SAD") for kind, middle in (("mean", np.mean), ("median", np.median))}
        found[name]["of_seeds"] = [float(np.mean([entries["probe"][id] for id in both])) for entries in of]
    right = packaged_atoms()
    fitted = load_atoms(work / "atoms.json")
    wrong = sorted(s for s, atom in fitted.atoms.items() if abs(atom.n_valence - right[s].n_valence) > 1e-3)
    found |= {"ratio": found["fitted"]["probe_mean"] / found["packaged"]["probe_mean"], "elements": len(fitted.atoms),
              "elements_with_other_valence": wrong}
    validation = both[0]
    structure = read_density(work / "calculations" / validation / "CHGCAR").structure
    structure.to(str(work / "POSCAR"), fmt="poscar")
    tomat("predict", work / "POSCAR", "--checkpoint", work / "run-fitted" / "model", "--out", work / "CHGCAR")
    true, predicted = (read_density(path).n_electrons for path in (work / "calculations" / validation / "CHGCAR", work / "CHGCAR"))
    found |= {"predicted": validation, "electrons": true, "electrons_predicted": predicted}
    write_json(RESULTS / "chgcars.json", found)
    print(json.dumps(found, indent=1))


def files(work: Path, paths: list[Path], steps: int) -> None:
    calculations = work / "calculations"
    calculations.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copy(path, calculations / path.name)
    tomat("convert", calculations, work / "densities")
    tomat("fit-atoms", work / "densities", "--out", work / "atoms.json")
    tomat("train", work / "densities", "--out", work / "run", "--steps", steps)
    tomat("evaluate", work / "densities", "--checkpoint", f"probe={work}/run/model", "--out", work / "scores", "--pictures", 0)
    store, atoms, rows = RawStore(work / "densities"), load_atoms(work / "atoms.json"), []
    for id in store.ids:
        density = store.read(id)
        density.structure.to(str(work / "POSCAR"), fmt="poscar")
        out = work / "CHGCAR"
        tomat("predict", work / "POSCAR", "--checkpoint", work / "run" / "model", "--grid", *density.shape, "--out", out)
        predicted, symbols = read_density(out), [site.specie.symbol for site in density.structure]
        error = np.abs(predicted.total - density.total).mean() / np.abs(density.total).mean()
        rows.append({"material": id, "formula": density.formula, "electrons": round(density.n_electrons, 4),
                     "of_fitted_atoms": round(sum(atoms[s].n_valence for s in symbols), 4),
                     "predicted": round(predicted.n_electrons, 4), "nmae_of_trained_material": round(float(error), 5),
                     "valence": " ".join(f"{s}={atoms[s].n_valence:g}" for s in dict.fromkeys(symbols))})
        print(rows[-1])
    write_table(RESULTS / "files.csv", rows)


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("chgcars")
    one.add_argument("store", type=RawStore)
    one.add_argument("work", type=Path)
    one.add_argument("--steps", type=int, default=3000)
    one.add_argument("--materials", type=int)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    two = kinds.add_parser("files")
    two.add_argument("work", type=Path)
    two.add_argument("files", type=Path, nargs="+")
    two.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if args.kind == "chgcars":
        chgcars(args.store, args.work, args.steps, args.materials, args.seeds)
    else:
        files(args.work, args.files, args.steps)


if __name__ == "__main__":
    main()
