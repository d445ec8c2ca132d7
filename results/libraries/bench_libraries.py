"""Compare three small parts of tomat with libraries that could replace them, on this machine.

    pip install grain joblib filelock
    python results/libraries/bench_libraries.py        # writes bench.json beside this file

The order of rows stands against grain's index_shuffle, `in_order` against joblib's ordered generator, and the lock of
`atomic_write` against filelock. Seconds are the best of five.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tomat.dataset.order import permuted
from tomat.io.files import _writing_in, write_json
from tomat.io.progress import in_order


def best(work: Callable[[], object], n: int) -> float:  # µs
    "The shortest time of five, for one of `n` items."
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return round(1e6 * min(times) / n, 3)


def order_of(n: int, window: int = 1024) -> dict[str, float]:
    "µs a row of a permutation of `n` rows, a window at a time."
    from grain._src.python.experimental.index_shuffle.python.index_shuffle_module import index_shuffle
    rows = np.random.default_rng(0).integers(0, n, window)
    return {"permuted": best(lambda: permuted(rows, n, 42, "rows", 3), window),
            "grain": best(lambda: [index_shuffle(int(i), max_index=n - 1, seed=5, rounds=4) for i in rows], window)}


def item(i: int) -> int:
    return i


def by_joblib(items: Any) -> Any:
    from joblib import Parallel, delayed
    return Parallel(n_jobs=2, return_as="generator", batch_size=1)(delayed(item)(x) for x in items)


def by_in_order(items: Any) -> Any:
    return in_order(item, items, 2)


def map_of(mapped: Callable[[Any], Any], n: int = 2000) -> dict[str, float]:
    "µs an item with two processes, and the items that are read in the two seconds after the first result."
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read
    results = mapped(endless())
    next(results)
    time.sleep(2)
    ahead = read
    results.close()
    return {"us_per_item": best(lambda: list(mapped(range(n))), n), "read_ahead": ahead}


def locks(n: int = 500) -> dict[str, float]:
    "µs to take a lock and give it back."
    from filelock import FileLock
    with tempfile.TemporaryDirectory() as folder:
        def ours() -> None:
            for _ in range(n):
                with _writing_in(Path(folder)):
                    pass

        def theirs() -> None:
            for _ in range(n):
                with FileLock(f"{folder}/x.lock"):
                    pass
        return {"flock of the folder": best(ours, n), "filelock": best(theirs, n)}


if __name__ == "__main__":
    versions = {name: version(name) for name in ("grain", "joblib", "filelock")}
    found = {"versions": versions, "order": {str(n): order_of(n) for n in (1024, 10**6, 77 * 10**6)},
             "map": {"in_order": map_of(by_in_order), "joblib": map_of(by_joblib)}, "lock": locks()}
    write_json(Path(__file__).with_name("bench.json"), found)
    print(found)
