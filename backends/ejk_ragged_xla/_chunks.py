"""How the cache is walked: the live range of each sequence, chunk by chunk, in the order that suits the platform."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import min_dim

from ._bits import from_bits, to_bits


# Rows of a chunk where `block_size_keys` does not say. On a CPU (2 cores, heads 32:8, D 128) half of it takes 1.1 to 1.3 of the
# time on full caches, about the same on sequences of 100 to 700 keys, and twice as much gains nothing. On a GPU (one H100) half
# takes 1.5 and twice as much 0.8 of the time, but temporary memory grows with it: to 2 % of a cache of 32768 rows.
CHUNK_ROWS = 512


def by_kv_head(problem, target, *arrays):
    """Arrays [B, Hq, ...] as [B, Hkv, G, ...], ready for products."""
    heads = (problem.num_kv_heads, problem.group)
    return [_operand(problem, target, x.reshape(x.shape[0], *heads, *x.shape[2:])) for x in arrays]


def _operand(problem, target, x):
    """On a CPU narrow dtypes are widened, there the products have no fast form for them; elsewhere they have."""
    return x.astype(problem.accum_dtype) if target.platform == "cpu" else x


def walk(problem, target, key, value, start, end, begin, step, per_sequence, written=()):
    """Run `step` over the chunks of every sequence's live range, in order.

    Chunk i of a sequence holds `rows` rows from start + i * rows on, so what a sequence gives does not depend on the others. A
    chunk that would pass the end of the cache is moved back; the rows that it shares with the one before are not `new`.

    On a CPU one sequence is done after another: time follows the live tokens of the whole batch. Elsewhere that would starve the
    device, and all sequences go together: time follows the longest live range.

    Args:
        begin: `begin(*arrays) -> state`, for one sequence.
        step: `step(arrays, state, k, v, live, new) -> (state, chunks)`, for one sequence. k, v: [Hkv, rows, D]; live, new: bool
            [rows], which rows are in the live range, and which of these no chunk before held; chunks: what to write at these rows
            of `written`, [Hkv, rows, D].
        per_sequence: arrays [B, ...].
        written: arrays like the cache, updated in place.

    Returns:
        The last states, stacked [B, ...], and `written`.
    """
    seq_len = problem.seq_len
    rows = min_dim(problem.fwd_params.block_size_keys, seq_len)  # sizes may be symbolic

    def count(start, end):
        return jnp.maximum(end - start + rows - 1, 0) // rows

    def first_row(i, start):
        return jnp.clip(start + i * rows, 0, seq_len - rows)

    zero = jnp.int32(0)  # all of one type, under jax_enable_x64 too

    def load(cache, b, row):
        chunk = lax.dynamic_slice(cache, (b, row, zero, zero), (1, rows, *cache.shape[2:]))[0]
        return _operand(problem, target, chunk).transpose(1, 0, 2)

    def store(cache, chunk, b, row):
        chunk = chunk.transpose(1, 0, 2).astype(problem.dtype)
        return lax.dynamic_update_slice(cache, to_bits(chunk)[None], (b, row, zero, zero))

    def do(i, b, start, end, arrays, state):
        row = first_row(i, start)
        here = row + jnp.arange(rows, dtype=row.dtype)
        live = (here >= start) & (here < end)
        new = live & (here >= start + i * rows)
        # Without the barrier XLA's CPU compiler in JAX 0.10 widens the whole bfloat16 cache before the loop.
        row, k, v = lax.optimization_barrier((row, key, value))
        return step(arrays, state, load(k, b, row), load(v, b, row), live, new)

    index = jnp.arange(problem.batch, dtype=jnp.int32)
    written = [to_bits(x) for x in written]
    if target.platform == "cpu":

        def sequence(written, xs):
            b, start, end, *arrays = xs

            def chunk(i, carry):
                state, written = carry
                state, chunks = do(i, b, start, end, arrays, state)
                return state, [store(x, c, b, first_row(i, start)) for x, c in zip(written, chunks, strict=True)]

            state, written = lax.fori_loop(zero, count(start, end), chunk, (begin(*arrays), written))
            return written, state

        written, states = lax.scan(sequence, written, (index, start, end, *per_sequence))
        return states, [from_bits(x, problem.dtype) for x in written]

    def chunk(i, carry):
        states, written = carry
        states, chunks = jax.vmap(do, (None, 0, 0, 0, 0, 0))(i, index, start, end, per_sequence, states)
        row = first_row(i, start)
        put = jax.vmap(lambda x, c, r: store(x[None], c, zero, r)[0])
        return states, [put(x, c, row) for x, c in zip(written, chunks, strict=True)]

    states = jax.vmap(begin)(*per_sequence)
    states, written = lax.fori_loop(zero, jnp.max(count(start, end)), chunk, (states, written))
    return states, [from_bits(x, problem.dtype) for x in written]
