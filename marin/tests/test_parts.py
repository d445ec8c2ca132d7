"""The parts of a run, one by one."""

import asyncio
import json
import math
import shlex
import subprocess
from collections import Counter

import haliax as hax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from tomat_marin import plan as plans
from tomat_marin.groups import groups_of, row_length, split
from tomat_marin.network import Objective, token_losses
from tomat_marin.rows import Endless, Rows
from tomat_marin.run import device_name

from conftest import LAUNCHER, ROOT, with_torch
from tomat.io.remote import TomatError
from tomat.dataset.meta import read_meta


@pytest.fixture
def knobs(monkeypatch, rows, tmp_path):
    "Set TOMAT_* variables."
    monkeypatch.chdir(tmp_path)
    def put(**given):
        for key, value in {"LABEL": rows, "VAL_SEQS": 10, **given}.items():
            monkeypatch.setenv(f"TOMAT_{key}", str(value))
    return put


def test_a_plan_says_what_will_run(knobs, rows):
    knobs(MODEL="200M", STEPS=10, SEED=3)
    about = plans.plan().about()
    assert about["knobs"]["model"] == "208M" and about["to"] == "runs/small-208M-seed3" and about["from"] == str(rows)
    assert about["tokens, padded"] == 10 * 128 * 256 and about["parameters"] == plans.n_parameters(plans.MODELS["208M"], 6794)
    assert about["epochs"] == 10 * 128 / 52 and about["learning rate"] == 1e-3
    assert (about["rows to learn from"], about["rows to judge by"]) == (52, 12)
    assert about["FLOPs"] == about["tokens, padded"] * plans.flops_per_token(plans.MODELS["208M"], 6794, 256)
    assert json.loads(json.dumps(about)) == about


@pytest.mark.parametrize("given, sentence", [
    ({"MODEL": "7B"}, "There is no model size '7B': use one of tiny, .*, 200M."),
    ({"STEPS": "many"}, "TOMAT_STEPS is 'many', which is no int: mend it."),
    ({"STEPS": 0}, "at least one step"), ({"PRECISION": "fp8"}, "The precision is bf16 or f32"),
    ({"LABEL": ""}, "TOMAT_LABEL names no data set"), ({"LABEL": "nowhere"}, "nowhere holds no meta.json"),
    ({"EMD": 0.5}, "needs one token a value, and two_token_9_12 writes 2"),
    ({"EMD": math.nan}, "numbers from 0 to 1"), ({"LR": math.nan}, "numbers from 0 to 1"),
    ({"VAL_SEQS": 9999}, "cannot keep back 9999 rows, .*: lower TOMAT_VAL_SEQS"), ({"VAL_SEQS": -1}, "at least one step"),
    ({"ROWS_AT_ONCE": 0}, "TOMAT_ROWS_AT_ONCE is 0: give at least 1, or -1"), ({"ROWS_AT_ONCE": -2}, "TOMAT_ROWS_AT_ONCE is -2"),
    ({"ROWS_AT_ONCE": 3}, "TOMAT_BATCH_SIZE is 128: give a multiple of 3"),
    ({"SAVE_STEPS": -1}, "TOMAT_SAVE_STEPS is -1: give at least 1"), ({"SAVE_STEPS": 0}, "TOMAT_SAVE_STEPS is 0"),
    *(({"SAVE_MINUTES": bad}, f"TOMAT_SAVE_MINUTES is {float(bad)}: give a number above 0") for bad in (math.nan, math.inf, 0, -1)),
    *(({"RESULTS_LABEL": bad}, "set TOMAT_RESULTS_LABEL to a plain name") for bad in ("../../z", "a/b", ".z", "-z", "a b", "z\n"))])
def test_a_wrong_knob_is_named(knobs, given, sentence):
    knobs(**given)
    with pytest.raises(TomatError, match=sentence):
        plans.plan()


def test_stores_are_settings(knobs, monkeypatch):
    knobs(LABEL="val-full", TOKEN_STORE="gs://b/tokens/", CHECKPOINT_STORE="gs://b/runs")
    wanted = plans.from_environment(plans.Knobs)
    assert plans.data_place(wanted) == "gs://b/tokens/val-full" and plans.run_place(wanted) == "gs://b/runs/val-full-30M-seed0"


def test_counters_are_those_of_the_rows(knobs, rows):
    knobs(MODEL="tiny", BATCH_SIZE=16, VAL_SEQS=0)
    plan, real = plans.plan(), sum(map(len, shard_rows(rows)))
    assert plan.counters(4) == {"step": 4, "tokens": real, "padded": 64 * 256, "flops": 64 * plan.row_flops}
    assert plan.counters(1)["tokens"] == round(real / 4) < 16 * 256


def test_devices_share_a_batch(knobs):
    knobs(BATCH_SIZE=12, ROWS_AT_ONCE=2)
    plan = plans.plan()
    plans.check_share(plan.knobs, plan.setup, devices=3)
    with pytest.raises(TomatError, match=r"TOMAT_BATCH_SIZE is 12: give a multiple of 8, .* devices, 4, .* at once, 2"):
        plans.check_share(plan.knobs, plan.setup, devices=4)


@pytest.mark.parametrize("kind, name", [
    ("TPU v6 lite", "v6e"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v4", "v4"), ("cpu", "cpu"),
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090")])
def test_devices_have_short_names(kind, name):
    assert device_name(kind) == name


STORES = {"TOMAT_TOKEN_STORE": "gs://b/rows", "TOMAT_CHECKPOINT_STORE": "gs://b/runs"}


def test_the_line_for_iris_is_one_that_iris_reads(monkeypatch):
    "It takes neither JAX nor an account: the Python of the library prints it."
    from iris.cli.job import run as job_run
    given = {**STORES, "TOMAT_LABEL": "val-full", "TOMAT_MODEL": "200M", "TOMAT_ROWS_AT_ONCE": "-1", "TOMAT_WANDB_MODE": "online",
             "TOMAT_WANDB_PROJECT": "tomat", "WANDB_API_KEY": "hidden", "TOMAT_TPU_TYPE": "v6e-4",
             "TOMAT_TPU_REGIONS": "us-east1, asia"}
    done = subprocess.run([with_torch(), str(LAUNCHER), "--iris", "there"], capture_output=True, text=True, cwd=ROOT,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **given})
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    words = shlex.split(done.stdout)
    assert words[:5] == ["iris", "--cluster", "there", "job", "run"] and "hidden" not in words
    asked = job_run.make_context("run", words[5:]).params
    carried = {name: value for name, value in given.items() if name.startswith("TOMAT_") and "TPU" not in name}
    assert dict(asked["env_vars"]) == {**carried, "WANDB_API_KEY": "$WANDB_API_KEY"}
    assert asked["tpu"] == "v6e-4" and asked["region"] == ("us-east1", "asia") and asked["enable_extra_resources"]
    assert asked["cmd"][:2] == ("bash", "-c") and asked["cmd"][2].endswith("python marin/train_tomat_tpu.py")


@pytest.mark.parametrize("given, sentence", [
    ({"CHECKPOINT_STORE": "here"}, "The setting checkpoint_store is 'here': name a folder in a bucket, .* TOMAT_CHECKPOINT_STORE."),
    ({"SETTINGS": "own.ini"}, "The setting tpu_type is '': name TPUs such as v6e-8"), ({"STEPS": 0}, "at least one step")])
def test_a_line_for_iris_that_could_not_run_is_refused(knobs, monkeypatch, tmp_path, given, sentence):
    (tmp_path / "own.ini").write_text("[data]\n")
    for key, value in STORES.items():
        monkeypatch.setenv(key, value)
    knobs(**given)
    with pytest.raises(TomatError, match=sentence):
        plans.iris_line("there")


def test_a_folder_belongs_to_one_run(knobs):
    knobs()
    first = plans.plan()
    plans.open_run_dir(first, writes=True)
    plans.open_run_dir(first, writes=False)
    knobs(SEED=1, RESULTS_LABEL=first.knobs.results_label)
    with pytest.raises(TomatError, match="holds a run with other knobs or other data"):
        plans.open_run_dir(plans.plan(), writes=True)


def shard_rows(rows):
    return [row for name in read_meta(rows)["shards"] for row in pq.read_table(rows / name)["input_ids"].to_pylist()]


def bare(named):
    array = np.asarray(named.array)
    return array[:np.count_nonzero(array)].tolist()


def test_rows_are_those_of_the_shards(rows):
    groups = groups_of(str(rows), read_meta(rows))
    Pos = hax.Axis("position", row_length(groups))
    assert Pos.size == 256
    found = asyncio.run(Rows(groups, Pos).get_batch([63, 0, 17, 18]))
    assert [bare(row) for row in found] == [shard_rows(rows)[i] for i in (63, 0, 17, 18)]


def test_every_epoch_has_every_row_in_another_order(rows):
    groups = groups_of(str(rows), read_meta(rows))
    stream = Endless(Rows(groups, hax.Axis("position", row_length(groups))), seed=5)
    first, second = (asyncio.run(stream.get_batch(range(64 * epoch, 64 * (epoch + 1)))) for epoch in range(2))
    a, b = ([tuple(bare(row)) for row in part] for part in (first, second))
    assert a != b and Counter(a) == Counter(b) == Counter(map(tuple, shard_rows(rows)))
    across = asyncio.run(stream.get_batch([130, 63, 64]))
    assert [tuple(bare(row)) for row in across[1:]] == [a[63], b[0]]


def test_whole_materials_are_held_out_as_the_library_does(rows, torch_says):
    groups = groups_of(str(rows), read_meta(rows))
    learn, keep = split(groups, 10)
    assert sum(group.rows for group in keep) == 12 and [*learn, *keep] == groups
    names = pq.read_table(rows / "rows-00000.parquet")["task_id"].to_pylist()
    assert sorted(set(names[-12:])) == torch_says[2]["held_out"]
    assert split(groups, 0) == (groups, [])
    with pytest.raises(TomatError, match="cannot keep back 64 rows"):
        split(groups, 64)


def test_shards_that_are_not_what_meta_counts_are_refused(rows, tmp_path):
    meta = read_meta(rows)
    with pytest.raises(TomatError, match="counts 65 rows and the shards hold 64"):
        groups_of(str(rows), meta | {"rows": 65})
    for name in meta["shards"]:
        (tmp_path / name).write_bytes(b"no Parquet")
    with pytest.raises(TomatError, match="cannot be read as Parquet"):
        groups_of(str(tmp_path), meta)


def test_losses_worked_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    target, values = jnp.array([[2]]), np.array([0.0, 1.0, 4.0], np.float32)
    for emd, expected in [(0.0, np.log(4)), (1.0, 0.5 * 4 + 0.25 * 3), (0.5, 0.5 * np.log(4) + 0.5 * 2.75)]:
        got = token_losses(logits, target, Objective(range(3), emd, values if emd else None))
        np.testing.assert_allclose(np.asarray(got), [[expected]], rtol=1e-6)
