"""The probe network: symmetries of a crystal leave its density alone, and a training repeats, resumes and learns."""

import csv
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from safetensors.torch import load_file

import tomat
from tomat.tokens.levels import fit_levels
from tomat.io.files import read_json
from tomat.io.remote import TomatError
from tomat.train.config import RunConfig
from tomat.train.probe import ProbeTask, ProbeTrainConfig, train_probe
from tomat.models.geometry import N_GAUSSIANS, N_HARMONICS, STEP, harmonics, radial_basis
from tomat.atoms.neighbours import Neighbours, find_neighbours, periodic_images
from tomat.density.metrics import nmae
from tomat.models.messages import ProbeConfig
from tomat.models.probe import (AtomGraph, ProbeNet, atom_graph, level_probabilities, load_probe, predict_field, save_probe)
from tomat.prediction.core import shift_to_mean
from tomat.prediction.predictors import ProbePredictor, load_predictor
from tomat.atoms.sad import free_atom, packaged_atoms, sad_density, valence_electrons
from tomat.train.log import read_log
from tomat.density.store import sample_store

TINY = ProbeConfig(width=8, n_layers=1, atom_channels=(4, 2, 2), voxel_channels=(4, 2, 2), readout_width=16, readout_blocks=1)
FIT = ProbeTrainConfig(TINY, steps=6, materials=3, voxels=20, kept=300, warmup=2, average=0.5, levels=16)
SHAPE = (12, 12, 12)


@pytest.fixture(scope="module")
def model() -> ProbeNet:
    "With last layers that are not zero, so that there is something to compare."
    torch.manual_seed(0)
    made = ProbeNet().eval()
    for layer in (made.head, made.sphere, made.bond):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture(scope="module")
def crystal() -> Structure:
    cell = Lattice.from_parameters(3.9, 4.4, 5.2, 75, 98, 112)
    return Structure(cell, ["Ba", "Ti", "O"], [[0.11, 0.02, 0.95], [0.52, 0.47, 0.55], [0.07, 0.41, 0.38]])


def sad_prediction(structure: Structure, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return sad_density(structure, shape) / structure.volume


def field(model: ProbeNet, structure: Structure, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    "Difference and expected error, one after the other."
    return np.stack(predict_field(model, structure, shape, sad_prediction(structure, shape)))


edges, angles = st.floats(2.5, 9), st.floats(60, 115)
cells = st.builds(Lattice.from_parameters, edges, edges, edges, angles, angles, angles).filter(lambda cell: cell.volume > 12)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(cells, st.integers(0, 2**16), st.floats(2.0, 6.0))
def test_a_point_has_every_atom_within_the_cutoff_once(cell, seed, cutoff):
    rng = np.random.default_rng(seed)
    structure = Structure(cell, ["Na", "Cl"], rng.uniform(-1, 2, (2, 3)))
    points = rng.random((3, 3)) @ cell.matrix
    near = find_neighbours(points, periodic_images(structure, cutoff))
    for point, found in zip(points, np.split(near.vector_3xP.numpy(), near.count_N.cumsum(0)[:-1], 1), strict=True):
        sites = structure.get_sites_in_sphere(point, cutoff)
        if any(abs(site.nn_distance - cutoff) < 1e-4 for site in sites):
            continue
        assert np.allclose(np.sort(np.linalg.norm(found, axis=0)), np.sort([site.nn_distance for site in sites]), atol=1e-4)


def test_an_atom_is_not_its_own_neighbour_but_its_images_are():
    alone = Structure(Lattice.cubic(3.0), ["Na"], [[0.2, 0.9, 1.7]])
    near = find_neighbours(alone.frac_coords % 1 @ alone.lattice.matrix, periodic_images(alone, 3.5), skip_self=True)
    assert near.count_N.tolist() == [6]
    assert np.allclose(np.linalg.norm(near.vector_3xP, axis=0), 3.0)


def test_radial_functions_have_no_step_anywhere():
    for cutoff in (4.0, 6.0, 4.013):
        basis = radial_basis(free_atom("Fe"), cutoff)
        assert len(basis) * STEP > cutoff + STEP / 2 and not basis[-1].any()
        assert basis.diff(dim=0)[:, :N_GAUSSIANS].abs().max() < 0.25
        assert torch.isfinite(basis).all()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 2**16))
def test_squares_of_harmonics_do_not_depend_on_rotations(seed):
    vectors = torch.tensor(np.random.default_rng(seed).normal(size=(10, 3))).float()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]
    pairs = (harmonics(x.T).split(N_HARMONICS) for x in (vectors, vectors @ rotation))
    for here, there in zip(*pairs, strict=True):
        assert torch.allclose((here**2).sum(0), (there**2).sum(0), atol=1e-5)


@pytest.mark.parametrize("steps", [(1, 0, 0), (5, 3, 11)])
def test_another_origin(model, crystal, steps):
    moved = crystal.copy()
    moved.translate_sites(range(3), np.divide(steps, SHAPE))
    here = field(model, crystal)
    assert np.abs(field(model, moved) - np.roll(here, steps, (1, 2, 3))).max() < 1e-4 * np.abs(here).max()


def with_trust(model: ProbeNet, learned: list[Structure]) -> ProbeNet:
    "The same network, which remembers the atoms of some crystals."
    made = ProbeNet(model.config)
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        states = [made.eval().states(atom_graph(structure, 6.0)) for structure in learned]
    made.remember(torch.cat(states), {site.specie.symbol for structure in learned for site in structure})
    return made


def test_atoms_of_the_training_data_have_no_distance_and_others_have(model, crystal):
    trusting = with_trust(model, [crystal])
    moved = crystal.copy()
    moved.translate_sites(range(3), [0.3, 0.4, 0.7])
    stretched = crystal.copy()
    stretched.apply_strain(0.1)
    assert max(trusting.distance(same) for same in (crystal, moved, crystal * (2, 1, 1))) < 0.05
    assert trusting.distance(stretched) > 0.3 and model.distance(crystal) is None


def test_a_distant_crystal_has_the_same_prediction_and_a_larger_expected_error(model, crystal):
    stretched = crystal.copy()
    stretched.apply_strain(0.1)
    trusting = with_trust(model, [crystal])
    (plain, width), (trusted, wider) = field(model, stretched), field(trusting, stretched)
    np.testing.assert_allclose(trusted, plain, rtol=1e-4, atol=1e-5)
    assert (wider > 1.5 * width).all() and (field(trusting, crystal)[1] < field(model, crystal)[1]).all()


@pytest.mark.parametrize("learned, kept", [("Kr", 1.0), ("Ar", 0.5), ("Fe", 0.0)])
def test_an_unknown_element_keeps_half_of_the_difference_or_none(model, learned, kept):
    alone, other = (Structure(Lattice.cubic(4.0), [symbol], [[0, 0, 0]]) for symbol in ("Kr", learned))
    plain, trusted = field(model, alone), field(with_trust(model, [other]), alone)
    np.testing.assert_allclose(trusted[0], kept * plain[0], atol=4e-3 * np.abs(plain[0]).max())
    assert (trusted[1] >= (1 - kept) * np.abs(plain[0])).all() and np.abs(plain[0]).max() > 0.01


def test_trust_is_saved_with_the_network(model, crystal, tmp_path):
    trusting = with_trust(model, [crystal])
    save_probe(trusting, tmp_path / "model", {"elements": ["Ba", "O", "Ti"]})
    again, other = load_probe(tmp_path / "model"), crystal * (1, 1, 2)
    assert (field(again, other) == field(trusting, other)).all() and again.distance(other) == trusting.distance(other)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_supercell(model, crystal, axis):
    scale, here = np.where(np.arange(3) == axis, 2, 1), field(model, crystal)
    there = field(model, crystal * tuple(scale), tuple(np.multiply(SHAPE, scale)))
    assert np.abs(there - np.concatenate([here, here], axis + 1)).max() < 1e-4 * np.abs(here).max()


@pytest.mark.parametrize("basis", [
    [[1, 0, 0], [1, 1, 0], [0, -1, 1]], [[0, 1, 0], [0, 0, 1], [1, 0, 0]], [[-1, 0, 0], [0, 1, 2], [0, 0, 1]]])
def test_other_lattice_vectors(model, crystal, basis):
    basis = np.array(basis)
    other = Structure(Lattice(basis @ crystal.lattice.matrix), crystal.species, crystal.frac_coords @ np.linalg.inv(basis))
    i, j, k = np.moveaxis(np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) @ basis % SHAPE[0], -1, 0)
    here = field(model, crystal)
    assert np.abs(field(model, other) - here[:, i, j, k]).max() < 1e-4 * np.abs(here).max()


def test_rotations_and_mirrors(model, crystal):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    here = field(model, crystal)
    for operation in (rotation, -rotation):
        rotated = Structure(Lattice(crystal.lattice.matrix @ operation), crystal.species, crystal.frac_coords)
        assert np.abs(field(model, rotated) - here).max() < 1e-4 * np.abs(here).max()


def test_the_order_of_the_atoms(model, crystal):
    here = field(model, crystal)
    assert np.abs(field(model, Structure.from_sites(crystal[::-1])) - here).max() < 1e-4 * np.abs(here).max()


def test_equal_atoms_get_equal_densities(model):
    rock = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    here = field(model, rock)
    assert np.abs(here - np.roll(here, (6, 6), (1, 2))).max() < 1e-4 * np.abs(here).max()


def test_a_block_at_the_edge_is_like_any_other(model, crystal):
    "20 = 16 + 4: voxels of the last blocks come out as those of a grid that is one block."
    free = sad_prediction(crystal, (20, 20, 20))
    fine, coarse = (np.stack(predict_field(model, crystal, x.shape, x)) for x in (free, free[::2, ::2, ::2]))
    assert np.abs(fine[:, ::2, ::2, ::2] - coarse).max() < 1e-4 * np.abs(coarse).max()


def test_any_number_of_threads_gives_the_same_bits(model, crystal):
    shape, before, fields = (20, 17, 9), torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            fields.append(field(model, crystal, shape))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)
    assert (fields[0] == fields[1]).all()


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(0, 2**16), st.floats(0.01, 3))
def test_electrons_are_made_exact_and_none_is_borrowed(seed, mean):
    total = np.random.default_rng(seed).normal(1, 1, (4, 5, 6))
    made = shift_to_mean(total, mean)
    assert made.mean() == pytest.approx(mean, rel=1e-9)
    assert (made >= np.minimum(total, 0) - 1e-12).all()
    order = np.argsort(total, axis=None)
    assert (np.diff(made.ravel()[order]) >= -1e-12).all()


def test_before_training_it_is_the_sum_of_atomic_densities(crystal):
    assert not predict_field(ProbeNet(TINY), crystal, SHAPE, sad_prediction(crystal))[0].any()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(-2, 2), st.floats(1e-6, 10))
def test_levels_share_out_all_probability(centre, width):
    codec = fit_levels(np.random.default_rng(0).laplace(0, 0.1, 3000), 64)
    p = level_probabilities(np.full((2, 3), centre), np.full((2, 3), width), codec)
    assert p.shape == (2, 3, 64) and (p >= 0).all() and np.allclose(p.sum(-1), 1)
    below, cell = p[0, 0].cumsum(), codec.encode(np.array([centre]))[0][0, 0]
    assert below[cell] >= 0.5 - 1e-12 and (cell == 0 or below[cell - 1] <= 0.5 + 1e-12)  # the median is in the centre's cell


def test_an_element_without_free_atom_gets_one_sentence(model):
    uranium = Structure(Lattice.cubic(3.5), ["U"], [[0, 0, 0]])
    with pytest.raises(TomatError, match="no free atom for U"):
        predict_field(model, uranium, SHAPE, np.ones(SHAPE))


def test_every_element_with_a_free_atom_gives_numbers(model):
    for symbol in packaged_atoms().atoms:
        alone = Structure(Lattice.cubic(4.0), [symbol], [[0, 0, 0]])
        assert np.isfinite(predict_field(model, alone, (4, 4, 4), sad_prediction(alone, (4, 4, 4)))).all(), symbol


def test_nothing_is_left_on_another_device(model, crystal):
    """Every tensor of a step lies on the device of the network: PyTorch's device without memory refuses a tensor of another one."""
    meta, learner = torch.device("meta"), ProbeNet(TINY).to("meta").train()
    near, atoms = (Neighbours(x.atom_P.to(meta), x.vector_3xP.to(meta), x.count_N.to(meta)) for x in (
        find_neighbours(np.random.default_rng(0).random((9, 3)) @ crystal.lattice.matrix, periodic_images(crystal, TINY.cutoff)),
        atom_graph(crystal, TINY.atom_cutoff).near))
    centre_N, width_N = learner(learner.tables(AtomGraph(["Ba", "Ti", "O"], atoms)), near, torch.zeros(9, device=meta))
    (centre_N.sum() + width_N.sum()).backward()
    assert centre_N.device == learner.sphere.weight.grad.device == meta


def test_a_checkpoint_comes_back(model, crystal, tmp_path):
    model.codec = fit_levels(np.linspace(-1, 1, 50), 8)
    save_probe(model, tmp_path / "c", {"elements": ["O"]})
    again = load_probe(tmp_path / "c")
    assert (field(again, crystal) == field(model, crystal)).all()
    assert again.codec == model.codec and again.config == model.config and again.training_metadata == {"elements": ["O"]}


def test_damaged_checkpoints_get_one_sentence(model, tmp_path):
    save_probe(model, tmp_path / "c", {"elements": []})
    changed = "is not the file that was written"
    for name, text in (("model.safetensors", changed), ("config.json", changed), ("tomat.json", "has no tomat.json")):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "c", copy)
        (copy / name).unlink()
        with pytest.raises(TomatError, match=text):
            load_probe(copy)
    metadata = read_json(tmp_path / "c" / "tomat.json")
    (tmp_path / "c" / "tomat.json").write_text(json.dumps(metadata | {"decoder": "causal"}))
    with pytest.raises(TomatError, match="names the decoder 'causal'"):
        load_probe(tmp_path / "c")


def test_a_checkpoint_of_another_network_gets_one_sentence(model, tmp_path):
    save_probe(model, tmp_path / "c", {"elements": []})
    metadata = read_json(tmp_path / "c" / "tomat.json")
    (tmp_path / "c" / "tomat.json").write_text(json.dumps(metadata | {"md5": {}}))
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    for change in ({"width": 16}, {"depth": 3}):
        (tmp_path / "c" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(TomatError, match="cannot be read with this version"):
            load_probe(tmp_path / "c")


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in load_file(checkpoint / "model.safetensors").items()}


def same(a: Path, b: Path) -> bool:
    return all((weights(a)[name] == x).all() for name, x in weights(b).items())


def trained(out: Path, config: ProbeTrainConfig = FIT) -> Path:
    ids = sample_store().split("train")
    return train_probe(sample_store(), ids[:4], out, config, ids[4:6], RunConfig(save_every=2))


def test_a_training_repeats_and_a_seed_matters(tmp_path):
    first = trained(tmp_path / "a")
    assert same(first, trained(tmp_path / "b"))
    assert not same(first, trained(tmp_path / "c", replace(FIT, seed=1)))
    assert [line["step"] for line in read_log(tmp_path / "a")] == list(range(1, 7))


def test_a_training_that_was_stopped_resumes(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")
    gradient = ProbeTask.gradient

    def stopping(task, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradient(task, step)
    with monkeypatch.context() as patch:
        patch.setattr(ProbeTask, "gradient", stopping)
        with pytest.raises(SystemExit) as stopped:
            trained(tmp_path / "parts")
    assert stopped.value.code == 128 + signal.SIGTERM and len(read_log(tmp_path / "parts")) == 3
    assert same(whole, trained(tmp_path / "parts"))


def test_a_checkpoint_holds_the_metadata_of_its_training(tmp_path):
    made = load_probe(trained(tmp_path / "run"))
    store = sample_store()
    elements = {site.specie.symbol for id in store.split("train")[:4] for site in store.read(id).structure}
    assert set(made.training_metadata["elements"]) == elements
    assert made.codec is not None and len(made.codec.recon_points) <= 16
    assert made.training_metadata["calibration_scale"] == made.training_metadata["held_out"]["calibration_scale"] > 0
    empty = [z for z in range(119) if not made.element.weight[z].any()]
    assert len(empty) == 119 - len(elements)  # the others have nothing but their descriptor


def test_a_given_calibration_scale_multiplies_expected_errors_where_nothing_is_held_out(tmp_path):
    ids, store = sample_store().split("train")[:3], sample_store()
    crystal = store.read(ids[0]).structure
    errors = []
    for scale in (1.0, 3.0):
        made = load_probe(train_probe(store, ids, tmp_path / str(scale), replace(FIT, calibration_scale=scale)))
        errors.append(predict_field(made, crystal, SHAPE, sad_prediction(crystal)))
    assert (errors[0][0] == errors[1][0]).all()
    assert np.allclose(3 * errors[0][1], errors[1][1], rtol=1e-4)


def test_impossible_trainings_are_refused(tmp_path):
    store = sample_store()
    for ids, held_out in ((["a"], ["a"]), ([], []), (["a", "a"], [])):
        with pytest.raises(TomatError, match="must name each material once"):
            train_probe(store, ids, tmp_path / "run", FIT, held_out)
    with pytest.raises(TomatError, match="steps"):
        ProbeTrainConfig(steps=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(TomatError, match="such as notes"):
        trained(tmp_path / "other")


# The packaged checkpoint

PACKAGED = Path(tomat.__file__).parent / "data" / "probe"
RESULTS = Path(__file__).parents[1] / "results" / "probe"


@pytest.fixture(scope="module")
def packaged() -> ProbePredictor:
    made = load_predictor()
    assert isinstance(made, ProbePredictor)
    return made


def measured() -> dict[str, dict[str, str]]:
    with open(RESULTS / "validation.csv", encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_the_card_says_what_was_measured(packaged):
    summary, text = json.loads((RESULTS / "validation.json").read_text()), (PACKAGED / "README.md").read_text()
    rows, metadata = measured(), packaged.model.training_metadata
    assert summary["training"] == {name: metadata[name] for name in summary["training"]}  # the checkpoint that was measured
    assert summary["materials"] == len(rows) and not {*rows} & {*metadata["materials"]}
    for name, how in (("mean", np.mean), ("median", np.median), ("worst", max)):
        score = how([float(row["nmae"]) for row in rows.values()])
        assert score == pytest.approx(summary[f"nmae_{name}"], rel=1e-4)
        assert f"{100 * summary[f'nmae_{name}']:.2f} %" in text
    for part in (f"{100 * summary['sad_mean']:.2f} %", f"{summary['ratio_of_means']:.3f}", summary["command"],
                 f"{summary['training']['steps']:,} steps", "e/Å³", " ".join(metadata["elements"]), *summary["rare_elements"],
                 *(f"| {kind} | {x['materials']} | {100 * x['nmae_mean']:.2f} % |" for kind, x in summary["classes"].items())):
        assert part in text


def test_the_packaged_checkpoint_halves_the_error_of_materials_outside_its_training_data(packaged):
    store, rows, scores = sample_store(), measured(), []
    for id in store.split("validation"):
        true = store.read(id)
        made = packaged.predict(true.structure, true.shape).density
        scores.append((nmae(made.total, true.total), nmae(sad_density(true.structure, true.shape), true.total)))
        assert id not in packaged.model.training_metadata["materials"]
        assert scores[-1][0] == pytest.approx(float(rows[id]["nmae"]), rel=0.01)
        assert made.n_electrons == pytest.approx(valence_electrons(true.structure), rel=1e-6)
        assert made.values.min() > -0.01 * made.values.max()
    ours, sad = np.mean(scores, 0)
    assert len(scores) == 8 and ours < sad / 2


def test_origin_and_cell_do_not_change_the_packaged_checkpoints_predictions(packaged):
    true = sample_store().read("gp-00559")
    shape, steps = (16, 16, 16), (3, 15, 8)
    here = packaged.predict(true.structure, shape)
    moved, twice = true.structure.copy(), true.structure.make_supercell([1, 1, 2], in_place=False)
    moved.translate_sites(range(len(moved)), np.divide(steps, shape))
    for structure, grid, change in ((moved, shape, lambda x: np.roll(x, steps, (0, 1, 2))),
                                    (twice, (16, 16, 32), lambda x: np.concatenate([x, x], 2))):
        there = packaged.predict(structure, grid)
        for one, other in ((there.density.rho, here.density.rho), (there.expected_error_xyz, here.expected_error_xyz)):
            assert np.abs(one - change(other)).max() < 1e-4 * np.abs(other).max()
