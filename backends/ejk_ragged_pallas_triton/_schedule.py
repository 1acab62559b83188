"""Who works on what: every sequence's live range is laid end to end on one line, and the line is cut evenly.

The line is counted in units of `UNIT` keys. Each of `workers` programs (a block of heads) takes `chunk` consecutive units, whatever
sequences they belong to, so that the load is even however ragged the batch is. A stretch of one sequence in one chunk is a piece.
Worker c and sequence b meet in at most one piece, and from piece to piece along the line c or b grows, so that c + b numbers them:
nothing is planned beforehand, each program finds its own pieces from the lengths, and the numbers are slots for their results.

A program walks through the tiles of all its pieces in one loop, for only one loop keeps the loads of the next tiles in flight
across the border between two sequences.

With `by_sequence`, each sequence is cut into `workers` pieces by itself instead, so that its result does not depend on the others.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


UNIT = 16  # keys; small enough that chunks differ by little, large enough that the line of any batch fits int32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static half of the plan.

    Attributes:
        batch: sequences, B.
        workers: chunks of the line, or pieces of each sequence when `by_sequence`.
        block_keys: keys of a tile.
        by_sequence: cut every sequence by itself.
        overhead: units that a sequence takes on the line beyond its keys, for what starting on it costs.
    """

    batch: int
    workers: int
    block_keys: int
    by_sequence: bool
    overhead: int

    @property
    def programs(self) -> int:
        return self.batch * self.workers if self.by_sequence else self.workers

    @property
    def slots(self) -> int:
        return self.batch * self.workers if self.by_sequence else self.workers + self.batch - 1

    def slot(self, program, b):
        """Where `program` puts its piece of sequence `b`."""
        return program if self.by_sequence else program + b

    def store_pieces(self, start_ref, end_ref, pieces_ref):
        """Writes down [2, B]: each sequence's first slot, and how many of the slots from there on are its pieces."""
        index, _, _, units, line = self._line(start_ref, end_ref)
        if self.by_sequence:
            first, count = index * self.workers, pl.cdiv(units, self._chunk(units))
        else:
            chunk = self._chunk(jnp.sum(units))
            first = (line - units) // chunk + index
            count = jnp.where(units > 0, (line - 1) // chunk - (line - units) // chunk + 1, 0)
        for row, values in enumerate((first, count)):
            plgpu.store(pieces_ref.at[row, index], values, mask=index < self.batch)

    def tiles(self, program, start_ref, end_ref):
        """How many tiles `program` has, and a function of the tile's number to (sequence, first key, end of the piece)."""
        if self.by_sequence:
            return self._tiles_of_sequence(program, start_ref, end_ref)
        index, start, end, units, line = self._line(start_ref, end_ref)
        total = jnp.sum(units)
        chunk = self._chunk(total)
        line_lo = jnp.maximum(line - units, program * chunk)
        line_hi = jnp.minimum(line, jnp.minimum((program + 1) * chunk, total))
        zero = start - (line - units + self.overhead) * UNIT  # the key that would stand at the beginning of the line
        key_lo = jnp.maximum(zero + line_lo * UNIT, start)
        key_hi = jnp.minimum(zero + line_hi * UNIT, end)
        # A piece that is all overhead gets a tile without keys, for its slot has to be filled.
        count = jnp.where(line_hi > line_lo, jnp.maximum(pl.cdiv(key_hi - key_lo, self.block_keys), 1), 0)
        tile_end = jnp.cumsum(count)
        tile_zero = key_lo - (tile_end - count) * self.block_keys

        def at(tile):
            here = (tile_end - count <= tile) & (tile < tile_end)  # one sequence; looked up in registers, without a load

            def pick(of_each):
                return jnp.sum(jnp.where(here, of_each, 0))

            return pick(index), pick(tile_zero) + tile * self.block_keys, pick(key_hi)

        return jnp.sum(count), at

    def _tiles_of_sequence(self, program, start_ref, end_ref):
        b, part = program // self.workers, program % self.workers
        start, end = start_ref[b], end_ref[b]
        chunk = self._chunk(pl.cdiv(jnp.maximum(end - start, 0), UNIT)) * UNIT
        key_lo = start + part * chunk
        key_hi = jnp.minimum(key_lo + chunk, end)
        count = pl.cdiv(jnp.maximum(key_hi - key_lo, 0), self.block_keys)
        return count, lambda tile: (b, key_lo + tile * self.block_keys, key_hi)

    def _line(self, start_ref, end_ref):
        """Of each sequence: its number, first key, end, units, and where its units end on the line; [power of two >= B]."""
        index = jnp.arange(pl.next_power_of_2(self.batch), dtype=jnp.int32)
        here = index < self.batch
        start = plgpu.load(start_ref.at[index], mask=here, other=0)
        end = plgpu.load(end_ref.at[index], mask=here, other=0)
        units = jnp.where(end > start, pl.cdiv(end - start, UNIT) + self.overhead, 0)
        return index, start, end, units, jnp.cumsum(units)

    def _chunk(self, units):
        """Units of a chunk when `units` are cut; a tile at least, so that short batches are not cut to shreds."""
        return jnp.maximum(pl.cdiv(units, self.workers), max(self.block_keys // UNIT, 1))
