"""`merge`: attention over disjoint ranges of keys, computed apart, becomes attention over all of them."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._formats import accum_dtype, FLOATING_DTYPES
from ._messages import refuse_ref


Partial = tuple[Float[Array, "*sequences head_dim"], Float[Array, "*sequences"]]


def merge(partials: Iterable[Partial]) -> Partial:
    """The attention of one query over several disjoint ranges of keys, from the attention over each of them.

    Partials are what `ragged_decode_attention(..., return_lse=True)` returns: of a shared prefix in one cache and the rest in
    another, say, or of the pieces that several devices hold. In any order and any grouping they give the same, up to rounding.
    A partial whose lse is -inf, an empty range's, counts for nothing, whatever its output holds. Differentiable, also there.

    Sinks are counted once: pass `softmax_aux` to the call of one partial only.

    Args:
        partials: (out, lse) pairs, one at least: out [batch, num_q_heads, head_dim], lse [batch, num_q_heads]. Any other leading
            axes will do, as long as they are alike.

    Returns:
        (out, lse) of all keys together, shaped and typed like one partial. Sums are float32, or float64 for float64 outputs, and
        rounded once, at the end. Where all ranges are empty, out is 0 and lse -inf.

    Raises:
        ValueError: no partials, or shapes or dtypes that do not fit.
        TypeError: something that is not pairs of arrays.
    """
    outs, lses = _checked(list(partials))
    dtype, accum = outs[0].dtype, accum_dtype(outs[0].dtype)
    out, lse = merge_stacked(jnp.stack(outs).astype(accum), jnp.stack(lses).astype(accum))
    return out.astype(dtype), lse.astype(lses[0].dtype)


def merge_stacked(out, lse):
    """Partials [N, ..., D] and [N, ...], merged along N; in the accumulation dtype."""
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
