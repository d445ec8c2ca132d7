"""The settings, the data and the folder of a run. Nothing here needs JAX, so a dry run works without it."""

import os
import shlex
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tomat.dataset.meta import read_meta, tokenizer_of
from tomat.dataset.noise import HistoryNoise
from tomat.dataset.order import RowIndex, RowOrder, row_index
from tomat.io.files import read_json, write_json
from tomat.io.untrusted import is_name
from tomat.io.remote import TomatError, exists, is_remote
from tomat.io.settings import setting
from tomat.models.objective import Objective, objective_of
from tomat.models.sizes import OTHER_NAMES, ModelSize, flops_per_token, model_size, n_parameters
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.config import RunConfig, TrainConfig, check_options, config_from, from_variables, option
from tomat.train.machines import PEAKS, bill, expected_efficiency, machine_of, mfu_setting

LANES = 128  # the number of tokens of a row is rounded up to a multiple of this, for the attention of TPUs


@dataclass(frozen=True)
class TpuConfig:
    "Settings that only this launcher has."
    label: str = option("", "Name of the data set in the token store, or a folder of rows.")
    results_label: str = option("", "Name of the run; empty: LABEL-MODEL-seedSEED.")
    save_minutes: float = option(15.0, "Minutes between two saved states, of which the newest are kept.", above=0, most=1e6)
    save_steps: int = option(10_000, "Steps between two saved states that are never deleted.", least=1)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.label:
            raise TomatError("TOMAT_LABEL names no data set: give a label of the token store, or a folder of rows.")
        if not is_name(self.results_label):
            raise TomatError(f"The name of the run would be {self.results_label!r}: set TOMAT_RESULTS_LABEL to a plain name of "
                             "letters, digits and _ . + - that begins with a letter or a digit.")


FIXED = {"loss_on": "density tokens alone count in the loss", "optimizer": "AdamW is the only optimiser",
         "save_every": "states are saved by time, set TOMAT_SAVE_MINUTES", "device": "JAX chooses the device, set JAX_PLATFORMS",
         "compiled": "XLA compiles everything", "shard": "weights are always sharded", "workers": "threads read the rows"}


def check_levanter(config: TrainConfig, run_config: RunConfig) -> None:
    "Raise `TomatError` for a setting of `tomat train` that Levanter does not support."
    for part in (config, run_config):
        for field in fields(part):
            if field.name in FIXED and (value := getattr(part, field.name)) != field.default:
                raise TomatError(f"{field.name} is {value!r}, and with Levanter it can only be {field.default!r}, remove "
                                 f"TOMAT_{field.name.upper()}: {FIXED[field.name]}.")
    if config.seed >= 2**31:
        raise TomatError(f"seed must be below 2147483648 with Levanter, got {config.seed}: set TOMAT_SEED to a smaller number.")


def settings() -> tuple[TrainConfig, RunConfig, TpuConfig]:
    "The settings that the TOMAT_* variables hold; raises `TomatError` for a wrong value."
    variables, precisions = dict(os.environ), {"": "", "bf16": "true", "f32": "false"}
    if variables.get("TOMAT_ROWS_AT_ONCE") == "-1":  # earlier name and value of an automatic TOMAT_MICRO_BATCH
        variables["TOMAT_ROWS_AT_ONCE"] = "0"
    precision = variables.get("TOMAT_PRECISION", "")  # earlier name of TOMAT_BF16
    if precision not in precisions:
        raise TomatError(f"TOMAT_PRECISION is {precision!r}: set TOMAT_BF16 to true or false.")
    variables.setdefault("TOMAT_BF16", precisions[precision])
    config, run_config = from_variables(TrainConfig, environ=variables), from_variables(RunConfig, environ=variables)
    check_levanter(config, run_config)
    config = replace(config, size=OTHER_NAMES.get(config.size, config.size))
    name = f"{Path(variables.get('TOMAT_LABEL', '')).name}-{config.size}-seed{config.seed}"
    return config, run_config, from_variables(TpuConfig, {"results_label": variables.get("TOMAT_RESULTS_LABEL") or name}, variables)


def data_folder(tpu: TpuConfig) -> str:
    "The folder of rows, local or remote."
    store = setting("token_store")
    return f"{store.rstrip('/')}/{tpu.label}" if store else tpu.label


def run_folder(tpu: TpuConfig) -> str:
    "The folder of the run, local or remote: states, and the model at the end."
    return f"{(setting('checkpoint_store') or 'runs').rstrip('/')}/{tpu.results_label}"


@dataclass(frozen=True)
class Plan:
    "A run and the data that it reads."
    config: TrainConfig
    run_config: RunConfig
    tpu: TpuConfig
    data: str                 # folder of rows, local or remote
    out: str                  # folder of the run, local or remote
    meta: dict[str, Any]      # content of the data's meta.json
    tokenizer: Tokenizer      # tokenizer of the data
    objective: Objective      # tokens and kind of the loss
    index: RowIndex           # row groups of the data, the units of the order
    first_val: int            # index of the first unit of the held-out materials; the number of units: none is held out

    @property
    def size(self) -> ModelSize:
        return model_size(self.config.size)

    @cached_property
    def noise(self) -> HistoryNoise | None:
        "The noise of what the model reads in training, as in `tomat train`."
        return HistoryNoise(self.tokenizer, self.config.noise, self.config.seed) if self.config.noise else None

    @property
    def bf16(self) -> bool:
        "Whether matrix products are in bfloat16; weights are always float32."
        return os.environ.get("JAX_PLATFORMS") != "cpu" if self.run_config.bf16 is None else self.run_config.bf16

    @property
    def metadata(self) -> dict[str, Any]:
        "Everything that decides the run, as run.json holds it."
        keys = ("label", "seed", "rows", "tokens", "tokenizer")
        return {"config": self.config.written(), "data": {key: self.meta[key] for key in keys}}

    def order(self, units: range,  # indices of units
              ) -> RowOrder:
        "The order of the rows of some units, as in `tomat train`."
        return RowOrder(self.index.counts, self.config.seed, self.config.window).subset(units)

    @property
    def train_units(self) -> range:
        "Indices of the units that the run trains on."
        return range(self.first_val)

    @property
    def val_units(self) -> range:
        "Indices of the units of the held-out materials."
        return range(self.first_val, len(self.index.groups))

    @cached_property
    def length(self) -> int:
        "The number of tokens of every row, PAD included: that of the longest material, rounded up to a multiple of LANES."
        return -(-max(group.length for group in self.index.groups) // LANES) * LANES

    @cached_property
    def row_flops(self) -> int:
        "The FLOPs to train on one row of `length` tokens."
        return round(flops_per_token(self.size, self.tokenizer.vocab.size, self.length) * self.length)

    def counters(self, step: int,  # number of steps done
                 ) -> dict[str, int]:
        "Tokens and FLOPs after these steps, under the names of `tomat train`; `tokens` is computed from the mean row."
        rows = step * self.config.batch_size
        return {"step": step, "tokens": round(rows * self.meta["tokens"] / self.meta["rows"]), "padded": rows * self.length,
                "flops": rows * self.row_flops}

    def cost(self) -> dict[str, Any]:
        "Hours and money of the run on the TPUs of the settings; TOMAT_MFU replaces the nearest measured MFU."
        machine = machine_of(setting("tpu_type", "v6e-8"))
        found = expected_efficiency("causal", self.config.size, machine, mfu_setting())
        about = {"machine": machine.name, "MFU expected": found.mfu, "MFU from": found.source.replace("--mfu", "TOMAT_MFU")}
        if not found.mfu or machine.kind not in PEAKS:
            return about | {"hours expected": None}
        seconds = self.counters(self.config.steps)["flops"] / (PEAKS[machine.kind] * 1e12 * found.mfu * machine.devices)
        return about | bill(seconds / 3600, machine.kind, machine.devices)

    def about(self) -> dict[str, Any]:
        "The run in numbers, as the dry run prints it."
        n_ids, last, counts = self.tokenizer.vocab.size, self.counters(self.config.steps), self.index.counts
        rows, held_out = int(counts[:self.first_val].sum()), int(counts[self.first_val:].sum())
        return {**self.metadata, "from": self.data, "to": self.out, "run": asdict(self.run_config) | asdict(self.tpu),
                "parameters": n_parameters(self.size, n_ids), "training rows": rows, "held-out rows": held_out,
                "validation rows": min(self.config.val_seqs, held_out), "tokens a row": self.length,
                "FLOPs per token": self.row_flops / self.length, "tokens": last["tokens"], "tokens, padded": last["padded"],
                "FLOPs": last["flops"], "epochs": self.config.steps * self.config.batch_size / rows, **self.cost()}


def check_share(config: TrainConfig, run_config: RunConfig,
                devices: int = 1,  # number of devices
                ) -> None:
    "Raise `TomatError` for a batch that the devices cannot share evenly."
    rows = max(1, run_config.micro_batch)
    if config.batch_size % (devices * rows):
        raise TomatError(f"batch_size is {config.batch_size}: give a multiple of {devices * rows}, which is the number of devices, "
                         f"{devices}, times micro_batch, {rows}.")


def plan() -> Plan:
    "The run that the variables describe; raises `TomatError` if its data is missing or its settings do not fit the data."
    config, run_config, tpu = settings()
    check_share(config, run_config)
    data = data_folder(tpu)
    meta = read_meta(data)
    tokenizer, index = tokenizer_of(data, meta), row_index(data, meta)
    objective = objective_of(tokenizer, config.loss_on, config.emd, config.soft)
    first_val = index.last_materials(config.val_seqs) if config.val_seqs else len(index.groups)
    return Plan(config, run_config, tpu, data, run_folder(tpu), meta, tokenizer, objective, index, first_val)


def _as_now(written: dict[str, Any],  # content of a run.json of any version
            plan: Plan,               # the run to compare it with
            ) -> dict[str, Any]:  # equal to `plan.metadata` for the same run
    "The content of a run.json in the present form; reads old files, which hold `knobs`, or a `model` instead of a `size`."
    if "knobs" not in written:  # reads old files
        return written | {"config": config_from(TrainConfig, written["config"]).written()}
    old = dict(written["knobs"])  # reads old files
    same = old["results_label"] == plan.tpu.results_label and (old["precision"] == "bf16") == plan.bf16
    given = {"size" if name == "model" else name: value for name, value in old.items()}
    ours = plan.config.written()
    config = config_from(TrainConfig, ours | {name: value for name, value in given.items() if name in ours})
    return {"config": config.written(), "data": written["data"]} if same else {}


def open_run_dir(plan: Plan,
                 writes: bool,  # True: this process writes run.json
                 ) -> bool:  # False for a run of an earlier version, whose rows came in another order
    "Open the folder of a new or a resumed run; raises `TomatError` for the folder of another run."
    path = f"{plan.out}/run.json"
    if not exists(path):
        if writes:
            write_json(path, plan.metadata)
        return True
    written = read_json(path)
    if _as_now(written, plan) != plan.metadata:
        raise TomatError(f"{plan.out} holds a run with other settings or other data: give TOMAT_RESULTS_LABEL another name.")
    return "config" in written


HOST = "--enable-extra-resources --no-sync --cpu 32 --memory 64GB --disk 50GB"
COMMAND = "sh marin/environment.sh .venv-tpu tpu && .venv-tpu/bin/python marin/train_tomat_tpu.py"


def iris_line(cluster: str,  # name of the cluster for iris
              ) -> str:
    "The `iris job run` command for the run that the variables describe, on the TPUs of the settings; does not read the data."
    config, run_config, tpu = settings()
    check_share(config, run_config)
    stores, tpu_type = ("token_store", "checkpoint_store"), setting("tpu_type")
    if missing := next((name for name in stores if not is_remote(setting(name))), "" if tpu_type else "tpu_type"):
        wanted = "a folder in a bucket" if missing in stores else "TPUs such as v6e-8"
        raise TomatError(f"The setting {missing} is {setting(missing)!r}: name {wanted}, in settings.ini or as "
                         f"TOMAT_{missing.upper()}.")
    names = [name for part in (config, run_config, tpu) for field in fields(part)
             for name in (field.name, *field.metadata["was"])] + ["precision"]
    given = {name: os.environ.get(f"TOMAT_{name.upper()}") for name in names} | {name: setting(name) for name in (
        *stores, "s3_endpoint", "gcs_project", "wandb_mode", "wandb_entity", "wandb_project")}
    variables = [word for name, value in given.items() if value for word in ("-e", f"TOMAT_{name.upper()}", value)]
    regions = [word for region in setting("tpu_regions").replace(",", " ").split() for word in ("--region", region)]
    line = shlex.join(["iris", "--cluster", cluster, "job", "run", "--tpu", tpu_type, *regions, *HOST.split(), *variables])
    secret = ' -e WANDB_API_KEY "$WANDB_API_KEY"' if setting("wandb_mode") == "online" else ""
    return f"{line}{secret} -- bash -c {shlex.quote(COMMAND)}"
