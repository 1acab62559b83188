"""The meaning of a call, rule by rule, for every backend: by hand where that is possible, and otherwise against the oracle."""

import dataclasses
import functools
import math
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from problems import cases, ranges, tiled_operands
from support import array, assert_batch_invariant, assert_repeatable, assert_right

from ejk_ragged import FwdParams, ragged_decode_attention
from ejk_ragged.testing import Case, CHECKS, oracle, TextbookBackend


CASES = {case.name: case for case in CHECKS}
# 64 divides the head dimensions of these cases. Some backends take no other head dimensions in pages or in 8 bits.
TILED = (
    Case("tiled-pages", 3, 72, 4, 2, 64, "bfloat16", ("ranges", (3, 70), (9, 9), (0, 20)), page_size=16, value_dim=128),
    Case(
        "tiled-int8",
        2,
        64,
        6,
        2,
        64,
        "bfloat16",
        ("ranges", (3, 60), (0, 20)),
        sinks=("query", 1),
        num_tokens=3,
        cache_dtype="int8",
        scales="row",
    ),
)


@pytest.mark.parametrize("case", [*CHECKS, *TILED], ids=lambda case: case.name)
def test_named_cases(subject, case):
    assert_right(subject.call, case.draw(poison=True))


# ---------------------------------------------------------------------------------------------------------------------------
# By hand, in a backend's first dtype. With a query of zeros every key weighs 1. So out is the mean of the valid values, and lse is
# the log of their number.


def counting(subject, batch, heads=2, kv_heads=1, seq_len=40, dim=16, num_tokens=None, dtype=None):
    """A query of zeros, and values that hold the number of their row. Any dtype can hold these numbers."""
    dtype = jnp.dtype(dtype or subject.dtypes[0])
    rows = jnp.broadcast_to(jnp.arange(seq_len, dtype=dtype)[None, :, None, None], (batch, seq_len, kv_heads, dim))
    tokens = () if num_tokens is None else (num_tokens,)
    return {"query": jnp.zeros((batch, *tokens, heads, dim), dtype), "key": jnp.ones_like(rows), "value": rows}


def valid_rows(subject, start, end, num_tokens=None, query_lengths=None, **options):
    """The number of valid keys and the mean of their indices, per sequence or [B, T], from the results of a call."""
    lengths = {"sequence_start": start, "sequence_end": end, "query_lengths": query_lengths}
    lengths = {name: array(x, jnp.int32) for name, x in lengths.items() if x is not None}
    batch = next((len(x) for x in lengths.values()), 1)
    out, lse = subject.call(**counting(subject, batch, num_tokens=num_tokens), **lengths, **options, return_lse=True)
    return np.exp(np.asarray(lse[..., 1])), np.asarray(out[..., 1, 3], np.float32)


def assert_rows(got, want):
    count, mean = (x.ravel() for x in got)
    np.testing.assert_allclose(count, [len(rows) for rows in want], rtol=1e-5)
    np.testing.assert_allclose(mean, [np.mean(rows) if len(rows) else 0 for rows in want], rtol=1e-5)  # any dtype can hold halves


def rounding(subject):
    """The largest relative error of an output."""
    return max(1e-5, float(jnp.finfo(subject.dtypes[0]).eps))


def test_ranges_are_half_open(subject):
    got = valid_rows(subject, [0, 3, 0, 39, 17], [40, 9, 1, 40, 18])
    assert_rows(got, [range(40), range(3, 9), range(1), range(39, 40), range(17, 18)])


def test_ranges_are_clipped(subject):
    top = np.iinfo(np.int32).max
    got = valid_rows(subject, [-7, 30, -top - 1, 41, top], [5, 90, top, 50, -1])
    assert_rows(got, [range(5), range(30, 40), range(40), (), ()])


def test_no_lengths_means_all(subject):
    assert_rows(valid_rows(subject, None, None), [range(40)])
    assert_rows(valid_rows(subject, [7], None), [range(7, 40)])
    assert_rows(valid_rows(subject, None, [7]), [range(7)])


@pytest.mark.parametrize(
    ("window", "wants"),
    [
        ((0, 0), (range(39, 40), range(8, 9), (), ())),
        ((5, 0), (range(34, 40), range(3, 9), range(36, 40), ())),
        ((5, -1), (range(34, 40), range(3, 9), range(36, 40), ())),
        ((5, 3), (range(34, 40), range(3, 9), range(36, 40), ())),
        ((100, 0), (range(40), range(3, 9), range(25, 40), ())),
        ((-1, 0), (range(40), range(3, 9), range(25, 40), ())),
        ((-1, -1), (range(40), range(3, 9), range(25, 40), ())),
        ((2**40, 0), (range(40), range(3, 9), range(25, 40), ())),
    ],
)
def test_window(subject, window, wants):
    """The query has position end - 1, whatever the rows behind it hold, and also if end - 1 is beyond the cache."""
    assert_rows(valid_rows(subject, [0, 3, 25, 9], [40, 9, 42, 4], sliding_window=window), wants)


@pytest.mark.parametrize(
    ("options", "wants"),
    [
        ({}, (*(range(i) for i in (39, 40, 40)), range(3, 7), range(3, 8), range(3, 9), (), range(1), range(2))),
        (
            {"sliding_window": (2, 0)},
            (range(36, 39), range(37, 40), range(38, 40), *(range(i, i + 3) for i in (4, 5, 6)), (), range(1), range(2)),
        ),
        ({"query_lengths": [2, 5, 1]}, (range(40), range(40), (), range(3, 7), range(3, 8), range(3, 9), range(2), (), ())),
        ({"query_lengths": [-1, 0, 3], "sliding_window": (0, 5)}, (*((),) * 7, range(1), range(1, 2))),
    ],
    ids=str,
)
def test_tokens(subject, options, wants):
    """Each token sees no key after its own, and its window goes back from its own key. The last token has position end - 1. The
    first sequence's last token does not fit into the cache. The third sequence has fewer keys than tokens."""
    assert_rows(valid_rows(subject, [0, 3, 0], [41, 9, 2], num_tokens=3, **options), wants)


@pytest.mark.parametrize("end", [90, 2**31 - 1])
def test_tokens_far_beyond_the_cache(subject, end):
    """Every token sees the whole cache, and with a window it sees nothing."""
    assert_rows(valid_rows(subject, [0], [end], num_tokens=2), [range(40)] * 2)
    assert_rows(valid_rows(subject, [0], [end], num_tokens=2, sliding_window=(3, 0)), [()] * 2)


@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (3, 2, 40)], ids=["number", "head", "sequence", "row"])
def test_scales(subject, shape):
    """A key's scale multiplies the logit before the cap. A value's scale multiplies the value, and does not change the
    denominator of the softmax."""
    key_scale, value_scale = np.random.default_rng(0).uniform(0.5, 1.5, (2, *shape)).astype(np.float32)
    dtype, dim = subject.dtypes[0], subject.dim
    rows = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int8)[None, :, None, None], (3, 40, 2, dim))
    arguments = {"query": jnp.full((3, 4, dim), 1 / dim, dtype), "key": jnp.full_like(rows, 3), "value": rows}
    scales = {"key_scale": array(key_scale), "value_scale": array(value_scale)}
    if shape == ():
        scales = {name: float(scale) for name, scale in scales.items()}
    out, lse = subject.call(**arguments, **scales, softmax_scale=1.0, logits_soft_cap=1.0, return_lse=True)
    key_scale, value_scale = (np.float64(x if x.ndim in (0, 3) else x[..., None]) for x in (key_scale, value_scale))
    p = np.exp(np.tanh(3 * key_scale)) * np.ones((3, 2, 40))
    want = np.sum(p * value_scale * np.arange(40), axis=2) / np.sum(p, axis=2)
    np.testing.assert_allclose(lse, np.log(np.sum(p, axis=2)).repeat(2, axis=1), rtol=2e-6)
    np.testing.assert_allclose(np.asarray(out[..., 5], np.float64), want.repeat(2, axis=1), rtol=rounding(subject))


def test_heads_read_their_group(subject):
    """Query head h reads kv head h // G."""
    arguments = counting(subject, 1, heads=6, kv_heads=2)
    arguments["value"] = jnp.broadcast_to(jnp.array([1.0, 2.0], subject.dtypes[0])[:, None], arguments["value"].shape)
    np.testing.assert_array_equal(subject.call(**arguments)[0, :, 0], [1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("sinks", "weights"),
    [
        (np.array([0.0, math.log(5)]), [6, 6, 6, 6]),
        (np.log([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]), [2, 4, 6, 8]),
        (np.log([[10.0], [20.0]]), [10, 10, 20, 20]),
        (np.array([-np.inf]), [0, 0, 0, 0]),
    ],
    ids=["shared", "query", "kv", "none by -inf"],
)
def test_sinks(subject, sinks, weights):
    """exp(sink) is added to the denominator once. A sink is neither scaled nor capped, and has no value. lse includes it."""
    arguments = counting(subject, 2, heads=4, kv_heads=2) | {"softmax_aux": array(sinks, jnp.float32)}
    end = jnp.array([9, 0], jnp.int32)
    out, lse = subject.call(**arguments, sequence_end=end, softmax_scale=0.1, logits_soft_cap=1.5, return_lse=True)
    weights = np.array(weights)
    np.testing.assert_allclose(np.exp(lse), [9 + weights, weights], rtol=1e-5)
    np.testing.assert_allclose(np.float64(out[..., 0]), [36 / (9 + weights), np.zeros(4)], rtol=rounding(subject))


def test_scale_then_cap(subject):
    """With one key the lse is its logit: cap * tanh(scale * q . k / cap)."""
    query, key = jnp.full((1, 1, 16), 0.5, subject.dtypes[0]), jnp.full((1, 1, 1, 16), 2.0, subject.dtypes[0])
    for scale, cap, want in (
        (None, None, 4.0),
        (0.5, None, 8.0),
        (None, 3.0, 3 * math.tanh(4 / 3)),
        (0.5, 3.0, 3 * math.tanh(8 / 3)),
    ):
        _, lse = subject.call(query, key, key, softmax_scale=scale, logits_soft_cap=cap, return_lse=True)
        np.testing.assert_allclose(lse, [[want]], rtol=2e-6)


def test_cap_far_above_the_logits(subject):
    """Nothing cancels in such a cap. Each sequence has one key, whose logit is the lse."""
    logits = np.arange(1, 33) / 16
    query = jnp.broadcast_to(array(logits, subject.dtypes[0])[:, None, None], (32, 2, 16))
    key = jnp.ones((32, 1, 1, 16), subject.dtypes[0])
    _, lse = subject.call(query, key, key, softmax_scale=1 / 16, logits_soft_cap=50.0, return_lse=True)
    want = 50 * np.tanh(logits / 50)
    for head in range(2):
        np.testing.assert_array_less(np.abs(lse[:, head] - want), 2e-6 * np.maximum(1, want))


@pytest.mark.parametrize("cap", [1e31, 1e38])
def test_cap_that_no_logit_reaches(subject, cap):
    """Logits are what they are without a cap, also where a logit divided by the cap is next to the smallest float32, or below."""
    arguments = dataclasses.replace(CASES["scale"], dtype=subject.dtypes[0], head_dim=64).draw()
    assert_right(functools.partial(subject.call, logits_soft_cap=cap), arguments)
    got, want = (subject.call(**arguments, logits_soft_cap=x, return_lse=True)[1] for x in (cap, None))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("cap", [1e-31, 1e-300])
def test_cap_next_to_nothing(subject, cap):
    """All logits are next to 0, also that of a key that is 0. The cap, or a logit divided by it, may be beyond float32."""
    arguments = counting(subject, 2)
    arguments["query"], arguments["key"] = arguments["query"] + 1, arguments["key"].at[:, ::2].set(0)
    out, lse = subject.call(**arguments, logits_soft_cap=cap, return_lse=True)
    np.testing.assert_allclose(lse, np.full((2, 2), np.log(40)), rtol=2e-6)
    np.testing.assert_allclose(np.asarray(out, np.float64), 19.5, rtol=1e-2)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_need_not_be_positive(subject, scale):
    assert_right(subject.call, CASES["scale"].draw() | {"softmax_scale": scale})


def test_large_logits(subject):
    """Nothing overflows, although one key outweighs all others by e^1000 and more."""
    arguments = counting(subject, 1) | {"query": jnp.ones((1, 2, 16), subject.dtypes[0])}
    arguments["key"] = arguments["value"] * 16
    out, lse = subject.call(**arguments, return_lse=True)
    np.testing.assert_array_equal(out, np.full(out.shape, 39))
    np.testing.assert_allclose(lse, np.full(lse.shape, 39 * 64), rtol=1e-6)
    out, lse = subject.call(**arguments, softmax_aux=jnp.array([1e4]), return_lse=True)
    np.testing.assert_array_equal(out, np.zeros(out.shape))
    np.testing.assert_allclose(lse, np.full(lse.shape, 1e4), rtol=1e-6)


def test_empty_range(subject):
    """The output is 0, lse is -inf and every gradient is 0, although the cache holds only NaN."""
    arguments = counting(subject, 2)
    arguments |= {name: jnp.full_like(arguments[name], jnp.nan) for name in ("key", "value")}
    lengths = {"sequence_start": jnp.array([5, 9], jnp.int32), "sequence_end": jnp.array([5, 2], jnp.int32)}

    def function(query, key, value):
        return subject.call(query, key, value, **lengths, return_lse=True)

    (out, lse), pullback = jax.vjp(function, *arguments.values())
    np.testing.assert_array_equal(out, np.zeros(out.shape))
    np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))
    for gradient in pullback((jnp.ones_like(out), jnp.ones_like(lse))):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_empty_range_with_sinks(subject):
    """lse and its gradient are those of the sinks. The output has no gradient."""
    arguments = counting(subject, 1) | {"sequence_end": jnp.zeros(1, jnp.int32)}
    sinks = jnp.array([[0.0, 1.0], [2.0, 2.0]])
    (out, lse), pullback = jax.vjp(lambda aux: subject.call(**arguments, softmax_aux=aux, return_lse=True), sinks)
    np.testing.assert_array_equal(out, np.zeros(out.shape))
    np.testing.assert_allclose(lse, jax.nn.logsumexp(sinks, axis=-1)[None], rtol=1e-6)
    np.testing.assert_array_equal(pullback((jnp.ones_like(out), jnp.zeros_like(lse)))[0], np.zeros((2, 2)))
    np.testing.assert_allclose(pullback((jnp.zeros_like(out), jnp.ones_like(lse)))[0], jax.nn.softmax(sinks), rtol=1e-6)


@pytest.mark.parametrize("name", ["sinks-shared", "sinks-query", "sinks-kv"])
def test_sinks_that_weigh_nothing(subject, name):
    """Sinks of -inf, for one head, one kv head or all heads, count as no sinks. Their gradient is 0, not NaN."""
    arguments = dataclasses.replace(CASES[name], dtype=subject.dtypes[0]).draw(poison=True)
    sinks = np.atleast_2d(arguments["softmax_aux"].copy())
    sinks[0] = -np.inf
    arguments["softmax_aux"] = sinks.reshape(arguments["softmax_aux"].shape)
    assert_right(subject.call, arguments)


def test_dtypes_of_the_answer(subject):
    for dtype in subject.dtypes:
        with jax.enable_x64(dtype == "float64"):
            out, lse = subject.call(**counting(subject, 1, dtype=jnp.dtype(dtype)), return_lse=True)
            assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), jnp.float32)
            assert (out.shape, lse.shape) == ((1, 2, 16), (1, 2))


INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_dtypes_of_lengths(subject, dtype):
    """Lengths have any integer dtype, also of NumPy. 300 rows are more than int8 holds, and unsigned integers must not wrap."""
    with jax.enable_x64(dtype.endswith("64")):
        arguments = counting(subject, 2, seq_len=300)
        start, end = np.array([3, 0], dtype), np.array([100, np.iinfo(dtype).max], dtype)
        _, lse = subject.call(**arguments, sequence_start=start, sequence_end=end, return_lse=True)
        np.testing.assert_allclose(np.exp(lse[:, 0]), [97, min(300, np.iinfo(dtype).max)], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_lengths_of_4_bits(dtype):
    start, end = jnp.array([2, 0], dtype), jnp.array([7, jnp.iinfo(dtype).min], dtype)
    query, rows = jnp.zeros((2, 2, 8)), jnp.zeros((2, 40, 1, 8))
    _, lse = ragged_decode_attention(query, rows, rows, start, end, return_lse=True, backend=TextbookBackend())
    np.testing.assert_allclose(np.exp(lse[:, 0]), [5, 0], rtol=1e-5)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_dtypes_of_query_lengths(subject, dtype):
    """130 and 260 tokens are more than int8 and uint8 hold. The smallest number of the dtype means no tokens, and the largest
    means all."""
    num_tokens = 260 if dtype == "uint8" else 130
    ends, lengths = np.array([300, 300, 200], np.int32), np.array([np.iinfo(dtype).max, np.iinfo(dtype).min, 100], dtype)
    with jax.enable_x64(dtype.endswith("64")):
        arguments = counting(subject, 3, heads=1, seq_len=300, num_tokens=num_tokens)
        _, lse = subject.call(**arguments, sequence_end=ends, query_lengths=lengths, return_lse=True)
    present = min(num_tokens, np.iinfo(dtype).max)
    counts = np.zeros((3, num_tokens))
    counts[0, :present] = 300 - present + 1 + np.arange(present)
    counts[2, :100] = 101 + np.arange(100)
    np.testing.assert_allclose(np.exp(lse[..., 0]), counts, rtol=1e-5)


@pytest.mark.parametrize("left", [0, 5, 2**31 - 1, 2**31 + 5, 2**32 - 1, 2**63, 2**70])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_dtypes_of_ends_and_windows(dtype, left):
    """A window around the last position that a dtype holds, and around other positions beyond the cache, keeps the keys that
    exact integers give."""
    ends = np.array([np.iinfo(dtype).max, np.iinfo(dtype).min, np.iinfo(dtype).max - 7, 20], dtype)
    with jax.enable_x64(dtype.endswith("64")):
        query, rows = jnp.zeros((4, 2, 1, 8)), jnp.zeros((4, 40, 1, 8))
        _, lse = ragged_decode_attention(
            query, rows, rows, sequence_end=ends, sliding_window=(left, 0), return_lse=True, backend=TextbookBackend()
        )
    positions = [[int(end) - 2 + token for token in range(2)] for end in ends]
    counts = [[len(range(max(p - left, 0), min(p + 1, 40))) for p in of_sequence] for of_sequence in positions]
    np.testing.assert_allclose(np.exp(lse[..., 0]), counts, rtol=1e-5)


def test_one_dimensional_sinks_of_query_heads_warn(subject):
    arguments = counting(subject, 1, heads=4, kv_heads=2)
    with pytest.warns(UserWarning, match=r"softmax_aux\[:, None\]") as caught:
        subject.call(**arguments, softmax_aux=jnp.zeros(4))
    assert caught[0].filename == support.__file__  # the warning points at the caller, which is `subject.call`
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject.call(**arguments, softmax_aux=jnp.zeros(3))
        subject.call(**arguments, softmax_aux=jnp.zeros((4, 1)))
        subject.call(**counting(subject, 1, heads=1), softmax_aux=jnp.zeros(1))


def test_numpy_arrays(subject):
    arguments = CASES["sinks-query"].draw(poison=True)
    out = subject.call(**arguments)
    assert isinstance(out, jax.Array)
    np.testing.assert_allclose(out, oracle(**arguments)[0], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------------
# Sizes, hints, bits


@pytest.mark.parametrize("dim", [8, 24, 80, 96, 112, 256])
def test_head_dims(subject, dim):
    assert_right(subject.call, Case("", 2, 33, 4, 2, dim, lengths=("uniform", 1, 33)).draw(poison=True))


@pytest.mark.parametrize("group", [1, 5, 7, 16])
def test_groups(subject, group):
    assert_right(subject.call, Case("", 2, 33, 2 * group, 2, 32, lengths=("uniform", 1, 33)).draw(poison=True))


@pytest.mark.parametrize("seq_len", [1, 2, 127, 600])
def test_sequence_lengths(subject, seq_len):
    assert_right(subject.call, Case("", 2, seq_len, 4, 2, 16, lengths=("skew", 1, seq_len)).draw(poison=True))


@pytest.mark.parametrize(
    "hints",
    [
        FwdParams(block_size_keys=16),
        FwdParams(block_size_keys=128, num_key_splits=1),
        FwdParams(num_key_splits=5),
        FwdParams(block_size_heads=16, num_warps=4, num_stages=2),
    ],
    ids=str,
)
def test_hints_never_change_the_meaning(subject, hints):
    call = functools.partial(subject.call, fwd_params=hints)
    assert_right(call, dataclasses.replace(CASES["all"], dtype="float32").draw(poison=True))


@pytest.mark.parametrize("name", ["edges", "all"])
def test_repeatable(subject, name):
    assert_repeatable(subject.call, CASES[name].draw(poison=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant(subject, dtype):
    """One sequence of 200 keys and more, in a batch and alone."""
    case = Case("", 4, 300, 8, 2, 32, dtype, lengths=("skew", 1, 300), sinks=("query", 1))
    for seed in range(2):
        assert_batch_invariant(subject.call, case.draw(seed))


# ---------------------------------------------------------------------------------------------------------------------------
# Everything together


SHAPES = [  # B, S, Hq, Hkv, D; few shapes, because each is compiled
    (1, 1, 1, 1, 8),
    (2, 33, 4, 4, 32),
    (3, 64, 6, 2, 16),
    (4, 50, 7, 1, 80),
    (5, 37, 10, 2, 24),
    (2, 300, 16, 1, 128),
]
# For backends that take pages and 8 bits in tiles. The first shape has few query rows, and the others have more.
TILED_SHAPES = [*SHAPES, (3, 64, 6, 2, 64), (2, 72, 40, 1, 128), (2, 64, 80, 1, 64)]


@hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)
@hypothesis.given(data=st.data())
def test_any_problem(subject, data):
    """Forward and gradients of any problem, with poison around the live ranges. Other ranges then use the same programs."""
    drawn = cases(TILED_SHAPES, subject.dtypes, tiled_operands) if subject.picky else cases(SHAPES, subject.dtypes)
    case = data.draw(drawn.filter(subject.takes), "case")
    gradients = not subject.picky or data.draw(st.booleans(), "gradients")  # without gradients the output is rounded in the kernel
    hints = data.draw(st.sampled_from([None, FwdParams(block_size_keys=16), FwdParams(num_key_splits=3)]), "hints")
    lengths = [case.lengths] if case.lengths == ("full",) else [case.lengths, data.draw(ranges(case.batch, case.seq_len), "others")]
    seed = data.draw(st.integers(0, 99), "seed")
    with jax.enable_x64(case.dtype == "float64"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "softmax_aux of shape", UserWarning)  # N may equal Hq
        for some in lengths:
            arguments = dataclasses.replace(case, lengths=some).draw(seed, poison=True)
            assert_right(functools.partial(subject.call, fwd_params=hints), arguments, gradients=gradients, seed=seed)


@pytest.mark.parametrize("name", ["cap", "window", "sinks-shared", "sinks-kv"])
def test_finite_differences(subject, name, x64):
    """A check that is independent of the oracle: the slope of the call's own output, in float64."""
    arguments = {
        k: array(v) if isinstance(v, np.ndarray) else v for k, v in dataclasses.replace(CASES[name], dtype="float64").draw().items()
    }
    if "float64" not in subject.dtypes:  # such a backend refuses float64, and does not round silently
        with pytest.raises(ValueError, match=f"backend '{subject.name}' cannot do this call .*float64"):
            subject.call(**arguments)
        return
    names = [k for k in ("query", "key", "value", "softmax_aux") if k in arguments]
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(arguments["query"].shape)

    @jax.jit
    def loss(*args):
        return jnp.sum(subject.call(**arguments | dict(zip(names, args, strict=True))) * weights)

    args = [arguments[k] for k in names]
    for i, gradient in enumerate(jax.grad(loss, range(len(args)))(*args)):
        direction = rng.standard_normal(args[i].shape)
        up, down = (loss(*args[:i], args[i] + step * direction, *args[i + 1 :]) for step in (1e-5, -1e-5))
        np.testing.assert_allclose(np.sum(gradient * direction), (up - down) / 2e-5, rtol=1e-6, atol=1e-7)
