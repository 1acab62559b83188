"""The reference of weights, where keys are the rows of the products: a weight is 2 to the power of its logit minus the reference.

The reference of a query row is the largest logit at the time when a logit was last more than GROWTH above the reference. So most
tiles need no maximum over the warps, and shrink no sums. The method is that of FlashAttention-4. The reference of a query row does
not depend on other query rows.
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
from ._jax import plgpu, TILE
from ._program import over_rows, Program


GROWTH = 6  # weights are up to 2 ** GROWTH, times the weight of the reference


def refer(program: Program, reference, logits, largest, shrink, sums, anyway=False):
    """The reference of each query row for a tile, and the sums so far relative to this reference.

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

    renews = _any_above(logits - over_rows(reference, logits), GROWTH, program.interpreted) | anyway
    return lax.cond(renews, renew, lambda sums: (reference, sums), sums)


def _any_above(x, limit, interpreted):
    """Whether any number of a matrix, laid out as `TILE`, is above a limit. All threads of the warpgroup wait for each other. JAX
    has no such operation, so it is written in Mosaic GPU's own."""
    if interpreted:
        return jnp.max(x) > limit

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def above(_, matrix):
        word = ir.IntegerType.get_signless(32)
        numbers = [vector.extract(pair, [], [i]) for pair in matrix.registers.flat for i in range(2)]
        largest = functools.reduce(arith.maxnumf, numbers)
        barrier = arith.addi(mgpu.warpgroup_idx(sync=False), arith.constant(word, 1))  # as `commit_smem` counts barriers
        limit_of_all = arith.constant(ir.F32Type.get(), float(limit))
        found: Any = llvm.inline_asm(word, [largest, limit_of_all, barrier], ANY_ABOVE, "=r,f,f,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return above(x) > 0


ANY_ABOVE = """{
.reg .pred mine, any;
setp.gt.f32 mine, $1, $2;
barrier.cta.red.or.pred any, $3, 128, mine;
selp.b32 $0, 1, 0, any;
}"""
