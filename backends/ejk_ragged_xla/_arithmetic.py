"""The arithmetic of one chunk of one sequence: C rows of D numbers, for H kv heads with R rows of queries each.

Rows come as [H, C, D], heads first, so that every product is a batch of plain matrix products. XLA's CPU compiler makes the
transposed copy in the same pass that takes the chunk out of the cache and widens it, which it needs anyway.
"""

import jax.numpy as jnp
from jax import lax


# Of `weighted`: rows of a block, and how many products XLA's CPU library takes as one piece of work.
BLOCK_ROWS = 32
LEAST_PRODUCTS = 64


def product(problem, a, b, contract, batch=((0,), (0,))):
    """Summed over axis `contract[0]` of `a` and `contract[1]` of `b`, batched over the axes `batch` of both, accumulation dtype.

    Two narrow operands stay narrow, for their products are exact; beside a wide one a narrow one is widened.
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
    """q [H, R, D] with every one of rows [H, C, D]: [H, R, C]."""
    # The barrier keeps the long operand on the left. XLA would fold the transposition into the product by swapping the two, and
    # then transpose the rows once more to please its CPU kernels: 1.2 times the time of the whole forward operation.
    return lax.optimization_barrier(product(problem, rows, q, (2, 2))).transpose(0, 2, 1)


def weighted(problem, target, weights, rows):
    """Rows [H, C, D] summed with weights [H, R, C]: [H, R, D].

    On a CPU block by block first: a library shares many small products out between cores, but not a few of small results.
    """
    heads, num_rows, dim = rows.shape
    num_queries = weights.shape[1]
    if target.platform != "cpu" or not isinstance(num_rows, int) or not isinstance(num_queries, int):  # sizes may be symbolic
        return product(problem, weights, rows, (2, 1))
    block = max(BLOCK_ROWS, 8 * num_queries)  # so that the blocks' sums are few beside the rows
    blocks = num_rows // block if num_rows % block == 0 else 1
    if heads * blocks < LEAST_PRODUCTS:
        return product(problem, weights, rows, (2, 1))
    weights, rows = weights.reshape(heads, num_queries, blocks, block), rows.reshape(heads, blocks, block, dim)
    return jnp.sum(product(problem, weights, rows, (3, 2), ((0, 2), (0, 1))), axis=1)


def outer(problem, weights, q):
    """q [H, R, D] summed over its rows with weights [H, R, C]: [H, C, D]."""
    return product(problem, weights, q, (1, 1))


def scaled(x, scale):
    """x [H, R, C] times the scale of each row of the cache, if there is one."""
    return x if scale is None else x * scale


def logits(problem, q, chunk):
    """Logits [H, R, C], scaled and capped, and the slope of the cap there."""
    # Scaled here, in the accumulation dtype: a scaled q would be rounded once more.
    x = problem.softmax_scale * scaled(dots(problem, q, chunk.k), chunk.k_scale)
    cap, slope = problem.logits_soft_cap, 1
    if cap is not None:
        bent = jnp.tanh(x / cap)
        x, slope = cap * bent, 1 - bent * bent
    # No finite logit is changed. But XLA's compilers cannot look through it: they would fuse the factor above and the subtraction
    # of the largest logit, which then differs from that by a rounding, and not so in each loop. Alike keys would weigh differently.
    return jnp.minimum(x, float(jnp.finfo(problem.accum_dtype).max)), slope
