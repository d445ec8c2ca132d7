"""Check the sources without changing them: prints one line a check, and what to do about a failure.

usage: python scripts/check.py [NAME ...]          names as in CHECKS; all but `staged` when none is given
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def output_of(*command: str | Path, cwd: Path = ROOT, given: str = "") -> tuple[bool, str]:
    "Whether the command succeeded with `given` as its input, and what it printed."
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}  # with it, nbdev exports nothing
    done = subprocess.run(command, cwd=cwd, env=env, input=given, capture_output=True, text=True, errors="replace")
    good = done.returncode == 0
    return good, (done.stdout if good else done.stdout + done.stderr).rstrip()


def ruff() -> str:
    good, text = output_of(BIN / "ruff", "check", "--quiet", "--output-format=concise", ".")
    return "" if good else text


def mypy() -> str:
    good, text = output_of(BIN / "mypy")
    return "" if good else text


def tracked(*folders: str) -> set[str]:
    "Files under `folders` that git holds or would take."
    _, text = output_of("git", "ls-files", "-co", "--exclude-standard", "-z", "--", *folders)
    return {name for name in text.split("\0") if name and (ROOT / name).exists()}


def export() -> str:
    "Export and clean a copy of the sources, then compare: the working tree stays as it is."
    names = tracked("nbs", "tomat", "pyproject.toml")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
        for command in ("nbdev-export", "nbdev-clean"):
            good, text = output_of(BIN / command, cwd=copy)
            if not good:
                return f"{command} failed:\n{text}"
        made = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
        _, ignored = output_of("git", "check-ignore", "--stdin", given="\n".join(made))
        made -= set(ignored.splitlines())
        stale = [name for name in sorted(made | names) if not same(ROOT / name, copy / name)]
    return f"stale: {', '.join(stale)}; run `make export clean-nbs` and commit what it changes" if stale else ""


def same(a: Path, b: Path) -> bool:
    if a.is_symlink() or b.is_symlink():
        return a.is_symlink() and b.is_symlink() and a.readlink() == b.readlink()
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


def readme() -> str:
    good, text = output_of(sys.executable, ROOT / "scripts/make_readme.py", "--check")
    return "" if good else text


def staged() -> str:
    "What the next commit holds: its notebooks are clean (the pre-commit hook)."
    _, text = output_of("git", "diff", "--cached", "--name-only", "--diff-filter=ACMR", "-z", "--", "nbs/*.ipynb")
    names = [name for name in text.split("\0") if name]
    if not names:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        shutil.copy2(ROOT / "pyproject.toml", copy)
        output_of("git", "checkout-index", f"--prefix={copy}/", "--", *names)
        before = {name: (copy / name).read_bytes() for name in names}
        output_of(BIN / "nbdev-clean", cwd=copy)
        unclean = [name for name in names if (copy / name).read_bytes() != before[name]]
    return f"not clean: {', '.join(unclean)}; run `make clean-nbs` and stage them again" if unclean else ""


CHECKS: dict[str, Callable[[], str]] = {
    "ruff": ruff, "mypy": mypy, "export": export, "readme": readme, "staged": staged}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"no check is named {unknown[0]}: there are {', '.join(CHECKS)}")
        return 2
    failed = 0
    for name in names or [name for name in CHECKS if name != "staged"]:
        start = time.monotonic()
        complaint = CHECKS[name]()
        failed += bool(complaint)
        if complaint or name != "staged":
            print(f"{'FAILED' if complaint else 'ok':>7}  {name:<8} {time.monotonic() - start:6.1f} s", flush=True)
        if complaint:
            print(complaint, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
