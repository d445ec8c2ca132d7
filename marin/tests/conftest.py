"""Shared by the tests: rows written by the library's own command, and runs of the launcher in processes of their own."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import launch  # noqa: F401 - adds the size "tiny"
import pytest

MARIN = Path(__file__).resolve().parents[1]
ROOT = MARIN.parent
LAUNCHER = MARIN / "train_tomat_tpu.py"
LAUNCH_TINY = MARIN / "tests" / "launch.py"

os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "TOMAT_PROGRESS": "0", "HF_HUB_OFFLINE": "1"}


def with_torch() -> str:
    "The Python that has tomat and torch."
    python = os.environ.get("TOMAT_PYTHON") or str(ROOT / ".venv" / "bin" / "python")
    if not Path(python).is_file():
        pytest.fail(f"{python} does not exist: run `make install`, or set TOMAT_PYTHON to a Python that has tomat and torch.",
                    pytrace=False)
    return python


def tomat(*arguments, python=None) -> str:
    "What a command of the library prints, or a script for its Python."
    script = python or ["-c", "from tomat.cli import main; main()"]
    done = subprocess.run([with_torch(), *script, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tokenized(out: Path, codec: str | Path, materials: int, side: int, *more: str) -> Path:
    "Rows of the packaged sample."
    tomat("tokenize", ROOT / "tomat" / "data" / "sample.zip", "--split", "all", "--materials", materials, "--out", out, "--label",
          out.name, "--patches-per-material", 4, "--patch-size", side, "--pad-to", 0, "--density-codec", codec, *more)
    return out


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    "64 rows of 16 materials, two tokens a voxel."
    return tokenized(tmp_path_factory.mktemp("data") / "small", "two_token_9_12", 16, 4)


class Runs:
    "Runs of the launcher in a folder of their own, which share what was compiled."

    def __init__(self, place: Path, rows: Path) -> None:
        self.place = place
        self.variables = {"LABEL": rows, "MODEL": "tiny", "STEPS": 20, "BATCH_SIZE": 8, "VAL_SEQS": 10, "EVAL_EVERY": 10,
                          "BF16": "false", "WANDB_MODE": "disabled"}

    def start(self, label: str, *arguments: str, log: str = "", more: dict | None = None, **variables) -> subprocess.Popen:
        given = {f"TOMAT_{key}": str(value) for key, value in {**self.variables, "RESULTS_LABEL": label, **variables}.items()}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("TOMAT_")}
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{self.place}-cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with open(f"{self.place}-{log or label}.log", "w") as errors:
            return subprocess.Popen([sys.executable, str(LAUNCH_TINY), *arguments], text=True, stdout=subprocess.PIPE,
                                    stderr=errors, cwd=self.place, env={**inherited, **cache, **given, **(more or {})})

    def printed(self, process: subprocess.Popen, log: str) -> str:
        "What it prints until its end, which is a good one."
        out, _ = process.communicate(timeout=300)
        errors = Path(f"{self.place}-{log}.log").read_text()
        assert process.returncode == 0, f"{out}\n{errors[-3000:]}"
        return out

    def run(self, label: str, *arguments: str, **variables) -> str:
        return self.printed(self.start(label, *arguments, **variables), label)

    def together(self, label: str, n: int = 2, **variables) -> list[str]:
        "The same run in n processes on loopback, one device each."
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        others = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n)}
        processes = [self.start(label, log=f"{label}-{i}", more=others | {"JAX_PROCESS_ID": str(i)}, **variables)
                     for i in range(n)]
        try:
            return [self.printed(process, f"{label}-{i}") for i, process in enumerate(processes)]
        finally:
            for process in processes:
                process.kill()


@pytest.fixture(scope="session")
def runs(tmp_path_factory, rows):
    return Runs(tmp_path_factory.mktemp("runs"), rows)


def losses(printed: str) -> dict[tuple[int, str], str]:
    "(step, kind) → the loss as it was printed."
    return {(int(step), kind): loss for step, kind, loss in re.findall(r"^step (\d+) (loss|validation loss) (\S+)", printed, re.M)}


@pytest.fixture(scope="session")
def whole(runs):
    "What a run prints that nobody disturbs."
    return runs.run("whole")


@pytest.fixture(scope="session")
def torch_says(runs, rows, whole, tmp_path_factory):
    "The library on the export of that run: logits of four rows, its loss and held-out materials, and its order of rows."
    import numpy as np
    out = tmp_path_factory.mktemp("torch") / "said.npz"
    tomat(runs.place / "runs/whole/model", rows, 10, 0, 0, 0, out, python=[str(MARIN / "tests" / "torch_side.py")])
    said = np.load(out)
    return said["ids"], said["logits"], json.loads(str(said["found"])), said["train_ids"]
