"""Named decode problems: small ones that between them meet every feature, and realistic steps of known models.

Tests, the report of `python -m ejk_ragged` and the benchmarks share them.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ._oracle import live_rows


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode problem: shapes, features, and how its lengths are drawn.

    Attributes:
        name: for reports.
        batch, seq_len, num_q_heads, num_kv_heads, head_dim, dtype: shapes and the name of the dtype.
        lengths: ("full",) passes none; ("uniform", low, high) draws ends within low..high; ("skew", low, high) fills the first
            sequence and draws the other ends; ("ranges", (start, end), ...) are those, for one sequence after another.
        softmax_scale, sliding_window, logits_soft_cap: as in the call.
        sinks: None, or ("shared", N), ("query", N) or ("kv", N): N sinks for all heads, for each query head, for each kv head.
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

    def ranges(self, seed: int = 0):
        """sequence_start and sequence_end, int32 [B] or None."""
        rng = np.random.default_rng([seed, 1])
        match self.lengths:
            case ("full",):
                return None, None
            case ("uniform", low, high):
                return None, rng.integers(low, high + 1, self.batch, dtype=np.int32)
            case ("skew", low, high):
                end = rng.integers(low, high + 1, self.batch, dtype=np.int32)
                end[0] = self.seq_len
                return None, end
            case ("ranges", *pairs):
                start, end = np.array([pairs[b % len(pairs)] for b in range(self.batch)], np.int32).T
                return start.copy(), end.copy()
        raise ValueError(f"unknown lengths {self.lengths!r}")

    def draw(self, seed: int = 0, poison: bool = False) -> dict:
        """Keyword arguments, arrays in NumPy, for `ragged_decode_attention` and for the oracle; what is None is left out.

        With `poison`, the cache holds NaN and infinities outside the live ranges.
        """
        rng = np.random.default_rng([seed, 2])
        dtype = np.dtype(jnp.dtype(self.dtype))
        cache = (self.batch, self.seq_len, self.num_kv_heads, self.head_dim)
        query = _normal(rng, (self.batch, self.num_q_heads, self.head_dim), dtype)
        key, value = _normal(rng, cache, dtype), _normal(rng, cache, dtype)
        if poison:
            junk = np.array([np.nan, np.inf, -np.inf], dtype)
            for b in range(self.batch):
                dead = np.delete(np.arange(self.seq_len), self._live_rows(b, seed))
                key[b, dead] = rng.choice(junk, (len(dead), *cache[2:]))
                value[b, dead] = rng.choice(junk, (len(dead), *cache[2:]))
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
        }
        return {name: value for name, value in arguments.items() if value is not None}

    def _live_rows(self, b, seed):
        return live_rows(b, self.seq_len, *self.ranges(seed), self.sliding_window)

    def live_tokens(self, seed: int = 0) -> int:
        """Keys that are valid, over all sequences, after the window."""
        return sum(len(self._live_rows(b, seed)) for b in range(self.batch))

    def live_bytes(self, seed: int = 0) -> int:
        """Bytes of the K and V rows that are valid: what a decode step has to read."""
        return self.live_tokens(seed) * 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize


_POOL = 4_194_301  # a prime, so that the rows of a larger cache don't repeat in step


def _normal(rng, shape, dtype):
    """Normal values, drawn once for a few million and repeated beyond: large caches take seconds otherwise."""
    size = int(np.prod(shape))
    return np.resize(rng.standard_normal(min(size, _POOL), np.float32 if dtype.itemsize < 8 else np.float64).astype(dtype), shape)


# Empty in two ways, one key, all keys, out of bounds on both sides, reversed.
_EDGES = ("ranges", (0, 0), (9, 9), (4, 5), (0, 67), (-5, 1000), (60, 8))

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
    Case("all", 6, 67, 10, 2, 80, "bfloat16", _EDGES, 0.2, (20, -1), 1.5, ("query", 2)),
)

# Realistic decode steps.
ROWS = (
    Case("full", 8, 32768, 32, 8, 128, "bfloat16"),
    Case("ragged", 64, 16384, 32, 8, 128, "bfloat16", ("uniform", 2048, 16384)),
    Case("skew", 32, 32768, 64, 8, 128, "bfloat16", ("skew", 128, 1023)),
    Case("one", 1, 131072, 32, 8, 128, "bfloat16"),
    Case("small", 1, 4096, 32, 8, 128, "bfloat16"),
    Case("many-small", 16, 1024, 32, 8, 128, "bfloat16", ("uniform", 128, 1024)),
    Case("mha", 16, 4096, 32, 32, 128, "bfloat16", ("uniform", 512, 4096)),
    Case("mqa", 64, 8192, 32, 1, 128, "bfloat16", ("uniform", 1024, 8192)),
    Case("window", 32, 32768, 64, 8, 64, "bfloat16", ("uniform", 4096, 32768), sliding_window=(4096, 0)),
    Case("cap", 16, 8192, 16, 8, 256, "bfloat16", ("uniform", 1024, 8192), logits_soft_cap=50.0),
    Case("llama-3-8b", 32, 8192, 32, 8, 128, "bfloat16", ("uniform", 1024, 8192)),
    Case("llama-3-70b", 16, 8192, 64, 8, 128, "bfloat16", ("uniform", 1024, 8192)),
    Case("qwen-2.5-7b", 32, 16384, 28, 4, 128, "bfloat16", ("uniform", 512, 16384)),
    Case("mistral-7b", 32, 16384, 32, 8, 128, "bfloat16", ("uniform", 512, 16384), sliding_window=(4095, 0)),
    Case("gemma-2-9b", 16, 4096, 16, 8, 256, "bfloat16", ("uniform", 512, 4096), logits_soft_cap=50.0),
    Case("gpt-oss-120b", 64, 8192, 64, 8, 64, "bfloat16", ("uniform", 64, 8192), sliding_window=(127, 0), sinks=("query", 1)),
)

# A step that two CPU cores do in a fraction of a second.
CPU_STEP = Case("cpu-step", 8, 4096, 32, 8, 128, "float32", ("skew", 100, 700))

# What the benchmark measures on a CPU. The two of few live tokens have the same lengths in caches of two sizes.
CPU_ROWS = (
    Case("cpu-full", 8, 4096, 32, 8, 128, "float32"),
    Case("cpu-full-bf16", 8, 4096, 32, 8, 128, "bfloat16"),
    Case("cpu-skew", 8, 4096, 32, 8, 128, "float32", ("skew", 100, 700)),
    Case("cpu-short-4096", 8, 4096, 32, 8, 128, "float32", ("uniform", 100, 700)),
    Case("cpu-short-32768", 8, 32768, 32, 8, 128, "float32", ("uniform", 100, 700)),
)
