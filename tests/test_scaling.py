"""Scaling: the published table from sizes alone, laws found again as surely as they say, forecasts, runs pulled from logs."""

import csv
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from crystals import script
from hypothesis import given, settings
from hypothesis import strategies as st

from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.io.remote import TomatError
from tomat.models.sizes import MODELS, flops_per_token, n_parameters
from tomat.study.pull import logged_run, offline_runs, online_runs, run_of
from tomat.train.log import Log
from tomat.study.forecast import (LossLaw, TokenizeRates, allocations, best_allocation, fit_loss, fit_rates, shaped,
                                  tokenize_forecast, wall_hours)
from tomat.study.scaling import RunRecord, fit_power, plot_runs, read_runs, write_runs
from tomat.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "results/scaling/published_runs.csv"
PUBLISHED = read_runs(TABLE)
quick = settings(derandomize=True, deadline=None, max_examples=30)

# As published: tokens ×10⁹, FLOPs ×10¹⁸, MFU %, thousand tokens a second, device, devices, rows a step, loss.
STATED = [
    ("30M", 0.67, 0.32, 12.4, 80, "A100", 1, 32, 2.235), ("30M", 1.31, 0.62, 12.0, 157, "A100", 2, 32, 1.962),
    ("30M", 2.62, 1.25, 11.96, 313, "A100", 4, 64, 1.975),
    ("30M", 5.24, 2.49, 11.86, 624, "A100", 8, 128, 2.022),
    ("30M", 1.05, 0.50, 10.25, 792, "v6e", 4, 128, 2.620), ("30M", 4.19, 2.00, 8.38, 1297, "v6e", 8, 256, 2.214),
    ("30M", 8.39, 4.00, 6.6, 1983, "v6e", 16, 512, 2.212), ("208M", 2.10, 5.18, 9.88, 294, "v6e", 8, 128, 2.060)]


def test_the_committed_table_is_the_published_one():
    lines = [(run.model, run.tokens / 1e9, run.flops / 1e18, 100 * run.mfu, run.tokens_per_s / 1e3, run.device, run.devices,
              run.batch_size, run.loss) for run in PUBLISHED]
    for ours, stated in zip(lines, STATED, strict=True):
        assert all(a == (b if isinstance(a, str) else pytest.approx(b)) for a, b in zip(ours, stated, strict=True))


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.run)
def test_published_runs_from_their_sizes_alone(run):
    assert run.tokens * run.flops_per_token == pytest.approx(run.flops, rel=0.015)
    assert 100 * run.mfu_of_sizes == pytest.approx(100 * run.mfu, abs=0.3)
    assert run.device_hours * 3600 == pytest.approx(run.flops / run.mfu / ({"A100": 312e12, "v6e": 918e12}[run.device]), rel=0.04)


def test_a_table_comes_back(tmp_path):
    unknown = RunRecord("x", "nano", "", 1, 8, "mine", 2900, 115, 1e6, 1e12, None, None, 3.5, 3.1, "g", "finished")
    write_runs([*PUBLISHED, unknown], tmp_path / "runs.csv")
    assert read_runs(tmp_path / "runs.csv") == [*PUBLISHED, unknown]
    assert unknown.mfu_of_sizes is None and unknown.device_hours is None
    for text in ("run,model\nx,30M\n", "run;model\n1;2\n", TABLE.read_text().replace("0.32e18", "many")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(TomatError, match="no table of runs"):
            read_runs(tmp_path / "bad.csv")


HEADER, FIRST, *_ = TABLE.read_text().splitlines()


@pytest.mark.parametrize("text, said", [
    ("", "its header lacks batch_size"), (HEADER.replace("mfu", "share"), "its header lacks mfu"),
    (f"{HEADER},colour", "its header should not have colour"),
    (f"{HEADER}\n{FIRST}\n{FIRST.rsplit(',', 3)[0]}", "line 3: Run '30M, A100:1' lacks the column mfu"),
    (f"{HEADER}\n{FIRST},7", "line 2: Run '30M, A100:1' has more fields than the header"),
    (f"{HEADER}\n{FIRST.replace('0.67e9', 'many')}", "Run '30M, A100:1' has 'many' as its tokens"),
    (f"{HEADER}\n{FIRST.replace('A100,1,', 'A100,1.5,')}", "Run '30M, A100:1' has '1.5' as its devices, which is no whole number")])
def test_a_bad_line_of_a_table_is_named(tmp_path, text, said):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(TomatError, match=f"bad.csv is no table of runs, .*{re.escape(said)}"):
        read_runs(tmp_path / "bad.csv")


@pytest.mark.parametrize("column", "tokens flops loss val_loss mfu tokens_per_s devices batch_size vocab_size context".split())
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_what_cannot_be_of_a_run_is_refused(tmp_path, column, value):
    with pytest.raises(TomatError, match=f"Run '30M, A100:1' has {value} as its {column}"):
        replace(PUBLISHED[0], **{column: value})
    if value in (0, -1) or column not in ("devices", "batch_size", "vocab_size", "context"):
        write_runs(PUBLISHED[:2], tmp_path / "runs.csv")
        with (tmp_path / "runs.csv").open() as table:
            lines = list(csv.DictReader(table))
        lines[1][column] = str(value)
        with (tmp_path / "runs.csv").open("w") as table:
            writer = csv.DictWriter(table, lines[0])
            writer.writeheader()
            writer.writerows(lines)
        with pytest.raises(TomatError, match=f"runs.csv is no table of runs, fix line 3: Run '30M, A100:2' .* its {column}"):
            read_runs(tmp_path / "runs.csv")


@quick
@given(st.floats(-1, 1), st.floats(-3, 3), st.integers(3, 12))
def test_an_exact_power_law_is_found(slope, height, n):
    x = np.geomspace(1e3, 1e6, n)
    law = fit_power(x, np.exp(height) * x**slope)
    assert law.slope == pytest.approx(slope, abs=1e-9) and law.slopes()[0] <= slope + 1e-9
    np.testing.assert_allclose(law.at(np.array([1e9])), np.exp(height) * 1e9**slope, rtol=1e-6)


def test_intervals_hold_as_often_as_they_say():
    rng, x = np.random.default_rng(0), np.geomspace(1, 100, 8)
    held = {"slope": 0, "line": 0, "point": 0}
    for _ in range(600):
        law = fit_power(x, 2 * x**-0.2 * np.exp(0.05 * rng.standard_normal(8)))
        far = np.array([1000.0])
        low, high = law.band(far)
        below, above = law.band(far, one_more=True)
        held["slope"] += law.slopes()[0] <= -0.2 <= law.slopes()[1]
        held["line"] += low[0] <= 2 * 1000**-0.2 <= high[0]
        held["point"] += below[0] <= 2 * 1000**-0.2 * np.exp(0.05 * rng.standard_normal()) <= above[0]
    assert all(0.92 < held[name] / 600 < 0.98 for name in ("slope", "line", "point")), held


@pytest.mark.parametrize("x, y", [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, -3], [1, 2, 3]), ([1, 2, 3], [1, 2, np.nan])])
@pytest.mark.filterwarnings("ignore:invalid value encountered in log:RuntimeWarning")
def test_what_is_no_law_is_refused(x, y):
    with pytest.raises(TomatError, match="three points or more"):
        fit_power(x, y)


def test_a_law_of_sizes_and_tokens_is_found_and_forecasts():
    true = LossLaw(1.2, 0.7, 0.4, 0.4, 0.35, 1e6, 1e8)
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e5, 1e7, 4), np.geomspace(1e7, 1e9, 5)))
    law = fit_loss(n, d, true.at(n, d))
    np.testing.assert_allclose(law.at(n, d), true.at(n, d), rtol=1e-4)
    assert law.at(1e8, 1e10) == pytest.approx(true.at(1e8, 1e10), rel=0.02)
    with pytest.raises(TomatError, match="six runs"):
        fit_loss(n[:5], d[:5], true.at(n, d)[:5])
    with pytest.raises(TomatError, match="different sizes"):
        fit_loss(np.full(9, 1e6), np.geomspace(1e7, 1e9, 9), np.linspace(3, 2, 9))
    for bad in ((np.full(20, 1e6), d, true.at(n, d)), (n, d, -true.at(n, d)), (n[:5], d[:5], true.at(n, d)[:5]), ([], [], [])):
        with pytest.raises(TomatError, match="six runs"):
            fit_loss(*bad)


def test_the_next_size():
    widths = [one.size.width for one in allocations(1e19)]
    assert widths == sorted(widths)
    for one in allocations(1e19):  # each spends the whole compute
        assert one.tokens * flops_per_token(one.size, 6792, 8192) == pytest.approx(1e19)
        assert one.parameters == n_parameters(one.size, 6792)
    assert (shaped(512).layers, shaped(1024).layers) == (MODELS["30M"].layers, MODELS["208M"].layers)
    assert n_parameters(shaped(1024), 6792) == pytest.approx(n_parameters(MODELS["208M"], 6792), rel=1e-3)
    small, large = best_allocation(1e18), best_allocation(1e21)
    assert small.parameters < large.parameters and small.tokens < large.tokens
    for one in (small, large):
        assert 0.7 < one.tokens / one.parameters / 20 < 1.4
    least = best_allocation(1e20, law := LossLaw(1, 1, 0.3, 1, 0.3, 1e8, 1e9))
    assert all(law.at(least.parameters, least.tokens) <= law.at(c.parameters, c.tokens) for c in allocations(1e20))
    assert best_allocation(1e14, widths=iter([32, 64, 128])).size.width == 64 and shaped(32).heads == 1


@pytest.mark.parametrize("flops, widths, nearest", [(1e13, range(64, 8193, 64), 64), (1e25, range(64, 8193, 64), 8192),
                                                    (1e20, range(64, 257, 64), 256), (1e20, [4096, 8192], 4096)])
def test_the_edge_of_the_widths_is_no_answer(flops, widths, nearest):
    law = LossLaw(1, 1, 0.3, 1, 0.3, 1e8, 1e9)
    for found in (lambda: best_allocation(flops, widths=widths), lambda: best_allocation(flops, law, widths=widths)):
        with pytest.raises(TomatError, match=f"{widths[0]} to {widths[-1]}, of which {nearest} is nearest: give more widths"):
            found()
    for nothing in (0, -1e18, float("nan")):
        with pytest.raises(TomatError, match="buys nothing"):
            best_allocation(nothing, law)


def test_hours():
    hours = wall_hours(2.49e18, "A100", 8, 0.1186)
    assert hours == pytest.approx(5.24e9 / 624e3 / 3600, rel=0.01)
    with pytest.raises(TomatError, match="abacus"):
        wall_hours(1, "abacus", 1, 0.5)
    for devices, mfu in ((0, 0.5), (-8, 0.5), (8, 0), (8, -0.1), (8, 11.86), (8, float("nan"))):
        with pytest.raises(TomatError, match="one device or more and an MFU above 0 and up to 1"):
            wall_hours(1, "A100", devices, mfu)
    assert wall_hours(312e12 * 3600, "A100", 1, 1) == pytest.approx(1)


@quick
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
def test_tokenizing_is_dealt_out_as_it_is_done(n, machines, cores, seed):
    voxels, rates = np.random.default_rng(seed).lognormal(13, 1, n), TokenizeRates(0.01, 2e-8, 1e-4)
    wall, core = tokenize_forecast(voxels, 128, rates, machines, cores)
    each = rates.seconds(voxels, 128)
    shards = [each[i:i + 4].sum() for i in range(0, n, 4)]
    assert core == pytest.approx(each.sum()) and max(shards) <= wall * (1 + 1e-9) <= core * (1 + 1e-8) + 1e-9
    assert wall >= core / (machines * cores) * (1 - 1e-9)
    if machines >= len(shards):
        assert wall == pytest.approx(max(shards))
    if machines == cores == 1:
        assert wall == pytest.approx(core)


def test_measured_rates_explain_what_was_measured():
    lines = list(csv.DictReader((ROOT / "results/scaling/tokenize_rates.csv").read_text().splitlines()))
    rates = fit_rates(lines)
    taken = np.array([float(line["cpu_seconds"]) for line in lines])
    found = np.array([rates.seconds(float(line["voxels"]), int(line["rows"])) for line in lines])
    assert np.median(np.abs(np.log(found / taken))) < 0.2 and min(rates.material, rates.voxel, rates.row) > 0
    exact = TokenizeRates(0.02, 3e-8, 2e-4)
    made = [{"voxels": v, "rows": r, "cpu_seconds": exact.seconds(v, r)} for v in (1e4, 1e5, 1e6) for r in (8, 128)]
    assert fit_rates(made).voxel == pytest.approx(3e-8, rel=1e-6)
    none, unknown = {"voxels": 1, "rows": 1, "cpu_seconds": 0}, {"voxels": "nan", "rows": 1, "cpu_seconds": 1}
    for few in ([], made[:2], [*made, none], [*made, unknown]):
        with pytest.raises(TomatError, match="three measured lines"):
            fit_rates(few)


@pytest.mark.parametrize("n, rows, machines, cores", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (1, 1, -1, 1)])
def test_nobody_tokenizes_nothing(n, rows, machines, cores):
    with pytest.raises(TomatError, match=f"not {n}, {rows}, {machines} and {cores}"):
        tokenize_forecast(np.ones(n), rows, TokenizeRates(1, 1, 1), machines, cores)


# Runs pulled from logs.

def lines_of(steps):
    return [{"step": step, "loss": 5 - step / 10, "tokens": 230 * step, "padded": 256 * step, "flops": 10**9 * step, "lr": 1e-3,
             "grad_norm": 1.0, "time": {"seconds": 1.0, "tokens_per_s": 100.0 * step, "mfu_real": 0.1 * step},
             **({"val": {"loss": 4.5 - step / 20}} if step % 2 == 0 else {})} for step in steps]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    "An offline run of W&B that was stopped after three steps, and went on from the second."
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    tokenizer = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=4)
    facts = {"config": {"model": "nano", "batch_size": 2, "steps": 5}, "stream": "s",
             "data": {"label": "tiny", "tokenizer": tokenizer.to_dict()}}
    (folder / "config.json").write_text(json.dumps(facts))
    variables = {"WANDB_MODE": "offline", "WANDB_RUN_GROUP": "nano-tiny", "WANDB_TAGS": "nano,tiny,A100-80GB:8,launch"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        about = {**facts, "name": "nano-tiny-b2-s0", "id": "one"}
        with pytest.raises(KeyboardInterrupt), Log(folder, (), about) as log:
            for line in lines_of([1, 2, 3]):
                log.write(line)
            raise KeyboardInterrupt
        with Log(folder, lines_of([1, 2]), about) as log:
            for line in lines_of([3, 4, 5]):
                log.write(line)
    return folder


@pytest.fixture(scope="module")
def offline(logged):
    (run,) = offline_runs(logged.parent)
    return run


def test_an_offline_run_in_two_sittings_is_one_line(logged, offline, tmp_path, capsys, monkeypatch):
    run = offline
    assert [line["step"] for line in run.history] == [1, 2, 3, 4, 5] and run.state == "finished"
    line = run_of(run)
    assert (line.run, line.group, line.device, line.devices) == ("nano-tiny-b2-s0", "nano-tiny", "A100", 8)
    assert (line.tokens, line.context, line.loss, line.val_loss) == (1150, 115, 4.5, 4.3)
    assert (line.tokens_per_s, line.mfu) == (300, pytest.approx(0.3)) and line.vocab_size == 6794
    ours = run_of(logged_run(logged))
    assert (ours.tokens, ours.flops, ours.loss, ours.val_loss) == (line.tokens, line.flops, line.loss, line.val_loss)
    program = script("pull_wandb_runs")
    arguments = [str(logged.parent), "--out", str(tmp_path / "runs.csv"), "--history", str(tmp_path / "steps.csv")]
    monkeypatch.setattr(sys, "argv", ["pull_wandb_runs.py", *arguments])
    assert program.main() == 0 and read_runs(tmp_path / "runs.csv") == [line]
    steps = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    assert [float(s["value"]) for s in steps if s["name"] == "val.loss"] == [4.4, 4.3]
    monkeypatch.setattr(sys, "argv", ["pull_wandb_runs.py", str(tmp_path), "--out", str(tmp_path / "runs.csv")])
    assert program.main() == 2 and "holds no run" in capsys.readouterr().err


def test_runs_online_are_the_same_lines(offline, monkeypatch):
    "What W&B's interface gives, from a stand-in; with no account it is a sentence."
    wandb = pytest.importorskip("wandb")
    asked = []
    steps = [{**line, "_step": line["step"], "_runtime": 1, "val.loss": line.get("val.loss")} for line in offline.history]
    run = SimpleNamespace(id="one", name=offline.name, group=offline.group, tags=list(offline.tags), state="finished",
                          config={**offline.config, "_wandb": {}}, scan_history=lambda: iter(steps))
    api = SimpleNamespace(runs=lambda place, filters: asked.append((place, filters)) or [run])
    monkeypatch.setattr(wandb, "Api", lambda: api)
    monkeypatch.setenv("TOMAT_WANDB_ENTITY", "us")
    assert online_runs("nano-tiny") == [offline] and asked == [("us/tomat", {"group": "nano-tiny"})]

    def refuse():
        raise wandb.errors.UsageError("no API key")
    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(TomatError, match="log in"):
        online_runs()


def levanter(tokenizer, tokens=0, changed=None, **more):
    "A run of three steps as the launcher of TPUs logs it: 8 rows of 128 tokens a step, not its `step`, and at times real tokens."
    about = {"knobs": {"model": "nano", "batch_size": 8}, "data": {"label": "tiny", "tokenizer": tokenizer}, "tokens a row": 128,
             "parameters": 4_408_384, "FLOPs per token": 26_646_912, "tokens, padded": 3072, "FLOPs": 3072 * 26_646_912}
    steps = [{"_step": n, "_runtime": 1.0, "loss": 6.0 - n, "train/loss": 6.0 - n, "padded": 1024 * (n + 1), "val.loss": None,
              "throughput/tokens_per_second": 400.0, "throughput/mfu": 25.0, **more} for n in (0, 1, 2)]
    steps[1]["val.loss"] = 5.5
    for n, step in enumerate(steps, 1):
        step |= {"step": n, "tokens": n * tokens} if tokens else {}
    run = {"id": "tpu", "name": "tpu", "group": "tiny", "tags": ["nano", "levanter", "v6e:8"], "state": "finished",
           "config": {"tomat": about, "trainer": {"seed": 0}}, "scan_history": lambda: iter([*steps[::-1], {"_step": 3}])}
    return SimpleNamespace(**run | (changed or {}))


def test_a_run_of_the_launcher_of_tpus_is_a_line(offline, monkeypatch, tmp_path, capsys):
    wandb = pytest.importorskip("wandb")
    tokenizer, seen = offline.config["data"]["tokenizer"], []
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda place, filters: seen))
    seen[:] = [levanter(tokenizer)]
    (run,) = online_runs()
    assert [line["step"] for line in run.history] == [0, 1, 2, 3]
    line = run_of(run)
    assert (line.run, line.model, line.device, line.devices, line.batch_size) == ("tpu", "nano", "v6e", 8, 8)
    assert (line.tokens, line.context, line.flops, line.vocab_size) == (3072, 128, 3072 * 26_646_912, 6794)
    assert (line.loss, line.val_loss, line.mfu, line.tokens_per_s) == (4.0, 5.5, 0.25, 400.0)
    seen[:] = [levanter(tokenizer, tokens=512)]  # half of a batch
    real = run_of(online_runs()[0])
    assert (real.tokens, real.context, real.flops, real.mfu, real.tokens_per_s) == (1536, 64, 1536 * 26_646_912, 0.125, 200)
    dead = {"name": "dead", "scan_history": lambda: iter([])}
    other = {"name": "other", "config": {"lr": 1}, "tags": None, "group": None}
    seen[:] = [levanter(tokenizer), levanter(tokenizer, changed=dead), levanter(tokenizer, changed=other),
               levanter(tokenizer, changed={"name": "burst"}, loss="NaN")]
    program, steps = script("pull_wandb_runs"), tmp_path / "steps.csv"
    monkeypatch.setattr(sys, "argv", ["pull_wandb_runs.py", "--out", str(tmp_path / "runs.csv"), "--history", str(steps)])
    assert program.main() == 0 and read_runs(tmp_path / "runs.csv") == [line]
    assert {row["run"] for row in csv.DictReader(steps.read_text().splitlines())} == {"tpu"}
    said = capsys.readouterr()
    assert "1 runs in" in said.out and "3 left out" in said.out
    assert re.findall(r"^(?:The run|Run) \W?(\w+)", said.err, re.M) == ["dead", "other", "burst"]
    seen[:] = []
    assert program.main() == 2 and "No run remains" in capsys.readouterr().err


def test_config_that_is_told_after_the_start_is_read(tmp_path):
    "As Levanter does; its steps have W&B's number alone."
    wandb = pytest.importorskip("wandb")
    tokenizer = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=4)
    made = levanter(tokenizer.to_dict())
    quiet_settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(mode="offline", dir=tmp_path, id="tpu", name="tpu", tags=made.tags, settings=quiet_settings)
    run.config.update(made.config)
    for line in sorted(made.scan_history(), key=lambda line: line["_step"])[:3]:
        run.log({name: value for name, value in line.items() if name[0] != "_" and value is not None}, step=line["_step"])
    run.finish()
    (found,) = offline_runs(tmp_path)
    assert found.config == made.config and found.tags == tuple(made.tags)
    line = run_of(found)
    assert (line.tokens, line.device, line.devices, line.state) == (3072, "v6e", 8, "finished")


def test_a_journal_that_is_cut_is_named_and_the_others_read(logged, offline, tmp_path, monkeypatch, capsys):
    whole = next(path for path in logged.rglob("*.wandb") if not path.parent.is_symlink())
    for name, size in (("empty", 0), ("short", 7), ("cut", 60), ("whole", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run-one.wandb").write_bytes(whole.read_bytes()[:size])
    left_out = []
    assert [run.id for run in offline_runs(tmp_path, left_out)] == ["one"]
    assert sorted(str(err).split(" is ")[0] for err in left_out) == sorted(
        str(tmp_path / name / "run-one.wandb") for name in ("empty", "short", "cut"))
    with pytest.raises(TomatError, match=r"cut.*names no run: copy it again"):
        offline_runs(tmp_path)
    program, out = script("pull_wandb_runs"), tmp_path / "runs.csv"
    monkeypatch.setattr(sys, "argv", ["pull_wandb_runs.py", str(tmp_path), "--out", str(out)])
    assert program.main() == 0 and len(read_runs(out)) == 1
    said = capsys.readouterr()
    assert said.out == f"1 runs in {out}, 3 left out\n" and said.err.count("run-one.wandb is empty or cut short") == 3
    out.unlink()
    monkeypatch.setattr(sys, "argv", ["pull_wandb_runs.py", str(tmp_path / "cut"), "--out", str(out)])
    assert program.main() == 2 and not out.exists() and "cut short" in capsys.readouterr().err


def test_a_run_of_something_else_is_refused(offline):
    first = offline.history[0]
    for changed in ({"config": {}}, {"history": []}, {"config": {"tomat": {}}}, {"config": {"tomat": 1}},
                    {"history": [{**first, "step": 0}]}, {"history": [{"step": 1}]}):
        with pytest.raises(TomatError, match="not one of `tomat train`"):
            run_of(replace(offline, **changed))
    with pytest.raises(TomatError, match="has nan as its loss"):
        run_of(replace(offline, history=[{**first, "loss": "NaN"}]))


def test_the_plot_is_drawn_from_tables(tmp_path, monkeypatch):
    out = tmp_path / "scaling.png"
    monkeypatch.setattr(sys, "argv", ["make_scaling_plot_png.py", str(TABLE), "--out", str(out)])
    assert script("make_scaling_plot_png").main() == 0
    assert out.read_bytes()[:4] == b"\x89PNG" and os.path.getsize(out) > 10_000
    assert len(plot_runs(PUBLISHED[:1]).axes) == 2  # no law through one run
    assert PUBLISHED[0].parameters == n_parameters(MODELS["30M"], 6792)


def test_a_plot_of_nothing_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text(f"{HEADER}\n")
    for table, out, said in (("empty.csv", "x.png", "empty.csv is no table"), ("header.csv", "x.png", "no run in .*header.csv"),
                             (TABLE, "x.pdf", "x.pdf .* ends in .png"), (TABLE, "x", "x .* ends in .png")):
        monkeypatch.setattr(sys, "argv", ["make_scaling_plot_png.py", str(tmp_path / table), "--out", str(tmp_path / out)])
        assert script("make_scaling_plot_png").main() == 2 and not (tmp_path / out).exists()
        assert re.search(said, err := capsys.readouterr().err) and err.count("\n") == 1
    with pytest.raises(TomatError, match="no run to draw"):
        plot_runs([])
