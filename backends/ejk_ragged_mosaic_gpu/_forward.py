"""The forward operation in two kernels: `split` works through pieces of the live ranges, `combine` merges each sequence's pieces.

A query row is one token and one query head of a kv head. The query is [B, T, Hkv, G, D] here. Where parts of the G query rows of a
token can be copied as products want them, that is the query as it is. Otherwise all query rows of a kv head are those of one token.
"""

import dataclasses

import jax.numpy as jnp

from ejk_ragged_schedule import length_arrays
from ejk_ragged_schedule.joined import joined_cache

from ._merge import combine
from ._split import split
from ._tiles import begins_at
from ._tuning import joined_heads, launches_early, tiles


def forward(problem, target, queries, cache, **how):
    """Output and log-sum-exp; shapes as in `ejk_ragged.Backend.forward`."""
    plan, (wide, _) = tiles(problem, target), joined_heads(problem, target)
    how["early"] = launches_early(target)
    lengths = length_arrays(problem, queries)
    if plan.end_to_end:
        lengths, cache = _laid_end_to_end(problem, lengths, cache)
    own = lengths["start"], lengths["end"]
    query_bounds = lengths.get("token_start"), lengths.get("token_end")
    if not (plan.many or plan.in_registers):
        query_bounds = _of_rows(problem, plan, query_bounds[0], plan.schedule.seq_len), _of_rows(problem, plan, query_bounds[1], 0)
    cache = _scales_by_row(problem, joined_cache(cache, wide))
    if plan.shares_lines:
        cache = _in_whole_rows(cache)
    sink = _sink_of_rows(problem, plan, queries.sink) if plan.many else queries.sink
    partial = split(wide, plan, _by_kv_head(wide, plan, queries.query), cache, own, query_bounds, sink, **how)
    out, lse = combine(problem, target, plan, partial, own, sink, **how)
    out, lse = _by_token(problem, out, lse)
    return out.reshape(*queries.query.shape[:3], problem.value_dim), lse.reshape(queries.query.shape[:3])


def _laid_end_to_end(problem, lengths, cache):
    """Lengths and cache with the rows of all sequences laid end to end, and their scales. XLA copies nothing, unless
    sequences share scales by row.

    Ranges of tokens count from where their sequence `begins_at`. The kernels do the same with ranges of sequences.
    """
    early = lambda: begins_at(jnp.arange(problem.batch, dtype=jnp.int32), problem.seq_len)[1][:, None]
    of_tokens = {name: lengths[name] + early() for name in ("token_start", "token_end") if lengths.get(name) is not None}
    flat = lambda x: None if x is None else x.reshape(1, -1, *x.shape[2:])

    def scales_end_to_end(scale):
        if scale is None or scale.shape[2] == 1:
            return scale
        return jnp.broadcast_to(scale, (problem.batch, *scale.shape[1:])).reshape(-1)

    scales = {name: scales_end_to_end(getattr(cache, name)) for name in ("key_scale", "value_scale")}
    return lengths | of_tokens, dataclasses.replace(cache, key=flat(cache.key), value=flat(cache.value), **scales)


def _in_whole_rows(cache):
    """A cache whose rows hold the columns of all kv heads, one kv head after another. Nothing is moved."""
    whole = lambda x: x.reshape(*x.shape[:2], -1)
    return dataclasses.replace(cache, key=whole(cache.key), value=whole(cache.value))


def _by_kv_head(problem, plan, query):
    """[B, T, Hq, D] as [B, T, Hkv, G, D] with the plan's T and G, and dimensions that tiles can hold."""
    batch, num_tokens, _, head_dim = query.shape
    query = query.reshape(batch, num_tokens, problem.num_kv_heads, problem.group, head_dim)
    more_dims = plan.query_dim - head_dim
    if plan.tokens != num_tokens:
        query = query.swapaxes(1, 2).reshape(batch, 1, problem.num_kv_heads, num_tokens * problem.group, head_dim)
    more_rows = plan.token_rows - query.shape[3]
    return jnp.pad(query, (*[(0, 0)] * 3, (0, more_rows), (0, more_dims))) if more_rows or more_dims else query


def _by_token(problem, out, lse):
    """Output and lse by the problem's tokens and heads, from those of `combine`."""
    shape = problem.batch, problem.num_kv_heads, problem.num_tokens, problem.group
    rows = problem.num_tokens * problem.group
    if (out.shape[1], out.shape[3]) != shape[2:]:
        out = out[:, 0, :, :rows].reshape(*shape, -1).swapaxes(1, 2)
    return out, lse[:, :, :rows].reshape(shape).swapaxes(1, 2)


def _scales_by_row(problem, cache):
    """A cache in which scales that differ by page are one per row."""

    def by_row(scale):
        if scale is None or not problem.paged or scale.shape[0] == 1:
            return scale
        return jnp.broadcast_to(scale, (*scale.shape[:2], problem.page_size))

    return dataclasses.replace(cache, key_scale=by_row(cache.key_scale), value_scale=by_row(cache.value_scale))


def _of_rows(problem, plan, of_tokens, beyond):
    """[B, T] as [B, query rows of all blocks]."""
    if of_tokens is None:
        return None
    rows = jnp.repeat(of_tokens, problem.group, axis=1)
    return jnp.pad(rows, ((0, 0), (0, plan.row_blocks * plan.block_rows - rows.shape[1])), constant_values=beyond)


def _sink_of_rows(problem, plan, sink):
    """[B or 1, T or 1, Hq] as [B or 1, Hkv, query rows of all blocks]."""
    if sink is None:
        return None
    batch = sink.shape[0]
    sink = jnp.broadcast_to(sink, (batch, problem.num_tokens, problem.num_q_heads))
    sink = sink.reshape(batch, problem.num_tokens, problem.num_kv_heads, problem.group).swapaxes(1, 2)
    sink = sink.reshape(batch, problem.num_kv_heads, -1)
    return jnp.pad(sink, ((0, 0), (0, 0), (0, plan.row_blocks * plan.block_rows - sink.shape[2])), constant_values=-jnp.inf)
