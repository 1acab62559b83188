"""What the kernels have in common: names of JAX's Mosaic GPU backend, and how a kernel is launched or interpreted."""

import math
import os
import threading
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from ejk_ragged_schedule.warning_filters import ignore_warning


plgpu = cast(Any, mosaic_gpu)  # types are checked with the oldest JAX, in which the module is another

# Layouts say which thread holds which numbers: of a matrix, of a matrix that is transposed in memory, of a vector with one number
# per column of a matrix, and of a vector with one number per row. In IN_EACH_WARP each warp has all of a vector of 64 numbers, and
# a thread has two neighbours, which are loaded one by one because scales may begin in the middle of 16 bytes.
TILE = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
OF_COLUMNS, OF_ROWS = TILE.reduce(0), TILE.reduce(1)
IN_EACH_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((64,), (2,), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3,), vector_dim=-1
)
# In these two layouts a thread has some columns of one row of each 64, so it loads and stores 16 bytes at once: 16 numbers of 8
# bits, or 8 numbers of 16 bits. The threads of a warp are two dimensions of the layouts, so that JAX loads a vector with one number
# per row number by number, and not by `ldmatrix`, which needs multiples of 16 bytes.
BYTES, WORDS = (
    plgpu.Layout.TILED(plgpu.Tiling(((64, 64), (32, 32), (2, 32), (count,))), warp_dims=(-7, -6), lane_dims=(-5, -3), vector_dim=-1)
    for count in (16, 8)
)
# The same for tiles of 8 bits that become the first operand of a product in registers. In KEY_BYTES a thread has 32 columns of each
# 128, side by side, of the rows that it has in TILE. In VALUE_BYTES a thread has four columns of each 128, of the rows that are its
# columns in TILE. In SUMS a thread has four rows of each 128, side by side, and the columns that it has in TILE.
KEY_BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 128), (16, 128), (8, 32), (16,))), warp_dims=(-7,), lane_dims=(-3, -4), vector_dim=-1
)
VALUE_BYTES = plgpu.Layout.TILED(plgpu.Tiling(((8, 128), (8, 32), (2, 4))), warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1)
# A thread loads eight numbers of the query as QUERY_LOADED, and stores them as QUERY_STORED, two at each place.
QUERY_LOADED = plgpu.Layout.TILED(plgpu.Tiling(((8, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
QUERY_STORED = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (2, 128), (32,), (16,), (8,), (2,))), warp_dims=(-8,), lane_dims=(-6, -2, -5), vector_dim=-1
)
SUMS = plgpu.Layout.TILED(plgpu.Tiling(((128, 8), (32, 8), (4, 2))), warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-2)


def of_parts(rows, columns):
    """The layout of partial results of so many query rows: 1, 2 or a multiple of 4. The 4 warps have up to 4 query rows at once. A
    thread has numbers that lie side by side."""
    rows, width = min(rows, 4), math.gcd(columns, 128)
    of_warp = width * rows // 4
    tiling = ((rows, width), *([(of_warp,)] if rows < 4 else []), (of_warp // 32,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiling), warp_dims=(-4, -3) if rows == 2 else (-3,), lane_dims=(-2,), vector_dim=-1)


LOWEST = float(jnp.finfo(jnp.float32).min)  # used in place of -inf if -inf - -inf would give NaN

# Whether all threads wait before and after every store into shared memory and every copy into shared memory. These kernels need no
# such barriers. All threads wait for the commit of a store before one of them reads what was stored. What is overwritten was read
# before a barrier: that of `refer`, of a sum or maximum over keys, or of a ring, at which each thread arrives.
AUTOMATIC_BARRIERS = False
# The kernels say which thread holds which numbers. JAX can search for the best layouts, but takes minutes here, or does not end.
LAYOUTS_AS_WRITTEN = plgpu.LoweringSemantics.Lane


def store(ref, values):
    """`ref[...] = values`, even where few bytes lie side by side. Since JAX 0.12 such stores have to be asked for."""
    if values.size == 1:  # is stored as a scalar only
        ref.at[(0,) * values.ndim][...] = jnp.max(values)
    elif hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


def when(condition):
    """`pl.when`, without a conversion from bool: JAX takes 7 ms to lower one."""
    if isinstance(condition, bool):
        return pl.when(condition)
    return lambda work: jax.lax.switch(jnp.where(condition, 1, 0), (lambda: None, work))


def launch(kernel, name, results, grid, *, follows, early, interpret, detect_races, updates=0, reduction_bytes=2048, **options):
    """A function of operands: `kernel` over a grid, {name of an axis: size}, with `results` of these shapes and dtypes.

    `follows` says whether the kernel works on what the kernel before it leaves. The kernel is then given a function `wait`, which
    returns when all of these operands are there. The kernel may read its other operands before. If `early`, the device launches
    such a kernel as soon as all programs of the one before have begun, and else as soon as they have ended. Without such a wait
    (programmatic dependent launch) the launch would begin after the end, and take a microsecond.

    The last `updates` operands are written in place, and are returned in place of results.
    """
    if interpret:
        _check_threads(options.get("num_threads", 1))

    def body(*refs, **shared):
        if follows:
            shared["wait"] = (lambda: None) if interpret else plgpu.griddepcontrol_wait
        elif early and not interpret:
            plgpu.griddepcontrol_launch_dependents()
        kernel(*refs, **shared)

    body.__name__ = name
    results = [jax.ShapeDtypeStruct(*result) for result in results]
    parameters = plgpu.CompilerParams(
        approx_math=True,
        reduction_scratch_bytes=reduction_bytes,
        lowering_semantics=LAYOUTS_AS_WRITTEN,
        unsafe_no_auto_barriers=not AUTOMATIC_BARRIERS,
    )
    call = plgpu.kernel(
        body,
        out_type=results,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=parameters,
        interpret=plgpu.InterpretGPUParams(detect_races=detect_races) if interpret else None,
        **options,
    )
    if updates:
        call = _updating(call, updates)
    return _interpreted(call, results, updates) if interpret else _without_64_bits(call)


def _check_threads(count):
    """Raises an error if the interpreter might wait forever.

    A warpgroup keeps a thread of JAX's CPU client while it waits. The client has a thread per core, or per device if they are more.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    there = max(cores, len(jax.local_devices(backend="cpu")))
    if there < count:
        raise RuntimeError(
            f"The interpreter of mosaic_gpu takes {count} threads of JAX's CPU client for this call, one per warpgroup. The client "
            f"has {there}, so it might wait forever. Call jax.config.update('jax_num_cpu_devices', 8) before JAX is used."
        )


def _updating(call, count):
    """`call`, whose last `count` operands are results too: XLA gives both the same memory."""

    def function(*operands):
        refs = [jax.new_ref(operand) for operand in operands[len(operands) - count :]]
        return [*call(*operands[: len(operands) - count], *refs), *map(jax.freeze, refs)]

    return function


def _without_64_bits(call):
    """`call`, in which numbers without a type have 32 bits, where more are enabled too."""

    def function(*operands):
        with jax.enable_x64(False):
            return call(*operands)

    return function


def _interpreted(call, results, updates):
    """`call` as a function that XLA calls back. The interpreter of kernels has ordered effects, and the lowering of a primitive
    does not take ordered effects."""
    call = _without_64_bits(jax.jit(call))

    def on_host(*operands):
        ignore_warning("invalid value encountered in matmul", RuntimeWarning)  # from keys that no token sees
        with _one_at_a_time, jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jax.block_until_ready(call(*operands))

    def function(*operands):
        updated = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands[len(operands) - updates :]]
        return jax.pure_callback(on_host, [*results, *updated], *operands)

    return function


_one_at_a_time = threading.Lock()  # all calls of the interpreter share one memory
