"""The oracle itself: its results against values worked out by hand, and its gradients against finite differences."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ejk_ragged._tools.cases import CPU_STEP, GROUPS
from ejk_ragged.testing import CHECKS, live_rows, oracle, oracle_gradients, relative_error, seen_rows, tolerance, verify


REALISTIC = [case for group in GROUPS.values() for case in group]


def test_worked_by_hand():
    """Two query heads on one kv head, with D 1. Keys 0 and ln 2 with scale 1 weigh 1 and 2, and a sink of 0 weighs 1."""
    query = np.array([[[1.0], [2.0]]])
    key = np.array([[[[9.0]], [[0.0]], [[np.log(2)]], [[9.0]]]])
    value = np.array([[[[9.0]], [[4.0]], [[8.0]], [[9.0]]]])
    out, lse = oracle(query, key, value, [1], [3], softmax_scale=1.0)
    np.testing.assert_allclose(out, [[[20 / 3], [36 / 5]]])
    np.testing.assert_allclose(lse, [[np.log(3), np.log(5)]])
    out, lse = oracle(query, key, value, [1], [3], softmax_scale=1.0, softmax_aux=np.array([[0.0], [0.0]]))
    np.testing.assert_allclose(out, [[[20 / 4], [36 / 6]]])
    out, lse = oracle(query, key, value, [0], [3], softmax_scale=1.0, sliding_window=(0, 0), logits_soft_cap=2.0)
    np.testing.assert_allclose(out, [[[8.0], [8.0]]])
    np.testing.assert_allclose(lse, [[2 * np.tanh(np.log(2) / 2), 2 * np.tanh(np.log(2))]])


def test_empty_by_hand():
    query, cache = np.ones((1, 2, 1)), np.full((1, 3, 1, 1), np.nan)
    out, lse = oracle(query, cache, cache, [2], [2])
    assert np.all(out == 0)
    assert np.all(lse == -np.inf)
    out, lse = oracle(query, cache, cache, [2], [1], softmax_aux=np.array([0.0, 0.0]))
    assert np.all(out == 0)
    np.testing.assert_allclose(lse, np.log(2))


def test_tokens_by_hand():
    """The same keys for two tokens. The first token sees the first key only. With a query length of 1 the second token is
    padding."""
    query = np.array([[[[1.0], [2.0]], [[1.0], [2.0]]]])
    key = np.array([[[[9.0]], [[0.0]], [[np.log(2)]], [[9.0]]]])
    value = np.array([[[[9.0]], [[4.0]], [[8.0]], [[9.0]]]])
    one, two = [[4.0], [4.0]], [[20 / 3], [36 / 5]]
    out, lse = oracle(query, key, value, [1], [3], softmax_scale=1.0)
    np.testing.assert_allclose(out, [[one, two]])
    np.testing.assert_allclose(lse, [[[0, 0], [np.log(3), np.log(5)]]], atol=1e-15)
    out, lse = oracle(query, key, value, [1], [3], softmax_scale=1.0, query_lengths=[1])
    np.testing.assert_allclose(out, [[two, [[0], [0]]]])
    assert np.all(lse[0, 1] == -np.inf)
    out, _ = oracle(query, key, value, [0], [3], softmax_scale=1.0, sliding_window=(0, 5))
    np.testing.assert_allclose(out, [[one, [[8.0], [8.0]]]])
    out, _ = oracle(query, key, value, [2], [3], softmax_scale=1.0)  # the first token has a position before the start
    np.testing.assert_allclose(out, [[[[0], [0]], [[8.0], [8.0]]]])


def live(token, **lengths):
    """The rows, of ten, that each of three tokens sees."""
    names = ("sequence_start", "sequence_end", "sliding_window", "query_lengths")
    return live_rows(0, 10, *(lengths.get(name) for name in names), token=token, num_tokens=3).tolist()


@pytest.mark.parametrize(
    ("lengths", "wants"),
    [
        ({}, [range(8), range(9), range(10)]),
        ({"sequence_end": [6]}, [range(4), range(5), range(6)]),
        ({"sequence_start": [4], "sequence_end": [6]}, [[], [4], [4, 5]]),  # the first token has a position before the start
        ({"sequence_end": [2]}, [[], [0], [0, 1]]),  # more tokens than rows
        ({"sequence_end": [99], "sequence_start": [-5]}, [range(10), range(10), range(10)]),  # far beyond the cache
        ({"sequence_end": [11], "sequence_start": [-5]}, [range(9), range(10), range(10)]),
        ({"sequence_end": [11], "sliding_window": (1, 0)}, [[7, 8], [8, 9], [9]]),
        ({"sequence_end": [6], "sliding_window": (1, 0)}, [[2, 3], [3, 4], [4, 5]]),
        ({"sequence_end": [6], "sliding_window": (1, 9)}, [[2, 3], [3, 4], [4, 5]]),
        ({"sequence_end": [6], "query_lengths": [2]}, [range(5), range(6), []]),
        ({"sequence_end": [6], "query_lengths": [0]}, [[], [], []]),
        ({"sequence_end": [6], "query_lengths": [7]}, [range(4), range(5), range(6)]),
        ({"sequence_end": [6], "query_lengths": [-1]}, [[], [], []]),
        ({"sequence_end": [6], "query_lengths": [1], "sliding_window": (0, 0)}, [[5], [], []]),
    ],
    ids=str,
)
def test_rows_of_tokens_by_hand(lengths, wants):
    assert [live(token, **lengths) for token in range(3)] == [list(want) for want in wants]


@pytest.mark.parametrize("shape", [(), (2,), (2, 2), (2, 2, 3)], ids=str)
def test_scales_by_hand(shape):
    """The cache stands for key times scale, so the result is the same as for a multiplied key."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((2, 4, 5)), rng.integers(-9, 9, (2, 3, 2, 5)), rng.integers(-9, 9, (2, 3, 2, 5))
    key_scale, value_scale = rng.standard_normal((2, *shape))
    want_key, want_value = np.array(key, float), np.array(value, float)
    for b, s, h in np.ndindex(2, 3, 2):
        index = (b, h, s) if len(shape) == 3 else (b, h)[2 - len(shape) :]
        want_key[b, s, h] *= key_scale[index]
        want_value[b, s, h] *= value_scale[index]
    got = oracle(query, key, value, key_scale=key_scale, value_scale=value_scale)
    for x, y in zip(got, oracle(query, want_key, want_value), strict=True):
        np.testing.assert_allclose(x, y)


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: case.name)
def test_gradients_by_finite_differences(case):
    arguments = dataclasses.replace(case, dtype="float64").draw(1)
    rng = np.random.default_rng(0)
    out, lse = oracle(**arguments)
    d_out = rng.standard_normal(out.shape)
    d_lse = np.where(np.isfinite(lse), rng.standard_normal(lse.shape), 0)
    gradients = oracle_gradients(**arguments, d_out=d_out, d_lse=d_lse)

    def loss(**changed):
        out, lse = oracle(**arguments | changed)
        return np.sum(out * d_out) + np.sum(np.where(np.isfinite(lse), lse, 0) * d_lse)

    frozen = case.cache_dtype is not None or case.page_size is not None
    assert (gradients.key is None) == frozen
    assert (gradients.value is None) == (frozen or case.value_columns is not None)
    for name in {"query", "key", "value", "softmax_aux"} & set(arguments):
        if getattr(gradients, name) is None:
            continue
        direction = rng.standard_normal(arguments[name].shape)
        step = 1e-5 * direction
        slope = (loss(**{name: arguments[name] + step}) - loss(**{name: arguments[name] - step})) / 2e-5
        np.testing.assert_allclose(np.sum(getattr(gradients, name) * direction), slope, rtol=1e-6, atol=1e-7)


def test_relative_error():
    assert relative_error([3.0, 4.4], [3.0, 4.0]) == pytest.approx(0.08)
    assert relative_error([-np.inf, 1.0], [-np.inf, 1.0]) == 0
    assert relative_error([0.0], [0.0]) == 0
    assert relative_error([1e-9], [0.0]) == np.inf
    assert relative_error([1e-9], [0.0], size=1.0) == pytest.approx(1e-9)
    for got, want in (([np.nan], [1.0]), ([np.inf], [1.0]), ([1.0], [np.inf]), ([np.inf], [-np.inf]), ([1.0], [1.0, 1.0])):
        assert relative_error(got, want) == np.inf


def test_tolerance():
    assert tolerance("bfloat16", 256) == 2.5e-3
    assert tolerance(np.dtype("float16"), 255) == 8e-4
    assert tolerance("float32", 256, gradient=True) == 4e-6


@pytest.mark.parametrize("case", [*CHECKS, *REALISTIC, CPU_STEP], ids=lambda case: case.name)
def test_cases_are_sound(case):
    """Heads divide, the live part is neither empty nor larger than the cache, and each name is of one problem."""
    assert case.num_q_heads % case.num_kv_heads == 0
    assert 0 < case.live_tokens() <= case.batch * case.seq_len
    itemsize = 1 if case.cache_dtype else 4 if case.dtype == "float32" else 2
    key, value = case.head_dim, case.head_dim if case.value_dim is None else case.value_dim
    if case.value_columns is not None:  # the value is read with the key, except for columns beyond the key
        value = max(case.value_columns[1] - max(case.value_columns[0], key), 0)
    scales = 4 * (case.scales == "row") * (1 if case.value_columns else 2)
    assert case.live_bytes() == case.live_tokens() * case.num_kv_heads * ((key + value) * itemsize + scales)
    group = CHECKS if case in CHECKS else REALISTIC
    assert [other.name for other in group].count(case.name) == (case is not CPU_STEP)
    assert case.name not in GROUPS


def test_pages_by_hand():
    """Two sequences of three rows in pages of two. The second page of one sequence is the first page of the other, and one entry
    is junk."""
    rng = np.random.default_rng(0)
    key, value, query = rng.standard_normal((3, 2, 1, 4)), rng.standard_normal((3, 2, 1, 3)), rng.standard_normal((2, 2, 4))
    by_hand = lambda x: np.stack([[x[2, 0], x[2, 1], x[0, 0]], [x[0, 0], x[0, 1], x[1, 0]]])
    want = oracle(query, by_hand(key), by_hand(value))
    got = oracle(query, key, value, sequence_end=[3, 3], page_table=np.array([[2, 0, -7], [0, 1, 99]]))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y)
    assert got[0].shape == (2, 2, 3)


def test_value_in_the_rows_by_hand():
    rng = np.random.default_rng(0)
    rows, query = rng.standard_normal((2, 5, 1, 7)), rng.standard_normal((2, 2, 4))
    want = oracle(query, rows[..., :4], rows[..., 2:7], softmax_scale=0.3)
    got = oracle(query, rows, None, softmax_scale=0.3, value_columns=(2, 7))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y)


@pytest.mark.parametrize("name", ["edges", "tokens-padded", "int8"])
def test_poison_is_outside(name):
    """Junk is in every row that no token sees, and in no other row. The same holds for scales."""
    (case,) = [case for case in CHECKS if case.name == name]
    arguments = case.draw(poison=True)
    held = arguments["key"][:, :, 0, 0] if case.cache_dtype is None else arguments["key_scale"][:, 0]
    assert np.isfinite(held).sum() == case.live_tokens()
    for b in range(case.batch):
        seen = seen_rows(
            b, case.seq_len, *case.ranges(), case.sliding_window, arguments.get("query_lengths"), num_tokens=case.num_tokens or 1
        )
        np.testing.assert_array_equal(np.isfinite(held[b]).nonzero()[0], seen)
        for array in (arguments["key"][b], arguments["value"][b]) if case.cache_dtype is None else ():
            np.testing.assert_array_equal(np.isfinite(array).all(axis=(1, 2)).nonzero()[0], seen)


def test_unknown_lengths():
    with pytest.raises(ValueError, match="unknown lengths"):
        dataclasses.replace(CHECKS[0], lengths=("long",)).draw()


def test_verdicts_of_the_output_alone():
    arguments = CHECKS[3].draw()

    def call(return_lse, **given: Any):
        exact: dict[str, Any] = {name: np.asarray(x) for name, x in given.items()}
        return tuple(map(jnp.float32, oracle(**exact)))

    assert [verdict.what for verdict in verify(call, arguments, gradients=False) if verdict.ok] == ["out", "lse"]
    cut = lambda **kw: tuple(x[1:] for x in call(**kw))
    assert [str(verdict) for verdict in verify(cut, arguments, gradients=False)] == [
        "out: error inf, tolerance 2e-06",
        "lse: error inf, tolerance 2e-06",
    ]
