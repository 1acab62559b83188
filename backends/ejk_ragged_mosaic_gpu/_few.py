"""The warpgroup that multiplies where query rows are few: keys are the rows of the products.

The tensor cores take 64 rows of one operand and 8 of the other. So logits are computed as K Q^T, [keys, query rows], and the output
as V^T P^T, [dims, query rows]. So little padding is multiplied, and a thread holds a few numbers of a tile. Maxima over keys pass
between warps for each tile. Sums over keys pass between warps only at the end of a piece.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import LOWEST, OF_COLUMNS, plgpu, store, TILE, TRANSPOSED
from ._line import Piece
from ._program import AT_ONCE, LOG2_E, product, Program, tile_of


def compute_pieces(program: Program, warpgroup):
    """Partial results of all pieces, in memory."""
    del warpgroup  # there is one
    program.ranges.pieces(program.number, lambda piece: _compute_piece(program, piece))


def _compute_piece(program: Program, piece: Piece):
    plan, shared = program.plan, program.shared
    rows, keys, dim = plan.block_rows, plan.schedule.block_keys, plan.value_dim
    q_slot = lax.rem(piece.number, plan.query_slots)
    plgpu.barrier_wait(shared.q_full.at[q_slot])
    bounds = [
        None if ref is None else plgpu.load(ref.at[piece.sequence, program.query_rows()], layout=OF_COLUMNS, optimized=False)
        for ref in program.query_bounds
    ]

    def tile(i, carry):
        acc, high, total = carry
        slot = lax.rem(piece.tiles_before + i, plan.stages)
        first = program.first_key(piece, i)
        row = program.row_of(piece, first)
        sees = program.sees(piece, first, row, bounds, (keys, rows), 0)

        plgpu.barrier_wait(shared.k_full.at[slot])
        k = _laid_out(program, "k", slot)
        k = k if plan.tile_dim == plan.block_dim else k.at[:, pl.ds(0, plan.block_dim)]
        x = product(k, shared.q.at[q_slot, 0].transpose((1, 0)))
        if plan.value_start is None:
            plgpu.barrier_arrive(shared.k_free.at[slot])
        x = jnp.where(sees, program.logits(x), tile_of((keys, rows), -jnp.inf))
        new_high = jnp.maximum(jnp.maximum(high, jnp.max(x, axis=0)), LOWEST)
        fade = jnp.exp2(high - new_high)
        p = jnp.exp2(x - lax.broadcast_in_dim(new_high, x.shape, [1]))
        total = total * lax.broadcast_in_dim(fade, total.shape, [1]) + p
        for i, term in enumerate(program.terms(p)):
            shared.p.at[i].transpose((1, 0))[...] = plgpu.layout_cast(term, TRANSPOSED)
        plgpu.commit_smem()

        if plan.value_start is None:
            plgpu.barrier_wait(shared.v_full.at[slot])
        v = _laid_out(program, "v", slot, sees, program.at_an_end(piece, row))
        terms = [shared.p.at[i].transpose((1, 0)) for i in range(plan.terms)]
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, [1]) + product(v.transpose((1, 0)), *terms)
        plgpu.barrier_arrive(shared.v_free.at[slot] if plan.value_start is None else shared.k_free.at[slot])
        return acc, new_high, total

    low = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), OF_COLUMNS)
    acc, high, total = lax.fori_loop(0, piece.num_tiles, tile, (tile_of((dim, rows), 0), low, tile_of((keys, rows), 0)))
    plgpu.barrier_arrive(shared.q_free.at[q_slot])
    _store(program, piece, acc, high, jnp.sum(total, axis=0))


def _laid_out(program, name, slot, sees=None, at_an_end=False):
    """A tile that has arrived, in the layout that products take.

    If a mask of the rows that each query row sees is given, rows that no query row sees become zeros: such a row may hold NaN, and
    0 times NaN is NaN. Such rows lie `at_an_end` of the range or between tokens.
    """
    plan, shared = program.plan, program.shared
    if name == "v" and plan.value_start is not None:
        arrived = shared.k.at[slot, :, pl.ds(plan.value_start, plan.value_dim)]
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
    elif sees is not None:
        pl.when(at_an_end)(lay_out)
    return tile


def _store(program, piece, acc, high, total):
    """Writes the results of a piece from registers to memory. No thread waits for the writes."""
    plan, results = program.plan, program.results
    slot, query_rows = plan.schedule.slot(program.number, piece.sequence), program.query_rows()
    parts = results.parts.at[slot, program.head, query_rows, pl.ds(0, plan.value_dim)]
    store(parts.transpose((1, 0)), plgpu.layout_cast(acc, TRANSPOSED))
    for i, values in enumerate((high / LOG2_E, total)):
        store(results.stats.at[slot, program.head, i, query_rows], values)
