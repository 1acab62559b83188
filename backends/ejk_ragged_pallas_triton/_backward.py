"""The backward operation: `split` walks through the live ranges once more and writes d_key and d_value; a second kernel adds up
the pieces of d_query.

Nothing of the softmax is stored by the forward but lse: p_j = exp(logit_j - lse), d_logit_j = p_j (d_out . v_j - delta).
Every row of d_key and d_value is written exactly once, the rows outside the live range as zeros, by a second, even share of them.

Rows of queries beyond one block are added up in d_key and d_value tile by tile; d_query's sums stay in registers, for one block
only. So where there are several blocks the two are done apart.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ejk_ragged import Wanted
from ejk_ragged_schedule import cdiv, length_arrays, Schedule

from ._blocks import (
    Block,
    dot,
    key_dot,
    line_of,
    load,
    LOG2_E,
    logits,
    logits_slope,
    query_dot,
    store,
    store_pieces,
    WHOLE,
)
from ._jax import array, compiler_params
from ._tuning import backward_tiles, SMALL_BLOCK, Tiles


def backward(problem, target, queries, cache, lse, d_out, delta, *, wanted, interpret):
    """The wanted gradients; shapes as in `ejk_ragged.Backend.backward`."""
    plan = backward_tiles(problem, target)
    if plan.row_blocks > 1 and wanted.query and wanted.key_value:
        arguments = problem, target, queries, cache, lse, d_out, delta
        apart = Wanted(query=True, key_value=False), Wanted(query=False, key_value=True)
        return [x for one in apart for x in backward(*arguments, wanted=one, interpret=interpret)]

    schedule = plan.schedule
    batch, num_tokens, num_q_heads, head_dim = queries.query.shape
    rows = num_tokens * num_q_heads
    query, d_out = (x.reshape(batch, rows, head_dim) for x in (queries.query, d_out))
    lse, delta = (x.reshape(batch, rows) for x in (lse, delta))
    lengths = length_arrays(problem, queries)
    # The rows before each live range and those after it, twice as many ranges, shared out among all programs alike.
    idle = Schedule(2 * batch, problem.seq_len, schedule.programs, schedule.block_keys, by_sequence=False)
    start = jnp.zeros(batch, jnp.int32) if lengths["start"] is None else jnp.clip(lengths["start"], 0, problem.seq_len)
    end = jnp.full(batch, problem.seq_len) if lengths["end"] is None else jnp.clip(lengths["end"], 0, problem.seq_len)
    idle_lengths = {
        "start": jnp.concatenate([jnp.zeros_like(start), jnp.maximum(start, end)]),
        "end": jnp.concatenate([start, jnp.full_like(start, problem.seq_len)]),
    }
    optional = lengths, cache.key_scale, cache.value_scale, idle_lengths if wanted.key_value else None
    optional, tree = jax.tree.flatten(optional)

    partial_shapes = [array((schedule.slots, rows, head_dim), problem.accum_dtype), array((2, batch), jnp.int32)]
    cache_shapes = [array(cache.key.shape, cache.key.dtype)] * 2
    results = pl.pallas_call(
        functools.partial(_split_kernel, tree=tree, problem=problem, plan=plan, idle=idle, wanted=wanted),
        name="ragged_decode_backward",
        grid=(problem.num_kv_heads * (plan.row_blocks if wanted.query else 1), schedule.programs),
        in_specs=[WHOLE] * (6 + len(optional)),
        out_specs=[WHOLE] * (2 * wanted.query + 2 * wanted.key_value),
        out_shape=partial_shapes * wanted.query + cache_shapes * wanted.key_value,
        compiler_params=compiler_params(plan.num_warps, plan.num_stages),
        interpret=interpret,
    )(query, cache.key, cache.value, lse, d_out, delta, *optional)

    if not wanted.query:
        return results
    parts, pieces, *d_key_value = results
    d_query = pl.pallas_call(
        functools.partial(_sum_kernel, plan=plan),
        name="ragged_decode_backward_sum",
        grid=(batch, pl.cdiv(rows, plan.merge_rows)),
        in_specs=[WHOLE] * 2,
        out_specs=WHOLE,
        out_shape=array(query.shape, problem.out_dtype),
        compiler_params=compiler_params(plan.merge_warps, 1),
        interpret=interpret,
    )(parts, pieces)
    return [d_query.reshape(queries.query.shape), *d_key_value]


def _split_kernel(
    q_ref, k_ref, v_ref, lse_ref, d_out_ref, delta_ref, *refs, tree, problem, plan: Tiles, idle: Schedule, wanted: Wanted
):
    """One program: its tiles of the live ranges, for the rows of queries of a kv head, all of them or, for d_query, a block; then
    its share of the cache's rows that stay zero."""
    optional_refs, out_refs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    lengths, key_scale_ref, value_scale_ref, idle_lengths = tree.unflatten(optional_refs)
    parts_ref, pieces_ref, *out_refs = out_refs if wanted.query else (None, None, *out_refs)
    schedule = plan.schedule
    row_blocks = plan.row_blocks if wanted.query else 1
    kv_head = pl.program_id(0) // row_blocks
    block = Block.of(kv_head, pl.program_id(0) % row_blocks, problem, plan)
    program = pl.program_id(1)
    line = line_of(schedule, program, lengths["start"], lengths["end"])
    num_tiles, tile_at = schedule.tiles(line)
    rows_late = problem.quantised and plan.block_rows * plan.block_dim > SMALL_BLOCK

    def tile(i, carry):
        d_q, fresh, b, key, end = carry
        keys = key + jnp.arange(schedule.block_keys, dtype=jnp.int32)
        live = keys < end

        def rows_of(block):
            """Query and cotangent of a block."""
            return load(block.of_query(q_ref, b)), load(block.of_query(d_out_ref, b))

        loaded = () if rows_late else rows_of(block)
        k, v = load(block.of_cache(k_ref, b, keys, live)), load(block.of_cache(v_ref, b, keys, live))
        q, d_out = loaded or rows_of(block)
        key_scales, value_scales = (block.scales(ref, b, keys, live) for ref in (key_scale_ref, value_scale_ref))
        key_scale, value_scale = (block.common_scale(ref, b) for ref in (key_scale_ref, value_scale_ref))

        def gradients(block, q, d_out):
            """For a block: probabilities, gradients of the products q . k; and keys with their scales."""
            lse, delta = load(block.of_row(lse_ref, b)), load(block.of_row(delta_ref, b))
            sees = block.sees(lengths, b, keys, end)
            tiles = (k, key_scales), (v, value_scales)
            if problem.gaps:  # 0 times what is there may be NaN
                tiles = (block.cleaned(sees, *tile) for tile in tiles)
            (seen_k, k_scales), (seen_v, v_scales) = tiles
            x = logits(problem, query_dot(problem, q, seen_k.T), k_scales, key_scale)
            # No probability is above 1, but beside large logits lse has lost its low bits.
            p = jnp.where(sees & block.ok[:, None], jnp.exp2(jnp.minimum(x - lse[:, None] * LOG2_E, 0.0)), 0.0)
            d_p = query_dot(problem, d_out, seen_v.T) * (value_scale if v_scales is None else v_scales[None, :])
            d_x = p * (d_p - delta[:, None]) * logits_slope(problem, x) * key_scale
            return p, d_x, seen_k, k_scales

        p, d_x, seen_k, k_scales = gradients(block, q, d_out)
        if wanted.key_value:

            def products(p, d_x, q, d_out):
                """Of d_key and d_value, one after the other: where there is one block only, the first is on its way to memory while
                the second is computed. Both before d_query, whose store is a branch."""
                yield dot(problem, d_x.astype(k.dtype).T, q)
                yield dot(problem, p.astype(v.dtype).T, d_out)

            def add(row_block, sums):
                other = Block.of(kv_head, row_block, problem, plan)
                q, d_out = rows_of(other)
                p, d_x, *_ = gradients(other, q, d_out)
                return tuple(x + more for x, more in zip(sums, products(p, d_x, q, d_out), strict=True))

            sums = products(p, d_x, q, d_out)
            if plan.row_blocks > 1:
                sums = jax.lax.fori_loop(1, plan.row_blocks, add, tuple(sums))
            for ref, values in zip(out_refs, sums, strict=True):
                store(block.of_cache(ref, b, keys, live), values)

        last = schedule.is_last(program, key, end)
        if wanted.query:
            d_q = jnp.where(fresh, 0.0, d_q) + key_dot(problem, d_x, seen_k, k_scales)

            @pl.when(last)
            def _():
                store(block.of_query(parts_ref, schedule.slot(program, b)), d_q)

        return d_q, last, *tile_at(i + 1)

    zeros = jnp.zeros((plan.block_rows, plan.block_dim), jnp.float32)
    jax.lax.fori_loop(0, num_tiles, tile, (zeros, jnp.asarray(True), *tile_at(0)))
    if wanted.query:
        pl.when(pl.program_id(0) == 0)(lambda: store_pieces(schedule, line, pieces_ref))

    if wanted.key_value:
        num_idle, idle_at = idle.tiles(line_of(idle, program, idle_lengths["start"], idle_lengths["end"]))

        def clear(i, _):
            which, key, end = idle_at(i)
            keys = key + jnp.arange(idle.block_keys, dtype=jnp.int32)
            for ref in out_refs:
                zeros = jnp.zeros((idle.block_keys, plan.block_dim), ref.dtype)
                store(block.of_cache(ref, which % schedule.batch, keys, keys < end), zeros)

        jax.lax.fori_loop(0, num_idle, clear, None)


def _sum_kernel(parts_ref, pieces_ref, d_query_ref, *, plan: Tiles):
    """One program: d_query of some rows of one sequence, the sum of its pieces."""
    num_rows, head_dim = d_query_ref.shape[1:]
    b = pl.program_id(0)
    rows = pl.program_id(1) * plan.merge_rows + jnp.arange(plan.merge_rows, dtype=jnp.int32)
    dims = jnp.arange(plan.block_dim, dtype=jnp.int32)
    mask = (rows < num_rows)[:, None] & (dims < head_dim)[None, :]
    first, count = pieces_ref[0, b], pieces_ref[1, b]

    def add(i, total):
        piece = i * plan.merge_slots + jnp.arange(plan.merge_slots, dtype=jnp.int32)
        place = parts_ref.at[(first + piece)[:, None, None], rows[None, :, None], dims[None, None, :]]
        return total + jnp.sum(load((place, (piece < count)[:, None, None] & mask[None])), axis=0)

    total = jnp.zeros((plan.merge_rows, plan.block_dim), jnp.float32)
    total = jax.lax.fori_loop(0, cdiv(count, plan.merge_slots), add, total)
    store((d_query_ref.at[b, rows[:, None], dims[None, :]], mask), total)
