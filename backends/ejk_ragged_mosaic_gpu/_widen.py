"""The warpgroup that widens tiles of an 8-bit cache to 16 bits in shared memory, for the warpgroups that multiply.

Keys are widened without their scales, so each is exact in the query's dtype. Their scales are for the logits. Values become
float16, which rounds less than bfloat16, and are multiplied by their scales. Where the result is not rounded to 16 bits, or the
value lies in the key's rows, value scales are for the weights.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._bits import bits_of, float_of, inverse, largest_exponent, widened
from ._jax import BYTES, IN_EACH_WARP, plgpu, store, when, WORDS
from ._program import Program


LEAST_UNIT, MOST_UNIT = 2.0**-100, 2.0**125  # of values, where all value scales are next to nothing, or more than any number


def widen(program: Program):
    """All tiles of a program, keys and values, each into the next place of the ring that products read.

    A tile of keys and a tile of values share their waits and the barrier after the stores, because waiting is most of the work.
    """
    plan, shared, interpreted = program.plan, program.shared, program.interpreted

    def tile(piece, number, row, unit):
        slot, place = (lax.rem(number, plan.places[name]) for name in ("narrow_k", "k"))
        narrow_full, narrow_free = (barriers.at[slot] for barriers in program.barriers("narrow_k"))
        plgpu.barrier_wait(narrow_full)
        plgpu.barrier_wait(program.barriers("v")[1].at[place])
        scales, value_scale = _scales(program, piece, slot, row), None
        keys, values = (plgpu.load(ref.at[slot], layout=BYTES) for ref in (shared.narrow_k, shared.narrow_v))
        if "v" in scales:
            if plan.scales_values:
                ref = program.copied_scales(piece, "v", slot, pl.ds(0, plan.place_rows))
                value_scale = plgpu.load(ref, layout=WORDS.reduce(1), optimized=False)
            unit = jnp.maximum(unit, jnp.minimum(largest_exponent(scales["v"], interpreted), bits_of(MOST_UNIT)))
            shared.v_unit[place] = float_of(unit, interpreted)
            if value_scale is not None:
                value_scale = (value_scale * float_of(inverse(unit, program.headroom), interpreted)).astype(jnp.float16)
            else:
                store(shared.v_scale.at[place], scales["v"] * float_of(inverse(unit), interpreted))
        if "k" in scales:
            store(shared.k_scale.at[place], scales["k"])
        shared.k.at[place][...] = widened(keys, shared.k.dtype, interpreted)
        values = widened(values, shared.v.dtype, interpreted)
        if value_scale is not None:
            values = values * plgpu.layout_cast(lax.broadcast_in_dim(value_scale, values.shape, [0]), WORDS)
        shared.v.at[place][...] = values
        plgpu.commit_smem()
        plgpu.barrier_arrive(narrow_free)
        when(program.at_an_end(piece, row))(lambda: program.clear(piece, row, shared.v.at[place]))
        for name in "kv":
            plgpu.barrier_arrive(program.barriers(name)[0].at[place])
        return unit

    _all_tiles(program, tile, jnp.int32(bits_of(LEAST_UNIT)))


def widen_parts(program: Program):
    """All parts of tiles of a program, each into the next place of the ring that products read. There is one ring, because the
    value lies in the key's rows."""
    plan, shared = program.plan, program.shared

    def tile(piece, number, row, _):
        for part in range(plan.parts):
            widen_part(piece, number * plan.parts + part, part, row)

    def widen_part(piece, number, part, row):
        slot, wide_slot = (lax.rem(number, plan.places[name]) for name in ("narrow_k", "k"))
        full, free = (barriers.at[slot] for barriers in program.barriers("narrow_k"))
        wide_full, wide_free = (barriers.at[wide_slot] for barriers in program.barriers("k"))
        wide = shared.k.at[wide_slot]
        plgpu.barrier_wait(full)
        numbers = plgpu.load(shared.narrow_k.at[slot], layout=BYTES)
        scales = _scales(program, piece, slot, row) if part == 0 else {}
        plgpu.barrier_wait(wide_free)
        wide[...] = widened(numbers, wide.dtype, program.interpreted)
        for name, scale in scales.items():
            store(getattr(shared, f"{name}_scale").at[wide_slot], scale)
        plgpu.commit_smem()
        plgpu.barrier_arrive(free)
        when(program.at_an_end(piece, row))(lambda: program.clear(piece, row, wide))
        plgpu.barrier_arrive(wide_full)

    _all_tiles(program, tile, None)


def _all_tiles(program, tile, before):
    """`tile(piece, its number, the row at which it is read, carry)` for all tiles. A piece begins with the carry `before`."""
    plan = program.plan
    plgpu.set_max_registers(plan.registers[1], action="decrease")
    program.release(*[f"narrow_{name}" for name in plan.rings])
    if plan.table:
        plgpu.barrier_wait(program.shared.stops_full)

    def work(piece):
        def step(i, carry):
            return tile(piece, piece.tiles_before + i, program.row_of(piece, program.first_key(piece, i)), carry)

        lax.fori_loop(0, piece.num_tiles, step, before)

    program.ranges.pieces(program.number, work)
    program.drain(*plan.rings)


def _scales(program, piece, slot, row):
    """Scales of "k" and "v" of a narrow tile that was read at `row`, where they differ by row."""
    of = lambda name: load_scales(piece, program.copied_scales(piece, name, slot, pl.ds(0, program.plan.place_rows)), row)
    return {name: of(name) for name in "kv" if program.by_row(name)}


def load_scales(piece, ref, row, layout=IN_EACH_WARP):
    """Scales of the rows of a tile that was read at `row`, with zeros outside the range, where a scale may be NaN."""
    scales = plgpu.load(ref, layout=layout, optimized=False)
    key = plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=layout) + row
    zeros = plgpu.layout_cast(jnp.zeros(scales.shape, scales.dtype), layout)
    return jnp.where((key >= piece.start) & (key < piece.end), scales, zeros)
