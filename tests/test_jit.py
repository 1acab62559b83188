"""Calls under `jax.jit`, and without it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import assert_close, draw

from ejk_ragged import _op, Cache, FwdParams, Queries, ragged_decode_attention
from ejk_ragged._problem import Settings
from ejk_ragged._selection import Request
from ejk_ragged.testing import Case


CASE = Case("jit", 3, 40, 4, 2, 16, lengths=("uniform", 1, 40), sinks=("query", 1))
TOKENS = dataclasses.replace(CASE, num_tokens=3, query_lengths=(3, 1, 2), cache_dtype="int8", scales="row")


@pytest.mark.parametrize("case", [CASE, TOKENS], ids=["plain", "tokens"])
def test_jit_equals_eager(subject, case):
    arrays, _ = draw(case)
    call = functools.partial(subject.call, sliding_window=(9, 0), logits_soft_cap=2.0, return_lse=True)
    assert_close(jax.jit(call)(**arrays), call(**arrays))


TRACED = {
    "jit": lambda call, key: jax.jit(call)(key),
    "scan": lambda call, key: jax.lax.scan(lambda carry, _: (carry, call(key)), 0, length=2),
    "eval_shape": jax.eval_shape,
    "checkpoint": lambda call, key: jax.grad(lambda key: jax.checkpoint(call)(key).sum())(key),
}


@pytest.mark.parametrize("placed", ["a device", "a mesh"])
@pytest.mark.parametrize("name", TRACED)
def test_a_function_that_closes_over_its_query(name, placed, auto):
    """Such a query is concrete while a function is traced. Nothing of the trace may be left in later calls with the same window."""
    where = jax.devices()[0] if placed == "a device" else NamedSharding(auto, PartitionSpec())
    query, rows = jax.device_put((jnp.ones((1, 4, 8)), jnp.ones((1, 16, 2, 8))), where)
    window = 3 + 4 * list(TRACED).index(name) + 2 * (placed == "a mesh"), 0  # not that of an earlier call
    attend = lambda query, rows: ragged_decode_attention(query, rows, rows, sliding_window=window)
    TRACED[name](lambda rows: attend(query, rows), rows)
    assert_close(attend(query, rows), query)
    assert_close(jax.jit(lambda rows: 2 * attend(query, rows))(rows), 2 * query)


def test_settings_as_static_arguments():
    arrays, _ = draw(CASE)
    settings = {
        "softmax_scale": 0.3,
        "fwd_params": FwdParams(block_size_keys=16),
        "sliding_window": (9, 0),
        "logits_soft_cap": 2.0,
        "backend": "auto",
        "return_lse": True,
    }
    jitted = jax.jit(ragged_decode_attention, static_argnames=tuple(settings))
    assert_close(jitted(**arrays, **settings), ragged_decode_attention(**arrays, **settings))


def test_one_trace_for_all_lengths():
    """Lengths are data: a decode loop compiles once."""
    arrays, _ = draw(CASE)
    traces = []

    @jax.jit
    def step(end):
        traces.append(end)
        return ragged_decode_attention(**arrays | {"sequence_end": end})

    for end in (1, 17, 40):
        step(jnp.full(3, end, jnp.int32))
    assert len(traces) == 1


@pytest.mark.parametrize("constant", ["query", "key", "sequence_end", "softmax_aux"])
def test_closed_over_constants(constant):
    arrays, _ = draw(CASE)
    want = ragged_decode_attention(**arrays)
    value = arrays.pop(constant)
    assert_close(jax.jit(lambda **kw: ragged_decode_attention(**kw, **{constant: value}))(**arrays), want)


def test_no_jit(subject):
    """With `jax.disable_jit` the backend runs operation by operation."""
    arrays, _ = draw(Case("", 2, 20, 2, 1, 8, lengths=("uniform", 0, 20)))
    want = subject.call(**arrays, return_lse=True)
    with jax.disable_jit():
        got = subject.call(**arrays, return_lse=True)
    assert_close(got, want)


def test_no_jit_with_gradients():
    arrays, _ = draw(Case("", 2, 20, 2, 1, 8, lengths=("uniform", 0, 20)))

    def loss(query, key):
        return jnp.sum(ragged_decode_attention(**arrays | {"query": query, "key": key}))

    want = jax.grad(loss, (0, 1))(arrays["query"], arrays["key"])
    with jax.disable_jit():
        got = jax.grad(loss, (0, 1))(arrays["query"], arrays["key"])
    assert_close(got, want)


@pytest.mark.parametrize("field", ["start", "sink", "key_scale"])
def test_shapes_are_checked_inside(field):
    """pytest's import hook (`--jaxtyping-packages` in pyproject.toml) checks the annotations of the waist, with all operands
    together."""
    arrays, _ = draw(CASE)
    lengths, sink = jnp.zeros((3, 1), jnp.int32), jnp.zeros((1, 1, 4))
    operands = {"query": arrays["query"][:, None], "start": lengths, "end": lengths, "sink": sink}
    cache = {"key": arrays["key"], "value": arrays["value"], "key_scale": None, "value_scale": None, "page_table": None}
    _op._typed(**operands, **cache)
    wrong = {"start": jnp.zeros((2, 1), jnp.int32), "sink": jnp.zeros((1, 2, 4)), "key_scale": jnp.zeros((3, 2, 39))}
    operands, cache = ({name: wrong[name] if name == field else x for name, x in group.items()} for group in (operands, cache))
    with pytest.raises(Exception, match="_typed"):
        _op.decode(Request(Settings(softmax_scale=1.0)), Queries(**operands), Cache(**cache))
