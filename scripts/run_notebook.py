"""Run one notebook: a test that no cell fails, and that its cells print what is saved in it.

usage: python scripts/run_notebook.py [--save] NOTEBOOK

Cells with a flag of [tool.nbdev] tst_flags are not run, and cells with `#| volatile` are run and not compared.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run_tests import ROOT, environment

os.environ |= environment() | {"IN_TEST": "1"}  # before NumPy and torch are loaded; IN_TEST: as in nbdev-test, nothing is exported
sys.path[0] = str(ROOT)  # a notebook finds the project, and not the files beside this one

from execnb.shell import CaptureShell, format_exc
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.test import nb_test_cells

LIMIT_S = 600  # of one cell
FLOAT = re.compile(r"\d+\.\d+(?:e[-+]\d+)?|\d+e[-+]\d+")
# What says nothing to a reader: addresses of objects, names of temporary folders, digests and sizes of compressed files (those
# of the next version of a package differ), and how wide a column is.
NOISE = [(re.compile(r" at 0x[0-9a-f]{6,}"), ""), (re.compile(r"\S*\btmp[a-z0-9_]{8}\b"), "tmp"),
         (re.compile(r"\b[0-9a-f]{32,64}\b"), "digest"), (re.compile(r"(?<='bytes': )\d{3,}"), "size"),
         (re.compile(r"[ \t]+(?=\n|$)"), ""), (re.compile(r"(?<=\S)[ \t]+"), " "), (re.compile("[─═]+"), "─")]


def text_of(outputs: list[dict[str, Any]]) -> str:
    "What a reader reads of a cell's outputs: what was printed, then the results; no pictures and no HTML."
    parts = ["".join("".join(out["text"]) for out in outputs if "text" in out)]
    data = [out["data"] for out in outputs if "data" in out]
    parts += ["".join(results[kind]) for results in data for kind in ("text/plain", "text/markdown") if kind in results]
    text = "\n".join(part.rstrip("\n") for part in parts if part)
    for pattern, instead in NOISE:
        text = pattern.sub(instead, text)
    return text


def same(saved: str, now: str) -> bool:
    """The same text, but for the last digits of numbers with a decimal point.

    Sums in another order, on another processor, move a number by about 1e-6, and training on it carries that further.  A
    number that somebody reads has three or four digits.  1e-3 lies between.  Below 1e-5 is mostly what rounding left, and its
    digits say nothing.  Whole numbers are counts and must be equal.
    """
    if FLOAT.sub("·", saved) != FLOAT.sub("·", now):
        return False
    pairs = zip(map(float, FLOAT.findall(saved)), map(float, FLOAT.findall(now)), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-3) or max(a, b) <= 1e-5 for a, b in pairs)


def execute(path: Path) -> tuple[list[tuple[Any, list[dict[str, Any]]]], str]:
    "Run the cells in order: those that ran, each with what was saved in it, and what went wrong, if anything."
    flags = get_config(ROOT).tst_flags
    shell, ran = CaptureShell(path), []
    os.chdir(path.parent)
    for cell in nb_test_cells(path, flags.split() if isinstance(flags, str) else flags):
        ran.append((cell, cell.get("outputs", [])))
        shell.cell(cell, timeout=LIMIT_S)
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]  # warnings of packages belong on no page
        if shell.exc:
            return ran, f"cell {cell.idx_ + 1} ({cell.id}) failed:\n{''.join(format_exc(shell.exc))}"
    return ran, ""


def difference(cell: Any, saved: list[dict[str, Any]]) -> Iterator[str]:
    "Lines that say how what a cell prints differs from what is saved in it; none where it does not."
    before, after = text_of(saved), text_of(cell.outputs)
    if "volatile" not in cell.directives_ and not same(before, after):
        yield f"cell {cell.idx_ + 1} ({cell.id}) prints something else than is saved in it:"
        yield from difflib.unified_diff(before.splitlines(), after.splitlines(), "saved", "now", lineterm="", n=1)


def save(path: Path, cells: list[Any]) -> None:
    "Write outputs into the file as it is now: a cell that was edited meanwhile keeps its own."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    new = {(cell.id, cell.source): cell.outputs for cell in cells}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = new.get((cell.get("id"), "".join(cell["source"])), cell["outputs"])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    nbdev_clean(str(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write what the cells print and draw into the notebook")
    parser.add_argument("notebook", type=lambda path: Path(path).resolve())
    args = parser.parse_args()
    name = os.path.relpath(args.notebook, ROOT)
    ran, failure = execute(args.notebook)
    stale = [line for cell, saved in ran for line in difference(cell, saved)]
    if failure:
        print(f"{name}: {failure}")
    elif args.save:
        save(args.notebook, [cell for cell, _ in ran])
    elif stale:
        print(f"{name}: saved outputs are stale", *stale, sep="\n")
        print(f"\nRun `python scripts/run_notebook.py --save {name}` and read what changed. Put `#| volatile` above a cell"
              " whose output depends on the time or the machine.")
    return int(bool(failure or (stale and not args.save)))


if __name__ == "__main__":
    sys.exit(main())
