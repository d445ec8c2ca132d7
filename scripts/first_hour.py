"""The first hour of a user, without this checkout: install what `make dist` built, predict, train, evaluate. Each step's seconds.

    make first-hour                                              # builds, and runs this in a folder that is removed
    python scripts/first_hour.py DIST --python python3.12        # with another Python
    python scripts/first_hour.py DIST --times 5 --out results/install/install.json

DIST holds the wheel and the sdist. Both are installed, the wheel last, into a new virtual environment that has PyTorch alone.
Predicting runs without the extra [train] and with all proxies led nowhere; then [train] is installed. With --times, the start of
Python, of torch and of tomat is measured too, whole processes in turn, in CPU seconds, beside `python -c "import torch"`.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0"
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9") | {
    "TOMAT_PROGRESS": "0"}
MGO = "MgO\n1.0\n0.0 2.105 2.105\n2.105 0.0 2.105\n2.105 2.105 0.0\nMg O\n1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"
WRITE = """import tomat
from pathlib import Path
store = tomat.sample_store()
for id in store.ids[:20]:
    Path("calculations", id).mkdir(parents=True)
    tomat.write(store.read(id), Path("calculations", id, "CHGCAR"))"""
READ = """from pymatgen.io.vasp.outputs import Chgcar
from pymatgen.io.vasp.inputs import Poscar
found = Chgcar.from_file("CHGCAR")
electrons = found.data["total"].mean()
print(f"pymatgen reads {electrons:.4f} electrons on {found.dim}")
assert abs(electrons - 16) < 1e-3 and found.structure.matches(Poscar.from_file("POSCAR").structure)"""
STARTS = {"python": "python -c pass", "import torch": "python -c 'import torch'", "import tomat": "python -c 'import tomat'",
          "tomat --help": "tomat --help", "tomat predict": "tomat predict POSCAR --grid 36,36,36 --out {n}.CHGCAR"}


class Folder:
    "A virtual environment and an empty folder beside it, where commands run."
    def __init__(self, root: Path, python: str) -> None:
        self.bin, self.here = root / "venv" / "bin", root / "work"
        self.seconds: dict[str, float] = {}
        self.here.mkdir()
        subprocess.run([python, "-m", "venv", root / "venv"], check=True)

    def run(self, line: str, **variables: str) -> None:
        "Run a command; its output is shown where it fails."
        hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
        env = {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("TOMAT_")}
        env |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", **variables}
        done = subprocess.run(shlex.split(line), cwd=self.here, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\n{line[:80]} ended with code {done.returncode}.")

    def step(self, name: str, line: str, **variables: str) -> None:
        begun = time.perf_counter()
        self.run(line, **variables)
        self.seconds[name] = round(time.perf_counter() - begun, 1)
        print(f"{self.seconds[name]:7.1f} s  {name}", flush=True)

    def megabytes(self) -> int:
        return sum(path.lstat().st_size for path in self.bin.parent.rglob("*") if not path.is_dir()) >> 20


def cpu_seconds(folder: Folder, line: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    folder.run(line, **OFFLINE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def starts(folder: Folder, times: int) -> dict[str, float]:
    "CPU seconds of whole processes, the median of several in turn; the first of each, which writes bytecode, is not counted."
    taken: dict[str, list[float]] = {name: [] for name in STARTS}
    for n in range(times + 1):
        for name, line in STARTS.items():
            taken[name].append(cpu_seconds(folder, line.format(n=n)))
    return {name: round(statistics.median(some[1:]), 3) for name, some in taken.items()}


def first_hour(folder: Folder, dist: Path, times: int) -> dict[str, Any]:
    (wheel,), (sdist,) = ([path.resolve() for path in dist.glob(kind)] for kind in ("*.whl", "*.tar.gz"))
    pip = "python -m pip -q --disable-pip-version-check --no-input install"
    found: dict[str, Any] = {"python": sys.version.split()[0], "megabytes": {}}
    folder.step("install PyTorch", f"{pip} {TORCH}")
    found["megabytes"]["torch"] = folder.megabytes()
    folder.step("install tomat from the sdist", f"{pip} {sdist}")
    folder.step("install tomat from the wheel", f"{pip} --force-reinstall --no-deps {wheel}")
    found["megabytes"]["tomat"] = folder.megabytes()
    (folder.here / "POSCAR").write_text(MGO)
    folder.step("predict MgO, no network", "tomat predict POSCAR --encut 520 --out CHGCAR", **OFFLINE)
    folder.step("open it with pymatgen", f"python -c {shlex.quote(READ)}")
    folder.step("predict it again, as a user does next", "tomat predict POSCAR --encut 520 --out again.cube", **OFFLINE)
    if times:
        found["cpu_seconds"] = starts(folder, times)
    folder.step("install [train]", f"{pip} '{wheel}[train]'")
    found["megabytes"]["tomat[train]"] = folder.megabytes()
    folder.step("write twenty CHGCARs", f"python -c {shlex.quote(WRITE)}")
    folder.step("convert them, a fifth held out", "tomat convert calculations densities --validation 0.2", **OFFLINE)
    folder.step("train S, 100 steps", "tomat train densities --out run --size S --steps 100 --kept 4000 --materials 8", **OFFLINE)
    folder.step("evaluate, with a report", "tomat evaluate densities --checkpoint run/model --out scores --pictures 1", **OFFLINE)
    if not (folder.here / "scores" / "report.html").stat().st_size:
        sys.exit("The report is empty.")
    return found | {"seconds": folder.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder of a wheel and an sdist")
    parser.add_argument("--python", default=sys.executable, help="the Python of the new environment")
    parser.add_argument("--times", type=int, default=0, help="how often each start is measured")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tomat-first-hour-") as root:
        found = first_hour(Folder(Path(root), args.python), args.dist, args.times)
    print("MB: " + ", ".join(f"{name} {size:,}" for name, size in found["megabytes"].items()))
    for name, seconds in found.get("cpu_seconds", {}).items():
        print(f"{seconds:7.2f} CPU s  {name:15} {seconds / found['cpu_seconds']['import torch']:5.2f} of import torch")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
