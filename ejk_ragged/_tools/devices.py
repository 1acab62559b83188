"""The part of `python -m ejk_ragged bench` about many devices: a decode step with its cache on one device, and split over all."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ejk_ragged.testing import Case

from .bench import decode_step, draw_cold, findings, fit, Inputs, Machine, Sample
from .timing import loop_times


ONE = "one device"
# Ways to split a cache: the size that is split, and the specs of cache and query.
SPLITS = {
    "batch": ("batch", P("devices"), P("devices")),
    "kv heads": ("num_kv_heads", P(None, None, "devices"), P(None, "devices")),
    "rows": ("seq_len", P(None, "devices"), P()),
}


def measure(
    case: Case, machine: Machine, devices: Sequence[Any], seed: int, backend: str | None = None, runs: int = 15
) -> dict[str, Any]:
    """One row, checked and timed on the first device and on all of them for each way to split its cache, or the reason why not.

    The time is that of a call in a loop on the devices, where each query is the output of the call before.

    Raises:
        ValueError: the row does not fit into memory.
    """
    asked, case = case, fit(case, machine.memory, 2)  # the first device has its share of the split copies beside the whole ones
    inputs = draw_cold(case, seed, machine, runs, 2)
    sample = Sample(case, inputs, gradients=False)
    call = decode_step(case, backend)
    found: dict[str, dict[str, Any]] = {}
    with findings(found, ONE):
        found[ONE] = _timed(call, inputs, sample, runs)
    mesh = jax.make_mesh((len(devices),), ("devices",), axis_types=(AxisType.Auto,), devices=devices)
    for name, (size, cache, query) in SPLITS.items():
        if getattr(case, size) % len(devices):
            found[name] = {"cannot": f"{size} {getattr(case, size)} is no multiple of {len(devices)} devices"}
            continue
        with findings(found, name):
            found[name] = _timed(call, _split(inputs, mesh, cache, query), sample, runs)
    for name, way in found.items():
        if name != ONE and "seconds" in way and "seconds" in found[ONE]:
            way["speedup"] = found[ONE]["seconds"] / way["seconds"]
    sizes = {"batch": case.batch, "batch_asked": asked.batch, "live_bytes": case.live_bytes(seed)}
    return {"row": case.name, "devices": len(devices), "ways": found} | sizes


def _split(inputs: Inputs, mesh, cache: P, query: P) -> Inputs:
    """The same arrays on a mesh."""
    put = lambda x, spec: None if x is None else jax.device_put(x, NamedSharding(mesh, spec))
    return dataclasses.replace(
        inputs,
        query=put(inputs.query, query),
        caches=[(put(key, cache), put(value, cache)) for key, value in inputs.caches],
        start=put(inputs.start, P()),
        end=put(inputs.end, P()),
        aux=put(inputs.aux, P()),
    )


def _timed(call, inputs, sample, runs) -> dict[str, Any]:
    sample.verify(lambda run: jax.jit(call)(*inputs.arguments(run)))
    query, _, _, *rest = inputs.arguments()

    @functools.partial(jax.jit, static_argnums=0)
    def loop(rounds, query, caches, rest):
        return jax.lax.fori_loop(
            0, rounds, lambda _, query: functools.reduce(lambda query, cache: call(query, *cache, *rest), caches, query), query
        )

    timing = loop_times(lambda rounds: lambda: loop(rounds, query, inputs.caches, rest), len(inputs.caches), runs)
    return timing.as_dict()
