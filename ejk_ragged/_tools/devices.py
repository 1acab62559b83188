"""The benchmark's part about many devices: a decode step with its cache on one device, and split over all devices."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ejk_ragged import Backend
from ejk_ragged.testing import Case

from .bench import decode_step, findings
from .cases import variant
from .inputs import draw_cold, fit, Inputs, letters_of, Sample
from .machine import Machine
from .timing import loop_times


ONE = "one device"
# Ways to split a cache: the size that is split, and the letters of the axes of cache and query that are split with it.
SPLITS = {"batch": ("batch", "b"), "kv heads": ("num_kv_heads", "qh"), "rows": ("seq_len", "s")}


def measure(
    case: Case, machine: Machine, devices: Sequence[Any], seed: int, backend: str | Backend | None = None, runs: int = 15
) -> dict[str, Any]:
    """Checks and times one case on the first device, and on all devices for each way to split its cache.

    A way that fails has the reason. The time is that of a call in a loop on the devices. Each query of the loop contains the output
    of the call before.

    Raises:
        TooLarge: the case does not fit into memory.
    """
    asked, case = case, fit(case, machine.memory, 2)  # the first device holds whole copies and its share of the split copies
    inputs = draw_cold(case, seed, machine, runs, 2)
    sample = Sample(case, inputs, gradients=False)
    call = decode_step(case, backend)
    found: dict[str, dict[str, Any]] = {}
    with findings(found, ONE):
        found[ONE] = _timed(call, inputs, sample, runs)
    mesh = jax.make_mesh((len(devices),), ("devices",), axis_types=(AxisType.Auto,), devices=devices)
    for name, (size, letters) in SPLITS.items():
        if getattr(case, size) % len(devices):
            found[name] = {"cannot": f"{size} {getattr(case, size)} is no multiple of {len(devices)} devices"}
            continue
        with findings(found, name):
            found[name] = _timed(call, _split(case, inputs, mesh, letters), sample, runs)
    for name, way in found.items():
        if name != ONE and "seconds" in way and "seconds" in found[ONE]:
            way["speedup"] = found[ONE]["seconds"] / way["seconds"]
    sizes = {"batch": case.batch, "batch_asked": asked.batch, "live_bytes": case.live_bytes(seed)}
    return {"case": case.name, "variant": variant(case), "devices": len(devices), "ways": found} | sizes


def _split(case, inputs: Inputs, mesh, letters: str) -> Inputs:
    """The arrays on a mesh. Cache and query are split along the axes of these letters. Other arrays are on every device."""

    def put(name, x):
        split = letters_of(name, x, case) if name not in inputs.rest or name == "query" else ""
        spec = PartitionSpec(*("devices" if letter in letters else None for letter in split))
        return jax.device_put(x, NamedSharding(mesh, spec))

    on_mesh = lambda arrays: {name: put(name, x) for name, x in arrays.items()}
    return dataclasses.replace(inputs, rest=on_mesh(inputs.rest), caches=[on_mesh(cache) for cache in inputs.caches])


def _timed(call, inputs, sample, runs) -> dict[str, Any]:
    sample.verify(lambda run: jax.jit(call)(**inputs.arguments(run)))

    @functools.partial(jax.jit, static_argnums=0)
    def loop(rounds, rest, caches):
        first = (0,) * rest["query"].ndim  # an output that is narrower than the query becomes its first columns
        step = lambda query, cache: jax.lax.dynamic_update_slice(query, call(**rest | {"query": query}, **cache), first)
        return jax.lax.fori_loop(0, rounds, lambda _, query: functools.reduce(step, caches, query), rest["query"])

    timing = loop_times(lambda rounds: lambda: loop(rounds, inputs.rest, inputs.caches), len(inputs.caches), runs)
    return timing.as_dict()
