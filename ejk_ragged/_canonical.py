"""What a call means: every rule that turns what a caller wrote into the operands of the canonical operation.

The rules are in the order in which the docstring of `ragged_decode_attention` states them. Lengths may have any integer type, and
values at the ends of that type: each is brought to int32 by a function that says what becomes of values beyond.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from . import _hints
from ._check import Arguments, check_arrays, check_fwd_params, check_scale, check_soft_cap, check_window
from ._formats import accum_dtype
from ._problem import Cache, FwdParams, precision_of, Queries, Settings
from ._registry import registry, Request


LARGEST = np.iinfo(np.int32).max


def checked(
    *, value_columns, softmax_scale, fwd_params, sliding_window, logits_soft_cap, backend, **arrays
) -> tuple[Arguments, Request]:
    """The arguments of a call of `ragged_decode_attention`, all of them, checked, in two halves: what is traced, what is static."""
    columns = check_arrays(arrays, value_columns, softmax_scale)
    hints, left = check_fwd_params(fwd_params), check_window(sliding_window)
    settings = Settings(
        softmax_scale=arrays["query"].shape[-1] ** -0.5 if softmax_scale is None else check_scale(softmax_scale),
        logits_soft_cap=check_soft_cap(logits_soft_cap),
        value_columns=columns,
        precision=precision_of(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
        fwd_params=hints,
        most_keys=None if left is None else 16 ** -(-left.bit_length() // 4),
    )
    tuned = _hints.current() if hints == FwdParams() else None
    request = Request(settings, registry.resolve(backend), tuned)
    return Arguments(**arrays, window_left=None if left is None else _beside(arrays["query"], left)), request


def _beside(query, left: int) -> Any:
    """`left` as an operand of the jitted call, so that calls with other windows share a program. Where the query is there already,
    `left` is put beside it explicitly: users may forbid implicit transfers (`jax.transfer_guard`)."""
    wide = jax.dtypes.canonicalize_dtype(np.uint64).type
    number = wide(min(left, np.iinfo(wide).max))
    if not isinstance(query, jax.Array) or isinstance(query, Tracer) or not query.is_fully_addressable:
        return number
    if isinstance(query.sharding, NamedSharding):
        return _placed(number, NamedSharding(query.sharding.mesh, PartitionSpec()))
    return _placed(number, query.sharding if query.committed and len(query.sharding.device_set) == 1 else None)


@functools.lru_cache(maxsize=64, typed=True)
def _placed(number, sharding):
    return jax.device_put(number, sharding)


def canonical(arguments: Arguments) -> tuple[Queries, Cache]:
    """The operands of the canonical operation. What the caller did not say is None."""
    a = jax.tree.map(jnp.asarray, arguments)
    query = a.query[:, None] if a.query.ndim == 3 else a.query
    accum = accum_dtype(query.dtype)
    value_scale = a.key_scale if a.value is None and a.value_scale is None else a.value_scale
    page_table = None if a.page_table is None else _int32(a.page_table)
    queries = Queries(query, *_bounds(a, query.shape[1]), _sink(a.softmax_aux, query.shape[2], accum))
    return queries, Cache(a.key, a.value, _scale(a.key_scale, accum), _scale(value_scale, accum), page_table)


def _bounds(a: Arguments, num_tokens):
    """The first row and the end of every token, [B, T], or [B, 1] where all tokens see the same rows; None where nothing is said.

    The bounds count rows of the sequence, be they in the cache or not: a position comes from `sequence_end` as the caller gave it.
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
        # One past the position of each token. From an end of 0 on, as from any end below, no token has a row.
        end = jnp.where(token < lengths, jnp.maximum(end, 0) - (lengths - 1 - token), 0)
    if a.window_left is not None:
        first = jnp.maximum(end, 0) - 1 - _left(a.window_left, given_end)[:, None]
        start = first if start is None else jnp.maximum(start, first)
    return start, end if several or a.sequence_end is not None else None


def _int32(lengths):
    """Integers of any type as int32. Values beyond int32 become its ends: rows that no cache has."""
    if not np.can_cast(lengths.dtype, np.int32):
        lengths = jnp.clip(lengths, max(np.iinfo(lengths.dtype).min, -LARGEST - 1), LARGEST)
    return lengths.astype(jnp.int32)


def _left(window_left, end):
    """How many rows before the position of a token its window keeps, int32 [B], for positions from `_int32(end)`.

    What `_int32` takes off an end, the window loses on the left.
    """
    if np.can_cast(end.dtype, np.int32):
        return jnp.minimum(window_left, LARGEST).astype(jnp.int32)[None]
    beyond = (jnp.maximum(end, LARGEST) - LARGEST).astype(window_left.dtype)
    return jnp.minimum(window_left - jnp.minimum(beyond, window_left), LARGEST).astype(jnp.int32)


def _sink(aux, num_q_heads, accum):
    """All sinks of a head as one logit, [1, 1, Hq]; None for no sinks."""
    if aux is None:
        return None
    aux = jnp.atleast_2d(aux.astype(accum))
    sink = aux[:, 0]
    if aux.shape[1] != 1:
        some = jnp.any(aux > -jnp.inf, axis=-1, keepdims=True)  # of none the logsumexp is -inf, but its gradient would be NaN
        sink = jnp.where(some[:, 0], jax.nn.logsumexp(jnp.where(some, aux, 0), axis=-1), -jnp.inf)
    return jnp.repeat(sink, num_q_heads // sink.shape[0])[None, None]


def _scale(scale, accum):
    """[B, Hkv, S], or 1 for each: a number, [Hkv], [B, Hkv] or [B, Hkv, S] by its axes; in pages [N, Hkv, page_size] likewise. Not
    broadcast, which on a GPU would be a kernel more."""
    if scale is None:
        return None
    axes = {0: (None, None, None), 1: (None, ..., None), 2: (..., None), 3: ()}[scale.ndim]
    return scale.astype(accum)[axes]
