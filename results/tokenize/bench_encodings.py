"""What a shard's pages could be instead: CPU seconds and bytes of other encodings and levels, in one run: encodings.csv.

    python results/tokenize/bench_encodings.py [--repeats 7]

The rows are those of the packaged sample, 64 patches of each material, in memory; each way writes them to memory, in turn, and the
best of its times counts. `bytes` is the floor: zstd of level 1 over the tokens as numbers of two bytes, without Parquet.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
from numcodecs.zstd import compress

from tomat.atoms.sad import with_sad
from tomat.dataset.parquet import material_rows
from tomat.density.store import sample_store
from tomat.study.site import write_table
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.tokenizer import Tokenizer

PATCHES, TOKENS = 64, "input_ids.list.element"


def ways(table: pa.Table) -> dict[str, Callable[[Any], Any]]:
    frame, ids = polars.from_arrow(table), table["input_ids"].combine_chunks().values.to_numpy()
    assert isinstance(frame, polars.DataFrame)

    def by_polars(level: int) -> Callable[[Any], Any]:
        return lambda out: frame.write_parquet(out, compression="zstd", compression_level=level, statistics=False,
                                               row_group_size=PATCHES)

    def by_arrow(**options: Any) -> Callable[[Any], Any]:
        return lambda out: pq.write_table(table, out, compression="zstd", compression_level=1, write_statistics=False,
                                          row_group_size=PATCHES, **options)

    return {**{f"polars, zstd level {level}": by_polars(level) for level in (1, 2, 3)},
            "polars, not compressed": lambda out: frame.write_parquet(out, compression="uncompressed", statistics=False,
                                                                      row_group_size=PATCHES),
            "pyarrow, plain": by_arrow(use_dictionary=False), "pyarrow, dictionary": by_arrow(use_dictionary=[TOKENS]),
            "pyarrow, delta": by_arrow(use_dictionary=False, column_encoding={TOKENS: "DELTA_BINARY_PACKED"}),
            "pyarrow, byte-stream split": by_arrow(use_dictionary=False, column_encoding={TOKENS: "BYTE_STREAM_SPLIT"}),
            "two bytes, no Parquet": lambda out: out.write(compress(ids.astype(np.uint16).tobytes(), 1))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    store, tokenizer = sample_store(), Tokenizer("framed", PUBLISHED_DENSITY, patch_size=14)
    table = pa.concat_tables([material_rows(with_sad(store.read(id)), tokenizer, PATCHES, 42)[0] for id in store.split("train")])
    found, seconds, size = ways(table), dict[str, list[float]](), dict[str, int]()
    for name, write in list(found.items()) * repeats:
        out, begun = io.BytesIO(), process_time()
        write(out)
        seconds.setdefault(name, []).append(process_time() - begun)
        size[name] = len(out.getvalue())
    rows = [{"way": name, "cpu_seconds": round(min(times), 4), "megabytes": round(size[name] / 1e6, 3)}
            for name, times in seconds.items()]
    write_table(Path(__file__).with_name("encodings.csv"), rows)
    print(f"{table.num_rows} rows, {table.nbytes / 1e6:.1f} MB in memory", *rows, sep="\n")


if __name__ == "__main__":
    main()
