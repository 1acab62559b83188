"""The tuner. It tries the hints that a backend suggests for a problem, and saves the fastest hints that give right results."""

import functools
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from ejk_ragged import _hints, explain, FwdParams
from ejk_ragged._formats import QUANTISED
from ejk_ragged._registry import registry
from ejk_ragged.testing import Case

from . import hints_file
from .bench import decode_step, findings, reason
from .inputs import draw_cold, fit, Sample
from .machine import Machine
from .timing import kernel_times, wall_times


AT_ONCE = 8  # candidates that are compiled together
GAIN = 0.98  # hints are better if they take at most this part of the default's time. A smaller gain may be noise


PROBLEM = "B,S,Hq:Hkv,D,DTYPE[,CACHE][,T4][,cap]"
_PATTERN = re.compile(
    rf"(\d+),(\d+),(\d+):(\d+),(\d+),(float32|bfloat16|float16)(?:,({'|'.join(QUANTISED)}))?(?:,T([1-9]\d*))?(?:,(cap))?"
)


def parse(text: str) -> Case:
    """The problem that a text of the command line names, in the form of `PROBLEM`.

    Raises:
        ValueError: the text has another form.
    """
    match = _PATTERN.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"a problem is written {PROBLEM}, as in 64,16384,32:8,128,bfloat16,int8,T4,cap; got {text!r}")
    *sizes, dtype, cache_dtype, tokens, cap = match.groups()
    batch, seq_len, heads, kv_heads, dim = map(int, sizes)
    return Case(
        text,
        *(batch, seq_len, heads, kv_heads, dim, dtype),
        lengths=("uniform", max(seq_len // 8, 1), seq_len),
        logits_soft_cap=50.0 if cap else None,
        num_tokens=int(tokens) if tokens else None,
        cache_dtype=cache_dtype,
        scales="row" if cache_dtype else None,
    )


def tune(
    case: Case,
    machine: Machine,
    backend: str | None,
    seed: int,
    deadline: float,
    runs: int = 15,
) -> dict[str, Any]:
    """Tries the hints of one problem, until all are tried or `deadline` has come. `deadline` is a time of `time.monotonic`.

    Returns:
        The hints that were tried, each with seconds or with the reason against it. If a time was measured, also the best hints, the
        default, and the key for the file.
    """
    case = fit(case, machine.memory, 1)
    inputs = draw_cold(case, seed, machine, runs)
    problem, chosen = _problem(case, inputs, machine, backend)
    sample = Sample(case, inputs, gradients=False)
    default = chosen.backend.fwd_params(problem, chosen.target)
    hints = dict.fromkeys([default, *(h.over(default) for h in chosen.backend.candidates(problem, chosen.target))])
    if len(hints) == 1:
        raise ValueError(f"{chosen.backend.name} declares no hints to try for it")
    tried: list[dict[str, Any]] = []
    remaining = list(hints)
    while remaining and (not tried or time.monotonic() < deadline):
        batch, remaining = remaining[:AT_ONCE], remaining[AT_ONCE:]
        tried += _try(case, chosen.backend, inputs, sample, machine, batch, runs)
    result = {
        "problem": str(problem),
        "key": _hints.key_of(chosen.backend, problem, chosen.target),
        "backend": chosen.backend.name,
        "tried": tried,
        "left_out": len(remaining),
    }
    timed = [one for one in tried if "seconds" in one]
    if not timed:
        return result
    best = min(timed, key=lambda one: one["seconds"])
    if "seconds" in tried[0] and best["seconds"] > GAIN * tried[0]["seconds"]:
        best = tried[0]
    return result | {"default": tried[0], "best": best}


def _problem(case, inputs, machine, backend):
    """The problem of a call, and the backend that is selected for it."""
    problem = decode_step(case, backend, function=explain)(**inputs.arguments()).problem
    return problem, registry.select(machine.platform, problem, backend)


def _try(case, backend, inputs, sample, machine, batch, runs) -> list[dict[str, Any]]:
    """Compiles programs with some hints at once, checks each result, and times the programs that are right."""
    found: dict[FwdParams, dict[str, Any]] = {}
    lowered, calls = {}, {}
    for hints in batch:
        with findings(found, hints):  # a compiler may reject hints
            lowered[hints] = jax.jit(decode_step(case, backend, hints)).lower(**inputs.arguments())
    with ThreadPoolExecutor(AT_ONCE) as threads:
        compiling = {hints: threads.submit(one.compile) for hints, one in lowered.items()}
    for hints, future in compiling.items():
        with findings(found, hints):
            call = functools.partial(_call, future.result(), inputs)
            sample.verify(call)
            if machine.counts_kernels:
                found[hints] = {"seconds": kernel_times(call, runs).seconds}
            else:
                calls[hints] = call
    found |= {hints: {"seconds": timing.seconds} for hints, timing in wall_times(calls, min(runs, 7)).items()}
    return [{"fwd_params": as_dict(hints), **found[hints]} for hints in batch]


def _call(program, inputs, run):
    return program(**inputs.arguments(run))


def as_dict(hints: FwdParams) -> dict[str, Any]:
    """The given hints as keyword arguments of `FwdParams`, for a file."""
    return {name: dict(value) if name == "others" else value for name, value in vars(hints).items() if value not in (None, ())}


def show(hints: FwdParams | dict[str, Any]) -> str:
    given = (hints if isinstance(hints, FwdParams) else FwdParams(**hints)).given
    return ", ".join(f"{name} {value}" for name, value in given.items()) or "none"


def run(
    cases: Sequence[Case],
    backends: Sequence[str],
    file: pathlib.Path,
    limit: float,
    seed: int,
    runs: int = 15,
    advance: Callable[[str], Any] = lambda text: None,
    keep: Callable[[dict[str, Any]], Any] = lambda result: None,
) -> list[dict[str, Any]]:
    """Tunes each case for each backend, within `limit` seconds in total. The best hints of a case are saved at once.

    `keep` is called with each result that is saved. A result that is not saved has the reason in "not_saved".
    """
    machine = Machine.here()
    jobs = [(case, backend) for case in cases for backend in backends or [None]]
    began = time.monotonic()
    results: list[dict[str, Any]] = []
    for i, (case, backend) in enumerate(jobs):
        advance(case.name)
        left = limit - (time.monotonic() - began)
        if left <= 0:
            results.append({"case": case.name, "refused": "the time limit had come"})
            continue
        deadline = time.monotonic() + left / (len(jobs) - i)  # leaves the later problems an equal share of the time
        try:
            result: dict[str, Any] = {"case": case.name} | tune(case, machine, backend, seed, deadline, runs)
        except Exception as error:
            result = {"case": case.name, "refused": reason(error)}
        results.append(result)
        if "best" in result:
            why = _save(file, result)
            if why is None:
                keep(result)
            else:
                result["not_saved"] = why
    return results


def _save(file, result) -> str | None:
    """Saves the best hints of a result. Returns None, or the reason why they are not saved."""
    best, key = result["best"], result["key"]
    if not key:
        return "its sizes belong to no class of problems"
    try:
        return hints_file.save(
            file, {key: {"fwd_params": best["fwd_params"], "seconds": best["seconds"], "problem": result["problem"]}}
        )
    except OSError as error:
        return reason(error)


def saved(result: dict[str, Any]) -> bool:
    return "best" in result and "not_saved" not in result


def text(results: Sequence[dict[str, Any]], file: pathlib.Path) -> str:
    """The results as text."""
    lines = []
    for result in results:
        if "best" not in result:
            refused = result.get("refused") or "; ".join(dict.fromkeys(one["refused"] for one in result["tried"]))
            lines.append(f"{result['case']}: nothing saved: {refused}")
            continue
        best, default = result["best"], result["default"]
        gain = (
            f"{default['seconds'] / best['seconds']:.2f}x the speed of the default" if "seconds" in default else "the default fails"
        )
        refused = sum("refused" in one for one in result["tried"])
        counts = f"{len(result['tried'])} tried, {refused} refused" + (f", {result['left_out']} left" if result["left_out"] else "")
        lines.append(
            f"{result['case']} ({result['backend']}): {show(best['fwd_params'])}: {best['seconds'] * 1e6:.1f} us, {gain}; {counts}"
        )
        if not saved(result):
            lines.append(f"  not saved: {result['not_saved']}")
    if any(map(saved, results)):
        lines.append(f"Saved in {file}")
    return "\n".join(lines)
