"""Voxels a second and peak memory of a whole prediction, sum of free atoms included, from small grids to large ones.

    python scripts/bench_predict.py [--grids 32 64 96 128 160] [--threads 2] [--repeats 2] [--checkpoint DIR] [--out FILE.json]

The crystal is a perovskite of 5 atoms; its cell grows with the grid, so that the spacing of the voxels stays that of real data.
Every grid has a process of its own: its peak memory is that of the process, less what it held before the prediction.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from time import perf_counter
from typing import Any

SPACING = 0.09  # Å


def crystal(n: int) -> Any:
    "As many perovskite cells as come closest to n voxels of the usual spacing, stretched to fit."
    from pymatgen.core import Lattice, Structure
    cells = max(1, round(n * SPACING / 4.0))
    cell = Structure(Lattice.cubic(n * SPACING / cells), ["Ba", "Ti", "O", "O", "O"],
                     [[0, 0, 0], [.5, .5, .51], [.5, .5, 0], [.5, 0, .5], [0, .5, .5]])
    return cell * (cells, cells, cells)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(n: int, threads: int, repeats: int, checkpoint: str | None) -> dict[str, Any]:
    import torch

    from tomat.predict import load_predictor
    torch.set_num_threads(threads)
    predictor, structure = load_predictor(checkpoint), crystal(n)
    predictor.predict(crystal(16), (16, 16, 16))  # what is read and imported once
    before, seconds = peak(), []
    for _ in range(repeats):
        started = perf_counter()
        predictor.predict(structure, (n, n, n))
        seconds.append(perf_counter() - started)
    return {"grid": n, "voxels": n**3, "atoms": len(structure), "seconds": min(seconds), "voxels_per_s": n**3 / min(seconds),
            "peak_mb": peak() - before, "bytes_per_voxel": (peak() - before) * 2**20 / n**3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, nargs="+", default=[32, 64, 96, 128, 160])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--checkpoint", help="another one than the packaged")
    parser.add_argument("--out", help="write the numbers as JSON")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.threads, args.repeats, args.checkpoint)))
        return 0
    rows = []
    for n in args.grids:
        options = ["--threads", str(args.threads), "--repeats", str(args.repeats)]
        options += ["--checkpoint", args.checkpoint] if args.checkpoint else []
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOMAT_PROGRESS": "0"}
        command = [sys.executable, __file__, "--one", str(n), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(f"{n:4d}³ = {row['voxels']:>9,} voxels, {row['atoms']:>4} atoms: {row['seconds']:7.2f} s, "
              f"{row['voxels_per_s']:>9,.0f} voxels/s, {row['peak_mb']:6,.0f} MB more at the peak, "
              f"{row['bytes_per_voxel']:5,.0f} bytes a voxel", flush=True)
    if args.out:
        from tomat.files import write_json
        said = f"python scripts/bench_predict.py --grids {' '.join(map(str, args.grids))} --threads {args.threads}"
        write_json(args.out, {"command": said, "cores": os.cpu_count(), "load": os.getloadavg(), "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
