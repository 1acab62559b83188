"""Operations on the bits of floats, for dtypes that XLA's CPU compiler handles slowly.

- bfloat16 arrays into which a loop writes. The compiler of JAX 0.10 widens the operands of an update in place, and so goes through
  the whole array for every chunk. It updates integers truly in place, so the bits are written as integers. The conversion costs one
  copy of one of the arrays at the end.
- Floats of 8 bits. The compiler widens them by arithmetic, which takes longer than reading four times the bytes. Each of them is
  also a float16 whose bits are in other places, and processors have an instruction to widen float16.
"""

import jax
import jax.numpy as jnp
from jax import lax


NEEDED = jax.__version_info__ < (0, 11)


def to_bits(x):
    """An array of bfloat16 as its bits, where the compiler needs that. Any other array unchanged."""
    return lax.bitcast_convert_type(x, jnp.uint16) if NEEDED and x.dtype == jnp.bfloat16 else x


def from_bits(x, dtype):
    """The inverse of `to_bits` for an array of `dtype`."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def widen(x, dtype):
    """`x.astype(dtype)`, for a dtype that is wider than x's or the same."""
    if x.dtype == jnp.float8_e5m2:  # its bits are the upper half of a float16's
        bits = lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int16)
        return lax.bitcast_convert_type(bits << 8, jnp.float16).astype(dtype)
    # The exponent has one bit less than a float16's, so the float16 is 256 times too small. All bits but the sign set is NaN.
    if x.dtype == jnp.float8_e4m3fn:
        bits = lax.bitcast_convert_type(x, jnp.int8)
        half = lax.bitcast_convert_type((bits.astype(jnp.int16) << 7) & jnp.int16(-0x4001), jnp.float16)
        return jnp.where(bits | jnp.int8(-128) == -1, jnp.nan, half.astype(dtype) * 256)
    return x.astype(dtype)
