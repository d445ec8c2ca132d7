"""Fit one-token codecs to the training part of a store and measure what they lose of materials they have not seen.

    python results/codecs/make_codec_results.py STORE VASP_FILE… [--out results/codecs]

Writes floors.csv (one line a codec and material), levels.csv (where the levels sit), deciles.csv (where the error sits) and
rounds.csv (Lloyd's method from equal steps).  Takes about four minutes and 1 GB.
"""
import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tomat.tokens.codecs import PUBLISHED_DENSITY, Codec, log_codec
from tomat.tokens.levels import LevelCodec, fit_levels
from tomat.density.core import RHO, TOTAL, Density
from tomat.tokens.fit_codec import Histogram, merge_histograms, field_of, fit_histogram, quantisation_error
from tomat.density.formats import read_density
from tomat.io.progress import track
from tomat.atoms.sad import with_sad
from tomat.density.store import RawStore
from tomat.study.site import write_table

LEVELS, SIZES = (1024, 4096, 16384), (1, 2, 3)
FIELDS = [(target, unit) for target in ("total", "difference") for unit in (TOTAL, RHO)]
Row = dict[str, Any]


def supercell(density: Density, n: int) -> Density:
    "The same crystal in a cell of n × n × n cells."
    values_xyz = np.tile(density.rho, (n, n, n))
    return Density(values_xyz, density.structure * (n, n, n), id=density.id, units=RHO)


def histograms(training: Iterable[Density]) -> tuple[dict[Any, Histogram], list[tuple[Histogram, float]]]:
    "What each fit needs: sums by field, and `total` of each material with its norm."
    parts: dict[Any, list[Histogram]] = {field: [] for field in FIELDS}
    single = []
    for density in training:
        for field in FIELDS:
            parts[field].append(Histogram.of(field_of(density, *field), *field))
        single.append((parts["total", TOTAL][-1], float(np.abs(density.total).sum())))
    sums: dict[Any, Histogram] = {field: merge_histograms(parts[field]) for field in FIELDS}
    return sums, single


def many_sizes(h: Histogram) -> LevelCodec:
    "L1 levels for `total` where every material also comes as supercells, each size with equally many voxels."
    points = np.concatenate([h.points * n**3 for n in SIZES])
    return fit_levels(points, LEVELS[-1], "l1", np.tile(h.counts, len(SIZES)))


def by_material(single: list[tuple[Histogram, float]], n_levels: int) -> LevelCodec:
    "L1 levels for `total` where every material counts alike: its voxels weigh 1/Σ|ρ|."
    weights = np.concatenate([h.counts / norm for h, norm in single])
    return fit_levels(np.concatenate([h.points for h, _ in single]), n_levels, "l1", weights)


def codecs(sums: Mapping[Any, Histogram], single: list[tuple[Histogram, float]]) -> Iterator[tuple[Row, Codec]]:
    "Every codec to measure, with what the table says about it."
    base = {"codec": "fitted", "weights": "voxels", "objective": "l1", "target": "total", "unit": TOTAL}
    for target, unit in FIELDS:
        for objective in ("l1", "l2"):
            for n in LEVELS:
                row = base | {"objective": objective, "levels": n, "target": target, "unit": unit}
                yield row, fit_histogram(sums[target, unit], n, objective)
    for n in LEVELS:
        yield base | {"weights": "materials", "levels": n}, by_material(single, n)
    yield base | {"weights": "sizes", "levels": LEVELS[-1]}, many_sizes(sums["total", TOTAL])
    for name in ("two_token_9_12", "fp16_1token"):
        codec = log_codec(name, PUBLISHED_DENSITY.log_min, PUBLISHED_DENSITY.log_max)
        yield base | {"codec": name, "weights": "", "objective": "", "levels": codec.top + 1}, codec


def measured(row: Row, codec: Codec, samples: list[tuple[str, Density]]) -> Iterator[Row]:
    "Quantisation error of each material with the field that the codec was fitted to."
    for kind, density in samples:
        if row["target"] == "difference" and kind != "validation":
            continue  # the packaged atoms fit densities of their own setups only
        if kind == "supercell" and (row["levels"] != LEVELS[-1] or row["objective"] != "l1"):
            continue
        score = quantisation_error(density, codec, row["target"], row["unit"])
        yield row | {"kind": kind, "material": score.id, "formula": density.formula, "nmae": f"{score.nmae:.4g}",
                       "clipped": score.clipped, "voxels": score.voxels, "volume": f"{score.volume:.5g}"}


def level_density(h: Histogram, fits: dict[str, LevelCodec]) -> Iterator[Row]:
    "Voxels, bins that hold some, and levels in slices of a tenth of a decade of positive `total`."
    edges = 10 ** np.arange(-1, np.log10(h.high), 0.1)
    voxels, bins = np.histogram(h.points, edges, weights=h.counts)[0], np.histogram(h.points, edges)[0]
    levels = {name: np.histogram(codec.recon_points, edges)[0] for name, codec in fits.items()}
    for i, (low, high) in enumerate(pairwise(edges)):
        yield {"low": f"{low:.5g}", "high": f"{high:.5g}", "voxels": int(voxels[i]), "bins": int(bins[i])} | {
            f"levels_{name}": int(counts[i]) for name, counts in levels.items()}


def deciles(validation: list[Density], fits: dict[str, LevelCodec]) -> Iterator[Row]:
    "Shares of electrons, levels and error between percentiles of `total`, over all held-out voxels."
    values = np.sort(np.concatenate([density.total.ravel() for density in validation]).astype(np.float64))
    percent = [*range(0, 100, 10), 99, 99.9, 100]
    cuts = [round(p / 100 * values.size) for p in percent]
    norm = np.abs(values).sum()
    lost = {name: np.abs(codec.decode(codec.encode(values)[0]) - values) for name, codec in fits.items()}
    for i, (start, stop) in enumerate(pairwise(cuts)):
        low, high = values[start] if start else -np.inf, values[stop] if stop < values.size else np.inf
        row = {"from": percent[i], "to": percent[i + 1], "largest": f"{values[stop - 1]:.5g}",
               "electrons": f"{np.abs(values[start:stop]).sum() / norm:.4g}"}
        for name, codec in fits.items():
            inside = (codec.recon_points >= low) & (codec.recon_points < high)
            row |= {f"levels_{name}": int(inside.sum()), f"nmae_{name}": f"{lost[name][start:stop].sum() / norm:.4g}"}
        yield row


def from_equal_steps(h: Histogram, validation: list[Density], n: int = LEVELS[-1]) -> Iterator[Row]:
    "Lloyd's method for L2, started from equal steps instead of companded cells."
    points = h.low + (np.arange(n) + 0.5) / n * (h.high - h.low)
    for done in range(1001):
        middles = (points[:-1] + points[1:]) / 2
        if done in (0, 10, 30, 100, 300, 1000):
            codec = LevelCodec(np.array([h.low, *middles, h.high]), points, max(abs(h.low), abs(h.high)))
            nmae = [quantisation_error(density, codec).nmae for density in validation]
            yield {"rounds": done, "mean": f"{np.mean(nmae):.4g}", "median": f"{np.median(nmae):.4g}"}
        cell = np.searchsorted(middles, h.points)
        weight = np.bincount(cell, h.counts, n)
        points = np.where(weight > 0, np.bincount(cell, h.counts * h.points, n) / np.maximum(weight, 1), points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store with the parts train and validation")
    parser.add_argument("vasp", nargs="*", help="density files of other programs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    args = parser.parse_args()
    store, out = RawStore(args.store), args.out
    training = (with_sad(store.read(id)) for id in track(store.split("train"), "count", unit="materials"))
    sums, single = histograms(training)
    validation = [with_sad(store.read(id)) for id in store.split("validation")]
    samples = [("validation", density) for density in validation]
    samples += [("vasp", replace(read_density(file), id=Path(file).name)) for file in args.vasp]
    samples += [("supercell", supercell(density, 2)) for density in validation]
    fits = {objective: fit_histogram(sums["total", TOTAL], LEVELS[-1], objective) for objective in ("l1", "l2")}
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "levels.csv", level_density(sums["total", TOTAL], fits))
    write_table(out / "deciles.csv", deciles(validation, fits))
    write_table(out / "rounds.csv", from_equal_steps(sums["total", TOTAL], validation))
    every = track(list(codecs(sums, single)), "measure", unit="codecs")
    write_table(out / "floors.csv", (line for row, codec in every for line in measured(row, codec, samples)))


if __name__ == "__main__":
    main()
