"""What was written before the modules moved still loads, goes on and says the same; see files/before/README.md."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tomat.tokens.levels import levels_metadata, load_levels
from tomat.density.core import preparation_name
from tomat.prediction.evaluate import evaluate
from tomat.io.remote import TomatError
from tomat.tokens.fit_codec import Histogram
from tomat.train.probe import ProbeTrainConfig, train_probe
from tomat.models.probe import ProbeConfig
from tomat.dataset.parquet import TokenizeConfig, density_checksum, read_shard
from tomat.prediction.predictors import load_predictor
from tomat.atoms.sad import load_atoms, with_sad
from tomat.dataset.meta import tokenizer_of
from tomat.dataset.verify import verify
from tomat.train.log import read_log
from tomat.dataset.meta import read_meta
from tomat.dataset.shards import tokenize
from tomat.models.sizes import MODELS, ModelSize
from tomat.density.store import RawStore
from tomat.dataset.fresh import FreshPatches, PatchConfig
from tomat.train.causal import RunConfig, TrainConfig, train

BEFORE = Path(__file__).parent / "files" / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
STORE = RawStore(BEFORE / "store.zarr")
DIFFERENCE = {"label": "before", "patches_per_material": 4, "rows_per_shard": 4, "prepare": with_sad}


@pytest.fixture(autouse=True)
def as_then(monkeypatch, one_thread):
    "One thread, and the size of the model."
    monkeypatch.setitem(MODELS, "nano", ModelSize(width=8, layers=1, heads=2, mlp=16, kv_heads=1))


def copied(name, folder):
    "A copy that may be written to."
    if (BEFORE / name).is_dir():
        shutil.copytree(BEFORE / name, folder / name)
    else:
        with tarfile.open(BEFORE / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name


def rows_in(folder):
    "All rows of a data set."
    return [row for shard in read_meta(folder)["shards"] for row in read_shard(folder / shard).to_pylist()]


def said(values_xyz):
    "Two numbers of a grid; the second one depends on the order."
    flat = values_xyz.ravel().astype(np.float64)
    return [flat.mean(), flat @ np.cos(np.arange(flat.size))]


def assert_predicts(path, name, rtol, trusted=True):
    predictor = load_predictor(path)
    if not trusted:  # checkpoints of before held no states of the training data
        predictor.model.trust = None
    for id, expected in EXPECTED["predicted"][name].items():
        true = STORE.read(id)
        np.testing.assert_allclose(said(predictor.predict(true.structure, true.shape).density.values), expected, rtol)
    return predictor


def assert_same_losses(out, name):
    for key in ("loss", "grad_norm"):
        now, then = ([line[key] for line in lines] for lines in (read_log(out), EXPECTED[name]))
        np.testing.assert_allclose(now, then, rtol=1e-5)


@pytest.mark.parametrize("name", ["store.zarr", "store.zip"])
def test_a_store_is_read(name):
    store = RawStore(BEFORE / name)
    assert store.ids == ["a", "b"] and store.splits == {"train": ["a"], "validation": ["b"]}
    for id, expected in EXPECTED["store"].items():
        assert density_checksum(store.read(id)) == expected["fingerprint"]
        np.testing.assert_allclose(said(store.read(id).values), expected["said"], 1e-6)
    a, b = map(store.read, "ab")
    assert a.sad is not None and b.sad is None and a.spin["diff"].shape == a.shape
    np.testing.assert_array_equal(a.augmentation["total"][2], np.arange(4) / 8)
    np.testing.assert_array_equal(a.moments["diff"], [0.25, -0.5])


@pytest.mark.parametrize("name, settings", [
    ("rows", {"label": "before", "patches_per_material": 8, "rows_per_shard": 8}), ("rows_difference", DIFFERENCE)])
def test_rows_are_taken_for_what_the_same_settings_make_now(name, settings, tmp_path):
    folder = copied(name, tmp_path)
    meta, rows = read_meta(folder), rows_in(folder)
    assert meta["plan"] == EXPECTED["plans"][name] and verify(folder) == []
    tokenizer = tokenizer_of(folder, meta)
    times = [(folder / shard).stat().st_mtime_ns for shard in meta["shards"]]
    assert tokenize(STORE, tokenizer, folder, TokenizeConfig(**settings)) == meta
    assert [(folder / shard).stat().st_mtime_ns for shard in meta["shards"]] == times  # none was made again
    (folder / "rows-00001.parquet").unlink()
    remade = tokenize(STORE, tokenizer, folder, TokenizeConfig(**settings))
    assert remade | {"shards": {}} == meta | {"shards": {}} and rows_in(folder) == rows and verify(folder) == []


def test_a_missing_part_is_added_to_one_of_before(tmp_path):
    folder = copied("rows_parts", tmp_path)
    tokenizer = tokenizer_of(BEFORE / "rows_difference", read_meta(BEFORE / "rows_difference"))
    tokenize(STORE, tokenizer, folder, TokenizeConfig(**DIFFERENCE), part=(1, 2))
    assert read_meta(folder)["plan"] == EXPECTED["plans"]["rows_difference"]
    assert rows_in(folder) == rows_in(BEFORE / "rows_difference")


def test_names_of_preparations_are_those_of_before():
    assert preparation_name(with_sad) == EXPECTED["prepared"]
    tokenizer = tokenizer_of(BEFORE / "rows", read_meta(BEFORE / "rows"))
    for name, prepare in {"": None, "difference": with_sad}.items():
        stream = FreshPatches(STORE, ["a", "b"], tokenizer, PatchConfig(2, prepare=prepare), epochs=1)
        assert stream.fingerprint == EXPECTED["streams"][name]
    with pytest.raises(TomatError, match="register the function"):
        tokenize(STORE, tokenizer, "nowhere", TokenizeConfig(prepare=lambda density: density))
    with pytest.raises(TomatError, match="register the function"):
        FreshPatches(STORE, ["a"], tokenizer, PatchConfig(prepare=lambda density: density))


def test_a_run_goes_on(tmp_path):
    out = copied("run", tmp_path)
    before = read_log(out)
    config = TrainConfig(steps=6, batch_size=2, warmup=2, seed=3, val_seqs=2, eval_every=3)
    model = train(BEFORE / "rows", out, config, RunConfig(save_every=3, keep=1))
    assert len(before) == 3 and read_log(out)[:3] == before  # with their times: no step was done again
    assert_same_losses(out, "run")
    assert_predicts(model, "causal", 1e-3)


def test_a_fit_goes_on(tmp_path):
    out = copied("fit", tmp_path)
    before = read_log(out)
    network = ProbeConfig(width=4, n_layers=1, atom_channels=(2, 1, 1), voxel_channels=(2, 1, 1), readout_width=4, readout_blocks=1)
    model = train_probe(STORE, ["a"], out, ProbeTrainConfig(network, steps=6, materials=1, voxels=20, warmup=2, levels=16), ["b"],
                        RunConfig(save_every=3))
    assert len(before) == 3 and read_log(out)[:3] == before  # with their times: no step was done again
    assert_same_losses(out, "fit")
    assert_predicts(model, "parallel", 1e-4, trusted=False)


@pytest.mark.parametrize("name", ["causal", "parallel"])
def test_a_checkpoint_predicts_the_same(name, tmp_path):
    predictor = assert_predicts(copied(f"checkpoint_{name}", tmp_path), name, 1e-5)
    assert predictor.identity()["weights"] == EXPECTED["identity"][name]


def test_scores_are_kept(tmp_path):
    out, predictors = copied("scores", tmp_path), {}
    for name in ("causal", "parallel"):
        predictors[name] = load_predictor(copied(f"checkpoint_{name}", tmp_path), full_grid=True)  # nothing was interpolated
    kept = {}
    for id in STORE.ids:
        path = out / "materials" / f"{id}.json"
        kept[id] = json.loads(path.read_text())
        path.write_text(json.dumps(kept[id] | {"stamp": STORE.version_tag(id)}))  # a stamp holds the time of a copy
    scores = evaluate(STORE, STORE.ids, predictors, out).scores
    assert [score.seconds for score in scores] == [line["seconds"] for id in STORE.ids for line in kept[id]["scores"]]
    assert all(score.potential_error is score.charge_error is None for score in scores)
    fresh = evaluate(STORE, STORE.ids, predictors, tmp_path / "fresh").scores
    assert all(score.potential_error > 0 and score.charge_error is not None for score in fresh)
    np.testing.assert_allclose([score.nmae for score in fresh], [score.nmae for score in scores], rtol=1e-4)


def test_fits_are_read():
    assert {symbol: atom.n_valence for symbol, atom in load_atoms(BEFORE / "atoms.json").atoms.items()} == EXPECTED["atoms"]
    of_rows = tokenizer_of(BEFORE / "rows", read_meta(BEFORE / "rows")).density_codec
    np.testing.assert_array_equal(load_levels(BEFORE / "codec.npz").recon_points, of_rows.recon_points)
    assert levels_metadata(BEFORE / "codec.npz") == {"target": "total", "unit": "electrons", "objective": "l1"}
    assert Histogram.load(BEFORE / "histogram.npz").n_values == STORE.read("a").values.size
