"""Time and memory of `tomat predict` on cells of up to 324 atoms: results/probe/bench_large.json.

    python results/probe/bench_large.py [--out FILE.json]

Alpha quartz, 9 atoms, is repeated to 36, 108 and 324 atoms, and every atom is moved by up to 0.1 Å, so that no symmetry is left.
Each line is a whole process: Python starts, imports, reads a POSCAR, predicts the default grid and writes a Zarr group. Its CPU
time and its largest resident memory are those that the system reports for the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

REPEATS = (1, 1, 1), (2, 2, 1), (2, 2, 3), (3, 4, 3)


def cell(repeats: tuple[int, int, int]) -> Structure:
    quartz = Structure.from_spacegroup("P3_221", Lattice.hexagonal(4.913, 5.405), ["Si", "O"],
                                       [[0.4697, 0.0, 2 / 3], [0.4135, 0.2669, 0.7858]])
    large: Structure = quartz * repeats
    rng = np.random.default_rng(len(large))
    for i in range(len(large)):
        large.translate_sites([i], rng.uniform(-0.1, 0.1, 3), frac_coords=False)
    return large


def measure(repeats: tuple[int, int, int], folder: str) -> dict[str, Any]:
    structure = cell(repeats)
    structure.to(filename=f"{folder}/POSCAR", fmt="poscar")
    command = [sys.executable, "-m", "tomat.cli", "predict", f"{folder}/POSCAR", "--out", f"{folder}/out.zarr", "--json"]
    started = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    found = json.loads(text)["predicted"][0]
    return {"atoms": len(structure), "grid": found["grid"], "voxels": int(np.prod(found["grid"])),
            "seconds": perf_counter() - started, "cpu_seconds": used.ru_utime + used.ru_stime,
            "prediction_seconds": found["seconds"], "memory_mb": used.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(repeats, folder) for repeats in REPEATS]
    for row in rows:
        print(row)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    out.write_text(json.dumps({"threads": threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
