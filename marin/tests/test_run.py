"""The launcher really trains: from shards of `tomat tokenize` to a checkpoint that `tomat predict` reads."""

import asyncio
import json
import subprocess
import sys

import haliax as hax
import numpy as np
import pytest
from tomat_marin.rows import OrderedRows

from conftest import LAUNCHER, MARIN, ROOT, losses, tokenized, tomat
from tomat.dataset.meta import read_meta, tokenizer_of
from tomat.dataset.noise import HistoryNoise
from tomat.dataset.order import RowOrder, row_index

LAST = "states/step-19"  # Levanter counts steps from 0


def journal(run):
    "The log of a run at W&B: its metadata, its configuration, and its lines."
    (path,) = (run / "wandb").glob(f"offline-run-*/run-{run.name}.wandb")
    done = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)], capture_output=True, text=True)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    metadata = next(record["run"] for record in records if record["type"] == "run")
    config = {name: value for record in records if record["type"] == "config" for name, value in record["config"]["update"].items()}
    return metadata, config, [record["history"]["item"] for record in records if record["type"] == "history"]


def test_twenty_steps(runs, whole):
    found = losses(whole)
    assert [step for step, kind in found if kind == "loss"] == list(range(1, 21))
    assert [step for step, kind in found if kind == "validation loss"] == [10, 20]
    assert float(found[20, "loss"]) < float(found[1, "loss"]) - 1 and float(found[20, "validation loss"]) < 8
    assert "508,992 parameters, rows of 256 tokens, 1 devices in 1 processes, from step 0" in whole
    out = runs.place / "runs" / "whole"
    assert {path.name for path in out.iterdir()} == {"run.json", "logs", "states", "model"}
    assert (out / LAST / "metadata.json").is_file(), "the last state is on disk when the process has ended"
    assert {path.name for path in runs.place.iterdir()} == {"runs"}


def as_before(run_json):
    "Write a run.json as an earlier version did."
    written = json.loads(run_json.read_text())
    written["config"]["model"] = written["config"].pop("size")
    names = ("model", "seed", "steps", "batch_size", "val_seqs", "eval_every", "emd")
    knobs = {"label": "small", "results_label": run_json.parent.name, "lr": 0.0, "precision": "f32"}
    run_json.write_text(json.dumps({"knobs": knobs | {name: written["config"][name] for name in names}, "data": written["data"]}))


def test_killed_and_started_again_it_prints_the_same_losses(runs, whole):
    "Also where an earlier version wrote run.json."
    process = runs.start("killed", SAVE_STEPS=4)
    before = ""
    for line in process.stdout:
        before += line
        if line.startswith("step 14 "):
            break
    process.kill()
    before += process.stdout.read()
    assert process.wait() == -9 and losses(before).items() <= losses(whole).items()
    as_before(runs.place / "runs" / "killed" / "run.json")
    after = runs.run("killed", SAVE_STEPS=4)
    assert "runs/killed was begun by an earlier version" in after
    first = min(step for step, _ in losses(after))
    assert 5 <= first <= 14 and f"from step {first - 1}\n" in after
    assert losses(before) | losses(after) == losses(whole) and losses(after).items() <= losses(whole).items()


def test_two_processes_have_the_losses_of_one(runs, whole):
    "Each takes half of every batch, and that in two pieces."
    first, second = runs.together("two", MICRO_BATCH=2)
    assert "2 devices in 2 processes" in first and not losses(second)
    ours, theirs = ({key: float(loss) for key, loss in losses(printed).items()} for printed in (whole, first))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 2e-5
    assert (runs.place / "runs" / "two" / "model" / "tomat.json").is_file()


def test_the_library_reads_the_export(runs, whole, torch_says, tmp_path):
    found = torch_says[2]
    assert found["loss"] == pytest.approx(float(losses(whole)[20, "validation loss"]), abs=1e-5)
    model = runs.place / "runs" / "whole" / "model"
    training = json.loads((model / "tomat.json").read_text())["training"]
    assert training["held_out_loss"] == pytest.approx(found["loss"], abs=1e-5)
    assert training["step"] == 20 and training["data"] == "small"
    cell = tmp_path / "POSCAR"
    cell.write_text("Al\n4.05\n0 .5 .5\n.5 0 .5\n.5 .5 0\nAl\n1\ndirect\n0 0 0\n")
    tomat("predict", cell, "--checkpoint", model, "--grid", 4, 4, 4, "--out", tmp_path / "CHGCAR")
    grid = (tmp_path / "CHGCAR").read_text().partition(f"{4:5}{4:5}{4:5}\n")[2]
    assert np.mean(np.array(grid.split()[:64], float)) == pytest.approx(3, rel=1e-4), "aluminium has three valence electrons"


def test_logits_are_those_of_torch(runs, torch_says):
    import jax
    import haliax as hax
    from levanter.checkpoint import load_checkpoint
    from levanter.layers.attention import AttentionMask
    from levanter.models.qwen import Qwen3LMHeadModel
    from tomat_marin.network import config_of
    from tomat.models.sizes import model_size
    ids, logits, *_ = torch_says
    vocab, key = hax.Axis("vocab", logits.shape[-1]), jax.random.PRNGKey(0)
    blank = Qwen3LMHeadModel.init(vocab, config_of(model_size("tiny"), 256), key=key)
    with hax.partitioning.set_mesh(jax.make_mesh((1,), ("data",))):
        model = load_checkpoint(blank, str(runs.place / "runs" / "whole" / LAST), subpath="model")
    tokens = hax.named(ids.astype(np.int32), ("batch", "position"))
    ours = model(tokens, AttentionMask.causal(), key=None).rearrange(("batch", "position", "vocab")).array
    np.testing.assert_allclose(np.asarray(ours), logits, atol=1e-4)


def test_earth_movers_distance_in_bf16(runs, tmp_path):
    "The library computes the same mixture, in four-byte numbers."
    rows = tokenized(tmp_path / "levels", "fp16_1token", 8, 2)
    printed = runs.run("emd", LABEL=rows, STEPS=2, VAL_SEQS=4, EMD=0.5, BF16="true", LR=1e-4, WANDB_MODE="offline")
    tomat(runs.place / "runs/emd/model", rows, 4, 0.5, 0, 0, tmp_path / "said.npz", python=[str(MARIN / "tests" / "torch_side.py")])
    found = json.loads(str(np.load(tmp_path / "said.npz")["found"]))
    assert float(losses(printed)[2, "validation loss"]) == pytest.approx(found["loss"], rel=5e-3)
    assert {path.name for path in runs.place.iterdir()} == {"runs"}
    metadata, config, lines = journal(runs.place / "runs" / "emd")
    assert metadata["run_group"] == str(rows) and sorted(metadata["tags"]) == ["cpu:1", "levanter", "tiny"]
    plan = config["tomat"]
    meta = json.loads((rows / "meta.json").read_text())
    assert plan["config"]["size"] == "tiny" and plan["data"]["tokenizer"] == meta["tokenizer"]
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["val.loss"] == float(lines[1]["val.loss"])
    assert [line["tokens"] for line in lines] == [round(n * meta["tokens"] / meta["rows"]) for n in (8, 16)]
    assert lines[1]["padded"] == plan["tokens, padded"] == 16 * plan["tokens a row"] and lines[1]["flops"] == plan["FLOPs"]
    assert lines[1]["flops"] == lines[1]["padded"] * plan["FLOPs per token"] and lines[1]["time.tokens_per_s"] > 0


def test_guided_rows_with_noise_and_soft_targets(runs, tmp_path):
    "Twenty steps on guided rows: torch reads the same noise, and finds the same losses on the export."
    tomat("fit-codec", ROOT / "tomat" / "data" / "sample.zip", "--split", "train", "--target", "difference", "--levels", 64,
          "--out", tmp_path / "codec.npz")
    rows = tokenized(tmp_path / "guided", tmp_path / "codec.npz", 16, 3, "--layout", "guided")
    printed = runs.run("guided", LABEL=rows, SOFT=0.05, NOISE=0.7)
    options = 10, 0, 0.05, 0.7
    tomat(runs.place / "runs/guided/model", rows, *options, tmp_path / "said.npz", python=[str(MARIN / "tests" / "torch_side.py")])
    said = np.load(tmp_path / "said.npz")
    assert float(losses(printed)[20, "validation loss"]) == pytest.approx(json.loads(str(said["found"]))["loss"], abs=1e-4)
    index, tokenizer = row_index(rows, read_meta(rows)), tokenizer_of(rows, read_meta(rows))
    units = range(index.last_materials(10))
    stream = OrderedRows(index, units, RowOrder(index.counts, 0, 1024).subset(units), hax.Axis("position", 256), None,
                         HistoryNoise(tokenizer, 0.7, 0))
    pairs = np.stack([pair.array for pair in asyncio.run(stream.get_batch(range(160)))])
    assert (pairs[:, 0] == said["train_ids"]).all() and (pairs[:, 1] == said["read_ids"]).all()
    assert (pairs[:, 0] != pairs[:, 1]).any(1).mean() > 0.8


def test_a_finished_run_is_left_as_it_is(runs, whole, monkeypatch):
    from tomat_marin.plan import plan
    from tomat_marin.run import train
    for key, value in {**runs.variables, "RESULTS_LABEL": "whole"}.items():
        monkeypatch.setenv(f"TOMAT_{key}", str(value))
    monkeypatch.chdir(runs.place)
    before = (runs.place / "runs/whole/model/tomat.json").stat().st_mtime_ns
    assert train(plan()) == "runs/whole/model" and (runs.place / "runs/whole/model/tomat.json").stat().st_mtime_ns == before


def test_a_dry_run_describes_the_run(runs, whole):
    about = json.loads(runs.run("whole", "--dry-run"))
    assert {key: about[key] for key in ("config", "data")} == json.loads((runs.place / "runs" / "whole" / "run.json").read_text())
    assert f"{about['parameters']:,} parameters" in whole
    told = json.loads(runs.run("whole", "--dry-run", TPU_TYPE="v6e-16", MFU=0.05, PRICE_V6E=2))
    hours = told["FLOPs"] / (918e12 * 0.05 * 16) / 3600
    assert told["hours expected"] == pytest.approx(hours) and told["device hours"] == pytest.approx(16 * hours)
    assert told["money expected"].endswith("at 2 an hour") and told["machine"] == "v6e-16"


def test_an_error_is_one_sentence(runs):
    process = runs.start("wrong", "--dry-run", MODEL="7B")
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 1
    error = (runs.place.parent / f"{runs.place.name}-wrong.log").read_text()
    assert error.startswith("tomat: There is no model size '7B'") and error.count("\n") == 1


def test_the_launcher_is_thin():
    lines = [line for line in LAUNCHER.read_text().splitlines() if line.strip()]
    assert len(lines) < 80
    for path in [*MARIN.glob("*.*"), *MARIN.glob("tomat_marin/*.py")]:
        if path.is_file() and path.suffix != ".md":
            text = path.read_text()
            assert "://" not in text and str(ROOT) not in text, f"{path} names a place"
