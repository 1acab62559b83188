"""The gradients, chunk by chunk: the probabilities are computed again from the log-sum-exp."""

import jax.numpy as jnp

from ._arithmetic import dots, logits, outer, weighted
from ._chunks import by_kv_head, walk


def backward(problem, target, query, key, value, start, end, lse, d_out, delta, wanted):
    """`Backend.backward`, hints resolved."""

    def begin(q, *_):
        return [jnp.zeros(q.shape, problem.accum_dtype)] * wanted.query

    def step(arrays, state, k, v, live, new):
        q, d_o, lse, delta = arrays
        k = jnp.where(live[:, None], k, 0)  # 0 * NaN is NaN
        x, slope = logits(problem, q, k)
        p = jnp.where(live, jnp.exp(x - lse[..., None]), 0)
        d_x = p * (dots(problem, d_o, v) - delta[..., None]) * slope * problem.softmax_scale
        d_x = jnp.where(live, d_x, 0)
        state = [d_q + weighted(problem, target, jnp.where(new, d_x, 0), k) for d_q in state]
        # Rows that the chunk before had get the same gradients again: cheaper than to read those back.
        return state, [outer(problem, d_x, q), outer(problem, p, d_o)] * wanted.key_value

    written = [jnp.zeros_like(key), jnp.zeros_like(value)] * wanted.key_value
    per_sequence = by_kv_head(problem, target, query, d_out, lse, delta)
    d_query, d_cache = walk(problem, target, key, value, start, end, begin, step, per_sequence, written)
    return [x.reshape(query.shape).astype(problem.out_dtype) for x in d_query] + d_cache
