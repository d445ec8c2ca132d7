"""Training and prediction of the probe network on this machine's device, beside named opponents in the same run.

    python results/probe/bench_probe.py VOXELS [--sizes S M] [--out results/probe/bench_probe.json]

VOXELS is a folder of `tomat prepare`. On a CPU one thread works and the clock is the process's own, so that other programs do
not count; where there is a CUDA device it is used, with large batches, compiled.  For every size:

- training, in voxels a second, whole steps: voxels drawn, neighbours, gradient, optimiser, average.  Opponents, alternately:
  the derivative by SciPy's sparse matrices (on a CPU; tomat 0.1 had it), and by PyTorch's own embedding_bag;
- prediction of whole grids, the sum of atomic densities not counted, in voxels a second;
- on CUDA, 50 steps from the same start as on the CPU: the largest difference of a loss (no dropout, since the generators of
  random numbers differ);
- the share of the device's peak, from the FLOPs that tomat.train.cost counts.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: its pools read it once

import argparse
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn import functional

from tomat.atoms.sad import sad_density
from tomat.dataset.prepare import VoxelSet
from tomat.io.files import write_json
from tomat.models import geometry
from tomat.models.messages import PROBE_SIZES
from tomat.models.probe import ProbeNet, predict_field
from tomat.run.launch import sentences
from tomat.train.config import ProbeTrainConfig, RunConfig
from tomat.train.cost import peak_of, probe_flops
from tomat.train.distributed import DistributedContext
from tomat.train.optim import set_rate
from tomat.train.probe import ProbeTask

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
clock = perf_counter if CUDA else process_time


class ScipySums(torch.autograd.Function):
    "The sums with the derivative of tomat 0.1: a product with a transposed sparse matrix of SciPy."

    @staticmethod
    def forward(ctx: Any, table_TxC: Tensor, row_Q: Tensor, start_N: Tensor, weight_MxQ: Tensor, by_row: Any) -> Tensor:
        ctx.save_for_backward(row_Q, start_N, weight_MxQ)
        ctx.rows = len(table_TxC)
        return torch.stack([functional.embedding_bag(row_Q, table_TxC, start_N, mode="sum", per_sample_weights=weight_Q)
                            for weight_Q in weight_MxQ], 1)

    @staticmethod
    def backward(ctx: Any, slope_NxMxC: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        row_Q, start_N, weight_MxQ = (x.numpy() for x in ctx.saved_tensors)
        ends = np.append(start_N, len(row_Q))
        parts = [csr_matrix((weight_Q, row_Q, ends), (len(start_N), ctx.rows)).T @ slope_NxC
                 for weight_Q, slope_NxC in zip(weight_MxQ, slope_NxMxC.numpy().transpose(1, 0, 2), strict=True)]
        return torch.from_numpy(sum(parts)), None, None, None, None


class PlainSums:
    "The sums with PyTorch's own derivative."

    @staticmethod
    def apply(table_TxC: Tensor, row_Q: Tensor, start_N: Tensor, weight_MxQ: Tensor, by_row: Any) -> Tensor:
        return torch.stack([functional.embedding_bag(row_Q, table_TxC, start_N, mode="sum", per_sample_weights=weight_Q)
                            for weight_Q in weight_MxQ], 1)


@contextmanager
def sums_by(kind: Any) -> Iterator[None]:
    "Inside the block the sums over neighbours are those of another class, and nothing is sorted for it."
    before = geometry._RowSums, geometry._sorted_by_row
    geometry._RowSums, geometry._sorted_by_row = kind, lambda *_: None  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        geometry._RowSums, geometry._sorted_by_row = before  # type: ignore[misc]


def step(task: ProbeTask, number: int) -> float:
    "One whole step of the training loop."
    set_rate(task.optimizers, 1e-3)
    loss = task.gradient(number).loss
    torch.nn.utils.clip_grad_norm_(task.model.parameters(), task.config.clip)
    for optimizer in task.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    task.updated(number + 1)
    return loss


def timed(work: Callable[[], Any]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    started = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - started


def training(data: VoxelSet, size: str, config: ProbeTrainConfig, repeats: int, steps: int) -> dict[str, Any]:
    "Voxels a second of whole steps, and of the same steps with other derivatives, taken in turn."
    context, run = DistributedContext(DEVICE), RunConfig(workers=8 if CUDA else 0, compiled=CUDA)
    opponents = {"PyTorch's own derivative": PlainSums} | ({} if CUDA else {"SciPy's sparse matrices": ScipySums})
    task = ProbeTask(config, data, None, Path("."), run, context)
    number = 0
    seconds: dict[str, list[float]] = {}
    for _ in range(3):  # what is compiled and read once
        step(task, number)
        number += 1
    for _ in range(repeats):
        for name, kind in {"tomat": None, **opponents}.items():
            def work(first: int = number) -> None:
                for i in range(first, first + steps):
                    step(task, i)
            if kind is None:
                seconds.setdefault(name, []).append(timed(work))
            else:
                with sums_by(kind):
                    seconds.setdefault(name, []).append(timed(work))
            number += steps
    voxels = steps * task.draws.per_step * config.voxels
    rates = {name: voxels / median(times) for name, times in seconds.items()}
    n_atoms = np.array([len(data.structure(i)[2]) for i in range(len(data))])
    volumes = np.array([abs(np.linalg.det(data.structure(i)[0])) for i in range(len(data))])
    flops = probe_flops(PROBE_SIZES[size], float((n_atoms / volumes).mean())).per_voxel(float(n_atoms.mean()), config.voxels)
    peak, source = peak_of(DEVICE)
    return {"materials_a_step": task.draws.per_step, "voxels_a_material": config.voxels, "voxels_per_s": rates.pop("tomat"),
            "opponents": {name: {"voxels_per_s": rate, "ratio": median(seconds[name]) / median(seconds["tomat"])}
                          for name, rate in rates.items()},
            "flops_a_voxel": flops, "share_of_peak": flops * voxels / median(seconds["tomat"]) / peak, "peak": peak,
            "peak_from": source, "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if CUDA else None}


def prediction(data: VoxelSet, size: str, repeats: int, grid: int) -> dict[str, Any]:
    "Voxels a second of whole grids of five materials."
    model, rates = ProbeNet(PROBE_SIZES[size], data.atoms).to(DEVICE), []
    for i in range(0, len(data), max(1, len(data) // 5)):
        structure = data.as_structure(i)
        sad_xyz = sad_density(structure, (grid,) * 3, data.atoms) / structure.volume
        predict_field(model, structure, (16, 16, 16), sad_xyz[:16, :16, :16])
        seconds = [timed(lambda: predict_field(model, structure, (grid,) * 3, sad_xyz)) for _ in range(repeats)]  # noqa: B023
        rates.append(grid**3 / min(seconds))
    return {"grid": grid, "voxels_per_s": median(rates), "slowest": min(rates), "fastest": max(rates)}


def agreement(data: VoxelSet, size: str, steps: int = 50) -> float:
    "Largest difference of a loss between the device and the CPU, over the steps of two runs from the same start."
    network = replace(PROBE_SIZES[size], dropout=0.0, element_dropout=0.0)
    config = ProbeTrainConfig(network, steps=steps, materials=min(24, len(data)))
    tasks = [ProbeTask(config, data, None, Path("."), RunConfig(compiled=False), DistributedContext(device))
             for device in (torch.device("cpu"), DEVICE)]
    return max(abs(step(tasks[0], i) - step(tasks[1], i)) for i in range(steps))


def measured(data: VoxelSet, size: str, repeats: int) -> dict[str, Any]:
    config = ProbeTrainConfig(size=size, steps=10**6)
    config = replace(config, materials=64, voxels=2048) if CUDA else config
    found = {"size": size, "parameters": sum(p.numel() for p in ProbeNet(PROBE_SIZES[size]).parameters()),
             "training": training(data, size, config, repeats, 20 if CUDA else 5),
             "prediction": prediction(data, size, repeats, 128 if CUDA else 48)}
    return found | ({"largest_difference_of_a_loss_to_the_cpu": agreement(data, size)} if CUDA else {})


@sentences
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voxels")
    parser.add_argument("--sizes", nargs="+", choices=[*PROBE_SIZES], default=["S", "M", "L"] if CUDA else ["S", "M"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if not CUDA:
        torch.set_num_threads(1)
    data = VoxelSet(args.voxels)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if CUDA else "one thread of a CPU", "torch": torch.__version__,
              "python": platform.python_version(), "materials": len(data), "sizes": []}
    for size in args.sizes:
        result["sizes"].append(measured(data, size, args.repeats))
        print(result["sizes"][-1], flush=True)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    main()
