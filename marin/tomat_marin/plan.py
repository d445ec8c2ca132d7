"""What a run is: its knobs, its network, its places. Nothing here wants JAX, so that a dry run costs nothing."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tomat.models import sizes
from tomat.io.files import TomatError, exists, is_name, is_remote, read_json, write_json
from tomat.io.settings import setting
from tomat.dataset.shards import read_meta
from tomat.models.sizes import OTHER_NAMES, ModelSize, flops_per_token, n_parameters
from tomat.tokens.tokenizer import Tokenizer, tokenizer_from_dict

from tomat_marin.groups import Group, groups_of, row_length, split

MODELS = {"tiny": ModelSize(width=64, layers=2, heads=2, mlp=128, kv_heads=1)} | sizes.MODELS  # "tiny" is for tests


@dataclass(frozen=True)
class Knobs:
    "Everything that decides a run; each is set by TOMAT_<NAME>."
    label: str                 # data set: its name in the token store, or a folder
    results_label: str         # name of the run; made of label, model and seed where it is not set
    model: str = "30M"         # a key of MODELS
    seed: int = 0              # of the weights and of the order of rows
    steps: int = 2000          # weight updates
    batch_size: int = 128      # rows a step, on all devices together
    val_seqs: int = 128        # rows to judge by, of the last materials; 0: none
    eval_every: int = 200      # steps between two evaluations
    emd: float = 0.0           # share of the earth mover's distance in the loss, 0 to 1
    lr: float = 0.0            # peak learning rate; 0: 2e-3 up to width 512, then falling with the width
    precision: str = "bf16"    # of the computation: "bf16" or "f32"; weights are always f32

    def __post_init__(self) -> None:
        if not self.label:
            raise TomatError("TOMAT_LABEL names no data set: give a label of the token store, or a folder of rows.")
        if self.model not in MODELS:
            raise TomatError(f"There is no model size {self.model!r}: use one of {', '.join([*MODELS, *OTHER_NAMES])}.")
        if not is_name(self.results_label):
            raise TomatError(f"The run would be called {self.results_label!r}: set TOMAT_RESULTS_LABEL to a plain name, of "
                             "letters, digits and _ . + - only, which begins with a letter or a digit.")
        if min(self.steps, self.batch_size, self.eval_every) < 1 or self.val_seqs < 0 or not 0 <= self.seed < 2**31:
            raise TomatError("A run has at least one step, one row a batch and an evaluation now and then, and a seed from 0 "
                             "to 2^31 - 1.")
        if self.precision not in ("bf16", "f32") or not 0 <= self.emd <= 1 or not 0 <= self.lr < 1:
            raise TomatError("The precision is bf16 or f32, the share of the earth mover's distance and the learning rate are "
                             "numbers from 0 to 1.")

    @property
    def size(self) -> ModelSize:
        return MODELS[self.model]

    @property
    def peak_lr(self) -> float:
        return self.lr or 2e-3 * min(1.0, 512 / self.size.width)


@dataclass(frozen=True)
class RunConfig:
    "How a run is carried out; none of it changes the numbers by more than rounding."
    rows_at_once: int = -1     # on one device; -1: its whole share of a batch
    save_minutes: float = 15   # between two states that replace each other
    save_steps: int = 10_000   # between two states that stay

    def __post_init__(self) -> None:
        if self.rows_at_once < 1 and self.rows_at_once != -1:
            raise TomatError(f"TOMAT_ROWS_AT_ONCE is {self.rows_at_once}: give at least 1, or -1 for a device's whole share of a "
                             "batch.")
        if not 0 < self.save_minutes <= 1e6:
            raise TomatError(f"TOMAT_SAVE_MINUTES is {self.save_minutes}: give a number above 0, a million at most.")
        if self.save_steps < 1:
            raise TomatError(f"TOMAT_SAVE_STEPS is {self.save_steps}: give at least 1.")


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as err:
        raise TomatError(f"TOMAT_{name.upper()} is {text!r}, which is no {kind.__name__}: mend it.") from err


def from_environment(kind: type) -> Any:  # Knobs or Setup
    "What the TOMAT_* variables say."
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    given = {name: os.environ.get(f"TOMAT_{name.upper()}", "") for name in kinds}
    values = {name: _number(name, text, kinds[name]) for name, text in given.items() if text}
    if kind is Knobs:
        values.setdefault("label", "")
        values["model"] = OTHER_NAMES.get(values.get("model", ""), values.get("model", Knobs.model))
        short = f"{Path(values['label']).name}-{values['model']}-seed{values.get('seed', Knobs.seed)}"
        values.setdefault("results_label", short)
    return kind(**values)


def data_place(knobs: Knobs) -> str:
    "The folder of rows, local or remote."
    store = setting("token_store")
    return f"{store.rstrip('/')}/{knobs.label}" if store else knobs.label


def run_place(knobs: Knobs) -> str:
    "The folder of the run, local or remote: states, and the model at the end."
    return f"{(setting('checkpoint_store') or 'runs').rstrip('/')}/{knobs.results_label}"


@dataclass(frozen=True)
class Plan:
    "A run and the data that it reads."
    knobs: Knobs
    setup: RunConfig
    data: str                 # folder of rows
    out: str                  # folder of the run
    meta: dict[str, Any]      # the data's meta.json
    tokenizer: Tokenizer      # the data's
    learn: Sequence[Group]    # its rows to learn from …
    keep: Sequence[Group]     # … and to judge by

    @property
    def facts(self) -> dict[str, Any]:
        "What decides the run, ready for JSON: a state of other facts is not gone on from."
        keys = ("label", "seed", "rows", "tokens", "tokenizer")
        return {"knobs": dataclasses.asdict(self.knobs), "data": {key: self.meta[key] for key in keys}}

    @cached_property
    def length(self) -> int:
        "Tokens of a row as it is trained on, PAD included."
        return row_length([*self.learn, *self.keep])

    @cached_property
    def row_flops(self) -> int:
        "FLOPs to train on such a row."
        return round(flops_per_token(self.knobs.size, self.tokenizer.vocab.size, self.length) * self.length)

    def counters(self, step: int) -> dict[str, int]:
        "What was read after so many steps, under the names of `tomat train`; `tokens` takes rows to be as long as their mean."
        rows = step * self.knobs.batch_size
        return {"step": step, "tokens": round(rows * self.meta["tokens"] / self.meta["rows"]), "padded": rows * self.length,
                "flops": rows * self.row_flops}

    def about(self) -> dict[str, Any]:
        "What it will take, for people."
        n_ids, last = self.tokenizer.vocab.size, self.counters(self.knobs.steps)
        rows, kept = (sum(group.rows for group in groups) for groups in (self.learn, self.keep))
        return {**self.facts, "from": self.data, "to": self.out, "setup": dataclasses.asdict(self.setup),
                "learning rate": self.knobs.peak_lr, "parameters": n_parameters(self.knobs.size, n_ids),
                "rows to learn from": rows, "rows to judge by": kept, "tokens a row": self.length,
                "FLOPs per token": self.row_flops / self.length, "tokens": last["tokens"], "tokens, padded": last["padded"],
                "FLOPs": last["flops"], "epochs": self.knobs.steps * self.knobs.batch_size / rows}


def check_share(knobs: Knobs, setup: RunConfig, devices: int = 1) -> None:
    "Refuse batches that so many devices cannot share."
    at_once = max(1, setup.rows_at_once)
    if knobs.batch_size % (devices * at_once):
        raise TomatError(f"TOMAT_BATCH_SIZE is {knobs.batch_size}: give a multiple of {devices * at_once}, which is the number of "
                         f"devices, {devices}, times the rows that each takes at once, {at_once}.")


def plan() -> Plan:
    "The run that the environment asks for; raises `TomatError` where its data is not there, or it cannot be."
    knobs, setup = from_environment(Knobs), from_environment(RunConfig)
    check_share(knobs, setup)
    data = data_place(knobs)
    meta = read_meta(data)
    tokenizer = tokenizer_from_dict(meta["tokenizer"])
    if knobs.emd and tokenizer.density_codec.tokens_per_value != 1:
        raise TomatError(f"The earth mover's distance needs one token a value, and {tokenizer.density_codec.name} writes "
                         f"{tokenizer.density_codec.tokens_per_value}.")
    return Plan(knobs, setup, data, run_place(knobs), meta, tokenizer, *split(groups_of(data, meta), knobs.val_seqs))


def open_run_dir(plan: Plan, writes: bool) -> None:
    "Refuse a folder that another run has begun; the process that `writes` puts the facts there."
    place = f"{plan.out}/run.json"
    if exists(place):
        if read_json(place) != plan.facts:
            raise TomatError(f"{plan.out} holds a run with other knobs or other data: give TOMAT_RESULTS_LABEL another name.")
    elif writes:
        write_json(place, plan.facts)


HOST = "--enable-extra-resources --no-sync --cpu 32 --memory 64GB --disk 50GB"
COMMAND = "sh marin/environment.sh .venv-tpu tpu && .venv-tpu/bin/python marin/train_tomat_tpu.py"


def iris_line(cluster: str) -> str:
    "The `iris job run` line of the run that the environment asks for, on the TPUs of the settings; the data is not looked at."
    check_share(from_environment(Knobs), from_environment(RunConfig))
    stores, tpu = ("token_store", "checkpoint_store"), setting("tpu_type")
    if missing := next((name for name in stores if not is_remote(setting(name))), "" if tpu else "tpu_type"):
        wanted = "a folder in a bucket" if missing in stores else "TPUs such as v6e-8"
        raise TomatError(f"The setting {missing} is {setting(missing)!r}: name {wanted}, in settings.ini or as "
                         f"TOMAT_{missing.upper()}.")
    names = [field.name for kind in (Knobs, RunConfig) for field in dataclasses.fields(kind)]
    given = {name: os.environ.get(f"TOMAT_{name.upper()}") for name in names} | {name: setting(name) for name in (
        *stores, "s3_endpoint", "gcs_project", "wandb_mode", "wandb_entity", "wandb_project")}
    variables = [word for name, value in given.items() if value for word in ("-e", f"TOMAT_{name.upper()}", value)]
    regions = [word for region in setting("tpu_regions").replace(",", " ").split() for word in ("--region", region)]
    line = shlex.join(["iris", "--cluster", cluster, "job", "run", "--tpu", tpu, *regions, *HOST.split(), *variables])
    secret = ' -e WANDB_API_KEY "$WANDB_API_KEY"' if setting("wandb_mode") == "online" else ""
    return f"{line}{secret} -- bash -c {shlex.quote(COMMAND)}"
