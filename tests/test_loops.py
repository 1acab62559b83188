"""Calls inside `lax.scan` and `while_loop`, with a cache that grows and is donated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from support import array, assert_close

from ejk_ragged import quantize, ragged_decode_attention
from ejk_ragged.testing import oracle, TextbookBackend


BATCH, SEQ_LEN, HEADS, KV_HEADS, DIM, STEPS = 2, 16, 4, 2, 8, 6
START = jnp.array([0, 5], jnp.int32)


def tokens():
    """Queries, new keys and new values of every step, and a cache that already holds rows."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: array(rng.standard_normal(shape), jnp.float32)
    steps = normal(STEPS, BATCH, HEADS, DIM), normal(STEPS, BATCH, KV_HEADS, DIM), normal(STEPS, BATCH, KV_HEADS, DIM)
    cache = normal(BATCH, SEQ_LEN, KV_HEADS, DIM), normal(BATCH, SEQ_LEN, KV_HEADS, DIM)
    return steps, cache


def step(call, carry, token):
    """Append one key and value to each sequence, then attend."""
    key, value, end = carry
    query, new_key, new_value = token
    rows = jnp.arange(BATCH, dtype=jnp.int32)
    key, value = key.at[rows, end].set(new_key), value.at[rows, end].set(new_value)
    end = end + jnp.int32(1)
    return (key, value, end), call(query, key, value, START, end, sliding_window=(4, 0))


def by_hand(call=ragged_decode_attention):
    steps, cache = tokens()
    carry, outs = (*cache, START), []
    for i in range(STEPS):
        carry, out = step(call, carry, jax.tree.map(lambda x, i=i: x[i], steps))
        outs.append(out)
    return jnp.stack(outs)


def test_scan(subject):
    steps, cache = tokens()
    _, outs = lax.scan(lambda carry, token: step(subject.call, carry, token), (*cache, START), steps)
    assert_close(outs, by_hand(subject.call))


def test_while_loop():
    """A generation that stops at a condition. Each output becomes part of the next query."""
    steps, cache = tokens()

    def body(state):
        i, carry, query = state
        token = query, steps[1][i], steps[2][i]
        carry, out = step(ragged_decode_attention, carry, token)
        return i + jnp.int32(1), carry, out

    state = (jnp.int32(0), (*cache, START), steps[0][0])
    looped = lax.while_loop(lambda state: state[0] < STEPS, body, state)
    for _ in range(STEPS):
        state = body(state)
    assert_close(looped, state)


def test_gradients_through_a_scan():
    """Earlier steps get gradients from later steps, through the cache."""
    steps, cache = tokens()

    def loss(looped, steps):
        if looped:
            _, outs = lax.scan(lambda carry, token: step(ragged_decode_attention, carry, token), (*cache, START), steps)
            return jnp.sum(outs**2)
        carry, total = (*cache, START), jnp.float32(0)
        for i in range(STEPS):
            carry, out = step(ragged_decode_attention, carry, jax.tree.map(lambda x, i=i: x[i], steps))
            total = total + jnp.sum(out**2)
        return total

    got = jax.grad(lambda steps: loss(True, steps))(steps)
    assert_close(got, jax.grad(lambda steps: loss(False, steps))(steps), 1e-4)
    assert all(np.any(np.asarray(x[0])) for x in got[1:])


def test_donated_caches():
    """The step updates the caches in place: there is no warning, and the buffers stay the same."""
    steps, cache = tokens()
    want = by_hand()
    jitted = jax.jit(lambda carry, token: step(ragged_decode_attention, carry, token), donate_argnums=0)
    carry = jax.tree.map(jnp.copy, (*cache, START))
    for i in range(STEPS):
        before = carry[:2]
        addresses = [x.unsafe_buffer_pointer() for x in before]
        carry, out = jitted(carry, jax.tree.map(lambda x, i=i: x[i], steps))
        assert all(x.is_deleted() for x in before)
        assert [x.unsafe_buffer_pointer() for x in carry[:2]] == addresses
        assert_close(out, want[i])


# ---------------------------------------------------------------------------------------------------------------------------
# A quantised cache that is written while it decodes


def quantised(carry, tokens, call):
    """Steps that each quantise one row per sequence, write the row and its scales at the sequence's end, and attend."""

    def one(carry, token):
        cache, end = carry
        query, *rows = token
        sequence = jnp.arange(BATCH, dtype=jnp.int32)
        for name, row in zip(("key", "value"), rows, strict=True):
            stored, scale = quantize(row)
            cache = cache | {
                name: cache[name].at[sequence, end].set(stored),
                f"{name}_scale": cache[f"{name}_scale"].at[sequence, :, end].set(scale),
            }
        end = end + jnp.int32(1)
        return (cache, end), call(query, **cache, sequence_start=START, sequence_end=end)

    return lax.scan(one, carry, tokens)


def empty(seq_len):
    """An empty cache with scales of NaN: reading a row that was not written shows."""
    rows = lambda: jnp.full((BATCH, seq_len, KV_HEADS, DIM), 99, jnp.int8)
    scales = lambda: jnp.full((BATCH, KV_HEADS, seq_len), jnp.nan, jnp.float32)
    return {"key": rows(), "value": rows(), "key_scale": scales(), "value_scale": scales()}


def test_quantised_cache_written_while_it_decodes(subject):
    steps, _ = tokens()
    run = jax.jit(functools.partial(quantised, call=subject.call), donate_argnums=0)
    before = empty(SEQ_LEN), jnp.copy(START)
    (cache, end), outs = run(before, steps)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    np.testing.assert_array_equal(end, START + STEPS)
    cache: dict[str, Any] = {name: np.asarray(x) for name, x in cache.items()}
    for i in range(STEPS):
        sequence, rows = np.arange(BATCH), np.asarray(START) + i
        for name, written in zip(("key", "value"), steps[1:], strict=True):
            scale = cache[f"{name}_scale"][sequence, :, rows][..., None]
            stands_for = cache[name][sequence, rows] * scale
            assert np.all(np.abs(stands_for - np.asarray(written[i])) <= 0.501 * scale)
        want, _ = oracle(np.asarray(steps[0][i]), **cache, sequence_start=np.asarray(START), sequence_end=rows + 1)
        np.testing.assert_allclose(outs[i], want, rtol=1e-5, atol=1e-5)
    for name, unwritten in empty(SEQ_LEN).items():
        rows = (slice(None), slice(None), slice(11, None)) if name.endswith("scale") else (slice(None), slice(11, None))
        np.testing.assert_array_equal(cache[name][rows], np.asarray(unwritten)[rows])


def test_quantised_cache_is_not_copied():
    """All four arrays are updated in place, and the program's own memory is less than one of them."""
    steps, _ = tokens()
    run = jax.jit(functools.partial(quantised, call=ragged_decode_attention), donate_argnums=0)
    cache = jax.eval_shape(functools.partial(empty, 32768))
    memory = run.lower((cache, START), steps).compile().memory_analysis()
    sizes = [x.size * x.dtype.itemsize for x in cache.values()]
    assert memory is not None
    assert memory.temp_size_in_bytes < min(sizes)
    assert memory.alias_size_in_bytes >= sum(sizes)


def test_eager_calls_transfer_nothing():
    """Also with a window, which is passed with the arrays."""
    query, rows, ends = jnp.ones((1, 2, 8)), jnp.ones((1, 9, 1, 8)), jnp.array([5])
    call = functools.partial(ragged_decode_attention, query, rows, rows, None, ends, backend=TextbookBackend())
    call(sliding_window=(3, 0))
    with jax.transfer_guard("disallow"):
        call()
        call(sliding_window=(3, 0))
