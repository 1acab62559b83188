import jax.numpy as jnp

from ._forward import logits, valid


def backward(problem, query, key, value, start, end, lse, d_out, delta, wanted):
    B, Hq, D = query.shape
    acc = problem.accum_dtype
    H = problem.num_kv_heads
    m = valid(key, start, end)
    key0 = jnp.where(m[:, :, None, None], key, 0).astype(acc)
    value0 = jnp.where(m[:, :, None, None], value, 0).astype(acc)
    x, t = logits(problem, query, key0)
    p = jnp.where(m[:, None, None], jnp.exp(x - lse.reshape(B, H, -1)[..., None]), 0)
    do = d_out.reshape(B, H, -1, D).astype(acc)
    dx = p * (jnp.einsum("bhgd,bshd->bhgs", do, value0, precision="highest") - delta.reshape(B, H, -1)[..., None])
    dx = jnp.where(m[:, None, None], dx, 0)
    if t is not None:
        dx = dx * (1 - t * t)
    dx = dx * problem.softmax_scale
    r = []
    if wanted.query:
        r.append(jnp.einsum("bhgs,bshd->bhgd", dx, key0, precision="highest").reshape(B, Hq, D).astype(query.dtype))
    if wanted.key_value:
        q = query.reshape(B, H, -1, D).astype(acc)
        r += [
            jnp.einsum("bhgs,bhgd->bshd", dx, q, precision="highest").astype(key.dtype),
            jnp.einsum("bhgs,bhgd->bshd", p, do, precision="highest").astype(key.dtype),
        ]
    return r
