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
from ._operands import bytes_of_values, keys_of, store_in_order_of_keys, sums_by_column, values_of
from ._program import load_of_rows, over, over_rows, Program, tile_of, tiling
from ._reference import GROWTH, refer
from ._widen import LEAST_UNIT, load_scales, MOST_UNIT


# The reference has the weight 2 ** REFERENCE_WEIGHT in place of 1, so that weights next to nothing keep their accuracy in float16.
# Times a scale, no weight reaches 2 ** 16.
REFERENCE_WEIGHT = 14 - GROWTH
PART_ROWS = 64  # rows of a tile that are widened at once


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
    rows = plan.block_rows
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    query = shared.query.at[warpgroup]
    store_in_order_of_keys(shared.q.at[q_slot, 0], query, program.interpreted)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.q_free.at[q_slot])
    bounds, seen_by_all = program.bounds(piece, program.query_rows(), OF_COLUMNS)

    def tile(turn, carry):
        i = first_tile + turn * plan.warpgroups
        acc, high, total, unit = carry
        slot = lax.rem(piece.tiles_before + i, plan.stages)
        first = program.first_key(piece, i)
        row = program.row_of(piece, first)

        products, values, (value_scales, new_unit) = _products(program, piece, slot, row, query, unit)
        x = [_logits(program, piece, slot, part, of_part) for part, of_part in zip(parts, products, strict=True)]
        x = program.masked(piece, first, [row + part.start for part in parts], bounds, seen_by_all, x, 0)

        def shrink(fade, sums):
            acc, total = sums
            total = total * over_rows(fade, total)
            if program.by_row("v"):
                smaller = (float_of(bits, program.interpreted) for bits in (unit, inverse(new_unit)))
                fade = fade * math.prod(smaller)  # the ratio of the units may be less than any float32
            return acc * over_rows(fade, acc), total

        largest = functools.partial(over_keys, "max")
        highest = functools.reduce(jnp.maximum, x)
        high, (acc, total) = refer(program, high, highest, largest, shrink, (acc, total), anyway=new_unit != unit)
        p = [jnp.exp2(of_part - over_rows(high, of_part)) for of_part in x]
        total = total + sum(p)
        for part, weights, scale in zip(parts, p, value_scales, strict=True):
            terms = program.terms(weights * (2.0**REFERENCE_WEIGHT if scale is None else over(scale, weights)))
            for place, term in zip(places, terms, strict=True):
                shared.p.at[place, :, part].transpose((1, 0))[...] = term
        plgpu.commit_smem()  # which also orders the loads from this place before the next copy into it
        for free in (shared.k_free, shared.v_free):
            plgpu.barrier_arrive(free.at[slot])
        weights = [[shared.p.at[place, :, part] for place in places] for part in parts]
        return _plus_products(program, piece, row, acc, values, weights), high, total, new_unit

    parts = _parts_of(plan)
    places = [warpgroup * plan.terms + i for i in range(plan.terms)]
    first_tile = (warpgroup + piece.tiles_before) & 1  # tiles with even numbers are those of the first warpgroup
    over_keys = functools.partial(_reduced, scratch=shared.reduction.at[warpgroup], interpreted=program.interpreted)
    low = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), OF_COLUMNS)
    nothing = tile_of((plan.value_dim, rows), 0), low, tile_of((PART_ROWS, rows), 0), jnp.int32(bits_of(LEAST_UNIT))
    acc, high, total, unit = lax.fori_loop(0, cdiv(piece.num_tiles - first_tile, plan.warpgroups), tile, nothing)
    weight = 2.0**-REFERENCE_WEIGHT  # before it meets `acc`, so that no product leaves the range
    scale = float_of(unit, program.interpreted) if program.by_row("v") else program.scale_of(piece, "v")
    acc = acc * (weight if scale is None else scale * weight)
    total = over_keys("add", total)
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
    return acc * over_rows(fade, acc) + other * over_rows(other_fade, acc), most, total * fade + other_total * other_fade


def _store(program, piece, acc, high, total):
    store_sums(program, piece, 0, sums_by_column(acc, program.interpreted))
    store_stats(program, piece, high, total)


def _parts_of(plan):
    """The rows of the parts of a tile."""
    return [pl.ds(first, PART_ROWS) for first in range(0, plan.schedule.block_keys, PART_ROWS)]


def _products(program, piece, slot, row, query, unit):
    """What a step needs of the tile in this slot, read at `row`.

    The values of the first part are widened here: while the tensor cores work, if there is one part, or after that. There would not
    be enough registers for the keys of all parts and values. Values of other parts stay as they are.

    Returns:
        q . k [keys, query rows] of each part, the values of each part as `values_of` takes or gives them, and `_value_scales`.
    """
    shared, interpreted, parts = program.shared, program.interpreted, _parts_of(program.plan)
    plgpu.barrier_wait(shared.k_full.at[slot])
    keys = lambda part: keys_of(shared.k.at[slot, part], program.problem.dtype, interpreted)

    def first_values():
        plgpu.barrier_wait(shared.v_full.at[slot])
        v = _values(program, piece, row, parts[0], bytes_of_values(shared.v.at[slot, parts[0]]))
        return v, _value_scales(program, piece, slot, row, unit)

    def multiply(*accs):
        for acc, part in zip(accs, parts, strict=True):
            plgpu.wgmma(acc, keys(part), query.transpose((1, 0)))
        if len(parts) > 1:
            return [acc[...] for acc in accs], first_values()
        others = first_values()
        return [acc[...] for acc in accs], others

    if interpreted:
        products, (v, scales) = [_interpreted(keys(part), query) for part in parts], first_values()
    else:
        of_part = plgpu.ACC((PART_ROWS, query.shape[0]), jnp.float32)
        products, (v, scales) = pl.run_scoped(multiply, *[of_part] * len(parts))
    return products, [v, *[bytes_of_values(shared.v.at[slot, part]) for part in parts[1:]]], scales


def _logits(program, piece, slot, part, x):
    """The logits of a part of a tile, from its products."""
    key_scale = load_of_rows(program.shared.k_scale.at[slot, part]) if program.by_row("k") else program.scale_of(piece, "k")
    return program.logits(x if key_scale is None else x * (over(key_scale, x) if key_scale.ndim else key_scale))


def _value_scales(program, piece, slot, row, unit):
    """What multiplies the weights of each part of a tile, one number per row [keys], or None; and the unit of these products, next
    to the weight of the reference.

    The unit, the bits of a power of two, is the largest exponent of the scales so far. Weights times scales then stay in the range
    of float16. A larger unit shrinks earlier sums.
    """
    parts = _parts_of(program.plan)
    if not program.by_row("v"):
        return [None] * len(parts), unit
    refs = [(program.shared.v_scale.at[slot, part], row + part.start) for part in parts]
    exponents = [largest_exponent(load_scales(piece, *of_part), program.interpreted) for of_part in refs]
    unit = jnp.maximum(unit, jnp.minimum(functools.reduce(jnp.maximum, exponents), bits_of(MOST_UNIT)))
    factor = float_of(inverse(unit, REFERENCE_WEIGHT), program.interpreted)
    return [load_scales(piece, *of_part, OF_ROWS) * factor for of_part in refs], unit


def _values(program, piece, row, part, numbers):
    """Values [Dv, keys] of a part of a tile, with zeros in rows outside the range: 0 times what such a row holds may be NaN."""
    v = values_of(numbers, program.interpreted)
    if jnp.issubdtype(program.problem.cache_dtype, jnp.integer):
        return v

    def clear(v):
        key = plgpu.broadcasted_iota(jnp.int32, v.shape, 1, layout=TILE) + row + part.start
        return jnp.where((key >= piece.start) & (key < piece.end), v, tile_of(v.shape, 0, v.dtype))

    return lax.cond(program.at_an_end(piece, row), clear, lambda v: v, v)


def _plus_products(program, piece, row, acc, values, weights):
    """`acc` and the products of values and weights, part by part. The values of a part are widened while the tensor cores work for
    the part before."""
    first, *others = values
    widened = lambda i: first if i == 0 else _values(program, piece, row, _parts_of(program.plan)[i], others[i - 1])
    if program.interpreted:
        return sum((_interpreted(widened(i), term) for i, terms in enumerate(weights) for term in terms), acc)

    def multiply(out):
        for i, terms in enumerate(weights):
            v = widened(i)
            for term in terms:
                plgpu.wgmma(out, v, term.transpose((1, 0)))

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


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
