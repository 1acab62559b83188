"""The truth that every backend is measured against: ragged decode attention in NumPy float64, written from its definition.

Plain loops over sequences and heads, nothing shared with the rest of the package.
"""

from typing import Any, NamedTuple

import numpy as np


class Gradients(NamedTuple):
    """Gradients in float64, shaped like what they belong to; `softmax_aux` is None where none was given.

    `size` says, by name, how large the products are that each gradient sums (their root sum square, one number a gradient): what
    rounding errors are relative to where the sum itself cancels, such as d_query of a range of one key.
    """

    query: Any
    key: Any
    value: Any
    softmax_aux: Any
    size: dict[str, float]


def oracle(
    query,
    key,
    value,
    sequence_start=None,
    sequence_end=None,
    softmax_scale=None,
    sliding_window=None,
    logits_soft_cap=None,
    softmax_aux=None,
):
    """Output [B, Hq, D] and lse [B, Hq], float64; the arguments are those of `ragged_decode_attention`."""
    query, key, value, sinks = _float64(query, key, value, softmax_aux)
    out = np.zeros(query.shape)
    lse = np.zeros(query.shape[:2])
    for b in range(query.shape[0]):
        live = live_rows(b, key.shape[1], sequence_start, sequence_end, sliding_window)
        for h in range(query.shape[1]):
            kv = h // (query.shape[1] // key.shape[2])
            x, _ = _logits(query[b, h], key[b, live, kv], softmax_scale, logits_soft_cap)
            lse[b, h] = _logsumexp(np.concatenate([x, sinks[h]]))
            if len(x):
                out[b, h] = np.exp(x - lse[b, h]) @ value[b, live, kv]
    return out, lse


def oracle_gradients(
    query,
    key,
    value,
    sequence_start=None,
    sequence_end=None,
    softmax_scale=None,
    sliding_window=None,
    logits_soft_cap=None,
    softmax_aux=None,
    *,
    d_out,
    d_lse,
) -> Gradients:
    """Gradients of sum(out * d_out) + sum(lse * d_lse).

    With p_j the probability of key j and s_n that of sink n: d_logit_j = p_j (d_out . v_j - delta), d_sink_n = -s_n delta,
    delta = d_out . out - d_lse; through the cap, d_tanh = 1 - tanh^2. An empty range has no gradients but that of its lse,
    logsumexp(sinks), to the sinks.
    """
    aux = softmax_aux
    query, key, value, sinks = _float64(query, key, value, aux)
    d_out, d_lse = np.asarray(d_out, np.float64), np.asarray(d_lse, np.float64)
    scale = query.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    d_query, d_key, d_value, d_sinks = (np.zeros(x.shape) for x in (query, key, value, sinks))
    squares = dict.fromkeys(("query", "key", "value", "softmax_aux"), 0.0)
    for b in range(query.shape[0]):
        live = live_rows(b, key.shape[1], sequence_start, sequence_end, sliding_window)
        for h in range(query.shape[1]):
            kv = h // (query.shape[1] // key.shape[2])
            q, k, v = query[b, h], key[b, live, kv], value[b, live, kv]
            x, slope = _logits(q, k, softmax_scale, logits_soft_cap)
            lse = _logsumexp(np.concatenate([x, sinks[h]]))
            if lse == -np.inf:  # no key and no sink
                continue
            p, s = np.exp(x - lse), np.exp(sinks[h] - lse)
            from_value = v @ d_out[b, h]
            delta = p @ from_value - d_lse[b, h]
            d_x = scale * slope * p * (from_value - delta)
            d_query[b, h] = d_x @ k
            d_key[b, live, kv] += np.outer(d_x, q)
            d_value[b, live, kv] += np.outer(p, d_out[b, h])
            d_sinks[h] -= s * delta

            delta_squared = np.sum((d_out[b, h] * (p @ v)) ** 2) + d_lse[b, h] ** 2
            x_squared = (scale * slope * p) ** 2 * (v**2 @ d_out[b, h] ** 2 + delta_squared)
            squares["query"] += x_squared @ np.sum(k**2, axis=1)
            squares["key"] += np.sum(x_squared) * (q @ q)
            squares["value"] += (p @ p) * (d_out[b, h] @ d_out[b, h])
            squares["softmax_aux"] += (s @ s) * delta_squared
    return Gradients(d_query, d_key, d_value, _like_aux(d_sinks, aux), {name: x**0.5 for name, x in squares.items()})


def live_rows(b, seq_len, sequence_start=None, sequence_end=None, sliding_window=None):
    """Indices of the valid keys of sequence `b`."""
    start = 0 if sequence_start is None else min(max(int(sequence_start[b]), 0), seq_len)
    end = seq_len if sequence_end is None else min(max(int(sequence_end[b]), 0), seq_len)
    left, right = (-1, -1) if sliding_window is None else sliding_window
    position = end - 1  # of the query
    low = max(start, position - left) if left >= 0 else start
    high = min(end - 1, position + right) if right >= 0 else end - 1
    return np.arange(low, max(low, high + 1))


def _float64(query, key, value, softmax_aux):
    """The arrays in float64, and the sinks as one row a query head."""
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    heads = query.shape[1]
    if softmax_aux is None:
        sinks = np.zeros((heads, 0))
    else:
        aux = np.asarray(softmax_aux).astype(np.float64)
        rows = aux[None] if aux.ndim == 1 else aux
        sinks = np.stack([rows[h * len(rows) // heads] for h in range(heads)])
    return query, key, value, sinks


def _like_aux(d_sinks, aux):
    """Gradients of one row a query head, summed into the shape that was given."""
    if aux is None:
        return None
    shape = np.shape(aux)
    rows = shape[0] if len(shape) == 2 else 1
    return d_sinks.reshape(rows, len(d_sinks) // rows, -1).sum(axis=1).reshape(shape)


def _logits(q, k, scale, cap):
    """Logits of one query head, scaled and capped, and the cap's slope there."""
    x = (len(q) ** -0.5 if scale is None else scale) * (k @ q)
    if cap is None:
        return x, np.ones_like(x)
    t = np.tanh(x / cap)
    return cap * t, 1 - t * t


def _logsumexp(x):
    top = np.max(x, initial=-np.inf)
    return top if top == -np.inf else top + np.log(np.sum(np.exp(x - top)))


# Relative L2 errors that are accepted: of outputs with 256 elements and more; of smaller ones, which may show one rounding in full.
TOLERANCES = {
    "float64": (1e-13, 1e-13),
    "float32": (2e-6, 2e-6),
    "bfloat16": (2.5e-3, 4e-3),
    "float16": (4e-4, 8e-4),
}


def tolerance(dtype, size, gradient=False):
    """The relative error accepted of an array of `size` elements, computed from inputs of `dtype` (a name or a dtype)."""
    large, tiny = TOLERANCES[np.dtype(dtype).name if not isinstance(dtype, str) else dtype]
    return (large if size >= 256 else tiny) * (2 if gradient else 1)


def relative_error(got, want, size=0.0):
    """Relative L2 error, `norm(got - want) / max(norm(want), size)`.

    Equal infinities are no error; NaN, other infinities and a wrong shape are an infinite one, as is anything but 0 where `want`
    and `size` are 0.
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
