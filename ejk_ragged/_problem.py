"""What an operation is: its operands (`Queries`, `Cache`), and its static facts (`Problem`), among them the tuning hints.

A `Problem` is what backends look at to say whether they can do a call, what the tuner keys on, and what error messages quote.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped


FLOATING_DTYPES = ("float16", "bfloat16", "float32", "float64")
QUANTISED_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


def accum_dtype(dtype) -> np.dtype:
    """The dtype in which sums over values of `dtype` are held: float32, or float64 for float64."""
    return np.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# What `jax.default_matmul_precision` may be, as one of the three levels that every platform has, never a lower one than the name
# says. Of the names that are not here, those of exact or of many-pass products, the level is the highest.
_LEVELS = {
    jax.lax.Precision.DEFAULT: (
        *("default", "bfloat16", "BF16_BF16_F32", "BF16_BF16_BF16", "F16_F16_F32", "F16_F16_F16"),
        *("ANY_F8_ANY_F8_F32", "ANY_F8_ANY_F8_F32_FAST_ACCUM", "ANY_F8_ANY_F8_ANY", "ANY_F8_ANY_F8_ANY_FAST_ACCUM"),
    ),
    jax.lax.Precision.HIGH: ("high", "tensorfloat32", "TF32_TF32_F32"),
}


def precision_of(name: str | None) -> jax.lax.Precision:
    """How products of float32 operands are taken; for None, where nobody asks for less, exactly."""
    return next((level for level, names in _LEVELS.items() if name in names), jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class FwdParams:
    """Tuning hints. They change how fast an answer comes and how it is rounded, never what it means.

    Every field may be None, which leaves the choice to the backend, and a backend ignores a hint that has no meaning for it.

    Attributes:
        block_size_heads: rows of queries, a row for each token and query head of a kv head, that a program works on together.
        block_size_keys: keys of one tile, or of one chunk.
        num_key_splits: pieces that every sequence's live range is cut into, whatever else the batch holds. With it given, the
            bits of a sequence's result do not depend on its neighbours.
        num_warps: warps of one program, on a GPU.
        num_stages: depth of the software pipeline, on a GPU.

    Raises:
        TypeError: a field is neither None nor an integer.
        ValueError: a field is less than 1.
    """

    block_size_heads: int | None = None
    block_size_keys: int | None = None
    num_key_splits: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if given is None:
                continue
            if isinstance(given, bool) or not isinstance(given, int | np.integer):
                raise TypeError(f"FwdParams.{field.name} must be a positive integer or None, got {given!r}.")
            if given < 1:
                raise ValueError(f"FwdParams.{field.name} must be a positive integer or None, got {given}.")
            object.__setattr__(self, field.name, int(given))

    def over(self, defaults: "FwdParams") -> "FwdParams":
        """These hints, with `defaults` where one is None."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(defaults, **given)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """T query tokens of each of B sequences, each with the keys that it sees. What is alike along an axis may have size 1 there.

    Attributes:
        query: [B, T, Hq, D].
        start, end: int32 [B, T], or [B, 1] where all tokens of a sequence see the same keys: the first key of a token and the end,
            exclusive; empty where start >= end.
        sink: accumulation dtype [B, T, Hq], or less where alike: one logit in the softmax's denominator, -inf for none.
    """

    query: Float[Array, "batch num_tokens num_q_heads head_dim"]
    start: Int32[Array, " batch #num_tokens"]
    end: Int32[Array, " batch #num_tokens"]
    sink: Float[Array, " #batch #num_tokens num_q_heads"]

    def hull(self, seq_len) -> tuple[jax.Array, jax.Array]:
        """Of each sequence the first key that any token sees, and the end: int32 [B] each; (seq_len, 0) if none sees any."""
        some = self.start < self.end
        start, end = jnp.where(some, self.start, seq_len), jnp.where(some, self.end, 0)
        return jnp.min(start, axis=1), jnp.max(end, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of B sequences. A quantised cache stands for `key * key_scale` and `value * value_scale`.

    Attributes:
        key, value: [B, S, Hkv, D] in the query's dtype, or a quantised one; rows that no token sees may hold anything.
        key_scale, value_scale: accumulation dtype [B, Hkv, S], each being 1 where all sequences, heads or rows have the same; rows
            that no token sees may hold anything. None where there is none.
    """

    key: Shaped[Array, "batch seq_len num_kv_heads head_dim"]
    value: Shaped[Array, "batch seq_len num_kv_heads head_dim"]
    key_scale: Float[Array, " #batch #num_kv_heads #seq_len"] | None = None
    value_scale: Float[Array, " #batch #num_kv_heads #seq_len"] | None = None


GIVEN = frozenset({"start", "end", "sink"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The static facts of a call that are not of its shapes; they travel with the operation through every transformation.

    Attributes:
        softmax_scale: factor on the logits.
        logits_soft_cap: cap of the logits, or None.
        fwd_params: tuning hints.
        precision: how products of float32 operands are to be taken; sums are in the accumulation dtype whatever it says.
        given: which of "start", "end" and "sink" say something; the others hold 0, seq_len and -inf, and need not be read.
        partial: whether output and d_query go on to be merged with those of other keys, and are not rounded before.
        gaps: whether there may be rows between the ranges of a sequence's tokens that none of them sees; they may hold anything.
        most_keys: no token sees more keys than this, as a window may say: a power of 16, so that calls with other windows share a
            program. None where nothing but the lengths says it.
    """

    softmax_scale: float
    logits_soft_cap: float | None = None
    fwd_params: FwdParams = FwdParams()
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
    given: frozenset[str] = GIVEN
    partial: bool = False
    gaps: bool = False
    most_keys: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Settings):
    """One decode operation as a backend meets it: T query tokens of each of B sequences attend to ranges of a padded cache.

    Sizes are integers, or symbolic dimensions while a function is exported with symbolic shapes.

    Attributes:
        batch: sequences, B.
        num_tokens: query tokens of a sequence, T.
        seq_len: rows of the padded cache, S.
        num_q_heads: query heads, Hq, a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads, Hkv.
        head_dim: head dimension, D.
        dtype: dtype of the query.
        cache_dtype: dtype of key and value: the query's, or a quantised one.
        softmax_scale: factor on the logits.
        logits_soft_cap: cap of the logits, or None.
        fwd_params: tuning hints.
        precision: how products of float32 operands are to be taken; sums are in the accumulation dtype whatever it says.
        given: which of "start", "end" and "sink" say something; the others hold 0, seq_len and -inf, and need not be read.
        partial: whether output and d_query go on to be merged with those of other keys, and are not rounded before.
        gaps: whether there may be rows between the ranges of a sequence's tokens that none of them sees; they may hold anything.
        most_keys: no token sees more keys than this, as a window may say: a power of 16, so that calls with other windows share a
            program. None where nothing but the lengths says it.
    """

    batch: int
    num_tokens: int
    seq_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype
    cache_dtype: np.dtype

    @classmethod
    def of(cls, queries: Queries, cache: Cache, settings: Settings) -> "Problem":
        """The problem of these operands, or of their shapes."""
        batch, num_tokens, num_q_heads, head_dim = queries.query.shape
        _, seq_len, num_kv_heads, _ = cache.key.shape
        return cls(
            batch=batch,
            num_tokens=num_tokens,
            seq_len=seq_len,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=np.dtype(queries.query.dtype),
            cache_dtype=np.dtype(cache.key.dtype),
            **vars(settings),
        )

    @property
    def group(self) -> int:
        """Query heads that share a kv head, G."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def quantised(self) -> bool:
        """Whether the cache is of a narrower dtype than the query."""
        return self.cache_dtype.name in QUANTISED_DTYPES

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Those that may be symbolic."""
        return self.batch, self.num_tokens, self.seq_len

    @property
    def accum_dtype(self) -> np.dtype:
        """Dtype of logits, softmax statistics and partial sums."""
        return accum_dtype(self.dtype)

    @property
    def out_dtype(self) -> np.dtype:
        """Dtype in which output and d_query are returned."""
        return self.accum_dtype if self.partial else self.dtype

    def __str__(self):
        tokens = "" if self.num_tokens == 1 else f"T {self.num_tokens}, "
        cache = f", {self.cache_dtype.name} cache" if self.quantised else ""
        cap = "" if self.logits_soft_cap is None else f", soft cap {self.logits_soft_cap:g}"
        return (
            f"B {self.batch}, {tokens}S {self.seq_len}, heads {self.num_q_heads}:{self.num_kv_heads}, D {self.head_dim}, "
            f"{self.dtype.name}{cache}{cap}"
        )
