"""The kernel that merges the pieces of each sequence. It is launched while the first kernel runs, and waits for its end."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk_ragged_schedule import cdiv

from ._jax import launch, LOWEST, plgpu, store, TILE, when
from ._line import Ranges
from ._program import load_of_rows, of_rows, over, sinks_at, tile_of, tiling
from ._tiles import Tiles
from ._tuning import merging, merging_blocks


def combine(problem, target, plan: Tiles, partial, lengths, sink, **how):
    """Output and lse of all sequences from the results of `split`.

    Args:
        partial: results of `split`, by name.
        sink: as `Queries.sink`, or as `Program.sink` if query rows are many.

    Returns:
        out: [B, T * Hq, Dv]. If query rows are many, [B, T, Hkv, G, Dv] with the plan's T and G.
        lse: float32 [B, T * Hq], or [B, Hkv, query rows of all blocks].
    """
    merge = _combine_blocks if plan.many else _combine_rows
    return merge(problem, target, plan, partial, lengths, sink, **how)


def _combine_rows(problem, target, plan, partial, lengths, sink, **how):
    rows = problem.num_tokens * problem.num_q_heads
    at_once, programs = merging(target, problem.batch, rows)
    operands, tree = jax.tree.flatten((partial["parts"], partial["stats"], lengths, sink))
    shared = {"out": plgpu.SMEM((at_once, plan.stored_dim), problem.out_dtype)}
    return launch(
        functools.partial(_rows_kernel, tree=tree, problem=problem, plan=plan),
        "ragged_decode_combine",
        [((problem.batch, rows, problem.value_dim), problem.out_dtype), ((problem.batch, rows), jnp.float32)],
        {"program": min(programs, 2) if how["interpret"] else programs},  # the interpreter is slow to begin a program
        follows=True,
        scratch_types=shared | _table(plan),
        **how,
    )(*operands)


def _rows_kernel(*refs, tree, problem, plan: Tiles, wait, out, stops=None):
    """One program: merges some query rows of a sequence at once, and then others, with their sinks. The program begins before the
    pieces are there. Meanwhile it finds out which pieces belong to which sequence."""
    parts_ref, part_stats_ref, lengths, sink_ref = tree.unflatten(refs[: tree.num_leaves])
    out_ref, lse_ref = refs[tree.num_leaves :]
    ranges = Ranges(plan, lengths, stops)
    ranges.make_table()
    wait()
    dims = plgpu.Layout.WG_STRIDED((plan.stored_dim,), vec_size=plan.stored_dim // 128)

    def sink_of(b, token, q_head):
        if sink_ref is None:
            return jnp.float32(-jnp.inf)
        batch, num_tokens, _ = sink_ref.shape
        return sink_ref[b if batch > 1 else 0, token if num_tokens > 1 else 0, q_head]

    def combine_rows(b, rows):
        first, count = ranges.slots(b)
        token_heads = [(lax.div(row, problem.num_q_heads), lax.rem(row, problem.num_q_heads)) for row in rows]
        places = [(lax.div(h, problem.group), token * problem.group + lax.rem(h, problem.group)) for token, h in token_heads]

        def merge(i, carry):
            pieces = [i * plan.merge_slots + k for k in range(plan.merge_slots)]
            slots = [first + jnp.minimum(piece, count - 1) for piece in pieces]
            return [merge_row(pieces, slots, *of_row) for of_row in zip(places, carry, strict=True)]

        def merge_row(pieces, slots, place, carry):
            head, row = place
            acc, high, total = carry
            part_high, part_total = ([part_stats_ref[slot, head, i, row] for slot in slots] for i in range(2))
            part_high = [jnp.where(piece < count, x, -jnp.inf) for piece, x in zip(pieces, part_high, strict=True)]
            parts = [plgpu.load(parts_ref.at[slot, *place], layout=dims) for slot in slots]
            new_high = functools.reduce(jnp.maximum, part_high, high)
            fade, weights = jnp.exp(high - new_high), [jnp.exp(x - new_high) for x in part_high]
            acc = acc * fade + sum(part * weight for part, weight in zip(parts, weights, strict=True))
            return acc, new_high, total * fade + sum(x * weight for x, weight in zip(part_total, weights, strict=True))

        zeros = plgpu.layout_cast(jnp.zeros((plan.stored_dim,), jnp.float32), dims)
        sinks = [sink_of(b, *token_head) for token_head in token_heads]
        init = [(zeros, jnp.maximum(x, LOWEST), jnp.where(x > -jnp.inf, jnp.float32(1), jnp.float32(0))) for x in sinks]
        merged = lax.fori_loop(0, cdiv(count, plan.merge_slots), merge, init)
        for i, (row, (acc, high, total)) in enumerate(zip(rows, merged, strict=True)):
            some = total > 0
            total = jnp.where(some, total, 1.0)
            lse_ref[b, row] = jnp.where(some, high + jnp.log(total), -jnp.inf)
            result = (acc / total).astype(out.dtype)
            if plan.stored_dim == problem.value_dim:
                out_ref[b, row] = result
            else:
                out[i] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out.at[i, pl.ds(0, problem.value_dim)], out_ref.at[b, row])
        plgpu.wait_smem_to_gmem(0)

    at_once, programs = out.shape[0], lax.axis_size("program")
    num_rows = out_ref.shape[1]
    program = lax.axis_index("program")

    def group(i, _):
        row = (program + i * programs) * at_once
        combine_rows(lax.div(row, num_rows), [lax.rem(row, num_rows) + k for k in range(at_once)])

    groups = problem.batch * num_rows // at_once
    lax.fori_loop(0, cdiv(groups - program, programs), group, None)


# ---------------------------------------------------------------------------------------------------------------------------
# Many query rows: 64 of them, and some dimensions, at once


def _combine_blocks(problem, target, plan, partial, lengths, sink, **how):
    written = [partial[name] for name in ("out", "lse") if plan.writes_out]
    operands, tree = jax.tree.flatten((partial["parts"], partial["stats"], lengths, sink))
    results = [] if written else list(plan.output(problem).values())
    blocks = problem.batch * problem.num_kv_heads * plan.row_blocks * plan.row_groups
    columns, at_once = merging_blocks(target, plan, blocks)
    programs = min(blocks * plan.value_dim // columns, merging(target, problem.batch, blocks * 64)[1])
    return launch(
        functools.partial(_blocks_kernel, tree=tree, problem=problem, plan=plan, size=columns, at_once=at_once),
        "ragged_decode_combine",
        results,
        {"program": min(programs, 2) if how["interpret"] else programs},
        follows=True,
        updates=len(written),
        scratch_types={"out": plgpu.SMEM((64, columns), problem.out_dtype, transforms=tiling(columns, problem.out_dtype))}
        | _table(plan),
        **how,
    )(*operands, *written)


def _blocks_kernel(*refs, tree, problem, plan: Tiles, size, at_once, wait, out, stops=None):
    """One program: 64 query rows and `size` dimensions of a sequence, `at_once` partial results at a time, and then others."""
    parts_ref, stats_ref, lengths, sink_ref = tree.unflatten(refs[: tree.num_leaves])
    out_ref, lse_ref = refs[tree.num_leaves :]
    ranges = Ranges(plan, lengths, stops)
    ranges.make_table()
    wait()
    sizes = problem.batch, problem.num_kv_heads, plan.row_blocks * plan.row_groups, plan.value_dim // size

    def merge_block(b, head, query_rows, column):
        first, count = ranges.slots(b)
        columns = pl.ds(pl.multiple_of(column * size, size), size)

        def merge(i, carry):
            acc, high, total = carry
            pieces = [i * at_once + k for k in range(at_once)]
            slots = [first + jnp.minimum(piece, count - 1) for piece in pieces]
            highs, totals = ([load_of_rows(stats_ref.at[slot, head, k, query_rows]) for slot in slots] for k in range(2))
            parts = [plgpu.load(parts_ref.at[slot, head, query_rows, columns], layout=TILE, optimized=False) for slot in slots]
            new_high = functools.reduce(jnp.maximum, highs, high)
            # A product: a piece that is not there is the last one again, with no weight.
            weights = [jnp.exp(x - new_high) * (piece < count).astype(jnp.float32) for piece, x in zip(pieces, highs, strict=True)]
            fade = jnp.exp(high - new_high)
            acc = acc * over(fade, acc) + sum(part * over(weight, part) for part, weight in zip(parts, weights, strict=True))
            return acc, new_high, total * fade + sum(x * weight for x, weight in zip(totals, weights, strict=True))

        def write():
            nothing = tile_of((64, size), 0), of_rows(64, LOWEST), of_rows(64, 0)
            acc, high, total = lax.fori_loop(0, cdiv(count, at_once), merge, nothing)
            values, lse = finished(acc, high, total, sinks_at(sink_ref, b, head, query_rows))
            when(column == 0)(lambda: store(lse_ref.at[b, head, query_rows], lse))
            write_out(plan, out_ref, out, values, b, head, query_rows, columns)

        if plan.writes_out:
            when(count != 1)(write)
        else:
            write()

    def block(i, _):
        place = lax.axis_index("program") + i * lax.axis_size("program")
        indices = []
        for size in reversed(sizes):
            indices.append(lax.rem(place, size))
            place = lax.div(place, size)
        column, block, head, b = indices
        merge_block(b, head, pl.ds(pl.multiple_of(block * 64, 64), 64), column)

    lax.fori_loop(0, cdiv(math.prod(sizes) - lax.axis_index("program"), lax.axis_size("program")), block, None)


def finished(acc, high, total, sink):
    """Output and lse of some query rows: from the sums of values [query rows, dims], the largest logit, the sum of weights, and the
    sink of each query row, or None."""
    if sink is not None:
        most = jnp.maximum(high, sink)
        fade = jnp.exp(high - most)
        acc, high, total = acc * over(fade, acc), most, total * fade + jnp.exp(sink - most)
    some = total > 0
    total = jnp.where(some, total, of_rows(total.size, 1))
    # One division per query row. A division is several instructions, and a query row has up to 512 columns.
    return acc * over(1 / total, acc), jnp.where(some, high + jnp.log(total), of_rows(total.size, -jnp.inf))


def write_out(plan, out_ref, staging, values, b, head, query_rows, columns: Any = slice(None)):
    """Values of 64 query rows to their places in the output [B, T, Hkv, G, Dv], by way of an array in shared memory."""
    staging[...] = values.astype(staging.dtype)
    plgpu.commit_smem()
    for i in range(0, 64, copy_rows := 8 if plan.pair else plan.copy_rows):
        row = query_rows.start + i
        token, place = lax.div(row, plan.token_rows), pl.multiple_of(lax.rem(row, plan.token_rows), 8)

        def copy(i=i, token=token, place=place):
            target = out_ref.at[b, token, head, pl.ds(place, copy_rows), columns]
            plgpu.copy_smem_to_gmem(staging.at[pl.ds(i, copy_rows)], target)

        when(row < plan.num_rows)(copy)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _table(plan):
    return {"stops": plgpu.SMEM((plan.table,), jnp.int32)} if plan.table else {}
