"""Files of an ill-meaning or careless person: nothing in them runs, nothing is fetched, nothing is written elsewhere."""

import gzip
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from crystals import is_sentence, noise, refused
from fsspec.implementations.memory import MemoryFileSystem
from pymatgen.core import Lattice, Structure
from safetensors.torch import load_file, save_file

from tomat.dataset.meta import read_meta, tokenizer_of
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.dataset.sync import sync
from tomat.dataset.verify import verify
from tomat.density.convert import store_all
from tomat.density.formats import read_density, read_structure, write_density
from tomat.density.source import InMemory, open_source
from tomat.density.store import RawStore, write_store
from tomat.io.files import local_copy
from tomat.io.remote import TomatError
from tomat.atoms.sad import sad_density
from tomat.models.causal import load_checkpoint
from tomat.models.probe import load_probe
from tomat.prediction.batch import plan_tasks
from tomat.prediction.crystals import predict
from tomat.prediction.evaluate import evaluate
from tomat.prediction.predictors import load_predictor
from tomat.tokens.fit_codec import Histogram
from tomat.train.checkpoints import load_state, run_lock
from tomat.train.log import list_runs

BEFORE = Path(__file__).parent / "files" / "before"


@pytest.fixture
def trap(tmp_path, monkeypatch):
    "Objects of JSON that import a module when monty decodes them; the module must stay unknown."
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil_module.py").write_text("class X: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield [{"@module": "evil_module", "@class": "X"}, {"@module": "evil_module", "@callable": "X"}]
    assert "evil_module" not in sys.modules
    sys.modules.pop("evil_module", None)


def good():
    return noise(np.random.default_rng(0), spin=("diff",))


def edited(path, change):
    "Rewrite a JSON file after a change of its content."
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def one_sentence(function, *args, words="."):
    with pytest.raises(TomatError, match=words) as caught:
        function(*args)
    assert is_sentence(str(caught.value)), caught.value


# What monty would import and call


def test_a_json_density_builds_no_class_that_it_names(tmp_path, trap):
    for bad in trap:
        write_density(good(), tmp_path / "x.json")
        edited(tmp_path / "x.json",
               lambda task, bad=bad: task["data"]["poscar"]["structure"]["sites"][0]["properties"].update(x=bad))
        refused(tmp_path / "x.json", "evil_module.X")
        write_density(good(), tmp_path / "x.json")
        edited(tmp_path / "x.json", lambda task, bad=bad: task["data"]["data"].update(total=bad))
        refused(tmp_path / "x.json", "evil_module.X")


def test_a_structure_builds_no_class_that_it_names(tmp_path, trap):
    for bad in trap:
        fields = good().structure.as_dict()
        fields["sites"][0]["properties"]["x"] = bad
        for name, text in {"s.json": json.dumps(fields), "s.yaml": json.dumps(fields)}.items():  # JSON is YAML
            (tmp_path / name).write_text(text)
            refused(tmp_path / name, "evil_module.X", read=read_structure)


def test_a_zarr_group_builds_no_class_that_it_names(tmp_path, trap):
    shutil.copytree(BEFORE / "store.zarr" / "label" / "a.zarr", tmp_path / "a.zarr")
    def change(group, bad):
        structure = json.loads(group["attributes"]["structure"])
        structure["sites"][0]["properties"]["x"] = bad
        group["attributes"]["structure"] = json.dumps(structure)
    for bad in trap:
        edited(tmp_path / "a.zarr" / "zarr.json", lambda group, bad=bad: change(group, bad))
        refused(tmp_path / "a.zarr", "evil_module.X")


def test_what_metadata_name_stays_as_it_is(tmp_path, trap):
    "Tasks of the Materials Project hold dates in this form."
    write_density(good(), tmp_path / "x.json")
    edited(tmp_path / "x.json", lambda task: task.update(last_updated=trap[0]))
    assert read_density(tmp_path / "x.json").metadata["last_updated"] == trap[0]
    write_density(read_density(tmp_path / "x.json"), tmp_path / "x.zarr")
    assert read_density(tmp_path / "x.zarr").metadata["last_updated"] == trap[0]


# JSON of any content


@pytest.mark.parametrize("text, words", [(5000 * "1", "5,000 digits"), (15000 * "[" + 15000 * "]", "levels"),
                                         ('{"a":' * 500 + "1" + 500 * "}", "levels"), ("\x00\xff", "JSON")])
def test_json_has_limits(tmp_path, text, words):
    for name in ("rows/meta.json", "store/split.json", "CHGCAR.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "store" / "mp_filelist.txt").write_text("a\n")
    one_sentence(verify, tmp_path / "rows", words=words)
    one_sentence(lambda: RawStore(tmp_path / "store").splits, words=words)
    refused(tmp_path / "CHGCAR.json", words)
    one_sentence(store_all, open_source(tmp_path / "CHGCAR.json"), tmp_path / "out", words=words)


# Names that become paths


def test_an_object_is_copied_into_its_folder_alone(tmp_path, monkeypatch):
    "A bucket with a key that climbs out of the folder that is copied."
    monkeypatch.setattr(MemoryFileSystem, "find", lambda self, path, detail=False, **kwargs: {
        f"{path}/a.txt": {"size": 1, "type": "file"}, f"{path}/../../stolen": {"size": 1, "type": "file"}} if detail else
        [f"{path}/a.txt", f"{path}/../../stolen"])
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, start=None, end=None, **kwargs: b"x"[start or 0:end])
    monkeypatch.setattr(MemoryFileSystem, "get", lambda self, keys, paths, **kwargs: [Path(path).write_text("x") for path in paths])
    monkeypatch.setenv("TMPDIR", str(tmp_path / "one" / "two"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "one" / "two").mkdir(parents=True)
    def copy():
        with local_copy("memory://bucket/group.zarr"):
            pass
    for function in (copy, lambda: sync("memory://bucket/data", tmp_path / "one" / "two" / "three")):
        one_sentence(function, words="stolen")
        assert not list(tmp_path.rglob("stolen"))


@pytest.mark.parametrize("name", ["store", "store.zip"])
def test_an_id_of_a_store_is_a_name(tmp_path, three, name):
    write_store(three, {}, tmp_path / "store")
    (tmp_path / "store" / "label" / "m-1.zarr").rename(tmp_path / "stolen.zarr")
    (tmp_path / "store" / "mp_filelist.txt").write_text("../../stolen\nm-2\nm-3\n")
    if name == "store.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            packed.write(tmp_path / "store" / "mp_filelist.txt", "mp_filelist.txt")
    store = RawStore(tmp_path / name)
    one_sentence(lambda: store.ids, words=r"mp_filelist.txt holds the name '\.\./\.\./stolen'")
    one_sentence(store.read, "../../stolen", words="stolen")
    one_sentence(evaluate, store, ["../../stolen"], {"probe": load_predictor()}, tmp_path / "a" / "scores", words="stolen")


def test_a_density_in_memory_is_scored_into_its_folder_alone(tmp_path, three):
    source = InMemory([replace(three[0], id="../../stolen")])
    one_sentence(evaluate, source, source.ids, {"probe": load_predictor()}, tmp_path / "a" / "b" / "scores", words="stolen")
    assert not list(tmp_path.rglob("stolen*"))


def test_a_member_of_an_archive_has_a_plain_path(tmp_path, three):
    write_density(three[0], tmp_path / "a.zarr.zip")
    with zipfile.ZipFile(tmp_path / "a.zarr.zip", "a") as packed:
        packed.writestr("charge_density_total/../../stolen", b"x")
    refused(tmp_path / "a.zarr.zip", "stolen")


def test_a_shard_is_named_as_it_was_written(tmp_path):
    shutil.copytree(BEFORE / "rows", tmp_path / "rows")
    edited(tmp_path / "rows" / "meta.json",
           lambda meta: meta["shards"].update({"../stolen.parquet": meta["shards"]["rows-00000.parquet"]}))
    one_sentence(verify, tmp_path / "rows", words="not of the form")


def test_a_checkpoint_names_its_own_files(tmp_path):
    shutil.copytree(BEFORE / "checkpoint_parallel", tmp_path / "model")
    (tmp_path / "stolen").write_bytes(b"x")
    edited(tmp_path / "model" / "tomat.json", lambda tomat: tomat["md5"].update({"../stolen": hashlib.md5(b"x").hexdigest()}))
    one_sentence(load_probe, tmp_path / "model", words="tomat.json is damaged")


# Checkpoints


def checkpoint(folder, kind, change, name="config.json"):
    "A checkpoint of before with changes in one of its JSON files, and the MD5s that fit."
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "causal":
        with tarfile.open(BEFORE / "checkpoint_causal.tar.xz") as archive:
            archive.extractall(folder.parent, filter="data")
        (folder.parent / "checkpoint_causal").rename(folder)
    else:
        shutil.copytree(BEFORE / "checkpoint_parallel", folder)
    edited(folder / name, change)
    md5 = hashlib.md5((folder / "config.json").read_bytes()).hexdigest()
    if name == "config.json":
        edited(folder / "tomat.json", lambda tomat: tomat["md5"].update({"config.json": md5}))
    return folder


@pytest.mark.parametrize("kind, load, changes", [
    ("causal", load_checkpoint, [{"num_key_value_heads": 99_999}, {"num_attention_heads": 2.5}, {"num_hidden_layers": 10**7},
                                 {"num_hidden_layers": 900}, {"hidden_size": 10**6}, {"intermediate_size": -1}, {"head_dim": "4"},
                                 {"hidden_act": "gelu"}, {"rope_parameters": [1]}, {"rope_parameters": {"rope_theta": 1e300}},
                                 {"vocab_size": 10**12}, {"rms_norm_eps": None}]),
    ("parallel", load_probe, [{"rounds": 10**7}, {"width": 99_999}, {"reach": 1e9}, {"dropout": "x"}, {"voxel_channels": 3},
                              {"blocks": 10**7}, {"trunk": True}, {"unknown": 1}])])
def test_a_config_has_bounds(tmp_path, kind, load, changes):
    for change in changes:
        one_sentence(load, checkpoint(tmp_path / "model", kind, lambda config, change=change: config.update(change)))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "auto_map", "quantization_config", "dtype"])
def test_a_config_fetches_nothing(tmp_path, monkeypatch, key):
    "These keys let transformers import or fetch code; they are not used."
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    value = {"auto_map": {"AutoModelForCausalLM": "somebody/model--x.Y"}, "quantization_config": {"quant_method": "bitsandbytes"},
             "dtype": "no_such_type"}.get(key, "somebody/kernel")
    plain, _ = load_checkpoint(checkpoint(tmp_path / "plain", "causal", lambda config: None))
    model, _ = load_checkpoint(checkpoint(tmp_path / "model", "causal", lambda config: config.update({key: value})))
    ids_BxL = torch.arange(12)[None]
    assert torch.equal(model(ids_BxL).logits, plain(ids_BxL).logits) and not hasattr(model.config, "auto_map")


@pytest.mark.parametrize("kind, load", [("causal", load_checkpoint), ("parallel", load_probe)])
def test_damaged_metadata_of_a_checkpoint(tmp_path, kind, load):
    key = "tokenizer" if kind == "causal" else "codec"
    changes = [{"training": []}, {"training": {"elements": [1]}}, {"training": {"elements": 3}}, {"md5": []}, {key: [1]},
               {"md5": {"config.json": 3}}, {key: {"codec": "levels"}}, {key: {"codec": []}}, {key: 1},
               *([{"decoder": ["probe"]}] if kind == "parallel" else [])]
    for change in changes:
        folder = checkpoint(tmp_path / "model", kind, lambda tomat, change=change: tomat.update(change), "tomat.json")
        one_sentence(load, folder)
        one_sentence(load_predictor, folder)
    for text in ("[]", "3", "{}", '{"a"'):
        folder = checkpoint(tmp_path / "model", kind, lambda tomat: None)
        (folder / "tomat.json").write_text(text)
        one_sentence(load, folder)
        one_sentence(load_predictor, folder)


def test_weights_of_another_size_build_no_network(tmp_path):
    folder = checkpoint(tmp_path / "model", "parallel", lambda config: config.update(width=1000, trunk=2000))
    one_sentence(load_probe, folder, words=r"a network of [\d,]+ numbers, and the file holds 1,849")
    folder = checkpoint(tmp_path / "model", "parallel", lambda config: None)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in weights.items()}, folder / "model.safetensors")
    md5 = hashlib.md5((folder / "model.safetensors").read_bytes()).hexdigest()
    edited(folder / "tomat.json", lambda tomat: tomat["md5"].update({"model.safetensors": md5}))
    one_sentence(load_probe, folder, words="NaN or infinite weights")


class Bomb:
    "A pickle that makes a file when it is loaded."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_run(tmp_path):
    ran = tmp_path / "ran"
    state = tmp_path / "step-00000001"
    state.mkdir()
    torch.save({"model": Bomb(ran)}, state / "state.pt")
    (state / "md5.json").write_text(json.dumps({"state.pt": hashlib.md5((state / "state.pt").read_bytes()).hexdigest()}))
    one_sentence(load_state, state, words="cannot be read")
    np.savez(tmp_path / "histogram.npz", bins=np.array([Bomb(ran)]), counts=np.ones(1))
    one_sentence(Histogram.load, tmp_path / "histogram.npz", words="not an .npz file of numbers")
    (tmp_path / "histogram.npz").write_bytes(pickle.dumps(Bomb(ran)))
    one_sentence(Histogram.load, tmp_path / "histogram.npz", words="not an .npz file of numbers")
    assert not ran.exists()


# Damaged files of runs and fits


def test_a_damaged_run_is_one_sentence(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    line = {"step": 1, "tokens": 10, "loss": 1.0, "lr": 0.1, "time": {"tokens_per_s": 3.0}}
    config = {"config": {"size": "nano", "steps": 4}, "data": {"label": "x"}}
    for wrong_line, wrong_config in [
            ({"tokens": None}, {}), ({"loss": None, "val": {"loss": "x"}, "time": 3}, {}), ({"time": []}, {}), ({"tokens": {}}, {}),
            ({}, {"config": {"steps": 4}}), ({}, {"config": []}), ({}, {"data": {}})]:
        (run / "log.jsonl").write_text(json.dumps(line | wrong_line) + "\n")
        (run / "config.json").write_text(json.dumps(config | wrong_config))
        one_sentence(list_runs, tmp_path, words="is a damaged run")
    (run / "log.jsonl").write_text(json.dumps(line) + "\n")
    (run / "config.json").write_text(json.dumps(config))
    assert list_runs(tmp_path)[0].count == 10


def test_any_flipped_byte_of_a_histogram_is_one_sentence_or_read(tmp_path):
    content = (BEFORE / "histogram.npz").read_bytes()
    rng, refusals = np.random.default_rng(0), 0
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (tmp_path / "h.npz").write_bytes(bytes(flipped))
        try:
            Histogram.load(tmp_path / "h.npz")
        except TomatError as err:
            refusals += str(err).endswith(".")
    assert refusals > 200


# Damaged data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A store and rows that this version wrote: each path → whether it must be found when a byte of it flips."
    folder = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(7)
    made = [noise(rng, (3, 4, 5), n, spin=("diff",), sad=True, augmented=True) for n in (1, 2, 3)]
    write_store([replace(density, id=f"m-{n}", metadata={}) for n, density in enumerate(made)], {}, folder / "store")
    old = RawStore(BEFORE / "store.zarr")
    tokenize(old, tokenizer_of(BEFORE / "rows", read_meta(BEFORE / "rows")), folder / "rows", TokenizeConfig(8, rows_per_shard=8))
    return folder


def test_every_flipped_byte_is_found(whole):
    "Of chunks, of zarr.json, of meta.json and of shards, 300 in all; each file is hit."
    assert verify(whole / "store") == verify(whole / "rows") == []
    files = sorted(path for path in whole.rglob("*") if path.is_file() and path.name not in ("mp_filelist.txt", "split.json"))
    assert {path.name for path in files} == {"zarr.json", "0", "meta.json", "rows-00000.parquet", "rows-00001.parquet"}
    rng, missed = np.random.default_rng(18), []
    for number in range(300):
        path = files[number % len(files)]
        content = path.read_bytes()
        at, bit = int(rng.integers(len(content))), int(rng.integers(8))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:])
        try:
            found = bool(verify(whole / path.relative_to(whole).parts[0]))
        except TomatError:
            found = True
        path.write_bytes(content)
        missed += [] if found else [(path.relative_to(whole), at, bit)]
    assert missed == []


def test_stores_of_before_have_no_checksums_and_are_read(tmp_path):
    group = BEFORE / "store.zarr" / "label" / "a.zarr"
    assert b"checksums" not in (group / "zarr.json").read_bytes()
    assert b"crc32c" not in (group / "charge_density_sad/zarr.json").read_bytes()
    assert verify(BEFORE / "store.zarr") == verify(BEFORE / "rows") == []


@pytest.mark.parametrize("store", ["old", "new"])
def test_a_chunk_holds_what_its_shape_says(tmp_path, store):
    "A larger shape once gave memory that nobody had written, and a smaller one another density."
    if store == "old":
        shutil.copytree(BEFORE / "store.zarr" / "label" / "a.zarr", tmp_path / "a.zarr")
    else:
        write_density(good(), tmp_path / "a.zarr")
        edited(tmp_path / "a.zarr" / "zarr.json", lambda group: group["attributes"].pop("checksums"))
    path = tmp_path / "a.zarr" / "charge_density_total" / "zarr.json"
    sound = json.loads(path.read_text())
    shapes = [[8, 9, 10], [1, 1, 1], sound["shape"][:2], [10**6] * 3, [10**30, 1, 1], [0, 1, 1], [2.5, 1, 1], "abc", [-1, -1, 1]]
    for shape in shapes:
        grid = {"name": "regular", "configuration": {"chunk_shape": shape}}
        path.write_text(json.dumps(sound | {"shape": shape, "chunk_grid": grid}))
        refused(tmp_path / "a.zarr")
    turned = {"name": "transpose", "configuration": {"order": [2, 1, 0]}}
    for change in ({"codecs": []}, {"codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle"}]}, {"data_type": "string"},
                   {"chunk_grid": {}}, {"codecs": [turned, *sound["codecs"]]}):
        path.write_text(json.dumps(sound | change))
        refused(tmp_path / "a.zarr")


def test_a_file_added_to_a_group_is_no_fault_and_a_lost_one_is(tmp_path):
    import zarr
    write_density(good(), tmp_path / "a.zarr")
    zarr.open_group(tmp_path / "a.zarr", mode="r+").create_array("mine", data=np.ones(3, "f4"))
    assert read_density(tmp_path / "a.zarr").spin
    shutil.rmtree(tmp_path / "a.zarr" / "charge_density_diff")
    refused(tmp_path / "a.zarr", "charge_density_diff/zarr.json")


@pytest.mark.parametrize("name", ["total", "diff"])
def test_a_lost_chunk_of_zeros_is_found_where_zeros_are_written(tmp_path, name):
    "Older groups leave out the chunks of a spin density that is zero everywhere."
    write_density(replace(good(), spin={"diff": np.zeros(good().shape)}), tmp_path / "a.zarr")
    assert not read_density(tmp_path / "a.zarr").spin["diff"].any()
    shutil.rmtree(tmp_path / "a.zarr" / f"charge_density_{name}" / "c")
    refused(tmp_path / "a.zarr", f"charge_density_{name} lacks 1 of its 1 chunks")


def test_verify_reads_a_raw_store(tmp_path, three):
    write_store(three, {"train": ["m-1"]}, tmp_path / "store")
    write_store(three, {}, tmp_path / "store.zip")
    assert verify(tmp_path / "store") == verify(tmp_path / "store.zip") == []
    shutil.rmtree(tmp_path / "store" / "label" / "m-2.zarr")
    assert len(verify(tmp_path / "store")) == 1 and "m-2" in verify(tmp_path / "store")[0]
    (tmp_path / "store" / "split.json").write_text('{"train": [7]}')
    assert len(verify(tmp_path / "store")) == 1 and "does not fit" in verify(tmp_path / "store")[0]


# What a few bytes ask for


def crystal(lattice, frac=((0, 0, 0),)):
    return Structure(Lattice(lattice), ["Mg"] * len(frac), frac)


SKEWED = [[1000, 0, 0], [999.9, 0.5, 0], [0, 0, 5]]


@pytest.mark.parametrize("structure, grid, words", [
    (crystal(0.001 * np.eye(3)), None, r"512,922,401|513,922,401 periodic images.*largest_images"),
    (crystal(0.001 * np.eye(3)), (8, 8, 8), "periodic images"),
    (crystal(SKEWED), None, r"has 5,[\d,]+ voxels.*largest_voxels"),
    (crystal(1e5 * np.eye(3)), (8, 8, 8), "waves in the sum of its atoms.*largest_waves"),
    (crystal(1e12 * np.eye(3), [[0, 0, 0], [0.5, 0.5, 0.5]]), (8, 8, 8), "waves in the sum of its atoms.*largest_waves"),
    (crystal(5 * np.eye(3), [[0, 0, 0], [0.01, 0.99, 0.01]]), (8, 8, 8), r"Atoms 1 \(Mg\) and 2 \(Mg\) of Mg2? are 0.09 Å apart"),
    (crystal([[0.3, 0, 0], [0, 9, 0], [0, 0, 9]]), (8, 8, 8), r"Atoms 1 \(Mg\) and 1 \(Mg\) of Mg are 0.30 Å apart"),
    (crystal(40 * np.eye(3)), None, r"The grid 420 × 420 × 420 of Mg has 74,088,000 voxels, and at most 33,554,432.*coarser grid"),
    (crystal(5 * np.eye(3)), (99_999, 1, 1), "a point every 5e-05 Å along a.*give 500 points"),
    (crystal(5 * np.eye(3)), (10**6, 10**6, 10**6), "1,000,000,000,000,000,000|1e\\+18"),
    (crystal(5 * np.eye(3), np.full((20_000, 3), 0.25)), (8, 8, 8), "0.00 Å apart"),
    (crystal(500 * np.eye(3), np.random.default_rng(0).random((20_001, 3))), (8, 8, 8), "20,001 atoms.*largest_atoms")])
def test_a_crystal_has_a_budget(structure, grid, words):
    one_sentence(predict, structure, grid, words=words)


def test_a_budget_is_a_setting(monkeypatch, tmp_path):
    (tmp_path / "POSCAR").write_text("c\n1.0\n5 0 0\n0 5 0\n0 0 5\nMg O\n1 1\nDirect\n0 0 0\n.5 .5 .5\n")
    assert plan_tasks([str(tmp_path / "POSCAR")], str(tmp_path / "x.cube"), (20, 20, 20))[0][0].shape == (20, 20, 20)
    monkeypatch.setenv("TOMAT_LARGEST_VOXELS", "7999")
    one_sentence(plan_tasks, [str(tmp_path / "POSCAR")], str(tmp_path / "x.cube"), (20, 20, 20), words="at most 7,999")
    monkeypatch.setenv("TOMAT_LARGEST_ATOMS", "1")
    refused(tmp_path / "POSCAR", "has 2 atoms, and at most 1", read=read_structure)
    monkeypatch.setenv("TOMAT_LARGEST_ATOMS", "-1")
    one_sentence(read_structure, tmp_path / "POSCAR", words="The setting largest_atoms is '-1'")


def test_the_sum_of_atoms_has_a_budget():
    one_sentence(sad_density, crystal(1e5 * np.eye(3)), (8, 8, 8), words="largest_waves")


def test_packed_bytes_have_a_budget(tmp_path, three):
    (tmp_path / "CHGCAR.gz").write_bytes(gzip.compress(bytes(150_000_000), 9))
    refused(tmp_path / "CHGCAR.gz", "unpacks to", "200 times")
    (tmp_path / "x.json.gz").write_bytes((tmp_path / "CHGCAR.gz").read_bytes())
    refused(tmp_path / "x.json.gz", "unpacks to")
    refused(tmp_path / "x.json.gz", "unpacks to", read=read_structure)
    write_store(three, {}, tmp_path / "store")
    with zipfile.ZipFile(tmp_path / "store.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("mp_filelist.txt", "m-1\n")
        packed.writestr("label/m-1.zarr/zarr.json", bytes(150_000_000))
    one_sentence(RawStore(tmp_path / "store.zip").read, "m-1", words="unpacks to")


# Two at once


def test_two_runs_in_one_folder(tmp_path):
    shutil.copytree(BEFORE / "rows", tmp_path / "rows")
    command = [sys.executable, "-m", "tomat.cli", "train", tmp_path / "rows", "--out", tmp_path / "run", "--steps", "2"]
    with run_lock(tmp_path / "run"):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 2 and "is written by another process that trains there" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and [path.name for path in (tmp_path / "run").iterdir()] == [".partial-lock"]


@pytest.mark.parametrize("copies", [1, 2])  # the name at the end of an archive; also that beside the content
def test_a_damaged_name_in_an_archive_is_one_sentence(tmp_path, copies):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("ä/zarr.json", "{}")
    content = path.read_bytes()
    first = content.rindex("ä".encode()) if copies == 1 else 0
    path.write_bytes(content[:first] + content[first:].replace("ä".encode(), b"\xff\xff"))
    for read in (read_density, lambda path: RawStore(path).ids):
        one_sentence(read, path, words="cannot be unpacked, its packed bytes are damaged")
