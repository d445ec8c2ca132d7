"""The parts of a run, one by one."""

import asyncio
import json
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

from tomat.files import TomatError
from tomat.shards import read_meta


@pytest.fixture
def knobs(monkeypatch, rows, tmp_path):
    "Set TOMAT_* variables."
    monkeypatch.chdir(tmp_path)
    def put(**given):
        for key, value in {"LABEL": rows, **given}.items():
            monkeypatch.setenv(f"TOMAT_{key}", str(value))
    return put


def test_a_plan_says_what_will_run(knobs, rows):
    knobs(MODEL="200M", STEPS=10, SEED=3)
    about = plans.plan().about()
    assert about["knobs"]["model"] == "208M" and about["to"] == "runs/small-208M-seed3" and about["from"] == str(rows)
    assert about["tokens, padded"] == 10 * 128 * 256 and about["parameters"] == plans.n_parameters(plans.MODELS["208M"], 6794)
    assert about["epochs"] == 10 * 128 / 64 and about["learning rate"] == 1e-3
    assert json.loads(json.dumps(about)) == about


@pytest.mark.parametrize("given, sentence", [
    ({"MODEL": "7B"}, "There is no model size '7B': use one of tiny, .*, 200M."),
    ({"STEPS": "many"}, "TOMAT_STEPS is 'many', which is no int: mend it."),
    ({"STEPS": 0}, "at least one step"), ({"PRECISION": "fp8"}, "The precision is bf16 or f32"),
    ({"LABEL": ""}, "TOMAT_LABEL names no data set"), ({"LABEL": "nowhere"}, "nowhere holds no meta.json"),
    ({"EMD": 0.5}, "needs one token a value, and two_token_9_12 writes 2")])
def test_a_wrong_knob_is_named(knobs, given, sentence):
    knobs(**given)
    with pytest.raises(TomatError, match=sentence):
        plans.plan()


def test_stores_are_settings(knobs, monkeypatch):
    knobs(LABEL="val-full", TOKEN_STORE="gs://b/tokens/", CHECKPOINT_STORE="gs://b/runs")
    wanted = plans.from_environment(plans.Knobs)
    assert plans.data_place(wanted) == "gs://b/tokens/val-full" and plans.run_place(wanted) == "gs://b/runs/val-full-30M-seed0"


def test_a_folder_belongs_to_one_run(knobs):
    knobs()
    first = plans.plan()
    plans.claim(first, writes=True)
    plans.claim(first, writes=False)
    knobs(SEED=1, RESULTS_LABEL=first.knobs.results_label)
    with pytest.raises(TomatError, match="holds a run with other knobs or other data"):
        plans.claim(plans.plan(), writes=True)


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
