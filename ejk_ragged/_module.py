"""`RaggedDecodeAttention`: `ragged_decode_attention` as an Equinox module, with learned sinks."""

from typing import Literal, overload

import equinox as eqx
from jaxtyping import Array, Float, Float32, Int, Shaped

from ._api import ragged_decode_attention
from ._backend import Backend
from ._check import AnyArray, check_fwd_params, check_number, check_window, Scale, Window
from ._messages import shown
from ._problem import FwdParams


class RaggedDecodeAttention(eqx.Module):
    """Ragged decode attention as a layer, which holds its settings and its sinks.

    The settings have the meaning of the arguments of `ragged_decode_attention`. The settings are static and the sinks are not, so
    the module passes through `jax.jit` and Equinox's filtered transformations.

    Attributes:
        sinks: learned sinks [num_q_heads, num_sinks], or None.
        softmax_scale: factor on the logits, or None.
        sliding_window: (left, right) or None.
        logits_soft_cap: a positive number or None.
        fwd_params: tuning hints or None.
        backend: None, a name or a `Backend`.
        value_columns: (first, end) for a value in the key's rows, or None.

    Raises:
        ValueError, TypeError: on construction, if no call would accept a setting.
    """

    sinks: Float[Array, "num_q_heads num_sinks"] | None = None
    softmax_scale: float | None = eqx.field(static=True, default=None)
    sliding_window: Window | None = eqx.field(static=True, default=None)
    logits_soft_cap: float | None = eqx.field(static=True, default=None)
    fwd_params: FwdParams | None = eqx.field(static=True, default=None)
    backend: str | Backend | None = eqx.field(static=True, default=None)
    value_columns: tuple[int, int] | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_window(self.sliding_window)
        check_fwd_params(self.fwd_params)
        for name, positive in (("logits_soft_cap", True), ("softmax_scale", False)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), positive)
        if self.sinks is not None and getattr(self.sinks, "ndim", None) != 2:
            raise ValueError(f"sinks must be [num_q_heads, num_sinks] or None, got {shown(self.sinks)}.")

    @overload
    def __call__(
        self,
        query: Float[AnyArray, "batch *num_tokens num_q_heads head_dim"],
        key: Shaped[AnyArray, "pages page_size num_kv_heads row_dim"],
        value: Shaped[AnyArray, "pages page_size num_kv_heads value_dim"] | None = None,
        sequence_start: Int[AnyArray, " batch"] | None = None,
        sequence_end: Int[AnyArray, " batch"] | None = None,
        *,
        page_table: Int[AnyArray, "batch pages_per_sequence"] | None = None,
        query_lengths: Int[AnyArray, " batch"] | None = None,
        key_scale: Scale | None = None,
        value_scale: Scale | None = None,
        return_lse: Literal[False] = False,
    ) -> Float[Array, "batch *num_tokens num_q_heads value_dim"]: ...
    @overload
    def __call__(
        self,
        query: Float[AnyArray, "batch *num_tokens num_q_heads head_dim"],
        key: Shaped[AnyArray, "pages page_size num_kv_heads row_dim"],
        value: Shaped[AnyArray, "pages page_size num_kv_heads value_dim"] | None = None,
        sequence_start: Int[AnyArray, " batch"] | None = None,
        sequence_end: Int[AnyArray, " batch"] | None = None,
        *,
        page_table: Int[AnyArray, "batch pages_per_sequence"] | None = None,
        query_lengths: Int[AnyArray, " batch"] | None = None,
        key_scale: Scale | None = None,
        value_scale: Scale | None = None,
        return_lse: Literal[True],
    ) -> tuple[Float[Array, "batch *num_tokens num_q_heads value_dim"], Float32[Array, "batch *num_tokens num_q_heads"]]: ...
    @overload
    def __call__(
        self,
        query: Float[AnyArray, "batch *num_tokens num_q_heads head_dim"],
        key: Shaped[AnyArray, "pages page_size num_kv_heads row_dim"],
        value: Shaped[AnyArray, "pages page_size num_kv_heads value_dim"] | None = None,
        sequence_start: Int[AnyArray, " batch"] | None = None,
        sequence_end: Int[AnyArray, " batch"] | None = None,
        *,
        page_table: Int[AnyArray, "batch pages_per_sequence"] | None = None,
        query_lengths: Int[AnyArray, " batch"] | None = None,
        key_scale: Scale | None = None,
        value_scale: Scale | None = None,
        return_lse: bool,
    ) -> (
        Float[Array, "batch *num_tokens num_q_heads value_dim"]
        | tuple[Float[Array, "batch *num_tokens num_q_heads value_dim"], Float32[Array, "batch *num_tokens num_q_heads"]]
    ): ...
    def __call__(
        self,
        query,
        key,
        value=None,
        sequence_start=None,
        sequence_end=None,
        *,
        page_table=None,
        query_lengths=None,
        key_scale=None,
        value_scale=None,
        return_lse=False,
    ):
        """Calls `ragged_decode_attention` on these arrays, with the module's settings and sinks."""
        if self.sinks is not None and self.sinks.shape[0] != query.shape[-2]:
            raise ValueError(f"query must have the sinks' {self.sinks.shape[0]} heads, got shape {query.shape}.")
        return ragged_decode_attention(
            query,
            key,
            value,
            sequence_start,
            sequence_end,
            self.softmax_scale,
            self.fwd_params,
            self.sliding_window,
            self.logits_soft_cap,
            self.sinks,
            page_table=page_table,
            value_columns=self.value_columns,
            query_lengths=query_lengths,
            key_scale=key_scale,
            value_scale=value_scale,
            backend=self.backend,
            return_lse=return_lse,
        )
