"""A backend in a dozen lines: MHA, forward only."""

import jax
import jax.numpy as jnp

from ejk_ragged import Backend


class TinyBackend(Backend):
    name = "tiny"
    priority = 1

    def supports(self, problem, target):
        return None if problem.group == 1 and problem.logits_soft_cap is None else "it knows nothing but MHA without a cap"

    def forward(self, problem, target, query, key, value, start, end, sink):
        rows = jnp.arange(problem.seq_len, dtype=jnp.int32)
        live = ((rows >= start[:, None]) & (rows < end[:, None]))[:, :, None]
        x = jnp.where(live, problem.softmax_scale * jnp.einsum("bhd,bshd->bsh", query, key), -jnp.inf).astype(sink.dtype)
        lse = jax.nn.logsumexp(jnp.concatenate([x, sink[:, None]], axis=1), axis=1)
        p = jnp.where(live, jnp.exp(x - lse[:, None]), 0)
        out = jnp.einsum("bsh,bshd->bhd", p, jnp.where(live[..., None], value, 0))
        return out.astype(query.dtype), lse
