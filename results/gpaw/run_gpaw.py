"""The calculations of results/gpaw/, under the Python that has GPAW (22.8): see make_gpaw_results.py.

    python3 results/gpaw/run_gpaw.py RUNS [--setups DIR] [--only ID …]

RUNS/ID.reference.npz has the converged density of a material, which a second run with other predictions takes up; RUNS/ID.scf.json,
RUNS/ID.fixed.json and, for three materials, RUNS/ID.bands.json have the numbers. Settings and convergence are those of the data
set: plane waves up to 500 eV, PBE, k-points at most 0.29 Å⁻¹ apart, Fermi-Dirac 0.1 eV, Pulay mixing.

An SCF starts from free atoms, from the prediction, or from the converged density with its own occupancies, at once or after the
density was held for HELD iterations (`held_…`): the first orbitals are poor, and spoil a good density. With a fixed density there
are the same three densities and the converged one with the occupancies of free atoms, `occupancies`. Then the occupancies become
those of the eigenstates while the total density is kept, `relaxed` for the prediction and `relaxed_occupancies` for the converged
density. Eigenvalues are compared with those of the converged density, within DEEP eV below its Fermi level and after the best
constant shift; energies with the converged one.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from gpaw_start import CONVERGED, FIXED, SETTINGS, bands, kpoints, on_grid, smooth, start_from, total

ECUT, WIDTH, HELD, DEEP = 500.0, 0.1, 3, 10.0  # eV, eV, iterations, eV
MOST, MOST_RELAXED = 60, 25  # iterations; an SCF, or occupancies, that take more count as not converged
BETTER = 4  # iterations after convergence: the reference must be closer to the limit than what is compared with it
POINTS = 60  # along the path of the bands
Choice = Callable[[Any, Any, Any], tuple[Any, Any]]


def calculator(atoms: Any, held: int = 0, most: int = MOST, fixed: bool = False) -> Any:
    from gpaw import GPAW, PW, FermiDirac
    return GPAW(mode=PW(ECUT), kpts=kpoints(atoms), occupations=FermiDirac(WIDTH), maxiter=most,
                experimental={"niter_fixdensity": held}, **(FIXED if fixed else {"convergence": CONVERGED}), **SETTINGS)


def eigenvalues(calc: Any) -> np.ndarray:  # (k-points, bands), eV
    return np.array([calc.get_eigenvalues(kpt=k) for k in range(len(calc.get_ibz_k_points()))])


def iterations(atoms: Any, choice: Choice, held: int = 0) -> int | None:
    "Iterations of an SCF; None if it does not converge."
    from gpaw import KohnShamConvergenceError
    calc = start_from(calculator(atoms, held), atoms, choice)
    try:
        atoms.get_potential_energy()
    except KohnShamConvergenceError:
        return None
    return int(calc.scf.niter)


def fixed(atoms: Any, choice: Choice) -> dict[str, Any]:
    "Energy, Fermi level and eigenvalues of a density that is kept."
    calc = start_from(calculator(atoms, fixed=True), atoms, choice, fixed=True)
    energy = atoms.get_potential_energy()
    return {"calc": calc, "energy": energy, "fermi": calc.get_fermi_level(), "eps": eigenvalues(calc)}


def relaxed(atoms: Any, choice: Choice) -> dict[str, Any] | None:
    "The same for a total density whose occupancies relax; None if they do not converge."
    from gpaw import KohnShamConvergenceError, Mixer
    calc = start_from(calculator(atoms, most=MOST_RELAXED, fixed=True), atoms, choice)
    calc.set_positions(calc.atoms)
    dens = calc.density
    rho_g = total(dens, dens.nt_sG[0], dens.D_asp)
    dens.set_mixer(Mixer(0.7, 5, 1))
    dens.mixer.reset()
    for mixer in dens.mixer.basemixers:  # the smooth part follows from the occupancies, which alone are to agree
        mixer.dotprod = lambda one, other, D_one, D_other: sum(np.vdot(a, b) for a, b in zip(D_one, D_other, strict=True))
    dens.mixer.mix(dens.nt_xG, dens.D_asp)

    def update(wfs: Any) -> None:
        wfs.calculate_atomic_density_matrices(dens.D_asp)
        dens.nt_sG[0] = smooth(calc, rho_g, dens.D_asp)
        dens.mix(None)

    dens.update = update
    try:
        energy = atoms.get_potential_energy()
    except KohnShamConvergenceError:
        return None
    return {"calc": calc, "energy": energy, "fermi": calc.get_fermi_level(), "eps": eigenvalues(calc)}


def of_atoms(calc: Any, nt_G: np.ndarray, D_asp: Any) -> tuple[np.ndarray, Any]:
    return nt_G, D_asp


def of_density(rho_xyz: np.ndarray) -> Choice:
    return lambda calc, nt_G, D_asp: (smooth(calc, on_grid(calc, rho_xyz), D_asp), D_asp)


def filled(D_asp: Any, saved: Any) -> Any:
    "Occupancies like those given, with saved numbers."
    found = D_asp.copy()
    for a in found:
        found[a][:] = saved[f"D{a}"]
    return found


def of_reference(saved: Any) -> Choice:
    return lambda calc, nt_G, D_asp: (saved["nt"].copy(), filled(D_asp, saved))


def of_reference_total(saved: Any) -> Choice:
    "The converged density with the occupancies of free atoms."
    def choice(calc: Any, nt_G: np.ndarray, D_asp: Any) -> tuple[np.ndarray, Any]:
        return smooth(calc, total(calc.density, saved["nt"], filled(D_asp, saved)), D_asp), D_asp
    return choice


def reference(atoms: Any, path: Path) -> Any:
    "The converged density, its energy and the iterations from free atoms, computed once."
    if not path.exists():
        begun = time.process_time()
        calc = start_from(calculator(atoms), atoms, of_atoms)
        atoms.get_potential_energy()
        niter = calc.scf.niter
        for _ in range(BETTER):
            calc.density.update(calc.wfs)
            calc.hamiltonian.update(calc.density)
            calc.wfs.eigensolver.iterate(calc.hamiltonian, calc.wfs)
            calc.hamiltonian.get_energy(calc.wfs.calculate_occupation_numbers(), calc.wfs)
        from ase.units import Ha
        D = {f"D{a}": D_sp for a, D_sp in calc.density.D_asp.items()}
        with open(path, "wb") as file:
            np.savez(file, nt=calc.density.nt_sG[0], energy=calc.hamiltonian.e_total_extrapolated * Ha, iterations=niter,
                     seconds=time.process_time() - begun, **D)
    return dict(np.load(path))


def errors(found: dict[str, Any], exact: dict[str, Any], energy: float, weights: np.ndarray, calc: Any) -> dict[str, float]:
    "Errors of a fixed density: eigenvalues and gap in meV, the energy in meV an atom."
    ref, top = exact["eps"], exact["fermi"]
    w = np.where((ref < top) & (ref > top - DEEP), weights[:, None], 0)
    wrong = 1000 * (found["eps"] - ref)
    wrong -= (wrong * w).sum() / w.sum()
    out = {"eigenvalues": float((abs(wrong) * w).sum() / w.sum()), "worst_eigenvalue": float(abs(wrong)[w > 0].max()),
           "energy": 1000 * (found["energy"] - energy) / len(calc.atoms)}
    if calc.wfs.nvalence % 2 == 0:
        n = calc.wfs.nvalence // 2
        out["gap"] = float(1000 * (found["eps"][:, n].min() - found["eps"][:, n - 1].max()))
    return out


def read(runs: Path, id: str) -> tuple[Any, np.ndarray]:  # ase Atoms, (nx, ny, nz) predicted density in e/Å³
    from ase import Atoms
    data = np.load(runs / f"{id}.npz")
    return Atoms(numbers=data["numbers"], cell=data["cell"], scaled_positions=data["positions"], pbc=True), data["predicted"]


def scf(atoms: Any, saved: Any, predicted_xyz: np.ndarray) -> dict[str, Any]:
    "Iterations."
    choices = {"atoms": of_atoms, "predicted": of_density(predicted_xyz), "converged": of_reference(saved)}
    out: dict[str, Any] = {"k_points": "x".join(map(str, kpoints(atoms)["size"])), "scf_atoms": int(saved["iterations"])}
    out |= {f"scf_{name}": iterations(atoms, choices[name]) for name in ("predicted", "converged")}
    return out | {f"held_{name}": iterations(atoms, choice, HELD) for name, choice in choices.items()}


def densities(atoms: Any, saved: Any, predicted_xyz: np.ndarray) -> dict[str, Any]:
    "Errors of fixed densities."
    predicted, occupancies = of_density(predicted_xyz), of_reference_total(saved)
    out: dict[str, Any] = {}
    exact = fixed(atoms, of_reference(saved))
    found = {"atoms": fixed(atoms, of_atoms), "predicted": fixed(atoms, predicted), "occupancies": fixed(atoms, occupancies),
             "converged": exact, "relaxed": relaxed(atoms, predicted), "relaxed_occupancies": relaxed(atoms, occupancies)}
    for name, run in found.items():
        if run is not None:
            wrong = errors(run, exact, float(saved["energy"]), exact["calc"].get_k_point_weights(), run["calc"])
            out |= {f"{key}_{name}": round(value, 3) for key, value in wrong.items()}
            out[f"fixed_{name}"] = int(run["calc"].scf.niter)
    return out


def drawn(atoms: Any, saved: Any, predicted_xyz: np.ndarray) -> dict[str, Any]:
    "Bands along ASE's path for the lattice, eV, of each fixed density."
    path = atoms.cell.bandpath(npoints=POINTS)
    x, places, names = path.get_linear_kpoint_axis()
    out: dict[str, Any] = {"x": x.round(5).tolist(), "places": places.round(5).tolist(), "names": list(names)}
    for name, choice in {"atoms": of_atoms, "predicted": of_density(predicted_xyz), "converged": of_reference(saved)}.items():
        run = fixed(atoms, choice)
        out[name] = {"fermi": round(run["fermi"], 4), "bands": eigenvalues(bands(run["calc"], path))[:, :-4].T.round(3).tolist()}
    return out


def write(path: Path, measured: Callable[..., dict[str, Any]], *given: Any) -> None:
    "Measure once, and write what is found with the CPU seconds."
    if path.exists():
        return
    begun, part = time.process_time(), path.with_suffix(".part")
    found = measured(*given)
    found["cpu_seconds"] = round(time.process_time() - begun, 1)
    part.write_text(json.dumps(found))
    part.replace(path)
    print(path.name, {key: value for key, value in found.items() if not isinstance(value, list | dict)}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that `make_gpaw_results.py predict` wrote")
    parser.add_argument("--setups", help="folder of PAW setups; GPAW's own if not given")
    parser.add_argument("--only", nargs="*", help="ids of materials; all chosen ones if not given")
    args = parser.parse_args()
    import gpaw
    if args.setups:
        gpaw.setup_paths[:] = [args.setups]
    print(f"GPAW {gpaw.__version__}, setups in {gpaw.setup_paths[0]}")
    chosen = json.loads((args.runs / "chosen.json").read_text())
    for id in (row["id"] for row in chosen["materials"]):
        if args.only and id not in args.only:
            continue
        atoms, predicted_xyz = read(args.runs, id)
        given = atoms, reference(atoms, args.runs / f"{id}.reference.npz"), predicted_xyz
        write(args.runs / f"{id}.scf.json", scf, *given)
        write(args.runs / f"{id}.fixed.json", densities, *given)
        if id in chosen["bands"]:
            write(args.runs / f"{id}.bands.json", drawn, *given)


if __name__ == "__main__":
    main()
