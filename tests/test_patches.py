"""What must hold for any grid, patch and offset."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tomat.tokens.patches import as_size, cover, cut, flat_indices, random_offsets, stitch

quick = settings(derandomize=True, deadline=None, max_examples=80)
side = st.integers(1, 9)
sizes = st.one_of(side, st.tuples(side, side, side))
shapes = st.tuples(*[st.integers(1, 12)] * 3)
seeds = st.integers(0, 2**32 - 1)


@quick
@given(shapes, sizes, seeds, st.sampled_from([1, 3, 60]))
def test_every_voxel_of_a_patch_is_the_one_the_formula_names(shape, size, seed, count):
    rng = np.random.default_rng(seed)
    values_xyz, offsets = rng.normal(size=shape), rng.integers(-30, 30, (count, 3))
    patches = cut(values_xyz, offsets, size)
    assert patches.shape == (count, *as_size(size))
    for _ in range(20):
        i, *place = (int(rng.integers(n)) for n in patches.shape)
        where = tuple((o + p) % n for o, p, n in zip(offsets[i], place, shape, strict=True))
        assert patches[(i, *place)] == values_xyz[where]


@quick
@given(shapes, sizes, seeds, st.tuples(*[st.integers(-40, 40)] * 3))
def test_a_shifted_crystal_has_the_same_patches(shape, size, seed, steps):
    rng = np.random.default_rng(seed)
    values_xyz, offsets = rng.normal(size=shape), random_offsets(shape, 4, rng)
    rolled = np.roll(values_xyz, steps, axis=(0, 1, 2))
    assert np.array_equal(cut(rolled, offsets + steps, size), cut(values_xyz, offsets, size))


@quick
@given(shapes, sizes, seeds, st.data())
def test_stitching_a_cover_is_the_identity(shape, size, seed, data):
    sides = as_size(size)
    overlap = tuple(data.draw(st.integers(0, s - 1)) for s in sides)
    rng = np.random.default_rng(seed)
    values_xyz = rng.lognormal(sigma=5, size=shape) * rng.choice([-1, 1], size=shape)
    weights = data.draw(st.sampled_from([None, rng.random(sides) + 1e-3]))
    offsets = cover(shape, size, overlap)
    assert np.array_equal(stitch(cut(values_xyz, offsets, size), offsets, shape, weights), values_xyz)


@quick
@given(shapes, sizes)
def test_a_disjoint_cover_meets_each_voxel_once_but_for_the_wrapping_patches(shape, size):
    times = np.bincount(flat_indices(shape, cover(shape, size), size).ravel(), minlength=int(np.prod(shape)))
    inside = tuple(slice(-(-n // s) * s - n, None) for n, s in zip(shape, as_size(size), strict=True))
    assert times.min() >= 1
    assert (times.reshape(shape)[inside] == 1).all()


@quick
@given(shapes, sizes, seeds)
def test_stitching_is_the_mean_of_all_opinions(shape, size, seed):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([cover(shape, size), random_offsets(shape, 3, rng)])
    patches, weights = rng.normal(size=(len(offsets), *as_size(size))), rng.random(as_size(size)) + 0.1
    total, weight = np.zeros(shape), np.zeros(shape)
    for offset, patch in zip(offsets, patches, strict=True):
        for place in np.ndindex(patch.shape):
            where = tuple((o + p) % n for o, p, n in zip(offset, place, shape, strict=True))
            total[where] += weights[place] * patch[place]
            weight[where] += weights[place]
    np.testing.assert_allclose(stitch(patches, offsets, shape, weights), total / weight, rtol=1e-9, atol=1e-12)
