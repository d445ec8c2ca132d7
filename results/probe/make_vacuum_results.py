"""Predicted densities of crystals with a vacuum, beside converged ones: results/probe/vacuum.csv.

    python3 results/probe/make_vacuum_results.py gpaw RUNS [--setups DIR]      # the Python that has GPAW, 22.8
    python results/probe/make_vacuum_results.py score RUNS

Two molecules in boxes of 8 Å, a slab of magnesia of four layers and a sheet of boron nitride, made by ase at its usual lengths of
bonds, not relaxed. GPAW has the settings of the data set, a minute of CPU time for each. The packaged checkpoint predicts each as
it is, and once more with the difference kept in the vacuum too, as the versions before did.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule, surface

from make_more_data import RESULTS, converge

SIDE = 8.0  # Å
MOST = 333  # iterations, as GPAW has it


def structures() -> dict[str, Any]:  # name → ase Atoms
    found = {}
    for name, formula in (("water", "H2O"), ("methane", "CH4")):
        atoms = molecule(formula)
        atoms.set_cell([SIDE] * 3)
        atoms.center()
        found[name] = atoms
    slab = surface(bulk("MgO", "rocksalt", a=4.21, cubic=True), (1, 0, 0), 1)
    slab.center(vacuum=5, axis=2)
    a = 2.51
    cell = [[a, 0, 0], [-a / 2, a * 3**0.5 / 2, 0], [0, 0, 10]]
    sheet = Atoms("BN", cell=cell, scaled_positions=[[0, 0, .5], [1 / 3, 2 / 3, .5]])
    return found | {"MgO slab": slab, "BN sheet": sheet}


def score(runs: Path) -> list[dict[str, Any]]:
    from unittest.mock import patch

    from tomat.atoms.sad import sad_density
    from tomat.density.metrics import nmae, potential_error
    from tomat.prediction.crystals import as_structure
    from tomat.prediction.predictors import load_predictor
    predictor, rows = load_predictor(), []
    for name, atoms in structures().items():
        structure = as_structure(atoms)
        true_xyz = np.load(runs / f"{name}.npy") * structure.volume
        lattice, row = structure.lattice.matrix, {"crystal": name, "atoms": len(structure), "electrons": float(true_xyz.mean())}
        kept = predictor.predict(structure, true_xyz.shape)
        with patch("tomat.prediction.predictors.in_reach", lambda *_: None):
            before = predictor.predict(structure, true_xyz.shape)
        for entry, total_xyz in (("sad", sad_density(structure, true_xyz.shape)), ("predicted", kept.density.total),
                                 ("before", before.density.total)):
            row |= {f"nmae_{entry}": nmae(total_xyz, true_xyz), f"potential_{entry}": potential_error(total_xyz, true_xyz, lattice)}
        row |= {"electrons_predicted": kept.electrons_before, "electrons_before": before.electrons_before,
                "expected": kept.expected_nmae, "unlike": kept.unlike}
        rows.append(row)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gpaw", "score"])
    parser.add_argument("runs", type=Path, help="folder for the converged densities")
    parser.add_argument("--setups", help="folder of PAW setups; GPAW's own if not given")
    args = parser.parse_args()
    if args.what == "gpaw":
        args.runs.mkdir(parents=True, exist_ok=True)
        for name, atoms in structures().items():
            if (args.runs / f"{name}.npy").exists():
                continue
            atoms.pbc = True
            if (rho_xyz := converge(atoms, args.setups, MOST)) is None:
                sys.exit(f"{name} does not converge in {MOST} iterations.")
            np.save(args.runs / f"{name}.npy", rho_xyz.astype(np.float32))
        return
    from tomat.study.site import write_table
    write_table(RESULTS / "vacuum.csv", score(args.runs))


if __name__ == "__main__":
    main()
