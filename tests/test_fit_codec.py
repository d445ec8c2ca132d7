"Fitting: histograms that add up exactly, levels that cover the counted values, quantisation errors that do not depend on the unit."
from dataclasses import replace

import numpy as np
import pytest
from crystals import crystal, real_looking, with_any_sad
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tomat.tokens.levels import LEVELS_METADATA, fit_levels, levels_metadata, load_levels, save_levels
from tomat.tokens.codecs import PUBLISHED_DENSITY
from tomat.density.core import RHO, TOTAL, Density
from tomat.io.remote import TomatError
from tomat.tokens.fit_codec import (MANTISSA_BITS, TARGETS, Histogram, _bins_of, _middles_of, field_of, fit_histogram,
                                    histogram_of, merge_histograms, quantisation_error, quantisation_errors,
                                    quantisation_summary)
from tomat.density.metrics import nmae
from tomat.density.store import sample_store
from tomat.tokens.tokenizer import Tokenizer, tokenizer_from_dict

quick = settings(derandomize=True, deadline=None, max_examples=80)
single = st.floats(width=32, allow_nan=False, allow_infinity=False)
values = st.one_of(
    hnp.arrays(np.float32, st.integers(0, 60), elements=single),
    hnp.arrays(np.float64, st.integers(0, 60), elements=st.floats(-1e6, 1e6)),
    hnp.arrays(np.int64, st.integers(0, 60), elements=st.integers(-9, 9)))


def cut_up(array, cuts):
    return np.split(array, sorted(c % (array.size + 1) for c in cuts))


@quick
@given(values, st.lists(st.integers(0, 60), max_size=6), st.integers(0, 40), st.randoms(use_true_random=False))
def test_any_parts_in_any_order_add_up_to_the_whole(array, cuts, at_once, random):
    whole, parts = Histogram.of(array), [Histogram.of(part) for part in cut_up(array, cuts)]
    random.shuffle(parts)
    assert merge_histograms(parts, at_once) == whole and sum(parts[1:], parts[0]) == whole
    assert whole.n_values == array.size and whole.counts.dtype == np.int64 and whole.bins.dtype == np.int32


@quick
@given(values, values, values)
def test_addition_is_associative_and_commutative_and_has_a_zero(a, b, c):
    x, y, z = map(Histogram.of, (a, b, c))
    assert (x + y) + z == x + (y + z) and x + y == y + x and x + Histogram.of(np.zeros(0)) == x


@quick
@given(hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e30, 1e30)))
@example(np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45, -1e-45, 0.0, -0.0]))
def test_the_middle_of_a_bin_is_near_and_bins_keep_the_order(array):
    array = np.sort(array)
    bins = _bins_of(array)
    assert (np.diff(bins) >= 0).all() and (_bins_of(_middles_of(bins)) == bins).all()
    close = 2.0 ** -(MANTISSA_BITS + 1) + 2.0**-24
    assert (np.abs(_middles_of(bins) - array) <= np.maximum(np.abs(array) * close * 1.001, 1e-42)).all()
    mirrored = _bins_of(-array[array != 0])
    normal = np.abs(array[array != 0]) > 1e-45
    assert (mirrored == -1 - bins[array != 0])[normal].all()


def test_bins_begin_at_round_numbers():
    assert np.diff(_bins_of(np.array([1, 2, 4, 0.5])))[0] == 2**MANTISSA_BITS
    assert _bins_of(np.array([1.0])) != _bins_of(np.array([np.nextafter(np.float32(1), np.float32(0))]))
    assert len(set(_bins_of(np.array([0.0, -0.0])).tolist())) == 1


@pytest.mark.parametrize("bad, word", [([1, np.nan], "1 of 2"), ([np.inf], "infinite"), ([1e39], "beyond"), ([-1e300, 1], "beyond"),
                                       ([1j], "complex"), (["a"], "real numbers"), ([None], "real numbers")])
def test_only_finite_real_numbers_are_counted(bad, word):
    with pytest.raises(TomatError, match=word):
        Histogram.of(np.array(bad))


def test_what_was_counted_differently_does_not_add_up():
    one = Histogram.of(np.ones(3))
    for other in (Histogram.of(np.ones(3), unit=RHO), Histogram.of(np.ones(3), target="difference")):
        with pytest.raises(TomatError, match="do not add up"):
            one + other
    with pytest.raises(TomatError, match="nothing to count"):
        merge_histograms(iter([]))


@quick
@given(values.filter(len), st.integers(1, 40), st.sampled_from(["l1", "l2"]))
def test_nothing_that_was_counted_is_clipped(array, n_levels, objective):
    codec = fit_histogram(Histogram.of(array), n_levels, objective)
    assert codec.encode(array)[1] == 0 and codec.vocab_size <= n_levels
    assert (codec.boundaries[0], codec.boundaries[-1]) == (array.min(), array.max())
    assert codec.encode(np.array([np.nextafter(float(array.max()), np.inf)]))[1] == 1


@pytest.mark.parametrize("objective", ["l1", "l2"])
@pytest.mark.parametrize("n_levels", [16, 256])
def test_a_histogram_fits_as_well_as_the_values(objective, n_levels):
    rng = np.random.default_rng(2)
    sample, unseen = real_looking(rng, 200_000), real_looking(rng, 20_000)
    binned, exact = fit_histogram(Histogram.of(sample), n_levels, objective), fit_levels(sample, n_levels, objective)
    power = {"l1": 1, "l2": 2}[objective]
    a, b = (np.mean(np.abs(codec.decode(codec.encode(sample)[0]) - sample) ** power) for codec in (binned, exact))
    assert a <= 1.03 * b
    if objective == "l1":
        a, b = (nmae(codec.decode(codec.encode(unseen)[0]), unseen) for codec in (binned, exact))
        assert a <= 1.1 * b


def test_there_must_be_something_to_fit():
    with pytest.raises(TomatError, match="no value to fit"):
        fit_histogram(Histogram.of(np.zeros(0)), 4)
    with pytest.raises(TomatError, match="nothing to count"):
        histogram_of([], sample_store().read)
    with pytest.raises(TomatError, match="1 level or more"):
        fit_histogram(Histogram.of(np.ones(3)), 0)
    with pytest.raises(TomatError, match="l3"):
        fit_histogram(Histogram.of(np.ones(3)), 4, "l3")


@quick
@given(values, st.sampled_from(TARGETS), st.sampled_from([TOTAL, RHO]))
def test_histograms_survive_their_file(tmp_path_factory, array, target, unit):
    path = tmp_path_factory.mktemp("part") / "part.npz"
    histogram = Histogram.of(array, target, unit)
    histogram.save(path)
    assert Histogram.load(path) == histogram and [p.name for p in path.parent.iterdir()] == ["part.npz"]


GOOD = {"bins": [1, 2], "counts": [3, 4], "low": 0.0, "high": 1.0, "target": "total", "unit": TOTAL}


@pytest.mark.parametrize("change", [
    {"bins": [2, 1]}, {"bins": [1, 1]}, {"counts": [3, 0]}, {"counts": [3]}, {"bins": [[1, 2]], "counts": [[3, 4]]}, {"low": 2.0},
    {"low": [1, 2]}, {"high": np.nan}, {"target": "spin"}, {"unit": "hartree"}, {"bins": ["a", "b"]}])
def test_a_damaged_histogram_is_refused_by_name(tmp_path, change):
    path = tmp_path / "bad.npz"
    np.savez(path, **GOOD)
    assert Histogram.load(path).n_values == 7
    np.savez(path, **{**GOOD, **change})
    with pytest.raises(TomatError, match=r"bad\.npz is no histogram"):
        Histogram.load(path)


def test_other_files_are_no_histograms(tmp_path):
    path = tmp_path / "x.npz"
    whole = Histogram.of(real_looking(np.random.default_rng(1), 1000))
    whole.save(path)
    raw = path.read_bytes()
    for damaged in (b"", b"text", raw[:len(raw) // 2], raw[:60] + bytes(200) + raw[260:]):
        path.write_bytes(damaged)
        with pytest.raises(TomatError, match=r"x\.npz"):
            Histogram.load(path)
    save_levels(fit_histogram(whole, 4), path)
    with pytest.raises(TomatError, match="lacks bins and counts"):
        Histogram.load(path)
    with pytest.raises(TomatError, match="does not exist"):
        Histogram.load(tmp_path / "none.npz")


def numbered(seed, unit=TOTAL):
    rng = np.random.default_rng(seed)
    return Density(rng.lognormal(2, 1, (4, 5, 6)).astype(np.float32), crystal(rng), id=f"m-{seed}").as_units(unit)


def fails_at_2(item):
    if item == 2:
        raise TomatError("m-2 is broken: fix it.")
    return numbered(item)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("unit", [TOTAL, RHO])
def test_any_number_of_workers_and_any_parts_fit_the_same(target, unit):
    how = {"target": target, "unit": unit, "prepare": with_any_sad}
    histogram = histogram_of(range(20), numbered, **how)
    codec = fit_histogram(histogram, 32)
    assert histogram.n_values == 20 * 120 and (histogram.target, histogram.unit) == (target, unit)
    assert histogram == Histogram.of(
        np.concatenate([field_of(with_any_sad(numbered(i)), target, unit).ravel() for i in range(20)]), target, unit)
    parts = [histogram_of(range(7), numbered, **how), histogram_of(range(7, 20), numbered, **how)]
    assert merge_histograms(parts) == histogram and fit_histogram(merge_histograms(parts), 32) == codec
    if (target, unit) == ("difference", RHO):
        assert histogram_of(range(20), numbered, workers=2, **how) == histogram
        measured = quantisation_errors(range(20, 30), numbered, codec, **how)
        assert quantisation_errors(range(20, 30), numbered, codec, workers=2, **how) == measured
        assert [score.id for score in measured] == [f"m-{i}" for i in range(20, 30)]


def test_a_broken_material_is_named():
    with pytest.raises(TomatError, match="m-2 is broken"):
        histogram_of(range(9), fails_at_2)


def test_fields_and_their_units():
    density = with_any_sad(numbered(1))
    rho = density.as_units(RHO)
    for target in TARGETS:
        in_electrons, in_rho = field_of(density, target), field_of(density, target, RHO)
        np.testing.assert_allclose(in_rho * density.volume, in_electrons, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(field_of(rho, target), in_electrons, rtol=1e-5, atol=1e-4)
    assert field_of(density) is density.values
    np.testing.assert_allclose(field_of(density, "difference") + density.sad, density.values, rtol=1e-5)
    with pytest.raises(TomatError, match="m-1 carries no sum of atomic densities"):
        field_of(numbered(1), "difference")


@pytest.mark.parametrize("target", TARGETS)
def test_the_quantisation_error_is_the_nmae_of_perfect_tokens(target):
    from tomat.prediction.causal import codec_floor  # imports torch, which the workers above can do without
    from tomat.models.causal import make_model
    from tomat.models.sizes import MODELS
    from tomat.prediction.causal import CausalPredictor
    density = with_any_sad(numbered(3))
    for unit in (TOTAL, RHO):
        codec = fit_histogram(histogram_of(range(6), numbered, target, unit, with_any_sad), 64)
        field, sad = field_of(density, target, unit), density.as_units(unit).sad if target == "difference" else 0
        tokens, n_clipped = codec.encode(field)
        score = quantisation_error(density, codec, target, unit)
        assert score.nmae == pytest.approx(nmae(codec.decode(tokens) + sad, density.as_units(unit).values), rel=1e-4)
        assert score.clipped == n_clipped and score.voxels == 120 and score.volume == density.volume
        tok = Tokenizer("framed", codec, patch_size=2, pad_to=None, target=target, unit=unit)
        written = codec_floor(density, CausalPredictor(make_model(MODELS["nano"], tok.vocab), tok)).density.total
        assert nmae(written, density.total) == pytest.approx(score.nmae, rel=1e-4)


def test_scaled_levels_in_scaled_units_have_the_same_error():
    density = numbered(3)
    one, other = (fit_histogram(Histogram.of(field_of(density, unit=unit), unit=unit), 32) for unit in (TOTAL, RHO))
    assert quantisation_error(density, one).nmae == pytest.approx(quantisation_error(density, other, unit=RHO).nmae, rel=1e-2)


def test_a_quantisation_error_needs_a_density():
    density = numbered(1)
    with pytest.raises(TomatError, match="zero everywhere"):
        quantisation_error(replace(density, values=np.zeros_like(density.values)), PUBLISHED_DENSITY)
    with pytest.raises(TomatError, match="no held-out material"):
        quantisation_summary([])


def test_a_summary_names_the_worst():
    codec = fit_histogram(Histogram.of(np.arange(100.0)), 8)
    measured = quantisation_errors(range(9), numbered, codec)
    summary = quantisation_summary(measured)
    worst = max(measured, key=lambda score: score.nmae)
    assert (summary["worst"], summary["worst_id"], summary["materials"]) == (worst.nmae, worst.id, 9)
    assert summary["clipped"] == sum(score.clipped for score in measured) > 0
    assert summary["median"] == pytest.approx(np.median([score.nmae for score in measured]))


def test_a_supercell_has_the_same_tokens_in_electrons_per_volume_only():
    density = numbered(2)
    twice = Density(np.tile(density.rho, (2, 1, 1)), density.structure * (2, 1, 1), units=RHO)
    codec = fit_histogram(histogram_of(range(6), numbered, unit=RHO), 64)
    np.testing.assert_allclose(field_of(twice, unit=RHO), np.tile(field_of(density, unit=RHO), (2, 1, 1)))
    one, other = (quantisation_error(material, codec, unit=RHO).nmae for material in (density, twice))
    assert other == pytest.approx(one, rel=1e-6)
    np.testing.assert_allclose(field_of(twice), 2 * np.tile(field_of(density), (2, 1, 1)), rtol=1e-5)


def test_a_file_of_levels_tells_the_tokenizer_what_it_is_for(tmp_path):
    histogram = histogram_of(range(4), numbered, unit=RHO)
    codec = fit_histogram(histogram, 16)
    save_levels(codec, tmp_path / "codec.npz", {"unit": histogram.unit, "target": histogram.target, "objective": "l1"})
    metadata = levels_metadata(tmp_path / "codec.npz")
    assert metadata == {"target": "total", "unit": RHO, "objective": "l1"} and tuple(metadata) == LEVELS_METADATA
    tok = Tokenizer("framed", load_levels(tmp_path / "codec.npz"), target=metadata["target"], unit=metadata["unit"])
    assert tokenizer_from_dict(tok.to_dict()) == tok and tok.density_codec == codec


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("unit", [TOTAL, RHO])
def test_perfect_tokens_predict_the_density_in_either_unit(monkeypatch, target, unit):
    """Handing the true tokens to everything after the model scores the quantisation error, for any target and unit."""
    from tomat.prediction import causal as prediction
    from tomat.models.causal import make_model
    from tomat.models.sizes import MODELS
    density = with_any_sad(numbered(5))
    codec = fit_histogram(Histogram.of(field_of(density, target, unit), target, unit), 40)
    tokenizer = Tokenizer("framed", codec, patch_size=4, pad_to=None, target=target, unit=unit)
    ids = tokenizer.encode(density, prediction.cover(density.shape, 4))[0]

    def true_ids(model, tok, prompts, strategy, *more):
        return (prediction.Written(ids_N, None, np.zeros(len(ids_N))) for ids_N in ids[:, prompts.shape[1]:-2].T)

    monkeypatch.setattr(prediction, "free_run", true_ids)
    causal = prediction.CausalPredictor(make_model(MODELS["nano"], tokenizer.vocab), tokenizer, rescale=False)
    written = causal.predict(density.structure, density.shape).density
    error = quantisation_error(density, codec, target, unit).nmae
    assert written.units == TOTAL and 0 < error < 0.05
    assert nmae(written.total, density.total) == pytest.approx(error, rel=1e-3, abs=1e-7)
    first_xyz = field_of(density, target, unit)[:4, :4, :4]
    assert (np.abs(tokenizer.decode(ids[0]).values - first_xyz) <= codec.bound(first_xyz)).all()
