"""Run the notebooks under nbs/ and the pytest tests, two jobs at a time; the last line is `N passed, N failed`.

usage: python scripts/run_tests.py [--save] [PATH ...]      notebooks and test files; everything when none is named
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 1800


@dataclass(frozen=True)
class Result:
    "What one job came to: a notebook, or one file of pytest tests."

    name: str
    counts: Counter[str]  # of "passed", "failed", "skipped"
    seconds: float
    report: str = ""  # what a reader needs when something failed

    def line(self) -> str:
        word = "FAILED" if self.counts["failed"] else "ok" if self.counts["passed"] else "skipped"
        count = "" if self.name.endswith(".ipynb") else f"   {tally(self.counts)}"
        return f"{word:>7}  {self.name:<34} {self.seconds:6.1f} s{count}"


def tally(counts: Counter[str]) -> str:
    text = f"{counts['passed']} passed, {counts['failed']} failed"
    return f"{text}, {counts['skipped']} skipped" if counts["skipped"] else text


def n_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)


def environment() -> dict[str, str]:
    "No network, no IPython profile of the user's, and one thread a job where two run side by side."
    env = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    if n_jobs() > 1:
        env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return env


def run(command: list[str | Path]) -> tuple[int, str, float]:
    "Exit code, output without colours, seconds."
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=LIMIT_S, text=True, errors="replace")
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")
        code, output = 1, f"{said}\nstopped: not done after {LIMIT_S // 60} minutes"
    return code, re.sub(r"\x1b\[[0-9;]*m", "", output), time.monotonic() - start


def run_notebook(path: Path, save: bool = False) -> list[Result]:
    "One notebook in a process of its own, which also compares what its cells print with what is saved, or saves it."
    digest = hashlib.sha256(path.read_bytes()).digest()
    code, output, seconds = run([sys.executable, ROOT / "scripts/run_notebook.py", *(["--save"] if save else []), path])
    if not save and hashlib.sha256(path.read_bytes()).digest() != digest:
        code, output = 1, f"{output}\nthe notebook's file changed while it ran"
    return [Result(str(path.relative_to(ROOT)), Counter(["failed" if code else "passed"]), seconds, output)]


def run_pytest(paths: list[Path]) -> list[Result]:
    "All pytest tests in one process; one result a file, read from pytest's JUnit report."
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        command: list[str | Path] = [sys.executable, "-m", "pytest", f"--junitxml={xml}", "-o", "junit_family=xunit1",
                                     "--continue-on-collection-errors"]
        code, output, seconds = run(command + list(paths))
        results = read_junit(xml) if xml.exists() else []
    if code not in (0, 5) and not any(result.counts["failed"] for result in results):  # 5: no test was found
        results.append(Result("pytest itself", Counter(failed=1), seconds))
    for i, result in enumerate(results):
        if result.counts["failed"]:
            results[i] = replace(result, report=output)  # pytest's output covers every file: once is enough
            break
    return results


def read_junit(xml: Path) -> list[Result]:
    outcomes: dict[str, dict[str, str]] = {}
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        # A file that cannot be imported is reported without "file", its path in dots as the name.
        file = case.get("file") or case.get("name", "").replace(".", "/") + ".py"
        tests, test = outcomes.setdefault(file, {}), f"{case.get('classname')}.{case.get('name')}"
        if tests.get(test) != "failed":  # a test is named twice where its clean-up fails too
            tests[test] = outcome
        seconds[file] = seconds.get(file, 0.0) + float(case.get("time", 0))
    return [Result(file, Counter(tests.values()), seconds[file]) for file, tests in outcomes.items()]


def jobs(paths: list[Path], save: bool) -> Iterator[Callable[[], list[Result]]]:
    "pytest first: it is the longest job, and the notebooks fill the other place meanwhile."
    tests = [path for path in paths if path.suffix != ".ipynb"]
    if tests and not save:
        yield partial(run_pytest, tests)
    yield from (partial(run_notebook, path, save) for path in paths if path.suffix == ".ipynb")


def everything() -> list[Path]:
    hidden = re.compile(r"[._]")
    notebooks = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
                 if not any(hidden.match(part) for part in path.relative_to(ROOT).parts)]
    return notebooks + ([ROOT / "tests"] if (ROOT / "tests").is_dir() else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=lambda path: Path(path).resolve(), help="notebooks and test files")
    parser.add_argument("--save", action="store_true", help="run the notebooks alone, and save what they print and draw")
    args = parser.parse_args()
    results: list[Result] = []
    with ThreadPoolExecutor(1 if args.save else n_jobs()) as pool:  # one alone, so that the times it prints are its own
        for future in as_completed([pool.submit(job) for job in jobs(args.paths or everything(), args.save)]):
            results += future.result()
            for result in future.result():
                print(result.line(), flush=True)
    for result in results:
        if result.counts["failed"] and result.report:
            print(f"\n{'=' * 20} {result.name} failed {'=' * 20}\n{result.report.rstrip()}")
    total = sum((result.counts for result in results), Counter())
    if not total["passed"] + total["failed"]:
        print("nothing was run: there is no notebook under nbs/ and no test under tests/")
    print(tally(total))
    return int(total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
