"""The meaning of a call: the rules that turn the arguments into the operands of the canonical operation.

The docstring of `ragged_decode_attention` states the rules. Lengths may have any integer type and any value of the type. Each
function that converts lengths to int32 says what happens to values beyond int32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from . import _hints
from ._check import Arguments, check_arrays, check_fwd_params, check_number, check_window
from ._formats import accum_dtype
from ._problem import Cache, FwdParams, precision_of, Queries, Settings
from ._registry import registry
from ._selection import Request


LARGEST = np.iinfo(np.int32).max


def checked(
    *, value_columns, softmax_scale, fwd_params, sliding_window, logits_soft_cap, backend, **arrays
) -> tuple[Arguments, Request]:
    """Checks all arguments of `ragged_decode_attention`. Returns the traced arguments and the static request."""
    columns = check_arrays(arrays, value_columns, softmax_scale)
    hints, left = check_fwd_params(fwd_params), check_window(sliding_window)
    query = arrays["query"]
    accum = jax.dtypes.canonicalize_dtype(accum_dtype(query.dtype))
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else check_number("softmax_scale", softmax_scale, dtype=accum)
    settings = Settings(
        softmax_scale=scale,
        logits_soft_cap=None if logits_soft_cap is None else _cap(logits_soft_cap, accum),
        value_columns=columns,
        precision=precision_of(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
        fwd_params=hints,
        most_keys=None if left is None else 16 ** -(-left.bit_length() // 4),
    )
    tuned = _hints.current() if hints == FwdParams() else None
    request = Request(settings, registry.resolve(backend), tuned)
    return Arguments(**arrays, window_left=None if left is None else _beside(query, left)), request


def _cap(given, accum) -> float | None:
    """A soft cap by which logits in the accumulation dtype can be divided.

    The quotient of a logit and the cap must be a normal number, unless the logit is next to 0. So a cap above `eps / tiny` becomes
    None. In float32, `eps / tiny` is 1e31, and such a cap changes logits of up to 1e27 by less than their rounding errors. A cap
    below `tiny / eps` becomes `tiny / eps`: all logits are next to 0 either way.
    """
    cap, limits = check_number("logits_soft_cap", given, positive=True), jnp.finfo(accum)
    least = float(limits.tiny) / float(limits.eps)
    return None if cap * least > 1 else max(cap, least)


def _beside(query, left: int) -> Any:
    """`left` as an operand of the jitted call. Calls that differ only in the window then share a program.

    If the query is on a device already, `left` is put on the device explicitly, because users may forbid implicit transfers
    (`jax.transfer_guard`).
    """
    wide = jax.dtypes.canonicalize_dtype(np.uint64).type
    number = wide(min(left, np.iinfo(wide).max))
    if not isinstance(query, jax.Array) or isinstance(query, Tracer) or not query.is_fully_addressable:
        return number
    if isinstance(query.sharding, NamedSharding):
        return _placed(number, NamedSharding(query.sharding.mesh, PartitionSpec()))
    return _placed(number, query.sharding if query.committed and len(query.sharding.device_set) == 1 else None)


@functools.lru_cache(maxsize=64, typed=True)
def _placed(number, sharding):
    with jax.ensure_compile_time_eval():  # a function that is traced may close over its query, and a tracer must not be kept
        return jax.device_put(number, sharding)


def canonical(arguments: Arguments) -> tuple[Queries, Cache]:
    """The operands of the canonical operation. What the caller did not pass is None."""
    a = jax.tree.map(jnp.asarray, arguments)
    query = a.query[:, None] if a.query.ndim == 3 else a.query
    accum = accum_dtype(query.dtype)
    value_scale = a.key_scale if a.value is None and a.value_scale is None else a.value_scale
    page_table = None if a.page_table is None else _int32(a.page_table)
    queries = Queries(query, *_bounds(a, query.shape[1]), _sink(a.softmax_aux, query.shape[2], accum))
    return queries, Cache(a.key, a.value, _scale(a.key_scale, accum), _scale(value_scale, accum), page_table)


def _bounds(a: Arguments, num_tokens):
    """The first row and the end of the range that each token sees: [B, T], or [B, 1] if all tokens of a sequence see the same rows.

    None where no argument sets a bound. Bounds may lie outside the cache, because positions come from `sequence_end` as given.
    """
    batch = a.query.shape[0]
    seq_len = a.key.shape[1] * (1 if a.page_table is None else a.page_table.shape[1])
    several = a.query_lengths is not None or num_tokens != 1
    start = None if a.sequence_start is None else _int32(a.sequence_start)[:, None]
    given_end = jnp.full(batch, seq_len, jnp.int32) if a.sequence_end is None else a.sequence_end
    end = _int32(given_end)[:, None]
    if several:
        lengths = jnp.full(batch, num_tokens, jnp.int32) if a.query_lengths is None else _int32(a.query_lengths)
        lengths, token = jnp.clip(lengths, 0, num_tokens)[:, None], jnp.arange(num_tokens, dtype=jnp.int32)[None]
        # One past the position of each token. An end below 0 counts as 0: no token sees a row then.
        end = jnp.where(token < lengths, jnp.maximum(end, 0) - (lengths - 1 - token), 0)
    if a.window_left is not None:
        first = jnp.maximum(end, 0) - 1 - _left(a.window_left, given_end)[:, None]
        start = first if start is None else jnp.maximum(start, first)
    return start, end if several or a.sequence_end is not None else None


def _int32(lengths):
    """Integers of any type as int32. A value beyond int32 becomes the smallest or largest int32: no cache has such rows."""
    if not np.can_cast(lengths.dtype, np.int32):
        lengths = jnp.clip(lengths, max(np.iinfo(lengths.dtype).min, -LARGEST - 1), LARGEST)
    return lengths.astype(jnp.int32)


def _left(window_left, end):
    """The number of rows that a window keeps before a token's position, int32 [B] or [1].

    Positions come from `_int32(end)`. If `_int32` makes an end smaller, the number of rows shrinks by the same amount, so that the
    window still begins at the same row.
    """
    if np.can_cast(end.dtype, np.int32):
        return jnp.minimum(window_left, LARGEST).astype(jnp.int32)[None]
    beyond = (jnp.maximum(end, LARGEST) - LARGEST).astype(window_left.dtype)
    return jnp.minimum(window_left - jnp.minimum(beyond, window_left), LARGEST).astype(jnp.int32)


def _sink(aux, num_q_heads, accum):
    """All sinks of a query head merged into one logit, [1, 1, Hq]. None if there are no sinks."""
    if aux is None:
        return None
    aux = jnp.atleast_2d(aux.astype(accum))
    sink = aux[:, 0]
    if aux.shape[1] != 1:
        some = jnp.any(aux > -jnp.inf, axis=-1, keepdims=True)  # if all are -inf, the gradient of logsumexp is NaN
        sink = jnp.where(some[:, 0], jax.nn.logsumexp(jnp.where(some, aux, 0), axis=-1), -jnp.inf)
    return jnp.repeat(sink, num_q_heads // sink.shape[0])[None, None]


def _scale(scale, accum):
    """A scale with three axes: [B, Hkv, S], or [N, Hkv, page_size] of a pool.

    An axis that the caller's scale does not have gets size 1. It is not broadcast, because that would be one more kernel on a GPU.
    """
    if scale is None:
        return None
    axes = {0: (None, None, None), 1: (None, ..., None), 2: (..., None), 3: ()}[scale.ndim]
    return scale.astype(accum)[axes]
