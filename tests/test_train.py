"""A run that was killed ends with the same bits; nothing that was saved is lost, or taken for what it is not."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import crystals
from crystals import limited, read_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

import tomat.models.loss
import tomat.train.log
from tomat.train import loop
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.levels import fit_levels
from tomat.train.cost import Placement, Rate, largest_micro_batch, memory_estimate, plan_full, read_rates
from tomat.train.estimate import Where, dry_run
from tomat.dataset.held_out import validation_rows, micro_batches, train_and_val
from tomat.io.remote import TomatError
from tomat.train.probe import ProbeTrainConfig, train_probe
from tomat.models.loss import LossModule, chunked_loss, loss_sum
from tomat.models.objective import objective_of
from tomat.models.causal import hidden_states, load_checkpoint, make_model, save_checkpoint
from tomat.models.sizes import MODELS, ModelSize
from tomat.train.optim import learning_rate
from tomat.models.probe import ProbeConfig
from tomat.train.config import SCHEDULES, RunConfig, TrainConfig
from tomat.models.device import pick_device
from tomat.train.log import flat, list_runs, read_log, save_picture
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.train.checkpoints import states_in
from tomat.density.store import sample_store
from tomat.dataset.stream import Batches, ParquetRows
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.causal import CausalTask, train

LEVELS = fit_levels(np.random.default_rng(7).lognormal(0, 2, 20_000), 64)
TOKENIZER = Tokenizer("framed", LEVELS, patch_size=2, pad_to=None)
CONFIG = TrainConfig(steps=40, batch_size=2, warmup=5, seed=11, val_seqs=5, eval_every=8)
RUN_CONFIG = RunConfig(save_every=3)
a_density = partial(crystals.a_density, positive=True)


@pytest.fixture(autouse=True, scope="module")
def small_nano(one_thread):
    "One thread, and a model of a size for tests."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "nano", SMALL)
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "A data set of 30 short rows of five materials, of different lengths."
    folder = tmp_path_factory.mktemp("data") / "rows"
    tokenize([a_density(seed, n_atoms=seed + 1) for seed in range(5)], TOKENIZER, folder, TokenizeConfig(6, label="five"))
    return folder


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    "A run that nobody disturbed."
    return train(rows, tmp_path_factory.mktemp("whole") / "run", CONFIG, RUN_CONFIG).parent


def timeless(run):
    "All of a log that the clock does not decide."
    return [{key: value for key, value in line.items() if key != "time"} for line in read_log(run)]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def same_run(one, other):
    "The weights bit for bit, every line of the log, the best model, and the last state with the optimiser."
    for name in ("model", "best"):
        assert tree(one / name) == tree(other / name)
    assert timeless(one) == timeless(other)
    assert [s.name for s in states_in(one)] == [s.name for s in states_in(other)]
    a, b = (torch.load(states_in(run)[-1] / "state.pt", weights_only=True) for run in (one, other))
    assert a["facts"] == b["facts"] and a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for name, learnt in a["optimizer"]["state"].items():
        assert all(torch.equal(learnt[key], b["optimizer"]["state"][name][key]) for key in learnt)


PROGRAM = """
import json, os, signal, sys, torch
from tomat.models.sizes import MODELS, ModelSize
from tomat.train.causal import train
from tomat.train.config import RunConfig, TrainConfig
MODELS["nano"] = ModelSize(width=32, layers=2, heads=2, mlp=64, kv_heads=1)
torch.set_num_threads(1)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
for job in json.loads(sys.argv[1]):
    train(job["data"], job["out"], TrainConfig(**job["config"]), RunConfig(**job["run_config"]))
if "RANK" in os.environ:
    torch.distributed.destroy_process_group()
"""


def started(*jobs, processes=1):
    "Runs, one after the other, in a process of their own, or in several: each (rows, out, config, run_config)."
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    program = jobs[0][1].parent / "program.py"
    program.write_text(PROGRAM)
    given = [{"data": str(data), "out": str(out), "config": vars(config), "run_config": vars(run_config)}
             for data, out, config, run_config in jobs]
    line = [sys.executable, *many, program, json.dumps(given)]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(run, out, n):
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < n:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.001)


# Never lost


LONG = replace(CONFIG, steps=160)


@pytest.fixture(scope="module")
def whole_long(rows, tmp_path_factory):
    return train(rows, tmp_path_factory.mktemp("long") / "run", LONG, RUN_CONFIG).parent


def test_a_killed_run_goes_on_bit_for_bit(rows, whole_long, tmp_path):
    out, rng = tmp_path / "run", np.random.default_rng(5)
    run = started((rows, out, LONG, RUN_CONFIG))
    wait_for_lines(run, out, int(rng.integers(5, 60)))
    time.sleep(rng.uniform(0, 0.05))  # somewhere between two saves, or inside one
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL and not (out / "model").exists()
    train(rows, out, LONG, RUN_CONFIG)
    same_run(whole_long, out)


def test_sigterm_saves_the_step_it_came_in(rows, whole_long, tmp_path):
    out, setup = tmp_path / "run", replace(RUN_CONFIG, save_every=1000)
    run = started((rows, out, LONG, setup))
    wait_for_lines(run, out, 7)
    run.send_signal(signal.SIGTERM)
    assert run.communicate()[0] == "" and run.returncode == 143
    (state,), log = states_in(out), read_log(out)
    assert 7 <= len(log) < 160 and state.name == f"step-{len(log):08}" and not list(tmp_path.rglob(".partial-*"))
    train(rows, out, LONG, setup)
    assert timeless(out) == timeless(whole_long) and tree(out / "model") == tree(whole_long / "model")


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "schedule": "wsd", "emd": 0.5, "clip": 0.5}])
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(rows, tmp_path, monkeypatch, options):
    """Stopped at three steps, twice of them between saves; each time in a process that has drawn random numbers."""
    config = replace(CONFIG, steps=20, **options)
    train(rows, tmp_path / "whole", config, RUN_CONFIG)
    update, stops = loop.update, [4, 9, 16]
    def stopping(run):
        if stops and run.counters["step"] == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        return update(run)
    monkeypatch.setattr(loop, "update", stopping)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            train(rows, tmp_path / "run", config, RUN_CONFIG)
        torch.rand(3)
        np.random.default_rng().random()
    train(rows, tmp_path / "run", config, RUN_CONFIG)
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_finished_run_changes_nothing_when_started_again(rows, whole):
    before = tree(whole)
    train(rows, whole, CONFIG, RUN_CONFIG)
    assert tree(whole) == before


def test_the_last_states_stay(whole, rows, tmp_path):
    assert [state.name for state in states_in(whole)] == ["step-00000039", "step-00000040"]
    train(rows, tmp_path / "run", replace(CONFIG, steps=7), RunConfig(save_every=2, keep=3))
    assert [state.name for state in states_in(tmp_path / "run")] == ["step-00000004", "step-00000006", "step-00000007"]


def test_a_full_disk_leaves_the_state_before(rows, tmp_path, monkeypatch, whole):
    """The disk is full from step 9 on: the state of step 6 is whole, the run goes on from it to the same numbers."""
    update = loop.update
    def filling(run):
        if run.counters["step"] == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        return update(run)
    monkeypatch.setattr(loop, "update", filling)
    now, words = resource.getrlimit(resource.RLIMIT_FSIZE)[0], r"step-00000006, is complete\.$"
    with limited(resource.RLIMIT_FSIZE, now), pytest.raises(TomatError, match=words) as err:
        train(rows, tmp_path / "run", CONFIG, RUN_CONFIG)
    assert "step-00000009" in str(err.value) and "\n" not in str(err.value)
    monkeypatch.undo()
    assert [s.name for s in states_in(tmp_path / "run")] == ["step-00000003", "step-00000006"]
    assert not list(tmp_path.rglob(".partial-*"))
    train(rows, tmp_path / "run", CONFIG, RUN_CONFIG)
    same_run(whole, tmp_path / "run")


def test_a_full_disk_at_the_first_save_promises_nothing(rows, tmp_path):
    with limited(resource.RLIMIT_FSIZE, 60_000), pytest.raises(TomatError, match="free some space") as err:
        train(rows, tmp_path / "run", replace(CONFIG, val_seqs=0), RUN_CONFIG)
    assert "complete" not in str(err.value) and states_in(tmp_path / "run") == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", ["states", "model"])
def test_one_flipped_byte_is_refused(rows, whole, tmp_path, name, share):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = states_in(run)[-1] / "state.pt" if name == "states" else run / "model/model.safetensors"
    good = file.read_bytes()
    place = round(share * (len(good) - 1))
    file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
    with pytest.raises(TomatError, match=file.name.replace(".", r"\.")):
        train(rows, run, CONFIG, RUN_CONFIG) if name == "states" else load_checkpoint(run / "model")


@pytest.mark.parametrize("cut, words", [
    (lambda lines: lines[:20] + lines[21:], "line 21"),
    (lambda lines: [*lines[:20], lines[20][:30] + "\n", *lines[21:]], "line 21"),
    (lambda lines: lines[:20], "ends at step 20"), (lambda lines: [], "ends at step 0"), (None, "log.jsonl"),
    (lambda lines: [*lines[:39], lines[39][:-5]], "ends at step 39"), (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1")])
def test_a_log_with_a_hole_is_noticed(rows, whole, tmp_path, cut, words):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    log = run / "log.jsonl"
    log.write_text("".join(cut(log.read_text().splitlines(keepends=True)))) if cut else log.unlink()
    with pytest.raises(TomatError, match=words):
        train(rows, run, CONFIG, RUN_CONFIG)


def test_half_a_line_after_the_last_state_is_forgotten(rows, whole, tmp_path):
    run = tmp_path / "run"
    train(rows, run, CONFIG, RUN_CONFIG)
    shutil.rmtree(run / "model")
    shutil.rmtree(states_in(run)[-1])
    log = run / "log.jsonl"
    log.write_text(log.read_text()[:-7])
    train(rows, run, CONFIG, RUN_CONFIG)
    assert timeless(run) == timeless(whole)


def test_a_run_refuses_what_is_not_its_own(rows, whole, tmp_path):
    for other in (replace(CONFIG, steps=41), replace(CONFIG, seed=12), replace(CONFIG, size="micro"), TrainConfig()):
        with pytest.raises(TomatError, match="another configuration"):
            train(rows, whole, other, RUN_CONFIG)
    tokenize([a_density(9)], TOKENIZER, tmp_path / "rows", TokenizeConfig(30))
    with pytest.raises(TomatError, match="other data"):
        train(tmp_path / "rows", whole, replace(CONFIG, val_seqs=0), RUN_CONFIG)
    with pytest.raises(TomatError, match="other data"):
        train(rows, whole, CONFIG, RUN_CONFIG, val=tmp_path / "rows")


@pytest.mark.parametrize("spoil, words", [
    (lambda run: (run / "letter.txt").write_text("Dear reader"), "letter.txt"),
    (lambda run: (run / "config.json").unlink(), "config.json"),
    (lambda run: (run / "meta.json").write_text("{}"), "data set of rows"),
    (lambda run: shutil.rmtree(run / "states"), "states are gone"),
    (lambda run: (run / "config.json").write_text("{"), "config.json")])
def test_a_folder_with_other_things_is_refused(rows, whole, tmp_path, spoil, words):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    spoil(run)
    before = tree(run)
    with pytest.raises(TomatError, match=words):
        train(rows, run, CONFIG, RUN_CONFIG)
    assert tree(run) == before


# The same numbers, however they are come by


PAIR = replace(CONFIG, steps=16, batch_size=6)


@pytest.fixture(scope="module")
def pair(rows, tmp_path_factory):
    "Two real processes over the loopback: each with the whole model, then the model shared between them."
    folder = tmp_path_factory.mktemp("pair")
    setup = replace(RUN_CONFIG, micro_batch=2)
    run = started((rows, folder / "whole", PAIR, setup), (rows, folder / "shared", PAIR, replace(setup, shard=True)), processes=2)
    said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    return folder


@pytest.mark.parametrize("name", ["whole", "shared"])
def test_two_processes_learn_what_one_does(rows, pair, tmp_path, name):
    train(rows, tmp_path / "run", PAIR, RUN_CONFIG)
    one, two = read_log(tmp_path / "run"), read_log(pair / name)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["tokens"] == b["tokens"] and a["padded"] >= b["padded"]
        assert ("val" in a) == ("val" in b)
        if "val" in a:
            assert a["val"]["loss"] == pytest.approx(b["val"]["loss"], abs=1e-5)
    for kind in ("model", "best"):
        ours, theirs = (load_checkpoint(run / kind)[0].state_dict() for run in (tmp_path / "run", pair / name))
        assert all(torch.allclose(ours[weight], theirs[weight], atol=1e-4) for weight in ours)


@pytest.mark.parametrize("name", ["whole", "shared"])
def test_a_run_of_two_processes_can_be_finished_by_one(rows, pair, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(pair / name, run)
    shutil.rmtree(states_in(run)[-1])
    shutil.rmtree(run / "model")
    train(rows, run, PAIR, RUN_CONFIG)
    assert [line["loss"] for line in read_log(run)] == pytest.approx([line["loss"] for line in read_log(pair / name)], abs=1e-5)


def test_processes_that_read_rows_change_nothing(rows, whole, tmp_path):
    train(rows, tmp_path / "run", replace(CONFIG, steps=10), replace(RUN_CONFIG, workers=2))
    assert [line["tokens"] for line in read_log(tmp_path / "run")] == [line["tokens"] for line in read_log(whole)[:10]]


def test_two_byte_numbers_change_little(rows, whole, tmp_path):
    train(rows, tmp_path / "run", CONFIG, replace(RUN_CONFIG, bf16=True))
    ours, theirs = ([line["loss"] for line in read_log(run)] for run in (tmp_path / "run", whole))
    assert ours == pytest.approx(theirs, abs=0.02)


def test_pieces_and_padding_change_no_more_than_rounding(rows, whole, tmp_path, monkeypatch):
    train(rows, tmp_path / "pieces", CONFIG, replace(RUN_CONFIG, micro_batch=1))
    whole_batches = CausalTask._losses
    def one_shape(self, *args, **options):
        self.length = 129
        return whole_batches(self, *args, **options)
    monkeypatch.setattr(CausalTask, "_losses", one_shape)
    train(rows, tmp_path / "padded", CONFIG, RUN_CONFIG)
    for name in ("pieces", "padded"):
        log = read_log(tmp_path / name)
        assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in read_log(whole)], abs=1e-4)
    assert read_log(tmp_path / "padded")[-1]["padded"] > 1.5 * read_log(tmp_path / "pieces")[-1]["padded"]


def test_seeds_decide_the_bytes(rows, tmp_path):
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        checkpoint = train(rows, tmp_path / name, TrainConfig(steps=3, batch_size=2, seed=seed))
        weights[name] = (checkpoint / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


# It learns


def test_the_loss_falls(whole):
    losses = [line["loss"] for line in read_log(whole)]
    assert len(losses) == 40 and np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1


def test_four_rows_are_learnt_by_heart(tmp_path, monkeypatch):
    """The real `nano`, on 4 rows of 64 voxels of noise: below 0.05 nats a voxel."""
    monkeypatch.setitem(MODELS, "nano", ModelSize(width=128, layers=4, heads=4, mlp=512, kv_heads=1))
    tokenize([a_density(1)], Tokenizer("framed", LEVELS, patch_size=4, pad_to=None), tmp_path / "rows", TokenizeConfig(4))
    train(tmp_path / "rows", tmp_path / "run", TrainConfig(steps=80, batch_size=4, lr=2e-3, warmup=10))
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert losses[0] > 3.5 and max(losses[-5:]) < 0.05


def seen_rows(monkeypatch, rows, out, config, val=None):
    "Material and corner of every row that is learnt from, step by step."
    gradient, seen = CausalTask.gradient, []
    def noting(task, step):
        result = gradient(task, step)
        seen.append([(row["material"], *row["offset"]) for row in task.inputs()])
        return result
    monkeypatch.setattr(CausalTask, "gradient", noting)
    train(rows, out, config, val=val)
    return seen


def test_an_epoch_holds_every_row_once_also_where_a_batch_holds_more(rows, tmp_path, monkeypatch):
    for size in (5, 30, 45):
        batches = seen_rows(monkeypatch, rows, tmp_path / str(size), TrainConfig(steps=90 // size, batch_size=size))
        order = [row for batch in batches for row in batch]
        every = sorted(order[:30])
        assert len(set(every)) > 25 and all(sorted(order[30 * k:30 * (k + 1)]) == every for k in range(3))
        assert order[:30] != order[30:60]


def test_held_out_materials_are_not_learnt_from(rows, tmp_path, monkeypatch):
    for val_seqs, left in ((1, 4), (6, 4), (7, 3), (24, 1)):
        seen = seen_rows(monkeypatch, rows, tmp_path / str(val_seqs), replace(CONFIG, steps=30, val_seqs=val_seqs))
        assert {row[0] for batch in seen for row in batch} == {f"m-{i}" for i in range(left)}
    with pytest.raises(TomatError, match="cannot hold out 25 rows"):
        train(rows, tmp_path / "none", replace(CONFIG, val_seqs=25))


def test_held_out_rows_of_their_own(rows, tmp_path, monkeypatch):
    tokenize([a_density(9)], TOKENIZER, tmp_path / "val", TokenizeConfig(3))
    seen = seen_rows(monkeypatch, rows, tmp_path / "run", replace(CONFIG, val_seqs=0), val=tmp_path / "val")
    assert {row[0] for batch in seen for row in batch} == {f"m-{i}" for i in range(5)}
    assert [line["step"] for line in read_log(tmp_path / "run") if "val" in line] == [8, 16, 24, 32, 40]
    tokenize([a_density(9)], replace(TOKENIZER, patch_size=3), tmp_path / "other", TokenizeConfig(3))
    with pytest.raises(TomatError, match="another tokenizer"):
        train(rows, tmp_path / "run2", CONFIG, val=tmp_path / "other")


def test_the_best_model_is_kept_and_the_callback_is_called(rows, tmp_path):
    """Held-out noise: the loss rises at last, and `best` is the model of the evaluation with the lowest."""
    weights = []
    def eval_callback(model, tokenizer):
        weights.append(next(model.parameters()).detach().clone())
        return {"nmae": 1 / len(weights)}
    train(rows, tmp_path / "run", replace(CONFIG, lr=2e-2), RUN_CONFIG, eval_callback=eval_callback)
    scores = {line["step"]: line["val"] for line in read_log(tmp_path / "run") if "val" in line}
    assert [s["nmae"] for s in scores.values()] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    best = min(scores, key=lambda step: scores[step]["loss"])
    model, _ = load_checkpoint(tmp_path / "run/best")
    assert torch.equal(model.model.embed_tokens.weight, weights[list(scores).index(best)])
    assert json.loads((tmp_path / "run/best/tomat.json").read_text())["training"]["step"] == best
    _, validation = train_and_val(rows, CONFIG.seed, CONFIG.window, CONFIG.val_seqs, None)
    block, _ = validation_rows(validation, CONFIG.val_seqs)
    learner, ids = LossModule(model, objective_of(TOKENIZER)), block.ids.long()
    with torch.no_grad():
        positions = learner.positions(ids)
        assert learner(ids, positions).item() / len(positions) == pytest.approx(scores[best]["loss"], rel=1e-5)


def test_a_loss_that_is_no_number_names_its_rows(rows, tmp_path, monkeypatch):
    config = replace(CONFIG, lr=1e9, warmup=0)
    with pytest.raises(TomatError, match=r"lower the learning rate.*bad-rows-\d+\.json") as err:
        seen_rows(monkeypatch, rows, tmp_path / "run", config)
    assert "\n" not in str(err.value)
    (path,) = (tmp_path / "run").glob("bad-rows-*.json")
    bad = json.loads(path.read_text())
    expected = ParquetRows(rows, config.seed, config.window)
    learn, _ = train_and_val(rows, config.seed, config.window, config.val_seqs, None)
    block = next(batch for number, batch in enumerate(Batches(learn, 2), 1) if number == bad["step"])
    assert [row["material"] for row in bad["rows"]] == [expected.names[m] for m in block.materials.tolist()]
    assert [row["offset"] for row in bad["rows"]] == block.offsets.tolist()
    assert len(read_log(tmp_path / "run")) == bad["step"] - 1
    monkeypatch.undo()
    if not states_in(tmp_path / "run"):
        train(rows, tmp_path / "run", replace(CONFIG, steps=3), RUN_CONFIG)  # what failed at once can be begun anew


# Losses


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 500), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 99))
def test_a_loss_in_chunks_is_the_plain_loss(tokens, n_ids, at_once, emd, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (tokens, n_ids))
    target, values = torch.randint(n_ids, (tokens,), generator=generator), torch.randn(n_ids, generator=generator)
    values_V = values if emd else None
    found = []
    for plain in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(tomat.models.loss.MAX_LOGITS, "cpu", at_once)
            loss = loss_sum(h @ w.T, target, emd, values_V) if plain else chunked_loss(h, w, target, emd, values_V)
            (loss / 3).backward()
        found.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_earth_movers_distance_is_the_mean_error_of_a_draw():
    generator = torch.Generator().manual_seed(0)
    logits, values, target = torch.randn(1, 50, generator=generator), torch.randn(50, generator=generator), torch.tensor([7])
    draws = torch.multinomial(logits.softmax(1)[0], 200_000, replacement=True, generator=generator)
    assert loss_sum(logits, target, 1.0, values).item() == pytest.approx((values[draws] - values[7]).abs().mean().item(), rel=0.01)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(2, 30), st.floats(0, 1), st.integers(0, 99))
def test_a_mixture_is_shares_of_both(tokens, n_ids, emd, seed):
    """(1 - share) · Σ -log p(true) + share · Σ p |ρ - ρ_true|, worked out in eight-byte numbers."""
    rng = np.random.default_rng(seed)
    logits, values, target = rng.normal(size=(tokens, n_ids)), rng.normal(size=n_ids), rng.integers(n_ids, size=tokens)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    cross_entropy = -np.log(shares[np.arange(tokens), target]).sum()
    distance = (shares * np.abs(values - values[target, None])).sum()
    found = loss_sum(torch.from_numpy(logits), torch.from_numpy(target), emd, torch.from_numpy(values).float())
    assert found.item() == pytest.approx((1 - emd) * cross_entropy + emd * distance, rel=1e-5, abs=1e-5)


def test_padding_does_not_change_the_loss(rows):
    learner = LossModule(make_model(SMALL, TOKENIZER.vocab), objective_of(TOKENIZER))
    ids = torch.tensor(read_rows(rows).ids[0]).long()
    short, long = ids[None], torch.nn.functional.pad(ids[None], (0, 30))
    assert len(learner.positions(short)) == len(learner.positions(long)) == 8
    assert learner(short, learner.positions(short)).item() == pytest.approx(learner(long, learner.positions(long)).item(), rel=1e-5)


def test_two_token_codecs_have_no_distance(tmp_path):
    tokenize([a_density(1)], Tokenizer("framed", PUBLISHED_DENSITY, patch_size=2, pad_to=None), tmp_path / "rows",
             TokenizeConfig(4))
    with pytest.raises(TomatError, match="one token a value"):
        train(tmp_path / "rows", tmp_path / "run", TrainConfig(emd=0.5))
    for loss_on in ("all", "density"):
        train(tmp_path / "rows", tmp_path / loss_on, TrainConfig(steps=2, loss_on=loss_on))
    assert read_log(tmp_path / "all")[0]["loss"] > read_log(tmp_path / "density")[0]["loss"]


# Pieces of a batch, schedules, plans


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 5), st.sampled_from([None, 50, 65]))
def test_pieces_hold_every_row_once_and_nothing_else(lengths, size, length):
    from tomat.dataset.stream import Block
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, n_tokens in enumerate(lengths):
        ids[row, :n_tokens] = 100 * (row + 1) + torch.arange(n_tokens)
    n = torch.zeros(len(lengths), dtype=torch.int32)
    pieces = micro_batches(Block(ids, torch.tensor(lengths, dtype=torch.int32), n, n, n, n), size, length)
    assert len(pieces) == -(-len(lengths) // size)
    if length:
        assert {tuple(piece.shape) for piece in pieces} == {(size, length)}
    else:
        assert all(len(piece) <= size and piece.shape[1] == max(2, int((piece > 0).sum(1).max())) for piece in pieces)
    found = [row[row > 0].tolist() for piece in pieces for row in piece]
    assert sorted(filter(None, found)) == sorted(row[row > 0].tolist() for row in ids)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler looks at it
def test_the_compiler_sees_one_shape(rows, tmp_path, monkeypatch):
    """Training, whose last micro batch is not full, and validation rows of another length compile once."""
    from torch._dynamo.testing import CompileCounter
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend=counter))
    config = replace(CONFIG, steps=4, batch_size=5, eval_every=2)
    train(rows, tmp_path / "run", config, RunConfig(micro_batch=2, compiled=True))
    assert counter.frame_count == 1  # the layers share it
    ours, theirs = tmp_path / "run", tmp_path / "plain"
    train(rows, theirs, config, RunConfig(micro_batch=2))
    assert [line["loss"] for line in read_log(ours)] == pytest.approx([line["loss"] for line in read_log(theirs)], abs=1e-4)


def test_micro_batches_are_equal(rows):
    from tomat.dataset.meta import read_meta
    from tomat.train.cost import plan_memory
    from tomat.train.distributed import DistributedContext
    context = DistributedContext(torch.device("cpu"))
    for batch, at_once, found in [(16, 10, 8), (16, 16, 16), (7, 3, 3), (8, 3, 3), (9, 5, 5), (32, 12, 11)]:
        config = replace(CONFIG, batch_size=batch)
        assert plan_memory(read_meta(rows), config, RunConfig(micro_batch=at_once), context)[0] == found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_rises_then_falls_or_stays(schedule):
    rates = [learning_rate(step, 40, 1e-3, 5, schedule) for step in range(41)]
    assert np.argmax(rates) in (4, 5) and max(rates) == pytest.approx(1e-3, rel=0.03) and all(np.diff(rates[:5]) > 0)
    assert rates[40] == pytest.approx({"constant": 1e-3, "cosine50": 2e-5}.get(schedule, 1e-4))
    assert all(np.diff(rates[5:]) <= 0) and all(rate == 1e-3 for rate in rates[5:32] if schedule in ("constant", "wsd"))


@pytest.mark.parametrize("options, word", [
    ({"size": "7T"}, "7T"), ({"schedule": "linear"}, "linear"), ({"optimizer": "sgd"}, "sgd"), ({"loss_on": "luck"}, "luck"),
    ({"steps": 0}, "^steps must be at least 1, got 0"), ({"batch_size": 0}, "batch_size"), ({"lr": math.nan}, "lr"),
    ({"lr": math.inf}, "lr"), ({"seed": -1}, "seed"), ({"eval_every": 0}, "eval_every"), ({"emd": 2.0}, "emd must be at most 1")])
def test_wrong_options_are_refused(options, word):
    with pytest.raises(TomatError, match=word):
        TrainConfig(**options)


def test_a_dry_run_writes_nothing_and_counts_right(rows, tmp_path, whole):
    before = tree(rows)
    facts = dry_run(rows, CONFIG, RunConfig(device="cpu"), Where(mfu=0.5))
    assert tree(rows) == before and facts["rows"] == 80 and facts["devices"] == 1
    assert facts["parameters"] == make_model(SMALL, TOKENIZER.vocab).num_parameters()
    assert facts["tokens"] == pytest.approx(read_log(whole)[-1]["tokens"], rel=0.15)
    seconds = 3600 * facts["hours expected"]
    assert facts["FLOPs"] == pytest.approx(seconds * 0.5 * 1e12 * facts["peak of a device, TFLOP/s"])


def test_the_batch_that_ran_out_of_memory_fits():
    """32 rows of 8,192 places of 30M on one device of 80 GB, uncompiled, every row full; its logits alone would take 18 GB."""
    estimate = memory_estimate(MODELS["30M"], 6792, 32, 8192, Placement(True, device="cuda"))
    assert 60e9 < estimate["all"] < 72e9 and estimate["logits"] < 1.1e9
    assert largest_micro_batch(MODELS["30M"], 6792, 5568, 32, 64 << 30, Placement(True, device="cuda")) == 32


@pytest.mark.parametrize("model, rows, measured_gb", [("208M", 8, 31.06), ("208M", 10, 39.8), ("208M", 16, 56.64),
                                                       ("30M", 32, 28.48)])
def test_the_estimate_is_what_an_h100_took_compiled(model, rows, measured_gb):
    placement = Placement(True, device="cuda", compiled=True)
    assert memory_estimate(MODELS[model], 6794, rows, 5568, placement)["all"] / 1e9 == pytest.approx(measured_gb, rel=0.07)


def test_a_line_says_all_that_is_promised(whole):
    log = read_log(whole)
    for line in log:
        assert {"step", "loss", "lr", "grad_norm", "tokens", "padded", "flops", "time"} <= line.keys()
        assert line["time"].keys() == {"seconds", "cpu_seconds", "tokens_per_s", "padded_per_s", "mfu_real", "mfu_padded"}
        assert 0 < line["time"]["tokens_per_s"] <= line["time"]["padded_per_s"]
        assert 0 < line["time"]["mfu_real"] <= line["time"]["mfu_padded"] * 1.001
    assert [line["step"] for line in log if "val" in line] == [8, 16, 24, 32, 40]


def test_one_line_on_the_terminal_lives(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tomat.train.log, "silent", lambda: False)
    train(rows, tmp_path / "run", replace(CONFIG, steps=8), RUN_CONFIG)
    said = capsys.readouterr().err
    assert all(word in said for word in ("train", "8/8", "loss ", "held-out ", "tokens/s"))


def test_a_plan_follows_from_measured_rates(tmp_path):
    "As results/probe/bench_probe.py writes them, a file for each device."
    for name, device, rate in (("", "one thread of a CPU", 8e3), ("_gpu", "NVIDIA H100 80GB HBM3", 4e6)):
        line = {"size": "S", "training": {"voxels_per_s": rate}}
        (tmp_path / f"bench_probe{name}.json").write_text(json.dumps({"device": device, "sizes": [line]}))
    rates = read_rates(tmp_path)
    assert set(rates) == {("one thread of a CPU", "S"), ("NVIDIA H100 80GB HBM3", "S")}
    rate = rates["NVIDIA H100 80GB HBM3", "S"]
    assert rate == Rate(4e6, True, "measured on NVIDIA H100 80GB HBM3")
    plan = plan_full(77_498, 20_000, 10, rate, "H100:2", 4)
    assert (plan.bytes, plan.hours) == (77_498 * 20_000 * 12, 77_498 * 20_000 * 10 / 8e6 / 3600)
    assert plan.money == pytest.approx(2 * plan.hours * 4)


def test_a_device_is_picked(monkeypatch):
    "As on a machine with two GPUs, which nothing is computed on."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device(name)) for name in ("", "cpu", "cuda", "cuda:1")] == ["cuda:0", "cpu", "cuda:0", "cuda:1"]
    with pytest.raises(TomatError, match="device 2 is asked for and PyTorch finds 2 GPUs"):
        pick_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(pick_device(name)) for name in ("", "cuda")] == ["cuda:1", "cuda:1"]
    with pytest.raises(TomatError, match="each with a GPU of its own"):
        pick_device("cuda:1")


def test_runs_of_both_kinds_stand_in_one_list(whole, tmp_path):
    """A probe network counts no FLOPs; a folder of another program is passed over."""
    store = sample_store()
    tiny = ProbeConfig(width=8, n_layers=1, atom_channels=(4, 2, 2), voxel_channels=(4, 2, 2), readout_width=16)
    fit = ProbeTrainConfig(tiny, steps=3, materials=2, voxels=20, kept=300, warmup=2, levels=16)
    shutil.copytree(whole, tmp_path / "causal")
    train_probe(store, store.split("train")[:2], tmp_path / "parallel", fit)
    (tmp_path / "another").mkdir()
    for name in ("config.json", "log.jsonl"):
        (tmp_path / "another" / name).write_text('{"step": 1}\n')
    causal, parallel = list_runs(tmp_path)
    assert (causal.run, causal.decoder, causal.unit) == ("causal", "causal", "tokens")
    assert (parallel.run, parallel.decoder, parallel.unit, parallel.steps) == ("parallel", "probe", "voxels", "3/3")
    assert causal.mfu > 0 and parallel.mfu is None and parallel.per_s > 0
    assert save_picture(tmp_path / "parallel").read_bytes()[:4] == b"\x89PNG"


def test_runs_are_listed_and_drawn(whole):
    (run,) = list_runs(whole.parent)
    assert (run.run, run.steps, run.size, run.data, run.finished) == ("run", "40/40", "nano", "five", True)
    log = read_log(whole)
    assert run.loss == log[-1]["loss"] and run.best == min(line["val"]["loss"] for line in log if "val" in line)
    assert run.per_s > 0 and run.mfu > 0
    assert save_picture(whole).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(TomatError, match="not a folder"):
        list_runs(whole / "nothing")


def test_weights_and_biases_offline(rows, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(rows, tmp_path / "run", replace(CONFIG, steps=9), replace(RUN_CONFIG, wandb=True))
    (record,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    said, line = record.read_bytes(), read_log(tmp_path / "run")[-1]
    assert all(name.encode() in said for name in flat(line)) and "val.loss" in flat(line) and "time.mfu_padded" in flat(line)


# A checkpoint


def test_a_checkpoint_is_plain_transformers(whole, rows):
    model, tokenizer = load_checkpoint(whole / "model")
    plain, words = AutoModelForCausalLM.from_pretrained(whole / "model"), AutoTokenizer.from_pretrained(whole / "model")
    ids = torch.tensor(read_rows(rows).ids[0])[None].long()
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    text = " ".join(tokenizer.vocab.word(int(i)) for i in ids[0])
    assert words(text).input_ids == ids[0].tolist() and words.decode(ids[0].tolist()) == text
    assert len(words) == tokenizer.vocab.size and words.convert_tokens_to_ids("[DENS_START]") == tokenizer.vocab.id("DENS_START")
    assert (words.pad_token_id, words.bos_token_id, words.eos_token_id) == (0, 1, 2)
    facts = json.loads((whole / "model" / "tomat.json").read_text())["training"]
    assert facts["steps"] == 40 and facts["data"] == "five" and facts["materials"] == [f"m-{i}" for i in range(5)]


def test_a_token_changes_no_earlier_position(tmp_path):
    """Of a model as it is made, as it is saved, and as plain transformers reads it."""
    save_checkpoint(make_model(SMALL, TOKENIZER.vocab, seed=3), TOKENIZER, tmp_path / "model")
    model, _ = load_checkpoint(tmp_path / "model")
    ids = torch.randint(1, TOKENIZER.vocab.size, (2, 30), generator=torch.Generator().manual_seed(0))
    ids[1] = ids[0]
    ids[1, 20] = 5
    with torch.inference_mode():
        hidden, logits = hidden_states(model, ids), model(ids).logits
        torch.testing.assert_close(hidden @ model.lm_head.weight.T, logits, rtol=1e-4, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(plain(ids).logits, logits)
    changed = (hidden[0] - hidden[1]).abs().amax(-1) > 1e-7
    assert changed[20:].all() and not changed[:20].any()
