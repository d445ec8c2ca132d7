"""Make the packaged sample, tomat/data/sample.zip, out of a larger raw store of the same densities.

    python scripts/make_sample.py STORE

Each material keeps its structure and density and gets its sum of atomic densities; `train` and `validation` stay apart
as they are in STORE, which splits by chemical system.
"""
import sys
from pathlib import Path

from tomat.atoms.sad import with_sad
from tomat.density.store import RawStore, write_store

TRAIN = """
gp-00026 gp-00215 gp-00396 gp-00045 gp-00126 gp-00274 gp-00289 gp-00343 gp-00537 gp-00654 gp-00785 gp-02044
gp-02101 gp-03903 gp-00313 gp-00323 gp-00475 gp-00523 gp-00561 gp-00656 gp-01219 gp-02043 gp-00618 gp-04072
gp-04798 gp-03508 gp-02129 gp-00278 gp-00437 gp-00542 gp-00694 gp-00792 gp-03971 gp-03944 gp-00813 gp-01099
""".split()
VALIDATION = "gp-00041 gp-00826 gp-01561 gp-00463 gp-00545 gp-00559 gp-01954 gp-00772".split()
OUT = Path(__file__).parent.parent / "tomat" / "data" / "sample.zip"
README = """# The packaged sample of tomat

36 materials to train on and 8 held out, by chemical system: no system is on both sides.

Converged electron densities from GPAW 22.8 with plane waves (500 eV), PBE, the PAW setups of gpaw-data 1.2.1,
Gamma-centred k-points at most 0.29 per Angstrom apart, Fermi-Dirac smearing of 0.1 eV, spin-unpolarised, density
converged to 1e-5. `charge_density_total` is density times cell volume in electrons (its mean is the number of
valence electrons): the valence pseudo-density plus the electronic part of the compensation charges, softened to a
Gaussian of 0.22 Angstrom, float32, not clipped. It is the counterpart of a VASP CHGCAR's total block, but the setups
and their valence differ: do not mix the two. Negative voxels near some nuclei belong to the pseudo-density.
`charge_density_sad` is the sum of atomic densities on the same grid, made by `tomat.atoms.sad` from `atoms.json`.

Structures: elemental crystals, AFLOW prototypes, Avogadro's crystal library, tabulated and estimated prototypes,
some strained or rattled. Each material's metadata says which. Made for this project; Apache-2.0 like the code.
"""


def main(source: str) -> None:
    store = RawStore(source)
    for part, ids in (("train", TRAIN), ("validation", VALIDATION)):
        if wrong := sorted(set(ids) - set(store.split(part))):
            raise SystemExit(f"{source}: {', '.join(wrong)} are not in its {part} part.")
    densities = (with_sad(store.read(id)) for id in [*TRAIN, *VALIDATION])
    write_store(densities, {"train": TRAIN, "validation": VALIDATION}, OUT, README)
    print(f"{OUT.name}: {len(TRAIN)} + {len(VALIDATION)} materials, {OUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
