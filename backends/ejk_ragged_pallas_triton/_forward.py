"""The forward operation in two kernels. `split` computes a partial result per piece, and `combine` merges a sequence's pieces.

A partial result is three things: the weighted sum of values, not divided yet, the largest logit, and the sum of the weights. The
last two are separate numbers, because a log-sum-exp would lose the sum of the weights next to a large logit.

`split` uses base-2 logits, because `exp2` is one instruction. The factor log2(e) is part of the scale of the logits. Everything
outside `split` is in base e.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ejk_ragged_schedule import cdiv, length_arrays
from ejk_ragged_schedule.joined import joined_cache

from ._blocks import (
    Block,
    line_of,
    load,
    load_tile,
    LOG2_E,
    logits,
    LOWEST,
    products,
    store,
    store_pieces,
    value_dot,
    WHOLE,
)
from ._jax import array, compiler_params
from ._joined import joined
from ._parts import Part
from ._rows import Rows
from ._tuning import forward_tiles, Tiles


def forward(problem, target, queries, cache, *, interpret):
    """Does `ejk_ragged.Backend.forward` for a problem whose hints are resolved."""
    plan = forward_tiles(problem, target)
    schedule = plan.schedule
    accum = problem.accum_dtype
    batch, num_tokens, num_q_heads, head_dim = queries.query.shape
    rows = num_tokens * num_q_heads
    wide, _ = joined(problem, target)
    query, cache = queries.query.reshape(batch, rows, head_dim), joined_cache(cache, wide)
    operands, tree = jax.tree.flatten((query, cache, length_arrays(problem, queries)))

    parts, part_stats, pieces = pl.pallas_call(
        functools.partial(_split_kernel, tree=tree, problem=wide, plan=plan),
        name="ragged_decode_split",
        grid=(wide.num_kv_heads * plan.row_blocks, schedule.programs),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * 3,
        out_shape=[
            array((schedule.slots, rows, problem.value_dim), accum),
            array((schedule.slots, rows, 2), accum),
            array((2, batch), jnp.int32),
        ],
        compiler_params=compiler_params(plan.num_warps, plan.num_stages),
        interpret=interpret,
    )(*operands)

    sinks = [] if queries.sink is None else [queries.sink]
    out, lse = pl.pallas_call(
        functools.partial(_combine_kernel, num_q_heads=num_q_heads, plan=plan),
        name="ragged_decode_combine",
        grid=(batch, pl.cdiv(rows, plan.merge_rows)),
        in_specs=[WHOLE] * (3 + len(sinks)),
        out_specs=[WHOLE] * 2,
        out_shape=[array((batch, rows, problem.value_dim), problem.out_dtype), array((batch, rows), accum)],
        compiler_params=compiler_params(plan.merge_warps, 1),
        interpret=interpret,
    )(parts, part_stats, pieces, *sinks)
    return out.reshape(batch, num_tokens, num_q_heads, problem.value_dim), lse.reshape(batch, num_tokens, num_q_heads)


def _split_kernel(*refs, tree, problem, plan: Tiles):
    """One program does its tiles for one block of query rows of a kv head."""
    *operand_refs, parts_ref, part_stats_ref, pieces_ref = refs
    q_ref, cache, lengths = tree.unflatten(operand_refs)
    schedule = plan.schedule
    block = Block.of(pl.program_id(0) // plan.row_blocks, pl.program_id(0) % plan.row_blocks, problem, plan)
    program = pl.program_id(1)
    rows = Rows.of(problem, schedule.block_keys, cache.page_table, lengths["start"])
    line = line_of(schedule, program, lengths["start"], lengths["end"], rows.align)
    num_tiles, tile_at = schedule.tiles(line)

    def tile(i, carry):
        acc, high, total, fresh, b, key, end, found = carry
        keys = key + jnp.arange(schedule.block_keys, dtype=jnp.int32)
        live = rows.live(keys, end, found)
        q = [load(block.of_query(q_ref, b, part)) for part in plan.key_parts]
        k, v = load_tile(problem, plan, block, cache, rows.place(b, key, found), live)
        sees = block.sees(lengths, b, keys, live)
        x = logits(problem, products(problem, q, k.parts), k.scales, block.common_scale(problem, cache.key_scale, b))
        x = jnp.where(sees, x, -jnp.inf)
        # The first tile of a piece resets the state. This is arithmetic, and so are the look-ups of the next tile. A branch would
        # end Triton's pipeline, which needs load addresses that do not depend on a branch.
        high = jnp.where(fresh, -jnp.inf, high)
        new_high = jnp.maximum(jnp.maximum(high, jnp.max(x, axis=1)), LOWEST)
        fade = jnp.exp2(high - new_high)
        p = jnp.exp2(x - new_high[:, None])
        total = total * fade[:, None] + p  # summed over keys only at the end of a piece: one barrier less per tile
        if problem.junk_between_tokens:  # a row that no query row sees has weight 0, but 0 times NaN is NaN
            v = v.cleaned(sees)
        acc = tuple(x * fade[:, None] + value_dot(problem, p, tile, v.scales) for x, tile in zip(acc, v.parts, strict=True))
        last = schedule.is_last(program, key, end)

        @pl.when(last)
        def _():
            slot = schedule.slot(program, b)
            scale = block.common_scale(problem, cache.value_scale, b)
            store((part_stats_ref.at[slot, block.places, 0], block.ok), new_high / LOG2_E)
            for part, x in zip(plan.value_parts, acc, strict=True):
                store(block.of_query(parts_ref, slot, part), x * scale)
            store((part_stats_ref.at[slot, block.places, 1], block.ok), jnp.sum(total, axis=1))

        return acc, new_high, total, last, *next_tile(i + 1)

    def next_tile(i):
        """For tile i: the sequence, the first row, the end of the piece, and what `Rows.look_up` finds."""
        b, key, end = tile_at(i)
        return b, key, end, rows.look_up(b, key)

    init = (
        tuple(jnp.zeros((plan.block_rows, part.size), jnp.float32) for part in plan.value_parts),
        jnp.full(plan.block_rows, -jnp.inf, jnp.float32),
        jnp.zeros((plan.block_rows, schedule.block_keys), jnp.float32),
        jnp.asarray(True),
        *next_tile(0),
    )
    jax.lax.fori_loop(0, num_tiles, tile, init)
    pl.when(pl.program_id(0) == 0)(lambda: store_pieces(schedule, line, pieces_ref))


def _combine_kernel(parts_ref, part_stats_ref, pieces_ref, *refs, num_q_heads, plan: Tiles):
    """One program merges the partial results and the sink of some query rows of one sequence."""
    *sink_refs, out_ref, lse_ref = refs
    value_parts = Part.of(out_ref.shape[2])
    b = pl.program_id(0)
    rows = pl.program_id(1) * plan.merge_rows + jnp.arange(plan.merge_rows, dtype=jnp.int32)
    ok = rows < out_ref.shape[1]
    first, count = pieces_ref[0, b], pieces_ref[1, b]

    def masked(part, mask):
        """A mask [pieces, rows] with one more axis, the dimensions of `part`."""
        return mask[:, :, None] & (part.dims < part.end)[None, None, :] if part.padded else mask[:, :, None]

    def merge(i, carry):
        acc, high, total = carry
        piece = i * plan.merge_slots + jnp.arange(plan.merge_slots, dtype=jnp.int32)
        mask = (piece < count)[:, None] & ok[None, :]
        slots = first + piece
        # One load for both numbers. With two loads, this kernel takes 1.5 times as long when there is little to merge.
        which = jnp.arange(2, dtype=jnp.int32)[None, None, :]
        place = part_stats_ref.at[slots[:, None, None], rows[None, :, None], which]
        stats = plgpu.load(place, mask=mask[:, :, None], other=-jnp.inf)
        part_high, part_total = (jnp.max(jnp.where(which == i, stats, -jnp.inf), axis=2) for i in range(2))
        part_total = jnp.maximum(part_total, 0.0)
        outs = [
            load((parts_ref.at[slots[:, None, None], rows[None, :, None], part.dims[None, None, :]], masked(part, mask)))
            for part in value_parts
        ]
        new_high = jnp.maximum(high, jnp.max(part_high, axis=0))
        weight = jnp.exp(part_high - new_high[None, :])
        fade = jnp.exp(high - new_high)
        total = total * fade + jnp.sum(part_total * weight, axis=0)
        acc = tuple(x * fade[:, None] + jnp.sum(out * weight[:, :, None], axis=0) for x, out in zip(acc, outs, strict=True))
        return acc, new_high, total

    sink = jnp.full(plan.merge_rows, -jnp.inf, jnp.float32)
    for ref in sink_refs:  # one, or none
        batch, num_tokens, _ = ref.shape
        place = ref.at[b if batch > 1 else 0, rows // num_q_heads if num_tokens > 1 else 0, rows % num_q_heads]
        sink = plgpu.load(place, mask=ok, other=-jnp.inf)
    init = (
        tuple(jnp.zeros((plan.merge_rows, part.size), jnp.float32) for part in value_parts),
        jnp.maximum(sink, LOWEST),
        jnp.where(sink > -jnp.inf, 1.0, 0.0),
    )
    acc, high, total = jax.lax.fori_loop(0, cdiv(count, plan.merge_slots), merge, init)
    empty = total == 0
    lse = jnp.where(empty, -jnp.inf, high + jnp.log(jnp.where(empty, 1.0, total)))
    for part, x in zip(value_parts, acc, strict=True):
        out = x / jnp.where(empty, 1.0, total)[:, None]
        store((out_ref.at[b, rows[:, None], part.dims[None, :]], part.masked(ok)), out)
    store((lse_ref.at[b, rows], ok), lse)
