"""The reference of weights: a weight is 2 to the power of its logit minus the reference.

The reference of a query row is the largest logit at the time when a logit was last more than GROWTH above the reference. So most
tiles need no maximum over the threads that share a query row, and shrink no sums. The method is that of FlashAttention-4. The
reference of a query row does not depend on other query rows.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import llvm  # jax.extend.mlir does not have it

from ._bits import SCALAR
from ._jax import OF_ROWS, plgpu, TILE
from ._program import over_rows, Program


GROWTH = 6  # weights are up to 2 ** GROWTH, times the weight of the reference


def refer(program: Program, reference, logits, largest, shrink, sums, anyway=False):
    """The reference of each query row for a tile, and the sums so far relative to this reference, where keys are the rows of the
    products.

    All threads of the warpgroup wait for each other. So what they read of the tile before in shared memory may be overwritten.

    Args:
        reference: the reference before [query rows]. At the beginning of a piece, `LOWEST`.
        logits: [keys, query rows] of the tile, or the larger ones of several parts.
        largest: a function of a matrix: the largest number of each column, over all warps.
        shrink: a function of factors [query rows] and `sums`: the sums times the factors.
        sums: the sums so far, a tree.
        anyway: whether `shrink` has to be called in any case.
    """

    def renew(sums):
        most = largest(logits)
        new = jnp.where(most - reference > GROWTH, most, reference)
        return new, shrink(jnp.exp2(reference - new), sums)

    renews = _any_in_warpgroup(logits - over_rows(reference, logits), GROWTH, program.interpreted) | anyway
    return lax.cond(renews, renew, lambda sums: (reference, sums), sums)


def any_in_warp(x, limit, interpreted):
    """1 or 0: whether any number that a warp has of an array is above a limit. In the interpreter, a warp has all of them."""
    if interpreted:
        return jnp.where(jnp.max(x) > limit, 1, 0)
    layout = TILE if x.ndim == 2 else OF_ROWS

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def above(_, array):
        return _found(_largest_of_thread(array), limit, ANY_IN_WARP, [])

    return above(x)


def _any_in_warpgroup(x, limit, interpreted):
    """Whether any number of a matrix, laid out as `TILE`, is above a limit. All threads of the warpgroup wait for each other. JAX
    has no such operation, so it is written in Mosaic GPU's own."""
    if interpreted:
        return jnp.max(x) > limit

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def above(_, matrix):
        word = ir.IntegerType.get_signless(32)
        barrier = arith.addi(mgpu.warpgroup_idx(sync=False), arith.constant(word, 1))  # as `commit_smem` counts barriers
        return _found(_largest_of_thread(matrix), limit, ANY_IN_WARPGROUP, [barrier])

    return above(x) > 0


def _largest_of_thread(array):
    """The largest number that a thread has of an array, whose registers are numbers or vectors of numbers."""
    numbers = []
    for register in array.registers.flat:
        size = register.type.shape[0] if isinstance(register.type, ir.VectorType) else 0
        numbers += [vector.extract(register, [], [i]) for i in range(size)] if size else [register]
    return functools.reduce(arith.maxnumf, numbers)


def _found(largest, limit, assembly, operands):
    """1 or 0: what `assembly` finds, of the largest number of each thread, the limit, and other operands of 32 bits."""
    word, constraints = ir.IntegerType.get_signless(32), ",".join(["=r", "f", "f", *["r"] * len(operands)])
    operands = [largest, arith.constant(ir.F32Type.get(), float(limit)), *operands]
    found: Any = llvm.inline_asm(word, operands, assembly, constraints, has_side_effects=True)
    return mgpu.FragmentedArray.splat(found, (), is_signed=True)


ANY_IN_WARP = """{
.reg .pred mine, any;
setp.gt.f32 mine, $1, $2;
vote.sync.any.pred any, mine, 0xffffffff;
selp.b32 $0, 1, 0, any;
}"""
ANY_IN_WARPGROUP = """{
.reg .pred mine, any;
setp.gt.f32 mine, $1, $2;
barrier.cta.red.or.pred any, $3, 128, mine;
selp.b32 $0, 1, 0, any;
}"""
