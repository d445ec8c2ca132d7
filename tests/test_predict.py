"""A prediction sees the structure, the grid and nothing else; a checkpoint is what was trained."""

import copy
import inspect
from dataclasses import replace
from functools import cache

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.vasp import VaspChargeDensity
from crystals import a_density, skewed, with_any_sad
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp.outputs import Chgcar
from small_models import SMALL, attentive_model
from typer.testing import CliRunner

import tomat.prediction.causal
import tomat.prediction.core
import tomat.prediction.decoding
import tomat.prediction.evaluate
import tomat.prediction.predictors
from tomat.prediction.batch import SUFFIXES, plan_tasks, run_tasks, write_prediction
from tomat.prediction.core import in_reach
from tomat.prediction.crystals import as_structure, default_grid, find_crystals, predict
from tomat.tokens.codecs import PUBLISHED_DENSITY, log_codec
from tomat.tokens.levels import fit_levels
from tomat.tokens.patches import cover
from tomat.prediction.decoding import DecodingStrategy, best_strategy, free_run
from tomat.density.core import RHO, Density
from tomat.io.remote import TomatError
from tomat.density.formats import read_density, write_density
from tomat.models.causal import load_checkpoint, make_model, save_checkpoint
from tomat.models.probe import ProbeConfig, ProbeNet
from tomat.prediction.causal import CausalPredictor
from tomat.prediction.predictors import ProbePredictor, load_predictor
from tomat.cli import app
from tomat.density.store import write_store
from tomat.prediction.core import check_crystal
from tomat.atoms.sad import sad_density, valence_electrons
from tomat.tokens.tokenizer import Tokenizer

POSITIVE = np.random.default_rng(7).lognormal(0, 2, 20_000)
CODECS = {
    "two_token_9_12": PUBLISHED_DENSITY,
    "tomol_3byte": log_codec("tomol_3byte", -4.13, 4.97),
    "fp16_1token": log_codec("fp16_1token", -4.13, 4.97),
    "levels": fit_levels(POSITIVE, 64),
    "signed levels": fit_levels(POSITIVE * np.where(np.arange(POSITIVE.size) % 3, 1, -1), 65),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def small(codec="levels", layout="framed", size=3, target="total"):
    "An attentive model and its tokenizer."
    tokenizer = Tokenizer(layout, CODECS[codec], patch_size=size, pad_to=None, target=target)
    return attentive_model(tokenizer, sharpness=3), tokenizer


def predicted(structure, shape, model, tokenizer, strategy="", **options):
    "The density that a language model predicts."
    return CausalPredictor(model, tokenizer, strategy, **options).predict(structure, shape).density


def crystal(seed, n_atoms=2, elements=("Li", "O", "Na", "Fe")):
    return skewed(np.random.default_rng(seed), n_atoms, elements)


def crowd(seed, n_atoms):
    "Atoms all over a cell, none too near another."
    rng = np.random.default_rng(seed)
    side = int(np.ceil(n_atoms ** (1 / 3)))
    places = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:n_atoms] + rng.uniform(0, 0.3, (n_atoms, 3))
    cell = 1.6 * side * np.eye(3) + rng.uniform(-0.2, 0.2, (3, 3))
    return Structure(Lattice(cell), rng.choice(["Li", "O"], n_atoms), places / side)


# A checkpoint


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    for codec in CODECS:
        model, tokenizer = small(codec)
        save_checkpoint(model, tokenizer, tmp_path / codec)
        again, reader = load_checkpoint(tmp_path / codec)
        assert reader == tokenizer and not again.training
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


# Prediction


@pytest.mark.parametrize("codec", ["two_token_9_12", "levels"])
def test_the_models_of_these_tests_are_worth_testing_with(codec):
    """Their predictions vary from voxel to voxel, and depend on every atom and on the place of the patch."""
    (model, tokenizer), structure = small(codec), crystal(5, 3)
    values = predicted(structure, (6, 6, 6), model, tokenizer, strategy="argmax", rescale=False).values
    assert len(np.unique(values)) > 20
    assert len({patch.tobytes() for patch in values.reshape(2, 3, 2, 3, 2, 3).transpose(0, 2, 4, 1, 3, 5).reshape(8, -1)}) == 8
    moved = structure.copy()
    moved.translate_sites([0], [0.01, 0, 0])
    assert not np.array_equal(predicted(moved, (6, 6, 6), model, tokenizer, strategy="argmax", rescale=False).values, values)


def test_causality():
    """A logit does not change when anything after it does."""
    model, tokenizer = small()
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, tokenizer.vocab.size, 40)).repeat(2, 1)
    ids[1, 25:] = torch.from_numpy(rng.integers(0, tokenizer.vocab.size, 15))
    with torch.inference_mode():
        logits = model(ids).logits
    torch.testing.assert_close(logits[0, :25], logits[1, :25], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits[0, 25], logits[1, 25], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout, size", [("framed", 3), ("anchored", 2), ("framed", (1, 4, 2))])
@pytest.mark.parametrize("codec", CODECS)
def test_every_predicted_row_decodes(codec, layout, size):
    """Whatever the weights say, each token is legal at its place: the whole row passes every check of the format."""
    (model, tokenizer), structure, shape = small(codec, layout, size), crystal(3, 4), (5, 6, 7)
    prompts = tokenizer.prompt(structure, shape, [(0, 0, 0), (4, 1, 6), (2, 5, 3)])
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[:tokenizer.vocab.blocks["density"].start] *= 20  # it would rather write something else
    free = model(torch.from_numpy(prompts).long()).logits[:, -1].argmax(-1)
    low, high = tokenizer.legal_ids(0)
    assert not any(low <= i < high for i in free), "an unmasked model would do: the test shows nothing"
    for strategy in {"argmax", best_strategy(tokenizer)}:
        blocks = np.stack([written.ids_N for written in free_run(model, tokenizer, prompts, strategy)], axis=1)
        end = np.tile([tokenizer.vocab.id("DENS_END"), 2], (3, 1))
        for ids in np.concatenate([prompts, blocks, end], axis=1):
            assert np.isfinite(tokenizer.decode(ids).values).all()


@pytest.mark.parametrize("codec", ["two_token_9_12", "levels"])
def test_the_cache_changes_nothing(codec):
    """Free-running with cached keys and values writes what reading the whole row again at every place would."""
    (model, tokenizer), structure = small(codec), crystal(5)
    prompts = tokenizer.prompt(structure, (6, 6, 6), [(0, 0, 0), (3, 2, 5)])
    ids = torch.from_numpy(prompts).long()
    with torch.inference_mode():
        for place, written in enumerate(free_run(model, tokenizer, prompts)):
            low, high = tokenizer.legal_ids(place)
            logits = model(ids).logits[:, -1, low:high]
            assert (logits.argmax(-1) + low).tolist() == written.ids_N.tolist(), place
            ids = torch.cat([ids, torch.from_numpy(written.ids_N)[:, None]], dim=1)
    assert ids.shape[1] == tokenizer.row_length(2) - 2


def test_the_median_is_the_middle_of_the_distribution():
    model, tokenizer = small("signed levels")
    prompts = tokenizer.prompt(crystal(5), (6, 6, 6), [(0, 0, 0)])
    low, high = tokenizer.legal_ids(0)
    with torch.inference_mode():
        shares = model(torch.from_numpy(prompts).long()).logits[0, -1, low:high].double().softmax(-1).numpy()
    values, first = tokenizer.density_codec.values_of_ids(), next(free_run(model, tokenizer, prompts, "median"))
    written = first.ids_N[0] - low
    below = shares[values < values[written]].sum()
    assert below < 0.5 + 1e-6 and below + shares[written] > 0.5 - 1e-6
    assert first.expected_error_N[0] == pytest.approx((shares * abs(values - values[written])).sum(), rel=1e-4)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.floats(-30, 5), min_size=65, max_size=65))
def test_what_each_strategy_promises(logits):
    """The likeliest level; the least expected absolute error among all levels; the mean, and the level nearest to it."""
    tokenizer = Tokenizer("framed", CODECS["signed levels"], patch_size=1, pad_to=None)
    values = tokenizer.density_codec.values_of_ids()
    logits = torch.tensor([logits])
    shares = logits.double().softmax(-1)[0].numpy()
    expected = (shares * abs(values[:, None] - values)).sum(1)  # of each level as the guess
    got = {strategy: DecodingStrategy(tokenizer, strategy, torch.device("cpu"))(logits, 0)
           for strategy in ("argmax", "median", "mean")}
    ids = {strategy: written.ids_N[0] for strategy, written in got.items()}
    assert ids["argmax"] == int(logits.argmax())
    assert expected[ids["median"]] == pytest.approx(expected.min(), rel=1e-4, abs=1e-4)
    assert got["mean"].means_N[0] == pytest.approx(shares @ values, rel=1e-4, abs=1e-3)
    assert abs(values[ids["mean"]] - shares @ values) == pytest.approx(abs(values - shares @ values).min(), rel=1e-3, abs=1e-3)
    for strategy in ("argmax", "median"):
        assert got[strategy].expected_error_N[0] == pytest.approx(expected[ids[strategy]], rel=1e-3, abs=1e-3)


def test_the_mean_is_what_the_grid_gets():
    """The values lie between the levels, and differ from those of the median's."""
    (model, tokenizer), structure = small("signed levels"), crystal(4)
    mean, median = (predicted(structure, (6, 6, 6), model, tokenizer, strategy, rescale=False) for strategy in ("mean", "median"))
    levels = np.float32(tokenizer.density_codec.values_of_ids())
    assert np.isin(median.values, levels).all() and not np.isin(mean.values, levels).any()


def spoiled(density):
    "The same material with no truth in it: NaN everywhere, written behind the frozen type's back."
    empty = Density(density.values.copy(), density.structure, density.id, sad=density.sad.copy())
    empty.values[:] = np.nan
    empty.sad[:] = np.nan
    return empty


@pytest.mark.parametrize("target", ["total", "difference"])
@pytest.mark.parametrize("codec", ["two_token_9_12", "levels"])
def test_no_prediction_sees_the_truth(codec, target):
    """What is scored is predicted from the structure and the shape of the grid: NaN as truth gives the same bits."""
    densities = [with_any_sad(a_density(seed, (5, 6, 7))) for seed in (1, 2)]
    nothing = [spoiled(density) for density in densities]
    assert all(np.isnan(d.values).all() and np.isnan(d.sad).all() for d in nothing)
    model, tokenizer = small(codec, target=target)
    entries = tomat.prediction.evaluate.entries_of({"causal": CausalPredictor(model, tokenizer, rescale=False)})
    reads, make = entries["causal, free-running"]
    assert reads == "structure"
    for density, blind in zip(densities, nothing, strict=True):
        one, other = make(density).density, make(blind).density
        assert np.isfinite(one.values).all() and one.values.tobytes() == other.values.tobytes()
        again = predicted(density.structure, density.shape, model, tokenizer, rescale=False)
        assert again.values.tobytes() == one.values.tobytes()


def test_no_function_of_predict_takes_a_density():
    """But for `Prediction`, which holds the result, and the references, which are no predictions."""
    seen, references = set(), {"sad_of", "reference", "codec_floor", "teacher_forced"}
    for module in (tomat.prediction.core, tomat.prediction.decoding, tomat.prediction.causal, tomat.prediction.predictors):
        members = [m for _, m in inspect.getmembers(module) if inspect.isroutine(m) or inspect.isclass(m)]
        own = [member for member in members
               if member.__module__ == module.__name__ and member.__name__ not in {"Prediction", *references}]
        seen |= {member.__name__ for member in own}
        methods = [f for member in own if inspect.isclass(member) for _, f in inspect.getmembers(member, inspect.isfunction)
                   if f.__module__ == module.__name__]
        for function in [*own, *methods]:
            for parameter in inspect.signature(function).parameters.values():
                assert "Density" not in str(parameter.annotation) and "density" not in parameter.name, (function, parameter)
    assert {"finish", "free_run", "patch_values", "_field", "CausalPredictor", "ProbePredictor", "load_predictor"} <= seen


@pytest.mark.parametrize("codec, strategy", [("two_token_9_12", "argmax"), ("signed levels", "median")])
def test_the_batch_does_not_matter(codec, strategy):
    (model, tokenizer), structure = small(codec), crystal(4, 3)
    one, three, all_ = (predicted(structure, (4, 5, 6), model, tokenizer, strategy, batch_size=n, rescale=False)
                        for n in (1, 5, 256))
    assert one.values.tobytes() == three.values.tobytes() == all_.values.tobytes()


@pytest.mark.parametrize("n_atoms, shape, size", [
    (1, (6, 5, 4), 3), (200, (6, 5, 4), 4), (3, (2, 1, 3), 4), (2, (5, 5, 5), (2, 5, 3)), (2, (1, 1, 1), 2)])
@pytest.mark.parametrize("target", ["total", "difference"])
def test_any_cell_is_predicted_and_its_electrons_are_exact(n_atoms, shape, size, target):
    """One atom and 200, skewed cells, grids smaller than the patch."""
    (model, tokenizer), structure = small("levels", "framed", size, target), crowd(n_atoms, n_atoms)
    density = predicted(structure, shape, model, tokenizer)
    assert density.shape == shape and density.values.dtype == np.float32 and np.isfinite(density.values).all()
    assert density.structure == structure and density.n_electrons == pytest.approx(valence_electrons(structure), rel=1e-6)
    raw = predicted(structure, shape, model, tokenizer, rescale=False)
    factor = valence_electrons(structure) / raw.metadata["electrons_before_rescaling"]
    assert raw.n_electrons == pytest.approx(raw.metadata["electrons_before_rescaling"], rel=1e-5)
    np.testing.assert_allclose(density.values, raw.values * factor, rtol=1e-5)


def test_overlapping_patches_are_averaged():
    """Each voxel is the mean of what the patches over it say, each of them written by itself."""
    (model, tokenizer), structure, shape = small("levels"), crystal(4), (6, 6, 6)
    offsets = cover(shape, 3, 1)
    prompts = tokenizer.prompt(structure, shape, offsets)
    ids_NxV = np.stack([written.ids_N for written in free_run(model, tokenizer, prompts, "median")], axis=1)
    values_NxV = tokenizer.density_codec.values_of_ids()[ids_NxV - tokenizer.vocab.blocks["density"].start]
    total, times = np.zeros(shape), np.zeros(shape)
    for offset, values_V in zip(offsets, values_NxV, strict=True):
        for index, value in zip(np.ndindex(3, 3, 3), values_V, strict=True):
            total[tuple((offset + index) % shape)] += value
            times[tuple((offset + index) % shape)] += 1
    assert set(times.ravel()) == {1, 2, 4, 8}
    shared = predicted(structure, shape, model, tokenizer, overlap=1, rescale=False)
    np.testing.assert_allclose(shared.values, total / times, rtol=1e-5)
    with pytest.raises(TomatError, match="overlap"):
        predicted(structure, (6, 6, 6), model, tokenizer, overlap=3)


def test_a_prediction_without_electrons_is_refused():
    tokenizer = Tokenizer("framed", fit_levels(-POSITIVE, 64), patch_size=3, pad_to=None)
    model = make_model(SMALL, tokenizer.vocab)
    with pytest.raises(TomatError, match="electrons"):
        predicted(crystal(1), (4, 4, 4), model, tokenizer)
    assert predicted(crystal(1), (4, 4, 4), model, tokenizer, rescale=False).n_electrons < 0


def test_an_element_without_a_free_atom_is_refused_before_the_work(monkeypatch):
    (model, tokenizer), structure = small(), Structure(Lattice.cubic(4), ["Tc"], [[0, 0, 0]])
    monkeypatch.setattr("tomat.prediction.causal.free_run", lambda *args: pytest.fail("the work was done first"))
    with pytest.raises(TomatError, match="Tc"):
        predicted(structure, (4, 4, 4), model, tokenizer)


# What a prediction says of itself


def test_borders_are_where_patches_meet():
    """Planes between which the set of patches over a voxel changes."""
    (model, tokenizer), structure = small("levels", size=3), crystal(4)
    for shape, overlap in (((6, 9, 3), 0), ((7, 6, 6), 0), ((6, 6, 6), 1), ((9, 7, 8), 1), ((5, 4, 6), 2)):
        found = CausalPredictor(model, tokenizer, overlap=overlap, rescale=False).predict(structure, shape).borders
        for n, planes in zip(shape, found, strict=True):
            patches = [{(start + i) % n for i in range(3)} for start in range(0, n, 3 - overlap)]
            over = [{number for number, patch in enumerate(patches) if plane in patch} for plane in range(n)]
            changes = {plane for plane in range(n) if over[plane] != over[plane - 1]}
            assert set(planes) >= changes and set(planes) - changes <= {0}, (shape, overlap)


def test_the_expected_error_is_in_the_unit_of_the_density():
    """Tokens that say electrons and tokens that say e/Å³ give the same field."""
    (model, tokenizer), structure = small("levels"), crystal(4)
    volume = structure.volume
    levels = tokenizer.density_codec
    scaled = replace(levels, boundaries=levels.boundaries / volume, recon_points=levels.recon_points / volume,
                     clip_max=levels.clip_max / volume)
    other = Tokenizer("framed", scaled, patch_size=3, pad_to=None, unit=RHO)
    a, b = (CausalPredictor(model, tok, rescale=False).predict(structure, (6, 6, 6)) for tok in (tokenizer, other))
    np.testing.assert_allclose(a.expected_error_xyz, b.expected_error_xyz, rtol=1e-3)
    np.testing.assert_allclose(a.density.values, b.density.values, rtol=1e-4)


@pytest.mark.parametrize("elements, places, words", [
    (["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0.999]], "apart"), (["Na", "Cl"], [[0, 0, 0.99], [0, 0, 0.01]], "1 (Na) and 2 (Cl)"),
    (["Tc"], [[0, 0, 0]], "Tc"), ([{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]], "partly|share"), ([], [], "no atoms")])
def test_a_crystal_that_cannot_be_predicted_is_one_sentence(elements, places, words):
    structure = Structure(Lattice.cubic(4), elements, places)
    (model, tokenizer) = small()
    for ask in (check_crystal, lambda s: predicted(s, (4, 4, 4), model, tokenizer)):
        with pytest.raises(TomatError) as caught:
            ask(structure)
        text = str(caught.value)
        assert any(word in text for word in words.split("|")) and "\n" not in text and text.endswith("."), text


def test_atoms_of_different_cells_are_not_too_close_when_they_are_not():
    check_crystal(Structure(Lattice.cubic(0.5), ["H"], [[0, 0, 0]]))
    with pytest.raises(TomatError, match="apart"):
        check_crystal(Structure(Lattice.from_parameters(0.3, 4, 4, 90, 90, 90), ["H"], [[0, 0, 0]]))


# The probe network: first a stand-in with its interface, then the packaged network


class StandIn(torch.nn.Module):
    "A tenth of the free atoms as the difference to them; unsure where they are."

    def __init__(self):
        super().__init__()
        self.share, self.training_metadata = torch.nn.Parameter(torch.tensor(0.1)), {"elements": ["Li", "O", "Na"]}

    def distance(self, structure):
        return None


def field_of_stand_in(model, structure, shape, sad_xyz, show=False):
    assert sad_xyz.shape == tuple(shape)
    assert sad_xyz.mean() * structure.volume == pytest.approx(valence_electrons(structure))
    share = model.share.item()
    return np.float32(share * sad_xyz), np.float32(share * sad_xyz / 2)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(tomat.prediction.predictors, "load_probe", lambda path: StandIn())
    monkeypatch.setattr(tomat.prediction.predictors, "predict_field", field_of_stand_in)
    return ProbePredictor(StandIn(), full_grid=True)


def test_the_probe_predictor_adds_and_counts(stand_in):
    structure = crystal(3, elements=("Li", "O", "Fe"), n_atoms=4)
    raw = replace(stand_in, rescale=False).predict(structure, (8, 9, 10))
    known = sad_density(structure, (8, 9, 10))
    share = in_reach(structure, known / structure.volume)  # of the difference; it fades where there are no atoms
    np.testing.assert_allclose(raw.density.values, (1 + 0.1 * share) * known, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(raw.expected_error_xyz, 0.05 * share * known / structure.volume, rtol=1e-5, atol=1e-6)
    assert raw.electrons_before == pytest.approx(float(((1 + 0.1 * share) * known).mean()), rel=1e-5) and raw.borders is None
    exact = stand_in.predict(structure, (8, 9, 10))
    assert exact.density.n_electrons == pytest.approx(valence_electrons(structure), rel=1e-6)
    assert exact.density.values.dtype == exact.expected_error_xyz.dtype == np.float32
    assert exact.density.metadata["elements_never_seen"] == sorted({str(e) for e in structure.species} - {"Li", "O", "Na"})


def test_a_checkpoint_says_which_decoder_it_is_for(stand_in, tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "tomat.json").write_text('{"decoder": "parallel"}')
    assert isinstance(load_predictor(tmp_path / "p", strategy=None, overlap=0), ProbePredictor)
    with pytest.raises(TomatError, match="overlap"):
        load_predictor(tmp_path / "p", overlap=2)
    model, tokenizer = small()
    save_checkpoint(model, tokenizer, tmp_path / "c", {"elements": ["Li"]})
    causal = load_predictor(tmp_path / "c", strategy="mean")
    assert causal.strategy == "mean" and causal.elements == {"Li"}
    save_checkpoint(model, tokenizer, tmp_path / "d")
    assert load_predictor(tmp_path / "d").elements is None
    for name in ("nowhere", "."):
        with pytest.raises(TomatError, match=r"checkpoint|does not exist"):
            load_predictor(tmp_path / name)


def test_identity_tells_weights_and_settings_apart(stand_in):
    (model, tokenizer) = small()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    ids = [p.identity() for p in (CausalPredictor(model, tokenizer), CausalPredictor(other, tokenizer),
                                  CausalPredictor(model, tokenizer, "argmax"), CausalPredictor(model, tokenizer, overlap=1),
                                  stand_in, replace(stand_in, rescale=False), replace(stand_in, full_grid=False))]
    assert all(a != b for i, a in enumerate(ids) for b in ids[:i])
    assert CausalPredictor(copy.deepcopy(model), tokenizer, batch_size=3).identity() == ids[0]


# Physics, of a network of random weights and of the packaged one


@cache
def network(name):
    "Either, as a predictor."
    if name == "packaged":
        return load_predictor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = ProbeNet(ProbeConfig(dropout=0.0, element_dropout=0.0))
        for layer in (model.head, model.sphere, model.bond):
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
    model.training_metadata = {"elements": ["Na", "Cl"]}
    return ProbePredictor(model.eval())


networks = pytest.mark.parametrize("name", ["random", "packaged"])
SALT = Structure(Lattice.from_parameters(4.2, 4.6, 5.1, 80, 95, 105), ["Na", "Cl", "O"],
                 [[0.05, 0.1, 0.02], [0.5, 0.55, 0.48], [0.9, 0.6, 0.1]])


def fields(predictor, structure, shape):
    "Density in e/Å³ and its expected error."
    prediction = predictor.predict(structure, shape)
    return prediction.density.rho, prediction.expected_error_xyz


def assert_alike(found, wanted, tolerance=1e-4):
    "Equal to so many e/Å³, where the field itself is worth comparing."
    for one, other in zip(found, wanted, strict=True):
        assert np.ptp(other) > 100 * tolerance
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


@networks
def test_a_prediction_is_more_than_the_free_atoms(name):
    rho, expected = fields(network(name), SALT, (12, 14, 16))
    assert abs(rho - sad_density(SALT, (12, 14, 16)) / SALT.volume).max() > 0.01 and (expected > 0).all()


@networks
def test_another_origin_moves_the_prediction(name):
    shape, steps = (12, 14, 16), (5, -3, 8)
    moved = SALT.copy()
    moved.translate_sites(range(3), np.divide(steps, shape), to_unit_cell=True)
    assert_alike(fields(network(name), moved, shape), [np.roll(f, steps, (0, 1, 2)) for f in fields(network(name), SALT, shape)])


@networks
def test_a_supercell_is_predicted_as_its_cell(name):
    twice = SALT.make_supercell([2, 1, 1], in_place=False)
    tiled = [np.concatenate([f, f]) for f in fields(network(name), SALT, (12, 14, 16))]
    assert_alike(fields(network(name), twice, (24, 14, 16)), tiled)


@networks
def test_other_lattice_vectors_change_nothing(name):
    """a and a + b span the same crystal as a and b: voxel (i, j, k) of the new grid is voxel (i, i + j, k) of the old."""
    n, cell = 14, SALT.lattice.matrix
    skewed = Lattice(np.array([cell[0] + cell[1], cell[1], cell[2]]))
    other = Structure(skewed, SALT.species, SALT.cart_coords, coords_are_cartesian=True)
    i, j, k = np.indices((n, n, 16))
    assert_alike(fields(network(name), other, (n, n, 16)), [f[i, (i + j) % n, k] for f in fields(network(name), SALT, (n, n, 16))])


@networks
@pytest.mark.parametrize("turn", [((1, 2, 0), (False, False, False)), ((0, 1, 2), (True, True, False)),
                                  ((2, 1, 0), (False, True, False))])
def test_a_turned_crystal_is_a_turned_prediction(name, turn):
    density = network(name).predict(SALT, (10, 12, 14)).density
    turned = density.permute_axes(*turn)
    assert_alike([network(name).predict(turned.structure, turned.shape).density.rho], [turned.rho])


@networks
def test_a_turn_in_space_changes_nothing(name):
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    turned = Structure(Lattice(SALT.lattice.matrix @ turn.T), SALT.species, SALT.frac_coords)
    assert_alike(fields(network(name), turned, (12, 12, 12)), fields(network(name), SALT, (12, 12, 12)))


@networks
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (17, 18, 33)])
def test_electrons_are_exact_on_any_grid(name, shape):
    density = network(name).predict(SALT, shape).density
    assert density.n_electrons == pytest.approx(valence_electrons(SALT), rel=1e-6)


# Structures in, files out


def test_objects_of_pymatgen_and_ase_are_crystals():
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    assert as_structure(atoms).formula == "Na1 Cl1" and as_structure(as_structure(atoms)) == as_structure(atoms)
    for thing in (ase.Atoms("H2O"), ase.Atoms(cell=[4, 4, 4]), "NaCl", None, 3):
        with pytest.raises(TomatError, match=r"\.$"):
            as_structure(thing)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.tuples(*[st.floats(1, 90)] * 3))
def test_a_default_grid_is_fine_enough_and_friendly(lengths):
    structure = Structure(Lattice.orthorhombic(*lengths), ["Li"], [[0, 0, 0]])
    for length, n in zip(lengths, default_grid(structure), strict=True):
        assert length / n <= 0.097 + 1e-9 and n % 2 == 0 and 210**12 % n == 0
        assert length / n > 0.06 or n <= 28


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_prediction_is_read_back_from_every_format(stand_in, tmp_path, format):
    prediction = stand_in.predict(crystal(3), (6, 7, 8))
    out, errors = (f"{tmp_path}/{name}{SUFFIXES[format]}" for name in ("a", "b"))
    write_prediction(prediction, out, errors)
    density, unsure = read_density(out), read_density(errors)
    np.testing.assert_allclose(density.total, prediction.density.total, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(unsure.rho, prediction.expected_error_xyz, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
def test_zarr_holds_density_and_uncertainty(stand_in, tmp_path, name):
    zarr = pytest.importorskip("zarr")
    prediction = stand_in.predict(crystal(3), (6, 7, 8))
    write_prediction(prediction, f"{tmp_path}/{name}", f"{tmp_path}/{name}")
    assert read_density(tmp_path / name).values.tobytes() == prediction.density.values.tobytes()
    store = zarr.storage.ZipStore(tmp_path / name, read_only=True) if name.endswith("zip") else tmp_path / name
    stored = zarr.open_group(store, mode="r")["charge_density_spread"][:]
    np.testing.assert_allclose(stored / prediction.density.volume, prediction.expected_error_xyz, rtol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_pymatgen_and_ase_read_what_is_written(stand_in, tmp_path):
    structure = crystal(3, 4, ("Li", "O"))
    density = stand_in.predict(structure, (6, 7, 8)).density
    write_density(density, tmp_path / "CHGCAR")
    theirs, atoms = Chgcar.from_file(str(tmp_path / "CHGCAR")), VaspChargeDensity(str(tmp_path / "CHGCAR"))
    np.testing.assert_allclose(theirs.data["total"], density.total, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(atoms.chg[0], density.rho, rtol=1e-6, atol=1e-6)
    assert theirs.data["total"].mean() == pytest.approx(valence_electrons(structure), abs=1e-6 * valence_electrons(structure))
    assert sorted(atoms.atoms[0].get_chemical_symbols()) == sorted(str(s) for s in structure.species)
    assert atoms.atoms[0].get_volume() == pytest.approx(structure.volume, rel=1e-5)


def test_a_folder_of_structures_becomes_a_folder_of_densities(stand_in, tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    crystal(1).to(str(inside / "one.cif"), fmt="cif")
    crystal(2).to(str(inside / "POSCAR.two"), fmt="poscar")
    write_density(stand_in.predict(crystal(3), (5, 6, 7)).density, inside / "three.zarr")
    Structure(Lattice.cubic(4), ["Tc"], [[0, 0, 0]]).to(str(inside / "four.cif"), fmt="cif")
    (inside / "README").write_text("Dear reader")
    tasks, skipped = plan_tasks([inside], f"{tmp_path}/out", None, f"{tmp_path}/errors")
    assert {task.name for task in tasks} == {"one", "two", "three"}
    assert set(skipped) == {"four.cif", "README"} and "Tc" in skipped["four.cif"]
    assert {task.name: task.shape for task in tasks}["three"] == (5, 6, 7) and sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    facts = list(run_tasks([replace(task, shape=(6, 6, 6)) for task in tasks], stand_in))
    assert [f["name"] for f in facts] == [task.name for task in tasks]
    assert [f["expected_nmae"] for f in facts] == [pytest.approx(0.05, rel=0.2)] * 3
    for folder in ("out", "errors"):
        assert {p.name for p in (tmp_path / folder).iterdir()} == {"one.CHGCAR", "two.CHGCAR", "three.CHGCAR"}
    assert all(read_density(f["out"]).shape == (6, 6, 6) for f in facts)


def test_one_density_in_a_script(stand_in, tmp_path, monkeypatch):
    """A crystal of any kind; the grid is the one given, that of a density file, or the default."""
    write_density(stand_in.predict(crystal(3), (5, 6, 7)).density, tmp_path / "three.zarr")
    for source, shape, grid, name in ((bulk("Li", a=3.4), None, None, "Li"), (bulk("Li", a=3.4), (4, 4, 4), (4, 4, 4), "Li"),
                                      (tmp_path / "three.zarr", None, (5, 6, 7), "three")):
        density = predict(source, shape, stand_in)
        assert density.id == name and density.shape == (grid or default_grid(density.structure))
        assert density.n_electrons == pytest.approx(valence_electrons(density.structure), rel=1e-6)
    monkeypatch.setattr("tomat.prediction.crystals.load_predictor", lambda: stand_in)
    assert predict(crystal(3), (4, 4, 4)).metadata["made_by"] == "tomat, probe"
    with pytest.raises(TomatError, match="does not exist"):
        predict("letter.txt")


def test_a_picture_of_one(stand_in, tmp_path):
    tasks, _ = plan_tasks([bulk("Li", a=3.4)], f"{tmp_path}/Li.cube", picture=f"{tmp_path}/Li.png")
    (facts,) = run_tasks(tasks, stand_in)
    assert (tmp_path / "Li.png").read_bytes().startswith(b"\x89PNG")
    assert facts["grid"] == list(default_grid(tasks[0].structure)) and facts["elements_never_seen"] == []
    assert {p.name for p in tmp_path.iterdir()} == {"Li.cube", "Li.png"}


def test_places_that_cannot_be_written_are_found_before_the_work(stand_in, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear reader")
    (tmp_path / "full.zarr").mkdir()
    (tmp_path / "full.zarr" / "a").write_text("a")
    crystal(1).to(str(tmp_path / "a.cif"), fmt="cif")
    write_density(stand_in.predict(crystal(3), (4, 4, 4)).density, tmp_path / "b.CHGCAR")
    with pytest.raises(TomatError, match="no name"):
        plan_tasks([crystal(1)], "")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    one, both = [tmp_path / "a.cif"], [crystal(1), crystal(2, elements=("Na",))]
    for sources, out, options, words in (
            (one, "letter.txt/x.cube", {}, "letter.txt"), (one, "full.zarr", {}, "full.zarr"), (one, "x.xyz", {}, "x.xyz"),
            (one, "x.cube", {"expected_error": f"{tmp_path}/x.cube"}, "x.cube"),
            (one, "x.cube", {"expected_error": f"{tmp_path}/x.xyz"}, "x.xyz"),
            (one, "x.cube", {"picture": f"{tmp_path}/letter.txt/x.png"}, "letter.txt"),
            (one, "x.cube", {"format": "zarr"}, "format"), (one, "x.cube", {"picture": f"{tmp_path}/x.pdf"}, ".png"),
            ([tmp_path / "b.CHGCAR"], "b.CHGCAR", {}, "replace"), ([tmp_path], "", {}, "replace"),
            (both, "x.cube", {}, "2"), (both, "letter.txt/out", {}, "letter.txt"), (both, "new", {"format": "xyz"}, "xyz"),
            ([crystal(1), crystal(1)], "new", {}, "Two structures"), ([], "new", {}, "no structure"),
            ([tmp_path / "full.zarr"], "new", {}, "no structure"), ([tmp_path / "none.cif"], "x.cube", {}, "none.cif")):
        with pytest.raises((TomatError, OSError)) as caught:
            plan_tasks(sources, f"{tmp_path}/{out}", **options)
        assert words in str(caught.value) and str(caught.value).count("\n") == 0, caught.value
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_model_that_does_not_say_how_sure_it_is(tmp_path):
    model, tokenizer = small("two_token_9_12")
    tasks, _ = plan_tasks([crystal(1)], f"{tmp_path}/x.cube", (3, 3, 3), f"{tmp_path}/y.cube")
    with pytest.raises(TomatError, match="gives no expected error"):
        next(run_tasks(tasks, CausalPredictor(model, tokenizer)))
    assert not list(tmp_path.iterdir())


def test_what_is_named_one_by_one_is_not_passed_over(tmp_path):
    Structure(Lattice.cubic(4), ["Tc"], [[0, 0, 0]]).to(str(tmp_path / "a.cif"), fmt="cif")
    with pytest.raises(TomatError, match=r"a\.cif.*Tc"):
        find_crystals([tmp_path / "a.cif"])


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("decoder", ["probe", "causal"])
def test_the_option_device_reaches_the_network(decoder, command, tmp_path, monkeypatch):
    """Both decoders compute where the option says: here on PyTorch's device without memory, which has no numbers to give back."""
    asked = []
    monkeypatch.setattr(tomat.prediction.predictors, "pick_device", lambda name: asked.append(name) or torch.device("meta"))
    density = a_density(0, shape=(6, 6, 6))
    write_store([density], {"validation": [density.id]}, tmp_path / "store")
    write_density(density, tmp_path / "POSCAR.chgcar")
    save_checkpoint(*small(), tmp_path / "causal", {"elements": ["O"]})
    line = {"predict": [tmp_path / "POSCAR.chgcar", "--out", tmp_path / "CHGCAR"],
            "evaluate": [tmp_path / "store", "--out", tmp_path / "scores"]}[command]
    checkpoint = ["--checkpoint", tmp_path / "causal"] if decoder == "causal" else []
    found = CliRunner().invoke(app, [command, *map(str, [*line, *checkpoint]), "--device", "cuda:1"])
    assert asked == ["cuda:1"] and found.exit_code and "meta" in str(found.exception), found.output


def test_a_vacuum_stays_empty(monkeypatch):
    "A molecule in a box: nothing is added where no atom is near, where the network alone would add most of its excess."
    water = Structure(Lattice.cubic(10), ["O", "H", "H"], np.array([[5, 5, 5], [5.76, 5.59, 5], [4.24, 5.59, 5]]) / 10)
    found = load_predictor().predict(water, (40, 40, 40))
    known = sad_density(water, (40, 40, 40)) / water.volume
    far = known < 1e-5
    assert far.mean() > 0.3
    np.testing.assert_allclose(found.density.rho[far], known[far], atol=1e-7)
    monkeypatch.setattr(tomat.prediction.predictors, "in_reach", lambda *_: None)
    alone = load_predictor().predict(water, (40, 40, 40))
    assert abs(found.electrons_before - 8) < abs(alone.electrons_before - 8) / 2
