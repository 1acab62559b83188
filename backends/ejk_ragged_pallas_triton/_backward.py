"""The backward operation in two kernels. `split` walks over the live ranges once more. `sum` adds up the pieces of d_query.

The forward operation keeps only lse of the softmax: p_j = exp(logit_j - lse), and d_logit_j = p_j (d_out . v_j - delta).

- d_key and d_value: `split` writes each row exactly once. Rows outside the live ranges are zeros. A second schedule shares them out
  evenly among all programs. If the value is in the key's rows, the gradient of a column that both use is the sum of two products,
  added up in registers.
- d_query: `split` adds up d_query in registers, and writes one partial result per piece.

If a kv head has several blocks of query rows, `split` runs twice. For d_key and d_value, a program goes through all blocks at each
tile. For d_query, a program has one block, because registers hold the sums of one block only.
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
    load_tile,
    LOG2_E,
    logits,
    logits_slope,
    products,
    store,
    store_pieces,
    WHOLE,
)
from ._jax import array, compiler_params
from ._rows import Rows
from ._tuning import backward_tiles, SMALL_BLOCK, Tiles


def backward(problem, target, queries, cache, lse, d_out, delta, *, wanted, interpret):
    """Does `ejk_ragged.Backend.backward` for a problem whose hints are resolved."""
    plan = backward_tiles(problem, target, key_value=wanted.key_value)
    if plan.row_blocks > 1 and wanted.query and wanted.key_value:
        arguments = problem, target, queries, cache, lse, d_out, delta
        apart = Wanted(query=True, key_value=False), Wanted(query=False, key_value=True)
        return [x for one in apart for x in backward(*arguments, wanted=one, interpret=interpret)]

    schedule = plan.schedule
    batch, num_tokens, num_q_heads, head_dim = queries.query.shape
    rows = num_tokens * num_q_heads
    query, d_out = queries.query.reshape(batch, rows, head_dim), d_out.reshape(batch, rows, problem.value_dim)
    lse, delta = (x.reshape(batch, rows) for x in (lse, delta))
    lengths = length_arrays(problem, queries)
    # The idle rows are the rows before and after each live range: two ranges per sequence, shared out evenly among all programs.
    idle = Schedule(2 * batch, problem.seq_len, schedule.programs, schedule.block_keys, by_sequence=False)
    idle_lengths = _idle_lengths(problem, lengths) if wanted.key_value else None
    operands, tree = jax.tree.flatten((query, cache, lse, d_out, delta, lengths, idle_lengths))

    partial_shapes = [array((schedule.slots, rows, head_dim), problem.accum_dtype), array((2, batch), jnp.int32)]
    cache_shapes = [array(x.shape, x.dtype) for x in (cache.key, cache.value) if x is not None]
    results = pl.pallas_call(
        functools.partial(_split_kernel, tree=tree, problem=problem, plan=plan, idle=idle, wanted=wanted),
        name="ragged_decode_backward",
        grid=(problem.num_kv_heads * (plan.row_blocks if wanted.query else 1), schedule.programs),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * (2 * wanted.query + len(cache_shapes) * wanted.key_value),
        out_shape=partial_shapes * wanted.query + cache_shapes * wanted.key_value,
        compiler_params=compiler_params(plan.num_warps, plan.num_stages),
        interpret=interpret,
    )(*operands)

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


def _idle_lengths(problem, lengths):
    """The rows before and after each live range, as the ranges of 2 * B sequences."""
    start = jnp.zeros(problem.batch, jnp.int32) if lengths["start"] is None else jnp.clip(lengths["start"], 0, problem.seq_len)
    end = jnp.full(problem.batch, problem.seq_len) if lengths["end"] is None else jnp.clip(lengths["end"], 0, problem.seq_len)
    return {
        "start": jnp.concatenate([jnp.zeros_like(start), jnp.maximum(start, end)]),
        "end": jnp.concatenate([start, jnp.full_like(start, problem.seq_len)]),
    }


def _split_kernel(*refs, tree, problem, plan: Tiles, idle: Schedule, wanted: Wanted):
    """One program does its tiles of the live ranges, and then writes zeros to its share of the idle rows.

    With d_query, the program has one block of query rows of a kv head. Without d_query, it has all blocks.
    """
    operand_refs, out_refs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    q_ref, cache, lse_ref, d_out_ref, delta_ref, lengths, idle_lengths = tree.unflatten(operand_refs)
    parts_ref, pieces_ref, *out_refs = out_refs if wanted.query else (None, None, *out_refs)
    schedule = plan.schedule
    row_blocks = plan.row_blocks if wanted.query else 1
    kv_head = pl.program_id(0) // row_blocks
    block = Block.of(kv_head, pl.program_id(0) % row_blocks, problem, plan)
    program = pl.program_id(1)
    rows = Rows.of(problem, schedule.block_keys, cache.page_table, lengths["start"])
    line = line_of(schedule, program, lengths["start"], lengths["end"], rows.align)
    num_tiles, tile_at = schedule.tiles(line)
    rows_late = problem.quantised and plan.block_rows * plan.key_width > SMALL_BLOCK
    written, unused = _written(problem, plan), [(0, part) for part in plan.unused_parts]

    def store_zeros(number_and_parts, place, live):
        for number, part in number_and_parts:
            zeros = jnp.zeros((*live.shape, part.size), out_refs[number].dtype)
            store(block.of_cache(out_refs[number], place, live, part), zeros)

    def tile(i, carry):
        d_q, fresh, b, key, end, found = carry
        keys = key + jnp.arange(schedule.block_keys, dtype=jnp.int32)
        live = rows.live(keys, end, found)

        def rows_of(block):
            """The query and the output's cotangent of a block, in parts."""
            q = [load(block.of_query(q_ref, b, part)) for part in plan.key_parts]
            return q, [load(block.of_query(d_out_ref, b, part)) for part in plan.value_parts]

        place = rows.place(b, key, found)
        loaded = () if rows_late else rows_of(block)
        k, v = load_tile(problem, plan, block, cache, place, live)
        q, d_out = loaded or rows_of(block)
        key_scale, value_scale = (block.common_scale(problem, ref, b) for ref in (cache.key_scale, cache.value_scale))

        def gradients(block, q, d_out):
            """For a block: the probabilities, the gradients of the products q . k, and the tile of keys."""
            lse, delta = load(block.of_row(lse_ref, b)), load(block.of_row(delta_ref, b))
            sees = block.sees(lengths, b, keys, live)
            seen_k, seen_v = (tile.cleaned(sees) for tile in (k, v)) if problem.junk_between_tokens else (k, v)  # 0 times NaN
            x = logits(problem, products(problem, q, seen_k.parts), seen_k.scales, key_scale)
            # A probability is at most 1. The minimum enforces this, because lse has lost its low bits if logits are large.
            p = jnp.where(sees & block.ok[:, None], jnp.exp2(jnp.minimum(x - lse[:, None] * LOG2_E, 0.0)), 0.0)
            d_p = products(problem, d_out, seen_v.parts) * (value_scale if seen_v.scales is None else seen_v.scales[None, :])
            d_x = p * (d_p - delta[:, None]) * logits_slope(problem, x) * key_scale
            return p, d_x, seen_k

        p, d_x, seen_k = gradients(block, q, d_out)
        if wanted.key_value:

            def outer_products(p, d_x, q, d_out):
                """The gradients of the tile's keys, and then of its values, as in `written`.

                If there is one block, d_key is on its way to memory while d_value is computed. Both come before d_query, whose
                store is a branch.
                """
                factors = [(weights, part) for weights, rows in ((d_x, q), (p, d_out)) for part in rows]
                for numbers in written.values():
                    products = (dot(problem, weights.astype(x.dtype).T, x) for weights, x in (factors[n] for n in numbers))
                    yield functools.reduce(jnp.add, products)

            def add(row_block, sums):
                other = Block.of(kv_head, row_block, problem, plan)
                q, d_out = rows_of(other)
                p, d_x, _ = gradients(other, q, d_out)
                return tuple(x + more for x, more in zip(sums, outer_products(p, d_x, q, d_out), strict=True))

            sums = outer_products(p, d_x, q, d_out)
            if plan.row_blocks > 1:
                sums = jax.lax.fori_loop(1, plan.row_blocks, add, tuple(sums))
            for (number, part), values in zip(written, sums, strict=True):
                store(block.of_cache(out_refs[number], place, live, part), values)
            store_zeros(unused, place, live)

        last = schedule.is_last(program, key, end)
        if wanted.query:
            more = [key_dot(problem, d_x, part, seen_k.scales) for part in seen_k.parts]
            d_q = tuple(jnp.where(fresh, 0.0, x) + y for x, y in zip(d_q, more, strict=True))

            @pl.when(last)
            def _():
                for part, x in zip(plan.key_parts, d_q, strict=True):
                    store(block.of_query(parts_ref, schedule.slot(program, b), part), x)

        return d_q, last, *next_tile(i + 1)

    def next_tile(i):
        """For tile i: the sequence, the first row, the end of the piece, and what `Rows.look_up` finds."""
        b, key, end = tile_at(i)
        return b, key, end, rows.look_up(b, key)

    zeros = tuple(jnp.zeros((plan.block_rows, part.size), jnp.float32) for part in plan.key_parts)
    jax.lax.fori_loop(0, num_tiles, tile, (zeros, jnp.asarray(True), *next_tile(0)))
    if wanted.query:
        pl.when(pl.program_id(0) == 0)(lambda: store_pieces(schedule, line, pieces_ref))

    if wanted.key_value:
        num_idle, idle_at = idle.tiles(line_of(idle, program, idle_lengths["start"], idle_lengths["end"]))

        def clear(i, _):
            which, key, end = idle_at(i)
            keys = key + jnp.arange(idle.block_keys, dtype=jnp.int32)
            store_zeros([*written, *unused], (which % schedule.batch, keys), keys < end)

        jax.lax.fori_loop(0, num_idle, clear, None)


def _written(problem, plan):
    """Which products add up to the gradient of a part of the cache's arrays.

    Returns:
        {(number of the array, part): numbers of products}. The products of the parts of the key come first, and then the products
        of the parts of the value.
    """
    array, column = (1, 0) if problem.value_columns is None else (0, problem.value_columns[0])
    written = {}
    for number, place in enumerate([(0, x) for x in plan.key_parts] + [(array, x.moved(column)) for x in plan.value_parts]):
        written.setdefault(place, []).append(number)
    return written


def _sum_kernel(parts_ref, pieces_ref, d_query_ref, *, plan: Tiles):
    """One program computes d_query of some query rows of one sequence: the sum over the pieces."""
    b = pl.program_id(0)
    rows = pl.program_id(1) * plan.merge_rows + jnp.arange(plan.merge_rows, dtype=jnp.int32)
    first, count = pieces_ref[0, b], pieces_ref[1, b]
    masks = [part.masked(rows < d_query_ref.shape[1]) for part in plan.key_parts]

    def add(i, totals):
        piece = i * plan.merge_slots + jnp.arange(plan.merge_slots, dtype=jnp.int32)
        there = (piece < count)[:, None, None]
        parts = [of_pieces(piece, there, *x) for x in zip(plan.key_parts, masks, strict=True)]
        return tuple(total + jnp.sum(part, axis=0) for total, part in zip(totals, parts, strict=True))

    def of_pieces(piece, there, part, mask):
        place = parts_ref.at[(first + piece)[:, None, None], rows[None, :, None], part.dims[None, None, :]]
        return load((place, there & mask[None]))

    totals = tuple(jnp.zeros((plan.merge_rows, part.size), jnp.float32) for part in plan.key_parts)
    totals = jax.lax.fori_loop(0, cdiv(count, plan.merge_slots), add, totals)
    for part, mask, total in zip(plan.key_parts, masks, totals, strict=True):
        store((d_query_ref.at[b, rows[:, None], part.dims[None, :]], mask), total)
