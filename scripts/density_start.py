"""Put a density into the file from which Quantum ESPRESSO or ABINIT starts an SCF.

    python scripts/density_start.py DENSITY prefix.save/charge-density.dat     # Quantum ESPRESSO, then startingpot = 'file'
    python scripts/density_start.py DENSITY caseo_DEN                          # ABINIT, then getden_filepath

Neither program reads a cube or an XSF file. Both read the binary file that an earlier calculation wrote, so let the program write
one for the same crystal and cutoff first, after a single iteration (electron_maxstep = 1, nstep 1). This replaces the numbers of
the density in it and leaves the rest as it is. DENSITY is any file that tomat reads, or predicts:

    tomat predict POSCAR --ecutrho 160 --out rho.xsf                           # on the grid of Quantum ESPRESSO

Without spin, and for norm-conserving potentials: with PAW the program also reads occupancies of the atoms, which a density does not
hold and which stay as they are. The potentials must have as many valence electrons as the density. Tried with Quantum ESPRESSO 6.7
and ABINIT 9.6.2.
"""

import argparse
from pathlib import Path

import numpy as np
from ase.units import Bohr

from tomat.density.core import Density
from tomat.density.formats import read_density
from tomat.io.files import atomic_write
from tomat.io.remote import TomatError
from tomat.run.launch import sentences

CLOSE = 0.01  # relative difference of the numbers of electrons that scaling may hide


def records(path: Path,  # an unformatted file of Fortran
            ) -> list[bytes]:
    "The records of a file."
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        size = int.from_bytes(content[at:at + 4], "little")
        if content[at:at + 4] != content[at + 4 + size:at + 8 + size]:
            raise TomatError(f"{path} is no unformatted file of Fortran: give charge-density.dat or a DEN file.")
        found.append(content[at + 4:at + 4 + size])
        at += size + 8
    if len(found) < 4:
        raise TomatError(f"{path} holds no density: give charge-density.dat or a DEN file.")
    return found


def scaled(density: Density, electrons: float) -> np.ndarray:  # (nx, ny, nz), e/bohr³
    "The density with the number of electrons of a file."
    if abs(density.n_electrons - electrons) > CLOSE * electrons:
        raise TomatError(f"{density.id or density.formula} has {density.n_electrons:.3f} electrons and the file to write into "
                         f"{electrons:.3f}: use potentials with the valence electrons of the density.")
    return density.rho.astype(float) * (Bohr**3 * electrons / density.n_electrons)


def espresso(density: Density, rows: list[bytes]) -> bytes:
    "The density at the waves of a charge-density.dat."
    if np.frombuffer(rows[0], np.int32)[2] != 1:  # after the flag of Γ alone and the number of waves
        raise TomatError("The file has a spin density, and a prediction has none: calculate without spin.")
    waves_Gx3, old_G = np.frombuffer(rows[2], np.int32).reshape(-1, 3), np.frombuffer(rows[3], complex)
    if (2 * np.abs(waves_Gx3).max(0) >= density.shape).any():
        raise TomatError(f"The grid of {density.shape} points is too coarse for the waves of the file: predict with --ecutrho.")
    rho_xyz = scaled(density, float(old_G[0].real) * density.volume / Bohr**3)
    a, b, c = (waves_Gx3 % np.array(density.shape)).T
    return np.asarray(np.fft.fftn(rho_xyz) / rho_xyz.size)[a, b, c].tobytes()


def abinit(density: Density, rows: list[bytes]) -> bytes:
    "The density on the grid of a DEN file."
    old = np.frombuffer(rows[-1])
    if old.size != np.prod(density.shape):
        raise TomatError(f"The density has {density.shape} points and the file {old.size:,}: predict it with --grid and the "
                         "numbers ngfft of the output.")
    return scaled(density, float(old.mean()) * density.volume / Bohr**3).ravel(order="F").tobytes()


def put(density: Density, path: Path) -> None:
    "Replace the density of a file."
    rows = records(path)
    whose = espresso if len(rows[0]) == 12 else abinit
    rows[-1] = whose(density, rows)
    with atomic_write(path) as aside:
        aside.write_bytes(b"".join(size + row + size for row in rows for size in [len(row).to_bytes(4, "little")]))


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("density", help="file of a density")
    parser.add_argument("file", type=Path, help="charge-density.dat of Quantum ESPRESSO or a DEN file of ABINIT, overwritten")
    args = parser.parse_args()
    put(read_density(args.density), args.file)


if __name__ == "__main__":
    main()
