"""A backend for short caches. It computes all logits at once, in a few operations."""

from typing import ClassVar

import jax.numpy as jnp

from ejk_ragged import Backend, Problem, Target


class DenseBackend(Backend):
    name: ClassVar[str] = "dense"
    platforms: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda"})
    priority: ClassVar[int] = 10  # asked before XLA, which has -100

    def supports(self, problem: Problem, target: Target) -> str | None:
        if problem.quantised:
            return f"it takes no quantised caches, such as {problem.cache_dtype.name}"
        if not problem.plain:
            return "it takes a padded key and a padded value of one width"
        if not isinstance(problem.seq_len, int) or problem.seq_len > 512:
            return f"it is for caches of up to 512 rows, not {problem.seq_len}"
        return None

    def forward(self, problem, target, queries, cache):
        rows = jnp.arange(problem.seq_len, dtype=jnp.int32)[None, None]
        start, end = queries.bounds(problem.seq_len)
        live = (rows >= start[..., None]) & (rows < end[..., None])  # [B, T or 1, S]
        # A masked probability is 0, but a dead row may hold NaN, and 0 times NaN is NaN.
        seen = live.any(axis=1)[:, :, None, None]
        key, value = (jnp.where(seen, jnp.asarray(x), 0).astype(problem.accum_dtype) for x in (cache.key, cache.value))

        grouped = (problem.batch, problem.num_tokens, problem.num_kv_heads, problem.group)
        q = problem.softmax_scale * queries.query.reshape(*grouped, -1).astype(problem.accum_dtype)
        x = jnp.einsum("bthgd,bshd->bthgs", q, key, precision="highest")
        if problem.logits_soft_cap is not None:
            x = problem.logits_soft_cap * jnp.tanh(x / problem.logits_soft_cap)
        x = jnp.where(live[:, :, None, None], x, -jnp.inf)

        sink = queries.sinks()
        sink = sink.reshape(*sink.shape[:2], *grouped[2:])
        top = jnp.maximum(x.max(axis=-1), sink)
        top = jnp.where(top > -jnp.inf, top, 0)  # a token with neither a key nor a sink
        weights = jnp.exp(x - top[..., None])
        total = weights.sum(axis=-1) + jnp.exp(sink - top)
        out = jnp.einsum("bthgs,bshd->bthgd", weights, value, precision="highest")
        out = out / jnp.where(total > 0, total, 1)[..., None]
        lse = top + jnp.log(total)
        return out.reshape(queries.query.shape).astype(problem.out_dtype), lse.reshape(queries.query.shape[:3])
