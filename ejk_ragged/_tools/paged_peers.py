"""Other implementations of decode attention over caches in pages, for the list in `peers`. They get our pool and our page table.

Work that a step does not repeat is done once, before: making tensors, and FlashInfer's plans, which follow from lengths and table.
"""

import importlib
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ejk_ragged.testing import Case

from .inputs import pages


WORKSPACE_BYTES = 512 << 20  # FlashInfer recommends 128 MiB, and 32 query heads per kv head need more than 256
TENSOR_CORES_FROM = 4  # query heads per kv head from which FlashInfer is told to use tensor cores, as servers do
BLOCK = 128 * 128  # elements per block of keys in JAX's operation: a multiprocessor has room for two blocks each of keys and values


class CannotExpress(Exception):
    """A case asks for something that a peer has no argument for."""


def tensor(torch: Any, x: jax.Array):
    """A PyTorch tensor that shares the memory of `x`. It is a copy if DLPack has no name for the dtype."""
    if x.dtype.name.startswith("float8"):
        return torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(getattr(torch, x.dtype.name))
    return torch.from_dlpack(x)


def jax_operation(module: str, name: str):
    """An operation of JAX's own Pallas examples for GPUs. JAX has deprecated the examples, so a later JAX may be without them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return getattr(importlib.import_module(f"jax.experimental.pallas.ops.gpu.{module}"), name)
    except Exception as error:  # the module, the function, or one of the module's own imports may be missing
        raise CannotExpress(f"JAX {jax.__version__} has no such operation") from error


def jax_paged(case: Case):
    """JAX's own example of decode attention over pages. It takes kv heads before pages, and a query that is scaled already."""
    paged_attention = jax_operation("paged_attention", "paged_attention")
    assert case.page_size is not None
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    splits = math.gcd(16, pages(case))
    block = math.gcd(max(BLOCK // (case.head_dim * case.page_size), 1), pages(case) // splits)

    def scales(key, scale):
        """A scale with any axes, as [kv heads, pages, rows of a page]."""
        if scale is None:
            return None
        heads_first = scale.swapaxes(0, 1) if scale.ndim == 3 else scale.reshape(-1, 1, 1)
        return jnp.broadcast_to(heads_first, (key.shape[2], *key.shape[:2]))

    def call(query, key, value, sequence_start, sequence_end, page_table, key_scale=None, value_scale=None):
        pools = [pool.transpose(2, 0, 1, 3) for pool in (key, value)]
        return paged_attention(
            query * jnp.asarray(scale, query.dtype),
            *pools,
            page_table,
            sequence_end,
            scales(key, key_scale),
            scales(value, value_scale),
            pages_per_compute_block=block,
            k_splits=splits,
            attn_logits_soft_cap=case.logits_soft_cap,
        )

    return call


def _listed(case: Case, page_table, ends) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FlashInfer's lists: where the pages of each sequence begin, the pages of all sequences, and the rows in each last page."""
    counts = -(-ends // case.page_size)
    first = np.concatenate([[0], np.cumsum(counts)])
    listed = np.concatenate([entries[:count] for entries, count in zip(page_table, counts, strict=True)])
    return first.astype(np.int32), listed.astype(np.int32), (ends - (counts - 1) * case.page_size).astype(np.int32)


def _one_scale(case: Case):
    if case.scales not in (None, "number"):
        raise CannotExpress("one scale for all keys and one for all values only")


def _left(case: Case) -> int:
    return -1 if case.sliding_window is None else case.sliding_window[0]


def flashinfer(case: Case):
    """FlashInfer's wrapper for decode steps."""
    import torch  # pyright: ignore[reportMissingImports]
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # pyright: ignore[reportMissingImports]

    _one_scale(case)
    tensor_cores = case.num_q_heads // case.num_kv_heads >= TENSOR_CORES_FROM or case.cache_dtype is not None
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)

    def prepare(query, key, value, sequence_start, sequence_end, page_table, key_scale=None, value_scale=None):
        listed = _listed(case, np.asarray(page_table), np.asarray(sequence_end))
        query, key, value = (tensor(torch, x) for x in (query, key, value))
        wrapper.plan(
            *map(torch.from_numpy, listed),
            case.num_q_heads,
            case.num_kv_heads,
            case.head_dim,
            case.page_size,
            window_left=_left(case),
            logits_soft_cap=case.logits_soft_cap,
            q_data_type=query.dtype,
            kv_data_type=key.dtype,
            sm_scale=case.softmax_scale,
        )
        scales = {"k_scale": key_scale, "v_scale": value_scale}
        return query, (key, value), {name: float(scale) for name, scale in scales.items() if scale is not None}

    return prepare, lambda query, cache, scales: wrapper.run(query, cache, **scales)


def xqa(case: Case):
    """FlashInfer's newer kernel for decode steps, from TensorRT-LLM. On Hopper its backend is called xqa."""
    import torch  # pyright: ignore[reportMissingImports]
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache  # pyright: ignore[reportMissingImports]

    _one_scale(case)
    tokens = case.num_tokens or 1
    if tokens > 32:
        raise CannotExpress("up to 32 query tokens")
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    options = {"window_left": _left(case), "kv_layout": "NHD", "backend": "xqa", "q_len_per_req": tokens}
    options["max_seq_len"] = pages(case) * (case.page_size or 0)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")  # zeros, because the workspace holds semaphores

    def prepare(query, key, value, sequence_start, sequence_end, page_table, softmax_aux=None, key_scale=1.0, value_scale=1.0):
        given: dict[str, Any] = {"bmm1_scale": scale * float(key_scale), "bmm2_scale": float(value_scale)}
        if softmax_aux is not None:
            given["sinks"] = tensor(torch, softmax_aux.reshape(-1))
        if tokens > 1:
            given["mask"] = tensor(torch, _bits_of_causal_mask(case.batch, tokens)).view(torch.uint16)
        query, key, value = (tensor(torch, x) for x in (query.reshape(-1, *query.shape[-2:]), key, value))
        table, ends = tensor(torch, page_table), tensor(torch, sequence_end).view(torch.uint32)
        return ({"query": query, "kv_cache": (key, value), "block_tables": table, "seq_lens": ends} | given,)

    def call(given):
        out = trtllm_batch_decode_with_kv_cache(workspace_buffer=workspace, **options, **given)
        return out if case.num_tokens is None else out.reshape(case.batch, tokens, *out.shape[-2:])

    return prepare, call


def _bits_of_causal_mask(batch: int, tokens: int) -> jax.Array:
    """The tokens that each token sees, as the bits of two 16-bit integers: [batch, tokens, 2]."""
    bits = ((2 << np.arange(tokens)) - 1).astype(np.uint32).view(np.int16).reshape(tokens, 2)
    return jnp.asarray(np.broadcast_to(bits, (batch, tokens, 2)))


def flashinfer_mla(case: Case):
    """FlashInfer's wrapper for MLA, absorbed. It takes query and cache in two parts each. Here the parts are views of one array."""
    import torch  # pyright: ignore[reportMissingImports]
    from flashinfer.mla import BatchMLAPagedAttentionWrapper  # pyright: ignore[reportMissingImports]

    assert case.value_columns is not None
    first, latent = case.value_columns
    if first or case.num_kv_heads > 1:
        raise CannotExpress("one kv head, and values in the first columns of the key's rows only")
    tokens = case.num_tokens or 1
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    wrapper = BatchMLAPagedAttentionWrapper(torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"))

    def prepare(query, key, sequence_start, sequence_end, page_table):
        ends = np.asarray(sequence_end)
        begins, listed, _ = _listed(case, np.asarray(page_table), ends)
        of_queries = np.arange(case.batch + 1, dtype=np.int32) * tokens
        query = query.reshape(-1, *query.shape[-2:])
        parts = tensor(torch, query[..., :latent]), tensor(torch, query[..., latent:])
        pool = tensor(torch, key)[:, :, 0]
        wrapper.plan(
            *(torch.from_numpy(x) for x in (of_queries, begins, listed, ends.astype(np.int32))),
            case.num_q_heads,
            latent,
            case.head_dim - latent,
            case.page_size,
            causal=tokens > 1,
            sm_scale=scale,
            q_data_type=parts[0].dtype,
            kv_data_type=pool.dtype,
        )
        return *parts, pool[..., :latent], pool[..., latent:]

    def call(*arrays):
        out = wrapper.run(*arrays)
        return out if case.num_tokens is None else out.reshape(case.batch, tokens, *out.shape[-2:])

    return prepare, call
