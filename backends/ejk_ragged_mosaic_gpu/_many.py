"""The warpgroups that multiply where query rows are many: query rows are the rows of the products, 64 per warpgroup.

Logits are computed as Q K^T, [query rows, keys], and the output as P V, [query rows, dims]. All warpgroups share the tiles. P stays
in registers. The products of two tiles overlap: the logits of the next tile are asked for before the output of this one, and the
softmax of the next tile runs while the tensor cores work on the output.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import LOWEST, OF_COLUMNS, plgpu, when
from ._line import Piece
from ._program import of_rows, product, Program, tile_of
from ._results import write_result
from ._softmax import Change, Softmax


def compute_pieces(program: Program, warpgroup):
    """All pieces for 64 query rows: the output, if the sequence has no other piece, or partial results."""
    if program.plan.takes_turns:  # the first turn is that of warpgroup 0
        when(warpgroup == 1)(lambda: plgpu.barrier_arrive(program.shared.turn.at[0]))
    program.ranges.pieces(program.number, lambda piece: _compute_piece(program, piece, warpgroup))
    if program.plan.takes_turns:  # and so is the last, in which nothing is left to do
        when(warpgroup == 0)(lambda: plgpu.barrier_wait(program.shared.turn.at[0]))


def _compute_piece(program: Program, piece: Piece, warpgroup):
    plan, shared = program.plan, program.shared
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    query = shared.q.at[q_slot, warpgroup]
    query_rows = program.query_rows(warpgroup)
    softmax = Softmax.of(program, piece, query_rows)
    tiles = _Tiles(program, piece, warpgroup, query, softmax)
    zeros = tile_of((query_rows.size, plan.value_dim), 0)

    def compute():
        carry = lax.fori_loop(0, piece.num_tiles - 1, tiles.step, tiles.begin(zeros, [*softmax.nothing(), *softmax.unit()]))
        acc, stats = tiles.last(*carry)
        return softmax.results(acc, *stats)

    nothing = zeros, *(of_rows(query_rows.size, value) for value in (LOWEST, 0))
    write_result(softmax, compute, lambda: query, pl.ds(0, plan.value_dim), nothing=nothing)
    plgpu.barrier_arrive(shared.q_free.at[q_slot])


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of a piece, for 64 query rows of one warpgroup: begin, any number of steps, last.

    Each hands on the sums of the output [query rows, dims], the `stats` of `Softmax`, and the weights of the tile whose values come
    next [query rows, keys].

    Attributes:
        program, piece, warpgroup: whose tiles.
        query: ref [query rows, D] in shared memory.
        softmax: the softmax of these query rows.
    """

    program: Program
    piece: Piece
    warpgroup: Any
    query: Any
    softmax: Softmax

    def begin(self, acc, stats):
        """Weights of the first tile."""
        slot = self.slot(0)
        plgpu.barrier_wait(self.program.shared.k_full.at[slot])
        scales = self.scales(slot)
        products = product(self.query, self.keys(slot))
        weights, stats, _ = self.weights(0, products, scales, stats)
        return acc, stats, weights

    def step(self, i, carry):
        """The output of tile i, and the weights of tile i + 1."""
        acc, stats, weights = carry
        slot, next_slot = self.slot(i), self.slot(i + 1)
        values = self.values(i)
        plgpu.barrier_wait(self.program.shared.k_full.at[next_slot])
        scales = self.scales(next_slot)
        self.wait_for_turn()
        if self.program.interpreted:  # which takes both operands of a product from shared memory
            products = product(self.query, self.keys(next_slot))
            acc = self.interpreted_sum(acc, weights, values)
            self.pass_turn()
            weights, stats, change = self.weights(i + 1, products, scales, stats)
        else:

            def both(refs):
                out, *results = refs

                def inner(logits):
                    plgpu.wgmma(logits, self.query, self.keys(next_slot))
                    for term in weights:
                        plgpu.wgmma(out, term, values)
                    self.pass_turn()
                    products = plgpu.wgmma_accumulator_load(logits, wait_n=1)
                    new_weights, new_stats, change = self.weights(i + 1, products, scales, stats)
                    for ref, result in zip(results, (*new_weights, *new_stats, *change), strict=True):
                        ref[...] = result

                pl.run_scoped(inner, plgpu.ACC(weights[0].shape, jnp.float32))

            acc, *results = pl.run_state(both)((plgpu.ACC.init(acc), *weights, *stats, jnp.int32(0), stats[0]))
            weights, stats, change = results[: len(weights)], results[len(weights) : -2], Change(*results[-2:])
        plgpu.barrier_arrive(self.program.shared.v_free.at[slot])
        return change.of(acc), stats, weights

    def last(self, acc, stats, weights):
        """The output of the last tile."""
        i = self.piece.num_tiles - 1
        values = self.values(i)
        if self.program.interpreted:
            acc = self.interpreted_sum(acc, weights, values)
        else:

            def multiply(out):
                for term in weights:
                    plgpu.wgmma(out, term, values)

            acc = pl.run_state(multiply)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(self.program.shared.v_free.at[self.slot(i)])
        return acc, stats

    def weights(self, i, products, scales, stats):
        """Weights of tile i, the new `stats`, and the `Change` that is left to do for the output so far. Nobody reads the tile's
        keys from now on."""
        program, piece = self.program, self.piece
        if program.plan.is_freed("k"):
            plgpu.barrier_arrive(program.shared.k_free.at[self.slot(i)])
        first = program.first_key(piece, i)
        return self.softmax.tile(first, program.row_of(piece, first), products, stats, *scales)

    def wait_for_turn(self):
        """Waits until the other warpgroup has asked for its products. The tensor cores then work for one warpgroup after the other,
        and the softmax of one runs beside the products of the other."""
        if self.program.plan.takes_turns:
            plgpu.barrier_wait(self.program.shared.turn.at[self.warpgroup])

    def pass_turn(self):
        """Says that all products of this step have been asked for."""
        if self.program.plan.takes_turns:
            plgpu.barrier_arrive(self.program.shared.turn.at[1 - self.warpgroup])

    def scales(self, slot):
        """For the tile in this slot: scales of keys, one per row [keys], one for all, or None; factors of the weights [keys], or
        None; the unit of the values, where rows have value scales of their own, or None."""
        program, shared = self.program, self.program.shared
        of_rows = lambda ref: plgpu.load(ref.at[slot], layout=OF_COLUMNS, optimized=False)
        key_scale = of_rows(shared.k_scale) if program.by_row("k") else program.scale_of(self.piece, "k")
        if not program.by_row("v"):
            return key_scale, None, None
        return key_scale, None if program.plan.scales_values else of_rows(shared.v_scale), shared.v_unit[slot]

    def slot(self, i):
        return lax.rem(self.piece.tiles_before + i, self.program.plan.places["k"])

    def keys(self, slot):
        return self.program.shared.k.at[slot].transpose((1, 0))

    def values(self, i):
        """The values of tile i, once they are there, with zeros in rows outside the range: 0 times what such a row holds may be
        NaN. The first warpgroup clears these rows, and the others wait for its word."""
        program, shared, piece, slot = self.program, self.program.shared, self.piece, self.slot(i)
        values = shared.v.at[slot]
        row = program.row_of(piece, program.first_key(piece, i))

        def clear():
            program.clear(piece, row, values)

        def clear_for_all():
            clear()
            plgpu.barrier_arrive(shared.v_clear.at[slot])

        def clear_or_wait():
            when(self.warpgroup == 0)(clear_for_all)
            when(self.warpgroup > 0)(lambda: plgpu.barrier_wait(shared.v_clear.at[slot]))

        plgpu.barrier_wait(shared.v_full.at[slot])
        if not program.plan.wide_stages:  # who widens a tile clears it
            when(program.at_an_end(piece, row))(clear if program.plan.warpgroups == 1 else clear_or_wait)
        return values

    def interpreted_sum(self, acc, weights, values):
        """`acc` and the products of the weights and the values, by way of shared memory."""
        for term in weights:
            place = self.program.shared.p.at[self.warpgroup]
            place[...] = term
            plgpu.commit_smem()
            acc = acc + product(place, values)
        return acc
