"""The kernel that reads the cache. One warpgroup of each program has tiles of keys and values copied into shared memory, and the
others multiply."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _few, _many, _narrow, _pair
from ._copy import copy
from ._jax import launch, plgpu, when
from ._line import Ranges
from ._program import heads_of, Program, TILED, tiling
from ._tiles import table_entries, Tiles
from ._widen import widen, widen_parts


def split(problem, plan: Tiles, query, cache, lengths, query_bounds, sink, **how):
    """Partial results of all pieces.

    Args:
        query: [B, T, Hkv, G, D]; `plan` says which T, G and D.
        lengths: (start, end), int32 [B] or None.
        query_bounds: (start, end), None where all query rows see the same rows. int32 [B, query rows of all blocks], or [B, T]
            where query rows are many, or tiles are widened in registers. They count from where each sequence `begins_at` if the
            rows of all sequences lie end to end. `lengths` do not.
        sink: float32 [B or 1, Hkv, query rows of all blocks], or None; looked at where output is written.

    Returns, by name:
        parts: float32 [slots, Hkv, query rows of all blocks, Dv or more], sums of values, not divided by those of their weights.
        stats: float32 [slots, Hkv, 2, query rows of all blocks], the reference of the weights, and the sum of the weights
            relative to the reference. In one number, their log-sum-exp, the sum would be lost next to a large logit.
        stops: where `plan.table`, the table of sequences, int32, as `Ranges.stops`.
        out, lse: where `plan.writes_out`, [B, T, Hkv, G, Dv] and float32 [B, Hkv, query rows of all blocks]: the output and lse of
            sequences that are one piece.
    """
    dtype, keys = problem.dtype, plan.schedule.block_keys
    heads, num_rows = problem.num_kv_heads, plan.row_blocks * plan.block_rows
    sink = sink if plan.writes_out else None
    operands, tree = jax.tree.flatten((query, cache, lengths, query_bounds, sink))
    results: dict[str, Any] = {
        "parts": ((plan.schedule.slots, heads, num_rows, plan.stored_dim), jnp.float32),
        "stats": ((plan.schedule.slots, heads, 2, num_rows), jnp.float32),
    }
    if plan.table:
        results["stops"] = (table_entries(plan.table, plan.table_step),), jnp.int32
    if plan.writes_out:
        results |= plan.output(problem)
    shared = _rings(problem, plan, cache)
    readers = plan.warpgroups
    if plan.pair:
        shared |= _pair.shared(plan, dtype, how["interpret"])
    elif not plan.many or how["interpret"]:
        weights = readers if plan.many else plan.terms * readers, plan.warpgroup_rows, keys
        dtype_of_weights = plan.value_dtype(problem)
        shared["p"] = plgpu.SMEM(weights, dtype_of_weights, transforms=tiling(keys, dtype_of_weights, plan.line))
    if plan.in_registers:
        shared |= _narrow.shared(plan, dtype)
    if plan.many and readers > 1 and not plan.wide_stages and not plan.pair:
        shared["v_clear"] = plgpu.Barrier(num_arrivals=1, num_barriers=plan.stages)
    if plan.takes_turns:
        shared["turn"] = plgpu.Barrier(num_arrivals=1, num_barriers=readers)
    if not plan.direct:
        dims = {"k_tile": plan.block_dim, "v_tile": plan.value_dim}
        shared |= {name: plgpu.SMEM((keys, dim), dtype, transforms=TILED) for name, dim in dims.items()}
    if plan.table:
        shared |= {"stops": plgpu.SMEM((table_entries(plan.table, plan.table_step),), jnp.int32), "stops_full": plgpu.Barrier()}
    static = {"tree": tree, "problem": problem, "plan": plan, "results": tuple(results), "interpreted": how["interpret"]}
    call = launch(
        functools.partial(_kernel, **static),
        "ragged_decode_split",
        results.values(),
        {"block": heads * plan.row_blocks, "program": plan.schedule.programs},
        follows=False,
        num_threads=readers + bool(plan.wide_stages) + 1,
        thread_name="warpgroup",
        scratch_types=shared,
        reduction_bytes=plan.reduction_bytes,
        **how,
    )
    return dict(zip(results, call(*operands), strict=True))


def _kernel(*refs, tree, problem, plan, results, interpreted, **shared):
    inputs, outputs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    query, cache, lengths, query_bounds, sink = tree.unflatten(inputs)
    block = lax.axis_index("block")
    program = Program(
        problem=problem,
        plan=plan,
        interpreted=interpreted,
        number=lax.axis_index("program"),
        head=lax.div(block, plan.row_blocks),
        query_block=lax.rem(block, plan.row_blocks),
        query=query,
        cache=(cache.key, cache.value),
        scales={"k": cache.key_scale, "v": cache.value_scale},
        page_table=cache.page_table,
        ranges=Ranges(plan, lengths, shared.pop("stops", None), plan.table_step),
        query_bounds=query_bounds,
        sink=sink,
        results=types.SimpleNamespace(**dict(zip(results, outputs, strict=True))),
        shared=types.SimpleNamespace(**shared),
    )
    warpgroup = lax.axis_index("warpgroup")
    if plan.pair:
        for one in range(plan.warpgroups):
            when(warpgroup == one)(functools.partial(_multiply, program, one))
    else:
        when(warpgroup < plan.warpgroups)(lambda: _multiply(program, warpgroup))
    if plan.wide_stages:
        when(warpgroup == plan.warpgroups)(lambda: (widen if plan.many else widen_parts)(program))
    when(warpgroup == lax.axis_size("warpgroup") - 1)(lambda: copy(program))


def _rings(problem, plan, cache):
    """The rings of shared memory, with the barriers of their places: who fills a place, and who frees it."""
    keys = plan.place_rows
    parts = keys // plan.part_rows
    # How many scales each row of "k" and "v" has in a program.
    given = ("k", cache.key_scale), ("v", cache.value_scale)
    by_row = [(name, scale) for name, scale in given if scale is not None and scale.shape[-1] > 1]
    scales = {name: min(heads_of(scale, problem), plan.joined) for name, scale in by_row}
    of_scales = len(plan.scale_copies) if plan.end_to_end else parts  # copies for each of them
    arrivals: dict[str, Any] = {"q": (plan.block_rows // plan.copy_rows, plan.warpgroups)}
    shared: dict[str, Any] = {"q": ((plan.row_groups, plan.warpgroup_rows, plan.query_dim), problem.dtype)}
    for name, (source, _, columns) in plan.rings.items():
        if plan.in_registers:  # each place is always read by the same warpgroup
            shared[name] = (keys, columns), problem.cache_dtype
            arrivals[name] = parts + of_scales * scales.get(name, 0), 1
        else:
            shared[name] = (keys, columns), plan.value_dtype(problem) if source else problem.dtype
            arrivals[name] = 1 if plan.wide_stages else parts, 1 if plan.pair else plan.warpgroups
        if plan.wide_stages:
            shared[f"narrow_{name}"] = (keys, columns), problem.cache_dtype
            arrivals[f"narrow_{name}"] = parts * len(plan.rings) + of_scales * len(scales), 1
    rings: dict[str, Any] = {}
    for name, (shape, dtype) in shared.items():
        if name == "q":
            tiled, line = plan.query_dim == plan.block_dim, plan.line
        else:
            tiled, line = plan.direct, plan.narrow_line if plan.in_registers else plan.line
        rings[name] = plgpu.SMEM((plan.places[name], *shape), dtype, transforms=tiling(shape[-1], dtype, line) if tiled else ())
        for state, count, others in zip(("full", "free"), arrivals[name], (plan.filled_with, plan.freed_with), strict=True):
            if name not in others:
                rings[f"{name}_{state}"] = plgpu.Barrier(num_arrivals=count, num_barriers=plan.places[name])
    for name, count in scales.items():
        if plan.wide_stages:
            rings[f"narrow_{name}_scale"] = plgpu.SMEM((plan.stages, plan.scales_copied), jnp.float32)
        places = (plan.stages, count, plan.scales_copied) if plan.in_registers else (plan.wide_stages or plan.stages, keys)
        rings[f"{name}_scale"] = plgpu.SMEM(places, jnp.float32)
    if plan.many and "v" in scales:
        rings["v_unit"] = plgpu.SMEM((plan.wide_stages,), jnp.float32)
    return rings


def _multiply(program, warpgroup):
    """All pieces of a program, for one of the warpgroups that multiply."""
    plan = program.plan
    if plan.registers:
        plgpu.set_max_registers(plan.registers[0], action="increase")
    form = _pair if plan.pair else _many if plan.many else _narrow if plan.in_registers else _few
    first_free = _pair.first_free(plan, warpgroup) if plan.pair else () if plan.in_registers else plan.rings
    program.release("q", *first_free)
    if plan.table:
        plgpu.barrier_wait(program.shared.stops_full)
    form.compute_pieces(program, warpgroup)
