"""The arithmetic of one chunk: C rows of the cache with D columns, for H kv heads with R query rows each.

A query row is one token and one query head of a kv head. Rows of the cache have the shape [H, C, D], heads first, so that each
product is a batch of plain matrix products. The transposition costs no extra pass: XLA's CPU compiler does it while it copies the
chunk out of the cache and widens it.
"""

import jax.numpy as jnp
from jax import lax


# Constants of `weighted`:
BLOCK_ROWS = 32  # rows per block
LEAST_PRODUCTS = 64  # products that XLA's CPU library takes as one piece of work: with fewer, blocks bring nothing


def product(problem, a, b, contract, batch=((0,), (0,))):
    """The product of `a` and `b`, in the accumulation dtype.

    The product sums over axis `contract[0]` of `a` and axis `contract[1]` of `b`, and is batched over the axes `batch` of both. Two
    operands of one narrow dtype stay narrow, because their products are exact. Operands of two dtypes are both widened.
    """
    if a.dtype != b.dtype:
        a, b = a.astype(problem.accum_dtype), b.astype(problem.accum_dtype)
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), batch),
        precision=problem.precision,
        preferred_element_type=problem.accum_dtype,
    )


def dots(problem, q, rows):
    """The products of q [H, R, D] with all rows [H, C, D]: [H, R, C]."""
    # The barrier keeps the long operand on the left. Without it, XLA folds the transposition into the product, by swapping the
    # operands, and transposes the rows once more for its CPU kernels. The forward operation then takes 1.2 times as long.
    return lax.optimization_barrier(product(problem, rows, q, (2, 2))).transpose(0, 2, 1)


def weighted(problem, target, weights, rows):
    """The sum of rows [H, C, D] with weights [H, R, C]: [H, R, D].

    On a CPU, each block of rows is summed first, and then the blocks' sums. XLA's CPU library spreads many small products over the
    cores, but it does not spread a few products with small results.
    """
    heads, num_rows, dim = rows.shape
    num_queries = weights.shape[1]
    if target.platform != "cpu" or not isinstance(num_rows, int) or not isinstance(num_queries, int):  # sizes may be symbolic
        return product(problem, weights, rows, (2, 1))
    block = max(BLOCK_ROWS, 8 * num_queries)  # keeps the number of block sums small against the number of rows
    blocks = num_rows // block if num_rows % block == 0 else 1
    if heads * blocks < LEAST_PRODUCTS:
        return product(problem, weights, rows, (2, 1))
    weights, rows = weights.reshape(heads, num_queries, blocks, block), rows.reshape(heads, blocks, block, dim)
    return jnp.sum(product(problem, weights, rows, (3, 2), ((0, 2), (0, 1))), axis=1)


def outer(problem, weights, q):
    """The sum of q [H, R, D] over query rows, with weights [H, R, C]: [H, C, D]."""
    return product(problem, weights, q, (1, 1))


def scaled(x, scale):
    """x [H, R, C] times the scale of each row of the cache, or x if there is no scale."""
    return x if scale is None else x * scale


def logits(problem, q, chunk):
    """The logits [H, R, C], scaled and capped, and the slope of the cap at each logit."""
    # The scale multiplies the products, in the accumulation dtype. A scaled q would be rounded once more.
    x = problem.softmax_scale * scaled(dots(problem, q, chunk.k), chunk.k_scale)
    cap, slope = problem.logits_soft_cap, 1
    if cap is not None:
        bent = jnp.tanh(x / cap)
        x, slope = cap * bent, 1 - bent * bent
    # The minimum changes no finite logit. It keeps XLA from fusing the factor above with a later subtraction of the largest logit.
    # The fused operation does not round the logit before the subtraction, and only some loops are fused. So equal keys would get
    # different weights.
    return jnp.minimum(x, float(jnp.finfo(problem.accum_dtype).max)), slope
