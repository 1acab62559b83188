"""The dtypes that a query may have, and the table of the dtypes of quantised caches.

The quantiser, the checks, the oracle's cases, the tuner and the backends read the table. A new dtype is a new line of the table.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


FLOATING_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Format:
    """The facts about one dtype of a quantised cache.

    Attributes:
        largest: the largest number that the quantiser stores.
        whole: whether the stored numbers are integers. The quantiser then rounds.
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


CACHE_DTYPES = (*FLOATING_DTYPES, *QUANTISED)


def is_quantised(dtype) -> bool:
    """Whether a cache of `dtype` is quantised."""
    return np.dtype(dtype).name in QUANTISED


def accum_dtype(dtype) -> np.dtype:
    """The dtype of sums over values of `dtype`: float64 for float64, and float32 otherwise."""
    return np.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
