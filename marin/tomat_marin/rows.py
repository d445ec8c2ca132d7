"""Rows of the shards of `tomat tokenize` as a data set of Levanter's, in the order of `tomat train`."""

import asyncio
from collections.abc import Sequence
from functools import lru_cache

import haliax as hax
import numpy as np
from levanter.data.dataset import AsyncDataset

from tomat.dataset.order import RowIndex, RowOrder, padded_ids
from tomat.io.remote import TomatError


class OrderedRows(AsyncDataset[hax.NamedArray]):
    "Rows by their number in an order, each (position,) int32 with PAD behind; a row group is read at a time."

    def __init__(self,
                 index: RowIndex,
                 units: Sequence[int],    # of the index: the units of the order
                 order: RowOrder,
                 Pos: hax.Axis,           # tokens of a row
                 n: int | None = None,    # rows until the end; None: without end
                 ) -> None:
        self.index, self.units, self.order, self.Pos, self.n = index, units, order, Pos, n
        self.table = lru_cache(maxsize=min(1024, max(64, 2 * order.units_per_window)))(self._table)

    def is_finite(self) -> bool:
        return self.n is not None

    async def async_len(self) -> int:
        if self.n is None:
            raise TomatError("An endless data set has no length.")
        return self.n

    def _table(self, unit: int) -> np.ndarray:  # (N, L) int32
        "All rows of a unit of the order."
        number = self.units[unit]
        table = self.index.read(number, ["input_ids"])
        return padded_ids(table, np.arange(table.num_rows), self.Pos.size)

    async def get_batch(self, indices: Sequence[int]) -> Sequence[hax.NamedArray]:
        unit_m, row_m = (numbers.tolist() for numbers in self.order.at(indices))
        needed = sorted(set(unit_m))
        tables = dict(zip(needed, await asyncio.gather(*(asyncio.to_thread(self.table, unit) for unit in needed)), strict=True))
        return [hax.NamedArray(tables[unit][row], (self.Pos,)) for unit, row in zip(unit_m, row_m, strict=True)]
