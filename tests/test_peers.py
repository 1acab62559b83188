"""The peers that the benchmark holds beside ours: what each is asked, and what it says that it cannot be asked."""

import contextlib
import dataclasses
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ejk_ragged import ragged_decode_attention
from ejk_ragged._tools import inputs, peers
from ejk_ragged.testing import Case, live_rows, TextbookBackend


pytestmark = pytest.mark.usefixtures("promoted_ranks")

TEXTBOOK = TextbookBackend()  # quickly compiled
TINY = Case("tiny", 3, 48, 4, 2, 64, lengths=("uniform", 3, 40))
FEATURES = Case("features", 3, 48, 4, 2, 64, "bfloat16", ("skew", 3, 9), 0.2, (20, 0), 1.5, ("query", 1))


def peer(name):
    (found,) = (p for p in peers.PEERS if p.name == name)
    return found


def verdict(call, case):
    """What the benchmark's check says of a peer's call."""
    drawn = inputs.draw(case, 5, 1, on_device=False)
    return inputs.Sample(case, drawn, gradients=False).compare({"out": call(**drawn.arguments())}, strict=False)


@pytest.mark.parametrize("name", [p.name for p in peers.PEERS])
def test_peers_say_what_they_lack(name):
    """Each either is absent, or makes a call, or says what it cannot express; none takes a soft cap and drops it."""
    if name.startswith("ejkernel") and importlib.util.find_spec("ejkernel"):
        peer(name).make(FEATURES)  # it takes all of it; the oracle decides
        return
    with pytest.raises((peers.CannotExpress, ImportError)):
        peer(name).make(FEATURES)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"sliding_window": (3, 0)}, "no decode window"),
        ({"logits_soft_cap": 5.0}, "no soft cap"),
        ({"sinks": ("query", 1)}, "no sinks"),
        ({"cache_dtype": "int8", "scales": "row"}, "no 8-bit cache"),
        ({"num_tokens": 2, "query_lengths": (1,)}, "no padding tokens"),
    ],
)
def test_jax_nn_cannot_express(change, lacks):
    with pytest.raises(peers.CannotExpress, match=lacks):
        peers.jax_nn(dataclasses.replace(TINY, **change), "xla")


@pytest.mark.parametrize("kind", ["pallas", "triton"])
def test_ejkernel_cannot_express(kind):
    for change, lacks in (({"num_tokens": 2}, "one query token only"), ({"cache_dtype": "int8"}, "no 8-bit cache")):
        with pytest.raises(peers.CannotExpress, match=lacks):
            peers.ejkernel(dataclasses.replace(TINY, **change), kind)


@pytest.mark.parametrize("lengths", [("full",), ("uniform", 1, 9)], ids=str)
@pytest.mark.parametrize("tokens", [None, 1, 4])
def test_jax_nn_is_asked_the_right_question(lengths, tokens):
    """Also where a sequence has fewer rows than tokens."""
    case = dataclasses.replace(TINY, lengths=lengths, num_tokens=tokens)
    found = verdict(peers.jax_nn(case, "xla"), case)
    if lengths != ("full",) and tokens == 4:  # a token that sees nothing has a mean there, and 0 here
        assert not found["ok"]
        case = dataclasses.replace(case, lengths=("uniform", 4, 9))
        found = verdict(peers.jax_nn(case, "xla"), case)
    assert found["ok"]


@pytest.mark.parametrize("window", [None, (2, 0)], ids=str)
def test_the_mask(window):
    """Which keys each token sees, as the oracle has it."""
    case = dataclasses.replace(TINY, num_tokens=3, lengths=("ranges", (0, 9), (4, 6), (8, 8)), sliding_window=window)
    start, end = case.ranges()
    seen = np.asarray(peers._seen(case, jnp.asarray(start), jnp.asarray(end)))
    want = np.zeros((3, 1, 3, 48), bool)
    for b, t in np.ndindex(3, 3):
        want[b, 0, t, live_rows(b, 48, start, end, window, token=t, num_tokens=3)] = True
    np.testing.assert_array_equal(seen, want)


def _theirs(**given):
    """Stands in for a peer's function: whatever they call their arguments, it does what ours does."""
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


CASES = {
    "plain": TINY,
    "full": dataclasses.replace(TINY, lengths=("full",)),
    "features": FEATURES,
    "cap": dataclasses.replace(TINY, logits_soft_cap=1.5),
    "window": dataclasses.replace(TINY, sliding_window=(20, 0)),
    "tokens": dataclasses.replace(TINY, num_tokens=3),
    "tokens window": dataclasses.replace(TINY, num_tokens=3, sliding_window=(20, 0)),
    "int8": dataclasses.replace(TINY, cache_dtype="int8", scales="row"),
}
TAKEN = {
    "tokamax": {"plain", "full", "cap", "tokens"},
    "flash-attn3-jax": {"plain", "full", "window", "tokens", "tokens window"},
    "jax pallas op": {"plain", "full"},
    "ejkernel pallas": {"plain", "full", "features", "cap", "window"},
    "ejkernel triton": {"plain", "full", "features", "cap", "window"},
}
FAKES = {
    "tokamax": ("tokamax", "dot_product_attention", fake_tokamax),
    "flash-attn3-jax": ("flash_attn3_jax", "flash_mha_with_kvcache", fake_flash_attention),
    "jax pallas op": ("jax.experimental.pallas.ops.gpu.decode_attention", "gqa", fake_jax_pallas),
    "ejkernel pallas": ("ejkernel.kernels._pallas.gpu.ragged_decode_attention", "ragged_decode_attention", fake_ejkernel),
    "ejkernel triton": ("ejkernel.kernels._triton.ragged_decode_attention", "ragged_decode_attention", fake_ejkernel),
}


@pytest.mark.parametrize("name", FAKES)
def test_peers_are_asked_the_right_question(name, monkeypatch):
    """With the peer's signature and our meaning behind it, every case that it takes is answered right."""
    module, attribute, function = FAKES[name]
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        if parts[0] != "jax" or i == len(parts):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    setattr(sys.modules[module], attribute, function)
    taken = set()
    for what, case in CASES.items():
        with contextlib.suppress(peers.CannotExpress):
            call = peer(name).make(case)
            assert verdict(call, case)["ok"]
            taken.add(what)
    assert taken == TAKEN[name]


def test_ejkernel_triton_is_spared_long_caches():
    with pytest.raises(peers.CannotExpress, match="unrolls"):
        peers.ejkernel(dataclasses.replace(TINY, seq_len=8192), "triton")
