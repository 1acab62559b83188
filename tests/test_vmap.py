"""Calls under `jax.vmap`: any subset of the arguments is mapped, maps are nested, and a shared cache is never copied."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from support import array, assert_close, combinations, draw, floats_of, planned, stack, weights

from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import Case, TextbookBackend


call = functools.partial(ragged_decode_attention, backend=TextbookBackend())  # the waist is under test; this compiles quickly

CASE = Case("vmap", 2, 12, 4, 2, 8, lengths=("ranges", (2, 9), (-1, 12)), sinks=("query", 2))
TOKENS = dataclasses.replace(CASE, num_tokens=2, query_lengths=(2, 1), cache_dtype="int8", scales="row")
GROUPS = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "lengths": ("sequence_start", "sequence_end"),
    "sinks": ("softmax_aux",),
}
GROUPS_OF_TOKENS = GROUPS | {"lengths": (*GROUPS["lengths"], "query_lengths"), "scales": ("key_scale", "value_scale")}
SHIFTS = {"sequence_start": 1, "sequence_end": -3, "query_lengths": -1}


def subsets(groups):
    """All subsets of five groups. Our code alone decides how those of two to four are mapped, and the others take the same ways
    through JAX."""
    for count in range(1, 6):
        for subset in itertools.combinations(groups, count):
            yield pytest.param("+".join(subset), marks=[pytest.mark.once] * (1 < count < 5))


def names_of(subset, groups=GROUPS):
    return [name for group in subset.split("+") for name in groups[group]]


def stacked(names, case=CASE, size=3):
    """The arrays. Those in `names` have a mapped axis in front, with other values along it."""
    arrays, _ = draw(case)
    for name in names:
        if name in SHIFTS:
            arrays[name] = array(np.asarray(arrays[name]) + np.arange(size, dtype=np.int32)[:, None] * SHIFTS[name])
        else:
            arrays[name] = stack(*[draw(case, seed)[0][name] for seed in range(size)])
    return arrays


def vmapped(call, names):
    def function(**arrays):
        axes = {name: 0 if name in names else None for name in arrays}
        return jax.vmap(lambda kw: call(**kw, return_lse=True), in_axes=(axes,))(arrays)

    return function


def looped(call, names):
    def function(**arrays):
        size = arrays[names[0]].shape[0]
        kw = [{name: x[i] if name in names else x for name, x in arrays.items()} for i in range(size)]
        return jax.tree.map(lambda *x: jnp.stack(x), *(call(**kw, return_lse=True) for kw in kw))

    return function


def assert_maps(call, names, case=CASE):
    """vmap gives what a Python loop gives, forward and backward."""
    arrays = stacked(names, case)
    floats = {name: arrays.pop(name) for name in floats_of(arrays)}

    def both(transform, floats):
        out, pullback = jax.vjp(lambda floats: transform(call, names)(**floats, **arrays), floats)
        return out, pullback(jax.tree.map(weights, out))

    # The calls of the loop have the same shapes for all subsets, so they are compiled once.
    assert_close(jax.jit(functools.partial(both, vmapped))(floats), both(looped, floats))


@pytest.mark.parametrize("subset", [*subsets(GROUPS)])
def test_any_subset(subset):
    assert_maps(call, names_of(subset))


@pytest.mark.parametrize("subset", ["query", "query+sinks", "lengths", "query+key+value+lengths+sinks"])
def test_each_backend(subject, subset):
    assert_maps(subject.call, names_of(subset))


@pytest.mark.parametrize(
    "subset", [*GROUPS_OF_TOKENS, "query+lengths+sinks", "key+value+scales", "query+scales", "query+key+value+lengths+sinks+scales"]
)
def test_tokens_and_quantised_caches(subset):
    assert_maps(functools.partial(call, sliding_window=(4, 0)), names_of(subset, GROUPS_OF_TOKENS), TOKENS)


def call_with_numbers(*, key_scale, value_scale, **arrays):
    """A call with one scale for the whole cache, in place of one per head."""
    return call(**arrays, key_scale=key_scale[0], value_scale=value_scale[0])


SHARED = {"number": (call_with_numbers, "head"), "head": (call, "head"), "sequence": (call, "sequence")}


@pytest.mark.parametrize(("name", "subset"), combinations([*SHARED], ["query", "query+scales", "key+value", "key+value+scales"]))
def test_scales_that_many_share(name, subset):
    call, scales = SHARED[name]
    assert_maps(call, names_of(subset, GROUPS_OF_TOKENS), dataclasses.replace(TOKENS, scales=scales))


@pytest.mark.parametrize("name", SHIFTS)
def test_one_length_alone(name):
    assert_maps(call, [name], TOKENS if name == "query_lengths" else CASE)


def test_features():
    featured = functools.partial(call, sliding_window=(4, 0), logits_soft_cap=1.5, softmax_scale=0.4)
    assert_maps(featured, ["query"])
    assert_maps(featured, ["query", "key", "value"])


@pytest.mark.parametrize(
    ("outer", "inner"),
    combinations(["query", "query+key+value+lengths+sinks"], ["query", "query+sinks", "lengths", "key+value"]),
)
def test_nested(outer, inner):
    """A map of maps, each over other arguments."""
    assert_nested(names_of(outer), names_of(inner))


def assert_nested(outer, inner, case=CASE):
    arrays = stacked(inner, case)
    arrays = {k: stack(x, np.asarray(x)[::-1]) if k in outer else x for k, x in arrays.items()}
    axes = lambda names: ({k: 0 if k in names else None for k in arrays},)
    twice = jax.vmap(jax.vmap(lambda kw: call(**kw, return_lse=True), in_axes=axes(inner)), in_axes=axes(outer))
    want = [looped(call, inner)(**{k: x[i] if k in outer else x for k, x in arrays.items()}) for i in range(2)]
    assert_close(twice(arrays), jax.tree.map(lambda *x: jnp.stack(x), *want))


def test_junk_between_mapped_ranges():
    """Three maps of one cache see ranges far from each other. The rows between the ranges may hold anything."""
    arrays, _ = draw(Case("", 1, 30, 2, 1, 8))
    starts, ends = jnp.array([[0], [10], [20]]), jnp.array([[4], [11], [30]])
    rows = jnp.arange(30)[None]
    seen = jnp.any((rows >= starts) & (rows < ends), axis=0)[None, :, None, None]
    mapped = jax.vmap(
        lambda start, end, cache: call(arrays["query"], **cache, sequence_start=start, sequence_end=end), (0, 0, None)
    )
    cache = {name: arrays[name] for name in ("key", "value")}
    junk = {name: jnp.where(seen, x, jnp.nan) for name, x in cache.items()}
    assert_close(mapped(starts, ends, junk), mapped(starts, ends, cache))


@pytest.mark.parametrize("subset", ["query", "key", "query+key+value+lengths+sinks"])
def test_a_map_over_nothing(subset):
    """An axis of size 0, which would be folded into the tokens, looped over, or joined with the batch."""
    names = names_of(subset)
    arrays = {name: x[:0] if name in names else x for name, x in stacked(names).items()}
    floats = {name: arrays.pop(name) for name in floats_of(arrays)}
    function = lambda floats: vmapped(ragged_decode_attention, names)(**floats, **arrays)
    (out, lse), pullback = jax.vjp(function, floats)
    assert (out.shape, lse.shape) == ((0, 2, 4, 8), (0, 2, 4))
    (gradients,) = pullback((out, lse))
    assert {name: x.shape for name, x in gradients.items()} == {name: x.shape for name, x in floats.items()}
    assert not any(np.any(x) for x in gradients.values())


def test_other_axes():
    arrays = stacked(["query", "key", "value"])
    query, key, value, start, end, sinks = arrays.values()
    want = vmapped(call, ["query", "key", "value"])(**arrays)[0]
    one = lambda query, key, value: call(query, key, value, start, end, softmax_aux=sinks)
    moved = jnp.moveaxis(query, 0, 1), jnp.moveaxis(key, 0, 2), jnp.moveaxis(value, 0, -1)
    got = jax.vmap(one, in_axes=(1, 2, -1), out_axes=2)(*moved)
    assert_close(jnp.moveaxis(got, 2, 0), want)


# ---------------------------------------------------------------------------------------------------------------------------
# A shared cache is read in place


LARGE = Case("", 2, 8192, 4, 2, 64, lengths=("ranges", (3, 8000), (0, 100)), sinks=("query", 1))
NUM_MAPPED = 8


def sizes(jaxpr):
    """The number of elements of every array that a jaxpr, and the jaxprs inside it, compute."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ragged_decode_operand":  # the identity, which compiles to nothing
            continue
        for inner in jax.tree.leaves(eqn.params):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from sizes(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
        yield from (math.prod(var.aval.shape) for var in eqn.outvars)


def mapped_call(mapped):
    arrays, _ = draw(LARGE)
    for name in mapped:
        x = arrays[name]
        arrays[name] = stack(*[x] * NUM_MAPPED)
    return vmapped(ragged_decode_attention, mapped), arrays


@pytest.mark.parametrize("subset", ["query", "query+sinks", "sinks", "lengths", "key", "value+lengths"])
def test_shared_cache_is_not_copied(subset):
    """The transformation makes no array as large as the cache, or as half of the cache if half is shared."""
    function, arrays = mapped_call(names_of(subset))
    assert max(sizes(jax.make_jaxpr(function)(**arrays).jaxpr)) < min(arrays["key"].size, arrays["value"].size) / 2


@pytest.mark.parametrize("subset", ["query", "query+sinks", "sinks"])
def test_shared_cache_is_not_copied_by_xla(subset):
    function, arrays = mapped_call(names_of(subset))
    memory = jax.jit(function).lower(**arrays).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < arrays["key"].nbytes / 2


def test_copies_would_be_seen():
    """The measure of the test above finds a copy that is made on purpose."""
    function, arrays = mapped_call(["query"])
    copying = lambda key, **rest: function(key=jnp.stack([key, key])[1], **rest)
    assert max(sizes(jax.make_jaxpr(copying)(**arrays).jaxpr)) >= arrays["key"].size


def test_mapped_queries_share_one_operation():
    """Mapped queries become more heads of one operation on the cache as it is. There is no loop."""
    function, arrays = mapped_call(["query"])
    text = str(jax.make_jaxpr(function)(**arrays))
    assert text.count("= ragged_decode_forward[") == 1
    assert "scan" not in text
    out, _ = function(**arrays)
    np.testing.assert_array_equal(out, np.stack([out[0]] * NUM_MAPPED))


# ---------------------------------------------------------------------------------------------------------------------------
# Pages, a value of another width, and a value in the key's rows


PAGES = Case("pages", 2, 12, 4, 2, 8, lengths=CASE.lengths, sinks=("query", 2), page_size=4, value_dim=12)
LATENT = Case("latent", 2, 12, 6, 1, 12, lengths=CASE.lengths, softmax_scale=0.3, value_columns=(0, 8), row_dim=16)
LAST_COLUMNS = dataclasses.replace(LATENT, name="last columns", value_columns=(9, 16))
LATENT_PAGES = dataclasses.replace(
    LATENT,
    name="latent pages",
    page_size=5,
    num_tokens=2,
    query_lengths=(2, 1),
    cache_dtype="int8",
    scales="row",
    value_columns=(4, 16),
)
POOL = {"pool": ("key", "value"), "table": ("page_table",)}
PARTS = ("query", "pool", "table", "lengths", "sinks")


@pytest.mark.parametrize("subset", [*subsets(PARTS), "key", "value+table", "key+query"])
def test_pages(subset):
    """The table has junk too. An entry of another map's pool would be seen."""
    assert_maps(call, names_of(subset, GROUPS | POOL), PAGES)


@pytest.mark.parametrize(
    ("case", "subset"), combinations([LATENT, LAST_COLUMNS, LATENT_PAGES], ["query", "key", "key+query+lengths"])
)
def test_value_in_the_rows(case, subset):
    groups = GROUPS_OF_TOKENS if case.num_tokens else GROUPS
    latent = functools.partial(call, **draw(case)[1])
    assert_maps(latent, names_of(subset, groups), case)
    if case.page_size:
        assert_maps(latent, [*names_of(subset, groups), "page_table", "key_scale"], case)


@pytest.mark.parametrize(
    ("outer", "inner"),
    combinations(["table", "pool+table", "query+pool"], ["query", "table", "query+table+lengths", "pool", "pool+table"]),
)
def test_nested_maps_of_pages(outer, inner):
    assert_nested(names_of(outer, GROUPS | POOL), names_of(inner, GROUPS | POOL), PAGES)


def test_entries_stay_in_the_pool_of_their_map():
    """A wrong entry beyond the pool is clipped to the pool of its own map."""
    arrays = stacked(["key", "value"], PAGES)
    arrays["page_table"] = jnp.array([[99, -1, 8, 10], [7, 11, -5, 2**31 - 1]], jnp.int32)
    del arrays["sequence_start"], arrays["sequence_end"]
    pools = ["key", "value"]
    assert_close(vmapped(call, pools)(**arrays), looped(call, pools)(**arrays))


def test_pools_with_heads_first(subject):
    """[Hkv, num_pages, page_size, D], as some projects have pools, mapped over heads with one table."""
    arrays, _ = draw(PAGES)
    query, key, value, start, end, aux, table = arrays.values()
    groups = query.reshape(2, 2, 2, 8).swapaxes(0, 1), aux.reshape(2, 2, 2)

    def one(query, aux, key, value):
        return subject.call(query, key[:, :, None], value[:, :, None], start, end, softmax_aux=aux, page_table=table)

    out = jax.vmap(one)(*groups, *(jnp.moveaxis(x, 2, 0) for x in (key, value)))
    assert_close(out.swapaxes(0, 1).reshape(2, 4, 12), call(**arrays))


LARGE_PAGES = Case("", 4, 8192, 4, 2, 64, lengths=("full",), page_size=16, value_dim=32)
MAPPED_PAGES = ["table", "query", "query+table", "pool", "query+pool+table"]


def shapes_of(arrays, mapped=()):
    return {
        name: jax.ShapeDtypeStruct((NUM_MAPPED, *x.shape) if name in mapped else x.shape, x.dtype) for name, x in arrays.items()
    }


def temporary_bytes(function, arrays):
    """The bytes that the compiled program needs in addition to its arguments and results."""
    return planned(jax.jit(function).lower(**arrays)).memory_analysis().temp_size_in_bytes


@pytest.mark.optimised
@pytest.mark.parametrize("subset", MAPPED_PAGES)
def test_pools_are_not_copied(subset):
    """A mapped pool becomes one pool in place, and a shared pool stays as it is."""
    names = names_of(subset, GROUPS | POOL)
    arrays = draw(LARGE_PAGES)[0]
    function = vmapped(functools.partial(ragged_decode_attention, backend="xla"), names)
    assert temporary_bytes(function, shapes_of(arrays, names)) < arrays["value"].nbytes / 4


@pytest.mark.optimised
def test_pools_with_heads_first_are_not_copied():
    arrays = draw(LARGE_PAGES)[0]
    query, key, value, table = arrays.values()

    def function(query, key, value):
        one = lambda query, key, value: ragged_decode_attention(
            query, key[:, :, None], value[:, :, None], page_table=table, backend="xla"
        )
        return jax.vmap(one)(query, key, value)

    first = lambda x: jax.ShapeDtypeStruct((x.shape[2], *x.shape[:2], x.shape[3]), x.dtype)
    shapes = {"query": jax.ShapeDtypeStruct((2, 4, 2, 64), query.dtype), "key": first(key), "value": first(value)}
    assert temporary_bytes(function, shapes) < value.nbytes / 4


@pytest.mark.optimised
def test_copies_of_pools_would_be_seen():
    arrays = draw(LARGE_PAGES)[0]
    function = vmapped(functools.partial(ragged_decode_attention, backend="xla"), ["query"])
    copying = lambda key, **rest: function(key=key[::-1], **rest)
    assert temporary_bytes(copying, shapes_of(arrays, ["query"])) >= arrays["key"].nbytes


def test_tables_on_a_shared_pool_are_one_operation():
    """Mapped tables become more sequences, and mapped queries become more tokens. There is no loop, and nothing as large as the
    pool."""
    arrays = draw(LARGE_PAGES)[0]
    for subset in ("table", "query", "query+table"):
        names = names_of(subset, GROUPS | POOL)
        jaxpr = jax.make_jaxpr(vmapped(ragged_decode_attention, names))(**shapes_of(arrays, names))
        assert str(jaxpr).count("= ragged_decode_forward[") == 1
        assert "scan" not in str(jaxpr)
        assert max(sizes(jaxpr.jaxpr)) < arrays["value"].size / 2
