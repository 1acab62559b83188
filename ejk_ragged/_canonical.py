"""What a call means: every rule that turns what a caller wrote into the operands of the canonical operation.

The rules are in the order in which the docstring of `ragged_decode_attention` states them. Lengths may have any integer type, and
values at the ends of that type: each is brought to int32 by a function that says what becomes of values beyond.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ._check import Arguments
from ._problem import accum_dtype, Cache, Queries


LARGEST = np.iinfo(np.int32).max


def canonical(arguments: Arguments) -> tuple[Queries, Cache]:
    """The operands of the canonical operation: the bounds of every token, one sink per head, scales with all their axes."""
    a = jax.tree.map(jnp.asarray, arguments)
    query = a.query[:, None] if a.query.ndim == 3 else a.query
    accum = accum_dtype(query.dtype)
    start, end = _bounds(a, query.shape[1])
    sink = _sink(a.softmax_aux, query.shape[2], accum)
    scales = (_scale(x, accum) for x in (a.key_scale, a.value_scale))
    return Queries(query, start, end, sink), Cache(a.key, a.value, *scales)


def _bounds(a: Arguments, num_tokens):
    """The first row and the end of every token, [B, T], or [B, 1] where all tokens see the same rows.

    The bounds count rows of the sequence, be they in the cache or not: a position comes from `sequence_end` as the caller gave it.
    Who reads the bounds clips them to the cache.
    """
    batch, seq_len = a.key.shape[:2]
    start = jnp.zeros(batch, jnp.int32) if a.sequence_start is None else _int32(a.sequence_start)
    given_end = jnp.full(batch, seq_len, jnp.int32) if a.sequence_end is None else a.sequence_end
    start, end = start[:, None], _int32(given_end)[:, None]
    if a.query_lengths is not None or num_tokens != 1:
        lengths = jnp.full(batch, num_tokens, jnp.int32) if a.query_lengths is None else _int32(a.query_lengths)
        lengths, token = jnp.clip(lengths, 0, num_tokens)[:, None], jnp.arange(num_tokens, dtype=jnp.int32)[None]
        # One past the position of each token. From an end of 0 on, as from any end below, no token has a row.
        end = jnp.where(token < lengths, jnp.maximum(end, 0) - (lengths - 1 - token), 0)
    if a.window_left is not None:
        start = jnp.maximum(start, jnp.maximum(end, 0) - 1 - _left(a.window_left, given_end)[:, None])
    return start, end


def _int32(lengths):
    """Lengths of any integer type as int32. Values beyond int32 become its ends: rows that no cache has."""
    ends = [bound for bound in (-LARGEST - 1, LARGEST) if np.iinfo(lengths.dtype).min <= bound <= np.iinfo(lengths.dtype).max]
    if not np.can_cast(lengths.dtype, np.int32):
        lengths = functools.reduce(lambda x, bound: (jnp.maximum if bound < 0 else jnp.minimum)(x, bound), ends, lengths)
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
    """All sinks of a head as one logit, [1, 1, Hq]."""
    if aux is None:
        return jnp.full((1, 1, num_q_heads), -jnp.inf, accum)
    aux = jnp.atleast_2d(aux.astype(accum))
    sink = aux[:, 0]
    if aux.shape[1] != 1:
        some = jnp.any(aux > -jnp.inf, axis=-1, keepdims=True)  # of none the logsumexp is -inf, but its gradient would be NaN
        sink = jnp.where(some[:, 0], jax.nn.logsumexp(jnp.where(some, aux, 0), axis=-1), -jnp.inf)
    return jnp.repeat(sink, num_q_heads // sink.shape[0])[None, None]


def _scale(scale, accum):
    """[B, Hkv, S], or 1 for each: a number, [Hkv], [B, Hkv] or [B, Hkv, S] by its axes. Not broadcast, which on a GPU would be a
    kernel more."""
    if scale is None:
        return None
    axes = {0: (None, None, None), 1: (None, ..., None), 2: (..., None), 3: ()}[scale.ndim]
    return scale.astype(accum)[axes]
