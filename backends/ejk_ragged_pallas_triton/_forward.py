"""The forward operation in two kernels: `split` works through pieces of the live ranges, `combine` merges each sequence's pieces.

Inside `split` logits are in base 2: `exp2` is one instruction, and the factor log2(e) rides on the scale. Outside all is natural.

A piece leaves sums that are not divided yet, and the largest logit apart from the sum of the weights: in one number, their
log-sum-exp, the sum would be lost beside a large logit.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ejk_ragged_schedule import cdiv, length_arrays

from ._blocks import Block, line_of, load, LOG2_E, logits, LOWEST, query_dot, store, store_pieces, value_dot, WHOLE
from ._jax import array, compiler_params
from ._tuning import forward_tiles, Tiles


def forward(problem, target, queries, cache, *, interpret):
    """Output and log-sum-exp; shapes as in `ejk_ragged.Backend.forward`."""
    plan = forward_tiles(problem, target)
    schedule = plan.schedule
    accum = problem.accum_dtype
    batch, num_tokens, num_q_heads, head_dim = queries.query.shape
    rows = num_tokens * num_q_heads
    optional, tree = jax.tree.flatten((length_arrays(problem, queries), cache.key_scale, cache.value_scale))

    parts, part_stats, pieces = pl.pallas_call(
        functools.partial(_split_kernel, tree=tree, problem=problem, plan=plan),
        name="ragged_decode_split",
        grid=(problem.num_kv_heads * plan.row_blocks, schedule.programs),
        in_specs=[WHOLE] * (3 + len(optional)),
        out_specs=[WHOLE] * 3,
        out_shape=[
            array((schedule.slots, rows, head_dim), accum),
            array((schedule.slots, rows, 2), accum),
            array((2, batch), jnp.int32),
        ],
        compiler_params=compiler_params(plan.num_warps, plan.num_stages),
        interpret=interpret,
    )(queries.query.reshape(batch, rows, head_dim), cache.key, cache.value, *optional)

    sinks = [queries.sink] if "sink" in problem.given else []
    out, lse = pl.pallas_call(
        functools.partial(_combine_kernel, num_q_heads=num_q_heads, plan=plan),
        name="ragged_decode_combine",
        grid=(batch, pl.cdiv(rows, plan.merge_rows)),
        in_specs=[WHOLE] * (3 + len(sinks)),
        out_specs=[WHOLE] * 2,
        out_shape=[array((batch, rows, head_dim), problem.out_dtype), array((batch, rows), accum)],
        compiler_params=compiler_params(plan.merge_warps, 1),
        interpret=interpret,
    )(parts, part_stats, pieces, *sinks)
    return out.reshape(queries.query.shape), lse.reshape(queries.query.shape[:3])


def _split_kernel(q_ref, k_ref, v_ref, *refs, tree, problem, plan: Tiles):
    """One program: its tiles, for one block of the rows of queries of a kv head. `tree` says which optional refs there are."""
    *optional_refs, parts_ref, part_stats_ref, pieces_ref = refs
    lengths, key_scale_ref, value_scale_ref = tree.unflatten(optional_refs)
    schedule = plan.schedule
    block = Block.of(pl.program_id(0) // plan.row_blocks, pl.program_id(0) % plan.row_blocks, problem, plan)
    program = pl.program_id(1)
    line = line_of(schedule, program, lengths["start"], lengths["end"])
    num_tiles, tile_at = schedule.tiles(line)

    def tile(i, carry):
        acc, high, total, fresh, b, key, end = carry
        keys = key + jnp.arange(schedule.block_keys, dtype=jnp.int32)
        live = keys < end
        q = load(block.of_query(q_ref, b))
        k, v = load(block.of_cache(k_ref, b, keys, live)), load(block.of_cache(v_ref, b, keys, live))
        key_scales, value_scales = (block.scales(ref, b, keys, live) for ref in (key_scale_ref, value_scale_ref))
        sees = block.sees(lengths, b, keys, end)
        x = logits(problem, query_dot(problem, q, k.T), key_scales, block.common_scale(key_scale_ref, b))
        x = jnp.where(sees, x, -jnp.inf)
        # The first tile of a piece forgets the piece before. This is arithmetic and no branch, and so are the look-ups of the
        # next tile: Triton keeps loads in flight only where their addresses come without one.
        high = jnp.where(fresh, -jnp.inf, high)
        new_high = jnp.maximum(jnp.maximum(high, jnp.max(x, axis=1)), LOWEST)
        fade = jnp.exp2(high - new_high)
        p = jnp.exp2(x - new_high[:, None])
        total = total * fade[:, None] + p  # summed over keys at the end of a piece only: warps wait for each other once less
        if problem.gaps:  # what nobody sees weighs 0, but 0 times what is there may be NaN
            v, value_scales = block.cleaned(sees, v, value_scales)
        acc = acc * fade[:, None] + value_dot(problem, p, v, value_scales)
        last = schedule.is_last(program, key, end)

        @pl.when(last)
        def _():
            slot = schedule.slot(program, b)
            store(block.of_query(parts_ref, slot), acc * block.common_scale(value_scale_ref, b))
            for i, values in enumerate((new_high / LOG2_E, jnp.sum(total, axis=1))):
                store((part_stats_ref.at[slot, block.places, i], block.ok), values)

        return acc, new_high, total, last, *tile_at(i + 1)

    init = (
        jnp.zeros((plan.block_rows, plan.block_dim), jnp.float32),
        jnp.full(plan.block_rows, -jnp.inf, jnp.float32),
        jnp.zeros((plan.block_rows, schedule.block_keys), jnp.float32),
        jnp.asarray(True),
        *tile_at(0),
    )
    jax.lax.fori_loop(0, num_tiles, tile, init)
    pl.when(pl.program_id(0) == 0)(lambda: store_pieces(schedule, line, pieces_ref))


def _combine_kernel(parts_ref, part_stats_ref, pieces_ref, *refs, num_q_heads, plan: Tiles):
    """One program: some rows of one sequence. Adds up its partial results, the sink's too."""
    *sink_refs, out_ref, lse_ref = refs
    num_rows, head_dim = out_ref.shape[1:]
    b = pl.program_id(0)
    rows = pl.program_id(1) * plan.merge_rows + jnp.arange(plan.merge_rows, dtype=jnp.int32)
    ok = rows < num_rows
    dims = jnp.arange(plan.block_dim, dtype=jnp.int32)
    dims_ok = dims < head_dim
    first, count = pieces_ref[0, b], pieces_ref[1, b]

    def merge(i, carry):
        acc, high, total = carry
        piece = i * plan.merge_slots + jnp.arange(plan.merge_slots, dtype=jnp.int32)
        mask = (piece < count)[:, None] & ok[None, :]
        slots = first + piece
        part_high = plgpu.load(part_stats_ref.at[slots[:, None], rows[None, :], 0], mask=mask, other=-jnp.inf)
        part_total = load((part_stats_ref.at[slots[:, None], rows[None, :], 1], mask))
        part = load(
            (
                parts_ref.at[slots[:, None, None], rows[None, :, None], dims[None, None, :]],
                mask[:, :, None] & dims_ok[None, None, :],
            )
        )
        new_high = jnp.maximum(high, jnp.max(part_high, axis=0))
        weight = jnp.exp(part_high - new_high[None, :])
        fade = jnp.exp(high - new_high)
        total = total * fade + jnp.sum(part_total * weight, axis=0)
        acc = acc * fade[:, None] + jnp.sum(part * weight[:, :, None], axis=0)
        return acc, new_high, total

    sink = jnp.full(plan.merge_rows, -jnp.inf, jnp.float32)
    for ref in sink_refs:  # one, or none
        batch, num_tokens, _ = ref.shape
        place = ref.at[b if batch > 1 else 0, rows // num_q_heads if num_tokens > 1 else 0, rows % num_q_heads]
        sink = plgpu.load(place, mask=ok, other=-jnp.inf)
    init = (
        jnp.zeros((plan.merge_rows, plan.block_dim), jnp.float32),
        jnp.maximum(sink, LOWEST),
        jnp.where(sink > -jnp.inf, 1.0, 0.0),
    )
    acc, high, total = jax.lax.fori_loop(0, cdiv(count, plan.merge_slots), merge, init)
    empty = total == 0
    out = acc / jnp.where(empty, 1.0, total)[:, None]
    lse = jnp.where(empty, -jnp.inf, high + jnp.log(jnp.where(empty, 1.0, total)))
    store((out_ref.at[b, rows[:, None], dims[None, :]], ok[:, None] & dims_ok[None, :]), out)
    store((lse_ref.at[b, rows], ok), lse)
