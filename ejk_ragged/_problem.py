"""What an operation is: its operands (`Queries`, `Cache`), and its static facts (`Problem`), among them the tuning hints.

A `Problem` is what backends look at to say whether they can do a call, what the tuner keys on, and what error messages quote.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from ._formats import accum_dtype, is_quantised
from ._messages import shown


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
                raise TypeError(f"FwdParams.{field.name} must be a positive integer or None, got {shown(given)}.")
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
    """T query tokens of each of B sequences, each with the rows that it sees. What is alike along an axis may have size 1 there.

    Attributes:
        query: [B, T, Hq, D].
        start, end: int32 [B, T], or [B, 1] where all tokens of a sequence see the same rows: the first row of a token and the end,
            exclusive; empty where start >= end. Both are as the caller's arguments gave them, and may lie outside the cache:
            `bounds` clips them. None: all rows from the first on, or up to the last.
        sink: accumulation dtype [B, T, Hq], 1 for B or T where alike: one logit in the softmax's denominator, -inf for none. None:
            no token has a sink.
    """

    query: Float[Array, "batch num_tokens num_q_heads head_dim"]
    start: Int32[Array, " batch #num_tokens"] | None = None
    end: Int32[Array, " batch #num_tokens"] | None = None
    sink: Float[Array, " #batch #num_tokens num_q_heads"] | None = None

    def bounds(self, seq_len) -> tuple[jax.Array, jax.Array]:
        """`start` and `end` within the cache, [0, S]: int32 [B, T] or [B, 1] each, never None."""
        sequences = (*self.query.shape[:-3], 1)  # mapped axes may stand in front
        start = jnp.zeros(sequences, jnp.int32) if self.start is None else jnp.clip(self.start, 0, seq_len)
        end = jnp.full(sequences, seq_len, jnp.int32) if self.end is None else jnp.clip(self.end, 0, seq_len)
        return start, end

    def hull(self, seq_len) -> tuple[jax.Array, jax.Array]:
        """The first row of each sequence that any token sees, and the end: int32 [B] each; (seq_len, 0) if no token sees a row."""
        start, end = self.bounds(seq_len)
        some = start < end
        start, end = jnp.where(some, start, seq_len), jnp.where(some, end, 0)
        return jnp.min(start, axis=-1), jnp.max(end, axis=-1)

    def sinks(self) -> jax.Array:
        """`sink`, or -inf for every head: accumulation dtype [B or 1, T or 1, Hq]."""
        if self.sink is not None:
            return self.sink
        return jnp.full((1, 1, self.query.shape[-2]), -jnp.inf, accum_dtype(self.query.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of B sequences of S rows: padded, or in a pool of N pages of `page_size` rows, P pages per sequence.

    Row j of sequence b is row j of `key[b]`, or, with a page table, row j % page_size of page `page_table[b, j // page_size]`. Rows
    that no token sees may hold anything, and so may entries of pages of which no token sees a row. A quantised cache stands for
    `key * key_scale` and `value * value_scale`.

    Attributes:
        key: [B, S, Hkv, R] or [N, page_size, Hkv, R], in the query's dtype or a quantised one. R is D; where the value is in the
            key's rows, R may be larger, and the key is the first D columns.
        value: [B, S, Hkv, Dv] or [N, page_size, Hkv, Dv], in the key's dtype. None: the columns `problem.value_columns` of `key`.
        key_scale, value_scale: accumulation dtype [B, Hkv, S] or [N, Hkv, page_size], each axis being 1 where the scale is alike
            along the axis. None: no scale.
        page_table: int32 [B, P], as the caller gave it: `pages` clips the entries. None: the cache is padded.
    """

    key: Shaped[Array, "pages page_size num_kv_heads row_dim"]
    value: Shaped[Array, "pages page_size num_kv_heads value_dim"] | None = None
    key_scale: Float[Array, " #pages #num_kv_heads #page_size"] | None = None
    value_scale: Float[Array, " #pages #num_kv_heads #page_size"] | None = None
    page_table: Int32[Array, "batch pages_per_sequence"] | None = None

    def pages(self) -> jax.Array:
        """Numbers of the pages of every sequence, within the pool: int32 [B, P]. A padded cache is one page per sequence."""
        num_pages = self.key.shape[-4]
        if self.page_table is None:
            return jnp.arange(num_pages, dtype=jnp.int32)[:, None]
        return jnp.clip(self.page_table, 0, num_pages - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The static facts of a call that are not of its shapes; they travel with the operation through every transformation.

    A backend must keep to the first six. `most_keys` is for tuning alone.

    Attributes:
        softmax_scale: factor on the logits.
        logits_soft_cap: cap of the logits, or None.
        value_columns: (first, end) of the columns of the key's rows that are the value, where the cache has no value of its own.
        precision: how products of float32 operands are to be taken; sums are in the accumulation dtype whatever it says.
        keeps_accum_dtype: whether output and d_query stay in the accumulation dtype, for they go on to be merged or differentiated.
        junk_between_tokens: whether there may be rows between the ranges of a sequence's tokens that no token sees. Such rows may
            hold NaN, like the rows before the first range and after the last.
        fwd_params: tuning hints.
        most_keys: no token sees more keys than this, as a window may say: a power of 16, so that calls with other windows share a
            program. None where nothing but the lengths bounds the keys.
    """

    softmax_scale: float
    logits_soft_cap: float | None = None
    value_columns: tuple[int, int] | None = None
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
    keeps_accum_dtype: bool = False
    junk_between_tokens: bool = False
    fwd_params: FwdParams = FwdParams()
    most_keys: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Settings):
    """One decode operation as a backend meets it: T query tokens of each of B sequences attend to ranges of rows of a cache.

    Sizes are integers, or symbolic dimensions while a function is exported with symbolic shapes. The other static facts are those
    of `Settings`.

    Attributes:
        batch: sequences, B.
        num_tokens: query tokens of a sequence, T.
        seq_len: rows of a sequence, S: of a padded cache as many as the cache has, with pages P * page_size.
        num_q_heads: query heads, Hq, a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads, Hkv.
        head_dim: head dimension of query and key, D.
        dtype: dtype of the query.
        cache_dtype: dtype of key and value: the query's, or a quantised one.
        value_dim: head dimension of value and output, Dv; None stands for D.
        row_dim: columns of the key's rows, R; None stands for D. R is D, or more where the value is in the key's rows.
        num_pages: pages of the pool, N; None for a padded cache.
        page_size: rows per page; None for a padded cache.
    """

    batch: int
    num_tokens: int
    seq_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype
    cache_dtype: np.dtype
    value_dim: Any = None
    row_dim: Any = None
    num_pages: int | None = None
    page_size: int | None = None

    def __post_init__(self):
        for name in ("value_dim", "row_dim"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.head_dim)

    @classmethod
    def of(cls, queries: Queries, cache: Cache, settings: Settings) -> "Problem":
        """The problem of these operands, or of their shapes."""
        batch, num_tokens, num_q_heads, head_dim = queries.query.shape
        num_pages, page_size, num_kv_heads, row_dim = cache.key.shape
        paged = cache.page_table is not None
        first, end = settings.value_columns or (0, cache.value.shape[-1])  # pyright: ignore[reportOptionalMemberAccess]
        return cls(
            batch=batch,
            num_tokens=num_tokens,
            seq_len=cache.page_table.shape[1] * page_size if paged else page_size,  # pyright: ignore[reportOptionalMemberAccess]
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=np.dtype(queries.query.dtype),
            cache_dtype=np.dtype(cache.key.dtype),
            value_dim=end - first,
            row_dim=row_dim,
            num_pages=num_pages if paged else None,
            page_size=page_size if paged else None,
            **vars(settings),
        )

    @property
    def group(self) -> int:
        """Query heads that share a kv head, G."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def quantised(self) -> bool:
        """Whether the cache is of a narrower dtype than the query."""
        return is_quantised(self.cache_dtype)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Those that may be symbolic."""
        return self.batch, self.num_tokens, self.seq_len, *([self.num_pages] if self.paged else [])

    @property
    def paged(self) -> bool:
        """Whether the cache is a pool of pages."""
        return self.page_size is not None

    @property
    def plain(self) -> bool:
        """Whether key and value are two padded arrays of one width."""
        return not self.paged and self.value_columns is None and self.value_dim == self.head_dim

    @property
    def accum_dtype(self) -> np.dtype:
        """Dtype of logits, softmax statistics and partial sums."""
        return accum_dtype(self.dtype)

    @property
    def out_dtype(self) -> np.dtype:
        """Dtype in which output and d_query are returned."""
        return self.accum_dtype if self.keeps_accum_dtype else self.dtype

    def __str__(self):
        tokens = "" if self.num_tokens == 1 else f"T {self.num_tokens}, "
        pages = f" in pages of {self.page_size}" if self.paged else ""
        value = "" if self.value_dim == self.head_dim and self.value_columns is None else f":{self.value_dim}"
        columns = "" if self.value_columns is None else f", value in columns {self.value_columns} of rows of {self.row_dim}"
        cache = f", {self.cache_dtype.name} cache" if self.quantised else ""
        cap = "" if self.logits_soft_cap is None else f", soft cap {self.logits_soft_cap:g}"
        return (
            f"B {self.batch}, {tokens}S {self.seq_len}{pages}, heads {self.num_q_heads}:{self.num_kv_heads}, "
            f"D {self.head_dim}{value}{columns}, {self.dtype.name}{cache}{cap}"
        )
