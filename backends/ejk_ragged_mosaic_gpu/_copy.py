"""The warpgroup that has tiles of keys and values copied into shared memory."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import plgpu, when
from ._program import Program
from ._tiles import begins_at, begins_in_line, OPERAND_DIM, SCALES_AT_ONCE


def copy(program: Program):
    """All copies of a program, each into the next place of its ring as soon as the place is free."""
    plan, shared, schedule = program.plan, program.shared, program.plan.schedule

    def hand_on_table():  # to the kernel that merges
        plgpu.copy_smem_to_gmem(program.ranges.stops, program.results.stops)
        plgpu.wait_smem_to_gmem(0)

    program.ranges.make_table()
    if plan.table:
        plgpu.barrier_arrive(shared.stops_full)
        when(program.number + program.head + program.query_block == 0)(hand_on_table)
    if plan.registers:
        plgpu.set_max_registers(plan.registers[-1], action="decrease")
    prefix = "narrow_" if plan.wide_stages else ""

    def into(name, slot):
        """A function of a source, and of a part of the next place of the ring, that copies; the place is free."""
        full, free = (barriers.at[slot] for barriers in program.barriers(name))
        if plan.is_freed(name):
            plgpu.barrier_wait(free)
        place = getattr(shared, name).at[slot]
        return lambda source, part=(): plgpu.copy_gmem_to_smem(source, place.at[part] if part else place, full)

    def copy_query(piece):
        copy_part = into("q", lax.rem(piece.number, plan.query_slots))
        for group in range(plan.row_groups):
            start = program.query_rows(group).start
            for i in range(0, plan.warpgroup_rows, plan.copy_rows):
                token, place = lax.div(start + i, plan.token_rows), lax.rem(start + i, plan.token_rows)
                rows = pl.ds(pl.multiple_of(place, 8), plan.copy_rows)
                # Query rows beyond the last token read the last token again. Their results are not used.
                source = program.query.at[piece.sequence, jnp.minimum(token, plan.tokens - 1), program.head, rows]
                copy_part(source, (group, pl.ds(i, plan.copy_rows)))

    def work(piece):
        places = places_of(piece, 0)
        copy_query(piece)

        def tile(i, places):
            following = places_of(piece, i + 1)  # looks up the next tile's entries, so that they are there in time
            places = places if plan.waits_for_pages else [(in_pool(page), row) for page, row in places]
            for half in range(plan.halves):
                for part in range(plan.parts):
                    slot = plan.place(piece.tiles_before + i, half, part)
                    copy_part(half, slot, part, places[half * len(places) // plan.halves :][: len(places) // plan.halves])
            return following

        def copy_part(half, slot, part, places):
            for name in plan.order(half):
                ring, copy_rows = plan.rings[name], into(prefix + name, slot)
                for i, (page, row) in enumerate(places):
                    rows = pl.ds(pl.multiple_of(row, plan.align), plan.part_rows)
                    where = pl.ds(i * plan.part_rows, plan.part_rows)
                    copy_rows(tile_in_cache(ring, part, page, rows), (where,) if len(places) > 1 else ())
                    copy_scales(name, slot, page, rows, where)

        def tile_in_cache(ring, part, page, rows):
            ref, first = program.cache[ring.source], ring.first + part * ring.columns
            if plan.shares_lines:
                first, _ = begins_in_line(program.head, program.problem.head_dim)
                return ref.at[page, rows, pl.ds(pl.multiple_of(first, OPERAND_DIM), ring.columns)]
            of_head = ref.at[page, rows, program.head]
            if ring.columns == ref.shape[-1]:
                return of_head
            # The slice has as many dimensions as products take, with zeros beyond the last one. JAX refuses such a slice if it
            # knows the start, so the start is computed at run time.
            beyond = first + ring.columns > ref.shape[-1]
            return of_head.at[:, pl.ds(first + piece.number * 0 if beyond else first, ring.columns)]

        def copy_scales(ring, slot, page, rows, where):
            for name in filter(program.by_row, plan.scales_with(ring)):
                ref = program.scales[name]
                target, full = getattr(shared, f"{prefix}{name}_scale").at[slot], program.barriers(prefix + ring)[0].at[slot]
                for i, head in enumerate(program.scale_heads(ref)):
                    if plan.end_to_end:
                        begin = (program.first_scale(piece, name, i) + rows.start) & -SCALES_AT_ONCE
                        copies = [
                            (ref.at[pl.ds(pl.multiple_of(begin + first, SCALES_AT_ONCE), size)], pl.ds(first, size))
                            for first, size in plan.scale_copies
                        ]
                    else:
                        copies = [(ref.at[page if ref.shape[0] > 1 else 0, head, rows], where)]
                    for source, place in copies:
                        plgpu.copy_gmem_to_smem(source, target.at[i, place] if plan.in_registers else target.at[place], full)

        lax.fori_loop(0, piece.num_tiles, tile, places)

    def places_of(piece, i):
        """Where tile i of the piece is, part by part: the page, or the sequence of a padded cache, and the row in it.

        To compute with an entry of the page table is to wait for it. So pages are entries as they are, unless
        `plan.waits_for_pages`.
        """
        row = program.row_of(piece, program.first_key(piece, i))
        rows = [row + part for part in range(0, schedule.block_keys, plan.part_rows)]
        if plan.end_to_end:
            begin, _ = begins_at(piece.sequence, program.problem.seq_len)
            return [(0, begin + row) for row in rows]
        if program.page_table is None:
            return [(piece.sequence, row) for row in rows]
        page_size = program.problem.page_size
        last = lax.div(jnp.maximum(piece.end - 1, 0), page_size)  # the last entry in use: later entries may be junk
        pages = [program.page_table[piece.sequence, jnp.minimum(lax.div(row, page_size), last)] for row in rows]
        return [
            (in_pool(page) if plan.waits_for_pages else page, lax.rem(row, page_size))
            for page, row in zip(pages, rows, strict=True)
        ]

    def in_pool(page):
        return page if program.page_table is None else jnp.clip(page, 0, program.problem.num_pages - 1)

    program.ranges.pieces(program.number, work)
    program.drain("q", *[prefix + name for name in plan.rings])
