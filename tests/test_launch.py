"""Launchers: what is printed is what is run, here and in a stand-in for a cloud; every function's body runs on real rows."""

import ast
import asyncio
import json
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from crystals import script
from packaging.requirements import Requirement

from tomat.io.remote import TomatError
from tomat.run.jobs import TASKS, Job, Resources, carry_out, read_job
from tomat.run.jobs import main as run_lines
from tomat.run.launch import (PrepareLaunch, SweepLaunch, SyncLaunch, TokenizeLaunch, TrainLaunch, VerifyLaunch, modal_needs,
                              modal_options, serve_job, shared_env, submit)
from tomat.dataset.meta import VOXELS, read_meta
from tomat.dataset.prepare import VoxelSet, prepare
from tomat.dataset.verify import verify as tomat_verify
from tomat.dataset.voxels import PrepareConfig
from tomat.density.source import open_source

pytest.importorskip("modal")
pytestmark = pytest.mark.filterwarnings("ignore:The .* function is executing locally:UserWarning")

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = str(files("tomat") / "data" / "sample.zip")
LAUNCHERS = sorted(path.stem for path in (ROOT / "scripts").glob("*_modal.py"))
SETTINGS = """[modal]
modal_app = tomat
volume = shelf
[data]
patch_size = 4
density_codec = two_token_9_12
layout = anchored
density_log_min = -4.13
density_log_max = 4.97
pad_to = 512
seed = 42
[data.tiny]
split = all
materials = 17
patches = 257
"""


@pytest.fixture(scope="module")
def scripts():
    return {name: script(name) for name in LAUNCHERS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder for what a volume would hold, and settings of its own."
    folder = tmp_path_factory.mktemp("volume")
    (folder / "settings.ini").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMAT_SETTINGS", str(folder / "settings.ini"))
        patch.setenv("HOME", str(folder))  # no account
        patch.setenv("TOMAT_RAW_STORE", SAMPLE)
        yield folder


@pytest.fixture(scope="module")
def rows(place, scripts):
    "Rows that sixteen workers made, as containers would: through the function of the app."
    (stage,) = TokenizeLaunch("tiny", cores=1, here=str(place)).stages()
    for job in stage:
        scripts["tokenize_patches_modal"].run.local(job.text)
    return place / "rows" / "tiny"


@pytest.fixture(scope="module")
def few(place):
    "The rows of two materials."
    ((job,),) = TokenizeLaunch("tiny", n_workers=1, materials=2, cores=1, here=str(place / "few")).stages()
    carry_out(job.text)
    return place / "few" / "rows" / "tiny"


class Cloud:
    "Stands where Modal's function is: writes down what it is handed, and has it carried out by `.local()`."
    app_id = "ap-1"  # running

    def __init__(self, run):
        self.run, self.options, self.texts = run, [], []

    def with_options(self, **options):
        self.options.append(options)
        return self

    def map(self, texts, return_exceptions=False):
        assert return_exceptions  # one that fails does not end the others
        self.texts += texts
        return map(self.run.local, texts)


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_sixteen_workers_give_the_bytes_of_one(place, rows):
    (alone,) = TokenizeLaunch("tiny", n_workers=1, cores=1, here=str(place / "one")).stages()
    assert [carry_out(job.text)["part"] for job in alone] == [[0, 1]]
    one, many = shards(place / "one" / "rows" / "tiny"), shards(rows)
    assert len(one) == 17 and one == many  # one more than workers, so that a worker has two
    assert len({path.parent for path in rows.rglob("*.parquet")}) == 16
    assert read_meta(rows)["rows"] == 17 * 257


CALLS = {
    "prepare_modal": ("parallel", {"label": "tiny", "n_workers": 2, "materials": 4, "cores": 1, "kept": 50}, 3),
    "fidelity_sweep_modal": ("sweep", {"n_workers": 3, "materials": 4, "split": "validation", "only": "coarse", "cores": 1}, 4),
    "tokenize_patches_modal": ("parallel", {"label": "tiny", "n_workers": 2, "materials": 4, "cores": 1}, 2),
    "train_modal": ("train", {"label": "tiny", "options": "steps=1 batch_size=1"}, 1),
    "verify_modal": ("check", {"label": "tiny", "cores": 1}, 1)}


@pytest.mark.parametrize("name", CALLS)
def test_a_dry_run_is_what_is_run(name, place, few, scripts, tmp_path, monkeypatch, capsys):
    module, (entry, options, n) = scripts[name], CALLS[name]
    monkeypatch.setattr("tomat.run.launch.MOUNT", str(tmp_path))  # the folder that stands for the volume
    if name in ("train_modal", "verify_modal"):
        (tmp_path / "rows").symlink_to(few.parent)
    cloud = Cloud(module.run)
    monkeypatch.setattr(module, "run", cloud)
    monkeypatch.setattr(module, "app", cloud)
    function = getattr(module, entry)
    function(**options, dry_run=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == n and not cloud.texts
    assert [json.loads(line)["task"] in TASKS for line in printed] == [True] * n
    function(**options)
    assert cloud.texts == printed  # to the last byte
    stages = [modal_needs(read_job(line).resources) for line in printed]
    assert all(options in stages for options in cloud.options) and stages[0] == cloud.options[0]
    assert len(capsys.readouterr().out.splitlines()) == n  # a line for what each job returned
    function(**options, here=str(tmp_path), dry_run=True)
    assert capsys.readouterr().out.splitlines() == printed  # and on this machine the same, with its folder


def test_a_run_is_trained_and_goes_on(place, few, monkeypatch):
    monkeypatch.setenv("TOMAT_STEPS", "2")
    monkeypatch.setenv("TOMAT_BATCH_SIZE", "5")
    ((job,),) = TrainLaunch("tiny", options="batch_size=2", name="mine", here=str(place / "few")).stages()
    assert (job.settings["config"]["steps"], job.settings["config"]["batch_size"]) == (2, 2)
    assert job.env["WANDB_RUN_GROUP"] == "nano-tiny" and "A100:1" in job.env["WANDB_TAGS"].split(",")
    first = carry_out(job.text)
    assert first["steps"] == "2/2" and first["finished"] and (place / "few/runs/mine/model/tomat.json").exists()
    before = (place / "few/runs/mine/log.jsonl").read_bytes()
    assert carry_out(job.text) == first and (place / "few/runs/mine/log.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def voxels(place):
    "Voxels of a label, by three workers after a job that chose the atoms, and those of other materials with the same atoms."
    stages = PrepareLaunch("tiny", n_workers=3, materials=5, cores=1, kept=60, here=str(place)).stages()
    results = submit(stages, here=str(place))
    assert [len(stage) for stage in stages] == [1, 3] and results[0]["sentence"].startswith("The packaged atoms are used")
    assert sum(result["voxels"] for result in results[1:]) == 5 * 60
    return place / "voxels" / "tiny"


def test_parts_of_voxels_are_those_of_one_worker(place, voxels):
    alone = PrepareLaunch("tiny", n_workers=1, materials=5, cores=1, kept=60, atoms=f"{place}/atoms/tiny.json",
                          here=str(place / "one"))
    assert [len(stage) for stage in alone.stages()] == [1]  # the atoms are there
    submit(alone.stages(), here=str(place / "one"))
    assert tomat_verify(voxels) == []
    prepare(open_source(SAMPLE), place / "direct", PrepareConfig(60, 0, "tiny"), open_source(SAMPLE).ids[:5])
    direct, *others = VoxelSet(place / "direct"), VoxelSet(place / "one/voxels/tiny"), VoxelSet(voxels)
    for other in others:
        assert direct.ids == other.ids and len(other) == 5
        for i in range(5):
            for a, b in zip(direct.columns(i), other.columns(i), strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_probe_network_is_trained_and_goes_on(place, voxels, monkeypatch):
    monkeypatch.setenv("TOMAT_STEPS", "2")
    options = "materials=2 voxels=10 levels=8"
    ((job,),) = TrainLaunch("tiny", "A100:1", options, decoder="probe", size="S", here=str(place)).stages()
    assert (job.settings["data"], job.settings["out"]) == (str(voxels), f"{place}/runs/probe-S-tiny-s0")
    assert job.settings["config"]["steps"] == 2 and job.settings["setup"]["workers"] == 8
    assert job.env["WANDB_RUN_GROUP"] == "probe-S-tiny" and job.env["WANDB_TAGS"] == "S,tiny,A100:1,probe,launch"
    text = json.dumps(json.loads(job.text) | {"settings": job.settings | {"setup": job.settings["setup"] | {"workers": 0}}})
    first = carry_out(text)
    assert (first["decoder"], first["size"], first["unit"], first["count"], first["finished"]) == ("probe", "S", "voxels", 40, True)
    before = (place / "runs/probe-S-tiny-s0/log.jsonl").read_bytes()
    assert carry_out(text) == first and (place / "runs/probe-S-tiny-s0/log.jsonl").read_bytes() == before


def test_a_job_trains_on_densities(place, tmp_path):
    "Without a launcher: the line names a store, and the network is the probe network."
    config = {"steps": 1, "materials": 1, "voxels": 5, "kept": 20, "levels": 8}
    settings = {"data": SAMPLE, "out": str(tmp_path / "run"), "config": config, "setup": {}, "val": None}
    done = carry_out(Job("train", settings | {"decoder": "probe", "first": 2, "atoms": "packaged"}).text)
    assert (done["decoder"], done["steps"]) == ("probe", "1/1")
    with pytest.raises(TomatError, match="make rows of the densities with `tomat tokenize`"):
        carry_out(Job("train", settings | {"config": {}}).text)
    with pytest.raises(TomatError, match="decoder must be one of causal, probe, got 'nerf'"):
        carry_out(Job("train", settings | {"decoder": "nerf"}).text)


def test_a_line_of_an_earlier_version_trains_the_language_model(few, tmp_path):
    "It names no decoder, and the size of the model is called model."
    config = {"model": "nano", "steps": 1, "batch_size": 1, "lr": 0.002}
    settings = {"data": str(few), "out": str(tmp_path / "run"), "config": config, "setup": {}, "val": None}
    done = carry_out(Job("train", settings).text)
    assert (done["decoder"], done["size"], done["steps"]) == ("causal", "nano", "1/1")


def test_voxels_are_verified_and_go_to_the_bucket(place, voxels, scripts, s3, monkeypatch):
    ((job,),) = VerifyLaunch("tiny", cores=1, kind="voxels", here=str(place)).stages()
    assert carry_out(job.text) == {"data": str(voxels), "faults": 0}
    with pytest.raises(TomatError, match="TOMAT_VOXEL_STORE"):
        SyncLaunch("tiny", kind="voxels", here=str(place)).stages()
    monkeypatch.setenv("TOMAT_VOXEL_STORE", f"{s3}/voxels/")
    ((job,),) = SyncLaunch("tiny", kind="voxels", here=str(place)).stages()
    assert scripts["sync_modal"].run.local(job.text)["target"] == f"{s3}/voxels/tiny"
    assert read_meta(f"{s3}/voxels/tiny", VOXELS) == read_meta(voxels, VOXELS)


def test_several_gpus_are_processes_of_torchrun(few):
    "A light task stands for training, whose processes tests/test_train.py looks after."
    text = Job("verify", {"data": str(few), "workers": 1}, Resources(gpu="A100:2"), {"TOMAT_NEW": "seen"}).text
    assert carry_out(text) == {"data": str(few), "faults": 0}


def test_a_sweep_by_workers_is_the_sweep_of_one(place):
    from tomat.study.fidelity import read_sweep
    options = {"split": "validation", "materials": 4, "only": "coarse", "cores": 1}
    for n in (1, 6):  # six workers for four materials
        results = submit(SweepLaunch(f"by-{n}", n_workers=n, here=str(place), **options).stages(), here=str(place))
        assert results[-1]["lines"] == 16 == sum(result.get("lines", 0) for result in results[:-1])
    one, many = ([{k: v for k, v in line.items() if k != "seconds"} for line in read_sweep(place / f"tables/by-{n}.csv")]
                 for n in (1, 6))
    assert str(one) == str(many)


def test_verify_reports_what_is_wrong(place, rows, scripts):
    text = Job("verify", {"data": f"{place}/damaged", "workers": 1}).text
    (place / "damaged" / "worker-00").mkdir(parents=True)
    for path in (rows / "worker-00").iterdir():
        (place / "damaged" / "worker-00" / path.name).write_bytes(path.read_bytes())
    assert "lacks worker-01" in scripts["verify_modal"].run.local(text)["error"]  # reported, so that no engine starts it again
    with pytest.raises(TomatError, match=r"1 of 1 jobs failed, one with: .*lacks worker-01"):
        submit([[read_job(text)]], here=str(place))


def test_rows_go_to_the_bucket(place, rows, scripts, s3, monkeypatch, capsys):
    with pytest.raises(TomatError, match="TOMAT_TOKEN_STORE"):
        SyncLaunch("tiny", here=str(place)).stages()
    monkeypatch.setenv("TOMAT_TOKEN_STORE", f"{s3}/rows/")
    scripts["sync_modal"].copy(name="tiny", here=str(place), dry_run=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["settings"]["target"] == f"{s3}/rows/tiny"
    result = scripts["sync_modal"].run.local(line)
    assert result["copied"] == 17 + 16 and read_meta(f"{s3}/rows/tiny") == read_meta(rows)


def test_the_service_on_modal_is_that_of_this_machine(place, scripts, capsys):
    "tests/test_service.py sends it requests."
    scripts["predict_modal"].serve(dry_run=True, device="cpu")
    job = read_job(capsys.readouterr().out.strip())
    assert (job.task, job.settings) == ("serve", {"checkpoint": "", "device": "cpu"})
    application = scripts["predict_modal"].Service().web.local()

    async def run():
        client = httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://x", timeout=120)
        async with application.router.lifespan_context(application), client:
            return await client.get("/health"), await client.get("/")
    health, about = asyncio.run(run())
    assert health.json()["status"] == "ok" and about.json()["decoder"] == "probe"


def test_limits_travel_to_a_container_and_a_token_does_not(place, monkeypatch):
    monkeypatch.setenv("TOMAT_SERVICE_VOXELS", "1000")
    monkeypatch.setenv("TOMAT_SERVICE_TOKEN", "secret")
    assert shared_env()["TOMAT_SERVICE_VOXELS"] == "1000" and "secret" not in serve_job().text


def test_printed_lines_can_be_run_elsewhere(place, tmp_path, capsys, monkeypatch):
    "A launcher as a program of its own, without an account, and its lines through `python -m tomat.run.jobs`."
    options = f"--label tiny --n-workers 2 --materials 4 --cores 1 --here {tmp_path} --dry-run".split()
    done = subprocess.run([sys.executable, ROOT / "scripts/tokenize_patches_modal.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (stage,) = TokenizeLaunch("tiny", n_workers=2, materials=4, cores=1, here=str(tmp_path)).stages()
    assert done.stdout.splitlines() == [job.text for job in stage]
    (tmp_path / "jobs.jsonl").write_text(done.stdout)
    run_lines([str(tmp_path / "jobs.jsonl")])
    assert read_meta(tmp_path / "rows/tiny")["rows"] == 4 * 257 and len(capsys.readouterr().out.splitlines()) == 2


def test_in_a_container_the_volume_is_read_first_and_committed_last(place, rows, monkeypatch):
    import modal
    seen = []

    class Volume:
        def reload(self):
            seen.append("reload")

        def commit(self):
            seen.append("commit")

    monkeypatch.setattr(modal, "is_local", lambda: False)
    monkeypatch.setattr(modal.Volume, "from_name", lambda name: seen.append(name) or Volume())
    monkeypatch.setitem(TASKS, "verify", lambda data, workers: SimpleNamespace(run=lambda: seen.append("work")))
    monkeypatch.delenv("TOMAT_SETTINGS")
    carry_out(Job("verify", {"data": str(rows), "workers": 1}, env={"TOMAT_VOLUME": "other"}).text)
    assert seen == ["other", "reload", "work", "commit"]


def test_a_job_sees_its_variables_and_leaves_none(monkeypatch):
    import os
    seen = {}
    monkeypatch.setenv("TOMAT_SEEN", "before")
    monkeypatch.setitem(TASKS, "verify", lambda: SimpleNamespace(run=lambda: seen.update(os.environ)))
    carry_out(Job("verify", {}, env={"TOMAT_SEEN": "x", "TOMAT_NEW": "y"}).text)
    assert (seen["TOMAT_SEEN"], seen["TOMAT_NEW"]) == ("x", "y")
    assert os.environ["TOMAT_SEEN"] == "before" and "TOMAT_NEW" not in os.environ


@pytest.mark.parametrize("text", [
    "", "tomat train", "[]", "{}", '{"task": "train"}', '{"task": 1, "settings": [], "resources": {}}',
    Job("train", {}).text, Job("walk", {}).text, Job("sync", {"source": "a"}).text])
def test_other_lines_are_one_sentence(text):
    with pytest.raises(TomatError) as caught:
        carry_out(text)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_files_of_jobs_are_checked(tmp_path):
    (tmp_path / "serve").write_text(Job("serve", {"checkpoint": ""}).text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, sentence in (("nowhere", "does not exist"), ("", "folder"), ("binary", "text file"), ("serve", "does not end")):
        with pytest.raises(TomatError, match=sentence):
            run_lines([str(tmp_path / name)])
    with pytest.raises(TomatError, match="part-000"):
        carry_out(Job("join", {"table": str(tmp_path / "x.csv"), "parts": 1}).text)


def test_resources_in_the_words_of_modal(place, monkeypatch):
    import modal
    assert modal_needs(Resources(2, 8, "A100:4", 0.5, 3)) == {
        "cpu": 2.0, "memory": 8192, "gpu": "A100:4", "timeout": 1800, "retries": 3}
    monkeypatch.setenv("TOMAT_MODAL_SECRETS", "bucket, wandb")
    monkeypatch.setenv("TOMAT_S3_ENDPOINT", "http://there")
    options = modal_options()
    assert len(options["secrets"]) == 2 and list(options["volumes"]) == ["/data"]
    assert options["env"] == shared_env() and options["env"]["AWS_ENDPOINT_URL"] == "http://there"
    assert options["env"]["TOMAT_VOLUME"] == "shelf" and isinstance(options["image"], modal.Image)
    for gpu in ("A100:3", "A100", ":4", "A100:0"):
        with pytest.raises(TomatError, match="A100:1"):
            Resources(gpu=gpu)


@pytest.mark.parametrize("wrong", [
    {"n_workers": 0}, {"n_workers": -1}, {"cores": 0}, {"materials": -3}])
def test_counts_are_checked(place, wrong):
    ((name, value),) = wrong.items()
    for launch in (TokenizeLaunch, SweepLaunch):
        with pytest.raises(TomatError, match=rf"{name} must be at least [01], got {value}\."):
            launch(**wrong)


@pytest.mark.parametrize("wrong, sentence", [
    ({"options": "steps"}, "no option 'steps', or its value is missing"), ({"options": "clip=-1"}, "clip must be above 0"),
    ({"options": "warmup=-4"}, "warmup must be at least 0"), ({"options": "emd=2"}, "emd must be at most 1"),
    ({"options": "emd=nan"}, "emd must be a finite number"), ({"options": "val_seqs=-3"}, "val_seqs must be at least 0"),
    ({"gpu": "A100:8", "options": "batch_size=12"}, "batch_size must be a multiple of 8"),
    ({"gpu": "A100:8", "options": "materials=12", "decoder": "probe"}, "materials must be a multiple of 8"),
    ({"options": "voxels=5"}, "--voxels belongs to the probe network"), ({"decoder": "nerf"}, "decoder must be one of"),
    ({"options": "emd=0.5", "decoder": "probe"}, "--emd belongs to the language model"),
    ({"size": "S"}, "size is 'S', which is one of the probe network"),
    ({"size": "30M", "decoder": "probe"}, "size is '30M', which is one of the language model"),
    ({"name": "../../away"}, "no name"), ({"label": "a/b"}, "no name"), ({"val_label": ".."}, "no name")])
def test_a_slip_is_refused_before_a_gpu_is_paid_for(place, wrong, sentence):
    with pytest.raises(TomatError, match=sentence):
        TrainLaunch(**{"label": "tiny", **wrong}).stages()


def test_variables_of_the_other_decoder_are_refused(place, monkeypatch):
    monkeypatch.setenv("TOMAT_DECODER", "probe")
    assert TrainLaunch("tiny").stages()[0][0].settings["decoder"] == "probe"
    monkeypatch.setenv("TOMAT_BATCH_SIZE", "8")
    with pytest.raises(TomatError, match=r"--batch-size belongs to the language model .*unset TOMAT_BATCH_SIZE"):
        TrainLaunch("tiny").stages()
    monkeypatch.setenv("TOMAT_DECODER", "nerf")
    with pytest.raises(TomatError, match="a decoder, causal or probe"):
        TrainLaunch("tiny").stages()


def test_sync_copies_one_thing(place, monkeypatch):
    monkeypatch.setenv("TOMAT_TOKEN_STORE", "s3://bucket/rows")
    with pytest.raises(TomatError, match="no name"):
        SyncLaunch("").stages()


def by_hand(name, *options, **env):
    "A launcher as a program, without an account."
    import os
    command = [sys.executable, ROOT / f"scripts/{name}.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


@pytest.mark.parametrize("name, options, env, sentence", [
    ("verify_modal", ["--dry-run"], {"TOMAT_SETTINGS": "nowhere.ini"}, "nowhere.ini does not exist"),
    ("tokenize_patches_modal", ["--label", "tiny", "--dry-run", "--n-workers", 0], {}, "n_workers must be at least 1"),
    ("predict_modal", ["--port", 99999], {}, "port must be"),
    ("verify_modal", ["--label", "tiny"], {}, "")])  # no account
def test_a_launcher_ends_with_a_sentence(place, name, options, env, sentence):
    done = by_hand(name, *options, **env)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert done.stderr.startswith("tomat: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_has_examples(place, name):
    done = by_hand(name, "--help")
    assert done.returncode == 0 and f"scripts/{name}.py" in done.stdout and "Print the job" in done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_is_thin_and_names_nobody(name):
    source = (ROOT / f"scripts/{name}.py").read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) < 80
    assert not any(isinstance(node, ast.For | ast.While | ast.Try | ast.With | ast.ListComp) for node in ast.walk(tree))
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    assert len(branches) == 1  # whether it is the program
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not any(mark in text for text in texts for mark in ("s3://", "gs://", "@gmail", "entity"))


def test_the_lock_holds_everything_that_the_project_asks_for():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][extra] for extra in ("gcs", "s3", "wandb"))
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[wanted.name]), text
