"""A test of the tests: each rule of the semantics is broken in turn, and the suite's own assertions must notice.

A mutation is a faulty call: the right one on changed arguments, with changed results, or on a backend with a fault. It is held
against one of the named cases, which thereby prove that they are enough.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_batch_invariant, assert_repeatable, assert_right

from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import Case, CHECKS, TextbookBackend


CASES = {case.name: case for case in CHECKS}
right = functools.partial(ragged_decode_attention, backend=TextbookBackend())


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: case.name)
def test_the_textbook_is_right(case):
    """Without a fault, another implementation than any that is shipped passes everything."""
    assert_right(right, case.draw(poison=True))


def arguments_changed(**changes):
    """The right call, with arguments replaced by functions of all arguments."""
    return lambda **kw: right(**kw | {name: change(kw) for name, change in changes.items()})


def results_changed(change):
    """The right call, with `change(out, lse, arguments)` for its results."""
    return lambda **kw: change(*right(**kw), kw)


def fault(name):
    return functools.partial(ragged_decode_attention, backend=TextbookBackend(name))


def window(by):
    return lambda kw: (kw["sliding_window"][0] + by, kw["sliding_window"][1])


def heads_modulo(**kw):
    """Query head h reads kv head h % Hkv."""
    kv_heads = kw["key"].shape[2]
    order = np.arange(kw["query"].shape[1]).reshape(-1, kv_heads).T.reshape(-1)  # those of kv head 0, then of 1...
    out, lse = right(**kw | {"query": kw["query"][:, order]})
    back = np.argsort(order)
    return out[:, back], lse[:, back]


def without_sinks(kw):
    return right(**{name: x for name, x in kw.items() if name != "softmax_aux"})


def detached(name):
    return arguments_changed(**{name: lambda kw: jax.lax.stop_gradient(kw[name])})


def rounded(name):
    return arguments_changed(**{name: lambda kw: kw[name].astype(jnp.bfloat16).astype(kw[name].dtype)})


start = lambda by: lambda kw: kw["sequence_start"] + jnp.int32(by)
end = lambda by: lambda kw: kw["sequence_end"] + jnp.int32(by)

MUTATIONS = {
    # valid keys
    "start is ignored": ("edges", arguments_changed(sequence_start=lambda kw: None)),
    "start is exclusive": ("edges", arguments_changed(sequence_start=start(1))),
    "end is ignored": ("edges", arguments_changed(sequence_end=lambda kw: None)),
    "end is inclusive": ("edges", arguments_changed(sequence_end=end(1))),
    "end is one short": ("edges", arguments_changed(sequence_end=end(-1))),
    "negative start wraps": ("edges", arguments_changed(sequence_start=lambda kw: kw["sequence_start"] % kw["key"].shape[1])),
    "reversed ranges are swapped": (
        "edges",
        arguments_changed(
            sequence_start=lambda kw: jnp.minimum(kw["sequence_start"], kw["sequence_end"]),
            sequence_end=lambda kw: jnp.maximum(kw["sequence_start"], kw["sequence_end"]),
        ),
    ),
    # heads
    "query head h reads kv head h % Hkv": ("gqa-7", heads_modulo),
    "all query heads read kv head 0": ("gqa-7", arguments_changed(key=lambda kw: kw["key"][:, :, :1] + 0 * kw["key"])),
    # window
    "window is dropped": ("window", arguments_changed(sliding_window=lambda kw: None)),
    "window keeps a key too many": ("window", arguments_changed(sliding_window=window(1))),
    "window keeps a key too few": ("window", arguments_changed(sliding_window=window(-1))),
    "window counts from the cache's end": (
        "window",
        arguments_changed(
            sliding_window=lambda kw: None,
            sequence_start=lambda kw: jnp.maximum(kw["sequence_start"], kw["key"].shape[1] - 1 - kw["sliding_window"][0]),
        ),
    ),
    # scale and cap
    "scale is ignored": ("scale", arguments_changed(softmax_scale=lambda kw: None)),
    "default scale is 1": ("mha", arguments_changed(softmax_scale=lambda kw: 1.0)),
    "cap is dropped": ("cap", arguments_changed(logits_soft_cap=lambda kw: None)),
    "cap before scale": ("cap", fault("cap before scale")),
    "cap after mask": ("cap", fault("cap after mask")),
    "no slope of the cap": ("cap", fault("no slope of the cap")),
    "no scale in the gradient": ("scale", fault("no scale in the gradient")),
    # sinks
    "sinks are dropped, shared": ("sinks-shared", lambda **kw: without_sinks(kw)),
    "sinks are dropped, by query head": ("sinks-query", lambda **kw: without_sinks(kw)),
    "sinks are counted twice": (
        "sinks-query",
        arguments_changed(softmax_aux=lambda kw: jnp.concatenate([kw["softmax_aux"], kw["softmax_aux"]], axis=-1)),
    ),
    "only the first sink counts": ("sinks-shared", arguments_changed(softmax_aux=lambda kw: kw["softmax_aux"][:1])),
    "sinks are scaled": ("sinks-query", arguments_changed(softmax_aux=lambda kw: kw["softmax_aux"] * kw["query"].shape[2] ** -0.5)),
    "sinks are capped": (
        "all",
        arguments_changed(softmax_aux=lambda kw: kw["logits_soft_cap"] * jnp.tanh(kw["softmax_aux"] / kw["logits_soft_cap"])),
    ),
    "sinks of kv head h % Hkv": ("sinks-kv", arguments_changed(softmax_aux=lambda kw: jnp.tile(kw["softmax_aux"], (2, 1)))),
    "sinks take part of the value": (
        "sinks-shared",
        results_changed(lambda out, lse, kw: (out + jnp.exp(kw["softmax_aux"][0] - lse)[..., None], lse)),
    ),
    "sinks do not learn": ("sinks-query", detached("softmax_aux")),
    # lse
    "lse without sinks": ("sinks-kv", results_changed(lambda out, lse, kw: (out, without_sinks(kw)[1]))),
    "lse in base 2": ("mha", results_changed(lambda out, lse, kw: (out, lse / np.float32(np.log(2))))),
    "lse is that of the mean": ("mha", results_changed(lambda out, lse, kw: (out, lse - np.float32(np.log(67))))),
    "lse is rounded": ("bfloat16", results_changed(lambda out, lse, kw: (out, lse.astype(jnp.bfloat16).astype(jnp.float32)))),
    "lse in the query's dtype": ("bfloat16", results_changed(lambda out, lse, kw: (out, lse.astype(out.dtype)))),
    "lse of an empty range is 0": ("edges", results_changed(lambda out, lse, kw: (out, jnp.where(lse > -jnp.inf, lse, 0)))),
    "lse has no gradient": ("mha", results_changed(lambda out, lse, kw: (out, jax.lax.stop_gradient(lse)))),
    # empty ranges and what lies outside
    "empty range is not 0": ("edges", fault("empty range not 0")),
    "NaN leaks from outside": ("edges", fault("NaN from outside")),
    "dead rows have gradients": ("edges", fault("dead rows not 0")),
    # output and accumulation
    "no denominator": ("mha", fault("no denominator")),
    "sums are rounded": ("mha", fault("rounded sums")),
    "query is rounded": ("mha", rounded("query")),
    "value is rounded": ("mha", rounded("value")),
    "output in float32": ("bfloat16", results_changed(lambda out, lse, kw: (out.astype(jnp.float32), lse))),
    "output rounded twice": ("float16", results_changed(lambda out, lse, kw: (out.astype(jnp.bfloat16).astype(out.dtype), lse))),
    # gradients
    "no delta": ("mha", fault("no delta")),
    "only one head of the group reaches the key": ("gqa-7", fault("one head of the group")),
    "gradients are rounded": ("mha", fault("rounded gradient")),
    "query has no gradient": ("mha", detached("query")),
    "key has no gradient": ("mha", detached("key")),
    "value has no gradient": ("mha", detached("value")),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_mutation_is_caught(mutation):
    case, call = MUTATIONS[mutation]
    with pytest.raises(AssertionError, match="error"):
        assert_right(call, CASES[case].draw(poison=True))


@pytest.mark.parametrize("name", ["empty range not 0", "NaN from outside"])
def test_infinite_errors_are_reported_as_such(name):
    with pytest.raises(AssertionError, match="out: error inf"):
        assert_right(fault(name), CASES["edges"].draw(poison=True))


def test_random_bits_are_caught():
    arguments = CASES["mha"].draw()
    assert_repeatable(right, arguments)
    jitter = iter([0.0, 1e-7])
    with pytest.raises(AssertionError):
        assert_repeatable(results_changed(lambda out, lse, kw: (out * np.float32(1 + next(jitter)), lse)), arguments)


def test_neighbours_are_caught():
    arguments = Case("", 3, 64, 4, 2, 16, lengths=("uniform", 40, 64)).draw()
    ulp = lambda kw: np.float32(1e-7) * kw["query"].shape[0]
    with pytest.raises(AssertionError):
        assert_batch_invariant(results_changed(lambda out, lse, kw: (out * (1 + ulp(kw)), lse)), arguments)
    longest = lambda kw: jnp.max(kw["sequence_end"]).astype(jnp.float32) * np.float32(1e-7)
    with pytest.raises(AssertionError):
        assert_batch_invariant(results_changed(lambda out, lse, kw: (out * (1 + longest(kw)), lse)), arguments)
