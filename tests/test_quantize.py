"""`quantize`: how far the stored numbers are from the given ones, and which numbers cannot be stored; and that a quantised cache
has no gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import array, draw

from ejk_ragged import quantize, ragged_decode_attention
from ejk_ragged.testing import Case, TextbookBackend


# Half a step, relative to the row's largest value. A step of int8 is 1 of 127. The floats have 4 and 3 significant bits, the bit
# that is not stored included. Small floats have other steps.
HALF_STEPS = {"int8": 0.5 / 127, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}

each_dtype = pytest.mark.parametrize("dtype", HALF_STEPS)


def rows(*shape, dtype="float32"):
    return array(np.random.default_rng(0).standard_normal(shape), dtype)


@each_dtype
@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16"])
def test_round_trip(dtype, given):
    """Rows of any size. The largest value of a row is stored as the largest number of the dtype."""
    sizes = jnp.array([1e-3, 1.0, 300.0], given)[:, None, None]
    x = rows(3, 5, 32, dtype=given) * sizes
    stored, scale = quantize(x, dtype)
    assert (stored.dtype, stored.shape) == (jnp.dtype(dtype), x.shape)
    assert (scale.dtype, scale.shape) == (jnp.float32, (3, 5))
    x, back = (np.asarray(y, np.float64) for y in (x, stored.astype(jnp.float32) * scale[..., None]))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert np.all(np.abs(back - x) <= HALF_STEPS[dtype] * largest * (1 + 1e-5))
    top = 127 if dtype == "int8" else float(jnp.finfo(dtype).max)
    np.testing.assert_array_equal(np.abs(np.asarray(stored, np.float32)).max(axis=-1), np.full((3, 5), top))


@each_dtype
def test_scales_lie_as_a_call_takes_them(dtype):
    """The scales of a whole cache have the rows last. The scales of one step's rows can be written into them."""
    cache = rows(2, 7, 3, 8)
    stored, scale = quantize(cache, dtype)
    assert scale.shape == (2, 3, 7)
    for i in range(7):
        row, row_scale = quantize(cache[:, i], dtype)
        np.testing.assert_array_equal(np.asarray(row, np.float32), np.asarray(stored[:, i], np.float32))
        np.testing.assert_array_equal(row_scale, scale[:, :, i])


@each_dtype
@pytest.mark.parametrize("value", [0.0, 1e-44, 2.5, -3e38])
def test_constants(dtype, value):
    """Zeros stay zeros, and nothing becomes NaN or infinite, however small or large a constant is."""
    stored, scale = quantize(jnp.full((2, 16), value, jnp.float32), dtype)
    assert np.all(np.asarray(scale) > 0)
    assert np.isfinite(np.asarray(stored, np.float32)).all()
    want = 0.0 if abs(value) < 1e-38 else value  # below the normal range of floats the result is 0
    np.testing.assert_allclose(np.asarray(stored, np.float32) * np.asarray(scale)[:, None], np.full((2, 16), want), rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (np.ones((2, 8), np.int32), "int8", "x must be rows [..., head_dim] of float16, bfloat16, float32, float64; got int32"),
        (np.float32(1), "int8", "got float32 of shape ()."),
        (np.ones((2, 0), np.float32), "int8", "got float32 of shape (2, 0)."),
        (np.ones((2, 8), np.float32), "int4", "dtype must be one of int8, float8_e4m3fn, float8_e5m2; got int4."),
    ],
    ids=["integers", "no axis", "no column", "int4"],
)
def test_errors(x, dtype, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(x, dtype)


@pytest.mark.parametrize(
    ("cache_dtype", "name"),
    [
        ("int8", "key_scale"),
        ("int8", "value_scale"),
        ("float8_e5m2", "key"),
        ("float8_e5m2", "value"),
        ("float8_e5m2", "key_scale"),
    ],
)
def test_a_quantised_cache_has_no_gradient(cache_dtype, name):
    """The error says what to write instead, and that works."""
    arrays, _ = draw(Case("", 2, 12, 4, 2, 8, cache_dtype=cache_dtype, scales="row"))
    call = functools.partial(ragged_decode_attention, backend=TextbookBackend())
    loss = lambda x, query: jnp.sum(call(**arrays | {name: x, "query": query}))
    message = rf"{name} of a quantised cache has no gradient, .* pass jax.lax.stop_gradient\({name}\)"
    with pytest.raises(ValueError, match=message):
        jax.grad(loss)(arrays[name], arrays["query"])
    stopped = jax.grad(lambda x, query: loss(jax.lax.stop_gradient(x), query), 1)(arrays[name], arrays["query"])
    assert np.any(np.asarray(stopped))
