"""Reverse differentiation in all its forms. Only the gradients that are asked for are computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, draw, floats_of, weights

from ejk_ragged import ragged_decode_attention, Wanted
from ejk_ragged.testing import Case, oracle_gradients, TextbookBackend


CASE = Case("grad", 3, 24, 4, 2, 16, lengths=("ranges", (2, 20), (0, 24), (5, 5)), sinks=("query", 2), logits_soft_cap=3.0)
TOKENS = dataclasses.replace(CASE, num_tokens=3, query_lengths=(3, 2, 1), cache_dtype="int8", scales="row")
NAMES = ("query", "key", "value", "softmax_aux")


call = functools.partial(ragged_decode_attention, backend=TextbookBackend())  # the waist is under test; this compiles quickly


def setting(call, case=CASE):
    """The call as a function of its differentiable arrays, two or four of them, and these arrays."""
    arrays, settings = draw(case)
    names = floats_of(arrays)
    floats = [arrays.pop(name) for name in names]
    return lambda *args, **kw: call(**dict(zip(names, args, strict=True)), **arrays, **settings, **kw), floats


def total(x):
    """A scalar from a result, with a different weight per element."""
    return jnp.sum(x * weights(x))


def assert_oracle(gradients, d_out, d_lse):
    arguments = CASE.draw()
    want = oracle_gradients(**arguments, d_out=d_out, d_lse=d_lse)
    for name, got in zip(NAMES, gradients, strict=True):
        np.testing.assert_allclose(got, getattr(want, name), rtol=1e-4, atol=1e-5)


def test_grad_and_value_and_grad(subject):
    function, floats = setting(subject.call)
    loss = lambda *args: total(function(*args))
    gradients = jax.grad(loss, range(4))(*floats)
    assert_oracle(gradients, jax.grad(total)(jnp.zeros((3, 4, 16))), np.zeros((3, 4)))
    value, again = jax.jit(jax.value_and_grad(loss, range(4)))(*floats)
    assert_close((value, again), (loss(*floats), gradients))


def test_vjp_through_lse(subject):
    function, floats = setting(functools.partial(subject.call, return_lse=True))
    (out, lse), pullback = jax.vjp(function, *floats)
    d_lse = weights(lse)
    assert_oracle(pullback((jnp.zeros_like(out), d_lse)), np.zeros(out.shape), d_lse)
    assert_oracle(jax.grad(lambda *args: jnp.sum(function(*args)[1] * d_lse), range(4))(*floats), np.zeros(out.shape), d_lse)


@pytest.mark.parametrize("case", [CASE, TOKENS], ids=["plain", "tokens"])
def test_checkpoint(case):
    function, floats = setting(call, case)
    loss = lambda *args: total(jnp.tanh(function(*args)))
    argnums = range(len(floats))
    want = jax.grad(loss, argnums)(*floats)
    assert_close(jax.grad(jax.checkpoint(loss), argnums)(*floats), want)
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss), argnums))(*floats), want)


def test_vmap_of_grad_and_grad_of_vmap(subject):
    function, floats = setting(subject.call)
    queries = jnp.stack([floats[0], 2 * floats[0]])
    grad = jax.grad(lambda *args: total(function(*args)), range(4))
    per_query = [grad(query, *floats[1:]) for query in queries]
    want = jax.tree.map(lambda *x: jnp.stack(x), *per_query)
    assert_close(jax.vmap(grad, in_axes=(0, None, None, None))(queries, *floats[1:]), want)
    both = lambda queries, *rest: jnp.sum(jax.vmap(lambda query: total(function(query, *rest)))(queries))
    want = want[0], *(jnp.sum(x, axis=0) for x in want[1:])
    assert_close(jax.grad(both, range(4))(queries, *floats[1:]), want)


def test_vmap_of_grad_of_tokens():
    """The queries of the maps become tokens of one call, on one quantised cache."""
    function, (query, sinks) = setting(call, TOKENS)
    grad = jax.grad(lambda *args: total(function(*args)), (0, 1))
    queries = jnp.stack([query, 2 * query])
    want = jax.tree.map(lambda *x: jnp.stack(x), *(grad(query, sinks) for query in queries))
    assert_close(jax.vmap(grad, (0, None))(queries, sinks), want)


def test_jacobian():
    """jacrev maps only the pullback: cotangents have an axis that nothing else has."""
    function, floats = setting(call)
    few = lambda query, value: function(query, floats[1], value, floats[3])[0, 1]
    d_query, d_value = jax.jacrev(few, (0, 1))(floats[0], floats[2])
    for i in (0, 7):
        assert_close((d_query[i], d_value[i]), jax.grad(lambda q, v, i=i: few(q, v)[i], (0, 1))(floats[0], floats[2]))


def test_lengths_have_no_gradients():
    arrays, _ = draw(CASE)
    out, pullback = jax.vjp(lambda *args: ragged_decode_attention(*args), *(arrays[k] for k in list(arrays)[:5]))
    *_, d_start, d_end = pullback(out)
    assert d_start.dtype == d_end.dtype == jax.dtypes.float0


class Recorder(TextbookBackend):
    """A backend that notes which gradients it is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def backward(self, *args, wanted, **kwargs):
        self.asked.append(wanted)
        return super().backward(*args, wanted=wanted, **kwargs)


@pytest.mark.parametrize(
    ("argnums", "wanted"),
    [
        ((0,), [Wanted(query=True, key_value=False)]),
        ((1,), [Wanted(query=False, key_value=True)]),
        ((2,), [Wanted(query=False, key_value=True)]),
        ((0, 3), [Wanted(query=True, key_value=False)]),
        ((3,), []),
        ((0, 1, 2, 3), [Wanted(query=True, key_value=True)]),
    ],
)
def test_only_what_is_wanted(argnums, wanted):
    """The cache's gradients are as large as the cache. They are not computed for the query's gradient."""
    recorder = Recorder()
    function, floats = setting(functools.partial(ragged_decode_attention, backend=recorder))
    got = jax.jit(jax.grad(lambda *args: total(function(*args)), argnums))(*floats)
    assert recorder.asked == wanted
    every = jax.grad(lambda *args: total(function(*args)), range(4))(*floats)
    assert_close(got, tuple(every[i] for i in argnums))


@pytest.mark.parametrize("argnums", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_some_gradients(subject, argnums):
    function, floats = setting(subject.call)
    loss = lambda *args: total(function(*args))
    every = jax.grad(loss, range(4))(*floats)
    assert_close(jax.grad(loss, argnums)(*floats), tuple(every[i] for i in argnums))


def test_partial_results_merge():
    """Two halves of a range, merged by their lse, give the result of the whole range and its gradients."""
    arrays, _ = draw(Case("", 2, 30, 4, 2, 16))
    middle, end = jnp.array([11, 20], jnp.int32), jnp.array([30, 20], jnp.int32)  # the second sequence has an empty second half

    def merged(query, key, value):
        first, lse_1 = ragged_decode_attention(query, key, value, None, middle, return_lse=True)
        second, lse_2 = ragged_decode_attention(query, key, value, middle, end, return_lse=True)
        weight = jax.nn.sigmoid(lse_1 - lse_2)[..., None]
        return weight * first + (1 - weight) * second

    whole = lambda query, key, value: ragged_decode_attention(query, key, value, None, end)
    for function in (lambda f: f(*arrays.values()), lambda f: jax.grad(lambda *args: total(f(*args)), range(3))(*arrays.values())):
        assert_close(function(merged), function(whole))


def test_debug_nans():
    """No NaN occurs on the way: a user who looks for NaN with `jax_debug_nans` is not stopped in this package."""
    arrays, _ = draw(Case("", 2, 30, 4, 2, 16, lengths=("ranges", (5, 5), (3, 20))))
    lengths = arrays.pop("sequence_start"), arrays.pop("sequence_end")
    with jax.debug_nans(True):
        loss = lambda query, key, value: total(ragged_decode_attention(query, key, value, *lengths))
        gradients = jax.grad(loss, range(3))(*arrays.values())
    assert all(np.isfinite(x).all() for x in gradients)


def pushed(function):
    """Forward mode, in the direction of the query itself."""
    return lambda query: jax.jvp(function, (query,), (query,))


REFUSED = {
    "hessian": lambda function: jax.hessian(lambda query: total(function(query))),
    "gradient of a gradient": lambda function: jax.grad(lambda x: total(jax.grad(lambda query: total(function(query)))(x))),
    "jvp of a gradient": lambda function: pushed(jax.grad(lambda query: total(function(query)))),
    "jvp": pushed,
    "jvp of jit": lambda function: pushed(jax.jit(function)),
    "jit of jvp": lambda function: jax.jit(pushed(function)),
    "jvp of vmap": lambda function: lambda query: pushed(jax.vmap(function))(query[None]),
    "vmap of jvp": lambda function: lambda query: jax.vmap(pushed(function))(query[None]),
    "jvp of checkpoint": lambda function: pushed(jax.checkpoint(function)),
    "jvp of scan": lambda function: pushed(lambda query: jax.lax.scan(lambda x, _: (function(x), None), query, length=2)),
    "jacfwd": jax.jacfwd,
    "jacfwd of jit": lambda function: jax.jacfwd(jax.jit(function)),
    "linearize": lambda function: lambda query: jax.linearize(function, query)[1](query),
}


@pytest.mark.parametrize("form", REFUSED)
def test_once_and_in_reverse(form):
    function, (query, *rest) = setting(call)
    with pytest.raises(NotImplementedError, match=r"is differentiated once, in reverse mode .* forward mode .* are not supported"):
        REFUSED[form](lambda query: function(query, *rest))(query)


@pytest.mark.parametrize("disabled", [False, True], ids=["jit", "disable_jit"])
def test_each_float_is_refused_in_forward_mode(disabled):
    function, floats = setting(call)
    for i, x in enumerate(floats):
        moved = lambda x, i=i: function(*floats[:i], x, *floats[i + 1 :])
        with jax.disable_jit(disabled), pytest.raises(NotImplementedError, match="in reverse mode"):
            pushed(moved)(x)


def test_a_linearised_call_is_transposed():
    function, (query, *rest) = setting(call)
    out, linear = jax.linearize(lambda query: function(query, *rest), query)
    (got,) = jax.linear_transpose(linear, query)(out)
    assert_close(got, jax.vjp(lambda query: function(query, *rest), query)[1](out)[0])
