"""Reports in a real browser: they fit a phone and a desk, load nothing, and a checker of accessibility finds no serious fault."""

import json
import re
from dataclasses import replace

import pytest
from browsing import serious, watched
from pymatgen.core import Lattice, Structure
from typer.testing import CliRunner

from tomat.cli import app
from tomat.density.store import sample_store
from tomat.prediction.evaluate import evaluate
from tomat.prediction.page import MOST_BYTES
from tomat.prediction.pictures import material_pictures
from tomat.prediction.predictors import load_predictor
from tomat.prediction.report import report_html, write_report

LONG = "a_very_long_name_of_a_crystal_without_any_place_to_break_it"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    "Scores of two materials by entries with long names."
    store, names = sample_store(), ("probe (a long name of a run, as people give them)", "other")
    out, predictor = tmp_path_factory.mktemp("scores"), load_predictor()
    result = evaluate(store, store.split("validation")[:2], dict.fromkeys(names, predictor), out, material_pictures, drawn=2)
    return replace(result, skipped={"mp-1": "mp-1/label/CHGCAR: line 8 holds 3 numbers, and 5 are expected."})


@pytest.fixture(scope="module")
def pages(evaluation, tmp_path_factory):
    "A report of an evaluation, and one of predictions: of a skewed cell, and of an element that no training data had."
    folder = tmp_path_factory.mktemp("predicted")
    (folder / "cells").mkdir()
    skewed = Structure(Lattice.from_parameters(3.1, 4.2, 5.3, 75, 100, 62), ["Li", "F"], [[0, 0, 0], [0.4, 0.5, 0.6]])
    strange = Structure(Lattice.cubic(3.6), ["Eu", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for name, crystal in ((LONG, skewed), ("EuO", strange)):
        crystal.to(str(folder / "cells" / f"{name}.vasp"), fmt="poscar")
    done = CliRunner().invoke(app, ["predict", str(folder / "cells"), "--grid", "18,20,24", "--out", f"{folder}/out/", "--report",
                                    f"{folder}/predicted.html", "--json"])
    assert not done.exception, done.output
    assert all("html" not in line for line in json.loads(done.stdout)["predicted"])
    return {"evaluation": write_report(evaluation, "A report")[0], "predictions": f"{folder}/predicted.html"}


@pytest.fixture
def opened(browser, pages, request):
    name, width, colours = request.param
    faults = []
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colours) as context:
        page = watched(context, faults)
        page.on("request", lambda asked: None if asked.url.startswith(("data:", "file:")) else faults.append(asked.url))
        page.goto(f"file://{pages[name]}")
        yield page
    assert not faults


VIEWS = [(name, width, colours) for name in ("evaluation", "predictions") for width in (400, 1200) for colours in ("light", "dark")]


@pytest.mark.parametrize("opened", VIEWS, indirect=True, ids=lambda view: "-".join(map(str, view)))
def test_a_report_fits_and_can_be_read_by_all(opened):
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 100)")
    boxes = opened.evaluate("""[...document.querySelectorAll('table, img')].map((e) => {
        const box = e.closest('.scroll') ?? e, r = box.getBoundingClientRect(), s = getComputedStyle(box);
        return [r.left, r.right, box === e || s.overflowX === 'auto' || e.offsetWidth <= r.width]})""")
    assert len(boxes) > 4 and all(left >= 0 and right <= width and reached for left, right, reached in boxes), boxes
    pytest.importorskip("axe_playwright_python")
    assert serious(opened) == []


@pytest.mark.parametrize("opened", [("predictions", 400, "light")], indirect=True, ids=["phone"])
def test_a_wide_table_is_scrolled_by_the_keyboard(opened):
    """The last column comes into view, and the names of the lines stay."""
    box = opened.locator(".scroll").first
    box.focus()
    for _ in range(40):
        opened.keyboard.press("ArrowRight")
    opened.wait_for_function("(e) => e.scrollLeft + e.clientWidth > e.scrollWidth - 3", arg=box.element_handle())
    last, first = box.locator("tbody tr").first.locator("td").last.bounding_box(), box.locator("tbody th").first.bounding_box()
    assert last["x"] + last["width"] <= 400 and 0 <= first["x"] < 40


def test_a_report_of_predictions_says_what_to_think_of_them(pages):
    with open(pages["predictions"], encoding="utf-8") as file:
        page = file.read()
    assert len(page.encode()) < MOST_BYTES / 4 and page.count("<h2>") == 2 and page.count("<img") == 6
    assert page.count('class="warning"') == 1 and "there was no Eu in it" in page and "1 of 2 are unlike" in page
    assert LONG in page and "Expected NMAE" in page and "valence electrons on a grid of 18 × 20 × 24" in page


def test_a_report_is_never_too_large(evaluation):
    """Of many drawn materials, as many are shown as fit, and the page says how many are not."""
    n = 40
    many = replace(evaluation, pictures=evaluation.pictures * n)
    page = report_html("Many", many)
    assert 0.9 * MOST_BYTES < len(page.encode()) < MOST_BYTES
    assert page.count("<h3>") + int(re.search(r"Pictures of (\d+) more", page)[1]) == 2 * n


def test_scores_of_before_have_slices_alone(evaluation, tmp_path):
    """A folder that an earlier version wrote holds pictures/ID.png and no others."""
    (tmp_path / "pictures").mkdir()
    for id in evaluation.pictures:
        with open(f"{evaluation.folder}/pictures/{id}.png", "rb") as old:
            (tmp_path / "pictures" / f"{id}.png").write_bytes(old.read())
    page = report_html("Before", replace(evaluation, folder=str(tmp_path)))
    assert page.count("<h3>") == 2 and page.count("Slices of") == 4  # alt text and name of the box


# ---------------------------------------------------------------- errors before work

@pytest.fixture
def salt(tmp_path):
    Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]).to(str(tmp_path / "POSCAR"), fmt="poscar")
    (tmp_path / "letter.txt").write_text("Dear reader")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "tomat.json").write_text("{ no JSON")
    (tmp_path / "shut").mkdir(mode=0o500)
    return tmp_path


@pytest.mark.parametrize("options, words", [
    (["--out", "x.foo"], "x.foo is of no known format"), (["--out", "letter.txt/CHGCAR"], "letter.txt"),
    (["--out", "CHGCAR", "--report", "x.pdf"], "x.pdf is written as HTML"), (["--out", "CHGCAR", "--picture", "x.jpg"], "x.jpg"),
    (["--out", "CHGCAR", "--expected-error", "y.foo"], "y.foo"),
    (["--out", "CHGCAR", "--report", "letter.txt/r.html"], "letter.txt"),
    (["--out", "x.zarr", "--report", "checkpoint"], "HTML"), (["POSCAR", "--out", "x.cube"], "there are 2 densities"),
    (["--out", "folder/", "--format", "xyz"], "'xyz'"), (["--out", "CHGCAR", "--format", "cube"], "gives its format"),
    (["--out", "POSCAR.vasp", "--template", "POSCAR.vasp"], "would replace it"), (["--out", ""], "no name"),
    (["--out", "CHGCAR", "--zval", "Na"], "Na")], ids=str)
def test_a_wrong_output_fails_before_a_checkpoint_is_read(salt, monkeypatch, options, words):
    """The checkpoint is damaged: an error about it would show that it was read first. Nothing is left behind."""
    monkeypatch.chdir(salt)
    before = sorted(salt.rglob("*"))
    done = CliRunner().invoke(app, ["predict", "POSCAR", "--checkpoint", "checkpoint", *options])
    assert words in str(done.exception) and "checkpoint/" not in str(done.exception) and sorted(salt.rglob("*")) == before


def test_the_damaged_checkpoint_is_found_where_the_outputs_are_right(salt, monkeypatch):
    monkeypatch.chdir(salt)
    done = CliRunner().invoke(app, ["predict", "POSCAR", "--checkpoint", "checkpoint", "--out", "CHGCAR"])
    assert "checkpoint/tomat.json" in str(done.exception)


@pytest.mark.parametrize("change, words", [
    ("element", "no free atom for Tc"), ("grid", "at most"), ("room", "does not fit on its disk"), ("memory", "GB of memory")])
def test_a_crystal_is_refused_before_a_checkpoint_is_read(salt, monkeypatch, change, words):
    monkeypatch.chdir(salt)
    grid = ["--grid", "20,20,20"]
    if change == "element":
        Structure(Lattice.cubic(4), ["Tc"], [[0, 0, 0]]).to("POSCAR", fmt="poscar")
    if change == "grid":
        grid = ["--grid", "400,400,400"]
    if change in ("room", "memory"):
        monkeypatch.setenv("TOMAT_LARGEST_VOXELS", str(10**18))
        Structure(Lattice.cubic(4e4), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]).to("POSCAR", fmt="poscar")
        grid = ["--grid", "400000,400000,400000"]
    if change == "room":  # memory without end, as on a system that does not tell
        monkeypatch.setattr("tomat.prediction.outputs.available_memory", lambda: None)
    done = CliRunner().invoke(app, ["predict", "POSCAR", "--checkpoint", "checkpoint", "--out", "CHGCAR", *grid])
    assert words in str(done.exception) and "tomat.json" not in str(done.exception) and not (salt / "CHGCAR").exists()


def test_elements_are_those_of_the_checkpoint(salt, monkeypatch):
    """The checkpoint's own atoms decide, before its weights are read."""
    monkeypatch.chdir(salt)
    from tomat.atoms.sad import FreeAtoms, packaged_atoms, save_atoms
    save_atoms(FreeAtoms({"Na": packaged_atoms()["Na"]}, "one"), salt / "checkpoint" / "atoms.json")
    done = CliRunner().invoke(app, ["predict", "POSCAR", "--checkpoint", "checkpoint", "--out", "CHGCAR"])
    assert "no free atom for Cl" in str(done.exception) and "the atoms of checkpoint" in str(done.exception)


def test_evaluate_looks_at_its_folder_first(salt, monkeypatch):
    monkeypatch.chdir(salt)
    for out in ("letter.txt", "letter.txt/scores"):
        done = CliRunner().invoke(app, ["evaluate", "letter.txt", "--checkpoint", "checkpoint", "--out", out])
        assert str(done.exception).startswith(("letter.txt is a file: give the name of a folder", "letter.txt/scores"))


