"""The schedule of the GPU kernels: which tiles of the live ranges each program works through, and where its results go."""

import functools
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from ejk_ragged import FwdParams, Target
from ejk_ragged_pallas_triton._blocks import line_of, store_pieces
from ejk_ragged_schedule import Schedule
from ejk_ragged_schedule.devices import has_fast_memory


BATCH, SEQ_LEN = 5, 200  # the sizes of most tests


@functools.cache
def walk(schedule):
    """A function of start and end. Every program counts its tiles and their rows, and notes the slots in which it ends a piece."""

    def kernel(start_ref, end_ref, tiles_ref, rows_ref, slots_ref, pieces_ref):
        program = pl.program_id(0)

        @pl.when(program == 0)
        def _():
            rows_ref[...] = jnp.zeros_like(rows_ref)
            slots_ref[...] = jnp.full_like(slots_ref, -1)

        line = line_of(schedule, program, start_ref, end_ref)
        num_tiles, at = schedule.tiles(line)
        tiles_ref[program] = num_tiles

        def tile(i, _):
            b, row, stop = at(i)
            index = jnp.arange(SEQ_LEN, dtype=jnp.int32)
            mine = (index >= row) & (index < jnp.minimum(row + schedule.block_keys, stop))
            rows_ref[b, :] = rows_ref[b, :] + mine.astype(jnp.int32)

            @pl.when(schedule.is_last(program, row, stop))
            def _():
                slot = schedule.slot(program, b)
                slots_ref[slot] = jnp.where(slots_ref[slot] == -1, b, -2)  # -2: two pieces in one slot

        jax.lax.fori_loop(0, num_tiles, tile, None)
        store_pieces(schedule, line, pieces_ref)

    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    shapes = [int32((schedule.programs,)), int32((schedule.batch, SEQ_LEN)), int32((schedule.slots,)), int32((2, schedule.batch))]
    return jax.jit(pl.pallas_call(kernel, grid=(schedule.programs,), out_shape=shapes, interpret=True))


@hypothesis.given(
    by_sequence=st.booleans(),
    workers=st.sampled_from([1, 3, 8]),
    deal=st.sampled_from([1, 2, 4]),
    ranges=st.lists(st.tuples(st.integers(0, SEQ_LEN), st.integers(0, SEQ_LEN)), min_size=BATCH, max_size=BATCH),
)
@hypothesis.example(by_sequence=False, workers=8, deal=1, ranges=[(0, 0)] * BATCH)
@hypothesis.example(by_sequence=False, workers=8, deal=1, ranges=[(0, SEQ_LEN)] + [(7, 8)] * (BATCH - 1))
@hypothesis.example(by_sequence=False, workers=8, deal=4, ranges=[(0, SEQ_LEN)] + [(7, 8)] * (BATCH - 1))
@hypothesis.example(by_sequence=False, workers=3, deal=1, ranges=[(0, SEQ_LEN)] * BATCH)
def test_schedule_covers_every_live_row_once(by_sequence, workers, deal, ranges):
    deal = 1 if by_sequence else deal
    covers_every_live_row_once(Schedule(BATCH, SEQ_LEN, workers * deal, 32, by_sequence, deal=deal), *np.array(ranges, np.int32).T)


@pytest.mark.parametrize("batch", [32, 33, 300])  # one strip, two strips, and three longer strips
def test_many_sequences(batch):
    ends = np.random.default_rng(batch).integers(0, SEQ_LEN, (2, batch), np.int32)
    covers_every_live_row_once(Schedule(batch, SEQ_LEN, 6, 32, by_sequence=False, deal=2), *ends)


def covers_every_live_row_once(schedule, start, end):
    tiles, rows, slots, (first, count) = map(np.asarray, walk(schedule)(start, end))
    index = np.arange(SEQ_LEN)
    np.testing.assert_array_equal(rows, (index >= start[:, None]) & (index < end[:, None]))
    # Each piece fills the slot in which it is looked for, and no other slot is filled.
    expected = np.full_like(slots, -1)
    for b in range(schedule.batch):
        assert np.all(expected[first[b] : first[b] + count[b]] == -1)
        expected[first[b] : first[b] + count[b]] = b
    np.testing.assert_array_equal(slots, expected)
    # No tile is cut in two, and no program has more than its share of the tiles.
    rounds = -(-np.maximum(end - start, 0) // schedule.stride)
    rounds = rounds if schedule.by_sequence else rounds.sum(keepdims=True)
    shares = -(-rounds // (schedule.workers // schedule.deal))
    tiles = tiles.reshape(len(rounds), -1)
    assert np.all(tiles.sum(axis=1) == rounds * schedule.deal)
    assert np.all(tiles.max(axis=1) == shares)


@pytest.mark.parametrize(
    ("batch", "stretches", "deal", "shortest", "cut"),
    [
        (32, 33, 1, SEQ_LEN, False),  # one worker of 33 is idle
        (32, 33, 1, SEQ_LEN - 7, False),  # which is as many tiles
        (32, 33, 1, SEQ_LEN - 8, True),
        (32, 11, 1, SEQ_LEN, False),  # three sequences per stretch, and two on the last one
        (32, 33, 2, SEQ_LEN, False),
        (32, 34, 1, SEQ_LEN, False),  # two workers of 34
        (32, 35, 1, SEQ_LEN, True),  # three idle workers are too many
        (32, 32, 1, SEQ_LEN, False),
    ],
)
def test_full_sequences_are_not_cut(batch, stretches, deal, shortest, cut):
    """Where few workers are idle then, each worker has whole sequences."""
    end = np.full(batch, SEQ_LEN, np.int32)
    end[7] = shortest
    schedule = Schedule(batch, SEQ_LEN, stretches * deal, 8, by_sequence=False, deal=deal)
    tiles, rows, slots, (_, count) = map(np.asarray, walk(schedule)(np.zeros_like(end), end))
    np.testing.assert_array_equal(rows, np.arange(SEQ_LEN) < end[:, None])
    assert (count.max() > deal) == cut
    assert np.all(np.bincount(slots[slots >= 0]) == count)
    assert tiles.max() == (-(-batch // stretches) * -(-SEQ_LEN // schedule.stride) if not cut else -(-tiles.sum() // stretches))


def test_a_long_sequence_is_shared_out():
    """The first sequence has 13 tiles of 16 keys, and four others have fewer. Three programs do the first sequence. The last of
    the three begins with the others."""
    start, end = np.zeros(BATCH, np.int32), np.array([SEQ_LEN, 3, 1, 2, 5], np.int32)
    schedule = Schedule(BATCH, SEQ_LEN, 4, 16, by_sequence=False)
    *_, (_, count) = map(np.asarray, walk(schedule)(start, end))
    assert count.tolist() == [3, 1, 1, 1, 1]


def pieces_of(schedule, start, end):
    """The pieces of each worker: sequence, first row, number of tiles, and number of rounds on the line."""
    of_workers = []
    for worker in range(schedule.workers):
        (line,) = schedule.line(jnp.int32(worker), [(jnp.arange(schedule.batch), jnp.array(start), jnp.array(end))])
        first, count = map(int, schedule.stretch(line.worker, line.total))
        origin, piece_end = map(np.asarray, schedule.piece(line))
        begun, stop = np.maximum(line.stop - line.rounds, first), np.minimum(line.stop, first + count)
        rows = origin + begun * schedule.stride
        tiles = -(-np.maximum(piece_end - rows, 0) // schedule.stride)
        of_workers.append([(b, rows[b], tiles[b], stop[b] - begun[b]) for b in np.flatnonzero(stop > begun)])
    return of_workers


@hypothesis.given(
    deal=st.sampled_from([1, 2]),
    change=st.sampled_from([0, 1, 3]),
    ends=st.lists(st.integers(0, SEQ_LEN), min_size=BATCH, max_size=BATCH),
)
@hypothesis.example(deal=1, change=3, ends=[0, 20, 0, 30, 0])
def test_changes_of_sequence_take_rounds(deal, change, ends):
    """Every row is in one tile, in whatever rounds, and each sequence has `change` rounds more than its rows take."""
    schedule = Schedule(BATCH, SEQ_LEN, 4 * deal, 16, by_sequence=False, deal=deal, change=change)
    seen, rounds = np.zeros((BATCH, SEQ_LEN), int), np.zeros(BATCH, int)
    for pieces in pieces_of(schedule, [0] * BATCH, ends):
        for b, row, tiles, of_piece in pieces:
            rounds[b] += of_piece
            for tile in range(tiles):
                seen[b, row + tile * schedule.stride : min(row + tile * schedule.stride + 16, ends[b])] += 1
    np.testing.assert_array_equal(seen, np.arange(SEQ_LEN) < np.array(ends)[:, None])
    expected = [-(-end // schedule.stride) + change if end else 0 for end in ends]
    np.testing.assert_array_equal(rounds, np.array(expected) * deal)


def test_who_changes_often_has_fewer_tiles():
    """A long sequence of 13 tiles, and four short ones of one tile each: 17 tiles and, with changes, 22 rounds."""

    def tiles(change):
        schedule = Schedule(BATCH, SEQ_LEN, 2, 16, by_sequence=False, change=change)
        return [sum(tiles for _, _, tiles, _ in pieces) for pieces in pieces_of(schedule, [0] * BATCH, [SEQ_LEN, 3, 1, 2, 5])]

    assert tiles(0) == [9, 8]
    assert tiles(1) == [11, 6]


@pytest.mark.parametrize("change", [0, 2])
def test_full_sequences_are_not_cut_by_changes(change):
    schedule = Schedule(32, SEQ_LEN, 34, 8, by_sequence=False, change=change)
    pieces = pieces_of(schedule, [0] * 32, [SEQ_LEN] * 32)
    assert [[(b, tiles) for b, _, tiles, _ in of_worker] for of_worker in pieces] == [[(b, 25)] for b in range(32)] + [[], []]


@pytest.mark.parametrize(
    ("batch", "seq_len", "splits", "change"),
    [(1, 1 << 20, None, 0), (32, 1024, None, 2), (32, 992, None, 0), (32, 1024, 4, 0)],
)
def test_who_has_changes(batch, seq_len, splits, change):
    """A single sequence has no changes. Nor has a cache of few rounds, or a sequence with a line of its own."""
    problem = types.SimpleNamespace(batch=batch, seq_len=seq_len, fwd_params=FwdParams(num_key_splits=splits))
    assert Schedule.of(problem, 64, 16, change=2).change == change


def test_a_line_longer_than_int32():
    """The line has 5 * 2**30 keys. Each of eight programs finds the sequence and the key at which its stretch begins."""
    rows, workers = 2**30, 8
    schedule = Schedule(BATCH, rows, workers, 32, by_sequence=False)

    def kernel(first_ref):
        program = pl.program_id(0)
        _, at = schedule.tiles(line_of(schedule, program, None, None))
        first_ref[program, 0], first_ref[program, 1], _ = at(0)

    shape = jax.ShapeDtypeStruct((workers, 2), jnp.int32)
    found = pl.pallas_call(kernel, grid=(workers,), out_shape=shape, interpret=True)()
    assert found.tolist() == [list(divmod(BATCH * rows // workers * program, rows)) for program in range(workers)]


@pytest.mark.parametrize(
    ("name", "fast"),
    [("NVIDIA H200", True), ("NVIDIA H200 NVL", True), ("NVIDIA H100", False), ("NVIDIA GH200 480GB", False), ("cpu", False)],
)
def test_which_memory_is_fast(name, fast):
    assert has_fast_memory(Target("cuda", types.SimpleNamespace(device_kind=name))) is fast
    assert not has_fast_memory(Target("cuda"))
