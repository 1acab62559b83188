"""`merge`: attention over parts of the keys becomes attention over all keys, in any grouping, with gradients and without NaN."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import array, assert_close, draw, weights

from ejk_ragged import merge, ragged_decode_attention
from ejk_ragged.testing import Case


CASE = Case("merge", 3, 24, 4, 2, 8, lengths=("ranges", (0, 24), (3, 9), (5, 5)), sinks=("query", 2))


def parts(arrays, cuts):
    """The calls on the ranges between `cuts`. The first call gets the sinks."""
    arrays = dict(arrays)
    start, end, aux = (arrays.pop(name) for name in ("sequence_start", "sequence_end", "softmax_aux"))
    edges = [0, *sorted(cuts), CASE.seq_len]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        lengths: dict[str, Any] = {"sequence_start": jnp.clip(start, low, high), "sequence_end": jnp.clip(end, low, high)}
        yield ragged_decode_attention(**arrays, **lengths, softmax_aux=aux if i == 0 else None, return_lse=True)


def whole(arrays):
    return ragged_decode_attention(**arrays, return_lse=True)


def pullback(function, arrays):
    floats = {name: x for name, x in arrays.items() if not name.startswith("sequence")}
    result, vjp = jax.vjp(lambda floats: function(arrays | floats), floats)
    return result, vjp(jax.tree.map(weights, result))


@given(st.lists(st.integers(0, CASE.seq_len), max_size=4), st.randoms(use_true_random=False))
def test_any_cuts_in_any_order(cuts, random):
    arrays, _ = draw(CASE)
    partials = list(parts(arrays, cuts))
    random.shuffle(partials)
    assert_close(jax.jit(merge)(partials), whole(arrays))


@pytest.mark.parametrize("cuts", [[], [12], [0, 6, 6, 24]], ids=str)
def test_gradients(cuts):
    """Gradients of query, both caches and sinks, through output and lse. They are 0, not NaN, if one range or all ranges are
    empty."""
    arrays, _ = draw(CASE)
    assert_close(
        jax.jit(lambda arrays: pullback(lambda arrays: merge(parts(arrays, cuts)), arrays))(arrays), pullback(whole, arrays)
    )


def test_any_grouping():
    arrays, _ = draw(CASE)
    a, b, c, d = parts(arrays, [5, 8, 20])
    want = whole(arrays)
    for grouped in ([a, b, c, d], [merge([a, b]), merge([c, d])], [merge([merge([a, b]), c]), d], [a, merge([b, merge([d, c])])]):
        assert_close(merge(grouped), want)


def test_two_caches():
    """A prefix that all sequences share, in a cache of batch 1, and the rest of each sequence in another cache."""
    arrays, _ = draw(CASE)
    query, key, value, *_ = arrays.values()
    prefix_key, prefix_value = key[:1, :10], value[:1, :10]
    shared = jax.vmap(lambda q: ragged_decode_attention(q[None], prefix_key, prefix_value, return_lse=True))(query)
    prefix = jax.tree.map(lambda x: x[:, 0], shared)
    ends = jnp.array([14, 3, 0])
    rest = ragged_decode_attention(query, key[:, 10:], value[:, 10:], None, ends, return_lse=True)
    key, value = (x.at[:, :10].set(x[:1, :10]) for x in (key, value))
    assert_close(merge([prefix, rest]), ragged_decode_attention(query, key, value, None, 10 + ends, return_lse=True))


def test_by_hand():
    """Two keys of equal logits weigh the same, so the lse of both is log 2 larger than the lse of one."""
    out, lse = merge([(jnp.array([1.0, 0.0]), jnp.array(0.5)), (jnp.array([0.0, 3.0]), jnp.array(0.5))])
    np.testing.assert_allclose(out, [0.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(lse, 0.5 + np.log(2), rtol=1e-6)


@pytest.mark.parametrize("junk", [0.0, np.nan, np.inf])
def test_empty_parts_count_for_nothing(junk):
    full = array([[1, 2]], "float32"), array([3], "float32")
    empty = array([[junk, junk]], "float32"), array([-np.inf], "float32")
    for partials in ([full, empty], [empty, full], [empty, full, empty]):
        assert_close(merge(partials), full)
    assert_close(merge([empty, empty]), (jnp.zeros((1, 2)), empty[1]))
    for partials in ([full, empty], [empty, empty]):
        gradients = jax.grad(lambda partials: sum(jnp.sum(jnp.where(x > -jnp.inf, x, 0)) for x in merge(partials)))
        gradients = jax.tree.map(np.asarray, jax.jit(gradients)(partials))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
        assert not np.any(gradients[-1][0])
        assert not np.any(gradients[-1][1])


def test_a_part_of_weight_zero_is_not_an_empty_one():
    """exp underflows, but the part is finite, so the result is that of the larger part."""
    large, small = (jnp.array([1.0]), jnp.array(0.0)), (jnp.array([7.0]), jnp.array(-1e4))
    assert_close(merge([large, small]), large)


def test_nan_is_not_hidden():
    assert jnp.isnan(merge([(jnp.array([jnp.nan]), jnp.array(0.0)), (jnp.array([1.0]), jnp.array(0.0))])[0]).all()
    assert jnp.isnan(merge([(jnp.array([1.0]), jnp.array(jnp.nan)), (jnp.array([1.0]), jnp.array(0.0))])[1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_once(dtype):
    rng = np.random.default_rng(0)
    outs = [array(rng.standard_normal((2, 3, 64)), dtype) for _ in range(5)]
    lses = [array(rng.standard_normal((2, 3)), jnp.float32) for _ in range(5)]
    out, lse = merge(zip(outs, lses, strict=True))
    wide, _ = merge((x.astype(jnp.float32), y) for x, y in zip(outs, lses, strict=True))
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(wide.astype(dtype), np.float32))


def test_float64(x64):
    arrays, _ = draw(Case("", 3, 24, 4, 2, 8, "float64", CASE.lengths, sinks=("query", 2)))
    assert_close(merge(parts(arrays, [7])), whole(arrays), 1e-7)  # lse is float32


def test_transformations():
    arrays, _ = draw(CASE)
    partials = list(parts(arrays, [7, 15]))
    want = merge(partials)
    assert_close(jax.jit(merge)(partials), want)
    assert_close(jax.vmap(merge)(partials), want)
    assert_close(jax.vmap(merge, 1, 1)(partials), want)


PAIR = (jnp.zeros((2, 4, 8)), jnp.zeros((2, 4)))


@pytest.mark.parametrize(
    ("partials", "error", "message"),
    [
        ([], ValueError, "partials must hold one .* pair at least, got none"),
        ([PAIR, PAIR[0]], TypeError, r"must be \(out, lse\) pairs of arrays, got .* for partials\[1\]"),
        ([(PAIR[0],)], TypeError, r"got tuple for partials\[0\]"),
        ([PAIR, (None, None)], TypeError, r"got tuple for partials\[1\]"),
        (
            [PAIR[::-1]],
            ValueError,
            r"partials\[0\] must be out \[..., head_dim\] and lse \[...\], got shapes \(2, 4\) and \(2, 4, 8\)",
        ),
        ([PAIR, (PAIR[0][:1], PAIR[1][:1])], ValueError, r"got float32 \(2, 4, 8\) for partials\[0\] and float32 \(1, 4, 8\) for"),
        ([PAIR, (PAIR[0].astype(jnp.bfloat16), PAIR[1])], ValueError, r"bfloat16 \(2, 4, 8\) for partials\[1\]"),
        ([PAIR, (PAIR[0], PAIR[1].astype(jnp.bfloat16))], ValueError, r"must all have an lse of one shape and one floating dtype"),
        ([(PAIR[0].astype(jnp.int32), PAIR[1])], ValueError, r"got int32 \(2, 4, 8\) for partials\[0\]"),
    ],
)
def test_errors(partials, error, message):
    with pytest.raises(error, match=message):
        merge(partials)
