"""Checkpoints on a hub: pushed, fetched, checked, kept, and refused, over HTTP with `hub_server`."""

import asyncio
import os
import re
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from multiprocessing import forkserver
from crystals import CODECS, ROOT
from hub_server import TOKEN, serving
from huggingface_hub import ModelCard, constants
from pymatgen.core import Lattice, Structure
from small_models import attentive_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomat.density.store import sample_store
from tomat.io.files import read_json
from tomat.io.hub import HubModel, hub_copy, kept_copy, parse_hub, pinned
from tomat.io.remote import TomatError
from tomat.models.causal import load_checkpoint, save_checkpoint
from tomat.models.messages import ProbeConfig
from tomat.models.probe import ProbeNet, load_probe, save_probe
from tomat.models.sharing import push_checkpoint
from tomat.prediction.predictors import load_predictor
from tomat.prediction.worker import ServiceLimits, WorkerQueue
from tomat.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub to its own client
GRID = ("--grid", "6,6,6")
PACKAGED = ROOT / "tomat/data/probe"
DECODERS = ("probe", "causal")
SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]).get_primitive_structure()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A small checkpoint of each decoder, whose predictions are worth comparing."
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    net = ProbeNet(ProbeConfig(width=8, atom_channels=(4, 2, 2), voxel_channels=(4, 2, 2), readout_width=8))
    torch.nn.init.normal_(net.head.weight, std=0.1)
    save_probe(net, folder / "probe", {"elements": ["Na", "Cl"], "held_out": {"loss": 0.031, "median": 0.02, "inside_90": 0.9}})
    tokenizer = Tokenizer("framed", CODECS["levels"], patch_size=3, pad_to=None)
    save_checkpoint(attentive_model(tokenizer), tokenizer, folder / "causal", {"elements": ["Na", "Cl"]})
    SALT.to(str(folder / "POSCAR"), fmt="poscar")
    return folder


@pytest.fixture
def there(tmp_path, monkeypatch):
    "A hub, an empty folder for copies, and an account."
    with serving(tmp_path / "hub") as (hub, server):
        def stop():
            huggingface_hub.close_session()  # else an open connection is served on
            server.shutdown()
            server.server_close()
        hub.stop, hub.url = stop, f"http://127.0.0.1:{server.server_port}"
        hub.env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "kept"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
                   "HF_TOKEN_PATH": str(tmp_path / "no-token"), "HF_HUB_OFFLINE": "0"}
        for name, value in hub.env.items():
            monkeypatch.setenv(name, value)
        for name, value in {"ENDPOINT": hub.url,
                            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
                            "HF_HUB_CACHE": hub.env["HF_HUB_CACHE"],
                            "HF_TOKEN_PATH": hub.env["HF_TOKEN_PATH"], "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def pushed(models, decoder="probe"):
    return push_checkpoint(models / decoder, f"hf://ana/{decoder}")


def sentence(work, *args):
    "The one sentence of the error."
    with pytest.raises(TomatError) as caught:
        work(*args)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_was_pushed_predicts_the_same_also_without_the_hub(there, models, tomat, tmp_path, decoder):
    def predict(checkpoint, name):
        done = tomat("predict", models / "POSCAR", *GRID, "--checkpoint", checkpoint, "--out", tmp_path / f"{name}.cube")
        assert done.code == 0, done.err
        return (tmp_path / f"{name}.cube").read_bytes(), done.err

    done = tomat("push", models / decoder, f"hf://ana/{decoder}")
    assert done.code == 0, done.err
    name = done.out.split()[-1]
    assert re.fullmatch(f"hf://ana/{decoder}@[0-9a-f]{{40}}", name)
    here, _ = predict(models / decoder, "here")
    first, note = predict(f"hf://ana/{decoder}", "first")
    assert first == here and f"tomat: fetched {name}" in note
    there.requests.clear()
    assert predict(name, "pinned") == (here, note.replace(f"tomat: fetched {name}\n", "")) and not there.requests
    assert predict(f"hf://ana/{decoder}", "again")[0] == here and len(there.requests) == 1
    there.stop()
    offline, note = predict(f"hf://ana/{decoder}", "offline")
    assert offline == here and f"hf://ana/{decoder} cannot be reached: its last copy is used, {name}" in note
    assert predict(name, "offline, pinned")[0] == here


@pytest.mark.parametrize("decoder", DECODERS)
def test_two_processes_one_with_the_hub_and_one_without(there, models, tmp_path, decoder):
    name, env = pushed(models, decoder), {**os.environ, **there.env}
    env.pop("HF_HUB_OFFLINE")
    for run in ("with", "without"):
        words = ["predict", models / "POSCAR", "--grid", "6,6,6", "--checkpoint", f"hf://ana/{decoder}@{name[-40:]}",
                 "--out", tmp_path / f"{run}.cube"]
        done = subprocess.run([sys.executable, "-m", "tomat.cli", *map(str, words)], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        if run == "with":
            there.stop()
    assert (tmp_path / "with.cube").read_bytes() == (tmp_path / "without.cube").read_bytes()


def test_only_the_files_of_a_checkpoint_are_fetched(there, models):
    pushed(models)
    there.commit("ana/probe", {"pytorch_model.bin": b"cos\nsystem\n", "evil.py": b"1/0", "tomat/__init__.py": b"1/0"})
    there.requests.clear()
    folder = hub_copy("hf://ana/probe")
    names = {"config.json", "atoms.json", "model.safetensors", "tomat.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert {line.rpartition("/")[2] for line in there.requests if "/resolve/" in line} == names


def test_a_branch_follows_its_commits_and_a_commit_stays(there, models):
    old = pushed(models)
    assert pinned("hf://ana/probe") == old
    net = load_probe(models / "probe")
    with torch.no_grad():
        net.head.bias += 0.01
    new = net.push_to_hub("ana/probe")
    assert new != old and pinned("hf://ana/probe") == new and pinned(old) == old
    assert torch.equal(load_probe("hf://ana/probe").head.bias, net.head.bias)
    assert torch.equal(ProbeNet.from_pretrained("ana/probe", revision=old[-40:]).head.bias, net.head.bias - 0.01)
    (there.root / "ana/probe/refs/v1").write_text(old[-40:])
    assert pinned("hf://ana/probe@v1") == old
    there.stop()
    assert pinned("hf://ana/probe") == new and pinned("hf://ana/probe@v1") == old


def test_from_pretrained_of_both_decoders(there, models, tmp_path):
    pushed(models)
    pushed(models, "causal")
    ids_BxL = torch.arange(12)[None]
    own, _ = load_checkpoint(models / "causal")
    assert torch.equal(AutoModelForCausalLM.from_pretrained("ana/causal").eval()(ids_BxL).logits, own(ids_BxL).logits)
    assert len(AutoTokenizer.from_pretrained("ana/causal")) == own.config.vocab_size
    net = ProbeNet.from_pretrained("ana/probe")
    assert not net.training and net.training_metadata["elements"] == ["Na", "Cl"]
    net.save_pretrained(tmp_path / "copy")
    again, here = ProbeNet.from_pretrained(tmp_path / "copy"), load_probe(models / "probe")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in here.state_dict().items())


def test_a_changed_byte_is_found_and_not_kept(there, models):
    pushed(models)
    for name in ("config.json", "model.safetensors"):
        content = (models / "probe" / name).read_bytes()
        there.changed = {name: content[:-1] + bytes([content[-1] ^ 1])}
        text = sentence(load_predictor, "hf://ana/probe")
        assert re.fullmatch(rf"hf://ana/probe@[0-9a-f]{{40}}/{re.escape(name)} arrived with another hash than the hub.*", text)
        there.changed = {}
    load_predictor("hf://ana/probe")


def test_a_commit_that_breaks_a_seal_is_refused(there, models):
    pushed(models)
    there.commit("ana/probe", {"config.json": (models / "probe/config.json").read_bytes() + b" "})
    assert "/config.json is not the file that was written with this checkpoint" in sentence(load_predictor, "hf://ana/probe")


def test_a_damaged_copy_is_fetched_again(there, models):
    name = pushed(models)
    weights = hub_copy(name) / "model.safetensors"
    content = weights.read_bytes()
    weights.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert hub_copy(name) == weights.parent and weights.read_bytes() == content
    weights.resolve().write_bytes(b"")
    there.stop()
    assert "cannot be read, check the network and run it again" in sentence(hub_copy, name)
    assert kept_copy(parse_hub(name)) is None


def test_an_interrupted_download_is_no_copy(there, models):
    name = pushed(models)
    there.changed = {"model.safetensors": b"short"}
    assert "hf://ana/probe" in sentence(hub_copy, name)
    there.changed = {}
    assert kept_copy(parse_hub(name)) is None and hub_copy(name).name == name[-40:]


MISSING = "cannot be read, there is no such model, or it is private: check the name, or set HF_TOKEN to a token that may read it."


@pytest.mark.parametrize("token", [TOKEN, ""])
@pytest.mark.parametrize("url, words", [
    ("hf://ana/nothing", MISSING),
    ("hf://ana/probe@v9", "ana/probe has no revision 'v9': give a commit with all of its 40 digits, a tag or a branch."),
    ("hf://ana/probe@" + 40 * "0", f"ana/probe has no revision '{40 * '0'}': give a commit"),
    ("hf://ana/notes", "hf://ana/notes holds no checkpoint of tomat, config.json is missing: give a model"),
    ("hf://probe", "'hf://probe' names no model of a hub: write hf://USER/MODEL, or hf://USER/MODEL@REVISION")])
def test_a_wrong_name_is_one_sentence(there, models, tomat, tmp_path, monkeypatch, url, words, token):
    pushed(models)
    there.commit("ana/notes", {"README.md": b"Mine."})
    monkeypatch.setenv("HF_TOKEN", token)
    done = tomat("predict", models / "POSCAR", "--grid", "6,6,6", "--checkpoint", url, "--out", tmp_path / "x.cube")
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1 and not (tmp_path / "x.cube").exists()


def test_a_private_model_needs_a_token(there, models, tomat, tmp_path, monkeypatch):
    done = tomat("push", models / "probe", "hf://ana/probe", "--private")
    assert done.code == 0 and "ana/probe" in there.private
    for token in ("", "hf_other"):
        monkeypatch.setenv("HF_TOKEN", token)
        done = tomat("predict", models / "POSCAR", *GRID, "--checkpoint", "hf://ana/probe", "--out", tmp_path / "x.cube")
        assert done.code == 2 and done.err == f"tomat: hf://ana/probe {MISSING}\n"
        push = sentence(push_checkpoint, models / "probe", "hf://ana/probe")
        assert "cannot be written, the hub does not accept that: log in with `hf auth login`, or set HF_TOKEN" in push
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_predictor("hf://ana/probe")


def test_sizes_and_hashes_are_checked_before_a_byte_comes(there, models, monkeypatch):
    pushed(models)
    there.requests.clear()
    monkeypatch.setenv("TOMAT_LARGEST_CHECKPOINT", "1000")
    assert "bytes, and at most 1,000 are allowed: use a smaller model, or raise the setting" in sentence(hub_copy, "hf://ana/probe")
    monkeypatch.delenv("TOMAT_LARGEST_CHECKPOINT")
    there.stated = {"tomat.json": 1 << 29}
    assert "tomat.json has 536,870,912 bytes, and a JSON of at most" in sentence(hub_copy, "hf://ana/probe")
    assert not any("/resolve/" in line for line in there.requests)


def test_offline_by_wish(there, models, monkeypatch):
    name = pushed(models)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there.requests.clear()
    assert "offline mode is enabled" in sentence(hub_copy, "hf://ana/probe") and not there.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_copy("hf://ana/probe")
    there.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(HubModel("ana/probe", hub_copy("hf://ana/probe").name)) == name and not there.requests


def test_the_card_has_the_scores_of_the_run_and_of_an_evaluation(there, models, tomat, tmp_path):
    pushed(models)
    card = ModelCard((there.root / "ana/probe/commits" / pinned("hf://ana/probe")[-40:] / "README.md").read_text())
    scores = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert scores == {"nmae": 3.1, "nmae-median": 2, "coverage-90": 90}
    assert "--checkpoint hf://ana/probe --out" in card.text

    store = sample_store()
    store.read(store.split("validation")[0]).write(tmp_path / "densities" / "CHGCAR")
    done = tomat("evaluate", tmp_path / "densities", "--checkpoint", "mine=hf://ana/probe", "--out", tmp_path / "scores", "--json")
    assert done.code == 0, done.err
    mean = read_json(tmp_path / "scores/scores.json")["summary"]["mine"]["nmae"]["mean"]
    done = tomat("push", models / "probe", "hf://ana/probe", "--scores", tmp_path / "scores")
    assert done.code == 0, done.err
    card = ModelCard((there.root / "ana/probe/commits" / done.out.split()[-1][-40:] / "README.md").read_text())
    scores = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert scores["nmae"] == pytest.approx(100 * mean, rel=1e-3) and card.data.model_name == "probe" and len(scores) == 4

    done = tomat("push", models / "causal", "hf://ana/causal", "--scores", tmp_path / "scores")
    assert done.code == 2 and "has no scores of this checkpoint, its weights are others" in done.err
    assert not (there.root / "ana/causal").exists()


def test_a_damaged_checkpoint_is_not_pushed(there, models, tomat, tmp_path):
    net = load_probe(models / "probe")
    save_probe(net, tmp_path / "model", net.training_metadata)
    (tmp_path / "model/config.json").write_text("{}")
    done = tomat("push", tmp_path / "model", "hf://ana/probe")
    assert done.code == 2 and "config.json is not the file that was written" in done.err and not there.requests


def test_a_card_that_the_hub_refuses_is_one_sentence(there, models, tmp_path):
    net = load_probe(models / "probe")
    net.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    (tmp_path / "model/README.md").write_text(card.replace("library_name", "license: mine\nlibrary_name"))
    assert 'correct README.md or check HF_ENDPOINT: ValueError: Invalid metadata in README.md. - "license" must be' in sentence(
        push_checkpoint, tmp_path / "model", "hf://ana/probe")
    (tmp_path / "model/README.md").write_text(card.replace("library_name", "license: mit\nlibrary_name"))
    folder = there.root / "ana/probe/commits" / push_checkpoint(tmp_path / "model", "hf://ana/probe")[-40:]
    assert ModelCard((folder / "README.md").read_text()).data.license == "mit"


def test_all_processes_of_a_service_have_one_commit(there, models):
    forkserver._forkserver._stop()  # one that an earlier test has started would hand on its variables
    name = pushed(models)
    queue = WorkerQueue("hf://ana/probe", "cpu", ServiceLimits(workers=1))

    async def served() -> str:
        async with queue.running():
            net = load_probe(models / "probe")
            net.head.bias.data += 1
            net.push_to_hub("ana/probe")
            return queue.workers[0]._args[0]

    assert asyncio.run(served()) == name
    assert queue.identity["weights"] == load_predictor(models / "probe").identity()["weights"]


def test_the_packaged_network_can_be_shared_with_its_own_card(there):
    push_checkpoint(PACKAGED, "hf://ana/packaged")
    assert load_predictor("hf://ana/packaged").identity() == load_predictor().identity()
    scores = {r.metric_type: r.metric_value for r in ModelCard((PACKAGED / "README.md").read_text()).data.eval_results}
    measured = read_json(ROOT / "results/probe/validation.json")
    assert scores == pytest.approx({"nmae": 100 * measured["nmae_mean"], "nmae-median": 100 * measured["nmae_median"],
                                    "potential": measured["potential_mean"]}, rel=1e-3)
