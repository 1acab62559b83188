"""How the cache is walked: which sequences together, and each one's live range chunk by chunk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


# Rows of a chunk where `block_size_keys` does not say.
CHUNK_ROWS = {"cpu": 256}
CHUNK_ROWS_ELSEWHERE = 128


def default_rows(target) -> int:
    return CHUNK_ROWS.get(target.platform, CHUNK_ROWS_ELSEWHERE)


def chunk_rows(problem):
    """Rows of a chunk: never more than the cache has, which may be a symbolic size."""
    return jax.core.min_dim(problem.fwd_params.block_size_keys, problem.seq_len)


def by_sequences(target, some, carry, per_sequence):
    """Run `some(first, carry, *per_sequence) -> (carry, results)` over all sequences, each array [B, ...].

    On a CPU one sequence after another, so that time follows the live tokens of the whole batch. Elsewhere all of them at once, as
    one sequence would starve the device: time follows the longest live range.

    Args:
        target: where it runs.
        some: takes the index of its first sequence and arrays [n, ...].
        carry: what is updated in place from call to call.
        per_sequence: arrays [B, ...].
    """
    if target.platform != "cpu":
        return some(None, carry, *per_sequence)

    def one(carry, xs):
        b, *arrays = xs
        carry, results = some(b, carry, *(x[None] for x in arrays))
        return carry, [x[0] for x in results]

    batch = per_sequence[0].shape[0]
    return lax.scan(one, carry, (jnp.arange(batch, dtype=jnp.int32), *per_sequence))


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The chunks of the live ranges of n sequences: chunk i holds rows start + i * size and on, of each its own.

    Near the end of the cache a chunk cannot be read whole; it is moved back, and the rows that earlier chunks had are masked.

    Attributes:
        first: index of the only sequence, or None for the whole batch.
        start, end: [n].
        size: rows of a chunk, at most `seq_len`.
        seq_len: rows of the cache.
    """

    first: Any
    start: jax.Array
    end: jax.Array
    size: int
    seq_len: int

    @property
    def count(self):
        """Chunks of the longest live range."""
        return jnp.max(jnp.maximum(self.end - self.start + self.size - 1, 0) // self.size)

    def _begin(self, i):
        begin = self.start + i * self.size
        return begin, jnp.clip(begin, 0, self.seq_len - self.size)

    def live(self, i):
        """[n, size]: which rows of chunk i are in the live range, and which of these no chunk before held."""
        begin, row = self._begin(i)
        rows = row[:, None] + jnp.arange(self.size, dtype=row.dtype)
        live = (rows >= self.start[:, None]) & (rows < self.end[:, None])
        return live, live & (rows >= begin[:, None])

    def load(self, cache, i):
        """Chunk i of `cache` [B, S, ...], as [n, size, ...]."""
        _, row = self._begin(i)
        if self.first is None:
            return jax.vmap(lambda x, r: lax.dynamic_slice_in_dim(x, r, self.size))(cache, row)
        zeros = (0,) * (cache.ndim - 2)
        return lax.dynamic_slice(cache, (self.first, row[0], *zeros), (1, self.size, *cache.shape[2:]))

    def store(self, cache, i, chunk):
        """`cache` with `chunk` at the rows of chunk i."""
        _, row = self._begin(i)
        if self.first is None:
            return jax.vmap(lambda x, u, r: lax.dynamic_update_slice_in_dim(x, u, r, 0))(cache, chunk, row)
        return lax.dynamic_update_slice(cache, chunk, (self.first, row[0], *(0,) * (cache.ndim - 2)))


# ---------------------------------------------------------------------------------------------------------------------------
# The arithmetic of one chunk: n sequences, C rows, H kv heads of G query heads each


class Arithmetic:
    """Contractions, in the accumulation dtype, in the form that suits the target."""

    def __init__(self, problem, target):
        self.accum = problem.accum_dtype
        self.scale = problem.softmax_scale
        self.cap = problem.logits_soft_cap
        self.precision = problem.matmul_precision or "highest"
        self.on_cpu = target.platform == "cpu"

    def heads(self, x, num_kv_heads):
        """[n, Hq, ...] as [n, H, G, ...] in the accumulation dtype."""
        return x.reshape(x.shape[0], num_kv_heads, -1, *x.shape[2:]).astype(self.accum)

    def dots(self, q, rows):
        """q [n, H, G, D] with every row of [n, C, H, D]: [n, C, H, G]."""
        if self.on_cpu:
            return jnp.sum(q[:, None] * rows[:, :, :, None], axis=-1)
        return jnp.einsum("nhgd,nchd->nchg", q, rows, precision=self.precision)

    def weighted(self, weights, rows):
        """Rows [n, C, H, D] summed with weights [n, C, H, G]: [n, H, G, D]."""
        if self.on_cpu:
            return jnp.sum(weights[..., None] * rows[:, :, :, None], axis=1)
        return jnp.einsum("nchg,nchd->nhgd", weights, rows, precision=self.precision)

    def outer(self, weights, q):
        """Weights [n, C, H, G] times q [n, H, G, D], summed over the group: [n, C, H, D]."""
        if self.on_cpu:
            return jnp.sum(weights[..., None] * q[:, None], axis=3)
        return jnp.einsum("nchg,nhgd->nchd", weights, q, precision=self.precision)

    def logits(self, q, k):
        """Logits [n, C, H, G], scaled and capped, and their slope in the uncapped ones."""
        x = self.scale * self.dots(q, k)
        if self.cap is None:
            return x, 1
        bent = jnp.tanh(x / self.cap)
        return self.cap * bent, 1 - bent * bent
