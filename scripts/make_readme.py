"""Write README.md from nbs/index.ipynb, without Quarto; --check only says whether it is up to date.

Markdown cells are taken as they stand, their relative links rewritten for the root folder; code cells become fenced
Python, printed outputs fenced text, and saved pictures the files nbs/images/readme-N.png. nbdev's directives
(hide, echo, output, export, hide_line, filter_stream) mean what they mean on the site.
"""

from __future__ import annotations

import argparse
import base64
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_export, rm_header_dash, strip_ansi

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "<!-- Written by `make readme` from nbs/index.ipynb: edit the notebook, not this file. -->"
# [text](target), ![text](target) and src="target"
LINK = re.compile(r'(?P<open>\]\(|\bsrc=")(?P<target>[^)\s"]+)')
FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[ \t]*$)", re.MULTILINE | re.DOTALL)


def from_root(link: re.Match[str]) -> str:
    "A link relative to nbs/ as a link relative to the root; addresses and anchors stay."
    target = link["target"]
    if re.match(r"[a-z][a-z0-9+.-]*:|#|/", target, re.IGNORECASE):
        return link[0]
    path, mark, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join("nbs", path))
    if not (ROOT / path).exists():
        raise SystemExit(f"nbs/index.ipynb links to {target}, which does not exist: fix the link.")
    return f"{link['open']}{path}{mark}{anchor}"


def markdown(source: str) -> str:
    "Links are rewritten outside fenced code only."
    parts = FENCE.split(source)
    return "".join(part if i % 2 else LINK.sub(from_root, part) for i, part in enumerate(parts)).strip()


def fenced(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def output(out: dict[str, Any], pictures: list[bytes], alt: str) -> str:
    "One output as markdown; a picture is added to `pictures`."
    if out["output_type"] == "error":
        raise SystemExit("nbs/index.ipynb holds a saved traceback: run it again before writing the README.")
    data = out.get("data", {})
    if "image/png" in data:
        pictures.append(base64.b64decode(joined(data["image/png"])))
        return f"![{alt}](nbs/images/readme-{len(pictures)}.png)"
    if "text/markdown" in data:
        return markdown(joined(data["text/markdown"]))
    text = joined(out.get("text", data.get("text/plain", "")))
    return fenced(text, "text") if text.strip() and out.get("name") != "stderr" else ""


def code(cell: Any, pictures: list[bytes]) -> list[str]:
    options = cell.directives_
    if options.get("include") == "false":
        return []
    cell.remove_directives()
    source = cell.source.strip()
    shown = [fenced(source, "python")] if source and options.get("echo") != "false" else []
    if options.get("output") == "false":
        return shown
    alt = options.get("fig-alt") or options.get("fig-cap") or ""
    outputs = [output(out, pictures, alt.strip("\"'")) for out in cell.get("outputs", [])]
    return shown + [text for text in outputs if text]


def readme(notebook: Path) -> dict[Path, bytes]:
    "The README and its pictures, by path."
    procs = [strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, hide_, clean_magics]
    cells = NBProcessor(notebook, procs, rm_directives=False, process=True).nb.cells
    pictures: list[bytes] = []
    blocks = [NOTICE]
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.remove_directives()
            blocks.append(markdown(cell.source))
        elif cell.cell_type == "code":
            blocks += code(cell, pictures)
    files = {ROOT / "nbs/images" / f"readme-{n}.png": picture for n, picture in enumerate(pictures, 1)}
    return files | {ROOT / "README.md": ("\n\n".join(block for block in blocks if block) + "\n").encode()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write README.md from nbs/index.ipynb.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md or a picture is stale")
    check = parser.parse_args().check
    os.chdir(ROOT)
    if not Path("nbs/index.ipynb").exists():
        raise SystemExit("There is no nbs/index.ipynb, from which README.md is written.")
    files = readme(ROOT / "nbs/index.ipynb")
    spare = [path for path in (ROOT / "nbs/images").glob("readme-*.png") if path not in files]
    stale = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    if check and stale + spare:
        names = ", ".join(str(path.relative_to(ROOT)) for path in sorted(stale + spare))
        print(f"stale: {names}; run `make readme` and commit what it changes")
        return 1
    if not check:
        for path in spare:
            path.unlink()
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(files[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
