"""The parts that the examples' models share: normalisation, positions, and attention over whole sequences in plain JAX.

Letters of shapes: B sequences, T tokens, Hq query heads, Hkv key/value heads, D head dimension.
"""

import jax
import jax.numpy as jnp


def rms_norm(x, epsilon=1e-6):
    """x [..., width] divided by its root mean square, taken in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def rotate(x, positions, base=1e4):
    """Rotary position embedding of heads x [..., H, D], whose tokens stand at integer positions [...]."""
    half = x.shape[-1] // 2
    frequencies = base ** -jnp.linspace(0, 1, half, endpoint=False, dtype=jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def full_attention(query, key, value, sinks=None, sliding_window=None):
    """Causal attention over whole sequences: query [B, T, Hq, D], key and value [B, T, Hkv, D], sinks [Hq, 1] to [B, T, Hq * D].

    Token i is the query of a decode step whose `sequence_end` is i + 1, with the same sinks and the same window.
    """
    batch, tokens, kv_heads, head_dim = key.shape
    query = query.reshape(batch, tokens, kv_heads, -1, head_dim)  # query head h reads kv head h // (Hq / Hkv)
    logits = jnp.einsum("bihgd,bjhd->bhgij", query, key) * head_dim**-0.5
    distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance <= sliding_window[0]
    logits = jnp.where(visible, logits, -jnp.inf)
    if sinks is None:
        weights = jax.nn.softmax(logits)
    else:
        sinks = jnp.broadcast_to(sinks.reshape(kv_heads, -1, 1, 1), (*logits.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1))[..., :-1]  # a sink is a key without a value
    return jnp.einsum("bhgij,bjhd->bihgd", weights, value).reshape(batch, tokens, -1)
