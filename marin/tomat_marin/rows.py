"""Rows of the shards of `tomat tokenize` as a data set for Levanter, in the order of `tomat train`."""

import asyncio
from collections.abc import Sequence
from functools import lru_cache

import haliax as hax
import numpy as np
from levanter.data.dataset import AsyncDataset

from tomat.dataset.noise import HistoryNoise
from tomat.dataset.order import RowIndex, RowOrder, padded_ids
from tomat.io.remote import TomatError

VERSION = hax.Axis("version", 2)  # of a row with noise: as it is, and as the model reads it


class OrderedRows(AsyncDataset[hax.NamedArray]):
    """Rows by their number in an order, each (position,) int32 ids with PAD at the end; reads whole row groups.

    With noise each is (version, position): the row, and what the model reads instead."""

    def __init__(self,
                 index: RowIndex,         # row groups of the data set
                 units: Sequence[int],    # for each unit of the order its index in `index.groups`
                 order: RowOrder,         # order of the rows of these units
                 Pos: hax.Axis,           # axis of a row's tokens
                 n: int | None = None,    # number of rows; None: without end
                 noise: HistoryNoise | None = None,
                 ) -> None:
        self.index, self.units, self.order, self.Pos, self.n, self.noise = index, units, order, Pos, n, noise
        self.table = lru_cache(maxsize=min(1024, max(64, 2 * order.units_per_window)))(self._table)

    def is_finite(self) -> bool:
        return self.n is not None

    async def async_len(self) -> int:
        if self.n is None:
            raise TomatError("This data set has no end, so it has no length: give OrderedRows the number of rows n.")
        return self.n

    def _table(self, unit: int,  # index of a unit in the order
               ) -> np.ndarray:  # (N, L) int32 ids
        "All rows of a unit."
        number = self.units[unit]
        table = self.index.read(number, ["input_ids"])
        return padded_ids(table, np.arange(table.num_rows), self.Pos.size)

    async def get_batch(self, indices: Sequence[int],  # numbers of rows in the order
                        ) -> Sequence[hax.NamedArray]:
        "The rows with these numbers."
        unit_m, row_m = (numbers.tolist() for numbers in self.order.at(indices))
        needed = sorted(set(unit_m))
        tables = dict(zip(needed, await asyncio.gather(*(asyncio.to_thread(self.table, unit) for unit in needed)), strict=True))
        found = np.stack([tables[unit][row] for unit, row in zip(unit_m, row_m, strict=True)])
        if self.noise is None:
            return [hax.NamedArray(ids, (self.Pos,)) for ids in found]
        both = np.stack([found, self.noise(found, np.asarray(indices))], axis=1)
        return [hax.NamedArray(pair, (VERSION, self.Pos)) for pair in both]
