"""The output and the log-sum-exp: an online softmax over chunks."""

import jax.numpy as jnp

from ._arithmetic import logits, weighted
from ._chunks import by_kv_head, walk


def forward(problem, target, query, key, value, start, end, sink):
    """`Backend.forward`, hints resolved."""

    def begin(q, sink):
        # A sink is a key without a value that was seen before the first chunk.
        return sink, jnp.where(sink == -jnp.inf, 0, jnp.ones_like(sink)), jnp.zeros(q.shape, problem.accum_dtype)

    def step(arrays, state, k, v, live, new):
        del live
        q, _ = arrays
        top, total, values = state
        v = jnp.where(new[:, None], v, 0)  # 0 * NaN is NaN
        x, _ = logits(problem, q, k)
        x = jnp.where(new, x, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(x, axis=2))
        base = jnp.where(new_top == -jnp.inf, 0, new_top)  # no key yet: -inf - -inf is NaN
        kept = jnp.exp(top - base)
        p = jnp.exp(x - base[..., None])
        return (new_top, total * kept + jnp.sum(p, axis=2), values * kept[..., None] + weighted(problem, target, p, v)), []

    per_sequence = by_kv_head(problem, target, query, sink)
    (top, total, values), _ = walk(problem, target, key, value, start, end, begin, step, per_sequence)
    out = values / jnp.where(total == 0, 1, total)[..., None]
    return out.reshape(query.shape).astype(problem.out_dtype), (top + jnp.log(total)).reshape(sink.shape)
