"""A model of Llama's kind in Equinox that decodes with `ragged_decode_attention`. `smollm2.py` writes with it.

- `extend` is prefill, decode step and verification of drafts in one function. It takes T tokens per sequence, and the number of
  tokens that each sequence has. The cache is a `KVCache`, padded or in pages, of any dtype. Layers are a `lax.scan`. One cache
  holds the rows of all layers, one layer after another. A layer is a start and an end in the cache, so no layer is sliced out.
- `whole` is the same model over whole sequences, in plain JAX and without a cache. It is for comparison.

Letters of shapes: B sequences, T tokens, R rows of a cache, Hq query heads, Hkv key/value heads, D head dimension.
"""

import dataclasses
import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
from transformer import full_attention, rms_norm, rotate

from ejk_ragged import KVCache, ragged_decode_attention


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model of Llama's kind."""

    layers: int
    width: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_base: float = 1e4
    epsilon: float = 1e-5


class Block(eqx.Module):
    """Attention, then a multilayer perceptron. Each of them reads the normalised residual stream and adds to the stream."""

    before_attention: jax.Array  # [width]
    to_heads: jax.Array  # [width, (Hq + 2 Hkv) * D]
    from_heads: jax.Array  # [Hq * D, width]
    before_mlp: jax.Array  # [width]
    up: jax.Array  # [width, 2 * hidden], gates first
    down: jax.Array  # [hidden, width]
    config: Config = eqx.field(static=True)

    def heads(self, x, positions):
        """Query [B, T, Hq, D], key and value [B, T, Hkv, D] of the stream x [B, T, width]."""
        c = self.config
        x = (rms_norm(x, c.epsilon) * self.before_attention) @ self.to_heads
        x = x.reshape(*x.shape[:2], -1, c.head_dim)
        query, key, value = jnp.split(x, [c.query_heads, c.query_heads + c.kv_heads], axis=2)
        return rotate(query, positions, c.rope_base), rotate(key, positions, c.rope_base), value

    def finish(self, x, attended):
        """Adds the heads' outputs [B, T, Hq, D] and the perceptron to the stream. Returns the stream."""
        x = x + attended.reshape(*x.shape[:2], -1) @ self.from_heads
        gate, up = jnp.split((rms_norm(x, self.config.epsilon) * self.before_mlp) @ self.up, 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ self.down


class Model(eqx.Module):
    """Tokens in, logits of the next token out. `blocks` is a list, or one `Block` whose arrays have all layers, to scan over."""

    embedding: jax.Array  # [vocabulary, width]
    blocks: list[Block] | Block
    before_head: jax.Array  # [width]
    head: jax.Array  # [vocabulary, width]; SmolLM2's is the embedding
    config: Config = eqx.field(static=True)

    def stacked(self):
        """The same model with its layers stacked, for a scan."""
        assert isinstance(self.blocks, list)
        return dataclasses.replace(self, blocks=jax.tree.map(lambda *x: jnp.stack(x), *self.blocks))

    def logits(self, x):
        x = rms_norm(x, self.config.epsilon) * self.before_head
        return jnp.einsum("btw,vw->btv", x, self.head, preferred_element_type=jnp.float32)


def ours(query, cache, start, end, new, fwd_params=None):
    call = {"sequence_start": start, "sequence_end": end, "query_lengths": new, "fwd_params": fwd_params}
    return ragged_decode_attention(query, **call, **cache.arguments())


def extend(model, cache, tokens, lengths, new, attention=ours):
    """Runs the model on tokens [B, T]. Returns the stream [B, T, width], and the cache with the new tokens.

    The first `new` [B] tokens of each sequence are there. They follow the `lengths` [B] tokens in the cache. The cache is one
    `KVCache` with the rows of all layers, or a list of caches for layers without a scan. If the list is shorter than the list of
    layers, several layers share a cache. That is for measurements only.
    """
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])

    def layer(x, block, cache, first):
        dtype = x.dtype if cache.key.dtype.itemsize == 1 else cache.key.dtype  # `write` rounds to 8 bits
        query, key, value = (heads.astype(dtype) for heads in block.heads(x, positions))
        cache = cache.write(key, value, at=first + lengths, lengths=new)
        start = None if isinstance(first, int) else jnp.full_like(lengths, first)
        attended = attention(query, cache, start, first + lengths + new, new)
        return block.finish(x, attended.astype(x.dtype)), cache

    x = model.embedding[tokens]
    if isinstance(cache, list):
        cache = list(cache)
        for i, block in enumerate(model.blocks):
            x, cache[i % len(cache)] = layer(x, block, cache[i % len(cache)], 0)
        return x, cache
    layers = model.config.layers
    firsts = jnp.arange(layers, dtype=jnp.int32) * (cache.seq_len // layers)
    return jax.lax.scan(lambda carry, xs: (layer(carry[0], xs[0], carry[1], xs[1]), None), (x, cache), (model.blocks, firsts))[0]


@functools.partial(jax.jit, static_argnames="attention", donate_argnames="cache")
def step(model, cache, tokens, lengths, new, wanted, attention=ours):
    """`extend`, and the likeliest token after each of the tokens numbered `wanted` [B, N]."""
    x, cache = extend(model, cache, tokens, lengths, new, attention)
    x = jnp.take_along_axis(x, wanted[..., None], axis=1)
    return jnp.argmax(model.logits(x), axis=-1).astype(jnp.int32), cache


@jax.jit
def whole(model, tokens):
    """Logits [B, T, vocabulary] of whole sequences [B, T], by full attention, without a cache."""
    positions = jnp.arange(tokens.shape[1])[None]

    def layer(x, block):
        return block.finish(x, full_attention(*block.heads(x, positions))), None

    return model.logits(jax.lax.scan(layer, model.embedding[tokens], model.blocks)[0])


def random_model(config: Config, key, dtype="float32"):
    """A model with random weights. Its layers are in a list."""
    keys = (jax.random.fold_in(key, i) for i in itertools.count())
    ones = jnp.ones(config.width, dtype)
    weights = lambda fan_in, *shape: jax.random.normal(next(keys), shape, dtype) * fan_in**-0.5
    width, hidden, heads = config.width, config.hidden, config.query_heads * config.head_dim

    def block():
        to_heads = weights(width, width, heads + 2 * config.kv_heads * config.head_dim)
        mlp = weights(width, width, 2 * hidden), weights(hidden, hidden, width)
        return Block(ones, to_heads, weights(heads, heads, width), ones, *mlp, config)

    embedding, head = (weights(width, config.vocabulary, width) for _ in range(2))
    return Model(embedding, [block() for _ in range(config.layers)], ones, head, config)


def without_rows(cache):
    """The cache full of NaN. An int8 cache gets scales of NaN. A row that is read before it is written then shows in the result."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0), cache)


def empty_cache(model, batch, rows, dtype, parts=None):
    """An empty cache for `extend` and this model: one cache, or a list of `parts` caches."""
    c = model.config
    empty = lambda rows: without_rows(KVCache.zeros(batch, rows, c.kv_heads, c.head_dim, dtype=dtype))
    return [empty(rows) for _ in range(parts or c.layers)] if isinstance(model.blocks, list) else empty(c.layers * rows)
