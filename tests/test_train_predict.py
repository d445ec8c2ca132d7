"""A run that was killed ends with the same bits; a prediction sees the structure, the grid and nothing else."""

import copy
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache

from dataclasses import replace

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from transformers import AutoModelForCausalLM, AutoTokenizer

import tomat.evaluate
import tomat.predict
from tomat.codecs import PUBLISHED_DENSITY, fit_levels, log_codec
from tomat.density import RHO, Density
from tomat.files import TomatError
from tomat.model import ModelSize, load_checkpoint, make_model, save_checkpoint
from tomat.predict import free_run, predict
from tomat.promolecule import promolecule, valence_electrons
from tomat.rows import read_rows
from tomat.shards import tokenize
from tomat.tokenizer import Tokenizer
from tomat.train import TrainConfig, batch_rows, learning_rate, read_log, train

SMALL = ModelSize(width=32, layers=2, heads=2, mlp=64, kv_heads=1)
POSITIVE = np.random.default_rng(7).lognormal(0, 2, 20_000)
CODECS = {
    "two_token_9_12": PUBLISHED_DENSITY,
    "tomol_3byte": log_codec("tomol_3byte", -4.13, 4.97),
    "fp16_1token": log_codec("fp16_1token", -4.13, 4.97),
    "levels": fit_levels(POSITIVE, 64),
    "signed levels": fit_levels(POSITIVE * np.where(np.arange(POSITIVE.size) % 3, 1, -1), 65),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "One thread, so that sums come in one order; no progress bars."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("TOMAT_PROGRESS", "0")
    yield
    torch.set_num_threads(threads)


@cache
def small(codec="levels", layout="framed", size=3, target="total"):
    "A model of 20,000 weights beside its embeddings that looks far back and writes something else at every place; a tokenizer."
    tokenizer = Tokenizer(layout, CODECS[codec], patch_size=size, pad_to=None, target=target)
    model = make_model(SMALL, tokenizer.vocab, seed=1, smooth=False).eval()
    with torch.no_grad():  # as it is made, it repeats the last token
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.self_attn.v_proj, layer.mlp.down_proj, layer.mlp.up_proj):
                part.weight *= 10
            layer.self_attn.q_norm.weight *= 3
    return model, tokenizer


def crystal(seed, n_atoms=2, elements=("Li", "O", "Na", "Fe")):
    "A skewed cell with atoms anywhere."
    rng = np.random.default_rng(seed)
    matrix = np.diag(rng.uniform(3, 9, 3)) + rng.uniform(-1.2, 1.2, (3, 3))
    return Structure(Lattice(matrix), rng.choice(elements, n_atoms).tolist(), rng.random((n_atoms, 3)))


def with_free_atoms(density):
    "Noise has no number of electrons that `with_promolecule` would accept."
    return replace(density, baseline=promolecule(density.structure, density.shape))


def a_density(seed, shape=(6, 7, 8)):
    return Density(np.random.default_rng(seed).lognormal(0, 2, shape).astype(np.float32), crystal(seed), id=f"m-{seed}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "A data set of 24 short rows."
    folder = tmp_path_factory.mktemp("data") / "rows"
    tokenize([a_density(seed) for seed in range(4)], small("levels", size=2)[1], folder, 6, label="four")
    return folder


# Training

CONFIG = TrainConfig(steps=40, batch_size=2, save_every=3, warmup=5, seed=11)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    "A run that nobody disturbed."
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMAT_PROGRESS", "0")
        return train(rows, tmp_path_factory.mktemp("whole") / "run", CONFIG).parent


def same_run(one, other):
    "The weights bit for bit, every line of the log, and the state of the optimizer."
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    a, b = (torch.load(run / "state.pt", weights_only=True)["optimizer"]["state"] for run in (one, other))
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in ("exp_avg", "exp_avg_sq", "step"))
    assert (one / "model/tomat.json").read_bytes() == (other / "model/tomat.json").read_bytes()


TRAIN = """
import sys, torch
from tomat.train import TrainConfig, train
torch.set_num_threads(1)
train(sys.argv[1], sys.argv[2], TrainConfig(steps=40, batch_size=2, save_every=3, warmup=5, seed=11))
"""


def test_a_killed_run_goes_on_bit_for_bit(rows, whole, tmp_path):
    out, rng = tmp_path / "run", np.random.default_rng(5)
    env = os.environ | {"TOMAT_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "-c", TRAIN, rows, out], env=env)
    last, deadline = int(rng.integers(3, 30)), time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < last:
        assert run.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))  # somewhere between two saves, or inside one
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not (out / "model").exists()
    before = torch.load(out / "state.pt", weights_only=True)["step"]
    assert 3 <= before < 40
    train(rows, out, CONFIG)
    same_run(whole, out)


def test_a_run_stopped_anywhere_goes_on_bit_for_bit(rows, whole, tmp_path, monkeypatch):
    """Stopped at three steps, twice of them between saves; each time in a process that has drawn random numbers."""
    update, stops = tomat.train._update, [4, 9, 26]
    def stopping(state, *args):
        if stops and state.step == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        return update(state, *args)
    monkeypatch.setattr(tomat.train, "_update", stopping)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            train(rows, tmp_path / "run", CONFIG)
        torch.rand(3)
        np.random.default_rng().random()
    train(rows, tmp_path / "run", CONFIG)
    same_run(whole, tmp_path / "run")


def test_a_finished_run_changes_nothing_when_started_again(rows, whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    train(rows, whole, CONFIG)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_a_run_refuses_what_is_not_its_own(rows, whole, tmp_path):
    for other in (TrainConfig(steps=41, batch_size=2, save_every=3, warmup=5, seed=11), TrainConfig()):
        with pytest.raises(TomatError, match="another configuration"):
            train(rows, whole, other)
    tokenize([a_density(9)], small("levels", size=2)[1], tmp_path / "rows", 6)
    with pytest.raises(TomatError, match="other data"):
        train(tmp_path / "rows", whole, CONFIG)


def test_seeds_decide_the_bytes(rows, tmp_path):
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        checkpoint = train(rows, tmp_path / name, TrainConfig(steps=3, batch_size=2, seed=seed))
        weights[name] = (checkpoint / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


def test_the_loss_falls(whole):
    losses = [line["loss"] for line in read_log(whole)]
    assert len(losses) == 40 and np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.2


def test_an_epoch_holds_every_row_once():
    for n, size in ((24, 5), (7, 3), (3, 8), (1, 2)):
        places = np.concatenate([batch_rows(step, n, size, seed=3) for step in range(2 * n)])
        for epoch in range(len(places) // n):
            assert sorted(places[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert batch_rows(0, 1000, 50, 1).tolist() != batch_rows(0, 1000, 50, 2).tolist()


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    rates = [learning_rate(step, CONFIG) for step in range(41)]
    assert np.argmax(rates) in (4, 5) and max(rates) == CONFIG.lr and rates[40] == pytest.approx(CONFIG.lr / 10)
    assert all(np.diff(rates[:5]) > 0) and all(np.diff(rates[5:]) < 0)


def test_padding_does_not_change_the_loss(rows):
    model, tokenizer = small("levels", size=2)
    ids, counted = read_rows(rows).ids[:1], tokenizer.vocab.blocks["density"]
    short = tomat.train.collate(ids)
    long = torch.nn.functional.pad(short, (0, 30))
    (one, n), (other, m) = (tomat.train.token_loss(model, batch, counted) for batch in (short, long))
    assert n == m == 8 and one.item() == pytest.approx(other.item(), rel=1e-5)


# A checkpoint


def test_a_checkpoint_is_plain_transformers(whole, rows):
    model, tokenizer = load_checkpoint(whole / "model")
    plain, words = AutoModelForCausalLM.from_pretrained(whole / "model"), AutoTokenizer.from_pretrained(whole / "model")
    ids = torch.tensor(read_rows(rows).ids[0])[None].long()
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    text = " ".join(tokenizer.vocab.word(int(i)) for i in ids[0])
    assert words(text).input_ids == ids[0].tolist() and words.decode(ids[0].tolist()) == text
    assert len(words) == tokenizer.vocab.size and words.convert_tokens_to_ids("[DENS_START]") == tokenizer.vocab.id("DENS_START")
    assert (words.pad_token_id, words.bos_token_id, words.eos_token_id) == (0, 1, 2)
    facts = json.loads((whole / "model" / "tomat.json").read_text())["training"]
    assert facts["steps"] == 40 and facts["data"] == "four" and facts["materials"] == ["m-0", "m-1", "m-2", "m-3"]


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
    values = predict(structure, (6, 6, 6), model, tokenizer, choose="argmax", rescale=False).values
    assert len(np.unique(values)) > 20
    assert len({patch.tobytes() for patch in values.reshape(2, 3, 2, 3, 2, 3).transpose(0, 2, 4, 1, 3, 5).reshape(8, -1)}) == 8
    moved = structure.copy()
    moved.translate_sites([0], [0.01, 0, 0])
    assert not np.array_equal(predict(moved, (6, 6, 6), model, tokenizer, choose="argmax", rescale=False).values, values)


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
    for choose in {"argmax", tomat.predict.best_choice(tokenizer)}:
        blocks = np.stack(list(free_run(model, tokenizer, prompts, choose)), axis=1)
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
            assert (logits.argmax(-1) + low).tolist() == written.tolist(), place
            ids = torch.cat([ids, torch.from_numpy(written)[:, None]], dim=1)
    assert ids.shape[1] == tokenizer.row_length(2) - 2


def test_the_median_is_the_middle_of_the_distribution():
    model, tokenizer = small("signed levels")
    prompts = tokenizer.prompt(crystal(5), (6, 6, 6), [(0, 0, 0)])
    low, high = tokenizer.legal_ids(0)
    with torch.inference_mode():
        shares = model(torch.from_numpy(prompts).long()).logits[0, -1, low:high].double().softmax(-1).numpy()
    values, written = tokenizer.density_codec.values_of_ids(), next(free_run(model, tokenizer, prompts, "median"))[0] - low
    below = shares[values < values[written]].sum()
    assert below < 0.5 + 1e-6 and below + shares[written] > 0.5 - 1e-6


def spoiled(density):
    "The same material with no truth in it: NaN everywhere, written behind the frozen type's back."
    empty = Density(density.values.copy(), density.structure, density.id, baseline=density.baseline.copy())
    empty.values[:] = np.nan
    empty.baseline[:] = np.nan
    return empty


@pytest.mark.parametrize("target", ["total", "difference"])
@pytest.mark.parametrize("codec", ["two_token_9_12", "levels"])
def test_no_prediction_sees_the_truth(monkeypatch, codec, target):
    """What is scored is predicted from the structure and the shape of the grid: NaN as truth gives the same bits."""
    densities = [with_free_atoms(a_density(seed, (5, 6, 7))) for seed in (1, 2)]
    nothing = [spoiled(density) for density in densities]
    assert all(np.isnan(d.values).all() and np.isnan(d.baseline).all() for d in nothing)
    monkeypatch.setattr(tomat.evaluate, "score", lambda *args: None)  # scoring does need the truth
    (model, tokenizer), options = small(codec, target=target), {"rescale": False}
    _, seen = tomat.evaluate.evaluate(densities, model, tokenizer, **options)
    _, blind = tomat.evaluate.evaluate(nothing, model, tokenizer, **options)
    for one, other in zip(seen, blind, strict=True):
        assert np.isfinite(one.values).all() and one.values.tobytes() == other.values.tobytes()
    again = predict(densities[0].structure, densities[0].shape, model, tokenizer, **options)
    assert again.values.tobytes() == seen[0].values.tobytes()


def test_no_function_of_predict_takes_a_density():
    functions = [member for _, member in inspect.getmembers(tomat.predict) if inspect.isroutine(member) or inspect.isclass(member)]
    own = [member for member in functions if member.__module__ == "tomat.predict"]
    assert {"predict", "free_run", "_written", "_scale"} <= {member.__name__ for member in own}
    methods = [f for member in own if inspect.isclass(member) for _, f in inspect.getmembers(member, inspect.isfunction)
               if f.__module__ == "tomat.predict"]
    for function in [*own, *methods]:
        for parameter in inspect.signature(function).parameters.values():
            assert "Density" not in str(parameter.annotation) and "density" not in parameter.name, (function, parameter)
    source = inspect.getsource(tomat.predict)
    assert not any(word in source for word in (".baseline", "read_density", "RawStore", ".encode(", "target_of"))


@pytest.mark.parametrize("codec, choose", [("two_token_9_12", "argmax"), ("signed levels", "median")])
def test_the_batch_does_not_matter(codec, choose):
    (model, tokenizer), structure = small(codec), crystal(4, 3)
    one, three, all_ = (predict(structure, (6, 7, 8), model, tokenizer, choose, batch_size=n, rescale=False) for n in (1, 5, 256))
    assert one.values.tobytes() == three.values.tobytes() == all_.values.tobytes()


@pytest.mark.parametrize("n_atoms, shape, size", [
    (1, (6, 5, 4), 3), (200, (6, 5, 4), 4), (3, (2, 1, 3), 4), (2, (5, 5, 5), (2, 5, 3)), (2, (1, 1, 1), 2)])
@pytest.mark.parametrize("target", ["total", "difference"])
def test_any_cell_is_predicted_and_its_electrons_are_exact(n_atoms, shape, size, target):
    """One atom and 200, skewed cells, grids smaller than the patch."""
    (model, tokenizer), structure = small("levels", "framed", size, target), crystal(n_atoms, n_atoms)
    density = predict(structure, shape, model, tokenizer)
    assert density.shape == shape and density.values.dtype == np.float32 and np.isfinite(density.values).all()
    assert density.structure == structure and density.n_electrons == pytest.approx(valence_electrons(structure), rel=1e-6)
    raw = predict(structure, shape, model, tokenizer, rescale=False)
    factor = valence_electrons(structure) / raw.metadata["electrons_before_rescaling"]
    assert raw.n_electrons == pytest.approx(raw.metadata["electrons_before_rescaling"], rel=1e-5)
    np.testing.assert_allclose(density.values, raw.values * factor, rtol=1e-5)


def test_overlapping_patches_are_averaged():
    (model, tokenizer), structure = small("levels"), crystal(4)
    apart, shared = (predict(structure, (6, 6, 6), model, tokenizer, overlap=n, rescale=False) for n in (0, 1))
    assert apart.shape == shared.shape and not np.array_equal(apart.values, shared.values)
    with pytest.raises(TomatError, match="overlap"):
        predict(structure, (6, 6, 6), model, tokenizer, overlap=3)


def test_a_prediction_without_electrons_is_refused():
    tokenizer = Tokenizer("framed", fit_levels(-POSITIVE, 64), patch_size=3, pad_to=None)
    model = make_model(SMALL, tokenizer.vocab)
    with pytest.raises(TomatError, match="electrons"):
        predict(crystal(1), (4, 4, 4), model, tokenizer)
    assert predict(crystal(1), (4, 4, 4), model, tokenizer, rescale=False).n_electrons < 0


def test_an_element_without_a_free_atom_is_refused_before_the_work(monkeypatch):
    (model, tokenizer), structure = small(), Structure(Lattice.cubic(4), ["Tc"], [[0, 0, 0]])
    monkeypatch.setattr(tomat.predict, "free_run", lambda *args: pytest.fail("the work was done first"))
    with pytest.raises(TomatError, match="Tc"):
        predict(structure, (4, 4, 4), model, tokenizer)


def test_perfect_tokens_score_the_codecs_floor(monkeypatch):
    """Handing the true tokens to everything after the model gives the floor that is reported, and no other number."""
    density = with_free_atoms(a_density(3, (6, 6, 6)))
    for codec, target in (("two_token_9_12", "total"), ("levels", "difference")):
        model, tokenizer = small(codec, target=target)
        rows = {}
        def true_ids(model, tokenizer, prompts, choose, rows=rows):
            return iter(rows["ids"][:, prompts.shape[1]:-2].T)
        rows["ids"] = tokenizer.encode(density, tomat.predict.cover(density.shape, tokenizer.size))[0]
        monkeypatch.setattr(tomat.predict, "free_run", true_ids)
        (score,), _ = tomat.evaluate.evaluate([density], model, tokenizer, rescale=False)
        assert score.nmae_free_running == pytest.approx(score.nmae_codec_floor, rel=1e-3, abs=1e-7)
        assert score.nmae_codec_floor < score.nmae_free_atoms


def test_units_of_the_truth_do_not_change_a_score():
    (model, tokenizer), density = small(), with_free_atoms(a_density(3, (5, 5, 5)))
    (one,), _ = tomat.evaluate.evaluate([density], model, tokenizer)
    (other,), _ = tomat.evaluate.evaluate([density.as_units(RHO)], model, tokenizer)
    assert one.nmae_free_running == pytest.approx(other.nmae_free_running, rel=1e-5)
    assert one.nmae_free_atoms == pytest.approx(other.nmae_free_atoms, rel=1e-5)
