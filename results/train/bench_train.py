"""This training loop beside a plain transformers loop, on the same rows and the same model, in one run.

    python results/train/bench_train.py STORE [--models micro] [--batch 1] [--steps 3] [--out results/train/bench.json]

On a CPU it takes `micro`, one row a step. Where there is a CUDA device it takes 30M with 32 rows a step and 208M with 16,
says how much memory each took beside the estimate, and compares the plain loop with as many rows as it can hold.
Rows are framed, P = 14, two_token_9_12, padded to 8,192, made from the training part of STORE.
The plain loop hands padded rows to `Qwen3ForCausalLM(input_ids, attention_mask, labels)` as a tutorial would: default loss and
attention, no compiling, autocast on CUDA. Both use AdamW and clip the gradient, and learn from all tokens but PAD; a third
line is this loop as `tomat train` runs it, with the loss on density tokens alone. Losses of the first step must agree.
On a CPU one thread works and the clock is the process's own, so that other programs on the machine do not count.
MFU: 6·N + 12·layers·width·context FLOPs a token, on real tokens (context: the row) and on all that the device read.
"""

import argparse
import gc
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

import tomat.train.cost
import tomat.train.loop
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.train.cost import Placement, memory_estimate, peak_of, row_flops
from tomat.io.remote import TomatError
from tomat.io.files import write_json
from tomat.models.causal import make_model
from tomat.models.sizes import model_size, n_parameters
from tomat.train.optim import make_optimizers
from tomat.train.log import read_log
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.density.store import RawStore
from tomat.dataset.stream import Batches, ParquetRows
from tomat.tokens.vocabulary import PAD
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.causal import RunConfig, TrainConfig, train

TOKENIZER = Tokenizer("framed", PUBLISHED_DENSITY)
CUDA = torch.cuda.is_available()
clock = perf_counter if CUDA else process_time
Step = dict[str, float]


def plain_steps(rows: str, config: TrainConfig, at_once: int) -> list[Step]:
    "The loop that a tutorial of transformers has, with gradient accumulation where the batch is larger than memory."
    device, size, n_ids = torch.device("cuda" if CUDA else "cpu"), model_size(config.size), TOKENIZER.vocab.size
    model = make_model(size, TOKENIZER.vocab, config.seed)
    torch.nn.Module.to(model, device)
    (optimizer,) = make_optimizers(model, "adamw", config.lr, config.weight_decay)
    steps: list[Step] = []
    for block in Batches(ParquetRows(rows, config.seed, config.window), config.batch_size, pad_to=TOKENIZER.pad_to):
        start, loss = clock(), 0.0
        for rows_, lengths in zip(block.ids.split(at_once), block.lengths.split(at_once), strict=True):
            ids = rows_.to(device)
            mask, labels = (ids != PAD).long(), torch.where(ids == PAD, -100, ids)
            with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
                part = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            share = (int(lengths.sum()) - len(lengths)) / (int(block.lengths.sum()) - len(block.lengths))
            (part * share).backward()
            loss += part.item() * share
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()
        steps.append({"loss": loss, "seconds": clock() - start,
                      "real": int(block.lengths.sum()), "flops_real": row_flops(size, n_ids, block.lengths.tolist()),
                      "padded": block.ids.numel(), "flops_padded": row_flops(size, n_ids, [block.ids.shape[1]] * len(block.ids))})
        if len(steps) == config.steps:
            return steps
    return steps


def our_steps(rows: str, config: TrainConfig, setup: RunConfig) -> list[Step]:
    "The log of `train`, a step a line."
    with tempfile.TemporaryDirectory() as folder:
        train(rows, f"{folder}/run", config, setup)
        log = read_log(f"{folder}/run")
    before: list[dict[str, Any]] = [{"tokens": 0, "padded": 0, "flops": 0}, *log]
    return [{"loss": line["loss"], "seconds": line["time"]["seconds"], "real": line["tokens"] - last["tokens"],
             "padded": line["padded"] - last["padded"], "flops_real": line["flops"] - last["flops"],
             "flops_padded": (line["flops"] - last["flops"]) * line["time"]["mfu_padded"] / line["time"]["mfu_real"]}
            for last, line in zip(before, log, strict=False)]


def measured(work: Callable[[], list[Step]], peak: float, skip: int) -> dict[str, Any]:
    "Run a loop; its speed over the steps after the first ones, and the most memory it took on a GPU."
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        steps = work()
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    timed = steps[skip:]
    kinds = ("real", "padded", "flops_real", "flops_padded")
    each = {name: median(step[name] / step["seconds"] for step in timed) for name in kinds}
    memory = {"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if CUDA else {}
    return {"tokens_per_s_real": round(each["real"]), "tokens_per_s_padded": round(each["padded"]),
            "mfu_real": round(each["flops_real"] / peak, 4), "mfu_padded": round(each["flops_padded"] / peak, 4),
            "seconds_a_step": [round(step["seconds"], 3) for step in steps], "first_loss": round(steps[0]["loss"], 5), **memory}


def compare(name: str, rows: str, args: argparse.Namespace, peak: float, keep: Callable[[dict[str, Any]], None]) -> None:
    "All loops with one model; what is known is kept after every loop, also where the memory did not do."
    size, skip = model_size(name), 2 if CUDA else 1
    batch = args.batch or ({"30M": 32}.get(name, 16) if CUDA else 1)
    config = TrainConfig(name, args.steps + skip, batch, lr=1e-3, warmup=1, schedule="constant", loss_on="all")
    setup = RunConfig(save_every=10**6, compiled=None if CUDA or not args.compile else True)
    found: dict[str, Any] = {"parameters": n_parameters(size, TOKENIZER.vocab.size), "batch": batch}
    loops: dict[str, Callable[[], list[Step]]] = {
        "tomat, all tokens": lambda: our_steps(rows, config, setup),
        "tomat": lambda: our_steps(rows, replace(config, loss_on="density"), setup)}
    if CUDA:
        estimate = memory_estimate(size, TOKENIZER.vocab.size, batch, 5568, Placement(bf16=True, device="cuda", compiled=True))
        found["memory_estimate_gb"] = round(estimate["all"] / 1e9, 2)
        loops["tomat, all rows at once"] = lambda: our_steps(rows, config, replace(setup, micro_batch=batch))
    for loop, work in loops.items():
        found[loop] = measured(work, peak, skip)
        keep(found)
    for at_once in (batch >> i for i in range(batch.bit_length())):
        plain = measured(partial(plain_steps, rows, config, at_once), peak, skip)
        if "out_of_memory" not in plain:
            break
    found["plain transformers"] = plain | {"rows_at_once": at_once}
    if all("first_loss" in found[loop] for loop in ("tomat, all tokens", "tomat", "plain transformers")):
        found["ratio_all_tokens"], found["ratio"] = (
            round(found[way]["tokens_per_s_real"] / plain["tokens_per_s_real"], 3) for way in ("tomat, all tokens", "tomat"))
        losses = plain["first_loss"], found["tomat, all tokens"]["first_loss"]
        if not math.isclose(*losses, rel_tol=1e-2 if CUDA else 1e-4):
            raise TomatError(f"The loops do not do the same: their first losses are {losses[0]} and {losses[1]} nats.")
    keep(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a raw store with a part named train")
    parser.add_argument("--models", nargs="+", default=["30M", "208M"] if CUDA else ["micro"])
    parser.add_argument("--batch", type=int, default=0, help="rows a step; 0: 1 on a CPU, 32 for 30M and 16 for others on CUDA")
    parser.add_argument("--steps", type=int, default=20 if CUDA else 3, help="that are timed, after one (CUDA: two) that are not")
    parser.add_argument("--compile", action="store_true", help="on a CPU too, where it takes a minute first")
    parser.add_argument("--out", type=Path, default=Path("results/train/bench.json"))
    args = parser.parse_args()
    os.environ["TOMAT_PROGRESS"] = "0"
    if not CUDA:
        torch.set_num_threads(1)
        for module in (tomat.train.cost, tomat.train.loop):
            vars(module)["perf_counter"] = clock
    peak, source = peak_of(torch.device("cuda" if CUDA else "cpu"))
    command = " ".join(["python results/train/bench_train.py STORE", *sys.argv[2:]])
    models: dict[str, Any] = {}
    report = {"command": command, "device": source, "peak_tflops": round(peak / 1e12, 4), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "load_before": round(os.getloadavg()[0], 2), "padded_length": TOKENIZER.pad_to,
              "models": models}

    def keep(name: str, found: dict[str, Any]) -> None:
        models[name] = found
        write_json(args.out, report)
    try:
        with tempfile.TemporaryDirectory() as folder:
            store = RawStore(args.store)
            meta = tokenize(store, TOKENIZER, f"{folder}/rows", TokenizeConfig(8, label="bench"), ids=store.split("train")[:64])
            report["length"] = meta["tokens"] / meta["rows"]
            for name in args.models:
                compare(name, f"{folder}/rows", args, peak, partial(keep, name))
    except TomatError as err:
        print(err, file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
