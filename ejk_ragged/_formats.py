"""The formats of numbers: which floats a query may have, and the table of what a quantised cache may hold.

The quantiser, the checks, the oracle's cases, the tuner and the backends read the table. A new format is a new line.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


FLOATING_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Format:
    """What a quantised cache may hold.

    Attributes:
        largest: the largest number that the quantiser stores.
        whole: whether the stored numbers are integers, to which the quantiser rounds.
        needs_scales: whether a cache without scales is an error.
    """

    largest: float
    whole: bool = False
    needs_scales: bool = False


QUANTISED = {
    "int8": Format(127.0, whole=True, needs_scales=True),
    "float8_e4m3fn": Format(448.0),
    "float8_e5m2": Format(57344.0),
}


def is_quantised(dtype) -> bool:
    """Whether a cache of `dtype` is a quantised one."""
    return np.dtype(dtype).name in QUANTISED


def accum_dtype(dtype) -> np.dtype:
    """The dtype in which sums over values of `dtype` are held: float32, or float64 for float64."""
    return np.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
