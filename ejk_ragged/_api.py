"""`ragged_decode_attention`: what callers write is checked, reduced to the canonical operation, and the answer shaped."""

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from . import _op
from ._check import check, Window
from ._problem import accum_dtype, FwdParams, Settings
from ._registry import Backend


@overload
def ragged_decode_attention(
    query: Float[Array, "batch num_q_heads head_dim"],
    key: Float[Array, "batch seq_len num_kv_heads head_dim"],
    value: Float[Array, "batch seq_len num_kv_heads head_dim"],
    sequence_start: Int[Array, " batch"] | None = None,
    sequence_end: Int[Array, " batch"] | None = None,
    softmax_scale: float | None = None,
    fwd_params: FwdParams | None = None,
    sliding_window: Window | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: Float[Array, " num_sinks"] | Float[Array, "heads num_sinks"] | None = None,
    *,
    backend: str | Backend | None = None,
    return_lse: Literal[False] = False,
) -> Float[Array, "batch num_q_heads head_dim"]: ...
@overload
def ragged_decode_attention(
    query: Float[Array, "batch num_q_heads head_dim"],
    key: Float[Array, "batch seq_len num_kv_heads head_dim"],
    value: Float[Array, "batch seq_len num_kv_heads head_dim"],
    sequence_start: Int[Array, " batch"] | None = None,
    sequence_end: Int[Array, " batch"] | None = None,
    softmax_scale: float | None = None,
    fwd_params: FwdParams | None = None,
    sliding_window: Window | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: Float[Array, " num_sinks"] | Float[Array, "heads num_sinks"] | None = None,
    *,
    backend: str | Backend | None = None,
    return_lse: Literal[True],
) -> tuple[Float[Array, "batch num_q_heads head_dim"], Float32[Array, "batch num_q_heads"]]: ...
@overload
def ragged_decode_attention(
    query: Float[Array, "batch num_q_heads head_dim"],
    key: Float[Array, "batch seq_len num_kv_heads head_dim"],
    value: Float[Array, "batch seq_len num_kv_heads head_dim"],
    sequence_start: Int[Array, " batch"] | None = None,
    sequence_end: Int[Array, " batch"] | None = None,
    softmax_scale: float | None = None,
    fwd_params: FwdParams | None = None,
    sliding_window: Window | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: Float[Array, " num_sinks"] | Float[Array, "heads num_sinks"] | None = None,
    *,
    backend: str | Backend | None = None,
    return_lse: bool,
) -> (
    Float[Array, "batch num_q_heads head_dim"]
    | tuple[Float[Array, "batch num_q_heads head_dim"], Float32[Array, "batch num_q_heads"]]
): ...
def ragged_decode_attention(
    query,
    key,
    value,
    sequence_start=None,
    sequence_end=None,
    softmax_scale=None,
    fwd_params=None,
    sliding_window=None,
    logits_soft_cap=None,
    softmax_aux=None,
    *,
    backend=None,
    return_lse=False,
):
    """Attention of one query token per sequence over a padded KV cache of which each sequence uses a range of its own.

    Query head h reads kv head h // (Hq / Hkv). Key j of a sequence is valid when start <= j < end, both clipped to [0, S], and when
    the window keeps it. Logits are `scale * q . k`, then capped, then masked. With sinks s_n,
    `out = sum_j exp(x_j) v_j / (sum_j exp(x_j) + sum_n exp(s_n))`, accumulated in float32 (float64 for float64 inputs). An empty
    range gives 0. What the cache holds outside the valid range changes nothing. Differentiable in query, key, value and sinks.

    The first ten arguments are those of ejkernel's `ragged_decode_attention`, with a meaning that every backend keeps.

    Args:
        query: [batch, num_q_heads, head_dim], one token per sequence; float16, bfloat16, float32 or float64.
        key: [batch, seq_len, num_kv_heads, head_dim], the cache, in the query's dtype; num_q_heads is a multiple of num_kv_heads.
        value: like `key`.
        sequence_start: integers [batch], the first valid row; None is 0.
        sequence_end: integers [batch], one past the last valid row; None is seq_len.
        softmax_scale: factor on the logits; None is head_dim ** -0.5.
        fwd_params: tuning hints; None leaves them to the backend. With `num_key_splits` given, a sequence's result does not depend
            on the rest of the batch, bit by bit.
        sliding_window: (left, right) around the query, which stands at end - 1; a negative side is unlimited. `left` keeps
            left + 1 keys; `right` bounds nothing that `sequence_end` does not.
        logits_soft_cap: cap > 0: logits become cap * tanh(logits / cap).
        softmax_aux: sinks, extra logits in the softmax's denominator, neither scaled nor capped: [num_sinks] for all heads,
            [num_q_heads, num_sinks], or [num_kv_heads, num_sinks].
        backend: None or "auto" to choose by platform and problem, a name that `backends()` lists, or a `Backend`.
        return_lse: also return the log of the softmax's denominator.

    Returns:
        [batch, num_q_heads, head_dim] in the query's dtype; with `return_lse`, also float32 [batch, num_q_heads], natural log,
        sinks included, -inf for an empty range without sinks.

    Raises:
        ValueError: shapes, dtypes or values that do not fit, an unknown backend, or a named one that cannot do the call.
        TypeError: an argument of the wrong type.
    """
    query, key, value, sequence_start, sequence_end, softmax_aux = (
        jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in (query, key, value, sequence_start, sequence_end, softmax_aux)
    )
    settings, left = check(
        query,
        key,
        value,
        sequence_start,
        sequence_end,
        softmax_scale,
        fwd_params,
        sliding_window,
        logits_soft_cap,
        softmax_aux,
        backend,
    )
    out, lse = _canonical(query, key, value, sequence_start, sequence_end, softmax_aux, settings, left)
    return (out, lse) if return_lse else out


@functools.partial(jax.jit, static_argnums=(6, 7))
def _canonical(query, key, value, sequence_start, sequence_end, softmax_aux, settings: Settings, left: int | None):
    """The checked call as the canonical operation. Jitted, so that an eager call is one dispatch."""
    batch, seq_len = key.shape[:2]
    num_q_heads = query.shape[1]
    start = jnp.zeros(batch, jnp.int32) if sequence_start is None else _int32(sequence_start, seq_len)
    end = jnp.full(batch, seq_len, jnp.int32) if sequence_end is None else _int32(sequence_end, seq_len)
    if left is not None:
        start = jnp.maximum(start, jnp.clip(end, 0, seq_len) - 1 - left)
    accum = accum_dtype(query.dtype)
    if softmax_aux is None:
        sink = jnp.full(num_q_heads, -jnp.inf, accum)
    else:
        aux = jnp.atleast_2d(softmax_aux.astype(accum))
        sink = jax.nn.logsumexp(aux, axis=-1)
        sink = jnp.repeat(sink, num_q_heads // sink.shape[0])
    sink = jnp.broadcast_to(sink, (batch, num_q_heads))
    out, lse = _op.decode(settings, query, key, value, start, end, sink)  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse.astype(jnp.float32)


def _int32(lengths, seq_len):
    """Lengths that clip to the same as these; `_op` leaves clipping to those backends that have it for nothing."""
    if not np.can_cast(lengths.dtype, np.int32):
        lengths = jnp.clip(lengths, 0, seq_len)
    return lengths.astype(jnp.int32)
