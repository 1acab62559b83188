"""The output and the log-sum-exp: an online softmax over chunks."""

import jax.numpy as jnp
from jax import lax

from ._chunks import Arithmetic, by_sequences, chunk_rows, Chunks


def forward(problem, target, query, key, value, start, end, sink):
    """`Backend.forward`, hints resolved."""
    arithmetic = Arithmetic(problem, target)
    heads, accum = problem.num_kv_heads, problem.accum_dtype

    def some(first, carry, query, start, end, sink):
        chunks = Chunks(first, start, end, chunk_rows(problem), problem.seq_len)
        q = arithmetic.heads(query, heads)

        def step(i, state):
            top, total, weighted = state
            _, new = chunks.live(i)
            k = chunks.load(key, i).astype(accum)
            v = jnp.where(new[:, :, None, None], chunks.load(value, i), 0).astype(accum)  # 0 * NaN is NaN
            x, _ = arithmetic.logits(q, k)
            x = jnp.where(new[:, :, None, None], x, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(x, axis=1))
            base = jnp.where(new_top == -jnp.inf, 0, new_top)  # no key yet: -inf - -inf is NaN
            kept = jnp.exp(top - base)
            p = jnp.exp(x - base[:, None])
            return new_top, total * kept + jnp.sum(p, axis=1), weighted * kept[..., None] + arithmetic.weighted(p, v)

        # A sink is a key without a value that every query has seen before the first chunk.
        top = arithmetic.heads(sink, heads)
        state = top, jnp.where(top == -jnp.inf, 0, jnp.ones_like(top)), jnp.zeros_like(q)
        top, total, weighted = lax.fori_loop(jnp.int32(0), chunks.count, step, state)
        out = weighted / jnp.where(total == 0, 1, total)[..., None]
        return carry, [out.reshape(query.shape).astype(query.dtype), (top + jnp.log(total)).reshape(sink.shape)]

    _, (out, lse) = by_sequences(target, some, (), (query, start, end, sink))
    return out, lse
