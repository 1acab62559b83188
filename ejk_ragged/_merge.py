"""`merge`: combines attention over disjoint ranges of keys into attention over all the keys."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._formats import accum_dtype, FLOATING_DTYPES
from ._messages import refuse_ref


Partial = tuple[Float[Array, "*sequences head_dim"], Float[Array, "*sequences"]]


def merge(partials: Iterable[Partial]) -> Partial:
    """The attention of one query over all keys, from partial results over disjoint ranges of the keys.

    A partial result is what `ragged_decode_attention(..., return_lse=True)` returns. For example, one partial result is of a shared
    prefix in one cache, and the other is of the rest of the sequence in another cache. Or each of several devices has a partial
    result.

    The order and the grouping of the partial results do not matter, up to rounding. A partial result of an empty range has an lse
    of -inf and no influence, whatever its out holds. `merge` is differentiable, including for empty ranges.

    Sinks must be counted once: pass `softmax_aux` to the call of one partial result only.

    Args:
        partials: one or more pairs (out, lse). out is [batch, num_q_heads, head_dim] and lse [batch, num_q_heads]. Other leading
            axes are accepted, too, if they are the same in all arrays.

    Returns:
        The pair (out, lse) over all keys, with the shapes and dtypes of one partial result. Sums are accumulated in float32, or in
        float64 for float64 outputs, and rounded once, at the end. If all ranges are empty, out is 0 and lse is -inf.

    Raises:
        ValueError: there are no partials, or shapes or dtypes do not fit.
        TypeError: a partial is not a pair of arrays.
    """
    outs, lses = _checked(list(partials))
    dtype, accum = outs[0].dtype, accum_dtype(outs[0].dtype)
    out, lse = merge_stacked(jnp.stack(outs).astype(accum), jnp.stack(lses).astype(accum))
    return out.astype(dtype), lse.astype(lses[0].dtype)


def merge_stacked(out, lse):
    """Merges N stacked partial results, out [N, ..., D] and lse [N, ...], in the accumulation dtype."""
    high = jax.lax.stop_gradient(jnp.max(lse, axis=0, keepdims=True))
    high = jnp.where(high == -jnp.inf, 0, high)  # -inf - -inf is NaN
    weight = jnp.exp(lse - high)
    total = jnp.sum(weight, axis=0)
    safe = jnp.where(total == 0, 1, total)
    counted = jnp.where((lse == -jnp.inf)[..., None], 0, out)
    out = jnp.sum(weight[..., None] * counted, axis=0) / safe[..., None]
    return out, jnp.where(total == 0, -jnp.inf, high[0] + jnp.log(safe))


def _checked(partials):
    if not partials:
        raise ValueError("partials must hold one (out, lse) pair at least, got none.")
    for i, partial in enumerate(partials):
        if not isinstance(partial, tuple | list) or len(partial) != 2 or not all(hasattr(x, "shape") for x in partial):
            raise TypeError(f"partials must be (out, lse) pairs of arrays, got {type(partial).__name__} for partials[{i}].")
        for name, x in zip(("out", "lse"), partial, strict=True):
            refuse_ref(f"partials[{i}] {name}", x)
    outs, lses = ([jnp.asarray(x) for x in arrays] for arrays in zip(*partials, strict=True))
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.ndim == 0 or out.shape[:-1] != lse.shape:
            raise ValueError(f"partials[{i}] must be out [..., head_dim] and lse [...], got shapes {out.shape} and {lse.shape}.")
        for name, x, first in (("out", out, outs[0]), ("lse", lse, lses[0])):
            if x.dtype.name not in FLOATING_DTYPES or x.dtype != first.dtype or x.shape != first.shape:
                raise ValueError(
                    f"partials must all have an {name} of one shape and one floating dtype, got {first.dtype.name} {first.shape} "
                    f"for partials[0] and {x.dtype.name} {x.shape} for partials[{i}]."
                )
    return outs, lses
