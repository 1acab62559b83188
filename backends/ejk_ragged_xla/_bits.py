"""What differs between versions of JAX: bfloat16 arrays that a loop writes into, on a CPU.

XLA's CPU compiler in JAX 0.10 widens the operands of an update in place, and so goes through the whole array for every chunk. The
bits are written as integers there, for which it has a true update. It costs a copy of one of the arrays at the end.
"""

import jax
import jax.numpy as jnp
from jax import lax


NEEDED = jax.__version_info__ < (0, 11)


def to_bits(x):
    return lax.bitcast_convert_type(x, jnp.uint16) if NEEDED and x.dtype == jnp.bfloat16 else x


def from_bits(x, dtype):
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
