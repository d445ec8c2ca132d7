"""How much faster `causal` decodes in batches with a cache than patch by patch without one, on the same patches, in one run.

    python scripts/bench_causal.py [--model nano] [--patch-size 4] [--patches 64] [--singly 2] [--threads 1] [--json]

Without a cache every token reads its whole row anew, so a few patches show its speed; both ways write the same tokens.
"""
import argparse
import json
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from tomat.codecs import fit_levels
from tomat.decode import free_run
from tomat.model import MODELS, make_model
from tomat.patches import cover
from tomat.store import sample_store
from tomat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    "Patches a second, each way."
    model: str
    tokens_per_patch: int
    prompt_tokens: int
    patches_together: int
    patches_singly: int
    batched_with_cache: float
    one_by_one_with_cache: float
    one_by_one_without_cache: float
    speed_up: float           # of the first over the last
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
        for place in range(tokenizer.n_density_tokens):
            low, high = tokenizer.legal_ids(place)
            logits_1xV = model(ids_1xL, use_cache=False, logits_to_keep=1).logits[:, -1, low:high]
            ids_1xL = torch.cat([ids_1xL, logits_1xV.argmax(-1, keepdim=True) + low], dim=1)
        rows.append(ids_1xL[0, len(prompt):].numpy())
    return np.stack(rows)


def with_cache(model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts_NxL: np.ndarray) -> np.ndarray:
    "As `predict` does."
    return np.stack([written.ids_N for written in free_run(model, tokenizer, prompts_NxL)], axis=1)


def measure(name: str, patch_size: int, n_together: int, n_singly: int) -> Result:
    "Time the three ways on patches of one material."
    store = sample_store()
    density = store.read(store.split("train")[0])
    assert density.baseline is not None
    levels = fit_levels((density.total - density.baseline).ravel(), 256)
    tokenizer = Tokenizer("framed", levels, patch_size=patch_size, pad_to=None, target="difference")
    model = make_model(MODELS[name], tokenizer.vocab, seed=1).eval()
    prompts_NxL = tokenizer.prompt(density.structure, density.shape, cover(density.shape, patch_size)[:n_together])
    few_NxL = prompts_NxL[:n_singly]
    with_cache(model, tokenizer, few_NxL[:1])  # warms up
    start = perf_counter()
    together_NxM = with_cache(model, tokenizer, prompts_NxL)
    batched = len(prompts_NxL) / (perf_counter() - start)
    start = perf_counter()
    for prompt in few_NxL:
        with_cache(model, tokenizer, prompt[None])
    cached = len(few_NxL) / (perf_counter() - start)
    start = perf_counter()
    singly_NxM = without_cache(model, tokenizer, few_NxL)
    plain = len(few_NxL) / (perf_counter() - start)
    return Result(name, tokenizer.n_density_tokens, prompts_NxL.shape[1], len(prompts_NxL), len(few_NxL), batched, cached, plain,
                  batched / plain, float((together_NxM[:n_singly] == singly_NxM).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="nano")
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--patches", type=int, default=64, help="written together")
    parser.add_argument("--singly", type=int, default=2, help="written one by one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args.model, args.patch_size, args.patches, args.singly)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return
    print(f"{found.model}, {found.prompt_tokens} + {found.tokens_per_patch} tokens a patch, {args.threads} thread(s)")
    print(f"  {found.patches_together} patches together, with the cache   {found.batched_with_cache:8.2f} patches/s")
    print(f"  one by one, with the cache            {found.one_by_one_with_cache:8.2f} patches/s")
    print(f"  one by one, without a cache           {found.one_by_one_without_cache:8.2f} patches/s")
    print(f"  speed-up {found.speed_up:.0f} ×; {100 * found.same_tokens:.1f} % of the tokens are the same")


if __name__ == "__main__":
    main()
