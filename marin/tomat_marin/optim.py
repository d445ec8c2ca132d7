"""Levanter's AdamW with the learning rates of `tomat train`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from levanter.optim.config import AdamConfig

from tomat.train.config import TrainConfig
from tomat.train.optim import learning_rate


@dataclass(frozen=True)
class Adam(AdamConfig):
    "AdamW whose learning rate of each step comes from `tomat.train.optim.learning_rate`."
    config: TrainConfig = field(default_factory=TrainConfig)  # settings of the training

    @classmethod
    def of(cls, config: TrainConfig) -> "Adam":
        "The optimiser with the settings of a training."
        return cls(learning_rate=config.peak_lr, weight_decay=config.weight_decay, max_grad_norm=config.clip, config=config)

    def lr_scheduler(self, num_train_steps: int, override_lr: float | None = None) -> Callable[[jax.Array], jax.Array]:
        "A function from the number of a step, from 0, to its learning rate."
        config, peak = self.config, override_lr or self.learning_rate
        rates = jnp.array([learning_rate(step, num_train_steps, peak, config.warmup, config.schedule)
                           for step in range(num_train_steps)])
        return lambda step: rates[jnp.minimum(step, num_train_steps - 1)]
