"""Measure every scheme of tomat.study.schemes on every material of a store, and on density files of other programs.

    python results/fidelity/make_fidelity_results.py STORE VASP_FILE… [--out results/fidelity] [--workers N]

Writes store.csv.gz and vasp.csv.gz (the sweeps, one line a material and scheme), materials.csv (what the materials are) and
run.json (how long it took, and how many materials a start that was stopped had measured before).  First it fits 16,384 levels
to the training part, for the density and for its difference to the sum of atomic densities.  Takes about eight minutes on two
free cores.
Stopped and started again, it goes on in the table where it was.
"""
import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from tomat.tokens.levels import save_levels
from tomat.density.core import RHO, Density
from tomat.study.fidelity import sweep
from tomat.io.files import write_json
from tomat.tokens.fit_codec import TARGETS, fit_histogram, histogram_of
from tomat.density.formats import read_density
from tomat.io.progress import n_cores
from tomat.atoms.sad import with_sad
from tomat.study.schemes import SCHEMES, fitted_schemes
from tomat.study.voxels import Scheme
from tomat.density.source import InMemory, Source
from tomat.density.store import RawStore
from tomat.study.site import write_table


def with_levels(store: RawStore, ids: list[str], workers: int) -> dict[str, Scheme]:
    "The table of schemes, and those with levels fitted to these materials."
    schemes = dict(SCHEMES)
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            prepare = with_sad if target == "difference" else None
            codec = fit_histogram(histogram_of(ids, store.read, target, RHO, prepare, workers), 16384)
            save_levels(codec, f"{folder}/{target}.npz", {"target": target, "unit": RHO, "objective": "l1"})
            schemes |= fitted_schemes(f"{folder}/{target}.npz")
    return schemes


def described(density: Density, part: str) -> dict[str, Any]:
    "The line of a material in materials.csv."
    return {"id": density.id, "formula": density.formula, "part": part, "atoms": len(density.structure),
            "voxels": density.values.size, "volume": density.volume, "electrons": density.n_electrons}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store with the parts train and validation")
    parser.add_argument("vasp", nargs="*", help="density files of other programs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--materials", type=int, help="only so many of the store, for a trial")
    parser.add_argument("--workers", type=int, default=n_cores(), help="processes")
    args = parser.parse_args()
    store, out = RawStore(args.store), args.out
    ids, parts = store.ids[:args.materials], {id: part for part in store.splits for id in store.split(part)}
    others = InMemory(replace(read_density(file), id=Path(file).name) for file in args.vasp)
    out.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    schemes = with_levels(store, [id for id in ids if parts.get(id) == "train"], args.workers)
    took, found = {"fit": perf_counter() - start}, {}
    tables: list[tuple[str, Source, list[str]]] = [("store", store, ids), ("vasp", others, others.ids)]
    for name, source, chosen in tables:
        start, found[name] = perf_counter(), len(list(out.glob(f"{name}.csv.gz.parts/*.csv")))
        lines = sweep(source, out / f"{name}.csv.gz", schemes, chosen, args.workers)
        took[name] = perf_counter() - start
        print(f"wrote {out / name}.csv.gz, {lines:,} lines")
    describe = [described(store.read(id), parts.get(id, "")) for id in ids]
    describe += [described(others.read(id), "vasp") for id in others.ids]
    write_table(out / "materials.csv", describe)
    write_json(out / "run.json", {"workers": args.workers, "seconds": {name: round(s) for name, s in took.items()},
                                  "cpu_seconds": round(sum(os.times()[:4])), "materials": len(ids) + len(others.ids),
                                  "measured_before": sum(found.values())})


if __name__ == "__main__":
    main()
