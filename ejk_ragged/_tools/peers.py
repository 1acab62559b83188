"""Other implementations of decode attention, to be held beside ours where they are installed.

Each is a function that takes a `Case` and gives a call `f(query, key, value, start, end, aux)` on JAX arrays, start and end int32
[B], with the result [B, Hq, D]. It raises `CannotExpress` where it has no way to say what the case asks.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ejk_ragged.testing import Case


class CannotExpress(Exception):
    """A peer has no way to say what a case asks for."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation to compare with.

    Attributes:
        name: for reports.
        make: the call for a case; raises `CannotExpress`, or ImportError where it is not installed.
        platforms: where it runs.
        gradients: whether it is compared in gradients too.
        torch: whether it takes PyTorch tensors and JAX cannot trace it; then `make` gives two functions,
            `prepare(query, key, value, start, end)`, which makes the tensors once, and the call, which takes them.
    """

    name: str
    make: Callable[[Case], Any]
    platforms: Sequence[str] = ("cuda",)
    gradients: bool = False
    torch: bool = False


def _needs(case, **features):
    """Refuses the features of a case that are False here: window, cap, sinks, scale."""
    asked = {
        "window": case.sliding_window is not None,
        "cap": case.logits_soft_cap is not None,
        "sinks": case.sinks is not None,
        "start": case.lengths[0] == "ranges",
    }
    missing = [name for name, wanted in asked.items() if wanted and not features.get(name, False)]
    if missing:
        words = {"window": "decode window", "cap": "soft cap", "sinks": "sinks", "start": "start"}
        raise CannotExpress(", ".join(f"no {words[name]}" for name in missing))


def _unless_full(case, end):
    """Lengths, where there is anything to say: without them a peer may be faster."""
    return None if case.lengths == ("full",) else end


def jax_nn(case: Case, implementation: Literal["xla", "cudnn"]):
    """`jax.nn.dot_product_attention`. Its local window stands at the first rows of the cache, not at a sequence's end."""
    _needs(case)

    def call(query, key, value, start, end, aux):
        out = jax.nn.dot_product_attention(
            query[:, None],
            key,
            value,
            scale=case.softmax_scale,
            key_value_seq_lengths=_unless_full(case, end),
            implementation=implementation,
        )
        return out[:, 0]

    return call


def jax_pallas(case: Case):
    """JAX's own example of decode attention in Pallas, for as long as it is there."""
    _needs(case, start=True)
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa

    def call(query, key, value, start, end, aux):
        start = start if case.lengths[0] == "ranges" else None
        return gqa(query, key, value, start_idx=start, kv_seq_len=_unless_full(case, end), sm_scale=case.softmax_scale)

    return call


def tokamax(case: Case):
    _needs(case, cap=True)
    from tokamax import dot_product_attention  # pyright: ignore[reportMissingImports]

    def call(query, key, value, start, end, aux):
        out = dot_product_attention(
            query[:, None],
            key,
            value,
            scale=case.softmax_scale,
            key_value_seq_lengths=_unless_full(case, end),
            logits_soft_cap=case.logits_soft_cap,
        )
        return out[:, 0]

    return call


def ejkernel(case: Case, kind: str):
    """The project whose signature ours follows; its Pallas kernel, and its Triton kernel."""
    import importlib

    if kind == "triton" and case.seq_len > 4096:
        raise CannotExpress("it unrolls its loop over the cache: minutes to compile")
    module = {"pallas": "ejkernel.kernels._pallas.gpu", "triton": "ejkernel.kernels._triton"}[kind]
    function = importlib.import_module(f"{module}.ragged_decode_attention").ragged_decode_attention

    def call(query, key, value, start, end, aux):
        return function(
            query,
            key,
            value,
            start,
            end,
            softmax_scale=case.softmax_scale,
            sliding_window=case.sliding_window,
            logits_soft_cap=case.logits_soft_cap,
            softmax_aux=aux,
        )

    return call


def flash_attention_3(case: Case):
    from flash_attn3_jax import flash_mha_with_kvcache  # pyright: ignore[reportMissingImports]

    _needs(case, window=True)
    left = -1 if case.sliding_window is None else case.sliding_window[0]
    splits = max(1, min(16, 132 // (case.batch * case.num_kv_heads)))  # it leaves the choice to its callers; one a multiprocessor

    def call(query, key, value, start, end, aux):
        results = flash_mha_with_kvcache(
            query[:, None],
            key,
            value,
            cache_seqlens=end,
            softmax_scale=case.softmax_scale,
            is_causal=left >= 0,
            window_size=(left, 0 if left >= 0 else -1),
            num_splits=splits,
        )
        return (results[0] if isinstance(results, tuple | list) else results)[:, 0]

    return call


def torch_sdpa(case: Case):
    """PyTorch's attention on the same memory: as it is where all sequences are full, with a boolean mask where they are not."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import sdpa_kernel, SDPBackend  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        raise CannotExpress("PyTorch sees no GPU")
    _needs(case, window=True, start=True)
    # Not its plain products, which would copy the cache once a query head.
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    options = {"scale": case.softmax_scale, "enable_gqa": case.num_q_heads != case.num_kv_heads}

    def mask(start, end):
        rows = torch.arange(case.seq_len, device=end.device)
        return ((rows >= start[:, None]) & (rows < end[:, None]))[:, None, None]

    def prepare(query, key, value, start, end):
        if case.sliding_window is not None:
            start = jnp.maximum(start, end - 1 - case.sliding_window[0])
        ragged = case.lengths != ("full",)
        tensors = [torch.from_dlpack(x) for x in (query, key, value)]
        q, k, v = tensors[0][:, :, None], tensors[1].transpose(1, 2), tensors[2].transpose(1, 2)
        return q, k, v, mask(torch.from_dlpack(start), torch.from_dlpack(end)) if ragged else None

    def call(q, k, v, attend):
        with torch.no_grad(), sdpa_kernel(kernels):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attend, **options)[:, :, 0]

    return prepare, call


PEERS: tuple[Peer, ...] = (
    Peer("jax.nn cudnn", functools.partial(jax_nn, implementation="cudnn"), gradients=True),
    Peer("jax.nn xla", functools.partial(jax_nn, implementation="xla"), ("cpu", "cuda", "rocm", "tpu"), gradients=True),
    Peer("jax pallas op", jax_pallas),
    Peer("tokamax", tokamax),
    Peer("ejkernel pallas", functools.partial(ejkernel, kind="pallas")),
    Peer("ejkernel triton", functools.partial(ejkernel, kind="triton")),
    Peer("flash-attn3-jax", flash_attention_3),
    Peer("torch sdpa", torch_sdpa, torch=True),
)
