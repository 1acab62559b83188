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

from ._jax import plgpu, store, when
from ._line import Piece
from ._program import load_of_rows, over, plus_products, product, Program, tile_of, tiling
from ._results import write_result
from ._softmax import Softmax


PAIR = 2


def shared(plan, dtype):
    """What the warpgroups pass to each other in shared memory: weights, and the largest logit and the sum of weights."""
    return {
        "p": plgpu.SMEM((PAIR, plan.terms, 64, plan.place_rows), dtype, transforms=tiling(plan.place_rows, dtype, plan.swizzle)),
        "stats": plgpu.SMEM((PAIR, 2, 64), jnp.float32),
        "p_full": plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
        "p_free": plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
    }


def compute_pieces(program: Program, me: int):
    """All pieces, for the columns of one warpgroup: the output, if the sequence has no other piece, or partial results."""
    plgpu.barrier_arrive(program.shared.p_free.at[1 - me])
    program.ranges.pieces(program.number, lambda piece: _compute_piece(program, piece, me))
    plgpu.barrier_wait(program.shared.p_free.at[me])


def _compute_piece(program, piece, me):
    plan, shared = program.plan, program.shared
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    query, size = shared.q.at[q_slot, 0], plan.value_dim // PAIR
    columns = pl.ds(me * size, size)
    softmax = Softmax.of(program, piece, program.query_rows())
    halves = _Halves(program, piece, me, query, softmax)
    nothing = tile_of((64, size), 0), softmax.nothing()

    def compute():
        acc, stats = lax.fori_loop(0, piece.num_tiles, halves.tile, nothing)
        return acc, *stats

    # At the end nobody reads the query: all weights have passed.
    acc, stats = nothing
    write_result(softmax, compute, (acc, *stats), lambda: query.at[:, columns], columns, with_stats=me == 0)
    plgpu.barrier_arrive(shared.q_free.at[q_slot])


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

    def tile(self, i, carry):
        """The output and the `stats` of `Softmax` with both halves of tile i."""
        return (self.first if self.me == 0 else self.second)(carry, i, *(self.slot(i, half) for half in range(PAIR)))

    def first(self, carry, i, slot, other_slot):
        """Tile i for the first warpgroup: its own half, then the other."""
        acc, stats = carry
        weights, stats, fade = self.weigh(i, slot, self.products(slot), stats)
        acc = self.add(acc, fade, weights, 0, slot)
        plgpu.barrier_wait(self.program.shared.k_full.at[other_slot])
        stats, fade = self.received(stats)
        return self.add(acc, fade, None, 1, other_slot), stats

    def second(self, carry, i, other_slot, slot):
        """Tile i for the second warpgroup, which has logits of its own half ready when the weights of the other half come."""
        acc, stats = carry
        plgpu.barrier_wait(self.program.shared.k_full.at[other_slot])
        products = self.products(slot)
        stats, other_fade = self.received(stats)
        weights, stats, fade = self.weigh(i, slot, products, stats)
        acc = self.add(acc, other_fade, None, 0, other_slot)
        return self.add(acc, fade, weights, 1, slot), stats

    def slot(self, i, half):
        """The place of a half of tile i in the rings."""
        return lax.rem((self.piece.tiles_before + i) * PAIR + half, self.program.plan.stages)

    def products(self, slot):
        """q . k of the half that is mine, once its keys are there: [64, keys]."""
        plan, shared = self.program.plan, self.program.shared
        plgpu.barrier_wait(shared.k_full.at[slot])
        return product(self.query, shared.k.at[slot, :, pl.ds(0, plan.block_dim)].transpose((1, 0)))

    def weigh(self, i, slot, products, stats):
        """Weights of the half that is mine, the new `stats`, and the factor for the output so far. The other warpgroup gets weights
        and `stats`, and finds zeros in rows of the value outside the range: 0 times what such a row holds may be NaN."""
        program, piece, shared, me = self.program, self.piece, self.program.shared, self.me
        first = program.first_key(piece, i)
        row = program.row_of(piece, first) + me * program.plan.place_rows
        weights, stats, fade = self.softmax.tile(first, row, products, stats)
        values = self.values(slot, wait=True)
        plgpu.barrier_wait(shared.p_free.at[me])
        for term, weight in enumerate(weights):
            shared.p.at[me, term][...] = weight
        for place, numbers in enumerate(stats):
            store(shared.stats.at[me, place], numbers)
        when(program.at_an_end(piece, row))(lambda: program.clear(piece, row, values))
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.p_full.at[me])
        return weights, stats, fade

    def received(self, stats):
        """The `stats` of the other warpgroup's half, and its factor for the output so far, from the `stats` before this half."""
        other, shared = 1 - self.me, self.program.shared
        plgpu.barrier_wait(shared.p_full.at[other])
        high, total = (load_of_rows(shared.stats.at[other, place]) for place in range(2))
        return [high, total], jnp.exp2((stats[0] - high) * self.program.factor)

    def add(self, acc, fade, weights, half, slot):
        """The output so far with the values of a half, which is free from then on. Weights that are mine come from registers, and
        the other's from shared memory."""
        program, plan, shared = self.program, self.program.plan, self.program.shared
        values, size = self.values(slot, wait=weights is None), plan.value_dim // PAIR
        values = values.at[:, pl.ds(self.me * size, size)]
        acc = acc * over(fade, acc)
        if weights is None or program.interpreted:
            weights = [shared.p.at[half, term] for term in range(plan.terms)]
        acc = plus_products(program, acc, *[(weight, values) for weight in weights])
        if half != self.me:
            plgpu.barrier_arrive(shared.p_free.at[half])
        for name in plan.columns:
            plgpu.barrier_arrive(program.barriers(name)[1].at[slot])
        return acc

    def values(self, slot, *, wait=False):
        """The values of a half. Each warpgroup waits once for the values of each half."""
        plan, shared = self.program.plan, self.program.shared
        if plan.value_start is not None:
            return shared.k.at[slot, :, pl.ds(plan.value_start, plan.value_dim)]
        if wait:
            plgpu.barrier_wait(shared.v_full.at[slot])
        return shared.v.at[slot]
