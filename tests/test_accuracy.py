"""Cases that amplify rounding, for every backend: keys that share a component, ranges of one key, large logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import array, weights

from ejk_ragged.testing import Case, oracle_gradients, relative_error, tolerance


def gradients(call, arguments, names=("query", "key", "value")):
    """Gradients of the output alone, for a cotangent that differs from element to element, and the oracle's gradients."""
    function = lambda *args: call(**arguments | dict(zip(names, args, strict=True)))
    out, pullback = jax.vjp(function, *[array(arguments[name]) for name in names])
    d_out = weights(out)
    want = oracle_gradients(**arguments, d_out=d_out, d_lse=np.zeros(out.shape[:-1]))
    return pullback(d_out), [getattr(want, name) for name in names], [want.size[name] for name in names]


def bound(dtype):
    """The bound on the relative error of a gradient."""
    return 2 * tolerance(dtype, 1000)


SHARED = [  # dtype, dtype of the cache, rows; 3000 rows are many for weights in float16
    ("bfloat16", None, 200),
    ("float16", None, 200),
    ("float16", None, 3000),
    ("bfloat16", "int8", 200),
    ("float16", "int8", 200),
    ("float16", "float8_e4m3fn", 200),
]


@pytest.mark.parametrize(("dtype", "cache_dtype", "seq_len"), SHARED)
def test_keys_that_share_a_component(subject, dtype, cache_dtype, seq_len):
    """The keys share a component ten times as large as their differences, as with a bias on K. The shared component cancels in
    d_query, because the gradients of the logits add up to 0."""
    case = Case("", 2, seq_len, 8, 2, 64, dtype, cache_dtype=cache_dtype, scales=cache_dtype and "row")
    arguments = case.draw()
    rng = np.random.default_rng(0)
    arguments["query"] = (0.3 * arguments["query"].astype(np.float32)).astype(arguments["query"].dtype)
    shared = 10 * rng.standard_normal((1, 1, 2, 64))
    key = arguments["key"].astype(np.float32)
    if cache_dtype is None:
        arguments["key"] = (key + shared).astype(arguments["key"].dtype)
    else:  # integers that eight bits can hold, with scales of 1
        arguments["key"] = np.rint(np.clip(key, -3, 3) + shared).astype(arguments["key"].dtype)
        arguments["key_scale"] = np.ones_like(arguments["key_scale"])
    names = ("query", "key", "value") if cache_dtype is None else ("query",)
    for got, want, _ in zip(*gradients(subject.call, arguments, names), strict=True):
        assert relative_error(got, want) < bound(dtype)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [("bfloat16", None), ("float16", None), ("bfloat16", "int8"), ("float16", "int8")]
)
def test_ranges_of_one_key(subject, dtype, cache_dtype):
    """The weight of the only key is 1, whatever query and key are. So their gradients are 0, up to the bound on the terms that
    cancel."""
    lengths = ("ranges", (0, 1), (17, 18), (39, 40), (5, 6))
    case = Case("", 4, 40, 8, 2, 64, dtype, lengths, cache_dtype=cache_dtype, scales=cache_dtype and "row")
    names = ("query", "key") if cache_dtype is None else ("query",)
    arguments = case.draw(poison=True)
    for got, want, size in zip(*gradients(subject.call, arguments, names), strict=True):
        assert np.linalg.norm(want) < 1e-9 * size
        assert np.linalg.norm(np.float64(got)) < 1e-5 * size


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 3e5}, {"sequence_start": [3]}, {"cache": "int8"}], ids=str)
@pytest.mark.optimised
def test_alike_keys_weigh_the_same(subject, options, size):
    """Equal keys: the output is the mean of the values. This must hold at any logit, in large and small chunks, and in the first
    and the last piece."""
    rng = np.random.default_rng(0)
    dtype, options = subject.dtypes[0], dict(options)
    query = jnp.broadcast_to(size / 64 * (1 + rng.random((1, 1, 24))), (1, 4, 24)).astype(dtype)
    key = jnp.broadcast_to(6 + rng.standard_normal((1, 1, 1, 24)), (1, 700, 2, 24)).astype(dtype)
    value = array(rng.standard_normal((1, 700, 2, 24)), dtype)
    start = options.get("sequence_start", [0])[0]
    if "sequence_start" in options:
        options["sequence_start"] = jnp.array([start], jnp.int32)
    if options.pop("cache", None):
        key, value = key.astype(jnp.int8), (30 * value).astype(jnp.int8)
        options["key_scale"] = jnp.full((1, 2, 700), 1.1, jnp.float32)
        options["value_scale"] = jnp.ones((1, 2, 700), jnp.float32)
    out = subject.call(query, key, value, softmax_scale=0.37, **options)
    want = np.repeat(np.asarray(value[:, start:], np.float64).mean(axis=1), 2, axis=1)
    assert relative_error(out, want) < max(1e-6, tolerance(dtype, out.size))


@pytest.mark.parametrize("size", [1e9, 1e12])
@pytest.mark.optimised
def test_gradients_beside_large_logits(subject, size):
    """Gradients are finite where the logits are. lse has lost its low bits at large logits, but no probability may be above 1."""
    arguments = Case("", 2, 60, 4, 2, 24, subject.dtypes[0]).draw()
    names = ("query", "key", "value")
    query, key, value = (array(arguments[name]) for name in names)
    factor = array(size**0.5, query.dtype)
    out, pullback = jax.vjp(functools.partial(subject.call), query * factor, key * factor, value)
    assert jnp.isfinite(out).all()
    for gradient in pullback(weights(out)):
        assert jnp.isfinite(gradient).all()
