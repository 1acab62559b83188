"""How long the device takes: kernel times from JAX's profiler on a GPU, wall time on a CPU, and others where these don't do."""

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


LOOP_SECONDS = 0.1  # what a loop on the device takes, about


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds over several runs: median, 10th and 90th percentile, and the least."""

    median: float
    p10: float
    p90: float
    least: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        p10, p90 = np.percentile(seconds, [10, 90])
        return cls(statistics.median(seconds), float(p10), float(p90), min(seconds))


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one call takes.

    Attributes:
        clock: "kernels" (how long any of its kernels runs), "graph" (one call of a replayed CUDA graph), "loop" (one call in
            a loop on the device) or "wall".
        seconds: what is reported: the least of wall times, the median of all others.
        time: the spread of what the clock says.
        span: on a GPU, from the start of the first kernel to the end of the last one.
        kernels: on a GPU, name and median seconds of each kernel, in order.
    """

    clock: str
    time: Spread
    span: Spread | None = None
    kernels: tuple[tuple[str, float], ...] = ()

    @property
    def seconds(self) -> float:
        return self.time.least if self.clock == "wall" else self.time.median

    def as_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds} | dataclasses.asdict(self)


class NotTimed(Exception):
    """A call whose time cannot be told, and why."""


def wall_times(calls: Mapping[Any, Callable[[int], Any]], runs: int) -> dict[Any, Timing]:
    """Wall times of JAX calls, the argument being the number of the run. They take turns, so that a busy moment meets all."""
    seconds = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(run))
            if run > 0:  # the first run compiles, or warms up
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing("wall", Spread.of(times)) for name, times in seconds.items()}


def loop_times(loop: Callable[[int], Callable[[], Any]], calls: int, runs: int) -> Timing:
    """Times of one call where `loop(n)` gives a function that runs n rounds of `calls` calls on the device, or on several.

    From the difference between loops of two lengths, so that what it takes to start them and to wait for them does not count.

    Raises:
        NotTimed: a call is too short to be told from the noise.
    """

    def seconds(run):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - begin

    few = loop(2)
    seconds(few)  # compiles
    rounds = round(min(max(2 * LOOP_SECONDS / seconds(few), 4), 100))
    many = loop(2 + rounds)
    seconds(many)
    times = Spread.of([(seconds(many) - seconds(few)) / (rounds * calls) for _ in range(runs)])
    if times.median <= 0:
        raise NotTimed("too short to be timed in a loop")
    return Timing("loop", times)


def kernel_times(call: Callable[[int], Any], runs: int, wait: Callable[[Any], Any] = jax.block_until_ready) -> Timing:
    """Kernel times of `call(run)` on a GPU, from a trace of `runs` calls one after another.

    Copies and fills that are not kernels are left out.

    Raises:
        NotTimed: the trace does not hold the same number of kernels for every run.
    """
    for run in range(-3, 0):  # clocks as they are in the middle of work, but no copy of a cache that the first runs read
        wait(call(run))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    result = None
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for run in range(runs):
                result = call(run)
            wait(result)
        finally:
            jax.profiler.stop_trace()
        return _of_events(kernels_in(folder), runs)


def kernels_in(folder: str) -> list[tuple[float, float, str]]:
    """Start and duration in nanoseconds, and name, of the kernels in a trace, in the order in which they started."""
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    events = [
        (event.start_ns, event.duration_ns, event.name)
        for plane in data.planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return sorted(event for event in events if not event[2].lower().startswith(("memcpy", "memset")))


def _of_events(events, runs) -> Timing:
    per_run, odd = divmod(len(events), runs)
    if odd or not per_run:
        raise NotTimed(f"the profiler saw {len(events)} kernels in {runs} runs")
    calls = [events[i * per_run : (i + 1) * per_run] for i in range(runs)]
    durations = np.array([[duration for _, duration, _ in call] for call in calls]) * 1e-9
    spans = [(max(start + duration for start, duration, _ in call) - call[0][0]) * 1e-9 for call in calls]
    busy = [_busy([(start, start + duration) for start, duration, _ in call]) * 1e-9 for call in calls]
    names = [name for _, _, name in calls[0]]
    medians = np.median(durations, axis=0)
    kernels = tuple((name[:80], float(seconds)) for name, seconds in zip(names, medians, strict=True))
    return Timing("kernels", Spread.of(busy), Spread.of(spans), kernels)


def _busy(intervals: Sequence[tuple[float, float]]) -> float:
    """How long any of the intervals, sorted by their beginnings, lasts: a kernel that waits for another counts once with it."""
    total, until = 0.0, -math.inf
    for begin, end in intervals:
        total += max(end - max(begin, until), 0)
        until = max(until, end)
    return total


def graph_times(torch: Any, call: Callable[[int], Any], runs: int) -> Timing:
    """Times of a PyTorch call from CUDA graphs, each holding one run and replayed between two events."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in range(3):
            call(run)
    torch.cuda.synchronize()
    seconds = []
    for run in range(runs):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call(run)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begin.record()
            graph.replay()
            end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return Timing("graph", Spread.of(seconds))
