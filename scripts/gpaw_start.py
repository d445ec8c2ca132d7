"""Start GPAW from a density that tomat predicted, or keep that density fixed: bands and an energy without an SCF.

    tomat predict POSCAR --ecut 500 --out CHGCAR
    python gpaw_start.py CHGCAR                                   # fixed: Fermi level, gap, energy
    python gpaw_start.py CHGCAR --path GXWLG --out bands.json     # the same, and bands that `ase band-structure` draws
    python gpaw_start.py CHGCAR --scf                             # an SCF that starts from it

This file is alone: it runs under the Python that has GPAW (22.8, its legacy interface, plane waves, no spin) and does not import
tomat. The settings of the command are those of the packaged network's training data. For others, write your own script for ASE:

    from gpaw_start import hold, read, start
    atoms, rho = read("CHGCAR")
    hold(GPAW(mode=PW(500), xc="PBE", kpts=(8, 8, 8)), atoms, rho)     # or start(…)
    atoms.get_potential_energy()

With MPI the processes may share the k-points, but not the grid: give GPAW parallel={'domain': 1}.
The energy of a fixed density is the Harris energy: its error is of second order in that of the density.

GPAW's density has two parts: a smooth one on the grid, and charges inside each sphere that follow from atomic occupancies. A
predicted density is the total of both, with the charges of the spheres softened. The occupancies are those of free atoms, and the
smooth part is chosen such that the total is the predicted one.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SOFT = 0.22    # Å, width of the Gaussian that softens the charges of the spheres in the training data
CLOSE = 0.01   # relative difference of the electrons of a file and of GPAW's setups that scaling may hide
SETTINGS = {"xc": "PBE", "mixer": {"backend": "pulay", "beta": 0.25, "nmaxold": 8, "weight": 1},
            "symmetry": {"point_group": True, "tolerance": 1e-5}, "txt": None}  # of the training data, beside the options
CONVERGED = {"density": 1e-5, "eigenstates": 1e-7, "energy": 1e-4}  # e and eV² an electron, eV an electron
FIXED = {"convergence": {**CONVERGED, "bands": "CBM+0.5"}, "nbands": -8}  # of a fixed density: the lowest empty bands too


def read(path: str | Path,  # a CHGCAR
         ) -> tuple[Any, np.ndarray]:  # ase Atoms, and (nx, ny, nz) density, e/Å³
    "Crystal and density of a file."
    from ase.calculators.vasp import VaspChargeDensity
    found = VaspChargeDensity(str(path))
    if not found.chg:
        raise ValueError(f"{path} holds no density: write one with `tomat predict POSCAR --ecut 500 --out CHGCAR`.")
    return found.atoms[0], found.chg[0]


def kpoints(atoms: Any,             # ase Atoms
            density: float = 3.4,   # points per 1/Å along each reciprocal axis, 2π included
            ) -> dict[str, Any]:  # keyword `kpts` of GPAW
    "A mesh around Γ with at least the given density."
    sides = 2 * np.pi * np.linalg.norm(np.linalg.inv(atoms.cell.array).T, axis=1)
    return {"size": tuple(int(n) for n in np.maximum(1, np.ceil(density * sides - 1e-6))), "gamma": True}


# The density


def softened(dens: Any,   # density of a GPAW calculator, initialised
             D_asp: Any,  # atom → (1, pairs) atomic occupancies
             ) -> np.ndarray:  # (nx, ny, nz), e/bohr³
    "Charges of the spheres that belong to atomic occupancies, softened."
    from ase.units import Bohr
    waves = dens.pd3.zeros()
    dens.ghat.add(waves, {a: D_sp[0] @ dens.setups[a].Delta_pL for a, D_sp in D_asp.items()})
    return dens.pd3.ifft(waves * np.exp(-dens.pd3.G2_qG[0] * (SOFT / Bohr) ** 2 / 4))


def total(dens: Any, nt_G: np.ndarray, D_asp: Any) -> np.ndarray:
    "The density that a prediction stands for, e/bohr³, of a smooth part on the coarse grid and of atomic occupancies."
    return dens.pd2.interpolate(nt_G - dens.nct_G, dens.pd3)[0] + softened(dens, D_asp)


def smooth(calc: Any, rho_g: np.ndarray, D_asp: Any) -> np.ndarray:
    "The smooth part on the coarse grid, with the symmetry of the crystal, that keeps a total density."
    dens = calc.density
    nt_G = dens.pd3.restrict(rho_g - softened(dens, D_asp), dens.pd2)[0] + dens.nct_G
    calc.wfs.kd.symmetry.symmetrize(nt_G, dens.gd)
    return nt_G


def on_grid(calc: Any,           # GPAW calculator, initialised
            rho_xyz: np.ndarray,  # (nx, ny, nz) density, e/Å³
            ) -> np.ndarray:  # the same in e/bohr³, with GPAW's number of electrons
    "A density as GPAW takes it; raises `ValueError` for another grid or other electrons."
    from ase.units import Bohr
    dens, volume = calc.density, calc.atoms.get_volume()
    grid, wanted = tuple(int(n) for n in dens.finegd.N_c), calc.wfs.nvalence
    if rho_xyz.shape != grid:
        raise ValueError(f"The density has {rho_xyz.shape} points and this calculation {grid}: predict it with "
                         f"`--grid {','.join(map(str, grid))}`.")
    if dens.gd.comm.size > 1:
        raise ValueError("The grid of this calculation is split among processes: give GPAW parallel={'domain': 1}.")
    if dens.ncomponents != 1:
        raise ValueError("A predicted density has no spin, and this calculation has: make it with spinpol=False.")
    found = rho_xyz.mean() * volume
    if abs(found - wanted) > CLOSE * wanted:
        raise ValueError(f"The density has {found:.2f} electrons and the setups of this calculation {wanted}: take the setups "
                         "that the density was computed with.")
    return rho_xyz * (Bohr**3 * wanted / found)


def start_from(calc: Any,                       # GPAW calculator, without atoms
               atoms: Any,                      # ase Atoms
               choose: Callable[[Any, Any, Any], tuple[Any, Any]],  # calc, nt_G and D_asp of free atoms → nt_G and D_asp
               fixed: bool = False,             # keep the density
               ) -> Any:
    "The calculator, which has the atoms and is going to start from the chosen smooth part and occupancies."
    calc.initialize(atoms)
    atoms.calc, dens = calc, calc.density
    of_atoms, dens.fixed = dens.initialize_from_atomic_densities, fixed

    def initialize(basis_functions: Any) -> None:
        of_atoms(basis_functions)
        nt_G, D_asp = choose(calc, dens.nt_sG[0].copy(), dens.D_asp.copy())
        dens.mixer.reset()
        dens.nt_sG[0] = nt_G
        dens.update_atomic_density_matrices(D_asp)
        dens.calculate_normalized_charges_and_mix()

    dens.initialize_from_atomic_densities = initialize
    return calc


def start(calc: Any,            # GPAW calculator, without atoms
          atoms: Any,           # ase Atoms
          rho_xyz: np.ndarray,  # (nx, ny, nz) density, e/Å³
          fixed: bool = False,  # keep the density
          ) -> Any:
    "The calculator, which has the atoms and is going to start from the density."
    def choose(calc: Any, nt_G: np.ndarray, D_asp: Any) -> tuple[np.ndarray, Any]:
        return smooth(calc, rho_g, D_asp), D_asp
    start_from(calc, atoms, choose, fixed)
    rho_g = on_grid(calc, rho_xyz)
    return calc


def hold(calc: Any, atoms: Any, rho_xyz: np.ndarray) -> Any:
    "The calculator, which has the atoms and is going to keep the density, e/Å³, fixed."
    return start(calc, atoms, rho_xyz, fixed=True)


def bands(calc: Any,     # GPAW calculator, converged or with a fixed density
          path: Any,     # band path of ASE, or an array of (points, 3) in reciprocal lattice vectors
          empty: int = 4,  # bands above the filled ones
          ) -> Any:  # GPAW calculator
    "A calculator with the eigenvalues along a path, of the density of another."
    count = int(np.ceil(calc.wfs.nvalence / 2)) + empty
    return calc.fixed_density(kpts=path, symmetry="off", nbands=count + 4, convergence={"bands": count, "eigenstates": 1e-7},
                              maxiter=100, txt=None)


# The command


def gap_of(calc: Any) -> float:
    "The gap at the mesh of k-points, eV, 0 for a metal."
    from ase.dft.bandgap import bandgap
    return float(bandgap(calc, output=None)[0])


def run(args: argparse.Namespace) -> None:
    from gpaw import GPAW, PW, FermiDirac, setup_paths
    if args.setups:
        setup_paths[:] = [args.setups]
    atoms, rho_xyz = read(args.density)
    calc = GPAW(mode=PW(args.ecut), kpts=kpoints(atoms, args.kpt_density), occupations=FermiDirac(args.width),
                **({"convergence": CONVERGED} if args.scf else FIXED), **SETTINGS)
    start(calc, atoms, rho_xyz, fixed=not args.scf)
    energy = atoms.get_potential_energy()
    how = "self-consistent" if args.scf else "fixed density"
    print(f"{atoms.get_chemical_formula()}: {how} after {calc.scf.niter} iterations, energy {energy:.4f} eV, "
          f"Fermi level {calc.get_fermi_level():.4f} eV, gap {gap_of(calc):.3f} eV")
    if args.path:
        drawn = bands(calc, atoms.cell.bandpath(args.path, npoints=args.points)).band_structure()
        drawn.write(args.out)
        print(f"{args.out}: {args.points} points along {args.path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("density", help="a CHGCAR on the grid of GPAW's density")
    parser.add_argument("--scf", action="store_true", help="iterate to self-consistency; if not given, the density is fixed")
    parser.add_argument("--ecut", type=float, default=500.0, help="cutoff of the plane waves, eV")
    parser.add_argument("--kpt-density", type=float, default=3.4, help="k-points per 1/Å along each reciprocal axis")
    parser.add_argument("--width", type=float, default=0.1, help="width of the Fermi-Dirac distribution, eV")
    parser.add_argument("--path", help="path of the bands, such as GXWLG")
    parser.add_argument("--points", type=int, default=60, help="k-points along the path")
    parser.add_argument("--out", default="bands.json", help="file for the bands along --path")
    parser.add_argument("--setups", help="folder of PAW setups; GPAW's own if not given")
    args = parser.parse_args()
    try:
        run(args)
    except ModuleNotFoundError as err:
        parser.exit(1, f"gpaw_start: {err.name} is missing in {sys.executable}: take the Python that has GPAW.\n")
    except (OSError, ValueError) as err:
        parser.exit(1, f"gpaw_start: {err}\n")


if __name__ == "__main__":
    main()
