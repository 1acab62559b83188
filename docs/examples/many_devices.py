"""One decode loop on eight devices, with four ways to split its cache. The loop is the same for all ways.

The devices are simulated on the CPU, so it runs anywhere, in a few seconds:

    python docs/examples/many_devices.py

For each way the program prints the bytes of the cache per device, what moves between the devices at a step, and the difference from
the result of one device. What moves is read from the compiled program. The program exits with 1 if something as large as the cache
moves, or if the results differ.
"""

import math
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ejk_ragged import ragged_decode_attention


BATCH, ROWS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 8, 2048, 16, 8, 64
STEPS = 4

# A cache is [batch, rows, kv heads, head_dim]. Each axis of the mesh splits one of these axes.
SPLITS = {
    "by batch": P(("a", "b", "c")),
    "by kv heads": P(None, None, ("a", "b", "c")),
    "by rows": P(None, ("a", "b", "c")),
    "by all three": P("a", "b", "c"),
}


def decode(key, value, ends, query, rows):
    """For each of `rows` [steps, batch, kv heads, head_dim]: writes one row per sequence, and attends."""

    def step(carry, row):
        key, value, ends, query = carry
        sequence = jnp.arange(BATCH)
        key, value = (cache.at[sequence, ends].set(row) for cache in (key, value))
        out = ragged_decode_attention(query, key, value, sequence_end=ends + 1)
        return (key, value, ends + 1, out), out  # a model would compute the next query from the output

    (key, value, *_), outs = jax.lax.scan(step, (key, value, ends, query), rows)
    return key, value, outs


def arguments():
    """A cache that is partly filled, the first query, and the rows of the next steps."""
    keys = jax.random.split(jax.random.key(0), 4)
    cache = (BATCH, ROWS, KV_HEADS, HEAD_DIM)
    ends = jnp.array([ROWS - STEPS, 1000, 7, 0, 512, 513, 1, 1999])
    query = jax.random.normal(keys[2], (BATCH, QUERY_HEADS, HEAD_DIM))
    rows = jax.random.normal(keys[3], (STEPS, BATCH, KV_HEADS, HEAD_DIM))
    return jax.random.normal(keys[0], cache), jax.random.normal(keys[1], cache), ends, query, rows


def collectives(program):
    """The name of each collective in a compiled program, and the bytes of its result. All results are float32 or int32."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text())
    return [(name, 4 * math.prod(int(size) for size in sizes.split(",") if size)) for sizes, name in found]


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices("cpu"))
    key, value, *rest = arguments()
    program = jax.jit(decode, donate_argnums=(0, 1))
    *_, alone = jax.jit(decode)(key, value, *rest)

    ok = True
    for name, spec in SPLITS.items():
        sharding = NamedSharding(mesh, spec)
        split = jax.device_put(key, sharding), jax.device_put(value, sharding)
        share = split[0].addressable_shards[0].data.nbytes
        compiled = program.lower(*split, *rest).compile()
        moved = collectives(compiled)
        new_key, _, outs = program(*split, *rest)  # the caches are donated
        error = float(jnp.max(jnp.abs(jax.device_get(outs) - jax.device_get(alone))))
        ok &= error < 1e-5 and new_key.sharding.is_equivalent_to(sharding, 4) and all(size < share / 4 for _, size in moved)
        what = ", ".join(f"{kind} of {size:,} bytes" for kind, size in moved) or "nothing"
        print(f"{name:12}  {2 * share:,} bytes of cache per device; moves {what}; differs by {error:.1e}")
    print("OK: every split gives one device's result" if ok else "FAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
