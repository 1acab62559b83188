"""The operands of an operation (`Queries`, `Cache`), its static facts (`Settings`, `Problem`) and its tuning hints (`FwdParams`).

Backends look at a `Problem` to decide whether they can do a call. The tuner derives its keys from a `Problem`, and error messages
quote it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from ._formats import accum_dtype, is_quantised
from ._messages import shown


# Each name that `jax.default_matmul_precision` accepts, as one of the three levels that every platform has. The level is never
# lower than the name says. A name that is not listed asks for exact or many-pass products: its level is HIGHEST.
_LEVELS = {
    jax.lax.Precision.DEFAULT: (
        *("default", "bfloat16", "BF16_BF16_F32", "BF16_BF16_BF16", "F16_F16_F32", "F16_F16_F16"),
        *("ANY_F8_ANY_F8_F32", "ANY_F8_ANY_F8_F32_FAST_ACCUM", "ANY_F8_ANY_F8_ANY", "ANY_F8_ANY_F8_ANY_FAST_ACCUM"),
    ),
    jax.lax.Precision.HIGH: ("high", "tensorfloat32", "TF32_TF32_F32"),
}


def precision_of(name: str | None) -> jax.lax.Precision:
    """The precision of products of float32 operands. None means exact products: the user has not asked for less."""
    return next((level for level, names in _LEVELS.items() if name in names), jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class FwdParams:
    """Tuning hints. Hints change the speed of a call and the rounding of its result. They never change its meaning.

    None leaves the choice to the backend. A backend ignores a hint that has no meaning for the backend.

    Attributes:
        block_size_heads: number of query rows per program. A query row is one token and one query head of a kv head.
        block_size_keys: number of keys per tile, or per chunk.
        num_key_splits: number of pieces per sequence: the live range of every sequence is cut into this many, whatever else is in
            the batch. If the hint is given, the bits of a sequence's result do not depend on the other sequences.
        num_warps: number of warps per program, on a GPU.
        num_stages: depth of the software pipeline, on a GPU.
        others: hints that a backend has of its own, by name: a mapping to positive integers. Kept as sorted pairs.

    Raises:
        TypeError: a hint is not an integer, or a name is not a string.
        ValueError: a hint is less than 1, or a name in `others` is that of another field.
    """

    block_size_heads: int | None = None
    block_size_keys: int | None = None
    num_key_splits: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    others: Mapping[str, int] | tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        fields = [field.name for field in dataclasses.fields(self) if field.name != "others"]
        for name in fields:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive(f"FwdParams.{name}", getattr(self, name), " or None"))
        others = dict(self.others)
        for name, value in others.items():
            if not isinstance(name, str):
                raise TypeError(f"FwdParams.others must have strings as names, got {shown(name)}.")
            if name in (*fields, "others"):
                raise ValueError(f"FwdParams.others has {name!r}, which is a field: pass FwdParams({name}={value}).")
            others[name] = positive(f"FwdParams.others[{name!r}]", value, " or None")
        object.__setattr__(self, "others", tuple(sorted(others.items())))

    @classmethod
    def of(cls, hints: Mapping[str, int]) -> "FwdParams":
        """Hints by name, whether fields or others."""
        fields = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.name in hints}
        return cls(**fields, others={name: value for name, value in hints.items() if name not in fields})

    @property
    def given(self) -> dict[str, int]:
        """The hints that are not None, others too, by name."""
        fields = {name: value for name, value in vars(self).items() if name != "others" and value is not None}
        return fields | dict(self.others)

    def over(self, defaults: "FwdParams") -> "FwdParams":
        """These hints, with the hints that are not given taken from `defaults`."""
        return FwdParams.of(defaults.given | self.given)


def positive(name: str, given: Any, or_none: str = "") -> int:
    """Checks that an argument is a positive integer, of any type."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise TypeError(f"{name} must be a positive integer{or_none}, got {shown(given)} of type {type(given).__name__}.")
    if given < 1:
        raise ValueError(f"{name} must be a positive integer{or_none}, got {given}.")
    return int(given)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """The query tokens of an operation, T per sequence of B sequences, with the range of rows that each token sees.

    Attributes:
        query: [B, T, Hq, D].
        start, end: int32 [B, T], or [B, 1] if all tokens of a sequence see the same rows. A token sees the rows
            start <= j < end, and no row if start >= end. A range may exceed the cache: `bounds` clips it. If start is None, ranges
            begin at row 0. If end is None, ranges end at row S.
        sink: [B, T, Hq] in the accumulation dtype, with size 1 for B or T if all sequences or tokens have the same. One logit in
            the softmax's denominator per token and query head, or -inf for no sink. None: no token has a sink.
    """

    query: Float[Array, "batch num_tokens num_q_heads head_dim"]
    start: Int32[Array, " batch #num_tokens"] | None = None
    end: Int32[Array, " batch #num_tokens"] | None = None
    sink: Float[Array, " #batch #num_tokens num_q_heads"] | None = None

    def bounds(self, seq_len) -> tuple[jax.Array, jax.Array]:
        """`start` and `end`, clipped to [0, seq_len]. Each is int32 [B, T] or [B, 1], never None."""
        sequences = (*self.query.shape[:-3], 1)  # there may be leading mapped axes
        start = jnp.zeros(sequences, jnp.int32) if self.start is None else jnp.clip(self.start, 0, seq_len)
        end = jnp.full(sequences, seq_len, jnp.int32) if self.end is None else jnp.clip(self.end, 0, seq_len)
        return start, end

    def hull(self, seq_len) -> tuple[jax.Array, jax.Array]:
        """The smallest range of rows per sequence that holds the ranges of all its tokens: first row and end, int32 [B] each.

        (seq_len, 0) if no token of the sequence sees a row.
        """
        start, end = self.bounds(seq_len)
        some = start < end
        start, end = jnp.where(some, start, seq_len), jnp.where(some, end, 0)
        return jnp.min(start, axis=-1), jnp.max(end, axis=-1)

    def sinks(self) -> jax.Array:
        """`sink`, or -inf for every head if there is none: [B or 1, T or 1, Hq] in the accumulation dtype."""
        if self.sink is not None:
            return self.sink
        return jnp.full((1, 1, self.query.shape[-2]), -jnp.inf, accum_dtype(self.query.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of B sequences, S rows per sequence.

    A padded cache holds row j of sequence b as `key[b, j]`. A pool holds N pages of page_size rows, and a sequence has P pages: row
    j of sequence b is row j % page_size of page `page_table[b, j // page_size]`, and S is P * page_size. A row that no token sees
    may hold anything. If no token sees a row of a page, the page table's entry for the page may be any integer.

    A quantised cache stands for `key * key_scale` and `value * value_scale`.

    Attributes:
        key: [B, S, Hkv, R] or [N, page_size, Hkv, R], in the query's dtype or a quantised dtype. The key is the first D columns. R
            is D, unless the value is in the key's rows: then R may be larger.
        value: [B, S, Hkv, Dv] or [N, page_size, Hkv, Dv], in the key's dtype. None: the value is the columns
            `problem.value_columns` of `key`.
        key_scale, value_scale: [B, Hkv, S] or [N, Hkv, page_size] in the accumulation dtype. An axis has size 1 if the scale is the
            same along the whole axis. None: no scale.
        page_table: int32 [B, P]. An entry may lie outside the pool: `pages` clips it. None: the cache is padded.
    """

    key: Shaped[Array, "pages page_size num_kv_heads row_dim"]
    value: Shaped[Array, "pages page_size num_kv_heads value_dim"] | None = None
    key_scale: Float[Array, " #pages #num_kv_heads #page_size"] | None = None
    value_scale: Float[Array, " #pages #num_kv_heads #page_size"] | None = None
    page_table: Int32[Array, "batch pages_per_sequence"] | None = None

    def pages(self) -> jax.Array:
        """The page table with its entries clipped to the pool: int32 [B, P]. A padded cache has one page per sequence."""
        num_pages = self.key.shape[-4]
        if self.page_table is None:
            return jnp.arange(num_pages, dtype=jnp.int32)[:, None]
        return jnp.clip(self.page_table, 0, num_pages - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The static facts of a call other than shapes and dtypes. They accompany the operation through every transformation.

    A backend must obey the first six fields. `fwd_params` are hints. `most_keys` serves only to choose defaults, and `maps` only to
    avoid copies.

    Attributes:
        softmax_scale: factor on the logits.
        logits_soft_cap: cap of the logits, or None.
        value_columns: (first, end), the columns of the key's rows that are the value. None if the cache has a value array.
        precision: precision of products of float32 operands. Sums are in the accumulation dtype at every precision.
        keeps_accum_dtype: whether output and d_query keep the accumulation dtype. They do if they are merged or differentiated
            afterwards.
        junk_between_tokens: whether rows that no token sees may lie between the ranges of a sequence's tokens. Such rows may hold
            NaN, like the rows before the first range and after the last.
        fwd_params: tuning hints.
        most_keys: an upper bound of the keys that a token sees, from the sliding window. The bound is a power of 16, so that calls
            with similar windows share a program. None: no bound but the lengths.
        maps: sizes of the axes over which `vmap` maps the cache, the outermost first. The first axis of each array of the cache is
            these axes and the array's own first axis, joined. A reshape of the array back to all these axes costs nothing. On
            several devices, the sizes are those on one device.
    """

    softmax_scale: float
    logits_soft_cap: float | None = None
    value_columns: tuple[int, int] | None = None
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
    keeps_accum_dtype: bool = False
    junk_between_tokens: bool = False
    fwd_params: FwdParams = FwdParams()
    most_keys: int | None = None
    maps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Settings):
    """All static facts of one decode operation: the shapes and dtypes of the operands, and the fields of `Settings`.

    While a function is exported with symbolic shapes, sizes may be symbolic dimensions. Otherwise they are integers.

    Attributes:
        batch: number of sequences, B.
        num_tokens: number of query tokens per sequence, T.
        seq_len: number of rows per sequence, S. For a cache in pages, P * page_size.
        num_q_heads: number of query heads, Hq, a multiple of `num_kv_heads`.
        num_kv_heads: number of key/value heads, Hkv.
        head_dim: head dimension of query and key, D.
        dtype: dtype of the query.
        cache_dtype: dtype of key and value: the query's dtype, or a quantised dtype.
        value_dim: head dimension of value and output, Dv. None means D.
        row_dim: number of columns of the key's rows, R. None means D. R may be larger than D if the value is in the key's rows.
        num_pages: number of pages of the pool, N. None for a padded cache.
        page_size: number of rows per page. None for a padded cache.
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
        """The problem of these operands, which may be arrays or their shapes and dtypes."""
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
        """Number of query heads per kv head, G."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def quantised(self) -> bool:
        """Whether the cache is quantised."""
        return is_quantised(self.cache_dtype)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The sizes that may be symbolic."""
        return self.batch, self.num_tokens, self.seq_len, *([self.num_pages] if self.paged else [])

    @property
    def paged(self) -> bool:
        """Whether the cache is a pool of pages."""
        return self.page_size is not None

    @property
    def plain(self) -> bool:
        """Whether key and value are two padded arrays with the same head dimension."""
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
