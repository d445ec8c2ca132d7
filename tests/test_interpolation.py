"Most voxels of a prediction are interpolated: waves come back, nuclei are exact, symmetries stay, and little is lost."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

import tomat.models.interpolation as module
from tomat.atoms.sad import sad_waves, valence_electrons
from tomat.density.metrics import nmae
from tomat.density.store import sample_store
from tomat.models.interpolation import (CHECKED, DEGREE, LARGEST_LOSS, NEAR, SIDE, checked_voxels, coarse_shape, expected_loss,
                                        near_voxels, predict_smooth, resample, spline_matrix)
from tomat.models.probe import predict_field
from tomat.prediction.predictors import load_predictor

CELL = Lattice.from_parameters(3.9, 4.4, 5.2, 75, 98, 112)
CRYSTAL = Structure(CELL, ["Ba", "Ti", "O"], [[0.11, 0.02, 0.95], [0.52, 0.47, 0.55], [0.07, 0.41, 0.38]])
SHAPE = (41, 46, 55)  # odd and even


@pytest.fixture(scope="module")
def packaged():
    return load_predictor()


def both(predictor, structure, shape=SHAPE):
    "Difference and error, interpolated and not, and the expected loss."
    sad = sad_waves(structure, predictor.atoms)
    sad_xyz = np.float32(sad.density(shape) / structure.volume)
    *smooth, loss = predict_smooth(predictor.model, structure, sad, sad_xyz)
    return np.stack(smooth), np.stack(predict_field(predictor.model, structure, shape, sad_xyz)), loss


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(30, 80), st.integers(30, 50), st.floats(0, 1, exclude_max=True), st.integers(0, 2**16))
def test_waves_of_ten_points_come_back_on_any_grid(n, m, origin, seed):
    "Any parity of both sizes, any origin; the second axis only repeats the first."
    rng, waves = np.random.default_rng(seed), np.arange(m // 10 + 1)
    a, b = rng.normal(size=(2, len(waves)))

    def wave(x):
        return (a * np.cos(2 * np.pi * x[:, None] * waves) + b * np.sin(2 * np.pi * x[:, None] * waves)).sum(1)

    start, end = wave(origin + np.arange(m) / m), wave(np.arange(n) / n)
    values = torch.from_numpy(start[:, None, None] * np.ones((1, 8, 8))).float()
    found = resample(values, [spline_matrix(n, m, origin, DEGREE), *[spline_matrix(9, 8, 0.3, DEGREE)] * 2]).numpy()
    assert np.abs(found - end[:, None, None]).max() < 1e-3 * (np.abs(a) + np.abs(b)).sum()


@pytest.mark.parametrize("degree", [1, DEGREE])
@pytest.mark.parametrize(("n", "m"), [(16, 8), (17, 8), (16, 9), (9, 13)])
def test_points_of_both_grids_keep_their_values(degree, n, m):
    matrix = spline_matrix(n, m, 3 / n, degree)
    assert torch.allclose(matrix.sum(1), torch.ones(n), atol=1e-5)
    assert torch.allclose(matrix[3], torch.eye(m)[0], atol=1e-5)
    assert degree > 1 or (matrix >= 0).all()  # so the expected error stays positive


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3), st.tuples(*[st.integers(9, 30)] * 3))
def test_the_ball_around_a_nucleus(centre, shape):
    found, distance = near_voxels(np.array(centre), shape, CELL.matrix)
    all_Gx3 = np.stack(np.meshgrid(*[np.arange(-n, 2 * n) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    r = np.linalg.norm((all_Gx3 / shape - centre) @ CELL.matrix, axis=1)
    assert len(found) == (r < NEAR).sum() and (distance < NEAR).all()
    np.testing.assert_allclose(np.linalg.norm((found / shape - centre) @ CELL.matrix, axis=1), distance)


def test_checked_voxels_move_with_the_first_atom():
    here, shape = CRYSTAL.frac_coords[0], np.array(SHAPE)
    there = checked_voxels(here + np.array((5, 3, 8)) / shape, SHAPE)
    np.testing.assert_array_equal(there - checked_voxels(here, SHAPE), np.broadcast_to((5, 3, 8), (CHECKED, SIDE**3, 3)))


def test_nuclei_are_exact_and_the_loss_is_what_all_voxels_say(packaged):
    ratios = []
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):  # the first atom decides which voxels are checked
        smooth, whole, loss = both(packaged, Structure.from_sites([CRYSTAL[i] for i in order]))
        for centre in CRYSTAL.frac_coords:
            inside = tuple(near_voxels(centre, SHAPE, CELL.matrix)[0].T % np.array(SHAPE)[:, None])
            assert np.abs(smooth - whole)[:, *inside].max() < 1e-5
        moved = smooth[0] - whole[0]
        assert 1e-4 < np.abs(moved).max() < 0.1 and (smooth[1] > 0).all()
        ratios.append(loss / (expected_loss(moved, whole[1]).mean() * CRYSTAL.volume / valence_electrons(CRYSTAL)))
    assert 0.2 < np.mean(ratios) < 5


@pytest.mark.parametrize("steps", [(1, 0, 0), (40, -3, 30)])
def test_another_origin_moves_the_prediction(packaged, steps):
    moved = CRYSTAL.copy()
    moved.translate_sites(range(3), np.divide(steps, SHAPE), to_unit_cell=True)
    there, here = both(packaged, moved)[0], both(packaged, CRYSTAL)[0]
    assert np.abs(there - np.roll(here, steps, (1, 2, 3))).max() < 2e-4 * np.abs(here).max()


def test_whole_predictions_lose_what_is_stated(packaged):
    store, interpolated = sample_store(), 0
    for id in store.split("validation"):
        true = store.read(id)
        made, every = (replace(packaged, full_grid=full).predict(true.structure, true.shape).density for full in (False, True))
        assert nmae(made.total, true.total) - nmae(every.total, true.total) < LARGEST_LOSS
        assert made.n_electrons == pytest.approx(valence_electrons(true.structure), rel=1e-6)
        interpolated += (made.total != every.total).any()
    assert interpolated > 5


def test_metals_need_fewer_voxels_than_oxygen_and_all_atoms_of_an_element_as_many(packaged, monkeypatch):
    found, work = [], module._add_nuclei
    monkeypatch.setattr(module, "_add_nuclei", lambda *given: found.append(work(*given)))
    rock = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.21), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    smooth, whole, loss = both(packaged, rock, (46, 46, 46))
    assert found[0]["Mg"] < found[0]["O"] <= NEAR and 0 < loss < LARGEST_LOSS
    for site in rock:
        voxel_Vx3, _ = near_voxels(site.frac_coords, (46,) * 3, rock.lattice.matrix, found[0][site.specie.symbol])
        assert np.abs(smooth - whole)[:, *voxel_Vx3.T % 46].max() < 1e-5


def test_where_much_would_be_lost_the_grid_is_whole(packaged, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_LOSS", 1e-9)
    smooth, whole, loss = both(packaged, CRYSTAL)
    assert (smooth == whole).all() and loss == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (20, 24, 28), (3, 200, 3)])
def test_grids_that_are_not_worth_it_are_whole(packaged, shape):
    assert np.prod(coarse_shape(CRYSTAL)) > np.prod(shape) / 2
    smooth, whole, loss = both(packaged, CRYSTAL, shape)
    assert (smooth == whole).all() and loss == 0


def test_any_number_of_threads_gives_the_same_bits(packaged):
    before, fields = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            fields.append(both(packaged, CRYSTAL)[0])
    finally:
        torch.set_num_threads(before)
    assert (fields[0] == fields[1]).all()


def test_interpolation_stays_on_the_device():
    meta = resample(torch.zeros(8, 9, 10, device="meta"), [spline_matrix(20, m, 0, 1) for m in (8, 9, 10)])
    assert meta.device.type == "meta" and meta.shape == (20, 20, 20)
