"""A notebook's saved text is what its cells print: the check fails where it is not, and `--save` mends it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notebook(path: Path, *cells: tuple[str, str]) -> Path:
    "A notebook of cells, each with its source and the text that was saved below it."
    made: list[dict] = [{"cell_type": "code", "execution_count": None, "id": f"cell{i}", "metadata": {}, "source": source,
             "outputs": [{"name": "stdout", "output_type": "stream", "text": saved}] if saved else []}
            for i, (source, saved) in enumerate(cells)]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def run(path: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "scripts/run_notebook.py"), *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_saved_text_is_compared_and_saved_anew(tmp_path):
    path = notebook(tmp_path / "page.ipynb",
                    ("print('3.811 %')", "3.812 %\n"), ("print('0.5  of', object())", "0.5 of <object object>\n"),
                    ("#| volatile\nprint('2 s')", "1 s\n"), ("#| slow\n1 / 0", "never\n"),
                    ("print('a page')\nprint('3.81 %')", "a page\n1.92 %\n"), ("print('19 rows')", "18 rows\n"), ("7", ""))
    code, text = run(path)
    assert code == 1
    for line in ("cell 5 (cell4) prints something else", "\n-1.92 %\n+3.81 %\n", "cell 6 (cell5)", "\n-18 rows\n+19 rows\n",
                 "cell 7 (cell6)", "\n+7\n", "scripts/run_notebook.py --save"):
        assert line in text
    assert text.count(" prints something else") == 3

    assert run(path, "--save") == (0, "")
    saved = ["".join(cell["outputs"][0].get("text", "")) for cell in json.loads(path.read_text())["cells"]]
    assert saved[2:6] == ["2 s\n", "never\n", "a page\n3.81 %\n", "19 rows\n"]
    assert run(path) == (0, "")


def test_a_cell_that_fails_is_named(tmp_path):
    path = notebook(tmp_path / "page.ipynb", ("x = 0", ""), ("1 / x", ""))
    before = path.read_bytes()
    for options in ((), ("--save",)):
        code, text = run(path, *options)
        assert code == 1 and "cell 2 (cell1) failed" in text and "ZeroDivisionError: division by zero" in text
    assert path.read_bytes() == before
