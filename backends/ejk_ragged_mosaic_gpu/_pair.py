"""The pair of warpgroups that multiply where values are wide or lie in the key's rows, and query rows are many.

Both warpgroups have the same 64 query rows, and each has half of the columns of the output, because one warpgroup has no room for
512 columns in its registers. A tile of keys has two halves. The first warpgroup computes the weights of the first half, and the
second warpgroup those of the second half. Weights, and what goes from half to half, pass through shared memory.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import plgpu, store, TILE, when
from ._line import Piece
from ._program import load_of_rows, over, plus_products, product, Program, tile_of, tiling, unknown_zero
from ._results import write_result
from ._softmax import Softmax


PAIR = 2
VALUES = "v0", "v1"  # the rings of values, one for each warpgroup


def freed_by(plan, me: int) -> list[str]:
    """The rings whose places are first said to be free by a warpgroup."""
    return [name for name in plan.rings if name == VALUES[me] or (me == 0 and name not in VALUES)]


def shared(plan, dtype, interpreted):
    """What the warpgroups pass to each other in shared memory: weights, and the largest logit and the sum of weights.

    Weights have one place. The warpgroups take turns, so who writes has read what the other wrote. A warp reads what the same warp
    of the other warpgroup wrote, so warps need not wait for each other. In the interpreter, `mine` has a place for the weights of
    each warpgroup, because products take them from shared memory.
    """
    tile, tiled = (64, plan.place_rows), tiling(plan.place_rows, dtype)
    arrays = {
        "p": plgpu.SMEM((plan.terms, *tile), dtype, transforms=tiled),
        "stats": plgpu.SMEM((PAIR, 2, 64), jnp.float32),
        "passed": plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
    }
    return arrays | ({"mine": plgpu.SMEM((PAIR, *tile), dtype, transforms=tiled)} if interpreted else {})


def compute_pieces(program: Program, me: int):
    """All pieces, for the columns of one warpgroup: the output, if the sequence has no other piece, or partial results."""
    program.ranges.pieces(program.number, lambda piece: _compute_piece(program, piece, me))


def _compute_piece(program, piece, me):
    plan, shared = program.plan, program.shared
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    query, size = shared.q.at[q_slot, 0], plan.value_dim // PAIR
    columns = pl.ds(me * size, size)
    softmax = Softmax.of(program, piece, program.query_rows())
    halves = _Halves(program, piece, me, softmax)
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
        softmax: the softmax of the query rows.
    """

    program: Program
    piece: Piece
    me: int
    softmax: Softmax

    def tile(self, i, carry):
        """The output and the `stats` of `Softmax` with both halves of tile i."""
        return (self.first if self.me == 0 else self.second)(carry, i, *(self.slot(i, half) for half in range(PAIR)))

    def first(self, carry, i, slot, other_slot):
        """Tile i for the first warpgroup: its own half, then the other."""
        acc, stats = carry
        weights, stats, fade = self.weigh(i, slot, self.products(i, slot), stats)
        acc = self.add(acc, fade, weights, slot)
        weights, stats, fade = self.received(other_slot, stats)
        return self.add(acc, fade, weights, other_slot), stats

    def second(self, carry, i, other_slot, slot):
        """Tile i for the second warpgroup, which has logits of its own half ready when the weights of the other half come."""
        acc, stats = carry
        products = self.products(i, slot)
        weights, stats, fade = self.received(other_slot, stats)
        acc = self.add(acc, fade, weights, other_slot)
        weights, stats, fade = self.weigh(i, slot, products, stats)
        return self.add(acc, fade, weights, slot), stats

    def slot(self, i, half):
        """The place of a half of tile i in the rings."""
        return self.program.plan.place(self.piece.tiles_before + i, half)

    def products(self, i, slot):
        """q . k of the half of tile i that is mine, part by part as keys come: [64, keys]."""
        plan, shared, piece = self.program.plan, self.program.shared, self.piece
        zero = unknown_zero(i)
        query = shared.q.at[lax.rem(piece.number, plan.query_slots) + zero, 0]

        def multiply(logits):
            for name in plan.order(self.me):
                if size := plan.key_columns(name):
                    self.wait(slot, name)
                    keys = getattr(shared, name).at[slot + zero, :, pl.ds(0, size)]
                    plgpu.wgmma(logits, query.at[:, pl.ds(plan.rings[name].first, size)], keys.transpose((1, 0)))
            return logits[...]

        products = pl.run_scoped(multiply, plgpu.ACC((64, plan.place_rows), jnp.float32))
        self.free(slot, *[name for name in plan.rings if name not in VALUES])
        return products

    def weigh(self, i, slot, products, stats):
        """Weights of the half that is mine, the new `stats`, and the factor for the output so far. The other warpgroup gets weights
        and `stats`, and finds zeros in rows of the value outside the range: 0 times what such a row holds may be NaN."""
        program, piece, shared, me = self.program, self.piece, self.program.shared, self.me
        first = program.first_key(piece, i)
        row = program.row_of(piece, first) + me * program.plan.place_rows
        weights, stats, fade = self.softmax.tile(first, row, products, stats)
        for term, weight in enumerate(weights):
            shared.p.at[term][...] = weight
        for place, numbers in enumerate(stats):
            store(shared.stats.at[me, place], numbers)
        self.wait(slot, *[name for name in VALUES if not program.plan.key_columns(name)])

        def clear():
            for name in VALUES:
                program.clear(piece, row, getattr(shared, name).at[slot])

        when(program.at_an_end(piece, row))(clear)
        plgpu.barrier_arrive(shared.passed.at[me])
        return weights, stats, fade

    def received(self, slot, stats):
        """The weights and the `stats` of the other warpgroup's half, and its factor for the output so far, from the `stats` before
        this half."""
        shared = self.program.shared
        plgpu.barrier_wait(shared.passed.at[1 - self.me])
        self.wait(slot, VALUES[self.me])
        weights = [plgpu.load(shared.p.at[term], layout=TILE) for term in range(self.program.plan.terms)]
        high, total = (load_of_rows(shared.stats.at[1 - self.me, place]) for place in range(2))
        return weights, [high, total], jnp.exp2((stats[0] - high) * self.program.factor)

    def add(self, acc, fade, weights, slot):
        """The output so far with the values of a half, whose place is free from then on."""
        program, name = self.program, VALUES[self.me]
        values = getattr(program.shared, name).at[slot]
        acc = acc * over(fade, acc)
        if program.interpreted:  # which takes both operands of a product from shared memory
            for weight in weights:
                program.shared.mine.at[self.me][...] = weight
                plgpu.commit_smem()
                acc = plus_products(program, acc, (program.shared.mine.at[self.me], values))
        else:
            acc = plus_products(program, acc, *[(weight, values) for weight in weights])
        self.free(slot, name)
        return acc

    def wait(self, slot, *names):
        for name in names:
            plgpu.barrier_wait(self.program.barriers(name)[0].at[slot])

    def free(self, slot, *names):
        for name in names:
            plgpu.barrier_arrive(self.program.barriers(name)[1].at[slot])
