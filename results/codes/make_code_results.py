"""What Quantum ESPRESSO and ABINIT make of tomat's grids and files: results/codes/.

    python results/codes/make_code_results.py grids WORK [--potentials DIR]
    python results/codes/make_code_results.py trips WORK [--potentials DIR]

The programs pw.x, pp.x, abinit, cut3d and cp2k.psmp must be there (Debian: quantum-espresso, abinit, abinit-data, cp2k), and DIR
holds the potentials of silicon that Debian's abinit-data has, 14-Si.nlcc.UPF and 14si.4.hgh. WORK is a folder for their files.

grids: the grid that each program takes for 13 crystals and four cutoffs, beside that of tomat.density.grids: grids.json, which the
tests read too. trips: silicon, sheared until only inversion is left. Each program converges its density and writes it as XSF and
cube, tests/files/programs/. tomat reads the XSF file and puts it back (scripts/density_start.py), and the program starts from it;
and the same with its own file as it was, and with the prediction of the packaged checkpoint: trips.csv. CP2K writes a cube file and
starts from none.
"""

import argparse
import gzip
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from tomat.density.core import Density
from tomat.density.formats import read_density
from tomat.density.grids import abinit_grid, espresso_grid
from tomat.io.files import write_json
from tomat.io.progress import track
from tomat.io.remote import TomatError
from tomat.prediction.predictors import load_predictor
from tomat.run.launch import sentences
from tomat.study.site import write_table

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parents[1]
FILES = ROOT / "tests" / "files" / "programs"
sys.path.insert(0, str(ROOT / "scripts"))
from density_start import put

Shape = tuple[int, ...]
DIAMOND = Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.43), ["Si"], [[0, 0, 0]])
HEXAGONAL, SIXTH = "P6_3/mmc", [1 / 3, 2 / 3, 1 / 4]


def crystals() -> dict[str, Structure]:
    "Crystals of silicon of many symmetries, most of them nowhere in nature."
    def with_group(group: str, lattice: Lattice, place: list[float]) -> Structure:
        return Structure.from_spacegroup(group, lattice, ["Si"], [place])
    cell = DIAMOND.get_primitive_structure()
    matrix, places = cell.lattice.matrix, cell.frac_coords
    return {
        "diamond": cell, "diamond, cube": DIAMOND, "diamond, centred": Structure(matrix, ["Si"] * 2, [[1 / 8] * 3, [-1 / 8] * 3]),
        "diamond, strained": Structure(matrix * [1, 1, 1.07], ["Si"] * 2, places),
        "lonsdaleite": with_group(HEXAGONAL, Lattice.hexagonal(3.84, 6.28), [1 / 3, 2 / 3, 0.0625]),
        "white tin": with_group("I4_1/amd", Lattice.tetragonal(4.7, 2.6), [0, 0, 0]).get_primitive_structure(),
        "fcc": with_group("Fm-3m", Lattice.cubic(3.85), [0, 0, 0]).get_primitive_structure(),
        "simple cubic": with_group("Pm-3m", Lattice.cubic(2.53), [0, 0, 0]),
        "simple cubic, twice": Structure(np.diag([2.53, 2.53, 5.06]), ["Si"] * 2, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.5]]),
        "hcp": with_group(HEXAGONAL, Lattice.hexagonal(2.7, 4.4), SIXTH),
        "BC8": with_group("Ia-3", Lattice.cubic(6.636), [0.1003] * 3).get_primitive_structure(),
        "monoclinic": with_group("P2_1/c", Lattice.monoclinic(4.1, 5.3, 5.9, 103), [0.21, 0.13, 0.32]),
        "triclinic": Structure(Lattice.from_parameters(3.1, 4.7, 6.3, 80, 95, 110), ["Si"] * 3,
                               [[0.0, 0.0, 0.0], [0.31, 0.42, 0.23], [0.7, 0.66, 0.61]])}


def lines(array_nx3: np.ndarray, before: str = "") -> str:
    return "\n".join(before + " ".join(f"{x:.12f}" for x in row) for row in array_nx3)


def ran(work: Path, *command: str, text: str = "") -> str:
    "What a program prints."
    done = subprocess.run(command, cwd=work, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def numbers(pattern: str, text: str) -> list[str]:
    "The groups of the first match; raises `TomatError` without one."
    if (found := re.search(pattern, text)) is None:
        raise TomatError(f"The program did not print {pattern!r}, but ended with: {' '.join(text[-300:].split())}")
    return list(found.groups())


class Program:
    "A program in its folder."

    def __init__(self, work: Path, potentials: str) -> None:
        self.work, self.potentials = work, potentials
        work.mkdir(parents=True, exist_ok=True)


class Espresso(Program):
    name, cutoff = "Quantum ESPRESSO", 8.0  # Ry, of the orbitals
    density = "out/si.save/charge-density.dat"

    def run(self, cell: Structure, cutoff: float, more: str = "", mesh: int = 1) -> str:
        (self.work / "si.in").write_text(f"""&control
 calculation='scf' prefix='si' outdir='out' pseudo_dir='{self.potentials}'
/
&system
 ibrav=0 nat={len(cell)} ntyp=1 ecutwfc={cutoff} occupations='smearing' degauss=0.02
/
&electrons
 conv_thr=1e-9 {more}
/
ATOMIC_SPECIES
Si 28.085 14-Si.nlcc.UPF
CELL_PARAMETERS angstrom
{lines(cell.lattice.matrix)}
ATOMIC_POSITIONS crystal
{lines(cell.frac_coords, "Si ")}
K_POINTS automatic
{mesh} {mesh} {mesh} 0 0 0
""")
        return ran(self.work, "pw.x", "-in", "si.in")

    def version(self, printed: str) -> str:
        return numbers(r"PWSCF v\.(\S+)", printed)[0]

    def grid(self, cell: Structure, cutoff: float) -> Shape:
        printed = self.run(cell, cutoff, "electron_maxstep=1")
        return tuple(map(int, numbers(r"FFT dimensions: \(\s*(\d+),\s*(\d+),\s*(\d+)\)", printed)))

    def ours(self, cell: Structure, cutoff: float) -> Shape:
        return espresso_grid(cell, 4 * cutoff)

    def once(self, cell: Structure) -> None:
        self.run(cell, self.cutoff, "electron_maxstep=1", 2)

    def scf(self, cell: Structure, start: bool = False) -> tuple[str, int]:
        printed = self.run(cell, self.cutoff, "startingpot='file'" if start else "", 2)
        return printed, int(numbers(r"convergence has been achieved in\s+(\d+) iterations", printed)[0])

    def write(self, format: str) -> Path:
        "The converged density as XSF or cube."
        number, path = {"xsf": 5, "cube": 6}[format], f"espresso.{format}"
        plot = f"&plot\n nfile=1 iflag=3 output_format={number} fileout='{path}'\n/\n"
        (self.work / "pp.in").write_text(f"&inputpp\n prefix='si' outdir='out' plot_num=0 filplot='rho'\n/\n{plot}")
        ran(self.work, "pp.x", "-in", "pp.in")
        return self.work / path


class Abinit(Program):
    name, cutoff = "ABINIT", 4.0  # Ha, of the orbitals
    density = "sio_DEN"

    def run(self, cell: Structure, cutoff: float, more: str = "", mesh: int = 1, *options: str) -> str:
        (self.work / "si.abi").write_text(f"""pp_dirpath "{self.potentials}"
pseudos "14si.4.hgh"
acell 1 1 1 angstrom
rprim
{lines(cell.lattice.matrix)}
ntypat 1 znucl 14 natom {len(cell)} typat {len(cell)}*1
xred
{lines(cell.frac_coords)}
ecut {cutoff} toldfe 5e-10 occopt 7 tsmear 0.01 chkprim 0 chksymtnons 0 chksymbreak 0
ngkpt {mesh} {mesh} {mesh} nshiftk 1 shiftk 0 0 0
{more}
""")
        for old in (self.work / "si.abo", self.work / "sio_OUT.nc"):
            old.unlink(missing_ok=True)
        return ran(self.work, "abinit", "si.abi", *options)

    def version(self, printed: str) -> str:
        return numbers(r"Version (\S+) of ABINIT", printed)[0]

    def grid(self, cell: Structure, cutoff: float) -> Shape:
        return tuple(map(int, numbers(r"ngfft\s+(\d+)\s+(\d+)\s+(\d+)\n", self.run(cell, cutoff, "nstep 1", 1, "--dry-run"))))

    def ours(self, cell: Structure, cutoff: float) -> Shape:
        return abinit_grid(cell, cutoff)

    def once(self, cell: Structure) -> None:
        self.run(cell, self.cutoff, "nstep 1", 2)

    def scf(self, cell: Structure, start: bool = False) -> tuple[str, int]:
        more = ""
        if start:
            (self.work / self.density).rename(self.work / "start_DEN")
            more = 'getden_filepath "start_DEN"'
        printed = self.run(cell, self.cutoff, f"nstep 40 {more}", 2)
        return printed, int(numbers(r"At SCF step\s+(\d+), etot is converged", printed)[0])

    def write(self, format: str) -> Path:
        "The converged density as XSF or cube."
        path = f"abinit.{format}"
        (self.work / path).unlink(missing_ok=True)
        answers = {"xsf": [9, path, "n", 0], "cube": [14, path, 0]}[format]
        ran(self.work, "cut3d", text="\n".join(map(str, [self.density, *answers, ""])))
        return self.work / path


Code = Espresso | Abinit
CODES: list[Callable[[Path, str], Code]] = [Espresso, Abinit]
CUTOFFS = {"Quantum ESPRESSO": (8.0, 12.0, 17.3, 25.0), "ABINIT": (3.7, 6.0, 9.0, 12.5)}  # Ry and Ha, of the orbitals


def grids(work: Path, potentials: str) -> None:
    rows = []
    for code in (make(work / "grids", potentials) for make in CODES):
        for name, cell in track(list(crystals().items()), code.name, unit="crystals"):
            rows += [{"code": code.name, "crystal": name, "cutoff": cutoff, "grid": code.grid(cell, cutoff),
                      "tomat": code.ours(cell, cutoff)} for cutoff in CUTOFFS[code.name]]
    write_json(RESULTS / "grids.json", {
        "cutoff": "of the orbitals, Ry for Quantum ESPRESSO and Ha for ABINIT", "grids": rows,
        "crystals": {name: {"lattice": cell.lattice.matrix.tolist(), "positions": cell.frac_coords.tolist()}
                     for name, cell in crystals().items()}})
    print(f"{sum(row['grid'] == row['tomat'] for row in rows)} of {len(rows)} grids agree")


def sheared() -> Structure:
    "Silicon of which only inversion is left."
    cell = DIAMOND.get_primitive_structure()
    shear = np.array([[1.02, 0.03, 0.01], [0, 0.98, 0.04], [0, 0, 1.01]])
    return Structure(cell.lattice.matrix @ shear, ["Si"] * 2, cell.frac_coords + np.array([[0.01, 0.02, 0.03], [0, 0, 0]]))


def through(code: Code, cell: Structure, density: Density) -> int:
    "Iterations of an SCF that starts from a density of tomat."
    code.once(cell)
    put(density, code.work / code.density)
    return code.scf(cell, start=True)[1]


CP2K = """&GLOBAL
 PROJECT cp2k
 RUN_TYPE ENERGY
&END
&FORCE_EVAL
 &DFT
  BASIS_SET_FILE_NAME BASIS_MOLOPT
  POTENTIAL_FILE_NAME GTH_POTENTIALS
  &MGRID
   CUTOFF 60
   NGRIDS 1
  &END
  &XC
   &XC_FUNCTIONAL PBE
   &END
  &END
  &KPOINTS
   SCHEME MONKHORST-PACK 2 2 2
  &END
  &PRINT
   &E_DENSITY_CUBE
    STRIDE 1 1 1
   &END
  &END
 &END
 &SUBSYS
  &CELL
AXES
  &END
  &COORD
   SCALED
ATOMS
  &END
  &KIND Si
   BASIS_SET SZV-MOLOPT-SR-GTH
   POTENTIAL GTH-PBE-q4
  &END
 &END
&END
"""


def kept(path: Path) -> Density:
    "The density in a file of a program, which is kept for the tests."
    (FILES / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
    return read_density(path)


def cp2k(work: Path, cell: Structure) -> dict[str, Any]:
    "What is read of a cube file of CP2K."
    work.mkdir(parents=True, exist_ok=True)
    axes = "\n".join(f"   {name} {row}" for name, row in zip("ABC", lines(cell.lattice.matrix).split("\n"), strict=True))
    content = CP2K.replace("AXES", axes).replace("ATOMS", lines(cell.frac_coords, "   Si "))
    (work / "si.inp").write_text(content)
    printed = ran(work, "cp2k.psmp", "-i", "si.inp")
    path = (work / "cp2k-ELECTRON_DENSITY-1_0.cube").replace(work / "cp2k.cube")
    density = kept(path)
    return {"code": "CP2K", "version": numbers(r"CP2K version (\S+)", printed)[0], "grid": "x".join(map(str, density.shape)),
            "electrons_cube": density.n_electrons, "atoms": int(numbers(r"SCF run converged in\s+(\d+) steps", printed)[0])}


def trips(work: Path, potentials: str) -> None:
    rows: list[dict[str, Any]] = []
    cell = sheared()
    for code in (make(work / "trips", potentials) for make in CODES):
        printed, of_atoms = code.scf(cell)
        own = (code.work / code.density).read_bytes()
        read = {format: kept(code.write(format)) for format in ("xsf", "cube")}
        (code.work / code.density).write_bytes(own)
        of_own = code.scf(cell, start=True)[1]
        predicted = load_predictor().predict(cell, read["xsf"].shape).density
        rows.append({"code": code.name, "version": code.version(printed), "grid": "x".join(map(str, read["xsf"].shape)),
                     **{f"electrons_{format}": density.n_electrons for format, density in read.items()},
                     "atoms": of_atoms, "own_file": of_own, "through_tomat": through(code, cell, read["xsf"]),
                     "predicted": through(code, cell, predicted)})
        print(rows[-1])
    empty = dict.fromkeys(rows[0], "")
    rows.append(empty | cp2k(work / "trips", cell))
    write_table(RESULTS / "trips.csv", rows)


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grids", "trips"])
    parser.add_argument("work", type=Path, help="folder for the files of the programs")
    parser.add_argument("--potentials", default="/usr/share/abinit/psp", help="folder of the potentials")
    args = parser.parse_args()
    {"grids": grids, "trips": trips}[args.what](args.work, args.potentials)


if __name__ == "__main__":
    main()
