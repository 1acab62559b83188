"""The pair of warpgroups that multiply where values are wide or lie in the key's rows, and query rows are many.

Both warpgroups have the same 64 query rows, and each has half of the columns of the output, because one warpgroup has no room for
512 columns in its registers. A tile of keys has two halves. The first warpgroup computes the weights of the first half, and the
second warpgroup those of the second half. Weights, and what goes from half to half, pass through shared memory.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import plgpu, store, TILE, when
from ._line import Piece
from ._program import load_of_rows, product, Program, tile_of, tiling, unknown_zero
from ._reference import any_in_warp
from ._results import write_result
from ._softmax import Change, Softmax


PAIR = 2
VALUES = "v0", "v1"  # the rings of values, one for each warpgroup


def only_keys(plan) -> list[str]:
    """The rings of columns that belong to the key only. A half is free there once its logits are: who computes them is the only one
    who reads it."""
    return [name for name in plan.rings if name not in VALUES]


def first_free(plan, me: int) -> list[str]:
    """The rings in which all places are free at the beginning, as one warpgroup says for itself or for both."""
    return [VALUES[me], *(only_keys(plan) if me == 0 else [])]


def shared(plan, dtype, interpreted):
    """What the warpgroups pass to each other in shared memory: weights, their references, and at the end of a piece the sums of
    weights.

    Weights have one place. The warpgroups take turns, so who writes has read what the other wrote. A warp reads what the same warp
    of the other warpgroup wrote, so warps need not wait for each other. In the interpreter, `mine` has a place for the weights of
    each warpgroup, because products take them from shared memory.
    """
    tile, tiled = (64, plan.place_rows), tiling(plan.place_rows, dtype)
    arrays = {
        "p": plgpu.SMEM((plan.terms, *tile), dtype, transforms=tiled),
        "stats": plgpu.SMEM((PAIR, 2, 64), jnp.float32),
        "passed": plgpu.Barrier(num_arrivals=1, num_barriers=PAIR),
        "asked": plgpu.Barrier(num_arrivals=1),
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

    def compute():
        carry = tile_of((64, size), 0), softmax.nothing()
        acc, stats = lax.fori_loop(0, piece.num_tiles, halves.tile, carry)
        acc, reference, total = softmax.results(acc, *stats)
        return acc, reference, total + halves.exchanged(total)

    # At the end nobody reads the query: all weights have passed.
    write_result(softmax, compute, lambda: query.at[:, columns], columns, with_stats=me == 0)
    plgpu.barrier_arrive(shared.q_free.at[q_slot])


class _Weighed(NamedTuple):
    """A half of a tile, weighed.

    Attributes:
        weights: weights [64, keys], in the terms of `Program.terms`.
        stats: the `stats` of `Softmax` after this half. Sums of weights are those of the halves that this warpgroup weighed.
        change: the `Change` that is left to do for the output so far.
    """

    weights: list[Any]
    stats: list[Any]
    change: Change


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
        return (self.first if self.me == 0 else self.second)(carry, i)

    def first(self, carry, i):
        """Tile i for the first warpgroup: its own half, then the other."""
        acc, stats = carry
        half = self.weigh(i, self.products(i), stats)
        acc, _ = self.add(acc, half, 0)
        half = self.received(half.stats)
        acc, _ = self.add(acc, half, 1)
        return acc, half.stats

    def second(self, carry, i):
        """Tile i for the second warpgroup, which has logits of its own half ready when the weights of the other half come. It
        computes its weights while the tensor cores add the values of the other half."""
        acc, stats = carry
        products = self.products(i)
        half = self.received(stats)
        acc, half = self.add(acc, half, 0, beside=lambda stats: self.weigh(i, products, stats))
        acc, _ = self.add(acc, half, 1)
        return acc, half.stats

    def products(self, i):
        """q . k of the half of tile i that is mine, part by part as keys come: [64, keys]. The tensor cores serve the first
        warpgroup before the second, so that the first one's softmax runs while they compute the second one's products."""
        plan, shared, piece, me = self.program.plan, self.program.shared, self.piece, self.me
        if me == 1:
            plgpu.barrier_wait(shared.asked)
        zero = unknown_zero(i)
        query = shared.q.at[lax.rem(piece.number, plan.query_slots) + zero, 0]

        def multiply(logits):
            for name in plan.order(me):
                if size := plan.key_columns(name):
                    self.wait(me, name)
                    keys = getattr(shared, name).at[me + zero, :, pl.ds(0, size)]
                    plgpu.wgmma(logits, query.at[:, pl.ds(plan.rings[name].first, size)], keys.transpose((1, 0)))
            if me == 0:
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(shared.asked)
            return logits[...]

        products = pl.run_scoped(multiply, plgpu.ACC((64, plan.place_rows), jnp.float32))
        self.free(me, *only_keys(plan))
        return products

    def weigh(self, i, products, stats):
        """The half that is mine, weighed. The other warpgroup gets weights and references, and finds zeros in rows of the value
        outside the range: 0 times what such a row holds may be NaN."""
        program, piece, shared, me = self.program, self.piece, self.program.shared, self.me
        first = program.first_key(piece, i)
        row = program.row_of(piece, first) + me * program.plan.place_rows
        weights, stats, change = self.softmax.tile(first, row, products, stats)
        for term, weight in enumerate(weights):
            shared.p.at[term][...] = weight
        store(shared.stats.at[me, 0], stats[0])
        self.wait(me, *[name for name in VALUES if not program.plan.key_columns(name)])

        def clear():
            for name in VALUES:
                program.clear(piece, row, getattr(shared, name).at[me])

        when(program.at_an_end(piece, row))(clear)
        plgpu.barrier_arrive(shared.passed.at[me])
        return _Weighed(weights, stats, change)

    def received(self, stats):
        """The other warpgroup's half, weighed. `stats` are those before this half."""
        shared, other = self.program.shared, 1 - self.me
        plgpu.barrier_wait(shared.passed.at[other])
        self.wait(other, VALUES[self.me])
        weights = [plgpu.load(shared.p.at[term], layout=TILE) for term in range(self.program.plan.terms)]
        reference, totals = stats
        new = load_of_rows(shared.stats.at[other, 0])
        happens = any_in_warp(new - reference, 0, self.program.interpreted)
        change = Change(happens, jnp.exp2((reference - new) * self.program.factor))
        return _Weighed(weights, [new, change.of(totals)], change)

    def exchanged(self, total):
        """The other warpgroup's sums of weights [query rows] at the end of a piece, for mine."""
        shared, me = self.program.shared, self.me
        store(shared.stats.at[me, 1], total)
        plgpu.barrier_arrive(shared.passed.at[me])
        plgpu.barrier_wait(shared.passed.at[1 - me])
        return load_of_rows(shared.stats.at[1 - me, 1])

    def add(self, acc, half, place, beside=None):
        """The output so far with the values of a half, whose place is free from then on. With `beside`, a function of the `stats`,
        also the next half, weighed while the tensor cores work."""
        program = self.program
        values = getattr(program.shared, VALUES[self.me]).at[place]
        acc = half.change.of(acc)
        following, tree = jax.tree.flatten(half if beside else None)
        weigh_next = lambda: jax.tree.leaves(beside(half.stats) if beside else None)

        def multiply(refs):
            out, *results = refs
            for weight in half.weights:
                plgpu.wgmma(out, weight, values)
            for ref, result in zip(results, weigh_next(), strict=True):
                ref[...] = result

        if program.interpreted:  # which takes both operands of a product from shared memory
            mine = program.shared.mine.at[self.me]
            for weight in half.weights:
                mine[...] = weight
                plgpu.commit_smem()
                acc = acc + product(mine, values)
            following = weigh_next()
        else:
            acc, *following = pl.run_state(multiply)((plgpu.ACC.init(acc), *following))
        self.free(place, VALUES[self.me])
        return acc, jax.tree.unflatten(tree, following)

    def wait(self, place, *names):
        for name in names:
            plgpu.barrier_wait(self.program.barriers(name)[0].at[place])

    def free(self, place, *names):
        for name in names:
            plgpu.barrier_arrive(self.program.barriers(name)[1].at[place])
