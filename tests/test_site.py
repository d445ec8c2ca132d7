"""The site: built once, then read as files, and in a browser where Chromium is installed."""

import ast
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}

sys.path.insert(0, str(ROOT / "scripts"))
from api_pages import modules_of
from browsing import serious, watched

pytest.importorskip("smalldocs")


class Page(HTMLParser):
    "What a page links to, what it loads, its anchors and its pictures."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.no_alt: list[str] = []
        self.title = ""
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self._in_title = self._in_title or tag == "title"
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if LOADED.get(tag) in found and found.get("rel") != "canonical":
            self.loads.append(found[LOADED[tag]])
        if tag == "img" and not (found.get("alt") or "").strip():
            self.no_alt.append(found.get("src", "")[:60])

    def handle_data(self, data):
        if self._in_title:
            self.title, self._in_title = data, False


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "docs"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "build_docs.py"), "--out", str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def place(page: str, target: str) -> tuple[str, str]:
    "The file below the site, and the anchor, that a link on a page leads to."
    parts = urlsplit(target)
    path = os.path.normpath(os.path.join(os.path.dirname(page), unquote(parts.path))) if parts.path else page
    return path + ("/index.html" if parts.path.endswith("/") or path == "." else ""), unquote(parts.fragment)


def test_links_lead_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme or link in ("", "#"):
                continue
            path, anchor = place(name, link)
            known = pages.get(path.removeprefix("./"))
            if not (site / path).exists() or (anchor and known and anchor not in known.ids):
                broken.append(f"{name} -> {link}")
    assert not broken, "\n".join(sorted(set(broken))[:40])


def test_nothing_is_loaded_from_a_network(site, pages):
    assert not [f"{name}: {load}" for name, page in pages.items() for load in page.loads if re.match(r"(https?:)?//", load)]
    remote = re.compile(r"(?:@import|url\()\s*['\"(]*https?:")
    assert not [path.name for path in site.rglob("*.css") if remote.search(path.read_text(encoding="utf-8"))]


def test_what_pages_load_is_there(site, pages):
    missing = [f"{name}: {load}" for name, page in pages.items() for load in page.loads
               if not load.startswith("data:") and not (site / place(name, load)[0]).exists()]
    assert not missing


def test_pictures_have_alternative_texts(pages):
    bare = {name: len(page.no_alt) for name, page in pages.items() if page.no_alt}
    assert not bare


def test_the_site_is_small(site):
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 25e6
    assert len(list(site.rglob("plotly*.js"))) == 1


def test_every_public_name_has_its_place(pages):
    found = modules_of(ROOT / "tomat")
    missing = {module.name: lost for module in found
               if (lost := {*map(module.anchor, module.names)} - pages[f"api/{module.page}.html"].ids)}
    assert len(found) > 50 and not missing


def test_every_notebook_is_a_page(pages):
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        assert path.relative_to(ROOT / "nbs").with_suffix(".html").as_posix() in pages


def test_parameters_come_with_shapes_and_units(site):
    text = (site / "api" / "density.html").read_text(encoding="utf-8")
    assert "(nx, ny, nz) any scalar field on a grid" in text and "vmin, vmax and cmap" in text
    assert "density × cell volume, electrons" in text and 'href="../01_density/01_core.html#def-Density"' in text


def shown_markdown(notebook: Path):
    "What the cells of a notebook that show nothing but their output put on the page, computed anew from the results."
    names: dict = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"#\| (hide|echo: false)", source):
            *before, last = ast.parse(source).body
            exec(compile(ast.Module(before, []), notebook.name, "exec"), names)
            if not isinstance(last, ast.Expr):
                exec(compile(ast.Module([last], []), notebook.name, "exec"), names)
            elif hasattr(value := eval(compile(ast.Expression(last.value), notebook.name, "eval"), names), "_repr_markdown_"):
                yield value._repr_markdown_()


def test_numbers_of_the_readme_are_those_of_the_results(monkeypatch):
    monkeypatch.chdir(ROOT / "nbs")
    shown = [line for text in shown_markdown(ROOT / "nbs" / "index.ipynb") for line in text.splitlines() if "%" in line]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) > 3 and not [line for line in shown if line not in readme]


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def open_page(page, url: str) -> None:
    "Go there, and wait until its plots are drawn."
    page.goto(url)
    if page.locator("[data-dashboard]").count():
        page.wait_for_selector("[data-ready]", timeout=60_000)


def test_every_page_opens(site, pages, address, browser):
    faults, wide = [], []
    with browser.new_context(viewport={"width": 400, "height": 800}) as context:
        page = watched(context, faults)
        for name in pages:
            open_page(page, f"{address}/{name}")
            if (width := page.evaluate("document.documentElement.scrollWidth")) > 400:
                wide.append(f"{name}: {width} px")
            broken = page.evaluate("[...document.images].filter((i) => i.complete && !i.naturalWidth).length")
            faults += [f"{name}: {broken} broken pictures"] * bool(broken)
    assert not faults, "\n".join(faults[:20])
    assert not wide


LOOKED_AT = ["index.html", "tutorial.html", "api/density.html", "03_tokens/01_codecs.html", "results/fidelity.html",
             "howto/row_format.html",
             *(f"dashboard/{name}.html" for name in ("densities", "fidelity", "training", "evaluation"))]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_no_serious_fault(address, browser, colours):
    pytest.importorskip("axe_playwright_python")
    faults, found = [], {}
    with browser.new_context(color_scheme=colours) as context:
        page = watched(context, faults)
        for name in LOOKED_AT:
            open_page(page, f"{address}/{name}")
            if bad := serious(page):
                found[name] = bad
    assert not faults and not found, json.dumps(found, indent=1, ensure_ascii=False)


def test_the_viewer_answers(address, browser):
    faults = []
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        page = watched(context, faults)
        open_page(page, f"{address}/dashboard/densities.html")
        said = page.locator(".said").inner_text()
        page.get_by_label("material").select_option(label=page.locator("option", has_text="TiO").inner_text())
        page.wait_for_function("(old) => document.querySelector('.said').textContent !== old", arg=said)
        assert "TiO" in page.locator(".said").inner_text() and "18 valence electrons" in page.locator(".said").inner_text()
        heading = page.locator(".tokens h2")
        before = heading.inner_text()
        page.locator(".slice").first.hover(position={"x": 180, "y": 150})
        page.wait_for_function("(old) => document.querySelector('.tokens h2').textContent !== old", arg=before)
        row = page.locator(".tokens pre").inner_text()
        assert row.startswith("[BOS]\n[GRID_START] 32 32 32 [GRID_END]\n[LATTICE_START]") and row.endswith("[DENS_END]\n[EOS]")
        assert re.fullmatch(r"d\d+ d\d+", page.locator(".tokens mark").inner_text())
        for label, value in (("surface of", "difference"), ("across", "0")):
            page.get_by_label(label, exact=True).select_option(value)
        for label, value in (("slice", "7"), ("surface at", "0.6")):
            page.get_by_label(label, exact=True).fill(value)
        assert "a = 7 of 32" in page.locator("output").all_inner_texts() and "(7," in heading.inner_text()
        meshes = page.evaluate("document.querySelector('.space').data.filter((t) => t.type === 'mesh3d').map((t) => t.i.length)")
        assert len(meshes) == 2 and min(meshes) > 100
    assert not faults


def test_colours_and_search(address, browser):
    faults = []
    with browser.new_context(color_scheme="light") as context:
        page = watched(context, faults)
        open_page(page, f"{address}/dashboard/evaluation.html")
        colour = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(colour)
        page.locator(".quarto-color-scheme-toggle:visible").first.click()
        page.wait_for_function(f"(old) => {colour} !== old", arg=light)
        page.wait_for_function("document.querySelector('.plot .xtick text').style.fill === 'rgb(222, 226, 230)'")
        search = page.locator("input[type=search]:visible, input[placeholder=Search]:visible").first
        search.fill("superposition of atomic densities")
        page.wait_for_selector("a:visible[href*=sad]")
    assert not faults
