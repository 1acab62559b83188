"""The report of `python -m ejk_ragged`: what is installed, which backend would run, whether it is right, and the time of a step.

One function gathers each section as plain data, which `--json` prints. Another function turns the data into text.
"""

import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ejk_ragged import backends, explain, Explanation, ragged_decode_attention
from ejk_ragged._platforms import platform_of
from ejk_ragged.testing import Case, CHECKS, verify

from .cases import CPU_STEP, MODELS
from .machine import default_platform
from .progress import progress
from .timing import wall_times


PACKAGES = ("ejk-ragged", "jax", "jaxlib", "equinox", "jaxtyping", "numpy")


def realistic() -> Case:
    """The decode step that is explained and timed. An accelerator gets a larger step than a CPU: it would compute the CPU's step in
    less time than it takes to launch it."""
    return CPU_STEP if default_platform() == "cpu" else MODELS[0]


# ---------------------------------------------------------------------------------------------------------------------------
# Gathering


def installation() -> dict[str, Any]:
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    devices = Counter((platform_of(device), device.device_kind) for device in jax.devices())
    infos = [
        {
            "name": info.name,
            "distribution": info.distribution,
            "platforms": None if info.platforms is None else sorted(info.platforms),
            "broken": info.broken,
            "faulty": info.faulty,
        }
        for info in backends()
    ]
    return {
        "versions": versions,
        "devices": [{"platform": name, "kind": kind, "count": count} for (name, kind), count in devices.items()],
        "backends": infos,
    }


def dispatch(explanation: Explanation) -> dict[str, Any]:
    """The backend that would run on each platform, and why the others would not, as data."""
    choices = {
        name: {
            "forward": choice.forward,
            "backward": choice.backward,
            "passed_over": choice.passed_over,
            "error": choice.error,
            "fwd_params": choice.fwd_params.given,
            "hints_from": choice.hints_from,
        }
        for name, choice in explanation.choices.items()
    }
    return {"problem": str(explanation.problem), "here": default_platform(), "platforms": choices}


def checks(cases: Sequence[Case] = CHECKS) -> list[dict[str, Any]]:
    """Compares every backend that can run here with the oracle: output, log-sum-exp and gradients, with NaN in the dead rows.

    Errors and tolerances are relative. An error of None is infinite or NaN.
    """
    able = [
        info.name for info in backends() if info.broken is None and (info.platforms is None or default_platform() in info.platforms)
    ]
    results = []
    with progress(len(able) * len(cases), lines=False) as advance:
        for name in able:
            for case in cases:
                advance(f"{name}, {case.name}")
                results.append({"backend": name, "case": case.name} | _check(name, case))
    return results


def _check(backend, case) -> dict[str, Any]:
    arguments = case.draw(poison=True)
    try:
        choice = explain(**arguments, backend=backend)[default_platform()]
    except ValueError as error:
        return {"ok": None, "refused": str(error)}
    if choice.forward is None:
        return {"ok": None, "refused": choice.error}

    def call(**arguments):
        return ragged_decode_attention(**arguments, backend=backend)

    try:
        verdicts = verify(call, arguments)
    except Exception as error:  # any error that a backend raises is a failed check
        return {"ok": False, "raised": f"{type(error).__name__}: {error}"}
    compared = [
        {"what": v.what, "ok": v.ok, "error": v.error if math.isfinite(v.error) else None, "tolerance": v.tolerance}
        for v in verdicts
    ]
    return {"ok": all(v.ok for v in verdicts), "compared": compared}


def step(case: Case, runs: int = 7) -> dict[str, Any]:
    """Times one decode step, and `jax.nn.dot_product_attention` on the same arrays. A time is the least of `runs`, after a warm-up.

    Bytes are those of the live rows of K and V, which a step has to read.
    """
    arguments: dict[str, Any] = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.draw().items()}

    @jax.jit
    def peer(query, key, value, sequence_end):
        return jax.nn.dot_product_attention(query[:, None], key, value, key_value_seq_lengths=sequence_end)[:, 0]

    calls = {
        "ejk-ragged": lambda run: ragged_decode_attention(**arguments),
        "jax.nn.dot_product_attention": lambda run: peer(**arguments),
    }
    for name, call in calls.items():
        try:
            jax.block_until_ready(call(0))
        except Exception as error:  # a backend raised an error, or there is no backend
            return {"error": f"{name}: {type(error).__name__}: {error}"}
    seconds = {name: timing.seconds for name, timing in wall_times(calls, runs).items()}
    ours, theirs = seconds.values()
    return {
        "problem": str(explain(**arguments).problem),
        "live_tokens": case.live_tokens(),
        "live_bytes": case.live_bytes(),
        "seconds": seconds,
        "live_gb_per_s": {name: case.live_bytes() / taken / 1e9 for name, taken in seconds.items()},
        "speedup": theirs / ours,
    }


# ---------------------------------------------------------------------------------------------------------------------------
# Showing


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """A table as text. Columns are left-aligned, and as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)


def show_installation(data) -> str:
    devices = [(d["platform"], f"{d['count']} x {d['kind']}") for d in data["devices"]]
    infos = [
        (
            info["name"],
            "every platform" if info["platforms"] is None else ", ".join(info["platforms"]),
            f"from {info['distribution']}",
            _why_not(info),
        )
        for info in data["backends"]
    ]
    parts = ["Versions", table(list(data["versions"].items())), "Devices", table(devices), "Backends"]
    return "\n".join([*parts, table(infos) if infos else "  none is installed"])


def _why_not(info) -> str:
    if info["broken"] is None:
        return ""
    return f"BROKEN: {info['broken']}" if info["faulty"] else f"not available here: {info['broken'].removeprefix('it ')}"


def show_dispatch(data) -> str:
    lines = [f"What would run ({data['problem']})"]
    rows = []
    for name, choice in data["platforms"].items():
        chosen = choice["forward"] or "nothing"
        if choice["backward"] != choice["forward"]:
            chosen += f", gradients by {choice['backward'] or 'none'}"
        why = [f"not {other}: {reason}" for other, reason in choice["passed_over"].items()]
        why += [choice["error"]] if choice["error"] else []
        rows.append((name + (" (here)" if name == data["here"] else ""), chosen, "; ".join(why)))
    return "\n".join([*lines, table(rows)])


def show_checks(data) -> str:
    title = "Checks against a float64 oracle, forward and gradients (the worst error, as a part of what is tolerated)"
    if not data:
        return f"{title}\n  no backend can run here"
    names = list(dict.fromkeys(result["backend"] for result in data))
    cases = list(dict.fromkeys(result["case"] for result in data))
    cells = {(result["case"], result["backend"]): _cell(result) for result in data}
    rows = [("", *names), *((case, *(cells[case, name] for name in names)) for case in cases)]
    details = [f"  {r['backend']}, {r['case']}: {why}" for r in data for why in _details(r)]
    return "\n".join([title, table(rows), *details])


def _cell(result) -> str:
    if result["ok"] is None:
        return "refused"
    if "raised" in result:
        return "RAISED"
    worst = max(_part(comparison) for comparison in result["compared"])
    return f"ok {worst:.0%}" if result["ok"] else "WRONG"


def _part(comparison) -> float:
    error, tolerance = comparison["error"], comparison["tolerance"]
    if error is None:
        return math.inf
    return error / tolerance if tolerance else error


def _details(result) -> list[str]:
    if result["ok"] is None:
        return [result["refused"]]
    if "raised" in result:
        return [result["raised"]]
    return [
        f"{c['what']} is wrong, error {'not finite' if c['error'] is None else format(c['error'], '.2g')}, "
        f"tolerance {c['tolerance']:.2g}"
        for c in result["compared"]
        if not c["ok"]
    ]


def show_step(data) -> str:
    if "error" in data:
        return f"One decode step\n  {data['error']}"
    rows = [
        (name, f"{seconds * 1e3:.2f} ms", f"{data['live_gb_per_s'][name]:.2f} GB/s of live K and V")
        for name, seconds in data["seconds"].items()
    ]
    title = f"One decode step ({data['problem']}; {data['live_tokens']} live tokens, {data['live_bytes'] / 1e6:.0f} MB)"
    return "\n".join([title, table(rows), f"  {data['speedup']:.1f} times as fast"])
