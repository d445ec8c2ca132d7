"""What cuts across the formats: nothing is dropped, nothing half-written, every bad file is one sentence."""

import gzip
import io
import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings, strategies as st
from monty.json import MontyEncoder
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp.outputs import Chgcar

from tomat.density import (RHO, TOTAL, Density, RawStore, density_info, format_of, plot_slice, read_density,
                           write_density, write_store)
from tomat.files import TomatError, exists, list_folder, write_text

FILES = Path(__file__).parent / "files"
quick = settings(derandomize=True, deadline=None, max_examples=25)


def crystal(rng, n_atoms=2, elements=("Fe", "O", "Na")):
    "A skewed cell with atoms anywhere in it, like ones together."
    lattice = Lattice.from_parameters(*rng.uniform(2, 6, 3), *rng.uniform(70, 110, 3))
    species = sorted(str(e) for e in rng.choice(elements, n_atoms))
    return Structure(lattice, species, rng.random((n_atoms, 3)))


def density(rng, shape=(4, 3, 5), n_atoms=2, spin=(), augmented=False, baseline=False):
    "A density of noise, each part of it different."
    def grid():
        return rng.normal(3, 2, shape).astype(np.float32)
    def paw(i):
        values = np.round(rng.normal(size=1 + 4 * i), 6)
        return values + 1j * np.round(rng.normal(size=values.size), 6) if i % 2 else values
    blocks = ("total", *spin) if augmented else ()
    return Density(grid(), crystal(rng, n_atoms), id="noise-1", spin={name: grid() for name in spin},
                   augmentation={name: {i + 1: paw(i) for i in range(n_atoms)} for name in blocks},
                   moments={name: np.round(rng.normal(size=n_atoms), 9) for name in spin},
                   baseline=grid() if baseline else None, metadata={"task_id": "noise-1", "comment": "noise"})


def assert_same(a, b):
    "Equal to the last bit of a float32, and of the structure's floats."
    assert a.id == b.id and a.structure.species == b.structure.species and a.units == b.units
    np.testing.assert_array_equal(a.structure.lattice.matrix, b.structure.lattice.matrix)
    np.testing.assert_array_equal(a.structure.frac_coords, b.structure.frac_coords)
    np.testing.assert_array_equal(a.values.astype(np.float32), b.values.astype(np.float32))
    for x, y in ((a.spin, b.spin), (a.moments, b.moments), (a.augmentation, b.augmentation)):
        assert list(x) == list(y)
    for name in a.spin:
        np.testing.assert_array_equal(a.spin[name].astype(np.float32), b.spin[name].astype(np.float32))
    for name in a.moments:
        np.testing.assert_array_equal(a.moments[name], b.moments[name])
    for name, atoms in a.augmentation.items():
        assert list(atoms) == list(b.augmentation[name])
        for atom in atoms:
            np.testing.assert_array_equal(atoms[atom], b.augmentation[name][atom])


SPINS = st.sampled_from([(), ("diff",), ("diff_x", "diff_y", "diff_z")])
NAMES = st.sampled_from(["noise-1.vasp", "CHGCAR.noise-1.gz", "noise-1.zarr", "noise-1.zarr.zip", "noise-1.json.gz"])


@quick
@given(seed=st.integers(0, 10**6), shape=st.tuples(*[st.integers(1, 6)] * 3), n_atoms=st.integers(1, 7), spin=SPINS,
       augmented=st.booleans(), names=st.lists(NAMES, min_size=1, max_size=3))
def test_no_chain_of_formats_drops_anything(tmp_path_factory, seed, shape, n_atoms, spin, augmented, names):
    folder = tmp_path_factory.mktemp("chain")
    first = density(np.random.default_rng(seed), shape, n_atoms, spin, augmented)
    now = first
    for name in names:
        write_density(now, folder / name)
        now = read_density(folder / name)
    assert_same(first, now)


@pytest.mark.parametrize("name", ["CHGCAR.Li.gz", "CHGCAR.NaCl.gz"])
def test_real_files_survive_zarr(tmp_path, name):
    before = read_density(FILES / name)
    write_density(before, tmp_path / "x.zarr")
    write_density(read_density(tmp_path / "x.zarr"), tmp_path / name)
    after = read_density(tmp_path / name)
    assert_same(before, after)
    assert after.augmentation and after.n_electrons == pytest.approx({"Li": 1, "NaCl": 8}[before.id], abs=5e-4)


def test_every_line_of_a_chgcar_comes_back(tmp_path):
    """Grid lines to the character, the others to the number."""
    write_density(read_density(FILES / "CHGCAR.NaCl.gz"), tmp_path / "CHGCAR")
    old = gzip.decompress((FILES / "CHGCAR.NaCl.gz").read_bytes()).decode().split("\n")
    new = (tmp_path / "CHGCAR").read_text().split("\n")
    assert len(old) == len(new)
    grid = slice(10, 11 + math.ceil(56**3 / 5))
    assert [line.split() for line in old[grid]] == [line.split() for line in new[grid]]
    def numbers(line):
        return [word if word.isalpha() else float(word) for word in line.split()]
    assert [numbers(line) for line in old[grid.stop:]] == [numbers(line) for line in new[grid.stop:]]


SPIN_FILE = """\
Fe  O
   1.00000000000000
     4.000000    0.000000    0.000000
     0.000000    4.000000    0.000000
     0.000000    0.000000    4.000000
   Fe   O
     1     1
Direct
  0.000000  0.000000  0.000000
  0.500000  0.500000  0.500000

    2    2    3
 0.10000000000E+02 0.20000000000E+02 0.30000000000E+02 0.40000000000E+02 0.50000000000E+02
 0.60000000000E+02 0.70000000000E+02 0.80000000000E+02 0.90000000000E+02 0.11000000000E+02
 0.12000000000E+02 0.13000000000E+02
augmentation occupancies   1   6
  0.2743786E+00 -0.3307158E-01  0.0000000E+00  0.1033253E-12 -0.1000000E+01
  0.5000000E+00
augmentation occupancies   2   1
  0.1000000E+01
  0.371234567890E+01 -0.100000000000E+00
    2    2    3
 -.10000000000E+01 0.20000000000E+00 0.30000000000E+00 0.40000000000E+00 0.50000000000E+00
 0.60000000000E+00 0.70000000000E+00 0.80000000000E+00 0.90000000000E+00 0.11000000000E+00
 0.12000000000E+00 0.13000000000E+00
augmentation occupancies   1   1
  0.4000000E+01
augmentation occupancies   2   1
  0.5000000E+01
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_spin_polarised_file_as_vasp_writes_it(tmp_path, end):
    (tmp_path / "CHGCAR").write_text(SPIN_FILE, newline=end)
    got = read_density(tmp_path / "CHGCAR")
    assert got.id == tmp_path.name and got.metadata["comment"] == "Fe  O"
    assert got.values[1, 0, 0] == 20 and got.values[0, 0, 2] == 90 and got.n_electrons == pytest.approx(486 / 12)
    assert got.spin["diff"][0, 0, 0] == -1
    np.testing.assert_array_equal(got.moments["diff"], [3.71234567890, -0.1])
    np.testing.assert_array_equal(got.augmentation["total"][1], [0.2743786, -0.03307158, 0, 1.033253e-13, -1, 0.5])
    np.testing.assert_array_equal(got.augmentation["diff"][2], [5])
    write_density(got, tmp_path / "again.vasp")
    lines = (tmp_path / "again.vasp").read_text().splitlines()
    place = [line.split() for line in lines].index(["2", "2", "3"], 12)
    assert [float(x) for x in lines[place - 1].split()] == [3.71234567890, -0.1]
    assert_same(got, replace(read_density(tmp_path / "again.vasp"), id=got.id))


def test_the_atom_counts_may_look_like_a_grid(tmp_path):
    rng = np.random.default_rng(1)
    structure = Structure(Lattice.cubic(4), ["Fe", "Fe", "O", "O", "Na", "Na"], rng.random((6, 3)))
    first = Density(rng.normal(size=(2, 2, 2)), structure, id="x", spin={"diff": rng.normal(size=(2, 2, 2))},
                    moments={"diff": np.arange(6.0)})
    write_density(first, tmp_path / "x.vasp")
    assert_same(first, read_density(tmp_path / "x.vasp"))


def test_the_old_and_the_new_json_of_pymatgen(tmp_path):
    """Augmentation as VASP's lines with the moments at the end, as the Materials Project has it, and as numbers."""
    (tmp_path / "CHGCAR").write_text(SPIN_FILE)
    from_text = read_density(tmp_path / "CHGCAR")
    new = Chgcar.from_file(tmp_path / "CHGCAR").as_dict()
    lines = SPIN_FILE.splitlines(keepends=True)
    old = {**new, "data_aug": {"total": lines[15:21], "diff": lines[25:]}}
    for task, moments in (({"task_id": "mp-1", "fs_id": "f", "data": old}, True), (old, True), ({"data": new}, False)):
        (tmp_path / "mp-1.json.gz").write_bytes(gzip.compress(json.dumps(task, cls=MontyEncoder).encode()))
        got = read_density(tmp_path / "mp-1.json.gz")
        assert_same(replace(from_text, id="mp-1", moments=from_text.moments if moments else {}), got)
    assert format_of("mp-1.json.gz") == "mp-json"


@quick
@given(seed=st.integers(0, 10**6), steps=st.tuples(*[st.integers(-9, 9)] * 3))
def test_rolling_moves_everything_together(seed, steps):
    rng = np.random.default_rng(seed)
    first = density(rng, spin=("diff",), baseline=True)
    moved = first.rolled(steps)
    assert moved.n_electrons == pytest.approx(first.n_electrons, abs=1e-6)
    i, j, k = rng.integers(0, first.shape)
    place = tuple((np.array([i, j, k]) + steps) % first.shape)
    for of in (lambda d: d.values, lambda d: d.spin["diff"], lambda d: d.baseline):
        assert of(moved)[place] == of(first)[i, j, k]
    shift = moved.structure.frac_coords - first.structure.frac_coords - np.divide(steps, first.shape)
    np.testing.assert_allclose(shift, shift.round(), atol=1e-12)
    back = moved.rolled([-s for s in steps])
    np.testing.assert_array_equal(back.values, first.values)


@settings(quick, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_units_and_electrons(tmp_path_factory, seed):
    first = density(np.random.default_rng(seed), spin=("diff",), baseline=True)
    other = first.as_units(RHO)
    assert other.n_electrons == pytest.approx(first.n_electrons, rel=1e-5)
    np.testing.assert_allclose(other.as_units(TOTAL).spin["diff"], first.spin["diff"], rtol=1e-5)
    np.testing.assert_allclose(other.values * first.volume, first.values, rtol=1e-5)
    path = tmp_path_factory.mktemp("units")
    for name in ("x.vasp", "x.zarr", "x.cube", "x.json"):
        write_density(other, path / name)
        assert read_density(path / name).n_electrons == pytest.approx(first.n_electrons, rel=1e-4)


def test_a_cube_with_its_origin_elsewhere(tmp_path):
    first = density(np.random.default_rng(3))
    write_density(first, tmp_path / "x.cube")
    lines = (tmp_path / "x.cube").read_text().splitlines()
    shifted = lines.copy()
    shifted[2] = f"{len(first.structure):5d}{1:12.6f}{2:12.6f}{-3:12.6f}"
    for i in range(6, 6 + len(first.structure)):
        z, q, *xyz = lines[i].split()
        shifted[i] = " ".join([z, q, *(f"{float(x) + d:.6f}" for x, d in zip(xyz, (1, 2, -3), strict=True))])
    (tmp_path / "y.cub.gz").write_bytes(gzip.compress("\n".join(shifted).encode()))
    a, b = read_density(tmp_path / "x.cube"), read_density(tmp_path / "y.cub.gz")
    np.testing.assert_allclose(a.structure.cart_coords, b.structure.cart_coords, atol=2e-6)
    np.testing.assert_array_equal(a.values, b.values)


def test_the_same_density_is_the_same_bytes(tmp_path):
    first = density(np.random.default_rng(0), spin=("diff",), augmented=True)
    for name in ("CHGCAR.gz", "x.cube.gz", "x.json.gz", "x.zarr.zip"):
        write_density(first, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        write_density(first, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_minus_zero_can_be_written(tmp_path):
    first = replace(density(np.random.default_rng(0)), values=np.full((2, 2, 2), -0.0))
    write_density(first, tmp_path / "CHGCAR")
    assert not np.signbit(read_density(tmp_path / "CHGCAR").values).any()


# Refusals

def refused(path, *words):
    "Reading gives one sentence that names the file."
    with pytest.raises(TomatError) as caught:
        read_density(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and text.endswith(".") and all(word in text for word in words), text


def test_every_truncation_is_refused_or_is_a_whole_smaller_file(tmp_path):
    """A cut between two blocks leaves a whole file of fewer blocks; every other cut is seen."""
    rng = np.random.default_rng(5)
    write_density(density(rng, (2, 3, 2), spin=("diff",), augmented=True), tmp_path / "CHGCAR")
    whole = (tmp_path / "CHGCAR").read_text()
    passed = []
    for n in range(len(whole) - 1):
        (tmp_path / "CHGCAR.cut").write_text(whole[:n])
        try:
            read_density(tmp_path / "CHGCAR.cut")
            passed.append(n)
        except TomatError as err:
            assert "CHGCAR.cut" in str(err) and "\n" not in str(err)
    assert len(passed) < 20
    assert all(whole[n].isspace() or whole[n - 1].isspace() for n in passed), "a number was cut in two"


@pytest.mark.parametrize("name", ["x.cube", "x.json", "x.zarr.zip", "CHGCAR.gz"])
def test_half_a_file_is_refused(tmp_path, name):
    write_density(density(np.random.default_rng(0), spin=("diff",), augmented=True), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for part in (0, 1, len(content) // 3, len(content) // 2, len(content) - 8):
        (tmp_path / name).write_bytes(content[:part])
        refused(tmp_path / name)


@pytest.mark.parametrize("name, content, words", [
    ("CHGCAR", "", ["empty"]),
    ("CHGCAR", "Dear reader,\n\nnothing here.\n", ["CHGCAR"]),
    ("POSCAR.vasp", SPIN_FILE[:SPIN_FILE.index("    2    2    3")], ["CHGCAR"]),
    ("CHGCAR", SPIN_FILE.replace("   Fe   O\n", ""), ["elements are not named"]),
    ("CHGCAR", SPIN_FILE.replace("   Fe   O\n", "   Xx   O\n"), ["unknown elements", "Xx"]),
    ("CHGCAR", SPIN_FILE.replace("0.20000000000E+02", "NaN"), ["1 NaN"]),
    ("CHGCAR", SPIN_FILE.replace("0.20000000000E+02", "*****************"), ["CHGCAR"]),
    ("CHGCAR", SPIN_FILE[:SPIN_FILE.index("    2    2    3\n -.1")], ["announced"]),
    ("CHGCAR", SPIN_FILE + SPIN_FILE[SPIN_FILE.index("    2    2    3\n -.1"):], ["3 blocks"]),
    ("a.json", "[]", ["JSON"]), ("a.json", "{}", ["no density"]), ("a.json", "{", ["JSON"]),
    ("a.json", '{"data": {"poscar": {}, "data": {}}}', ["JSON"]),
    ("a.cube", "one\ntwo\n  1 0 0 0\n 2 1 0 0\n 2 0 1 0\n 2 0 0 1\n 999 0 0 0 0\n" + "1.0 " * 8, ["cube"]),
    ("a.cube", "one\ntwo\n  1 0 0 0\n 2 1 0 0\n 2 0 1 0\n 2 0 0 1\n 1 0 0 0 0\n" + "1.0 " * 7, ["cube"]),
    ("a.cube", "one\ntwo\n  1 0 0 0 2\n 1 1 0 0\n 1 0 1 0\n 1 0 0 1\n 1 0 0 0 0\n 1.0 2.0\n", ["2 fields"]),
    ("a.zarr", "a file", ["zip"]), ("a.zip", "a file", ["zip"]), ("CHGCAR.gz", SPIN_FILE, ["unpacked"])])
def test_a_bad_file_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, *words)


def test_bad_names(tmp_path):
    refused(tmp_path / "OUTCAR", "CHGCAR", "*.cube", "*.zarr")
    refused(tmp_path / "CHGCAR", "does not exist")
    (tmp_path / "CHGCAR.folder").mkdir()
    refused(tmp_path / "CHGCAR.folder")
    (tmp_path / "OUTCAR").write_text(SPIN_FILE)
    assert read_density(tmp_path / "OUTCAR", format="chgcar").formula == "FeO"
    with pytest.raises(TomatError, match="use one of"):
        read_density(tmp_path / "OUTCAR", format="elk")


def test_bad_zarr_groups(tmp_path):
    good = density(np.random.default_rng(0))
    write_density(good, tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "charge_density_total" / "c" / "0" / "0" / "0").unlink()
    refused(tmp_path / "a.zarr", "lacks 1 of its 1 chunks")
    (tmp_path / "a.zarr" / "zarr.json").unlink()
    refused(tmp_path / "a.zarr")
    structure = json.dumps(good.structure.as_dict())
    for array, attributes, words in [
            (np.ones((2, 2, 2, 2), "f4"), {"structure": structure}, "3-D grid"),
            (np.ones((2, 2, 2), int), {"structure": structure}, "3-D grid"),
            (np.full((2, 2, 2), np.inf), {"structure": structure}, "8 NaN or infinite"),
            (np.ones((2, 2, 2)), {}, "structure"), (None, {"structure": structure}, "no array")]:
        group = zarr.open_group(tmp_path / "b.zarr", mode="w")
        group.attrs.update(attributes)
        if array is not None:
            group.create_array("charge_density_total", data=array)
        refused(tmp_path / "b.zarr", words)


def test_a_spin_block_of_zeros_may_be_left_out_on_disk(tmp_path):
    good = density(np.random.default_rng(0), spin=("diff",))
    write_density(replace(good, spin={"diff": np.zeros(good.shape)}), tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "charge_density_diff" / "c" / "0" / "0" / "0").unlink()
    assert not read_density(tmp_path / "a.zarr").spin["diff"].any()


def test_a_foreign_zarr_group_reads(tmp_path):
    """Chunks of any size, attributes as objects, no id: the name gives it."""
    group = zarr.open_group(tmp_path / "mp-7.zarr", mode="w")
    good = density(np.random.default_rng(0))
    group.attrs.update({"structure": good.structure.as_dict(), "metadata": {}})
    group.create_array("charge_density_total", data=good.values, chunks=(2, 2, 2))
    assert_same(read_density(tmp_path / "mp-7.zarr"), Density(good.values, good.structure, id="mp-7"))


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    mixed = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    alloy = Density(np.ones((2, 2, 2)), mixed, id="alloy")
    for name in ("CHGCAR", "a.cube", "a.json"):
        with pytest.raises(TomatError, match="one element at each site"):
            write_density(alloy, tmp_path / name)
    spoiled = density(np.random.default_rng(0))
    spoiled.values[0, 0, 0] = np.nan
    for name in ("CHGCAR", "a.cube", "a.json", "a.zarr"):
        with pytest.raises(TomatError, match="NaN"):
            write_density(spoiled, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    write_density(alloy, tmp_path / "a.zarr")
    assert not read_density(tmp_path / "a.zarr").structure.is_ordered


# Stores

@pytest.fixture
def three():
    rng = np.random.default_rng(7)
    return [replace(density(rng, (3, 4, 5), n, baseline=True), id=f"m-{n}", metadata={}) for n in (1, 2, 3)]


@pytest.mark.parametrize("name", ["store", "store.zip"])
def test_a_store_comes_back(tmp_path, three, name):
    write_store(three, {"train": ["m-1", "m-3"], "validation": ["m-2"], "test": []}, tmp_path / name, readme="Made up.")
    store = RawStore(str(tmp_path / name))
    assert store.ids == ["m-1", "m-2", "m-3"] and store.split("train") == ["m-1", "m-3"] and store.split("test") == []
    for one in three:
        got = store.read(one.id)
        assert_same(one, got)
        np.testing.assert_array_equal(got.baseline, one.baseline)
    with pytest.raises(TomatError, match="m-9"):
        store.read("m-9")
    with pytest.raises(TomatError, match="it has test, train, validation"):
        store.split("dev")


def test_a_store_made_elsewhere(tmp_path, three):
    """Split under another name, other keys in it, everything inside one more folder of the archive."""
    write_store(three, {}, tmp_path / "a")
    (tmp_path / "a" / "split.json").unlink()
    (tmp_path / "a" / "split_limit_22M.json").write_text('{"seed": 42, "train": [2, 0], "validation": [1]}')
    assert RawStore(str(tmp_path / "a")).splits == {"train": ["m-3", "m-1"], "validation": ["m-2"]}
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in (tmp_path / "a").rglob("*"):
            packed.write(path, "top/" + path.relative_to(tmp_path / "a").as_posix())
    store = RawStore(str(tmp_path / "b.zip"))
    assert store.split("train") == ["m-3", "m-1"]
    assert_same(store.read("m-2"), three[1])
    refused(tmp_path / "b.zip", "RawStore")


def test_bad_stores(tmp_path, three):
    for splits, which, words in [({"train": ["m-8"]}, three, "m-8"), ({}, [three[0], three[0]], "used once"),
                                 ({}, [replace(three[0], id="a/b")], "ids are names")]:
        for name in ("s", "s.zip"):
            with pytest.raises(TomatError, match=words):
                write_store(which, splits, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    write_store(three, {"train": ["m-1"]}, tmp_path / "s")
    for split in ('{"train": [3]}', '{"train": [-1]}', '{"train": ["m-1"]}', "[1]", "{"):
        (tmp_path / "s" / "split.json").write_text(split)
        with pytest.raises(TomatError, match="does not fit"):
            RawStore(str(tmp_path / "s")).split("train")
    (tmp_path / "broken.zip").write_text("no zip")
    for root in ("missing", "broken.zip"):
        with pytest.raises(TomatError, match=root):
            RawStore(str(tmp_path / root)).split("train")


def test_a_store_that_fails_on_the_way_leaves_nothing(tmp_path, three):
    def some():
        yield three[0]
        raise KeyboardInterrupt
    for name in ("s", "s.zip"):
        with pytest.raises(KeyboardInterrupt):
            write_store(some(), {}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# An S3 server on loopback

@pytest.fixture(scope="module")
def server():
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def s3(server, monkeypatch):
    "A bucket, found through the environment as anybody's is."
    for name, value in {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    import s3fs
    fs = s3fs.S3FileSystem(endpoint_url=server, use_listings_cache=False)
    if fs.exists("densities"):
        fs.rm("densities", recursive=True)
    fs.mkdir("densities")
    return "s3://densities"


def test_densities_in_s3(s3):
    first = density(np.random.default_rng(0), spin=("diff",), augmented=True)
    for name in ("x.zarr", "x.zarr.zip", "CHGCAR.x.gz", "x.json.gz", "sub/x.zarr"):
        for _ in range(2):
            write_density(first, f"{s3}/{name}")
        assert_same(first, replace(read_density(f"{s3}/{name}"), id=first.id))
    assert list_folder(s3) == ["CHGCAR.x.gz", "sub", "x.json.gz", "x.zarr", "x.zarr.zip"]
    assert read_density(f"{s3}/CHGCAR.x.gz").id == "x"


def test_a_failed_write_to_s3_leaves_nothing(s3, monkeypatch):
    spoiled = density(np.random.default_rng(0))
    spoiled.values[0, 0, 0] = np.nan
    for name in ("x.zarr", "CHGCAR.x.gz"):
        with pytest.raises(TomatError, match="NaN"):
            write_density(spoiled, f"{s3}/{name}")
    import s3fs
    put = s3fs.S3FileSystem._put_file
    async def dead(self, source, key, *args, **kwargs):
        if key.endswith("x.zarr/zarr.json") or key.endswith(".gz"):
            raise OSError("the line went dead")
        return await put(self, source, key, *args, **kwargs)
    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", dead)
    for name in ("x.zarr", "CHGCAR.x.gz"):
        with pytest.raises(TomatError, match="the line went dead"):
            write_density(density(np.random.default_rng(0)), f"{s3}/{name}")
        assert not exists(f"{s3}/{name}")
    assert list_folder(s3) == []


def test_what_s3_refuses_is_one_sentence(s3, monkeypatch):
    for path in ("s3://no-such-bucket/x.zarr", f"{s3}/x.zarr", f"{s3}/CHGCAR"):
        refused(path, "no such file")
    with pytest.raises(TomatError, match="no such bucket"):
        write_density(density(np.random.default_rng(0)), "s3://no-such-bucket/CHGCAR")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    refused(f"{s3}/x.zarr", "endpoint")


@pytest.mark.parametrize("name", ["store", "store.zip"])
def test_a_store_in_s3(s3, three, name):
    write_store(three, {"train": ["m-1"], "validation": ["m-2", "m-3"]}, f"{s3}/{name}")
    store = RawStore(f"{s3}/{name}")
    assert store.ids == ["m-1", "m-2", "m-3"]
    for id in store.split("validation"):
        assert_same(store.read(id), three[int(id[-1]) - 1])
    with pytest.raises(TomatError, match="m-9"):
        store.read("m-9")


def test_other_things_in_a_bucket_stay(s3, three):
    write_text(f"{s3}/thesis.tex", "years of work")
    with pytest.raises(TomatError, match="holds other things"):
        write_store(three, {}, s3)
    assert list_folder(s3) == ["thesis.tex"]


# For people

def test_info_is_plain_json():
    first = density(np.random.default_rng(0), spin=("diff",), augmented=True)
    info = json.loads(json.dumps(density_info(first, "chgcar")))
    assert info["grid"] == [4, 3, 5] and info["spin"] == ["diff"] and info["augmentation"] is True
    assert info["electrons"] == pytest.approx(first.values.mean(), rel=1e-6)
    assert info["negative_share"] == pytest.approx((first.values < 0).mean())
    assert info["max"] == pytest.approx(first.values.max() / first.volume, rel=1e-6)


def test_a_slice_is_drawn_the_right_way_round():
    import matplotlib
    matplotlib.use("Agg")
    values_xyz = np.arange(24.0).reshape(2, 3, 4)
    ax = plot_slice(values_xyz, axis=1, index=2)
    np.testing.assert_array_equal(ax.images[0].get_array(), values_xyz[:, 2, :].T)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "c")
    ax.figure.savefig(io.BytesIO())
