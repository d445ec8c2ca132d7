"""More training materials than the data set has: crystals drawn by rule, converged by GPAW with its settings.

    python results/probe/make_more_data.py draw STORE                           # more.csv: which crystals
    python3 results/probe/make_more_data.py gpaw RUNS [--setups DIR]            # the Python that has GPAW, 22.8
    python results/probe/make_more_data.py store STORE RUNS OUT                 # STORE with them in its part train

Held-out materials of the training split, and the runs that leave an element out, say where the network errs most: where light
nonmetals take charge. So each crystal has one of them, drawn by NONMETALS, in a prototype drawn from PROTOTYPES, with metals drawn
from those of the training split, most of them with balanced oxidation
states. Each has a chemical system of its own, found in neither part of STORE. The lengths are such that
the closest atoms are CLOSE times the sum of their covalent radii apart. Two or more runs of `gpaw` share the work: each crystal
is claimed by one of them. What does not converge in MOST iterations is left out.
"""

import argparse
import csv
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import get_distances
from ase.spacegroup import crystal

RESULTS = Path(__file__).resolve().parent
MORE = RESULTS / "more.csv"
sys.path.insert(0, str(RESULTS.parents[1] / "scripts"))
DRAWN, MOST = 171, 60
CLOSE = (0.9, 1.02)
UNBALANCED = 0.4  # share of draws that need no balance of common oxidation states
NONMETALS = {"H": 35, "O": 25, "F": 15, "N": 10, "S": 8, "Cl": 4, "C": 3}
LEFT_OUT = {"Ne", "Ce", "Yb", "B", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I", "Se", "As", "H"}
# letters: A, B metals, X the nonmetal, H hydrogen; positions as in the International Tables
PROTOTYPES: dict[str, tuple[str, int, list[tuple[float, float, float]], list[float]]] = {
    "rock salt": ("AX", 225, [(0, 0, 0), (.5, .5, .5)], [1, 1, 1, 90, 90, 90]),
    "zinc blende": ("AX", 216, [(0, 0, 0), (.25, .25, .25)], [1, 1, 1, 90, 90, 90]),
    "nickel arsenide": ("AX", 194, [(0, 0, 0), (1 / 3, 2 / 3, .25)], [1, 1, 1.55, 90, 90, 120]),
    "fluorite": ("AX", 225, [(0, 0, 0), (.25, .25, .25)], [1, 1, 1, 90, 90, 90]),
    "antifluorite": ("XA", 225, [(0, 0, 0), (.25, .25, .25)], [1, 1, 1, 90, 90, 90]),
    "cadmium iodide": ("AX", 164, [(0, 0, 0), (1 / 3, 2 / 3, .25)], [1, 1, 1.5, 90, 90, 120]),
    "brucite": ("AOH", 164, [(0, 0, 0), (1 / 3, 2 / 3, .22), (1 / 3, 2 / 3, .43)], [1, 1, 1.5, 90, 90, 120]),
    "bismuth fluoride": ("AXX", 225, [(0, 0, 0), (.25, .25, .25), (.5, .5, .5)], [1, 1, 1, 90, 90, 90]),
    "rhenium trioxide": ("AX", 221, [(0, 0, 0), (.5, 0, 0)], [1, 1, 1, 90, 90, 90]),
    "perovskite": ("ABX", 221, [(.5, .5, .5), (0, 0, 0), (.5, 0, 0)], [1, 1, 1, 90, 90, 90]),
    "antiperovskite": ("ABX", 221, [(.5, 0, 0), (.5, .5, .5), (0, 0, 0)], [1, 1, 1, 90, 90, 90]),
    "half-Heusler": ("ABX", 216, [(0, 0, 0), (.25, .25, .25), (.5, .5, .5)], [1, 1, 1, 90, 90, 90]),
    "potassium hexachloroplatinate": ("ABX", 225, [(.25, .25, .25), (0, 0, 0), (.25, 0, 0)], [1, 1, 1, 90, 90, 90]),
    "ordered rock salt": ("ABXX", 123, [(0, 0, 0), (.5, .5, .5), (.5, .5, 0), (0, 0, .5)], [1, 1, 1.42, 90, 90, 90]),
}


def draw(store: Any) -> list[dict[str, Any]]:
    "A row for each crystal."
    from pymatgen.core import Composition
    seen, metals = set[str](), set[str]()
    for part in ("train", "validation"):
        for id in store.split(part):
            elements = {element.symbol for element in store.read(id).structure.composition.elements}
            seen.add("-".join(sorted(elements)))
            metals |= elements - LEFT_OUT if part == "train" else set()
    random, rows = Random(0), list[dict[str, Any]]()
    while len(rows) < DRAWN:
        nonmetal = random.choices(list(NONMETALS), list(NONMETALS.values()))[0]
        prototype = random.choice(list(PROTOTYPES))
        A, B = random.sample(sorted(metals), 2)
        symbols = [{"A": A, "B": B, "X": nonmetal}.get(letter, letter) for letter in PROTOTYPES[prototype][0]]
        row = {"id": f"more-{len(rows):03d}", "prototype": prototype, "elements": " ".join(symbols),
               "close": round(random.uniform(*CLOSE), 3)}
        system, odd = "-".join(sorted(set(symbols))), random.random() < UNBALANCED
        if system not in seen and (odd or Composition(atoms_of(row).get_chemical_formula()).oxi_state_guesses()):
            seen.add(system)
            rows.append(row)
    return rows


def rows_of_table() -> list[dict[str, str]]:
    with open(MORE, newline="") as file:
        return list(csv.DictReader(file))


def atoms_of(row: dict[str, Any]) -> Atoms:
    "The primitive cell of a row."
    _, group, basis, cell = PROTOTYPES[row["prototype"]]
    atoms = crystal(row["elements"].split(), basis, spacegroup=group, cellpar=cell, primitive_cell=True)
    radii = covalent_radii[atoms.numbers]
    shifts = np.stack(np.meshgrid(*[range(-2, 3)] * 3, indexing="ij"), -1).reshape(-1, 3) @ atoms.cell.array
    apart = np.stack([get_distances(atoms.positions, atoms.positions + shift)[1] for shift in shifts])
    apart[apart < 1e-6] = np.inf
    atoms.set_cell(atoms.cell * float(row["close"]) / (apart / (radii[:, None] + radii)).min(), scale_atoms=True)
    return atoms


def converge(atoms: Atoms, setups: str | None, most: int) -> np.ndarray | None:  # (nx, ny, nz), e/Å³
    "The density of a crystal; None where it takes more iterations than `most`."
    import gpaw
    from ase.units import Bohr
    from gpaw import GPAW, PW, FermiDirac, KohnShamConvergenceError
    from gpaw_start import CONVERGED, SETTINGS, kpoints, total
    if setups:
        gpaw.setup_paths[:] = [setups]
    atoms.calc = GPAW(mode=PW(500), kpts=kpoints(atoms), occupations=FermiDirac(0.1), convergence=CONVERGED, maxiter=most,
                      **SETTINGS)
    try:
        atoms.get_potential_energy()
    except KohnShamConvergenceError:
        return None
    density = atoms.calc.density
    rho_xyz: np.ndarray = total(density, density.nt_sG[0], density.D_asp) / Bohr**3
    return rho_xyz


def run(runs: Path, setups: str | None) -> None:
    runs.mkdir(parents=True, exist_ok=True)
    for row in rows_of_table():
        if (runs / "stop").exists():
            return
        try:
            (runs / f"{row['id']}.claimed").touch(exist_ok=False)
        except FileExistsError:
            continue
        atoms = atoms_of(row)
        rho_xyz = converge(atoms, setups, MOST)
        if rho_xyz is not None:
            aside = runs / f"{row['id']}.part.npz"
            np.savez(aside, numbers=atoms.numbers, cell=atoms.cell.array, positions=atoms.get_scaled_positions(),
                     rho=rho_xyz.astype(np.float32))
            aside.rename(runs / f"{row['id']}.npz")
        print(row["id"], atoms.get_chemical_formula(), row["prototype"], rho_xyz is not None, flush=True)


def store_of(store: Any, runs: Path, out: Path) -> None:
    "A copy of a store with the converged crystals in its part train."
    from pymatgen.core import Lattice, Structure

    from tomat.density.core import RHO, Density
    from tomat.density.store import write_store
    from tomat.io.progress import track
    parts = {name: store.split(name) for name in ("train", "validation")}
    more = [row["id"] for row in rows_of_table() if (runs / f"{row['id']}.npz").exists()]

    def read(id: str) -> Density:
        if id not in more:
            return store.read(id)
        data = np.load(runs / f"{id}.npz")
        return Density(data["rho"], Structure(Lattice(data["cell"]), data["numbers"], data["positions"]), id, RHO)

    write_store((read(id) for id in track([*parts["train"], *more, *parts["validation"]], "write")),
                {"train": parts["train"] + more, "validation": parts["validation"]}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "gpaw", "store"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--setups", help="folder of PAW setups; GPAW's own if not given")
    args = parser.parse_args()
    if args.what == "gpaw":
        return run(args.paths[0], args.setups)
    from tomat.density.store import RawStore
    store = RawStore(args.paths[0])
    if args.what == "draw":
        from tomat.study.site import write_table
        return write_table(MORE, draw(store))
    store_of(store, *args.paths[1:])


if __name__ == "__main__":
    main()
