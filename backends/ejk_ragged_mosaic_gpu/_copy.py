"""The warpgroup that has tiles of keys and values copied into shared memory."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import plgpu
from ._program import Program


def copy(program: Program):
    """All copies of a program, each into the next place of its ring as soon as the place is free."""
    plan, shared, schedule = program.plan, program.shared, program.plan.schedule
    program.ranges.make_table()
    if plan.table:
        plgpu.barrier_arrive(shared.stops_full)
    if plan.registers:
        plgpu.set_max_registers(plan.registers[1], action="decrease")

    def into(name, slot):
        """A function of a source, and of a part of the next place of the ring, that copies; the place is free."""
        full, free = (barriers.at[slot] for barriers in program.barriers(name))
        plgpu.barrier_wait(free)
        place = getattr(shared, name).at[slot]
        return lambda source, part=(): plgpu.copy_gmem_to_smem(source, place.at[part] if part else place, full)

    def copy_query(piece):
        copy_part = into("q", lax.rem(piece.number, plan.query_slots))
        for warpgroup in range(plan.warpgroups):
            start = program.query_rows(warpgroup).start
            for i in range(0, plan.warpgroup_rows, plan.copy_rows):
                token, place = lax.div(start + i, plan.token_rows), lax.rem(start + i, plan.token_rows)
                rows = pl.ds(pl.multiple_of(place, 8), plan.copy_rows)
                # Query rows beyond the last are others of the last token: nobody asks for what they see.
                source = program.query.at[piece.sequence, jnp.minimum(token, plan.tokens - 1), program.head, rows]
                copy_part(source, (warpgroup, pl.ds(i, plan.copy_rows)))

    def work(piece):
        copy_query(piece)
        # As many dimensions as products take, zeros beyond the last; such a slice is not refused where its start is not known.
        dims = pl.ds(piece.number * 0, plan.block_dim)

        def tile(i, _):
            slot = lax.rem(piece.tiles_before + i, plan.stages)
            row = pl.multiple_of(program.row_of(piece, program.first_key(piece, i)), plan.align)
            for name, ref in zip("kv", program.cache, strict=True):
                source = ref.at[piece.sequence, pl.ds(row, schedule.block_keys), program.head]
                into(name, slot)(source if plan.direct else source.at[:, dims])

        lax.fori_loop(0, piece.num_tiles, tile, None)

    program.ranges.pieces(program.number, work)
    for name, places in program.rings():
        for slot in range(places):  # nobody leaves while something is on its way
            plgpu.barrier_wait(program.barriers(name)[1].at[slot])
