"""The oracle: ragged decode attention in NumPy float64, written from its definition. Every backend is compared with it.

The oracle is plain loops over sequences, tokens and heads. It shares no code with the rest of the package.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike


AnyArray = jax.Array | np.ndarray


class Gradients(NamedTuple):
    """The gradients of the arguments, in float64, each in the shape of its argument.

    A gradient is None if it does not exist: for a quantised cache, for a pool of pages, and for absent sinks or an absent value.

    Attributes:
        query, key, value, softmax_aux: the gradients.
        size: one number per gradient, by name. Each element of a gradient is a sum of products, and the number is the root of the
            sum of the squares of all these products. Rounding errors are relative to this number where the sum cancels, for
            example in d_query of a range of one key.
    """

    query: Any
    key: Any
    value: Any
    softmax_aux: Any
    size: dict[str, float]


def oracle(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray | None,
    sequence_start: ArrayLike | None = None,
    sequence_end: ArrayLike | None = None,
    softmax_scale: float | None = None,
    sliding_window: tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: ArrayLike | None = None,
    *,
    page_table: ArrayLike | None = None,
    value_columns: tuple[int, int] | None = None,
    query_lengths: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The output and the log-sum-exp in float64. The arguments are those of `ragged_decode_attention`, with arrays of NumPy or JAX.

    Returns:
        A pair (out, lse). out has the shape of the query, except that the last axis is the value's head dimension. lse has the
        shape of the query without the last axis.
    """
    tokens, key, value, sinks = _operands(query, key, value, softmax_aux, page_table, value_columns, key_scale, value_scale)
    lengths = sequence_start, sequence_end, sliding_window, query_lengths
    batch, num_tokens, num_q_heads, _ = tokens.shape
    out = np.zeros((*tokens.shape[:3], value.shape[-1]))
    lse = np.zeros(tokens.shape[:3])
    for b in range(batch):
        for t in range(num_tokens):
            live = live_rows(b, key.shape[1], *lengths, token=t, num_tokens=num_tokens)
            for h in range(num_q_heads):
                kv = h // (num_q_heads // key.shape[2])
                x, _ = _logits(tokens[b, t, h], key[b, live, kv], softmax_scale, logits_soft_cap)
                lse[b, t, h] = _logsumexp(np.concatenate([x, sinks[h]]))
                if len(x):
                    out[b, t, h] = np.exp(x - lse[b, t, h]) @ value[b, live, kv]
    return out.reshape(*np.shape(query)[:-1], value.shape[-1]), lse.reshape(np.shape(query)[:-1])


def oracle_gradients(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray | None,
    sequence_start: ArrayLike | None = None,
    sequence_end: ArrayLike | None = None,
    softmax_scale: float | None = None,
    sliding_window: tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: ArrayLike | None = None,
    *,
    page_table: ArrayLike | None = None,
    value_columns: tuple[int, int] | None = None,
    query_lengths: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
    d_out: AnyArray,
    d_lse: AnyArray,
) -> Gradients:
    """The gradients of sum(out * d_out) + sum(lse * d_lse).

    p_j is the probability of key j, s_n is the probability of sink n, and delta = d_out . out - d_lse. Then:

    - d_logit_j = p_j (d_out . v_j - delta).
    - d_sink_n = -s_n delta.
    - The cap multiplies d_logit_j by its slope, 1 - tanh^2.

    For an empty range, lse is logsumexp(sinks). Only the sinks have a gradient then.
    """
    aux, frozen = softmax_aux, page_table is not None or np.asarray(query).dtype != np.asarray(key).dtype
    row_dim = np.shape(key)[-1]
    tokens, key, value, sinks = _operands(query, key, value, aux, page_table, value_columns, key_scale, value_scale)
    lengths = sequence_start, sequence_end, sliding_window, query_lengths
    d_out, d_lse = (
        np.asarray(d_out, np.float64).reshape(*tokens.shape[:3], -1),
        np.asarray(d_lse, np.float64).reshape(tokens.shape[:3]),
    )
    batch, num_tokens, num_q_heads, head_dim = tokens.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    d_query, d_key, d_value, d_sinks = (np.zeros(x.shape) for x in (tokens, key, value, sinks))
    squares = dict.fromkeys(("query", "key", "value", "softmax_aux"), 0.0)
    for b, t, h in np.ndindex(batch, num_tokens, num_q_heads):
        live = live_rows(b, key.shape[1], *lengths, token=t, num_tokens=num_tokens)
        kv = h // (num_q_heads // key.shape[2])
        q, k, v, d_o = tokens[b, t, h], key[b, live, kv], value[b, live, kv], d_out[b, t, h]
        x, slope = _logits(q, k, softmax_scale, logits_soft_cap)
        lse = _logsumexp(np.concatenate([x, sinks[h]]))
        if lse == -np.inf:  # no key and no sink
            continue
        p, s = np.exp(x - lse), np.exp(sinks[h] - lse)
        from_value = v @ d_o
        delta = p @ from_value - d_lse[b, t, h]
        d_x = scale * slope * p * (from_value - delta)
        d_query[b, t, h] = d_x @ k
        d_key[b, live, kv] += np.outer(d_x, q)
        d_value[b, live, kv] += np.outer(p, d_o)
        d_sinks[h] -= s * delta

        delta_squared = np.sum((d_o * (p @ v)) ** 2) + d_lse[b, t, h] ** 2
        x_squared = (scale * slope * p) ** 2 * (v**2 @ d_o**2 + delta_squared)
        squares["query"] += x_squared @ np.sum(k**2, axis=1)
        squares["key"] += np.sum(x_squared) * (q @ q)
        squares["value"] += (p @ p) * (d_o @ d_o)
        squares["softmax_aux"] += (s @ s) * delta_squared
    if value_columns is not None:  # a row's gradient is the sum over its uses as key and as value
        d_rows = np.zeros((*d_key.shape[:-1], row_dim))
        d_rows[..., :head_dim] += d_key
        d_rows[..., slice(*value_columns)] += d_value
        d_key, d_value = d_rows, None
        squares["key"] += squares["value"]
    size = {name: x**0.5 for name, x in squares.items()}
    d_cache = (None, None) if frozen else (d_key, d_value)
    return Gradients(d_query.reshape(np.shape(query)), *d_cache, _like_aux(d_sinks, aux), size)


def live_rows(
    b: int,
    seq_len: int,
    sequence_start: ArrayLike | None = None,
    sequence_end: ArrayLike | None = None,
    sliding_window: tuple[int, int] | None = None,
    query_lengths: ArrayLike | None = None,
    *,
    token: int = 0,
    num_tokens: int = 1,
) -> np.ndarray:
    """The indices of the keys that token `token` of sequence `b` sees."""
    start = 0 if sequence_start is None else int(np.asarray(sequence_start)[b])
    end = seq_len if sequence_end is None else int(np.asarray(sequence_end)[b])
    present = num_tokens if query_lengths is None else min(max(int(np.asarray(query_lengths)[b]), 0), num_tokens)
    if token >= present:
        return np.arange(0)
    left, right = (-1, -1) if sliding_window is None else sliding_window
    position = end - present + token
    low = max(start, position - left) if left >= 0 else start
    high = min(position, position + right) if right >= 0 else position
    low, stop = max(low, 0), min(high + 1, seq_len)  # rows are clipped to the cache; the position is not
    return np.arange(low, max(low, stop))


def seen_rows(b: int, seq_len: int, *lengths: Any, num_tokens: int = 1) -> np.ndarray:
    """The indices of the keys that any token of sequence `b` sees. `lengths` are the lengths that `live_rows` takes."""
    seen = [live_rows(b, seq_len, *lengths, token=t, num_tokens=num_tokens) for t in range(num_tokens)]
    return np.unique(np.concatenate(seen))


def _operands(
    query, key, value, softmax_aux, page_table, value_columns, key_scale, value_scale
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The operands in float64: query [B, T, Hq, D], keys and values [B, S, Hkv, ...] with their scales applied, sinks [Hq, N]."""
    query, key = (np.asarray(x).astype(np.float64) for x in (query, key))
    head_dim, heads = query.shape[-1], query.shape[-2]
    if value_columns is None:
        value = np.asarray(value).astype(np.float64)
    else:
        value = key[..., slice(*value_columns)]
        value_scale = key_scale if value_scale is None else value_scale
    key = key[..., :head_dim]
    with np.errstate(invalid="ignore"):  # rows that no token sees may hold anything
        key, value = (x if scale is None else x * _scale(scale) for x, scale in ((key, key_scale), (value, value_scale)))
    if page_table is not None:
        key, value = (_by_sequence(x, page_table) for x in (key, value))
    tokens = query[:, None] if query.ndim == 3 else query
    if softmax_aux is None:
        sinks = np.zeros((heads, 0))
    else:
        aux = np.asarray(softmax_aux).astype(np.float64)
        aux = aux[None] if aux.ndim == 1 else aux
        sinks = np.stack([aux[h * len(aux) // heads] for h in range(heads)])
    return tokens, key, value, sinks


def _by_sequence(pool, page_table):
    """A pool [N, page_size, ...], gathered to [B, P * page_size, ...]. Entries outside the pool are clipped."""
    sequences = [[pool[min(max(int(entry), 0), len(pool) - 1)] for entry in entries] for entries in np.asarray(page_table)]
    return np.stack([np.concatenate(pages) for pages in sequences])


def _scale(scale):
    """A scale in a shape that multiplies [B, S, Hkv, D], or a pool."""
    scale = np.asarray(scale).astype(np.float64)
    match scale.ndim:
        case 0:
            return scale
        case 1:
            return scale[:, None]
        case 2:
            return scale[:, None, :, None]
    return scale.transpose(0, 2, 1)[..., None]


def _like_aux(d_sinks, aux):
    """The gradient of softmax_aux, in its shape, from gradients [Hq, N]: summed over the query heads that share a sink."""
    if aux is None:
        return None
    shape = np.shape(aux)
    rows = shape[0] if len(shape) == 2 else 1
    return d_sinks.reshape(rows, len(d_sinks) // rows, -1).sum(axis=1).reshape(shape)


def _logits(q, k, scale, cap):
    """The logits of one query head, scaled and capped, and the slope of the cap at each logit."""
    x = (len(q) ** -0.5 if scale is None else scale) * (k @ q)
    if cap is None:
        return x, np.ones_like(x)
    t = np.tanh(x / cap)
    return cap * t, 1 - t * t


def _logsumexp(x):
    top = np.max(x, initial=-np.inf)
    return top if top == -np.inf else top + np.log(np.sum(np.exp(x - top)))


# The relative L2 errors that are accepted: (for outputs of 256 elements or more, for smaller outputs). The error of a small output
# can be one rounding error in full. In a large output, rounding errors average out.
TOLERANCES = {
    "float64": (1e-13, 1e-13),
    "float32": (2e-6, 2e-6),
    "bfloat16": (2.5e-3, 4e-3),
    "float16": (4e-4, 8e-4),
}


def tolerance(dtype: Any, size: int, gradient: bool = False) -> float:
    """The relative error that is accepted for an array of `size` elements, from a query of `dtype` (a name or a dtype)."""
    large, tiny = TOLERANCES[np.dtype(dtype).name if not isinstance(dtype, str) else dtype]
    return (large if size >= 256 else tiny) * (2 if gradient else 1)


def relative_error(got: ArrayLike, want: ArrayLike, size: float = 0.0) -> float:
    """The relative L2 error, `norm(got - want) / max(norm(want), size)`.

    Equal infinities are no error. The error is infinite for NaN, for other infinities, and for a wrong shape. If `want` and `size`
    are 0, the error is infinite unless `got` is 0.
    """
    got, want = np.asarray(got).astype(np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return np.inf
    same = got == want
    difference, want = np.where(same, 0, got - np.where(same, 0, want)), np.where(np.isinf(want) & same, 0, want)
    if not np.all(np.isfinite(difference)):
        return np.inf
    error, norm = np.linalg.norm(difference), max(np.linalg.norm(want), size)
    return float(error / norm) if norm > 0 else (0.0 if error == 0 else np.inf)
