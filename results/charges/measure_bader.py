"""Bader charges of true and predicted densities by pybader: results/charges/bader.csv.

    pip install pybader 'setuptools<81'     # in an environment of its own: see the page of the results
    python results/charges/measure_bader.py STORE FILE…

The materials are those of the validation part of STORE, and the density files FILE… of any code. The surfaces of zero flux are
those of the valence density alone (`valence`), or of its sum with the densities of the cores, from computed free atoms (`true`,
`predicted`); the charges are always those of the valence electrons. A density file has no prediction.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pybader.interface import Bader
from pymatgen.core import Structure
from scipy.spatial import cKDTree

from tomat.atoms.charges import density_atoms, valence_numbers
from tomat.atoms.kohn_sham import RADII, kohn_sham_shells, outer_shells
from tomat.atoms.neighbours import periodic_images
from tomat.density.core import Density
from tomat.density.formats import read_density
from tomat.density.store import RawStore
from tomat.io.progress import track
from tomat.prediction.predictors import load_predictor
from tomat.run.launch import sentences
from tomat.study.site import write_table

RESULTS = Path(__file__).resolve().parent
REACH = 3.0  # Å, beyond which no core has a density


def core_table(symbol: str, n_valence: float) -> np.ndarray:
    "Density of the core electrons of a free atom at RADII, e/Å³."
    every = sum(shell.electrons * shell.rho_R for shell in kohn_sham_shells(symbol))
    outer = sum((n * shell.rho_R for shell, n in outer_shells(symbol, n_valence)), np.zeros(len(RADII)))
    return np.maximum(every - outer, 0)


def core_density(structure: Structure, shape: tuple[int, ...], valence_N: np.ndarray) -> np.ndarray:
    "Sum of the cores on a grid, e/Å³."
    matrix, images = structure.lattice.matrix, periodic_images(structure, REACH)
    points_Px3 = np.stack(np.meshgrid(*[np.arange(n) / n for n in shape], indexing="ij"), -1).reshape(-1, 3) @ matrix
    tables = [core_table(site.specie.symbol, n) for site, n in zip(structure, valence_N, strict=True)]
    rho_P, tree = np.zeros(len(points_Px3)), cKDTree(points_Px3)
    for atom, position in zip(images.atom_J, images.position_Jx3, strict=True):
        near = np.array(tree.query_ball_point(position, REACH), int)
        if near.size:
            rho_P[near] += np.interp(np.linalg.norm(points_Px3[near] - position, axis=1), RADII, tables[atom])
    return rho_P.reshape(shape)


def bader_charges(density: Density, cores_xyz: np.ndarray, valence_N: np.ndarray) -> np.ndarray:
    "Valence electrons less those inside an atom's surface of zero flux."
    structure, total_xyz = density.structure, np.ascontiguousarray(density.total, np.float64)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        found = Bader({"charge": total_xyz, "spin": None}, structure.lattice.matrix.copy(),
                      structure.frac_coords % 1 @ structure.lattice.matrix, {"voxel_offset": np.zeros(3)}, threads=1,
                      spin_flag=False)
        found.reference = total_xyz + cores_xyz * density.volume
        found.volumes_init()
        found.bader_calc()
        found.refine_volumes(found.bader_volumes)
        found.bader_to_atom_distance()
        found.sum_volumes()
    charges_N: np.ndarray = valence_N - found.atoms_charge / density.volume
    return charges_N


def rows_of(name: str, density: Density, made: Density | None) -> list[dict[str, Any]]:
    "A row for each atom."
    valence_N = valence_numbers(density.structure, density_atoms(density))
    cores_xyz = core_density(density.structure, density.shape, valence_N)
    alone, true = bader_charges(density, 0 * cores_xyz, valence_N), bader_charges(density, cores_xyz, valence_N)
    predicted = None if made is None else bader_charges(made, cores_xyz, valence_N)
    return [{"id": name, "formula": density.formula, "element": site.specie.symbol, "valence_electrons": float(valence_N[i]),
             "valence": float(alone[i]), "true": float(true[i]), "predicted": None if predicted is None else float(predicted[i])}
            for i, site in enumerate(density.structure)]


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store")
    parser.add_argument("files", nargs="*", help="density files of other codes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store, predictor, rows = RawStore(args.store), load_predictor(), []
    for file in args.files:
        rows += rows_of(Path(file).name, read_density(file), None)
    for id in track(store.split("validation"), "bader", unit="materials"):
        density = store.read(id)
        rows += rows_of(id, density, predictor.predict(density.structure, density.shape).density)
    write_table(RESULTS / "bader.csv", rows)


if __name__ == "__main__":
    main()
