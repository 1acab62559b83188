"""The forward operation in two kernels: `split` works through pieces of the live ranges, `combine` merges each sequence's pieces.

Inside `split` logits are in base 2: `exp2` is one instruction, and the factor log2(e) rides on the scale. Outside all is natural.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ._blocks import Block, dot, load, LOG2_E, logits, LOWEST, store, WHOLE
from ._jax import array, compiler_params
from ._schedule import cdiv
from ._tuning import forward_tiles, Tiles


def forward(problem, target, query, key, value, start, end, sink, *, interpret):
    """Output and log-sum-exp; shapes as in `ejk_ragged.Backend.forward`."""
    plan = forward_tiles(problem, target)
    schedule = plan.schedule
    accum = problem.accum_dtype
    batch, num_q_heads, head_dim = query.shape

    # What says nothing is not read: XLA then does not make it, which on a short call is a tenth of the time.
    lengths = {name: x for name, x in (("start", start), ("end", end)) if name in problem.given}
    sinks = [sink] if "sink" in problem.given else []

    parts, part_lse, pieces = pl.pallas_call(
        functools.partial(_split_kernel, lengths=tuple(lengths), problem=problem, plan=plan),
        name="ragged_decode_split",
        grid=(problem.num_kv_heads * plan.head_blocks, schedule.programs),
        in_specs=[WHOLE] * (3 + len(lengths)),
        out_specs=[WHOLE] * 3,
        out_shape=[
            array((schedule.slots, num_q_heads, head_dim), accum),
            array((schedule.slots, num_q_heads), accum),
            array((2, batch), jnp.int32),
        ],
        compiler_params=compiler_params(plan.num_warps, plan.num_stages),
        interpret=interpret,
    )(query, key, value, *lengths.values())

    out, lse = pl.pallas_call(
        functools.partial(_combine_kernel, plan=plan),
        name="ragged_decode_combine",
        grid=(batch, pl.cdiv(num_q_heads, plan.merge_heads)),
        in_specs=[WHOLE] * (3 + len(sinks)),
        out_specs=[WHOLE] * 2,
        out_shape=[
            array(query.shape, problem.out_dtype),
            array(query.shape[:2], accum),
        ],
        compiler_params=compiler_params(plan.merge_warps, 1),
        interpret=interpret,
    )(parts, part_lse, pieces, *sinks)
    return out, lse


def _split_kernel(q_ref, k_ref, v_ref, *refs, lengths, problem, plan: Tiles):
    """One program: its tiles, for one block of the query heads that share a kv head. `lengths` names the refs that are there."""
    *length_refs, parts_ref, part_lse_ref, pieces_ref = refs
    given = dict(zip(lengths, length_refs, strict=True))
    schedule = plan.schedule
    block = Block.of(pl.program_id(0), problem, plan)
    program = pl.program_id(1)
    line = schedule.line(program, given.get("start"), given.get("end"))
    num_tiles, tile_at = schedule.tiles(line)

    def tile(i, carry):
        acc, high, total, fresh, b, row, end = carry
        rows = row + jnp.arange(schedule.block_keys, dtype=jnp.int32)
        live = rows < end
        q = load(block.of_query(q_ref, b))
        k, v = load(block.of_cache(k_ref, b, rows, live)), load(block.of_cache(v_ref, b, rows, live))
        x = jnp.where(live[None, :], logits(problem, dot(problem, q, k.T)), -jnp.inf)
        # The first tile of a piece forgets the piece before. This is arithmetic and no branch, and so are the look-ups of the
        # next tile: Triton keeps loads in flight only where their addresses come without one.
        high = jnp.where(fresh, -jnp.inf, high)
        new_high = jnp.maximum(jnp.maximum(high, jnp.max(x, axis=1)), LOWEST)
        fade = jnp.exp2(high - new_high)
        p = jnp.exp2(x - new_high[:, None])
        total = total * fade[:, None] + p  # summed over keys at the end of a piece only: warps wait for each other once less
        acc = acc * fade[:, None] + dot(problem, p.astype(v.dtype), v)
        last = schedule.is_last(program, row, end)

        @pl.when(last)
        def _():
            slot = schedule.slot(program, b)
            sum_p = jnp.sum(total, axis=1)
            denominator = jnp.where(sum_p > 0, sum_p, 1.0)
            lse = jnp.where(sum_p > 0, new_high / LOG2_E + jnp.log(denominator), -jnp.inf)
            store(block.of_query(parts_ref, slot), acc / denominator[:, None])
            plgpu.store(part_lse_ref.at[slot, block.heads], lse, mask=block.heads_ok)

        return acc, new_high, total, last, *tile_at(i + 1)

    init = (
        jnp.zeros((plan.block_heads, plan.block_dim), jnp.float32),
        jnp.full(plan.block_heads, -jnp.inf, jnp.float32),
        jnp.zeros((plan.block_heads, schedule.block_keys), jnp.float32),
        jnp.asarray(True),
        *tile_at(0),
    )
    jax.lax.fori_loop(0, num_tiles, tile, init)
    pl.when(pl.program_id(0) == 0)(lambda: schedule.store_pieces(line, pieces_ref))


def _combine_kernel(parts_ref, part_lse_ref, pieces_ref, *refs, plan: Tiles):
    """One program: some heads of one sequence. Weights its partial outputs by their softmax denominators, the sink's too."""
    *sink_refs, out_ref, lse_ref = refs
    num_q_heads, head_dim = out_ref.shape[1:]
    b = pl.program_id(0)
    heads = pl.program_id(1) * plan.merge_heads + jnp.arange(plan.merge_heads, dtype=jnp.int32)
    heads_ok = heads < num_q_heads
    dims = jnp.arange(plan.block_dim, dtype=jnp.int32)
    dims_ok = dims < head_dim
    first, count = pieces_ref[0, b], pieces_ref[1, b]

    def merge(i, carry):
        acc, high, total = carry
        piece = i * plan.merge_slots + jnp.arange(plan.merge_slots, dtype=jnp.int32)
        mask = (piece < count)[:, None] & heads_ok[None, :]
        slots = first + piece
        lse = plgpu.load(part_lse_ref.at[slots[:, None], heads[None, :]], mask=mask, other=-jnp.inf)
        part = plgpu.load(
            parts_ref.at[slots[:, None, None], heads[None, :, None], dims[None, None, :]],
            mask=mask[:, :, None] & dims_ok[None, None, :],
            other=0.0,
        )
        new_high = jnp.maximum(high, jnp.max(lse, axis=0))
        weight = jnp.exp(lse - new_high[None, :])
        fade = jnp.exp(high - new_high)
        total = total * fade + jnp.sum(weight, axis=0)
        acc = acc * fade[:, None] + jnp.sum(part * weight[:, :, None], axis=0)
        return acc, new_high, total

    sink = jnp.full(plan.merge_heads, -jnp.inf, jnp.float32)
    for sink_ref in sink_refs:  # one, or none
        sink = plgpu.load(sink_ref.at[b, heads], mask=heads_ok, other=-jnp.inf)
    init = (
        jnp.zeros((plan.merge_heads, plan.block_dim), jnp.float32),
        jnp.maximum(sink, LOWEST),
        jnp.where(sink > -jnp.inf, 1.0, 0.0),
    )
    acc, high, total = jax.lax.fori_loop(0, cdiv(count, plan.merge_slots), merge, init)
    empty = total == 0
    out = acc / jnp.where(empty, 1.0, total)[:, None]
    lse = jnp.where(empty, -jnp.inf, high + jnp.log(jnp.where(empty, 1.0, total)))
    plgpu.store(out_ref.at[b, heads[:, None], dims[None, :]], out.astype(out_ref.dtype), mask=heads_ok[:, None] & dims_ok[None, :])
    plgpu.store(lse_ref.at[b, heads], lse, mask=heads_ok)
