"""The house rules that no single notebook can check: imports, notebooks as pages, lengths of functions."""

import ast
import builtins
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import fastcore.test
import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = """files progress settings density chgcar formats store fetch source classify codecs fit patches tokenizer parquet shards
           rows sync stream promolecule analytic fit_atoms metrics schemes fidelity sizes model loss optim feed cost devices states
           runs plan train decode geometry parallel fit_parallel predict batch scores evaluate report serve demo scaling
           pull jobs launch site cli""".split()
LATE = "modal levanter jax wandb s3fs gcsfs".split()  # heavy or remote: imported by what uses them, when it runs
MODULES = sorted(path for path in (ROOT / "tomat").glob("*.py") if not path.name.startswith("_"))
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not path.name.startswith(("_", ".")))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|Users)(?:/|\b)")

modules = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def imported(tree: ast.AST) -> Iterator[str]:
    "Names of tomat's own modules that a module imports, anywhere in it."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("tomat." if node.level else "") + (node.module or "")
            names = [base.rstrip(".")] + [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("tomat."))


def code_lines(function: ast.AST, source: str) -> int:
    "Lines that hold code: docstring, comments and blank lines left out."
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    doc = range(docstring.lineno, docstring.end_lineno + 1) if docstring else range(0)
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in quiet
             for line in range(token.start[0], token.end[0] + 1)}
    return sum(line in lines and line not in doc for line in range(function.lineno, function.end_lineno + 1))


def bound(tree: ast.AST) -> set[str]:
    "Every name that code binds, whatever the scope; of `import *`, what fastcore.test holds."
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.ExceptHandler):
            names.add(node.name or "")
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names |= set(vars(fastcore.test)) if node.name == "*" else {(node.asname or node.name).split(".")[0]}
    return names


def top_level(statement: ast.stmt) -> set[str]:
    "What a statement binds for those after it: of a definition, its name alone."
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return {statement.name}
    return bound(statement)


def cells_of(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def texts_of(cell: dict) -> Iterator[str]:
    "What a reader of the notebook reads: the source and the outputs that are text."
    yield cell["source"]
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", ""))
        yield from ("".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


@modules
def test_imports_go_downward(path):
    assert path.stem in ORDER, f"{path.name} has no place in the order of modules: add it to ORDER in this file"
    below = ORDER[:ORDER.index(path.stem)]
    upward = {name for name in imported(ast.parse(path.read_text())) if name in ORDER and name not in below}
    assert not upward, f"tomat.{path.stem} imports {sorted(upward)}, which come after it in the reading order"


@pytest.mark.parametrize("source, names", [
    ("import tomat.io.files", {"files"}), ("from .files import exists", {"files"}), ("from . import files", {"files"}),
    ("from tomat import files as f", {"files"}), ("def f():\n    from tomat.io.files import exists", {"files"}),
    ("import numpy", set())])
def test_every_form_of_import_is_seen(source, names):
    assert set(imported(ast.parse(source))) == names


@modules
def test_a_module_is_what_a_notebook_exports(path):
    source = re.search(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: \.\./(\S+)\.$", path.read_text(), re.MULTILINE)
    assert source and (ROOT / source[1]).exists(), f"{path.name} has no notebook: delete it, or write its notebook"


def test_nothing_heavy_is_imported_early():
    lines = ["import sys", *(f"import tomat.{path.stem}; print('{path.stem}', *sorted(set({LATE}) & set(sys.modules)))"
                             for path in MODULES)]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    early = [line for line in done.stdout.splitlines() if " " in line]
    assert not early, f"importing tomat.{early[0].replace(' ', ' also imports ', 1)}"


@modules
def test_functions_are_short(path):
    source = path.read_text()
    long = {node.name: lines for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := code_lines(node, source)) > 40}
    assert not long, f"over 40 lines of code: {long}"


def test_lines_of_code_are_counted_without_docstring_comments_and_blanks():
    head = 'def f(\n    x: int,  # a number\n) -> int:\n    """One.\n\n    Two."""\n'
    source = head + '    # why\n\n    return (x +\n            1)\n'
    assert code_lines(ast.parse(source).body[0], source) == 5


@notebooks
def test_a_notebook_is_small(path):
    assert path.stat().st_size < 200_000


@notebooks
def test_a_notebook_has_its_place_on_the_site(path):
    name = str(path.relative_to(ROOT / "nbs"))
    assert f"- {name}\n" in (ROOT / "_quarto.yml").read_text(), f"list {name} in the sidebar of _quarto.yml"


@notebooks
def test_a_notebook_starts_with_its_claim(path):
    first = cells_of(path)[0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S.*\n+> \S", first["source"]), "the first cell is `# Title`, then `> open_run_dir`"


@notebooks
def test_few_cells_are_hidden(path):
    cells = cells_of(path)
    hidden = [cell for cell in cells if re.search(r"^#\|\s*hide\s*$", cell["source"], re.MULTILINE)]
    assert len(hidden) < len(cells) / 5


@notebooks
def test_cells_that_import_can_run_without_the_shown_cells(path):
    "To make the site, nbdev runs the exported cells and every cell with an import in it, and no other."
    known = set(dir(builtins))
    for cell in cells_of(path):
        exported = re.search(r"^#\|\s*export", cell["source"], re.MULTILINE)
        if cell["cell_type"] != "code" or not (exported or "import " in cell["source"]):
            continue
        tree = ast.parse(re.sub(r"^%.*$", "", cell["source"], flags=re.MULTILINE))
        if not exported and not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)):
            continue
        loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        missing = sorted(loaded - bound(tree) - known)
        known |= {name for statement in tree.body for name in top_level(statement)}
        assert exported or not missing, f"a cell imports and needs {missing}: give its imports a cell of their own"


@notebooks
def test_a_notebook_holds_no_path_of_a_machine(path):
    lines = [line for cell in cells_of(path) for text in texts_of(cell) for line in text.splitlines()]
    found = [line for line in lines if MACHINE_PATH.search(line)]
    assert not found


@notebooks
def test_no_traceback_is_saved(path):
    kinds = [output["output_type"] for cell in cells_of(path) for output in cell.get("outputs", [])]
    assert "error" not in kinds
    streams = "".join(text for cell in cells_of(path) for text in list(texts_of(cell))[1:])
    assert "Traceback (most recent call last)" not in streams


@pytest.mark.parametrize("text, hit", [
    ("/home/a/b", True), ("file:///tmp/x", True), ("in /work.", True),
    ("gs://b/tmp/x", False), ("work/main", False), ("/worked", False), ("../tmp/x", False)])
def test_paths_of_machines_are_recognised(text, hit):
    assert bool(MACHINE_PATH.search(text)) == hit


def test_sources_hold_no_path_of_a_machine():
    scripts = [path for path in (ROOT / "scripts").glob("*") if path.is_file()]
    paths = [*MODULES, *scripts, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "settings.ini", ROOT / "pyproject.toml"]
    found = [f"{path.name}: {line}" for path in sorted(paths)
             for line in path.read_text(encoding="utf-8").splitlines() if MACHINE_PATH.search(line)]
    assert not found
