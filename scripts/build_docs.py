"""Write the site to _docs/ from nbs/, results/ and the sources; with Quarto where it is installed, else with smalldocs.

    python scripts/build_docs.py [--out _docs] [--without-viewer] [--serve PORT]

Notebooks are shown with the outputs that were saved in them; nothing is run but the packaged network, for the density viewer.
The site needs no network: maths become MathML, and one plotly.js serves all pages.
"""

from __future__ import annotations

import argparse
import ast
import base64
import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import yaml
from api_pages import Module, index_page, modules_of, package_page
from latex2mathml.converter import convert
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(__file__).resolve().parent / "site"
PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")
FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[ \t]*$)", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"(?<![\[`\w])`(\w+)`(?![\]`])")
MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.DOTALL)
CDN = re.compile(r'<(?:link|script)[^>]*https?://[^>]*(?:katex|mathjax|polyfill)[^>]*>(?:</script>)?', re.IGNORECASE)


# ---------------------------------------------------------------- notebooks


def links_of(modules: list[Module]) -> dict[str, str]:
    "Public names that only one module has → their address below api/."
    counts = Counter(name for module in modules for name in module.names)
    return {name: f"{module.page}.md#{module.anchor(name)}" for module in modules for name in module.names
            if counts[name] == 1 and len(name) > 3}


def linked(text: str, links: dict[str, str], up: str) -> str:
    "Markdown in which names in backticks lead to the API; code blocks, links and headings stay."
    def link(match: re.Match[str]) -> str:
        return f"[`{match[1]}`]({up}api/{links[match[1]]})" if match[1] in links else match[0]
    def prose(part: str) -> str:
        return "\n".join(line if line.startswith(("#", "    ")) else NAME.sub(link, line) for line in part.split("\n"))
    return "".join(part if i % 2 else prose(part) for i, part in enumerate(FENCE.split(text)))


def outside(text: str, path: Path, folder: Path, up: str) -> str:
    "Markdown whose links to texts beside nbs/, such as a model card, lead to copies of them on the site."
    def link(match: re.Match[str]) -> str:
        target = (path.parent / match[1]).resolve()
        if not target.is_file() or target.is_relative_to(ROOT / "nbs"):
            return match[0]
        name = target.name.replace("README", "about")  # smalldocs passes READMEs over
        there = folder / "repo" / target.relative_to(ROOT).with_name(name)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, there)
        return f"]({up}{there.relative_to(folder).as_posix()}"
    return re.sub(r"\]\((\.\./[^)#\s]+\.md)", link, text)


def defined(source: str) -> list[str]:
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def staged(path: Path, folder: Path, modules: dict[str, Module], links: dict[str, str]) -> dict[str, Any]:
    "A notebook as the site shows it: no hidden cells, a heading before each definition, imports folded."
    name = path.relative_to(ROOT / "nbs").as_posix()
    up = "../" * name.count("/")
    procs = [strip_ansi, hide_line, filter_stream_, rm_header_dash, hide_, clean_magics]
    notebook = NBProcessor(path, procs, rm_directives="quarto", process=True).nb
    cells: list[dict[str, Any]] = []
    for cell in notebook.cells:
        options, plain = cell.get("directives_") or {}, {k: v for k, v in cell.items() if not k.endswith("_") and k != "metadata"}
        plain["metadata"] = {}
        if cell.cell_type == "markdown":
            plain["source"] = outside(linked(cell.source, links, up), path, folder, up)
        elif "default_exp" in options or not cell.source.strip():
            continue
        elif "export" in options:
            known = [d for d in defined(cell.source) if name in modules and d in modules[name].names]
            heads = [f"[`{d}`]({up}api/{modules[name].page}.md#{modules[name].anchor(d)}){{#def-{d} .definition}}" for d in known]
            if heads:
                cells.append({"cell_type": "markdown", "metadata": {}, "id": f"d{len(cells)}", "source": " ".join(heads)})
            elif all(isinstance(node, ast.Import | ast.ImportFrom | ast.If) for node in ast.parse(cell.source).body):
                plain["source"] = f'#| code-fold: true\n#| code-summary: "imports"\n{cell.source}'
        elif name.startswith("results/") and "\n" in cell.source:  # results come first, and how they were drawn on request
            plain["source"] = f'#| code-fold: true\n#| code-summary: "code"\n{cell.source}'
        cells.append(plain)
    return {"cells": cells, "metadata": {"kernelspec": notebook.metadata.get("kernelspec", {})}, "nbformat": 4, "nbformat_minor": 5}


def titled(notebook: dict[str, Any]) -> str:
    "Move the first cell's title to the front matter, where renderers look for it; returns it."
    first = notebook["cells"][0]
    match = re.match(r"# (.+)\n+> (.+)\n*", first["source"])
    if not match:
        raise SystemExit(f"A notebook begins with {first['source'][:40]!r}: begin it with `# Title` and `> claim`.")
    wide = "\npage-layout: full\ntoc: false" if any("data-dashboard" in cell["source"] for cell in notebook["cells"]) else ""
    front = f"---\ntitle: {json.dumps(match[1].strip(), ensure_ascii=False)}{wide}\n---"
    notebook["cells"].insert(0, {"cell_type": "raw", "metadata": {}, "id": "front", "source": front})
    first["source"] = f"[{match[2].strip()}]{{.claim}}\n\n" + first["source"][match.end():]
    return match[1].strip()


def stage(folder: Path) -> None:
    "Everything that a renderer reads."
    every = modules_of(ROOT / "tomat")
    by_notebook, links = {module.notebook: module for module in every}, links_of(every)
    settings = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    settings["project"]["output-dir"] = "_docs"
    (folder / "_quarto.yml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    titles = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        name = path.relative_to(ROOT / "nbs").as_posix()
        page = staged(path, folder, by_notebook, links)
        titles[name] = titled(page)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(page, ensure_ascii=False), encoding="utf-8")
    (folder / "api").mkdir()
    (folder / "api" / "index.md").write_text(index_page(every), encoding="utf-8")
    for part in dict.fromkeys(module.page for module in every):
        text = package_page(part, [module for module in every if module.page == part], titles)
        (folder / "api" / f"{part}.md").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- rendering


def render(folder: Path) -> Path:
    "The rendered pages, not yet finished."
    if quarto := shutil.which("quarto"):
        subprocess.run([quarto, "render", str(folder)], check=True)
    else:
        from smalldocs.site import build
        warnings = {warning.partition(": ")[2]: warning for warning in reversed(build(folder, quiet=True).warnings)}  # each once
        for warning in warnings.values():
            if "is ignored" not in warning:  # settings for Quarto alone
                print(f"warning: {warning}", file=sys.stderr)
    return folder / "_docs"


def mathml(page: str) -> str:
    "LaTeX in a page as MathML, which browsers show without a script."
    return MATH.sub(lambda match: convert(unescape(match[2]), display="block" if match[1] == "display" else "inline"), page)


def smaller(match: re.Match[str]) -> str:
    "A PNG in base64 as WebP with 256 colours, if that is smaller: a plot of matplotlib has few, and takes a third of the space."
    image, out = Image.open(io.BytesIO(base64.b64decode(match[1]))).convert("RGB"), io.BytesIO()
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE).convert("RGB")
    few.save(out, "webp", lossless=True, quality=60, method=3)
    return min(f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}", match[0], key=len)


PLAIN = re.compile(r'<span class="(?:op|dv)">([^<]*)</span>')
TWINS = re.compile(r'(<span class="(\w+)">[^<]*)</span><span class="\2">')


def joined(page: str) -> str:
    "A page whose code has no marks of operators and numbers, a twentieth of the site, and no two neighbouring ones of one kind."
    page = PLAIN.sub(r"\1", page)
    return TWINS.sub(r"\1", TWINS.sub(r"\1", page))


def finished(page: str, up: str) -> str:
    "A page with the site's own style and scripts, and without anything from a network."
    page = PNG.sub(smaller, CDN.sub("", mathml(joined(page))))
    head = f'<link rel="stylesheet" href="{up}site/site.css"><link rel="icon" href="{up}site/icon.svg" type="image/svg+xml">'
    if "data-dashboard" in page:
        head += f'<script src="{up}site/plotly.min.js" defer></script><script src="{up}site/dashboard.js" type="module"></script>'
    scrolls = re.compile(r'<(pre|table|math(?=[^>]*display="block"))\b(?![^>]*tabindex)')
    page = scrolls.sub(r'<\1 tabindex="0"', page)  # with keys too
    return page.replace("</head>", head + "</head>", 1)


LEAF = re.compile(r'<li class="sidebar-item"><div class="sidebar-item-container">(<a href="[^"]*" class="sidebar-link[^>]*>'
                  r'[^<]*</a>)</div></li>')
ENTRY = re.compile(r'class="sidebar-item-text (sidebar-link(?: active)?)"([^>]*)><span class="menu-text">(.*?)</span>')


def shorter(page: str) -> str:
    "A page whose sidebar has no marks that no style uses: every page holds an entry for every other one."
    return LEAF.sub(r'<li class="sidebar-item">\1</li>', ENTRY.sub(r'class="\1"\2>\3', page))


def shorter_index(path: Path) -> None:
    "Shorten the texts of the API in the index of the search, which are found by their titles."
    entries = json.loads(path.read_text(encoding="utf-8"))
    for entry in entries:
        if entry["href"].startswith("api/"):
            entry["text"] = entry["text"][:160]
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def finish(site: Path) -> None:
    plain = not any("sidebar-item-text" in path.read_text(encoding="utf-8") for path in site.rglob("*.css"))  # not of Quarto
    for path in site.rglob("*.css"):  # themes ask a server for their letters: the reader's own do as well
        path.write_text(re.sub(r"@import\s+url\(['\"]?https?:[^)]*\);?", "", path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in site.rglob("*.html"):
        up = "../" * (len(path.relative_to(site).parts) - 1)
        page = finished(path.read_text(encoding="utf-8"), up)
        path.write_text(shorter(page) if plain else page, encoding="utf-8")
    if plain:
        shorter_index(site / "search.json")
    shutil.copytree(ASSETS, site / "site", dirs_exist_ok=True)
    import plotly
    shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", site / "site")


def build(out: Path, viewer: bool = True) -> None:
    "The whole site; `out` is replaced once everything is written."
    with tempfile.TemporaryDirectory(prefix="tomat-docs-") as name:
        folder = Path(name) / "pages"
        folder.mkdir()
        stage(folder)
        site = render(folder)
        finish(site)
        from tomat.study.site import write_data
        write_data(ROOT / "results", site / "site" / "data", viewer=viewer)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(site, out)


def serve(folder: Path, port: int) -> None:
    "Show the site on this computer until Ctrl-C."
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site; replaced")
    parser.add_argument("--without-viewer", action="store_true", help="leave out the predictions of the density viewer")
    parser.add_argument("--serve", type=int, metavar="PORT", help="then show it on this port")
    args = parser.parse_args()
    os.chdir(ROOT)
    build(args.out, not args.without_viewer)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {len(list(args.out.rglob('*.html')))} pages, {size / 1e6:.1f} MB")
    if args.serve is not None:
        serve(args.out, args.serve)


if __name__ == "__main__":
    main()
