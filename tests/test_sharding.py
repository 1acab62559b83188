"""On many devices: the answer of one, no traffic of the cache's size, and results that are split as the cache is.

The devices are simulated on the CPU (conftest.py), so what is compiled can be read.
"""

import functools
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_close, assert_right, draw

from ejk_ragged import merge, ragged_decode_attention
from ejk_ragged.testing import Case


EXAMPLE = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "many_devices.py"

# Ranges that lie in one shard, cross shards, and are empty; a window that crosses shards.
RANGES = ("ranges", (0, 64), (-5, 1000), (9, 9), (20, 37))
CASE = Case("", 4, 64, 8, 4, 16, lengths=RANGES, sinks=("query", 2))
FEATURES = Case("", 4, 64, 8, 4, 16, "bfloat16", RANGES, 0.3, (25, 0), 1.5, ("kv", 1))
LARGE = Case("", 4, 2048, 8, 4, 16, lengths=("uniform", 0, 2048), sinks=("query", 1))

SPECS = {
    "whole": P(),
    "batch": P("x"),
    "heads": P(None, None, "x"),
    "sequence": P(None, "x"),
    "two axes": P(None, ("y", "x")),
    "all": P("x", "y", "z"),
}
SPLIT_SEQUENCE = ("sequence", "two axes", "all")

each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    return make_mesh(*[request.param] * 3)


@pytest.fixture
def auto():
    return make_mesh("Auto", "Auto", "Auto")


@pytest.fixture
def explicit():
    return make_mesh("Explicit", "Explicit", "Explicit")


def make_mesh(*kinds):
    kinds = tuple(AxisType[kind] for kind in kinds)
    return jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=kinds, devices=jax.devices("cpu"))


def put(mesh, spec, *arrays):
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    return placed[0] if len(placed) == 1 else placed


def split(call, mesh, spec):
    """The call, with its cache placed on a mesh; the other arguments come as they are."""

    def function(*, key, value, **rest):
        return call(key=put(mesh, spec, key), value=put(mesh, spec, value), **rest)

    return function


def placed(case, mesh, spec):
    arrays, settings = draw(case)
    arrays |= {name: put(mesh, spec, arrays[name]) for name in ("key", "value")}
    return arrays, settings


def loss(query, key, value, sequence_start, sequence_end, softmax_aux, **settings):
    out, lse = ragged_decode_attention(
        query, key, value, sequence_start, sequence_end, softmax_aux=softmax_aux, return_lse=True, **settings
    )
    return jnp.sum(jnp.cos(out.astype(jnp.float32))) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0))


gradients = jax.grad(loss, argnums=(0, 1, 2, 5))


# ---------------------------------------------------------------------------------------------------------------------------
# The answer


@each_spec
@pytest.mark.parametrize("case", [CASE, FEATURES], ids=["plain", "features"])
def test_right(case, mesh, spec):
    """Output, lse and gradients are the oracle's, within the tolerances of one device, whatever dead rows hold."""
    assert_right(split(ragged_decode_attention, mesh, spec), case.draw(poison=True))


@pytest.mark.parametrize("spec", [P("x"), P(None, "x", "y")], ids=["batch", "sequence and heads"])
def test_each_backend(subject, mesh, spec):
    call = functools.partial(ragged_decode_attention, backend=subject.on_cpus())
    assert_right(split(call, mesh, spec), FEATURES.draw(poison=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_once(mesh, dtype):
    """Partial results are not rounded before they are merged: but for ties, output and d_query have one device's bits."""
    case = Case("", 4, 64, 8, 4, 64, dtype, sinks=("query", 1))
    arrays, _ = draw(case)

    def results(key, value):
        function = lambda query: ragged_decode_attention(query, key, value, softmax_aux=arrays["softmax_aux"])
        out, pullback = jax.vjp(function, arrays["query"])
        return out, *pullback(jnp.ones_like(out))

    cache = arrays["key"], arrays["value"]
    for got, want in zip(results(*put(mesh, P(None, "x"), *cache)), results(*cache), strict=True):
        other = np.asarray(got.view(jnp.uint16)) != np.asarray(want.view(jnp.uint16))
        assert other.mean() < 0.01


def test_float64(mesh, x64):
    assert_right(split(ragged_decode_attention, mesh, P("x", "y", "z")), Case("", 4, 64, 8, 4, 16, "float64", RANGES).draw())


def test_under_jit(mesh):
    arrays, _ = placed(CASE, mesh, P("x", "y", "z"))
    want, _ = draw(CASE)
    assert_close(jax.jit(gradients)(*arrays.values()), gradients(*want.values()))


def test_without_jit(auto):
    arrays, _ = placed(CASE, auto, P(None, "x"))
    with jax.disable_jit():
        out = ragged_decode_attention(**arrays)
    assert_close(out, ragged_decode_attention(**draw(CASE)[0]))


def test_constrained_inside_jit(auto):
    """A cache that is made inside, and whose sharding the partitioner learns there."""

    def function(key, value, **rest):
        key, value = (jax.lax.with_sharding_constraint(2 * x, NamedSharding(auto, P(None, "y"))) for x in (key, value))
        return ragged_decode_attention(key=key, value=value, **rest)

    arrays, _ = draw(CASE)
    doubled = arrays | {name: 2 * arrays[name] for name in ("key", "value")}
    assert_close(jax.jit(function)(**arrays), ragged_decode_attention(**doubled))


# ---------------------------------------------------------------------------------------------------------------------------
# What moves between devices, and how results are split


def traffic(function, *args):
    """Of each collective in the compiled program: its name, and the elements of its result."""
    text = jax.jit(function).lower(*args).compile().as_text()
    found = re.findall(r"= (\S.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    return [
        (name, sum(math.prod(map(int, re.findall(r"\d+", dims))) for dims in re.findall(r"\[(.*?)\]", to))) for to, name in found
    ]


def shards(spec):
    """Elements of a cache's shard, of the output's, and in how many shards the sequence is cut."""
    batch, sequence, heads, _ = (
        2 ** len((axes,) if isinstance(axes, str) else axes or ()) for axes in (*spec, *[None] * (4 - len(spec)))
    )
    out = LARGE.batch * LARGE.num_q_heads * LARGE.head_dim // (batch * heads)
    return LARGE.batch * LARGE.seq_len * LARGE.num_kv_heads * LARGE.head_dim // (batch * sequence * heads), out, sequence


def forward(*args):
    query, key, value, start, end, aux = args
    return ragged_decode_attention(query, key, value, start, end, softmax_aux=aux, return_lse=True)


@pytest.fixture
def large(mesh, spec):
    arrays, _ = placed(LARGE, mesh, spec)
    return [arrays.get(name) for name in ("query", "key", "value", "sequence_start", "sequence_end", "softmax_aux")]


@each_spec
def test_traffic_forward(large, spec):
    """Batch and heads need none. The sequence axis needs one collective, over (out, lse)."""
    _, out, sequence = shards(spec)
    expected = [("all-gather", sequence * out * (LARGE.head_dim + 1) // LARGE.head_dim)] if sequence > 1 else []
    assert traffic(forward, *large) == expected


@each_spec
def test_traffic_backward(large, mesh, spec):
    """One more over the sequence axis, for d_query; those of the sinks' gradient are as small."""
    cache, out, sequence = shards(spec)
    collectives = traffic(gradients, *large)
    assert all(size <= sequence * out * (LARGE.head_dim + 1) // LARGE.head_dim < cache / 4 for _, size in collectives), collectives
    assert collectives.count(("all-reduce", out)) == (sequence > 1)


def test_traffic_would_be_seen(auto):
    arrays, _ = placed(LARGE, auto, P(None, "x"))
    gathered = lambda key: 2 * jax.lax.with_sharding_constraint(key, NamedSharding(auto, P()))
    assert traffic(gathered, arrays["key"]) == [("all-gather", arrays["key"].size)]


@each_spec
def test_results_are_split_as_the_cache(large, mesh, spec):
    batch, _, heads, _ = *spec, *[None] * (4 - len(spec))
    for x in forward(*large):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P(batch, heads)), x.ndim)
    _, *d_cache, _ = jax.jit(gradients)(*large)
    for x in d_cache:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def test_types_state_shardings(explicit):
    arrays, _ = placed(CASE, explicit, P("x", "y", "z"))
    out, lse = jax.eval_shape(functools.partial(ragged_decode_attention, return_lse=True), **arrays)
    assert out.sharding.spec == P("x", "z", None)
    assert lse.sharding.spec == P("x", "z")


@pytest.mark.parametrize("query", [P("x"), P(None, "y"), P(None, None, "x"), P("y", "x")], ids=str)
@pytest.mark.parametrize("spec", [P(), P("x"), P(None, None, "x"), P(None, "x")], ids=str)
def test_query_split_in_its_own_way(auto, query, spec):
    """The partitioner moves the query; the cache and its gradients stay where they are."""
    arrays, _ = placed(LARGE, auto, spec)
    args = [
        put(auto, query, arrays["query"]),
        *(arrays.get(n) for n in ("key", "value", "sequence_start", "sequence_end", "softmax_aux")),
    ]
    assert max((size for _, size in traffic(gradients, *args)), default=0) <= 2 * LARGE.batch * LARGE.num_q_heads * (
        LARGE.head_dim + 1
    )
    _, d_key, d_value, _ = jax.jit(gradients)(*args)
    assert d_key.sharding.is_equivalent_to(NamedSharding(auto, spec), 4)
    assert d_value.sharding.is_equivalent_to(NamedSharding(auto, spec), 4)


@each_spec
def test_decode_loop_owns_its_cache(auto, spec):
    """Rows are written and read where they lie, in a loop under jit that keeps the cache's sharding."""

    def step(carry, row):
        key, value, ends, query = carry
        index = jnp.arange(LARGE.batch)
        key, value = (x.at[index, ends].set(row) for x in (key, value))
        out = ragged_decode_attention(query, key, value, None, ends + 1)
        return (key, value, ends + 1, out), out

    def loop(key, value, ends, query, rows):
        return jax.lax.scan(step, (key, value, ends, query), rows)

    arrays, _ = placed(LARGE, auto, spec)
    rows = jnp.ones((3, LARGE.batch, LARGE.num_kv_heads, LARGE.head_dim))
    args = arrays["key"], arrays["value"], arrays["sequence_end"] // 2, arrays["query"], rows
    assert max((size for _, size in traffic(loop, *args)), default=0) < shards(spec)[0] / 4
    (key, *_), out = jax.jit(loop)(*args)
    assert key.sharding.is_equivalent_to(NamedSharding(auto, spec), 4)
    alone = [jax.device_put(x, jax.devices("cpu")[0]) for x in args]
    assert_close(out, jax.jit(loop)(*alone)[1])


# ---------------------------------------------------------------------------------------------------------------------------
# Transformations


@pytest.mark.parametrize("mapped", ["query", "query key value", "sequence_end"])
def test_vmap(mesh, mapped):
    """A mapped axis stands beside those that are split: nothing is moved for it."""
    mapped = mapped.split()
    arrays, _ = draw(LARGE)
    arrays |= {name: jnp.stack([arrays[name], arrays[name][::-1], arrays[name]]) for name in mapped}
    names = list(arrays)
    call = lambda *args: loss(**{"sequence_start": None} | dict(zip(names, args, strict=True)))
    differentiated = [names.index(name) for name in ("query", "key", "value", "softmax_aux")]
    function = jax.vmap(jax.value_and_grad(call, differentiated), [0 if name in mapped else None for name in names])
    args = {
        name: put(mesh, P(None, "x", "y", "z") if name in mapped else P("x", "y", "z"), x) if name in ("key", "value") else x
        for name, x in arrays.items()
    }
    assert_close(jax.jit(function)(*args.values()), function(*arrays.values()), 1e-4)
    # Mapped lengths on a shared cache: one after another, and each has gradients like the cache of its own.
    assert max(size for _, size in traffic(function, *args.values())) <= 3 * 2 * LARGE.batch * LARGE.num_q_heads * (
        LARGE.head_dim + 1
    )


def test_mapped_axis_that_is_split(auto):
    arrays, _ = draw(CASE)
    stacked = [jnp.stack([arrays[name], -arrays[name]]) for name in ("query", "key", "value")]
    function = jax.vmap(lambda *args: ragged_decode_attention(*args, arrays["sequence_start"], arrays["sequence_end"]))
    got = jax.jit(function)(stacked[0], *put(auto, P("x", None, None, "y"), *stacked[1:]))
    assert_close(got, function(*stacked))


def test_under_set_mesh(mesh):
    arrays, _ = placed(CASE, mesh, P("x", "y", "z"))
    with jax.set_mesh(mesh):
        got = jax.jit(gradients)(*arrays.values())
    assert_close(got, gradients(*draw(CASE)[0].values()))


def test_checkpoint(mesh):
    arrays, _ = placed(CASE, mesh, P("x", "y", "z"))
    again = jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2, 5))
    assert_close(jax.jit(again)(*arrays.values()), gradients(*draw(CASE)[0].values()))


def test_exported_with_explicit_axes(explicit):
    """An artifact for eight devices. (With automatic axes it would hold a callback into Python, which JAX does not serialise.)"""
    arrays, _ = placed(CASE, explicit, P("x", "y", "z"))
    exported = export.export(jax.jit(ragged_decode_attention))(**arrays)
    again = export.deserialize(exported.serialize())
    assert again.nr_devices == 8
    everywhere = {name: put(explicit, P(), x) if name not in ("key", "value") else x for name, x in arrays.items()}
    assert_close(jax.jit(again.call)(**everywhere), ragged_decode_attention(**draw(CASE)[0]))


# ---------------------------------------------------------------------------------------------------------------------------
# shard_map, with its default checks


def test_shard_map(subject, mesh):
    """Each device calls on its share of the batch; sinks are shared, and their gradient is summed."""
    function = functools.partial(loss, backend=subject.on_cpus())
    local = jax.shard_map(lambda *args: function(*args)[None], mesh=mesh, in_specs=(*[P("x")] * 5, P()), out_specs=P("x"))
    arrays, _ = draw(CASE)
    args = [*put(mesh, P("x"), *list(arrays.values())[:5]), put(mesh, P(), arrays["softmax_aux"])]
    got = jax.jit(jax.grad(lambda *args: jnp.sum(local(*args)), (0, 1, 2, 5)))(*args)
    assert_close(got, jax.grad(function, (0, 1, 2, 5))(*arrays.values()))


@pytest.mark.parametrize("varying", ["query", "cache", "lengths", "sinks"])
def test_inputs_that_vary_unlike(mesh, varying):
    """What differs between devices meets what is the same on all; gradients of the latter are summed over the devices."""
    arrays, _ = draw(CASE)
    names = {
        "query": ["query"],
        "cache": ["key", "value"],
        "lengths": ["sequence_start", "sequence_end"],
        "sinks": ["softmax_aux"],
    }[varying]
    stacked = {name: jnp.stack([x, x[::-1]]) if name in names else x for name, x in arrays.items()}

    def on_one(*args):
        return loss(**{name: x[0] if name in names else x for name, x in zip(arrays, args, strict=True)})

    specs = tuple(P("x") if name in names else P() for name in arrays)
    mapped = jax.shard_map(lambda *args: on_one(*args)[None], mesh=mesh, in_specs=specs, out_specs=P("x"))
    split = [put(mesh, spec, x) for spec, x in zip(specs, stacked.values(), strict=True)]
    got = jax.jit(jax.grad(lambda *args: jnp.sum(mapped(*args)), (0, 1, 2, 5)))(*split)

    def one_after_another(*args):
        parts = [[x[i : i + 1] if name in names else x for name, x in zip(arrays, args, strict=True)] for i in range(2)]
        return sum(on_one(*part) for part in parts)

    assert_close(got, jax.grad(one_after_another, (0, 1, 2, 5))(*stacked.values()))


def test_merged_by_hand(mesh):
    """Inside `shard_map` a device knows of its own rows alone: lengths, sinks and the merge are the caller's."""

    def local(query, key, value, start, end, aux):
        index, rows = jax.lax.axis_index("x"), key.shape[1]
        aux = jnp.where(index == 0, aux, -jnp.inf)
        partial = ragged_decode_attention(
            query, key, value, start - index * rows, end - index * rows, softmax_aux=aux, return_lse=True
        )
        out, lse = merge(zip(*jax.lax.all_gather(partial, "x"), strict=True))
        return out[None], lse[None]

    arrays, _ = placed(CASE, mesh, P(None, "x"))
    specs = (P(), P(None, "x"), P(None, "x"), P(), P(), P())
    args = [put(mesh, spec, x) for spec, x in zip(specs, arrays.values(), strict=True)]
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("x")))(*args)
    want = forward(*draw(CASE)[0].values())
    for i in range(2):
        assert_close([np.asarray(x)[i] for x in got], [np.asarray(x) for x in want])


@pytest.mark.parametrize("kind", ["explicit axes", "shard_map"])
def test_lowers_for_gpus(kind):
    """With kernels inside, on a machine that has no GPU to run them."""
    mesh = make_mesh(*["Explicit" if kind == "explicit axes" else "Auto"] * 3)
    spec = P(None, "x") if kind == "explicit axes" else P("x")
    arrays, _ = placed(CASE, mesh, spec)
    function = gradients
    if kind == "shard_map":
        specs = (*[P("x")] * 5, P())
        local = jax.shard_map(lambda *args: loss(*args)[None], mesh=mesh, in_specs=specs, out_specs=P("x"))
        function = jax.grad(lambda *args: jnp.sum(local(*args)), (0, 1, 2, 5))
    text = jax.jit(function).trace(*arrays.values()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton") >= 2  # forward and backward


def test_vmap_inside(mesh):
    arrays, _ = draw(CASE)
    query, key, value, start, end, _ = arrays.values()
    stacked = [jnp.stack([x, -x]) for x in (query, key, value)]
    function = jax.vmap(ragged_decode_attention, (0, 0, 0, None, None))
    specs = (*[P(None, "x")] * 3, P("x"), P("x"))
    split = [put(mesh, spec, x) for spec, x in zip(specs, (*stacked, start, end), strict=True)]
    got = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(None, "x")))(*split)
    assert_close(got, function(*stacked, start, end))


@pytest.mark.parametrize("kinds", [("Auto", "Auto"), ("Explicit", "Explicit"), ("Auto", "Explicit"), ("Explicit", "Auto")], ids=str)
def test_over_some_axes(kinds):
    """A `shard_map` over one axis of a mesh whose other axes split the cache too."""
    mesh = make_mesh("Auto", *kinds)
    specs = (*[P("x")] * 5, P())
    local = jax.shard_map(lambda *args: loss(*args)[None], mesh=mesh, axis_names={"x"}, in_specs=specs, out_specs=P("x"))
    arrays, _ = placed(CASE, mesh, P("x", "y", "z"))
    args = [put(mesh, spec, x) if x.ndim != 4 else x for spec, x in zip(specs, arrays.values(), strict=True)]
    got = jax.jit(jax.grad(lambda *args: jnp.sum(local(*args)), (0, 1, 2, 5)))(*args)
    assert_close(got, gradients(*draw(CASE)[0].values()))


@pytest.mark.parametrize("kinds", [("Explicit", "Auto", "Explicit"), ("Auto", "Explicit", "Auto")], ids=str)
def test_axes_of_both_kinds(kinds):
    arrays, _ = placed(CASE, make_mesh(*kinds), P("x", "y", "z"))
    assert_close(jax.jit(gradients)(*arrays.values()), gradients(*draw(CASE)[0].values()))


# ---------------------------------------------------------------------------------------------------------------------------
# What cannot work


def test_head_dim_may_not_be_split(mesh):
    """With automatic axes the partitioner finds it, and JAX raises what it reports."""
    arrays, _ = placed(CASE, mesh, P("x", None, None, "y"))
    error = ValueError if mesh.axis_types[0] == AxisType.Explicit else jax.errors.JaxRuntimeError
    with pytest.raises(
        error, match=r"must not be split along head_dim, got P\('x', None, None, 'y'\). Split them along batch, seq_len"
    ):
        ragged_decode_attention(**arrays)


def test_key_and_value_are_split_alike(mesh):
    arrays, _ = placed(CASE, mesh, P("x"))
    arrays["value"] = put(mesh, P(None, "x"), arrays["value"])
    error = ValueError if mesh.axis_types[0] == AxisType.Explicit else jax.errors.JaxRuntimeError
    with pytest.raises(
        error, match=r"key and value must be split alike, got P\('x', None, None, None\) and P\(None, 'x', None, None\)"
    ):
        ragged_decode_attention(**arrays)


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
    arrays, _ = placed(CASE, explicit, cache)
    arrays["query"] = put(explicit, query, arrays["query"])
    with pytest.raises(ValueError, match=f"query must be split {message}"):
        ragged_decode_attention(**arrays)


def test_query_split_as_the_cache(explicit):
    arrays, _ = placed(CASE, explicit, P("x", "y", "z"))
    arrays["query"] = put(explicit, P("x", "z"), arrays["query"])
    arrays |= {name: put(explicit, P("x"), arrays[name]) for name in ("sequence_start", "sequence_end")}
    arrays["softmax_aux"] = put(explicit, P("z"), arrays["softmax_aux"])
    got = jax.jit(gradients)(*arrays.values())
    assert [x.sharding.spec for x in got] == [jax.typeof(arrays[n]).sharding.spec for n in ("query", "key", "value", "softmax_aux")]
    assert_close(got, gradients(*draw(CASE)[0].values()))


# ---------------------------------------------------------------------------------------------------------------------------


def test_example():
    done = subprocess.run([sys.executable, "-W", "error", EXAMPLE], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK" in done.stdout
