"""The warpgroups that multiply where query rows are few and the cache has 8 bits.

As in `_few`, keys are the rows of the products. Their first operands, K and V^T, are widened in registers, so no wide tile passes
through shared memory. Two warpgroups take tiles in turn, so that one widens while the other waits. At the end of a piece the first
warpgroup joins the results of both.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk_ragged_schedule import cdiv

from ._bits import bits_of, float_of, inverse, largest_exponent
from ._few import store_stats, store_sums
from ._jax import LOWEST, OF_COLUMNS, OF_ROWS, plgpu, store, TILE, when
from ._line import Piece
from ._operands import keys_of, store_in_order_of_keys, sums_by_column, values_of
from ._program import load_of_rows, over, plus_products, Program, tile_of, tiling
from ._widen import LEAST_UNIT, load_scales, MOST_UNIT


# Weights are relative to 2 ** 14 in place of 1, so that those next to nothing keep their accuracy in float16. Times a scale, they
# are less than 2 ** 16.
LARGEST_WEIGHT = 14


def shared(plan, dtype):
    """What the warpgroups have in shared memory next to the rings: queries and numbers that pass between warps, for each of them,
    and the results of the second one."""
    rows, readers = plan.block_rows, plan.warpgroups
    arrays = {"joined": (plan.value_dim, rows), "joined_stats": (2, rows), "reduction": (readers, 32 * rows)}
    return {
        "query": plgpu.SMEM((readers, rows, plan.block_dim), dtype, transforms=tiling(plan.block_dim, dtype, plan.line)),
        **{name: plgpu.SMEM(shape, jnp.float32) for name, shape in arrays.items()},
        **{f"joined_{state}": plgpu.Barrier(num_arrivals=1) for state in ("full", "free")},
    }


def compute_pieces(program: Program, warpgroup):
    """Partial results of all pieces, in memory."""
    joined_free = program.shared.joined_free

    def release():
        program.release(*program.plan.rings)
        plgpu.barrier_arrive(joined_free)

    when(warpgroup == 0)(release)
    program.ranges.pieces(program.number, lambda piece: _compute_piece(program, piece, warpgroup))
    when(warpgroup == 1)(lambda: plgpu.barrier_wait(joined_free))


def _compute_piece(program: Program, piece: Piece, warpgroup):
    plan, shared = program.plan, program.shared
    rows, keys = plan.block_rows, plan.schedule.block_keys
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    query = shared.query.at[warpgroup]
    store_in_order_of_keys(shared.q.at[q_slot, 0], query, program.interpreted)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.q_free.at[q_slot])
    bounds, _ = program.bounds(piece, program.query_rows(), OF_COLUMNS)

    def tile(turn, carry):
        i = first_tile + turn * plan.warpgroups
        acc, high, total, unit = carry
        slot = lax.rem(piece.tiles_before + i, plan.stages)
        first = program.first_key(piece, i)
        row = program.row_of(piece, first)
        sees = program.sees(piece, first, row, bounds, (keys, rows), 0)

        x, key_scale, v, (value_scale, new_unit) = _products(program, piece, slot, row, query, unit)
        x = x if key_scale is None else x * (over(key_scale, x) if key_scale.ndim else key_scale)
        x = jnp.where(sees, program.logits(x), tile_of((keys, rows), -jnp.inf))
        new_high = jnp.maximum(jnp.maximum(high, over_keys("max", x)), LOWEST)
        fade = jnp.exp2(high - new_high)
        p = jnp.exp2((x - lax.broadcast_in_dim(new_high, x.shape, [1])) + LARGEST_WEIGHT)
        total = total * lax.broadcast_in_dim(fade, total.shape, [1]) + p
        terms = list(program.terms(p if value_scale is None else p * over(value_scale, p)))
        for place, term in enumerate(terms):
            place += warpgroup * plan.terms
            shared.p.at[place].transpose((1, 0))[...] = term
        plgpu.commit_smem()  # which also orders the loads from this place before the next copy into it
        for free in (shared.k_free, shared.v_free):
            plgpu.barrier_arrive(free.at[slot])
        if value_scale is not None:
            smaller = (float_of(bits, program.interpreted) for bits in (unit, inverse(new_unit)))
            fade = fade * math.prod(smaller)  # the ratio of the units may be less than any float32
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, [1])
        weights = [shared.p.at[warpgroup * plan.terms + place] for place in range(plan.terms)]
        return _plus_products(program, acc, v, weights), new_high, total, new_unit

    first_tile = (warpgroup + piece.tiles_before) & 1  # tiles with even numbers are those of the first warpgroup
    over_keys = functools.partial(_reduced, scratch=shared.reduction.at[warpgroup], interpreted=program.interpreted)
    low = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), OF_COLUMNS)
    nothing = tile_of((plan.value_dim, rows), 0), low, tile_of((keys, rows), 0), jnp.int32(bits_of(LEAST_UNIT))
    acc, high, total, unit = lax.fori_loop(0, cdiv(piece.num_tiles - first_tile, plan.warpgroups), tile, nothing)
    weight = 2.0**-LARGEST_WEIGHT  # before it meets `acc`, so that no product leaves the range
    scale = float_of(unit, program.interpreted) if program.by_row("v") else program.scale_of(piece, "v")
    acc = acc * (weight if scale is None else scale * weight)
    total = over_keys("add", total) * weight
    when(warpgroup == 1)(lambda: _pass_on(shared, acc, high, total))
    when(warpgroup == 0)(lambda: _store(program, piece, *_joined(shared, acc, high, total)))


def _pass_on(shared, acc, high, total):
    """Leaves the results of a piece in shared memory, for the first warpgroup."""
    plgpu.barrier_wait(shared.joined_free)
    store(shared.joined, acc)
    for i, values in enumerate((high, total)):
        store(shared.joined_stats.at[i], values)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.joined_full)


def _joined(shared, acc, high, total):
    """The results of a piece: those of this warpgroup, which is the first, and of the other."""
    plgpu.barrier_wait(shared.joined_full)
    other = plgpu.load(shared.joined, layout=TILE, optimized=False)
    other_high, other_total = (plgpu.load(shared.joined_stats.at[i], layout=OF_COLUMNS, optimized=False) for i in range(2))
    plgpu.barrier_arrive(shared.joined_free)
    most = jnp.maximum(high, other_high)
    fade, other_fade = jnp.exp2(high - most), jnp.exp2(other_high - most)
    over_rows = lambda x: lax.broadcast_in_dim(x, acc.shape, [1])
    return acc * over_rows(fade) + other * over_rows(other_fade), most, total * fade + other_total * other_fade


def _store(program, piece, acc, high, total):
    store_sums(program, piece, 0, sums_by_column(acc, program.interpreted))
    store_stats(program, piece, high, total)


def _products(program, piece, slot, row, query, unit):
    """What a step needs of the tile in this slot, read at `row`. The values are widened while the tensor cores work.

    Returns:
        q . k [keys, query rows], the scales of the keys, the values as `values_of` gives them, and `_value_scales`.
    """
    shared = program.shared
    plgpu.barrier_wait(shared.k_full.at[slot])
    k = keys_of(shared.k.at[slot], program.problem.dtype, program.interpreted)
    key_scale = load_of_rows(shared.k_scale.at[slot]) if program.by_row("k") else program.scale_of(piece, "k")

    def values():
        plgpu.barrier_wait(shared.v_full.at[slot])
        v = _cleared(program, piece, row, values_of(shared.v.at[slot], program.interpreted))
        return v, _value_scales(program, piece, slot, row, unit)

    if program.interpreted:
        return _interpreted(k, query), key_scale, *values()

    def multiply(acc):
        plgpu.wgmma(acc, k, query.transpose((1, 0)))
        others = values()
        return acc[...], others

    x, others = pl.run_scoped(multiply, plgpu.ACC((k.shape[0], query.shape[0]), jnp.float32))
    return x, key_scale, *others


def _value_scales(program, piece, slot, row, unit):
    """What multiplies the weights of a tile, one number per row of the tile [keys], or None; and the unit of these products.

    The unit, the bits of a power of two, is the largest exponent of the scales so far. Weights times scales then stay in the range
    of float16. A larger unit shrinks earlier sums.
    """
    if not program.by_row("v"):
        return None, unit
    ref = program.shared.v_scale.at[slot]
    scales = load_scales(piece, ref, row)
    unit = jnp.maximum(unit, jnp.minimum(largest_exponent(scales, program.interpreted), bits_of(MOST_UNIT)))
    return load_scales(piece, ref, row, OF_ROWS) * float_of(inverse(unit), program.interpreted), unit


def _cleared(program, piece, row, v):
    """Values [Dv, keys] with zeros in rows of the cache outside the range: 0 times what such a row holds may be NaN."""
    if jnp.issubdtype(program.problem.cache_dtype, jnp.integer):
        return v

    def clear(v):
        key = plgpu.broadcasted_iota(jnp.int32, v.shape, 1, layout=TILE) + row
        return jnp.where((key >= piece.start) & (key < piece.end), v, tile_of(v.shape, 0, v.dtype))

    return lax.cond(program.at_an_end(piece, row), clear, lambda v: v, v)


def _plus_products(program, acc, v, weights):
    if program.interpreted:
        return sum((_interpreted(v, weight) for weight in weights), acc)

    return plus_products(program, acc, *[(v, weight.transpose((1, 0))) for weight in weights])


def _reduced(operation, x, scratch, interpreted):
    """The largest ("max") or the sum ("add") over the rows of a matrix, by way of an array in shared memory that is this
    warpgroup's own. JAX's reductions have one array for all warpgroups."""
    if interpreted:
        return {"max": jnp.max, "add": jnp.sum}[operation](x, axis=0)
    layout = TILE.reduce(0)

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType()), return_type=plgpu.ShapeDtypeStruct((x.shape[1],), x.dtype, layout=layout))
    def reduce(_, matrix, scratch):
        return matrix.reduce(operation, 0, scratch)

    return reduce(x, scratch)


def _interpreted(a, ref):
    """`a` [m, k] times what `ref` [n, k] refers to, transposed. The interpreter's products have no operands in registers."""
    return jnp.dot(a, ref[...].T, preferred_element_type=jnp.float32)
