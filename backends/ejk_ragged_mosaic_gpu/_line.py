"""Which program works on which rows. From the lengths, a program finds its pieces of the live ranges, and the slots of results.

Every program sums up the rounds of all sequences, in a table in shared memory, and looks its pieces up in the table. A table in
registers would be spread over the threads, and threads exchange values through shared memory anyway.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk_ragged_schedule import cdiv, Line

from ._jax import OF_COLUMNS, plgpu, TILE, when
from ._tiles import begins_at, BLOCK_SEQUENCES, Tiles


class Piece(NamedTuple):
    """A program's part of a sequence.

    Attributes:
        sequence: number of the sequence.
        start, end: the sequence's range.
        row: the first row of the first tile.
        num_tiles: number of tiles. 0 if the other workers on the stretch have all rows.
        siblings: number of pieces of the sequence, this one included.
        number: number of pieces that the program did before.
        tiles_before: number of tiles that the program did before.
    """

    sequence: Any
    start: Any
    end: Any
    row: Any
    num_tiles: Any
    siblings: Any
    number: Any
    tiles_before: Any


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The live ranges, on one line or on a line each.

    Attributes:
        plan: the static shape of the work.
        lengths: (start, end), refs of int32 [B], or None.
        stops: ref of int32, in shared memory while it is made: where on the line the last of each `step` sequences stops. None if
            each sequence is on a line of its own.
        step: sequences per entry.
    """

    plan: Tiles
    lengths: Any
    stops: Any
    step: int = 1

    def make_table(self):
        """Fills `stops`. Each program fills its own."""
        if self.stops is None:
            return
        batch = self.plan.schedule.batch
        in_blocks = batch - batch % 8
        whole, rest = divmod(in_blocks, BLOCK_SEQUENCES)
        first = lambda i: pl.multiple_of(i * BLOCK_SEQUENCES, 8)
        total = lax.fori_loop(0, whole, lambda i, total: self._sum_up(first(i), BLOCK_SEQUENCES, total), jnp.int32(0))
        if rest:  # a whole block again, if there is one, which ends with the rest
            plgpu.commit_smem()  # all threads have read what is written again
            begin = max(in_blocks - BLOCK_SEQUENCES, 0)
            total = self._sum_up(begin, in_blocks - begin, self.stops[begin // self.step - 1] if begin else total)
        few = [self._rounds(*self._range(b)) for b in range(in_blocks, batch)]  # fewer than a copy to registers takes
        for b, rounds in enumerate(few, in_blocks):
            total += rounds
            if (b + 1) % self.step == 0 or b + 1 == batch:
                self.stops[b // self.step] = total
        plgpu.commit_smem()

    def _sum_up(self, first, count, total):
        number = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=OF_COLUMNS) + first
        lengths = lambda ref: plgpu.load(ref.at[pl.ds(first, count)], layout=OF_COLUMNS, optimized=False)
        start, end = (None if ref is None else lengths(ref) for ref in self.lengths)
        rounds = self._rounds(*self._clipped(number, start, end))
        square = BLOCK_SEQUENCES, rounds.size
        this, other = (plgpu.broadcasted_iota(jnp.int32, square, axis, layout=TILE) for axis in (0, 1))
        rounds = jnp.where(other < (this + 1) * self.step, lax.broadcast_in_dim(rounds, square, [1]), 0)
        entry = lambda b: b if self.step == 1 else b >> (self.step.bit_length() - 1)
        self.stops[pl.ds(entry(first), BLOCK_SEQUENCES)] = jnp.sum(rounds, axis=1, dtype=jnp.int32) + total
        plgpu.commit_smem()
        return self.stops[entry(first + count) - 1]

    def pieces(self, program, work):
        """Calls `work` with one piece of the program after another."""
        schedule = self.plan.schedule
        worker = lax.rem(program, schedule.workers)
        alone = lax.div(program, schedule.workers)
        total = self._total(alone)
        first, count = schedule.stretch(worker, total)
        b, before = (alone, jnp.int32(0)) if self.stops is None else self._find(jnp.minimum(first, total - 1))

        def piece(carry):
            b, before, number, tiles = carry
            start, end = self._range(b)
            stop = before + self._rounds(start, end)
            begun = jnp.maximum(before, first)
            line = Line(worker, b, self._first_row(start, end), end, stop - before, stop, total)
            origin, piece_end = schedule.piece(line)
            row = origin + begun * schedule.stride
            here = stop > begun
            num_tiles = jnp.where(here, cdiv(jnp.maximum(piece_end - row, 0), schedule.stride), 0)
            when(here)(lambda: work(Piece(b, start, end, row, num_tiles, schedule.pieces(line)[1], number, tiles)))
            return b + 1, stop, number + jnp.where(here, 1, 0), tiles + num_tiles

        before = jnp.where(count > 0, before, first)
        lax.while_loop(lambda carry: carry[1] < first + count, piece, (b, before, jnp.int32(0), jnp.int32(0)))

    def slots(self, b):
        """The first slot of a sequence's results, and how many from there on are its pieces."""
        zero = jnp.zeros_like(b)
        before, stop = self._before(b), self._stop(b)
        # Worker and range matter where a line is cut, and not where pieces are counted.
        return self.plan.schedule.pieces(Line(zero, b, zero, zero, stop - before, stop, self._total(b)))

    def _find(self, place):
        """The sequence at a place on the line, and where the sequence begins on the line."""
        number, last = jnp.int32(0), self._last  # entries of sequences that stop at or before the place; the last one does not
        for digit in reversed(range(-(-last.bit_length() // 4))):  # by which few loads wait for each other
            step = 16**digit
            ends = [self.stops[jnp.minimum(number + i * step - 1, last)] for i in range(1, min(last // step, 15) + 1)]
            # Not `astype`: JAX takes 7 ms to lower a conversion from bool.
            number += step * sum(jnp.where(end <= place, 1, 0) for end in ends)
        b, before = number * self.step, self._stop_before(number)
        stop = before
        for rounds in self._rounds_of(number):
            stop += rounds
            b += jnp.where(stop <= place, 1, 0)
            before = jnp.where(stop <= place, stop, before)
        return b, before

    @property
    def _last(self) -> int:
        """The number of the last entry."""
        return (self.plan.schedule.batch - 1) // self.step

    def _range(self, b):
        return self._clipped(b, *(None if ref is None else ref[b] for ref in self.lengths))

    def _clipped(self, b, start, end):
        """Ranges of sequences, clipped to the cache. If rows lie end to end, ranges count from where each sequence `begins_at`."""
        start, end = self.plan.schedule.clipped(b, start, end)
        if self.plan.end_to_end:
            seq_len = self.plan.schedule.seq_len
            _, early = begins_at(b, seq_len)
            start, end = jnp.minimum(start, seq_len) + early, end + early  # no start wraps
        return start, end

    def _total(self, b):
        """The rounds of the line on which a sequence lies."""
        return self._rounds(*self._range(b)) if self.stops is None else self.stops[self._last]

    def _stop(self, b):
        if self.stops is not None and self.step == 1:
            return self.stops[b]
        return self._before(b) + self._rounds(*self._range(b))

    def _before(self, b):
        """Where a sequence begins on its line."""
        if self.stops is None:
            return jnp.int32(0)
        number = lax.div(b, self.step)
        earlier = [jnp.where(number * self.step + i < b, rounds, 0) for i, rounds in enumerate(self._rounds_of(number))]
        return sum(earlier, self._stop_before(number))

    def _stop_before(self, number):
        """Where the sequences before those of an entry stop."""
        return jnp.where(number > 0, self.stops[jnp.maximum(number - 1, 0)], 0)

    def _rounds_of(self, number):
        """The rounds of the sequences of an entry, but for its last sequence."""
        sequences = [jnp.minimum(number * self.step + i, self.plan.schedule.batch - 1) for i in range(self.step - 1)]
        return [self._rounds(*self._range(b)) for b in sequences]

    def _rounds(self, start, end):
        return self.plan.schedule.rounds(self._first_row(start, end), end)

    def _first_row(self, start, end):
        """The row at which the tiles of a range begin. A copy can begin at this row."""
        return jnp.where(start < end, start & -self.plan.align, start)
