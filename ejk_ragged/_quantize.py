"""`quantize`: turns rows of keys or values into 8-bit numbers and scales, for a quantised cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from ._formats import FLOATING_DTYPES, QUANTISED
from ._messages import refuse_ref


def quantize(x: Float[Array, "*rows head_dim"], dtype=jnp.int8) -> tuple[Shaped[Array, "*rows head_dim"], Float32[Array, "..."]]:
    """Quantises rows of floats: `stored * scale` is `x`, up to half a step of `dtype`.

    Each row has one scale, from the largest absolute value of the row. The scale is symmetric: zero stays zero.

    Args:
        x: [..., head_dim]. A whole cache is [batch, seq_len, num_kv_heads, head_dim]. The rows of one step are
            [batch, num_kv_heads, head_dim].
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        A pair (stored, scale). stored has the shape of `x`, and the dtype `dtype`. scale is float32. For `x` of four axes, scale is
        [batch, num_kv_heads, seq_len], as `ragged_decode_attention` takes it. For any other `x`, scale has the shape of `x` without
        the last axis. A row of zeros gives zeros and a positive scale.

    Raises:
        ValueError: `x` is not floats, or has no axis or no column, or `dtype` is another dtype.
    """
    refuse_ref("x", x)
    x, dtype = jnp.asarray(x), jnp.dtype(dtype)
    if dtype.name not in QUANTISED:
        raise ValueError(f"dtype must be one of {', '.join(QUANTISED)}; got {dtype.name}.")
    if x.dtype.name not in FLOATING_DTYPES or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be rows [..., head_dim] of {', '.join(FLOATING_DTYPES)}; got {x.dtype.name} of shape {x.shape}.")
    x = x.astype(jnp.float32)
    kind = QUANTISED[dtype.name]
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.maximum(largest / kind.largest, jnp.finfo(jnp.float32).tiny)  # no division by zero
    steps = jnp.clip(x / scale, -kind.largest, kind.largest)  # the division may round upwards
    stored = (jnp.round(steps) if kind.whole else steps).astype(dtype)
    scale = scale[..., 0]
    return stored, scale.swapaxes(1, 2) if x.ndim == 4 else scale
