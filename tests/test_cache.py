"""`KVCache`: where a write puts rows, compared with rows written by hand; attention over the cache; and that a write is in
place."""

import dataclasses
import functools
import inspect
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import SPECS
from support import array, assert_close, assert_right, planned, weights
from test_traffic import collectives

from ejk_ragged import KVCache, quantize, ragged_decode_attention
from ejk_ragged._cache import _places
from ejk_ragged.testing import TextbookBackend


BATCH, SEQ_LEN, HEADS, DIM = 3, 12, 2, 8
FIELDS = ("key", "value", "key_scale", "value_scale", "page_table")
TABLE = np.array([[7, 2, 4], [0, 3, -1], [5, 9, 1]], np.int32)  # a page that is not there, and one outside the pool
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "value of another width": {"value_dim": 16},
    "value in the rows": {"value_columns": (0, 4)},
    "key and value side by side": {"value_columns": (8, 16), "row_dim": 16},
    "pages": {"page_size": 4},
    "pages of a table": {"page_size": 4, "num_pages": 9, "page_table": TABLE},
    "pages, value of another width": {"page_size": 5, "value_dim": 16},
    "pages, value in the rows": {"page_size": 4, "num_pages": 9, "page_table": TABLE, "value_columns": (0, 4)},
}
DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2")


def combinations(dtypes):
    """Every layout with floats and with int8, and two layouts with the other dtypes."""
    of_each = {"float32", "int8"}
    pairs = [(name, dtype) for name in LAYOUTS for dtype in dtypes if dtype in of_each or name in ("padded", "pages of a table")]
    return pytest.mark.parametrize(("layout", "dtype"), [pytest.param(LAYOUTS[name], d, id=f"{name}, {d}") for name, d in pairs])


call = functools.partial(ragged_decode_attention, backend=TextbookBackend())


def zeros(layout: dict[str, Any], dtype="float32", seq_len=SEQ_LEN) -> Any:
    return KVCache.zeros(BATCH, seq_len, HEADS, DIM, dtype=dtype, **layout)


def floats(dtype):
    """The dtype of the model for a cache of `dtype`."""
    return dtype if jnp.dtype(dtype).itemsize > 1 else "bfloat16"


def new_rows(cache, num_tokens, seed=0) -> tuple[Any, Any]:
    """Key and value of `num_tokens` tokens per sequence. If `num_tokens` is None, one token in three axes."""
    rng = np.random.default_rng(seed)
    tokens = () if num_tokens is None else (num_tokens,)
    held = cache.key, cache.value
    draw = lambda x: array(rng.standard_normal((BATCH, *tokens, *x.shape[-2:])), floats(x.dtype.name))
    key, value = (None if x is None else draw(x) for x in held)
    return key, value


def arrays_of(cache) -> dict[str, Any]:
    return {name: np.array(x) for name in FIELDS if (x := getattr(cache, name)) is not None}


def write_by_hand(arrays, key, value, at, lengths=None):
    """A write row by row, with Python's integers."""
    table = arrays.get("page_table")
    num_pages, page_size = arrays["key"].shape[:2]
    seq_len = page_size * (1 if table is None else table.shape[1])
    for name, new in (("key", key), ("value", value)):
        if new is None:
            continue
        new = np.asarray(new if new.ndim == 4 else new[:, None])
        for b in range(new.shape[0]):
            for t in range(new.shape[1] if lengths is None else min(int(lengths[b]), new.shape[1])):
                j = int(at[b]) + t
                page = -1 if not 0 <= j < seq_len else b if table is None else int(table[b, j // page_size])
                if not 0 <= page < num_pages:
                    continue
                row = new[b, t]
                if f"{name}_scale" in arrays:
                    row, scale = (np.asarray(x) for x in _quantize(new[b, t], arrays[name].dtype))
                    arrays[f"{name}_scale"][page, :, j % page_size] = scale
                arrays[name][page, j % page_size] = row


_quantize = jax.jit(quantize, static_argnums=1)


def assert_same(cache, arrays):
    got = arrays_of(cache)
    assert got.keys() == arrays.keys()
    for name, want in arrays.items():
        assert got[name].dtype == want.dtype
        np.testing.assert_array_equal(got[name].astype(np.float64), want.astype(np.float64), err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------------
# What is written where


@combinations(DTYPES)
def test_a_loop_of_writes_then_attention(layout, dtype):
    """A ragged prompt, single tokens, and drafts that are there in part, until a sequence is full. Attention is then the same as
    over plain arrays."""
    cache = zeros(layout, dtype)
    arrays, lengths = arrays_of(cache), np.array([0, 0, 0], np.int32)
    write = jax.jit(KVCache.write, donate_argnums=0)
    steps = [(5, [5, 2, 0]), (None, [1, 1, 1]), (3, [3, 1, 2]), (None, [1, 0, 1]), (3, [3, 2, 3])]
    for seed, (num_tokens, counts) in enumerate(steps):
        key, value = new_rows(cache, num_tokens, seed)
        cache = write(cache, key, value, lengths, np.array(counts, np.int32))
        write_by_hand(arrays, key, value, lengths, counts)
        lengths = lengths + np.array(counts, np.int32)
    assert_same(cache, arrays)
    assert lengths[0] > SEQ_LEN  # the last draft of the first sequence did not fit
    lengths[1] = min(lengths[1], 8)  # the rows before the missing page
    lengths[2] = min(lengths[2], 4) if "page_table" in layout else lengths[2]

    query = array(np.random.default_rng(9).standard_normal((BATCH, 4, DIM)), floats(dtype))
    settings = {"sequence_end": lengths, "softmax_scale": 0.3}
    by_hand = {"value": None} | arrays | {"value_columns": layout["value_columns"]} if "value_columns" in layout else arrays
    assert_close(call(query, **settings, **cache.arguments()), call(query, **settings, **by_hand), 0)
    assert_right(ragged_decode_attention, {"query": np.asarray(query), **settings, **by_hand})


AT = {
    "int8": [127, -128, 10],
    "uint8": [255, 11, 0],
    "int16": [-(2**15), 2**15 - 1, 11],
    "int32": [2**31 - 1, -(2**31), -2],
    "uint32": [2**32 - 1, 2**31, 9],
    "int64": [2**63 - 1, -(2**63), 2**32 + 3],
}


@pytest.mark.parametrize("integers", AT)
@pytest.mark.parametrize("layout", ["padded", "pages of a table"])
def test_rows_elsewhere_are_dropped(layout, integers, x64):
    """Rows are dropped before the cache, beyond it, at the ends of any integer type, and where a sequence has no tokens. Nothing
    else changes."""
    for seq_len in (SEQ_LEN, 400):  # 400 rows are more than int8 can count
        table = {"page_table": np.resize(TABLE, (BATCH, -(-seq_len // 4)))} if layout != "padded" else {}
        cache = zeros(LAYOUTS[layout] | table, seq_len=seq_len)
        cache = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, cache)
        key, value = new_rows(cache, 3)
        for lengths in (None, [3, -1, 2], [127, 0, -128]):
            for at in (AT[integers], AT[integers][::-1]):
                counts = None if lengths is None else np.array(np.clip(lengths, np.iinfo(integers).min, 127), integers)
                arrays = arrays_of(cache)
                write_by_hand(arrays, key, value, at, counts)
                assert_same(cache.write(key, value, np.array(at, integers), counts), arrays)


@pytest.mark.parametrize("integers", ["int8", "uint8", "int16", "uint32"])
def test_page_tables_of_any_integers(integers):
    """A page outside the pool takes no rows, also at the ends of the table's integer type."""
    info = np.iinfo(integers)
    table = np.array([[1, info.max], [info.min, 200 if info.max > 200 else 100], [0, 3]], integers)
    cache = zeros({"page_size": 4, "num_pages": 6, "page_table": table}, seq_len=8)
    key, value = new_rows(cache, 8)
    arrays = arrays_of(cache)
    lengths = [8, 8, 8] if info.min else [8, 0, 4]  # without negative numbers entry 0 is a page, and no two sequences may share it
    write_by_hand(arrays, key, value, [0, 0, 0], lengths)
    assert_same(cache.write(key, value, np.zeros(3, np.int32), np.array(lengths)), arrays)


def test_a_row_of_several_sequences():
    """One of the two rows remains, whole. So inactive slots may share a page for rows that nobody reads."""
    cache = zeros({"page_size": 4, "num_pages": 4, "page_table": np.array([[1], [0], [0]], np.int32)}, seq_len=4)
    key, value = new_rows(cache, 2)
    written = cache.write(key, value, np.zeros(3, np.int32))
    np.testing.assert_array_equal(written.key[1, :2], key[0])
    assert any(np.array_equal(written.key[0, :2], key[b]) for b in (1, 2))


def test_rows_are_rounded_up_to_whole_pages():
    assert zeros({"page_size": 5}, seq_len=12).seq_len == 15
    assert zeros({"page_size": 5}, seq_len=15).seq_len == 15


@pytest.mark.parametrize("layout", ["padded", "pages of a table"])
def test_only_a_padded_cache_promises_unique_places(layout):
    """XLA may do anything if the promise of unique places is broken. In pages, only the caller knows whether sequences share a
    page."""
    cache = zeros(LAYOUTS[layout])
    text = jax.jit(KVCache.write).lower(cache, *new_rows(cache, 3), np.zeros(BATCH, np.int32)).as_text()
    assert ("unique_indices = true" in text) == (layout == "padded")
    assert ("unique_indices = false" in text) == (layout != "padded")


def test_dropped_rows_have_places_of_their_own():
    """The promise of unique places includes the dropped rows: those before and beyond the cache, and padding tokens."""
    page, offset = _places(zeros({}), np.array([11, -2, 2]), np.array([3, 3, 1]), 3)
    places = np.stack([np.broadcast_to(page, offset.shape), offset], axis=-1).reshape(-1, 2)
    assert len(np.unique(places, axis=0)) == 3 * BATCH


def test_the_docstring_runs(promoted_ranks):
    code = re.findall(r"```python\n(.*?)```", inspect.getdoc(KVCache) or "", flags=re.DOTALL)
    names = {"jax": jax, "jnp": jnp, "functools": functools, "KVCache": KVCache, "ragged_decode_attention": ragged_decode_attention}
    names |= {"batch": BATCH, "seq_len": SEQ_LEN, "num_kv_heads": HEADS, "head_dim": DIM}
    for block in code:
        exec(block, names)
    step, cache, lengths = (names[name] for name in ("step", "cache", "lengths"))
    key, value = new_rows(cache, None)
    for n in (1, 2):
        cache, lengths, out = step(cache, lengths, jnp.ones((BATCH, 4, DIM), jnp.bfloat16), key, value)
        np.testing.assert_array_equal(lengths, np.full(BATCH, n))
        assert_close(out, jnp.repeat(value, 2, axis=1), 1e-2)


# ---------------------------------------------------------------------------------------------------------------------------
# In place

# For these dtypes XLA for CPUs converts the whole array to a wider float at each scatter.
WIDENED = {"float8_e4m3fn", "float8_e5m2"} | ({"bfloat16"} if jax.__version_info__ < (0, 11) else set())
IN_PLACE = [dtype for dtype in DTYPES if jax.default_backend() != "cpu" or dtype not in WIDENED]


def abstract(make, *layers):
    """A large cache that nobody allocates, with a leading axis of layers."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*layers, *x.shape), x.dtype), jax.eval_shape(make))


def large(layout, dtype):
    layout = {name: x for name, x in layout.items() if name not in ("num_pages", "page_table")}
    layout |= {"page_size": 32} if "page_size" in layout else {}
    layout |= {"row_dim": 128} if "row_dim" in layout else {}
    return KVCache.zeros(BATCH, 4096, HEADS, 64, dtype=dtype, **layout)


def assert_in_place(function, cache, *rest):
    """Every array of the donated cache must be written in place, and the program must hold nothing else of the cache's size."""
    compiled = planned(jax.jit(function, donate_argnums=0).lower(cache, *rest))
    memory = compiled.memory_analysis()
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)]
    assert memory.alias_size_in_bytes >= sum(sizes)
    assert memory.temp_size_in_bytes < 0.05 * max(sizes), memory.temp_size_in_bytes / max(sizes)
    assert f"input_output_alias={{ {{{0 if len(sizes) > 1 else ''}}}: (0, {{}}" in str(compiled.as_text())


def specs_of(cache, num_tokens=3):
    key, value = (
        None if x is None else jax.ShapeDtypeStruct((*x.shape[:-4], BATCH, num_tokens, *x.shape[-2:]), floats(x.dtype.name))
        for x in (cache.key, cache.value)
    )
    return key, value, jax.ShapeDtypeStruct((BATCH,), jnp.int32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)


@pytest.mark.optimised
@combinations(IN_PLACE)
def test_a_write_is_in_place(layout, dtype):
    """A write by itself, and a write in the carry of a loop."""

    def loop(cache, key, value, at, lengths):
        body = lambda cache, i: (cache.write(key, value, at + i, lengths), None)
        return lax.scan(body, cache, jnp.arange(5, dtype=jnp.int32))[0]

    cache = abstract(lambda: large(layout, dtype))
    assert_in_place(KVCache.write, cache, *specs_of(cache))
    assert_in_place(loop, cache, *specs_of(cache))


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("layout", ["padded", "pages"])
def test_stacked_layers_are_in_place(layout, dtype):
    cache = abstract(lambda: large(LAYOUTS[layout], dtype), 4)
    assert_in_place(jax.vmap(KVCache.write, (0, 0, 0, None, None)), cache, *specs_of(cache))


LAYERS = 4


def scan_over_layers(cache, table, queries, keys, values, at):
    """A scan over the layers, with one pool in the carry. The pool has the pages of all layers."""
    num_pages = cache.key.shape[0] // LAYERS

    def layer(cache, x):
        i, query, key, value = x
        cache = dataclasses.replace(cache, page_table=table + i * num_pages)
        cache = cache.write(key, value, at)
        out = ragged_decode_attention(query, sequence_end=at + key.shape[1], **cache.arguments(), backend="xla")
        return cache, out

    return lax.scan(layer, cache, (jnp.arange(LAYERS, dtype=jnp.int32), queries, keys, values))


@pytest.mark.optimised
@pytest.mark.parametrize("page_size", [32, 4096])
def test_layers_in_one_pool_are_in_place(page_size):
    """Writes and attention. A padded cache is a pool of one page per sequence."""
    pages = 4096 // page_size
    pool = {"page_size": page_size, "num_pages": LAYERS * BATCH * pages}
    make = lambda: KVCache.zeros(BATCH, 4096, HEADS, 64, dtype="float32", **pool)
    cache, table = abstract(make), jax.ShapeDtypeStruct((BATCH, pages), jnp.int32)
    new = jax.ShapeDtypeStruct((LAYERS, BATCH, 3, HEADS, 64), jnp.float32)
    assert_in_place(scan_over_layers, cache, table, new, new, new, jax.ShapeDtypeStruct((BATCH,), jnp.int32))


def test_layers_in_one_pool_are_a_list_of_caches():
    rng = np.random.default_rng(0)
    queries, keys, values = (array(rng.standard_normal((LAYERS, BATCH, 3, HEADS, DIM)), jnp.float32) for _ in range(3))
    at, table = jnp.array([0, 5, 9], jnp.int32), jnp.arange(BATCH * 3, dtype=jnp.int32).reshape(BATCH, 3)
    cache = zeros({"page_size": 4, "num_pages": LAYERS * BATCH * 3})
    cache, out = jax.jit(scan_over_layers)(cache, table, queries, keys, values, at)
    caches = [zeros({"page_size": 4}).write(key, value, at) for key, value in zip(keys, values, strict=True)]
    wants = [
        ragged_decode_attention(query, sequence_end=at + 3, **one.arguments(), backend="xla")
        for query, one in zip(queries, caches, strict=True)
    ]
    assert_close(out, jnp.stack(wants))
    np.testing.assert_array_equal(cache.key, jnp.concatenate([one.key for one in caches]))


def test_layers_in_one_pool_keep_the_pages_of_others():
    """A sequence without pages writes nowhere if its entries are beyond the pool of all layers."""
    new, at = jnp.ones((LAYERS, BATCH, 3, HEADS, DIM)), jnp.zeros(BATCH, jnp.int32)
    pages = BATCH * 3
    table = jnp.arange(pages, dtype=jnp.int32).reshape(BATCH, 3).at[0].set(LAYERS * pages)
    cache = zeros({"page_size": 4, "num_pages": LAYERS * pages})
    cache, _ = jax.jit(scan_over_layers)(cache, table, new, new, new, at)
    written = cache.key.any((1, 2, 3)).reshape(LAYERS, BATCH, 3)
    np.testing.assert_array_equal(
        written, np.broadcast_to([[False] * 3, [True, False, False], [True, False, False]], written.shape)
    )


# ---------------------------------------------------------------------------------------------------------------------------
# A tree of arrays


@combinations(["float32", "int8"])
def test_through_transformations(layout, dtype):
    """The cache is mapped, stacked, scanned, and made of shapes alone."""
    cache = zeros(layout, dtype)
    key, value = new_rows(cache, 2)
    at = jnp.array([0, 3, 9], jnp.int32)
    want = cache.write(key, value, at)
    assert jax.tree.structure(want) == jax.tree.structure(cache)
    assert jax.eval_shape(lambda: zeros(layout, dtype)).seq_len == cache.seq_len
    stacked = jax.tree.map(lambda x: array(np.stack([x, x])), cache)
    assert stacked.seq_len == cache.seq_len
    twice = jax.vmap(KVCache.write, (0, None, None, None))(stacked, key, value, at)
    looped = lax.scan(lambda cache, _: (cache.write(key, value, at), None), cache, length=2)[0]
    for got in (jax.tree.map(lambda x: np.asarray(x)[1], twice), looped, jax.jit(KVCache.write)(cache, key, value, at)):
        assert_same(got, arrays_of(want))
    assert eqx.tree_equal(eqx.combine(*eqx.partition(cache, eqx.is_inexact_array)), cache)
    assert set(jax.tree.leaves(jax.tree.map(lambda x: "spec", cache))) == {"spec"}  # leaves of any kind


def test_plain_arrays_are_a_cache():
    """A cache can be made of the arrays of a prompt."""
    rng = np.random.default_rng(0)
    stored, scale = quantize(array(rng.standard_normal((BATCH, SEQ_LEN, HEADS, DIM)), jnp.float32))
    cache = KVCache(stored, stored, scale, scale)
    key, value = new_rows(cache, 1)
    arrays = arrays_of(cache)
    write_by_hand(arrays, key, value, [4, 5, 6])
    assert_same(cache.write(key, value, np.array([4, 5, 6])), arrays)


def test_the_table_is_replaced():
    table = array(TABLE)
    cache = zeros({"page_size": 4, "num_pages": 9, "page_table": table})
    jax.jit(KVCache.write, donate_argnums=0)(cache, *new_rows(cache, 1), np.zeros(3, np.int32))
    np.testing.assert_array_equal(table, TABLE)  # the caller's table is not donated with the cache
    cache = zeros({"page_size": 4, "num_pages": 9, "page_table": table})
    np.testing.assert_array_equal(dataclasses.replace(cache, page_table=table[:, ::-1]).arguments()["page_table"], TABLE[:, ::-1])


def test_gradients_pass_through_a_write():
    """A padded cache of floats: a row that is replaced has no gradient, and a new row has the gradient of its place."""
    cache = jax.tree.map(lambda x: x + 1, zeros({}))
    key, value = new_rows(cache, 3)
    at, lengths = np.array([0, 10, 4], np.int32), np.array([3, 3, 1], np.int32)
    loss = lambda cache, key: jnp.sum(weights(cache.key) * cache.write(key, value, at, lengths).key)
    d_cache, d_key = jax.grad(loss, (0, 1))(cache, key)
    want_cache, want_key = np.array(weights(cache.key)), np.zeros(key.shape, np.float32)
    for b, t in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)):
        want_key[b, t] = want_cache[b, at[b] + t]
        want_cache[b, at[b] + t] = 0
    np.testing.assert_array_equal(d_key, want_key)
    np.testing.assert_array_equal(d_cache.key, want_cache)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_on_many_devices(mesh, spec, dtype):
    """A cache that is split stays split, and nothing of its size moves between devices."""
    cache = KVCache.zeros(4, 512, 4, 16, dtype=dtype)
    batch, rows, heads, *_ = *spec, None, None, None
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 4 else P(batch, heads, rows)))
    split = jax.tree.map(place, cache)
    new = array(np.random.default_rng(0).standard_normal((4, 3, 4, 16)), "float32" if dtype == "float32" else "bfloat16")
    at = np.array([0, 511, 200, 255], np.int32)
    moved, compiled = collectives(KVCache.write, split, new, new, at)
    assert max((size for _, size in moved), default=0) <= 2 * new.size
    got = compiled(split, new, new, at)
    for x, given in zip(jax.tree.leaves(got), jax.tree.leaves(split), strict=True):
        assert x.sharding.is_equivalent_to(given.sharding, x.ndim)
    assert_same(got, arrays_of(cache.write(new, new, at)))
