"""Compiling ahead of time: `eval_shape`, lowering for platforms that this machine lacks, and `jax.export`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import assert_close, draw

from ejk_ragged import ragged_decode_attention
from ejk_ragged.testing import Case


CASE = Case("export", 3, 40, 4, 2, 16, lengths=("uniform", 0, 40), sinks=("query", 1))
function = functools.partial(ragged_decode_attention, sliding_window=(20, 0), logits_soft_cap=2.0, return_lse=True)


def loss(query, key, value, sequence_end, softmax_aux):
    out, _ = function(query, key, value, None, sequence_end, softmax_aux=softmax_aux)
    return jnp.sum(out**2)


def shapes(arrays):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eval_shape(subject, dtype):
    arrays = shapes(draw(Case("", 3, 40, 4, 2, 16, dtype))[0])
    out, lse = jax.eval_shape(functools.partial(subject.call, return_lse=True), **arrays)
    assert (out.shape, out.dtype) == ((3, 4, 16), jnp.dtype(dtype))
    assert (lse.shape, lse.dtype) == ((3, 4), jnp.float32)


def test_eval_shape_of_tokens(subject):
    arrays = shapes(draw(Case("", 3, 40, 4, 2, 16, "bfloat16", num_tokens=5, cache_dtype="int8", scales="row"))[0])
    out, lse = jax.eval_shape(functools.partial(subject.call, return_lse=True), **arrays)
    assert (out.shape, out.dtype) == ((3, 5, 4, 16), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((3, 5, 4), jnp.float32)


def test_eval_shape_of_an_enormous_cache():
    """The cache has more than 2**31 elements, and none of them exists."""
    case = Case("", 8, 2**20, 32, 8, 128, "bfloat16")
    cache = jax.ShapeDtypeStruct((case.batch, case.seq_len, case.num_kv_heads, case.head_dim), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((case.batch, case.num_q_heads, case.head_dim), jnp.bfloat16)
    assert cache.size > 2**31
    assert jax.eval_shape(ragged_decode_attention, query, cache, cache).shape == query.shape


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_lowers_for_any_platform(platform):
    """Forward and backward are lowered for machines other than this one."""
    arrays, _ = draw(CASE)
    lowered = jax.jit(jax.grad(loss, (0, 1, 2, 4))).trace(*shapes(arrays).values()).lower(lowering_platforms=(platform,))
    assert "func.func public @main" in lowered.as_text()


# By default JAX refuses to export a custom call whose meaning might change with the next release. Triton kernels are such calls.
TRITON = [export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "triton_kernel_call")]


@pytest.mark.parametrize(("backend", "checks"), [("auto", TRITON), ("xla", [])])
def test_one_artifact_for_two_platforms(backend, checks):
    """One artifact is exported for cpu and cuda, serialised, read back, and called here."""
    arrays, _ = draw(CASE)
    jitted = jax.jit(functools.partial(function, backend=backend))
    exported = export.export(jitted, platforms=("cpu", "cuda"), disabled_checks=checks)(**shapes(arrays))
    again = export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda")
    assert_close(again.call(**arrays), function(**arrays))


def test_gradients_in_an_artifact():
    arrays, _ = draw(CASE)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 4)))
    exported = export.export(gradients, platforms=("cpu", "cuda"), disabled_checks=TRITON)(*shapes(arrays).values())
    again = export.deserialize(exported.serialize())
    assert_close(again.call(*arrays.values()), gradients(*arrays.values()))


def test_an_artifact_that_can_be_differentiated():
    arrays, _ = draw(CASE)
    exported = export.export(jax.jit(loss))(*shapes(arrays).values())
    again = export.deserialize(exported.serialize(vjp_order=1))
    assert_close(jax.grad(again.call, (0, 1, 2, 4))(*arrays.values()), jax.grad(loss, (0, 1, 2, 4))(*arrays.values()))


@pytest.mark.parametrize("differentiate", [False, True])
def test_symbolic_batch_and_sequence(differentiate):
    """One artifact for any batch and cache length, on the platforms whose backend allows it."""
    batch, seq_len = export.symbolic_shape("b, s")
    aval = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    cache = aval(batch, seq_len, 2, 16)
    symbolic = [aval(batch, 4, 16), cache, cache, aval(batch, dtype=jnp.int32), aval(4, 1)]
    call = jax.grad(loss, (0, 1, 2, 4)) if differentiate else loss
    exported = export.export(jax.jit(call), platforms=("cpu",))(*symbolic)
    again = export.deserialize(exported.serialize())
    for size, length in ((3, 40), (1, 1), (2, 333)):
        arrays, _ = draw(Case("", size, length, 4, 2, 16, lengths=("uniform", 0, length), sinks=("query", 1)))
        assert_close(again.call(*arrays.values()), call(*arrays.values()))


def test_symbolic_tokens_of_a_quantised_cache():
    """One artifact for any number of sequences, tokens and rows."""
    batch, tokens, seq_len = export.symbolic_shape("b, t, s")
    aval = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    cache, scale = aval(batch, seq_len, 2, 16, dtype=jnp.int8), aval(batch, 2, seq_len)
    symbolic = {"query": aval(batch, tokens, 4, 16), "key": cache, "value": cache, "key_scale": scale, "value_scale": scale}
    symbolic |= {name: aval(batch, dtype=jnp.int32) for name in ("sequence_end", "query_lengths")}
    call = functools.partial(ragged_decode_attention, sliding_window=(9, 0), return_lse=True)
    again = export.deserialize(export.export(jax.jit(call), platforms=("cpu",))(**symbolic).serialize())
    for size, count, length in ((3, 2, 40), (1, 1, 1), (2, 5, 333)):
        lengths = tuple(range(count, count - size, -1))
        case = Case("", size, length, 4, 2, 16, "float32", ("uniform", 0, length), num_tokens=count, query_lengths=lengths)
        arrays, _ = draw(dataclasses.replace(case, cache_dtype="int8", scales="row"))
        arrays = {name: arrays[name] for name in symbolic}
        assert_close(again.call(**arrays), call(**arrays))


def test_compiled_ahead_of_time(subject):
    arrays, _ = draw(CASE)
    compiled = jax.jit(functools.partial(subject.call, return_lse=True)).lower(**shapes(arrays)).compile()
    assert_close(compiled(**arrays), subject.call(**arrays, return_lse=True))
    assert np.isfinite(compiled(**arrays)[0]).all()
