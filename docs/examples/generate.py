"""Train a small language model, then let it write with a KV cache and `RaggedDecodeAttention`.

A byte-level transformer learns from the Python reference that comes with every Python (`pydoc_data.topics`), in about two minutes
on two cores. Then it continues a batch of prompts of different lengths, one byte per step. Each sequence has its own place in a
padded KV cache:

    python docs/examples/generate.py
    python docs/examples/generate.py --prompt "A list is " --prompt "To open a file, " --temperature 0.6

What to look at, in the order of the file:

- `Block` owns one `RaggedDecodeAttention`: eight query heads share two key/value heads, every second block looks back over a short
  window only, and each query head has a sink that it learns.
- `full_attention`, in `transformer.py` beside this file, is the same attention over whole sequences, in plain JAX. Training uses
  it, with the module's window and sinks.
- `write_cached` is the decode loop: a `lax.scan` under `jit` that owns (donates) its cache. The cache begins as NaN: rows outside
  a sequence's own range are never used, so nothing has to clear them.
- `write_recomputed` writes the same bytes the slow way, with full attention over everything at every step.

The last two must agree, byte for byte. The program says whether they do, and exits with 1 if they do not.
"""

import argparse
import dataclasses
import functools
import math
import pydoc_data.topics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from transformer import full_attention, rms_norm, rotate

from ejk_ragged import RaggedDecodeAttention


PROMPTS = (
    "The ",
    "An exception ",
    "A class definition ",
    "When a function is called, ",
    "The following example shows how the ",
    "If an error occurs while the module is imported, ",
)


# ---------------------------------------------------------------------------------------------------------------------------
# The model. Letters of shapes: B sequences, T tokens, S rows of the cache, Hq query heads, Hkv key/value heads, D head dimension.


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model."""

    context: int = 256
    layers: int = 4
    width: int = 128
    query_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 16
    window: int = 32  # keys that every second block sees


class Block(eqx.Module):
    """Attention, then a multilayer perceptron. Each of them reads the normalised residual stream and adds to the stream."""

    to_query: jax.Array
    to_key: jax.Array
    to_value: jax.Array
    from_heads: jax.Array
    up: jax.Array
    down: jax.Array
    attend: RaggedDecodeAttention

    def __init__(self, config: Config, window: int | None, key):
        keys = iter(jax.random.split(key, 6))

        def weights(fan_in, *shape, scale=1.0):
            return scale * fan_in**-0.5 * jax.random.normal(next(keys), (fan_in, *shape), jnp.float32)

        heads = config.query_heads * config.head_dim
        quiet = (2 * config.layers) ** -0.5  # what is added to the residual stream starts small
        self.to_query = weights(config.width, config.query_heads, config.head_dim)
        self.to_key = weights(config.width, config.kv_heads, config.head_dim)
        self.to_value = weights(config.width, config.kv_heads, config.head_dim)
        self.from_heads = weights(heads, config.width, scale=quiet)
        self.up = weights(config.width, 4 * config.width)
        self.down = weights(4 * config.width, config.width, scale=quiet)
        self.attend = RaggedDecodeAttention(
            sinks=jnp.zeros((config.query_heads, 1), jnp.float32),
            sliding_window=None if window is None else (window - 1, 0),  # the query's own key, and `window - 1` before it
        )

    def heads(self, x, positions):
        """Query [..., Hq, D], key and value [..., Hkv, D] of the stream x [..., width]."""
        x = rms_norm(x)
        query, key, value = (jnp.tensordot(x, to, axes=1) for to in (self.to_query, self.to_key, self.to_value))
        return rotate(query, positions), rotate(key, positions), value

    def finish(self, x, attended):
        """Adds the heads' outputs [..., Hq * D] and the perceptron to the stream x [..., width]. Returns the stream."""
        x = x + attended @ self.from_heads
        return x + jax.nn.relu(rms_norm(x) @ self.up) ** 2 @ self.down

    def whole(self, x):
        """Whole sequences. Returns the stream x [B, T, width], and key and value [B, T, Hkv, D] for a cache."""
        query, key, value = self.heads(x, jnp.arange(x.shape[1]))
        attended = full_attention(query, key, value, self.attend.sinks, self.attend.sliding_window)
        return self.finish(x, attended), (key, value)

    def step(self, x, cache, lengths):
        """One more token per sequence, x [B, width]. The two cache arrays [B, S, Hkv, D] hold `lengths` [B] tokens before it."""
        query, new_key, new_value = self.heads(x, lengths)
        rows = jnp.arange(len(lengths)), lengths  # each sequence writes at its own end
        key, value = cache[0].at[rows].set(new_key), cache[1].at[rows].set(new_value)
        attended = self.attend(query, key, value, sequence_end=lengths + 1)
        return self.finish(x, attended.reshape(len(lengths), -1)), (key, value)


class Model(eqx.Module):
    """Bytes in, logits of the next byte out."""

    embedding: jax.Array
    blocks: list[Block]

    def __init__(self, config: Config, key):
        key, *keys = jax.random.split(key, config.layers + 1)
        self.embedding = config.width**-0.5 * jax.random.normal(key, (256, config.width), jnp.float32)
        self.blocks = [Block(config, config.window if i % 2 == 0 else None, k) for i, k in enumerate(keys)]

    def whole(self, tokens):
        """Logits [B, T, 256] after each of tokens [B, T], and every block's key and value."""
        x, cache = self.embedding[tokens], []
        for block in self.blocks:
            x, key_value = block.whole(x)
            cache.append(key_value)
        return rms_norm(x) @ self.embedding.T, cache

    def step(self, tokens, cache, lengths):
        """Logits [B, 256] after one more token [B] in each sequence, and the cache that holds it."""
        x, new_cache = self.embedding[tokens], []
        for block, key_value in zip(self.blocks, cache, strict=True):
            x, key_value = block.step(x, key_value, lengths)
            new_cache.append(key_value)
        return rms_norm(x) @ self.embedding.T, new_cache


# ---------------------------------------------------------------------------------------------------------------------------
# Training


def bits_per_byte(model, text):
    """Mean cross-entropy of each byte of text [B, T + 1] but the first, in bits."""
    log_probabilities = jax.nn.log_softmax(model.whole(text[:, :-1])[0])
    return -jnp.mean(jnp.take_along_axis(log_probabilities, text[:, 1:, None], axis=-1)) / math.log(2)


@functools.partial(jax.jit, donate_argnames=("model", "moments"))
def train_step(model, moments, text, step, rate):
    """One step of Adam. Returns the new model, the new moments, and the loss before the step."""
    loss, gradient = jax.value_and_grad(bits_per_byte)(model, text)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
    second = jax.tree.map(lambda v, g: 0.98 * v + 0.02 * g * g, moments[1], gradient)

    def update(p, m, v):
        return p - rate * (m / (1 - 0.9**step)) / (jnp.sqrt(v / (1 - 0.98**step)) + 1e-8)

    return jax.tree.map(update, model, first, second), (first, second), loss


def train(model, text, context, steps, seed, batch=4, peak_rate=3e-3):
    """The model after `steps` batches of pieces of `text`, drawn at random."""
    rng = np.random.default_rng(seed)
    moments = (jax.tree.map(jnp.zeros_like, model), jax.tree.map(jnp.zeros_like, model))
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        places = rng.integers(len(text) - context, size=batch)
        pieces = text[places[:, None] + np.arange(context + 1)]
        rate = peak_rate * min(step / 50, 1, 1.02 - step / steps)  # up quickly, then down to nearly nothing
        model, moments, loss = train_step(model, moments, pieces, np.float32(step), np.float32(rate))
        show_progress(step, steps, time.perf_counter() - begin, f"{loss:.2f} bits/byte")
    return model


def show_progress(done, total, elapsed, note):
    """Shows progress: one bar on a terminal, and ten lines elsewhere."""
    on_terminal = sys.stdout.isatty()
    if on_terminal or 10 * done // total > 10 * (done - 1) // total:
        left = elapsed / done * (total - done)
        bar = "#" * (30 * done // total)
        line = f"  [{bar:30}] {done}/{total}, {note}, {elapsed:.0f} s, {left:.0f} s left"
        print(line.ljust(79) if on_terminal else line, end="\r" if on_terminal and done < total else "\n", flush=True)


# ---------------------------------------------------------------------------------------------------------------------------
# Writing: two ways that must agree


def score(logits, temperature, key):
    """Scores [B, 256] whose largest is the next byte: the logits, or a draw from their softmax at a temperature above 0."""
    return logits + temperature * jax.random.gumbel(key, logits.shape, logits.dtype)


def empty_cache(config: Config, batch, rows):
    """A cache of NaN. A row that is read before it is written then shows in the result."""
    shape = (batch, rows, config.kv_heads, config.head_dim)
    return [(jnp.full(shape, jnp.nan, jnp.float32), jnp.full(shape, jnp.nan, jnp.float32)) for _ in range(config.layers)]


@functools.partial(jax.jit, donate_argnames="cache")
def write_cached(model, cache, prompts, lengths, temperature, keys):
    """Continues prompts [B, T] of `lengths` [B] bytes, padded on the right. Writes one byte per random key.

    Returns the bytes [steps, B] with their scores [steps, B, 256], and the cache.
    """
    logits, prefix = model.whole(prompts)
    logits = logits[jnp.arange(len(lengths)), lengths - 1]
    # The padding's keys and values get into the cache too. They lie past the sequence's end, and are overwritten as it grows.
    cache = jax.tree.map(lambda rows, new: rows.at[:, : new.shape[1]].set(new), cache, prefix)

    def step(carry, key):
        logits, cache, lengths = carry
        scores = score(logits, temperature, key)
        tokens = jnp.argmax(scores, axis=-1)
        logits, cache = model.step(tokens, cache, lengths)
        return (logits, cache, lengths + 1), (tokens, scores)

    (_, cache, _), written = jax.lax.scan(step, (logits, cache, lengths), keys)
    return written, cache


@jax.jit
def write_recomputed(model, prompts, lengths, temperature, keys):
    """Writes the same as `write_cached`, by full attention over whole sequences at every step."""
    sequences = jnp.arange(len(lengths))

    def step(carry, key):
        text, lengths = carry
        logits, _ = model.whole(text)
        scores = score(logits[sequences, lengths - 1], temperature, key)
        tokens = jnp.argmax(scores, axis=-1)
        return (text.at[sequences, lengths].set(tokens), lengths + 1), (tokens, scores)

    text = jnp.pad(prompts, ((0, 0), (0, len(keys))))
    _, written = jax.lax.scan(step, (text, lengths), keys)
    return written


def timed(function, *args):
    """The result of a jitted function, and its time in seconds without compilation."""
    compiled = function.lower(*args).compile()
    begin = time.perf_counter()
    result = jax.block_until_ready(compiled(*args))
    return result, time.perf_counter() - begin


def disagreements(written, expected, tolerance=1e-3):
    """The faults of `written` (bytes [steps, B] and scores [steps, B, 256]), one line per fault, and the largest error of a score.

    If two bytes differ, the gap between their expected scores says why. A small gap is a near-tie, which rounding can turn. A large
    gap is a mistake. The bytes after a difference are not compared, because the two sequences differ from there on.
    """
    (tokens, scores), (expected_tokens, expected_scores) = jax.device_get((written, expected))
    same = tokens == expected_tokens
    comparable = np.cumprod(np.concatenate([np.ones_like(same[:1]), same[:-1]]), axis=0, dtype=bool)
    error = np.abs(scores - expected_scores)[comparable].max()
    lines = [] if error <= tolerance else [f"scores differ by {error:.2g}, more than {tolerance:g}"]
    for step, b in np.argwhere(comparable & ~same):
        got, best = tokens[step, b], expected_tokens[step, b]
        gap = expected_scores[step, b, best] - expected_scores[step, b, got]
        lines.append(f"prompt {b}, byte {step}: {bytes([got])} in place of {bytes([best])}, whose score is higher by {gap:.2g}")
    return lines, error


# ---------------------------------------------------------------------------------------------------------------------------
# The program


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Train a small language model, let it write with a KV cache, and check what it wrote."
    )
    option = parser.add_argument
    option("--steps", type=int, default=1600, help="training steps [%(default)s, about two minutes on two cores]")
    option("--prompt", action="append", help="a prompt to continue; give several for a batch [six of our own]")
    option("--tokens", type=int, default=200, help="bytes to write after each prompt [%(default)s]")
    option("--temperature", type=float, default=0.0, help="0 takes the likeliest byte, 1 draws as the model predicts [%(default)s]")
    option("--seed", type=int, default=0, help="seed of weights, training and draws [%(default)s]")
    options = parser.parse_args(argv)
    options.prompt = options.prompt or PROMPTS
    if min(options.steps, options.tokens, *map(len, options.prompt)) < 1:
        parser.error("--steps and --tokens must be at least 1, and a --prompt must not be empty")
    return options


def main(argv=None) -> int:
    """Train, write, check. Returns the exit status: 1 if the cached and the recomputed bytes differ."""
    options, config = parse(argv), Config()
    model_key, write_key = jax.random.split(jax.random.key(options.seed))

    text = np.frombuffer("\n\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    held_out = text[-16 * (config.context + 1) :].reshape(16, -1)
    text = text[: -held_out.size]
    model = Model(config, model_key)
    print(f"{sum(x.size for x in jax.tree.leaves(model)):,} parameters learn from {len(text):,} bytes of Python's own reference")
    evaluate = jax.jit(bits_per_byte)
    before, begin = evaluate(model, held_out), time.perf_counter()
    model = train(model, text, config.context, options.steps, options.seed)
    seconds = time.perf_counter() - begin
    sinks = np.stack([np.asarray(block.attend.sinks) for block in model.blocks])
    print(f"held-out text: {before:.2f} bits/byte before, {evaluate(model, held_out):.2f} after {seconds:.0f} s of training")
    print(f"sinks: all 0 before, {sinks.min():.2f} to {sinks.max():.2f} after")

    prompts = [prompt.encode() for prompt in options.prompt]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.array([list(prompt.ljust(max(lengths), b"\0")) for prompt in prompts], np.int32)
    cache = empty_cache(config, len(prompts), max(lengths) + options.tokens)
    keys = jax.random.split(write_key, options.tokens)
    with jax.default_matmul_precision("highest"):  # without this, some devices round the inputs of float32 products
        (written, _), cached_seconds = timed(write_cached, model, cache, padded, lengths, options.temperature, keys)
        expected, recomputed_seconds = timed(write_recomputed, model, padded, lengths, options.temperature, keys)
    for prompt, continuation in zip(prompts, np.asarray(written[0]).T, strict=True):
        print(f"\n--- {prompt.decode()}|{bytes(continuation.tolist()).decode(errors='replace')}")

    cached_speed, recomputed_speed = (written[0].size / seconds for seconds in (cached_seconds, recomputed_seconds))
    print(f"\n{cached_speed:,.0f} bytes/s with the cache, {recomputed_speed:,.0f} recomputing", end=" ")
    print(f"({cached_speed / recomputed_speed:.1f}x)")
    wrong, error = disagreements(written, expected)
    if wrong:
        print("FAILED: this is not what recomputing full attention writes", *wrong, sep="\n  ")
        return 1
    print(f"OK: every byte is what recomputing full attention writes; scores differ by {error:.1g} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
