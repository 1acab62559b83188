"""A donated cache that one program writes and reads is not copied on a CPU, however it is written."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import planned

from ejk_ragged import ragged_decode_attention


ALLOWED = 0.05  # of one cache array
SHAPES = {
    "several sequences": (2, 65536, 4, 64),
    "one sequence": (1, 131072, 4, 64),
    "one kv head": (2, 262144, 64),
    "one sequence of one kv head": (1, 524288, 64),
}
DTYPES = ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"]


# A cache is [B, S, Hkv, D] or [B, S, D], with rows along axis 1, or [B, Hkv, S, D], with rows along axis 2. `new` has one row for
# each sequence.


def by_index(cache, new, end, rows=1):
    sequences = jnp.arange(len(end))
    return cache.at[(sequences, end) if rows == 1 else (sequences, slice(None), end)].set(new)


def by_slice(cache, new, end, rows=1):
    return lax.dynamic_update_slice_in_dim(cache, jnp.expand_dims(new, rows), end[0], rows)


def by_mask(cache, new, end, rows=1):
    number = lax.broadcasted_iota(jnp.int32, cache.shape, rows)
    here = number == end.reshape(-1, *[1] * (cache.ndim - 1))
    return jnp.where(here, jnp.broadcast_to(jnp.expand_dims(new, rows), cache.shape), cache)


WRITES = [by_index, by_slice, by_mask]


def step(attend, write, query, key, value, end):
    """Writes one row per sequence, then attends."""
    new = (query[:, 0] if key.ndim == 3 else query[:, : key.shape[2]]).astype(key.dtype)
    key, value = (write(x, new, end) for x in (key, value))
    k, v = (x[:, :, None] if x.ndim == 3 else x for x in (key, value))
    return attend(query, k, v, sequence_end=end + 1, **scales(key)), key, value


def scales(key) -> dict[str, Any]:
    return {"key_scale": 0.1, "value_scale": 0.1} if key.dtype == jnp.int8 else {}


def in_scan(attend, write, query, key, value, end, step=step):
    """Four steps, with the cache in the carry."""

    def one(carry, _):
        out, key, value = step(attend, write, query, carry[0], carry[1], carry[2])
        return (key, value, carry[2] + 1), out

    (key, value, _), outs = lax.scan(one, (key, value, end), None, length=4)
    return outs, key, value


PROGRAMS = {"step": step, "scan": in_scan}


def temporary(function, shape, write, dtype):
    """Temporary memory that attention adds to the compiled program, as a fraction of one cache array.

    The write alone takes no such memory, except where XLA's scatter converts the whole array on CPUs.
    """
    query = jnp.float32 if dtype.itemsize == 1 else dtype
    aval = jax.ShapeDtypeStruct
    cache = aval(shape, dtype)
    arrays = aval((shape[0], 8, shape[-1]), query), cache, cache, aval(shape[:1], jnp.int32)

    def taken(attend):
        program = jax.jit(functools.partial(function, attend, write), donate_argnums=(1, 2))
        return planned(program.lower(*arrays)).memory_analysis().temp_size_in_bytes / (cache.size * dtype.itemsize)

    converts = write is by_index and ("float8" in dtype.name or (dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11)))
    return taken(ragged_decode_attention) - (taken(lambda query, *_, **__: query) if converts else 0)


@pytest.mark.optimised
@pytest.mark.xla
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_donated_cache_is_written_in_place(program, shape, write, dtype):
    assert temporary(PROGRAMS[program], SHAPES[shape], write, jnp.dtype(dtype)) < ALLOWED


def heads_first(attend, write, query, key, value, end):
    """`step` on a cache [B, Hkv, S, D], with sequences and kv heads mapped."""
    batch, heads, _, dim = key.shape
    grouped = query.reshape(batch, heads, -1, dim)
    key, value = (write(x, grouped[:, :, 0].astype(x.dtype), end, rows=2) for x in (key, value))

    def one(query, key, value, end):
        k, v = (x[None, :, None] for x in (key, value))
        return attend(query[None], k, v, sequence_end=end[None], **scales(key))[0]

    of_heads = jax.vmap(one, (0, 0, 0, None))
    out = jax.vmap(of_heads)(grouped, key, value, end + 1)
    return out.reshape(query.shape), key, value


def layers_first(attend, write, query, key, value, end):
    """`step` on a cache [layers, B, S, Hkv, D], with layers mapped. `vmap` turns each write by slice into a scatter."""
    out, key, value = jax.vmap(functools.partial(step, attend, write), (None, 0, 0, None))(query, key, value, end)
    return out.sum(0), key, value


MAPPED = {
    "heads first": (heads_first, (2, 4, 65536, 64)),
    "heads first, one sequence": (heads_first, (1, 4, 65536, 64)),
    "layers first": (layers_first, (2, 2, 32768, 4, 64)),
}


@pytest.mark.optimised
@pytest.mark.xla
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cache", ["heads first", "heads first, one sequence"])
def test_a_mapped_cache_is_written_in_place(cache, write, dtype):
    function, shape = MAPPED[cache]
    assert temporary(function, shape, write, jnp.dtype(dtype)) < ALLOWED


@pytest.mark.optimised
@pytest.mark.xla
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cache", MAPPED)
def test_a_mapped_cache_in_the_carry_is_written_in_place(cache, write):
    function, shape = MAPPED[cache]
    assert temporary(functools.partial(in_scan, step=function), shape, write, jnp.dtype("float32")) < ALLOWED
