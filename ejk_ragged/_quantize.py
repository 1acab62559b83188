"""`quantize`: rows of keys or values as 8-bit numbers and scales, as a quantised cache holds them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from ._formats import FLOATING_DTYPES, QUANTISED
from ._messages import refuse_ref


def quantize(x: Float[Array, "*rows head_dim"], dtype=jnp.int8) -> tuple[Shaped[Array, "*rows head_dim"], Float32[Array, "..."]]:
    """Rows of floats as `stored * scale`, up to half a step of `dtype`, each row with a scale from its largest absolute value.

    Args:
        x: [..., head_dim]: of a whole cache [batch, seq_len, num_kv_heads, head_dim], of one step's rows
            [batch, num_kv_heads, head_dim].
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        stored, shaped like `x`, in `dtype`; and scale, float32, symmetric (zero stays zero), of a whole cache
        [batch, num_kv_heads, seq_len], sequence last as `ragged_decode_attention` takes it, of anything else without the last axis.
        A row of zeros has zeros and a positive scale.

    Raises:
        ValueError: not floats, no axis, or another dtype.
    """
    refuse_ref("x", x)
    x, dtype = jnp.asarray(x), jnp.dtype(dtype)
    if dtype.name not in QUANTISED:
        raise ValueError(f"dtype must be one of {', '.join(QUANTISED)}; got {dtype.name}.")
    if x.dtype.name not in FLOATING_DTYPES or x.ndim == 0:
        raise ValueError(f"x must be rows [..., head_dim] of {', '.join(FLOATING_DTYPES)}; got {x.dtype.name} of shape {x.shape}.")
    x = x.astype(jnp.float32)
    kind = QUANTISED[dtype.name]
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.maximum(largest / kind.largest, jnp.finfo(jnp.float32).tiny)  # what is smaller would divide by zero
    steps = jnp.clip(x / scale, -kind.largest, kind.largest)  # the division may round upwards
    stored = (jnp.round(steps) if kind.whole else steps).astype(dtype)
    scale = scale[..., 0]
    return stored, scale.swapaxes(1, 2) if x.ndim == 4 else scale
