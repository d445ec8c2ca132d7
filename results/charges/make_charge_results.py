"""Charges and potentials of predicted densities beside those of the true ones: results/charges/.

    python results/charges/make_charge_results.py STORE [--checkpoint RUN/model]

The materials are those of the validation part of STORE, predicted from their structures on their own grids by the packaged
checkpoint, or by another one. charges.csv has a row for each atom, potentials.csv one for each material, summary.json the means.
The errors of free atoms are the sizes of the true charges, as their own charges are zero.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from tomat.atoms.electrostatics import planar_average
from tomat.atoms.sad import packaged_atoms
from tomat.density.classify import classify
from tomat.density.metrics import hartree_potential
from tomat.density.store import RawStore
from tomat.io.files import write_json
from tomat.io.progress import track
from tomat.prediction.analysis import Analysis, analyze
from tomat.prediction.predictors import load_predictor
from tomat.run.launch import sentences
from tomat.study.site import write_table

RESULTS = Path(__file__).resolve().parent
COMMAND = "python results/charges/make_charge_results.py STORE"


def atoms_of(id: str, true: Analysis, made: Analysis) -> list[dict[str, Any]]:
    "A row for each atom."
    assert made.charge_at_most_N is not None and made.sphere_at_most_N is not None
    columns = {"true": true.charge_N, "predicted": made.charge_N, "at_most": made.charge_at_most_N, "radius": true.radius_N,
               "sphere_true": true.sphere_N, "sphere_predicted": made.sphere_N, "sphere_at_most": made.sphere_at_most_N}
    return [{"id": id, "formula": true.density.formula, "class": classify(true.density.structure), "atom": i + 1,
             "element": site.specie.symbol, **{name: float(values_N[i]) for name, values_N in columns.items()}}
            for i, site in enumerate(true.density.structure)]


def potential_of(id: str, true: Analysis, made: Analysis) -> dict[str, Any]:
    "Mean errors of the planar averages of the potential over the three axes, eV: of the prediction, of the SAD, and the bound."
    density, row = true.density, {"id": id, "formula": true.density.formula}
    assert density.sad is not None
    sad_xyz = hartree_potential((density.sad - density.total) / density.volume, density.structure.lattice.matrix)
    off = [np.abs(made.planes[axis].potential_n - plane.potential_n).mean() for axis, plane in true.planes.items()]
    bounds = [plane.at_most_n.mean() for plane in made.planes.values() if plane.at_most_n is not None]
    return row | {"error": float(np.mean(off)), "at_most": float(np.mean(bounds)),
                  "sad": float(np.mean([np.abs(planar_average(sad_xyz, axis)).mean() for axis in range(3)]))}


def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def summary_of(atoms: list[dict[str, Any]], materials: list[dict[str, Any]]) -> dict[str, Any]:
    "Means over atoms, and over the means of the materials; shares are errors ÷ bounds."
    error, at_most = np.abs(column(atoms, "predicted") - column(atoms, "true")), column(atoms, "at_most")
    sphere = np.abs(column(atoms, "sphere_predicted") - column(atoms, "sphere_true"))
    free, ids = np.abs(column(atoms, "true")), column(atoms, "id")
    def of_materials(values: np.ndarray) -> float:
        return float(np.mean([values[ids == id].mean() for id in dict.fromkeys(ids)]))
    return {"command": COMMAND, "atoms": len(atoms), "materials": len(materials), "charge_error": float(error.mean()),
            "charge_error_free": float(free.mean()), "charge_error_median": float(np.median(error)),
            "charge_error_of_materials": of_materials(error), "charge_error_free_of_materials": of_materials(free),
            "charge_share": float(error.sum() / at_most.sum()), "charge_inside": float((error <= at_most).mean()),
            "charge_rank": float(spearmanr(error, at_most)[0]), "sphere_error": float(sphere.mean()),
            "sphere_share": float(sphere.sum() / column(atoms, "sphere_at_most").sum()),
            "sphere_inside": float((sphere <= column(atoms, "sphere_at_most")).mean()),
            "potential_error": float(column(materials, "error").mean()),
            "potential_error_sad": float(column(materials, "sad").mean()),
            "potential_share": float(column(materials, "error").sum() / column(materials, "at_most").sum()),
            "potential_inside": float((column(materials, "error") <= column(materials, "at_most")).mean())}


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store")
    parser.add_argument("--checkpoint", help="another checkpoint than the packaged one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store, predictor, atoms, materials = RawStore(args.store), load_predictor(args.checkpoint), [], []
    for id in track(store.split("validation"), "analyze", unit="materials"):
        density = store.read(id)
        found = predictor.predict(density.structure, density.shape)
        true = analyze(density, packaged_atoms())
        made = analyze(found.density, packaged_atoms(), found.expected_error_xyz)
        atoms += atoms_of(id, true, made)
        materials.append(potential_of(id, true, made))
    write_table(RESULTS / "charges.csv", atoms)
    write_table(RESULTS / "potentials.csv", materials)
    summary = summary_of(atoms, materials)
    write_json(RESULTS / "summary.json", summary)
    print(summary)


if __name__ == "__main__":
    main()
