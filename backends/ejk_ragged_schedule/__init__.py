"""Who works on what, for kernels on GPUs: every sequence's live range is laid end to end on one line, and the line is cut evenly.

The line is counted in tiles, for a tile costs the same whether it is full or not: a range begins a new one, and the line is cut
between two. Each of `workers` programs (a block of heads) takes a stretch of it, whatever sequences that meets, so that the load is
even however ragged the batch is. Where sequences are few, `deal` workers share a stretch and take its tiles in turn, as cards are
dealt: the memory then serves fewer places at a time, and the line is counted in rounds, of a tile for each of them.

A worker's part of a sequence is a piece. Worker c and sequence b meet in at most one, and c + b * deal numbers them, for from piece
to piece along the line the stretch or b grows: nothing is planned beforehand, each program finds its own pieces from the lengths,
and the numbers are their results' slots.

A program walks through the tiles of all its pieces in one loop, for only one loop keeps the loads of the next tiles in flight
across the border between two sequences.

With `by_sequence`, each sequence lies on a line of its own, cut among `workers` of its own, and does not depend on the others.

Arithmetic on values alone: how lengths are read and results are written is the kernel's matter.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Line(NamedTuple):
    """A worker's number; of each sequence in a strip of its line, or of one: number, first key and end, rounds, and where these
    stop; and all the line's rounds."""

    worker: jax.Array
    number: jax.Array
    start: jax.Array
    end: jax.Array
    rounds: jax.Array
    stop: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static half of the plan.

    Attributes:
        batch: sequences, B.
        seq_len: rows of the cache, S, to which lengths are clipped.
        workers: programs of a line.
        block_keys: keys of a tile.
        by_sequence: every sequence has a line of its own.
        deal: workers that share a stretch; divides `workers`.
    """

    batch: int
    seq_len: int
    workers: int
    block_keys: int
    by_sequence: bool
    deal: int = 1

    @classmethod
    def of(cls, problem, programs: int, block_keys: int) -> "Schedule":
        """For a problem on a device that runs so many programs of a block of heads at once.

        With `num_key_splits` given nothing depends on the batch.
        """
        batch, seq_len, splits = problem.batch, problem.seq_len, problem.fwd_params.num_key_splits
        if splits:
            return cls(batch, seq_len, splits, block_keys, by_sequence=True)
        workers = max(programs, 1)
        # As many share a stretch as leave one for each sequence: each sequence more on it is a piece more for all of them.
        share = max(workers // max(batch, LEAST_STRETCHES), 1)
        deal = 1 << (share.bit_length() - 1)  # the power of two below
        return cls(batch, seq_len, workers - workers % deal, block_keys, by_sequence=False, deal=deal)

    @property
    def stride(self) -> int:
        """Keys of a round: from one tile of a piece to its next."""
        return self.deal * self.block_keys

    @property
    def programs(self) -> int:
        return self.batch * self.workers if self.by_sequence else self.workers

    @property
    def slots(self) -> int:
        return self.batch * self.workers if self.by_sequence else self.workers + (self.batch - 1) * self.deal

    def slot(self, program, b):
        """Where `program` puts its piece of sequence `b`."""
        return program if self.by_sequence else program + b * self.deal

    def sequences(self, program):
        """Numbers of the sequences on the line of `program`, in strips of [a power of two]; the last may go beyond the batch."""
        if self.by_sequence:
            return [jnp.full(1, program // self.workers, jnp.int32)]
        size = 1 if self.batch == 1 else max(STRIP, (1 << (self.batch - 1).bit_length()) // MOST_STRIPS)
        return [first + jnp.arange(size, dtype=jnp.int32) for first in range(0, self.batch, size)]

    def line(self, program, strips) -> list[Line]:
        """The line on which `program` works, in strips, from (number, start, end) of each strip of its `sequences`: first keys and
        ends as given, 0 where there is no sequence. None: ranges begin at 0, or end at seq_len."""
        strips = [(number, *self.clipped(number, start, end)) for number, start, end in strips]
        rounds = [self.rounds(start, end) for _, start, end in strips]
        *before, total = itertools.accumulate(map(total_of, rounds), initial=jnp.int32(0))
        return [
            Line(program % self.workers, *strip, of_each, first + running_sum(of_each), total)
            for strip, of_each, first in zip(strips, rounds, before, strict=True)
        ]

    def clipped(self, number, start, end):
        """First keys and ends of the sequences `number` within the cache, from what was given."""
        start = jnp.zeros_like(number) if start is None else jnp.maximum(start, 0)
        end = jnp.where(number < self.batch, self.seq_len, 0) if end is None else jnp.minimum(end, self.seq_len)
        return start, end

    def rounds(self, start, end):
        """Rounds of ranges that are clipped already."""
        return jnp.where(end > start, cdiv(end - start, self.stride), 0)

    def pieces(self, line: Line):
        """Of each sequence of a strip: the first slot, and how many from there on are its pieces; all its workers say the same."""
        chunk = self._chunk(line.total)
        before = (line.stop - line.rounds) // chunk
        count = jnp.where(line.rounds > 0, (line.stop - 1) // chunk - before + 1, 0)
        first = line.number * self.workers if self.by_sequence else (line.number + before) * self.deal
        return first, count * self.deal

    def tiles(self, line: list[Line]):
        """How many tiles the line's worker has, and a function of a tile's number to (sequence, first key, end of the piece).

        All who share a stretch have as many, so that each has a piece of each sequence on it, if one of tiles without keys.
        """
        first, count = self.stretch(line[0].worker, line[0].total)
        values = [(strip.number, *self.piece(strip)) for strip in line]

        def at(tile):
            place = first + tile
            # One sequence of one strip; looked up in registers, without a load.
            here = [(strip.stop - strip.rounds <= place) & (place < strip.stop) for strip in line]
            number, origin, piece_end = (
                total_of(sum(jnp.where(mask, x, 0) for mask, x in zip(here, of_strips, strict=True)))
                for of_strips in zip(*values, strict=True)
            )
            return number, origin + place * self.stride, piece_end

        return count, at

    def stretch(self, worker, total):
        """Where on a line of `total` rounds the worker's stretch begins, and how many rounds it has."""
        chunk = self._chunk(total)
        first = (worker // self.deal) * chunk
        return first, jnp.clip(total - first, 0, chunk)

    def piece(self, line: Line):
        """Of each sequence of a strip: the key at which the worker's tile would begin in the line's first round, `stride` keys
        before that of the next; and where its piece ends."""
        first, count = self.stretch(line.worker, line.total)
        before = line.stop - line.rounds
        piece_end = jnp.minimum(line.end, line.start + (jnp.minimum(line.stop, first + count) - before) * self.stride)
        return line.start - before * self.stride + self._turn(line.worker), piece_end

    def is_last(self, program, row, piece_end):
        """Whether the tile of `program` that begins at key `row` is the last one of its piece."""
        return row - self._turn(program % self.workers) + self.stride >= piece_end

    def _turn(self, worker):
        """Keys of a round that others have before this worker."""
        return (worker % self.deal) * self.block_keys

    def _chunk(self, total):
        """Rounds of a stretch; one at least, for it is divided by."""
        return jnp.maximum(cdiv(total, self.workers // self.deal), 1)


def length_arrays(problem, queries) -> dict[str, Any]:
    """What says which keys are seen: "start" and "end" of each sequence, [B], and "token_start" and "token_end", [B, T], where the
    tokens of a sequence differ in them. What says nothing is None: XLA then does not make it, which on a short call is a tenth of
    the time."""
    given = {"start": queries.start, "end": queries.end}
    if all(x is None or x.shape[1] == 1 for x in given.values()):
        return {name: None if x is None else x[:, 0] for name, x in given.items()}
    clipped = dict(zip(given, queries.bounds(problem.seq_len), strict=True))
    per_token = {f"token_{name}": x if x.shape[1] > 1 else None for name, x in clipped.items()}
    return dict(zip(given, queries.hull(problem.seq_len), strict=True)) | per_token


# A strip has as many sequences as a warp has threads: one instruction sums them up, and no warp waits for another. Strips take
# registers, so in large batches there are no more of them, and they are longer.
STRIP, MOST_STRIPS = 32, 4
LEAST_STRETCHES = 4  # of a line, however few sequences are on it; fewer and longer ones are read more slowly again


# Of int32 alone: where 64-bit types are enabled, jnp's own would go over to int64.


def cdiv(a, b):
    return jax.lax.div(a + (b - 1), jnp.asarray(b, a.dtype))


def total_of(x):
    return jnp.sum(x, dtype=x.dtype)


def running_sum(x):
    return jnp.cumsum(x, dtype=x.dtype)
