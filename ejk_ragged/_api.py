"""`ragged_decode_attention`: what callers write is checked, reduced to the canonical operation, and the answer shaped."""

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
from ._registry import Request


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
    """Attention of each sequence's newest tokens over a KV cache of which each sequence uses a range of rows of its own.

    The cache is padded, [batch, seq_len, ...], or a pool of pages with a page table. Query head h reads kv head h // (Hq / Hkv).
    Row j of a sequence is valid when start <= j < end. The tokens are in the cache already: the last token stands at end - 1, the
    tokens before it at the rows before, and each token sees the valid rows up to its own position that the window around that
    position keeps. Positions come from `sequence_end` as it is given, be it beyond the cache; only rows of the cache are seen.
    Logits are `scale * q . k`, then capped, then masked. With sinks s_n,
    `out = sum_j exp(x_j) v_j / (sum_j exp(x_j) + sum_n exp(s_n))`, accumulated in float32 (float64 for float64 queries). A token
    that sees no row gives 0. What the cache holds at rows that no token sees changes nothing. Differentiable in query, sinks, and a
    padded key and value of floats.

    The first ten arguments are those of ejkernel's `ragged_decode_attention`, with a meaning that every backend keeps. The fourth
    argument is `sequence_start`, not the lengths: pass `sequence_end=lengths` by name.

    Args:
        query: [batch, num_q_heads, head_dim], one token per sequence, or [batch, num_tokens, num_q_heads, head_dim]; float16,
            bfloat16, float32 or float64.
        key: [batch, seq_len, num_kv_heads, head_dim], the cache, in the query's dtype, or quantised: int8, float8_e4m3fn or
            float8_e5m2; num_q_heads is a multiple of num_kv_heads. With a page table
            [num_pages, page_size, num_kv_heads, head_dim].
        value: like `key`, with a head dimension of its own. None where the value is in the key's rows: see `value_columns`.
        sequence_start: integers [batch], the first valid row; None is 0.
        sequence_end: integers [batch], one past the last valid row, which is the newest token's; None is seq_len.
        softmax_scale: factor on the logits; None is head_dim ** -0.5. With `value=None` the scale must be given.
        fwd_params: tuning hints; None leaves them to the backend. With `num_key_splits` given, a sequence's result does not depend
            on the rest of the batch, bit by bit.
        sliding_window: (left, right) around each token's position; a negative side is unlimited. `left` keeps left + 1 keys;
            `right` bounds nothing that causality does not.
        logits_soft_cap: cap > 0: logits become cap * tanh(logits / cap).
        softmax_aux: sinks, extra logits in the softmax's denominator, neither scaled nor capped: [num_sinks] for all heads,
            [num_q_heads, num_sinks], or [num_kv_heads, num_sinks].
        page_table: integers [batch, pages], for a cache in pages: row j of sequence b is row j % page_size of page
            `page_table[b, j // page_size]` of the pool. seq_len is pages * page_size. Entries may repeat, and an entry of a page of
            which no token sees a row may be any integer.
        value_columns: (first, end), for `value=None`: rows of `key` are [..., num_kv_heads, row_dim] with row_dim >= head_dim, the
            key is their first head_dim columns and the value their columns first to end.
        query_lengths: integers [batch], how many of the num_tokens tokens are there, the first ones; None is all of them. The
            others see no row. For a query of four axes.
        key_scale: of a quantised cache, which stands for `key * key_scale`: a number, or an array [num_kv_heads],
            [batch, num_kv_heads] or [batch, num_kv_heads, seq_len]; in pages [num_pages, num_kv_heads, page_size] in place of the
            last two. int8 needs both scales.
        value_scale: likewise, for `value * value_scale`. With `value=None`, None is `key_scale`.
        backend: None or "auto" to choose by platform and problem, a name that `backends()` lists, or a `Backend`.
        return_lse: also return the log of the softmax's denominator.

    Returns:
        Shaped and typed like the query, but the last axis is the value's head dimension; with `return_lse`, also float32 without
        the last axis, natural log, sinks included, -inf for a token that sees no row and has no sink.

    Raises:
        ValueError: shapes, dtypes or values that do not fit, an unknown backend, or a named one that cannot do the call; a gradient
            of a quantised cache, of its scales or of a pool of pages.
        TypeError: an argument of the wrong type; from JAX, differentiation in forward mode (`jax.jvp`).
        NotImplementedError: second derivatives.
    """
    arguments, request = checked(
        query=query,
        key=key,
        value=value,
        sequence_start=sequence_start,
        sequence_end=sequence_end,
        softmax_scale=softmax_scale,
        fwd_params=fwd_params,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        softmax_aux=softmax_aux,
        page_table=page_table,
        value_columns=value_columns,
        query_lengths=query_lengths,
        key_scale=key_scale,
        value_scale=value_scale,
        backend=backend,
    )
    out, lse = _decode(arguments, request)
    return (out, lse) if return_lse else out


@functools.partial(jax.jit, static_argnames="request")
def _decode(arguments: Arguments, request: Request):
    """Jitted, so that an eager call is one dispatch."""
    queries, cache = canonical(arguments)
    out, lse = _op.decode(request, queries, cache)
    if arguments.query.ndim == 3:
        out, lse = out[:, 0], lse[:, 0]
    return out, lse.astype(jnp.float32)
