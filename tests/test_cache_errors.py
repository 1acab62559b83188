"""What `KVCache` refuses, when it is made and when it is written to. Every error says what came and what is accepted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cache import BATCH, call, DIM, HEADS, new_rows, SEQ_LEN, TABLE, zeros

from ejk_ragged import KVCache


MAKE = {
    "size": ({"batch": 0}, ValueError, "batch must be a positive integer, got 0."),
    "size of a wrong type": ({"seq_len": 4.0}, TypeError, "seq_len must be a positive integer, got 4.0 of type float."),
    "page size": ({"page_size": -1}, ValueError, "page_size must be a positive integer, got -1."),
    "no dtype": (
        {"dtype": None},
        ValueError,
        "dtype must be one of float16, bfloat16, float32, float64, int8, float8_e4m3fn, float8_e5m2; got None.",
    ),
    "dtype": ({"dtype": "int4"}, ValueError, "dtype must be one of float16, bfloat16, float32, float64, int8, "),
    "value_dim": (
        {"value_columns": (0, 4), "value_dim": 8},
        ValueError,
        "value_dim must be None if value_columns is given, got 8 and (0, 4)",
    ),
    "row_dim": (
        {"row_dim": 16},
        ValueError,
        "row_dim must be None, or at least head_dim if value_columns is given; got row_dim 16, head_dim 8 and value_columns None.",
    ),
    "narrow rows": ({"row_dim": 4, "value_columns": (0, 4)}, ValueError, "got row_dim 4, head_dim 8 and value_columns (0, 4)."),
    "columns": ({"value_columns": (0, 9)}, ValueError, "value_columns must be (first, end) with 0 <= first < end <= 8"),
    "one column": ({"value_columns": 4}, ValueError, "value_columns must be two integers (first, end) or None, got 4."),
    "num_pages": (
        {"num_pages": 4},
        ValueError,
        "num_pages must be None for a padded cache, got 4. For a cache in pages, pass page_size.",
    ),
    "table": (
        {"page_table": TABLE},
        ValueError,
        "page_table must be None for a padded cache, got int32 of shape (3, 3). For a cache",
    ),
    "table's shape": (
        {"page_table": TABLE, "page_size": 3},
        ValueError,
        "page_table must be integers of shape (3, 4), the pages of each sequence in order; got int32 of shape (3, 3).",
    ),
    "table of floats": ({"page_table": TABLE * 1.0, "page_size": 4}, ValueError, "; got float32 of shape (3, 3)."),
    "table of a wrong type": ({"page_table": [1], "page_size": 4}, TypeError, "page_table must be an array, got [1] of type list."),
    "small pool": (
        {"page_size": 4, "num_pages": 8},
        ValueError,
        "page_table must be given for a pool of 8 pages, fewer than the 9 pages that 3 sequences of 3 pages need.",
    ),
}


@pytest.mark.parametrize("name", MAKE)
def test_errors_of_zeros(name):
    changes, error, message = MAKE[name]
    sizes = {"batch": BATCH, "seq_len": SEQ_LEN, "num_kv_heads": HEADS, "head_dim": DIM}
    with pytest.raises(error, match=re.escape(message)):
        KVCache.zeros(**sizes | changes)


PADDED, ROWS = np.zeros((3, 12, 2, 8), np.float32), np.zeros((3, 2, 12), np.float32)
HOLD = {
    "no key": ({"key": None, "value": PADDED}, TypeError, "key must be an array, got None."),
    "no value": (
        {"key": PADDED},
        ValueError,
        "value must be an array, got None. If the value is in the key's rows, pass ",
    ),
    "value and columns": (
        {"key": PADDED, "value": PADDED, "value_columns": (0, 4)},
        ValueError,
        "value_columns must be None for a cache with a value of its own",
    ),
    "shapes": (
        {"key": PADDED, "value": PADDED[:2]},
        ValueError,
        "key and value must have the same dtype, and the same shape but for ",
    ),
    "dtypes": ({"key": PADDED, "value": PADDED.astype(np.float16)}, ValueError, "value float16 of shape (3, 12, 2, 8)."),
    "axes": (
        {"key": ROWS, "value": ROWS},
        ValueError,
        "key must be [batch, seq_len, num_kv_heads, row_dim], got shape (3, 2, 12).",
    ),
    "scales of floats": (
        {"key": PADDED, "value": PADDED, "key_scale": ROWS},
        ValueError,
        "key_scale must be None for a cache of floats",
    ),
    "no scales": (
        {"key": PADDED.astype(np.int8), "value_columns": (0, 4)},
        ValueError,
        "key_scale must be given for an int8 cache",
    ),
    "scales' axes": (
        {"key": PADDED.astype(np.int8), "value_columns": (0, 4), "key_scale": ROWS.swapaxes(1, 2)},
        ValueError,
        "key_scale must be a number, or floats of shape ",
    ),
    "table": (
        {"key": PADDED, "value": PADDED, "page_table": ROWS},
        ValueError,
        "page_table must be integers of shape (3, pages), ",
    ),
}


@pytest.mark.parametrize("name", HOLD)
def test_errors_of_plain_arrays(name):
    arrays, error, message = HOLD[name]
    with pytest.raises(error, match=re.escape(message)):
        KVCache(**arrays)


KEY, ONE = jax.ShapeDtypeStruct((3, 4, 2, 8), jnp.float32), jax.ShapeDtypeStruct((3, 2, 8), jnp.float32)
AT_0, INT8 = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((3, 4, 2, 8), jnp.int8)
GOOD = {"key": KEY, "value": KEY, "at": AT_0}
WRITE = {
    "shape": (
        {},
        {"key": jax.ShapeDtypeStruct((3, 4, 1, 8), jnp.float32)},
        "key must have shape (3, num_tokens, 2, 8), or (3, 2, 8) for one token per sequence; got (3, 4, 1, 8) for a cache whose "
        "key is (3, 12, 2, 8), [batch, seq_len, num_kv_heads, row_dim].",
    ),
    "shape of a value": ({"value_dim": 16}, {}, "value must have shape (3, num_tokens, 2, 16), or (3, 2, 16) for one token"),
    "shape of a pool": (
        {"page_size": 4},
        {"key": ONE, "value": KEY, "at": AT_0},
        "key and value must have the same tokens, got key",
    ),
    "no tokens": ({}, {"key": jax.ShapeDtypeStruct((3, 0, 2, 8), jnp.float32)}, "key must have shape (3, num_tokens, 2, 8)"),
    "rows": (
        {"value_columns": (0, 8), "row_dim": 16},
        {"value": None},
        "key must have shape (3, num_tokens, 2, 16), or (3, 2, 16)",
    ),
    "value in the rows": (
        {"value_columns": (0, 4)},
        {},
        "value must be None for a cache whose value is in the key's rows (value_columns=(0, 4)), got float32 "
        "of shape (3, 4, 2, 8). Pass whole rows as key.",
    ),
    "no value": ({}, {"value": None}, "value must be an array, got None of type NoneType."),
    "no key": ({}, {"key": 1.0}, "key must be an array, got 1.0 of type float."),
    "dtype": (
        {"dtype": "bfloat16"},
        {},
        "key must have the cache's dtype, bfloat16, got float32. Pass key.astype('bfloat16'), or make the cache with dtype='float3",
    ),
    "quantised already": (
        {"dtype": "int8"},
        {"key": INT8},
        "key must be floats (float16, bfloat16, float32, float64), which write ",
    ),
    "at of floats": (
        {},
        {"at": jax.ShapeDtypeStruct((3,), jnp.float32)},
        "at must be integers of shape (3,), the row of each sequence",
    ),
    "at of a pool": ({"page_size": 2}, {"at": jax.ShapeDtypeStruct((18,), jnp.int32)}, "at must be integers of shape (3,)"),
    "one at": ({}, {"at": 0}, "at must be an array, got 0 of type int. Pass one integer per sequence: jnp.full(batch, 0)."),
    "lengths": (
        {},
        {"lengths": jax.ShapeDtypeStruct((4,), jnp.int32)},
        "lengths must be None or integers of shape (3,), got int32 of",
    ),
}


@pytest.mark.parametrize("name", WRITE)
def test_errors_of_write(name):
    layout, changes, message = WRITE[name]
    cache = jax.eval_shape(lambda: KVCache.zeros(BATCH, SEQ_LEN, HEADS, DIM, **{"dtype": "float32"} | layout))
    error = TypeError if "must be an array" in message else ValueError
    with pytest.raises(error, match=re.escape(message)):
        cache.write(**GOOD | changes)


def test_a_stack_is_not_written_to_as_one():
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), zeros({}))
    with pytest.raises(
        ValueError, match=r"write needs a cache of one layer, .* got key \(2, 3, 12, 2, 8\)\. Map write .* jax\.vmap\."
    ):
        stacked.write(*new_rows(zeros({}), 1), np.zeros(3, np.int32))


def test_scales_that_are_not_of_rows():
    """A scale per head is good for a call, but `write` cannot fill it."""
    stored, head = PADDED.astype(np.int8), np.ones(2, np.float32)
    cache = KVCache(stored, stored, head, head)
    assert call(np.ones((3, 4, 8), np.float32), **cache.arguments()).shape == (3, 4, 8)
    message = "key_scale of the cache must have one scale per row, shape (3, 2, 12), for write to fill; got shape (2,)."
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.write(*new_rows(cache, 1), np.zeros(3, np.int32))
