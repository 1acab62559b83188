import jax
import jax.numpy as jnp


def logits(problem, query, key):
    B, Hq, D = query.shape
    acc = problem.accum_dtype
    q = query.reshape(B, problem.num_kv_heads, -1, D).astype(acc)
    x = jnp.einsum("bhgd,bshd->bhgs", q, key.astype(acc), precision="highest") * problem.softmax_scale
    t = None
    if problem.logits_soft_cap:
        t = jnp.tanh(x / problem.logits_soft_cap)
        x = problem.logits_soft_cap * t
    return x, t


def valid(key, start, end):
    j = jnp.arange(key.shape[1])
    return (j >= start[:, None]) & (j < end[:, None])


def forward(problem, query, key, value, start, end, sink):
    B, Hq, D = query.shape
    acc = problem.accum_dtype
    m = valid(key, start, end)
    key = jnp.where(m[:, :, None, None], key, 0)
    value = jnp.where(m[:, :, None, None], value, 0)
    x, _ = logits(problem, query, key)
    x = jnp.where(m[:, None, None], x, -jnp.inf).reshape(B, Hq, -1)
    lse = jax.nn.logsumexp(jnp.concatenate([x, sink[..., None]], -1), axis=-1)
    p = jnp.where(x > -jnp.inf, jnp.exp(x - lse[..., None]), 0)
    out = jnp.einsum("bhgs,bshd->bhgd", p.reshape(B, problem.num_kv_heads, -1, p.shape[-1]), value.astype(acc), precision="highest")
    return out.reshape(B, Hq, D).astype(query.dtype), lse
