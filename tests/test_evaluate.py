"""Scores worked out by hand, entries that say what they read, runs that go on where they stopped, and a report of its own."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.data import covalent_radii
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from small_models import attentive_model

import tomat.prediction.evaluate
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.levels import fit_levels
from tomat.prediction.decoding import DecodingStrategy
from tomat.density.core import RHO, Density
from tomat.prediction.causal import codec_floor, teacher_forced
from tomat.prediction.evaluate import copied, entries_of, evaluate, sad_prediction, score_material
from tomat.io.remote import TomatError
from tomat.atoms.hirshfeld import charge_error
from tomat.density.metrics import nmae, potential_error
from tomat.tokens.patches import cover, cut
from tomat.prediction.causal import CausalPredictor
from tomat.prediction.core import Prediction
from tomat.atoms.sad import FreeAtom, FreeAtoms, sad_density
from tomat.prediction.pictures import material_pictures, slices_png
from tomat.prediction.report import evaluation_summary, report_html, reliability_png, scores_csv, write_report
from tomat.prediction.scores import REGIONS, ERROR_BINS, miscalibration, nemd, regions, reliability, score, seam
from tomat.density.source import InMemory
from tomat.density.store import RawStore, write_store
from tomat.tokens.tokenizer import Tokenizer

quick = settings(derandomize=True, deadline=None, max_examples=25)
SIGNED = np.random.default_rng(7).lognormal(0, 1, 5000) * np.where(np.arange(5000) % 2, 1, -1)


pytestmark = pytest.mark.usefixtures("one_thread")


def material(seed, id="", shape=(6, 7, 8), elements=("Na", "Cl")):
    "Free atoms with some charge moved about, so that the electrons are right."
    rng = np.random.default_rng(seed)
    structure = Structure(Lattice.from_parameters(*rng.uniform(4, 5, 3), 80, 95, 105), elements, [[0.1, 0, 0], [0.55, 0.5, 0.45]])
    sad_xyz = sad_density(structure, shape)
    moved = rng.normal(0, 0.3, shape)
    return Density((sad_xyz + moved - moved.mean()).astype(np.float32), structure, id or f"m-{seed}", sad=sad_xyz)


@cache
def causal(target="difference", strategy="", two=False, unit="electrons"):
    "A predictor with an attentive model."
    codec = PUBLISHED_DENSITY if two else fit_levels(SIGNED / (80 if unit == RHO else 1), 64)
    tokenizer = Tokenizer("framed", codec, patch_size=3, pad_to=None, target=target, unit=unit)
    return CausalPredictor(attentive_model(tokenizer), tokenizer, strategy, rescale=False)


class Halfway:
    "A predictor that is wrong by a known share, and knows it."

    def __init__(self, share=0.5, calls=None):
        self.share, self.calls = share, calls if calls is not None else []

    def predict(self, structure, shape, show=False):
        self.calls.append(structure)
        total = sad_density(structure, shape) * (1 + self.share)
        return Prediction(Density(total.astype(np.float32), structure), np.full(shape, 0.01, np.float32), float(total.mean()))

    def identity(self):
        return {"share": self.share}


# Where


def test_regions_are_distances_in_radii():
    """Against every atom and image, one voxel after the other."""
    d = material(1)
    where, cell = regions(d.structure, d.shape), d.structure.lattice
    for index in [(0, 0, 0), (3, 3, 3), (5, 1, 7), (2, 6, 4), (1, 0, 0), (4, 4, 4)]:
        place = np.divide(index, d.shape)
        near = min(cell.get_distance_and_image(place, site.frac_coords)[0] / covalent_radii[site.specie.Z] for site in d.structure)
        assert where[index] == (0 if near < 0.5 else 1 if near < REGIONS["bonds"] else 2), near
    assert set(np.unique(where)) == {0, 1, 2}


@quick
@given(st.integers(0, 99), st.tuples(*[st.integers(-9, 9)] * 3))
def test_regions_move_with_the_atoms(seed, steps):
    d = material(seed)
    moved = d.rolled(steps)
    assert (regions(moved.structure, d.shape) != np.roll(regions(d.structure, d.shape), steps, (0, 1, 2))).mean() < 0.01  # rounding


def test_a_tiny_cell_sees_many_images():
    assert (regions(Structure(Lattice.cubic(0.6), ["Cs"], [[0, 0, 0]]), (4, 4, 4)) == 0).all()


# Whether the model knew


@quick
@given(st.integers(0, 999), st.floats(0.3, 3))
def test_calibration(seed, factor):
    rng = np.random.default_rng(seed)
    expected = rng.lognormal(-3, 1, (20, 20, 20))
    error = abs(rng.laplace(0, expected))
    found = miscalibration(reliability(factor * expected, error))
    assert found == pytest.approx(abs(factor - 1), abs=0.1 * max(1, factor))
    sums = np.array(reliability(expected, error))
    assert sums.shape == (len(ERROR_BINS) + 1, 3) and sums[:, 0].sum() == expected.size
    assert sums[:, 2].sum() == pytest.approx(error.sum())


def test_reliability_of_extremes():
    expected, error = np.array([[[0.0, 1e9, 1e-5]]]), np.array([[[1.0, 2.0, 3.0]]])
    sums = np.array(reliability(expected, error))
    assert sums[0].tolist() == [1, 0, 1] and sums[-1].tolist() == [1, 1e9, 2]
    assert miscalibration(reliability(np.zeros((2, 2, 2)), np.zeros((2, 2, 2)))) == 0


@quick
@given(st.floats(0, 3), st.floats(0.02, 3))
def test_nemd_is_the_expected_error_of_a_draw(error, expected):
    """By quadrature over the Laplace distribution."""
    ones = np.ones((1, 1, 1))
    x = np.linspace(-60, 60, 400_001)
    wanted = (abs(x - error) * np.exp(-abs(x) / expected) / (2 * expected)).sum() * (x[1] - x[0])
    found = nemd(expected * ones, error * ones, ones)
    assert nemd(0 * ones, error * ones, ones) == pytest.approx(error, abs=1e-9)
    assert found == pytest.approx(wanted, abs=2e-3) and found >= error - 1e-12


# A score


def test_a_score_by_hand():
    """Three voxels' worth of error in a cell of one e/Å³."""
    structure = Structure(Lattice.cubic(2), ["Li"], [[0, 0, 0]])
    true = Density(np.full((2, 2, 2), 8.0), structure, "one")
    off = np.zeros((2, 2, 2))
    off[0, 0, 0], off[1, 1, 1] = 0.4, -0.8  # e/Å³
    where = np.full((2, 2, 2), 1, np.int8)
    where[0, 0, 0] = 0
    found = score(true, Prediction(Density(8 * (1 + off), structure), None, 9.0), "x", "structure", where, 1.5)
    assert found.nmae == pytest.approx(1.2 / 8) and found.rmse == pytest.approx(np.sqrt((0.16 + 0.64) / 8))
    assert (found.error_nuclei, found.error_bonds, found.error_interstitial) == (pytest.approx(0.4), pytest.approx(0.8 / 7), None)
    assert found.electron_error == pytest.approx(1.0) and found.kind == "intermetallic" and found.seconds == 1.5
    assert found.nemd is found.rank_correlation is found.miscalibration is found.reliability is found.seam is None
    assert found.potential_error == pytest.approx(potential_error(8 * (1 + off), np.full((2, 2, 2), 8.0), 2 * np.eye(3)))
    assert found.charge_error is None  # a density without its SAD


def test_the_charges_of_a_score_are_those_of_its_atoms():
    "Of the SAD that the density came with, in either unit, and of other atoms where the predictor has others."
    true = material(1, shape=(18, 20, 22))
    where = regions(true.structure, true.shape)
    found, rho = (score(d, sad_prediction(d), "SAD", "structure", where) for d in (true, true.as_units(RHO)))
    own = charge_error(true.sad, true.total, true.sad, true.structure)
    assert (found.charge_error, rho.charge_error) == (pytest.approx(own, rel=1e-2),) * 2 and own > 1e-4
    assert rho.potential_error == pytest.approx(found.potential_error, rel=1e-3) and found.potential_error > 1
    r = np.arange(0, 5, 0.05)
    wide = FreeAtoms({s: FreeAtom.of(s, 7, 0.05, 7 * np.exp(-r**2 / 2) / (2 * np.pi) ** 1.5) for s in ("Na", "Cl")}, "wide")
    other, _ = score_material(true, {"SAD": ("structure", sad_prediction)}, wide)
    sad_xyz = sad_density(true.structure, true.shape, wide)
    assert other[0].charge_error == pytest.approx(charge_error(sad_xyz, true.total, sad_xyz, true.structure, wide), rel=1e-3)


@pytest.mark.parametrize("sign, rank", [(1, 1), (-1, -1)])
def test_rank_correlation(sign, rank):
    true = material(1)
    rng = np.random.default_rng(0)
    off = rng.permutation(true.values.size).reshape(true.shape) / 100
    prediction = Prediction(Density(true.total + off, true.structure), np.exp(sign * off), 1.0)
    found = score(true, prediction, "x", "structure", regions(true.structure, true.shape))
    assert found.rank_correlation == pytest.approx(rank, abs=1e-3)


def test_seams():
    step = np.zeros((6, 6, 6))
    step[3:] = 1
    borders = (np.array([0, 3]), np.array([0]), np.array([], int))
    assert seam(step, borders) is None  # nothing jumps inside
    noise = np.random.default_rng(0).normal(0, 0.1, (6, 6, 6))
    assert seam(step + noise, borders) > 3 and 0.7 < seam(noise, borders) < 1.4
    assert seam(noise, (np.arange(6),) * 3) is None and seam(noise, (np.array([], int),) * 3) is None


def test_units_of_the_truth_do_not_change_a_score():
    true = material(2)
    entries = entries_of({"causal": causal(), "half": Halfway()})
    one, other = (score_material(t, entries)[0] for t in (true, true.as_units(RHO)))
    for a, b in zip(one, other, strict=True):
        assert a.nmae == pytest.approx(b.nmae, rel=1e-4, abs=1e-9) and a.rmse == pytest.approx(b.rmse, rel=1e-4, abs=1e-9), a.entry


# What reads the truth


def test_the_free_atoms_and_the_copy_by_hand():
    true = material(3)
    assert nmae(sad_prediction(true).density.total, true.total) == pytest.approx(nmae(true.sad, true.total), rel=1e-5)
    wanted = true.sad[1, 2, 3] + (true.total - true.sad)[1, 2, 2]
    assert copied(true).density.total[1, 2, 3] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(TomatError, match="SAD"):
        sad_prediction(replace(true, sad=None))


@pytest.mark.parametrize("options", [{"target": "difference"}, {"target": "total"}, {"target": "total", "two": True},
                                     {"target": "difference", "unit": RHO}])
def test_the_floor_is_that_of_perfect_tokens(options):
    """Written as rows, read back row by row."""
    true, predictor = material(3, shape=(6, 6, 6)), causal(**options)
    tokenizer = predictor.tokenizer
    offsets = cover(true.shape, tokenizer.size)
    rows = tokenizer.encode(true, offsets)[0]
    unit = true.volume if tokenizer.unit == RHO else 1
    sad_xyz = true.sad if tokenizer.target == "difference" else np.zeros(true.shape)
    floor = codec_floor(true, predictor).density.total
    for row, patch, free in zip(rows, cut(floor, offsets, 3), cut(sad_xyz, offsets, 3), strict=True):
        np.testing.assert_allclose(tokenizer.decode(row).values * unit + free, patch, rtol=1e-4, atol=1e-3)
    assert nmae(floor, true.total) > 0


@pytest.mark.parametrize("options", [{}, {"strategy": "argmax"}, {"strategy": "mean"}, {"target": "total", "two": True}])
def test_teacher_forcing_shows_the_true_voxels_before_and_no_other(options):
    """Each voxel is what the model says when it reads the true row up to there, one row at a time."""
    true, predictor = material(4, shape=(3, 3, 6)), causal(**options)
    tokenizer, model = predictor.tokenizer, predictor.model
    sad_xyz = true.sad if tokenizer.target == "difference" else np.zeros(true.shape)
    found = teacher_forced(true, predictor)
    rows = torch.from_numpy(tokenizer.encode(true, [(0, 0, 0), (0, 0, 3)])[0]).long()
    start, k = rows.shape[1] - 2 - tokenizer.n_density_tokens, tokenizer.density_codec.tokens_per_value
    choose = DecodingStrategy(tokenizer, predictor.strategy, torch.device("cpu"))
    for row, offset in zip(rows, (0, 3), strict=True):
        for voxel in (0, 1, 13, 26):
            ids, value = [], None
            for token in range(voxel * k, voxel * k + k):
                low, high = tokenizer.legal_ids(token)
                with torch.inference_mode():
                    written = choose(model(row[None, :start + token]).logits[:, -1, low:high], low)
                ids.append(written.ids_N[0] - tokenizer.vocab.blocks["density"].start)
                value = None if written.means_N is None else written.means_N[0]
            value = tokenizer.density_codec.decode_ids(np.array([ids]))[0] if value is None else value
            x, y, z = np.unravel_index(voxel, (3, 3, 3))
            place = (x, y, z + offset)
            assert found.density.total[place] - sad_xyz[place] == pytest.approx(value, rel=1e-3, abs=2e-3)
            if written.expected_error_N is not None:
                assert found.expected_error_xyz[place] * true.volume == pytest.approx(written.expected_error_N[0], rel=1e-3)


def test_every_entry_says_what_it_reads():
    """With NaN as the truth, what reads the structure alone gives the same bits, and the rest gives no density."""
    true = material(5)
    blind = Density(true.values.copy(), true.structure, true.id, sad=true.sad.copy())
    blind.values[:] = np.nan
    entries = entries_of({"causal": causal(), "half": Halfway()})
    assert {name: reads for name, (reads, _) in entries.items()} == {
        "SAD": "structure", "causal, free-running": "structure", "half": "structure",
        "causal, teacher-forced": "truth", "causal, codec floor": "truth", "copy the previous true voxel": "truth"}
    for name, (reads, make) in entries.items():
        if reads == "structure":
            assert make(blind).density.values.tobytes() == make(true).density.values.tobytes(), name
        else:
            with pytest.raises(TomatError):
                make(blind)


# A run


@pytest.fixture
def store(tmp_path):
    write_store([material(seed) for seed in (1, 2, 3)], {"validation": ["m-1", "m-2", "m-3"]}, tmp_path / "store")
    return RawStore(tmp_path / "store")


def test_a_run_goes_on_where_it_stopped(store, tmp_path):
    calls = []
    class Breaks(Halfway):
        def predict(self, *args, **kwargs):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().predict(*args, **kwargs)
    with pytest.raises(KeyboardInterrupt):
        evaluate(store, store.ids, {"half": Breaks(calls=calls)}, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out/materials").iterdir()) == ["m-1.json", "m-2.json"]
    rest = []
    result = evaluate(store, store.ids, {"half": Halfway(calls=rest)}, tmp_path / "out")
    assert len(rest) == 1 and [s.id for s in result.scores if s.entry == "half"] == store.ids
    fresh = evaluate(store, store.ids, {"half": Halfway()}, tmp_path / "other")
    assert [asdict(replace(s, seconds=0)) for s in fresh.scores] == [asdict(replace(s, seconds=0)) for s in result.scores]


@pytest.mark.parametrize("change", ["predictor", "density", "rules", "name", "damage"])
def test_what_was_scored_otherwise_is_scored_anew(store, tmp_path, monkeypatch, change):
    evaluate(store, store.ids, {"half": Halfway()}, tmp_path / "out")
    calls, name = [], "half"
    again = Halfway(calls=calls)
    if change == "predictor":
        again.share = 0.25
    if change == "density":
        time.sleep(0.02)
        other = replace(material(2), values=material(2).values + np.float32(0.0))
        tomat.density.formats.write_density(other, tmp_path / "store/label/m-2.zarr")
    if change == "rules":
        monkeypatch.setattr(tomat.prediction.evaluate, "_RULES", 99)
    if change == "name":
        name = "other"
    if change == "damage":
        (tmp_path / "out/materials/m-3.json").write_text("[]")
    result = evaluate(store, store.ids, {name: again}, tmp_path / "out")
    assert len(calls) == (1 if change in ("density", "damage") else 3)
    assert [s.id for s in result.scores if s.entry == name] == store.ids


def test_a_report_shows_the_pictures_of_its_own_run(store, tmp_path):
    """Not those that another predictor left in the folder; and those that were not asked for before are drawn later."""
    def draw(true, made):
        return {"slices": slices_png(true, {"half": made["half"]})}
    def shown(share, drawn):
        calls = []
        result = evaluate(store, store.ids, {"half": Halfway(share, calls)}, tmp_path / "out", draw, drawn)
        return len(calls), result.pictures, report_html("t", result).count("<h3>")
    assert shown(0.5, 3) == (3, store.ids, 3)
    assert shown(0.25, 1) == (3, store.ids[:1], 1)
    assert shown(0.25, 3) == (2, store.ids, 3)
    assert shown(0.25, 0) == (0, [], 0) and shown(0.25, 2) == (0, ["m-1", "m-3"], 2)


def test_what_cannot_be_scored_is_skipped_and_named(tmp_path):
    strange = replace(material(1), sad=None, values=material(1).values * 2)
    source = InMemory([replace(strange, id="strange"), material(2)])
    result = evaluate(source, source.ids, {"half": Halfway()}, tmp_path / "out")
    assert list(result.skipped) == ["strange"] and {s.id for s in result.scores} == {"m-2"}
    assert "strange" in report_html("t", result)
    for ids in (["strange"], []):
        with pytest.raises(TomatError, match="no material to score"):
            evaluate(source, ids, {"half": Halfway()}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


KILLED = """
import sys, time
import numpy as np
from tomat.density.core import Density
from tomat.prediction.evaluate import evaluate
from tomat.prediction.core import Prediction
from tomat.density.store import RawStore
class Slow:
    def predict(self, structure, shape, show=False):
        print("predicting", flush=True)
        time.sleep(0.5)
        return Prediction(Density(np.ones(shape, np.float32), structure), None, 1.0)
    def identity(self):
        return {}
store = RawStore(sys.argv[1])
evaluate(store, store.ids, {"slow": Slow()}, sys.argv[2])
"""


def test_a_kill_loses_one_material_at_most(store, tmp_path):
    line = [sys.executable, "-c", KILLED, str(store.root), str(tmp_path / "out")]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=quiet)
    assert run.stdout.readline() == run.stdout.readline() == "predicting\n"
    run.send_signal(signal.SIGKILL)
    run.communicate()
    whole = [p.name for p in (tmp_path / "out/materials").iterdir() if not p.name.startswith(".")]
    assert whole == ["m-1.json"] and json.loads((tmp_path / "out/materials/m-1.json").read_text())["scores"]


# The report


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    write_store([material(1), material(2, elements=("Li", "Al"))], {"validation": ["m-1", "m-2"]}, folder / "store")
    store = RawStore(folder / "store")
    return evaluate(store, store.ids, {"half": Halfway(), "causal": causal()}, folder / "out", material_pictures, drawn=1)


def test_a_summary_is_means_medians_and_tails(result):
    found = evaluation_summary(result.scores)
    for entry, s in found.items():
        values = [line.nmae for line in result.scores if line.entry == entry]
        assert s["nmae"] == {"mean": pytest.approx(np.mean(values)), "median": pytest.approx(np.median(values)),
                             "p95": pytest.approx(np.percentile(values, 95))} and s["materials"] == 2
        assert set(s["classes"]) == {"halide", "intermetallic"} and s["classes"]["halide"]["materials"] == 1
    assert found["half"]["nmae"]["mean"] == pytest.approx(0.5, rel=0.2)
    assert found["half"]["nemd"]["mean"] > found["half"]["nmae"]["mean"]
    assert found["SAD"]["nemd"] is None and found["causal, free-running"]["seam"] > 0
    for name in ("potential_error", "charge_error"):
        own = [getattr(line, name) for line in result.scores if line.entry == "half"]
        mean = found["half"][name] if name == "charge_error" else found["half"][name]["mean"]
        assert mean == pytest.approx(np.mean(own)) and min(own) > 0
        some = evaluation_summary([replace(result.scores[0], **{name: None}), *result.scores[1:]])
        assert some["SAD"][name] is None and some["half"][name] == found["half"][name]  # no mean over a part
    assert np.array(found["half"]["reliability"])[:, 0].sum() == 2 * 6 * 7 * 8


def test_the_report_stands_alone_and_labels_everything(result, tmp_path):
    files = write_report(replace(result, folder=result.folder), "a <title>", ["a & b"], more=3)
    page = Path(files[0]).read_text()
    assert "a &lt;title&gt;" in page and "a &amp; b" in page and not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("<img") == 6 and page.count("<table") == 5  # one material is drawn, and two curves
    for line in result.scores:
        assert line.entry in page and line.id in page
    assert page.count('class="truth"') == 9  # three entries in three tables
    written = json.loads(Path(files[2]).read_text())
    assert written["more"] == 3 and written["title"] == "a <title>" and len(written["materials"]) == len(result.scores)
    assert written["summary"] == json.loads(json.dumps(evaluation_summary(result.scores)))


def test_the_csv_has_a_line_for_each_material_and_entry(result):
    lines = list(csv.DictReader(scores_csv(result.scores).splitlines()))
    assert len(lines) == 12 and {(line["id"], line["entry"]) for line in lines} == {(s.id, s.entry) for s in result.scores}
    assert float(lines[0]["nmae"]) == result.scores[0].nmae and lines[0]["shape"] == "6x7x8"
    assert [line["nemd"] for line in lines if line["entry"] == "SAD"] == ["", ""]


def test_without_any_expected_error_there_is_no_curve(result):
    found = evaluation_summary([s for s in result.scores if s.reliability is None])
    assert reliability_png(found) is None
