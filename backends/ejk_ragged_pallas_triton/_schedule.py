"""Who works on what: every sequence's live range is laid end to end on one line, and the line is cut evenly.

The line is counted in units of `UNIT` keys; a sequence of n live keys takes ceil(n / UNIT) of them. Each of `workers` programs (a
head) takes `chunk` consecutive units, whatever sequences they belong to, so that the load is even however ragged the batch is.
A stretch of one sequence in one chunk is a piece. Worker c and sequence b meet in at most one piece, and from piece to piece
along the line c or b grows, so that c + b numbers them: no plan is made anywhere, each program finds its own from the lengths.

With `splits` given, each sequence is cut into that many pieces by itself instead, so that its result does not depend on the others.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


UNIT = 16  # keys; small enough that chunks differ by little, large enough that the line of any batch fits int32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static half: how many programs a head, and how many slots their pieces need.

    Attributes:
        batch: sequences.
        workers: chunks of the line, or pieces of each sequence when `by_sequence`.
        min_chunk: least units in a chunk, so that short batches are not cut to shreds.
        by_sequence: cut every sequence by itself.
    """

    batch: int
    workers: int
    min_chunk: int
    by_sequence: bool

    @property
    def programs(self) -> int:
        return self.batch * self.workers if self.by_sequence else self.workers

    @property
    def slots(self) -> int:
        return self.batch * self.workers if self.by_sequence else self.workers + self.batch - 1

    def line(self, start_ref, end_ref):
        """Units of each sequence, and the running sum of them; [power of two >= batch]."""
        index = jnp.arange(pl.next_power_of_2(self.batch), dtype=jnp.int32)
        here = index < self.batch
        start = plgpu.load(start_ref.at[index], mask=here, other=0)
        end = plgpu.load(end_ref.at[index], mask=here, other=0)
        units = cdiv(jnp.maximum(end - start, 0), UNIT)
        return index, units, jnp.cumsum(units)

    def pieces(self, index, units, line):
        """Each sequence's first slot, and how many of the slots from there on are its pieces."""
        if self.by_sequence:
            chunk = self._sequence_chunk(units)
            return index * self.workers, cdiv(units, chunk)
        chunk = self._line_chunk(units)
        first, last = (line - units) // chunk, (line - 1) // chunk
        return first + index, jnp.where(units > 0, last - first + 1, 0)

    def for_each_piece(self, program, start_ref, end_ref, do):
        """`do(b, key_lo, key_hi, slot)` for every piece of this program."""
        index, units, line = self.line(start_ref, end_ref)

        if self.by_sequence:
            b, part = program // self.workers, program % self.workers
            key_start, key_end = start_ref[b], end_ref[b]
            chunk = self._sequence_chunk(cdiv(jnp.maximum(key_end - key_start, 0), UNIT)) * UNIT
            key_lo = key_start + part * chunk

            @pl.when(key_lo < key_end)
            def _():
                do(b, key_lo, jnp.minimum(key_lo + chunk, key_end), program)

            return

        chunk = self._line_chunk(units)
        stop = jnp.minimum((program + 1) * chunk, jnp.sum(units))

        def body(position):
            b = jnp.sum((line <= position).astype(jnp.int32))  # empty sequences are stepped over
            base = jnp.max(jnp.where(line <= position, line, 0))
            key_start, key_end = start_ref[b], end_ref[b]
            piece_end = jnp.minimum(stop, base + cdiv(key_end - key_start, UNIT))
            key_lo = key_start + (position - base) * UNIT
            do(b, key_lo, jnp.minimum(key_start + (piece_end - base) * UNIT, key_end), program + b)
            return piece_end

        jax.lax.while_loop(lambda position: position < stop, body, program * chunk)

    def _line_chunk(self, units):
        return jnp.maximum(cdiv(jnp.sum(units), self.workers), self.min_chunk)

    def _sequence_chunk(self, units):
        return jnp.maximum(cdiv(units, self.workers), self.min_chunk)


def cdiv(a, b):
    return (a + b - 1) // b
