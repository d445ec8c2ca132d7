"Language models for the tests: a few thousand weights, and answers worth comparing."

import torch
from transformers import Qwen3ForCausalLM

from tomat.models.causal import make_model
from tomat.models.sizes import ModelSize
from tomat.tokens.tokenizer import Tokenizer

SMALL = ModelSize(width=32, layers=2, heads=2, mlp=64, kv_heads=1)


def attentive_model(tokenizer: Tokenizer, sharpness: float = 1.0) -> Qwen3ForCausalLM:
    """A model that looks far back and writes something else at every position; as it is made, it repeats the last token.

    `sharpness` multiplies the attention's logits.
    """
    model = make_model(SMALL, tokenizer.vocab, seed=1, smooth=False).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.self_attn.v_proj, layer.mlp.down_proj, layer.mlp.up_proj):
                part.weight *= 10
            layer.self_attn.q_norm.weight *= sharpness
    return model
