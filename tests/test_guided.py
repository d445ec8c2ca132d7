"""Guided rows: what is known in front of each voxel, decoding with known tokens, noisy histories, soft targets, fresh patches."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from crystals import a_density, quick, real_looking, with_any_sad
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL, attentive_model

from tomat.atoms.sad import sad_density
from tomat.dataset.fresh import FreshPatches, PatchConfig
from tomat.dataset.held_out import materials_of, train_and_val
from tomat.dataset.noise import HistoryNoise
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.dataset.stream import Batches
from tomat.dataset.verify import verify
from tomat.density.core import RHO
from tomat.density.store import RawStore, sample_store, write_store
from tomat.io.remote import TomatError
from tomat.models.causal import load_checkpoint, make_model
from tomat.models.loss import LossModule, loss_sum
from tomat.models.objective import objective_of
from tomat.models.sizes import MODELS
from tomat.prediction.causal import CausalPredictor, teacher_forced
from tomat.prediction.decoding import free_run
from tomat.prediction.predictors import load_predictor
from tomat.tokens.codecs import PUBLISHED_DENSITY, log_codec
from tomat.tokens.guides import GUIDE_LEVELS, distance_steps, ruling_atoms
from tomat.tokens.levels import fit_levels
from tomat.tokens.patches import as_size, cut, random_offsets
from tomat.tokens.tokenizer import Tokenizer, tokenizer_from_dict
from tomat.train.causal import train
from tomat.train.config import RunConfig, TrainConfig
from tomat.train.log import read_log

SIGNED = fit_levels(real_looking(np.random.default_rng(7), 20_000), 64)
CODECS = {"levels": SIGNED, "two_token_9_12": PUBLISHED_DENSITY, "tomol_3byte": log_codec("tomol_3byte", -4.13, 4.97)}
pytestmark = pytest.mark.usefixtures("one_thread")


def guided(codec="levels", size=3, **more):
    return Tokenizer("guided", CODECS[codec], patch_size=size, pad_to=None, target="difference", **more)


def material(seed, shape=(6, 7, 8), n_atoms=2):
    return with_any_sad(a_density(seed, shape, n_atoms))


side = st.integers(1, 5)
sizes = st.one_of(side, st.tuples(side, side, side))
shapes = st.tuples(*[st.integers(1, 9)] * 3)
seeds = st.integers(0, 2**32 - 1)


# Rows


@quick
@given(st.sampled_from(sorted(CODECS)), shapes, sizes, st.integers(1, 20), seeds)
def test_a_row_decodes_to_what_went_in(codec, shape, size, n_atoms, seed):
    density, tok, rng = material(seed, shape, n_atoms), guided(codec, size), np.random.default_rng(seed)
    offsets = random_offsets(shape, 3, rng)
    ids_NxL, _ = tok.encode(density, offsets)
    assert ids_NxL.shape == (3, tok.row_length(n_atoms))
    difference = density.total - density.as_units("electrons").sad
    sad = density.as_units(RHO).sad
    for ids_L, offset, values, here in zip(ids_NxL, offsets, cut(difference, offsets, size), cut(sad, offsets, size), strict=True):
        row = tok.decode(ids_L)
        assert (row.layout, row.shape, row.size) == ("guided", shape, as_size(size))
        assert (np.abs(row.values - values) <= CODECS[codec].bound(values)).all()
        assert (np.abs(GUIDE_LEVELS.decode(row.guides[..., :1]) - here) <= GUIDE_LEVELS.bound(here)).all()
        for voxel in itertools.islice(np.ndindex(*row.size), 0, None, 7):
            frac = (offset + voxel) % shape / np.array(shape)
            number, distance = ruling_atoms(density.structure, frac[None])
            assert row.guides[voxel][1:].tolist() == [number[0], distance_steps(distance)[0]]


@quick
@given(shapes, sizes, st.integers(1, 20), seeds, st.tuples(*[st.integers(-40, 40)] * 3))
def test_a_whole_grid_step_does_not_change_a_row(shape, size, n_atoms, seed, steps):
    density, tok = material(seed, shape, n_atoms), guided(size=size)
    offsets = random_offsets(shape, 4, np.random.default_rng(seed))
    rolled = density.rolled(steps)
    rolled = replace(rolled, sad=np.roll(density.sad, steps, (0, 1, 2)))
    assert np.array_equal(tok.encode(rolled, offsets + steps)[0], tok.encode(density, offsets)[0])


@quick
@given(st.integers(0, 10**6), st.data())
def test_a_lost_or_doubled_token_is_refused(seed, data):
    tok = guided()
    ids_L = tok.encode(material(seed), [(1, 2, 3)])[0][0]
    place = data.draw(st.integers(0, len(ids_L) - 1))
    for damaged in (np.delete(ids_L, place), np.insert(ids_L, place, ids_L[place])):
        with pytest.raises(TomatError, match="expected"):
            tok.decode(damaged)


def test_the_published_size_and_the_blocks():
    tok = Tokenizer("guided", fit_levels(np.linspace(-1, 1, 5000), 1024), patch_size=12, target="difference")
    assert (tok.n_block_tokens, tok.n_density_tokens) == (6912, 1728)
    assert tokenizer_from_dict(tok.to_dict()) == tok
    blocks = list(tok.vocab.blocks)
    assert blocks == ["special", "element", "integer", "position", "guide", "distance", "density"]
    framed = Tokenizer("framed", tok.density_codec, target="difference").vocab
    assert tok.vocab.size == framed.size + 512 + 128 and tok.vocab.names[:20] == framed.names[:20]
    with pytest.raises(TomatError, match="set the target to difference"):
        Tokenizer("guided", tok.density_codec)


def test_many_workers_write_the_bytes_of_one(tmp_path):
    materials = [replace(material(seed), id=f"m-{seed}") for seed in range(6)]
    for workers in (1, 4):
        tokenize(materials, guided(), tmp_path / str(workers), TokenizeConfig(5, rows_per_shard=10, workers=workers))
    one, four = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.suffix == ".parquet"} for n in "14")
    assert one == four and len(one) > 1 and verify(tmp_path / "4") == []


# Decoding


@pytest.mark.parametrize("codec", ["levels", "two_token_9_12"])
def test_known_tokens_are_fed_and_the_cache_changes_nothing(codec):
    "What `free_run` writes is what reading the whole row again would; with the guides it is a legal row."
    tok, density = guided(codec, (2, 3, 2)), material(5)
    model, offsets = attentive_model(tok, sharpness=3), [(0, 0, 0), (3, 2, 5)]
    prompts, guides = (tok.prompt(density.structure, density.shape, offsets),
                       tok.guides(density.structure, density.as_units(RHO).sad, np.array(offsets)))
    k, ids = tok.density_codec.tokens_per_value, torch.from_numpy(prompts).long()
    for place, written in enumerate(free_run(model, tok, prompts, "argmax", guides)):
        if place % k == 0:
            ids = torch.cat([ids, torch.from_numpy(guides[:, place // k])], 1)
        low, high = tok.legal_ids(place)
        with torch.inference_mode():
            assert (model(ids).logits[:, -1, low:high].argmax(-1) + low).tolist() == written.ids_N.tolist(), place
        ids = torch.cat([ids, torch.from_numpy(written.ids_N)[:, None]], 1)
    end = np.tile([tok.vocab.id("DENS_END"), tok.vocab.id("EOS")], (2, 1))
    rows = np.concatenate([ids.numpy(), end], 1)
    known = tok.encode(density, offsets)[0]
    values = prompts.shape[1] + tok.places
    assert all(np.isfinite(tok.decode(row).values).all() for row in rows)
    assert np.array_equal(np.delete(rows, values, 1), np.delete(known, values, 1))


def test_a_model_without_history_predicts_all_voxels_in_one_pass(rows, tmp_path, small_nano):
    "Each voxel as a model says that has read the zero level at every voxel before; a checkpoint trained so is used so."
    tok, density = guided(size=(2, 3, 2)), material(5)
    model, offsets = attentive_model(tok, sharpness=3), np.array([(0, 0, 0), (3, 2, 5)])
    prompts, guides = (tok.prompt(density.structure, density.shape, offsets),
                       tok.guides(density.structure, density.as_units(RHO).sad, offsets))
    (low, high), ids, found = tok.legal_ids(0), torch.from_numpy(prompts).long(), []
    for place, written in enumerate(free_run(model, tok, prompts, "argmax", guides, history=False)):
        ids = torch.cat([ids, torch.from_numpy(guides[:, place])], 1)
        with torch.inference_mode():
            assert (model(ids).logits[:, -1, low:high].argmax(-1) + low).tolist() == written.ids_N.tolist(), place
        ids, found = torch.cat([ids, torch.full((2, 1), tok.zero)], 1), [*found, written.ids_N]
    assert len(found) == 12 and len(np.unique(found)) > 2
    for noise, history in ((1.0, False), (0.5, True)):
        causal = load_predictor(train(rows, tmp_path / str(noise), replace(CONFIG, steps=1, noise=noise)))
        assert causal.history == history == ("teacher-forced" in causal.references())


def test_every_voxel_sees_what_stands_before_it_and_nothing_else():
    "A later token changes no earlier value: in the loss, in teacher forcing, and the guides and atoms are read."
    tok, density = guided(), material(4, (3, 3, 6))
    model = attentive_model(tok, sharpness=3)
    ids = torch.from_numpy(tok.encode(density, [(0, 0, 0)])[0]).long()
    start, learner = tok.prompt_length(2), LossModule(model, objective_of(tok))

    def hidden(ids_1xL):
        with torch.inference_mode():
            return model(ids_1xL).logits[0]
    before = hidden(ids)
    for place in (start + tok.places[4], start + tok.places[13] - 1, start - 5):  # a value, a guide, a position
        other = ids.clone()
        other[0, place] += 1
        after = hidden(other)
        assert torch.equal(before[:place], after[:place]) and not torch.allclose(before[place:], after[place:])
    assert learner.positions(ids).tolist() == (start + tok.places - 1).tolist()
    predictor = CausalPredictor(model, tok, rescale=False)
    changed = density.values.copy()
    changed[1, 1, 1] += 50  # voxel 13 of the first patch
    one, other = (teacher_forced(x, predictor).density.values for x in (density, replace(density, values=changed)))
    differs = (one != other)[:, :, :3].ravel()
    assert not differs[:14].any() and differs[14:].any() and np.array_equal(one[:, :, 3:], other[:, :, 3:])


def test_a_prediction_reads_no_density():
    tok, density = guided(unit=RHO), material(4, (6, 6, 6))
    found = CausalPredictor(attentive_model(tok, sharpness=3), tok, rescale=False).predict(density.structure, density.shape)
    added = found.density.total - sad_density(density.structure, density.shape)
    assert len(np.unique(added.round(4))) > 5
    assert (np.abs(added / density.volume) <= np.abs(SIGNED.values_of_ids()).max() * 1.001).all()


# Training


@pytest.fixture
def small_nano(monkeypatch):
    monkeypatch.setitem(MODELS, "nano", SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    write_store([replace(material(seed, n_atoms=seed % 3 + 1), id=f"m-{seed}", sad=None) for seed in range(5)], {}, folder)
    return folder


@pytest.fixture(scope="module")
def rows(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "rows"
    tokenize(RawStore(store), guided(), folder, TokenizeConfig(4, label="five", prepare=with_any_sad))
    return folder


CONFIG = TrainConfig(steps=6, batch_size=3, warmup=2, seed=3)


def losses(run):
    return [line["loss"] for line in read_log(run)]


def test_the_log_says_which_loss_ran(rows, tmp_path, small_nano):
    "The first loss of a run is that of its first batch by the formula: hard or soft targets, a mixture, a noisy history."
    training, _ = train_and_val(rows, 3, 1024, 0, None)
    block = next(iter(Batches(training, 3)))
    found = set()
    for emd, soft, noise in [(0, 0, 0), (0, 2.0, 0), (0.5, 2.0, 0), (0, 0, 1.0)]:
        config = replace(CONFIG, steps=1, emd=emd, soft=soft, noise=noise)
        train(rows, tmp_path / f"{emd} {soft} {noise}", config)
        tok, ids = guided(), block.ids
        read = torch.from_numpy(HistoryNoise(tok, noise, 3)(ids.numpy(), np.arange(3))) if noise else ids
        learner = LossModule(make_model(SMALL, tok.vocab, 3), objective_of(tok, emd=emd, soft=soft))
        places = learner.positions(ids)
        with torch.no_grad():
            logits = learner.model(read[:, :-1]).logits[..., learner.objective.ids.start:].flatten(0, 1)[places]
        target = ids[:, 1:].flatten()[places] - learner.objective.ids.start
        expected = loss_sum(logits, target, emd, learner.values_V, soft).item() / len(places)
        (logged,) = losses(tmp_path / f"{emd} {soft} {noise}")
        assert logged == pytest.approx(expected, rel=1e-4)
        found.add(round(logged, 4))
    assert len(found) == 4


@quick
@given(st.integers(0, 99), st.floats(0.05, 20))
def test_soft_targets_are_a_divergence_from_a_gaussian(seed, soft):
    rng = np.random.default_rng(seed)
    logits, values, target = rng.normal(size=(5, 9)), rng.normal(size=9), rng.integers(9, size=5)
    wanted = np.exp(-0.5 * ((values - values[target, None]) / soft) ** 2)
    wanted /= wanted.sum(1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.where(wanted > 0, wanted * np.log(np.maximum(wanted, 1e-300) / shares), 0).sum()
    found = loss_sum(torch.from_numpy(logits), torch.from_numpy(target), 0.0, torch.from_numpy(values).float(), soft)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_noise_and_fresh_patches_are_the_same_after_a_stop(store, rows, tmp_path, small_nano):
    config = replace(CONFIG, noise=1.0, soft=1.0)
    source = _WithSad(store)
    whole = train(rows, tmp_path / "whole", config, RunConfig(save_every=2), fresh=source)
    stopped = itertools.count()

    def stop(model, tokenizer):
        if next(stopped) == 0:
            raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt):
        train(rows, tmp_path / "again", replace(config, eval_every=3), RunConfig(save_every=2), eval_callback=stop, fresh=source)
    config = replace(config, eval_every=3)
    again = train(rows, tmp_path / "again", config, RunConfig(save_every=2), eval_callback=stop, fresh=source)
    assert losses(tmp_path / "whole") == losses(tmp_path / "again")
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert losses(tmp_path / "whole") != losses_of(rows, tmp_path / "rows", config)


def losses_of(rows, out, config):
    train(rows, out, config)
    return losses(out)


class _WithSad:
    "A store of noise, which has no electrons in the right number, with its SAD."

    def __init__(self, path):
        self.store = RawStore(path)

    def read(self, id):
        return with_any_sad(self.store.read(id))


def test_fresh_patches_come_from_the_training_materials_alone(store, rows):
    training, validation = train_and_val(rows, 3, 1024, 4, None)
    ids = materials_of(training)
    held_out = {validation.names[m] for window in validation for m in window.materials.tolist()}
    assert not held_out & {*ids} and held_out | {*ids} == {f"m-{seed}" for seed in range(5)}
    stream = FreshPatches(_WithSad(store), ids, guided(), PatchConfig(8, permute_axes=True), seed=3)
    seen = [row[row > 0].tobytes() for batch in itertools.islice(Batches(stream, 8), 12) for row in batch.ids.numpy()]
    assert len({*seen}) == len(seen)


def test_a_trained_model_reads_its_guides(tmp_path, small_nano):
    "With the guides of another row its loss on unseen rows is worse by a tenth of a nat at least."
    store = sample_store()
    materials = [store.read(id) for id in store.split("train")[:6]]
    differences = np.concatenate([(d.as_units(RHO).values - d.as_units(RHO).sad).ravel() for d in materials])
    tok = Tokenizer("guided", fit_levels(differences, 64), patch_size=3, pad_to=None, target="difference", unit=RHO)
    tokenize(materials, tok, tmp_path / "rows", TokenizeConfig(2))
    config = TrainConfig(steps=150, batch_size=6, warmup=10, noise=1.0, optimizer="muon", lr=1e-2)
    model, _ = load_checkpoint(train(tmp_path / "rows", tmp_path / "run", config, RunConfig(save_every=150), fresh=store))
    rows = np.concatenate([tok.encode(d, random_offsets(d.shape, 20, np.random.default_rng(9)))[0][:, -tok.n_block_tokens - 3:]
                           for d in materials if len(d.structure) == len(materials[0].structure)])
    head = tok.encode(materials[0], [(0, 0, 0)])[0][0, :-tok.n_block_tokens - 3]
    rows = np.concatenate([np.tile(head, (len(rows), 1)), rows], 1)
    learner, guides = LossModule(model, objective_of(tok)), len(head) + 1 + np.setdiff1d(np.arange(tok.n_block_tokens), tok.places)
    mixed = rows.copy()
    mixed[:, guides] = np.random.default_rng(3).permutation(rows)[:, guides]
    found = []
    for ids in (rows, mixed):
        true, read = torch.from_numpy(ids).long(), torch.from_numpy(HistoryNoise(tok, 1.0, 0)(ids, np.arange(len(ids)))).long()
        with torch.no_grad():
            places = learner.positions(true)
            found.append(learner(true, places, read).item() / len(places))
    assert found[1] > found[0] + 0.1
