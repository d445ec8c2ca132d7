"""How much faster `causal` decodes in batches with a cache than patch by patch without one, on the same patches, in one run.

    python results/evaluation/bench_causal.py [--model nano] [--patch-size 4] [--patches 64] [--singly 2] [--threads 1] [--json]

Without a cache every token reads its whole row anew, so a few patches show its speed; both ways write the same tokens.
Each way is timed several times and the fastest counts; beside the speed-up of the clock stands that of the processor's time,
which other programs disturb less.
"""
import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter, process_time

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from tomat.tokens.levels import fit_levels
from tomat.prediction.decoding import free_run
from tomat.models.causal import make_model
from tomat.models.sizes import MODELS
from tomat.tokens.patches import cover
from tomat.density.store import sample_store
from tomat.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    "Patches a second, each way."
    model: str
    threads: int
    repeats: int
    tokens_per_patch: int
    prompt_tokens: int
    patches_together: int
    patches_singly: int
    batched_with_cache: float
    one_by_one_with_cache: float
    one_by_one_without_cache: float
    speed_up: float           # of the first over the last
    speed_up_cpu: float       # the same of processor seconds
    same_tokens: float        # share of the tokens on which the two agree; rounding can tip a choice between equals


@torch.inference_mode()
def without_cache(model: Qwen3ForCausalLM,
                  tokenizer: Tokenizer,
                  prompts_NxL: np.ndarray,  # (N, L) ids
                  ) -> np.ndarray:  # (N, M) ids
    "Each patch alone, its whole row read anew for every token."
    rows = []
    for prompt in prompts_NxL:
        ids_1xL = torch.from_numpy(prompt.astype(np.int64))[None]
        for position in range(tokenizer.n_density_tokens):
            low, high = tokenizer.legal_ids(position)
            logits_1xV = model(ids_1xL, use_cache=False, logits_to_keep=1).logits[:, -1, low:high]
            ids_1xL = torch.cat([ids_1xL, logits_1xV.argmax(-1, keepdim=True) + low], dim=1)
        rows.append(ids_1xL[0, len(prompt):].numpy())
    return np.stack(rows)


def with_cache(model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts_NxL: np.ndarray) -> np.ndarray:
    "As `predict` does."
    return np.stack([written.ids_N for written in free_run(model, tokenizer, prompts_NxL)], axis=1)


def timed(work: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, float, float]:
    "What comes out, and the least seconds by the clock and of the processor."
    wall, cpu = [], []
    for _ in range(repeats):
        start = perf_counter(), process_time()
        out = work()
        wall.append(perf_counter() - start[0])
        cpu.append(process_time() - start[1])
    return out, min(wall), min(cpu)


def measure(name: str, patch_size: int, n_together: int, n_singly: int, repeats: int) -> Result:
    "Time the three ways on patches of one material."
    store = sample_store()
    density = store.read(store.split("train")[0])
    assert density.sad is not None
    levels = fit_levels((density.total - density.sad).ravel(), 256)
    tokenizer = Tokenizer("framed", levels, patch_size=patch_size, pad_to=None, target="difference")
    model = make_model(MODELS[name], tokenizer.vocab, seed=1).eval()
    prompts_NxL = tokenizer.prompt(density.structure, density.shape, cover(density.shape, patch_size)[:n_together])
    few_NxL = prompts_NxL[:n_singly]
    with_cache(model, tokenizer, few_NxL[:1])  # warms up
    together_NxM, *batched = timed(lambda: with_cache(model, tokenizer, prompts_NxL), repeats)
    _, *cached = timed(lambda: np.concatenate([with_cache(model, tokenizer, prompt[None]) for prompt in few_NxL]), repeats)
    singly_NxM, *plain = timed(lambda: without_cache(model, tokenizer, few_NxL), repeats)
    wall, cpu = (plain[i] / len(few_NxL) / (batched[i] / len(prompts_NxL)) for i in (0, 1))
    return Result(name, torch.get_num_threads(), repeats, tokenizer.n_density_tokens, prompts_NxL.shape[1], len(prompts_NxL),
                  len(few_NxL), len(prompts_NxL) / batched[0], len(few_NxL) / cached[0], len(few_NxL) / plain[0], wall, cpu,
                  float((together_NxM[:n_singly] == singly_NxM).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="nano")
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--patches", type=int, default=64, help="written together")
    parser.add_argument("--singly", type=int, default=2, help="written one by one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args.model, args.patch_size, args.patches, args.singly, args.repeats)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return
    print(f"{found.model}, {found.prompt_tokens} + {found.tokens_per_patch} tokens a patch, {args.threads} thread(s)")
    print(f"  {found.patches_together} patches together, with the cache   {found.batched_with_cache:8.2f} patches/s")
    print(f"  one by one, with the cache            {found.one_by_one_with_cache:8.2f} patches/s")
    print(f"  one by one, without a cache           {found.one_by_one_without_cache:8.2f} patches/s")
    print(f"  speed-up {found.speed_up:.0f} × ({found.speed_up_cpu:.0f} × in processor seconds); "
          f"{100 * found.same_tokens:.1f} % of the tokens are the same")


if __name__ == "__main__":
    main()
