"""What interpolation loses and saves, on the validation materials and on 128³ voxels, both paths in one run.

    python results/probe/bench_interpolation.py STORE [--parts materials large speed] [--threads 2] [--out results/probe]

STORE is a raw store with validation materials. Three files:

- interpolation.csv: for every validation material its NMAE predicted voxel by voxel and as the package predicts it, the loss that
  is expected, and the share of CPU time;
- interpolation_ways.csv: half the points along each axis and Fourier interpolation or splines between them, with and without the
  voxels near nuclei predicted: the loss on the materials whose grids have even sides;
- bench_interpolation.json: voxels a second of whole predictions on 128³, supercells of validation materials whose true density is
  repeated with them. Other programs may share the cores, so CPU seconds are there beside those of the clock; the two paths take
  turns. The part `large` is 300 atoms on 400³: the SAD and the prediction apart, with the memory at the peak, 3 GB.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its threads wait in a loop, which counts as work

import argparse
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from pymatgen.core import Lattice, Structure
from scipy.signal import resample as by_waves

from tomat.atoms.sad import sad_waves
from tomat.density.metrics import nmae
from tomat.density.store import RawStore
from tomat.io.files import read_json, write_json
from tomat.io.progress import track
from tomat.models.interpolation import DEGREE, expected_loss, near_voxels, predict_smooth, resample, spline_matrix
from tomat.models.probe import predict_field
from tomat.prediction.core import shift_to_mean
from tomat.prediction.predictors import ProbePredictor, load_predictor
from tomat.run.launch import sentences
from tomat.study.site import write_table

REACHES = (0.0, 0.3, 0.5, 0.7, 0.9)  # Å, distances from a nucleus within which voxels are predicted
TILED = ("MoC", "TiO", "RhN", "VH2")  # of 32³ voxels: four cells along each axis are 128³
PARTS = ("materials", "large", "speed")
Row = dict[str, Any]


def packaged() -> ProbePredictor:
    "The packaged network."
    predictor = load_predictor()
    assert isinstance(predictor, ProbePredictor)
    return predictor


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    "Result, seconds and CPU seconds of a call."
    started, busy = perf_counter(), process_time()
    result = work()
    return result, perf_counter() - started, process_time() - busy


def halved(difference_xyz: np.ndarray, way: str) -> np.ndarray:
    "The field from every second point along each axis, the others interpolated."
    half_xyz = difference_xyz[::2, ::2, ::2]
    if way == "splines":
        matrices = [spline_matrix(n, m, 0, DEGREE) for n, m in zip(difference_xyz.shape, half_xyz.shape, strict=True)]
        return resample(torch.from_numpy(half_xyz.copy()), matrices).numpy()
    for axis, n in enumerate(difference_xyz.shape):
        half_xyz = by_waves(half_xyz, n, axis=axis)
    return half_xyz


def ways(structure: Structure, difference_xyz: np.ndarray, error_xyz: np.ndarray,
         score: Callable[[np.ndarray], float]) -> list[Row]:
    "The loss of each way to interpolate, and of predicting more voxels around the nuclei."
    rows, whole = [], score(difference_xyz)
    for way in ("Fourier", "splines"):
        made_xyz = halved(difference_xyz, way)
        for near in REACHES:
            for centre in structure.frac_coords:
                voxel_Vx3, _ = near_voxels(centre, difference_xyz.shape, structure.lattice.matrix, near)
                index = tuple(voxel_Vx3.T % np.array(difference_xyz.shape)[:, None])
                made_xyz[index] = difference_xyz[index]
            lost = expected_loss(made_xyz - difference_xyz, error_xyz).mean()
            rows.append({"way": way, "near": near, "loss": score(made_xyz) - whole, "expected_e_per_A3": lost})
    return rows


def materials(store: RawStore) -> tuple[list[Row], list[Row]]:
    "Each validation material both ways, and all ways of half the points."
    rows, halves, predictor = [], [], packaged()
    for id in track(store.split("validation"), "interpolate", unit="materials"):
        true = store.read(id).as_units("e/Å³")
        sad = sad_waves(true.structure, predictor.atoms)
        sad_xyz = (sad.density(true.shape) / true.volume).astype(np.float32)
        (smooth_xyz, _, expected), _, busy = timed(lambda: predict_smooth(predictor.model, true.structure, sad, sad_xyz))  # noqa: B023
        (whole_xyz, error_xyz), _, cpu = timed(lambda: predict_field(predictor.model, true.structure, true.shape, sad_xyz))  # noqa: B023

        def score(difference_xyz: np.ndarray) -> float:
            return nmae(shift_to_mean(sad_xyz + difference_xyz, sad.electrons / true.volume), true.values)  # noqa: B023

        rows.append({"id": id, "formula": true.formula, "grid": " ".join(map(str, true.shape)), "nmae_full": score(whole_xyz),
                     "nmae": score(smooth_xyz), "expected_loss": expected, "interpolated": bool((smooth_xyz != whole_xyz).any()),
                     "cpu_share": busy / cpu})
        if not any(n % 2 for n in true.shape):
            halves += [{"id": id, **row} for row in ways(true.structure, whole_xyz, error_xyz, score)]
            for row in halves[-2 * len(REACHES):]:
                row["expected_loss"] = row.pop("expected_e_per_A3") * true.volume / sad.electrons
    return rows, halves


def at_128(store: RawStore, repeats: int) -> list[Row]:
    "Whole predictions of 128³ voxels, both paths in turn, against the true density repeated."
    rows = []
    paths = {"": packaged(), "_full": replace(packaged(), full_grid=True)}
    for id in store.split("validation"):
        true = store.read(id).as_units("e/Å³")
        if true.formula not in TILED:
            continue
        structure, (nx, ny, nz) = true.structure * (4, 4, 4), (4 * n for n in true.shape)
        row: Row = {"id": id, "formula": true.formula, "atoms": len(structure), "grid": [nx, ny, nz]}
        for _ in range(repeats):
            for name, predictor in paths.items():
                made, seconds, busy = timed(lambda: predictor.predict(structure, (nx, ny, nz)))  # noqa: B023
                row[f"seconds{name}"] = min(seconds, row.get(f"seconds{name}", np.inf))
                row[f"cpu_seconds{name}"] = min(busy, row.get(f"cpu_seconds{name}", np.inf))
                row[f"nmae{name}"] = nmae(made.density.rho, np.tile(true.values, (4, 4, 4)))
        voxels = nx * ny * nz
        for name in paths:
            for clock in ("", "cpu_"):
                row[f"voxels_per_{clock}s{name}"] = voxels / row[f"{clock}seconds{name}"]
        row |= {"loss": row["nmae"] - row["nmae_full"], "cpu_ratio": row["cpu_seconds_full"] / row["cpu_seconds"]}
        rows.append(row)
        print({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return rows


def large(n: int = 400, atoms: int = 300) -> Row:
    "Atoms at random places of a cubic cell at the density of rock salt, on a grid of a fine calculation."
    rng, edge, predictor = np.random.default_rng(0), (atoms / 0.0446) ** (1 / 3), packaged()
    sites = np.stack(np.unravel_index(rng.permutation(343)[:atoms], (7, 7, 7)), 1) / 7  # on a lattice, so that none are too close
    structure = Structure(Lattice.cubic(edge), ["Na", "Cl"] * (atoms // 2), sites)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, seconds, busy = timed(lambda: sad_waves(structure, predictor.atoms).density((n, n, n)))
    sad_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, all_seconds, all_busy = timed(lambda: predictor.predict(structure, (n, n, n)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"atoms": atoms, "grid": n, "spacing": edge / n, "sad_seconds": seconds, "sad_cpu_seconds": busy,
            "sad_peak_mb": (sad_peak - before) / 1024, "seconds": all_seconds, "cpu_seconds": all_busy,
            "voxels_per_s": n**3 / all_seconds, "voxels_per_cpu_s": n**3 / all_busy, "peak_mb": (peak - before) / 1024}


def summary(halves: list[Row]) -> list[Row]:
    "Mean and worst of each way."
    table = []
    for key in dict.fromkeys((row["way"], row["near"]) for row in halves):
        some = [row for row in halves if (row["way"], row["near"]) == key]
        table.append(dict(zip(("way", "near"), key, strict=True)) | {"materials": len(some)} | {
            f"{name}_{short}": float(of([row[name] for row in some])) for name in ("loss", "expected_loss")
            for short, of in (("mean", np.mean), ("worst", np.max))})
    return table


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/probe"))
    args = parser.parse_args()
    store, bench = RawStore(args.store), args.out / "bench_interpolation.json"
    found = read_json(bench) if bench.exists() else {}
    parts: dict[str, Callable[[], Any]] = {"large": large, "speed": lambda: at_128(store, args.repeats)}
    for part, work in parts.items():  # large first: the peak is its own
        if part in args.parts:
            torch.set_num_threads(args.threads)
            found[part] = {"threads": args.threads, "cores": os.cpu_count(), "load": os.getloadavg(), "results": work()}
            write_json(bench, found)
    if "materials" in args.parts:
        torch.set_num_threads(1)
        rows, halves = materials(store)
        write_table(args.out / "interpolation.csv", rows)
        write_table(args.out / "interpolation_ways.csv", summary(halves))


if __name__ == "__main__":
    main()
