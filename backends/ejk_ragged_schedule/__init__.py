"""The schedule of the GPU kernels: which program works on which keys, and where each program writes its results.

The live ranges of all sequences are laid end to end on one line. The line is cut into equal stretches, one per worker. So all
workers have the same load, however ragged the batch is. Here three workers share four sequences:

    line       |00|00|00|00|0 |11|1 |22|22|22|22|22|22|22|22|2 |3 |
    stretches  |-----------------|-----------------|--------------|
    workers     0                 1                 2
    pieces     |--------------|--|--|--------------|-----------|--|
    slots       0              1  2  3              4           5

- Tile: the keys that a program reads at once, one cell of the figure. The line is counted in tiles, because a tile takes the same
  time whether it is full or not. Each range begins a new tile, and each stretch ends with a tile.
- Worker: a program, for one block of heads. Each block of heads has the same line and the same workers.
- Piece: the tiles of one worker that belong to one sequence. A worker and a sequence have one piece at most.
- Slot: the place of a piece's result. Worker c writes its piece of sequence b to slot c + b * deal. From one piece of the line to
  the next, the stretch or b grows, so no two pieces have the same slot. Each program finds its pieces from the lengths. Nothing is
  planned before the kernel starts.
- Whole: if all sequences are full and few workers are idle then, each stretch is whole sequences, and nothing is merged.
- Deal: if there are few sequences, `deal` workers share a stretch and take its tiles in turn, as cards are dealt. The memory then
  serves fewer places at a time.
- Round: one tile for each of the `deal` workers of a stretch. The line is then counted in rounds.
- Change: rounds without keys between two sequences. A worker takes time to begin and end a piece, so a stretch with many short
  sequences has fewer tiles than others.

A program walks through the tiles of all its pieces in one loop. One loop keeps the loads of the next tiles in flight when the
sequence changes.

With `by_sequence`, each sequence has a line and workers of its own, and the number of a program is its slot. The result of a
sequence then does not depend on the other sequences.

This module is arithmetic on values. The kernels read the lengths and write the results.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Line(NamedTuple):
    """A line as one worker sees it, for a strip of its sequences. Fields are int32. `[n]` is one entry per sequence of the strip.

    Attributes:
        worker: number of the worker on the line.
        number: numbers of the sequences, [n].
        start: first keys of the live ranges, [n].
        end: ends of the live ranges, exclusive, [n].
        rounds: numbers of rounds of the live ranges, [n].
        stop: where the rounds of each sequence end on the line, [n].
        total: number of rounds of the whole line.
    """

    worker: jax.Array
    number: jax.Array
    start: jax.Array
    end: jax.Array
    rounds: jax.Array
    stop: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static facts of a schedule, and its arithmetic.

    Attributes:
        batch: number of sequences, B.
        seq_len: number of rows per sequence, S. Lengths are clipped to it.
        workers: number of workers per line.
        block_keys: number of keys per tile.
        by_sequence: whether each sequence has a line of its own.
        deal: number of workers that share a stretch. A divisor of `workers`.
        change: number of rounds without keys at the end of each sequence, for the time that a worker takes to begin and end a
            piece. A piece may have no keys then. Only for kernels that walk from piece to piece (`piece`) and not from tile to tile
            (`tiles`).
    """

    batch: int
    seq_len: int
    workers: int
    block_keys: int
    by_sequence: bool
    deal: int = 1
    change: int = 0

    @classmethod
    def of(cls, problem, programs: int, block_keys: int, change: int = 0) -> "Schedule":
        """The schedule of a problem. `programs` is the number of programs per block of heads that the device runs at once.

        If `num_key_splits` is given, the schedule of a sequence does not depend on the batch, and has no `change`.
        """
        batch, seq_len, splits = problem.batch, problem.seq_len, problem.fwd_params.num_key_splits
        if splits:
            return cls(batch, seq_len, splits, block_keys, by_sequence=True)
        workers = max(programs, 1)
        # As many workers share a stretch as leave one stretch per sequence. More sequences per stretch would mean more pieces,
        # because each of its workers has a piece of each sequence on the stretch.
        share = max(workers // max(batch, LEAST_STRETCHES), 1)
        deal = 1 << (share.bit_length() - 1)  # rounded down to a power of two
        schedule = cls(batch, seq_len, workers - workers % deal, block_keys, by_sequence=False, deal=deal)
        most = batch * -(-seq_len // schedule.stride)
        changes = batch > 1 and most >= LEAST_ROUNDS * schedule._stretches
        return dataclasses.replace(schedule, change=change if changes else 0)

    @property
    def stride(self) -> int:
        """Number of keys per round: the distance from one tile of a piece to the next."""
        return self.deal * self.block_keys

    @property
    def programs(self) -> int:
        """Number of programs per block of heads, on all lines together."""
        return self.batch * self.workers if self.by_sequence else self.workers

    @property
    def slots(self) -> int:
        """Number of slots for results."""
        return self.batch * self.workers if self.by_sequence else self.workers + (self.batch - 1) * self.deal

    def slot(self, program, b):
        """The slot in which `program` writes the result of its piece of sequence `b`."""
        return program if self.by_sequence else program + b * self.deal

    def sequences(self, program):
        """The numbers of the sequences on the line of `program`, in strips.

        The length of a strip is a power of two. The last strip may have numbers beyond the batch.
        """
        if self.by_sequence:
            return [jnp.full(1, div(program, self.workers), jnp.int32)]
        size = 1 if self.batch == 1 else max(STRIP, (1 << (self.batch - 1).bit_length()) // MOST_STRIPS)
        return [first + jnp.arange(size, dtype=jnp.int32) for first in range(0, self.batch, size)]

    def line(self, program, strips) -> list[Line]:
        """The line of `program`, in strips, from one (number, start, end) per strip of `sequences`.

        start and end are the first keys and ends as the caller gave them, and 0 for numbers beyond the batch. A start of None means
        that ranges begin at 0, and an end of None means that ranges end at seq_len.
        """
        strips = [(number, *self.clipped(number, start, end)) for number, start, end in strips]
        rounds = [self.rounds(start, end) for _, start, end in strips]
        *before, total = itertools.accumulate(map(total_of, rounds), initial=jnp.int32(0))
        return [
            Line(rem(program, self.workers), *strip, of_each, first + running_sum(of_each), total)
            for strip, of_each, first in zip(strips, rounds, before, strict=True)
        ]

    def clipped(self, number, start, end):
        """The first keys and ends of the sequences `number`, clipped to the cache. Arguments as in `line`."""
        start = jnp.zeros_like(number) if start is None else jnp.maximum(start, 0)
        end = jnp.where(number < self.batch, self.seq_len, 0) if end is None else jnp.minimum(end, self.seq_len)
        return start, end

    def rounds(self, start, end):
        """The numbers of rounds of clipped ranges."""
        return jnp.where(end > start, cdiv(end - start, self.stride) + self.change, 0)

    def pieces(self, line: Line):
        """For each sequence of a strip: the first slot of its pieces, and the number of its pieces, which have consecutive slots.

        All workers of a line compute the same.
        """
        chunk = self._chunk(line.total)
        before = div(line.stop - line.rounds, chunk)
        count = jnp.where(line.rounds > 0, div(line.stop - 1, chunk) - before + 1, 0)
        first = line.number * self.workers if self.by_sequence else (line.number + before) * self.deal
        return first, count * self.deal

    def tiles(self, line: list[Line]):
        """The number of tiles of the worker, and a function from the number of a tile to (sequence, first key, end of the piece).

        All workers that share a stretch have the same number of tiles, and a piece of each sequence on the stretch. Some tiles may
        have no keys.
        """
        first, count = self.stretch(line[0].worker, line[0].total)
        values = [(strip.number, *self.piece(strip)) for strip in line]

        def at(tile):
            place = first + tile
            # The mask selects one sequence of one strip. The look-up is in registers, without a load.
            here = [(strip.stop - strip.rounds <= place) & (place < strip.stop) for strip in line]
            number, origin, piece_end = (
                total_of(sum(jnp.where(mask, x, 0) for mask, x in zip(here, of_strips, strict=True)))
                for of_strips in zip(*values, strict=True)
            )
            return number, origin + place * self.stride, piece_end

        return count, at

    def stretch(self, worker, total):
        """The first round of the worker's stretch, and its number of rounds, on a line of `total` rounds."""
        chunk = self._chunk(total)
        first = div(worker, self.deal) * chunk
        return first, jnp.clip(total - first, 0, chunk)

    def piece(self, line: Line):
        """For each sequence of a strip: an origin, and the end of the worker's piece.

        The worker's tile in round r of the line begins at key origin + r * stride.
        """
        first, count = self.stretch(line.worker, line.total)
        before = line.stop - line.rounds
        piece_end = jnp.minimum(line.end, line.start + (jnp.minimum(line.stop, first + count) - before) * self.stride)
        return line.start - before * self.stride + self._turn(line.worker), piece_end

    def is_last(self, program, row, piece_end):
        """Whether the tile of `program` that begins at row `row` is the last tile of its piece."""
        return row - self._turn(rem(program, self.workers)) + self.stride >= piece_end

    def _turn(self, worker):
        """Number of keys of a round that come before this worker's keys."""
        return rem(worker, self.deal) * self.block_keys

    def _chunk(self, total):
        """Number of rounds per stretch. At least 1, because other code divides by it."""
        chunk = jnp.maximum(cdiv(total, self._stretches), 1)
        if not self._whole:
            return chunk
        full = -(-self.seq_len // self.stride) + self.change
        return jnp.where(total == self.batch * full, self._whole * full, chunk)

    @property
    def _stretches(self) -> int:
        """Number of stretches per line."""
        return self.workers // self.deal

    @property
    def _whole(self) -> int:
        """Number of sequences per stretch if all sequences are full, or 0 where stretches then cut sequences.

        A sequence that is not cut has nothing to merge. For this, one worker of IDLE may have nothing to do.
        """
        sequences = -(-self.batch // self._stretches)
        idle = sequences * self._stretches - self.batch
        return sequences if 0 < idle * IDLE <= self.batch and not self.by_sequence else 0


def length_arrays(problem, queries) -> dict[str, Any]:
    """The arrays that say which keys are seen.

    "start" and "end" are the range of each sequence, [B]. "token_start" and "token_end" are the ranges of its tokens, [B, T], and
    exist only if the tokens of a sequence differ. An array that would bound nothing is None. XLA then does not compute it, which
    saves a tenth of the time of a short call.
    """
    given = {"start": queries.start, "end": queries.end}
    if all(x is None or x.shape[1] == 1 for x in given.values()):
        return {name: None if x is None else x[:, 0] for name, x in given.items()}
    clipped = dict(zip(given, queries.bounds(problem.seq_len), strict=True))
    per_token = {f"token_{name}": x if x.shape[1] > 1 else None for name, x in clipped.items()}
    return dict(zip(given, queries.hull(problem.seq_len), strict=True)) | per_token


# Sequences per strip: as many as a warp has threads. One instruction then sums over a strip, and no warp waits for another.
STRIP = 32
# Strips per line. Strips take registers, so a large batch has longer strips and not more strips.
MOST_STRIPS = 4
# If all sequences are full, stretches are whole sequences where no more than one worker of IDLE is idle then.
IDLE = 16
# Rounds per stretch, if all sequences are full, from which on changes of sequence count. Shorter calls took longer with changes.
LEAST_ROUNDS = 32
# Stretches per line, however few sequences there are. With fewer stretches, which are longer, the cache is read more slowly.
LEAST_STRETCHES = 4


# These functions stay in int32. If 64-bit types are enabled, the functions of jnp go over to int64. What is divided is not
# negative, or not used. So no quotient needs a look at signs, which takes several operations.


def div(a, b):
    return jax.lax.div(a, jnp.asarray(b, a.dtype))


def rem(a, b):
    return jax.lax.rem(a, jnp.asarray(b, a.dtype))


def cdiv(a, b):
    return div(a + (b - 1), b)


def total_of(x):
    return jnp.sum(x, dtype=x.dtype)


def running_sum(x):
    return jnp.cumsum(x, dtype=x.dtype)
