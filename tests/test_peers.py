"""The peers that the benchmark compares with this package: what each is asked, and what each says that it cannot do."""

import contextlib
import dataclasses
import importlib.util
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from ejk_ragged import ragged_decode_attention
from ejk_ragged._tools import inputs, peers
from ejk_ragged.testing import Case, live_rows, TextbookBackend


pytestmark = pytest.mark.usefixtures("promoted_ranks")

TEXTBOOK = TextbookBackend()  # compiles quickly
TINY = Case("tiny", 3, 48, 4, 2, 64, lengths=("uniform", 3, 40))
FEATURES = Case("features", 3, 48, 4, 2, 64, "bfloat16", ("skew", 3, 9), 0.2, (20, 0), 1.5, ("query", 1))


def peer(name):
    (found,) = (p for p in peers.PEERS if p.name == name)
    return found


def verdict(call, case):
    """The verdict of the benchmark's check on a peer's call."""
    drawn = inputs.draw(case, 5, 1, on_device=False)
    return inputs.Sample(case, drawn, gradients=False).compare({"out": call(**drawn.arguments())}, strict=False)


@pytest.mark.parametrize("name", [p.name for p in peers.PEERS])
def test_peers_say_what_they_lack(name):
    """Each peer is absent, makes a call, or says what it cannot express. No peer takes a soft cap and drops it."""
    if name.startswith("ejkernel") and importlib.util.find_spec("ejkernel"):
        peer(name).call(FEATURES)  # the peer takes all features, and the oracle decides
        return
    with pytest.raises((peers.CannotExpress, ImportError)):
        peer(name).call(FEATURES)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"sliding_window": (3, 0)}, "no decode window"),
        ({"logits_soft_cap": 5.0}, "no soft cap"),
        ({"sinks": ("query", 1)}, "no sinks"),
        ({"cache_dtype": "int8", "scales": "row"}, "no int8 cache"),
        ({"num_tokens": 2, "query_lengths": (1,)}, "no padding tokens"),
        ({"page_size": 16}, "no pages"),
        ({"value_dim": 32}, "no value of another width"),
        ({"value_columns": (0, 32)}, "no values in the key's rows"),
        ({"sliding_window": (3, 0), "logits_soft_cap": 5.0}, "no decode window, no soft cap"),
    ],
)
def test_jax_nn_cannot_express(change, lacks):
    with pytest.raises(peers.CannotExpress, match=lacks):
        peer("jax.nn xla").call(dataclasses.replace(TINY, **change))


@pytest.mark.parametrize("name", [p.name for p in peers.PEERS if "padded" not in p.able])
def test_peers_for_pages_are_not_held_beside_padded_caches(name):
    with pytest.raises(peers.CannotExpress, match="caches in pages only"):
        peer(name).call(TINY)


def test_abilities_are_features():
    """A misspelt ability would count for nothing."""
    assert {able for p in peers.PEERS for able in p.able} <= set(peers.FEATURES)


@pytest.mark.parametrize("kind", ["pallas", "triton"])
def test_ejkernel_cannot_express(kind):
    for change, lacks in (({"num_tokens": 2}, "one query token only"), ({"cache_dtype": "int8"}, "no int8 cache")):
        with pytest.raises(peers.CannotExpress, match=lacks):
            peer(f"ejkernel {kind}").call(dataclasses.replace(TINY, **change))


@pytest.mark.parametrize("lengths", [("full",), ("uniform", 1, 9)], ids=str)
@pytest.mark.parametrize("tokens", [None, 1, 4])
def test_jax_nn_is_asked_the_right_question(lengths, tokens):
    """Also if a sequence has fewer rows than tokens."""
    case = dataclasses.replace(TINY, lengths=lengths, num_tokens=tokens)
    found = verdict(peers.jax_nn(case, "xla"), case)
    if lengths != ("full",) and tokens == 4:  # a token that sees nothing gives a mean in jax.nn, and 0 here
        assert not found["ok"]
        case = dataclasses.replace(case, lengths=("uniform", 4, 9))
        found = verdict(peers.jax_nn(case, "xla"), case)
    assert found["ok"]


@pytest.mark.parametrize("window", [None, (2, 0)], ids=str)
def test_the_mask(window):
    """The mask has the keys that each token sees, by the oracle."""
    case = dataclasses.replace(TINY, num_tokens=3, lengths=("ranges", (0, 9), (4, 6), (8, 8)), sliding_window=window)
    start, end = case.ranges()
    seen = np.asarray(peers._seen(case, jnp.asarray(start), jnp.asarray(end)))
    want = np.zeros((3, 1, 3, 48), bool)
    for b, t in np.ndindex(3, 3):
        want[b, 0, t, live_rows(b, 48, start, end, window, token=t, num_tokens=3)] = True
    np.testing.assert_array_equal(seen, want)


def _theirs(**given):
    """Stands in for a peer's function. Its arguments have the peer's names, and it computes what this package does."""
    given = {name: value for name, value in given.items() if value is not None}
    return ragged_decode_attention(**given, backend=TEXTBOOK)


def fake_tokamax(
    query, key, value, bias=None, mask=None, *, scale=None, key_value_seq_lengths=None, logits_soft_cap=None, implementation=None
):
    if mask is not None:
        assert logits_soft_cap is None
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)
    ours = {"softmax_scale": scale, "sequence_end": key_value_seq_lengths, "logits_soft_cap": logits_soft_cap}
    return _theirs(query=query, key=key, value=value, **ours)


def fake_flash_attention(
    q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, softmax_scale=None, is_causal=False, window_size=(-1, -1), num_splits=1
):
    ours = {"softmax_scale": softmax_scale, "sequence_end": cache_seqlens, "sliding_window": window_size}
    assert is_causal == (window_size != (-1, -1) or q.shape[1] > 1)
    assert num_splits >= 1
    return _theirs(query=q, key=k_cache, value=v_cache, **ours)


def fake_jax_pallas(q, k, v, start_idx=None, kv_seq_len=None, sm_scale=None):
    return _theirs(query=q, key=k, value=v, sequence_start=start_idx, sequence_end=kv_seq_len, softmax_scale=sm_scale)


def fake_ejkernel(query, key, value, sequence_start, sequence_end, **options):
    return _theirs(query=query, key=key, value=value, sequence_start=sequence_start, sequence_end=sequence_end, **options)


def fake_torch():
    """The part of PyTorch that the peers need, with NumPy's arrays as tensors."""
    torch = types.ModuleType("torch")
    float8 = {name: np.dtype(getattr(jnp, name)) for name in ("float8_e4m3fn", "float8_e5m2")}
    numbers = {name: np.dtype(name) for name in ("uint8", "uint16", "uint32")}
    given = {"from_dlpack": np.asarray, "from_numpy": lambda x: x, "zeros": lambda count, dtype, device: np.zeros(1, dtype)}
    vars(torch).update(float8 | numbers | given)
    return torch


def fake_fa3(q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, softmax_scale=None, causal=False, softcap=0.0):
    """The part of FlashAttention-3's signature that is used. The logits of `qv` with the value are added."""
    assert causal == (q.shape[1] > 1)
    rows = {"key": k_cache, "value": v_cache}
    if qv is not None:
        q, rows = np.concatenate([qv, q], -1), {"key": np.concatenate([v_cache, k_cache], -1), "value": v_cache}
    return _theirs(query=q, **rows, sequence_end=cache_seqlens, softmax_scale=softmax_scale, logits_soft_cap=softcap or None)


class FakeWrapper:
    """FlashInfer's wrapper for decode steps: its signatures, and a page table made of its lists."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
        assert kv_layout == "NHD"

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        sm_scale=None,
    ):
        assert {x.dtype.name for x in (indptr, indices, last_page_len)} == {"int32"}
        assert (last_page_len >= 1).all()
        assert (last_page_len <= page_size).all()
        self.dtypes = q_data_type, kv_data_type
        self.given = {
            "page_table": _table_of(indptr, indices),
            "sequence_end": jnp.asarray((np.diff(indptr) - 1) * page_size + last_page_len),
            "sliding_window": None if window_left < 0 else (window_left, 0),
            "logits_soft_cap": logits_soft_cap,
            "softmax_scale": sm_scale,
        }

    def run(self, q, paged_kv_cache, *, k_scale=None, v_scale=None):
        key, value = paged_kv_cache
        assert self.dtypes == (q.dtype, key.dtype)
        return _theirs(query=q, key=key, value=value, key_scale=k_scale, value_scale=v_scale, **self.given)


def _table_of(indptr, indices):
    table = np.zeros((len(indptr) - 1, np.diff(indptr).max()), np.int32)
    for b, (first, end) in enumerate(itertools.pairwise(indptr)):
        table[b, : end - first] = indices[first:end]
    return table


class FakeLatentWrapper:
    """FlashInfer's wrapper for MLA, like `FakeWrapper`."""

    def __init__(self, float_workspace_buffer, use_cuda_graph=False):
        pass

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ):
        assert {x.dtype.name for x in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {"int32"}
        self.tokens = qo_indptr[1]
        assert causal == (self.tokens > 1)
        ours = {"page_table": _table_of(kv_indptr, kv_indices), "sequence_end": jnp.asarray(kv_len_arr), "softmax_scale": sm_scale}
        self.given = ours | {"value_columns": (0, head_dim_ckv), "value": None}

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
        query, pool = np.concatenate([q_nope, q_pe], -1), np.concatenate([ckv_cache, kpe_cache], -1)[:, :, None]
        several = query.reshape(-1, self.tokens, *query.shape[1:])
        out = ragged_decode_attention(several, pool, backend=TEXTBOOK, **self.given)
        return out.reshape(*query.shape[:2], -1)


def fake_xqa(
    query,
    kv_cache,
    workspace_buffer,
    block_tables,
    seq_lens,
    max_seq_len,
    bmm1_scale=1.0,
    bmm2_scale=1.0,
    window_left=-1,
    sinks=None,
    kv_layout="HND",
    backend="auto",
    q_len_per_req=1,
    mask=None,
):
    """The signature of xqa. The output is scaled at the end, and the mask has a bit for each token that a token sees."""
    (key, value), tokens = kv_cache, q_len_per_req
    assert (kv_layout, backend, seq_lens.dtype) == ("NHD", "xqa", np.uint32)
    assert max_seq_len == block_tables.shape[1] * key.shape[1]
    if tokens > 1:
        assert np.asarray(mask).dtype == np.uint16
        seen = np.unpackbits(np.ascontiguousarray(np.asarray(mask)).view(np.uint8), axis=-1, bitorder="little")[..., :tokens]
        assert (seen == np.tri(tokens)).all()
        query = query.reshape(-1, tokens, *query.shape[1:])
    quantised = {"key_scale": 1.0, "value_scale": 1.0} if key.dtype != query.dtype else {}
    ours = {"page_table": block_tables, "sequence_end": seq_lens.astype(np.int32), "softmax_scale": bmm1_scale, **quantised}
    ours |= {"softmax_aux": None if sinks is None else sinks[:, None]}
    window = None if window_left < 0 else (window_left, 0)
    out = bmm2_scale * _theirs(query=query, key=key, value=value, sliding_window=window, **ours)
    return out if tokens == 1 else out.reshape(-1, *out.shape[2:])


def fake_jax_paged(
    q,
    k_pages,
    v_pages,
    block_tables,
    lengths,
    k_scales_pages=None,
    v_scales_pages=None,
    *,
    pages_per_compute_block=8,
    k_splits=16,
    attn_logits_soft_cap=None,
):
    """Its query is already scaled."""
    assert block_tables.shape[1] % k_splits == 0
    assert block_tables.shape[1] // k_splits % pages_per_compute_block == 0
    scales = [None if scale is None else scale.swapaxes(0, 1) for scale in (k_scales_pages, v_scales_pages)]
    return _theirs(
        query=q,
        key=k_pages.transpose(1, 2, 0, 3),
        value=v_pages.transpose(1, 2, 0, 3),
        page_table=block_tables,
        sequence_end=lengths,
        softmax_scale=1.0,
        logits_soft_cap=attn_logits_soft_cap,
        key_scale=scales[0],
        value_scale=scales[1],
    )


IN_PAGES = dataclasses.replace(TINY, seq_len=50, page_size=16)
LATENT = dataclasses.replace(TINY, num_kv_heads=1, softmax_scale=0.2, value_columns=(0, 48))
E4M3 = {"dtype": "bfloat16", "cache_dtype": "float8_e4m3fn"}
CASES = {
    "plain": TINY,
    "full": dataclasses.replace(TINY, lengths=("full",)),
    "features": FEATURES,
    "cap": dataclasses.replace(TINY, logits_soft_cap=1.5),
    "window": dataclasses.replace(TINY, sliding_window=(20, 0)),
    "tokens": dataclasses.replace(TINY, num_tokens=3),
    "tokens window": dataclasses.replace(TINY, num_tokens=3, sliding_window=(20, 0)),
    "int8": dataclasses.replace(TINY, cache_dtype="int8", scales="row"),
    "narrow": dataclasses.replace(TINY, value_dim=32),
    "latent": LATENT,
    "latent tokens": dataclasses.replace(LATENT, num_tokens=3),
    "pages": IN_PAGES,
    "pages full": dataclasses.replace(IN_PAGES, lengths=("full",), softmax_scale=0.2),
    "pages window": dataclasses.replace(IN_PAGES, sliding_window=(20, 0)),
    "pages cap": dataclasses.replace(IN_PAGES, logits_soft_cap=1.5),
    "pages sinks": dataclasses.replace(IN_PAGES, sinks=("query", 1)),
    "pages tokens": dataclasses.replace(IN_PAGES, num_tokens=3),
    "pages int8": dataclasses.replace(IN_PAGES, cache_dtype="int8", scales="number"),
    "pages int8 rows": dataclasses.replace(IN_PAGES, cache_dtype="int8", scales="row"),
    "pages e4m3": dataclasses.replace(IN_PAGES, **E4M3, scales="number"),
    "pages latent": dataclasses.replace(LATENT, page_size=16),
    "pages latent tokens": dataclasses.replace(LATENT, page_size=16, num_tokens=3),
}
TAKEN = {
    "fa3": {"plain", "full", "cap", "tokens", "narrow", "latent", "latent tokens"},
    "flashinfer": {"pages", "pages full", "pages window", "pages cap", "pages e4m3"},
    "flashinfer xqa": {
        *("pages", "pages full", "pages window", "pages sinks", "pages tokens"),
        *("pages int8", "pages e4m3"),
    },
    "flashinfer mla": {"pages latent", "pages latent tokens"},
    "jax paged op": {"pages", "pages full", "pages cap", "pages int8", "pages int8 rows", "pages e4m3"},
    "tokamax": {"plain", "full", "cap", "tokens"},
    "flash-attn3-jax": {"plain", "full", "window", "tokens", "tokens window"},
    "jax pallas op": {"plain", "full"},
    "ejkernel pallas": {"plain", "full", "features", "cap", "window"},
    "ejkernel triton": {"plain", "full", "features", "cap", "window"},
}
FAKES = {
    "fa3": ("fa3_fwd_interface", "flash_attn_with_kvcache", fake_fa3),
    "flashinfer": ("flashinfer", "BatchDecodeWithPagedKVCacheWrapper", FakeWrapper),
    "flashinfer xqa": ("flashinfer.decode", "trtllm_batch_decode_with_kv_cache", fake_xqa),
    "flashinfer mla": ("flashinfer.mla", "BatchMLAPagedAttentionWrapper", FakeLatentWrapper),
    "jax paged op": ("jax.experimental.pallas.ops.gpu.paged_attention", "paged_attention", fake_jax_paged),
    "tokamax": ("tokamax", "dot_product_attention", fake_tokamax),
    "flash-attn3-jax": ("flash_attn3_jax", "flash_mha_with_kvcache", fake_flash_attention),
    "jax pallas op": ("jax.experimental.pallas.ops.gpu.decode_attention", "gqa", fake_jax_pallas),
    "ejkernel pallas": ("ejkernel.kernels._pallas.gpu.ragged_decode_attention", "ragged_decode_attention", fake_ejkernel),
    "ejkernel triton": ("ejkernel.kernels._triton.ragged_decode_attention", "ragged_decode_attention", fake_ejkernel),
}


def install_fake(name, monkeypatch):
    module, attribute, function = FAKES[name]
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        if parts[0] != "jax" or i == len(parts):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    setattr(sys.modules[module], attribute, function)
    monkeypatch.setitem(sys.modules, "torch", fake_torch())


@pytest.mark.parametrize("name", FAKES)
def test_peers_are_asked_the_right_question(name, monkeypatch):
    """A stand-in has the peer's signature and our computation. Every case that the peer takes must be right."""
    install_fake(name, monkeypatch)
    taken = set()
    for what, case in CASES.items():
        with contextlib.suppress(peers.CannotExpress):
            made = peer(name).call(case)
            assert verdict(_called(made) if peer(name).torch else made, case)["ok"]
            taken.add(what)
    assert taken == TAKEN[name]


def _called(made):
    """A call with JAX arrays of the two functions of a PyTorch peer."""
    prepare, call = made
    return lambda **arguments: call(*prepare(**arguments))


def test_ejkernel_triton_is_spared_long_caches():
    with pytest.raises(peers.CannotExpress, match="unrolls"):
        peers.ejkernel(dataclasses.replace(TINY, seq_len=8192), "triton")


@pytest.mark.parametrize(
    ("name", "case", "lacks"),
    [
        ("flashinfer xqa", dataclasses.replace(IN_PAGES, num_tokens=33), "up to 32 query tokens"),
        ("flashinfer xqa", CASES["pages int8 rows"], "one scale for all keys"),
        ("flashinfer", dataclasses.replace(CASES["pages e4m3"], scales="head"), "one scale for all keys"),
        ("flashinfer mla", dataclasses.replace(CASES["pages latent"], value_columns=(16, 64)), "in the first columns"),
        ("fa3", dataclasses.replace(LATENT, value_columns=(16, 64)), "in the first columns"),
    ],
    ids=str,
)
def test_what_only_some_cases_ask(name, case, lacks, monkeypatch):
    install_fake(name, monkeypatch)
    with pytest.raises(peers.CannotExpress, match=lacks):
        peer(name).call(case)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # by JAX 0.11
@pytest.mark.parametrize("dtypes", [{}, {"cache_dtype": "int8", "scales": "row"}], ids=["bfloat16", "int8"])
def test_jax_lowers_its_own_peer_for_pages(dtypes):
    """The operation exists, takes these arguments, and lowers to a GPU kernel. No GPU is needed for this."""
    case = Case("", 2, 256, 8, 2, 64, "bfloat16", ("uniform", 1, 256), page_size=16, **dtypes)
    drawn = inputs.draw(case, 5, 1, on_device=False)
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        lowered = jax.jit(peer("jax paged op").call(case)).trace(**drawn.arguments()).lower(lowering_platforms=("cuda",))
    assert "paged_attention" in lowered.as_text()
