"""What moves between devices, by the compiled programs: nothing of the cache's size. Results are split as the cache is."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import call, gradients, place, placed, put, SPECS
from support import assert_close, draw, stack

from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import Case


LARGE = Case("", 4, 2048, 8, 4, 16, lengths=("uniform", 0, 2048), sinks=("query", 1))
TOKENS = Case(
    "", 4, 2048, 8, 4, 16, lengths=("uniform", 0, 2048), sinks=("query", 1), num_tokens=3, cache_dtype="int8", scales="row"
)

each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def collectives(function, *args):
    """The collectives of the compiled program, each with its name and the elements of its result. And the program, to run it."""
    compiled = jax.jit(function).lower(*args).compile()
    text = compiled.as_text()
    assert text is not None
    found = re.findall(r"= (\S.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    return [
        (name, sum(math.prod(map(int, re.findall(r"\d+", dims))) for dims in re.findall(r"\[(.*?)\]", to))) for to, name in found
    ], compiled


def shards(case, spec):
    """Elements of a cache's shard and of the output's shard, and the number of shards of the sequence."""
    batch, sequence, heads, _ = (
        2 ** len((axes,) if isinstance(axes, str) else axes or ()) for axes in (*spec, *[None] * (4 - len(spec)))
    )
    out = (case.num_tokens or 1) * case.batch * case.num_q_heads * case.head_dim // (batch * heads)
    return case.batch * case.seq_len * case.num_kv_heads * case.head_dim // (batch * sequence * heads), out, sequence


def forward(arrays, call=call):
    return call(**arrays, return_lse=True)


def assert_split(x, mesh, spec):
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


@each_spec
@pytest.mark.parametrize("case", [LARGE, TOKENS], ids=["one token", "tokens, int8"])
def test_forward(mesh, spec, case):
    """Batch and heads need no collective. The sequence axis needs one, over (out, lse)."""
    _, out, sequence = shards(case, spec)
    moved, compiled = collectives(forward, arrays := placed(case, mesh, spec))
    assert moved == ([("all-gather", sequence * out * (case.head_dim + 1) // case.head_dim)] if sequence > 1 else [])
    batch, _, heads, _ = *spec, *[None] * (4 - len(spec))
    for x in compiled(arrays):
        assert_split(x, mesh, P(batch, heads) if case.num_tokens is None else P(batch, None, heads))


@each_spec
def test_backward(mesh, spec):
    """The sequence axis needs one more collective, for d_query. The collectives for the sinks' gradient are as small."""
    cache, out, sequence = shards(LARGE, spec)
    moved, compiled = collectives(gradients, arrays := placed(LARGE, mesh, spec))
    assert all(size <= sequence * out * (LARGE.head_dim + 1) // LARGE.head_dim < cache / 4 for _, size in moved), moved
    assert moved.count(("all-reduce", out)) == (sequence > 1)
    got = compiled(arrays)
    for name in ("key", "value"):
        assert_split(got[name], mesh, spec)


@pytest.mark.parametrize("case", [LARGE, TOKENS], ids=["one token", "tokens, int8"])
def test_each_backend(subject, auto, case):
    """The work of a real backend on each device moves nothing either."""
    call = functools.partial(ragged_decode_attention, backend=subject.on_cpus())
    _, out, _ = shards(case, spec := P("x", "y", "z"))
    moved, _ = collectives(functools.partial(gradients, call=call), placed(case, auto, spec))
    assert all(size <= 2 * out * (case.head_dim + 1) // case.head_dim for _, size in moved), moved


def test_it_would_be_seen(auto):
    arrays = placed(LARGE, auto, P(None, "x"))
    gathered = lambda key: 2 * jax.lax.with_sharding_constraint(key, NamedSharding(auto, P()))
    assert collectives(gathered, arrays["key"])[0] == [("all-gather", arrays["key"].size)]


@pytest.mark.parametrize("query", [P("x"), P(None, "y"), P(None, None, "x"), P("y", "x")], ids=str)
@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=str)
def test_query_split_in_its_own_way(auto, query, spec):
    """The partitioner moves the query. The cache and its gradients stay where they are."""
    arrays = placed(LARGE, auto, spec)
    arrays["query"] = put(auto, query, arrays["query"])
    moved, compiled = collectives(gradients, arrays)
    assert max((size for _, size in moved), default=0) <= 2 * LARGE.batch * LARGE.num_q_heads * (LARGE.head_dim + 1)
    got = compiled(arrays)
    for name in ("key", "value"):
        assert_split(got[name], auto, spec)


@each_spec
def test_decode_loop_owns_its_cache(auto, spec):
    """Rows are written and read in place, in a loop under jit that keeps the cache's sharding."""

    def step(carry, row):
        key, value, ends, query = carry
        index = jnp.arange(LARGE.batch)
        key, value = (x.at[index, ends].set(row) for x in (key, value))
        out = call(query, key, value, None, ends + 1)
        return (key, value, ends + 1, out), out

    def loop(key, value, ends, query, rows):
        return jax.lax.scan(step, (key, value, ends, query), rows)

    arrays = placed(LARGE, auto, spec)
    rows = jnp.ones((3, LARGE.batch, LARGE.num_kv_heads, LARGE.head_dim))
    args = arrays["key"], arrays["value"], arrays["sequence_end"] // 2, arrays["query"], rows
    moved, compiled = collectives(loop, *args)
    assert max((size for _, size in moved), default=0) < shards(LARGE, spec)[0] / 4
    (key, *_), out = compiled(*args)
    assert_split(key, auto, spec)
    alone = [jax.device_put(x, jax.devices("cpu")[0]) for x in args]
    assert_close(out, jax.jit(loop)(*alone)[1])


@pytest.mark.parametrize("mapped", [["query"], ["query", "key", "value"], ["sequence_end"]], ids=str)
def test_vmap(mesh, mapped):
    """A mapped axis comes in front of the split axes, or joins the tokens. Nothing is moved for it."""
    arrays, _ = draw(LARGE)
    arrays |= {name: stack(arrays[name], np.asarray(arrays[name])[::-1], arrays[name]) for name in mapped}
    function = jax.vmap(gradients, ({name: 0 if name in mapped else None for name in arrays},))
    split = place(mesh, P(None, "x", "y", "z") if "key" in mapped else P("x", "y", "z"), arrays)
    moved, compiled = collectives(function, split)
    assert_close(compiled(split), function(arrays), 1e-4)
    # Mapped lengths on a shared cache: the maps run one after another, and each map has gradients of the cache's size.
    assert max(size for _, size in moved) <= 3 * 2 * LARGE.batch * LARGE.num_q_heads * (LARGE.head_dim + 1)
