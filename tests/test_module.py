"""`RaggedDecodeAttention` as a layer: it passes through JAX's and Equinox's transformations, and to a disk and back."""

import dataclasses
import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, draw

from ejk_ragged import FwdParams, ragged_decode_attention, RaggedDecodeAttention
from ejk_ragged.testing import Case


CASE = Case("module", 2, 20, 4, 2, 8, lengths=("ranges", (2, 17), (0, 20)), sinks=("query", 2))
SETTINGS: dict[str, Any] = {
    "softmax_scale": 0.4,
    "sliding_window": (9, 0),
    "logits_soft_cap": 2.0,
    "fwd_params": FwdParams(block_size_keys=16),
    "backend": "xla",
}


def layer(**changes):
    """A layer with every field set, and arguments for it."""
    arrays, _ = draw(CASE)
    return RaggedDecodeAttention(**{"sinks": arrays.pop("softmax_aux")} | SETTINGS | changes), list(arrays.values())


def test_is_the_function():
    module, args = layer()
    want = ragged_decode_attention(*args, **SETTINGS, softmax_aux=module.sinks, return_lse=True)
    assert_close(module(*args, return_lse=True), want)
    assert_close(module(*args), want[0])
    query, key, value, *_ = args
    assert_close(RaggedDecodeAttention()(query, key, value), ragged_decode_attention(query, key, value))
    want = ragged_decode_attention(query, key, value, None, args[4])
    assert_close(RaggedDecodeAttention()(query, key, value, sequence_end=args[4]), want)


def test_tokens_and_quantised_caches():
    case = Case("", 2, 20, 4, 2, 8, "float32", ("ranges", (2, 17), (0, 20)), num_tokens=3, query_lengths=(3, 1))
    for quantised in ({}, {"cache_dtype": "int8", "scales": "row"}):
        arrays, _ = draw(dataclasses.replace(case, **quantised))
        module, _ = layer()
        want = ragged_decode_attention(**arrays, softmax_aux=module.sinks, **SETTINGS, return_lse=True)
        assert_close(eqx.filter_jit(module)(**arrays, return_lse=True), want)


def test_only_the_sinks_are_leaves():
    module, _ = layer()
    (leaf,) = jax.tree.leaves(module)
    assert leaf is module.sinks
    assert jax.tree.leaves(RaggedDecodeAttention(**SETTINGS)) == []


def test_jit():
    module, args = layer()
    want = module(*args)
    assert_close(jax.jit(lambda module, *args: module(*args))(module, *args), want)
    assert_close(eqx.filter_jit(module)(*args), want)
    assert_close(eqx.filter_jit(lambda module, args: module(*args, return_lse=True))(module, args)[0], want)


def test_settings_are_part_of_what_is_compiled():
    traces = []

    @eqx.filter_jit
    def call(module, *args):
        traces.append(module)
        return module(*args)

    for cap in (2.0, 2.0, 1.0):
        module, args = layer(logits_soft_cap=cap)
        call(module, *args)
    assert len(traces) == 2


def test_sinks_learn():
    """Gradient steps on the sinks alone make the output that of other sinks."""
    module, args = layer()
    assert module.sinks is not None
    target = eqx.tree_at(lambda module: module.sinks, module, module.sinks + 1.0)(*args)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(module):
        return jnp.sum((module(*args) - target) ** 2)

    first, gradients = loss(module)
    assert gradients.sinks.shape == module.sinks.shape
    assert eqx.filter_grad(lambda module: jnp.sum((module(*args) - target) ** 2))(module).sinks.dtype == jnp.float32
    value = first
    for _ in range(50):
        value, gradients = loss(module)
        module = eqx.apply_updates(module, jax.tree.map(lambda x: -2.0 * x, gradients))
    assert value < 0.05 * first


def test_an_ensemble_of_sinks():
    module, args = layer()
    assert module.sinks is not None
    stacked = jnp.stack([module.sinks, module.sinks - 1.0])
    ensemble = eqx.filter_vmap(lambda sinks: eqx.tree_at(lambda m: m.sinks, module, sinks))(stacked)
    outs = eqx.filter_vmap(lambda module: module(*args))(ensemble)
    want = [ragged_decode_attention(*args, **SETTINGS, softmax_aux=sinks) for sinks in stacked]
    assert_close(outs, jnp.stack(want))


def test_serialisation():
    module, args = layer()
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, module)
    file.seek(0)
    other, _ = layer(sinks=jnp.zeros((4, 2)))
    assert_close(eqx.tree_deserialise_leaves(file, other)(*args), module(*args))


@pytest.mark.parametrize("backend", [None, "auto", "xla"])
def test_backend_by_name(backend):
    module, args = layer(backend=backend)
    assert_close(module(*args), layer()[0](*args))


def test_no_sinks():
    module, args = layer(sinks=None)
    assert_close(jax.jit(module)(*args), ragged_decode_attention(*args, **SETTINGS))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sliding_window": 7}, ValueError, "sliding_window must be two integers"),
        ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap must be positive"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number"),
        ({"fwd_params": 4}, TypeError, "fwd_params must be an ejk_ragged.FwdParams"),
        ({"sinks": jnp.zeros(4)}, ValueError, r"sinks must be \[num_q_heads, num_sinks\] or None"),
        ({"sinks": 1.0}, ValueError, r"sinks must be \[num_q_heads, num_sinks\] or None, got 1.0"),
    ],
)
def test_checked_on_construction(settings, error, message):
    with pytest.raises(error, match=message):
        RaggedDecodeAttention(**settings)


def test_sinks_of_other_heads():
    """For the function, (Hkv, N) are sinks per kv head. The sinks of a layer are per query head."""
    module, args = layer(sinks=jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"query must have the sinks' 2 heads, got shape \(2, 4, 8\)"):
        module(*args)


def test_unknown_backend_is_said_by_the_call():
    """The call raises, not the construction: a layer may be made where its backend is not installed."""
    module, args = layer(backend="cudnn")
    with pytest.raises(ValueError, match="got 'cudnn'"):
        module(*args)


def test_numpy_arrays():
    module, args = layer()
    assert_close(module(*map(np.asarray, args)), module(*args))
