"""Kv heads that Pallas-Triton joins, where the memory is fast: how many, and that the answer is that of kv heads apart."""

import dataclasses
import functools
import re
import types
from typing import Any

import jax
import numpy as np
import pytest
from support import assert_right, pallas_triton

from ejk_ragged import FwdParams, Problem, ragged_decode_attention, Target
from ejk_ragged.testing import Case
from ejk_ragged_pallas_triton import _joined
from ejk_ragged_pallas_triton._joined import joined
from ejk_ragged_pallas_triton._tuning import resolve


A100 = types.SimpleNamespace(compute_capability="8.0", device_kind="NVIDIA A100")
H100, H200 = (types.SimpleNamespace(compute_capability="9.0", device_kind=f"NVIDIA {name}") for name in ("H100", "H200"))
SIZES = {"batch": 8, "num_tokens": 1, "seq_len": 5001, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 80}
POOL = {"num_pages": 700, "page_size": 64, "seq_len": 5056}


def problem(cache_dtype="bfloat16", dtype="bfloat16", **changes):
    given: dict[str, Any] = SIZES | {"softmax_scale": 1.0} | changes
    return Problem(dtype=np.dtype(dtype), cache_dtype=np.dtype(cache_dtype), **given)


@pytest.mark.parametrize(
    ("changes", "device", "heads"),
    [
        ({}, H200, 4),  # 320 columns of 16 bits are five whole lines
        ({}, H100, 4),
        ({}, A100, 1),
        ({"head_dim": 112}, H200, 4),
        ({"head_dim": 96}, H200, 2),
        ({"head_dim": 96}, H100, 2),
        ({"head_dim": 64}, H200, 2),
        ({"head_dim": 64}, H100, 1),
        ({"head_dim": 32}, H200, 1),  # not timed
        ({"head_dim": 128}, H200, 1),
        ({"head_dim": 96, "value_dim": 128}, H200, 1),
        ({"head_dim": 88}, H200, 1),
        ({"num_tokens": 2}, H200, 2),  # four would be 32 query rows
        ({"num_tokens": 3}, H200, 1),
        ({"num_kv_heads": 2, "num_q_heads": 8, "batch": 32}, H200, 2),
        ({"num_kv_heads": 7, "num_q_heads": 28}, H200, 1),
        ({"batch": 4}, H200, 4),
        ({"batch": 4}, H100, 1),
        ({"batch": 2}, H200, 1),
        ({"most_keys": 4096}, H200, 4),
        ({"most_keys": 256, "batch": 200}, H200, 1),
        (POOL, H200, 4),
        (POOL | {"batch": 5}, H200, 1),
        (POOL | {"head_dim": 64, "batch": 16}, H200, 1),
        ({"cache_dtype": "int8"}, H200, 1),
        ({"dtype": "float32", "cache_dtype": "float32"}, H200, 1),
        ({"value_columns": (0, 80)}, H200, 1),
        ({"fwd_params": FwdParams(num_key_splits=8)}, H200, 1),
        ({"fwd_params": FwdParams(block_size_keys=64)}, H200, 4),
        ({"fwd_params": FwdParams(block_size_keys=128)}, H200, 2),
        ({"fwd_params": FwdParams(block_size_keys=256)}, H200, 1),
    ],
    ids=str,
)
def test_how_many(changes, device, heads):
    one = problem(**changes)
    wide, number = joined(one, Target("cuda", device))
    assert number == heads
    assert (wide.num_q_heads, wide.num_kv_heads * heads) == (one.num_q_heads, one.num_kv_heads)
    assert (wide.head_dim, wide.value_dim, wide.row_dim) == (heads * one.head_dim, heads * one.value_dim, heads * one.row_dim)


@pytest.mark.parametrize("device", [H100, H200])
@pytest.mark.parametrize("page_size", [None, 16, 64])
@pytest.mark.parametrize("head_dim", range(24, 256, 8))
def test_hints_that_are_resolved_join_as_many(head_dim, page_size, device):
    one = problem(head_dim=head_dim, seq_len=4096, batch=64, page_size=page_size, num_pages=page_size and 100000)
    target = Target("cuda", device)
    resolved = dataclasses.replace(one, fwd_params=resolve(one, target))
    assert joined(resolved, target)[1] == joined(one, target)[1]
    assert resolve(resolved, target) == resolved.fwd_params


def test_hints_that_do_not_fit():
    """The message has the sizes of the call, not those of the joined kv heads."""
    hints = FwdParams(block_size_keys=64, num_stages=4)
    with pytest.raises(ValueError, match=r"block_size_keys 64, .* for B 8, S 5001, heads 32:8, D 80, bfloat16; a program has"):
        resolve(problem(fwd_params=hints), Target("cuda", H200))


@pytest.fixture
def always(monkeypatch):
    """Joins kv heads of small problems, too, whatever the device, and of other head dimensions."""
    monkeypatch.setattr(_joined, "JOINED", _joined.FAST_JOINED | {48: 8})
    monkeypatch.setattr(_joined, "_pays", lambda problem, target, much: problem.value_columns is None and not problem.quantised)


CASES = {
    "80, four": Case("", 2, 70, 16, 4, 80, "bfloat16", ("ranges", (3, 66), (0, 9))),
    "80, two, of a group of 5": Case("", 2, 70, 10, 2, 80, "bfloat16", ("ranges", (3, 66), (0, 0)), logits_soft_cap=20.0),
    "96, tokens": Case("", 2, 70, 8, 4, 96, "float16", num_tokens=3, sliding_window=(30, 0), sinks=("query", 1)),
    "64, narrow values": Case("", 2, 70, 8, 4, 64, "bfloat16", value_dim=24, query_lengths=(3, 1), num_tokens=3),
    "48, in pages": Case("", 3, 70, 8, 8, 48, "bfloat16", ("ranges", (3, 66), (0, 9), (20, 70)), page_size=16),
    "112, in pages": Case("", 2, 64, 4, 4, 112, "bfloat16", page_size=7, sinks=("kv", 2)),
}


@pytest.mark.pallas_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers(always, case):
    """Output, log-sum-exp and gradients. Gradients have kv heads apart."""
    assert_right(functools.partial(ragged_decode_attention, backend=pallas_triton()), case.draw(poison=True))


def lowered(*arrays, **keywords):
    """The operations of StableHLO, and the kernels that are called, for a call that is lowered for cuda."""
    call = functools.partial(ragged_decode_attention, backend="pallas_triton", **keywords)
    text = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    operations = [line.split("= ")[1].split()[0].split("(")[0] for line in text.splitlines() if "= stablehlo" in line]
    return set(operations), re.findall(r'\bir = "(.*?)(?<!\\)"', text), text


ARRAYS = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((4, 32, 80), (4, 1000, 8, 80), (4, 1000, 8, 80))]


def test_nothing_is_moved(always):
    """The joined cache is the cache: around the two kernels, axes are joined and cut, and nothing is moved."""
    operations, kernels, text = lowered(*ARRAYS)
    assert operations == {"stablehlo.reshape", "stablehlo.broadcast_in_dim", "stablehlo.custom_call"}
    assert len(kernels) == 2
    assert "4x1000x2x320xbf16" in text


def test_the_second_kernel_is_that_of_kv_heads_apart(always, monkeypatch):
    """Partial results have the columns of one kv head each."""
    hints = FwdParams(num_key_splits=3)
    _, (first, second), _ = lowered(*ARRAYS, fwd_params=hints)
    monkeypatch.setattr(_joined, "_pays", lambda *_: False)
    jax.clear_caches()
    _, (first_apart, second_apart), _ = lowered(*ARRAYS, fwd_params=hints)
    assert first != first_apart
    assert second == second_apart
