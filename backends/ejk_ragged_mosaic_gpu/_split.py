"""The kernel that reads the cache. One warpgroup of each program has tiles of keys and values copied into shared memory, and the
others multiply."""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import _few, _many
from ._copy import copy
from ._jax import launch, plgpu
from ._line import Ranges
from ._program import Program, TILED
from ._tuning import Tiles


def split(problem, plan: Tiles, query, cache, lengths, query_bounds, sink, **how):
    """Partial results of all pieces.

    Args:
        query: [B, T, Hkv, G, D], D padded; `plan` says which T and G.
        lengths: (start, end), int32 [B] or None.
        query_bounds: (start, end), None where all query rows see the same rows. int32 [B, query rows of all blocks], or [B, T]
            where query rows are many.
        sink: float32 [B or 1, Hkv, query rows of all blocks], or None; looked at where output is written.

    Returns, by name:
        parts: float32 [slots, Hkv, query rows of all blocks, Dv or more], sums of values, not divided by those of their weights.
        stats: float32 [slots, Hkv, 2, query rows of all blocks], the largest logit, and the sum of the weights relative to the
            largest. In one number, their log-sum-exp, the sum would be lost next to a large logit.
        out, lse: where `plan.writes_out`, [B, T, Hkv, G, Dv] and float32 [B, Hkv, query rows of all blocks]: the output and lse of
            sequences that are one piece.
    """
    dtype, keys = problem.dtype, plan.schedule.block_keys
    heads, num_rows = problem.num_kv_heads, plan.row_blocks * plan.block_rows
    sink = sink if plan.writes_out else None
    operands, tree = jax.tree.flatten((query, cache.key, cache.value, cache.page_table, lengths, query_bounds, sink))
    results = {
        "parts": ((plan.schedule.slots, heads, num_rows, plan.stored_dim), jnp.float32),
        "stats": ((plan.schedule.slots, heads, 2, num_rows), jnp.float32),
    }
    if plan.writes_out:
        results |= plan.output(problem)
    ring = lambda dim: plgpu.SMEM((plan.stages, keys, dim), dtype, transforms=TILED if plan.direct else ())
    readers = plan.warpgroups
    shared = {
        "q": plgpu.SMEM((plan.query_slots, readers, plan.warpgroup_rows, plan.block_dim), dtype, transforms=TILED),
        "k": ring(plan.block_dim),
        "v": ring(plan.value_dim),
    }
    copies_of = {"q": plan.block_rows // plan.copy_rows, "k": keys // plan.part_rows, "v": keys // plan.part_rows}
    for name, copies in copies_of.items():
        places = plan.query_slots if name == "q" else plan.stages
        shared[f"{name}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=places)
        shared[f"{name}_free"] = plgpu.Barrier(num_arrivals=readers, num_barriers=places)
    if not plan.many or how["interpret"]:
        shared["p"] = plgpu.SMEM((readers if plan.many else plan.terms, plan.warpgroup_rows, keys), dtype, transforms=TILED)
    if readers > 1:
        shared["v_clear"] = plgpu.Barrier(num_arrivals=1, num_barriers=plan.stages)
    if not plan.direct:
        dims = {"k_tile": plan.block_dim, "v_tile": plan.value_dim}
        shared |= {name: plgpu.SMEM((keys, dim), dtype, transforms=TILED) for name, dim in dims.items()}
    if plan.table:
        shared |= {"stops": plgpu.SMEM((plan.table,), jnp.int32), "stops_full": plgpu.Barrier()}
    static = {"tree": tree, "problem": problem, "plan": plan, "results": tuple(results), "interpreted": how["interpret"]}
    call = launch(
        functools.partial(_kernel, **static),
        "ragged_decode_split",
        results.values(),
        {"block": heads * plan.row_blocks, "program": plan.schedule.programs},
        follows=False,
        num_threads=readers + 1,
        thread_name="warpgroup",
        scratch_types=shared,
        reduction_bytes=plan.reduction_bytes,
        **how,
    )
    return dict(zip(results, call(*operands), strict=True))


def _kernel(*refs, tree, problem, plan, results, interpreted, **shared):
    inputs, outputs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    query, key, value, page_table, lengths, query_bounds, sink = tree.unflatten(inputs)
    block = lax.axis_index("block")
    program = Program(
        problem=problem,
        plan=plan,
        interpreted=interpreted,
        number=lax.axis_index("program"),
        head=lax.div(block, plan.row_blocks),
        query_block=lax.rem(block, plan.row_blocks),
        query=query,
        cache=(key, value),
        page_table=page_table,
        ranges=Ranges(plan, lengths, shared.pop("stops", None)),
        query_bounds=query_bounds,
        sink=sink,
        results=types.SimpleNamespace(**dict(zip(results, outputs, strict=True))),
        shared=types.SimpleNamespace(**shared),
    )
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup < plan.warpgroups)(lambda: _multiply(program, warpgroup))
    pl.when(warpgroup == plan.warpgroups)(lambda: copy(program))


def _multiply(program, warpgroup):
    """All pieces of a program, for one of the warpgroups that multiply."""
    if program.plan.registers:
        plgpu.set_max_registers(program.plan.registers[0], action="increase")
    for name, places in program.rings():
        for slot in range(places):
            plgpu.barrier_arrive(program.barriers(name)[1].at[slot])
    if program.plan.table:
        plgpu.barrier_wait(program.shared.stops_full)
    compute_piece = _many.compute_piece if program.plan.many else _few.compute_piece
    program.ranges.pieces(program.number, lambda piece: compute_piece(program, piece, warpgroup))
