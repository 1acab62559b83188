"""What callers may pass, checked while tracing: every error names the argument, what came and what is accepted.

A wrong value, shape or dtype is a ValueError, a wrong type a TypeError.
"""

import math
import operator
import warnings
from typing import Any

import jax
import numpy as np

from . import _hints
from ._problem import FwdParams, Problem, Settings
from ._registry import registry


Window = tuple[int, int]

FLOATING_DTYPES = ("float16", "bfloat16", "float32", "float64")


def check(query, key, value, start, end, scale, fwd_params, window, cap, aux, backend) -> tuple[Settings, int | None]:
    """The settings of a call of `ragged_decode_attention`, and how many keys its window keeps to the left (None: all).

    Arrays may be anything with a shape and a dtype.
    """
    check_cache(query, key, value)
    batch, _, num_kv_heads, head_dim = key.shape
    for name, lengths in (("sequence_start", start), ("sequence_end", end)):
        if lengths is not None:
            check_lengths(name, lengths, batch)
    if aux is not None:
        check_sinks(aux, query.shape[1], num_kv_heads)
    fwd_params, left = check_fwd_params(fwd_params), check_window(window)
    present = {"start": start is not None or left is not None, "end": end is not None, "sink": aux is not None}
    settings = Settings(
        softmax_scale=head_dim**-0.5 if scale is None else check_scale(scale),
        logits_soft_cap=check_soft_cap(cap),
        fwd_params=fwd_params,
        matmul_precision=jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
        backend=registry.resolve(backend),
        given=frozenset(name for name in present if present[name]),
        tuned=_hints.current() if fwd_params == FwdParams() else None,
    )
    registry.check_named(settings.backend, Problem.of(query, key, settings))
    return settings, left


def check_cache(query, key, value):
    """query [B, Hq, D] and key, value [B, S, Hkv, D] fit together."""
    for name, array, axes in (
        ("query", query, "batch, num_q_heads, head_dim"),
        ("key", key, _CACHE),
        ("value", value, _CACHE),
    ):
        _check_array(name, array)
        if array.ndim != len(axes.split(",")):
            raise ValueError(f"{name} must be [{axes}], got shape {array.shape}.")
        if array.dtype.name not in FLOATING_DTYPES:
            raise ValueError(f"{name} must have one of the dtypes {', '.join(FLOATING_DTYPES)}; got {array.dtype.name}.")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have the same shape, got key {key.shape} and value {value.shape}.")
    if not query.dtype == key.dtype == value.dtype:
        dtypes = f"query {query.dtype.name}, key {key.dtype.name}, value {value.dtype.name}"
        raise ValueError(f"query, key and value must have the same dtype, got {dtypes}.")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have the same batch, got query {query.shape} and key {key.shape}.")
    if query.shape[2] != key.shape[3]:
        raise ValueError(f"query and key must have the same head_dim, got query {query.shape} and key {key.shape}.")
    for name, array in (("query", query), ("key", key)):
        if 0 in array.shape:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}.")
    if query.shape[1] % key.shape[2]:
        raise ValueError(
            f"query must have a multiple of key's num_kv_heads, got {query.shape[1]} query heads and {key.shape[2]} kv heads."
        )


_CACHE = "batch, seq_len, num_kv_heads, head_dim"


def _check_array(name, array):
    if not (hasattr(array, "shape") and hasattr(array, "dtype") and hasattr(array, "ndim")):
        raise TypeError(f"{name} must be an array, got {array!r} of type {type(array).__name__}.")


def check_lengths(name, lengths, batch):
    """Lengths are one integer a sequence."""
    _check_array(name, lengths)
    if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"{name} must be None or integers of shape ({batch},), got {lengths.dtype.name} of shape {lengths.shape}.")


def check_sinks(aux, num_q_heads, num_kv_heads):
    """Sinks are shared by all heads, or given per query head or per kv head."""
    _check_array("softmax_aux", aux)
    if aux.dtype.name not in FLOATING_DTYPES:
        raise ValueError(f"softmax_aux must have one of the dtypes {', '.join(FLOATING_DTYPES)}; got {aux.dtype.name}.")
    if aux.ndim not in (1, 2) or 0 in aux.shape or (aux.ndim == 2 and aux.shape[0] not in (num_q_heads, num_kv_heads)):
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
    """Keys that the window keeps to the left of the query, None for all of them."""
    if window is None:
        return None
    try:
        if any(isinstance(side, bool) for side in window):
            raise TypeError
        left, _ = map(operator.index, window)
    except (TypeError, ValueError):
        raise ValueError(f"sliding_window must be two integers (left, right) or None, got {window!r}.") from None
    return None if left < 0 else min(left, np.iinfo(np.int32).max)


def check_fwd_params(fwd_params) -> FwdParams:
    if fwd_params is None:
        return FwdParams()
    if not isinstance(fwd_params, FwdParams):
        raise TypeError(f"fwd_params must be an ejk_ragged.FwdParams or None, got {fwd_params!r}.")
    return fwd_params
