"""`KVCache`: the arrays of a KV cache in one object. It writes new rows and gives the arguments of a call."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, Shaped

from ._check import AnyArray, array_type, check_columns, check_integers, check_lengths, check_page_table, check_scales, PADDED, POOL
from ._formats import CACHE_DTYPES, FLOATING_DTYPES, is_quantised
from ._messages import shown
from ._problem import positive
from ._quantize import quantize


ARRAYS = ("key", "value", "key_scale", "value_scale", "page_table")


class KVCache(eqx.Module):
    """A KV cache: padded or in pages, of floats or quantised, with a value array or with the value in the key's rows.

    `KVCache.zeros` makes an empty cache. `write` returns the cache with new rows. `arguments` returns the arguments of a call:

    ```python
    cache = KVCache.zeros(batch, seq_len, num_kv_heads, head_dim)
    lengths = jnp.zeros(batch, jnp.int32)

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(cache, lengths, query, key, value):  # key and value [batch, num_kv_heads, head_dim], of the newest token
        cache = cache.write(key, value, at=lengths)  # row `lengths` is the first free row
        lengths = lengths + 1
        return cache, lengths, ragged_decode_attention(query, sequence_end=lengths, **cache.arguments())
    ```

    A write is in place if the cache is donated to the jitted function, as in the example. A write is also in place if the cache is
    in the carry of `jax.lax.scan` or `jax.lax.while_loop`. Any other write copies the cache. XLA for CPUs always copies an array of
    float8, and before JAX 0.11 also an array of bfloat16.

    **A full cache** drops the rows that no longer fit, without an error. Compare the lengths with `seq_len` before a step.

    **Pages.** `page_table` is an array like the others. A scheduler that gives pages to sequences keeps a NumPy table, and replaces
    the table of the cache before each step: `dataclasses.replace(cache, page_table=jnp.array(table))`. Donating the cache deletes
    its table too. So give each donated cache a table array of its own. The package has no scheduler.

    **Several layers.** A list with one cache per layer suits most models. A cache with a leading axis of layers on each array also
    works: call `write` and `arguments` inside `jax.vmap`. To scan over layers, hold all layers in one pool of
    `num_layers * num_pages` pages. The page table of a layer is `table + layer * num_pages`. No layer is copied then. In such a
    table, the entry of a page that a sequence does not have is `num_layers * num_pages`, and not -1: a write to page
    `-1 + layer * num_pages` would change the last page of the layer before.

    Attributes:
        key: [batch, seq_len, num_kv_heads, row_dim]. For a cache in pages: [num_pages, page_size, num_kv_heads, row_dim]. row_dim
            is the head dimension, or larger if the value is in the key's rows.
        value: like `key`, but its head dimension may differ. None if the value is in the key's rows.
        key_scale: scale of a quantised cache, float32 [batch, num_kv_heads, seq_len]. For a cache in pages:
            [num_pages, num_kv_heads, page_size].
        value_scale: like `key_scale`. None if the value is in the key's rows.
        page_table: integers [batch, pages], for a cache in pages. Row j of sequence b is row j % page_size of page
            `page_table[b, j // page_size]`. None for a padded cache.
        value_columns: (first, end), static: the columns of the key's rows that are the value. None if `value` is an array.

    Raises:
        ValueError, TypeError: on construction, if the arrays do not fit together.
    """

    key: Shaped[AnyArray, "pages page_size num_kv_heads row_dim"]
    value: Shaped[AnyArray, "pages page_size num_kv_heads value_dim"] | None = None
    key_scale: Float[AnyArray, "pages num_kv_heads page_size"] | None = None
    value_scale: Float[AnyArray, "pages num_kv_heads page_size"] | None = None
    page_table: Int[AnyArray, "batch pages_per_sequence"] | None = None
    value_columns: tuple[int, int] | None = eqx.field(
        static=True, default=None, converter=lambda columns: tuple(columns) if isinstance(columns, list) else columns
    )

    def __check_init__(self):
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        types: dict[str, Any] = {name: array_type(name, x) for name, x in arrays.items()}
        key, value, table, *scales = (types.get(name) for name in ("key", "value", "page_table", "key_scale", "value_scale"))
        if key is None:
            raise TypeError("key must be an array, got None.")
        if value is None and self.value_columns is None:
            raise ValueError(
                "value must be an array, got None. If the value is in the key's rows, pass value_columns=(first, end), the "
                "columns in which the value is."
            )
        if len(key.shape) < 4:
            raise ValueError(f"key must be {self._layout.format('row_dim')}, got shape {key.shape}.")
        check_columns(self.value_columns, value, key, softmax_scale=1.0)
        if value is not None and (value.shape[:-1], value.dtype) != (key.shape[:-1], key.dtype):
            raise ValueError(
                f"key and value must have the same dtype, and the same shape but for the last axis; got key {shown(key)} and "
                f"value {shown(value)}."
            )
        if len(key.shape) == 4:  # one layer
            check_scales(key, value, table, *scales)
            if table is not None:
                check_page_table(table, table.shape[0] if table.shape else "batch")

    @classmethod
    def zeros(
        cls,
        batch: int,
        seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype=jnp.bfloat16,
        value_dim: int | None = None,
        value_columns: tuple[int, int] | None = None,
        row_dim: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        page_table: Int[AnyArray, "batch pages_per_sequence"] | None = None,
    ) -> "KVCache":
        """An empty cache: all rows are zeros.

        Args:
            batch: number of sequences.
            seq_len: largest number of rows per sequence. For a cache in pages, seq_len is rounded up to whole pages.
            num_kv_heads: number of key/value heads.
            head_dim: head dimension of the key, and of the value unless `value_dim` is given.
            dtype: the dtype of the queries. For a quantised cache int8, float8_e4m3fn or float8_e5m2: the cache then has one scale
                per row and head.
            value_dim: head dimension of the value. None means head_dim.
            value_columns: (first, end), for a cache whose value is these columns of the key's rows. Such a cache has no value
                array.
            row_dim: number of columns of the key's rows, with `value_columns`. None means head_dim.
            page_size: number of rows per page, for a cache in pages. None for a padded cache.
            num_pages: number of pages of the pool. None means as many as the sequences need when all of them are full.
            page_table: integers [batch, pages], where pages is seq_len / page_size, rounded up. An entry outside the pool, for
                example -1, stands for a page that the sequence does not have yet. None gives each sequence pages of its own, in
                order. A pool with too few pages for that needs a table. The table is copied.

        Raises:
            ValueError: sizes or arguments do not fit together.
            TypeError: a size is not an integer.
        """
        sizes = {"batch": batch, "seq_len": seq_len, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        optional = {"value_dim": value_dim, "row_dim": row_dim, "page_size": page_size, "num_pages": num_pages}
        for name, size in (sizes | {name: size for name, size in optional.items() if size is not None}).items():
            positive(name, size)
        given = None if dtype is None else jnp.dtype(dtype).name  # NumPy takes None for float64
        if given not in CACHE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(CACHE_DTYPES)}; got {given}.")
        dtype = jnp.dtype(dtype)
        if value_columns is not None and value_dim is not None:
            raise ValueError(
                f"value_dim must be None if value_columns is given, got {value_dim} and {value_columns!r}. value_columns says how "
                "wide the value is."
            )
        if row_dim is not None and (value_columns is None or row_dim < head_dim):
            raise ValueError(
                f"row_dim must be None, or at least head_dim if value_columns is given; got row_dim {row_dim}, head_dim {head_dim} "
                f"and value_columns {value_columns!r}."
            )
        pages, rows = batch, seq_len
        if page_size is not None:
            page_table, pages = _table(batch, -(-seq_len // page_size), num_pages, page_table)
            rows = page_size
        elif num_pages is not None or page_table is not None:
            name, came = ("num_pages", num_pages) if page_table is None else ("page_table", page_table)
            raise ValueError(f"{name} must be None for a padded cache, got {shown(came)}. For a cache in pages, pass page_size.")
        widths = {"key": row_dim or head_dim} | ({"value": value_dim or head_dim} if value_columns is None else {})
        held: dict[str, Any] = {name: jnp.zeros((pages, rows, num_kv_heads, width), dtype) for name, width in widths.items()}
        if is_quantised(dtype):
            held |= {f"{name}_scale": jnp.zeros((pages, num_kv_heads, rows), jnp.float32) for name in widths}
        return cls(**held, page_table=page_table, value_columns=value_columns)

    @property
    def seq_len(self) -> int:
        """The largest number of rows per sequence."""
        return self.key.shape[-3] * (1 if self.page_table is None else self.page_table.shape[-1])

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `ragged_decode_attention`: `key`, `value`, and every other field that is not None."""
        fields = {name: getattr(self, name) for name in (*ARRAYS, "value_columns")}
        return {name: x for name, x in fields.items() if x is not None or name == "value"}

    def write(
        self,
        key: Float[AnyArray, "batch *num_tokens num_kv_heads row_dim"],
        value: Float[AnyArray, "batch *num_tokens num_kv_heads value_dim"] | None,
        at: Int[AnyArray, " batch"],
        lengths: Int[AnyArray, " batch"] | None = None,
    ) -> "KVCache":
        """The cache with new rows: token t of sequence b becomes row `at[b] + t`. A quantised cache quantises the rows.

        **Dropped rows.** A row outside the cache is written nowhere. A row is outside the cache before row 0, from row `seq_len`
        on, and in a page outside the pool.

        **Shared pages.** No two sequences may write to the same row of the pool. If they do, one of the two new rows remains, and
        either is possible. Share only pages that are complete, and give each sequence a page of its own to write to.

        Gradients pass through a write into a padded cache of floats.

        Args:
            key: [batch, num_tokens, num_kv_heads, row_dim], or [batch, num_kv_heads, row_dim] for one token per sequence. The
                dtype is the cache's. For a quantised cache the dtype is any float dtype: the rows are not quantised yet. If the
                value is in the key's rows, pass whole rows, with every column.
            value: like `key`, with the value's head dimension. None if the value is in the key's rows.
            at: integers [batch], the row of each sequence's first token. For a decode step, `at` is the length of the sequence
                before the step. For a prompt, `at` is zeros.
            lengths: integers [batch], the number of tokens that each sequence has: only the first lengths[b] tokens are written.
                None means all tokens. A length of 0 leaves a sequence unchanged.

        Raises:
            ValueError: shapes or dtypes do not fit the cache.
            TypeError: an argument is not an array.
        """
        if len(self.key.shape) != 4:
            raise ValueError(
                f"write needs a cache of one layer, whose key is {self._layout.format('row_dim')}; got key {self.key.shape}. Map "
                "write over the layers with jax.vmap."
            )
        if self.value is None and value is not None:
            raise ValueError(
                f"value must be None for a cache whose value is in the key's rows (value_columns={self.value_columns}), got "
                f"{shown(value)}. Pass whole rows as key."
            )
        for name, new in (("key", key), ("value", value)):
            if getattr(self, name) is not None:
                self._check_new(name, array_type(name, new), key)
        batch = self._batch
        first = f"integers of shape ({batch},), the row of each sequence at which its first token goes;"
        check_integers("at", array_type("at", at), (batch,), first)
        if lengths is not None:
            check_lengths("lengths", array_type("lengths", lengths), batch)
        return _written(self, key, value, at, lengths)

    @property
    def _batch(self) -> int:
        return (self.key if self.page_table is None else self.page_table).shape[0]

    @property
    def _layout(self) -> str:
        return PADDED if self.page_table is None else POOL

    def _check_new(self, name, new, key):
        """Checks that new rows fit the array `name` of the cache. A quantised cache must have one scale per row and head."""
        held, scale = getattr(self, name), getattr(self, f"{name}_scale")
        one, several = (self._batch, *held.shape[2:]), f"({self._batch}, num_tokens, {held.shape[2]}, {held.shape[3]})"
        if len(new.shape) not in (3, 4) or (new.shape[0], *new.shape[-2:]) != one or 0 in new.shape:
            raise ValueError(
                f"{name} must have shape {several}, or {one} for one token per sequence; got {new.shape} for a cache whose "
                f"{name} is {held.shape}, {self._layout.format('row_dim')}."
            )
        if new.shape[:-1] != np.shape(key)[:-1]:
            raise ValueError(f"key and value must have the same tokens, got key {np.shape(key)} and value {new.shape}.")
        if not is_quantised(held.dtype):
            if new.dtype != held.dtype:
                raise ValueError(
                    f"{name} must have the cache's dtype, {held.dtype.name}, got {new.dtype.name}. Pass "
                    f"{name}.astype({held.dtype.name!r}), or make the cache with dtype={new.dtype.name!r}."
                )
            return
        if new.dtype.name not in FLOATING_DTYPES:
            raise ValueError(
                f"{name} must be floats ({', '.join(FLOATING_DTYPES)}), which write quantises to {held.dtype.name}; got "
                f"{new.dtype.name}."
            )
        rows = held.shape[0], held.shape[2], held.shape[1]
        if np.shape(scale) != rows:
            came = "None" if scale is None else f"shape {np.shape(scale)}"
            raise ValueError(f"{name}_scale of the cache must have one scale per row, shape {rows}, for write to fill; got {came}.")


def _table(batch, pages, num_pages, table):
    """The page table of a new cache, and the number of pages of its pool."""
    needed = batch * pages
    pool = needed if num_pages is None else num_pages
    if table is not None:
        accepted = f"integers of shape ({batch}, {pages}), the pages of each sequence in order;"
        check_integers("page_table", array_type("page_table", table), (batch, pages), accepted)
        return jnp.array(table), pool  # a copy, so that a caller who donates the cache keeps the table
    if pool < needed:
        raise ValueError(
            f"page_table must be given for a pool of {pool} pages, fewer than the {needed} pages that {batch} sequences of {pages} "
            "pages need. Pass a table with -1 for each page that a sequence does not have yet."
        )
    return jnp.arange(needed, dtype=jnp.int32).reshape(batch, pages), pool


@jax.jit
def _written(cache: KVCache, key, value, at, lengths) -> KVCache:
    """The write on checked arguments. Jitted, so that an eager write is one dispatch."""
    new = {name: x if x.ndim == 4 else x[:, None] for name, x in (("key", key), ("value", value)) if x is not None}
    page, offset = _places(cache, at, lengths, new["key"].shape[1])
    # With duplicate indices, `unique_indices` is undefined behaviour. Only the caller knows whether pages are shared.
    unique = cache.page_table is None
    held = {name: getattr(cache, name) for name in (*ARRAYS, "value_columns")}
    for name, rows in new.items():
        if is_quantised(held[name].dtype):
            rows, scale = quantize(rows, held[name].dtype)
            scale = scale.swapaxes(1, 2).astype(held[f"{name}_scale"].dtype)
            held[f"{name}_scale"] = _set(held[f"{name}_scale"], scale, (page, slice(None), offset), unique)
        held[name] = _set(held[name], rows, (page, offset), unique)
    return KVCache(**held)


def _places(cache, at, lengths, num_tokens):
    """The page of each new row, and the row within the page: int32, [B, T] or [B, 1] each.

    The row of a dropped token is beyond the end of the page, where the scatter drops it. Each dropped token has a different such
    row, so that indices are unique. A padded cache is a pool in which each sequence has one page of seq_len rows.
    """
    num_pages, page_size = cache.key.shape[:2]
    batch, entries = (num_pages, 1) if cache.page_table is None else cache.page_table.shape
    token = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    row = _within(at, -num_tokens, cache.seq_len)[:, None] + token
    kept = (row >= 0) & (row < cache.seq_len)
    if lengths is not None:
        kept &= token < _within(lengths, 0, num_tokens)[:, None]
    page = jnp.arange(batch, dtype=jnp.int32)[:, None]
    if cache.page_table is not None:
        entry = jnp.clip(row // page_size, 0, entries - 1)
        page = jnp.take_along_axis(_within(cache.page_table, -1, num_pages), entry, axis=1)
        kept &= (page >= 0) & (page < num_pages)
    beyond = page_size + jnp.arange(batch * num_tokens, dtype=jnp.int32).reshape(batch, num_tokens)
    return page, jnp.where(kept, row % page_size, beyond)


def _within(x, low: int, high: int):
    """Integers of any type, clipped to [low, high], as int32."""
    x, bounds = jnp.asarray(x), np.iinfo(x.dtype)
    return jnp.clip(x, max(low, bounds.min), min(high, bounds.max)).astype(jnp.int32)


def _set(array, new, index, unique) -> Array:
    """Writes `new` with one scatter, which XLA can do in place. The result keeps the array's sharding."""
    sharding = jax.typeof(array).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return array.at[index].set(new, mode="drop", unique_indices=unique, out_sharding=sharding if explicit else None)
