"""A run with Levanter's trainer: rows in, states on the way, a checkpoint for `tomat predict` at the end."""

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
from levanter.optim.config import AdamConfig
from levanter.tracker import NoopConfig, TrackerConfig
from levanter.tracker.wandb import WandbConfig
import levanter.trainer
from levanter.trainer import Trainer, TrainerConfig
from transformers import Qwen3Config as HFQwen3Config

from tomat.io.files import exists, is_remote, md5_of, write_json
from tomat.io.settings import setting
from tomat.models.sizes import n_parameters
from tomat.tokens.tokenizer import BOS, EOS, PAD

from tomat_marin.network import Objective, config_of, fresh, loss_and_count, objective_of
from tomat_marin.plan import Plan, check_share, open_run_dir
from tomat_marin.rows import Endless, Rows


def distributed_config() -> DistributedConfig:
    "On Iris, Slurm and TPU pods Levanter finds the other processes itself; elsewhere JAX's own variables name them."
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address or "IRIS_TASK_ID" in os.environ:
        return DistributedConfig()
    if os.environ.get("JAX_PLATFORMS") == "cpu":  # else two processes may order their collectives differently, and gloo fails
        os.environ["XLA_FLAGS"] = f"--xla_cpu_enable_concurrency_optimized_scheduler=false {os.environ.get('XLA_FLAGS', '')}"
    return DistributedConfig(address, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"]))


def _local(plan: Plan) -> Path:
    "Where files go that have to be local: into the run's folder, if that is."
    folder = Path(tempfile.gettempdir(), "tomat-marin", plan.knobs.results_label) if is_remote(plan.out) else Path(plan.out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device_name(kind: str,  # as JAX calls it
                ) -> str:
    "`v6e` of `TPU v6 lite`, `H100` of `NVIDIA H100 80GB HBM3`: as `tomat.train.cost.PEAKS` has them."
    name = re.split(r"-| \d+ ?GB", re.sub(r"^(TPU|NVIDIA) (GeForce )?", "", kind).replace(" lite", "e"))[0]
    return {"v5": "v5p"}.get(name, name)


def _tracker(plan: Plan) -> TrackerConfig:
    mode, knobs = setting("wandb_mode", "offline"), plan.knobs
    if mode == "disabled":
        return NoopConfig()
    os.environ.setdefault("WANDB_DIR", str(_local(plan)))
    devices = f"{device_name(jax.devices()[0].device_kind)}:{jax.device_count()}"
    return WandbConfig(entity=setting("wandb_entity") or None, project=setting("wandb_project", "tomat"), mode=mode,
                       name=knobs.results_label, group=knobs.label, tags=[knobs.model, "levanter", devices], save_code=False)


def trainer_config(plan: Plan) -> TrainerConfig:
    "What Levanter's trainer is told."
    knobs, setup = plan.knobs, plan.setup
    saves = CheckpointerConfig(base_path=f"{plan.out}/states", append_run_id_to_base_path=False, keep=[{"every": setup.save_steps}],
                               save_interval=datetime.timedelta(minutes=setup.save_minutes))
    return TrainerConfig(
        seed=knobs.seed, mp=jmp.get_policy("p=f32,c=bf16" if knobs.precision == "bf16" else "f32"), log_dir=_local(plan) / "logs",
        id=knobs.results_label, tracker=_tracker(plan), log_jaxprs=False, log_xla_hlo=False, watch=WatchConfig(watch_targets=[]),
        train_batch_size=knobs.batch_size, per_device_parallelism=setup.rows_at_once, num_train_steps=knobs.steps,
        steps_per_eval=knobs.eval_every, checkpointer=saves, distributed=DistributedConfig(initialize_jax_distributed=False),
        require_accelerator=os.environ.get("JAX_PLATFORMS") != "cpu")


def say(line: str) -> None:
    "Print in the first process."
    if jax.process_index() == 0:
        print(line, flush=True)


def judge_with(trainer: Trainer,
               rows: Rows,  # held out
               objective: Objective,
               ) -> Callable[[Qwen3LMHeadModel], float]:
    "A function that gives the mean loss of a model on held-out rows."
    loader = trainer.data_loader(rows, trainer.EvalBatch)

    @named_jit(axis_resources=trainer.parameter_axis_mapping)
    def score(model: Qwen3LMHeadModel, ids: hax.NamedArray) -> tuple[jax.Array, jax.Array]:
        with hax.axis_mapping(trainer.compute_axis_mapping):
            return loss_and_count(trainer.mp.cast_to_compute(model), ids, objective)

    def judge(model: Qwen3LMHeadModel) -> float:
        scores = [tuple(map(float, score(model, ids))) for ids in loader]  # rows that fill the last batch count nothing
        return sum(total for total, _ in scores) / sum(count for _, count in scores)

    return judge


class Teller:
    "A hook that prints the loss of each step and, now and then, that of held-out rows."

    def __init__(self, plan: Plan, judge: Callable[[Qwen3LMHeadModel], float] | None) -> None:
        self.plan, self.knobs, self.judge = plan, plan.knobs, judge
        self.told, self.scores = 0, dict[str, Any]()

    def __call__(self, info: StepInfo) -> None:
        step = info.next_step
        if step == self.told or not info.step_duration:  # the trainer calls its hooks once more at the end
            return
        self.told, self.scores = step, {**self.scores, "step": step, "loss": float(info.loss)}
        last, per_step = step == self.knobs.steps, self.plan.counters(1)
        speed = {f"time.{name}_per_s": per_step[name] / info.step_duration for name in ("tokens", "padded")}
        if last or step % max(1, self.knobs.steps // 1000) == 0:
            say(f"step {step} loss {info.loss:.7f} {speed['time.padded_per_s']:,.0f} tokens/s")
        line = {**self.plan.counters(step), "loss": self.scores["loss"], **speed}  # as `tomat train` tells W&B
        if self.judge and (last or step % self.knobs.eval_every == 0):
            self.scores["held_out_loss"] = line["val.loss"] = self.judge(info.state.eval_model)
            say(f"step {step} held-out loss {line['val.loss']:.7f}")
        levanter.tracker.log(line, step=info.step)


def export(model: Qwen3LMHeadModel,
           plan: Plan,
           scores: dict[str, Any],  # what is known of it
           ) -> str:  # the folder, out/model
    "Write Hugging Face weights with the tokenizer and tomat.json beside; every process must ask, the first one writes."
    place, vocab_size = f"{plan.out}/model", plan.tokenizer.vocab.size
    more = {"architectures": ["Qwen3ForCausalLM"], "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
            "max_position_embeddings": max(8192, model.config.max_seq_len)}
    converter = HFCheckpointConverter(Qwen3Config, HfConfigClass=HFQwen3Config, config_overrides=more)
    converter.save_pretrained(model, place, save_tokenizer=False, save_reference_code=False, max_shard_size=2**62)
    if jax.process_index() == 0:
        plan.tokenizer.save_hf(place)
        written = {name: md5_of(f"{place}/{name}") for name in ("config.json", "model.safetensors")}
        training = {**plan.facts["knobs"], **scores, "parameters": n_parameters(plan.knobs.size, vocab_size),
                    "data": plan.meta["label"], "rows": plan.meta["rows"], "materials": sorted(plan.meta["materials"])}
        write_json(f"{place}/tomat.json", {"tokenizer": plan.tokenizer.to_dict(), "training": training, "md5": written})
    multihost_utils.sync_global_devices("exported")
    return place


def train(plan: Plan) -> str:  # the checkpoint, a folder
    "Train, or go on with a run that was stopped."
    knobs, vocab = plan.knobs, plan.tokenizer.vocab
    check_share(knobs, plan.setup, jax.device_count())
    open_run_dir(plan, writes=jax.process_index() == 0)
    if exists(f"{plan.out}/model/tomat.json"):
        say(f"{plan.out} is finished")
        return f"{plan.out}/model"
    levanter.trainer.initialize(config := trainer_config(plan))
    levanter.tracker.log_hyperparameters({"tomat": plan.about()})
    Pos, objective = hax.Axis("position", plan.length), objective_of(plan.tokenizer, knobs.emd)
    model_config = config_of(knobs.size, Pos.size)

    def loss(model: Qwen3LMHeadModel, ids: hax.NamedArray, *, key: jax.Array | None = None) -> jax.Array:
        total, count = loss_and_count(model, ids, objective)
        return total / count

    adam = AdamConfig(learning_rate=knobs.peak_lr, weight_decay=0.1, warmup=min(20, knobs.steps // 2))
    with Trainer(config, adam.build(knobs.steps), loss) as trainer:  # leaving it waits until the last state is on disk
        model_key, training_key = jax.random.split(jax.random.PRNGKey(knobs.seed))
        state = trainer.initial_state(training_key, model_init=lambda: fresh(model_config, vocab, model_key))
        say(f"{n_parameters(knobs.size, vocab.size):,} parameters, rows of {Pos.size} tokens, {jax.device_count()} devices in "
            f"{jax.process_count()} processes, from step {int(state.step)}")
        teller = Teller(plan, judge_with(trainer, Rows(plan.keep, Pos), objective) if plan.keep else None)
        trainer.add_hook(log_performance_stats(Pos.size, config.batch_schedule, plan.row_flops))
        trainer.add_hook(teller)
        loader = trainer.data_loader(Endless(Rows(plan.learn, Pos), knobs.seed))
        last = trainer.train(state, loader.iter_from_step(state.step))
        place = export(last.state.eval_model, plan, teller.scores)
    levanter.tracker.current_tracker().finish()
    say(f"saved {place}")
    return place
