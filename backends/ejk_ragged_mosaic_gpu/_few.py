"""The warpgroup that multiplies where query rows are few: keys are the rows of the products.

The tensor cores take 64 rows of one operand and 8 of the other. So logits are computed as K Q^T, [keys, query rows], and the output
as V^T P^T, [dims, query rows]. So little padding is multiplied, and a thread holds a few numbers of a tile. Maxima over keys pass
between warps only where the reference of weights changes, and sums over keys only at the end of a piece.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import LOWEST, OF_COLUMNS, plgpu, store, TILE, TRANSPOSED, when
from ._line import Piece
from ._program import AT_ONCE, load_of_rows, LOG2_E, over, over_rows, plus_products, Program, tile_of, unknown_zero
from ._reference import refer


TINY = float(jnp.finfo(jnp.float32).tiny)


def compute_pieces(program: Program, warpgroup):
    """Partial results of all pieces, in memory."""
    del warpgroup  # there is one
    program.ranges.pieces(program.number, lambda piece: _compute_piece(program, piece))


def _compute_piece(program: Program, piece: Piece):
    plan, shared = program.plan, program.shared
    rows, keys = plan.block_rows, plan.schedule.block_keys
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    bounds = [
        None if ref is None else plgpu.load(ref.at[piece.sequence, program.query_rows()], layout=OF_COLUMNS, optimized=False)
        for ref in program.query_bounds
    ]

    def tile(i, carry):
        sums, high, totals = carry
        number = (piece.tiles_before + i) * plan.parts
        slots = [lax.rem(number + part, plan.places["k"]) for part in range(plan.parts)]
        first = program.first_key(piece, i)
        row = program.row_of(piece, first)
        sees = program.sees(piece, first, row, bounds, (keys, rows), 0)

        x = _products(program, slots, shared.q.at[q_slot + unknown_zero(i), 0])
        key_scale, value_scale = (_scale(program, piece, name, slots[0]) for name in "kv")
        if plan.value_start is None:
            plgpu.barrier_arrive(shared.k_free.at[slots[0]])
        x = x if key_scale is None else x * (over(key_scale, x) if key_scale.ndim else key_scale)
        x = jnp.where(sees, program.logits(x), tile_of((keys, rows), -jnp.inf))
        high, (sums, totals) = refer(program, high, x, largest, shrink, (sums, totals))
        p = jnp.exp2(x - over_rows(high, x))
        total, *rounded = totals
        terms = list(program.terms(p * over(value_scale, p) if rounded else p))
        for place, term in enumerate(terms):
            shared.p.at[place].transpose((1, 0))[...] = plgpu.layout_cast(term, TRANSPOSED)
        plgpu.commit_smem()
        totals = [total + p, *(x + _without_scales(terms, p, value_scale) for x in rounded)]

        if plan.value_start is None:
            plgpu.barrier_wait(shared.v_full.at[slots[0]])
        weights = [shared.p.at[place].transpose((1, 0)) for place in range(plan.terms)]
        new_sums = []
        for part, slot in enumerate(slots):
            if plan.value_parts[part]:
                v, acc = _laid_out(program, "v", slot, part, sees, program.at_an_end(piece, row)), sums[len(new_sums)]
                new_sums.append(plus_products(program, acc, *[(v.transpose((1, 0)), weight) for weight in weights]))
            plgpu.barrier_arrive(shared.v_free.at[slot] if plan.value_start is None else shared.k_free.at[slot])
        return new_sums, high, totals

    largest = functools.partial(jnp.max, axis=0)
    shrink = lambda fade, sums: jax.tree.map(lambda x: x * over_rows(fade, x), sums)
    low = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), OF_COLUMNS)
    sums = [tile_of((size, rows), 0) for _, size in filter(None, plan.value_parts)]
    totals = [tile_of((keys, rows), 0)] * (2 if program.by_row("v") else 1)
    sums, high, totals = lax.fori_loop(0, piece.num_tiles, tile, (sums, low, totals))
    plgpu.barrier_arrive(shared.q_free.at[q_slot])
    total, *rounded = (jnp.sum(x, axis=0) for x in totals)
    scale = program.scale_of(piece, "v")
    if rounded:  # the output in units of the weights as they were rounded, so that the weight of a single row is exact
        ratio = jnp.where(rounded[0] > 0, total / rounded[0], total)
        sums = [acc * over_rows(ratio, acc) for acc in sums]
    first = 0
    for acc in sums if scale is None else [acc * scale for acc in sums]:
        store_sums(program, piece, first, plgpu.layout_cast(acc, TRANSPOSED))
        first += acc.shape[0]
    store_stats(program, piece, high, total)


def _products(program, slots, query):
    """q . k of a tile whose parts are in these slots, [keys, query rows]."""
    plan, shared = program.plan, program.shared

    def multiply(acc):
        for part, slot in enumerate(slots):
            plgpu.barrier_wait(shared.k_full.at[slot])
            k, first = _laid_out(program, "k", slot, part), part * plan.part_dim
            size = min(plan.part_dim, plan.block_dim - first)
            if size > 0:
                k = k if size == plan.part_dim else k.at[:, pl.ds(0, size)]
                plgpu.wgmma(acc, k, query.at[:, pl.ds(first, size)].transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((plan.schedule.block_keys, plan.block_rows), jnp.float32))


def _scale(program, piece, name, slot):
    """The scales of "k" or "v": one per row of the tile whose first part is in this slot [keys], one for all of them, or None."""
    if not program.by_row(name):
        return program.scale_of(piece, name)
    return load_of_rows(getattr(program.shared, f"{name}_scale").at[slot])


def _without_scales(terms, p, scale):
    """The weights whose products with scales, one per row, are the sum of `terms`: `p` but for rounding. Where a scale is next to
    nothing, they are `p`."""
    tiny = jnp.abs(scale) < TINY
    inverse, kept = jnp.where(tiny, 0, 1 / scale), jnp.where(tiny, 1, 0)
    return sum(term.astype(jnp.float32) for term in terms) * over(inverse, p) + p * over(kept, p)


def _laid_out(program, name, slot, part, sees=None, at_an_end=False):
    """A part of a tile that has arrived, or the value's columns in the part, in the layout that products take.

    If a mask of the rows that each query row sees is given, rows that no query row sees become zeros: such a row may hold NaN, and
    0 times NaN is NaN. Such rows lie `at_an_end` of the range or between tokens.
    """
    plan, shared = program.plan, program.shared
    if name == "v" and plan.value_start is not None:
        arrived = shared.k.at[slot, :, pl.ds(*plan.value_parts[part])]
    else:
        arrived = getattr(shared, name).at[slot]
    tile = arrived if plan.direct else getattr(shared, f"{name}_tile")

    def lay_out():
        seen = None if sees is None else jnp.max(sees.astype(jnp.int32), axis=1) > 0
        for first in range(0, tile.shape[1], AT_ONCE):
            columns = pl.ds(first, min(AT_ONCE, tile.shape[1] - first))
            values = plgpu.load(arrived.at[:, columns], layout=TILE, optimized=plan.direct)
            if seen is not None:
                zeros = tile_of(values.shape, 0, values.dtype)
                values = jnp.where(lax.broadcast_in_dim(seen, values.shape, [0]), values, zeros)
            tile.at[:, columns][...] = values
        plgpu.commit_smem()

    if not plan.direct or (sees is not None and program.problem.junk_between_tokens):
        lay_out()
    elif sees is not None and not plan.wide_stages:  # who widens a tile clears it
        when(at_an_end)(lay_out)
    return tile


def store_sums(program, piece, first, acc):
    """Writes sums of values [dims, query rows], from the dimension `first` on, from registers to memory. No thread waits for it."""
    store(sums_of(program, piece).at[:, pl.ds(first, acc.shape[0])].transpose((1, 0)), acc)


def sums_of(program, piece):
    """Ref of the sums of values of a piece [query rows, dims]."""
    slot = program.plan.schedule.slot(program.number, piece.sequence)
    return program.results.parts.at[slot, program.head, program.query_rows()]


def store_stats(program, piece, high, total):
    """Writes the references and the sums of weights [query rows] in the same way."""
    plan = program.plan
    slot = plan.schedule.slot(program.number, piece.sequence)
    for i, values in enumerate((high / LOG2_E, total)):
        store(program.results.stats.at[slot, program.head, i, program.query_rows()], values)
