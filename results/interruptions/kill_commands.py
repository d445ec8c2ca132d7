"""What is left of a writing command that is killed: results/interruptions/.

    python results/interruptions/kill_commands.py WORK [--kills 10] [--seed 0]

Each command that writes (convert, tokenize, prepare, train, evaluate, sync) runs once undisturbed on the packaged sample, and then
again into another folder, where SIGKILL meets it and all its processes at random moments, ten times, each time started anew; the
last start is left alone.  What was there must never look complete, and in the end the files must be those of the undisturbed
run, byte for byte (of scores without their seconds; of a run its weights).  kills.csv holds the counts.
"""

import argparse
import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tomat.density.formats import write_density
from tomat.density.store import sample_store
from tomat.io.progress import track
from tomat.study.site import write_table

TOMAT = Path(sys.executable).with_name("tomat")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Command:
    "A command that writes."
    words: list[str]            # its line; OUT stands for its output
    complete: str               # file of the output that is there only once all others are
    compared: tuple[str, ...]   # patterns of the files that must be the same


def digest(path: Path) -> str:
    "The content of a file, of scores without their seconds."
    if path.name != "scores.csv":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open() as lines:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(lines)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def contents(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    "The compared files of an output, by name."
    return {str(path.relative_to(folder)): digest(path) for pattern in patterns for path in sorted(folder.glob(pattern))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)}


def start(command: Command, out: Path) -> subprocess.Popen[bytes]:
    "The command, in a process group of its own; what it says goes to a file beside its output."
    words = [str(out) if word == "OUT" else word for word in command.words]
    with log_of(out).open("ab") as log:
        return subprocess.Popen([TOMAT, *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def check(name: str, code: int, out: Path) -> None:
    "End with the last line that a command wrote, if it failed by itself."
    if code:
        lines = log_of(out).read_text(errors="replace").splitlines() or ["nothing"]
        raise SystemExit(f"tomat {name} ended with exit code {code}, though nobody killed it, and said: {lines[-1]}")


def killed(name: str, command: Command, out: Path, seconds: float) -> bool:
    "Whether the command was killed before its end."
    run = start(command, out)
    with suppress(subprocess.TimeoutExpired):
        run.wait(seconds)
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    if run.wait() == -signal.SIGKILL:
        return True
    check(name, run.returncode, out)
    return False


def row_of(name: str, command: Command, work: Path, kills: int, rng: np.random.Generator) -> dict[str, object]:
    "The counts of one command."
    whole, out = work / f"{name}-whole", work / f"{name}-killed"
    for folder in (whole, out):
        shutil.rmtree(folder, ignore_errors=True)
        log_of(folder).unlink(missing_ok=True)
    begun = time.monotonic()
    check(name, start(command, whole).wait(), whole)
    seconds, right = time.monotonic() - begun, contents(whole, command.compared)
    if not (whole / command.complete).exists():
        raise SystemExit(f"tomat {name} writes no {command.complete}, so nobody can tell when it is complete")
    met = early = 0
    for share in rng.uniform(0.05, 1.0, kills):
        if killed(name, command, out, share * seconds):
            met += 1
            early += (out / command.complete).exists() and contents(out, command.compared) != right
        else:  # it was done: begin again
            shutil.rmtree(out)
    ended = start(command, out).wait()
    return {"command": name, "seconds": round(seconds, 1), "kills": kills, "met_it_running": met, "looked_complete": early,
            "exit_code_at_last": ended, "files": len(right), "files_that_differ": len(set(right.items()) ^ set(
                contents(out, command.compared).items()))}


def commands(work: Path) -> dict[str, Command]:
    "The commands, on the packaged sample written out as a folder of CHGCARs and as a store."
    store, folder = sample_store(), work / "calculations"
    for id in track(store.ids, "write", unit="CHGCARs"):
        path = folder / id / "CHGCAR"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_density(store.read(id), path, "chgcar")
    sample = str(store.root)
    rows = work / "rows"
    if not (rows / "meta.json").exists():
        subprocess.run([TOMAT, "tokenize", sample, "--out", rows], stdout=subprocess.DEVNULL, check=True)
    shards = "*.parquet", "*.arrow", "meta.json"
    return {
        "convert": Command(["convert", str(folder), "OUT", "--workers", "2"], "mp_filelist.txt", ("**/*",)),
        "tokenize": Command(["tokenize", sample, "--out", "OUT", "--workers", "2"], "meta.json", shards),
        "prepare": Command(["prepare", sample, "--out", "OUT", "--workers", "2"], "meta.json", shards),
        "train": Command(["train", sample, "--out", "OUT", "--steps", "60", "--save-every", "10", "--device", "cpu"],
                         "model/tomat.json", ("model/model.safetensors",)),
        "evaluate": Command(["evaluate", sample, "--out", "OUT", "--pictures", "0"], "scores.json", ("scores.csv",)),
        "sync": Command(["sync", str(rows), "OUT"], "meta.json", shards)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name, command in commands(args.work).items():
        if not args.only or name in args.only:
            rows.append(row_of(name, command, args.work, args.kills, np.random.default_rng([args.seed, len(rows)])))
            print(rows[-1], flush=True)
    if not args.only:
        write_table(Path(__file__).parent / "kills.csv", rows)
    if any(row["looked_complete"] or row["exit_code_at_last"] or row["files_that_differ"] for row in rows):
        raise SystemExit("something was lost")


if __name__ == "__main__":
    main()
