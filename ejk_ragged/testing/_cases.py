"""`Case`: a named decode problem. `CHECKS`: small cases that together use every feature.

The tests, the report of `python -m ejk_ragged` and the benchmarks use `Case`.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._oracle import seen_rows


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode problem: shapes, features, and the distribution of its lengths.

    Attributes:
        name: name of the case in reports.
        batch, seq_len, num_q_heads, num_kv_heads, head_dim: shapes.
        dtype: name of the query's dtype.
        lengths: one of four distributions. ("full",) passes no lengths. ("uniform", low, high) draws ends from low to high,
            inclusive. ("skew", low, high) draws ends likewise, but the first sequence is full. ("ranges", (start, end), ...) gives
            the ranges of the sequences in turn, and starts again when there are more sequences than ranges.
        softmax_scale, sliding_window, logits_soft_cap: the arguments of the call.
        sinks: ("shared", N) for N sinks shared by all heads, ("query", N) for N sinks per query head, ("kv", N) for N sinks per kv
            head, or None.
        num_tokens: number of tokens of a query of four axes. None for a query of three axes.
        query_lengths: the numbers of tokens of the sequences in turn, as for ("ranges", ...), or None.
        cache_dtype: name of a quantised cache's dtype. None for a cache in `dtype`.
        scales: shape of a quantised cache's scales. "number", "head" for one per kv head, "sequence" for one per sequence and kv
            head, "row" for one per row and kv head, or None for no scales. A case with pages may not have "sequence".
        page_size: rows per page, or None for a padded cache. Pages are in random order, and some are shared between sequences. The
            table has one more entry per sequence than needed. Entries that no token needs are junk.
        value_dim: head dimension of the value. None means head_dim.
        value_columns: the columns of the key's rows that are the value. None for a cache with a value array.
        row_dim: number of columns of the key's rows. None means head_dim.
        integers: name of the lengths' dtype. A length beyond the dtype becomes the nearest value of the dtype.
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
    page_size: int | None = None
    value_dim: int | None = None
    value_columns: tuple[int, int] | None = None
    row_dim: int | None = None

    @property
    def rows(self) -> int:
        """Number of rows per sequence, S: `seq_len`, or for a cache in pages the rows of all entries of the page table."""
        return self.seq_len if self.page_size is None else self._pages * self.page_size

    @property
    def _pages(self):
        return -(-self.seq_len // self.page_size) + 1  # pyright: ignore[reportOperatorIssue]

    def ranges(self, seed: int = 0) -> tuple[np.ndarray | None, np.ndarray | None]:
        """sequence_start and sequence_end, each integers [B] or None."""
        rng = np.random.default_rng([seed, 1])
        match self.lengths:
            case ("full",):
                return None, None
            case ("uniform", low, high):
                return None, self._integers(rng.integers(low, high + 1, self.batch))
            case ("skew", low, high):
                end = rng.integers(low, high + 1, self.batch)
                end[0] = self.rows
                return None, self._integers(end)
            case ("ranges", *pairs):
                start, end = zip(*self._in_turn(pairs), strict=True)
                return self._integers(start), self._integers(end)
        raise ValueError(f"unknown lengths {self.lengths!r}")

    def draw(self, seed: int = 0, poison: bool = False) -> dict[str, Any]:
        """Keyword arguments for `ragged_decode_attention` and for the oracle, with NumPy arrays. What is None is left out.

        With `poison`, cache and scales hold junk in the rows that no token sees: NaN and infinities, if the dtype has them.
        """
        rng = np.random.default_rng([seed, 2])
        dtype = np.dtype(jnp.dtype(self.dtype))
        tokens = () if self.num_tokens is None else (self.num_tokens,)
        query = _normal(rng, (self.batch, *tokens, self.num_q_heads, self.head_dim), dtype)
        table = self._page_table(rng, seed)
        pool = self.batch if table is None else self.batch * self._pages + 2
        rows = pool, self.rows if self.page_size is None else self.page_size
        held = dtype if self.cache_dtype is None else np.dtype(jnp.dtype(self.cache_dtype))
        widths = self.row_dim or self.head_dim, *[self.value_dim or self.head_dim] * (self.value_columns is None)
        cache = [_normal(rng, (*rows, self.num_kv_heads, width), held) for width in widths]
        key_scale, value_scale = self._scale(rng, rows), self._scale(rng, rows) if self.value_columns is None else None
        if poison:
            dead = ~self._seen_places(rows, table, seed)
            for array in cache:
                array[dead] = rng.choice(_junk(held), array[dead].shape)
            for scale in (key_scale, value_scale) if self.scales == "row" else ():
                if scale is not None:
                    scale.swapaxes(1, 2)[dead] = rng.choice(_junk(scale.dtype), (int(dead.sum()), self.num_kv_heads))
        aux = None
        if self.sinks is not None:
            kind, count = self.sinks
            heads = {"shared": (), "query": (self.num_q_heads,), "kv": (self.num_kv_heads,)}[kind]
            # The mean is 2 and not 0, so that sinks have a noticeable weight against a hundred keys.
            aux = (rng.standard_normal((*heads, count)) + 2).astype(np.float64 if self.dtype == "float64" else np.float32)
        start, end = self.ranges(seed)
        arguments = {
            "query": query,
            "key": cache[0],
            "value": cache[1] if self.value_columns is None else None,
            "sequence_start": start,
            "sequence_end": end,
            "softmax_scale": self.head_dim**-0.5 if self.value_columns and self.softmax_scale is None else self.softmax_scale,
            "sliding_window": self.sliding_window,
            "logits_soft_cap": self.logits_soft_cap,
            "softmax_aux": aux,
            "page_table": table,
            "value_columns": self.value_columns,
            "query_lengths": self._query_lengths,
            "key_scale": key_scale,
            "value_scale": value_scale,
        }
        needed = ("value",) if self.value_columns else ()
        return {name: value for name, value in arguments.items() if value is not None or name in needed}

    def _in_turn(self, values):
        return [values[b % len(values)] for b in range(self.batch)]

    def _integers(self, values):
        bounds = np.iinfo(self.integers)
        return np.array([min(max(int(value), bounds.min), bounds.max) for value in values], self.integers)

    @property
    def _query_lengths(self):
        return None if self.query_lengths is None else self._integers(self._in_turn(self.query_lengths))

    def _scale(self, rng, rows) -> Any:
        """A scale, random unless it is a number: about 1 / `_STEPS` for an int8 cache, which then stands for normal values, or
        about 1 for float8."""
        shapes = {
            "head": (self.num_kv_heads,),
            "sequence": (self.batch, self.num_kv_heads),
            "row": (rows[0], self.num_kv_heads, rows[1]),
        }
        if self.scales is None:
            return None
        size = 1 / _STEPS if self.cache_dtype == "int8" else 1.0
        if self.scales == "number":
            return size
        return (size * rng.uniform(0.5, 1.5, shapes[self.scales])).astype(np.float32)

    def _page_table(self, rng, seed):
        """Random pages. Some sequences share their first pages with sequence 0. An entry is junk if no token sees a row of its
        page."""
        if self.page_size is None:
            return None
        pool = self.batch * self._pages + 2
        table = rng.permutation(pool)[: self.batch * self._pages].reshape(self.batch, self._pages).astype(np.int32)
        junk = np.array([0, -1, pool, -(2**31), 2**31 - 1], np.int32)
        for b in range(1, self.batch):
            shared = rng.integers(0, self._pages + 1) // 2
            table[b, :shared] = table[0, :shared]
        for b in range(self.batch):
            unseen = np.delete(np.arange(self._pages), np.unique(self._seen(b, seed) // self.page_size))
            table[b, unseen] = rng.choice(junk, len(unseen))
        return table

    def _seen_places(self, rows, table, seed):
        """Which rows of the cache any token sees: bool [B, S], or [N, page_size] for a pool."""
        seen = np.zeros(rows, bool)
        for b in range(self.batch):
            j = self._seen(b, seed)
            seen[(b, j) if table is None else (table[b, j // rows[1]], j % rows[1])] = True
        return seen

    def _seen(self, b, seed):
        return seen_rows(
            b, self.rows, *self.ranges(seed), self.sliding_window, self._query_lengths, num_tokens=self.num_tokens or 1
        )

    def live_tokens(self, seed: int = 0) -> int:
        """The number of keys that any token sees, over all sequences."""
        return sum(len(self._seen(b, seed)) for b in range(self.batch))

    def live_bytes(self, seed: int = 0) -> int:
        """The bytes that a decode step has to read: the rows of keys and values that any token sees, and their scales."""
        itemsize = jnp.dtype(self.cache_dtype or self.dtype).itemsize
        if self.value_columns is None:
            columns, scales = self.head_dim + (self.value_dim or self.head_dim), 2
        else:
            columns, scales = len({*range(self.head_dim), *range(*self.value_columns)}), 1
        row = columns * itemsize + (4 * scales if self.scales == "row" else 0)
        return self.live_tokens(seed) * self.num_kv_heads * row


_POOL = 4_194_301  # how many normal values are drawn; a prime, so that repeated values do not fall on the same columns of rows
_STEPS = 32  # steps of an int8 cache per standard deviation


def _normal(rng, shape, dtype):
    """Normal values. At most `_POOL` values are drawn, and repeated for a larger array, because drawing more takes seconds."""
    size = int(np.prod(shape))
    pool = rng.standard_normal(min(size, _POOL), np.float32 if dtype.itemsize < 8 else np.float64)
    pool = np.clip(np.rint(_STEPS * pool), -127, 127) if dtype == np.int8 else pool
    return np.resize(pool.astype(dtype), shape)


@functools.cache
def _junk(dtype):
    """The values of `dtype` that do the most harm if a backend uses them."""
    if dtype == np.int8:
        return np.array([-128, 127], dtype)
    return np.array([np.nan, np.inf, -np.inf], np.float32).astype(dtype)


# In turn: empty, empty, one key, all keys, beyond the cache on both sides, end before start.
_EDGES = ("ranges", (0, 0), (9, 9), (4, 5), (0, 67), (-5, 1000), (60, 8))
# In turn: fewer keys than tokens, fewer keys than tokens after a start, all keys, an end far beyond the cache, some keys, empty.
_SHORT = ("ranges", (0, 3), (40, 42), (0, 67), (7, 1000), (0, 50), (5, 5))
# A full cache: of the new rows of a draft, some, all or none fit.
_FULL = ("ranges", (0, 69), (60, 68), (0, 71), (5, 67), (0, 80), (66, 70))

# Small cases: each feature alone, then all features together.
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
    Case("pages", 6, 67, 4, 2, 32, lengths=_EDGES, page_size=16),
    Case("pages-of-one", 3, 20, 4, 2, 16, lengths=("uniform", 1, 20), page_size=1),
    Case(
        "pages-int8",
        6,
        67,
        4,
        2,
        32,
        lengths=_SHORT,
        sliding_window=(20, 0),
        num_tokens=3,
        cache_dtype="int8",
        scales="row",
        page_size=7,
    ),
    Case("narrow-value", 6, 67, 4, 2, 48, lengths=_EDGES, value_dim=32),
    Case("value-in-rows", 3, 67, 6, 1, 36, lengths=("uniform", 1, 67), softmax_scale=0.2, value_columns=(0, 32), row_dim=40),
    Case("fused", 3, 67, 4, 2, 16, lengths=("uniform", 1, 67), softmax_scale=0.2, value_columns=(16, 32), row_dim=32, page_size=16),
    Case(
        "mla-e4m3",
        3,
        67,
        6,
        1,
        36,
        "bfloat16",
        _SHORT,
        0.2,
        (30, 0),
        None,
        None,
        3,
        None,
        "float8_e4m3fn",
        "row",
        value_columns=(0, 32),
        page_size=32,
    ),
    Case("all", 6, 67, 10, 2, 80, "bfloat16", _EDGES, 0.2, (20, -1), 1.5, ("query", 2)),
    Case("all-int8", 6, 67, 10, 2, 80, "bfloat16", _SHORT, 0.2, (20, -1), 1.5, ("query", 2), 4, (4, 1, 3, 0), "int8", "row"),
)
