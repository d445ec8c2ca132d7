"""Which rows are where in the shards of `tomat tokenize`, how long they are, and which are kept back."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tomat.io.files import TomatError, open_binary

LANES = 128  # rows are as long as a multiple of this: what a TPU's attention takes


class Group(NamedTuple):
    "A row group of a shard: the rows of a material."
    place: str            # of the shard
    footer: Any           # the shard's
    number: int           # in the shard
    rows: int
    longest: int          # tokens of a row, on average at least


def _groups_of(place: str) -> list[Group]:
    try:
        with open_binary(place) as file:
            footer = pq.read_metadata(file)
    except pa.ArrowException as err:
        raise TomatError(f"{place} cannot be read as Parquet: write the rows again with `tomat tokenize`.") from err
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    ids = [column for column in range(footer.num_columns) if footer.schema.column(column).path.startswith("input_ids")]
    if len(ids) != 1:
        raise TomatError(f"{place} has no column input_ids: give a folder that `tomat tokenize` wrote.")
    return [Group(place, footer, i, group.num_rows, -(-group.column(ids[0]).num_values // group.num_rows))
            for i, group in enumerate(groups) if group.num_rows]


def groups_of(data: str,             # a folder of rows, local or remote
              meta: dict[str, Any],  # its meta.json
              ) -> list[Group]:
    "All row groups, from the footers; raises `TomatError` where they are not what meta.json counts."
    with ThreadPoolExecutor(16) as pool:
        found = [group for groups in pool.map(_groups_of, (f"{data}/{name}" for name in meta["shards"])) for group in groups]
    if (n := sum(group.rows for group in found)) != meta["rows"] or not n:
        raise TomatError(f"{data}: meta.json counts {meta['rows']} rows and the shards hold {n}: write them again.")
    return found


def row_length(groups: Sequence[Group]) -> int:
    "Tokens that hold every row: rows of one material are equally long."
    return -(-max(group.longest for group in groups) // LANES) * LANES


def read_column(group: Group, name: str) -> pa.ChunkedArray:
    "One column of a row group."
    with open_binary(group.place) as file:
        return pq.ParquetFile(file, metadata=group.footer).read_row_group(group.number, columns=[name])[name]


def split(groups: Sequence[Group],  # of a data set
          val_seqs: int,            # rows to judge by; 0: none
          ) -> tuple[Sequence[Group], Sequence[Group]]:  # to learn from and to judge by
    "Keep back the last materials that together have `val_seqs` rows, as `tomat train` does."
    if not val_seqs:
        return groups, []
    count, first = 0, len(groups)
    while first and count < val_seqs:
        first -= 1
        count += groups[first].rows
    def material(number: int) -> str:
        return read_column(groups[number], "task_id")[0].as_py()
    while 0 < first < len(groups) and material(first - 1) == material(first):  # one that is spread over two shards
        first -= 1
    if not first:
        raise TomatError(f"The data set cannot keep back {val_seqs} rows, whole materials of them, and have others left to learn "
                         "from: lower TOMAT_VAL_SEQS.")
    return groups[:first], groups[first:]
