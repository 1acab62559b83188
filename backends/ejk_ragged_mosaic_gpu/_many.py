"""The warpgroups that multiply where query rows are many: query rows are the rows of the products, 64 per warpgroup.

Logits are computed as Q K^T, [query rows, keys], and the output as P V, [query rows, dims]. All warpgroups share the tiles. P stays
in registers. The products of two tiles overlap: the logits of the next tile are asked for before the output of this one, and the
softmax of the next tile runs while the tensor cores work on the output.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import LOWEST, OF_COLUMNS, OF_ROWS, plgpu, store
from ._line import Piece
from ._merge import finished, write_out
from ._program import LOG2_E, of_rows, over, product, Program, sinks_at, tile_of


def compute_piece(program: Program, piece: Piece, warpgroup):
    """A piece for 64 query rows: the output, if the sequence has no other piece, or partial results."""
    plan, shared, results = program.plan, program.shared, program.results
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    query = shared.q.at[q_slot, warpgroup]
    query_rows = program.query_rows(warpgroup)
    tiles = _Tiles(program, piece, warpgroup, query, *_bounds(program, piece, query_rows))
    nothing = tile_of((query_rows.size, plan.value_dim), 0), of_rows(query_rows.size, LOWEST), of_rows(query_rows.size, 0)
    unit = [of_rows(query_rows.size, LEAST_UNIT)] if program.by_row("v") else []

    def natural(high):
        return jnp.maximum(high * (program.factor / LOG2_E), LOWEST)

    def keep(acc, high, total):
        slot = plan.schedule.slot(program.number, piece.sequence)
        store(results.parts.at[slot, program.head, query_rows, pl.ds(0, plan.value_dim)], acc)
        for i, values in enumerate((natural(high), total)):
            store(results.stats.at[slot, program.head, i, query_rows], values)

    def write(acc, high, total):
        sink = sinks_at(program.sink, piece.sequence, program.head, query_rows)
        out, lse = finished(acc, natural(high), total, sink)
        store(results.lse.at[piece.sequence, program.head, query_rows], lse)
        write_out(plan, results.out, query, out, piece.sequence, program.head, query_rows)

    def work():
        acc, *sums = nothing
        carry = lax.fori_loop(0, piece.num_tiles - 1, tiles.step, tiles.begin(acc, [*sums, *unit]))
        acc, (high, total, *units) = tiles.last(*carry)
        scale = over(units[0], acc) if units else program.scale_of(piece, "v")
        done = acc if scale is None else acc * scale, high, total
        pieces = program.ranges.slots(piece.sequence)[1] if plan.writes_out else 0
        pl.when(pieces == 1)(lambda: write(*done))
        pl.when(pieces != 1)(lambda: keep(*done))

    pl.when(piece.num_tiles > 0)(work)
    pl.when(piece.num_tiles == 0)(lambda: keep(*nothing))
    plgpu.barrier_arrive(shared.q_free.at[q_slot])


def _bounds(program, piece, query_rows):
    """First rows and ends of the query rows, int32 [query rows] each, or None where tokens have none of their own; and the first
    row and the end of what all of these query rows see."""
    problem, bounds, seen_by_all = program.problem, [], []
    first, last = lax.div(query_rows.start, problem.group), problem.num_tokens - 1
    count = min(last + 1, (query_rows.size - 2) // problem.group + 2)  # tokens that so many query rows may be of
    row = plgpu.broadcasted_iota(jnp.int32, (query_rows.size,), 0, layout=OF_ROWS) + query_rows.start
    for ref, of_all, narrower in zip(program.query_bounds, (piece.start, piece.end), (jnp.maximum, jnp.minimum), strict=True):
        if ref is None:
            bounds.append(None)
        else:
            of_tokens = [ref[piece.sequence, jnp.minimum(first + i, last)] for i in range(count)]
            # A product: what is selected from a single number has no sign (see the tests).
            bounds.append(sum((row // problem.group == first + i).astype(jnp.int32) * x for i, x in enumerate(of_tokens)))
            of_all = functools.reduce(narrower, of_tokens, of_all)
        seen_by_all.append(of_all)
    return bounds, seen_by_all


LEAST_UNIT = float(jnp.finfo(jnp.float32).tiny)  # of the output, where all value scales are 0


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of a piece, for 64 query rows of one warpgroup: begin, any number of steps, last.

    Each hands on the sums of the output [query rows, dims], the `stats` of these sums [query rows], and the weights of the tile
    whose values come next [query rows, keys]. `stats` are the largest logit without its factor, and the sum of weights. If rows
    have value scales of their own, `stats` also have the largest value scale so far. The output is in units of this scale, so
    that a weight times a scale keeps the accuracy of the weight.

    Attributes:
        program, piece, warpgroup: whose tiles.
        query: ref [query rows, D] in shared memory.
        bounds: first rows and ends, int32 [query rows] or None each.
        seen_by_all: first row and end of what all query rows see. Only tiles beyond need a mask.
    """

    program: Program
    piece: Piece
    warpgroup: Any
    query: Any
    bounds: Any
    seen_by_all: Any

    def begin(self, acc, stats):
        """Weights of the first tile."""
        slot = self.slot(0)
        plgpu.barrier_wait(self.program.shared.k_full.at[slot])
        scales = self.scales(slot)
        products = product(self.query, self.keys(slot))
        weights, stats, _ = self.softmax(0, products, scales, stats)
        return acc, stats, weights

    def step(self, i, carry):
        """The output of tile i, and the weights of tile i + 1."""
        acc, stats, weights = carry
        slot, next_slot = self.slot(i), self.slot(i + 1)
        values = self.values(i)
        plgpu.barrier_wait(self.program.shared.k_full.at[next_slot])
        scales = self.scales(next_slot)
        if self.program.interpreted:  # which takes both operands of a product from shared memory
            products = product(self.query, self.keys(next_slot))
            acc = self.interpreted_sum(acc, weights, values)
            weights, stats, fade = self.softmax(i + 1, products, scales, stats)
        else:

            def both(refs):
                out, *results = refs

                def inner(logits):
                    plgpu.wgmma(logits, self.query, self.keys(next_slot))
                    for term in weights:
                        plgpu.wgmma(out, term, values)
                    products = plgpu.wgmma_accumulator_load(logits, wait_n=1)
                    new_weights, new_stats, fade = self.softmax(i + 1, products, scales, stats)
                    for ref, result in zip(results, (*new_weights, *new_stats, fade), strict=True):
                        ref[...] = result

                pl.run_scoped(inner, plgpu.ACC(weights[0].shape, jnp.float32))

            acc, *results = pl.run_state(both)((plgpu.ACC.init(acc), *weights, *stats, stats[0]))
            weights, stats, fade = results[: len(weights)], results[len(weights) : -1], results[-1]
        plgpu.barrier_arrive(self.program.shared.v_free.at[slot])
        return acc * over(fade, acc), stats, weights

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

    def softmax(self, i, products, scales, stats):
        """Weights of tile i, the new `stats`, and the factor by which this tile shrinks the output so far. The tile's keys are free
        from now on."""
        program, piece, (high, total, *unit) = self.program, self.piece, stats
        plgpu.barrier_arrive(program.shared.k_free.at[self.slot(i)])
        key_scale, value_scale = (
            lax.broadcast_in_dim(x, products.shape, [1]) if program.by_row(name) else x for name, x in scales.items()
        )
        products = products if key_scale is None else products * key_scale
        first = program.first_key(piece, i)
        row = program.row_of(piece, first)

        def masked(x):
            sees = program.sees(piece, first, row, self.bounds, x.shape, 1)
            return jnp.where(sees, x, tile_of(x.shape, -jnp.inf))

        x, factor = products if program.factor != 1 else program.logits(products), program.factor
        start, end = self.seen_by_all
        x = lax.cond((row < jnp.maximum(first, start)) | (row + x.shape[1] > end), masked, lambda x: x, x)
        new_high = jnp.maximum(jnp.maximum(high, jnp.max(x, axis=1)), LOWEST)
        fade = jnp.exp2((high - new_high) * factor)
        p = jnp.exp2((x - over(new_high, x)) * factor)
        stats = [new_high, total * fade + jnp.sum(p, axis=1)]
        if unit:
            new_unit = jnp.maximum(unit[0], jnp.max(jnp.abs(value_scale), axis=1))
            p, fade = p * (value_scale * over(1 / new_unit, p)), fade * (unit[0] / new_unit)
            stats.append(new_unit)
        return list(program.terms(p)), stats, fade

    def scales(self, slot):
        """Scales of "k" and "v": one per row of the tile of keys in this slot, one for all of them, or None."""

        def of_rows(name):
            return plgpu.load(getattr(self.program.shared, f"{name}_scale").at[slot], layout=OF_COLUMNS, optimized=False)

        program = self.program
        return {name: of_rows(name) if program.by_row(name) else program.scale_of(self.piece, name) for name in "kv"}

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
            pl.when(self.warpgroup == 0)(clear_for_all)
            pl.when(self.warpgroup > 0)(lambda: plgpu.barrier_wait(shared.v_clear.at[slot]))

        plgpu.barrier_wait(shared.v_full.at[slot])
        if not program.plan.wide_stages:  # who widens a tile clears it
            pl.when(program.at_an_end(piece, row))(clear if program.plan.warpgroups == 1 else clear_or_wait)
        return values

    def interpreted_sum(self, acc, weights, values):
        """`acc` and the products of the weights and the values, by way of shared memory."""
        for term in weights:
            place = self.program.shared.p.at[self.warpgroup]
            place[...] = term
            plgpu.commit_smem()
            acc = acc + product(place, values)
        return acc
