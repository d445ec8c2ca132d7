"""What a voxel's guide is worth before any sequence: a small network reads it and predicts the difference to the SAD.

    python results/guides/make_guide_results.py STORE VOXELS [--steps 1200]

VOXELS is a folder for `tomat prepare` of the parts train and validation. Each row of guides.csv is a choice of known quantities:
the level of the sum of atomic densities (SAD), and the nearest atoms by r/R_covalent, each with its element and, unless said
otherwise, its distance; the composition and the volume per atom of the crystal are always known, as in the head of a row.
The error is over the drawn voxels of the validation part, the mean of materials, in shares of the SAD's own error.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
from pathlib import Path
from time import process_time
from typing import NamedTuple

import numpy as np
import torch
from ase.data import atomic_numbers, covalent_radii
from torch import Tensor, nn

from tomat.atoms.neighbours import find_neighbours, images_of
from tomat.dataset.prepare import VoxelSet, prepare
from tomat.dataset.voxels import PrepareConfig
from tomat.density.store import RawStore
from tomat.io.progress import track
from tomat.run.launch import sentences
from tomat.study.site import write_table

RESULTS = Path(__file__).resolve().parent
NEAREST = 4      # atoms that are looked at
CUTOFF = 5.0     # Å
EACH = 2500      # voxels of a material
BATCH = 4096     # voxels of a step
GUIDES = {"SAD": (True, 0, True), "SAD, element": (True, 1, False), "element, distance": (False, 1, True),
          "SAD, element, distance": (True, 1, True), "SAD, two atoms": (True, 2, True), "SAD, three atoms": (True, 3, True),
          "SAD, four atoms": (True, 4, True)}  # name → whether the SAD is known, number of atoms, whether their distances are


class Voxels(NamedTuple):
    "Voxels of M materials, V in all."
    material_V: Tensor
    number_VxK: Tensor     # atomic numbers of the nearest atoms, 0: none
    distance_VxK: Tensor   # Å
    sad_V: Tensor          # e/Å³
    rho_V: Tensor          # e/Å³
    mean_V: Tensor         # of the material's density, e/Å³
    share_MxZ: Tensor      # of each element
    volume_M: Tensor       # per atom, Å³


def nearest(lattice: np.ndarray, frac_Ax3: np.ndarray, number_A: np.ndarray, points_Nx3: np.ndarray,
            ) -> tuple[np.ndarray, np.ndarray]:
    "Atomic numbers and distances of the atoms with the smallest distances in covalent radii, nearest first."
    found = find_neighbours(points_Nx3, images_of(lattice, frac_Ax3, CUTOFF))
    distance_P, number_P = found.vector_3xP.square().sum(0).sqrt().numpy(), number_A[found.atom_P.numpy()]
    point_P = np.repeat(np.arange(len(points_Nx3)), found.count_N.numpy())
    order = np.lexsort((distance_P / covalent_radii[number_P], point_P))
    rank_P = np.arange(len(point_P)) - np.concatenate([[0], np.cumsum(found.count_N.numpy())])[point_P[order]]
    kept = order[rank_P < NEAREST]
    number, distance = np.zeros((len(points_Nx3), NEAREST), np.int64), np.full((len(points_Nx3), NEAREST), CUTOFF, np.float32)
    places = point_P[kept], rank_P[rank_P < NEAREST]
    number[places], distance[places] = number_P[kept], distance_P[kept]
    return number, distance


def voxels_of(data: VoxelSet, seed: int) -> Voxels:
    rng, parts, shares, volumes = np.random.default_rng(seed), [], [], []
    for i in track(range(len(data)), "neighbours", unit="materials"):
        lattice, frac, symbols = data.structure(i)
        index, sad, rho = data.columns(i)
        pick = np.sort(rng.choice(len(index), min(EACH, len(index)), replace=False))
        number_A = np.array([atomic_numbers[symbol] for symbol in symbols])
        points = np.stack(np.unravel_index(index[pick], data.shape(i)), 1) / data.shape(i) @ lattice
        parts.append((np.full(len(pick), i), *nearest(lattice, frac, number_A, points), sad[pick], rho[pick],
                      np.full(len(pick), data.mean(i), np.float32)))
        shares.append(np.bincount(number_A, minlength=119) / len(number_A))
        volumes.append(abs(np.linalg.det(lattice)) / len(number_A))
    columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
    columns += [torch.tensor(np.array(shares), dtype=torch.float32), torch.tensor(volumes, dtype=torch.float32)]
    return Voxels(*columns)


class Reader(nn.Module):
    "Reads a guide and predicts the difference to the SAD."

    def __init__(self, sad: bool, atoms: int, distances: bool, width: int = 192) -> None:
        super().__init__()
        self.sad, self.atoms, self.distances = sad, atoms, distances
        self.element, self.gate, self.composition = nn.Embedding(119, 24), nn.Linear(16, 4), nn.Linear(119, 48, bias=False)
        layers: list[nn.Module] = [nn.LazyLinear(width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, v: Voxels) -> Tensor:  # (V,) e/Å³
        sad_V = v.sad_V.clamp(min=0)
        x = [self.composition(v.share_MxZ.sqrt())[v.material_V], v.volume_M.log()[v.material_V, None]]
        if self.sad:
            x.append(torch.stack([sad_V, (sad_V + 0.003).log(), sad_V.sqrt()], 1))
        for k in range(self.atoms):
            element = self.element(v.number_VxK[:, k])
            x.append(element)
            if self.distances:
                radial = torch.exp(-((v.distance_VxK[:, k, None] - torch.linspace(0, 4.5, 16)) / 0.3) ** 2)
                x += [radial, (element[:, :, None] * self.gate(radial)[:, None]).flatten(1)]
        return self.net(torch.cat(x, 1))[:, 0] * 0.1 * (sad_V + 0.02).sqrt()


def some(v: Voxels, picks: Tensor) -> Voxels:
    return Voxels(*[column[picks] for column in v[:6]], *v[6:])  # type: ignore[call-arg]


def score(training: Voxels, validation: Voxels, reader: Reader, steps: int) -> dict[str, float]:
    rng, busy = np.random.default_rng(0), process_time()
    reader(some(training, torch.arange(2)))  # makes the lazy layer
    optimizer = torch.optim.AdamW(reader.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    for _ in range(steps):
        batch = some(training, torch.from_numpy(rng.integers(len(training.sad_V), size=BATCH)))
        loss = ((batch.sad_V + reader(batch) - batch.rho_V).abs() / batch.mean_V).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error_V = (validation.sad_V + reader(validation) - validation.rho_V).abs()
    sad_V, n = (validation.sad_V - validation.rho_V).abs(), len(validation.volume_M)
    total, ours, sad = (torch.zeros(n).index_add(0, validation.material_V, x) for x in (validation.rho_V.abs(), error_V, sad_V))
    nmae, of_sad = float((ours / total).mean()), float((sad / total).mean())
    return {"nmae": nmae, "sad": of_sad, "share": nmae / of_sad, "better": int((ours < sad).sum()), "materials": n,
            "cpu_seconds": process_time() - busy}


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store with the parts train and validation")
    parser.add_argument("voxels", type=Path, help="a folder for drawn voxels")
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = RawStore(args.store)
    for part in ("train", "validation"):
        prepare(store, args.voxels / part, PrepareConfig(), store.split(part))
    training, validation = (voxels_of(VoxelSet(args.voxels / part), seed) for seed, part in enumerate(("train", "validation")))
    rows = []
    for name, (sad, atoms, distances) in GUIDES.items():
        torch.manual_seed(0)
        rows.append({"guide": name, "steps": args.steps, **score(training, validation, Reader(sad, atoms, distances), args.steps)})
        print(rows[-1], flush=True)
        write_table(RESULTS / "guides.csv", rows)


if __name__ == "__main__":
    main()
