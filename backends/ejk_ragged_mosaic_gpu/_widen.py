"""The warpgroup that widens tiles of an 8-bit cache to 16 bits in shared memory, for the warpgroups that multiply.

The cache's numbers are widened without their scales, so each is exact in the query's dtype. Key scales are for the logits, and
value scales for the weights.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import OF_ROWS, plgpu, store, UPCAST
from ._program import Program


def widen(program: Program):
    """All tiles of a program, each into the next place of the ring that products read."""
    plan, shared = program.plan, program.shared
    plgpu.set_max_registers(plan.registers[1], action="decrease")
    program.release("narrow_k", "narrow_v")
    if plan.table:
        plgpu.barrier_wait(shared.stops_full)

    def work(piece):
        def tile(i, _):
            number = piece.tiles_before + i
            widen_tile(piece, number, program.row_of(piece, program.first_key(piece, i)))

        lax.fori_loop(0, piece.num_tiles, tile, None)

    def widen_tile(piece, number, row):
        slot, wide_slot = (lax.rem(number, plan.places[name]) for name in ("narrow_k", "k"))
        for name in "kv":
            full, free = (barriers.at[slot] for barriers in program.barriers(f"narrow_{name}"))
            wide_full, wide_free = (barriers.at[wide_slot] for barriers in program.barriers(name))
            plgpu.barrier_wait(full)
            plgpu.barrier_wait(wide_free)
            narrow, wide = getattr(shared, f"narrow_{name}").at[slot], getattr(shared, name).at[wide_slot]
            for first in range(0, narrow.shape[0], 64):
                rows = pl.ds(first, 64)
                wide.at[rows][...] = _widened(plgpu.load(narrow.at[rows], layout=UPCAST), wide.dtype)
            if name == "k":
                for scale_name, scales in load_scales(program, piece, slot, row).items():
                    store(getattr(shared, f"{scale_name}_scale").at[wide_slot], scales)
            plgpu.commit_smem()
            plgpu.barrier_arrive(free)
            if name == "v":
                pl.when(program.at_an_end(piece, row))(lambda wide=wide: program.clear(piece, row, wide))
            plgpu.barrier_arrive(wide_full)

    program.ranges.pieces(program.number, work)
    program.drain("k", "v")


def widen_parts(program: Program):
    """All parts of tiles of a program, each into the next place of the ring that products read. There is one ring: the value lies
    in the key's rows.

    A part's numbers leave their narrow place before a wide place is free, so that copies go on.
    """
    plan, shared = program.plan, program.shared
    plgpu.set_max_registers(plan.registers[1], action="decrease")
    program.release("narrow_k")
    if plan.table:
        plgpu.barrier_wait(shared.stops_full)

    def work(piece):
        def tile(i, _):
            row = program.row_of(piece, program.first_key(piece, i))
            for part in range(plan.parts):
                widen_part(piece, (piece.tiles_before + i) * plan.parts + part, part, row)

        lax.fori_loop(0, piece.num_tiles, tile, None)

    def widen_part(piece, number, part, row):
        slot, wide_slot = (lax.rem(number, plan.places[name]) for name in ("narrow_k", "k"))
        full, free = (barriers.at[slot] for barriers in program.barriers("narrow_k"))
        wide_full, wide_free = (barriers.at[wide_slot] for barriers in program.barriers("k"))
        wide = shared.k.at[wide_slot]
        plgpu.barrier_wait(full)
        numbers = plgpu.load(shared.narrow_k.at[slot], layout=UPCAST)
        scales = load_scales(program, piece, slot, row) if part == 0 else {}
        plgpu.commit_smem()
        plgpu.barrier_arrive(free)
        plgpu.barrier_wait(wide_free)
        wide[...] = _widened(numbers, wide.dtype)
        for name, scale in scales.items():
            store(getattr(shared, f"{name}_scale").at[wide_slot], scale)
        plgpu.commit_smem()
        pl.when(program.at_an_end(piece, row))(lambda: program.clear(piece, row, wide))
        plgpu.barrier_arrive(wide_full)

    program.ranges.pieces(program.number, work)
    program.drain("k")


def load_scales(program, piece, slot, row):
    """Scales of "k" and "v" of a narrow tile that was read at `row`, where they differ by row."""
    loaded = {}
    for name in filter(program.by_row, "kv"):
        scales = plgpu.load(getattr(program.shared, f"narrow_{name}_scale").at[slot], layout=OF_ROWS, optimized=False)
        key = plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=OF_ROWS) + row
        seen = (key >= piece.start) & (key < piece.end)  # the scale of a row outside the range may be NaN
        zeros = plgpu.layout_cast(jnp.zeros(scales.shape, scales.dtype), OF_ROWS)
        loaded[name] = jnp.where(seen, scales, zeros)
    return loaded


def _widened(x, dtype):
    """8-bit numbers in a 16-bit dtype that holds each of them. Of floats, the GPU widens by way of float16 alone."""
    return (
        x.astype(dtype) if x.dtype == jnp.int8 or dtype == jnp.float16 else x.astype(jnp.float16).astype(jnp.float32).astype(dtype)
    )
