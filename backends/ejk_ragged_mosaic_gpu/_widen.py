"""The warpgroup that widens tiles of an 8-bit cache to 16 bits in shared memory, for the warpgroups that multiply.

Keys are widened without their scales, so each is exact in the query's dtype. Their scales are for the logits. Values become
float16, which rounds less than bfloat16, and are multiplied by their scales. Where the result is not rounded to 16 bits, or the
value lies in the key's rows, value scales are for the weights.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import IN_EACH_WARP, int8_to_float16, plgpu, store, UPCAST
from ._program import Program


LEAST_UNIT = 2.0**-100  # of values, where all value scales are 0 or next to nothing


def widen(program: Program):
    """All tiles of a program, keys and values, each into the next place of the ring that products read.

    A tile of keys and a tile of values share their waits and the barrier after the stores, because waiting is most of the work.
    """
    plan, shared = program.plan, program.shared

    def tile(piece, number, row, unit):
        slot, place = (lax.rem(number, plan.places[name]) for name in ("narrow_k", "k"))
        for name in "kv":
            plgpu.barrier_wait(program.barriers(f"narrow_{name}")[0].at[slot])
            plgpu.barrier_wait(program.barriers(name)[1].at[place])
        scales, value_scale = load_scales(program, piece, slot, row), None
        if "k" in scales:
            store(shared.k_scale.at[place], scales["k"])
        if "v" in scales:
            unit = jnp.maximum(unit, jnp.max(jnp.abs(scales["v"])))
            shared.v_unit[place] = unit
            if plan.scales_values:
                value_scale = plgpu.load(shared.narrow_v_scale.at[slot], layout=UPCAST.reduce(1), optimized=False)
                value_scale = (value_scale * (program.headroom / unit)).astype(jnp.float16)
            else:
                store(shared.v_scale.at[place], scales["v"] / unit)
        keys, values = (plgpu.load(ref.at[slot], layout=UPCAST) for ref in (shared.narrow_k, shared.narrow_v))
        shared.k.at[place][...] = _widened(program, keys, shared.k.dtype)
        values = _widened(program, values, shared.v.dtype)
        if value_scale is not None:
            values = values * plgpu.layout_cast(lax.broadcast_in_dim(value_scale, values.shape, [0]), UPCAST)
        shared.v.at[place][...] = values
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.narrow_k_free.at[slot])
        plgpu.barrier_arrive(shared.narrow_v_free.at[slot])
        pl.when(program.at_an_end(piece, row))(lambda: program.clear(piece, row, shared.v.at[place]))
        plgpu.barrier_arrive(shared.k_full.at[place])
        plgpu.barrier_arrive(shared.v_full.at[place])
        return unit

    _all_tiles(program, tile, jnp.float32(LEAST_UNIT))


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
        numbers = plgpu.load(shared.narrow_k.at[slot], layout=UPCAST)
        scales = load_scales(program, piece, slot, row) if part == 0 else {}
        plgpu.barrier_wait(wide_free)
        wide[...] = _widened(program, numbers, wide.dtype)
        for name, scale in scales.items():
            store(getattr(shared, f"{name}_scale").at[wide_slot], scale)
        plgpu.commit_smem()
        plgpu.barrier_arrive(free)
        pl.when(program.at_an_end(piece, row))(lambda: program.clear(piece, row, wide))
        plgpu.barrier_arrive(wide_full)

    _all_tiles(program, tile, None)


def _all_tiles(program, tile, before):
    """`tile(piece, its number, the row at which it is read, carry)` for all tiles. A piece begins with the carry `before`."""
    plan = program.plan
    plgpu.set_max_registers(plan.registers[1], action="decrease")
    program.release(*[f"narrow_{name}" for name in plan.columns])
    if plan.table:
        plgpu.barrier_wait(program.shared.stops_full)

    def work(piece):
        def step(i, carry):
            return tile(piece, piece.tiles_before + i, program.row_of(piece, program.first_key(piece, i)), carry)

        lax.fori_loop(0, piece.num_tiles, step, before)

    program.ranges.pieces(program.number, work)
    program.drain(*plan.columns)


def load_scales(program, piece, slot, row):
    """Scales of "k" and "v" of a narrow tile that was read at `row`, where they differ by row."""
    loaded = {}
    for name in filter(program.by_row, "kv"):
        scales = plgpu.load(getattr(program.shared, f"narrow_{name}_scale").at[slot], layout=IN_EACH_WARP, optimized=False)
        key = plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=IN_EACH_WARP) + row
        seen = (key >= piece.start) & (key < piece.end)  # the scale of a row outside the range may be NaN
        zeros = plgpu.layout_cast(jnp.zeros(scales.shape, scales.dtype), IN_EACH_WARP)
        loaded[name] = jnp.where(seen, scales, zeros)
    return loaded


def _widened(program, x, dtype):
    """8-bit numbers in a 16-bit dtype that holds each of them. Of floats, the GPU widens by way of float16 alone."""
    if x.dtype == jnp.int8 and dtype == jnp.float16 and not program.interpreted:
        return int8_to_float16(x)
    if x.dtype == jnp.int8 or dtype == jnp.float16:
        return x.astype(dtype)
    return x.astype(jnp.float16).astype(jnp.float32).astype(dtype)
