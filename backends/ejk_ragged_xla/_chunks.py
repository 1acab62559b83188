"""How the cache is walked: the live range of each sequence, chunk by chunk, in the order that suits the platform."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import min_dim

from ._bits import from_bits, to_bits, widen


# Rows of a chunk where `block_size_keys` does not say; docs/performance/cpu.md has the figures.
# Twice as much takes 0.8 of the time on a GPU, but temporary memory that grows to 2 % of a cache of 32768 rows.
CHUNK_ROWS = 512
# On a CPU, what is less than a large chunk is done in chunks of this fraction of one, if they have so many rows at least.
FRACTION = 2
LEAST_FRACTION = 128
# And kv heads are done in so many parts there, if they can be: XLA runs side by side what does not depend on each other.
PARTS = 2


class Chunk(NamedTuple):
    """C rows of one sequence, for some kv heads H.

    Attributes:
        k, v: [H, C, D].
        k_scale, v_scale: [H or 1, 1, C], 0 at rows that nobody sees, or 1 for C where all rows have the same, or None.
        live: bool [1, R, C], or [1, 1, C] where all rows of queries see the same: which rows of the cache each row of queries sees.
        new: likewise, those of them that no chunk before held.
        seen: bool [1, C, 1], the rows that anybody sees; k and v may hold anything at the others, and 0 times that may be NaN.
    """

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    live: Any
    new: Any
    seen: Any


def by_kv_head(problem, target, *arrays):
    """Arrays [B, T, Hq, ...], 1 for B or T where alike, as [B, Hkv, R, ...]: R = T * G rows of queries, ready for products."""

    def rows(x):
        rest = x.shape[3:]
        x = jnp.broadcast_to(x, (problem.batch, problem.num_tokens, problem.num_q_heads, *rest))
        x = x.reshape(problem.batch, problem.num_tokens, problem.num_kv_heads, problem.group, *rest)
        return x.swapaxes(1, 2).reshape(problem.batch, problem.num_kv_heads, problem.num_tokens * problem.group, *rest)

    return [_operand(problem, target, rows(x)) for x in arrays]


def by_token(problem, x):
    """[B, Hkv, R, ...] as [B, T, Hq, ...]."""
    rest = x.shape[3:]
    x = x.reshape(problem.batch, problem.num_kv_heads, problem.num_tokens, problem.group, *rest).swapaxes(1, 2)
    return x.reshape(problem.batch, problem.num_tokens, problem.num_q_heads, *rest)


def _operand(problem, target, x):
    """On a CPU narrow dtypes are widened, there the products have no fast form for them; elsewhere they have."""
    return widen(x, problem.accum_dtype) if target.platform == "cpu" else x


def walk(problem, target, queries, cache, begin, step, per_sequence, written=()):
    """Run `step` over the chunks of every sequence's live range, in order.

    Chunks follow each other from the first live row on, so what a sequence gives does not depend on the others. A chunk that would
    pass the end of the cache is moved back; the rows that it shares with the one before are not `new`.

    On a CPU one sequence is done after another, in large chunks and then in small ones: time follows the live tokens of the whole
    batch. Elsewhere that would starve the device, and all sequences go together: time follows the longest live range.

    Args:
        begin: `begin(*arrays) -> state`, for some kv heads H of one sequence; [H, ...].
        step: `step(arrays, state, chunk) -> (state, rows)`, likewise; rows: what to write at the chunk's rows of `written`,
            [H, C, D].
        per_sequence: arrays [B, Hkv, ...].
        written: arrays like the cache, updated in place.

    Returns:
        The last states, stacked [B, Hkv, ...], and `written`.
    """
    seq_len = problem.seq_len
    rows = min_dim(problem.fwd_params.block_size_keys, seq_len)  # sizes may be symbolic
    zero = jnp.int32(0)  # all of one type, under jax_enable_x64 too

    def count(start, end, rows):
        return jnp.maximum(end - start + rows - 1, 0) // rows

    def place(b, row, heads):
        return b, row, jnp.int32(heads.start), zero

    def load(rows_of, b, row, rows, heads):
        if rows_of.ndim == 3:
            at, size = (b, row, jnp.int32(heads.start * problem.head_dim)), (1, rows, len(heads) * problem.head_dim)
        else:
            at, size = place(b, row, heads), (1, rows, len(heads), problem.head_dim)
        chunk = lax.dynamic_slice(rows_of, at, size).reshape(rows, len(heads), problem.head_dim)
        return _operand(problem, target, chunk).transpose(1, 0, 2)

    def load_scale(scale, b, row, rows, heads, seen):
        if scale is None:
            return None
        alike = [n == 1 for n in scale.shape]
        at = [zero if same else place for same, place in zip(alike, (b, jnp.int32(heads.start), row), strict=True)]
        sizes = [1 if same else n for same, n in zip(alike, (1, len(heads), rows), strict=True)]
        chunk = lax.dynamic_slice(scale, at, sizes)[0][:, None]
        return chunk if alike[2] else jnp.where(seen.transpose(0, 2, 1), chunk, 0)

    def store(rows_of, chunk, b, row, heads):
        chunk = chunk.transpose(1, 0, 2).astype(problem.cache_dtype)
        return lax.dynamic_update_slice(rows_of, to_bits(chunk)[None], place(b, row, heads))

    def do(rows, heads, first, b, bounds, arrays, state):
        start, end = bounds
        row = jnp.clip(first, 0, seq_len - rows)  # as slices and their updates clip it themselves
        here = (row + jnp.arange(rows, dtype=row.dtype))[None]
        live = (here >= start[:, None]) & (here < end[:, None])
        new = live & (here >= first)
        # Without the barrier XLA's CPU compiler in JAX 0.10 widens the whole bfloat16 cache before the loop.
        row, held = lax.optimization_barrier((row, cache))
        seen = jnp.any(live, axis=0)[None, :, None]
        k, v = (load(x, b, row, rows, heads) for x in (held.key, held.value))
        k_scale, v_scale = (load_scale(x, b, row, rows, heads, seen) for x in (held.key_scale, held.value_scale))
        return step(arrays, state, Chunk(k, v, k_scale, v_scale, by_row(live), by_row(new), seen))

    def by_row(mask):
        """[T, C] as [1, R, C]."""
        if mask.shape[0] == 1:
            return mask[None]
        rows = mask.shape[1]
        mask = jnp.broadcast_to(mask[:, None], (problem.num_tokens, problem.group, rows))
        return mask.reshape(1, problem.num_tokens * problem.group, rows)

    index = jnp.arange(problem.batch, dtype=jnp.int32)
    begins, ends = queries.hull(seq_len)
    bounds = queries.start, queries.end
    written = [to_bits(x) for x in written]
    if target.platform == "cpu":
        # Heads and head_dim as one axis: were there an axis of size 1 between the others, the compiler of JAX 0.10 would copy a
        # cache that comes out of a reshape, such as one of heads first under `vmap`.
        shape = problem.batch, seq_len, problem.num_kv_heads * problem.head_dim
        cache = dataclasses.replace(cache, key=cache.key.reshape(shape), value=cache.value.reshape(shape))
        fraction = rows // FRACTION if isinstance(rows, int) and rows % FRACTION == 0 else 0
        sizes = [rows, fraction] if fraction >= LEAST_FRACTION else [rows]
        each = problem.num_kv_heads // PARTS if problem.num_kv_heads % PARTS == 0 else problem.num_kv_heads
        parts = [range(head, head + each) for head in range(0, problem.num_kv_heads, each)]

        def sequence(written, xs):
            b, begun, end, bounds, arrays = xs
            arrays = [[x[heads.start : heads.stop] for x in arrays] for heads in parts]

            def chunk(size, begun, i, carry):
                states, written = carry
                first = begun + i * size
                next_states = []
                for heads, own, state in zip(parts, arrays, states, strict=True):
                    state, chunks = do(size, heads, first, b, bounds, own, state)
                    written = [store(x, c, b, first, heads) for x, c in zip(written, chunks, strict=True)]
                    next_states.append(state)
                return next_states, written

            carry = [begin(*own) for own in arrays], written
            for size in sizes:
                number = count(begun, end, size) if size == sizes[-1] else jnp.maximum(end - begun, 0) // size
                carry = lax.fori_loop(zero, number, functools.partial(chunk, size, begun), carry)
                begun += number * size
            states, written = carry
            return written, jax.tree.map(lambda *x: jnp.concatenate(x), *states)

        written, states = lax.scan(sequence, written, (index, begins, ends, bounds, per_sequence))
        return states, [from_bits(x, problem.cache_dtype) for x in written]

    heads = range(problem.num_kv_heads)

    def chunk(i, carry):
        states, written = carry
        first = begins + i * rows
        states, chunks = jax.vmap(functools.partial(do, rows, heads))(first, index, bounds, per_sequence, states)
        put = jax.vmap(lambda x, c, r: store(x[None], c, zero, r, heads)[0])
        return states, [put(x, c, first) for x, c in zip(written, chunks, strict=True)]

    states = jax.vmap(begin)(*per_sequence)
    states, written = lax.fori_loop(zero, jnp.max(count(begins, ends, rows)), chunk, (states, written))
    return states, [from_bits(x, problem.cache_dtype) for x in written]
