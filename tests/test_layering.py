"""The house rules that no single notebook can check: one order, imports that go down it, short modules, notebooks as pages.

Each test collects every violation and reports them together, one a line.
"""

import ast
import builtins
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import fastcore.test
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from api_pages import index_page, modules_of, reading_order

from tomat.cli import app

LATE = "modal levanter jax wandb s3fs gcsfs transformers".split()  # heavy or remote: imported where they are used
PLAIN = [*LATE, "torch", "numpy"]  # what `import tomat` alone does not import
ABOUT = {("tomat.models.causal", "transformers")}  # the language model is a network of transformers
MODULES = modules_of(ROOT / "tomat")
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part.startswith(("_", ".")) for part in path.relative_to(ROOT).parts))
SOURCES = sorted(path for folder in ("tomat", "scripts", "marin/tomat_marin", "results") for path in (ROOT / folder).rglob("*.py")
                 if path.name != "_modidx.py") + sorted((ROOT / "marin").glob("*.py"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|Users)(?:/|\b)")
OLD_WORDS = re.compile(r"\b(?:promolecule|hear|judge|widen|told|claim)\b")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def report(found: Iterable[str]) -> None:
    "Fail with every violation, one a line."
    if lines := list(found):
        pytest.fail(f"{len(lines)} found:\n" + "\n".join(lines), pytrace=False)


def name_of(path: Path) -> str:
    "A file below the project's folder, as messages name it."
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST, package: str = "") -> set[str]:
    """Modules of tomat that code imports, anywhere in it, without the leading `tomat.`.

    `package` is the sub-package of the code, which relative imports start from. `from a import b` gives a and a.b.
    """
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["tomat", *package.split(".")][:1 - node.level or None] if node.level else []
            base = ".".join(part for part in [*start, *(node.module or "").split(".")] if part)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return {name.removeprefix("tomat.") for name in names if name.startswith("tomat.")}


def lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def code_lines(function: FUNCTION, source: str) -> int:
    "Lines that hold code: docstring, comments and blank lines left out."
    docstring = function.body[0]
    doc = lines_of(docstring) if ast.get_docstring(function) is not None else range(0)
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in quiet
             for line in range(token.start[0], token.end[0] + 1)}
    return sum(line in lines and line not in doc for line in lines_of(function))


def n_parameters(function: FUNCTION) -> int:
    "Parameters without self and cls."
    a = function.args
    every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return sum(arg is not None and arg.arg not in ("self", "cls") for arg in every)


def is_command(function: FUNCTION, module: str) -> bool:
    """Whether the parameters are options of a command line, which may be more than seven.

    That is a command registered in tomat.cli, or a function of a script decorated with `….local_entrypoint(…)` (Modal).
    Configurations are dataclasses, whose fields are no parameters of a function here.
    """
    commands = [command.callback for command in app.registered_commands]
    if (module, function.name) in {(callback.__module__, callback.__name__) for callback in commands if callback}:
        return True
    calls = [decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in function.decorator_list]
    return any(isinstance(call, ast.Attribute) and call.attr == "local_entrypoint" for call in calls)


def bound(tree: ast.AST) -> set[str]:
    "Every name that code binds, whatever the scope; of `import *`, the names of fastcore.test."
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, FUNCTION | ast.ClassDef | ast.ExceptHandler):
            names.add(node.name or "")
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names |= set(vars(fastcore.test)) if node.name == "*" else {(node.asname or node.name).split(".")[0]}
    return names


def needs_of_import_cells(cells: list[dict]) -> Iterator[tuple[int, list[str]]]:
    """Cells that import and use names of shown cells: number of the cell, names.

    To make the site, nbdev runs the exported cells and every cell with an import in it, and no other.
    """
    known = set(dir(builtins))
    for number, cell in enumerate(cells, 1):
        exported = re.search(r"^#\|\s*export", cell["source"], re.MULTILINE)
        if cell["cell_type"] != "code" or not (exported or "import " in cell["source"]):
            continue
        tree = ast.parse(re.sub(r"^%.*$", "", cell["source"], flags=re.MULTILINE))
        if not exported and not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)):
            continue
        loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if (missing := sorted(loaded - bound(tree) - known)) and not exported:
            yield number, missing
        for statement in tree.body:  # a definition binds its name alone for the cells after it
            known |= {statement.name} if isinstance(statement, FUNCTION | ast.ClassDef) else bound(statement)


def cells_of(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def outputs_of(cell: dict) -> Iterator[str]:
    "The outputs that are text."
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", ""))
        yield from ("".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def import_order() -> list[str]:
    "Modules from the lowest to the highest: tomat.io, then the sidebar from top to bottom."
    return [module.name for module in sorted(MODULES, key=lambda module: not module.name.startswith("io."))]


# The order


def test_the_sidebar_is_the_order_of_folders_and_files():
    listed, there = reading_order(), [path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS]
    numbered = [page for page in listed if re.match(r"\d\d_", page)]
    report([*(f"{page}: list it in the sidebar of _quarto.yml" for page in there if page not in listed),
            *(f"{page}: in the sidebar of _quarto.yml, and no such notebook" for page in listed if page not in there),
            *(f"{page}: listed twice in the sidebar" for page in sorted(set(listed)) if listed.count(page) > 1),
            *(f"{b} follows {a} in the sidebar, and comes before it by name" for a, b in pairwise(numbered) if b < a)])


def test_every_module_comes_from_a_notebook_of_its_name():
    made = {module.name: module.notebook for module in MODULES}
    found = []
    for path in sorted((ROOT / "tomat").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "tomat").with_suffix("").parts)
        if path.name.startswith("_"):
            continue
        if name not in made or not (ROOT / "nbs" / made[name]).exists():
            found.append(f"{name_of(path)}: no notebook exports it; delete it, or write its notebook")
        elif not re.fullmatch(rf"\d\d_\w+/\d\d_{path.stem}\.ipynb", made[name]):
            found.append(f"{name_of(path)} comes from nbs/{made[name]}: name the notebook NN_{path.stem}.ipynb")
        elif "." in name and made[name].split("/")[0][3:] != name.split(".")[0]:
            found.append(f"{name_of(path)} comes from nbs/{made[name]}: its folder has another name than the package")
    report(found)


def test_api_pages_follow_the_sidebar():
    listed = reading_order()
    pages = re.findall(r"^\| \[`tomat\.([\w.]+)`\]\(\w+\.md#\1\)", index_page(MODULES), re.MULTILINE)
    notebooks = {module.name: module.notebook for module in MODULES}
    assert [notebooks[page] for page in pages] == [notebook for notebook in listed if notebook in notebooks.values()]


def test_imports_go_down_one_order():
    order = {name: place for place, name in enumerate(import_order())}
    found = []
    for module in MODULES:
        names = imported(ast.parse(module.source), module.name.rpartition(".")[0]) & set(order)
        found += [f"tomat.{module.name} imports tomat.{name}, which comes after it" for name in sorted(names)
                  if order[name] >= order[module.name]]
    report(found)


def test_nothing_heavy_is_imported_early():
    lines = ["import sys", "seen = set()", f"late, plain = {LATE}, {PLAIN}",
             "def new(names): found = sorted(set(names) & set(sys.modules) - seen); seen.update(found); return found",
             "import tomat; print('tomat', *new(plain))",
             *(f"import tomat.{name}; print('tomat.{name}', *new(late))" for name in import_order())]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    early = {(module, name) for module, *names in map(str.split, done.stdout.splitlines()) for name in names}
    report(f"import {module} also imports {name}" for module, name in sorted(early - ABOUT))


def test_a_prediction_imports_nothing_of_training(tmp_path):
    "A first prediction takes seconds, and most of them are imports."
    (tmp_path / "POSCAR").write_text("Li\n1\n3.4 0 0\n0 3.4 0\n0 0 3.4\nLi\n1\nDirect\n0 0 0\n")
    unused = ("pyarrow polars tokenizers transformers granian starlette "  # of the extras [train] and [serve]
              "torch.distributed.fsdp pymatgen.io.vasp matplotlib pandas plotly scipy.signal torch._dynamo")
    words = ["predict", str(tmp_path / "POSCAR"), "--grid", "8,8,8", "--out", str(tmp_path / "x.cube")]
    lines = ["import sys", "from tomat.cli import app", f"app({words}, standalone_mode=False)",
             f"print('imported:', *(name for name in {unused.split()} if name in sys.modules))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


# Sources


def test_modules_and_functions_are_short():
    found = []
    for path in SOURCES:
        module = name_of(path).removesuffix(".py").replace("/", ".")
        source = path.read_text(encoding="utf-8")
        if (n := len(source.splitlines())) > 350 and path.is_relative_to(ROOT / "tomat"):
            found.append(f"{name_of(path)}: {n} lines, 350 at most")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, FUNCTION) and (n := code_lines(node, source)) > 40:
                found.append(f"{name_of(path)}:{node.lineno}: {node.name} has {n} lines of code, 40 at most")
            if isinstance(node, FUNCTION) and (n := n_parameters(node)) > 7 and not is_command(node, module):
                found.append(f"{name_of(path)}:{node.lineno}: {node.name} has {n} parameters, 7 at most")
    report(found)


def test_words_of_old_stay_where_old_files_are_read():
    report(f"{name_of(path)}:{number}: {line.strip()}" for path in sorted((ROOT / "tomat").rglob("*.py"))
           for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
           if OLD_WORDS.search(line) and "reads old files" not in line)


def test_sources_hold_no_path_of_a_machine():
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.suffix in (".py", ".sh", ".js", ".css")]
    paths = {*SOURCES, *scripts, *ROOT.glob("*.md"), *(ROOT / name for name in ("Makefile", "settings.ini", "pyproject.toml"))}
    report(f"{name_of(path)}:{number}: {line.strip()}" for path in sorted(paths)
           for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if MACHINE_PATH.search(line))


# Notebooks


def test_a_notebook_is_a_page():
    found = []
    for path in NOTEBOOKS:
        cells, size = cells_of(path), path.stat().st_size
        hidden = sum(bool(re.search(r"^#\|\s*hide\s*$", cell["source"], re.MULTILINE)) for cell in cells)
        if size >= 200_000 or len(cells) > 70:
            found.append(f"{name_of(path)}: {len(cells)} cells and {size:,} bytes; 70 and 199,999 at most")
        if cells[0]["cell_type"] != "markdown" or not re.match(r"# \S.*\n+> \S", cells[0]["source"]):
            found.append(f"{name_of(path)}: the first cell is not `# Title` and `> one plain sentence`")
        if hidden * 5 >= len(cells):
            found.append(f"{name_of(path)}: {hidden} of {len(cells)} cells are hidden, under a fifth may be")
        found += [f"{name_of(path)}: cell {number} imports and needs {missing}: give its imports a cell of their own"
                  for number, missing in needs_of_import_cells(cells)]
    report(found)


def test_a_notebook_holds_no_path_of_a_machine_and_no_traceback():
    found = []
    for path in NOTEBOOKS:
        for number, cell in enumerate(cells_of(path), 1):
            outputs = list(outputs_of(cell))
            found += [f"{name_of(path)}: cell {number}: {line.strip()}" for text in [cell["source"], *outputs]
                      for line in text.splitlines() if MACHINE_PATH.search(line)]
            failed = any(output["output_type"] == "error" for output in cell.get("outputs", []))
            if failed or any("Traceback (most recent call last)" in text for text in outputs):
                found.append(f"{name_of(path)}: cell {number}: a traceback is saved")
    report(found)


# The helpers above


def test_violations_are_seen():
    both = {"io", "io.files"}
    for source, names in {"import tomat.io.files": {"io.files"}, "from tomat.io import files as f": both,
                          "from ..io import files": both, "from .files import x": {"density.files", "density.files.x"},
                          "def f():\n    from tomat.io.files import x": {"io.files", "io.files.x"}, "import numpy": set()}.items():
        assert imported(ast.parse(source), "density") == names, source

    head = '@app.local_entrypoint()\ndef f(\n    self, x: int,  # a number\n    *y, **z) -> int:\n    """One.\n\n    Two."""\n'
    source = head + '    # why\n\n    return (x +\n            1)\n'
    function = ast.parse(source).body[0]
    assert code_lines(function, source) == 5 and n_parameters(function) == 3
    tokenize = ast.parse("def tokenize(): pass").body[0]
    assert is_command(function, "scripts.x") and is_command(tokenize, "tomat.commands.data")
    assert not is_command(tokenize, "tomat.dataset.shards")

    sources = ("#| export\nx = 1", "y = 2", "import a; a.b(x)", "import a; a.b(y)")
    cells = [{"cell_type": "code", "source": source} for source in sources]
    assert list(needs_of_import_cells(cells)) == [(4, ["y"])]

    for text in ("/home/a/b", "file:///tmp/x", "in /work."):
        assert MACHINE_PATH.search(text), text
    for text in ("gs://b/tmp/x", "work/main", "/worked", "../tmp/x"):
        assert not MACHINE_PATH.search(text), text
