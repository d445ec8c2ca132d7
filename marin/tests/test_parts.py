"""The parts of a run, one by one."""

import asyncio
import json
import math
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import haliax as hax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from tomat.models.objective import Objective
from tomat_marin import plan as plans
from tomat_marin.network import token_losses
from tomat_marin.optim import Adam
from tomat_marin.rows import OrderedRows
from tomat_marin.run import device_name

from conftest import LAUNCHER, ROOT, with_torch
from tomat.dataset.meta import read_meta
from tomat.dataset.order import RowOrder, row_index
from tomat.io.remote import TomatError
from tomat.models.sizes import model_size
from tomat.train.config import SCHEDULES, RunConfig, TrainConfig
from tomat.train.optim import learning_rate


@pytest.fixture
def variables(monkeypatch, rows, tmp_path):
    "Set TOMAT_* variables."
    monkeypatch.chdir(tmp_path)
    def put(**given):
        for key, value in {"LABEL": rows, "VAL_SEQS": 10, **given}.items():
            monkeypatch.setenv(f"TOMAT_{key}", str(value))
    return put


def test_a_plan_describes_the_run(variables, rows):
    variables(MODEL="200M", STEPS=10, SEED=3, BATCH_SIZE=128)
    about = plans.plan().about()
    assert about["config"]["size"] == "208M" and about["to"] == "runs/small-208M-seed3" and about["from"] == str(rows)
    assert about["tokens, padded"] == 10 * 128 * 256 and about["parameters"] == plans.n_parameters(model_size("208M"), 6794)
    assert about["epochs"] == 10 * 128 / 52 and about["config"]["lr"] == 1e-3
    assert (about["training rows"], about["held-out rows"], about["validation rows"]) == (52, 12, 10)
    assert about["FLOPs"] == about["tokens, padded"] * plans.flops_per_token(model_size("208M"), 6794, 256)
    assert json.loads(json.dumps(about)) == about


def test_a_run_json_with_the_earlier_name_of_the_size_is_read(variables):
    variables(MODEL="30M", STEPS=20)
    plan = plans.plan()
    config = dict(plan.metadata["config"])
    old = {"model": config.pop("size"), **config}
    Path(plan.out).mkdir(parents=True)
    Path(plan.out, "run.json").write_text(json.dumps(plan.metadata | {"config": old}))
    assert plans.open_run_dir(plan, writes=True)
    Path(plan.out, "run.json").write_text(json.dumps(plan.metadata | {"config": old | {"model": "nano"}}))
    with pytest.raises(TomatError, match="other settings or other data"):
        plans.open_run_dir(plan, writes=True)


def test_settings_and_defaults_are_those_of_the_library(variables, rows):
    variables()
    config, run_config, tpu = plans.settings()
    assert (config, run_config) == (TrainConfig(val_seqs=10), RunConfig()) and tpu.results_label == "small-nano-seed0"
    variables(ROWS_AT_ONCE=4, PRECISION="f32", WINDOW=64, WARMUP=3, SCHEDULE="wsd", CLIP=2, WEIGHT_DECAY=0.3)
    config, run_config, _ = plans.settings()
    assert config == TrainConfig(val_seqs=10, window=64, warmup=3, schedule="wsd", clip=2.0, weight_decay=0.3)
    assert (run_config.micro_batch, run_config.bf16) == (4, False)
    variables(ROWS_AT_ONCE=-1)
    assert plans.settings()[1].micro_batch == 0, "earlier runs wrote -1 for a device's whole share"


@pytest.mark.parametrize("given, sentence", [
    ({"MODEL": "7B"}, "There is no model size '7B'"), ({"STEPS": "many"}, "TOMAT_STEPS must be a whole number, got 'many'"),
    ({"STEPS": 0}, "steps must be at least 1, got 0"), ({"PRECISION": "fp8"}, "TOMAT_PRECISION is 'fp8': set TOMAT_BF16"),
    ({"LABEL": ""}, "TOMAT_LABEL names no data set"), ({"LABEL": "nowhere"}, "nowhere holds no meta.json"),
    ({"EMD": 0.5}, "emd is 0.5, .* needs one token a value: two_token_9_12 writes 2"),
    ({"EMD": math.nan}, "emd must be a finite number"), ({"LR": math.nan}, "lr must be a finite number"),
    ({"VAL_SEQS": 9999}, "cannot hold out 9999 rows .*: lower val_seqs"), ({"VAL_SEQS": -1}, "val_seqs must be at least 0"),
    ({"MICRO_BATCH": -1}, "micro_batch must be at least 0, got -1"), ({"ROWS_AT_ONCE": -2}, "micro_batch must be at least 0"),
    ({"MICRO_BATCH": 3}, "batch_size is 8: give a multiple of 3"), ({"SAVE_STEPS": 0}, "save_steps must be at least 1"),
    ({"SAVE_MINUTES": 0}, "save_minutes must be above 0"), ({"SAVE_MINUTES": math.inf}, "save_minutes must be a finite number"),
    ({"LOSS_ON": "all"}, "loss_on is 'all', and with Levanter it can only be 'density'"),
    ({"OPTIMIZER": "muon"}, "optimizer is 'muon', and with Levanter"), ({"DEVICE": "cuda"}, "device is 'cuda', .* JAX_PLATFORMS"),
    ({"SAVE_EVERY": 5}, "save_every is 5, .* TOMAT_SAVE_MINUTES"), ({"WORKERS": 2}, "workers is 2"),
    ({"SEED": 2**31}, "seed must be below 2147483648 with Levanter"),
    *(({"RESULTS_LABEL": bad}, "set TOMAT_RESULTS_LABEL to a plain name") for bad in ("../../z", "a/b", ".z", "-z", "a b", "z\n"))])
def test_a_wrong_setting_is_named(variables, given, sentence):
    variables(**given)
    with pytest.raises(TomatError, match=sentence):
        plans.plan()


def test_stores_are_settings(variables):
    variables(LABEL="val-full", TOKEN_STORE="gs://b/tokens/", CHECKPOINT_STORE="gs://b/runs")
    tpu = plans.settings()[2]
    assert plans.data_folder(tpu) == "gs://b/tokens/val-full" and plans.run_folder(tpu) == "gs://b/runs/val-full-nano-seed0"


def test_counters_are_those_of_the_rows(variables, rows):
    variables(MODEL="tiny", BATCH_SIZE=16, VAL_SEQS=0)
    plan, real = plans.plan(), sum(map(len, shard_rows(rows)))
    assert plan.counters(4) == {"step": 4, "tokens": real, "padded": 64 * 256, "flops": 64 * plan.row_flops}
    assert plan.counters(1)["tokens"] == round(real / 4) < 16 * 256


def test_devices_share_a_batch():
    config, run_config = TrainConfig(batch_size=12), RunConfig(micro_batch=2)
    plans.check_share(config, run_config, devices=3)
    with pytest.raises(TomatError, match=r"batch_size is 12: give a multiple of 8, .* devices, 4, times micro_batch, 2"):
        plans.check_share(config, run_config, devices=4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_those_of_the_library(schedule):
    config = TrainConfig(steps=40, warmup=5, schedule=schedule)
    rate = Adam.of(config).lr_scheduler(40)
    expected = [learning_rate(step, 40, config.peak_lr, 5, schedule) for step in range(40)]
    np.testing.assert_allclose([float(rate(step)) for step in range(40)], expected, rtol=1e-6)


@pytest.mark.parametrize("kind, name", [
    ("TPU v6 lite", "v6e"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v4", "v4"), ("cpu", "cpu"),
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090")])
def test_devices_have_short_names(kind, name):
    assert device_name(kind) == name


STORES = {"TOMAT_TOKEN_STORE": "gs://b/rows", "TOMAT_CHECKPOINT_STORE": "gs://b/runs"}


def test_the_line_for_iris_is_one_that_iris_reads(monkeypatch):
    "It takes neither JAX nor an account: the Python of the library prints it."
    from iris.cli.job import run as job_run
    given = {**STORES, "TOMAT_LABEL": "val-full", "TOMAT_MODEL": "200M", "TOMAT_ROWS_AT_ONCE": "4", "TOMAT_WINDOW": "64",
             "TOMAT_BATCH_SIZE": "128", "TOMAT_WANDB_MODE": "online",
             "TOMAT_WANDB_PROJECT": "tomat", "WANDB_API_KEY": "hidden", "TOMAT_TPU_TYPE": "v6e-4",
             "TOMAT_TPU_REGIONS": "us-east1, asia"}
    done = subprocess.run([with_torch(), str(LAUNCHER), "--iris", "there"], capture_output=True, text=True, cwd=ROOT,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **given})
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    words = shlex.split(done.stdout)
    assert words[:5] == ["iris", "--cluster", "there", "job", "run"] and "hidden" not in words
    parsed = job_run.make_context("run", words[5:]).params
    carried = {name: value for name, value in given.items() if name.startswith("TOMAT_") and "TPU" not in name}
    assert dict(parsed["env_vars"]) == {**carried, "WANDB_API_KEY": "$WANDB_API_KEY"}
    assert parsed["tpu"] == "v6e-4" and parsed["region"] == ("us-east1", "asia") and parsed["enable_extra_resources"]
    assert parsed["cmd"][:2] == ("bash", "-c") and parsed["cmd"][2].endswith("python marin/train_tomat_tpu.py")


@pytest.mark.parametrize("given, sentence", [
    ({"CHECKPOINT_STORE": "here"}, "The setting checkpoint_store is 'here': name a folder in a bucket, .* TOMAT_CHECKPOINT_STORE."),
    ({"SETTINGS": "own.ini"}, "The setting tpu_type is '': name TPUs such as v6e-8"), ({"STEPS": 0}, "steps must be at least 1")])
def test_a_line_for_iris_that_could_not_run_is_refused(variables, monkeypatch, tmp_path, given, sentence):
    (tmp_path / "own.ini").write_text("[data]\n")
    for key, value in STORES.items():
        monkeypatch.setenv(key, value)
    variables(**given)
    with pytest.raises(TomatError, match=sentence):
        plans.iris_line("there")


def test_a_folder_belongs_to_one_run(variables):
    variables()
    first = plans.plan()
    assert plans.open_run_dir(first, writes=True) and plans.open_run_dir(first, writes=False)
    variables(SEED=1, RESULTS_LABEL=first.tpu.results_label)
    with pytest.raises(TomatError, match="holds a run with other settings or other data"):
        plans.open_run_dir(plans.plan(), writes=True)


@pytest.mark.parametrize("change", [{}, {"lr": 2e-3}, {"seed": 1}, {"lr": 1e-4}, {"precision": "bf16"}, {"results_label": "x"}])
def test_a_run_json_of_an_earlier_version_is_read(variables, change, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    variables(MODEL="200M" if "seed" in change else "30M", STEPS=20)
    plan = plans.plan()
    old = {"label": "small", "results_label": plan.tpu.results_label, "model": plan.config.size, "seed": 0, "steps": 20,
           "batch_size": 8, "val_seqs": 10, "eval_every": 100, "emd": 0.0, "lr": 0.0, "precision": "f32"}
    Path(plan.out).mkdir(parents=True)
    Path(plan.out, "run.json").write_text(json.dumps({"knobs": old | change, "data": plan.metadata["data"]}))
    if not change or change == {"lr": 2e-3}:
        assert not plans.open_run_dir(plan, writes=True), "its rows came in another order"
    else:
        with pytest.raises(TomatError, match="other settings or other data"):
            plans.open_run_dir(plan, writes=True)


def shard_rows(rows):
    return [row for name in read_meta(rows)["shards"] for row in pq.read_table(rows / name)["input_ids"].to_pylist()]


def bare(named):
    array = np.asarray(named.array)
    return array[:np.count_nonzero(array)].tolist()


def ordered(rows, seed=0, n=None):
    index = row_index(str(rows), read_meta(rows))
    return OrderedRows(index, range(len(index.groups)), RowOrder(index.counts, seed), hax.Axis("position", 256), n)


def got(rows, numbers):
    return [tuple(bare(row)) for row in asyncio.run(rows.get_batch(numbers))]


def test_every_epoch_has_every_row_in_another_order(rows):
    stream = ordered(rows, seed=5)
    first, second = (got(stream, range(64 * epoch, 64 * (epoch + 1))) for epoch in range(2))
    assert first != second and Counter(first) == Counter(second) == Counter(map(tuple, shard_rows(rows)))
    assert got(stream, [130, 63, 64])[1:] == [first[63], second[0]]
    assert not stream.is_finite() and ordered(rows, n=10).is_finite()


def test_rows_come_in_the_order_of_the_library(variables, torch_says):
    "160 rows, three epochs of the training rows, as the library's batches give them; and the validation rows."
    variables(MODEL="tiny", BATCH_SIZE=8)
    plan = plans.plan()
    for units, theirs in ((plan.train_units, torch_says[3]), (plan.val_units, torch_says[0])):
        stream = OrderedRows(plan.index, units, plan.order(units), hax.Axis("position", 256))
        assert got(stream, range(len(theirs))) == [tuple(row[row > 0].tolist()) for row in theirs]


def test_whole_materials_are_held_out_as_in_the_library(variables, rows, torch_says):
    variables(MODEL="tiny")
    plan = plans.plan()
    names = pq.read_table(rows / "rows-00000.parquet")["task_id"].to_pylist()
    assert plan.index.counts[plan.first_val:].sum() == 12 and sorted(set(names[-12:])) == torch_says[2]["held_out"]
    variables(MODEL="tiny", VAL_SEQS=0)
    assert not plans.plan().val_units


def test_shards_that_are_not_what_meta_counts_are_refused(variables, rows, tmp_path):
    for name in ("meta.json", *read_meta(rows)["shards"]):
        (tmp_path / name).write_bytes((rows / name).read_bytes())
    variables(LABEL=tmp_path)
    plans.plan()
    for name in read_meta(rows)["shards"]:
        (tmp_path / name).write_bytes(b"no Parquet")
    with pytest.raises(TomatError, match="cannot be read as Parquet"):
        plans.plan()


def test_losses_worked_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    target, values = jnp.array([[2]]), np.array([0.0, 1.0, 4.0], np.float32)
    for emd, expected in [(0.0, np.log(4)), (1.0, 0.5 * 4 + 0.25 * 3), (0.5, 0.5 * np.log(4) + 0.5 * 2.75)]:
        got = token_losses(logits, target, Objective(range(3), emd, values if emd else None))
        np.testing.assert_allclose(np.asarray(got), [[expected]], rtol=1e-6)
    wanted = np.exp(-0.5 * (np.array([4.0, 3.0, 0.0]) / 2) ** 2)
    wanted /= wanted.sum()
    got = token_losses(logits, target, Objective(range(3), 0.0, values, 2.0))
    np.testing.assert_allclose(np.asarray(got), [[(wanted * np.log(wanted / [0.5, 0.25, 0.25])).sum()]], rtol=1e-5)
