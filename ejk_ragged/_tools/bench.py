"""The measurements of `python -m ejk_ragged bench`: decode steps and their gradients, checked and then timed beside other
implementations on the same arrays, drawn afresh for every run.

Everything comes out as plain data; `_bench_report` shows it and `_plots` draws it.
"""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ejk_ragged import explain, FwdParams, ragged_decode_attention
from ejk_ragged._registry import platform_of
from ejk_ragged.testing import Case, oracle, oracle_gradients, relative_error, tolerance

from .peers import CannotExpress, Peer, PEERS
from .timing import copy_bandwidth, graph_times, kernel_times, NotTimed, read_bandwidth, Timing, wall_times


COLD_BYTES = 400e6  # read between two uses of the same copy of a cache, several times what the caches of a GPU hold
MOST_COPIES = 24
# Peers may round where our contract says not to, but not answer another question.
PEER_TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2, "float64": 1e-9}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the benchmark runs, and bandwidths measured there: bytes per second of reading, and of copying, read plus written."""

    platform: str
    device: str
    memory: int
    read: float
    copy: float | None

    @classmethod
    def here(cls, copying: bool = False) -> "Machine":
        device = jax.devices()[0]
        platform = platform_of(device)
        stats = device.memory_stats() or {}
        memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        copy = copy_bandwidth(platform, memory) if copying else None
        return cls(platform, device.device_kind, memory, read_bandwidth(platform, memory), copy)

    @property
    def counts_kernels(self) -> bool:
        return self.platform in ("cuda", "rocm")


def fit(case: Case, memory: int, copies: int) -> Case:
    """`case` with as many of its sequences as leave room for `copies` of the cache in 0.6 of `memory`.

    Raises:
        ValueError: not even one sequence fits.
    """
    room = 0.6 * memory // copies
    batch = min(case.batch, int(room // (cache_bytes(case) // case.batch)))
    if batch < 1:
        raise ValueError(f"{case.name}: one sequence needs {cache_bytes(case) // case.batch * copies / 1e9:.1f} GB")
    return dataclasses.replace(case, batch=batch)


def cache_bytes(case: Case) -> int:
    """Of K and V."""
    return 2 * case.batch * case.seq_len * case.num_kv_heads * case.head_dim * jnp.dtype(case.dtype).itemsize


# ---------------------------------------------------------------------------------------------------------------------------
# Arrays


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of one row. `caches` are copies of (key, value) with values of their own, to be used in turn."""

    query: jax.Array
    caches: Sequence[tuple[jax.Array, jax.Array]]
    start: jax.Array
    end: jax.Array
    aux: jax.Array | None
    d_out: jax.Array

    def arguments(self, run: int = 0):
        return (self.query, *self.caches[run % len(self.caches)], self.start, self.end, self.aux)


def draw(case: Case, seed: int, copies: int, on_device: bool) -> Inputs:
    """Lengths as the case draws them; large arrays are drawn where they are used."""
    start, end = case.ranges(seed)
    start = np.zeros(case.batch, np.int32) if start is None else start
    end = np.full(case.batch, case.seq_len, np.int32) if end is None else end
    aux = dataclasses.replace(case, batch=1, seq_len=1, lengths=("full",)).draw(seed).get("softmax_aux")
    dtype = jnp.dtype(case.dtype)
    heads = (case.batch, case.num_q_heads, case.head_dim)
    cache = (case.batch, case.seq_len, case.num_kv_heads, case.head_dim)
    keys = iter(jax.random.split(jax.random.key(seed), 2 * copies + 2))
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    if on_device:
        caches = [(normal(next(keys), cache, dtype), normal(next(keys), cache, dtype)) for _ in range(copies)]
    else:  # NumPy is faster there
        drawn = [dataclasses.replace(case, sinks=None).draw(seed + i) for i in range(copies)]
        caches = [(jnp.asarray(one["key"]), jnp.asarray(one["value"])) for one in drawn]
    query, d_out = (normal(next(keys), heads, dtype) for _ in range(2))
    return Inputs(query, caches, jnp.asarray(start), jnp.asarray(end), None if aux is None else jnp.asarray(aux), d_out)


def draw_cold(case: Case, seed: int, machine: Machine, runs: int, per_copy: int = 1) -> Inputs:
    """With as many copies of the cache as it takes, and as fit, so that none comes from a GPU's own caches.

    `per_copy` is how many times the cache's size each copy needs.
    """
    wanted = max(2, min(math.ceil(COLD_BYTES / max(case.live_bytes(seed), 1)), runs, MOST_COPIES)) if machine.counts_kernels else 1
    copies = max(1, min(wanted, int(0.6 * machine.memory // (per_copy * cache_bytes(case)))))
    return draw(case, seed, copies, machine.platform != "cpu")


# ---------------------------------------------------------------------------------------------------------------------------
# Checks


class Wrong(Exception):
    """A result differs from the oracle's."""


class Sample:
    """A few sequences and heads of a row, and what the oracle says of them: whole rows would take it minutes."""

    def __init__(self, case: Case, inputs: Inputs, gradients: bool):
        lengths = np.asarray(inputs.end) - np.asarray(inputs.start)
        self.batch = np.unique([np.argmax(lengths), np.argmin(lengths)])
        self.kv_heads = np.unique([0, case.num_kv_heads - 1])
        group = case.num_q_heads // case.num_kv_heads
        self.heads = np.concatenate([np.arange(h * group, (h + 1) * group) for h in self.kv_heads])
        query, key, value, start, end, aux = inputs.arguments()
        if aux is not None and aux.ndim == 2:
            aux = aux[self.heads if aux.shape[0] == case.num_q_heads else self.kv_heads]
        arguments = {
            "query": self.of_heads(query),
            "key": self.of_cache(key),
            "value": self.of_cache(value),
            "sequence_start": np.asarray(start)[self.batch],
            "sequence_end": np.asarray(end)[self.batch],
            "softmax_scale": case.softmax_scale,
            "sliding_window": case.sliding_window,
            "logits_soft_cap": case.logits_soft_cap,
            "softmax_aux": aux,
        }
        self.dtype, self.gradients = case.dtype, gradients
        if gradients:
            d_out = self.of_heads(inputs.d_out)
            want = oracle_gradients(**arguments, d_out=d_out, d_lse=np.zeros(d_out.shape[:2]))
            self.want = [("d_" + name, getattr(want, name), want.size[name]) for name in ("query", "key", "value")]
        else:
            self.want = [("out", oracle(**arguments)[0], 0.0)]

    def of_heads(self, x):
        return np.asarray(jnp.asarray(x)[self.batch][:, self.heads])

    def of_cache(self, x):
        return np.stack([np.asarray(x[b][:, self.kv_heads]) for b in self.batch])

    def verify(self, call: Callable[[int], Any]):
        """Raises `Wrong` unless a forward call of ours is right."""
        verdict = self.compare([call(0)], strict=True)
        if not verdict["ok"]:
            raise Wrong(_differs(verdict))

    def compare(self, results, strict: bool) -> dict[str, Any]:
        """The largest relative error of the results, what is tolerated, and whether that was kept."""
        worst = {"error": -1.0, "tolerance": 0.0, "ok": True}
        for (name, want, size), got in zip(self.want, results, strict=True):
            got = self.of_cache(got) if name in ("d_key", "d_value") else self.of_heads(got)
            error = relative_error(got, want, size)
            allowed = tolerance(self.dtype, want.size, self.gradients) if strict else PEER_TOLERANCES[self.dtype]
            if not error <= allowed or error > worst["error"]:
                finite = error if math.isfinite(error) else None
                worst = {"error": finite, "tolerance": allowed, "ok": error <= allowed, "what": name}
            if not worst["ok"]:
                break
        return worst


# ---------------------------------------------------------------------------------------------------------------------------
# Candidates


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An implementation that takes part. `make` is as in `Peer`."""

    name: str
    make: Callable[[Case], Any]
    ours: bool = False
    torch: bool = False


def candidates(platform: str, backends: Sequence[str | None], peers: bool, gradients: bool) -> list[Candidate]:
    """Ours, once for each backend (None is the automatic choice), and the peers that run there."""
    ours = [
        Candidate(f"ejk-ragged {name}" if name else "ejk-ragged", functools.partial(decode_step, backend=name), ours=True)
        for name in backends
    ]
    return ours + [_peer(p) for p in PEERS if peers and platform in p.platforms and (p.gradients or not gradients)]


def _peer(peer: Peer) -> Candidate:
    return Candidate(peer.name, peer.make, torch=peer.torch)


def decode_step(case: Case, backend: Any = None, fwd_params: FwdParams | None = None):
    """Our call for a case, as `Peer.make` gives those of others."""

    def call(query, key, value, start, end, aux):
        full = case.lengths == ("full",)
        return ragged_decode_attention(
            query,
            key,
            value,
            None if case.lengths[0] != "ranges" else start,
            None if full else end,
            softmax_scale=case.softmax_scale,
            fwd_params=fwd_params,
            sliding_window=case.sliding_window,
            logits_soft_cap=case.logits_soft_cap,
            softmax_aux=aux,
            backend=backend,
        )

    return call


def _lower(call, inputs, gradients):
    """What has to be compiled: the forward step, or the whole gradient and the two halves of it."""
    arguments = inputs.arguments()
    if not gradients:
        return [jax.jit(call).lower(*arguments)]

    def step(query, key, value, rest):
        return call(query, key, value, *rest)

    def gradient(query, key, value, rest, d_out):
        loss = lambda q, k, v: jnp.sum(step(q, k, v, rest).astype(jnp.float32) * d_out.astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    def forward(query, key, value, rest):
        return jax.vjp(lambda q, k, v: step(q, k, v, rest), query, key, value)

    query, key, value, *rest = arguments
    whole = jax.jit(gradient).lower(query, key, value, rest, inputs.d_out)
    half = jax.jit(forward)
    _, pullback = jax.eval_shape(half, query, key, value, rest)
    back = jax.jit(lambda pullback, d_out: pullback(d_out)).lower(pullback, inputs.d_out)
    return [whole, half.lower(query, key, value, rest), back]


@dataclasses.dataclass(frozen=True)
class Works:
    """The calls of one candidate that are timed, by name, with the number of the run, and how to wait for one."""

    calls: dict[str, Callable[[int], Any]]
    wait: Callable[[Any], Any] = jax.block_until_ready


def _prepare(candidate, inputs, compiled, gradients) -> Works:
    """The calls of a candidate; `compiled` is what `_lower` gave, compiled, or what a `Peer` of PyTorch makes."""
    query, _, _, *rest = inputs.arguments()
    if candidate.torch:
        import torch  # pyright: ignore[reportMissingImports]

        prepare, call = compiled
        prepared = [prepare(query, *cache, *rest[:2]) for cache in inputs.caches]
        return Works({"forward": lambda run: call(*prepared[run % len(prepared)])}, lambda result: torch.cuda.synchronize())
    if not gradients:
        return Works({"forward": lambda run: compiled[0](*inputs.arguments(run))})
    whole, half, back = compiled
    pullbacks = [half(query, *cache, rest)[1] for cache in inputs.caches]
    return Works(
        {
            "gradient": lambda run: whole(query, *inputs.caches[run % len(inputs.caches)], rest, inputs.d_out),
            "backward": lambda run: back(pullbacks[run % len(pullbacks)], inputs.d_out),
        }
    )


def _check(candidate, works, sample) -> dict[str, Any]:
    """The worst of what every call of a candidate gives beside the oracle; "refused" says that it is wrong."""
    worst: dict[str, Any] = {"error": 0.0}
    for call in works.calls.values():
        results = call(0)
        works.wait(results)
        if candidate.torch:
            results = jnp.from_dlpack(results.contiguous())
        verdict = sample.compare(results if sample.gradients else [results], candidate.ours)
        if not verdict["ok"]:
            return {"refused": _differs(verdict)} | verdict
        worst = max(worst, verdict, key=lambda one: one["error"])
    return worst


def _differs(verdict):
    error = "is not finite" if verdict["error"] is None else f"{verdict['error']:.1e}"
    return f"differs from the oracle: {verdict['what']} {error}, {verdict['tolerance']:.1e} allowed"


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
    """An exception in a line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = str(error).strip().splitlines()
    short = text[0][:140] if text else ""
    return short if isinstance(error, CannotExpress | NotTimed | Wrong) else f"{type(error).__name__}: {short}"


# ---------------------------------------------------------------------------------------------------------------------------
# Rows


def measure(
    case: Case, machine: Machine, entrants: Sequence[Candidate], seed: int, runs: int = 15, gradients: bool = False
) -> dict[str, Any]:
    """One row: every candidate checked on a sample of it and timed, or the reason why not.

    Raises:
        ValueError: the row does not fit into memory.
    """
    per_copy = 4 if gradients else 1  # the cache, its copy among the residuals, and the gradients
    asked, case = case, fit(case, machine.memory, per_copy)
    inputs = draw_cold(case, seed, machine, runs, per_copy)
    sample = Sample(case, inputs, gradients)
    found: dict[str, dict[str, Any]] = {}
    made, waiting = [], {}
    for entrant in entrants:
        with findings(found, entrant.name), _quiet(not entrant.ours):
            call = entrant.make(case)
            made.append((entrant, call if entrant.torch else _lower(call, inputs, gradients)))
    with ThreadPoolExecutor(8) as threads:
        compiling = [(entrant, [threads.submit(_compile, one) for one in program]) for entrant, program in made]
    del made
    for entrant, futures in compiling:
        with findings(found, entrant.name):
            found[entrant.name], calls = _take_part(entrant, futures, inputs, sample, machine, runs)
            waiting |= {(entrant.name, name): call for name, call in calls.items()}
    for (entrant, name), timing in wall_times(waiting, min(runs, 7)).items():
        found[entrant].setdefault("timings", {})[name] = timing
    summary = _summary(asked, case, machine, inputs, entrants, found, seed, gradients)
    del inputs, sample, compiling, waiting
    gc.collect()  # the next row needs the memory
    return summary


def _take_part(entrant, futures, inputs, sample, machine, runs) -> tuple[dict[str, Any], dict[str, Callable]]:
    """One candidate checked, and timed if kernels are what is timed; otherwise its calls, to be timed with those of others."""
    works = _prepare(entrant, inputs, [future.result() for future in futures], sample.gradients)
    verdict = _check(entrant, works, sample)
    if "refused" in verdict:
        return verdict, {}
    if not machine.counts_kernels:
        return verdict, works.calls
    return verdict | {"timings": _time(entrant, works, runs)}, {}


@contextlib.contextmanager
def _quiet(wanted):
    """Without the warnings of others' code."""
    with warnings.catch_warnings():
        if wanted:
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def findings(found, name):
    """Whatever an implementation raises is a finding about it."""
    try:
        yield
    except Exception as error:
        found[name] = {"refused": reason(error)}


def _compile(program):
    """A lowered program compiled; what is none stays what it is."""
    return program.compile() if hasattr(program, "compile") else program


def _summary(asked, case, machine, inputs, entrants, found, seed, gradients) -> dict[str, Any]:
    live = case.live_bytes(seed)
    moved = live + cache_bytes(case) * gradients
    bandwidth = machine.copy if gradients else machine.read
    arguments = dict(zip(("query", "key", "value"), inputs.arguments(), strict=False), logits_soft_cap=case.logits_soft_cap)
    chosen = explain(**arguments)[machine.platform]
    results = []
    first = None
    for entrant in entrants:
        result = {"name": entrant.name, "ours": entrant.ours} | found[entrant.name]
        if "timings" in result:
            result["timings"] = {name: timing.as_dict() for name, timing in result["timings"].items()}
            seconds = result["timings"]["backward" if gradients else "forward"]["seconds"]
            result |= {"bytes_per_second": moved / seconds, "fraction": moved / seconds / bandwidth}
            whole = result["timings"]["gradient" if gradients else "forward"]["seconds"]
            first = first or (whole if entrant.ours else None)
            result["ratio"] = None if first is None else whole / first
        results.append(result)
    return {
        "row": case.name,
        "direction": "gradient" if gradients else "forward",
        "problem": str(explain(**arguments).problem),
        "lengths": list(case.lengths),
        "sliding_window": case.sliding_window,
        "sinks": case.sinks,
        "batch_asked": asked.batch,
        "backend": chosen.backward if gradients else chosen.forward,
        "live_tokens": case.live_tokens(seed),
        "live_bytes": live,
        "moved_bytes": moved,
        "copies": len(inputs.caches),
        "candidates": results,
    }


def scaling(machine: Machine, base: Case, seed: int, backend: str | None = None, runs: int = 15) -> dict[str, Any]:
    """Time against live tokens in the cache of `base`, and against the cache's size with the same few live tokens."""
    ours = candidates(machine.platform, [backend], peers=False, gradients=False)

    def points(cases):
        for case in cases:
            row = measure(case, machine, ours, seed, runs)
            if timing := row["candidates"][0].get("timings", {}).get("forward"):
                sizes = {"seq_len": case.seq_len, "live_tokens": row["live_tokens"], "live_bytes": row["live_bytes"]}
                yield sizes | {"seconds": timing["seconds"], "time": timing["time"]}

    longest = [base.seq_len * i // 6 for i in range(1, 7)]
    sizes = [base.seq_len // 4 * 2**i for i in range(5)]
    few = dataclasses.replace(base, lengths=("uniform", base.seq_len // 8, base.seq_len // 4))
    return {
        "problem": f"B {base.batch}, heads {base.num_q_heads}:{base.num_kv_heads}, D {base.head_dim}, {base.dtype}",
        "live": list(points(dataclasses.replace(base, lengths=("uniform", n // 2, n)) for n in longest)),
        "size": list(points(dataclasses.replace(few, seq_len=size) for size in sizes)),
    }
