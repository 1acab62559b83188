"""How the Mosaic GPU backend reads many query rows, pages, values of another width, and caches of 8 bits.

The kernels run in the interpreter, which also looks for races. test_mosaic_gpu.py has few query rows of a padded cache.
"""

import dataclasses
import functools
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support import array, assert_right, END_TO_END, expected, has_mosaic_gpu

import ejk_ragged_schedule
from ejk_ragged import Cache, explain, FwdParams, Problem, Queries, Target
from ejk_ragged._problem import Settings
from ejk_ragged.testing import Case, oracle, relative_error
from ejk_ragged_mosaic_gpu import _tuning, MosaicGpuBackend
from ejk_ragged_mosaic_gpu._tiles import Tiles
from ejk_ragged_mosaic_gpu._tuning import resolve, tiles


pytestmark = has_mosaic_gpu

# Two programs share six tiles: the first one has the first sequence and one tile of the last sequence. The second sequence is
# empty. The tiles of the first sequence hold one row before its range, and one row beyond.
RANGES = ("ranges", (57, 183), (7, 7), (1, 250))
# Both sequences are one piece if there is one program.
TWO = ("ranges", (3, 119), (60, 70))


def plan(case, programs, hints=None) -> Tiles:
    """The shape of the work of a case."""
    problem = explain(**case.draw(), backend=MosaicGpuBackend(interpret=True), fwd_params=hints).problem
    target = Target("cpu", types.SimpleNamespace(core_count=programs))
    return tiles(dataclasses.replace(problem, fwd_params=resolve(problem, target)), target)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (Case("", 2, 256, 40, 1, 64, "bfloat16", ("ranges", (0, 256), (0, 120)), sinks=("query", 1)), 2),
        (Case("", 2, 512, 4, 1, 128, "bfloat16", ("ranges", (0, 507), (0, 248)), cache_dtype="int8", scales="row"), 2),
        (Case("", 2, 384, 40, 1, 128, "bfloat16", ("ranges", (0, 376), (0, 120)), value_columns=(64, 128)), 1),
        (Case("", 2, 256, 40, 1, 64, "bfloat16", ("ranges", (0, 256), (0, 120)), cache_dtype="int8", scales="row"), 1),
    ],
    ids=["many", "in registers", "pair", "widened"],
)
def test_a_piece_without_rows(interpreted, monkeypatch, case, change):
    """The second program begins in the rounds that count for the change from the first sequence to the second. The last tile of a
    range is read further back, and ends where the range ends."""
    monkeypatch.setattr(ejk_ragged_schedule, "LEAST_ROUNDS", 0)
    schedule = plan(case, 2).schedule
    end = np.array(case.ranges()[1])
    stop = -(-end // schedule.stride) + change
    assert (schedule.change, schedule.deal) == (change, 1)
    assert stop[0] - change <= -(-stop.sum() // 2) < stop[0]
    assert_right(interpreted(programs=2), case.draw(poison=True), gradients=False)


# ---------------------------------------------------------------------------------------------------------------------------
# Many query rows


# Name: case, programs, and what the shape of the work is. Where hints ask for one stage, each tile takes the place of another.
MANY = {
    "one warpgroup": (
        Case("", 3, 256, 40, 1, 64, "bfloat16", RANGES, sinks=("query", 1)),
        2,
        {"warpgroups": 1, "writes_out": True, "token_rows": 40},
    ),
    "two warpgroups, with tokens of their own": (
        Case("", 3, 256, 24, 1, 64, "float16", RANGES, 0.2, (100, 0), 1.5, ("kv", 2), num_tokens=4, query_lengths=(4, 3, 2)),
        2,
        {"warpgroups": 2, "writes_out": True, "token_rows": 24},
    ),
    "three warpgroups, query rows end to end": (
        Case("", 2, 128, 17, 1, 64, "bfloat16", TWO, sinks=("query", 1), num_tokens=8),
        1,
        {"warpgroups": 3, "tokens": 1, "token_rows": 136, "stages": 1},
    ),
    "two warpgroups in turn": (
        Case("", 2, 256, 40, 1, 128, "bfloat16", ("ranges", (3, 250), (60, 70)), sinks=("query", 1), num_tokens=2),
        1,
        {"warpgroups": 2, "takes_turns": True},
    ),
    "rows of all sequences end to end": (
        Case("", 8, 101, 40, 1, 64, "bfloat16", END_TO_END, 0.2, (50, 0), num_tokens=2),
        2,
        {"warpgroups": 2, "end_to_end": True},
    ),
    "two blocks of two heads": (
        Case("", 2, 256, 64, 2, 64, "bfloat16", ("ranges", (1, 242), (60, 190)), -0.5, (150, 0), num_tokens=7),
        8,
        {"warpgroups": 2, "row_blocks": 2, "takes_turns": False},
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_many_query_rows(interpreted, name):
    case, programs, expected = MANY[name]
    hints = FwdParams(num_stages=expected.get("stages"))
    found = plan(case, programs, hints)
    assert {field: getattr(found, field) for field in expected} == expected
    assert found.many
    assert_right(interpreted(hints, programs), case.draw(poison=True), gradients=False)


def test_output_that_is_not_rounded(capfd):
    """Weights have two terms. With one term, the error is a few thousandths. Scales differ by page, which only a mapped call
    has."""
    rng = np.random.default_rng(0)
    make = lambda *shape, dtype="bfloat16": array(rng.standard_normal(shape), dtype)
    table, end = array(rng.permutation(12)[:10].reshape(2, 5), jnp.int32), jnp.array([[157], [9]], jnp.int32)
    scales = [array(rng.uniform(0.5, 1.5, (12, 1, 1)), jnp.float32) for _ in range(2)]
    cache = Cache(*(make(12, 32, 1, 64, dtype="float8_e4m3fn") for _ in range(2)), *scales, page_table=table)
    queries = Queries(make(2, 1, 40, 64), None, end)
    problem = Problem.of(queries, cache, Settings(softmax_scale=0.125, keeps_accum_dtype=True))
    backend = MosaicGpuBackend(interpret=True, detect_races=True, programs=2)
    target = Target("cpu", types.SimpleNamespace(core_count=2))
    out, lse = backend.forward(dataclasses.replace(problem, fwd_params=resolve(problem, target)), target, queries, cache)
    names = "key_scale", "value_scale"
    by_row = {name: np.broadcast_to(scale, (12, 1, 32)) for name, scale in zip(names, scales, strict=True)}
    exact: dict[str, Any] = {"page_table": np.asarray(table), "sequence_end": np.asarray(end[:, 0])} | by_row
    want, want_lse = oracle(np.asarray(queries.query[:, 0]), np.asarray(cache.key), np.asarray(cache.value), **exact)
    assert out.dtype == jnp.float32
    assert relative_error(out[:, 0], want) < 2e-5
    np.testing.assert_allclose(lse[:, 0], want_lse, rtol=1e-5)
    assert "RACE DETECTED" not in capfd.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------------
# Pages, and values of another width


def paged(heads, kv_heads, **fields):
    return Case("", 3, 120, heads, kv_heads, 64, "bfloat16", ("ranges", (3, 117), (7, 7), (60, 71)), **fields)


WIDTHS = {
    # All entries of the page table together have fewer rows than a tile.
    "pages of 8, few query rows": (
        Case("", 3, 24, 8, 2, 64, "bfloat16", ("ranges", (3, 21), (7, 7), (1, 9)), page_size=8, num_tokens=3),
        2,
    ),
    "pages of 24, few query rows, a wider value": (paged(8, 2, page_size=24, value_dim=128), 2),
    "pages of 8, many query rows, a wider value": (paged(40, 1, page_size=8, sliding_window=(70, 0), value_dim=128), 2),
    "pages of 64, few query rows, a narrower value": (
        Case("", 2, 128, 4, 1, 192, "bfloat16", TWO, page_size=64, value_dim=128),
        2,
    ),
    "a narrower value, in lines of 16 columns": (Case("", 2, 128, 6, 2, 80, "bfloat16", TWO, value_dim=48, num_tokens=2), 1),
    "lines of 32 columns, in pages": (Case("", 2, 128, 4, 1, 96, "float16", TWO, page_size=16, sliding_window=(70, 0)), 1),
    "rows of all sequences end to end, in lines of 16 columns": (
        Case("", 8, 101, 6, 2, 112, "bfloat16", END_TO_END, num_tokens=3, query_lengths=(3, 2, 1, 3, 3, 1, 2, 3)),
        1,
    ),
    "whole sequences end to end": (Case("", 8, 37, 4, 1, 64, "bfloat16"), 3),
    "a narrower value, in no tiles": (Case("", 2, 70, 4, 1, 80, "bfloat16", ("ranges", (3, 67), (60, 70)), value_dim=40), 2),
    # Two programs share each of four stretches. The last round ends within the tile of the first program.
    "many query rows, a narrower value": (
        Case("", 1, 640, 40, 1, 192, "bfloat16", ("ranges", (5, 5 * 128 - 100)), value_dim=128),
        8,
    ),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_pages_and_widths(interpreted, name):
    """Rows and entries that nobody sees are junk."""
    case, programs = WIDTHS[name]
    found = plan(case, programs)
    assert found.many == ("many" in name)
    assert found.direct == ("in no tiles" not in name)
    assert found.line == (32 if "16 columns" in name else 64 if "32 columns" in name else 128)
    assert found.end_to_end == ("end to end" in name)
    assert found.schedule.deal == (2 if programs == 8 else 1)
    assert_right(interpreted(programs=programs), case.draw(poison=True), gradients=False)


def test_pages_that_are_looked_up_without_waiting(interpreted, monkeypatch):
    """Where the memory is fast, and query rows are many, entries for small pages are used as late as where query rows are few.
    Entries may lie outside the pool."""
    case = paged(40, 1, page_size=8, sliding_window=(70, 0), value_dim=128)
    assert plan(case, 2).waits_for_pages
    monkeypatch.setattr(_tuning, "has_fast_memory", lambda _: True)
    assert not plan(case, 2).waits_for_pages
    assert plan(paged(40, 1, page_size=24), 2).waits_for_pages
    assert_right(interpreted(programs=2), case.draw(poison=True), gradients=False)


def test_bits_do_not_depend_on_the_place_in_the_batch():
    """Rows of all sequences are not copied end to end if `num_key_splits` is given."""
    case = Case("", 8, 101, 4, 1, 64, "bfloat16")
    assert plan(case, 1).end_to_end
    assert not plan(case, 1, FwdParams(num_key_splits=2)).end_to_end


def test_the_bits_of_a_sequence(interpreted):
    """With splits, the bits do not depend on the pages that hold the sequence's rows, nor on other sequences. Tiles begin at
    multiples of 16 rows. Entries outside the pool count as the first and the last page."""
    arguments = Case("", 2, 256, 40, 1, 64, "bfloat16", ("ranges", (16, 240), (0, 48)), sinks=("query", 1)).draw()
    call = functools.partial(interpreted(FwdParams(num_key_splits=3), programs=2), return_lse=True)
    assert_right(call, arguments, gradients=False)

    def in_pages(page_size, batch):
        pages = np.random.default_rng(page_size).permutation(2 * 256 // page_size)
        pools = {name: arguments[name].reshape(-1, page_size, 1, 64)[np.argsort(pages)] for name in ("key", "value")}
        lengths = {name: arguments[name][:batch] for name in ("query", "sequence_start", "sequence_end")}
        table = np.where(pages == 0, -3, np.where(pages == len(pages) - 1, 2**31 - 1, pages))
        return arguments | pools | lengths | {"page_table": table.reshape(2, -1)[:batch].astype(np.int32)}

    want = [x[0] for x in call(**arguments)]
    for other in (in_pages(16, 2), in_pages(128, 1)):
        for x, y in zip(want, call(**other), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y[0], np.float32))


# ---------------------------------------------------------------------------------------------------------------------------
# Values in the key's rows, and wide heads


# Name: case, programs, and what the shape of the work is. Hints ask for as many stages, and for as many keys. A program that is
# alone uses each place several times.
WIDE = {
    "few query rows, in pages": (
        Case(
            "",
            3,
            24,
            8,
            2,
            128,
            "bfloat16",
            ("ranges", (3, 21), (7, 7), (1, 9)),
            page_size=8,
            num_tokens=3,
            value_columns=(64, 128),
        ),
        2,
        {"pair": False, "many": False},
    ),
    "few query rows, a value behind the key": (
        Case("", 2, 128, 4, 1, 64, "float16", TWO, row_dim=256, value_columns=(64, 192)),
        2,
        {"pair": False, "tile_dim": 192},
    ),
    "a pair, with tokens of their own, in pages": (
        Case(
            *("", 3, 256, 32, 2, 192, "bfloat16", RANGES, -0.1, (100, 0), 2.0, ("query", 1)),
            num_tokens=5,
            page_size=16,
            value_columns=(64, 192),
        ),
        2,
        {"pair": True, "row_blocks": 2, "part_rows": 16},
    ),
    "a pair, sequences of one piece": (
        Case("", 2, 128, 40, 1, 128, "bfloat16", TWO, value_columns=(0, 64), sinks=("query", 1)),
        1,
        {"pair": True, "writes_out": True},
    ),
    "a pair, small halves": (
        Case("", 2, 256, 40, 1, 128, "bfloat16", ("ranges", (3, 250), (60, 70)), value_columns=(64, 128), num_tokens=2),
        1,
        {"pair": True, "stages": 2, "place_rows": 32},
    ),
    "a pair, small halves in pages": (
        Case("", 2, 256, 40, 1, 192, "float16", ("ranges", (3, 250), (60, 70)), page_size=16, value_columns=(64, 192)),
        1,
        {"pair": True, "stages": 2, "place_rows": 32, "part_rows": 16},
    ),
    "a pair, rows of all sequences end to end": (
        Case("", 8, 101, 40, 1, 128, "bfloat16", END_TO_END, value_columns=(64, 128), sinks=("query", 1)),
        1,
        {"pair": True, "end_to_end": True, "writes_out": True},
    ),
    "a pair, wide values of their own": (
        Case("", 2, 128, 40, 1, 64, "float16", TWO, value_dim=320),
        2,
        {"pair": True, "value_start": None, "writes_out": False, "stages": 2, "place_rows": 64},
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_rows(interpreted, name):
    """Rows and entries that nobody sees are junk."""
    case, programs, expected = WIDE[name]
    hints = FwdParams(num_stages=expected.get("stages"), block_size_keys=2 * expected.get("place_rows", 0) or None)
    found = plan(case, programs, hints)
    assert {field: getattr(found, field) for field in expected} == expected
    assert_right(interpreted(hints, programs), case.draw(poison=True), gradients=False)


@pytest.mark.parametrize(("batch", "step"), [(75, 4), (19, 8), (72, 1)])
def test_tables_of_sequences(interpreted, monkeypatch, batch, step):
    """A program's table has blocks of 64 sequences, the rest of eight or more, and the rest of fewer. An entry may be for several
    sequences, which only large batches have by themselves."""
    usual = _tuning._tiles
    monkeypatch.setattr(_tuning, "_tiles", lambda *args: dataclasses.replace(usual(*args), table_step=step))
    case = Case("", batch, 16, 2, 1, 64, "bfloat16", ("uniform", 0, 16))
    assert plan(case, 3).table_step == step
    assert_right(interpreted(programs=3), case.draw(poison=True), gradients=False)


@pytest.mark.parametrize(("tokens", "group"), [(2, 4), (3, 5), (5, 8), (5, 16)])
def test_sinks_of_each_token(capfd, tokens, group):
    """`vmap` makes tokens of mapped queries, and each token may have sinks of its own."""
    rng = np.random.default_rng(0)
    make = lambda *shape: array(rng.standard_normal(shape), jnp.bfloat16)
    key, value, end = make(2, 128, 2, 128), make(2, 128, 2, 128), array([[113], [40]], jnp.int32)
    sink = array(4 * rng.standard_normal((2, tokens, 2 * group)), jnp.float32)
    queries, cache = Queries(make(2, tokens, 2 * group, 128), None, end, sink), Cache(key, value)
    problem = Problem.of(queries, cache, Settings(softmax_scale=0.125))
    target = Target("cpu", types.SimpleNamespace(core_count=2))
    backend = MosaicGpuBackend(interpret=True, detect_races=True, programs=2)
    problem = dataclasses.replace(problem, fwd_params=resolve(problem, target))
    out, lse = backend.forward(problem, target, queries, cache)
    for token in range(tokens):
        for b in range(2):
            of_sequence = [np.asarray(x[b : b + 1]) for x in (queries.query[:, token], key, value)]
            want, want_lse = oracle(
                *of_sequence, sequence_end=np.asarray(end[b]), softmax_aux=np.asarray(sink[b, token])[:, None], softmax_scale=0.125
            )
            assert relative_error(out[b : b + 1, token], want) < 2.5e-3
            np.testing.assert_allclose(lse[b : b + 1, token], want_lse, rtol=1e-4, atol=1e-4)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_a_pair_with_two_terms_per_weight(capfd):
    """An output that is not rounded. With one term, the error is a few thousandths."""
    rng = np.random.default_rng(0)
    make = lambda *shape: array(rng.standard_normal(shape), jnp.bfloat16)
    key, end = make(2, 128, 1, 128), array([[113], [40]], jnp.int32)
    queries, cache = Queries(make(2, 1, 40, 128), None, end), Cache(key, None)
    settings = Settings(softmax_scale=0.125, keeps_accum_dtype=True, value_columns=(64, 128))
    problem, target = Problem.of(queries, cache, settings), Target("cpu", types.SimpleNamespace(core_count=2))
    backend = MosaicGpuBackend(interpret=True, detect_races=True, programs=2)
    hints = resolve(problem, target)
    assert tiles(dataclasses.replace(problem, fwd_params=hints), target).terms == 2
    out, lse = backend.forward(dataclasses.replace(problem, fwd_params=hints), target, queries, cache)
    key = np.asarray(key)
    want, want_lse = oracle(
        np.asarray(queries.query[:, 0]), key, key[..., 64:], sequence_end=np.asarray(end[:, 0]), softmax_scale=0.125
    )
    assert out.dtype == jnp.float32
    assert relative_error(out[:, 0], want) < 2e-5
    np.testing.assert_allclose(lse[:, 0], want_lse, rtol=1e-5)
    assert "RACE DETECTED" not in capfd.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------------
# Caches of 8 bits


# Name: case, programs and hints.
QUANTISED = {
    "int8, one scale, in pages": (
        Case("", 3, 256, 4, 1, 64, "bfloat16", RANGES, cache_dtype="int8", scales="number", page_size=64, sinks=("query", 1)),
        2,
        None,
    ),
    "int8, one scale, many query rows, in pages": (
        Case("", 3, 256, 40, 1, 64, "bfloat16", RANGES, cache_dtype="int8", scales="number", page_size=64, sinks=("query", 1)),
        2,
        None,
    ),
    # Copies fill lines with zeros, and lay the rows of all sequences end to end, with their scales.
    "int8, a scale per row, lines filled in part, end to end": (
        Case("", 8, 101, 6, 2, 80, "bfloat16", END_TO_END, value_dim=112, cache_dtype="int8", scales="row", num_tokens=2),
        2,
        None,
    ),
    "int8, a scale per row, wide rows of keys and values, end to end": (
        Case("", 8, 101, 4, 1, 320, "bfloat16", END_TO_END, value_columns=(0, 256), cache_dtype="int8", scales="row"),
        2,
        None,
    ),
    "float8_e4m3fn, a scale per row, lines filled in part, many query rows": (
        Case("", 8, 101, 40, 2, 96, "bfloat16", END_TO_END, value_dim=48, cache_dtype="float8_e4m3fn", scales="row"),
        2,
        None,
    ),
    # One program works on more tiles than its rings have places.
    "float8_e4m3fn, a scale per row, in pages": (
        Case("", 3, 256, 40, 1, 64, "bfloat16", RANGES, cache_dtype="float8_e4m3fn", scales="row", page_size=32),
        1,
        FwdParams(num_stages=2),
    ),
    # Few query rows, of tiles that are widened in registers. One program has more tiles than places, and a sequence of one tile.
    "int8, a scale per row, few query rows": (
        Case(
            *("", 3, 640, 20, 2, 128, "bfloat16", ("ranges", (0, 640), (3, 40), (130, 500)), None, (300, 0)),
            cache_dtype="int8",
            scales="row",
            num_tokens=2,
            sinks=("query", 1),
        ),
        2,
        FwdParams(num_stages=2),
    ),
    "float8_e4m3fn, a scale per row, 8 query rows per token, in pages": (
        Case(
            *("", 3, 256, 8, 1, 256, "bfloat16", RANGES),
            cache_dtype="float8_e4m3fn",
            scales="row",
            page_size=32,
            num_tokens=2,
            value_dim=128,
        ),
        1,
        None,
    ),
    "float8_e5m2, a scale per head, two blocks of few query rows, tiles of 128 keys": (
        Case(
            *("", 2, 512, 24, 2, 128, "bfloat16", TWO),
            logits_soft_cap=20.0,
            cache_dtype="float8_e5m2",
            scales="head",
            value_dim=256,
        ),
        4,
        FwdParams(block_size_heads=8, block_size_keys=128),
    ),
    "float8_e5m2, a scale per head, two blocks of two warpgroups and of two heads": (
        Case(
            *("", 2, 128, 80, 2, 64, "bfloat16", TWO, None, (70, 0), 20.0),
            num_tokens=5,
            cache_dtype="float8_e5m2",
            scales="head",
            value_dim=128,
        ),
        4,
        None,
    ),
}


@pytest.mark.parametrize(
    ("dims", "heads", "widened_in_registers", "laid_out"),
    [
        ((80, 112), 4, True, (128, 128)),
        ((64, 64), 4, True, (128, 128)),
        ((256, 48), 4, True, (256, 128)),
        ((64, 192), 4, False, (64, 192)),
        ((48, 80), 64, False, (64, 128)),
    ],
)
def test_lines_of_8_bits(dims, heads, widened_in_registers, laid_out):
    """A row of 8 bits is copied as a whole line, with zeros in the rest. Lines are longer where that lets registers widen them."""
    found = plan(Case("", 2, 256, heads, 1, dims[0], "bfloat16", value_dim=dims[1], cache_dtype="int8", scales="row"), 2)
    assert found.in_registers == widened_in_registers
    assert (found.block_dim, found.value_dim) == laid_out


def test_rows_of_keys_and_values_fill_no_lines():
    case = Case("", 2, 256, 4, 1, 64, "bfloat16", value_columns=(0, 64), cache_dtype="int8", scales="row")
    assert plan(case, 2).tile_dim == 64


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised(interpreted, name):
    """Rows, scales and entries that nobody sees are junk."""
    case, programs, hints = QUANTISED[name]
    assert_right(interpreted(hints, programs=programs), case.draw(poison=True), gradients=False)


@pytest.mark.parametrize("shapes", [((8, 1, 101), (1, 2, 101)), ((1, 1, 101), (8, 2, 101)), ((8, 2, 1), (1, 1, 101))], ids=str)
def test_shared_scales_end_to_end(capfd, shapes):
    """Scales by row that sequences or kv heads share, where the rows of all sequences lie end to end. Only `Backend.forward` takes
    such scales."""
    rng = np.random.default_rng(0)
    scales = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in zip(("key", "value"), shapes, strict=True)}
    case = Case("", 8, 101, 4, 2, 128, "bfloat16", END_TO_END, cache_dtype="int8", scales="row")
    arguments = case.draw()
    arguments |= {f"{name}_scale": array(np.broadcast_to(scale, (8, 2, 101))) for name, scale in scales.items()}
    shared = {f"{name}_scale": array(scale) for name, scale in scales.items()}
    start, end = (arguments[f"sequence_{name}"][:, None] for name in ("start", "end"))
    queries = Queries(arguments["query"][:, None], start, end)
    cache = Cache(arguments["key"], arguments["value"], **shared)
    problem = Problem.of(queries, cache, Settings(softmax_scale=128**-0.5))
    backend = MosaicGpuBackend(interpret=True, detect_races=True, programs=2)
    target = Target("cpu", types.SimpleNamespace(core_count=2))
    problem = dataclasses.replace(problem, fwd_params=resolve(problem, target))
    assert tiles(problem, target).end_to_end
    out, _ = backend.forward(problem, target, queries, cache)
    assert relative_error(out[:, 0], expected(arguments)) < 2.5e-3
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_ranges_end_to_end_at_the_ends_of_their_type(interpreted):
    """Ranges count from up to 7 rows before their sequence, and do not wrap."""
    arguments = Case("", 8, 101, 4, 1, 64, "bfloat16").draw()
    top, least = np.iinfo(np.int32).max, np.iinfo(np.int32).min
    starts, ends = [top, top, top - 3, least, 0, 200, 101, least], [top, top, top, least, least, top, 90, 50]
    arguments |= {"sequence_start": array(starts, jnp.int32), "sequence_end": array(ends, jnp.int32)}
    assert_right(interpreted(programs=2), arguments, gradients=False)


def test_a_large_tile_end_to_end(interpreted):
    """The scales of such a tile take two copies, because a copy begins at a multiple of 16 bytes."""
    case = Case("", 8, 301, 4, 1, 64, "bfloat16", cache_dtype="int8", scales="row")
    hints = FwdParams(block_size_keys=256, num_stages=2)
    assert len(plan(case, 2, hints).scale_copies) == 2
    assert_right(interpreted(hints, programs=2), case.draw(), gradients=False)


APART = ("ranges", (3, 66), (0, 90))
WIDE_QUANTISED = {
    "320": Case("", 2, 96, 4, 1, 320, "bfloat16", APART, cache_dtype="float8_e4m3fn", scales="row"),
    "512, two blocks of query rows": Case(
        "", 2, 96, 20, 1, 512, "bfloat16", APART, cache_dtype="int8", scales="row", num_tokens=1, sinks=("query", 1)
    ),
    "keys of 192, values of 320, in pages": Case(
        "", 2, 128, 2, 1, 192, "bfloat16", APART, cache_dtype="int8", scales="head", value_dim=320, page_size=64
    ),
    "keys of 384, values of 80": Case("", 2, 96, 8, 2, 384, "bfloat16", APART, cache_dtype="int8", scales="row", value_dim=80),
}


@pytest.mark.parametrize("name", WIDE_QUANTISED)
def test_more_than_256_dimensions_in_8_bits(interpreted, name):
    """Such dimensions are widened in parts. The last line of a row of 320 is filled in part. Gradients, which another backend has,
    take an output that is not rounded."""
    assert_right(interpreted(programs=3), WIDE_QUANTISED[name].draw(poison=True))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "seq_len"),
    [
        ("int8", 64, 32, 256),
        ("float8_e4m3fn", 64, 32, 256),
        ("float8_e5m2", 64, 32, 256),
        ("int8", 128, 4, 512),
        ("float8_e5m2", 128, 4, 512),
    ],
)
def test_value_scales_of_any_size(interpreted, dtype, head_dim, heads, seq_len):
    """Values times scales are in units of the largest scale so far, so that they stay in the range of float16, and the unit
    changes from tile to tile, also for a warpgroup that has every other tile of 128 rows. Sequence 0 has scales that grow, and
    sequence 1 has scales that shrink. All scales of sequence 2 are 0, and those of sequence 3 are the smallest of float32. Some
    values are the largest of the dtype."""
    case = Case("", 4, seq_len, heads, 1, head_dim, "bfloat16", num_tokens=2, cache_dtype=dtype, scales="row")
    arguments = case.draw()
    limits = jnp.iinfo(dtype) if dtype == "int8" else jnp.finfo(dtype)
    value = np.array(arguments["value"])
    value[:, ::7, :, ::2], value[:, ::7, :, 1::2] = limits.min, limits.max
    exponents = np.linspace(-30, 33, seq_len)
    scale = np.stack([10.0**exponents, 10.0 ** exponents[::-1], 0 * exponents, 1e-38 + 0 * exponents])[:, None]
    arguments |= {"value": array(value), "value_scale": array(scale, jnp.float32)}
    out = np.asarray(interpreted(programs=2)(**arguments), np.float64)
    want = expected(arguments)
    for i in (0, 1):
        assert relative_error(out[i], want[i]) < 2.5e-3
    assert np.abs(out[2]).max() == 0
    assert np.isfinite(out[3]).all()


@pytest.mark.parametrize(("heads", "head_dim"), [(64, 64), (8, 128)])
def test_a_unit_that_grows_beyond_float32(interpreted, heads, head_dim):
    """The first unit of values is 2 ** 128 times the least unit, more than a float32 holds."""
    arguments = Case("", 1, 128, heads, 1, head_dim, "bfloat16", cache_dtype="int8", scales="row").draw()
    arguments["value_scale"] = jnp.full((1, 1, 128), 2.0**28, jnp.float32)
    assert relative_error(np.asarray(interpreted()(**arguments), np.float64), expected(arguments)) < 2.5e-3


@pytest.mark.parametrize(("heads", "head_dim"), [(64, 64), (8, 128)])
def test_weights_next_to_nothing(interpreted, heads, head_dim):
    """The first row has nearly all of the weight, and its value is 0. So the output is what rows with weights around 1e-7 add. In
    float16 such a weight has one or two bits."""
    case = Case("", 1, 256, heads, 1, head_dim, "bfloat16", cache_dtype="int8", scales="row")
    arguments = case.draw()
    query = np.zeros((1, heads, head_dim), np.float32)
    query[..., 0] = 8
    key, value = np.array(arguments["key"]), np.array(arguments["value"])
    key[..., 0] = np.linspace(0, 20, 256)[:, None]
    key[:, 0, :, 0], value[:, 0] = 127, 0
    scale = jnp.full((1, 1, 256), 1 / 8, jnp.float32)
    arguments |= {"query": array(query, "bfloat16"), "key": array(key), "value": array(value), "key_scale": scale}
    arguments["softmax_scale"] = 16 / 127
    want = expected(arguments)
    assert relative_error(np.asarray(interpreted()(**arguments)), want) < 2.5e-3


# Query heads, head dimension, and columns of the value.
IN_COLUMNS, AS_ROWS, BY_A_PAIR = (8, 128, None), (40, 64, None), (40, 128, (64, 128))


@pytest.mark.parametrize(
    ("cache_dtype", "dtype", "rise", "form"),
    [
        ("int8", "bfloat16", 1, IN_COLUMNS),
        ("int8", "bfloat16", 5, IN_COLUMNS),
        (None, "float16", 5, IN_COLUMNS),
        ("int8", "bfloat16", 1, AS_ROWS),
        ("int8", "bfloat16", 5, AS_ROWS),
        (None, "float16", 5, AS_ROWS),
        (None, "bfloat16", 5, BY_A_PAIR),
    ],
)
def test_logits_that_rise(interpreted, cache_dtype, dtype, rise, form):
    """Logits rise by a factor of 2 to the power of `rise` in the weights of 64 rows. So a tile's weights are above the reference of
    weights, and after some tiles there is another reference. All later weights together would leave the range of float16. The scale
    of the softmax is below 1 or above."""
    heads, dim, columns = form
    kind = {"cache_dtype": cache_dtype, "scales": cache_dtype and "row", "value_columns": columns}
    arguments = Case("", 1, 1024, heads, 1, dim, dtype, **kind).draw()
    query, key = np.zeros((1, heads, dim), np.float32), np.array(arguments["key"])
    query[..., 0] = np.arange(1, heads + 1) / heads
    key[..., 0] = np.linspace(-127, 127, 1024)[:, None]
    if cache_dtype:
        arguments["key_scale"] = jnp.ones((1, 1, 1024), jnp.float32)
    small = 2.0**-6 if rise > 1 else 1
    scale = rise * 16 / 254 / np.log2(np.e) / small
    arguments |= {"query": array(query * small, dtype), "key": array(key), "softmax_scale": scale}
    assert relative_error(np.asarray(interpreted(programs=1)(**arguments)), expected(arguments)) < 2.5e-3


@pytest.mark.parametrize(
    ("cache_dtype", "form"),
    [("int8", IN_COLUMNS), (None, IN_COLUMNS), ("int8", AS_ROWS), (None, AS_ROWS), (None, BY_A_PAIR)],
)
def test_query_rows_do_not_depend_on_each_other(interpreted, cache_dtype, form):
    """The logits of one query row rise quickly or not at all. The output of the others has the same bits."""
    heads, dim, columns = form
    kind = {"cache_dtype": cache_dtype, "scales": cache_dtype and "row", "value_columns": columns}
    arguments = Case("", 1, 512, heads, 1, dim, "bfloat16", **kind).draw()
    query, key = np.array(arguments["query"]), np.array(arguments["key"])
    key[..., 0] = np.linspace(-127, 127, 512)[:, None]
    query[..., 0], query[:, 3, 0] = 0, 0.5
    call = lambda query: np.asarray(interpreted(programs=1)(**arguments | {"query": array(query), "key": array(key)}), np.float32)
    out = call(query)
    query[:, 3, 0] = 0
    other = call(query)
    assert not np.array_equal(out[:, 3], other[:, 3])
    np.testing.assert_array_equal(np.delete(out, 3, axis=1), np.delete(other, 3, axis=1))


def test_two_terms_of_weights_times_scales(interpreted):
    """With gradients the output is not rounded, and weights times scales are the sum of two numbers of 16 bits."""
    case = Case("", 2, 256, 8, 1, 128, "bfloat16", TWO, cache_dtype="int8", scales="row")
    assert_right(interpreted(), case.draw(poison=True))
