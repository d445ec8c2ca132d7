"Codecs: what holds for every value, every block and every file of levels."
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tomat.tokens.codecs
from tomat.tokens.codecs import LOG_CODECS, POSITIONS, PUBLISHED_DENSITY, LogCodec, log_codec
from tomat.tokens.levels import LevelCodec, codec_from_dict, fit_levels, levels_metadata, load_levels, save_levels
from tomat.io.remote import TomatError

quick = settings(derandomize=True, deadline=None, max_examples=60)
numbers = st.floats(-1e7, 1e7, allow_subnormal=False)
arrays = hnp.arrays(np.float64, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6), elements=numbers)
samples = hnp.arrays(np.float64, st.integers(1, 60), elements=numbers)
ranges = st.tuples(st.floats(-15, 5), st.floats(0.1, 10)).map(lambda r: (r[0], r[0] + r[1]))


def format_sheet(value: float, codec: LogCodec) -> list[int]:
    "The sheet's formula for one number in plain Python, written without a look at the vectorised one."
    from math import floor, log10
    m = min(max(log10(max(abs(value), 1e-15)), codec.log_min), codec.log_max)
    b = floor((m - codec.log_min) / (codec.log_max - codec.log_min) * (2 ** sum(codec.bits) - 1))
    if abs(value) < 1e-15:
        b = 0
    digits = f"{b:0{sum(codec.bits)}b}"
    tokens = []
    for n in codec.bits:
        tokens.append(int(digits[:n], 2))
        digits = digits[n:]
    return [tokens[0] + (2 ** codec.bits[0] if value < 0 else 0), *tokens[1:]]


@pytest.mark.parametrize("name", LOG_CODECS)
def test_tokens_are_those_of_the_format_sheet(name):
    rng = np.random.default_rng(0)
    v = 10 ** rng.uniform(-6, 6, 5000) * rng.choice([-1, 1], 5000)
    codec = log_codec(name, -4.13, 4.97)
    assert codec.encode(v)[0].tolist() == [format_sheet(x, codec) for x in v]


def test_published_values():
    assert POSITIONS.encode([0.5, 0.0])[0].tolist() == [[236, 187, 235], [0, 0, 0]]
    assert PUBLISHED_DENSITY.decode([[172, 397], [169, 3663]]).round(2).tolist() == [97.17, 81.14]
    assert [log_codec(name, -4, 5).vocab_size for name in LOG_CODECS] == [1024, 4608, 65536]


@pytest.mark.parametrize("name", LOG_CODECS)
@pytest.mark.parametrize("point", ["low", "centre"])
@quick
@given(values=arrays, limits=ranges)
def test_log_round_trip_within_bound(name, point, values, limits):
    codec = log_codec(name, *limits)
    tokens, n_clipped = codec.encode(values)
    assert tokens.shape == (*values.shape, codec.tokens_per_value) and tokens.dtype == np.int32
    assert (tokens >= 0).all() and (tokens < codec.vocab_sizes).all()
    back = codec.decode(tokens, point)
    assert back.shape == values.shape
    assert (np.abs(back - values) <= codec.bound(values, point)).all()
    assert (back * values >= 0).all()
    size = np.abs(values)
    low, high = codec.magnitudes
    assert n_clipped == ((size > high) | ((size >= 1e-15) & (size < low))).sum()


@quick
@given(values=arrays)
def test_decoding_the_centre_is_stable(values):
    tokens, _ = PUBLISHED_DENSITY.encode(values)
    back = PUBLISHED_DENSITY.decode(tokens, "centre")
    assert (PUBLISHED_DENSITY.decode(PUBLISHED_DENSITY.encode(back)[0], "centre") == back).all()


@pytest.mark.parametrize("name", LOG_CODECS)
def test_every_level_decodes_in_order(name):
    codec = log_codec(name, -4.13, 4.97)
    b = np.unique(np.linspace(0, codec.top, 30_000).astype(np.int64))
    tokens = np.stack([(b >> sum(codec.bits[j + 1:])) & (2**n - 1) for j, n in enumerate(codec.bits)], -1)
    for point in ("low", "centre"):
        values = codec.decode(tokens, point)
        assert values[0] == 0 and (np.diff(values) > 0).all() and values[-1] == pytest.approx(10**4.97, rel=1e-12)
        negative = codec.decode(tokens + np.eye(len(codec.bits), dtype=int)[0] * 2 ** codec.bits[0], point)
        assert (negative == -values).all() and not np.signbit(negative[0])


def test_blocks_leave_no_trace(monkeypatch):
    rng = np.random.default_rng(1)
    v = (10 ** rng.uniform(-5, 5, 20_000) * rng.choice([-1, 1], 20_000)).astype(np.float32)
    tokens, n_clipped = PUBLISHED_DENSITY.encode(v)
    for block in (1, 7, 1000, 20_000):
        monkeypatch.setattr(tomat.tokens.codecs, "BLOCK", block)
        again, n = PUBLISHED_DENSITY.encode(v)
        assert (again == tokens).all() and n == n_clipped
    assert (PUBLISHED_DENSITY.encode(v[::-1])[0] == tokens[::-1]).all()
    strided = PUBLISHED_DENSITY.encode(v.reshape(20, 10, 100).transpose(2, 0, 1))[0]
    assert (strided.transpose(1, 2, 0, 3).reshape(-1, 2) == tokens).all()
    assert (PUBLISHED_DENSITY.encode(v.astype(np.float64))[0] == tokens).all()


@quick
@given(values=arrays)
def test_ids_are_tokens_moved_into_their_slices(values):
    for codec in (POSITIONS, PUBLISHED_DENSITY, LevelCodec([-1, 0, 1], [-0.5, 0.5], 1)):
        tokens, _ = codec.encode(values)
        ids, _ = codec.encode_ids(values)
        ends = np.cumsum(codec.vocab_sizes)
        assert (ids - codec.offsets == tokens).all() and (ids >= codec.offsets).all() and (ids < ends).all()
        assert (codec.decode_ids(ids) == codec.decode(tokens)).all()


def test_one_token_codecs_list_their_values():
    codec = log_codec("fp16_1token", -4, 5)
    values = codec.values_of_ids("centre")
    assert values.shape == (65536,) and (codec.encode(values)[0][1:32768, 0] == np.arange(1, 32768)).all()
    with pytest.raises(TomatError, match="2 tokens a value"):
        PUBLISHED_DENSITY.values_of_ids()


@pytest.mark.parametrize("objective", ["l1", "l2"])
@quick
@given(values=samples, n=st.integers(1, 80), data=st.data())
def test_fitted_levels_meet_both_conditions(objective, values, n, data):
    weights = data.draw(st.none() | hnp.arrays(np.float64, len(values), elements=st.integers(1, 9).map(float)))
    codec = fit_levels(values, n, objective, weights)
    m = len(np.unique(values))
    points, inner = codec.recon_points, codec.boundaries[1:-1]
    assert codec.vocab_size == min(n, m)
    assert (np.diff(points) > 0).all() and (points[:-1] < inner).all() and (inner <= points[1:]).all()
    assert codec.boundaries[0] == values.min() and codec.boundaries[-1] == values.max()
    assert codec.clip_max == np.abs(values).max()
    tokens, n_clipped = codec.encode(values)
    assert n_clipped == 0
    for point in ("low", "centre", "fitted"):
        error = np.abs(codec.decode(tokens, point) - values)
        assert (error <= codec.bound(values, point)).all()
        assert (error <= np.diff(codec.boundaries)[tokens[..., 0]] * (1 + 1e-12)).all()
    for far in (values * 3, values - 1e8):  # most of these are clipped
        assert (np.abs(codec.decode(codec.encode(far)[0]) - far) <= codec.bound(far)).all()
    if n >= m:
        assert (codec.decode(tokens) == values).all()


@pytest.mark.parametrize("objective", ["l1", "l2"])
def test_no_single_level_can_be_improved(objective):
    rng = np.random.default_rng(2)
    v, w = rng.lognormal(0, 2, 3000) - 0.3, rng.integers(1, 5, 3000)
    codec = fit_levels(v, 24, objective, w, iterations=500)
    cell = codec.encode(v)[0][:, 0]
    for i, point in enumerate(codec.recon_points):
        mine, weight = v[cell == i], w[cell == i]
        power = 1 if objective == "l1" else 2
        cost = [np.sum(weight * np.abs(mine - p) ** power) for p in (point, point * 0.999, point * 1.001)]
        assert cost[0] <= min(cost) * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["l1", "l2"])
def test_small_fit_against_all_partitions(objective):
    from itertools import combinations
    rng = np.random.default_rng(3)
    power, centre = (1, np.median) if objective == "l1" else (2, np.mean)
    for _ in range(20):
        v = np.sort(rng.lognormal(0, 1, 12))
        costs = []
        for cuts in combinations(range(1, 12), 3):
            costs.append(sum(np.sum(np.abs(c - centre(c)) ** power) for c in np.split(v, cuts)))
        codec = fit_levels(v, 4, objective)
        found = np.sum(np.abs(codec.decode(codec.encode(v)[0]) - v) ** power)
        assert min(costs) * (1 - 1e-9) <= found <= 3 * min(costs)


def test_l1_and_l2_each_win_their_own_game():
    rng = np.random.default_rng(4)
    v = rng.lognormal(0, 2, 20_000)
    error = {o: np.abs((c := fit_levels(v, 64, o)).decode(c.encode(v)[0]) - v) for o in ("l1", "l2")}
    assert error["l1"].mean() < error["l2"].mean() and (error["l1"] ** 2).mean() > (error["l2"] ** 2).mean()


def test_weights_count_as_copies():
    rng = np.random.default_rng(5)
    v, w = rng.normal(size=500), rng.integers(0, 4, 500)
    assert fit_levels(v, 16, "l1", w) == fit_levels(np.repeat(v, w), 16, "l1")


def test_a_million_values_and_16384_levels():
    rng = np.random.default_rng(6)
    v = rng.lognormal(0, 2.5, 1_000_000).astype(np.float32)
    codec = fit_levels(v, 16384)
    error = np.abs(codec.decode(codec.encode(v)[0]) - v)
    assert codec.vocab_size == 16384 and error.sum() / v.sum() < 2e-4


@quick
@given(values=samples, n=st.integers(1, 20))
def test_codecs_survive_json_and_npz(tmp_path_factory, values, n):
    codec = fit_levels(values, n)
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict()))) == codec
    path = tmp_path_factory.mktemp("levels") / "fit.npz"
    save_levels(codec, path)
    assert load_levels(path) == codec and hash(load_levels(path)) == hash(codec)
    for log in (POSITIONS, PUBLISHED_DENSITY):
        assert codec_from_dict(json.loads(json.dumps(log.to_dict()))) == log


def test_a_file_of_levels_may_say_what_it_is_for(tmp_path):
    codec, path = fit_levels(np.arange(9.0), 4), tmp_path / "levels.npz"
    for metadata in ({}, {"unit": "e/Å³"}, {"target": "difference", "unit": "electrons", "objective": "l2"}):
        save_levels(codec, path, metadata)
        assert levels_metadata(path) == metadata and load_levels(path) == codec
    with pytest.raises(TomatError, match="cannot hold boundaries, colour"):
        save_levels(codec, path, {"colour": "red", "boundaries": "none"})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(TomatError, match=r"levels\.npz is not an"):
        levels_metadata(path)


@pytest.mark.parametrize("left_out", [slice(1, -1), slice(0, -1), slice(1, None), slice(0, None)])
def test_files_of_levels_from_elsewhere(tmp_path, left_out):
    edges, points = np.array([0, 0.5, 2, 30], np.float32), np.array([0.1, 1, 5], np.float32)
    path = tmp_path / "theirs.npz"
    np.savez(path, boundaries=edges[left_out], recon_points=points, clip_max=np.array([30.0]), comment="unsigned")
    codec = load_levels(path)
    assert codec.boundaries.tolist() == [0, 0.5, 2, 30] and codec.recon_points.dtype == np.float64
    assert codec.encode([-1, 0, 0.5, 40])[0][:, 0].tolist() == [0, 0, 1, 2] and codec.encode([-1, 0, 0.5, 40])[1] == 2


def test_open_ends_stop_at_clip_max():
    codec = LevelCodec([-np.inf, 0, np.inf], [-1, 1], 8)
    assert codec.boundaries.tolist() == [-8, 0, 8]


GOOD = {"boundaries": [0, 1, 2, 3], "recon_points": [0.5, 1.5, 2.5], "clip_max": 3}
BAD_FILES = [
    ({"boundaries": [0, 2, 1, 3]}, "boundaries must rise"), ({"boundaries": [0, 1, 1, 3]}, "boundaries must rise"),
    ({"boundaries": [0, 1, np.nan, 3]}, "boundaries must rise"), ({"boundaries": [1]}, "3 levels need 2 to 4"),
    ({"boundaries": [[0, 1], [2, 3]]}, "3 levels need 2 to 4"), ({"boundaries": ["a", "b"]}, "real numbers"),
    ({"recon_points": [0.5, 2.5, 1.5]}, "must be rising"), ({"recon_points": []}, "must be rising"),
    ({"recon_points": [0.5, np.nan, 2.5]}, "NaN"), ({"recon_points": [0.5, 1.5, 1.6]}, "between two"),
    *(({"clip_max": wrong}, "clip_max") for wrong in (-1, [1, 2], np.nan, np.inf, 1.5)),
]


@pytest.mark.parametrize("change, sentence", BAD_FILES)
def test_malformed_levels_are_refused_by_name(tmp_path, change, sentence):
    path = tmp_path / "bad.npz"
    np.savez(path, **{**GOOD, **change})
    with pytest.raises(TomatError, match=sentence) as caught:
        load_levels(path)
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_levels(tmp_path):
    path = tmp_path / "x.npz"
    for content in (b"", b"PK\x03\x04 truncated", b"text"):
        path.write_bytes(content)
        with pytest.raises(TomatError, match="is not an"):
            load_levels(path)
    for missing in GOOD:
        np.savez(path, **{k: v for k, v in GOOD.items() if k != missing})
        with pytest.raises(TomatError, match=missing):
            load_levels(path)
    np.save(tmp_path / "x.npy", np.zeros(3))
    np.savez(path, **{**GOOD, "clip_max": np.array({"pickled": 1}, object)})
    for p in (path, tmp_path / "x.npy"):
        with pytest.raises(TomatError, match="is not an"):
            load_levels(p)
    with pytest.raises(TomatError, match="does not exist"):
        load_levels(tmp_path / "none.npz")


@pytest.mark.parametrize("codec", [PUBLISHED_DENSITY, LevelCodec(np.array([0, 1, 2]), np.array([0.5, 1.5]), 2)])
@pytest.mark.parametrize("bad", [[1.0, np.nan], [np.inf], [-np.inf], [1 + 1j], ["a"], [None]])
def test_only_finite_real_numbers_are_written(codec, bad):
    with pytest.raises(TomatError):
        codec.encode(bad)


@pytest.mark.parametrize("tokens", [[[512, 0]], [[-1, 0]], [[0, 4096]], [[0, 0, 0]], [[0.0, 0.0]], 3, []])
def test_tokens_of_another_codec_are_refused(tokens):
    with pytest.raises(TomatError, match="two_token_9_12"):
        PUBLISHED_DENSITY.decode(tokens)


def test_the_rest_is_refused_too():
    with pytest.raises(TomatError, match="no fitted points"):
        PUBLISHED_DENSITY.decode([[1, 1]], "fitted")
    with pytest.raises(TomatError, match="no reconstruction point"):
        PUBLISHED_DENSITY.decode([[1, 1]], "middle")
    with pytest.raises(TomatError, match="no log codec"):
        log_codec("fp8", 0, 1)
    for limits in ((0, 0), (1, 0), (-16, 0), (0, 301), (np.nan, 1)):
        with pytest.raises(TomatError, match="log range"):
            log_codec("fp16_1token", *limits)
    for bits in ((), (0, 8), (16, 16)):
        with pytest.raises(TomatError, match="bits"):
            LogCodec("x", bits, 0, 1)
    damaged = {**PUBLISHED_DENSITY.to_dict(), "log_min": "a"}
    for d in ({}, {"codec": "log"}, {"codec": "zip"}, {"codec": "levels", **GOOD, "name": "x"}, damaged):
        with pytest.raises(TomatError):
            codec_from_dict(d)
    for call in (([], 4), ([1, 2], 0), ([1, np.nan], 2), ([1, 2], 2, "l3")):
        with pytest.raises(TomatError):
            fit_levels(*call)
    for weights in ([1], [0, 0], [-1, 2], [np.nan, 1]):
        with pytest.raises(TomatError):
            fit_levels([1, 2], 2, "l1", weights)
