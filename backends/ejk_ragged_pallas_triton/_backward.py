"""The backward operation: `split` walks through the live ranges once more and writes d_key and d_value; a second kernel adds up
the pieces of d_query.

Nothing of the softmax is stored by the forward but lse: p_j = exp(logit_j - lse), d_logit_j = p_j (d_out . v_j - delta).
Every row of d_key and d_value is written exactly once, the rows outside the live range as zeros, by a second, even share of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ._blocks import Block, dot, load, LOG2_E, logits, logits_slope, store, WHOLE
from ._jax import array, compiler_params
from ._schedule import cdiv, Schedule
from ._tuning import backward_tiles, Tiles


def backward(problem, target, query, key, value, start, end, lse, d_out, delta, *, wanted, interpret):
    """The wanted gradients; shapes as in `ejk_ragged.Backend.backward`."""
    plan = backward_tiles(problem, target)
    schedule = plan.schedule
    # The rows before each live range and those after it, twice as many ranges, shared out among all programs alike.
    idle = Schedule(2 * problem.batch, problem.seq_len, schedule.programs, schedule.block_keys, by_sequence=False)
    start, end = (jnp.clip(x, 0, problem.seq_len) for x in (start, end))
    live_end = jnp.maximum(start, end)
    idle_start = jnp.concatenate([jnp.zeros_like(start), live_end])
    idle_end = jnp.concatenate([start, jnp.full_like(end, problem.seq_len)])

    partial_shapes = [
        array((schedule.slots, *query.shape[1:]), problem.accum_dtype),
        array((2, problem.batch), jnp.int32),
    ]
    cache_shapes = [array(key.shape, key.dtype)] * 2
    results = pl.pallas_call(
        functools.partial(_split_kernel, problem=problem, plan=plan, idle=idle, wanted=wanted),
        name="ragged_decode_backward",
        grid=(problem.num_kv_heads, schedule.programs),
        in_specs=[WHOLE] * 10,
        out_specs=[WHOLE] * (2 * wanted.query + 2 * wanted.key_value),
        out_shape=partial_shapes * wanted.query + cache_shapes * wanted.key_value,
        compiler_params=compiler_params(plan.num_warps, plan.num_stages),
        interpret=interpret,
    )(query, key, value, start, end, lse, d_out, delta, idle_start, idle_end)

    if not wanted.query:
        return results
    parts, pieces, *d_key_value = results
    d_query = pl.pallas_call(
        functools.partial(_sum_kernel, plan=plan),
        name="ragged_decode_backward_sum",
        grid=(problem.batch, pl.cdiv(problem.num_q_heads, plan.merge_heads)),
        in_specs=[WHOLE] * 2,
        out_specs=WHOLE,
        out_shape=array(query.shape, problem.out_dtype),
        compiler_params=compiler_params(plan.merge_warps, 1),
        interpret=interpret,
    )(parts, pieces)
    return [d_query, *d_key_value]


def _split_kernel(
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    end_ref,
    lse_ref,
    d_out_ref,
    delta_ref,
    idle_start_ref,
    idle_end_ref,
    *out_refs,
    problem,
    plan: Tiles,
    idle,
    wanted,
):
    """One program: its tiles of the live ranges, for all query heads of a kv head; then its share of the rows that stay zero."""
    schedule = plan.schedule
    block = Block.of(pl.program_id(0), problem, plan)
    program = pl.program_id(1)
    parts_ref, pieces_ref, *out_refs = out_refs if wanted.query else (None, None, *out_refs)

    line = schedule.line(program, start_ref, end_ref)
    num_tiles, tile_at = schedule.tiles(line)

    def tile(i, carry):
        d_q, fresh, b, row, end = carry
        rows = row + jnp.arange(schedule.block_keys, dtype=jnp.int32)
        live = rows < end
        q, d_out = load(block.of_query(q_ref, b)), load(block.of_query(d_out_ref, b))
        k, v = load(block.of_cache(k_ref, b, rows, live)), load(block.of_cache(v_ref, b, rows, live))
        lse = plgpu.load(lse_ref.at[b, block.heads], mask=block.heads_ok, other=0.0)
        delta = plgpu.load(delta_ref.at[b, block.heads], mask=block.heads_ok, other=0.0)
        x = logits(problem, dot(problem, q, k.T))
        p = jnp.where(live[None, :] & block.heads_ok[:, None], jnp.exp2(x - lse[:, None] * LOG2_E), 0.0)
        d_x = p * (dot(problem, d_out, v.T) - delta[:, None]) * logits_slope(problem, x)
        d_x, p = d_x.astype(k.dtype), p.astype(k.dtype)
        if wanted.key_value:
            d_k_ref, d_v_ref = out_refs
            store(block.of_cache(d_k_ref, b, rows, live), dot(problem, d_x.T, q))
            store(block.of_cache(d_v_ref, b, rows, live), dot(problem, p.T, d_out))
        last = schedule.is_last(program, row, end)
        if wanted.query:
            d_q = jnp.where(fresh, 0.0, d_q) + dot(problem, d_x, k)

            @pl.when(last)
            def _():
                store(block.of_query(parts_ref, schedule.slot(program, b)), d_q)

        return d_q, last, *tile_at(i + 1)

    zeros = jnp.zeros((plan.block_heads, plan.block_dim), jnp.float32)
    jax.lax.fori_loop(0, num_tiles, tile, (zeros, jnp.asarray(True), *tile_at(0)))
    if wanted.query:
        pl.when(pl.program_id(0) == 0)(lambda: schedule.store_pieces(line, pieces_ref))

    if wanted.key_value:
        num_idle, idle_at = idle.tiles(idle.line(program, idle_start_ref, idle_end_ref))

        def clear(i, _):
            which, row, row_end = idle_at(i)
            rows = row + jnp.arange(idle.block_keys, dtype=jnp.int32)
            for ref in out_refs:
                zeros = jnp.zeros((idle.block_keys, plan.block_dim), ref.dtype)
                store(block.of_cache(ref, which % problem.batch, rows, rows < row_end), zeros)

        jax.lax.fori_loop(0, num_idle, clear, None)


def _sum_kernel(parts_ref, pieces_ref, d_query_ref, *, plan: Tiles):
    """One program: d_query of some heads of one sequence, the sum of its pieces."""
    num_q_heads, head_dim = d_query_ref.shape[1:]
    b = pl.program_id(0)
    heads = pl.program_id(1) * plan.merge_heads + jnp.arange(plan.merge_heads, dtype=jnp.int32)
    dims = jnp.arange(plan.block_dim, dtype=jnp.int32)
    mask = (heads < num_q_heads)[:, None] & (dims < head_dim)[None, :]
    first, count = pieces_ref[0, b], pieces_ref[1, b]

    def add(i, total):
        piece = i * plan.merge_slots + jnp.arange(plan.merge_slots, dtype=jnp.int32)
        place = parts_ref.at[(first + piece)[:, None, None], heads[None, :, None], dims[None, None, :]]
        return total + jnp.sum(load((place, (piece < count)[:, None, None] & mask[None])), axis=0)

    total = jnp.zeros((plan.merge_heads, plan.block_dim), jnp.float32)
    total = jax.lax.fori_loop(0, cdiv(count, plan.merge_slots), add, total)
    store((d_query_ref.at[b, heads[:, None], dims[None, :]], mask), total)
