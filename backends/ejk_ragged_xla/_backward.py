"""The gradients, chunk by chunk: probabilities are computed again from the log-sum-exp."""

import jax.numpy as jnp
from jax import lax

from ._chunks import Arithmetic, by_sequences, chunk_rows, Chunks


def backward(problem, target, query, key, value, start, end, lse, d_out, delta, wanted):
    """`Backend.backward`, hints resolved."""
    arithmetic = Arithmetic(problem, target)
    heads, accum = problem.num_kv_heads, problem.accum_dtype

    def some(first, d_cache, query, start, end, lse, d_out, delta):
        chunks = Chunks(first, start, end, chunk_rows(problem), problem.seq_len)
        q, d_o, lse, delta = (arithmetic.heads(x, heads) for x in (query, d_out, lse, delta))

        def step(i, state):
            d_query, d_cache = state
            live, new = chunks.live(i)
            k = jnp.where(live[:, :, None, None], chunks.load(key, i), 0).astype(accum)  # 0 * NaN is NaN
            v = chunks.load(value, i).astype(accum)
            x, slope = arithmetic.logits(q, k)
            p = jnp.where(live[:, :, None, None], jnp.exp(x - lse[:, None]), 0)
            d_x = p * (arithmetic.dots(d_o, v) - delta[:, None]) * slope * problem.softmax_scale
            d_x = jnp.where(live[:, :, None, None], d_x, 0)
            if wanted.query:
                d_query += arithmetic.weighted(jnp.where(new[:, :, None, None], d_x, 0), k)
            if wanted.key_value:
                # Rows that an earlier chunk had are computed again here, to the same values: cheaper than to read them back.
                rows = arithmetic.outer(d_x, q), arithmetic.outer(p, d_o)
                d_cache = [chunks.store(x, i, r.astype(x.dtype)) for x, r in zip(d_cache, rows, strict=True)]
            return d_query, d_cache

        d_query, d_cache = lax.fori_loop(jnp.int32(0), chunks.count, step, (jnp.zeros_like(q), d_cache))
        return d_cache, [d_query.reshape(query.shape).astype(query.dtype)]

    d_cache = [jnp.zeros_like(key), jnp.zeros_like(value)] if wanted.key_value else []
    d_cache, d_query = by_sequences(target, some, d_cache, (query, start, end, lse, d_out, delta))
    return d_query * wanted.query + d_cache
