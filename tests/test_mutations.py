"""A test of the tests: each rule of the semantics is broken in turn, and the suite's own assertions must notice.

A mutation is a faulty call: the right call on changed arguments, the right call with changed results, or a call on a textbook
with one method broken. Each mutation is compared on one of the named cases. This proves that the named cases are enough. The
cases have no junk around the live rows, unless the mutation leaks junk.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_batch_invariant, assert_repeatable, assert_right

from ejk_ragged import Queries, ragged_decode_attention
from ejk_ragged.testing import Case, CHECKS, TextbookBackend, verify_backend


CASES = {case.name: case for case in CHECKS}
right: Callable = functools.partial(ragged_decode_attention, backend=TextbookBackend())


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: case.name)
def test_the_textbook_is_right(case):
    """Without a fault, the textbook passes every case. It is an implementation independent of the backends that are shipped."""
    assert_right(right, case.draw(poison=True))


# ---------------------------------------------------------------------------------------------------------------------------
# Calls with changed arguments or results


def arguments_changed(**changes):
    """The right call, in which functions of all arguments replace some arguments."""
    return lambda **kw: right(**kw | {name: change(kw) for name, change in changes.items()})


def results_changed(change):
    """The right call, with `change(out, lse, arguments)` in place of its results."""
    return lambda **kw: change(*right(**kw), kw)


def window(by):
    return lambda kw: (kw["sliding_window"][0] + by, kw["sliding_window"][1])


def start(by):
    return lambda kw: kw["sequence_start"] + jnp.int32(by)


def end(by):
    """The end, moved by a number or by a function of the arguments."""
    return lambda kw: kw["sequence_end"] + (by(kw) if callable(by) else jnp.int32(by))


def num_tokens(kw):
    return jnp.int32(kw["query"].shape[1])


def heads_modulo(**kw):
    """Query head h reads kv head h % Hkv."""
    kv_heads = kw["key"].shape[2]
    order = np.arange(kw["query"].shape[1]).reshape(-1, kv_heads).T.reshape(-1)  # heads of kv head 0, then of kv head 1...
    out, lse = right(**kw | {"query": kw["query"][:, order]})
    back = np.argsort(order)
    return out[:, back], lse[:, back]


def without_sinks(kw):
    return right(**{name: x for name, x in kw.items() if name != "softmax_aux"})


def detached(name):
    return arguments_changed(**{name: lambda kw: jax.lax.stop_gradient(kw[name])})


def rounded(name):
    return arguments_changed(**{name: lambda kw: kw[name].astype(jnp.bfloat16).astype(kw[name].dtype)})


def value_scale_in_the_denominator(**kw):
    """For values of 1, the output is the weighted mean of the value's scales. Dividing by it puts the scales into the
    denominator."""
    out, lse = right(**kw)
    scale, _ = right(**kw | {"value": jnp.ones_like(kw["value"])})
    return out / jnp.where(scale == 0, 1, scale), lse


def value_scale_on_the_output(**kw):
    out, lse = right(**kw | {"value_scale": 1.0})
    mean = jnp.nanmean(jnp.where(jnp.isinf(kw["value_scale"]), jnp.nan, kw["value_scale"]), axis=2)
    return out * jnp.repeat(mean, out.shape[1] // mean.shape[1], axis=1)[..., None].astype(out.dtype), lse


# ---------------------------------------------------------------------------------------------------------------------------
# Textbooks with one method broken


def fault(**methods):
    """A call on the textbook with these methods in place of its own."""
    return functools.partial(ragged_decode_attention, backend=type("Faulty", (TextbookBackend,), methods)())


def cap_before_scale(self, problem, products):
    cap, scale = problem.logits_soft_cap, problem.softmax_scale
    t = jnp.tanh(products / cap)
    return scale * cap * t, scale * (1 - t * t)


def cap_after_mask(self, problem, queries, cache):
    x, slope = TextbookBackend.logits(self, problem, queries, cache)
    return jnp.where(x > -jnp.inf, x, -problem.logits_soft_cap), slope


def key_scale_after_the_cap(self, problem, queries, cache):
    x, slope = TextbookBackend.logits(self, problem, queries, dataclasses.replace(cache, key_scale=None))
    scale = cache.key_scale[:, None, :, None]
    return jnp.where(x > -jnp.inf, x * scale, x), slope * scale


def slope(change):
    """A changed slope of the logits."""

    def bent(self, problem, products):
        x, slope = TextbookBackend.bent(self, problem, products)
        return x, change(slope, problem)

    return bent


def live_rows_times_1(self, problem, queries, rows, scale):
    """The other rows are multiplied by 0, whatever they hold."""
    seen = jnp.any(self.live(problem, queries), axis=1)[..., None, None]
    rows = rows.astype(problem.accum_dtype) * seen.astype(problem.accum_dtype)
    return rows if scale is None else rows * scale.swapaxes(1, 2)[..., None]


def only_rows_are_masked(self, problem, queries, rows, scale):
    """The scales of the rows are not masked."""
    rows = TextbookBackend.seen(self, problem, queries, rows, None)
    return rows if scale is None else rows * scale.swapaxes(1, 2)[..., None]


def dead_rows_not_0(self, *args, **kw):
    return [x + 1e-30 for x in TextbookBackend.backward(self, *args, **kw)]


def one_head_of_the_group(self, problem, target, queries, cache, lse, d_out, delta, *, wanted):
    d_query, *_ = TextbookBackend.backward(self, problem, target, queries, cache, lse, d_out, delta, wanted=wanted)
    first = (jnp.arange(problem.num_q_heads) % problem.group == 0)[None, None]
    d_out, delta = jnp.where(first[..., None], d_out, 0), jnp.where(first, delta, 0)
    _, *d_cache = TextbookBackend.backward(self, problem, target, queries, cache, lse, d_out, delta, wanted=wanted)
    return [d_query, *d_cache]


def bounds(change):
    """All tokens of a sequence get bounds from `change(start, end)` of their bounds, [B, T]. Empty ranges stay empty."""

    def live(self, problem, queries):
        start, end = jnp.broadcast_arrays(*queries.bounds(problem.seq_len))
        wrong_start, wrong_end = change(start, end)
        empty = start >= end
        queries = Queries(queries.query, jnp.where(empty, 0, wrong_start), jnp.where(empty, 0, wrong_end), queries.sink)
        return TextbookBackend.live(self, problem, queries)

    return live


def padding_attends(self, problem, queries):
    """Padding tokens attend to the rows that the sequence's last token sees."""
    starts, ends = queries.bounds(problem.seq_len)
    last = jnp.argmax(ends, axis=1, keepdims=True)
    start, end = (jnp.take_along_axis(jnp.broadcast_to(x, ends.shape), last, axis=1) for x in (starts, ends))
    empty = starts >= ends
    start, end = jnp.where(empty, start, starts), jnp.where(empty, end, ends)
    return TextbookBackend.live(self, problem, Queries(queries.query, start, end, queries.sink))


def of_all(reduce, x):
    return jnp.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)


def sinks_of_the_first_token(self, problem, target, queries, cache):
    first = (jnp.arange(problem.num_tokens) == 0)[None, :, None]
    queries = dataclasses.replace(queries, sink=jnp.where(first, queries.sinks(), -jnp.inf))
    return TextbookBackend.forward(self, problem, target, queries, cache)


def row_of_the_page_off_by_one(self, problem, cache, x):
    rows = 1 if x is None or x.ndim == 4 else 2
    return TextbookBackend.gathered(self, problem, cache, None if x is None else jnp.roll(x, 1, axis=rows))


def scales_by_sequence(self, problem, cache, x):
    """The scales of page b are used for sequence b."""
    if x is None or x.ndim == 4:
        return TextbookBackend.gathered(self, problem, cache, x)
    return jnp.broadcast_to(x[: problem.batch, :, :1], (problem.batch, x.shape[1], problem.seq_len))


def value_at_the_start_of_the_rows(self, problem, queries, cache):
    first, end = problem.value_columns
    problem = dataclasses.replace(problem, value_columns=(0, end - first))
    return TextbookBackend.values(self, problem, queries, cache)


def value_as_wide_as_the_key(self, problem, queries, cache):
    """The value is read with the key's width, and then cut."""
    flat = cache.value.reshape(*cache.value.shape[:2], -1)
    wide = jnp.pad(flat, ((0, 0), (0, 0), (0, problem.num_kv_heads * problem.head_dim - flat.shape[-1])))
    wide = wide.reshape(*cache.value.shape[:3], problem.head_dim)[..., : problem.value_dim]
    return TextbookBackend.values(self, problem, queries, dataclasses.replace(cache, value=wide))


MUTATIONS = {
    # pages and widths
    "the page of the next entry": ("pages", fault(pages=lambda self, cache: jnp.roll(cache.pages(), -1, axis=1))),
    "the table of the first sequence for all": (
        "pages",
        fault(pages=lambda self, cache: jnp.broadcast_to(cache.pages()[:1], cache.page_table.shape)),
    ),
    "a page's row is off by one": ("pages", fault(gathered=row_of_the_page_off_by_one)),
    "scales by sequence in place of pages": ("pages-int8", fault(gathered=scales_by_sequence)),
    "the value's columns are taken from the key's start": ("fused", fault(values=value_at_the_start_of_the_rows)),
    "the value is as wide as the key": ("narrow-value", fault(values=value_as_wide_as_the_key)),
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
    # tokens
    "no causality": ("tokens", fault(live=bounds(lambda start, end: (start, of_all(jnp.max, end))))),
    "causality is off by one": (
        "tokens",
        fault(live=bounds(lambda start, end: (start, jnp.minimum(end + 1, of_all(jnp.max, end))))),
    ),
    "a token does not see itself": ("tokens", fault(live=bounds(lambda start, end: (start, end - 1)))),
    "causality is aligned with the start": (
        "tokens",
        fault(live=bounds(lambda start, end: (start, start + 1 + jnp.arange(end.shape[1], dtype=jnp.int32)[None]))),
    ),
    "end does not count the new tokens": ("tokens", arguments_changed(sequence_end=end(num_tokens))),
    "tokens before the start see the first key": ("tokens", arguments_changed(sequence_start=start(-1))),
    "padding tokens attend": ("tokens-padded", fault(live=padding_attends)),
    "padding is ignored": ("tokens-padded", arguments_changed(query_lengths=lambda kw: None)),
    "padding stands in the cache": (
        "tokens-padded",
        arguments_changed(sequence_end=end(lambda kw: jnp.clip(kw["query_lengths"], 0, 5) - num_tokens(kw))),
    ),
    "query_lengths are not clipped": (
        "tokens-padded",
        arguments_changed(sequence_end=end(lambda kw: jnp.minimum(num_tokens(kw) - kw["query_lengths"], 0))),
    ),
    "window by the last token": ("tokens-window", fault(live=bounds(lambda start, end: (of_all(jnp.max, start), end)))),
    "window by the first token": ("tokens-window", fault(live=bounds(lambda start, end: (of_all(jnp.min, start), end)))),
    "window keeps a key too many of each token": ("tokens-window", arguments_changed(sliding_window=window(1))),
    "tokens in the order of heads": (
        "tokens",
        results_changed(lambda out, lse, kw: (out.swapaxes(1, 2).reshape(out.shape), lse.swapaxes(1, 2).reshape(lse.shape))),
    ),
    "sinks of the first token only": ("all-int8", fault(forward=sinks_of_the_first_token)),
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
    "cap before scale": ("cap", fault(bent=cap_before_scale)),
    "cap after mask": ("cap", fault(logits=cap_after_mask)),
    "no slope of the cap": ("cap", fault(bent=slope(lambda slope, problem: problem.softmax_scale))),
    "no scale in the gradient": ("scale", fault(bent=slope(lambda slope, problem: slope / problem.softmax_scale))),
    # quantised caches
    "key's scale is dropped": ("int8", arguments_changed(key_scale=lambda kw: 1.0)),
    "value's scale is dropped": ("int8", arguments_changed(value_scale=lambda kw: 1.0)),
    "value has the key's scale": ("int8", arguments_changed(value_scale=lambda kw: kw["key_scale"])),
    "key's scale after the cap": ("all-int8", fault(logits=key_scale_after_the_cap)),
    "value's scale on the output": ("int8", value_scale_on_the_output),
    "value's scale in the denominator": ("int8", value_scale_in_the_denominator),
    "scales of the row before": ("int8", arguments_changed(key_scale=lambda kw: jnp.roll(kw["key_scale"], 1, axis=2))),
    "scales of another kv head": ("int8-heads", arguments_changed(value_scale=lambda kw: kw["value_scale"][::-1])),
    "scales of another sequence": ("e4m3", arguments_changed(key_scale=lambda kw: kw["key_scale"][::-1])),
    "key's scale is rounded": ("int8", rounded("key_scale")),
    "value's scale is rounded": ("int8", rounded("value_scale")),
    "NaN leaks from dead scales": ("int8", fault(seen=only_rows_are_masked)),
    "NaN leaks from a key's dead scales into d_query": (
        "int8",
        fault(keys=lambda self, problem, queries, cache: only_rows_are_masked(self, problem, queries, cache.key, cache.key_scale)),
    ),
    "NaN leaks from outside a float8 cache": ("e4m3", fault(seen=live_rows_times_1)),
    "no gradient through a quantised key": ("int8", detached("query")),
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
    "empty range is not 0": ("edges", fault(divided=lambda self, values, total: values / total)),
    "NaN leaks from outside": ("edges", fault(seen=live_rows_times_1)),
    "dead rows have gradients": ("edges", fault(backward=dead_rows_not_0)),
    # output and accumulation
    "no denominator": ("mha", fault(divided=lambda self, values, total: values)),
    "sums are rounded": ("mha", fault(weights=lambda self, weights: weights.astype(jnp.bfloat16).astype(weights.dtype))),
    "query is rounded": ("mha", rounded("query")),
    "value is rounded": ("mha", rounded("value")),
    "output in float32": ("bfloat16", results_changed(lambda out, lse, kw: (out.astype(jnp.float32), lse))),
    "output rounded twice": ("float16", results_changed(lambda out, lse, kw: (out.astype(jnp.bfloat16).astype(out.dtype), lse))),
    # gradients
    "no delta": ("mha", fault(d_logits=lambda self, p, d_p, delta: p * d_p)),
    "only one head of the group reaches the key": ("gqa-7", fault(backward=one_head_of_the_group)),
    "gradients are rounded": (
        "mha",
        fault(d_logits=lambda self, p, d_p, delta: (p * (d_p - delta)).astype(jnp.bfloat16).astype(p.dtype)),
    ),
    "query has no gradient": ("mha", detached("query")),
    "key has no gradient": ("mha", detached("key")),
    "value has no gradient": ("mha", detached("value")),
}


def assert_forward_then_all_right(call, arguments):
    """Most mutations change the output. Then no gradient is compiled."""
    assert_right(call, arguments, gradients=False)
    assert_right(call, arguments)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_mutation_is_caught(mutation):
    case, call = MUTATIONS[mutation]
    arguments = CASES[case].draw(poison=mutation.startswith("NaN"))
    with pytest.raises(AssertionError, match="error"):
        assert_forward_then_all_right(call, arguments)


@pytest.mark.parametrize("mutation", ["empty range is not 0", "NaN leaks from outside", "NaN leaks from dead scales"])
def test_infinite_errors_are_reported_as_such(mutation):
    case, call = MUTATIONS[mutation]
    with pytest.raises(AssertionError, match="out: error inf"):
        assert_right(call, CASES[case].draw(poison=True))


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


def test_a_backend_is_verified_whole():
    """On every case, and with junk in the rows between the ranges of tokens. A backend that refuses says why."""

    class Plain(TextbookBackend):
        def supports(self, problem, target):
            return None if problem.plain else "it is plain"

    cases = [CASES[name] for name in ("edges", "pages", "narrow-value")]
    found = verify_backend(TextbookBackend(), cases)
    assert found.keys() == {*(case.name for case in cases), "junk between tokens"}
    assert [name for name, verdicts in found.items() if isinstance(verdicts, str) or not all(v.ok for v in verdicts)] == []
    refused = [name for name, why in verify_backend(Plain(), cases).items() if isinstance(why, str) and "it is plain" in why]
    assert refused == ["pages", "narrow-value"]


def test_junk_between_tokens_is_noticed():
    """The backend clears only the rows before the first range and after the last range."""

    def seen(self, problem, queries, rows, scale):
        problem = dataclasses.replace(problem, junk_between_tokens=False)
        return TextbookBackend.seen(self, problem, queries, rows, scale)

    faulty = type("Faulty", (TextbookBackend,), {"seen": seen})()
    verdicts = verify_backend(faulty, ())["junk between tokens"]
    assert not isinstance(verdicts, str)
    assert not verdicts[0].ok
