"""Who works on what: every sequence's live range is laid end to end on one line, and the line is cut evenly.

The line is counted in units of `UNIT` keys. Each of `workers` programs (a block of heads) takes a stretch of it, whatever sequences
that meets, so that the load is even however ragged the batch is. Where sequences are few, `deal` workers share a longer stretch and
take its tiles in turn, as cards are dealt: the memory then serves fewer places at a time. A worker's part of a sequence is a piece.
Worker c and sequence b meet in at most one, and c + b * deal numbers them, for from piece to piece along the line the stretch or b
grows: nothing is planned beforehand, each program finds its own pieces from the lengths, and the numbers are their results' slots.

A program walks through the tiles of all its pieces in one loop, for only one loop keeps the loads of the next tiles in flight
across the border between two sequences.

With `by_sequence`, each sequence lies on a line of its own, cut among `workers` of its own, and does not depend on the others.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


UNIT = 16  # keys; small enough that chunks differ by little, large enough that the line of any batch fits int32


class Line(NamedTuple):
    """A worker's number, and of each sequence on its line: number, first key and end, units, and where these stop."""

    worker: jax.Array
    number: jax.Array
    start: jax.Array
    end: jax.Array
    units: jax.Array
    stop: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static half of the plan.

    Attributes:
        batch: sequences, B.
        seq_len: rows of the cache, S, to which lengths are clipped.
        workers: programs of a line.
        block_keys: keys of a tile.
        by_sequence: every sequence has a line of its own.
        overhead: units that a sequence takes on the line beyond its keys, for what starting on it costs.
        deal: workers that share a stretch; divides `workers`.
    """

    batch: int
    seq_len: int
    workers: int
    block_keys: int
    by_sequence: bool
    overhead: int
    deal: int = 1

    @property
    def stride(self) -> int:
        """Keys from one tile of a piece to its next."""
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

    def line(self, program, start_ref, end_ref) -> "Line":
        """The line on which `program` works, as it lays it out for itself: all sequences, or its own when `by_sequence`.

        A ref may be None: ranges then begin at 0, or end at seq_len.
        """
        if self.by_sequence:
            number = jnp.full(1, program // self.workers, jnp.int32)
        else:
            number = jnp.arange(pl.next_power_of_2(self.batch), dtype=jnp.int32)
        start, end = jnp.zeros_like(number), jnp.where(number < self.batch, self.seq_len, 0)
        if start_ref is not None:
            start = jnp.maximum(plgpu.load(start_ref.at[number], mask=number < self.batch, other=0), 0)
        if end_ref is not None:
            end = jnp.minimum(plgpu.load(end_ref.at[number], mask=number < self.batch, other=0), self.seq_len)
        units = jnp.where(end > start, cdiv(end - start, UNIT) + self.overhead, 0)
        return Line(program % self.workers, number, start, end, units, running_sum(units))

    def store_pieces(self, line: "Line", pieces_ref):
        """The line's first worker writes down [2, B]: each sequence's first slot, and how many from there on are its pieces."""

        @pl.when(line.worker == 0)
        def _():
            chunk = self._chunk(total_of(line.units))
            before = (line.stop - line.units) // chunk
            count = jnp.where(line.units > 0, (line.stop - 1) // chunk - before + 1, 0)
            first = line.number * self.workers if self.by_sequence else (line.number + before) * self.deal
            for row, values in enumerate((first, count * self.deal)):
                plgpu.store(pieces_ref.at[row, line.number], values, mask=line.number < self.batch)

    def tiles(self, line: "Line"):
        """How many tiles the line's worker has, and a function of a tile's number to (sequence, first key, end of the piece)."""
        worker, number, start, end, units, stop = line
        total = total_of(units)
        chunk = self._chunk(total)
        stretch, turn = worker // self.deal, worker % self.deal
        line_lo = jnp.maximum(stop - units, stretch * chunk)
        line_hi = jnp.minimum(stop, jnp.minimum((stretch + 1) * chunk, total))
        zero = start - (stop - units + self.overhead) * UNIT  # the key that would stand at the beginning of the line
        key_lo = jnp.maximum(zero + line_lo * UNIT, start)
        key_hi = jnp.minimum(zero + line_hi * UNIT, end)
        key_lo += turn * self.block_keys
        # A piece that is all overhead, or too short for all who share it, gets a tile without keys, for its slot has to be filled.
        count = jnp.where(line_hi > line_lo, jnp.maximum(cdiv(key_hi - key_lo, self.stride), 1), 0)
        tile_end = running_sum(count)
        tile_zero = key_lo - (tile_end - count) * self.stride

        def at(tile):
            here = (tile_end - count <= tile) & (tile < tile_end)  # one sequence; looked up in registers, without a load

            def pick(of_each):
                return total_of(jnp.where(here, of_each, 0))

            return pick(number), pick(tile_zero) + tile * self.stride, pick(key_hi)

        return total_of(count), at

    def _chunk(self, units):
        """Units of a stretch when `units` are cut; a tile at least for each, so that short batches are not cut to shreds."""
        return jnp.maximum(cdiv(units, self.workers // self.deal), max(self.stride // UNIT, 1))


# Of int32 alone: where 64-bit types are enabled, jnp's own would go over to int64.


def cdiv(a, b):
    return jax.lax.div(a + (b - 1), jnp.asarray(b, a.dtype))


def total_of(x):
    return jnp.sum(x, dtype=x.dtype)


def running_sum(x):
    return jnp.cumsum(x, dtype=x.dtype)
