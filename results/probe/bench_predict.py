"""Voxels a second and peak memory of a whole prediction, sum of atomic densities included, from small grids to large ones.

    python results/probe/bench_predict.py [--grids 32 64 96 128 160] [--threads 2] [--repeats 3] [--out FILE.json]

Three crystals: nickel aluminide, whose cell is repeated as the grid grows, so that the spacing of the voxels stays that of real
data; and strontium titanate and corundum, of 5 and 10 atoms, on 64³. Every line has a process of its own: its peak memory is
that of the process, less what it held before the prediction. The best of the repeats counts, of wall time and of CPU time.
Last comes `tomat predict` as a command, which starts Python and imports everything, on 64³ of strontium titanate.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

SPACING = 0.09  # Å; 32 voxels are a cell of nickel aluminide


def crystal(name: str, n: int) -> Any:
    from pymatgen.core import Lattice, Structure
    if name == "SrTiO3":
        return Structure(Lattice.cubic(3.905), ["Sr", "Ti", "O", "O", "O"],
                         [[0.0, 0.0, 0.0], [.5, .5, .5], [.5, .5, 0.0], [.5, 0.0, .5], [0.0, .5, .5]])
    if name == "Al2O3":
        cell = Lattice.hexagonal(4.76, 12.99)
        return Structure.from_spacegroup("R-3c", cell, ["Al", "O"], [[0.0, 0.0, .352], [.306, 0.0, .25]]).get_primitive_structure()
    cells = max(1, round(n * SPACING / 2.88))
    return Structure(Lattice.cubic(n * SPACING / cells), ["Ni", "Al"], [[0.0, 0.0, 0.0], [.5, .5, .5]]) * (cells, cells, cells)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, n: int, threads: int, repeats: int, checkpoint: str | None) -> dict[str, Any]:
    import torch

    from tomat.prediction.predictors import load_predictor
    torch.set_num_threads(threads)
    predictor, structure = load_predictor(checkpoint), crystal(name, n)
    predictor.predict(crystal(name, 32), (16, 16, 16))  # what is read and imported once
    before, seconds, cpu = peak(), [], []
    for _ in range(repeats):
        started, busy = perf_counter(), process_time()
        predictor.predict(structure, (n, n, n))
        seconds.append(perf_counter() - started)
        cpu.append(process_time() - busy)
    return {"crystal": name, "grid": n, "voxels": n**3, "atoms": len(structure), "atoms_per_A3": len(structure) / structure.volume,
            "seconds": min(seconds), "cpu_seconds": min(cpu), "voxels_per_s": n**3 / min(seconds),
            "voxels_per_cpu_s": n**3 / min(cpu), "peak_mb": peak() - before, "bytes_per_voxel": (peak() - before) * 2**20 / n**3}


def whole_command(threads: int, repeats: int, checkpoint: str | None) -> dict[str, Any]:
    "What a user waits for: starting, importing, reading, predicting and writing a CHGCAR."
    environment, seconds, cpu = os.environ | {"OMP_NUM_THREADS": str(threads), "TOMAT_PROGRESS": "0"}, [], []
    options = ["--checkpoint", checkpoint] if checkpoint else []
    with tempfile.TemporaryDirectory() as folder:
        crystal("SrTiO3", 64).to(str(Path(folder, "POSCAR")), fmt="poscar")
        command = [sys.executable, "-m", "tomat.cli", "predict", f"{folder}/POSCAR", "--out", f"{folder}/CHGCAR",
                   "--grid", "64", "64", "64", *options]
        for _ in range(repeats):
            started, busy = perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True, env=environment)
            seconds.append(perf_counter() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu.append(after.ru_utime + after.ru_stime - busy.ru_utime - busy.ru_stime)
            Path(folder, "CHGCAR").unlink()
    return {"command": "tomat predict POSCAR --out CHGCAR --grid 64 64 64", "seconds": min(seconds), "cpu_seconds": min(cpu)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, nargs="+", default=[32, 64, 96, 128, 160])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", help="another one than the packaged")
    parser.add_argument("--out", help="write the numbers as JSON")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.threads, args.repeats, args.checkpoint)))
        return 0
    rows = []
    for name, n in [*(("NiAl", n) for n in args.grids), ("SrTiO3", 64), ("Al2O3", 64)]:
        options = ["--threads", str(args.threads), "--repeats", str(args.repeats)]
        options += ["--checkpoint", args.checkpoint] if args.checkpoint else []
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOMAT_PROGRESS": "0"}
        command = [sys.executable, __file__, "--one", name, str(n), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(f"{name:>6} {n:4d}³ = {row['voxels']:>9,} voxels, {row['atoms']:>4} atoms: {row['seconds']:6.2f} s, "
              f"{row['voxels_per_s']:>8,.0f} voxels/s; CPU {row['cpu_seconds']:6.2f} s; "
              f"{row['peak_mb']:5,.0f} MB more at the peak, {row['bytes_per_voxel']:5,.0f} bytes a voxel", flush=True)
    whole = whole_command(args.threads, args.repeats, args.checkpoint)
    print(f"{whole['command']}: {whole['seconds']:.2f} s, CPU {whole['cpu_seconds']:.2f} s")
    if args.out:
        from tomat.io.files import write_json
        shown = f"python results/probe/bench_predict.py --grids {' '.join(map(str, args.grids))} --threads {args.threads}"
        write_json(args.out, {"command": shown, "threads": args.threads, "cores": os.cpu_count(), "load": os.getloadavg(),
                              "results": rows, "whole_command": whole})
    return 0


if __name__ == "__main__":
    sys.exit(main())
