"""What cuts across the formats: nothing is dropped, nothing half-written, every bad file is one sentence."""

import gzip
import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from crystals import SPIN_FILE, assert_same, noise, quick, refused
from hypothesis import given, settings, strategies as st
from monty.json import MontyEncoder
from pymatgen.core import Element, Lattice, Structure
from pymatgen.io.vasp.outputs import Chgcar

from tomat.density.core import RHO, Density, formula_of
from tomat.io.remote import TomatError, exists, list_folder
from tomat.io.files import write_text
from tomat.density.formats import density_info, format_of, may_be_density, read_density, read_structure, write_density
from tomat.density.zarr_group import group_version_tag

FILES = Path(__file__).parent / "files"


SPINS = st.sampled_from([(), ("diff",), ("diff_x", "diff_y", "diff_z")])
NAMES = st.sampled_from(["noise-1.vasp", "CHGCAR.noise-1.gz", "noise-1.zarr", "noise-1.zarr.zip", "noise-1.json.gz"])


@quick
@given(seed=st.integers(0, 10**6), shape=st.tuples(*[st.integers(1, 6)] * 3), n_atoms=st.integers(1, 7), spin=SPINS,
       augmented=st.booleans(), names=st.lists(NAMES, min_size=1, max_size=3))
def test_no_chain_of_formats_drops_anything(tmp_path_factory, seed, shape, n_atoms, spin, augmented, names):
    folder = tmp_path_factory.mktemp("chain")
    first = noise(np.random.default_rng(seed), shape, n_atoms, spin, augmented)
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


def test_a_cube_with_its_origin_elsewhere(tmp_path):
    first = noise(np.random.default_rng(3))
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
    first = noise(np.random.default_rng(0), spin=("diff",), augmented=True)
    for name in ("CHGCAR.gz", "x.cube.gz", "x.json.gz", "x.zarr.zip"):
        write_density(first, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        write_density(first, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["x.cube", "x.json", "x.zarr.zip", "CHGCAR.gz"])
def test_half_a_file_is_refused(tmp_path, name):
    write_density(noise(np.random.default_rng(0), spin=("diff",), augmented=True), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for part in (0, 1, len(content) // 3, len(content) // 2, len(content) - 8):
        (tmp_path / name).write_bytes(content[:part])
        refused(tmp_path / name)


NAMELESS = SPIN_FILE.replace("   Fe   O\n", "").replace("Fe  O\n", "by hand\n")


@pytest.mark.parametrize("name, content, words", [
    ("CHGCAR", "", ["empty"]),
    ("CHGCAR", "Dear reader,\n\nnothing here.\n", ["CHGCAR"]),
    ("POSCAR.vasp", SPIN_FILE[:SPIN_FILE.index("    2    2    3")], ["CHGCAR"]),
    ("CHGCAR", NAMELESS, ["line 6", "elements are not named"]),
    ("CHGCAR", SPIN_FILE.replace("   Fe   O\n", "   Xx   O\n"), ["unknown elements", "Xx"]),
    ("CHGCAR", SPIN_FILE.replace("0.20000000000E+02", "NaN"), ["1 NaN"]),
    ("CHGCAR", SPIN_FILE.replace(" 0.5000000E+00", " 0.5000E+1000"), ["line", "atom 1 has an occupancy that is NaN or infinite"]),
    ("CHGCAR", SPIN_FILE.replace("0.20000000000E+02", "*****************"), ["line 13: value 2 of 12", "too large for"]),
    ("CHGCAR", SPIN_FILE[:SPIN_FILE.index("    2    2    3\n -.1")], ["announce"]),
    ("CHGCAR", SPIN_FILE + SPIN_FILE[SPIN_FILE.index("    2    2    3\n -.1"):], ["3 blocks"]),
    ("a.json", "[]", ["JSON"]), ("a.json", "{}", ["no density"]), ("a.json", "{", ["JSON"]),
    ("a.json", '{"data": {"poscar": {}, "data": {}}}', ["JSON"]),
    ("a.cube", "one\ntwo\n  1 0 0 0\n 2 1 0 0\n 2 0 1 0\n 2 0 0 1\n 999 0 0 0 0\n" + "1.0 " * 8, ["cube"]),
    ("a.cube", "one\ntwo\n  1 0 0 0\n 2 1 0 0\n 2 0 1 0\n 2 0 0 1\n 1 0 0 0 0\n" + "1.0 " * 7, ["cube"]),
    ("a.cube", "one\ntwo\n  1 0 0 0 2\n 1 1 0 0\n 1 0 1 0\n 1 0 0 1\n 1 0 0 0 0\n 1.0 2.0\n", ["2 fields"]),
    ("a.zarr", "a file", ["zip"]), ("a.zip", "a file", ["zip"])])
def test_a_bad_file_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, *words)


def test_bad_names(tmp_path):
    for name in ("CHGCAR", "OUTCAR", "no-such-file.gz"):  # that it is missing comes before its name
        refused(tmp_path / name, "does not exist")
    (tmp_path / "CHGCAR.folder").mkdir()
    refused(tmp_path / "CHGCAR.folder")
    (tmp_path / "OUTCAR").write_text("vasp.6.4.3\n")
    refused(tmp_path / "OUTCAR", "CHGCAR", "*.cube", "*.zarr", "--from")
    refused(tmp_path / "OUTCAR", "line", read=lambda path: read_density(path, format="chgcar"))
    with pytest.raises(TomatError, match="use one of"):
        read_density(tmp_path / "OUTCAR", format="elk")


def test_bad_zarr_groups(tmp_path):
    good = noise(np.random.default_rng(0))
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
    "By other programs, and by earlier versions, which wrote no checksums either."
    good = noise(np.random.default_rng(0))
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.attrs.update({"structure": good.structure.as_dict()})
    for name, values in {"total": good.values, "diff": np.zeros(good.shape)}.items():
        group.create_array(f"charge_density_{name}", data=values)
    assert not (tmp_path / "a.zarr" / "charge_density_diff" / "c").exists()
    assert not read_density(tmp_path / "a.zarr").spin["diff"].any()


def test_a_foreign_zarr_group_reads(tmp_path):
    """Chunks of any size, attributes as objects, no id: the name gives it."""
    group = zarr.open_group(tmp_path / "mp-7.zarr", mode="w")
    good = noise(np.random.default_rng(0))
    group.attrs.update({"structure": good.structure.as_dict(), "metadata": {}})
    group.create_array("charge_density_total", data=good.values, chunks=(2, 2, 2))
    assert_same(read_density(tmp_path / "mp-7.zarr"), Density(good.values, good.structure, id="mp-7"))


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    mixed = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    alloy = Density(np.ones((2, 2, 2)), mixed, id="alloy")
    for name in ("CHGCAR", "a.cube", "a.json"):
        with pytest.raises(TomatError, match="one element at each site"):
            write_density(alloy, tmp_path / name)
    spoiled = noise(np.random.default_rng(0))
    spoiled.values[0, 0, 0] = np.nan
    for name in ("CHGCAR", "a.cube", "a.json", "a.zarr"):
        with pytest.raises(TomatError, match="NaN"):
            write_density(spoiled, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    write_density(alloy, tmp_path / "a.zarr")
    assert not read_density(tmp_path / "a.zarr").structure.is_ordered


def test_info_is_plain_json():
    first = noise(np.random.default_rng(0), spin=("diff",), augmented=True)
    info = json.loads(json.dumps(density_info(first, "chgcar")))
    assert info["grid"] == [4, 3, 5] and info["spin"] == ["diff"] and info["augmentation"] is True
    assert info["electrons"] == pytest.approx(first.values.mean(), rel=1e-6)
    assert info["negative_share"] == pytest.approx((first.values < 0).mean())
    assert info["max"] == pytest.approx(first.values.max() / first.volume, rel=1e-6)


def test_densities_in_s3(s3):
    first = noise(np.random.default_rng(0), spin=("diff",), augmented=True)
    for name in ("x.zarr", "x.zarr.zip", "CHGCAR.x.gz", "x.json.gz", "sub/x.zarr"):
        for _ in range(2):
            write_density(first, f"{s3}/{name}")
        assert_same(first, replace(read_density(f"{s3}/{name}"), id=first.id))
    assert list_folder(s3) == ["CHGCAR.x.gz", "sub", "x.json.gz", "x.zarr", "x.zarr.zip"]
    assert read_density(f"{s3}/CHGCAR.x.gz").id == "x"


def test_a_failed_write_to_s3_leaves_nothing(s3, monkeypatch):
    spoiled = noise(np.random.default_rng(0))
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
            write_density(noise(np.random.default_rng(0)), f"{s3}/{name}")
        assert not exists(f"{s3}/{name}")
    assert list_folder(s3) == []


def test_what_s3_refuses_is_one_sentence(s3, monkeypatch):
    for path in ("s3://no-such-bucket/x.zarr", f"{s3}/x.zarr", f"{s3}/CHGCAR"):
        refused(path, "no such file")
    with pytest.raises(TomatError, match="no such bucket"):
        write_density(noise(np.random.default_rng(0)), "s3://no-such-bucket/CHGCAR")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    refused(f"{s3}/x.zarr", "endpoint")


@settings(quick, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_electrons_survive_a_change_of_unit(tmp_path_factory, seed):
    first = noise(np.random.default_rng(seed), spin=("diff",), sad=True)
    folder = tmp_path_factory.mktemp("units")
    for name in ("x.vasp", "x.zarr", "x.cube", "x.json"):
        write_density(first.as_units(RHO), folder / name)
        assert read_density(folder / name).n_electrons == pytest.approx(first.n_electrons, rel=1e-4)


@pytest.mark.filterwarnings("error:No Pauling electronegativity")
def test_a_noble_gas_passes_without_a_warning(tmp_path):
    neon = Density(np.ones((2, 2, 2)), Structure(Lattice.cubic(4), ["Ne", "Ne"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    for name in ("CHGCAR.Ne.gz", "Ne.cube", "Ne.json", "Ne.zarr"):
        Element("Ne").__dict__.pop("X", None)  # pymatgen warns once
        write_density(neon, tmp_path / name)
        assert density_info(read_density(tmp_path / name))["formula"] == "Ne"


# Structures

@pytest.fixture
def fe_o():
    return Structure(Lattice.from_parameters(3, 3.1, 3.2, 80, 95, 100), ["Fe", "Fe", "O"],
                     [[0, 0, 0], [0.5, 0.5, 0.3], [0.1, 0.7, 0.6]])


@pytest.mark.parametrize("name", ["POSCAR", "POSCAR.gz", "FeO.poscar", "CONTCAR_2", "FeO.vasp", "FeO.vasp.gz", "FeO.cif",
                                  "FeO.cif.gz", "FeO.json", "FeO.json.gz", "FeO.yaml", "FeO.xsf"])
def test_a_structure_file_gives_its_structure_and_no_grid(tmp_path, fe_o, name):
    plain = name.removesuffix(".gz")
    ending = plain.split(".")[-1]
    fe_o.to(tmp_path / plain, fmt=ending if ending in ("cif", "json", "yaml", "xsf") else "poscar")
    if name != plain:
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / plain).read_bytes()))
    got, shape = read_structure(tmp_path / name)
    assert shape is None and [s.symbol for s in got.species] == ["Fe", "Fe", "O"]
    if not plain.endswith(".cif"):  # keeps lengths and angles alone: the cell may turn
        np.testing.assert_allclose(got.lattice.matrix, fe_o.lattice.matrix, atol=1e-5)
    np.testing.assert_allclose(got.frac_coords, fe_o.frac_coords, atol=1e-5)


@pytest.mark.parametrize("name", ["CHGCAR", "x.vasp", "x.vasp.gz", "POSCAR.vasp", "POSCAR.cube", "x.json.gz", "x.zarr",
                                  "x.zarr.zip"])
def test_a_density_gives_its_structure_and_its_grid(tmp_path, name):
    first = noise(np.random.default_rng(0), augmented=True)
    write_density(first, tmp_path / name)
    got, shape = read_structure(tmp_path / name)
    assert shape == first.shape and got.species == first.structure.species
    np.testing.assert_allclose(got.frac_coords, first.structure.frac_coords, atol=1e-5)


HEADER = SPIN_FILE[:SPIN_FILE.index("    2    2    3")]


@pytest.mark.filterwarnings("ignore:Elements in POSCAR", "ignore:No ", "ignore:Issues")
@pytest.mark.parametrize("name, content, words", [
    ("POSCAR", "", ["empty"]), ("POSCAR", "Dear reader,\n", ["ends after line 1"]), ("a.json", "{", ["JSON"]),
    ("a.json", "[]", ["JSON"]), ("a.json", '{"lattice": 1, "sites": 2}', ["structure file"]),
    ("a.cif", "data_x\n", ["lists no sites"]),
    ("POSCAR", NAMELESS[:NAMELESS.index("    2    2    3")], ["elements are not named"]),
    ("POSCAR", HEADER.replace("   Fe   O\n", "   Xx   O\n"), ["unknown elements", "Xx"]),
    ("POSCAR", HEADER.replace("0.500000  0.500000  0.500000", "0.500000  nan  0.500000"), ["line 10", "nan"]),
    ("POSCAR", HEADER.replace("4.000000    0.000000    0.000000", "0.000000    0.000000    0.000000"), [""]),
    ("a.xyz", "2\nFe O\n", ["*.cif", "POSCAR"]),
    ("a.zip", "x", ["zip"]),
    ("a.vasp", SPIN_FILE[:len(HEADER) + 100], ["copy it again"]), ("CHGCAR", HEADER, ["CHGCAR"])])
def test_a_bad_structure_file_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, *words, read=read_structure)


def test_names_that_are_not_there(tmp_path):
    for name in ("POSCAR", "CHGCAR", "a.vasp", "a.json", "a.zarr", "no-such-file.gz"):
        refused(tmp_path / name, "does not exist", read=read_structure)
    refused(tmp_path, "no known format", read=read_structure)
    (tmp_path / "POSCAR.folder").mkdir()
    refused(tmp_path / "POSCAR.folder", read=read_structure)


def test_velocities_are_no_grid(tmp_path):
    (tmp_path / "a.vasp").write_text(HEADER + "  0.1 0.2 0.3\n  0.1 0.2 0.3\n")
    assert read_structure(tmp_path / "a.vasp")[1] is None


def test_shared_sites_are_refused(tmp_path):
    mixed = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    mixed.to(tmp_path / "a.cif")
    write_density(Density(np.ones((2, 2, 2)), mixed), tmp_path / "a.zarr")
    refused(tmp_path / "a.zarr", "Fe0.5Ni0.5", "one element", read=read_structure)
    refused(tmp_path / "a.cif", "the site Fe0 has the occupancy 0.5", "one element", read=read_structure)


def test_structures_in_s3(s3, fe_o):
    write_text(f"{s3}/POSCAR", fe_o.to(fmt="poscar"))
    write_density(noise(np.random.default_rng(0)), f"{s3}/x.zarr")
    assert formula_of(read_structure(f"{s3}/POSCAR")[0]) == formula_of(fe_o)
    assert read_structure(f"{s3}/x.zarr")[1] == (4, 3, 5)
    refused(f"{s3}/a.cif", "no such file", read=read_structure)
    refused(f"{s3}/a.xyz", "no such file", read=read_structure)


@pytest.mark.parametrize("name, content, may", [
    ("custodian.json", '[{"job": {"data": {"poscar": 1}}}]', False), ("a.json", '{"data": {"poscar": {}, "data": {}}}', True),
    ("a.json", '{"poscar": {}, "data": {}}', True), ("a.json", '{"data": {"poscar": {}}}', False), ("a.json", "1", False),
    ("a.json", '{"task_id": "mp-1", "data": {"poscar": {"struc', True), ("a.json", '{"lattice": {}, "sites"', False),
    ("a.json", '{"x": "' + "y" * 70_000 + '"}', False), ("a.json", '{"poscar": {"x": "' + "y" * 70_000 + '"}, "data": {}}', True),
    ("a.vasp", SPIN_FILE, True), ("a.vasp", SPIN_FILE.split("\n\n")[0], False),
    ("CHGCAR.vasp", "no more", True), ("a.cube", "{}", True), ("a.json", "", False)])
def test_what_may_be_a_density_by_its_head(tmp_path, name, content, may):
    (tmp_path / name).write_text(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert [may_be_density(tmp_path / name), may_be_density(tmp_path / f"{name}.gz")] == [may, may]


def test_a_damaged_file_may_be_a_density(tmp_path):
    """Who reads it says what is wrong. Of a structure that is longer than the head nothing is known."""
    (tmp_path / "a.vasp").write_text(SPIN_FILE[:200] + "  0.0  0.0  0.0\n" * 10_000)
    assert may_be_density(tmp_path / "a.vasp")
    (tmp_path / "a.json.gz").write_bytes(b"\x1f\x8bnot packed")
    assert may_be_density(tmp_path / "a.json.gz") and may_be_density(tmp_path / "missing.json")


def test_a_disk_that_fails_under_a_cube_names_the_cube(tmp_path):
    """A file that may not grow past 20 kB, as after `ulimit -f`: the reason was lost on the way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    nacl = read_density(FILES / "CHGCAR.NaCl.gz")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for name in ("x.cube", "x.cube.gz"):
            sentence = rf"{name} cannot be written, choose another place or free some space: File too large\.$"
            with pytest.raises(TomatError, match=sentence):
                write_density(nacl, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_the_caller_may_name_the_material(tmp_path):
    (tmp_path / "CHGCAR.salt").write_text(SPIN_FILE)
    assert [read_density(tmp_path / "CHGCAR.salt", id=id).id for id in (None, "iron")] == ["salt", "iron"]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_group_replaces_a_group_and_nothing_else(tmp_path, three, request, where):
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3")
    target = f"{root}/grp.zarr"
    write_density(noise(np.random.default_rng(0), spin=("diff",), augmented=True, sad=True), target)
    write_density(three[0], target)
    assert list_folder(target) == ["charge_density_sad", "charge_density_total", "zarr.json"]
    write_text(f"{target}/other/notes.txt", "mine")
    with pytest.raises(TomatError, match=r"grp\.zarr is a folder that holds other files, such as other: .*\.$"):
        write_density(three[1], target)
    assert list_folder(f"{target}/other") == ["notes.txt"]
    assert_same(three[0], read_density(target))


def test_a_version_tag_covers_all_of_a_group(tmp_path, three):
    for name in ("a.zarr", "b.zarr"):
        write_density(three[0], tmp_path / name)
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    assert group_version_tag(a) != group_version_tag(b) and group_version_tag(a, content=True) == group_version_tag(b, content=True)
    for path in [p for p in sorted(a.rglob("*")) if p.is_file()]:
        before, content, details = (group_version_tag(a), group_version_tag(a, content=True)), path.read_bytes(), path.stat()
        path.write_bytes(content[::-1])
        os.utime(path, ns=(details.st_atime_ns, details.st_mtime_ns))
        assert group_version_tag(a, content=True) != before[1]
        path.write_bytes(content + b" ")
        assert group_version_tag(a) != before[0]
        path.unlink()
        assert group_version_tag(a) != before[0] and group_version_tag(a, content=True) != before[1]
        path.write_bytes(content)
    with pytest.raises(TomatError, match=r"c\.zarr does not exist"):
        group_version_tag(tmp_path / "c.zarr")


def test_a_version_tag_covers_all_of_a_group_in_a_bucket(s3, three):
    write_density(three[0], f"{s3}/a.zarr")
    before = group_version_tag(f"{s3}/a.zarr")
    assert group_version_tag(f"{s3}/a.zarr/") == before
    write_text(f"{s3}/a.zarr/charge_density_total/c/0/0/0", "other")
    assert group_version_tag(f"{s3}/a.zarr") != before
    with pytest.raises(TomatError, match=r"b\.zarr holds no files: check the name\.$"):
        group_version_tag(f"{s3}/b.zarr")


@pytest.mark.parametrize("name", ["p.cube", "p.json.gz", "CHGCAR", "p.zarr"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for read in (read_density, read_structure):
        with pytest.raises(TomatError, match=rf"{name} is a pipe or a device: give a file\.$"):
            read(tmp_path / name)
