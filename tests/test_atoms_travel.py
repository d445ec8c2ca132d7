"""Densities with other valence electrons than the packaged atoms go the whole way: their atoms are fitted, lie beside the rows
and in the checkpoint, and decide the electrons of predictions, evaluations and answers."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
from pymatgen.core import Lattice, Structure
from small_models import attentive_model

from tomat import cli
from tomat.atoms.choose import choose_atoms
from tomat.atoms.fit_atoms import COMPUTED_PRIOR, fit_atoms, solve, sums_of
from tomat.atoms.sad import FreeAtom, FreeAtoms, load_atoms, own_digest, packaged_atoms, sad_density, save_atoms, with_sad
from tomat.atoms.zval import check_zval, parse_zval, read_zval
from tomat.dataset.fresh import FreshPatches, PatchConfig
from tomat.dataset.held_out import train_and_val
from tomat.dataset.meta import data_atoms, read_meta, tokenizer_of
from tomat.dataset.parquet import TokenizeConfig
from tomat.dataset.shards import tokenize
from tomat.dataset.sync import sync
from tomat.dataset.verify import verify
from tomat.density.core import Density
from tomat.density.formats import read_density
from tomat.density.metrics import nmae
from tomat.density.source import InMemory
from tomat.density.store import write_store
from tomat.io.files import read_json
from tomat.io.remote import TomatError
from tomat.models.causal import load_checkpoint, with_atoms
from tomat.prediction.causal import CausalPredictor
from tomat.prediction.core import Prediction
from tomat.prediction.evaluate import evaluate
from tomat.prediction.predictors import load_predictor
from tomat.prediction.worker import Options, ServiceLimits, answer
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.tokens.tokenizer import Tokenizer

FILES = Path(__file__).parent / "files"
POTCAR = """  PAW_PBE {0} 01Jan2000
 {1}
   VRHFIN ={2}: made up
   TITEL  = PAW_PBE {0} 01Jan2000
   POMASS =   22.990; ZVAL   =   {1}    mass and valenz
 End of Dataset
"""

pytestmark = pytest.mark.usefixtures("one_thread")


def coarse(name, shape, id):
    "A density of VASP on a coarser grid, with the same number of electrons."
    density = read_density(FILES / name)
    values = density.values
    for axis, n in enumerate(shape):
        values = scipy.signal.resample(values, n, axis=axis)
    return Density(values.astype(np.float32), density.structure, id)


SALT, LITHIUM = coarse("CHGCAR.NaCl.gz", (14, 14, 14), "salt"), coarse("CHGCAR.Li.gz", (8, 8, 8), "lithium")
OTHER = replace(SALT.rolled((3, 0, 5)), id="other")
DIFFERENCE = Tokenizer("framed", PUBLISHED_DENSITY, patch_size=4, pad_to=None, target="difference")


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def tomat():
    "Run the command line in this process."
    import io
    from contextlib import redirect_stderr, redirect_stdout
    def run(*args):
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["tomat", *map(str, args)])
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
        return Done(code, out.getvalue(), err.getvalue())
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory, tomat):
    "A store of VASP's densities, rows of differences and a trained language model, by the command line alone."
    folder = tmp_path_factory.mktemp("vasp")
    write_store([SALT, LITHIUM, OTHER], {"train": ["salt", "lithium"], "validation": ["other"]}, folder / "store")
    SALT.structure.to(str(folder / "POSCAR"), fmt="poscar")
    done = tomat("tokenize", folder / "store", "--out", folder / "rows", "--target", "difference", "--patch-size", 4,
                 "--patches-per-material", 8, "--pad-to", 0, "--workers", 1)
    assert done.code == 0, done.err
    (folder / "said").write_text(done.err)
    done = tomat("train", folder / "rows", "--out", folder / "run", "--steps", 2, "--batch-size", 2)
    assert done.code == 0, done.err
    return folder


def valence(atoms):
    return {symbol: atom.n_valence for symbol, atom in atoms.atoms.items()}


# Rows


def test_rows_carry_fitted_atoms(made):
    meta, atoms = read_meta(made / "rows"), load_atoms(made / "rows/atoms.json")
    assert "do not fit, since salt holds 8.00 electrons and they 14.00" in (made / "said").read_text()
    assert valence(atoms) == {"Cl": 7, "Li": 1, "Na": 1} and meta["atoms"] == atoms.digest and not meta["skipped"]
    assert data_atoms(made / "rows", meta).digest == atoms.digest and verify(made / "rows") == []


def test_a_second_call_goes_on_with_the_same_atoms(made, tomat, tmp_path):
    before = (made / "rows/meta.json").stat().st_mtime_ns, (made / "rows/rows-00000.parquet").stat().st_mtime_ns
    options = ["--target", "difference", "--patch-size", 4, "--patches-per-material", 8, "--pad-to", 0, "--workers", 1]
    done = tomat("tokenize", made / "store", "--out", made / "rows", *options)
    assert done.code == 0 and done.err == "" and (made / "rows/rows-00000.parquet").stat().st_mtime_ns == before[1]
    done = tomat("tokenize", made / "store", "--out", made / "rows", "--atoms", "packaged", *options)
    assert done.code == 2 and "other materials or settings" in done.err
    done = tomat("tokenize", made / "store", "--out", tmp_path / "rows", "--atoms", made / "rows/atoms.json", *options)
    assert done.code == 0 and read_meta(tmp_path / "rows") == read_meta(made / "rows")


def test_atoms_are_copied_with_the_rows_and_missed_without(made, tmp_path):
    sync(made / "rows", tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
    (tmp_path / "copy/atoms.json").unlink()
    assert len(faults := verify(tmp_path / "copy")) == 1 and "atoms.json is missing" in faults[0]
    save_atoms(packaged_atoms(), tmp_path / "copy/atoms.json")
    with pytest.raises(TomatError, match="holds other atoms"):
        data_atoms(tmp_path / "copy", read_meta(tmp_path / "copy"))


def test_parts_share_one_file(made, tomat, tmp_path):
    options = ["--target", "difference", "--patch-size", 4, "--patches-per-material", 8, "--pad-to", 0, "--workers", 1]
    for choice in ([], ["--atoms", "fit"]):
        done = tomat("tokenize", made / "store", "--out", tmp_path / "parts", "--worker", "0/2", *choice, *options)
        assert done.code == 2 and "tomat fit-atoms" in done.err and "--atoms" in done.err
    for part in ("0/2", "1/2"):
        done = tomat("tokenize", made / "store", "--out", tmp_path / "parts", "--worker", part, "--atoms", made / "rows/atoms.json",
                     *options)
        assert done.code == 0, done.err
    meta = read_meta(tmp_path / "parts")
    assert data_atoms(tmp_path / "parts", meta).digest == meta["atoms"] and verify(tmp_path / "parts") == []
    (tmp_path / "parts/worker-00/atoms.json").unlink()
    assert any("worker-00/atoms.json is missing" in fault for fault in verify(tmp_path / "parts"))


def test_rows_of_whole_densities_carry_atoms_too(made, tomat, tmp_path):
    "The density is written as it is, and the electrons of predictions are those of its atoms."
    options = ["--patch-size", 4, "--patches-per-material", 4, "--pad-to", 0]
    done = tomat("tokenize", made / "store", "--out", tmp_path / "rows", *options)
    assert done.code == 0 and "8.00 electrons" in done.err, done.err
    meta = read_meta(tmp_path / "rows")
    assert valence(data_atoms(tmp_path / "rows", meta))["Na"] == 1 and verify(tmp_path / "rows") == []
    tokenizer = tokenizer_of(tmp_path / "rows", meta)  # the rows are those of before, whatever the atoms
    assert tokenize(InMemory([LITHIUM, SALT]), tokenizer, tmp_path / "rows", TokenizeConfig(4), ["salt", "lithium"]) | {
        "atoms": meta["atoms"]} == meta
    done = tomat("tokenize", made / "store", "--out", tmp_path / "parts", "--worker", "0/1", *options)
    assert done.code == 0 and "will have other electrons" in done.err and "atoms" not in read_meta(tmp_path / "parts")


def test_packaged_atoms_are_not_named(tmp_path):
    free = Density(sad_density(SALT.structure, (6, 6, 6)), SALT.structure, "free")
    config = TokenizeConfig(2, atoms=load_packaged(tmp_path))
    assert config.recipe(DIFFERENCE) == TokenizeConfig(2).recipe(DIFFERENCE)
    tokenize([free], DIFFERENCE, tmp_path / "rows", replace(config, prepare=with_sad))
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["meta.json", "rows-00000.parquet"]
    assert own_digest(data_atoms(tmp_path / "rows", read_meta(tmp_path / "rows"))) is None


def load_packaged(folder):
    save_atoms(packaged_atoms(), folder / "packaged.json")
    return load_atoms(folder / "packaged.json")


def test_validation_rows_need_the_same_atoms(made, tmp_path):
    atoms = load_atoms(made / "rows/atoms.json")
    chlorine = FreeAtom.of("Cl", 7, 0.05, atoms["Cl"].density_r(np.arange(121) * 0.05) * 1.001)
    other = replace(atoms, atoms=atoms.atoms | {"Cl": chlorine})
    for name, chosen in (("same", atoms), ("other", other)):
        tokenizer = replace(DIFFERENCE, density_codec=DIFFERENCE.density_codec)
        tokenize([OTHER], tokenizer, tmp_path / name, TokenizeConfig(4, prepare=with_sad, atoms=chosen))
    train_and_val(made / "rows", 1, 64, 0, tmp_path / "same")
    with pytest.raises(TomatError, match="made with other atoms"):
        train_and_val(made / "rows", 1, 64, 0, tmp_path / "other")


def test_fresh_patches_are_those_of_the_same_atoms(made):
    atoms, source = load_atoms(made / "rows/atoms.json"), InMemory([SALT, LITHIUM])
    stream = FreshPatches(source, source.ids, DIFFERENCE, PatchConfig(3, prepare=with_sad, atoms=atoms), epochs=1)
    plain = FreshPatches(source, source.ids, DIFFERENCE, PatchConfig(3, prepare=with_sad), epochs=1)
    named = FreshPatches(source, source.ids, DIFFERENCE, PatchConfig(3, prepare=with_sad, atoms=packaged_atoms()), epochs=1)
    assert stream.fingerprint != plain.fingerprint == named.fingerprint
    rows = stream.rows(0, 0, np.arange(3))
    expected = DIFFERENCE.encode(replace(SALT, sad=sad_density(SALT.structure, SALT.shape, atoms)), rows.offsets_Nx3)[0]
    np.testing.assert_array_equal(rows.ids_NxL, expected)
    with pytest.raises(TomatError, match="43 % fewer"):
        plain.rows(0, 0, np.arange(3))


# Checkpoints


def test_the_checkpoint_predicts_eight_electrons(made, tomat, tmp_path):
    model, _ = load_checkpoint(made / "run/model")
    assert model.atoms.digest == load_atoms(made / "rows/atoms.json").digest
    assert model.atoms.name == f"the atoms of {made}/run/model"
    done = tomat("predict", made / "POSCAR", "--checkpoint", made / "run/model", "--out", made / "NaCl.CHGCAR", "--grid", 8, 8, 8)
    assert done.code == 0, done.err
    assert read_density(made / "NaCl.CHGCAR").n_electrons == pytest.approx(8 * len(SALT.structure) / 2, rel=1e-4)
    (tmp_path / "request").mkdir()
    (tmp_path / "request/POSCAR").write_bytes((made / "POSCAR").read_bytes())
    about = answer(load_predictor(made / "run/model"), tmp_path, Options("POSCAR", (8, 8, 8), "x.cube"), ServiceLimits())
    assert about["electrons"] == pytest.approx(8 * len(SALT.structure) / 2, rel=1e-4)


def test_the_checkpoint_is_scored_against_the_sum_of_its_atoms(made, tomat):
    line = ["evaluate", made / "store", "--checkpoint", made / "run/model", "--out", made / "scores", "--pictures", 0]
    done = tomat(*line, "--json")
    assert done.code == 0, done.err
    atoms = load_atoms(made / "rows/atoms.json")
    expected = nmae(sad_density(OTHER.structure, OTHER.shape, atoms), OTHER.total)
    found = json.loads(done.out)
    assert found["SAD"]["nmae"]["mean"] == pytest.approx(expected, rel=1e-3) and expected < 0.2
    assert {name for name, entry in found.items() if entry["reads"] == "structure"} == {"SAD", "causal, free-running"}
    setup = json.loads((made / "scores/scores.json").read_text())["setup"]
    assert setup["predictors"]["causal"]["atoms"] == atoms.digest


def test_a_density_of_another_code_is_refused_with_advice(made, tomat, tmp_path):
    free = Density(sad_density(SALT.structure, (6, 6, 6)), SALT.structure, "free")
    write_store([free], {"validation": ["free"]}, tmp_path / "store")
    done = tomat("evaluate", tmp_path / "store", "--checkpoint", made / "run/model", "--out", tmp_path / "scores")
    assert done.code == 2 and done.err.count("\n") == 1
    assert all(word in done.err for word in ("14.00 electrons", "8.00", "75 % more", "tomat fit-atoms", "train")), done.err


def test_old_checkpoints_have_the_packaged_atoms(made, tmp_path):
    import shutil
    shutil.copytree(made / "run/model", tmp_path / "model")
    (tmp_path / "model/atoms.json").unlink()
    with pytest.raises(TomatError, match=r"atoms\.json is not the file"):  # a new checkpoint without its atoms is damaged
        load_checkpoint(tmp_path / "model")
    metadata = read_json(tmp_path / "model/tomat.json")
    del metadata["md5"]["atoms.json"]
    (tmp_path / "model/tomat.json").write_text(json.dumps(metadata))
    assert own_digest(load_checkpoint(tmp_path / "model")[0].atoms) is None


class Scaled:
    "A predictor that returns the sum of its atoms."

    def __init__(self, atoms):
        self.atoms = atoms

    def predict(self, structure, shape, show=False):
        total = sad_density(structure, shape, self.atoms)
        return Prediction(Density(total.astype(np.float32), structure), None, float(total.mean()))

    def identity(self):
        return {"atoms": own_digest(self.atoms)}


def test_each_set_of_atoms_is_an_entry(tmp_path):
    "Lithium has one electron in both sets; the references of the second set read its sum."
    fitted, _ = fit_atoms([0], lambda _: LITHIUM, COMPUTED_PRIOR)
    rows = {"a": Scaled(packaged_atoms()), "b": Scaled(fitted), "c": Scaled(fitted)}
    scores = {s.entry: s for s in evaluate(InMemory([LITHIUM]), ["lithium"], rows, tmp_path / "scores").scores}
    assert list(scores) == ["SAD", "SAD of b", "a", "b", "c", "copy the previous true voxel"]
    for name, atoms in (("SAD", packaged_atoms()), ("a", packaged_atoms()), ("SAD of b", fitted), ("b", fitted), ("c", fitted)):
        expected = nmae(sad_density(LITHIUM.structure, LITHIUM.shape, atoms), LITHIUM.total)
        assert scores[name].nmae == pytest.approx(expected, rel=1e-4), name
    assert scores["SAD of b"].nmae < 0.5 * scores["SAD"].nmae


def test_references_read_the_sum_of_their_own_atoms(tmp_path):
    fitted, _ = fit_atoms([0], lambda _: LITHIUM, COMPUTED_PRIOR)
    causal = CausalPredictor(with_atoms(attentive_model(DIFFERENCE), fitted), DIFFERENCE, rescale=False)
    alone, mixed = (evaluate(InMemory([LITHIUM]), ["lithium"], predictors, tmp_path / name).scores for name, predictors in {
        "alone": {"b": causal}, "mixed": {"a": Scaled(packaged_atoms()), "b": causal}}.items())
    found = {s.entry: s.nmae for s in mixed}
    for line in alone:
        name = "SAD of b" if line.entry == "SAD" else line.entry
        assert name.startswith("copy") or found[name] == pytest.approx(line.nmae, rel=1e-5), name


def test_the_difference_is_added_to_the_sum_of_its_atoms():
    "The same tokens, read as a density and as a difference."
    fitted, _ = fit_atoms([0], lambda _: LITHIUM, COMPUTED_PRIOR)
    model = with_atoms(attentive_model(DIFFERENCE), fitted)
    difference, total = (CausalPredictor(model, replace(DIFFERENCE, target=target), rescale=False).predict(
        LITHIUM.structure, (4, 4, 4)).density.total for target in ("difference", "total"))
    sad_xyz = sad_density(LITHIUM.structure, (4, 4, 4), fitted)
    np.testing.assert_allclose(difference - total, sad_xyz, atol=0.02)  # float32 values of up to 3e4
    assert np.abs(sad_density(LITHIUM.structure, (4, 4, 4)) - sad_xyz).max() > 0.1


# The probe network


def test_the_probe_network_carries_them_too(made, tomat, tmp_path):
    done = tomat("train", made / "store", "--out", tmp_path / "run", "--decoder", "probe", "--steps", 2, "--materials", 2,
                 "--voxels", 20, "--levels", 16)
    assert done.code == 0 and "8.00 electrons" in done.err, done.err
    predictor = load_predictor(tmp_path / "run/model")
    assert valence(predictor.atoms) == {"Cl": 7, "Li": 1, "Na": 1}
    assert predictor.predict(SALT.structure, (8, 8, 8)).electrons_before == pytest.approx(8, abs=2)  # of an untrained network
    line = ["predict", made / "POSCAR", "--checkpoint", tmp_path / "run/model", "--out", tmp_path / "CHGCAR"]
    done = tomat(*line, "--grid", 8, 8, 8)
    assert done.code == 0, done.err
    assert read_density(tmp_path / "CHGCAR").n_electrons == pytest.approx(8 * len(SALT.structure) / 2, rel=1e-4)
    done = tomat("evaluate", made / "store", "--checkpoint", tmp_path / "run/model", "--out", tmp_path / "scores", "--json")
    assert done.code == 0 and json.loads(done.out)["SAD"]["nmae"]["mean"] < 0.2, done.err


# Potentials


@pytest.mark.parametrize("title, number, symbol, refused", [("Na", 1.0, "Na", False), ("Na_pv", 7.0, "Na", True),
                                                            ("K_sv", 9.0, "K", False)])
def test_a_potcar_beside_the_structure_is_compared(made, tomat, tmp_path, title, number, symbol, refused):
    (tmp_path / "POSCAR").write_bytes((made / "POSCAR").read_bytes())
    (tmp_path / "POTCAR").write_text(POTCAR.format(title, number, symbol) + POTCAR.format("Cl", 7.0, "Cl"))
    assert read_zval(tmp_path / "POTCAR") == [(symbol, number), ("Cl", 7.0)]
    line = ["predict", tmp_path / "POSCAR", "--checkpoint", made / "run/model", "--out", tmp_path / "CHGCAR"]
    done = tomat(*line, "--grid", 8, 8, 8)
    assert (done.code, (tmp_path / "CHGCAR").exists()) == ((2, False) if refused else (0, True)), done.err
    if refused:
        assert all(word in done.err for word in ("POTCAR gives Na 7", "predicts 1", "tomat train")) and done.err.count("\n") == 1


def test_zval_is_compared_before_anything_is_written(made, tomat, tmp_path):
    line = ["predict", made / "POSCAR", "--checkpoint", made / "run/model", "--out", tmp_path / "deep/CHGCAR", "--grid", 8, 8, 8]
    done = tomat(*line, "--zval", "Na=7,Cl=7")
    assert done.code == 2 and "--zval gives Na 7 valence electrons, and this checkpoint predicts 1" in done.err
    assert list(tmp_path.iterdir()) == []
    assert tomat(*line, "--zval", "Na=1,Cl=7").code == 0
    for wrong in ("Na", "Na=x", "Zz=1", "Na=0"):
        with pytest.raises(TomatError, match="such as Na=1,Cl=7"):
            parse_zval(wrong)


def test_undetermined_electrons_are_compared_by_their_sum():
    odd = replace(SALT, values=SALT.values * (11 / 8))
    atoms = solve(sums_of(odd, 500), COMPUTED_PRIOR)
    assert atoms.metadata["electrons_known"] == []
    check_zval(odd.structure, [("Na", 4.0), ("Cl", 7.0)], atoms, "POTCAR")
    with pytest.raises(TomatError, match="Na 1 valence"):
        check_zval(odd.structure, [("Na", 1.0), ("Cl", 7.0)], atoms, "POTCAR")


# The choice


def test_materials_without_a_sum_take_no_part():
    shared = Density(np.ones((4, 4, 4)), Structure(Lattice.cubic(4), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]]), "shared")
    atoms, sentence = choose_atoms(InMemory([shared, SALT]), ["shared", "salt"])
    assert valence(atoms) == {"Cl": 7, "Na": 1} and "fitted to 1 material" in sentence


def test_the_choice_stops_at_the_first_mismatch():
    read = []
    class Counting(InMemory):
        def read(self, id):
            read.append(id)
            return super().read(id)
    source = Counting([SALT, LITHIUM, OTHER])
    choose_atoms(source, ["salt", "lithium", "other"])
    assert read == ["salt", "salt", "lithium", "other"]


def test_an_element_that_is_missing_is_fitted_beside_the_free_atoms():
    "Technetium has no free atom; oxygen keeps its own as a prior, because the electrons are those of the packaged set."
    bell = FreeAtom.of("Tc", 7, 0.05, 7 * np.exp(-(np.arange(121) * 0.05)**2 / 0.5) / (0.5 * np.pi)**1.5)
    atoms = FreeAtoms(packaged_atoms().atoms | {"Tc": bell}, "with technetium")
    cell = Structure(Lattice.cubic(4), ["Tc", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    oxide = Density(sad_density(cell, (12, 12, 12), atoms), cell, "oxide")
    chosen, sentence = choose_atoms(InMemory([oxide]), ["oxide"])
    assert valence(chosen) == {"O": 6, "Tc": 7} and "oxide holds Tc, for which there is none" in sentence
    assert chosen.metadata["pulled_to"] == packaged_atoms().name


def test_mixed_potentials_are_named():
    twice = replace(SALT, values=SALT.values * (14 / 8), id="twice")
    _, sentence = choose_atoms(InMemory([SALT, twice]), ["salt", "twice"])
    assert "several kinds of potentials" in sentence


def test_negative_valence_is_refused():
    cells = [Structure(Lattice.cubic(4), ["Na"] * n, np.random.default_rng(0).random((n, 3))) for n in (1, 2)]
    mixed = Structure(Lattice.cubic(4), ["Na", "Na", "Cl"], np.random.default_rng(1).random((3, 3)))
    more = Density(np.full((6, 6, 6), 1.0), mixed, "more")
    few = [Density(np.full((6, 6, 6), float(n)), cell, f"few-{n}") for n, cell in enumerate(cells, 1)]
    with pytest.raises(TomatError, match=r"Cl comes out with -1\.00 valence electrons"):
        choose_atoms(InMemory([*few, more]), ["few-1", "few-2", "more"], fit=True)
