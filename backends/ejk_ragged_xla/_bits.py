"""What XLA's CPU compiler does badly with dtypes as they are, done with their bits.

- Arrays that a loop writes into, in bfloat16. The compiler of JAX 0.10 widens the operands of an update in place, and so goes
  through the whole array for every chunk. The bits are written as integers there, for which it has a true update. It costs a copy
  of one of the arrays at the end.
- Floats of 8 bits, which it widens by arithmetic that takes longer than reading four times the bytes. But each is a float16
  with its bits in other places, and for those processors have an instruction.
"""

import jax
import jax.numpy as jnp
from jax import lax


NEEDED = jax.__version_info__ < (0, 11)


def to_bits(x):
    return lax.bitcast_convert_type(x, jnp.uint16) if NEEDED and x.dtype == jnp.bfloat16 else x


def from_bits(x, dtype):
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def widen(x, dtype):
    """x.astype(dtype) of something wider."""
    if x.dtype == jnp.float8_e5m2:  # the upper half of a float16
        bits = lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int16)
        return lax.bitcast_convert_type(bits << 8, jnp.float16).astype(dtype)
    if x.dtype == jnp.float8_e4m3fn:  # one bit less of exponent, so 256 times too small; and what has all bits set is NaN
        bits = lax.bitcast_convert_type(x, jnp.int8)
        half = lax.bitcast_convert_type((bits.astype(jnp.int16) << 7) & jnp.int16(-0x4001), jnp.float16)
        return jnp.where(bits | jnp.int8(-128) == -1, jnp.nan, half.astype(dtype) * 256)
    return x.astype(dtype)
