"""Bad input: the type of the error, what its message names, and that it is raised while tracing."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ejk_ragged import explain, FwdParams, KVCache, quantize, ragged_decode_attention
from ejk_ragged.testing import TextbookBackend


B, S, HQ, HKV, D = 2, 12, 4, 2, 8


def aval(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


QUERY, CACHE = aval(B, HQ, D), aval(B, S, HKV, D)
INT8 = {name: aval(B, S, HKV, D, dtype="int8") for name in ("key", "value")}
SCALED = INT8 | {"key_scale": 1.0, "value_scale": 1.0}
GOOD = {"query": QUERY, "key": CACHE, "value": CACHE}
N, PAGE = 9, 4
POOL, TABLE = aval(N, PAGE, HKV, D), aval(B, 3, dtype="int32")
PAGES = {"key": POOL, "value": POOL, "page_table": TABLE}
INT8_PAGES = {name: aval(N, PAGE, HKV, D, dtype="int8") for name in ("key", "value")} | {"page_table": TABLE}
ROWS = {"key": aval(B, S, HKV, 12), "value": None, "value_columns": (4, 12), "softmax_scale": 0.3}

# The change to a good call, the error, and its message, which names the argument, what came and what is accepted.
ERRORS = {
    # shapes
    "query rank": (
        {"query": aval(B, D)},
        ValueError,
        "query must be [batch, num_q_heads, head_dim] or [batch, num_tokens, num_q_heads, head_dim], got shape (2, 8).",
    ),
    "key rank": (
        {"key": aval(B, S, D)},
        ValueError,
        "key must be [batch, seq_len, num_kv_heads, head_dim], got shape (2, 12, 8).",
    ),
    "value rank": (
        {"value": aval(B, S, D)},
        ValueError,
        "value must be [batch, seq_len, num_kv_heads, head_dim], got shape (2, 12, 8).",
    ),
    "key and value lengths": (
        {"value": aval(B, S + 1, HKV, D)},
        ValueError,
        "key and value must have the same shape but for the last axis, got key (2, 12, 2, 8) and value (2, 13, 2, 8).",
    ),
    "key and value heads": (
        {"value": aval(B, S, 2 * HKV, D)},
        ValueError,
        "key and value must have the same shape but for the last axis, got key (2, 12, 2, 8) and value (2, 12, 4, 8).",
    ),
    "batch": (
        {"query": aval(3, HQ, D)},
        ValueError,
        "query and key must have the same batch, got query (3, 4, 8) and key (2, 12, 2, 8).",
    ),
    "head dim": (
        {"query": aval(B, HQ, 16)},
        ValueError,
        "query and key must have the same head_dim, got query (2, 4, 16) and key (2, 12, 2, 8).",
    ),
    "group": (
        {"query": aval(B, 5, D)},
        ValueError,
        "query must have a multiple of key's num_kv_heads, got 5 query heads and 2 kv heads.",
    ),
    "fewer query heads": (
        {"query": aval(B, 1, D)},
        ValueError,
        "query must have a multiple of key's num_kv_heads, got 1 query heads and 2 kv heads.",
    ),
    "no query heads": ({"query": aval(B, 0, D)}, ValueError, "query must not be empty, got shape (2, 0, 8)."),
    "no rows": (
        {"key": aval(B, 0, HKV, D), "value": aval(B, 0, HKV, D)},
        ValueError,
        "key must not be empty, got shape (2, 0, 2, 8).",
    ),
    "no batch": (
        {"query": aval(0, HQ, D), "key": aval(0, S, HKV, D), "value": aval(0, S, HKV, D)},
        ValueError,
        "query must not be empty, got shape (0, 4, 8).",
    ),
    # dtypes
    "dtypes differ": (
        {"query": aval(B, HQ, D, dtype="bfloat16")},
        ValueError,
        "query, key and value must have the same dtype, got query bfloat16, key float32, value float32.",
    ),
    "value dtype differs": (
        {"value": aval(B, S, HKV, D, dtype="float16")},
        ValueError,
        "query, key and value must have the same dtype, got query float32, key float32, value float16.",
    ),
    "integers": (
        {"query": aval(B, HQ, D, dtype="int32")},
        ValueError,
        "query must have one of the dtypes float16, bfloat16, float32, float64; got int32.",
    ),
    "complex": ({"value": aval(B, S, HKV, D, dtype="complex64")}, ValueError, "value must have one of the dtypes"),
    "one of two quantised": (
        {"key": aval(B, S, HKV, D, dtype="float8_e4m3fn")},
        ValueError,
        "query, key and value must have the same dtype, got query float32, key float8_e4m3fn, value float32. Key and value of a "
        "quantised cache have one of int8, float8_e4m3fn, float8_e5m2, both the same.",
    ),
    "quantised query": ({"query": aval(B, HQ, D, dtype="int8")}, ValueError, "query must have one of the dtypes float16,"),
    "int4": ({"key": aval(B, S, HKV, D, dtype="int4")}, ValueError, "key must have one of the dtypes float16, bfloat16, float32, "),
    # quantised caches
    "int8 without scales": (INT8, ValueError, "key_scale must be given for an int8 cache, got None. `quantize` returns the scale "),
    "int8 without one scale": (INT8 | {"key_scale": 1.0}, ValueError, "value_scale must be given for an int8 cache, got None"),
    "scale of a cache of floats": (
        {"value_scale": aval(HKV)},
        ValueError,
        "value_scale must be None for a cache of floats, got float32 of shape (2,) and key of dtype float32. Scales are for a "
        "cache of one of int8, float8_e4m3fn, float8_e5m2.",
    ),
    "scale of query heads": (
        SCALED | {"key_scale": aval(HQ)},
        ValueError,
        "key_scale must be a number, or floats of shape [num_kv_heads] (2,), [batch, num_kv_heads] (2, 2) or "
        "[batch, num_kv_heads, seq_len] (2, 2, 12); got float32 of shape (4,).",
    ),
    "scale with heads last": (
        SCALED | {"value_scale": aval(B, S, HKV)},
        ValueError,
        "got float32 of shape (2, 12, 2).",
    ),
    "scale of integers": (
        SCALED | {"value_scale": aval(HKV, dtype="int32")},
        ValueError,
        "got int32 of shape (2,).",
    ),
    "scale is a flag": (
        SCALED | {"key_scale": True},
        TypeError,
        "key_scale must be an array, got True of type bool.",
    ),
    # tokens
    "lengths of one token": (
        {"query_lengths": aval(B, dtype="int32")},
        ValueError,
        "query_lengths must be None for a query of one token per sequence, [batch, num_q_heads, head_dim]; got query (2, 4, 8). "
        "For several tokens the query is [batch, num_tokens, num_q_heads, head_dim].",
    ),
    "lengths of tokens": (
        {"query": aval(B, 3, HQ, D), "query_lengths": aval(3, dtype="int32")},
        ValueError,
        "query_lengths must be None or integers of shape (2,), got int32 of shape (3,).",
    ),
    "group of tokens": (
        {"query": aval(B, 3, 5, D)},
        ValueError,
        "query must have a multiple of key's num_kv_heads, got 5 query heads and 2 kv heads.",
    ),
    "no tokens": ({"query": aval(B, 0, HQ, D)}, ValueError, "query must not be empty, got shape (2, 0, 4, 8)."),
    "query is no array": ({"query": [[1.0]]}, TypeError, "query must be an array, got [[1.0]] of type list."),
    "key is None": ({"key": None}, TypeError, "key must be an array, got None of type NoneType."),
    # lengths
    "start batch": (
        {"sequence_start": aval(3, dtype="int32")},
        ValueError,
        "sequence_start must be None or integers of shape (2,), got int32 of shape (3,).",
    ),
    "end rank": (
        {"sequence_end": aval(B, 1, dtype="int32")},
        ValueError,
        "sequence_end must be None or integers of shape (2,), got int32 of shape (2, 1).",
    ),
    "end floats": (
        {"sequence_end": aval(B)},
        ValueError,
        "sequence_end must be None or integers of shape (2,), got float32 of shape (2,).",
    ),
    "end booleans": ({"sequence_end": aval(B, dtype="bool")}, ValueError, "sequence_end must be None or integers"),
    "end scalar": ({"sequence_end": aval(dtype="int32")}, ValueError, "got int32 of shape ()."),
    "end number": (
        {"sequence_end": 7},
        TypeError,
        "sequence_end must be an array, got 7 of type int. Pass one integer per sequence: jnp.full(batch, 7).",
    ),
    "start list": (
        {"sequence_start": [0, 1]},
        TypeError,
        "sequence_start must be an array, got [0, 1] of type list. Pass jnp.asarray(sequence_start).",
    ),
    # sinks
    "sink heads": (
        {"softmax_aux": aval(3, 1)},
        ValueError,
        "softmax_aux must have shape (num_sinks,), (4, num_sinks) for query heads or (2, num_sinks) for kv heads; got (3, 1).",
    ),
    "sink rank": ({"softmax_aux": aval(1, HQ, 1)}, ValueError, "got (1, 4, 1)."),
    "sink scalar": ({"softmax_aux": aval()}, ValueError, "got ()."),
    "no sinks": ({"softmax_aux": aval(HQ, 0)}, ValueError, "got (4, 0)."),
    "sink dtype": (
        {"softmax_aux": aval(HQ, 1, dtype="int32")},
        ValueError,
        "softmax_aux must have one of the dtypes float16, bfloat16, float32, float64; got int32.",
    ),
    "sink number": ({"softmax_aux": 1.0}, TypeError, "softmax_aux must be an array, got 1.0 of type float."),
    # scale, cap, window, hints
    "scale infinite": ({"softmax_scale": np.inf}, ValueError, "softmax_scale must be finite or None, got inf."),
    "scale beyond float32": (
        {"softmax_scale": 1e39},
        ValueError,
        "softmax_scale must be finite in float32, the dtype of logits, or None; got 1e+39.",
    ),
    "scale beyond floats": ({"softmax_scale": 10**400}, ValueError, "softmax_scale must be finite or None, got 1000"),
    "scale text": (
        {"softmax_scale": "1"},
        TypeError,
        "softmax_scale must be a number known while tracing, or None; got '1' of type str.",
    ),
    "scale boolean": ({"softmax_scale": True}, TypeError, "softmax_scale must be a number"),
    "cap zero": ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be positive and finite, or None; got 0.0."),
    "cap negative": ({"logits_soft_cap": -1}, ValueError, "logits_soft_cap must be positive and finite, or None; got -1."),
    "cap infinite": ({"logits_soft_cap": float("inf")}, ValueError, "must be positive and finite, or None; got inf."),
    "cap beyond floats": ({"logits_soft_cap": 10**400}, ValueError, "must be positive and finite, or None; got 1000"),
    "cap NaN": ({"logits_soft_cap": float("nan")}, ValueError, "must be positive and finite, or None; got nan."),
    "cap list": ({"logits_soft_cap": [1.0]}, TypeError, "got [1.0] of type list."),
    "window number": (
        {"sliding_window": 4096},
        ValueError,
        "sliding_window must be two integers (left, right) or None, got 4096.",
    ),
    "window of one": ({"sliding_window": (1,)}, ValueError, "got (1,)."),
    "window of three": ({"sliding_window": (1, 2, 3)}, ValueError, "got (1, 2, 3)."),
    "window floats": ({"sliding_window": (1.0, 0)}, ValueError, "got (1.0, 0)."),
    "window of booleans": ({"sliding_window": (True, False)}, ValueError, "got (True, False)."),
    "window text": ({"sliding_window": "ab"}, ValueError, "got 'ab'."),
    "hints": (
        {"fwd_params": {"num_warps": 4}},
        TypeError,
        "fwd_params must be an ejk_ragged.FwdParams or None, got {'num_warps': 4}.",
    ),
    # pages
    "page table of floats": (
        PAGES | {"page_table": aval(B, 3)},
        ValueError,
        "page_table must be integers of shape (2, pages), the pages of each sequence in order, or None for a padded cache; got "
        "float32 of shape (2, 3).",
    ),
    "page table of booleans": (PAGES | {"page_table": aval(B, 3, dtype="bool")}, ValueError, "got bool of shape (2, 3)."),
    "page table of another batch": (PAGES | {"page_table": aval(3, 3, dtype="int32")}, ValueError, "got int32 of shape (3, 3)."),
    "page table of one axis": (PAGES | {"page_table": aval(B, dtype="int32")}, ValueError, "got int32 of shape (2,)."),
    "page table without entries": (PAGES | {"page_table": aval(B, 0, dtype="int32")}, ValueError, "got int32 of shape (2, 0)."),
    "page table of a wrong type": (
        PAGES | {"page_table": [[0]]},
        TypeError,
        "page_table must be an array, got [[0]] of type list.",
    ),
    "pool rank": (
        PAGES | {"key": aval(N * PAGE, HKV, D)},
        ValueError,
        "key must be [num_pages, page_size, num_kv_heads, head_dim], got shape (36, 2, 8).",
    ),
    "pools of different pages": (
        PAGES | {"value": aval(N, 2 * PAGE, HKV, D)},
        ValueError,
        "key and value must have the same shape but for the last axis, got key (9, 4, 2, 8) and value (9, 8, 2, 8). Both are "
        "[num_pages, page_size, num_kv_heads, ...].",
    ),
    "pools of another number of pages": (
        PAGES | {"value": aval(N + 1, PAGE, HKV, D)},
        ValueError,
        "got key (9, 4, 2, 8) and value (10, 4, 2, 8).",
    ),
    "pool without pages": (
        PAGES | {"key": aval(0, PAGE, HKV, D), "value": aval(0, PAGE, HKV, D)},
        ValueError,
        "key must not be empty, got shape (0, 4, 2, 8).",
    ),
    "pool of another head dim": (
        PAGES | {"key": aval(N, PAGE, HKV, 16)},
        ValueError,
        "query and key must have the same head_dim, got query (2, 4, 8) and key (9, 4, 2, 16).",
    ),
    "lengths beside pages": (
        PAGES | {"sequence_end": aval(N, dtype="int32")},
        ValueError,
        "sequence_end must be None or integers of shape (2,), got int32 of shape (9,).",
    ),
    "scales by sequence beside pages": (
        INT8_PAGES | {"key_scale": aval(B, HKV), "value_scale": 1.0},
        ValueError,
        "key_scale must be a number, or floats of shape [num_kv_heads] (2,) or [num_pages, num_kv_heads, page_size] (9, 2, 4); "
        "got float32 of shape (2, 2).",
    ),
    "scales by row of sequences beside pages": (
        INT8_PAGES | {"key_scale": 1.0, "value_scale": aval(B, HKV, 12)},
        ValueError,
        "value_scale must be a number, or floats of shape [num_kv_heads] (2,) or [num_pages, num_kv_heads, page_size] (9, 2, 4); "
        "got float32 of shape (2, 2, 12).",
    ),
    "int8 pool without scales": (INT8_PAGES, ValueError, "key_scale must be given for an int8 cache, got None"),
    # values in the key's rows
    "no value": (
        {"value": None},
        ValueError,
        "value must be an array, or None with value_columns=(first, end), the columns of key's rows that are the value; got None "
        "without value_columns.",
    ),
    "columns and a value": (
        {"value_columns": (0, 4)},
        ValueError,
        "value_columns must be None for a cache with a value of its own, got (0, 4) and value (2, 12, 2, 8). Pass value=None if "
        "the value is in the key's rows.",
    ),
    "columns beyond the rows": (
        ROWS | {"value_columns": (4, 13)},
        ValueError,
        "value_columns must be (first, end) with 0 <= first < end <= 12, the columns of key's rows; got (4, 13) and key "
        "(2, 12, 2, 12).",
    ),
    "no columns": (ROWS | {"value_columns": (4, 4)}, ValueError, "0 <= first < end <= 12, the columns of key's rows; got (4, 4)"),
    "columns from the end": (
        ROWS | {"value_columns": (-4, 12)},
        ValueError,
        "0 <= first < end <= 12, the columns of key's rows; got",
    ),
    "columns of one number": (
        ROWS | {"value_columns": 8},
        ValueError,
        "value_columns must be two integers (first, end) or None, got 8.",
    ),
    "three columns": (ROWS | {"value_columns": (0, 4, 8)}, ValueError, "must be two integers (first, end) or None, got (0, 4, 8)."),
    "columns of floats": (ROWS | {"value_columns": (0.0, 4.0)}, ValueError, "two integers (first, end) or None, got (0.0, 4.0)."),
    "rows narrower than the query": (
        ROWS | {"key": aval(B, S, HKV, 6), "value_columns": (0, 6)},
        ValueError,
        "query must have no more columns than key's rows, of which the first head_dim are the key; got query (2, 4, 8) and key "
        "(2, 12, 2, 6).",
    ),
    "rows without a scale of the logits": (
        ROWS | {"softmax_scale": None},
        ValueError,
        "softmax_scale must be given where the value is in the key's rows (value=None), got None. The default, head_dim ** -0.5, "
        "is wrong for MLA",
    ),
    # backends
    "unknown backend": (
        {"backend": "cudnn"},
        ValueError,
        r"backend must be None, 'auto', a Backend or one of .*\bxla\b.*; got 'cudnn'\.",
    ),
    "backend of a wrong type": (
        {"backend": 3},
        TypeError,
        r"backend must be None, 'auto', a Backend instance or one of .*\bxla\b.*; got 3 of type int\.",
    ),
    "backend class": (
        {"backend": TextbookBackend},
        TypeError,
        r"got <class '.*\.TextbookBackend'> of type ABCMeta\.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    """The call and `explain` raise the error from shapes alone: no array exists."""
    changes, error, message = ERRORS[name]
    pattern = message if name in ("unknown backend", "backend of a wrong type", "backend class") else re.escape(message)
    kwargs = GOOD | changes
    arrays = {name: x for name, x in kwargs.items() if isinstance(x, jax.ShapeDtypeStruct)}
    rest = {name: x for name, x in kwargs.items() if name not in arrays}
    with pytest.raises(error, match=pattern):
        jax.eval_shape(functools.partial(ragged_decode_attention, **rest), **arrays)
    with pytest.raises(error, match=pattern):
        explain(**kwargs)


@pytest.mark.parametrize("name", ["softmax_scale", "logits_soft_cap"])
def test_traced_settings(name):
    arrays: list[Any] = [jnp.ones(x.shape, x.dtype) for x in GOOD.values()]
    call = lambda x: ragged_decode_attention(*arrays, **{name: x})
    with pytest.raises(TypeError, match=f"{name} must be a number known while tracing, or None; got .* of type .*Tracer"):
        jax.jit(call)(1.0)
    assert call(np.float32(1.0)).shape == QUERY.shape  # numbers of any type are accepted
    assert call(1).shape == QUERY.shape


class Refusing(TextbookBackend):
    def supports(self, problem, target):
        return f"it has no head dimension {problem.head_dim}"


class Elsewhere(TextbookBackend):
    platforms = frozenset({"tpu"})


def test_named_backend_that_cannot():
    """The error says why the backend cannot do the call, and which backend can. It is raised while tracing if the backend can do
    the call on none of its platforms."""
    message = (
        r"backend 'textbook' cannot do this call \(B 2, S 12, heads 4:2, D 8, float32\) on cpu: it has no head dimension 8\. "
        r"Backends that can: .*\bxla\b"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(ragged_decode_attention, backend=Refusing()), **GOOD)


def test_named_backend_of_another_platform():
    """That the backend cannot run here is known only when the call is lowered for this platform."""
    call = functools.partial(ragged_decode_attention, backend=Elsewhere())
    assert jax.eval_shape(call, **GOOD).shape == QUERY.shape
    device = jax.devices("cpu")[0]
    arrays = [jax.device_put(jnp.ones(x.shape, x.dtype), device) for x in GOOD.values()]
    with pytest.raises(ValueError, match=r"on cpu: it runs on tpu, not on cpu\. Backends that can: .*\bxla\b"):
        call(*arrays)


# ---------------------------------------------------------------------------------------------------------------------------
# FwdParams

FIELDS = [field.name for field in dataclasses.fields(FwdParams) if field.name != "others"]


def test_fields():
    assert FIELDS == ["block_size_heads", "block_size_keys", "num_key_splits", "num_warps", "num_stages"]
    assert FwdParams() == FwdParams(None, None, None, None, None)


@pytest.mark.parametrize("field", FIELDS)
def test_fwd_params_checks(field):
    made = lambda x: FwdParams(**{field: x})
    for bad in (0, -1):
        with pytest.raises(ValueError, match=rf"FwdParams\.{field} must be a positive integer or None, got {bad}\."):
            made(bad)
    for bad in (1.0, "1", True, jnp.ones((), jnp.int32)):
        with pytest.raises(TypeError, match=rf"FwdParams\.{field} must be a positive integer or None, got "):
            made(bad)
    assert type(getattr(made(np.int64(3)), field)) is int


def test_fwd_params_are_frozen_and_hashable():
    four: Any = np.int32(4)  # a field is an int, whatever integer type it is made of
    assert hash(FwdParams(num_warps=4)) == hash(FwdParams(num_warps=four))
    with pytest.raises(dataclasses.FrozenInstanceError):
        FwdParams().num_warps = 4  # pyright: ignore[reportAttributeAccessIssue] since it is frozen


def test_fwd_params_over():
    merged = FwdParams(num_warps=8).over(FwdParams(num_warps=4, num_stages=2))
    assert merged == FwdParams(num_warps=8, num_stages=2)


def test_other_hints():
    """A backend's own hints are kept by name. They are given, merged and compared like the fields."""
    two: Any = np.int64(2)
    hints = FwdParams(num_warps=4, others={"unroll": two, "depth": 3})
    assert hints == FwdParams(num_warps=4, others=(("depth", 3), ("unroll", 2)))
    assert hash(hints) == hash(FwdParams.of({"unroll": 2, "num_warps": 4, "depth": 3}))
    assert hints.given == {"num_warps": 4, "depth": 3, "unroll": 2}
    assert hints != FwdParams(num_warps=4)
    assert FwdParams(others={"depth": 5}).over(hints).given == {"num_warps": 4, "depth": 5, "unroll": 2}
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"depth": 0}, ValueError, r"FwdParams\.others\['depth'\] must be a positive integer or None, got 0\."),
        ({"depth": "3"}, TypeError, r"FwdParams\.others\['depth'\] must be a positive integer"),
        ({3: 3}, TypeError, r"FwdParams\.others must have strings as names, got 3"),
        ({"num_warps": 4}, ValueError, r"FwdParams\.others has 'num_warps', which is a field: pass FwdParams\(num_warps=4\)\."),
    ]
    for others, error, says in wrong:
        with pytest.raises(error, match=says):
            FwdParams(others=others)


# ---------------------------------------------------------------------------------------------------------------------------
# Mistakes that users make, and the way out that the message names

ONES, ROWS_OF_ONES = jnp.ones((B, HQ, D)), jnp.ones((B, S, HKV, D))
CALL: Any = ragged_decode_attention
REF: Any = jax.new_ref(ROWS_OF_ONES)


@pytest.mark.parametrize(
    ("mistake", "error", "says"),
    [
        (
            lambda: CALL(ONES, quantize(ROWS_OF_ONES), quantize(ROWS_OF_ONES)),
            TypeError,
            ["key must be an array, got (int8 of shape (2, 12, 2, 8)", "unpack it: key, key_scale = quantize(...)"],
        ),
        (lambda: CALL(ONES, KVCache(ROWS_OF_ONES, ROWS_OF_ONES), None), TypeError, ["got KVCache(", "**cache.arguments()"]),
        (lambda: CALL(ONES, ROWS_OF_ONES[:1], ROWS_OF_ONES[:1]), ValueError, ["the same batch", "pass page_table"]),
        (lambda: CALL(ONES, REF, ROWS_OF_ONES), TypeError, ["jax.Ref", "key[...]"]),
        (lambda: quantize(REF), TypeError, ["jax.Ref", "x[...]"]),
        (
            lambda: CALL(ONES, ROWS_OF_ONES, ROWS_OF_ONES, sliding_window=16),
            ValueError,
            ["sliding_window must be two integers", "got 16", "pass (15, 0)"],
        ),
        (
            lambda: CALL(ONES, ROWS_OF_ONES.swapaxes(1, 2), ROWS_OF_ONES.swapaxes(1, 2)),
            ValueError,
            ["[batch, num_kv_heads, seq_len, head_dim]", "key.transpose(0, 2, 1, 3)", "recipes"],
        ),
        (
            lambda: CALL(ONES.swapaxes(0, 1), ROWS_OF_ONES, ROWS_OF_ONES),
            ValueError,
            ["[num_q_heads, batch, head_dim]", "query.transpose(1, 0, 2)"],
        ),
        (
            lambda: CALL(ONES, ROWS_OF_ONES, ROWS_OF_ONES, backend=ROWS_OF_ONES),
            TypeError,
            ["backend must be None, 'auto', a Backend instance", "float32 of shape"],
        ),
    ],
    ids=[
        "pairs",
        "cache",
        "pool without a table",
        "ref",
        "ref to quantise",
        "window of one number",
        "heads first",
        "swapped query",
        "an array for a backend",
    ],
)
def test_the_way_out(mistake, error, says):
    with pytest.raises(error) as caught:
        mistake()
    message = str(caught.value)
    assert [part for part in says if part not in message] == []
    assert len(message) < 700  # the message does not print the numbers of an array


def test_explain_knows_platforms_by_jax_names():
    explanation = explain(**GOOD)
    assert explanation["gpu"] == explanation["cuda"]
    with pytest.raises(KeyError, match="cpu, cuda"):
        explanation["metal"]
