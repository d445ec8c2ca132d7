"""What a predicted density saves GPAW, on validation materials: results/gpaw/.

    python results/gpaw/make_gpaw_results.py predict STORE RUNS
    python3 results/gpaw/run_gpaw.py RUNS [--setups DIR]             # the Python that has GPAW
    python results/gpaw/make_gpaw_results.py table RUNS

predict: the packaged checkpoint predicts the materials on the grids of their densities, RUNS/ID.npz; RUNS/chosen.json has their
scores. run_gpaw.py: the calculations, files for each material; a stopped run goes on where it was. table: materials.csv and
bands.json.

The materials are chosen before anything is computed: cells of at most five atoms without Cr, Mn, Fe, Co and Ni, which the data set
treats as not magnetic. Of each chemical class there are the three whose own calculation was fastest, and beside them the material
with the largest error of the potential in results/probe/validation.csv and every material that is called unlike the training data.
Bands are drawn of three materials: of the compounds, those whose errors of the potential are the smallest, the middle one and the
largest.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Element

from tomat.density.classify import classify
from tomat.density.core import Density
from tomat.density.metrics import nmae, potential_error
from tomat.density.store import RawStore
from tomat.atoms.sad import with_sad
from tomat.io.files import read_json, write_json
from tomat.io.progress import track
from tomat.io.remote import TomatError
from tomat.prediction.predictors import load_predictor
from tomat.run.launch import sentences
from tomat.study.site import read_table, write_table

RESULTS = Path(__file__).resolve().parent
MAGNETIC = {"Cr", "Mn", "Fe", "Co", "Ni"}
MOST_ATOMS, OF_EACH_CLASS = 5, 3


def choose(densities: dict[str, Density], scores: dict[str, dict[str, Any]]) -> list[str]:
    "The ids of the materials, by the rule above."
    small = [id for id, density in densities.items() if len(density.structure) <= MOST_ATOMS
             and not MAGNETIC & {element.symbol for element in density.structure.composition.elements}]
    fastest = sorted(small, key=lambda id: densities[id].metadata["scf_seconds"])
    kinds = {id: classify(densities[id].structure) for id in small}
    found = {id for kind in kinds.values() for id in [id for id in fastest if kinds[id] == kind][:OF_EACH_CLASS]}
    found |= {max(small, key=lambda id: float(scores[id]["potential"]))}
    return sorted(found | {id for id in small if scores[id]["unlike"] == "True"})


def predict(store: RawStore, runs: Path) -> None:
    scores = {row["id"]: row for row in read_table(RESULTS.parent / "probe" / "validation.csv")}
    predictor, rows = load_predictor(), []
    densities = {id: store.read(id) for id in store.split("validation")}
    for id in track(choose(densities, scores), "predict", unit="materials"):
        density = with_sad(densities[id]).as_units("e/Å³")
        assert density.sad is not None
        cell, made = density.structure, predictor.predict(density.structure, density.shape)
        assert made.expected_error_xyz is not None
        rho_xyz, matrix = made.density.rho, cell.lattice.matrix
        runs.mkdir(parents=True, exist_ok=True)
        np.savez(runs / f"{id}.npz", cell=matrix, numbers=[site.specie.Z for site in cell], positions=cell.frac_coords,
                 predicted=rho_xyz)
        rows.append({"id": id, "formula": density.formula, "class": classify(cell), "atoms": len(cell),
                     "nmae": nmae(rho_xyz, density.values), "nmae_sad": nmae(density.sad, density.values),
                     "expected": float(made.expected_error_xyz.sum() / np.abs(density.values).sum()),
                     "distance": made.distance, "unlike": made.unlike,
                     "potential": potential_error(rho_xyz * cell.volume, density.total, matrix),
                     "potential_sad": potential_error(density.sad * cell.volume, density.total, matrix)})
    write_json(runs / "chosen.json", {"materials": rows, "bands": of_bands(rows)})
    print(", ".join(f"{row['formula']} ({row['id']})" for row in rows))


def of_bands(rows: list[dict[str, Any]]) -> list[str]:
    "The ids of the compounds with the smallest, the middle and the largest error of the potential."
    compounds = [row for row in rows if row["formula"] not in Element.__members__]
    ranked = [row["id"] for row in sorted(compounds, key=lambda row: row["potential"])]
    return [ranked[0], ranked[len(ranked) // 2], ranked[-1]]


def table(runs: Path) -> None:
    def part(id: str, name: str) -> dict[str, Any]:
        path = runs / f"{id}.{name}.json"
        if not path.exists():
            raise TomatError(f"{path} is missing: run results/gpaw/run_gpaw.py first.")
        return read_json(path)
    chosen, rows = read_json(runs / "chosen.json"), []
    for row in chosen["materials"]:
        iterations, densities = part(row["id"], "scf"), part(row["id"], "fixed")
        seconds = iterations.pop("cpu_seconds") + densities.pop("cpu_seconds")
        rows.append({**row, **iterations, **densities, "cpu_seconds": round(seconds, 1)})
    columns = dict.fromkeys(column for row in rows for column in row)
    write_table(RESULTS / "materials.csv", [{column: row.get(column, "") for column in columns} for row in rows])
    drawn = [row for row in rows if row["id"] in chosen["bands"]]
    write_json(RESULTS / "bands.json", {row["id"]: {"formula": row["formula"], "potential": row["potential"],
                                                    **part(row["id"], "bands")} for row in drawn})
    print(f"{len(rows)} materials, {sum(row['cpu_seconds'] for row in rows) / 60:.0f} CPU minutes")


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["predict", "table"])
    parser.add_argument("paths", nargs="+", help="for predict a raw store and a folder for the calculations, for table the folder")
    args = parser.parse_args()
    if len(args.paths) != {"predict": 2, "table": 1}[args.what]:
        parser.error("predict takes STORE RUNS, and table takes RUNS")
    if args.what == "predict":
        predict(RawStore(args.paths[0]), Path(args.paths[1]))
    else:
        table(Path(args.paths[0]))


if __name__ == "__main__":
    main()
