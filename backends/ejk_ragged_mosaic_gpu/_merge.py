"""The kernel that merges the pieces of each sequence. It may be launched while the first kernel runs, and waits for its end."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk_ragged_schedule import cdiv

from ._jax import launch, LOWEST, of_parts, plgpu, store, when
from ._line import Ranges
from ._program import over
from ._tiles import begins_in_line, Tiles
from ._tuning import merging


TINY = float(jnp.finfo(jnp.float32).tiny)


def combine(problem, target, plan: Tiles, partial, lengths, sink, **how):
    """Output and lse of all sequences from the results of `split`.

    Args:
        partial: results of `split`, by name.
        sink: as `Queries.sink`, or as `Program.sink` if query rows are many.

    Returns:
        out: [B, T, Hkv, G, Dv]. If query rows are many, with the plan's T and G.
        lse: float32 [B, Hkv, T * G], or [B, Hkv, query rows of all blocks] if query rows are many.
    """
    written = [partial[name] for name in ("out", "lse") if plan.writes_out]
    stops = partial.get("stops")
    if stops is not None and plan.table_step == 1:  # says all that lengths say
        lengths = None, None
    operands, tree = jax.tree.flatten((partial["parts"], partial["stats"], stops, lengths, sink))
    results = plan.output(problem).values()
    size, parts, programs = merging(problem, target, plan)
    return launch(
        functools.partial(_kernel, tree=tree, problem=problem, plan=plan, parts=parts),
        "ragged_decode_combine",
        [] if written else results,
        {"program": min(programs, 2) if how["interpret"] else programs},  # the interpreter is slow to begin a program
        follows=True,
        updates=len(written),
        scratch_types={"staging": plgpu.SMEM(size, problem.out_dtype)},
        **how,
    )(*operands, *written)


def _kernel(*refs, tree, problem, plan: Tiles, parts, wait, staging):
    """One program: `parts` parts of the query rows and dimensions of a sequence, `plan.merge_slots` partial results at a time, and
    then others."""
    parts_ref, stats_ref, stops_ref, lengths, sink_ref = tree.unflatten(refs[: tree.num_leaves])
    out_ref, lse_ref = refs[tree.num_leaves :]
    wait()
    ranges = Ranges(plan, lengths, stops_ref, plan.table_step)
    rows, size = staging.shape
    layout = of_parts(rows, size)
    of_rows = functools.partial(plgpu.load, layout=layout.reduce(1), optimized=False)
    over_columns = lambda x, like: plgpu.layout_cast(over(x, like), layout)
    constant = lambda value, *shape: plgpu.layout_cast(
        jnp.full(shape, value, jnp.float32), layout if len(shape) == 2 else layout.reduce(1)
    )
    _, tokens, heads, group, value_dim = out_ref.shape
    num_rows = tokens * group

    def place_in_parts(head, query_rows, columns):
        """Where query rows and columns of a kv head are among partial results: the joined kv head, its query rows and columns."""
        if plan.joined == 1:
            return head, query_rows, columns
        token, first, other = lax.div(query_rows.start, group), lax.rem(query_rows.start, group), lax.rem(head, plan.joined)
        start = (token * plan.joined + other) * group + first
        wide_head = lax.div(head, plan.joined)
        _, before = begins_in_line(wide_head, plan.joined * value_dim) if plan.shares_lines else (0, 0)
        own_columns = pl.ds(pl.multiple_of(columns.start + other * value_dim + before, 16), size)
        return wide_head, pl.ds(pl.multiple_of(start, rows), rows), own_columns

    def merge_parts(b, place, column):
        first, count = ranges.slots(b)
        columns = pl.ds(pl.multiple_of(column * size, size), size)
        first_rows = [(place * parts + i) * rows for i in range(parts)]  # of those of all kv heads
        query_rows = [(lax.div(i, num_rows), pl.ds(pl.multiple_of(lax.rem(i, num_rows), rows), rows)) for i in first_rows]

        def merge(i, carry):
            pieces = [i * plan.merge_slots + k for k in range(plan.merge_slots)]
            slots = [first + jnp.minimum(piece, count - 1) for piece in pieces]
            return [merge_part(pieces, slots, *place, *sums) for place, sums in zip(query_rows, carry, strict=True)]

        def merge_part(pieces, slots, head, query_rows, acc, high, total):
            head, query_rows, own_columns = place_in_parts(head, query_rows, columns)
            highs, totals = ([of_rows(stats_ref.at[slot, head, k, query_rows]) for slot in slots] for k in range(2))
            sums = [plgpu.load(parts_ref.at[slot, head, query_rows, own_columns], layout=layout, optimized=False) for slot in slots]
            new_high = functools.reduce(jnp.maximum, highs, high)
            # A product: a piece that is not there is the last one again, with no weight.
            weights = [jnp.exp(x - new_high) * (piece < count).astype(jnp.float32) for piece, x in zip(pieces, highs, strict=True)]
            fade = jnp.exp(high - new_high)
            acc = acc * over_columns(fade, acc) + sum(x * over_columns(weight, x) for x, weight in zip(sums, weights, strict=True))
            return acc, new_high, total * fade + sum(x * weight for x, weight in zip(totals, weights, strict=True))

        def write():
            nothing = constant(0, rows, size), constant(LOWEST, rows), constant(0, rows)
            merged = lax.fori_loop(0, cdiv(count, plan.merge_slots), merge, [nothing] * parts)
            for place, sums in zip(query_rows, merged, strict=True):
                write_part(*place, *sums)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def write_part(head, query_rows, acc, high, total):
            token, first = lax.div(query_rows.start, group), lax.rem(query_rows.start, group)
            out, lse = finished(acc, high, total, sink_of(b, token, head, first), over_columns)
            when(column == 0)(lambda: store(lse_ref.at[b, head, query_rows], lse))
            write_values(out_ref.at[b, token, head, pl.ds(first, rows)], columns, out.astype(out_ref.dtype))

        if plan.writes_out:
            when(count != 1)(write)
        else:
            write()

    def sink_of(b, token, head, first):
        if sink_ref is None:
            return None
        b = b if sink_ref.shape[0] > 1 else 0
        if plan.many:
            return of_rows(sink_ref.at[b, head, pl.ds(token * group + first, rows)])
        return of_rows(sink_ref.at[b, token if sink_ref.shape[1] > 1 else 0, pl.ds(head * group + first, rows)])

    def write_values(ref, columns, values):
        if value_dim % size == 0:
            store(ref.at[:, columns], values)
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for the part before
        staging[...] = values
        plgpu.commit_smem()
        for i in range(rows):  # a copy takes what lies together in shared memory
            plgpu.copy_smem_to_gmem(staging.at[i, pl.ds(0, value_dim)], ref.at[i])

    places = problem.batch, heads * num_rows // (rows * parts), -(-value_dim // size)
    program, programs = lax.axis_index("program"), lax.axis_size("program")

    def at(i, _):
        place = program + i * programs
        indices = []
        for count in reversed(places):
            indices.append(lax.rem(place, count))
            place = lax.div(place, count)
        merge_parts(*reversed(indices))

    lax.fori_loop(0, cdiv(math.prod(places) - program, programs), at, None)


def finished(acc, high, total, sink, over=over):
    """Output and lse of some query rows: from the sums of values [query rows, dims], the reference, the sum of weights, and the
    sink of each query row, or None. `over` is the function for the layout of `acc`."""
    if sink is not None:
        most = jnp.maximum(high, sink)
        fade = jnp.exp(high - most)
        acc, high, total = acc * over(fade, acc), most, total * fade + jnp.exp(sink - most)
    # If nothing is seen, the sums are 0, and so is the output. One division per query row: a division is several instructions, and
    # a query row has up to 512 columns.
    return acc * over(1 / jnp.maximum(total, TINY), acc), high + jnp.log(total)


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
