"The sweep: the same table for any number of workers, from wherever it was stopped, and nothing that hides."
import csv
import gzip
import io
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
from crystals import noise

from tomat.study.fidelity import COLUMNS, measure, measure_all, read_sweep, sweep, sweep_summary
from tomat.io.remote import TomatError
from tomat.density.metrics import METRICS, atom_spheres, nmae
from tomat.study.schemes import SCHEMES, Difference, LowWaves
from tomat.study.voxels import Direct, Scheme, TopShare, as_numbers, as_tokens
from tomat.density.source import InMemory
from tomat.density.store import sample_store

PUBLISHED = ("mp_id category config tokens nmae chi_sq hellinger jsd weighted_mae seconds grid "
             "mass_captured effective_threshold").split()
FEW = {name: SCHEMES[name] for name in ("direct@float32", "cutoff@5%", "fourier@5%", "Δ table + fourier@5%", "patches@one token")}
STORE = sample_store()
IDS = STORE.split("validation")[:3]


def lines_of(path):
    "All but the seconds."
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [{**line, "seconds": ""} for line in csv.DictReader(io.StringIO(text))]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "one.csv"
    assert sweep(STORE, out, FEW, IDS) == len(IDS) * len(FEW)
    return out


def test_the_published_columns_come_first(table):
    assert list(COLUMNS[:len(PUBLISHED)]) == PUBLISHED
    assert table.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_any_number_of_workers(table, tmp_path):
    sweep(STORE, tmp_path / "three.csv.gz", FEW, IDS, workers=3)
    assert lines_of(tmp_path / "three.csv.gz") == lines_of(table)
    assert os.listdir(tmp_path) == ["three.csv.gz"]


def test_numbers_are_those_of_the_metrics(table):
    density = STORE.read(IDS[1])
    true = density.total.astype(float)
    for row in read_sweep(table)[len(FEW):2 * len(FEW)]:
        scheme = FEW[row["config"]]
        tokens = scheme.write(true, density.structure)
        back = scheme.read(tokens, density.structure)
        assert row["mp_id"] == IDS[1] and row["tokens"] == len(tokens) and row["context"] == scheme.context(tokens)
        for name, metric in METRICS.items():
            unit = density.volume if name in ("rmse", "weighted_mae") else 1
            assert row[name] == pytest.approx(metric(back, true) / unit, rel=1e-4, abs=1e-20)
        assert row["mass_captured"] == pytest.approx(back.sum() / true.sum(), rel=1e-4)
        assert row["seconds"] >= 0 and row["grid"] == "x".join(map(str, density.shape))


def test_effective_threshold(table):
    density, rows = STORE.read(IDS[0]), {row["config"]: row for row in read_sweep(table)[:len(FEW)]}
    rho = np.sort(np.abs(density.rho).ravel())[::-1]
    assert rows["cutoff@5%"]["effective_threshold"] == pytest.approx(rho[round(0.05 * rho.size) - 1], rel=1e-4)
    assert np.isnan(rows["fourier@5%"]["effective_threshold"])


@dataclass(frozen=True)
class Slow(Scheme):
    "A scheme that leaves time to be killed in."
    kind = "slow"

    def encode(self, values_xyz, structure):
        time.sleep(0.3)
        return as_tokens(values_xyz, None)

    def decode(self, tokens, shape, structure):
        return as_numbers(tokens, None).reshape(shape)


def test_killed_and_started_again(tmp_path):
    "A kill that nothing can catch; what was done is not done again, and the table is as if nothing had happened."
    code = ("import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from test_fidelity import *; "
            f"sweep(STORE, Path({str(tmp_path / 'slow.csv')!r}), {{'slow': Slow()}}, STORE.ids[:8], workers=2)")
    started = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    parts, deadline = tmp_path / "slow.csv.parts", time.monotonic() + 60
    while len(list(parts.glob("[!.]*.csv"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("[!.]*.csv")}
    assert 3 <= len(done) < 8 and not (tmp_path / "slow.csv").exists()
    times = []
    sweep(Watched(times), tmp_path / "slow.csv", {"slow": Slow()}, STORE.ids[:8])
    sweep(STORE, tmp_path / "fresh.csv", {"slow": Slow()}, STORE.ids[:8], workers=2)
    assert len(times) == 8 - len(done)
    assert lines_of(tmp_path / "slow.csv") == lines_of(tmp_path / "fresh.csv")
    assert sorted(os.listdir(tmp_path)) == ["fresh.csv", "slow.csv"]


class Watched:
    "The sample, which records the materials that are read."

    def __init__(self, times):
        self.times, self.ids, self.version_tag = times, STORE.ids, STORE.version_tag

    def split(self, name):
        return self.ids

    def read(self, id):
        self.times.append(id)
        return STORE.read(id)


def test_other_schemes_and_other_densities_do_not_find_old_parts(tmp_path):
    def interrupted(densities, schemes):
        "All but the last material, then a stop."
        class Stops(InMemory):
            def read(self, id):
                if id == list(self.ids)[-1]:
                    raise KeyboardInterrupt
                return super().read(id)
        with pytest.raises(KeyboardInterrupt):
            sweep(Stops(densities), tmp_path / "t.csv", schemes)
    rng = np.random.default_rng(0)
    first, second = (replace(noise(rng), id=id) for id in ("a", "b"))
    interrupted([first, second], {"x": LowWaves(0.5)})
    assert len(list((tmp_path / "t.csv.parts").glob("*.csv"))) == 1
    other = replace(first, values=first.values + np.float32(1))
    sweep(InMemory([other, second]), tmp_path / "t.csv", {"x": LowWaves(0.5)})
    sweep(InMemory([other, second]), tmp_path / "fresh.csv", {"x": LowWaves(0.5)})
    assert lines_of(tmp_path / "t.csv") == lines_of(tmp_path / "fresh.csv")
    interrupted([first, second], {"x": LowWaves(0.5)})
    sweep(InMemory([first, second]), tmp_path / "t.csv", {"x": TopShare(0.5)})
    sweep(InMemory([first, second]), tmp_path / "fresh.csv", {"x": TopShare(0.5)})
    assert lines_of(tmp_path / "t.csv") == lines_of(tmp_path / "fresh.csv")


def test_a_line_without_numbers_holds_the_reason(tmp_path):
    "A refusing scheme, and a material that cannot be read, each leave a line with the reason."
    class Broken(InMemory):
        def version_tag(self, id):
            return id

        def read(self, id):
            if id == "b":
                raise TomatError("b is damaged: copy it again.")
            return super().read(id)
    rng = np.random.default_rng(0)
    source = Broken(replace(noise(rng), id=id) for id in "abc")
    sweep(source, tmp_path / "t.csv", {"direct": Direct(), "difference": Difference(Direct())})
    rows = read_sweep(tmp_path / "t.csv")
    assert [(row["mp_id"], row["config"], bool(row["note"])) for row in rows] == [
        ("a", "direct", False), ("a", "difference", True), ("b", "", True), ("c", "direct", False), ("c", "difference", True)]
    assert "same setups" in rows[1]["note"] and np.isnan(rows[1]["nmae"]) and rows[2]["note"] == "b is damaged: copy it again."
    table = {line["config"]: line for line in sweep_summary(rows)}
    assert list(table) == ["direct"] and table["direct"]["materials"] == 2 and table["direct"]["refused"] == 0


def test_summary_by_hand():
    rows = [{"config": "x", "note": "", "mp_id": id, "tokens": t, "context": t, "nmae": e, "seconds": 1.0}
            for id, t, e in (("a", 10.0, 0.1), ("b", 20.0, 0.5), ("c", 60.0, 0.2))]
    rows += [{**rows[0], "note": "no"}]
    medians = {"tokens": 20, "context": 20, "nmae": 0.2, "seconds": 1}
    assert sweep_summary(rows) == [{"config": "x", "materials": 3, "refused": 1} | medians | {"worst": 0.5, "worst_id": "b"}]


def test_the_published_conclusions_on_the_sample():
    "At equal share kept waves beat voxels; all of them lose nothing; tabulated atoms help where analytic ones do not."
    density = STORE.read(STORE.split("validation")[3])
    true = density.total.astype(float)
    def lost(name):
        return nmae(SCHEMES[name].read(SCHEMES[name].write(true, density.structure), density.structure), true)
    assert lost("cutoff@5%") > 100 * lost("fourier@5%") and lost("cutoff@1%") > 20 * lost("fourier@1%")
    assert max(lost(name) for name in SCHEMES if name.endswith("@100%")) < 1e-6
    assert lost("Δ table + fourier@1%") < 0.3 * lost("fourier@1%")
    assert min(lost(f"Δ {kind} + fourier@1%") for kind in ("gaussian", "slater", "shells")) > 0.99 * lost("fourier@1%")


def test_every_scheme_has_numbers_for_a_material_of_the_sample():
    density = STORE.read(STORE.split("validation")[0])
    rows = list(measure_all(density, SCHEMES))
    assert [row["config"] for row in rows] == list(SCHEMES) and not any(row["note"] for row in rows if "@0.1%" not in row["config"])
    found = measure(density, Direct(), atom_spheres(density.structure, density.shape))
    assert found["nmae"] < 1e-7 and found["sphere_error"] < 1e-6


@pytest.mark.parametrize("out, ids, words", [
    ("t.parquet", IDS, "end it with .csv"), ("t.csv", [], "nothing to measure"), ("t.csv", IDS[:1] * 2, "twice"),
    ("s3://bucket/t.csv", IDS, "local file")])
def test_refusals(tmp_path, out, ids, words):
    path = out if out.startswith("s3") else tmp_path / out
    with pytest.raises(TomatError, match=words) as caught:
        sweep(STORE, path, FEW, ids)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_second_run_into_the_same_table_is_refused_and_the_first_is_not_disturbed(tmp_path):
    code = ("import sys; sys.path.insert(0, 'tests'); from test_fidelity import *; "
            f"sweep(STORE, {str(tmp_path / 'slow.csv')!r}, {{'slow': Slow()}}, STORE.ids[:6])")
    first = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "slow.csv.parts").glob("[!.]*.csv")) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(TomatError, match="Another run is writing") as caught:
        sweep(STORE, tmp_path / "slow.csv", FEW, IDS)
    assert "\n" not in str(caught.value)
    assert first.wait() == 0 and len(lines_of(tmp_path / "slow.csv")) == 6
    assert os.listdir(tmp_path) == ["slow.csv"]


def test_a_full_disk_leaves_the_parts_that_fit(tmp_path):
    "The error is one sentence; with free space again the sweep goes on."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(TomatError, match=r"t\.csv cannot be written, .* too large\.$"):
            sweep(STORE, tmp_path / "t.csv", FEW, IDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["t.csv.parts"]
    parts = {part: part.stat().st_mtime_ns for part in (tmp_path / "t.csv.parts").glob("*.csv")}
    assert len(parts) == len(IDS) and all(len(part.read_text().splitlines()) == len(FEW) for part in parts)
    times = []
    sweep(Watched(times), tmp_path / "t.csv", FEW, IDS)
    assert not times and os.listdir(tmp_path) == ["t.csv"]


@pytest.mark.parametrize("out", ["file/t.csv", "t.csv"])
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TomatError, match=r"cannot be written|workers"):
        sweep(STORE, tmp_path / out, FEW, IDS, workers=0)
    assert os.listdir(tmp_path) == ["file"]


def test_another_folder_is_not_emptied(tmp_path):
    (tmp_path / "t.csv.parts").mkdir()
    (tmp_path / "t.csv.parts" / "thesis.doc").write_text("mine")
    with pytest.raises(TomatError, match=r"thesis\.doc"):
        sweep(STORE, tmp_path / "t.csv", FEW, IDS)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\x1f\x8b\x00", ",".join(COLUMNS).encode() + b"\nx" * 3])
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_another_table_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TomatError, match=rf"{name} .*[^.]\.$"):
        read_sweep(tmp_path / name)


def test_a_table_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(TomatError, match=r"t\.csv is not a file: check the name\.$") as caught:
        read_sweep(tmp_path / "t.csv")
    assert str(caught.value).startswith(str(tmp_path))
