"""The measurements of `python -m ejk_ragged bench`: decode steps and their gradients. Each is checked, and then timed
next to other implementations on the same arrays.

The results are plain data. `tables` shows the data and `plots` draws them.
"""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from ejk_ragged import explain, FwdParams, ragged_decode_attention
from ejk_ragged.testing import Case

from .cases import variant
from .inputs import cache_bytes, differentiated, differs, draw_cold, fit, padded, Sample, settings, TooLarge, Wrong
from .machine import Machine
from .peers import CannotExpress, Peer, PEERS
from .timing import graph_times, kernel_times, NotTimed, Timing, wall_times


# ---------------------------------------------------------------------------------------------------------------------------
# Candidates


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An implementation that is measured. `make` is as in `Peer`, and raises `CannotExpress` for a case that it cannot do."""

    name: str
    make: Callable[[Case], Any]
    ours: bool = False
    torch: bool = False


def candidates(platform: str, backends: Sequence[str | None], peers: bool, gradients: bool) -> list[Candidate]:
    """Our implementation once per backend (None is the automatic choice), and the peers that run on the platform."""
    ours = [
        Candidate(f"ejk-ragged {name}" if name else "ejk-ragged", functools.partial(decode_step, backend=name), ours=True)
        for name in backends
    ]
    return ours + [_peer(p) for p in PEERS if peers and platform in p.platforms and (p.gradients or not gradients)]


def _peer(peer: Peer) -> Candidate:
    return Candidate(peer.name, peer.call, torch=peer.torch)


def decode_step(case: Case, backend: Any = None, fwd_params: FwdParams | None = None, function=ragged_decode_attention):
    """Our call for a case, in the form that `Peer.make` returns. `function` may be another function with the same arguments."""

    def call(sequence_start, sequence_end, **arrays):
        whole = case.lengths == ("full",) and case.seq_len % (case.page_size or 1) == 0
        bounds = {} if whole else {"sequence_end": sequence_end}
        bounds |= {"sequence_start": sequence_start} if case.lengths[0] == "ranges" else {}
        return function(**arrays, **bounds, **settings(case), fwd_params=fwd_params, backend=backend)

    return call


def _lower(call, case, inputs, gradients):
    """The programs to compile: the forward step, or the whole gradient and its two halves."""
    if not gradients:
        return [jax.jit(call).lower(**inputs.arguments())]

    def gradient(floating, rest, d_out):
        loss = lambda floating: jnp.sum(call(**floating, **rest).astype(jnp.float32) * d_out.astype(jnp.float32))
        return jax.grad(loss)(floating)

    def forward(floating, rest):
        return jax.vjp(lambda floating: call(**floating, **rest), floating)

    parts = _parts(case, inputs)
    whole = jax.jit(gradient).lower(*parts, inputs.d_out)
    half = jax.jit(forward)
    _, pullback = jax.eval_shape(half, *parts)
    back = jax.jit(lambda pullback, d_out: pullback(d_out)[0]).lower(pullback, inputs.d_out)
    return [whole, half.lower(*parts), back]


def _parts(case, inputs, run=0):
    """Two groups of arguments: those that gradients are taken with respect to, and the others."""
    arguments = inputs.arguments(run)
    return {name: arguments.pop(name) for name in differentiated(case)}, arguments


@dataclasses.dataclass(frozen=True)
class Works:
    """The timed calls of one candidate, by name. A call takes the number of the run. `wait` waits for the result of a call."""

    calls: dict[str, Callable[[int], Any]]
    wait: Callable[[Any], Any] = jax.block_until_ready


def _prepare(candidate, case, inputs, compiled, gradients) -> Works:
    """The calls of a candidate. `compiled` holds the compiled programs of `_lower`, or the two functions of a `Peer` of PyTorch."""
    copies = range(len(inputs.caches))
    if candidate.torch:
        import torch  # pyright: ignore[reportMissingImports]

        prepare, call = compiled
        prepared = [prepare(**inputs.arguments(copy)) for copy in copies]
        return Works({"forward": lambda run: call(*prepared[run % len(prepared)])}, lambda result: torch.cuda.synchronize())
    if not gradients:
        return Works({"forward": lambda run: compiled[0](**inputs.arguments(run))})
    whole, half, back = compiled
    pullbacks = [half(*_parts(case, inputs, copy))[1] for copy in copies]
    return Works(
        {
            "gradient": lambda run: whole(*_parts(case, inputs, run), inputs.d_out),
            "backward": lambda run: back(pullbacks[run % len(pullbacks)], inputs.d_out),
        }
    )


def _check(candidate, works, sample) -> dict[str, Any]:
    """The largest error of a candidate's calls against the oracle. "refused" is set if a call is wrong."""
    worst: dict[str, Any] = {"error": 0.0}
    for call in works.calls.values():
        results = call(0)
        works.wait(results)
        if candidate.torch:
            results = jnp.from_dlpack(results.contiguous())
        results = {f"d_{name}": x for name, x in dict(results).items()} if sample.gradients else {"out": results}
        verdict = sample.compare(results, candidate.ours)
        if not verdict["ok"]:
            return {"refused": differs(verdict)} | verdict
        worst = max(worst, verdict, key=lambda one: one["error"])
    return worst


def _time(candidate, works, runs) -> dict[str, Timing]:
    """Kernel times of a candidate's calls."""
    timings = {}
    for name, call in works.calls.items():
        try:
            timings[name] = kernel_times(call, runs, works.wait)
        except NotTimed:
            if not candidate.torch:
                raise
            import torch  # pyright: ignore[reportMissingImports]

            timings[name] = graph_times(torch, call, runs)
    return timings


def reason(error: BaseException) -> str:
    """An exception as one line of text."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = str(error).strip().splitlines()
    short = text[0][:140] if text else ""
    return short if isinstance(error, CannotExpress | NotTimed | TooLarge | Wrong) else f"{type(error).__name__}: {short}"


# ---------------------------------------------------------------------------------------------------------------------------
# Cases


def measure(
    case: Case, machine: Machine, entrants: Sequence[Candidate], seed: int, runs: int = 15, gradients: bool = False
) -> dict[str, Any]:
    """Measures one case. Each candidate is checked on a sample of the case and then timed, or has the reason why not.

    Raises:
        TooLarge: the case does not fit into memory.
    """
    written = gradients and "key" in differentiated(case)
    per_copy = 2 + 2 * written if gradients else 1  # the cache, its copy among the residuals, and gradients
    asked, case = case, fit(case, machine.memory, per_copy)
    inputs = draw_cold(case, seed, machine, runs, per_copy)
    sample = Sample(case, inputs, gradients)
    found: dict[str, dict[str, Any]] = {}
    made, waiting = [], {}
    for entrant in entrants:
        with findings(found, entrant.name), _quiet(not entrant.ours):
            call = entrant.make(case)
            made.append((entrant, call if entrant.torch else _lower(call, case, inputs, gradients)))
    with ThreadPoolExecutor(8) as threads:
        compiling = [(entrant, [threads.submit(_compile, one) for one in program]) for entrant, program in made]
    del made
    for entrant, futures in compiling:
        with findings(found, entrant.name):
            found[entrant.name], calls = _take_part(entrant, futures, case, inputs, sample, machine, runs)
            waiting |= {(entrant.name, name): call for name, call in calls.items()}
    for (entrant, name), timing in wall_times(waiting, min(runs, 7)).items():
        found[entrant].setdefault("timings", {})[name] = timing
    return _summary(asked, case, machine, inputs, entrants, found, seed, gradients)


def _take_part(entrant, futures, case, inputs, sample, machine, runs) -> tuple[dict[str, Any], dict[str, Callable]]:
    """Checks one candidate. If kernels are timed, times it too. Otherwise returns its calls, which take turns with others."""
    works = _prepare(entrant, case, inputs, [future.result() for future in futures], sample.gradients)
    verdict = _check(entrant, works, sample)
    if "refused" in verdict:
        return verdict, {}
    if not machine.counts_kernels:
        return verdict, works.calls
    return verdict | {"timings": _time(entrant, works, runs)}, {}


@contextlib.contextmanager
def _quiet(wanted):
    """A context that hides warnings if `wanted`. Used for the code of other projects."""
    with warnings.catch_warnings():
        if wanted:
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def findings(found, name):
    """A context that stores an error under `name`. An error counts against the implementation, except `TooLarge`."""
    try:
        yield
    except TooLarge as error:
        found[name] = {"cannot": str(error)}
    except Exception as error:
        found[name] = {"refused": reason(error)}


def _compile(program):
    """Compiles a lowered program. Returns anything else unchanged."""
    return program.compile() if hasattr(program, "compile") else program


def _summary(asked, case, machine, inputs, entrants, found, seed, gradients) -> dict[str, Any]:
    """One case as data: its description, the bytes that it has to move, and the results."""
    explanation = decode_step(case, function=explain)(**inputs.arguments())
    chosen = explanation[machine.platform]
    live_tokens, live_bytes = padded(case).live_tokens(seed), padded(case).live_bytes(seed)
    entries = 4 * math.ceil(live_tokens / case.page_size) if case.page_size else 0  # of the page table
    written = cache_bytes(case) if gradients and "key" in differentiated(case) else 0
    moved = live_bytes + entries + written
    bandwidth = machine.copy if written else machine.read
    summary = {
        "case": case.name,
        "variant": variant(case),
        "direction": "gradient" if gradients else "forward",
        "problem": str(explanation.problem),
        "batch": case.batch,
        "batch_asked": asked.batch,
        "group": case.num_q_heads // case.num_kv_heads,
        "differentiated": list(differentiated(case)) if gradients else [],
        "backend": chosen.backward if gradients else chosen.forward,
        "live_tokens": live_tokens,
        "live_bytes": live_bytes,
        "moved_bytes": moved,
        "copies": len(inputs.caches),
        "candidates": _ratios([_result(one, found[one.name], moved, bandwidth) for one in entrants]),
    }
    features = ("page_size", "cache_dtype", "scales", "sliding_window", "sinks")
    return summary | {"num_tokens": case.num_tokens or 1, "lengths": list(case.lengths)} | {x: getattr(case, x) for x in features}


def _result(entrant, found, moved, bandwidth) -> dict[str, Any]:
    """One candidate as data. The fraction is that of the backward operation for gradients, and of the forward step otherwise."""
    result = {"name": entrant.name, "ours": entrant.ours} | found
    if "timings" in result:
        result["timings"] = {name: timing.as_dict() for name, timing in result["timings"].items()}
        clocked = result["timings"].get("backward") or result["timings"]["forward"]
        per_second = moved / clocked["seconds"]
        result |= {"bytes_per_second": per_second, "fraction": per_second / bandwidth}
    return result


def _ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds each candidate's time, divided by the time of our first candidate. Times are those of the whole gradient or step."""
    whole = lambda result: (result["timings"].get("gradient") or result["timings"]["forward"])["seconds"]
    timed = [result for result in results if "timings" in result]
    first = next((whole(result) for result in timed if result["ours"]), None)
    for result in timed:
        result["ratio"] = None if first is None else whole(result) / first
    return results


def scaling(machine: Machine, base: Case, seed: int, backend: str | None = None, runs: int = 15) -> dict[str, Any]:
    """Measures time against live tokens with the cache of `base`, and time against the cache's size with the same live tokens.

    A point that fails or does not fit into memory is left out. "left_out" has the reason.
    """
    ours = candidates(machine.platform, [backend], peers=False, gradients=False)
    left_out: dict[str, dict[str, str]] = {}

    def points(cases):
        for case in cases:
            name = f"{case.lengths[2]} of {case.seq_len} rows"
            with findings(left_out, name):
                if fit(case, machine.memory, 1).batch < case.batch:
                    raise TooLarge("not all sequences fit into memory")
                measured = measure(case, machine, ours, seed, runs)
                (found,) = measured["candidates"]
                if "refused" in found:
                    left_out[name] = found
                    continue
                timing = found["timings"]["forward"]
                sizes = {"seq_len": case.seq_len} | {x: measured[x] for x in ("live_tokens", "live_bytes")}
                yield sizes | {"seconds": timing["seconds"], "time": timing["time"]}

    longest = [base.seq_len * i // 6 for i in range(1, 7)]
    sizes = [base.seq_len // 4 * 2**i for i in range(5)]
    few = dataclasses.replace(base, lengths=("uniform", base.seq_len // 8, base.seq_len // 4))
    return {
        "problem": f"B {base.batch}, heads {base.num_q_heads}:{base.num_kv_heads}, D {base.head_dim}, {base.dtype}",
        "live": list(points(dataclasses.replace(base, lengths=("uniform", n // 2, n)) for n in longest)),
        "size": list(points(dataclasses.replace(few, seq_len=size) for size in sizes)),
        "left_out": left_out,
    }
