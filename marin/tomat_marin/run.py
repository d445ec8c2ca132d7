"""A run with Levanter's trainer, which saves states and ends with a checkpoint for `tomat predict`."""

import datetime
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import haliax as hax
import jax
import jmp
import levanter.tracker
from haliax.partitioning import named_jit
from jax.experimental import multihost_utils
from levanter.callbacks import StepInfo, log_performance_stats
from levanter.callbacks.watch import WatchConfig
from levanter.checkpoint import CheckpointerConfig
from levanter.compat.hf_checkpoints import HFCheckpointConverter
from levanter.distributed import DistributedConfig
from levanter.models.qwen import Qwen3Config, Qwen3LMHeadModel
from levanter.tracker import NoopConfig, TrackerConfig
from levanter.tracker.wandb import WandbConfig
import levanter.trainer
from levanter.trainer import Trainer, TrainerConfig
from transformers import Qwen3Config as HFQwen3Config

from tomat.atoms.sad import save_atoms
from tomat.dataset.meta import data_atoms
from tomat.dataset.noise import HistoryNoise
from tomat.io.remote import exists, is_remote
from tomat.io.files import md5_of, write_json
from tomat.io.settings import setting
from tomat.models.objective import Objective
from tomat.models.sizes import n_parameters
from tomat.tokens.vocabulary import BOS, EOS, PAD

from tomat_marin.network import config_of, fresh, loss_and_count
from tomat_marin.optim import Adam
from tomat_marin.plan import Plan, check_share, open_run_dir
from tomat_marin.rows import VERSION, OrderedRows


def distributed_config() -> DistributedConfig:
    "The settings by which processes find each other: Levanter's own on Iris, Slurm and TPU pods, else JAX's variables."
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address or "IRIS_TASK_ID" in os.environ:
        return DistributedConfig()
    if os.environ.get("JAX_PLATFORMS") == "cpu":  # otherwise two processes may order their collectives differently, and gloo fails
        os.environ["XLA_FLAGS"] = f"--xla_cpu_enable_concurrency_optimized_scheduler=false {os.environ.get('XLA_FLAGS', '')}"
    return DistributedConfig(address, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"]))


def _local(plan: Plan) -> Path:
    "A folder for files that must be local: the run's folder if that is local, else a temporary one."
    folder = Path(tempfile.gettempdir(), "tomat-marin", plan.tpu.results_label) if is_remote(plan.out) else Path(plan.out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device_name(kind: str,  # name of the device in JAX, such as `TPU v6 lite`
                ) -> str:
    "The short name of a device, as in `tomat.train.machines.PEAKS`: `v6e` for `TPU v6 lite`, `H100` for `NVIDIA H100 80GB HBM3`."
    name = re.split(r"-| \d+ ?GB", re.sub(r"^(TPU|NVIDIA) (GeForce )?", "", kind).replace(" lite", "e"))[0]
    return {"v5": "v5p"}.get(name, name)


def _tracker(plan: Plan) -> TrackerConfig:
    "The settings of W&B, or of no tracker for `wandb_mode` `disabled`."
    mode = setting("wandb_mode", "offline")
    if mode == "disabled":
        return NoopConfig()
    os.environ.setdefault("WANDB_DIR", str(_local(plan)))
    devices = f"{device_name(jax.devices()[0].device_kind)}:{jax.device_count()}"
    return WandbConfig(entity=setting("wandb_entity") or None, project=setting("wandb_project", "tomat"), mode=mode,
                       name=plan.run_config.name or plan.tpu.results_label, group=plan.tpu.label,
                       tags=[plan.config.size, "levanter", devices], save_code=False)


def trainer_config(plan: Plan) -> TrainerConfig:
    "The settings of Levanter's trainer."
    config, run_config, tpu = plan.config, plan.run_config, plan.tpu
    saves = CheckpointerConfig(base_path=f"{plan.out}/states", append_run_id_to_base_path=False, keep=[{"every": tpu.save_steps}],
                               save_interval=datetime.timedelta(minutes=tpu.save_minutes),
                               keep_last_temporary_checkpoints=run_config.keep)
    return TrainerConfig(
        seed=config.seed, mp=jmp.get_policy("p=f32,c=bf16" if plan.bf16 else "f32"), log_dir=_local(plan) / "logs",
        id=tpu.results_label, tracker=_tracker(plan), log_jaxprs=False, log_xla_hlo=False, watch=WatchConfig(watch_targets=[]),
        train_batch_size=config.batch_size, per_device_parallelism=run_config.micro_batch or -1, num_train_steps=config.steps,
        steps_per_eval=config.eval_every, checkpointer=saves, distributed=DistributedConfig(initialize_jax_distributed=False),
        require_accelerator=os.environ.get("JAX_PLATFORMS") != "cpu")


def say(line: str) -> None:
    "Print a line in the first process alone."
    if jax.process_index() == 0:
        print(line, flush=True)


def versions(ids: hax.NamedArray,  # rows of `OrderedRows`, with or without noise
             objective: Objective,
             ) -> tuple[hax.NamedArray, Objective, hax.NamedArray | None]:  # as `loss_and_count` takes them
    "The rows as they are, and as the model reads them; None: the same."
    noisy = any(axis.name == VERSION.name for axis in ids.axes)
    return (ids[VERSION.name, 0], objective, ids[VERSION.name, 1]) if noisy else (ids, objective, None)


def validation(trainer: Trainer,
               rows: OrderedRows,  # validation rows, with an end
               objective: Objective,
               ) -> Callable[[Qwen3LMHeadModel], float]:
    "A function from a model to its mean loss per token on the validation rows."
    loader = trainer.data_loader(rows, trainer.EvalBatch)

    @named_jit(axis_resources=trainer.parameter_axis_mapping)
    def score(model: Qwen3LMHeadModel, ids: hax.NamedArray) -> tuple[jax.Array, jax.Array]:
        with hax.axis_mapping(trainer.compute_axis_mapping):
            return loss_and_count(trainer.mp.cast_to_compute(model), *versions(ids, objective))

    def mean_loss(model: Qwen3LMHeadModel) -> float:
        scores = [tuple(map(float, score(model, ids))) for ids in loader]  # rows of PAD in the last batch have no token in the loss
        return sum(total for total, _ in scores) / sum(count for _, count in scores)

    return mean_loss


class LogHook:
    "A hook that prints and logs the loss of each step and, every `eval_every` steps, of the validation rows."

    def __init__(self, plan: Plan, validate: Callable[[Qwen3LMHeadModel], float] | None) -> None:
        self.plan, self.config, self.validate = plan, plan.config, validate
        self.logged, self.scores = 0, dict[str, Any]()

    def __call__(self, info: StepInfo) -> None:
        step = info.next_step
        if step == self.logged or not info.step_duration:  # the trainer calls its hooks a second time after the last step
            return
        self.logged, self.scores = step, {**self.scores, "step": step, "loss": float(info.loss)}
        last, per_step = step == self.config.steps, self.plan.counters(1)
        speed = {f"time.{name}_per_s": per_step[name] / info.step_duration for name in ("tokens", "padded")}
        if last or step % max(1, self.config.steps // 1000) == 0:
            say(f"step {step} loss {info.loss:.7f} {speed['time.padded_per_s']:,.0f} tokens/s")
        line = {**self.plan.counters(step), "loss": self.scores["loss"], **speed}  # the names of `tomat train`
        if self.validate and (last or step % self.config.eval_every == 0):
            self.scores["held_out_loss"] = line["val.loss"] = self.validate(info.state.eval_model)
            say(f"step {step} validation loss {line['val.loss']:.7f}")
        levanter.tracker.log(line, step=info.step)


def export(model: Qwen3LMHeadModel,
           plan: Plan,
           scores: dict[str, Any],  # losses of the model, for tomat.json
           ) -> str:  # folder of the checkpoint, out/model
    "Write a checkpoint in the format of Hugging Face with the tokenizer and tomat.json; all processes must call it."
    folder, vocab_size = f"{plan.out}/model", plan.tokenizer.vocab.size
    more = {"architectures": ["Qwen3ForCausalLM"], "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
            "max_position_embeddings": max(8192, model.config.max_seq_len)}
    converter = HFCheckpointConverter(Qwen3Config, HfConfigClass=HFQwen3Config, config_overrides=more)
    converter.save_pretrained(model, folder, save_tokenizer=False, save_reference_code=False, max_shard_size=2**62)
    if jax.process_index() == 0:
        plan.tokenizer.save_hf(folder)
        save_atoms(data_atoms(plan.data, plan.meta), f"{folder}/atoms.json")
        written = {name: md5_of(f"{folder}/{name}") for name in ("config.json", "model.safetensors", "atoms.json")}
        training = {**plan.config.written(), **scores, "parameters": n_parameters(plan.size, vocab_size),
                    "data": plan.meta["label"], "rows": plan.meta["rows"], "materials": sorted(plan.meta["materials"])}
        write_json(f"{folder}/tomat.json", {"tokenizer": plan.tokenizer.to_dict(), "training": training, "md5": written})
    multihost_utils.sync_global_devices("exported")
    return folder


def _begin(plan: Plan) -> bool:  # False: the run is finished
    "Open the folder of the run, and return whether there are steps left."
    check_share(plan.config, plan.run_config, jax.device_count())
    same_order = open_run_dir(plan, writes=jax.process_index() == 0)
    if exists(f"{plan.out}/model/tomat.json"):
        say(f"{plan.out} is finished")
        return False
    if not same_order:
        say(f"{plan.out} was begun by an earlier version: from here on its rows come in the order of `tomat train`")
    return True


def train(plan: Plan) -> str:  # folder of the checkpoint
    "Train, or resume a run that was stopped; returns the folder of the checkpoint."
    if not _begin(plan):
        return f"{plan.out}/model"
    config, vocab = plan.config, plan.tokenizer.vocab
    levanter.trainer.initialize(settings := trainer_config(plan))
    levanter.tracker.log_hyperparameters({"tomat": plan.about()})
    Pos, objective = hax.Axis("position", plan.length), plan.objective
    model_config = config_of(plan.size, Pos.size)

    def rows(units: range, n: int | None = None, noise: HistoryNoise | None = None) -> OrderedRows:
        return OrderedRows(plan.index, units, plan.order(units), Pos, n, noise)

    def loss(model: Qwen3LMHeadModel, ids: hax.NamedArray, *, key: jax.Array | None = None) -> jax.Array:
        total, count = loss_and_count(model, *versions(ids, objective))
        return total / count

    with Trainer(settings, Adam.of(config).build(config.steps), loss) as trainer:  # its end waits until the last state is on disk
        model_key, training_key = jax.random.split(jax.random.PRNGKey(config.seed))
        state = trainer.initial_state(training_key, model_init=lambda: fresh(model_config, vocab, model_key))
        say(f"{n_parameters(plan.size, vocab.size):,} parameters, rows of {Pos.size} tokens, {jax.device_count()} devices in "
            f"{jax.process_count()} processes, from step {int(state.step)}")
        scored = rows(plan.val_units, config.val_seqs, None if config.history else plan.noise)
        hook = LogHook(plan, validation(trainer, scored, objective) if plan.val_units else None)
        trainer.add_hook(log_performance_stats(Pos.size, settings.batch_schedule, plan.row_flops))
        trainer.add_hook(hook)
        loader = trainer.data_loader(rows(plan.train_units, noise=plan.noise))
        last = trainer.train(state, loader.iter_from_step(state.step))
        folder = export(last.state.eval_model, plan, hook.scores)
    levanter.tracker.current_tracker().finish()
    say(f"saved {folder}")
    return folder
