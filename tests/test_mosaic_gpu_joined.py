"""Kv heads of 8-bit caches that Mosaic GPU joins, where the memory is fast: how many, and that the answer is that of kv heads
apart. The kernels run in the interpreter, which also looks for races."""

import dataclasses
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support import array, assert_right, END_TO_END, expected, has_mosaic_gpu

from ejk_ragged import FwdParams, Problem, Target
from ejk_ragged.testing import Case, relative_error
from ejk_ragged_mosaic_gpu._tiles import begins_in_line
from ejk_ragged_mosaic_gpu._tuning import joined_heads, resolve, tiles


TARGET, H100 = (
    Target("cuda", types.SimpleNamespace(compute_capability="9.0", device_kind=f"NVIDIA {name}")) for name in ("H200", "H100")
)
SIZES = {"batch": 16, "num_tokens": 1, "seq_len": 4096, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 112}
POOL = {"num_pages": 1100, "page_size": 64}


def problem(cache_dtype="int8", **changes):
    given: dict[str, Any] = SIZES | {"softmax_scale": 1.0} | changes
    return Problem(dtype=np.dtype("bfloat16"), cache_dtype=np.dtype(cache_dtype), **given)


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({}, 4),
        (POOL, 4),
        ({"cache_dtype": "float8_e4m3fn"}, 4),
        ({"cache_dtype": "bfloat16"}, 1),
        ({"batch": 13}, 1),  # too few bytes
        ({"head_dim": 96, "batch": 22}, 4),
        ({"head_dim": 96, "batch": 21}, 1),
        ({"head_dim": 80, "batch": 10}, 4),
        ({"head_dim": 80, "batch": 9}, 1),
        ({"head_dim": 64, "batch": 4}, 2),
        ({"head_dim": 64, "batch": 3}, 1),
        ({"head_dim": 64, "num_tokens": 4}, 2),
        ({"head_dim": 64, "num_tokens": 5}, 1),  # 40 query rows
        ({"num_tokens": 2}, 1),  # 32 query rows, and threads have no registers for them
        ({"num_q_heads": 8, "num_tokens": 4}, 4),
        ({"num_q_heads": 40}, 1),
        ({"num_kv_heads": 6, "num_q_heads": 24, "batch": 32}, 1),
        ({"head_dim": 48}, 1),  # not timed
        ({"head_dim": 128}, 1),
        ({"value_dim": 96}, 1),
        ({"value_columns": (0, 112)}, 1),
        ({"most_keys": 3584}, 4),
        ({"most_keys": 256, "batch": 512}, 1),
        ({"fwd_params": FwdParams(num_key_splits=4)}, 1),
        ({"fwd_params": FwdParams(block_size_heads=16)}, 4),
        ({"fwd_params": FwdParams(block_size_heads=8)}, 1),
        ({"fwd_params": FwdParams(num_stages=2)}, 4),
        ({"fwd_params": FwdParams(num_stages=4)}, 1),  # there is no room for so many tiles of joined kv heads
        ({"fwd_params": FwdParams(block_size_keys=128)}, 1),
    ],
    ids=str,
)
def test_how_many(changes, heads):
    one = problem(**changes)
    wide, number = joined_heads(one, TARGET)
    assert number == heads
    assert joined_heads(one, H100)[1] == 1  # not timed
    assert (wide.num_q_heads, wide.num_kv_heads * heads) == (one.num_q_heads, one.num_kv_heads)
    assert (wide.head_dim, wide.value_dim, wide.row_dim) == (heads * one.head_dim, heads * one.value_dim, heads * one.row_dim)


@pytest.mark.parametrize("hints", [{}, {"block_size_heads": 8}, {"num_stages": 4}, {"block_size_keys": 128}], ids=str)
@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112])
def test_hints_that_are_resolved_join_as_many(head_dim, page_size, hints):
    for group, tokens in ((1, 1), (1, 4), (2, 1), (4, 1), (4, 2), (4, 4), (8, 1)):
        sizes: dict[str, Any] = {"batch": 64, "num_tokens": tokens, "num_q_heads": 8 * group, "head_dim": head_dim}
        one = problem(page_size=page_size, num_pages=page_size and 100000, fwd_params=FwdParams(**hints), **sizes)
        resolved = dataclasses.replace(one, fwd_params=resolve(one, TARGET))
        assert joined_heads(resolved, TARGET)[1] == joined_heads(one, TARGET)[1] == tiles(resolved, TARGET).joined
        assert resolve(resolved, TARGET) == resolved.fwd_params


@pytest.mark.parametrize(
    ("head_dim", "num_kv_heads", "shares_lines", "frees_early"),
    [
        (64, 8, False, False),
        (80, 8, True, True),
        (80, 12, False, True),  # rows of 960 bytes, which are not whole lines
        (96, 8, False, True),
        (112, 8, True, True),
        (112, 4, False, True),
        (128, 8, False, False),
        (320, 4, False, False),
    ],
)
def test_lines_and_places(head_dim, num_kv_heads, shares_lines, frees_early):
    """Copies take whole lines of 128 bytes where joined kv heads share them. Joined kv heads free a place early that is the
    only one of its warpgroup."""
    one = problem(head_dim=head_dim, num_kv_heads=num_kv_heads, num_q_heads=2 * num_kv_heads, batch=64)
    plan = tiles(dataclasses.replace(one, fwd_params=resolve(one, TARGET)), TARGET)
    assert (plan.shares_lines, plan.frees_early) == (shares_lines, frees_early)
    wide = plan.joined * head_dim
    assert plan.narrow_line == (64 if wide % 128 and not shares_lines else 128)


@pytest.mark.parametrize(
    ("head", "columns", "place"), [(0, 320, (0, 0)), (1, 320, (256, 64)), (2, 320, (640, 0)), (3, 448, (1280, 64))]
)
def test_where_the_line_of_a_joined_kv_head_begins(head, columns, place):
    assert begins_in_line(head, columns) == place


def eight_bits(batch, seq_len, num_q_heads, num_kv_heads, head_dim, lengths=("ranges", (3, 66), (0, 90)), **more):
    given: dict[str, Any] = {"cache_dtype": "int8", "scales": "row"} | more
    return Case("", batch, seq_len, num_q_heads, num_kv_heads, head_dim, "bfloat16", lengths, **given)


JOINED = {
    "64, tokens, sinks": eight_bits(2, 96, 16, 4, 64, num_tokens=2, query_lengths=(2, 1), sinks=("query", 1)),
    "80, in pages": eight_bits(3, 128, 16, 8, 80, lengths=("ranges", (3, 66), (0, 9), (20, 128)), page_size=32),
    "80, rows end to end": eight_bits(8, 101, 12, 4, 80, cache_dtype="float8_e5m2", lengths=END_TO_END),
    "80, three": eight_bits(2, 96, 24, 12, 80, lengths=("ranges", (3, 66), (0, 90))),
    "80, four share lines": eight_bits(2, 96, 16, 16, 80, num_tokens=2),
    "96, scales by head": eight_bits(2, 96, 4, 4, 96, scales="head", sinks=("kv", 2)),
    "96, one scale": eight_bits(2, 96, 8, 8, 96, scales="number", logits_soft_cap=20.0),
    "112, tokens": eight_bits(2, 96, 8, 4, 112, cache_dtype="float8_e4m3fn", num_tokens=2, sliding_window=(40, 0)),
    "112, two share lines": eight_bits(2, 96, 8, 8, 112, num_tokens=2, query_lengths=(1, 2)),
}


@has_mosaic_gpu
@pytest.mark.parametrize("name", JOINED)
def test_answers(joins_always, interpreted, name):
    """Rows and scales that nobody sees are junk. Gradients, which another backend has, take an output that is not rounded."""
    assert_right(interpreted(programs=3), JOINED[name].draw(poison=True))


@has_mosaic_gpu
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_each_kv_head_has_its_own_scales(joins_always, interpreted, dtype):
    """Values times scales stay in the range of float16 because they are in units of their largest scale. Each joined kv head has a
    unit of its own. It grows from tile to tile for one that is not the first, and stays for others."""
    arguments = Case("", 1, 256, 16, 4, 80, "bfloat16", cache_dtype=dtype, scales="row").draw()
    exponents = np.linspace(-30, 30, 256)
    scale = np.stack([1e30 + 0 * exponents, 10.0**exponents, 10.0 ** exponents[::-1], 1e-30 + 0 * exponents])[None]
    arguments["value_scale"] = array(scale, jnp.float32)
    arguments["key_scale"] = arguments["key_scale"] * jnp.array([1e-3, 1.0, 3.0, 0.0])[None, :, None]
    out, want = np.asarray(interpreted(programs=1)(**arguments), np.float64), expected(arguments)
    for head in range(4):
        of_head = slice(4 * head, 4 * head + 4)
        assert relative_error(out[:, of_head], want[:, of_head]) < 2.5e-3


@has_mosaic_gpu
@pytest.mark.parametrize("name", ["value", "value_scale", "key_scale"])
def test_nan_of_one_kv_head_stays_there(joins_always, interpreted, name):
    """Such a number in a row that tokens see is for query heads of its own kv head only."""
    case = Case("", 1, 128, 8, 4, 80, "bfloat16", cache_dtype="float8_e4m3fn", scales="row")
    arguments = case.draw()
    want = expected(arguments)
    place = (0, 9, 1) if name == "value" else (0, 1, 9)
    arguments[name] = jnp.asarray(arguments[name]).at[place].set(jnp.nan)
    out = np.asarray(interpreted(programs=2)(**arguments), np.float64)
    assert np.isnan(out[:, 2:4]).all()
    others = np.r_[0:2, 4:8]
    assert relative_error(out[:, others], want[:, others]) < 2.5e-3
