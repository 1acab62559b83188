"""The forward operation in two kernels: `split` works through pieces of the live ranges, `combine` merges each sequence's pieces.

Rows of queries, a token and a head of one kv head, lie in [B, Hkv, R, D] here, R of them, so that the rows of a program are one
block of memory. With one token that is the query as it is.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk_ragged_schedule import cdiv, length_arrays, Line

from ._jax import launch, LOWEST, plgpu
from ._split import rounds_of, split
from ._tuning import round_up, Tiles, tiles


def forward(problem, target, queries, cache, **how):
    """Output and log-sum-exp; shapes as in `ejk_ragged.Backend.forward`."""
    plan = tiles(problem, target)
    lengths = length_arrays(problem, queries)
    own = lengths["start"], lengths["end"]
    row_bounds = tuple(
        _of_rows(problem, plan, lengths.get(f"token_{name}"), 0 if name == "end" else problem.seq_len) for name in ("start", "end")
    )
    parts, part_lse, *stops = split(problem, plan, _by_kv_head(problem, plan, queries.query), cache, own, row_bounds, **how)
    sink = queries.sink if "sink" in problem.given else None
    where = stops if plan.table else own
    out, lse = combine(problem, plan, parts, part_lse, where, sink, **how)
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


def combine(problem, plan: Tiles, parts, part_lse, where, sink, **how):
    """Output [B, T * Hq, D] and lse of all sequences; `where` has what tells the pieces of each: stops, or the lengths."""
    rows = problem.num_tokens * problem.num_q_heads
    at_once = math.gcd(rows, plan.merge_rows)
    operands, tree = jax.tree.flatten((parts, part_lse, where, sink))
    return launch(
        functools.partial(_combine_kernel, tree=tree, problem=problem, plan=plan),
        "ragged_decode_combine",
        [((problem.batch, rows, problem.head_dim), problem.out_dtype), ((problem.batch, rows), jnp.float32)],
        # The interpreter takes long to begin a program.
        {"sequence": problem.batch, "program": 1 if how["interpret"] else rows // at_once},
        follows=True,
        scratch_types={"out": plgpu.SMEM((at_once, plan.stored_dim), problem.out_dtype)},
        **how,
    )(*operands)


def _combine_kernel(*refs, tree, problem, plan: Tiles, out):
    """One program: some rows of a sequence at once. Weights their partial outputs by their softmax denominators, the sink's too."""
    parts_ref, part_lse_ref, where, sink_ref = tree.unflatten(refs[: tree.num_leaves])
    out_ref, lse_ref = refs[tree.num_leaves :]
    b = lax.axis_index("sequence")
    first, count = _pieces(plan, b, where)
    dims = plgpu.Layout.WG_STRIDED((plan.stored_dim,), vec_size=plan.stored_dim // 128)

    def sink_of(token, q_head):
        if sink_ref is None:
            return jnp.float32(-jnp.inf)
        batch, num_tokens, _ = sink_ref.shape
        return sink_ref[b if batch > 1 else 0, token if num_tokens > 1 else 0, q_head]

    def combine_rows(rows):
        token_heads = [(lax.div(row, problem.num_q_heads), lax.rem(row, problem.num_q_heads)) for row in rows]
        places = [(lax.div(h, problem.group), token * problem.group + lax.rem(h, problem.group)) for token, h in token_heads]

        def merge(i, carry):
            pieces = [i * plan.merge_slots + k for k in range(plan.merge_slots)]
            slots = [first + jnp.minimum(piece, count - 1) for piece in pieces]
            return [merge_row(pieces, slots, *of_row) for of_row in zip(places, carry, strict=True)]

        def merge_row(pieces, slots, place, carry):
            acc, high, total = carry
            lse = [part_lse_ref[slot, *place] for slot in slots]
            lse = [jnp.where(piece < count, x, -jnp.inf) for piece, x in zip(pieces, lse, strict=True)]
            parts = [plgpu.load(parts_ref.at[slot, *place], layout=dims) for slot in slots]
            new_high = functools.reduce(jnp.maximum, lse, high)
            fade, weights = jnp.exp(high - new_high), [jnp.exp(x - new_high) for x in lse]
            acc = acc * fade + sum(part * weight for part, weight in zip(parts, weights, strict=True))
            return acc, new_high, total * fade + sum(weights)

        zeros = plgpu.layout_cast(jnp.zeros((plan.stored_dim,), jnp.float32), dims)
        sinks = [sink_of(*token_head) for token_head in token_heads]
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

    at_once = out.shape[0]
    each = out_ref.shape[1] // at_once // lax.axis_size("program")

    def group(i, _):
        row = (lax.axis_index("program") * each + i) * at_once
        combine_rows([row + k for k in range(at_once)])

    lax.fori_loop(0, each, group, None)


def _pieces(plan: Tiles, b, where):
    """The first slot of a sequence, and how many from there on are its pieces."""
    zero = jnp.zeros_like(b)
    if plan.table:
        (stops_ref,) = where
        before, stop, total = (
            jnp.where(b > 0, stops_ref[jnp.maximum(b - 1, 0)], 0),
            stops_ref[b],
            stops_ref[plan.schedule.batch - 1],
        )
    else:
        start, end = plan.schedule.clipped(b, *(None if ref is None else ref[b] for ref in where))
        before, stop = zero, rounds_of(plan, start, end)
        total = stop
    # Worker and range matter where a line is cut, and not where pieces are counted.
    return plan.schedule.pieces(Line(zero, b, zero, zero, stop - before, stop, total))
