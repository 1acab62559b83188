"""A backend by the textbook, all logits at once, that commits one named fault when asked to: for test_mutations.py."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from ejk_ragged import Backend


class DenseBackend(Backend):
    name: ClassVar[str] = "dense"

    def __init__(self, fault: str | None = None):
        self.fault = fault

    def supports(self, problem, target):
        del problem, target

    def _logits(self, problem, query, key, start, end):
        """Logits [B, Hkv, G, S], masked; the tanh of the cap; the mask."""
        accum = problem.accum_dtype
        q = query.reshape(problem.batch, problem.num_kv_heads, problem.group, problem.head_dim).astype(accum)
        x = _dot("bhgd,bshd->bhgs", q, key.astype(accum))
        scale, cap = problem.softmax_scale, problem.logits_soft_cap
        rows = jnp.arange(problem.seq_len, dtype=jnp.int32)
        mask = (rows >= start[:, None]) & (rows < end[:, None])
        mask = mask[:, None, None]
        if self.fault != "cap before scale":
            x = scale * x
        if self.fault == "cap after mask":
            x = jnp.where(mask, x, -jnp.inf)
            mask = jnp.ones_like(mask)
        t = jnp.zeros_like(x)
        if cap is not None:
            t = jnp.tanh(x / cap)
            x = cap * t
        if self.fault == "cap before scale":
            x = scale * x
        return jnp.where(mask, x, -jnp.inf), t, mask

    def forward(self, problem, target, query, key, value, start, end, sink):
        del target
        accum = problem.accum_dtype
        key, value = self._live(key, start, end), self._live(value, start, end)
        x, _, mask = self._logits(problem, query, key, start, end)
        sink = sink.reshape(*x.shape[:3], 1)
        top = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), sink)
        top = jnp.where(top > -jnp.inf, top, 0)
        weights = jnp.where(mask, jnp.exp(x - top), 0)
        if self.fault == "rounded sums":
            weights = weights.astype(jnp.bfloat16).astype(accum)
        total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
        lse = jnp.log(total) + top
        if self.fault != "empty range not 0":
            total = jnp.where(total > 0, total, 1)
        weighted = _dot("bhgs,bshd->bhgd", weights, value.astype(accum))
        out = weighted if self.fault == "no denominator" else weighted / total
        return out.reshape(query.shape).astype(problem.out_dtype), lse.reshape(query.shape[:2])

    def _live(self, rows, start, end):
        """Cache rows with zeros outside the range."""
        index = jnp.arange(rows.shape[1], dtype=jnp.int32)
        mask = ((index >= start[:, None]) & (index < end[:, None]))[..., None, None]
        return rows * mask.astype(rows.dtype) if self.fault == "NaN from outside" else jnp.where(mask, rows, 0)

    def backward(self, problem, target, query, key, value, start, end, lse, d_out, delta, *, wanted):
        del target
        accum = problem.accum_dtype
        grouped = (problem.batch, problem.num_kv_heads, problem.group)
        key, value = self._live(key, start, end), self._live(value, start, end)
        x, t, mask = self._logits(problem, query, key, start, end)
        p = jnp.where(mask, jnp.exp(x - lse.reshape(*grouped, 1)), 0)
        d_out = d_out.reshape(*grouped, -1).astype(accum)
        d_p = _dot("bhgd,bshd->bhgs", d_out, value.astype(accum))
        d_x = p * (d_p if self.fault == "no delta" else d_p - delta.reshape(*grouped, 1))
        if self.fault != "no slope of the cap":
            d_x = d_x * (1 - t * t)
        if self.fault != "no scale in the gradient":
            d_x = d_x * problem.softmax_scale
        d_x = jnp.where(mask, d_x, 0)
        if self.fault == "rounded gradient":
            d_x = d_x.astype(jnp.bfloat16).astype(accum)
        gradients = []
        if wanted.query:
            gradients.append(_dot("bhgs,bshd->bhgd", d_x, key.astype(accum)).reshape(query.shape).astype(problem.out_dtype))
        if wanted.key_value:
            d_key = _dot("bhgs,bhgd->bshd", d_x, query.reshape(*grouped, -1).astype(accum))
            d_value = _dot("bhgs,bhgd->bshd", p, d_out)
            if self.fault == "one head of the group":
                d_key = _dot("bhs,bhd->bshd", d_x[:, :, 0], query.reshape(*grouped, -1)[:, :, 0].astype(accum))
            if self.fault == "dead rows not 0":
                d_key, d_value = d_key + 1e-30, d_value + 1e-30
            gradients += [d_key.astype(key.dtype), d_value.astype(value.dtype)]
        return gradients


_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
