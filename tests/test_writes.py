"""A donated cache that one program writes and reads is not copied on a CPU, however it is written."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ejk_ragged import ragged_decode_attention


BATCH, ROWS, HEADS, DIM = 2, 65536, 4, 64
ALLOWED = 0.05  # of one cache array


def by_index(cache, new, end):
    return cache.at[jnp.arange(BATCH), end].set(new)


def by_slice(cache, new, end):
    return lax.dynamic_update_slice_in_dim(cache, new[:, None], end[0], 1)


def by_mask(cache, new, end):
    here = (jnp.arange(ROWS, dtype=jnp.int32)[None] == end[:, None])[..., None, None]
    return jnp.where(here, jnp.broadcast_to(new[:, None], cache.shape), cache)


def step(write, query, key, value, end):
    """Writes one row per sequence, then attends."""
    new = query[:, :HEADS].astype(key.dtype)
    key, value = (write(x, new, end) for x in (key, value))
    scales: dict[str, Any] = {"key_scale": 0.1, "value_scale": 0.1} if key.dtype == jnp.int8 else {}
    return ragged_decode_attention(query, key, value, sequence_end=end + 1, **scales), key, value


def in_scan(write, query, key, value, end):
    """Four steps, with the cache in the carry."""

    def one(carry, _):
        out, key, value = step(write, query, carry[0], carry[1], carry[2])
        return (key, value, carry[2] + 1), out

    (key, value, _), outs = lax.scan(one, (key, value, end), None, length=4)
    return outs, key, value


PADDED = (BATCH, ROWS, HEADS, DIM)
PROGRAMS = {"step": step, "scan": in_scan}


def temporary(function, write, dtype):
    """Temporary memory of the compiled program, as a fraction of one cache array."""
    query = jnp.float32 if jnp.dtype(dtype).itemsize == 1 else jnp.dtype(dtype)
    aval = jax.ShapeDtypeStruct
    arrays = aval((BATCH, 8, DIM), query), aval(PADDED, dtype), aval(PADDED, dtype), aval((BATCH,), jnp.int32)
    program = jax.jit(lambda *args: function(write, *args), donate_argnums=(1, 2)).lower(*arrays).compile()
    analysis: Any = program.memory_analysis()
    return analysis.temp_size_in_bytes / (BATCH * ROWS * HEADS * DIM * jnp.dtype(dtype).itemsize)


@pytest.mark.optimised
@pytest.mark.xla
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("write", [by_index, by_slice, by_mask])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_donated_cache_is_written_in_place(program, write, dtype):
    assert temporary(PROGRAMS[program], write, jnp.dtype(dtype)) < ALLOWED
