"""Other implementations of decode attention, to compare with ours where they are installed.

`PEERS` lists the implementations with the features that each can express. Each implementation is a function that takes a `Case` and
returns a call. The call takes JAX arrays by the names of our arguments, and returns a result in the shape of the query. The
implementations for caches in pages are in `paged_peers`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ejk_ragged._formats import QUANTISED
from ejk_ragged.testing import Case

from . import paged_peers
from .inputs import settings
from .paged_peers import CannotExpress, jax_operation, tensor


# The features that a case may ask for, by name: the words for a peer without the feature, and whether a case asks for the feature.
FEATURES: dict[str, tuple[str, Callable[[Case], bool]]] = {
    "padded": ("caches in pages only", lambda case: case.page_size is None),
    "pages": ("no pages", lambda case: case.page_size is not None),
    "window": ("no decode window", lambda case: case.sliding_window is not None),
    "cap": ("no soft cap", lambda case: case.logits_soft_cap is not None),
    "sinks": ("no sinks", lambda case: case.sinks is not None),
    "start": ("no start", lambda case: case.lengths[0] == "ranges"),
    "tokens": ("one query token only", lambda case: case.num_tokens is not None),
    "padding": ("no padding tokens", lambda case: case.query_lengths is not None),
    "widths": ("no value of another width than the key's", lambda case: case.value_dim not in (None, case.head_dim)),
    "latent": ("no values in the key's rows", lambda case: case.value_columns is not None),
    "apart": ("values in the key's rows only", lambda case: case.value_columns is None),
} | {dtype: (f"no {dtype} cache", lambda case, dtype=dtype: case.cache_dtype == dtype) for dtype in QUANTISED}


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation to compare with.

    Attributes:
        name: name in reports.
        make: returns the call for a case. Raises `CannotExpress`, or ImportError if the implementation is not installed.
        able: names of the `FEATURES` that the implementation can express.
        platforms: the platforms on which it runs.
        gradients: whether gradients are compared, too.
        torch: whether the implementation takes PyTorch tensors, so that JAX cannot trace it. `make` then returns two functions:
            `prepare` makes the tensors from the JAX arrays, once, and the call takes the tensors.
    """

    name: str
    make: Callable[[Case], Any]
    able: Sequence[str] = ("padded", "apart")
    platforms: Sequence[str] = ("cuda",)
    gradients: bool = False
    torch: bool = False

    def call(self, case: Case):
        """The call that `make` returns.

        Raises:
            CannotExpress: the case asks for features that the peer lacks. The message names them.
        """
        lacks = [words for name, (words, asked) in FEATURES.items() if asked(case) and name not in self.able]
        if lacks:
            raise CannotExpress(", ".join(lacks))
        return self.make(case)


def _unless_full(case, end):
    """`end`, or None if all sequences are full: a peer may be faster without lengths."""
    return None if case.lengths == ("full",) else end


def _seen(case, start, end, xp=jnp):
    """The mask of the keys that each token sees, [B, 1, T, S]. `xp` is the module of the arrays: `jnp` or `torch`."""
    place = {} if xp is jnp else {"device": end.device}
    rows, back = xp.arange(case.seq_len, **place)[None, None], xp.arange((case.num_tokens or 1) - 1, -1, -1, **place)[None]
    start, end = start[:, None], end[:, None] - back  # of each token
    if case.sliding_window is not None:
        start = xp.maximum(start, end - 1 - case.sliding_window[0])
    return ((rows >= start[..., None]) & (rows < end[..., None]))[:, None]


def _lengths_or_mask(case, start, end) -> dict[str, Any]:
    """The argument with the lengths, or with a mask for several tokens, for `jax.nn` and implementations with the same arguments.

    Several tokens need a mask, because the causal mask and the window of `jax.nn` are aligned with the first rows of the cache and
    not with the end of a sequence.
    """
    return {"mask": _seen(case, start, end)} if case.num_tokens else {"key_value_seq_lengths": _unless_full(case, end)}


def _in_four_axes(call):
    """`call`, which takes and returns [B, T, H, D], as a function that also takes and returns [B, H, D]."""

    @functools.wraps(call)
    def either(query, **rest):
        return call(query, **rest) if query.ndim == 4 else call(query[:, None], **rest)[:, 0]

    return either


def jax_nn(case: Case, implementation: Literal["xla", "cudnn"]):
    """`jax.nn.dot_product_attention`."""

    @_in_four_axes
    def call(query, key, value, sequence_start, sequence_end):
        seen = _lengths_or_mask(case, sequence_start, sequence_end)
        return jax.nn.dot_product_attention(query, key, value, scale=case.softmax_scale, implementation=implementation, **seen)

    return call


def jax_pallas(case: Case):
    """JAX's own example of decode attention in Pallas."""
    gqa = jax_operation("decode_attention", "gqa")

    def call(query, key, value, sequence_start, sequence_end):
        start = sequence_start if case.lengths[0] == "ranges" else None
        return gqa(query, key, value, start_idx=start, kv_seq_len=_unless_full(case, sequence_end), sm_scale=case.softmax_scale)

    return call


def tokamax(case: Case):
    from tokamax import dot_product_attention  # pyright: ignore[reportMissingImports]

    @_in_four_axes
    def call(query, key, value, sequence_start, sequence_end):
        seen = _lengths_or_mask(case, sequence_start, sequence_end)
        return dot_product_attention(query, key, value, scale=case.softmax_scale, logits_soft_cap=case.logits_soft_cap, **seen)

    return call


def ejkernel(case: Case, kind: str):
    """A kernel of ejkernel, whose arguments ours follow: its Pallas kernel or its Triton kernel."""
    import importlib

    if kind == "triton" and case.seq_len > 4096:
        raise CannotExpress("it unrolls its loop over the cache: minutes to compile")
    module = {"pallas": "ejkernel.kernels._pallas.gpu", "triton": "ejkernel.kernels._triton"}[kind]
    function = importlib.import_module(f"{module}.ragged_decode_attention").ragged_decode_attention

    def call(query, key, value, sequence_start, sequence_end, softmax_aux=None):
        return function(query, key, value, sequence_start, sequence_end, softmax_aux=softmax_aux, **settings(case))

    return call


def flash_attention_3(case: Case):
    """FlashAttention-3 for JAX. Its causal mask is aligned with a sequence's end, as ours is. 8-bit caches need 8-bit queries."""
    from flash_attn3_jax import flash_mha_with_kvcache  # pyright: ignore[reportMissingImports]

    left = -1 if case.sliding_window is None else case.sliding_window[0]
    splits = max(1, min(16, 132 // (case.batch * case.num_kv_heads)))  # the caller has to choose: one program per multiprocessor

    @_in_four_axes
    def call(query, key, value, sequence_start, sequence_end):
        results = flash_mha_with_kvcache(
            query,
            key,
            value,
            cache_seqlens=sequence_end,
            softmax_scale=case.softmax_scale,
            is_causal=left >= 0 or case.num_tokens is not None,
            window_size=(left, 0 if left >= 0 else -1),
            num_splits=splits,
        )
        return results[0] if isinstance(results, tuple | list) else results

    return call


def torch_sdpa(case: Case):
    """PyTorch's attention on the same memory. It gets no mask if one token sees all rows, and a boolean mask otherwise."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import sdpa_kernel, SDPBackend  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        raise CannotExpress("PyTorch sees no GPU")
    # All backends but the plain products, which would copy the cache once per query head.
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    options = {"scale": case.softmax_scale, "enable_gqa": case.num_q_heads != case.num_kv_heads}
    several = case.num_tokens is not None
    masked = several or case.sliding_window is not None or case.lengths != ("full",)

    def prepare(query, key, value, sequence_start, sequence_end):
        query, key, value, start, end = map(torch.from_dlpack, (query, key, value, sequence_start, sequence_end))
        query = query.transpose(1, 2) if several else query[:, :, None]
        return query, key.transpose(1, 2), value.transpose(1, 2), _seen(case, start, end, torch) if masked else None

    def call(query, key, value, seen):
        with torch.no_grad(), sdpa_kernel(kernels):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, **options)
        return out.transpose(1, 2) if several else out[:, :, 0]

    return prepare, call


def fa3(case: Case):
    """FlashAttention-3 of the distribution fa3-fwd: forward, bfloat16, without pages and windows. If the value is in the key's
    rows, its query has two parts."""
    import torch  # pyright: ignore[reportMissingImports]
    from fa3_fwd_interface import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

    several, columns = case.num_tokens is not None, case.value_columns and case.value_columns[1]
    if columns and case.value_columns != (0, columns):
        raise CannotExpress("values in the first columns of the key's rows only")
    options = {
        "softmax_scale": case.softmax_scale or case.head_dim**-0.5,
        "softcap": case.logits_soft_cap or 0.0,
        "causal": several,
    }

    def prepare(query, key, sequence_start, sequence_end, value: Any = None):
        query, key, end = (tensor(torch, x) for x in (query if several else query[:, None], key, sequence_end))
        if columns:
            return query[..., columns:], key[..., columns:], key[..., :columns], end, query[..., :columns]
        return query, key, tensor(torch, value), end, None

    def call(query, key, value, end, query_of_value):
        out = flash_attn_with_kvcache(query, key, value, qv=query_of_value, cache_seqlens=end, **options)
        return out if several else out[:, 0]

    return prepare, call


PADDED = ("padded", "apart")
PAGED = ("pages", "apart")
EVERYWHERE = ("cpu", "cuda", "rocm", "tpu")
EJKERNEL = (*PADDED, "window", "cap", "sinks", "start")
PEERS: tuple[Peer, ...] = (
    Peer("jax.nn cudnn", functools.partial(jax_nn, implementation="cudnn"), (*PADDED, "tokens"), gradients=True),
    Peer("jax.nn xla", functools.partial(jax_nn, implementation="xla"), (*PADDED, "tokens"), EVERYWHERE, gradients=True),
    Peer("jax pallas op", jax_pallas, (*PADDED, "start")),
    Peer("jax paged op", paged_peers.jax_paged, (*PAGED, "cap", *QUANTISED)),
    Peer("tokamax", tokamax, (*PADDED, "cap", "tokens")),
    Peer("ejkernel pallas", functools.partial(ejkernel, kind="pallas"), EJKERNEL),
    Peer("ejkernel triton", functools.partial(ejkernel, kind="triton"), EJKERNEL),
    Peer("flash-attn3-jax", flash_attention_3, (*PADDED, "window", "tokens")),
    Peer("fa3", fa3, (*PADDED, "latent", "widths", "cap", "tokens"), torch=True),
    Peer("torch sdpa", torch_sdpa, (*PADDED, "widths", "window", "start", "tokens"), torch=True),
    Peer("flashinfer", paged_peers.flashinfer, (*PAGED, "window", "cap", "float8_e4m3fn", "float8_e5m2"), torch=True),
    Peer("flashinfer xqa", paged_peers.xqa, (*PAGED, "window", "sinks", "tokens", "float8_e4m3fn", "int8"), torch=True),
    Peer("flashinfer mla", paged_peers.flashinfer_mla, ("pages", "latent", "tokens"), torch=True),
)
