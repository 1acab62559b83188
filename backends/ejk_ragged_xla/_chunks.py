"""The walk over the cache: the live range of each sequence, chunk by chunk, in the order that suits the platform."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._bits import from_bits, to_bits, widen
from ._rows import held, Reader


# Rows per chunk, unless the hint `block_size_keys` is given. docs/developers/xla-on-cpus.md has the figures. On a GPU, 1024 rows
# take 0.8 of the time, but the temporary memory grows to 2 % of a cache of 32768 rows.
CHUNK_ROWS = 512
# On a CPU, a live range ends with small chunks, when fewer rows are left than a large chunk has.
FRACTION = 2  # rows of a large chunk / rows of a small chunk
LEAST_FRACTION = 128  # rows of a small chunk, at least: otherwise all chunks are large
# On a CPU, kv heads are done in this many parts, if their number can be divided. XLA runs independent parts in parallel.
PARTS = 2


class Chunk(NamedTuple):
    """C rows of one sequence, for H kv heads.

    Attributes:
        k, v: [H, C, D] and [H, C, Dv]. Rows that are not `seen` may hold anything. Clear them before a product: 0 times NaN is NaN.
        k_scale, v_scale: [H or 1, 1, C], with 0 for rows that are not `seen`. Or [H or 1, 1, 1] if all rows have the same scale. Or
            None.
        live: bool [1, R, C], or [1, 1, C] if all query rows see the same rows: which rows each query row sees.
        new: like `live`, without the rows that the chunk before held already.
        seen: bool [1, C, 1], the rows that any query row sees.
    """

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    live: Any
    new: Any
    seen: Any


def by_kv_head(problem, target, *arrays):
    """Arrays [B or 1, T or 1, Hq, ...] as [B, Hkv, R, ...], with R = T * G query rows, in the dtype for products."""

    def query_rows(x):
        rest = x.shape[3:]
        x = jnp.broadcast_to(x, (problem.batch, problem.num_tokens, problem.num_q_heads, *rest))
        x = x.reshape(problem.batch, problem.num_tokens, problem.num_kv_heads, problem.group, *rest)
        return x.swapaxes(1, 2).reshape(problem.batch, problem.num_kv_heads, problem.num_tokens * problem.group, *rest)

    return [_operand(problem, target, query_rows(x)) for x in arrays]


def by_token(problem, x):
    """An array [B, Hkv, R, ...] as [B, T, Hq, ...]."""
    rest = x.shape[3:]
    x = x.reshape(problem.batch, problem.num_kv_heads, problem.num_tokens, problem.group, *rest).swapaxes(1, 2)
    return x.reshape(problem.batch, problem.num_tokens, problem.num_q_heads, *rest)


def walk(problem, target, queries, cache, begin, step, per_sequence, written=()):
    """Runs `step` over the chunks of every sequence's live range, in order.

    The first chunk begins with the first live row, or with the first page that has a live row. So the result of a sequence does
    not depend on the other sequences. A chunk that would exceed the cache or its page is moved back. The rows that it then shares
    with the chunk before are not `new`.

    On a CPU, one sequence is done after another, in large chunks and then in small ones. The time is proportional to the number of
    live tokens in the batch. On other platforms this order would leave most of the device idle, so all sequences are done together.
    The time is proportional to the longest live range.

    Args:
        problem: the static facts, with resolved hints.
        target: where the operation runs.
        queries, cache: the operands.
        begin: `begin(*arrays) -> state`. `arrays` are the arrays of `per_sequence` for H kv heads of one sequence, [H, ...]. So is
            the state.
        step: `step(arrays, state, chunk) -> (state, rows)`. `rows` holds one array [H, C, ...] per array of `written`, which is
            written to the chunk's rows.
        per_sequence: arrays [B, Hkv, ...].
        written: arrays like the cache, which are updated in place.

    Returns:
        The final states [B, Hkv, ...], and `written`.
    """
    order = _one_after_another if target.platform == "cpu" else _together
    states, written = order(
        _Walk(problem, target, queries, cache, held(cache, problem.maps), begin, step), per_sequence, [to_bits(x) for x in written]
    )
    return states, [from_bits(x, problem.cache_dtype) for x in written]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The arguments of `walk`. `held` is the cache in the shapes of `_rows.held`."""

    problem: Any
    target: Any
    queries: Any
    cache: Any
    held: Any
    begin: Any
    step: Any

    def reader(self, rows) -> Reader:
        return Reader.of(self.problem, self.cache.pages() if self.problem.paged else None, rows)

    def do(self, reader, heads, row, b, bounds, arrays, state):
        """Does the chunk at `row` for some kv heads of sequence `b`. Returns the next state, the rows to write, and their place."""
        start, end = bounds
        place = reader.place(row)
        here = (place + jnp.arange(reader.rows, dtype=place.dtype))[None]
        live = (here >= start[:, None]) & (here < end[:, None])
        new = live & (here >= row)
        # Without the barrier, XLA's CPU compiler of JAX 0.10 widens the whole bfloat16 cache before the loop.
        place, cache = lax.optimization_barrier((place, self.held))
        cache = jax.tree.map(lambda x, like: x.reshape(like.shape), cache, self.cache)
        seen = jnp.any(live, axis=0)[None, :, None]
        k, v = self.key_value(reader, cache, heads, place, b)
        k_scale, v_scale = (self.scale(reader, x, heads, place, b, seen) for x in (cache.key_scale, cache.value_scale))
        chunk = Chunk(k, v, k_scale, v_scale, self.by_query_row(live), self.by_query_row(new), seen)
        state, rows = self.step(arrays, state, chunk)
        return state, rows, place

    def key_value(self, reader, cache, heads, place, b):
        """The keys [H, C, D] and the values [H, C, Dv] of a chunk. If the value is in the key's rows, each row is read once."""

        def load(array):
            chunk = _operand(self.problem, self.target, reader.slices(array, b, place, heads, axis=1))
            return chunk.transpose(1, 0, 2)

        if self.problem.value_columns is None:
            return load(cache.key), load(cache.value)
        rows = load(cache.key)
        return rows[..., : self.problem.head_dim], rows[..., slice(*self.problem.value_columns)]

    def scale(self, reader, scale, heads, place, b, seen):
        """The scales of a chunk, as `Chunk` holds them."""
        if scale is None:
            return None
        chunk = reader.slices(scale, b, place, heads, axis=2)[:, None]
        return chunk if chunk.shape[2] == 1 != reader.rows else jnp.where(seen.transpose(0, 2, 1), chunk, 0)

    def by_query_row(self, mask):
        """A mask [T, C] as [1, R, C], or a mask [1, C] as [1, 1, C]."""
        if mask.shape[0] == 1:
            return mask[None]
        rows = mask.shape[1]
        mask = jnp.broadcast_to(mask[:, None], (self.problem.num_tokens, self.problem.group, rows))
        return mask.reshape(1, self.problem.num_tokens * self.problem.group, rows)

    def store(self, array, chunk, b, place, heads):
        chunk = chunk.transpose(1, 0, 2).astype(self.problem.cache_dtype)
        return lax.dynamic_update_slice(array, to_bits(chunk)[None], (b, place, jnp.int32(heads.start), jnp.int32(0)))


def _one_after_another(walk: _Walk, per_sequence, written):
    """Does one sequence after another. The parts of its kv heads are independent, and XLA runs them in parallel."""
    problem = walk.problem
    readers = [walk.reader(problem.fwd_params.block_size_keys)]
    rows = readers[0].rows
    if isinstance(rows, int) and rows % FRACTION == 0 and rows // FRACTION >= LEAST_FRACTION:
        readers.append(walk.reader(rows // FRACTION))
    each = problem.num_kv_heads // PARTS if problem.num_kv_heads % PARTS == 0 else problem.num_kv_heads
    parts = [range(head, head + each) for head in range(0, problem.num_kv_heads, each)]

    def sequence(written, xs):
        b, begun, end, bounds, arrays = xs
        arrays = [[x[heads.start : heads.stop] for x in arrays] for heads in parts]

        def chunk(reader, carry):
            row, states, written = carry
            next_states = []
            for heads, own, state in zip(parts, arrays, states, strict=True):
                state, chunks, place = walk.do(reader, heads, row, b, bounds, own, state)
                written = [walk.store(x, c, b, place, heads) for x, c in zip(written, chunks, strict=True)]
                next_states.append(state)
            return reader.next(row), next_states, written

        carry = readers[0].first(begun), [walk.begin(*own) for own in arrays], written
        for reader in readers:
            reach = 1 if reader is readers[-1] else reader.rows  # the loop goes on while at least this many rows are left
            carry = lax.while_loop(lambda carry, reach=reach: carry[0] + reach <= end, functools.partial(chunk, reader), carry)
        _, states, written = carry
        return written, jax.tree.map(lambda *x: jnp.concatenate(x), *states)

    index = jnp.arange(problem.batch, dtype=jnp.int32)
    hull, bounds = walk.queries.hull(problem.seq_len), walk.queries.bounds(problem.seq_len)
    written, states = lax.scan(sequence, written, (index, *hull, bounds, per_sequence))
    return states, written


def _together(walk: _Walk, per_sequence, written):
    """Does all sequences at once."""
    problem = walk.problem
    reader = walk.reader(problem.fwd_params.block_size_keys)
    heads = range(problem.num_kv_heads)
    index = jnp.arange(problem.batch, dtype=jnp.int32)
    begun, ends = walk.queries.hull(problem.seq_len)
    bounds = walk.queries.bounds(problem.seq_len)

    def chunk(carry):
        rows, states, written = carry
        do = functools.partial(walk.do, reader, heads)
        states, chunks, places = jax.vmap(do)(rows, index, bounds, per_sequence, states)
        put = jax.vmap(lambda x, c, place: walk.store(x[None], c, jnp.int32(0), place, heads)[0])
        return reader.next(rows), states, [put(x, c, places) for x, c in zip(written, chunks, strict=True)]

    carry = reader.first(begun), jax.vmap(walk.begin)(*per_sequence), written
    _, states, written = lax.while_loop(lambda carry: jnp.any(carry[0] < ends), chunk, carry)
    return states, written


def _operand(problem, target, x):
    """`x` in the dtype for products: on a CPU the accumulation dtype, because products of narrow dtypes are slow there."""
    return widen(x, problem.accum_dtype) if target.platform == "cpu" else x
