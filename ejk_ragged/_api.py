"""`ragged_decode_attention`: checks the arguments, calls the canonical operation, and shapes the result."""

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from . import _op
from ._backend import Backend
from ._canonical import canonical, checked
from ._check import AnyArray, Arguments, Scale, Window
from ._problem import FwdParams
from ._selection import Request


@overload
def ragged_decode_attention(
    query: Float[AnyArray, "batch *num_tokens num_q_heads head_dim"],
    key: Shaped[AnyArray, "pages page_size num_kv_heads row_dim"],
    value: Shaped[AnyArray, "pages page_size num_kv_heads value_dim"] | None,
    sequence_start: Int[AnyArray, " batch"] | None = None,
    sequence_end: Int[AnyArray, " batch"] | None = None,
    softmax_scale: float | None = None,
    fwd_params: FwdParams | None = None,
    sliding_window: Window | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: Float[AnyArray, " num_sinks"] | Float[AnyArray, "heads num_sinks"] | None = None,
    *,
    page_table: Int[AnyArray, "batch pages_per_sequence"] | None = None,
    value_columns: tuple[int, int] | None = None,
    query_lengths: Int[AnyArray, " batch"] | None = None,
    key_scale: Scale | None = None,
    value_scale: Scale | None = None,
    backend: str | Backend | None = None,
    return_lse: Literal[False] = False,
) -> Float[Array, "batch *num_tokens num_q_heads value_dim"]: ...
@overload
def ragged_decode_attention(
    query: Float[AnyArray, "batch *num_tokens num_q_heads head_dim"],
    key: Shaped[AnyArray, "pages page_size num_kv_heads row_dim"],
    value: Shaped[AnyArray, "pages page_size num_kv_heads value_dim"] | None,
    sequence_start: Int[AnyArray, " batch"] | None = None,
    sequence_end: Int[AnyArray, " batch"] | None = None,
    softmax_scale: float | None = None,
    fwd_params: FwdParams | None = None,
    sliding_window: Window | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: Float[AnyArray, " num_sinks"] | Float[AnyArray, "heads num_sinks"] | None = None,
    *,
    page_table: Int[AnyArray, "batch pages_per_sequence"] | None = None,
    value_columns: tuple[int, int] | None = None,
    query_lengths: Int[AnyArray, " batch"] | None = None,
    key_scale: Scale | None = None,
    value_scale: Scale | None = None,
    backend: str | Backend | None = None,
    return_lse: Literal[True],
) -> tuple[Float[Array, "batch *num_tokens num_q_heads value_dim"], Float32[Array, "batch *num_tokens num_q_heads"]]: ...
@overload
def ragged_decode_attention(
    query: Float[AnyArray, "batch *num_tokens num_q_heads head_dim"],
    key: Shaped[AnyArray, "pages page_size num_kv_heads row_dim"],
    value: Shaped[AnyArray, "pages page_size num_kv_heads value_dim"] | None,
    sequence_start: Int[AnyArray, " batch"] | None = None,
    sequence_end: Int[AnyArray, " batch"] | None = None,
    softmax_scale: float | None = None,
    fwd_params: FwdParams | None = None,
    sliding_window: Window | None = None,
    logits_soft_cap: float | None = None,
    softmax_aux: Float[AnyArray, " num_sinks"] | Float[AnyArray, "heads num_sinks"] | None = None,
    *,
    page_table: Int[AnyArray, "batch pages_per_sequence"] | None = None,
    value_columns: tuple[int, int] | None = None,
    query_lengths: Int[AnyArray, " batch"] | None = None,
    key_scale: Scale | None = None,
    value_scale: Scale | None = None,
    backend: str | Backend | None = None,
    return_lse: bool,
) -> (
    Float[Array, "batch *num_tokens num_q_heads value_dim"]
    | tuple[Float[Array, "batch *num_tokens num_q_heads value_dim"], Float32[Array, "batch *num_tokens num_q_heads"]]
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
    page_table=None,
    value_columns=None,
    query_lengths=None,
    key_scale=None,
    value_scale=None,
    backend=None,
    return_lse=False,
):
    """Attention of the newest tokens of each sequence over a KV cache. Each sequence uses its own range of rows of the cache.

    **Cache.** The cache is padded, [batch, seq_len, ...], or it is a pool of pages with a page table. Query head h reads kv head
    h // (num_q_heads / num_kv_heads). Row j of a sequence is valid if start <= j < end.

    **Tokens.** The keys and values of the tokens are in the cache already. The newest token has position end - 1, and the tokens
    before it have the positions before. Token t sees the valid rows up to its own position, within the sliding window. Positions
    come from `sequence_end` as given, even if it is larger than seq_len.

    **Result.** The logit of row j is x_j = softmax_scale * (q . k_j), then capped. With sinks s_n,
    `out = sum_j exp(x_j) v_j / (sum_j exp(x_j) + sum_n exp(s_n))`, over the rows that the token sees. Sums are accumulated in
    float32, or in float64 for float64 queries. A token that sees no row gives 0. A row that no token sees may hold anything, NaN
    included.

    **Gradients** exist for the query, the sinks, and a padded cache of floats.

    The first ten arguments are the arguments of ejkernel's `ragged_decode_attention`, and they mean the same on every backend. The
    fourth argument is `sequence_start`, not the lengths: pass the lengths by name, as `sequence_end=lengths`.

    Args:
        query: [batch, num_q_heads, head_dim] for one token per sequence, or [batch, num_tokens, num_q_heads, head_dim]. float16,
            bfloat16, float32 or float64.
        key: [batch, seq_len, num_kv_heads, head_dim]. With a page table: [num_pages, page_size, num_kv_heads, head_dim]. The dtype
            is the query's, or int8, float8_e4m3fn or float8_e5m2 for a quantised cache. num_q_heads must be a multiple of
            num_kv_heads.
        value: like `key`, but its head dimension may differ. None if the value is in the key's rows: see `value_columns`.
        sequence_start: integers [batch], the first valid row of each sequence. None means 0.
        sequence_end: integers [batch], one past the last valid row of each sequence. The last valid row belongs to the newest
            token. None means seq_len.
        softmax_scale: factor on the logits. None means head_dim ** -0.5. With `value=None` the scale must be given.
        fwd_params: tuning hints. None leaves the hints to the backend. If `num_key_splits` is given, the result of a sequence does
            not depend on the rest of the batch, bit by bit.
        sliding_window: (left, right). A token at position p sees only the rows from p - left on: left + 1 rows, its own included.
            A negative left is unlimited. `right` has no effect, because no token sees a row after its own.
        logits_soft_cap: cap > 0. Logits become cap * tanh(logits / cap).
        softmax_aux: sinks, which are extra logits in the softmax's denominator. They are neither scaled nor capped. [num_sinks]
            for all heads, [num_q_heads, num_sinks] per query head, or [num_kv_heads, num_sinks] per kv head.
        page_table: integers [batch, pages], for a cache in pages. Row j of sequence b is row j % page_size of page
            `page_table[b, j // page_size]`, and seq_len is pages * page_size. Several entries may name the same page. If no token
            sees a row of a page, the entry of the page may be any integer.
        value_columns: (first, end), with `value=None`. `key` is then [..., num_kv_heads, row_dim] with row_dim >= head_dim. The
            first head_dim columns are the key, and the columns from first to end are the value.
        query_lengths: integers [batch], the number of tokens that each sequence has: the first query_lengths[b] of the num_tokens
            tokens. The other tokens are padding and see no row. None means all tokens. Only for a query of four axes.
        key_scale: scale of a quantised cache: the keys are `key * key_scale`. A number, [num_kv_heads], [batch, num_kv_heads] or
            [batch, num_kv_heads, seq_len]. With a page table: a number, [num_kv_heads] or [num_pages, num_kv_heads, page_size].
            int8 needs both scales.
        value_scale: likewise, for `value * value_scale`. With `value=None`, None means `key_scale`.
        backend: None or "auto" chooses by platform and problem. Otherwise a name that `backends()` lists, or a `Backend`.
        return_lse: also return the log-sum-exp: the natural log of the softmax's denominator.

    Returns:
        The output, in the query's shape and dtype, except that the last axis is the value's head dimension. With `return_lse` a
        pair: the output, and the log-sum-exp in float32, without the last axis. The log-sum-exp includes the sinks, and is -inf
        for a token that sees no row and has no sink.

    Raises:
        ValueError: shapes, dtypes or values do not fit; the backend is unknown, or is named and cannot do the call; or a gradient
            is asked for of a quantised cache, of its scales or of a pool of pages.
        TypeError: an argument has the wrong type.
        NotImplementedError: a second derivative is asked for, or differentiation in forward mode (`jax.jvp`).
    """
    call = dict(locals())  # all arguments, by name: nothing else has a name yet
    del call["return_lse"]
    arguments, request = checked(**call)
    out, lse = _decode(arguments, request)
    return (out, lse) if return_lse else out


@functools.partial(jax.jit, static_argnames="request")
def _decode(arguments: Arguments, request: Request):
    """The call on checked arguments. Jitted, so that an eager call is one dispatch."""
    queries, cache = canonical(arguments)
    out, lse = _op.decode(request, queries, cache)
    if arguments.query.ndim == 3:
        out, lse = out[:, 0], lse[:, 0]
    return out, lse.astype(jnp.float32)
