"""Named decode problems: small ones that between them meet every feature, and realistic steps of known models.

Tests, the report of `python -m ejk_ragged` and the benchmarks share them.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._oracle import seen_rows


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode problem: shapes, features, and how its lengths are drawn.

    Attributes:
        name: for reports.
        batch, seq_len, num_q_heads, num_kv_heads, head_dim, dtype: shapes and the name of the query's dtype.
        lengths: ("full",) passes none; ("uniform", low, high) draws ends within low..high; ("skew", low, high) fills the first
            sequence and draws the other ends; ("ranges", (start, end), ...) are those, for one sequence after another.
        softmax_scale, sliding_window, logits_soft_cap: as in the call.
        sinks: None, or ("shared", N), ("query", N) or ("kv", N): N sinks for all heads, for each query head, for each kv head.
        num_tokens: of a query of four axes, or None for one of three.
        query_lengths: None, or how many tokens there are, for one sequence after another.
        cache_dtype: the name of a quantised cache's dtype, or None for a cache in `dtype`.
        scales: of a quantised cache, by their axes: "number", "head", "sequence" (and head), "row" (and sequence and head), or
            None.
        integers: the name of the lengths' dtype. A length beyond the dtype becomes the nearest end of the dtype.
    """

    name: str
    batch: int
    seq_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    lengths: tuple = ("full",)
    softmax_scale: float | None = None
    sliding_window: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    sinks: tuple[str, int] | None = None
    num_tokens: int | None = None
    query_lengths: tuple[int, ...] | None = None
    cache_dtype: str | None = None
    scales: str | None = None
    integers: str = "int32"

    def ranges(self, seed: int = 0):
        """sequence_start and sequence_end, integers [B] or None."""
        rng = np.random.default_rng([seed, 1])
        match self.lengths:
            case ("full",):
                return None, None
            case ("uniform", low, high):
                return None, self._integers(rng.integers(low, high + 1, self.batch))
            case ("skew", low, high):
                end = rng.integers(low, high + 1, self.batch)
                end[0] = self.seq_len
                return None, self._integers(end)
            case ("ranges", *pairs):
                start, end = zip(*self._in_turn(pairs), strict=True)
                return self._integers(start), self._integers(end)
        raise ValueError(f"unknown lengths {self.lengths!r}")

    def draw(self, seed: int = 0, poison: bool = False) -> dict[str, Any]:
        """Keyword arguments, arrays in NumPy, for `ragged_decode_attention` and for the oracle; what is None is left out.

        With `poison`, cache and scales hold junk at the rows that no token sees: NaN and infinities, where their dtypes have them.
        """
        rng = np.random.default_rng([seed, 2])
        dtype = np.dtype(jnp.dtype(self.dtype))
        tokens = () if self.num_tokens is None else (self.num_tokens,)
        query = _normal(rng, (self.batch, *tokens, self.num_q_heads, self.head_dim), dtype)
        cache = (self.batch, self.seq_len, self.num_kv_heads, self.head_dim)
        held = dtype if self.cache_dtype is None else np.dtype(jnp.dtype(self.cache_dtype))
        key, value = _normal(rng, cache, held), _normal(rng, cache, held)
        key_scale, value_scale = self._scale(rng), self._scale(rng)
        if poison:
            for b in range(self.batch):
                dead = np.delete(np.arange(self.seq_len), self._seen(b, seed))
                for rows in (key[b], value[b]):
                    rows[dead] = rng.choice(_junk(held), (len(dead), *rows.shape[1:]))
                for scale in (key_scale, value_scale) if self.scales == "row" else ():
                    scale[b][:, dead] = rng.choice(_junk(scale.dtype), (self.num_kv_heads, len(dead)))
        aux = None
        if self.sinks is not None:
            kind, count = self.sinks
            heads = {"shared": (), "query": (self.num_q_heads,), "kv": (self.num_kv_heads,)}[kind]
            # Raised a little, so that they weigh something beside a hundred keys.
            aux = (rng.standard_normal((*heads, count)) + 2).astype(np.float64 if self.dtype == "float64" else np.float32)
        start, end = self.ranges(seed)
        arguments = {
            "query": query,
            "key": key,
            "value": value,
            "sequence_start": start,
            "sequence_end": end,
            "softmax_scale": self.softmax_scale,
            "sliding_window": self.sliding_window,
            "logits_soft_cap": self.logits_soft_cap,
            "softmax_aux": aux,
            "query_lengths": self._query_lengths,
            "key_scale": key_scale,
            "value_scale": value_scale,
        }
        return {name: value for name, value in arguments.items() if value is not None}

    def _in_turn(self, values):
        return [values[b % len(values)] for b in range(self.batch)]

    def _integers(self, values):
        bounds = np.iinfo(self.integers)
        return np.array([min(max(int(value), bounds.min), bounds.max) for value in values], self.integers)

    @property
    def _query_lengths(self):
        return None if self.query_lengths is None else self._integers(self._in_turn(self.query_lengths))

    def _scale(self, rng) -> Any:
        """Such that an int8 cache, drawn with steps of a 32nd, stands for values of about 1."""
        shapes = {
            "head": (self.num_kv_heads,),
            "sequence": (self.batch, self.num_kv_heads),
            "row": (self.batch, self.num_kv_heads, self.seq_len),
        }
        if self.scales is None:
            return None
        size = 1 / _STEPS if self.cache_dtype == "int8" else 1.0
        if self.scales == "number":
            return size
        return (size * rng.uniform(0.5, 1.5, shapes[self.scales])).astype(np.float32)

    def _seen(self, b, seed):
        return seen_rows(
            b, self.seq_len, *self.ranges(seed), self.sliding_window, self._query_lengths, num_tokens=self.num_tokens or 1
        )

    def live_tokens(self, seed: int = 0) -> int:
        """Keys that any token sees, over all sequences."""
        return sum(len(self._seen(b, seed)) for b in range(self.batch))

    def live_bytes(self, seed: int = 0) -> int:
        """Bytes of the K and V rows that any token sees, and of their scales: what a decode step has to read."""
        itemsize = jnp.dtype(self.cache_dtype or self.dtype).itemsize
        row = self.head_dim * itemsize + (4 if self.scales == "row" else 0)
        return self.live_tokens(seed) * 2 * self.num_kv_heads * row


_POOL = 4_194_301  # a prime, so that the rows of a larger cache don't repeat in step
_STEPS = 32  # of an int8 cache, in a standard deviation


def _normal(rng, shape, dtype):
    """Normal values, drawn once for a few million and repeated beyond: large caches take seconds otherwise."""
    size = int(np.prod(shape))
    pool = rng.standard_normal(min(size, _POOL), np.float32 if dtype.itemsize < 8 else np.float64)
    pool = np.clip(np.rint(_STEPS * pool), -127, 127) if dtype == np.int8 else pool
    return np.resize(pool.astype(dtype), shape)


@functools.cache
def _junk(dtype):
    """The worst that an array of `dtype` can hold."""
    if dtype == np.int8:
        return np.array([-128, 127], dtype)
    return np.array([np.nan, np.inf, -np.inf], np.float32).astype(dtype)


# Empty in two ways, one key, all keys, out of bounds on both sides, reversed.
_EDGES = ("ranges", (0, 0), (9, 9), (4, 5), (0, 67), (-5, 1000), (60, 8))
# Fewer keys than tokens, a start among them, all, far beyond the end of the cache.
_SHORT = ("ranges", (0, 3), (40, 42), (0, 67), (7, 1000), (0, 50), (5, 5))

# A full cache: drafts of which some rows, all rows or no rows fit.
_FULL = ("ranges", (0, 69), (60, 68), (0, 71), (5, 67), (0, 80), (66, 70))

# Small: every feature alone, then together.
CHECKS = (
    Case("mha", 2, 67, 4, 4, 32),
    Case("mqa", 2, 67, 5, 1, 64, lengths=("uniform", 1, 67)),
    Case("gqa-7", 3, 67, 14, 2, 16, lengths=("uniform", 1, 67)),
    Case("edges", 6, 67, 4, 2, 32, lengths=_EDGES),
    Case("window", 6, 67, 4, 2, 32, lengths=_EDGES, sliding_window=(7, 0)),
    Case("cap", 2, 67, 4, 2, 32, lengths=("uniform", 1, 67), logits_soft_cap=1.5),
    Case("scale", 2, 67, 4, 2, 32, lengths=("uniform", 1, 67), softmax_scale=0.4),
    Case("sinks-shared", 6, 67, 4, 2, 32, lengths=_EDGES, sinks=("shared", 3)),
    Case("sinks-query", 6, 67, 4, 2, 32, lengths=_EDGES, sinks=("query", 1)),
    Case("sinks-kv", 6, 67, 4, 2, 32, lengths=_EDGES, sinks=("kv", 2)),
    Case("d-80", 2, 67, 6, 2, 80, lengths=("ranges", (3, 40), (11, 67))),
    Case("bfloat16", 4, 300, 8, 2, 64, "bfloat16", lengths=("uniform", 1, 300)),
    Case("float16", 4, 300, 8, 2, 64, "float16", lengths=("uniform", 1, 300)),
    Case("tokens", 6, 67, 4, 2, 32, lengths=_SHORT, num_tokens=5),
    Case("tokens-padded", 6, 67, 4, 2, 32, lengths=_SHORT, num_tokens=5, query_lengths=(5, 2, 0, 4, 9, 1)),
    Case("tokens-window", 6, 67, 4, 2, 32, lengths=_SHORT, sliding_window=(3, 0), num_tokens=5, query_lengths=(5, 2, 3, 4, 1, 0)),
    Case("tokens-many", 2, 90, 14, 2, 16, lengths=("uniform", 50, 90), num_tokens=20),
    Case("tokens-beyond", 6, 67, 4, 2, 32, lengths=_FULL, num_tokens=4, query_lengths=(4, 3, 4, 4, 2, 4)),
    Case("window-beyond", 6, 67, 4, 2, 32, lengths=_FULL, sliding_window=(9, 0), num_tokens=4, query_lengths=(4, 3, 4, 4, 2, 4)),
    Case("int8", 6, 67, 4, 2, 32, lengths=_EDGES, cache_dtype="int8", scales="row"),
    Case("int8-heads", 3, 67, 4, 2, 32, "bfloat16", ("uniform", 1, 67), cache_dtype="int8", scales="head"),
    Case("e4m3", 6, 67, 4, 2, 32, "bfloat16", _EDGES, cache_dtype="float8_e4m3fn", scales="sequence"),
    Case("e5m2", 2, 67, 4, 2, 32, "float16", ("uniform", 1, 67), cache_dtype="float8_e5m2"),
    Case("all", 6, 67, 10, 2, 80, "bfloat16", _EDGES, 0.2, (20, -1), 1.5, ("query", 2)),
    Case("all-int8", 6, 67, 10, 2, 80, "bfloat16", _SHORT, 0.2, (20, -1), 1.5, ("query", 2), 4, (4, 1, 3, 0), "int8", "row"),
)
