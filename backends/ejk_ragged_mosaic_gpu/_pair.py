"""The pair of warpgroups that multiply where values are wide or lie in the key's rows, and query rows are many.

Both warpgroups have the same 64 query rows, and each has half of the columns of the output, because one warpgroup has no room for
512 columns in its registers. A tile of keys has two halves. The first warpgroup computes the weights of the first half, and the
second warpgroup those of the second half. Weights, and what goes from half to half, pass through shared memory.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import plgpu, store
from ._line import Piece
from ._program import load_of_rows, over, product, Program, tile_of, tiling
from ._softmax import Softmax


PAIR = 2


def shared(plan, dtype):
    """What the warpgroups pass to each other in shared memory: weights, and the factor, the largest logit and the sum of weights."""
    return {
        "p": plgpu.SMEM((PAIR, plan.terms, 64, plan.place_rows), dtype, transforms=tiling(plan.place_rows, dtype, plan.swizzle)),
        "passed": plgpu.SMEM((PAIR, 3, 64), jnp.float32),
        "p_full": plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
        "p_free": plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
    }


def compute_pieces(program: Program, me: int):
    """Partial results of all pieces, for the columns of one warpgroup."""
    plgpu.barrier_arrive(program.shared.p_free.at[1 - me])
    program.ranges.pieces(program.number, lambda piece: _compute_piece(program, piece, me))
    plgpu.barrier_wait(program.shared.p_free.at[me])


def _compute_piece(program, piece, me):
    plan, shared = program.plan, program.shared
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    halves = _Halves(program, piece, me, shared.q.at[q_slot, 0], Softmax.of(program, piece, program.query_rows()))
    size = plan.value_dim // PAIR
    acc, stats = lax.fori_loop(0, piece.num_tiles, halves.step, (tile_of((64, size), 0), halves.softmax.nothing()))
    plgpu.barrier_arrive(shared.q_free.at[q_slot])
    halves.softmax.keep_output(acc, pl.ds(me * size, size))
    if me == 0:
        halves.softmax.keep(*stats)


@dataclasses.dataclass(frozen=True)
class _Halves:
    """The halves of the tiles of a piece, for one warpgroup.

    Attributes:
        program, piece: whose tiles.
        me: which of the two warpgroups.
        query: ref [64, D] in shared memory.
        softmax: the softmax of the query rows.
    """

    program: Program
    piece: Piece
    me: int
    query: Any
    softmax: Softmax

    def step(self, i, carry):
        """The output and the `stats` of `Softmax` with both halves of tile i."""
        acc, stats = carry
        slots = [lax.rem((self.piece.tiles_before + i) * PAIR + half, self.program.plan.stages) for half in range(PAIR)]
        k_full = self.program.shared.k_full
        for slot in slots[: self.me + 1]:
            plgpu.barrier_wait(k_full.at[slot])
        products = product(self.query, self.keys(slots[self.me]))
        if self.me == 0:
            weights, stats, fade = self.weigh(i, slots[0], products, stats)
            acc = self.add(acc, fade, weights, 0, slots[0])
            plgpu.barrier_wait(k_full.at[slots[1]])
            fade, *stats = self.received()
            acc = self.add(acc, fade, None, 1, slots[1])
        else:
            first_fade, *stats = self.received()
            weights, stats, fade = self.weigh(i, slots[1], products, stats)
            acc = self.add(acc, first_fade, None, 0, slots[0])
            acc = self.add(acc, fade, weights, 1, slots[1])
        return acc, stats

    def weigh(self, i, slot, products, stats):
        """Weights of the half that is mine, the new `stats`, and the factor for the output so far. The other warpgroup gets them
        too, and finds zeros in rows of the value outside the range: 0 times what such a row holds may be NaN."""
        program, piece, shared, me = self.program, self.piece, self.program.shared, self.me
        first = program.first_key(piece, i)
        row = program.row_of(piece, first) + me * program.plan.place_rows
        weights, stats, fade = self.softmax.tile(first, row, products, stats)
        values = self.values(slot)
        plgpu.barrier_wait(shared.p_free.at[me])
        for term, weight in enumerate(weights):
            shared.p.at[me, term][...] = weight
        for place, numbers in enumerate((fade, *stats)):
            store(shared.passed.at[me, place], numbers)
        pl.when(program.at_an_end(piece, row))(lambda: program.clear(piece, row, values))
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.p_full.at[me])
        return weights, stats, fade

    def received(self):
        """The factor and the `stats` of the other warpgroup's half."""
        other, shared = 1 - self.me, self.program.shared
        plgpu.barrier_wait(shared.p_full.at[other])
        return [load_of_rows(shared.passed.at[other, place]) for place in range(3)]

    def add(self, acc, fade, weights, half, slot):
        """The output so far with the values of a half. Weights that are mine come from registers."""
        shared, plan = self.program.shared, self.program.plan
        values = self.values(slot) if weights is None else self.values_of(slot)
        size = plan.value_dim // PAIR
        values = values.at[:, pl.ds(self.me * size, size)]
        acc = acc * over(fade, acc)
        if weights is None or self.program.interpreted:
            weights = [shared.p.at[half, term] for term in range(plan.terms)]
        if self.program.interpreted:
            for weight in weights:
                acc = acc + product(weight, values)
        else:

            def multiply(out):
                for weight in weights:
                    plgpu.wgmma(out, weight, values)

            acc = pl.run_state(multiply)(plgpu.ACC.init(acc))
        if half != self.me:
            plgpu.barrier_arrive(shared.p_free.at[half])
        for name in plan.columns:
            plgpu.barrier_arrive(self.program.barriers(name)[1].at[slot])
        return acc

    def keys(self, slot):
        plan = self.program.plan
        keys = self.program.shared.k.at[slot]
        return (keys if plan.tile_dim == plan.block_dim else keys.at[:, pl.ds(0, plan.block_dim)]).transpose((1, 0))

    def values(self, slot):
        """The values of a half, once they are there. Each warpgroup asks once for each half."""
        if self.program.plan.value_start is None:
            plgpu.barrier_wait(self.program.shared.v_full.at[slot])
        return self.values_of(slot)

    def values_of(self, slot):
        plan, shared = self.program.plan, self.program.shared
        if plan.value_start is None:
            return shared.v.at[slot]
        return shared.k.at[slot, :, pl.ds(plan.value_start, plan.value_dim)]
