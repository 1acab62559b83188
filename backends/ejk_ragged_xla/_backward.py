"""The gradients, chunk by chunk. The probabilities are computed again from the log-sum-exp."""

import jax.numpy as jnp

from ._arithmetic import dots, logits, outer, scaled, weighted
from ._chunks import by_kv_head, by_token, walk


def backward(problem, target, queries, cache, lse, d_out, delta, wanted):
    """Does `Backend.backward` for a problem whose hints are resolved."""

    def begin(q, *_):
        return [jnp.zeros(q.shape, problem.accum_dtype)] * wanted.query

    def step(arrays, state, chunk):
        q, d_o, lse, delta = arrays
        k = jnp.where(chunk.seen, chunk.k, 0)
        x, slope = logits(problem, q, chunk)
        # A probability is at most 1. The minimum enforces this, because lse has lost its low bits if logits are large.
        p = jnp.where(chunk.live, jnp.exp(jnp.minimum(x - lse[..., None], 0)), 0)
        d_p = scaled(dots(problem, d_o, chunk.v), chunk.v_scale)
        d_x = p * (d_p - delta[..., None]) * slope * problem.softmax_scale
        d_x = jnp.where(chunk.live, scaled(d_x, chunk.k_scale), 0)
        state = [d_q + weighted(problem, target, jnp.where(chunk.new, d_x, 0), k) for d_q in state]
        # A row that was in the chunk before, too, gets the same gradients again. That is cheaper than to read them back.
        return state, of_cache(problem, outer(problem, d_x, q), outer(problem, p, d_o)) if wanted.key_value else []

    written = [jnp.zeros_like(x) for x in (cache.key, cache.value) if x is not None] if wanted.key_value else []
    per_sequence = by_kv_head(problem, target, queries.query, d_out, lse, delta)
    d_query, d_cache = walk(problem, target, queries, cache, begin, step, per_sequence, written)
    return [by_token(problem, x).astype(problem.out_dtype) for x in d_query] + d_cache


def of_cache(problem, d_k, d_v):
    """The gradients of the cache's arrays, from the gradients of keys and values [H, C, ...]."""
    if problem.value_columns is None:
        return [d_k, d_v]
    first, end = problem.value_columns
    wide = (problem.row_dim - problem.head_dim, problem.row_dim - end)
    return [jnp.pad(d_k, ((0, 0), (0, 0), (0, wide[0]))) + jnp.pad(d_v, ((0, 0), (0, 0), (first, wide[1])))]
