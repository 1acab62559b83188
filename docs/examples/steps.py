"""Times of whole decode steps, with this package's attention and with `jax.nn.dot_product_attention`, for `smollm2.py`.

`--compare` times SmolLM2. `--random` times models with random weights, which need no download. Weights do not change the speed.

Layers are not scanned here. A scan slices each layer's weights out of larger arrays, and also the part of a cache that `jax.nn`
needs. Some devices copy what they slice.
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from llama import Config, empty_cache, ours, step


RANDOM = {
    "llama-3-8b": Config(32, 4096, 14336, 32, 8, 128, 128256, 5e5),
    "smollm2-135m": Config(30, 576, 1536, 9, 3, 64, 49152, 1e5),
    "tiny": Config(2, 32, 64, 4, 2, 8, 64),
}
SECONDS = 0.2  # approximate time for which each way runs in its turn


def jax_nn(query, cache, start, end, new, implementation):
    """`jax.nn`'s attention in place of ours, for a cache of one layer, so `start` is None. The causal mask of `jax.nn` begins at
    row 0, so several tokens get a mask."""
    del start
    tokens, rows = query.shape[1], cache.key.shape[1]
    lengths, mask = end, None
    if tokens > 1:
        ends = (end - new)[:, None] + 1 + jnp.arange(tokens)
        lengths, mask = None, (jnp.arange(rows) < ends[..., None])[:, None]
    return jax.nn.dot_product_attention(
        query.astype(cache.key.dtype),
        cache.key,
        cache.value,
        mask=mask,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    ).astype(query.dtype)


ATTENTION = {
    "ours": ours,
    "jax.nn xla": functools.partial(jax_nn, implementation="xla"),
    "jax.nn cudnn": functools.partial(jax_nn, implementation="cudnn"),
    "none": lambda query, *_: query,
}


def measure(model, lengths, rows, dtype, ways, say):
    """Times a decode step at `lengths`, for each way (attention, tokens per step). All ways share one cache, and take turns."""
    config, batch = model.config, len(lengths)
    memory = jax.devices()[0].memory_stats() or {"bytes_limit": sys.maxsize, "bytes_in_use": 0}
    layer = 2 * batch * rows * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    free = memory["bytes_limit"] - memory["bytes_in_use"]
    room = int(0.4 * free) // layer  # XLA copies half of each layer's cache for `jax.nn`, and holds all copies at once
    cache = empty_cache(model, batch, rows, dtype, min(max(room, 1), config.layers))
    assert isinstance(cache, list), "a model whose layers are a list has one cache for each"
    if len(cache) < config.layers:
        say(f"  There is room for the caches of {len(cache)} layers, which all {config.layers} share: as many bytes are read.")
    programs, times = {}, {}
    for way in ways:
        attention, tokens = way
        count = np.full(batch, tokens, np.int32)
        arrays = lengths - count, count, np.tile(np.arange(tokens, dtype=np.int32), (batch, 1))
        fed, *arrays = jax.device_put((np.zeros((batch, tokens), np.int32), *arrays))
        try:
            program = step.lower(model, cache, fed, *arrays, attention=ATTENTION[attention]).compile()
        except Exception as error:
            say(f"  {attention} can't: {str(error).splitlines()[0][:100]}")
            continue
        programs[way], times[way] = (program, fed, arrays), []
    for turn in range(6):
        for way, (program, fed, arrays) in programs.items():
            number = int(np.clip(SECONDS / times[way][0], 1, 50)) if turn else 1  # the first one warms up
            begin = time.perf_counter()
            for _ in range(number):
                fed, cache = program(model, cache, fed, *arrays)
            jax.block_until_ready(fed)
            times[way].append((time.perf_counter() - begin) / number)
    lines = []
    for (attention, tokens), seconds in times.items():
        second = statistics.median(seconds[1:])
        line = {"batch": batch, "live": int(lengths.sum()), "cache": dtype, "attention": attention, "tokens": tokens}
        lines.append(line | {"ms": 1e3 * second, "tokens_per_second": batch * tokens / second})
        say("  {cache:8} {attention:12} {tokens} a step {ms:9.2f} ms {tokens_per_second:9.1f} tokens/s".format(**lines[-1]))
    return lines


def compare(model, say):
    """Times steps of this model, with ours and with `jax.nn`'s attention. Sequences are short, ragged or long, in 2048 rows."""
    lines = []
    for name, bounds in {"short": (5, 26), "ragged": (100, 1900), "long": (2000, 2000)}.items():
        lengths = np.linspace(*bounds, 8).astype(np.int32)
        say(f"{name}: lengths {bounds[0]} to {bounds[1]}, batch 8, 2048 rows")
        ways = [(attention, 1) for attention in ("ours", "jax.nn xla", "none")]
        mine, theirs, none = measured = measure(model, lengths, 2048, "float32", ways, say)
        share = [1 - none["ms"] / line["ms"] for line in (mine, theirs)]
        say(
            f"  {theirs['ms'] / mine['ms']:.2f} times as fast; attention takes {share[0]:.0%} of a step, {share[1]:.0%} with jax.nn"
        )
        lines += [{"lengths": name} | line for line in measured]
    return lines


def random_steps(model, batches, rows, attentions, say):
    """Times steps of a model in bfloat16, with sequences of `rows // 8` to `rows` tokens. All tokens of a step count as
    accepted."""
    ways = {
        "bfloat16": [("ours", 1), ("jax.nn cudnn", 1), ("jax.nn xla", 1), ("none", 1), ("ours", 4)],
        "int8": [("ours", 1), ("ours", 4)],
    }
    lines = []
    for batch in batches:
        lengths = np.linspace(rows, rows // 8, batch).astype(np.int32)
        say(f"batch {batch}: lengths {lengths.min()} to {lengths.max()}")
        for dtype, among in ways.items():
            lines += measure(model, lengths, rows, dtype, [way for way in among if way[0] in attentions], say)
    return lines


def picture(result, file):
    """A picture of the tokens per second by batch, with a bar for each way. `result` is the data that `--random --json` prints."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    lines = result["steps"]
    batches = sorted({line["batch"] for line in lines})
    ways = dict.fromkeys((line["attention"], line["cache"], line["tokens"]) for line in lines)
    figure, panels = plt.subplots(1, len(batches), figsize=(9, 3.2), squeeze=False)
    for batch, axes in zip(batches, panels[0], strict=True):
        bars = {(line["attention"], line["cache"], line["tokens"]): line for line in lines if line["batch"] == batch}
        named = {"none": "no attention"}
        names = [f"{named.get(way, way)}, {cache}" + f", {tokens} tokens" * (tokens > 1) for way, cache, tokens in ways]
        heights = [bars[way]["tokens_per_second"] if way in bars else 0 for way in ways]
        drawn = axes.barh(names, heights, color=["#00796b" if attention == "ours" else "#b0bec5" for attention, *_ in ways])
        axes.bar_label(drawn, [f" {height:.0f}" if height else " -" for height in heights], fontsize=7)
        axes.set_title(f"batch {batch}", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not panels[0][0]:
            axes.set_yticklabels([])
    figure.suptitle(f"{result['model']}: tokens a second, {result['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
