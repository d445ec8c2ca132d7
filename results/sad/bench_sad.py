"""The sum of atomic densities (SAD): its agreement with stored sums, its time, and the gain of fitted atoms.

    python results/sad/bench_sad.py STORE VASP_FILE… [--out results/sad]

Writes agreement.csv (each validation material against its stored sum), bench.json (seconds of one core, beside the sum point by
point), fit.csv (each validation material under several sets of atoms), learning.csv (more training materials), folds.csv (how
hard to pull: train part alone, four folds by chemical system), vasp.csv (files of another code), and fitted.json, the atoms
fitted to the train part.  Takes about ten minutes and 1 GB.
"""

import os

for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
    os.environ[f"{name}_NUM_THREADS"] = "1"  # before numpy is imported: its pools read these once

import argparse
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

import tomat.atoms.fit_atoms as fits
from tomat.atoms.analytic import ANALYTIC, analytic_atoms
from tomat.density.core import Density
from tomat.io.files import write_json
from tomat.atoms.fit_atoms import COMPUTED_PRIOR, FitSums, add_up, columns_of, solve, sums_of
from tomat.density.formats import read_density
from tomat.density.metrics import nmae
from tomat.io.progress import track
from tomat.atoms.sad import FreeAtom, FreeAtoms, packaged_atoms, sad_density, save_atoms, valence_electrons
from tomat.density.store import RawStore
from tomat.study.site import write_table

PULLS, TAIL_PULLS = (0.03, 0.1, 0.3, 1.0, 3.0), (1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS, PARTS = 4, (10, 20, 40, 80, 160, 312, 598)
Row = dict[str, Any]


def around(atom: FreeAtom, centre: np.ndarray, lattice: np.ndarray, shape: tuple[int, ...],
           ) -> tuple[list[np.ndarray], np.ndarray]:  # indices of the grid along each axis, and squared distances there
    "The box of grid points that an atom can reach, not wrapped, and how far each of them is."
    reach = atom.cutoff * np.linalg.norm(np.linalg.inv(lattice), axis=0)
    box = [np.arange(a, b + 1) for a, b in zip(np.ceil((centre - reach) * shape).astype(int),
                                               np.floor((centre + reach) * shape).astype(int), strict=True)]
    u, v, w = np.ix_(*(i / n - x for i, n, x in zip(box, shape, centre, strict=True)))
    g = lattice @ lattice.T
    r2 = g[0, 0] * u**2 + g[1, 1] * v**2 + 2 * g[0, 1] * u * v + g[2, 2] * w**2 + 2 * w * (g[0, 2] * u + g[1, 2] * v)
    return box, r2.ravel()


def point_by_point(structure: Structure, shape: tuple[int, int, int]) -> np.ndarray:
    "The opponent: the spline of each atom at every grid point in its reach, all images, added up."
    total = np.zeros(int(np.prod(shape)))
    for site in structure:
        atom = packaged_atoms()[site.specie.symbol]
        box, r2 = around(atom, site.frac_coords, structure.lattice.matrix, shape)
        inside = np.flatnonzero(r2 < atom.cutoff**2)
        where = np.ravel_multi_index(np.ix_(*box), shape, mode="wrap").ravel()[inside]
        total += np.bincount(where, atom.density_r(np.sqrt(np.maximum(r2[inside], 0))), minlength=total.size)
    return (total * (valence_electrons(structure) / total.mean())).reshape(shape)


def agreement(densities: list[Density]) -> list[Row]:
    "Each material against the sum that the store holds."
    rows = []
    for density in densities:
        start = process_time()
        total_xyz = sad_density(density.structure, density.shape)
        seconds = process_time() - start
        assert density.sad is not None
        rows.append({"id": density.id, "formula": density.formula, "atoms": len(density.structure), "voxels": density.values.size,
                     "nmae_to_stored": nmae(total_xyz, density.sad), "electrons": valence_electrons(density.structure),
                     "electrons_off": total_xyz.mean() - valence_electrons(density.structure),
                     "electrons_off_density": total_xyz.mean() / density.n_electrons - 1,
                     "nmae_to_density": nmae(total_xyz, density.total), "seconds": seconds})
    return rows


def cells() -> dict[str, tuple[Structure, tuple[int, int, int]]]:
    "What is timed: the usual, the tiny, the huge, the skewed, the full."
    rng, elements = np.random.default_rng(0), ["Na", "Cl", "Ti", "O"]
    def cell(lattice: Lattice, n_atoms: int) -> Structure:
        return Structure(lattice, sorted(rng.choice(elements, n_atoms)), rng.random((n_atoms, 3)))
    skewed = Lattice.from_parameters(5.4, 5.4, 14, 90, 22, 90)
    return {"10 atoms": (cell(Lattice.cubic(5.4), 10), (100, 100, 100)),
            "1 atom, tiny": (cell(Lattice.cubic(2.4), 1), (24, 24, 24)),
            "1 atom, 22 degrees": (cell(skewed, 1), (48, 48, 120)), "1 atom, huge": (cell(Lattice.cubic(20), 1), (160, 160, 160)),
            "200 atoms": (cell(Lattice.cubic(14.5), 200), (144, 144, 144))}


def seconds_of(make: Callable[[Structure, tuple[int, int, int]], np.ndarray], structure: Structure, shape: tuple[int, int, int],
               repeats: int) -> tuple[float, np.ndarray]:  # processor time, the best of some; what was made
    best = np.inf
    for _ in range(repeats):
        start = process_time()
        total_xyz = make(structure, shape)
        best = min(best, process_time() - start)
    return best, total_xyz


def bench() -> dict[str, Row]:
    "Ours and the opponent's on the same cells in the same run; form factors are made once, before."
    found = {}
    for name, (structure, shape) in track(list(cells().items()), "time"):
        sad_density(structure, (2, 2, 2))
        ours, waves_xyz = seconds_of(sad_density, structure, shape, 3)
        theirs, points_xyz = seconds_of(point_by_point, structure, shape, 1)
        found[name] = {"atoms": len(structure), "shape": shape, "volume": round(structure.volume, 2), "seconds": round(ours, 4),
                       "seconds_point_by_point": round(theirs, 3), "times_faster": round(theirs / ours, 1),
                       "nmae_to_point_by_point": nmae(waves_xyz, points_xyz)}
    return found


def scores(densities: list[Density], atoms: FreeAtoms) -> dict[str, float]:
    "NMAE of each material that has an atom for all its elements."
    found = {}
    for density in densities:
        if {site.specie.symbol for site in density.structure} <= set(atoms.atoms):
            found[density.id] = nmae(sad_density(density.structure, density.shape, atoms), density.total)
    return found


def fitted_to(parts: list[FitSums], pull: float, prior: FreeAtoms | None = None) -> FreeAtoms:
    "The atoms of some materials under another pull than the chosen one, to free atoms or to computed ones."
    kept = fits.PRIOR_WEIGHT, fits.TAIL_WEIGHT
    fits.PRIOR_WEIGHT, fits.TAIL_WEIGHT = pull, pull
    try:
        return solve(add_up(parts), prior)
    finally:
        fits.PRIOR_WEIGHT, fits.TAIL_WEIGHT = kept


def of_system(density: Density) -> int:
    "The fold of a material: that of its chemical system."
    return zlib.crc32("".join(sorted(density.structure.composition.get_el_amt_dict())).encode()) % FOLDS


def folds(train: list[Density], parts: list[FitSums]) -> list[Row]:
    "How hard to pull, without a look at the validation part."
    fold, rows = [of_system(density) for density in train], []
    for kind, prior, pulls in (("to free atoms", None, PULLS), ("to computed atoms", COMPUTED_PRIOR, TAIL_PULLS)):
        for pull in track(pulls, kind):
            found: list[float] = []
            for left_out in range(FOLDS):
                atoms = fitted_to([p for p, f in zip(parts, fold, strict=True) if f != left_out], pull, prior)
                found += scores([d for d, f in zip(train, fold, strict=True) if f == left_out][::3], atoms).values()
            rows.append({"pull": pull, "kind": kind, "materials": len(found), "mean": mean(found), "median": median(found),
                         "worst": max(found)})
    return rows


def fit_rows(validation: list[Density], sets: Mapping[str, FreeAtoms]) -> list[Row]:
    "Each validation material under each set of atoms; empty where an element has no atom."
    errors = {name: scores(validation, atoms) for name, atoms in sets.items()}
    return [{"id": d.id, "formula": d.formula} | {name: found.get(d.id, "") for name, found in errors.items()} for d in validation]


def learning(validation: list[Density], parts: list[FitSums]) -> list[Row]:
    "More training materials; elements without one keep their free atom."
    order, rows = np.random.default_rng(0).permutation(len(parts)), []
    for n in (n for n in PARTS if n <= len(parts)):
        fitted = solve(add_up(parts[i] for i in sorted(order[:n])))
        found = list(scores(validation, replace(fitted, atoms={**packaged_atoms().atoms, **fitted.atoms})).values())
        rows.append({"materials": n, "elements": len(fitted.atoms), "mean": mean(found), "median": median(found),
                     "worst": max(found)})
    return rows


def half_fitted(density: Density) -> float:
    "NMAE of atoms that were fitted to other voxels of the same file: the least that a sum of spheres can reach here."
    n = min(6000, density.values.size // 2)
    atoms = solve(sums_of(density, n))
    chosen = fits.material_rng(0, density.id).choice(density.values.size, n, replace=False)
    others = np.setdiff1d(np.random.default_rng(1).choice(density.values.size, 2 * n, replace=False), chosen)
    columns = columns_of(density.structure, np.stack(np.unravel_index(others, density.shape), 1) / density.shape)
    rho = density.rho.reshape(-1)[others]
    return nmae(sum(c @ fits._in_basis(atoms[s]) for s, c in columns.items()), rho)  # type: ignore[arg-type]


def vasp(paths: list[str]) -> list[Row]:
    "Files of another code: packaged atoms scaled to their electrons, and atoms fitted to the three together and each alone."
    densities = [read_density(path, id=Path(path).name) for path in paths]
    parts = [sums_of(density) for density in densities]
    together, computed = solve(add_up(parts)), solve(add_up(parts), COMPUTED_PRIOR)
    rows = []
    for density in densities:
        packaged = sad_density(density.structure, density.shape)
        ours = sad_density(density.structure, density.shape, together)
        symbols = sorted({site.specie.symbol for site in density.structure})
        rows.append({"file": density.id, "formula": density.formula, "electrons": density.n_electrons,
                     "electrons_packaged": valence_electrons(density.structure),
                     "electrons_fitted": valence_electrons(density.structure, together),
                     "packaged": nmae(packaged * (density.n_electrons / packaged.mean()), density.total),
                     "fitted": nmae(ours, density.total),
                     "fitted_computed": nmae(sad_density(density.structure, density.shape, computed), density.total),
                     "other_voxels": half_fitted(density),
                     "valences": " ".join(f"{s} {together[s].n_valence:.3f}" for s in symbols)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store with the parts train and validation")
    parser.add_argument("vasp", nargs="+", help="density files of another program")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    args = parser.parse_args()
    store = RawStore(args.store)
    validation = [store.read(id) for id in store.split("validation")]
    write_table(args.out / "agreement.csv", agreement(validation))
    write_json(args.out / "bench.json", {"command": "python results/sad/bench_sad.py STORE VASP_FILE…", "cells": bench()})
    write_table(args.out / "vasp.csv", vasp(args.vasp))
    train = [store.read(id) for id in store.split("train")]
    parts = [sums_of(density) for density in track(train, "sum", unit="materials")]
    fitted = solve(add_up(parts))
    save_atoms(fitted, args.out / "fitted.json")
    sets = {"free": packaged_atoms(), "fitted": fitted, "fitted_computed": solve(add_up(parts), COMPUTED_PRIOR)}
    sets |= {name: analytic_atoms(name) for name in ANALYTIC}
    write_table(args.out / "fit.csv", fit_rows(validation, sets))
    write_table(args.out / "learning.csv", learning(validation, parts))
    write_table(args.out / "folds.csv", folds(train, parts))


if __name__ == "__main__":
    main()
