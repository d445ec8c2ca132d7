"Metrics: hand-worked values, and what no metric may depend on."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tomat.files import TomatError
from tomat.metrics import METRICS, electron_error, nmae, rmse

quick = settings(derandomize=True, deadline=None, max_examples=100)
shapes = hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)


@st.composite
def pairs(draw, low=-100.0):
    "A prediction and a truth on one small grid, the truth not zero everywhere."
    shape = draw(shapes)
    predicted, true = (draw(hnp.arrays(np.float64, shape, elements=st.floats(low, 1000, width=16))) for _ in range(2))
    true.flat[0] = 1.0
    return predicted, true


def test_hand_worked():
    true, predicted = np.array([[[4.0, 2.0], [1.0, 1.0]]]), np.array([[[3.0, 3.0], [1.0, 2.0]]])
    assert nmae(predicted, true) == 3 / 8
    assert rmse(predicted, true) == pytest.approx(np.sqrt(3 / 4))
    assert electron_error(predicted, true) == 0.25
    assert nmae(-true, true) == 2 and nmae(true, -true) == 2


@quick
@given(pairs(), st.integers(-7, 7), st.integers(-7, 7), st.integers(-7, 7))
def test_the_origin_does_not_matter(pair, i, j, k):
    moved = [np.roll(v, (i, j, k), (0, 1, 2)) for v in pair]
    for metric in METRICS.values():
        assert metric(*moved) == pytest.approx(metric(*pair), rel=1e-9, abs=1e-9)


@quick
@given(pairs(), st.floats(1e-3, 1e3))
def test_units(pair, factor):
    scaled = [factor * v for v in pair]
    assert nmae(*scaled) == pytest.approx(nmae(*pair), rel=1e-9)
    assert rmse(*scaled) == pytest.approx(factor * rmse(*pair), rel=1e-9)
    assert electron_error(*scaled) == pytest.approx(factor * electron_error(*pair), rel=1e-9, abs=1e-9)


@quick
@given(pairs())
def test_a_supercell_is_the_same_material(pair):
    doubled = [np.tile(v, (1, 2, 1)) for v in pair]
    for metric in METRICS.values():
        assert metric(*doubled) == pytest.approx(metric(*pair), rel=1e-9, abs=1e-9)


@quick
@given(pairs(low=0.0))
def test_electrons_are_bounded_by_nmae(pair):
    predicted, true = pair
    assert abs(electron_error(predicted, true)) <= nmae(predicted, true) * true.mean() * (1 + 1e-9) + 1e-9


@quick
@given(pairs())
def test_zero_only_for_the_truth(pair):
    predicted, true = pair
    for metric in (nmae, rmse):
        assert metric(true, true) == 0 and (metric(predicted, true) > 0) == bool((predicted != true).any())
        assert isinstance(metric(predicted, true), float)


def test_float32_is_summed_in_float64():
    true = np.full((64, 64, 64), 16777216.0, np.float32)
    assert electron_error(true, true - np.float32(1)) == 1.0


@pytest.mark.parametrize("metric", METRICS.values())
def test_refusals(metric):
    ones = np.ones((2, 2, 2))
    empty = np.ones((0, 2, 2))
    shapes = [(ones, np.ones((2, 2, 1))), (np.ones(8), ones), (empty, empty)]
    contents = [(ones * np.nan, ones), (ones, ones + np.inf), (ones * 1j, ones), (ones, ones.astype(str))]
    for predicted, true in shapes + contents:
        with pytest.raises(TomatError) as caught:
            metric(predicted, true)
        assert "\n" not in str(caught.value)


def test_a_true_density_of_zeros_has_no_nmae():
    with pytest.raises(TomatError, match="zero everywhere"):
        nmae(np.ones((2, 2, 2)), np.zeros((2, 2, 2)))
