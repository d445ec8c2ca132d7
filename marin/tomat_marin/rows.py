"""The Parquet shards of `tomat tokenize` as a data set of Levanter's, read a row group at a time."""

import asyncio
from collections.abc import Sequence
from functools import lru_cache

import haliax as hax
import jax
import numpy as np
from levanter.data.dataset import AsyncDataset
from levanter.utils.jax_utils import local_cpu_mesh

from tomat.io.files import TomatError

from tomat_marin.groups import Group, read_column

WINDOW = 1024  # rows that are shuffled together, about


class Rows(AsyncDataset[hax.NamedArray]):
    "Rows by their number, each (position,) int32 with PAD behind."

    def __init__(self, groups: Sequence[Group], Pos: hax.Axis) -> None:
        self.groups, self.Pos = list(groups), Pos
        self.ends = np.cumsum([group.rows for group in groups])
        self.table = lru_cache(maxsize=64)(self._table)

    def is_finite(self) -> bool:
        return True

    async def async_len(self) -> int:
        return int(self.ends[-1])

    def _table(self, number: int) -> np.ndarray:  # (N, L) int32
        "All rows of a row group."
        lists = read_column(self.groups[number], "input_ids").combine_chunks()
        values, starts = lists.values.to_numpy(), lists.offsets.to_numpy()
        ids_NxL = np.zeros((len(lists), self.Pos.size), np.int32)
        for ids_L, start, stop in zip(ids_NxL, starts, starts[1:], strict=False):
            if stop - start > self.Pos.size:
                raise TomatError(f"{self.groups[number].place} has rows of several lengths in one row group: write it again.")
            ids_L[:stop - start] = values[start:stop]
        return ids_NxL

    async def get_batch(self, indices: Sequence[int]) -> Sequence[hax.NamedArray]:
        numbers = np.searchsorted(self.ends, indices, side="right").tolist()
        needed = sorted(set(numbers))
        read = await asyncio.gather(*(asyncio.to_thread(self.table, number) for number in needed))
        tables = dict(zip(needed, read, strict=True))
        places = [index - (int(self.ends[number - 1]) if number else 0) for index, number in zip(indices, numbers, strict=True)]
        return [hax.NamedArray(tables[number][place], (self.Pos,)) for number, place in zip(numbers, places, strict=True)]


class Endless(AsyncDataset[hax.NamedArray]):
    "Rows again and again; windows of materials are shuffled, and shuffled anew in each epoch."

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.n, self.seed = rows, int(rows.ends[-1]), seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def is_finite(self) -> bool:
        return False

    async def async_len(self) -> int:
        raise TomatError("An endless data set has no length.")

    def _epoch(self, epoch: int) -> AsyncDataset[hax.NamedArray]:
        with local_cpu_mesh():
            key = jax.random.fold_in(jax.random.PRNGKey(self.seed), epoch)
        block = self.rows.groups[0].rows
        return self.rows.block_shuffle(io_block_size=block, window_blocks=max(1, WINDOW // block), key=key)

    async def get_batch(self, indices: Sequence[int]) -> Sequence[hax.NamedArray]:
        found: dict[int, hax.NamedArray] = {}
        for epoch in sorted({index // self.n for index in indices}):
            mine = [index for index in indices if index // self.n == epoch]
            rows = await self.epoch(epoch).get_batch([index % self.n for index in mine])
            found.update(zip(mine, rows, strict=True))
        return [found[index] for index in indices]
