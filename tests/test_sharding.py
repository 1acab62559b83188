"""Calls on many devices: the answer is that of one device, whoever says how the cache is split, and a split that cannot work is
an error."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import call, gradients, loss, make_mesh, place, placed, put, SPECS
from support import array, assert_close, assert_right, combinations, draw, floats_of, stack

from ejk_ragged import merge, ragged_decode_attention
from ejk_ragged.testing import Case


# Ranges in one shard, across shards, and empty. A window that crosses shards.
RANGES = ("ranges", (0, 64), (-5, 1000), (9, 9), (20, 37))
CASE = Case("", 4, 64, 8, 4, 16, lengths=RANGES, sinks=("query", 2))
FEATURES = Case("features", 4, 64, 8, 4, 16, "bfloat16", RANGES, 0.3, (25, 0), 1.5, ("kv", 1))
TOKENS = Case("tokens", 4, 64, 8, 4, 16, "float32", RANGES, 0.3, (25, 0), 1.5, ("kv", 1), 3, (3, 2, 3, 1), "int8", "row")


def on_meshes(*names_and_values):
    """Parameters, each combined with both kinds of meshes."""
    names, values = names_and_values[::2], names_and_values[1::2]
    return pytest.mark.parametrize((*names, "mesh"), combinations(*values, ["Auto", "Explicit"]), indirect=["mesh"])


@pytest.fixture
def explicit():
    return make_mesh("Explicit", "Explicit", "Explicit")


def split(call, mesh, spec):
    """The call with its cache placed on a mesh. The other arguments stay as they are."""
    return lambda **arrays: call(**place(mesh, spec, arrays))


# ---------------------------------------------------------------------------------------------------------------------------
# The answer


@on_meshes("name", [*SPECS], "case", [FEATURES, TOKENS])
def test_right(name, case, mesh):
    """Output, lse and gradients are the oracle's, within the tolerances of one device, whatever dead rows hold."""
    assert_right(split(call, mesh, SPECS[name]), case.draw(poison=True))


@on_meshes("case", [FEATURES, TOKENS])
def test_each_backend(subject, mesh, case):
    call = functools.partial(ragged_decode_attention, backend=subject.on_cpus())
    assert_right(split(call, mesh, P(None, "x", "y")), case.draw(poison=True))


@on_meshes("group", [1, 5])
def test_one_kv_head(mesh, group):
    case = Case("", 2, 16, group, 1, 16, lengths=("ranges", (3, 16), (0, 7)), sinks=("query", 1))
    for spec in (P(), P("x", "y")):
        assert_right(split(call, mesh, spec), case.draw(poison=True))


# Under jit a constraint may cut rows and sequences unevenly. Some devices then have fewer, and padding fills their part.
UNEVEN = {
    "rows": (Case("", 2, 13, 4, 2, 16), P(None, ("x", "y"))),
    "rows, an end beyond them": (Case("", 2, 5, 4, 2, 16, lengths=("ranges", (0, 6), (1, 99))), P(None, "x")),
    "fewer rows than devices": (Case("", 2, 3, 4, 2, 16, lengths=("ranges", (0, 3), (1, 2))), P(None, ("x", "y", "z"))),
    "sequences": (Case("", 3, 16, 4, 2, 16, lengths=("ranges", (0, 9), (2, 16), (0, 3))), P("x")),
    "both, of an int8 cache": (
        Case("", 3, 13, 4, 2, 16, sinks=("query", 1), num_tokens=2, cache_dtype="int8", scales="row"),
        P("x", "y"),
    ),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven(auto, name):
    case, spec = UNEVEN[name]
    batch, rows, *_ = *spec, None

    def constrained(**arrays):
        specs = {"key": spec, "value": spec, "key_scale": P(batch, None, rows), "value_scale": P(batch, None, rows)}
        constrain = lambda name: jax.lax.with_sharding_constraint(arrays[name], NamedSharding(auto, specs[name]))
        cut = {name: constrain(name) for name in specs if name in arrays}
        return call(**arrays | cut)

    def jitted(**arguments):
        traced = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
        static = {name: x for name, x in arguments.items() if name not in traced}
        return jax.jit(functools.partial(constrained, **static))(**traced)

    assert_right(jitted, case.draw(poison=True))


@on_meshes("dtype", ["bfloat16", "float16"])
def test_rounded_once(mesh, dtype):
    """Partial results are not rounded before they are merged. So output and d_query have the bits of one device, except for
    ties."""
    arrays, _ = draw(Case("", 4, 64, 8, 4, 64, dtype, sinks=("query", 1)))

    def results(arrays):
        out, pullback = jax.vjp(lambda query: call(**arrays | {"query": query}), arrays["query"])
        return out, *pullback(jnp.ones_like(out))

    for got, want in zip(results(place(mesh, P(None, "x"), arrays)), results(arrays), strict=True):
        other = np.asarray(got.view(jnp.uint16)) != np.asarray(want.view(jnp.uint16))
        assert other.mean() < 0.01


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_alike_keys_on_several_devices(mesh, size):
    """The devices' shares are weighed by a float32 lse, so a weight is off by the rounding error of the logits at most."""
    query = jnp.zeros((1, 4, 16)).at[..., 0].set(size)
    key, value = jnp.ones((1, 64, 2, 16)), array(np.random.default_rng(0).uniform(-1, 1, (1, 64, 2, 16)), jnp.float32)
    arrays = place(mesh, P(None, ("y", "x")), {"query": query, "key": key, "value": value})
    start, end = jnp.array([3], jnp.int32), jnp.array([37], jnp.int32)  # the devices have 13, 16, 5 and 0 rows
    out = call(arrays["query"], arrays["key"], arrays["value"], start, end, softmax_scale=1.0)
    want = np.repeat(np.asarray(value[:, 3:37], np.float64).mean(axis=1), 2, axis=1)
    assert np.abs(out - want).max() < 1e-6 + 2**-23 * size


def test_float64(mesh, x64):
    assert_right(split(call, mesh, P("x", "y", "z")), Case("", 4, 64, 8, 4, 16, "float64", RANGES).draw())


def test_without_jit(auto):
    with jax.disable_jit():
        out = call(**placed(CASE, auto, P(None, "x")))
    assert_close(out, call(**draw(CASE)[0]))


def test_constrained_inside_jit(auto):
    """The cache is made inside jit, and the partitioner learns its sharding there."""

    def function(arrays):
        cut = lambda x: jax.lax.with_sharding_constraint(2 * x, NamedSharding(auto, P(None, "y")))
        return call(**arrays | {name: cut(arrays[name]) for name in ("key", "value")})

    arrays, _ = draw(CASE)
    assert_close(jax.jit(function)(arrays), call(**arrays | {name: 2 * arrays[name] for name in ("key", "value")}))


def test_types_state_shardings(explicit):
    function = functools.partial(call, return_lse=True)
    out, lse = jax.eval_shape(function, **placed(CASE, explicit, P("x", "y", "z")))
    assert (out.sharding.spec, lse.sharding.spec) == (P("x", "z", None), P("x", "z"))
    out, lse = jax.eval_shape(function, **placed(TOKENS, explicit, P("x", "y", "z")))
    assert (out.sharding.spec, lse.sharding.spec) == (P("x", None, "z", None), P("x", None, "z"))


# ---------------------------------------------------------------------------------------------------------------------------
# Transformations


@pytest.fixture
def alone():
    """The result of one device."""
    return gradients(draw(CASE)[0])


def test_under_jit(mesh, alone):
    assert_close(jax.jit(gradients)(placed(CASE, mesh, P("x", "y", "z"))), alone)


def test_under_set_mesh(mesh, alone):
    arrays = placed(CASE, mesh, P("x", "y", "z"))
    with jax.set_mesh(mesh):
        got = jax.jit(gradients)(arrays)
    assert_close(got, alone)


def test_checkpoint(mesh, alone):
    again = functools.partial(gradients, call=checkpointed)
    assert_close(jax.jit(again)(placed(CASE, mesh, P("x", "y", "z"))), alone)


def checkpointed(return_lse, **arrays):
    return jax.checkpoint(functools.partial(call, return_lse=return_lse))(**arrays)


@pytest.mark.parametrize("kinds", [("Explicit", "Auto", "Explicit"), ("Auto", "Explicit", "Auto")], ids=str)
def test_axes_of_both_kinds(kinds, alone):
    assert_close(jax.jit(gradients)(placed(CASE, make_mesh(*kinds), P("x", "y", "z"))), alone)


def test_exported_with_explicit_axes(explicit):
    """An artifact for eight devices. With automatic axes the artifact would hold a callback into Python, which JAX does not
    serialise."""
    arrays = placed(CASE, explicit, P("x", "y", "z"))
    again = export.deserialize(export.export(jax.jit(call))(**arrays).serialize())
    assert again.nr_devices == 8
    everywhere = {name: put(explicit, P(), x) if name not in ("key", "value") else x for name, x in arrays.items()}
    assert_close(jax.jit(again.call)(**everywhere), call(**draw(CASE)[0]))


@on_meshes("names", [("query", "key", "value"), ("query", "key", "value", "sequence_end", "softmax_aux")])
def test_mapped_axis_that_is_split(mesh, names):
    """All mapped arguments are split, as JAX demands where types say how arrays are split."""
    arrays, _ = draw(CASE)
    stacked = arrays | {name: stack(arrays[name], np.asarray(arrays[name])[::-1]) for name in names}
    spec = lambda name: P("x", None, None, "y") if name in ("key", "value") else P("x")
    split = {name: put(mesh, spec(name) if name in names else P(), x) for name, x in stacked.items()}
    function = lambda arrays: jax.vmap(gradients, ({name: 0 if name in names else None for name in arrays},))(arrays)
    assert_close(jax.jit(function)(split), function(stacked))


@pytest.mark.xla
@pytest.mark.parametrize("size", [4, 3])
def test_a_backend_gets_the_sizes_of_maps_on_one_device(auto, size):
    """The XLA backend reshapes the cache by `problem.maps`. The partitioner splits the mapped axis, so the number of maps on all
    devices does not divide the first axis of the cache on one device."""
    one = functools.partial(ragged_decode_attention, backend="xla")
    arrays, _ = draw(Case("", 1, 64, 8, 4, 16))
    args: list[Any] = [stack(*[np.asarray(arrays[name]) * (1 + i) for i in range(size)]) for name in ("query", "key", "value")]

    def function(spec, query, *cache):
        return jax.vmap(one)(query, *(jax.lax.with_sharding_constraint(x, NamedSharding(auto, spec)) for x in cache))

    want = stack(*[one(*(np.asarray(x)[i] for x in args)) for i in range(size)])
    for spec in (P("x"), P(("x", "y")), P("x", None, "y", "z")):
        assert_close(jax.jit(functools.partial(function, spec))(*args), want)


def heads_first(call):
    """A call on a cache [B, Hkv, S, D] and queries [B, Hkv, G, D]: nested maps of one head of one sequence."""

    def one(query, key, value, start, end):
        return call(query[None], key[None, :, None], value[None, :, None], start[None], end[None])[0]

    return jax.vmap(jax.vmap(one, (0, 0, 0, None, None)))


def head_first(arrays):
    query, key, value, start, end, *_ = arrays.values()
    batch, _, heads, dim = key.shape
    return query.reshape(batch, heads, -1, dim), key.swapaxes(1, 2), value.swapaxes(1, 2), start, end


@pytest.mark.parametrize("spec", [P("x"), P("x", "y"), P(None, "x", "y")], ids=str)
def test_heads_first(mesh, spec):
    arrays, _ = draw(CASE)
    args = head_first(arrays)
    want = call(*list(arrays.values())[:5])
    batch, heads, *_ = *spec, None
    # Where types say how arrays are split, all mapped arguments must be split in the same way.
    specs = [P(batch, heads), spec, spec, P(batch), P(batch)]
    got = jax.jit(heads_first(call))(*[put(mesh, to, x) for to, x in zip(specs, args, strict=True)])
    assert_close(got.reshape(want.shape), want)


# ---------------------------------------------------------------------------------------------------------------------------
# shard_map, with its default checks


def mapped_gradients(function, mesh, specs, arrays, **options):
    """Gradients of the sum over devices of `function(arrays)` on each device."""
    local = jax.shard_map(lambda arrays: function(arrays)[None], mesh=mesh, in_specs=(specs,), out_specs=P("x"), **options)
    floats = {name: arrays[name] for name in floats_of(arrays)}
    return jax.jit(jax.grad(lambda floats: jnp.sum(local(arrays | floats))))(floats)


def by_batch(arrays):
    """Specs by name: every argument with a batch is split, and the sinks are shared."""
    return {name: P() if name == "softmax_aux" else P("x") for name in arrays}


def test_shard_map(subject, mesh):
    """Each device calls on its share of the batch. Sinks are shared, and their gradient is summed."""
    function = functools.partial(loss, functools.partial(ragged_decode_attention, backend=subject.on_cpus()))
    arrays, _ = draw(CASE)
    specs = by_batch(arrays)
    split = {name: put(mesh, specs[name], x) for name, x in arrays.items()}
    assert_close(mapped_gradients(function, mesh, specs, split), gradients(arrays))


def test_shard_map_of_tokens(mesh):
    """The same with several tokens and a quantised cache."""
    arrays, settings = draw(TOKENS)
    some = functools.partial(call, **settings)
    specs = by_batch(arrays)
    split = {name: put(mesh, specs[name], x) for name, x in arrays.items()}
    assert_close(mapped_gradients(functools.partial(loss, some), mesh, specs, split), gradients(arrays, some))


@on_meshes("varying", [["query"], ["key", "value"], ["sequence_start", "sequence_end"], ["softmax_aux"]])
def test_inputs_that_vary_unlike(mesh, varying):
    """Some inputs differ between devices and some are the same on all devices. Gradients of the latter are summed over the
    devices."""
    arrays, _ = draw(CASE)
    stacked = {name: stack(x, np.asarray(x)[::-1]) if name in varying else x for name, x in arrays.items()}
    specs = {name: P("x") if name in varying else P() for name in arrays}

    def on_one(arrays):
        return loss(call, {name: x[0] if name in varying else x for name, x in arrays.items()})

    def one_after_another(floats):
        parts = [{name: x[i : i + 1] if name in varying else x for name, x in (stacked | floats).items()} for i in range(2)]
        return sum(on_one(part) for part in parts)

    split = {name: put(mesh, specs[name], x) for name, x in stacked.items()}
    got = mapped_gradients(on_one, mesh, specs, split)
    assert_close(got, jax.grad(one_after_another)({name: stacked[name] for name in got}))


def test_merged_by_hand(mesh):
    """Inside `shard_map` a device knows only its own rows. The caller handles lengths, sinks and the merge."""

    def local(query, key, value, start, end, aux):
        index, rows = jax.lax.axis_index("x"), key.shape[1]
        aux = jnp.where(index == 0, aux, -jnp.inf)
        partial = call(query, key, value, start - index * rows, end - index * rows, softmax_aux=aux, return_lse=True)
        out, lse = merge(zip(*jax.lax.all_gather(partial, "x"), strict=True))
        return out[None], lse[None]

    arrays, _ = draw(CASE)
    specs = (P(), P(None, "x"), P(None, "x"), P(), P(), P())
    args = [put(mesh, spec, x) for spec, x in zip(specs, arrays.values(), strict=True)]
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("x")))(*args)
    want = call(**arrays, return_lse=True)
    for i in range(2):
        assert_close([np.asarray(x)[i] for x in got], [np.asarray(x) for x in want])


@pytest.mark.parametrize("kind", ["explicit axes", "shard_map"])
def test_lowers_for_gpus(kind):
    """The program has kernels, and is lowered on a machine without a GPU."""
    mesh = make_mesh(*["Explicit" if kind == "explicit axes" else "Auto"] * 3)
    spec = P(None, "x") if kind == "explicit axes" else P("x")
    arrays = placed(CASE, mesh, spec)
    function = functools.partial(gradients, call=ragged_decode_attention)
    if kind == "shard_map":
        function = functools.partial(mapped_gradients, functools.partial(loss, ragged_decode_attention), mesh, by_batch(arrays))
    text = jax.jit(function).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton") >= 2  # forward and backward


def test_vmap_inside(mesh):
    arrays, _ = draw(CASE)
    query, key, value, start, end, _ = arrays.values()
    stacked = [stack(x, -np.asarray(x)) for x in (query, key, value)]
    function = jax.vmap(call, (0, 0, 0, None, None))
    specs = (*[P(None, "x")] * 3, P("x"), P("x"))
    args: list[Any] = [*stacked, start, end]
    split = [put(mesh, spec, x) for spec, x in zip(specs, args, strict=True)]
    got = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(None, "x")))(*split)
    assert_close(got, function(*args))


@pytest.mark.parametrize("kinds", [("Auto", "Auto"), ("Explicit", "Explicit"), ("Auto", "Explicit"), ("Explicit", "Auto")], ids=str)
def test_over_some_axes(kinds, alone):
    """A `shard_map` over one axis of a mesh whose other axes split the cache too."""
    mesh = make_mesh("Auto", *kinds)
    arrays = placed(CASE, mesh, P("x", "y", "z"))
    specs = by_batch(arrays)
    arrays = {name: x if name in ("key", "value") else put(mesh, specs[name], x) for name, x in arrays.items()}
    assert_close(mapped_gradients(functools.partial(loss, call), mesh, specs, arrays, axis_names={"x"}), alone)


# ---------------------------------------------------------------------------------------------------------------------------
# What cannot work


def error_of(mesh):
    """The error of a call. With automatic axes the partitioner finds the mistake, and JAX raises what the partitioner reports."""
    return ValueError if mesh.axis_types[0] == AxisType.Explicit else jax.errors.JaxRuntimeError


def test_head_dim_may_not_be_split(mesh):
    message = r"must not be split along head_dim, got P\('x', None, None, 'y'\). Split them along batch, seq_len"
    with pytest.raises(error_of(mesh), match=message):
        call(**placed(CASE, mesh, P("x", None, None, "y")))


def test_key_and_value_are_split_alike(mesh):
    arrays = placed(CASE, mesh, P("x"))
    arrays["value"] = put(mesh, P(None, "x"), arrays["value"])
    message = r"key and value must be split alike, got P\('x', None, None, None\) and P\(None, 'x', None, None\)"
    with pytest.raises(error_of(mesh), match=message):
        call(**arrays)


def test_kv_heads_are_split_evenly(auto):
    """Two kv heads over four devices. JAX pads such a constraint, and no query reads a head of padding."""

    @jax.jit
    def function(arrays):
        cut = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(auto, P(None, None, ("y", "z"))))
        return call(**arrays | {name: cut(arrays[name]) for name in ("key", "value")})

    message = (
        "must be split evenly along num_kv_heads, got 2 kv heads over 4 devices by 'y' and 'z'. Split them over fewer devices "
        "there, and over the others along batch or seq_len."
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        function(draw(Case("", 4, 16, 8, 2, 16))[0])


@pytest.mark.parametrize(
    ("query", "cache", "message"),
    [
        (P(None, "y"), P("x"), "along num_q_heads by no mesh axis, as key is, or not at all; got 'y'. Reshard it to"),
        (P("x", "y"), P("x", None, "z"), "along num_q_heads by 'z', as key is, or not at all; got 'y'"),
        (P(("x", "y")), P("x"), "along batch by 'x', as key is, or not at all; got 'x' and 'y'"),
        (P(None, None, "y"), P("x"), "along head_dim by no mesh axis, as key is, or not at all; got 'y'"),
    ],
)
def test_query_that_types_say_is_split_unlike_the_cache(explicit, query, cache, message):
    arrays = placed(CASE, explicit, cache)
    arrays["query"] = put(explicit, query, arrays["query"])
    with pytest.raises(ValueError, match=f"query must be split {message}"):
        call(**arrays)


def test_tokens_that_types_say_are_split(explicit):
    arrays = placed(dataclasses.replace(TOKENS, num_tokens=4), explicit, P("x"))
    arrays["query"] = put(explicit, P("x", "y"), arrays["query"])
    with pytest.raises(ValueError, match="query must be split along num_tokens by no mesh axis, as key is, or not at all; got 'y'"):
        call(**arrays)


def test_query_split_as_the_cache(explicit, alone):
    arrays = placed(CASE, explicit, P("x", "y", "z"))
    arrays["query"] = put(explicit, P("x", "z"), arrays["query"])
    arrays |= {name: put(explicit, P("x"), arrays[name]) for name in ("sequence_start", "sequence_end")}
    arrays["softmax_aux"] = put(explicit, P("z"), arrays["softmax_aux"])
    got = jax.jit(gradients)(arrays)
    assert all(x.sharding.spec == jax.typeof(arrays[name]).sharding.spec for name, x in got.items())
    assert_close(got, alone)


def test_axes_of_one_device_split_nothing():
    """If the type of a query splits it over one device, the query fits any cache."""
    explicit = make_mesh("Explicit", "Explicit", "Explicit", sizes=(8, 1, 1))
    arrays = draw(Case("", 1, 16, 4, 2, 16))[0]
    split = place(explicit, P(None, "x"), arrays) | {"query": put(explicit, P("y", "z"), arrays["query"])}
    assert_close(jax.jit(gradients)(split), gradients(arrays))
