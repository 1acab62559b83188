"""The forward operation in two kernels: `split` works through pieces of the live ranges, `combine` merges each sequence's pieces.

Rows of queries, a token and a head of one kv head, lie in [B, Hkv, R, D] here, R of them, so that the rows of a program are one
block of memory. With one token that is the query as it is.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk_ragged_schedule import cdiv, length_arrays

from ._jax import launch, LOWEST, plgpu
from ._line import Ranges
from ._split import split
from ._tuning import merging, round_up, Tiles, tiles


def forward(problem, target, queries, cache, **how):
    """Output and log-sum-exp; shapes as in `ejk_ragged.Backend.forward`."""
    plan = tiles(problem, target)
    lengths = length_arrays(problem, queries)
    own = lengths["start"], lengths["end"]
    row_bounds = tuple(
        _of_rows(problem, plan, lengths.get(f"token_{name}"), 0 if name == "end" else problem.seq_len) for name in ("start", "end")
    )
    parts, part_stats = split(problem, plan, _by_kv_head(problem, plan, queries.query), cache, own, row_bounds, **how)
    out, lse = combine(problem, target, plan, parts, part_stats, own, queries.sink, **how)
    return out.reshape(queries.query.shape), lse.reshape(queries.query.shape[:3])


def _by_kv_head(problem, plan, query):
    """[B, T, Hq, D] as [B, Hkv, R, D], with rows and dimensions that tiles can hold."""
    batch, num_tokens, _, head_dim = query.shape
    query = query.reshape(batch, num_tokens, problem.num_kv_heads, problem.group, head_dim).swapaxes(1, 2)
    rows = num_tokens * problem.group
    query = query.reshape(batch, problem.num_kv_heads, rows, head_dim)
    more_rows = round_up(rows, 8) - rows if rows > 8 else 0  # up to 8 are one tile, which may be larger than what there is
    more_dims = plan.block_dim - head_dim
    return jnp.pad(query, ((0, 0), (0, 0), (0, more_rows), (0, more_dims))) if more_rows or more_dims else query


def _of_rows(problem, plan, of_tokens, beyond):
    """[B, T] as [B, rows of all blocks]."""
    if of_tokens is None:
        return None
    rows = jnp.repeat(of_tokens, problem.group, axis=1)
    return jnp.pad(rows, ((0, 0), (0, plan.row_blocks * plan.block_rows - rows.shape[1])), constant_values=beyond)


def combine(problem, target, plan: Tiles, parts, part_stats, lengths, sink, **how):
    """Output [B, T * Hq, D] and lse of all sequences."""
    rows = problem.num_tokens * problem.num_q_heads
    at_once, programs = merging(target, problem.batch, rows)
    operands, tree = jax.tree.flatten((parts, part_stats, lengths, sink))
    shared = {"out": plgpu.SMEM((at_once, plan.stored_dim), problem.out_dtype)}
    if plan.table:
        shared["stops"] = plgpu.SMEM((plan.table,), jnp.int32)
    return launch(
        functools.partial(_combine_kernel, tree=tree, problem=problem, plan=plan),
        "ragged_decode_combine",
        [((problem.batch, rows, problem.head_dim), problem.out_dtype), ((problem.batch, rows), jnp.float32)],
        {"program": min(programs, 2) if how["interpret"] else programs},  # the interpreter takes long to begin one
        follows=True,
        scratch_types=shared,
        **how,
    )(*operands)


def _combine_kernel(*refs, tree, problem, plan: Tiles, wait, out, stops=None):
    """One program: some rows of a sequence at once, and then others. Adds up their partial results, the sink's too. It is there
    before the pieces are, and knows already whose they will be."""
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
            if plan.stored_dim == problem.head_dim:
                out_ref[b, row] = result
            else:
                out[i] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out.at[i, pl.ds(0, problem.head_dim)], out_ref.at[b, row])
        plgpu.wait_smem_to_gmem(0)

    at_once, programs = out.shape[0], lax.axis_size("program")
    num_rows = out_ref.shape[1]
    program = lax.axis_index("program")

    def group(i, _):
        row = (program + i * programs) * at_once
        combine_rows(lax.div(row, num_rows), [lax.rem(row, num_rows) + k for k in range(at_once)])

    groups = problem.batch * num_rows // at_once
    lax.fori_loop(0, cdiv(groups - program, programs), group, None)
