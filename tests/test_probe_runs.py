"""Runs of the probe network: one process or two, killed and resumed, on one device and another, with the same result."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tomat.dataset.prepare import prepare
from tomat.dataset.voxels import PrepareConfig
from tomat.density.store import sample_store
from tomat.io.remote import TomatError
from tomat.models.messages import ProbeConfig
from tomat.train.config import ProbeTrainConfig, RunConfig
from tomat.train.log import read_log
from tomat.train.probe import train_voxels

TINY: dict[str, Any] = {"width": 8, "n_layers": 1, "atom_channels": (4, 2, 2), "voxel_channels": (4, 2, 2), "readout_width": 16,
                        "readout_blocks": 1}
CONFIG = ProbeTrainConfig(ProbeConfig(**TINY), steps=40, materials=4, voxels=20, kept=300, warmup=4, average=0.5, levels=16,
                          eval_every=10)
PROGRAM = """
import json, sys, torch
from tomat.models.messages import ProbeConfig
from tomat.train.config import ProbeTrainConfig, RunConfig
from tomat.train.probe import train_voxels
torch.set_num_threads(1)
job = json.loads(sys.argv[1])
config = ProbeTrainConfig(**job["config"] | {"network": ProbeConfig(**job["config"]["network"])})
train_voxels(job["data"], job["out"], config, RunConfig(**job["run_config"]), job["val"])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    "Prepared voxels to train on and to validate on."
    folder, store = tmp_path_factory.mktemp("voxels"), sample_store()
    for part, ids in (("train", store.split("train")[:9]), ("validation", store.split("validation")[:3])):
        prepare(store, folder / part, PrepareConfig(kept=300), ids)
    return folder / "train", folder / "validation"


def started(data, out: Path, run_config: RunConfig, processes: int = 1) -> subprocess.Popen:
    "The run in a process of its own, or in several."
    program = out.parent / "program.py"
    program.write_text(PROGRAM)
    job = {"data": str(data[0]), "val": str(data[1]), "out": str(out), "config": asdict(CONFIG), "run_config": asdict(run_config)}
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return subprocess.Popen([sys.executable, *many, program, json.dumps(job)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    "The run by one process, without a stop."
    out = tmp_path_factory.mktemp("whole") / "run"
    run = started(data, out, RunConfig(save_every=10))
    assert run.communicate() and run.returncode == 0
    return out


def timeless(out: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "time"} for line in read_log(out)]


def weights(out: Path) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in load_file(out / "model" / "model.safetensors").items()}


def test_two_processes_do_what_one_does(data, whole, tmp_path):
    run = started(data, tmp_path / "run", RunConfig(save_every=10), processes=2)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    for one, two in zip(timeless(whole), timeless(tmp_path / "run"), strict=True):
        assert one["tokens"] == two["tokens"] and one.get("val", {}).keys() == two.get("val", {}).keys()
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)
        for key, score in one.get("val", {}).items():
            assert two["val"][key] == pytest.approx(score, rel=1e-4), (one["step"], key)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_goes_on_bit_for_bit(data, whole, tmp_path, workers):
    """SIGKILL somewhere between two saves or inside one; voxels are read by another process too."""
    out, rng, deadline = tmp_path / "run", np.random.default_rng(workers), time.monotonic() + 120
    run = started(data, out, RunConfig(save_every=10, workers=workers))
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < rng.integers(12, 30):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not (out / "model").exists()
    again = started(data, out, RunConfig(save_every=10, workers=workers))
    assert again.communicate() and again.returncode == 0
    assert timeless(out) == timeless(whole)
    assert all((weights(whole)[name] == x).all() for name, x in weights(out).items())


def test_a_batch_never_holds_a_material_twice(data, tmp_path, monkeypatch):
    """Nine materials in steps of four: passes do not end with a step."""
    seen = []
    from tomat.train.probe import ProbeTask
    gradient = ProbeTask.gradient

    def noting(task, step):
        result = gradient(task, step)
        seen.append([entry["material"] for entry in task.inputs()])
        return result
    monkeypatch.setattr(ProbeTask, "gradient", noting)
    train_voxels(data[0], tmp_path / "run", replace(CONFIG, steps=12))
    assert all(len(set(step)) == 4 for step in seen) and len({id for step in seen for id in step}) == 9


def test_more_materials_a_step_than_there_are(data, tmp_path):
    train_voxels(data[0], tmp_path / "run", replace(CONFIG, steps=2, materials=50))
    assert [line["tokens"] for line in read_log(tmp_path / "run")] == [180, 360]


def test_what_does_not_fit_is_refused(data, tmp_path):
    with pytest.raises(TomatError, match="is in the training data and in the validation data"):
        train_voxels(data[0], tmp_path / "a", CONFIG, val=data[0])
    with pytest.raises(TomatError, match="PyTorch finds no GPU"):
        train_voxels(data[0], tmp_path / "b", CONFIG, RunConfig(device="cuda"))
    with pytest.raises(TomatError, match=r"holds no meta\.json"):
        train_voxels(tmp_path, tmp_path / "c", CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"bf16": True}, {"workers": 2}])
def test_options_of_a_run_change_the_result_by_rounding_at_most(data, whole, tmp_path, options, one_thread):
    train_voxels(data[0], tmp_path / "run", CONFIG, RunConfig(**options))
    for line, before in zip(read_log(tmp_path / "run"), read_log(whole), strict=True):
        assert line["loss"] == pytest.approx(before["loss"], rel=2e-2 if "bf16" in options else 1e-6)
