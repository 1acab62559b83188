"""The warpgroups that multiply where query rows are few and the cache has 8 bits.

As in `_few`, keys are the rows of the products. Their first operands, K and V^T, are widened in registers, so no wide tile passes
through shared memory. Two warpgroups take tiles in turn, so that one widens while the other waits. At the end of a piece the first
warpgroup merges the results of both.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk_ragged_schedule import cdiv

from ._bits import bits_of, float_of, inverse, largest_exponent
from ._few import store_stats, store_sums, sums_of
from ._jax import LOWEST, OF_COLUMNS, OF_ROWS, plgpu, store, TILE, when
from ._line import Piece
from ._operands import bytes_of_values, keys_of, query_of, store_in_order_of_keys, store_own_sums, sums_by_column, values_of
from ._program import AT_ONCE, load_of_rows, over, over_rows, Program, tile_of, tiling, unknown_zero
from ._reference import GROWTH, refer
from ._tiles import OPERAND_DIM
from ._widen import LEAST_UNIT, load_scales, MOST_UNIT


# The reference has the weight 2 ** REFERENCE_WEIGHT in place of 1, so that weights next to nothing keep their accuracy in float16.
# Times a scale, no weight reaches 2 ** 16.
REFERENCE_WEIGHT = 14 - GROWTH
PART_ROWS = 64  # rows of a tile that are widened at once
KEYS_AT_ONCE = 128  # dimensions of wide keys that are widened at once, next to the sums of an output of as many dimensions
VALUES_AT_ONCE = 384  # dimensions of values that are widened at once, at most. Of more, AT_ONCE are


def shared(plan, dtype):
    """What the warpgroups have in shared memory next to the rings: queries and numbers that pass between warps, for each of them,
    and the results of the second one."""
    rows, readers = plan.block_rows, plan.warpgroups
    arrays = {"second": (plan.value_dim, rows), "second_stats": (2, rows), "reduction": (readers, 32 * rows)}
    return {
        "query": plgpu.SMEM((readers, rows, plan.block_dim), dtype, transforms=tiling(plan.block_dim, dtype, plan.line)),
        **{name: plgpu.SMEM(shape, jnp.float32) for name, shape in arrays.items()},
        **{f"second_{state}": plgpu.Barrier(num_arrivals=1) for state in ("full", "free")},
    }


def compute_pieces(program: Program, warpgroup):
    """Partial results of all pieces, in memory."""
    second_free = program.shared.second_free

    def release():
        program.release(*program.plan.rings)
        plgpu.barrier_arrive(second_free)

    when(warpgroup == 0)(release)
    program.ranges.pieces(program.number, lambda piece: _compute_piece(program, piece, warpgroup))
    when(warpgroup == 1)(lambda: plgpu.barrier_wait(second_free))


def _compute_piece(program: Program, piece: Piece, warpgroup):
    plan, shared = program.plan, program.shared
    rows = plan.block_rows
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    group, before = program.problem.group, program.columns_before
    query = query_of(shared.q.at[q_slot, 0], plan.block_dim, plan.joined, group, before, program.interpreted)
    store_in_order_of_keys(query, shared.query.at[warpgroup], program.interpreted)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.q_free.at[q_slot])
    bounds, seen_by_all = program.bounds(piece, program.query_rows(), OF_COLUMNS)

    def tile(turn, carry):
        i = first_tile + turn * plan.warpgroups
        accs, high, total, unit = carry
        slot = lax.rem(piece.tiles_before + i, plan.stages)
        first = program.first_key(piece, i)
        row = program.row_of(piece, first)

        query = shared.query.at[warpgroup + unknown_zero(i)]
        products, key_scales, values, (value_scales, new_unit) = _products(program, piece, slot, row, query, unit)
        x = [_logits(program, piece, *of_part) for of_part in zip(products, key_scales, strict=True)]
        x = program.masked(piece, first, [row + part.start for part in parts], bounds, seen_by_all, x, 0)

        def shrink(fade, sums):
            accs, total = sums
            total = total * over_rows(fade, total)
            if program.by_row("v"):
                for units in (unit, [inverse(bits) for bits in new_unit]):  # their ratio may be less than any float32
                    fade = fade * _floats(program, units)
            return [acc * over_rows(fade, acc) for acc in accs], total

        largest = functools.partial(over_keys, "max")
        highest = functools.reduce(jnp.maximum, x)
        high, (accs, total) = refer(program, high, highest, largest, shrink, (accs, total), anyway=_differ(unit, new_unit))
        p = [jnp.exp2(of_part - over_rows(high, of_part)) for of_part in x]
        total = total + sum(p)
        for part, weights, scale in zip(parts, p, value_scales, strict=True):
            terms = program.terms(weights * (2.0**REFERENCE_WEIGHT if scale is None else _of_weights(program, scale, weights)))
            for place, term in zip(places, terms, strict=True):
                shared.p.at[place, :, part].transpose((1, 0))[...] = term
        plgpu.commit_smem()  # which also orders the loads from this place before the next copy into it
        if not plan.frees_early:
            _free(shared, slot)
        weights = [[shared.p.at[place, :, part] for place in places] for part in parts]
        return _plus_products(program, piece, row, accs, values, weights), high, total, new_unit

    parts = _parts_of(plan)
    places = [warpgroup * plan.terms + i for i in range(plan.terms)]
    first_tile = (warpgroup + piece.tiles_before) & 1  # tiles with even numbers are those of the first warpgroup
    over_keys = functools.partial(_reduced, scratch=shared.reduction.at[warpgroup], interpreted=program.interpreted)
    units = [jnp.int32(bits_of(LEAST_UNIT))] * (len(program.scale_heads(program.scales["v"])) if program.by_row("v") else 0)
    low = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), OF_COLUMNS)
    sums = [tile_of((columns.size, rows), 0) for columns in _values_at_once(plan.value_dim)]
    nothing = sums, low, tile_of((PART_ROWS, rows), 0), units
    accs, high, total, unit = lax.fori_loop(0, cdiv(piece.num_tiles - first_tile, plan.warpgroups), tile, nothing)
    weight = 2.0**-REFERENCE_WEIGHT  # before it meets `acc`, so that no product leaves the range
    scale = _floats(program, unit) if program.by_row("v") else program.scale_of(piece, "v")
    accs = [acc * (weight if scale is None else _over_rows(scale * weight, acc)) for acc in accs]
    total = over_keys("add", total)
    when(warpgroup == 1)(lambda: _pass_on(shared, accs, high, total))
    when(warpgroup == 0)(lambda: _store(program, piece, *_merged(shared, accs, high, total)))


def _free(shared, slot):
    """Says that the tile in this slot is in registers, so that the next copy may begin."""
    for free in (shared.k_free, shared.v_free):
        plgpu.barrier_arrive(free.at[slot])


def _pass_on(shared, accs, high, total):
    """Leaves the results of a piece in shared memory, for the first warpgroup."""
    plgpu.barrier_wait(shared.second_free)
    for columns, acc in zip(_values_at_once(shared.second.shape[0]), accs, strict=True):
        store(shared.second.at[columns], acc)
    for i, values in enumerate((high, total)):
        store(shared.second_stats.at[i], values)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.second_full)


def _merged(shared, accs, high, total):
    """The results of a piece: those of this warpgroup, which is the first, and of the other."""
    parts = _values_at_once(shared.second.shape[0])
    plgpu.barrier_wait(shared.second_full)
    others = [plgpu.load(shared.second.at[columns], layout=TILE, optimized=False) for columns in parts]
    other_high, other_total = (plgpu.load(shared.second_stats.at[i], layout=OF_COLUMNS, optimized=False) for i in range(2))
    plgpu.barrier_arrive(shared.second_free)
    most = jnp.maximum(high, other_high)
    fade, other_fade = jnp.exp2(high - most), jnp.exp2(other_high - most)
    accs = [acc * over_rows(fade, acc) + other * over_rows(other_fade, acc) for acc, other in zip(accs, others, strict=True)]
    return accs, most, total * fade + other_total * other_fade


def _store(program, piece, accs, high, total):
    joined = program.plan.joined
    for columns, acc in zip(_values_at_once(program.plan.value_dim), accs, strict=True):
        sums = sums_by_column(acc, program.interpreted)
        if joined == 1 or program.interpreted:
            store_sums(program, piece, columns.start, sums)
        else:
            own_dims, group = program.problem.value_dim // joined, program.problem.group
            store_own_sums(sums_of(program, piece), sums, columns.start, own_dims, joined, group, program.columns_before)
    store_stats(program, piece, high, total)


def _parts_of(plan):
    """The rows of the parts of a tile."""
    return [pl.ds(first, PART_ROWS) for first in range(0, plan.schedule.block_keys, PART_ROWS)]


def _at_once(dims, whole, most) -> list[Any]:
    """The parts of so many dimensions that are widened in registers at once: all up to `whole`, and else parts of up to `most`."""
    most = whole if dims <= whole else most
    return [pl.ds(first, min(most, dims - first)) for first in range(0, dims, most)]


def _values_at_once(dims) -> list[Any]:
    """The parts of so many dimensions of values, and of the output."""
    return _at_once(dims, VALUES_AT_ONCE, AT_ONCE)


def _products(program, piece, slot, row, query, unit):
    """What a step needs of the tile in this slot, read at `row`.

    The values of the first part are widened here: while the tensor cores work, if there is one part, or after that. There would not
    be enough registers for the keys of all parts and values. Values of other parts, and wide ones, stay as they are.

    Returns:
        q . k [keys, query rows] of each part, `_key_scales` of each part, the values of each part as `values_of` takes or gives
        them, and `_value_scales`.
    """
    shared, interpreted, parts = program.shared, program.interpreted, _parts_of(program.plan)
    dims = _at_once(query.shape[1], AT_ONCE, KEYS_AT_ONCE)
    plgpu.barrier_wait(shared.k_full.at[slot])
    whole = program.plan.narrow_line == OPERAND_DIM  # lines of the layouts in registers
    keys = lambda part, columns: keys_of(shared.k.at[slot, part, columns], program.problem.dtype, interpreted, whole)

    def the_rest():
        key_scales = [_key_scales(program, piece, slot, part) for part in parts]
        plgpu.barrier_wait(shared.v_full.at[slot])
        v = bytes_of_values(shared.v.at[slot, parts[0]], whole)
        if max(query.shape[1], program.plan.value_dim) <= AT_ONCE:
            v = _values(program, piece, row, parts[0], v)
        values = [v, *[bytes_of_values(shared.v.at[slot, part], whole) for part in parts[1:]]]
        value_scales = _value_scales(program, piece, slot, row, unit)
        if program.plan.frees_early:
            plgpu.commit_smem()  # between the loads from this place and the next copy into it
            _free(shared, slot)
        return key_scales, values, value_scales

    def multiply(*accs):
        for acc, part in zip(accs, parts, strict=True):
            for i, columns in enumerate(dims):
                if i:
                    plgpu.wgmma_wait(0)  # until then, the registers of the dimensions before are in use
                plgpu.wgmma(acc, keys(part, columns), query.at[:, columns].transpose((1, 0)))
        if len(parts) > 1:
            return [acc[...] for acc in accs], the_rest()
        rest = the_rest()
        return [acc[...] for acc in accs], rest

    if interpreted:
        products = [sum(_interpreted(keys(part, columns), query.at[:, columns]) for columns in dims) for part in parts]
        rest = the_rest()
    else:
        of_part = plgpu.ACC((PART_ROWS, query.shape[0]), jnp.float32)
        products, rest = pl.run_scoped(multiply, *[of_part] * len(parts))
    return products, *rest


def _key_scales(program, piece, slot, part) -> list[Any]:
    """The scales of the keys of a part of a tile, one number per row [keys] for each kv head that has scales of its own. Empty if
    scales are not by row."""
    heads = range(program.shared.k_scale.shape[1] if program.by_row("k") else 0)
    return [load_of_rows(program.copied_scales(piece, "k", slot, part, i)) for i in heads]


def _logits(program, piece, x, scales):
    """The logits of a part of a tile, from its products and `_key_scales`."""
    if scales:
        return program.logits(x * _of_weights(program, scales, x))
    scale = program.scale_of(piece, "k")
    return program.logits(x if scale is None else x * _over_rows(scale, x))


def _value_scales(program, piece, slot, row, unit):
    """What multiplies the weights of each part of a tile, one number per row [keys] for each kv head that has scales of its own, or
    None; and the unit of these products for each of these kv heads, next to the weight of the reference.

    The unit, the bits of a power of two, is the largest exponent of the scales so far. Weights times scales then stay in the range
    of float16. A larger unit shrinks earlier sums.
    """
    parts = _parts_of(program.plan)
    if not program.by_row("v"):
        return [None] * len(parts), unit
    scales, units = [], []
    for i, before in enumerate(unit):
        refs = [(program.copied_scales(piece, "v", slot, part, i), row + part.start) for part in parts]
        exponents = [largest_exponent(load_scales(piece, *of_part), program.interpreted) for of_part in refs]
        units.append(jnp.maximum(before, jnp.minimum(functools.reduce(jnp.maximum, exponents), bits_of(MOST_UNIT))))
        factor = float_of(inverse(units[i], REFERENCE_WEIGHT), program.interpreted)
        scales.append([load_scales(piece, *of_part, OF_ROWS) * factor for of_part in refs])
    return list(zip(*scales, strict=True)), units


def _of_weights(program, scales, like):
    """What multiplies the matrix `like` [keys, query rows], from one number per row [keys] for each kv head."""
    return program.of_heads([over(scale, like) for scale in scales], like.shape, 1)


def _over_rows(scale, like):
    """One number, or one per query row, over all rows of the matrix `like`."""
    return over_rows(scale, like) if scale.ndim else scale


def _floats(program, units):
    """The numbers with these bits, one for each kv head, as `Program.of_query_rows` gives them."""
    return program.of_query_rows([float_of(bits, program.interpreted) for bits in units])


def _differ(before, after) -> Any:
    return functools.reduce(jnp.logical_or, [x != y for x, y in zip(before, after, strict=True)], False)


def _values(program, piece, row, part, numbers):
    """Values [Dv, keys] of a part of a tile, with zeros in rows outside the range: 0 times what such a row holds may be NaN."""
    v = values_of(numbers, program.interpreted)
    if jnp.issubdtype(program.problem.cache_dtype, jnp.integer):
        return v

    def clear(v):
        key = plgpu.broadcasted_iota(jnp.int32, v.shape, 1, layout=TILE) + row + part.start
        return jnp.where((key >= piece.start) & (key < piece.end), v, tile_of(v.shape, 0, v.dtype))

    return lax.cond(program.at_an_end(piece, row), clear, lambda v: v, v)


def _plus_products(program, piece, row, accs, values, weights):
    """`accs`, for parts of the dimensions, and the products of values and weights, part by part. The values of a part are widened
    while the tensor cores work for the part before."""
    parts = _parts_of(program.plan)

    def widened(i, columns):
        if values[i].dtype == jnp.float16:
            return values[i]
        of_dims = values[i] if len(accs) == 1 else values[i][:, columns.start : columns.start + columns.size]
        return _values(program, piece, row, parts[i], of_dims)

    def plus(acc, columns):
        if program.interpreted:
            return sum((_interpreted(widened(i, columns), term) for i, terms in enumerate(weights) for term in terms), acc)

        def multiply(out):
            for i, terms in enumerate(weights):
                v = widened(i, columns)
                for term in terms:
                    plgpu.wgmma(out, v, term.transpose((1, 0)))

        return pl.run_state(multiply)(plgpu.ACC.init(acc))

    return [plus(*of_dims) for of_dims in zip(accs, _values_at_once(program.plan.value_dim), strict=True)]


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
