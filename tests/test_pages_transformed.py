"""Pages, values of another width and values in the key's rows under jit, grad, checkpoint, scan and export."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from support import array, assert_close, assert_right, draw, everything, planned, weights

from ejk_ragged import explain, quantize, ragged_decode_attention, RaggedDecodeAttention
from ejk_ragged.testing import Case, oracle, TextbookBackend


LENGTHS = ("ranges", (2, 9), (-1, 12), (5, 5))
PAGES = Case("pages", 3, 12, 4, 2, 8, lengths=LENGTHS, sinks=("query", 2), page_size=5, value_dim=12)
DENSE = dataclasses.replace(PAGES, name="dense", page_size=None)
LATENT = Case("latent", 3, 12, 6, 1, 12, lengths=LENGTHS, softmax_scale=0.3, value_columns=(2, 10), row_dim=16)
LATENT_PAGES = dataclasses.replace(
    LATENT, name="latent pages", page_size=4, num_tokens=2, query_lengths=(2, 1, 2), cache_dtype="int8", scales="row"
)
CASES = (PAGES, DENSE, LATENT, LATENT_PAGES)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

call = functools.partial(ragged_decode_attention, backend=TextbookBackend())  # the waist is under test; this compiles quickly


def setting(case, call: Any = call):
    """The call with its static arguments, and the arrays."""
    arrays, settings = draw(case)
    return functools.partial(call, **settings), arrays


@each_case
def test_jit(case):
    function, arrays = setting(case)
    assert_close(jax.jit(functools.partial(function, return_lse=True))(**arrays), function(**arrays, return_lse=True))


@each_case
def test_without_jit(case):
    function, arrays = setting(case)
    with jax.disable_jit():
        got = function(**arrays, return_lse=True)
    assert_close(got, function(**arrays, return_lse=True))


@pytest.mark.parametrize("integers", ["int8", "uint16", "uint32"])
def test_tables_of_any_integers(integers):
    """Junk beyond the integer type becomes other junk."""
    function, arrays = setting(PAGES)
    table = array(np.asarray(arrays["page_table"]).astype(integers))
    assert_close(function(**arrays | {"page_table": table}), function(**arrays))


# ---------------------------------------------------------------------------------------------------------------------------
# Gradients


@each_case
def test_gradients(case):
    """Gradients of query and sinks always, of a dense key and value, and of a dense key that is also the value; also under
    checkpoint."""
    function, arrays = setting(case)
    assert_right(function, case.draw(poison=True))

    def checkpointed(**arguments):
        traced = {name: x for name, x in arguments.items() if hasattr(x, "shape")}
        static = {name: x for name, x in arguments.items() if name not in traced}
        return jax.checkpoint(lambda traced: function(**traced, **static))(traced)

    whole = arrays | ({"value": None} if case.value_columns else {})
    assert_close(everything(checkpointed, whole), everything(lambda **kw: function(**kw), whole))


def test_both_uses_of_a_key():
    """The gradient of a key that is also the value is the sum over both uses, and 0 in columns that neither uses."""
    case = dataclasses.replace(LATENT, value_columns=(2, 14), row_dim=20)
    function, arrays = setting(case)
    names = {name: arrays[name] for name in ("sequence_start", "sequence_end")}
    apart = lambda query, key, value: call(query, key, value, **names, softmax_scale=0.3)
    key = arrays["key"]
    out, pullback = jax.vjp(lambda key: function(**arrays | {"key": key}), key)
    _, of_both = jax.vjp(lambda key: apart(arrays["query"], key[..., :12], key[..., 2:14]), key)
    assert_close(pullback(weights(out)), of_both(weights(out)))
    assert not np.any(np.asarray(pullback(weights(out))[0])[..., 14:])


@pytest.mark.parametrize("name", ["key", "value", "key_scale"])
def test_a_pool_has_no_gradient(name):
    case = dataclasses.replace(PAGES, cache_dtype="float8_e4m3fn", scales="row") if name == "key_scale" else PAGES
    function, arrays = setting(case)
    what = "quantised cache" if name == "key_scale" else "pool of pages"
    loss = lambda x, stop=lambda x: x: jnp.sum(function(**arrays | {name: stop(x)}))
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(jax.checkpoint(f)))):
        with pytest.raises(ValueError, match=rf"{name} of a {what} has no gradient.* pass jax.lax.stop_gradient\({name}\)"):
            transform(loss)(arrays[name])
        assert not np.any(transform(functools.partial(loss, stop=lax.stop_gradient))(arrays[name]))


# ---------------------------------------------------------------------------------------------------------------------------
# A donated pool that is written while it decodes


STEPS, BATCH, PAGE = 6, 2, 4
TABLE = jnp.array([[3, 1, 4], [0, 5, 2]], jnp.int32)


def tokens(heads, kv_heads, width, row_dim):
    rng = np.random.default_rng(0)
    normal = lambda *shape: array(rng.standard_normal(shape), jnp.float32)
    return normal(STEPS, BATCH, heads, width), normal(STEPS, BATCH, kv_heads, row_dim), normal(STEPS, BATCH, kv_heads, row_dim)


def decode(call, table, carry, tokens):
    """Steps that each write a row per sequence and its scales, and attend."""

    def one(carry, token):
        cache, end = carry
        query, *rows = token
        page, row = table[jnp.arange(BATCH, dtype=jnp.int32), end // PAGE], end % PAGE
        for name, x in zip(("key", "value"), rows, strict=True):
            if name not in cache:
                continue
            if f"{name}_scale" in cache:
                x, scale = quantize(x)
                cache = cache | {f"{name}_scale": cache[f"{name}_scale"].at[page, :, row].set(scale)}
            cache = cache | {name: cache[name].at[page, row].set(x)}
        end = end + jnp.int32(1)
        value = {} if "value" in cache else {"value": None, "value_columns": (0, 8), "softmax_scale": 0.3}
        return (cache, end), call(query, **cache, **value, sequence_end=end, page_table=table)

    return lax.scan(one, carry, tokens)


def pools(num_pages, kv_heads, width, kind):
    rows = lambda: jnp.full((num_pages, PAGE, kv_heads, width), 9 if kind == "int8" else jnp.nan, kind)
    scales = lambda: jnp.full((num_pages, kv_heads, PAGE), jnp.nan, jnp.float32)
    names = ("key",) if kv_heads == 1 else ("key", "value")
    return {name: rows() for name in names} | ({f"{name}_scale": scales() for name in names} if kind == "int8" else {})


POOLS = pytest.mark.parametrize(("kv_heads", "kind"), [(2, "float32"), (2, "int8"), (1, "float32"), (1, "int8")])


@POOLS
def test_scan_that_writes_its_pool(kv_heads, kind):
    """Rows that are not written yet are junk. Each step's result is the oracle's."""
    steps = tokens(4, kv_heads, 12, 12)
    cache = pools(7, kv_heads, 12, kind)
    run = jax.jit(functools.partial(decode, call, TABLE), donate_argnums=0)
    before = cache, jnp.zeros(BATCH, jnp.int32)
    (cache, end), outs = run(before, steps)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    np.testing.assert_array_equal(end, np.full(BATCH, STEPS))
    value = {} if kv_heads == 2 else {"value": None, "value_columns": (0, 8), "softmax_scale": 0.3}
    for i in range(STEPS):
        arguments: dict[str, Any] = {name: np.asarray(x) for name, x in cache.items()} | value
        want, _ = oracle(np.asarray(steps[0][i]), **arguments, sequence_end=np.full(BATCH, 1 + i), page_table=np.asarray(TABLE))
        np.testing.assert_allclose(outs[i], want, rtol=1e-5, atol=1e-5)


@pytest.mark.optimised
@POOLS
def test_a_pool_that_is_written_is_not_copied(kv_heads, kind):
    """The program updates every array in place, and its own memory is 2 % of the pool."""
    num_pages = 100_000
    steps = tokens(4, kv_heads, 64, 64)
    cache = jax.eval_shape(functools.partial(pools, num_pages, kv_heads, 64, kind))
    table = jnp.zeros((BATCH, 2000), jnp.int32)
    run = jax.jit(functools.partial(decode, functools.partial(ragged_decode_attention, backend="xla"), table), donate_argnums=0)
    memory = planned(run.lower((cache, jnp.zeros(BATCH, jnp.int32)), steps)).memory_analysis()
    sizes = [x.size * x.dtype.itemsize for x in cache.values()]
    assert memory.temp_size_in_bytes < sum(sizes) / 50
    assert memory.alias_size_in_bytes >= sum(sizes)


# ---------------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("case", [PAGES, LATENT_PAGES], ids=lambda case: case.name)
def test_symbolic_batch_pages_and_pool(case):
    """One artifact for any number of sequences, of pages per sequence, and of pages in the pool."""
    function, arrays = setting(case, functools.partial(ragged_decode_attention, sliding_window=(20, 0), return_lse=True))
    batch, pages, pool = export.symbolic_shape("b, p, n")
    sizes = {"page_table": (batch, pages), "softmax_aux": arrays["softmax_aux"].shape if "softmax_aux" in arrays else ()}
    of_pool = ("key", "value", "key_scale", "value_scale")
    symbolic = {
        name: jax.ShapeDtypeStruct(sizes.get(name, (pool if name in of_pool else batch, *x.shape[1:])), x.dtype)
        for name, x in arrays.items()
    }
    again = export.deserialize(export.export(jax.jit(function), platforms=("cpu",))(**symbolic).serialize())
    for size, length in ((3, 12), (1, 1), (2, 333)):
        lengths = ("ranges", (0, length), (length // 2, length))
        arrays, _ = draw(dataclasses.replace(case, batch=size, seq_len=length, lengths=lengths))
        assert_close(again.call(**arrays), function(**arrays))


def test_symbolic_gradients():
    """Gradients of a dense key that is also the value, for any batch and length."""
    function, arrays = setting(LATENT, ragged_decode_attention)
    batch, rows = export.symbolic_shape("b, s")
    aval = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    loss = lambda query, key, end: jnp.sum(function(query=query, key=key, sequence_end=end) ** 2)
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    exported = export.export(gradients, platforms=("cpu",))(
        aval(batch, 6, 12), aval(batch, rows, 1, 16), aval(batch, dtype=jnp.int32)
    )
    again = export.deserialize(exported.serialize())
    for size, length in ((3, 12), (1, 1), (2, 333)):
        arrays, _ = draw(dataclasses.replace(LATENT, batch=size, seq_len=length, lengths=("uniform", 0, length)))
        args = [arrays[name] for name in ("query", "key", "sequence_end")]
        assert_close(again.call(*args), gradients(*args))


# ---------------------------------------------------------------------------------------------------------------------------
# The module, and `explain`


@each_case
def test_module(case):
    arrays, settings = draw(case)
    settings = {name: x for name, x in settings.items() if x is not None}
    module = RaggedDecodeAttention(arrays.get("softmax_aux"), **settings, backend=TextbookBackend())
    rest = {name: x for name, x in arrays.items() if name != "softmax_aux"}
    want = call(**{"value": None} | arrays, **settings, return_lse=True)
    assert_close(jax.jit(functools.partial(module, return_lse=True))(**rest), want)


def test_explain_shows_what_the_cache_is():
    shown = {}
    for case in CASES:
        arrays, settings = draw(case)
        explanation = explain(**arrays, **settings)
        shown[case.name] = str(explanation).splitlines()[0]
        assert explanation["cpu"].forward == "xla"
        assert explanation["cpu"].backward == "xla"
    assert shown == {
        "pages": "ragged_decode_attention of B 3, S 20 in pages of 5, heads 4:2, D 8:12, float32",
        "dense": "ragged_decode_attention of B 3, S 12, heads 4:2, D 8:12, float32",
        "latent": "ragged_decode_attention of B 3, S 12, heads 6:1, D 12:8, value in columns (2, 10) of rows of 16, float32",
        "latent pages": "ragged_decode_attention of B 3, T 2, S 16 in pages of 4, heads 6:1, D 12:8, "
        "value in columns (2, 10) of rows of 16, float32, int8 cache",
    }
