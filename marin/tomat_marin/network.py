"""Levanter's Qwen3 in the sizes of tomat, and its loss on density tokens: cross-entropy, earth mover's distance, or a mixture."""

import math

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from levanter.layers.attention import AttentionMask
from levanter.models.lm_model import split_activations
from levanter.models.qwen import Qwen3Config, Qwen3LMHeadModel

from tomat.models.objective import Objective
from tomat.models.sizes import ModelSize
from tomat.tokens.vocabulary import PAD, Vocabulary

CHUNK = 512  # largest number of tokens of each row whose logits are in memory at once


def config_of(size: ModelSize,  # shape of the network
              length: int,      # number of tokens of a row
              ) -> Qwen3Config:
    "Levanter's configuration of the network that `tomat.models.causal.qwen3_config` describes."
    return Qwen3Config(
        max_seq_len=length, hidden_dim=size.width, intermediate_dim=size.mlp, num_layers=size.layers, num_heads=size.heads,
        num_kv_heads=size.kv_heads or size.heads, head_dim=size.head_dim, tie_word_embeddings=True, layer_norm_epsilon=1e-6)


def _rank_code(n: int,           # number of consecutive ids
               Embed: hax.Axis,  # axis of the embedding's width
               seed: int,        # seed of the frequencies
               scale: float = 16.0,  # standard deviation of the frequencies, radians over all n ids
               ) -> jax.Array:  # (n, width)
    "Fourier features of the rank as in `tomat.models.causal.rank_code`, with other random frequencies."
    frequencies = scale * np.random.default_rng(seed).standard_normal(Embed.size // 2)
    phase_nxw = jnp.linspace(0, 1, n)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return 2**0.5 * jnp.concatenate([jnp.sin(phase_nxw), jnp.cos(phase_nxw)], axis=1)


def fresh(config: Qwen3Config,
          vocab: Vocabulary,  # ids that the network reads and writes
          key: jax.Array,     # key of the random numbers
          ) -> Qwen3LMHeadModel:
    "An untrained model, whose embeddings are similar for neighbouring numbers, as in `tomat train`."
    model_key, embedding_key = jax.random.split(key)
    model = Qwen3LMHeadModel.init(hax.Axis("vocab", vocab.size), config, key=model_key)
    scale = config.initializer_range
    start = hax.random.normal(embedding_key, (model.Vocab, model.Embed)).array * scale
    for ids in vocab.numbers:
        start = start.at[ids.start:ids.stop].add(scale * _rank_code(len(ids), model.Embed, ids.start))
    weight = hax.named(start, (model.Vocab, model.Embed))
    return eqx.tree_at(lambda m: m.embeddings.token_embeddings.weight, model, weight)


def token_losses(logits_BxCxV: jax.Array,  # (B, C, V) float32 logits of the objective's ids
                 target_BxC: jax.Array,    # (B, C) index of the true id among them
                 objective: Objective,
                 ) -> jax.Array:  # (B, C)
    "For each token cross-entropy or divergence in nats, earth mover's distance in the codec's unit, or a mixture."
    losses, log_p = jnp.zeros(target_BxC.shape), jax.nn.log_softmax(logits_BxCxV, axis=-1)
    values_V = jnp.zeros(()) if objective.values_V is None else jnp.asarray(objective.values_V)
    distance_BxCxV = jnp.zeros(()) if objective.values_V is None else jnp.abs(values_V - values_V[target_BxC][..., None])
    if objective.emd < 1 and objective.soft:
        log_q = jax.nn.log_softmax(-0.5 * (distance_BxCxV / objective.soft) ** 2, axis=-1)
        losses += (1 - objective.emd) * (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
    elif objective.emd < 1:
        losses -= (1 - objective.emd) * jnp.take_along_axis(log_p, target_BxC[..., None], axis=-1)[..., 0]
    if objective.emd:
        losses += objective.emd * (jnp.exp(log_p) * distance_BxCxV).sum(-1)
    return losses


def loss_and_count(model: Qwen3LMHeadModel,
                   ids: hax.NamedArray,  # (batch, position) ids of rows, PAD at their end
                   objective: Objective,
                   read: hax.NamedArray | None = None,  # (batch, position) ids that the model reads instead; None: the same
                   ) -> tuple[jax.Array, jax.Array]:  # () sum of the losses; () number of tokens in it
    "The sum of the losses of density tokens, each given the tokens before it, and their number."
    hidden, _ = split_activations(model.activations(ids if read is None else read, AttentionMask.causal(), key=None))
    hidden_BxLxW = hidden.rearrange(("batch", "position", model.Embed)).array
    counted = objective.ids
    head_VxW = hax.auto_sharded(model.get_lm_head()["vocab", counted.start:counted.stop]).array
    ids_BxL = ids.rearrange(("batch", "position")).array
    target_BxL = jnp.pad(ids_BxL[:, 1:], ((0, 0), (0, 1)), constant_values=PAD) - counted.start
    counts_BxL = (target_BxL >= 0) & (target_BxL < len(counted))
    width = math.gcd(ids_BxL.shape[1], CHUNK)

    @jax.checkpoint
    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden_BxCxW, target_BxC, counts_BxC = part
        logits = jnp.einsum("bcw,vw->bcv", hidden_BxCxW, head_VxW, preferred_element_type=jnp.float32)
        losses = token_losses(logits, jnp.where(counts_BxC, target_BxC, 0), objective)
        return total + jnp.where(counts_BxC, losses, 0).sum(), None

    def parts(x: jax.Array) -> jax.Array:  # (L/C, B, C, …)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, width, *x.shape[2:]), 1, 0)

    total, _ = jax.lax.scan(add, jnp.zeros(()), tuple(map(parts, (hidden_BxLxW, target_BxL, counts_BxL))))
    return total, counts_BxL.sum()
