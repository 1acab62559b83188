"""The reference of weights, where keys are the rows of the products: a weight is 2 to the power of its logit minus the reference.

The reference of a query row is the largest logit at the time when a logit was last more than GROWTH above the reference. So most
tiles need no maximum over the warps, and shrink no sums. The method is that of FlashAttention-4. The reference of a query row does
not depend on other query rows.
"""

import jax.numpy as jnp
from jax import lax

from ._bits import any_above
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

    renews = any_above(logits - over_rows(reference, logits), GROWTH, program.interpreted) | anyway
    return lax.cond(renews, renew, lambda sums: (reference, sums), sums)
