"""What a run will cost: dry runs of every kind, prices, comparisons of runs, and models of unfinished runs."""

import csv
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tomat import cli
from tomat.density.formats import read_density, write_density
from tomat.density.store import sample_store
from tomat.io.remote import TomatError
from tomat.models.causal import load_checkpoint
from tomat.models.probe import load_probe
from tomat.run.launch import PrepareLaunch, ServeLaunch, SyncLaunch, TokenizeLaunch, TrainLaunch, serve_here, submit
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.tokenizer import Tokenizer
from tomat.train.compare import compare_runs
from tomat.train.config import TrainConfig
from tomat.train.estimate import Where, dry_run
from tomat.train.machines import Machine, machine_of, measured_rates

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = list(csv.DictReader((ROOT / "results/scaling/published_runs.csv").read_text().splitlines()))
ROWS = {"tokenizer": Tokenizer("anchored", PUBLISHED_DENSITY).to_dict(), "rows": 1000, "tokens": 5_540_000,
        "tokens_padded": 8_192_000}


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    "The settings of the checkout, and no price, rate or MFU from outside."
    for name in [name for name in os.environ if name.startswith(("TOMAT_PRICE", "TOMAT_RATES", "TOMAT_MFU", "TOMAT_ON"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TOMAT_SETTINGS", str(ROOT / "settings.ini"))
    monkeypatch.setenv("TOMAT_PROGRESS", "0")


def run(*words):
    "A command in this process."
    cli.app([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Rows, and runs of both decoders that were stopped at step 4 of 6, with whole runs of four steps beside them."
    folder, store = tmp_path_factory.mktemp("made"), str(sample_store().root)
    run("tokenize", store, "--split", "validation", "--patch-size", 3, "--pad-to", 0, "--patches-per-material", 2, "--out",
        folder / "rows")
    run("prepare", store, "--split", "train", "--materials", 4, "--kept", 200, "--atoms", "packaged", "--out", folder / "voxels")
    causal = ("--batch-size", 2, "--schedule", "constant", "--save-every", 2, "--val-seqs", 2, "--eval-every", 2)
    probe = ("--materials", 2, "--voxels", 20, "--levels", 8, "--schedule", "constant", "--save-every", 2, "--eval-every", 2)
    for name, data, options in (("causal", "rows", causal), ("probe", "voxels", probe)):
        for steps in (4, 6):
            run("train", folder / data, "--out", folder / f"{name}-{steps}", "--steps", steps, "--keep", 3, *options)
        shutil.rmtree(folder / f"{name}-6/model")
        shutil.rmtree(folder / f"{name}-6/states/step-00000006")
    return folder


@contextmanager
def nothing_changes(folder):
    def files():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
    before = files()
    yield
    assert files() == before


@pytest.mark.parametrize("line", PUBLISHED, ids=[line["run"] for line in PUBLISHED])
def test_the_published_hours_follow_from_the_published_mfu(line):
    batch, tokens = int(line["batch_size"]), float(line["tokens"])
    config = TrainConfig(size=line["model"], steps=round(tokens / batch / 8192), batch_size=batch)
    machine = machine_of(line["run"].split(", ")[1])
    wall = tokens / float(line["tokens_per_s"]) / 3600
    for where in (Where(machine, float(line["mfu"])), Where(machine)):  # told, and from the packaged table
        assert dry_run(ROWS, config, where=where)["hours expected"] == pytest.approx(wall, rel=0.2)
    assert dry_run(ROWS, config, where=Where(machine, float(line["mfu"]), pad=False))["hours expected"] < 0.7 * wall


def test_a_dry_run_for_another_machine(made, capsys, monkeypatch):
    line = ("train", made / "rows", "--size", "30M", "--batch-size", 8, "--steps", 100, "--dry-run", "--json", "--on")
    with nothing_changes(made):
        run(*line, "A100:8", "--mfu", 0.5, "--no-mfu-pad")
    plan = json.loads(capsys.readouterr().out)
    assert (plan["machine"], plan["devices"], plan["MFU from"], plan["MFU counts"]) == ("A100:8", 8, "given", "real tokens")
    assert plan["hours expected"] == pytest.approx(plan["FLOPs"] / (8 * 312e12 * 0.5) / 3600)
    assert plan["device hours"] == 8 * plan["hours expected"] and "set price_a100" in plan["money expected"]
    monkeypatch.setenv("TOMAT_PRICE_A100", "3e9")
    with pytest.raises(TomatError, match="price_a100 is '3e9'"):
        run(*line, "A100:8")
    monkeypatch.setenv("TOMAT_PRICE_A100", "3000000")
    run(*line, "A100:8")
    plan = json.loads(capsys.readouterr().out)
    assert plan["money expected"] == f"{3e6 * plan['device hours']:,.2f} dollars, at 3e+06 an hour"
    run(*line, "v6e-8")
    assert "micro batch" not in json.loads(capsys.readouterr().out)
    run(*line, "L4")
    plan = json.loads(capsys.readouterr().out)
    assert plan["hours expected"] == "unknown" and plan["MFU from"] == "nothing was measured on L4: give --mfu"


@pytest.mark.parametrize("words, why", [
    (("--dry-run", "--on", "abacus:8"), "'abacus:8' is not known"), (("--dry-run", "--mfu", 40), "mfu must be at most 1, got 40"),
    (("--dry-run", "--on", "A100:3"), "batch_size must be a multiple of 3"), (("--on", "A100:8"), "add --dry-run"),
    (("--dry-run", "--mfu-pad"), "give --mfu")])
def test_wrong_words_are_one_sentence(made, words, why):
    with pytest.raises(TomatError, match=why) as found:
        run("train", made / "rows", "--out", made / "new", *words)
    assert str(found.value).endswith(".") and not (made / "new").exists()


@pytest.mark.parametrize("text, machine", [("A100:8", Machine("A100", 8, 80)), ("a100-40gb:2", Machine("A100", 2, 40)),
    ("H100 NVL:4", Machine("H100 NVL", 4, 94)), ("RTX 4090", Machine("RTX 4090", 1, 24)), ("v6e-8", Machine("v6e", 8)),
    ("v5p-8", Machine("v5p", 4)), ("v5litepod-16", Machine("v5e", 16))])
def test_machines_have_the_names_of_clouds(text, machine):
    assert machine_of(text) == machine and machine_of(machine.name).kind == machine.kind


def test_a_table_of_rates_of_my_own(tmp_path, monkeypatch):
    head, line = "work,what,machine,value,unit,pad,source\n", "causal,30M,L4:1,0.3,MFU,no,my own run\n"
    (tmp_path / "rates.csv").write_text(head + line)
    monkeypatch.setenv("TOMAT_RATES", str(tmp_path / "rates.csv"))
    assert dry_run(ROWS, TrainConfig(), where=Where(machine_of("L4:2")))["MFU from"] == "30M on L4:1, my own run"
    wrongs = line.replace("0.3", "30"), line.replace("my own run", ""), line.replace("L4:1", "abacus"), "a,b\n"
    for number, wrong in enumerate(wrongs):
        path = tmp_path / f"rates-{number}.csv"
        path.write_text(head + line + wrong)
        monkeypatch.setenv("TOMAT_RATES", str(path))
        with pytest.raises(TomatError, match="line 3 is no line of rates"):
            measured_rates()


@pytest.mark.parametrize("work", ["tokenize", "prepare"])
def test_tokenize_and_prepare_say_what_they_take(work, made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOMAT_PRICE_CORE", "100000")
    store = sample_store()
    run(work, store.root, "--out", tmp_path / "out", "--workers", 2, "--split", "train", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists() and plan["materials"] == len(store.split("train")) and plan["cores"] == 2
    sizes = [store.read(id).values.size for id in list(store.split("train"))[::-(-plan["materials"] // 8)]]
    assert plan["voxels of a material"] == pytest.approx(np.mean(sizes)) and "read now" in plan["voxels from"]
    assert plan["core hours"] == pytest.approx(plan["materials"] * plan["core seconds a material"] / 3600)
    assert "at 100000 an hour" in plan["money expected"] and "results/" in plan["rates from"]


def test_every_launcher_says_what_it_costs(capsys, monkeypatch):
    monkeypatch.setenv("TOMAT_PRICE_A100", "2")
    monkeypatch.setenv("TOMAT_TOKEN_STORE", "s3://bucket/rows")
    for launch, words in ((TokenizeLaunch(label="train-full"), ("tokenize on 16 × 4 cores", "0.72 core hours", "set price_core")),
                          (PrepareLaunch(label="train-full"), ("atoms on 1 × 4 cores: not measured, at most 24", "prepare on")),
                          (SyncLaunch(name="val-full"), ("sync on 1 × 2 cores: not measured, at most 12.00 hours",)),
                          (TrainLaunch("train-full", "A100:8", "size=30M steps=4997 batch_size=128"),
                           ("train on A100:8: 2.3", "device hours", "dollars, at 2 an hour", "30M on A100:8", "results/scaling")),
                          (TrainLaunch("train-full", "H100:8", decoder="probe"), ("hours unknown", "TOMAT_MFU")),
                          (TrainLaunch("nowhere"), ("the cost is unknown, since No data set is called 'nowhere'",))):
        submit(launch.stages(), dry_run=True)
        printed = capsys.readouterr()
        assert all(json.loads(line)["task"] for line in printed.out.splitlines())  # lines for another program, and nothing else
        assert all(word in printed.err for word in words), printed.err
    serve_here(ServeLaunch(dry_run=True))
    assert "serve on 1 × 4 cores: for each hour" in capsys.readouterr().err
    monkeypatch.setenv("TOMAT_MFU", "0.0593")
    submit(TrainLaunch("train-full", "A100:8", "size=30M steps=4997 batch_size=128").stages(), dry_run=True)
    assert "train on A100:8: 4.6" in capsys.readouterr().err


def test_two_runs_are_compared(made, capsys):
    run("runs", made / "causal-4", made / "causal-6", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"config.steps": [4, 6]} and found["note"] == "" and found["unit"] == "tokens"
    assert all(one == pytest.approx(other) for one, other in found["losses"].values())  # the same seed: the same first steps
    assert len(found["losses"]) == 4 and found["last"]["finished"] == [True, False]
    run("runs", made / "causal-4", made / "causal-6", "--by", "steps")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("config.steps", "loss after 4 steps", "held-out loss", "causal-6"))
    assert compare_runs([made / "causal-4", made / "probe-4"]).note == "the losses mean different things, since decoders differ"
    with pytest.raises(TomatError, match="--by must be"):
        run("runs", made, "--by", "days")


def test_a_stopped_run_predicts_as_the_run_that_ended_there(made, tmp_path, capsys):
    cell = sample_store().read(next(iter(sample_store().split("validation"))))
    write_density(cell, tmp_path / "CHGCAR")
    for decoder in ("causal", "probe"):
        found = {}
        for name, folder in (("whole", f"{decoder}-4/model"), ("run", f"{decoder}-4"), ("stopped", f"{decoder}-6")):
            out = tmp_path / f"{name}.cube"
            run("predict", tmp_path / "CHGCAR", "--grid", 6, 6, 6, "--checkpoint", made / folder, "--out", out)
            found[name] = read_density(out).values
            said = capsys.readouterr().err
            assert (f"{decoder}-6 is unfinished: the model is that of step 4 of 6." in said) == (name == "stopped")
        assert (found["run"] == found["whole"]).all()
        close = 1e-6 if decoder == "causal" else 0.02  # this probe run does not have its voxels, and trusts every atom
        assert np.abs(found["stopped"] - found["whole"]).sum() <= close * np.abs(found["whole"]).sum()


def test_a_stopped_run_is_evaluated(made, tmp_path, capsys):
    store = sample_store()
    write_density(min((store.read(id) for id in store.split("validation")), key=lambda one: one.values.size), tmp_path / "CHGCAR")
    run("evaluate", tmp_path / "CHGCAR", "--checkpoint", made / "probe-6", "--out", tmp_path / "report", "--pictures", 0)
    printed = capsys.readouterr()
    assert "probe-6 is unfinished: the model is that of step 4 of 6." in printed.err and (tmp_path / "report").is_dir()


def test_an_unfinished_run_without_what_it_needs(made, tmp_path):
    shutil.copytree(made / "causal-6", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/best", ignore_errors=True)
    (tmp_path / "run/states/atoms.json").unlink()  # as an earlier version left it
    with pytest.raises(TomatError, match="does not name its atoms"):
        run("predict", "POSCAR", "--checkpoint", tmp_path / "run", "--out", tmp_path / "x.cube")
    for state in (tmp_path / "run/states").glob("step-*"):
        shutil.rmtree(state)
    with pytest.raises(TomatError, match="has no saved state"):
        run("predict", "POSCAR", "--checkpoint", tmp_path / "run", "--out", tmp_path / "x.cube")


def test_info_says_what_a_checkpoint_and_a_run_are(made, capsys):
    for decoder, load in (("causal", lambda path: load_checkpoint(path)[0]), ("probe", load_probe)):
        run("info", made / f"{decoder}-4/model", "--json")
        found = json.loads(capsys.readouterr().out)
        n = sum(p.numel() for p in load(made / f"{decoder}-4/model").parameters())
        assert (found["content"], found["decoder"], found["parameters"], found["steps"]) == ("checkpoint", decoder, n, 4)
        assert "materials" in found["training data"]
        run("info", made / f"{decoder}-6", "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["content"] == "run" and found["state"] == "unfinished, its last saved state is step-00000004"
