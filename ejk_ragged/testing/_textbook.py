"""A backend as a textbook would write it: plain JAX, all logits at once. It does every problem. It is slow on large caches."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from ejk_ragged._backend import Backend


class TextbookBackend(Backend):
    """A backend for tests, with two uses:

    - Tests of the code around backends use it because it compiles quickly.
    - Subclasses with a deliberate fault show that a test can fail.

    Like a kernel, it relies on the facts of the problem: without `junk_between_tokens` it does not clear the rows between the
    ranges of a sequence's tokens. It gathers a cache in pages into a padded cache first.
    """

    name: ClassVar[str] = "textbook"

    def supports(self, problem, target) -> str | None:
        del problem, target

    def forward(self, problem, target, queries, cache):
        del target
        x, _ = self.logits(problem, queries, cache)
        sink = self.by_kv_head(problem, queries.sinks())[..., None]
        top = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), sink)
        top = jnp.where(top > -jnp.inf, top, 0)
        weights = self.weights(jnp.exp(x - top))
        total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
        out = self.divided(_dot("bthgs,bshd->bthgd", weights, self.values(problem, queries, cache)), total)
        return self.by_head(out).astype(problem.out_dtype), self.by_head((jnp.log(total) + top)[..., 0])

    def backward(self, problem, target, queries, cache, lse, d_out, delta, *, wanted):
        del target
        accum = problem.accum_dtype
        split = functools.partial(self.by_kv_head, problem)
        x, slope = self.logits(problem, queries, cache)
        p = jnp.where(x > -jnp.inf, jnp.exp(jnp.minimum(x - split(lse)[..., None], 0)), 0)
        d_out = split(d_out).astype(accum)
        d_p = _dot("bthgd,bshd->bthgs", d_out, self.values(problem, queries, cache))
        d_x = self.d_logits(p, d_p, split(delta)[..., None]) * slope
        gradients = []
        if wanted.query:
            d_query = _dot("bthgs,bshd->bthgd", d_x, self.keys(problem, queries, cache))
            gradients.append(self.by_head(d_query).astype(problem.out_dtype))
        if wanted.key_value:
            d_key = _dot("bthgs,bthgd->bshd", d_x, split(queries.query).astype(accum))
            d_value = _dot("bthgs,bthgd->bshd", p, d_out)
            gradients += [x.astype(cache.key.dtype) for x in self.d_cache(problem, d_key, d_value)]
        return gradients

    # The steps that a faulty subclass may override.

    def live(self, problem, queries):
        """Which rows each token sees, [B, T, S]."""
        rows = jnp.arange(problem.seq_len, dtype=jnp.int32)[None, None]
        start, end = queries.bounds(problem.seq_len)
        return (rows >= start[..., None]) & (rows < end[..., None])

    def logits(self, problem, queries, cache):
        """Masked logits [B, T, Hkv, G, S], and their derivative with respect to the products q . k."""
        q = self.by_kv_head(problem, queries.query).astype(problem.accum_dtype)
        products = _dot("bthgd,bshd->bthgs", q, self.keys(problem, queries, cache))
        x, slope = self.bent(problem, products)
        live = self.live(problem, queries)[:, :, None, None]
        return jnp.where(live, x, -jnp.inf), slope

    def bent(self, problem, products):
        """The logits of the products q . k: scaled, then capped. And their derivative with respect to the products."""
        x, cap = problem.softmax_scale * products, problem.logits_soft_cap
        if cap is None:
            return x, problem.softmax_scale
        t = jnp.tanh(x / cap)
        return cap * t, problem.softmax_scale * (1 - t * t)

    def keys(self, problem, queries, cache):
        """The keys that the cache stands for, [B, S, Hkv, D], with 0 in rows that no token sees."""
        rows, scale = (self.gathered(problem, cache, x) for x in (cache.key[..., : problem.head_dim], cache.key_scale))
        return self.seen(problem, queries, rows, scale)

    def values(self, problem, queries, cache):
        """The values that the cache stands for, [B, S, Hkv, Dv], with 0 in rows that no token sees."""
        value = cache.key[..., slice(*problem.value_columns)] if problem.value_columns else cache.value
        rows, scale = (self.gathered(problem, cache, x) for x in (value, cache.value_scale))
        return self.seen(problem, queries, rows, scale)

    def gathered(self, problem, cache, x):
        """An array of the cache by sequence, gathered from the pages if the cache is a pool.

        Keys and values become [B, S, Hkv, ...], and scales become [B, Hkv or 1, S].
        """
        if x is None or not problem.paged:
            return x
        x = x if x.ndim == 4 else x.swapaxes(1, 2)
        x = jnp.broadcast_to(x, (problem.num_pages, problem.page_size, *x.shape[2:]))[self.pages(cache)]
        x = x.reshape(problem.batch, problem.seq_len, *x.shape[3:])
        return x if x.ndim == 4 else x.swapaxes(1, 2)

    def pages(self, cache):
        return cache.pages()

    def seen(self, problem, queries, rows, scale):
        """The rows times their scales, with 0 in rows that no token sees."""
        rows = rows.astype(problem.accum_dtype)
        if scale is not None:
            rows = rows * scale.swapaxes(1, 2)[..., None]
        if not problem.junk_between_tokens:
            start, end = (x[:, None] for x in queries.hull(problem.seq_len))
            queries = dataclasses.replace(queries, start=start, end=end)
        return jnp.where(jnp.any(self.live(problem, queries), axis=1)[..., None, None], rows, 0)

    def d_cache(self, problem, d_key, d_value):
        """The gradients of the cache's arrays, from the gradients of keys and values."""
        if problem.value_columns is None:
            return [d_key, d_value]
        d_rows = jnp.zeros((*d_key.shape[:-1], problem.row_dim), d_key.dtype).at[..., : problem.head_dim].add(d_key)
        return [d_rows.at[..., slice(*problem.value_columns)].add(d_value)]

    def weights(self, weights):
        return weights

    def divided(self, values, total):
        return values / jnp.where(total > 0, total, 1)

    def d_logits(self, p, d_p, delta):
        return p * (d_p - delta)

    # Shapes.

    def by_kv_head(self, problem, x):
        """[B, T, Hq, ...] as [B, T, Hkv, G, ...]."""
        return x.reshape(*x.shape[:2], problem.num_kv_heads, problem.group, *x.shape[3:])

    def by_head(self, x):
        return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
