"""The output and the log-sum-exp, by an online softmax over chunks."""

import jax.numpy as jnp

from ._arithmetic import logits, scaled, weighted
from ._chunks import by_kv_head, by_token, walk


def forward(problem, target, queries, cache):
    """Does `Backend.forward` for a problem whose hints are resolved."""

    def begin(q, sink):
        # The sink counts as a key with value 0 that comes before the first chunk.
        values = jnp.zeros((*q.shape[:-1], problem.value_dim), problem.accum_dtype)
        return sink, jnp.where(sink == -jnp.inf, 0, jnp.ones_like(sink)), values

    def step(arrays, state, chunk):
        q, _ = arrays
        top, total, values = state
        v = jnp.where(chunk.seen, chunk.v, 0)
        x, _ = logits(problem, q, chunk)
        x = jnp.where(chunk.new, x, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(x, axis=2))
        base = jnp.where(new_top == -jnp.inf, 0, new_top)  # no key yet: -inf - -inf is NaN
        kept = jnp.exp(top - base)
        p = jnp.exp(x - base[..., None])
        values = values * kept[..., None] + weighted(problem, target, scaled(p, chunk.v_scale), v)
        return (new_top, total * kept + jnp.sum(p, axis=2), values), []

    per_sequence = by_kv_head(problem, target, queries.query, queries.sinks())
    (top, total, values), _ = walk(problem, target, queries, cache, begin, step, per_sequence)
    out = values / jnp.where(total == 0, 1, total)[..., None]
    return by_token(problem, out).astype(problem.out_dtype), by_token(problem, top + jnp.log(total))
