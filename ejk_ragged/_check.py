"""What callers may pass, checked while tracing: every error names the argument, what came and what is accepted.

A wrong value, shape or dtype is a ValueError, a wrong type a TypeError. Arrays may be anything with a shape and a dtype, and count
as what JAX will make of them: a NumPy array of float64 is one of float32 unless 64-bit types are enabled.
"""

import dataclasses
import functools
import math
import operator
import warnings
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from . import _hints
from ._problem import FLOATING_DTYPES, FwdParams, precision_of, QUANTISED_DTYPES, Settings
from ._registry import registry, Request


AnyArray = Array | np.ndarray  # what comes; what is returned is always JAX's
Window = tuple[int, int]
Scale = (
    float
    | Float[AnyArray, ""]
    | Float[AnyArray, " num_kv_heads"]
    | Float[AnyArray, "batch num_kv_heads"]
    | Float[AnyArray, "batch num_kv_heads seq_len"]
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arrays of a call as they came, checked; `window_left` is how many keys a window keeps before a token's own."""

    query: Any
    key: Any
    value: Any
    sequence_start: Any = None
    sequence_end: Any = None
    softmax_aux: Any = None
    query_lengths: Any = None
    key_scale: Any = None
    value_scale: Any = None
    window_left: Any = None


def check(*, softmax_scale, fwd_params, sliding_window, logits_soft_cap, backend, **arrays) -> tuple[Arguments, Request]:
    """The arguments of a call of `ragged_decode_attention`, all of them, in two halves: what is traced, and what is static."""
    types: dict[str, Any] = {
        name: _type(name, x) if x is not None or name in ("query", "key", "value") else None for name, x in arrays.items()
    }
    query, key = types["query"], types["key"]
    check_cache(query, key, types["value"])
    batch, _, num_kv_heads, head_dim = key.shape
    for name in ("sequence_start", "sequence_end", "query_lengths"):
        if types[name] is not None:
            check_lengths(name, types[name], batch)
    if types["query_lengths"] is not None and len(query.shape) == 3:
        raise ValueError(
            f"query_lengths must be None for a query of one token a sequence, [batch, num_q_heads, head_dim]; got query "
            f"{query.shape}. For several tokens it is [batch, num_tokens, num_q_heads, head_dim]."
        )
    if types["softmax_aux"] is not None:
        check_sinks(types["softmax_aux"], query.shape[-2], num_kv_heads)
    check_scales(key, types["key_scale"], types["value_scale"])

    fwd_params, left = check_fwd_params(fwd_params), check_window(sliding_window)
    several = arrays["query_lengths"] is not None or (len(query.shape) == 4 and query.shape[1] != 1)
    given = {
        "start": arrays["sequence_start"] is not None or left is not None,
        "end": arrays["sequence_end"] is not None or several,
        "sink": arrays["softmax_aux"] is not None,
    }
    settings = Settings(
        softmax_scale=head_dim**-0.5 if softmax_scale is None else check_scale(softmax_scale),
        logits_soft_cap=check_soft_cap(logits_soft_cap),
        fwd_params=fwd_params,
        precision=precision_of(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
        given=frozenset(name for name in given if given[name]),
        most_keys=None if left is None else 16 ** -(-left.bit_length() // 4),
    )
    tuned = _hints.current() if fwd_params == FwdParams() else None
    request = Request(settings, registry.resolve(backend), tuned)
    return Arguments(**arrays, window_left=None if left is None else _beside(arrays["query"], left)), request


def _beside(query, left: int) -> Any:
    """`left` as an operand of the jitted call, so that calls with other windows share a program. Where the query is there already,
    `left` is put beside it explicitly: users may forbid implicit transfers (`jax.transfer_guard`)."""
    wide = jax.dtypes.canonicalize_dtype(np.uint64).type
    number = wide(min(left, np.iinfo(wide).max))
    if not isinstance(query, jax.Array) or isinstance(query, jax.core.Tracer) or not query.is_fully_addressable:
        return number
    if isinstance(query.sharding, NamedSharding):
        return _placed(number, NamedSharding(query.sharding.mesh, PartitionSpec()))
    return _placed(number, query.sharding if query.committed and len(query.sharding.device_set) == 1 else None)


@functools.lru_cache(maxsize=64, typed=True)
def _placed(number, sharding):
    return jax.device_put(number, sharding)


def _type(name: str, x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, or of a number given as a scale."""
    array: Any = np.float32(x) if name.endswith("_scale") and type(x) in (int, float) else x
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(f"{name} must be an array, got {x!r} of type {type(x).__name__}.")
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True))


_CACHE = "batch, seq_len, num_kv_heads, head_dim"


def check_cache(query, key, value):
    """query [B, Hq, D] or [B, T, Hq, D] and key, value [B, S, Hkv, D] fit together."""
    if len(query.shape) not in (3, 4):
        raise ValueError(
            f"query must be [batch, num_q_heads, head_dim] or [batch, num_tokens, num_q_heads, head_dim], got shape {query.shape}."
        )
    for name, array in (("key", key), ("value", value)):
        if len(array.shape) != 4:
            raise ValueError(f"{name} must be [{_CACHE}], got shape {array.shape}.")
    for name, array, accepted in (
        ("query", query, FLOATING_DTYPES),
        ("key", key, FLOATING_DTYPES + QUANTISED_DTYPES),
        ("value", value, FLOATING_DTYPES + QUANTISED_DTYPES),
    ):
        if array.dtype.name not in accepted:
            raise ValueError(f"{name} must have one of the dtypes {', '.join(accepted)}; got {array.dtype.name}.")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have the same shape, got key {key.shape} and value {value.shape}.")
    if key.dtype != value.dtype or (key.dtype.name in FLOATING_DTYPES and query.dtype != key.dtype):
        dtypes = f"query {query.dtype.name}, key {key.dtype.name}, value {value.dtype.name}"
        raise ValueError(
            f"query, key and value must have the same dtype, got {dtypes}. Of a quantised cache, key and value have one of "
            f"{', '.join(QUANTISED_DTYPES)}, both the same."
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have the same batch, got query {query.shape} and key {key.shape}.")
    if query.shape[-1] != key.shape[3]:
        raise ValueError(f"query and key must have the same head_dim, got query {query.shape} and key {key.shape}.")
    for name, array in (("query", query), ("key", key)):
        if 0 in array.shape:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}.")
    if query.shape[-2] % key.shape[2]:
        raise ValueError(
            f"query must have a multiple of key's num_kv_heads, got {query.shape[-2]} query heads and {key.shape[2]} kv heads."
        )


def check_lengths(name, lengths, batch):
    """Lengths are one integer a sequence."""
    if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"{name} must be None or integers of shape ({batch},), got {lengths.dtype.name} of shape {lengths.shape}.")


def check_scales(key, key_scale, value_scale):
    """A quantised cache has scales, one of floats none."""
    batch, seq_len, num_kv_heads, _ = key.shape
    shapes = ((), (num_kv_heads,), (batch, num_kv_heads), (batch, num_kv_heads, seq_len))
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scale is None:
            if key.dtype.name == "int8":
                raise ValueError(
                    f"{name} must be given for an int8 cache, got None: without it the cache would be integers up to 127, which is "
                    "nearly always a mistake. Pass 1.0 if it is not."
                )
            continue
        if key.dtype.name not in QUANTISED_DTYPES:
            raise ValueError(f"{name} must be None for a cache of floats, got one beside key of dtype {key.dtype.name}.")
        if scale.shape not in shapes or scale.dtype.name not in FLOATING_DTYPES:
            raise ValueError(
                f"{name} must be a number, or floats of shape [num_kv_heads] {shapes[1]}, [batch, num_kv_heads] {shapes[2]} or "
                f"[batch, num_kv_heads, seq_len] {shapes[3]}; got {scale.dtype.name} of shape {scale.shape}."
            )


def check_sinks(aux, num_q_heads, num_kv_heads):
    """Sinks are shared by all heads, or given per query head or per kv head."""
    if aux.dtype.name not in FLOATING_DTYPES:
        raise ValueError(f"softmax_aux must have one of the dtypes {', '.join(FLOATING_DTYPES)}; got {aux.dtype.name}.")
    axes = len(aux.shape)
    if axes not in (1, 2) or 0 in aux.shape or (axes == 2 and aux.shape[0] not in (num_q_heads, num_kv_heads)):
        raise ValueError(
            f"softmax_aux must have shape (num_sinks,), ({num_q_heads}, num_sinks) for query heads or ({num_kv_heads}, num_sinks) "
            f"for kv heads; got {aux.shape}."
        )
    if aux.shape == (num_q_heads,) and num_q_heads > 1:
        warnings.warn(
            f"softmax_aux of shape ({num_q_heads},) means {num_q_heads} sinks shared by all heads. If it is one sink for each of "
            f"the {num_q_heads} query heads, pass softmax_aux[:, None].",
            UserWarning,
            stacklevel=4,  # the caller of the public function
        )


def check_scale(scale) -> float:
    number = _as_float("softmax_scale", scale)
    if not math.isfinite(number):
        raise ValueError(f"softmax_scale must be finite or None, got {scale!r}.")
    return number


def check_soft_cap(cap) -> float | None:
    if cap is None:
        return None
    number = _as_float("logits_soft_cap", cap)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"logits_soft_cap must be positive and finite, or None; got {cap!r}.")
    return number


def _as_float(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except TypeError:  # JAX's error for a traced value is one too
        raise TypeError(
            f"{name} must be a number known while tracing, or None; got {value!r} of type {type(value).__name__}."
        ) from None


def check_window(window) -> int | None:
    """Keys that the window keeps to the left of a token, None for all of them."""
    if window is None:
        return None
    try:
        if any(isinstance(side, bool) for side in window):
            raise TypeError
        left, _ = map(operator.index, window)
    except (TypeError, ValueError):
        raise ValueError(f"sliding_window must be two integers (left, right) or None, got {window!r}.") from None
    return None if left < 0 else left


def check_fwd_params(fwd_params) -> FwdParams:
    if fwd_params is None:
        return FwdParams()
    if not isinstance(fwd_params, FwdParams):
        raise TypeError(f"fwd_params must be an ejk_ragged.FwdParams or None, got {fwd_params!r}.")
    return fwd_params
