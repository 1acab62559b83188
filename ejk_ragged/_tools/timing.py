"""The clocks of the benchmark: kernel times from JAX's profiler, wall times, loops on devices, and CUDA graphs."""

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


LOOP_SECONDS = 0.1  # approximate time of a loop on the device


@dataclasses.dataclass(frozen=True)
class Spread:
    """The times of several runs, in seconds: median, 10th and 90th percentile, and the least."""

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
    """The time of one call.

    Attributes:
        clock: "kernels" (the time for which any of the call's kernels runs), "graph" (a replayed CUDA graph of the call), "loop"
            (the call in a loop on the device) or "wall".
        seconds: the reported time: the least for the clock "wall", and the median for the other clocks.
        time: the times of all runs, by the clock.
        span: the time from the start of the first kernel to the end of the last kernel. Only for the clock "kernels".
        kernels: name and median seconds of each kernel, in order. Only for the clock "kernels".
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
    """The time of a call cannot be measured. The message has the reason."""


def wall_times(calls: Mapping[Any, Callable[[int], Any]], runs: int) -> dict[Any, Timing]:
    """Wall times of JAX calls. A call takes the number of the run. The calls take turns, so that a busy moment affects all."""
    seconds = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(run))
            if run > 0:  # the first run compiles, or warms up
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing("wall", Spread.of(times)) for name, times in seconds.items()}


def loop_times(loop: Callable[[int], Callable[[], Any]], calls: int, runs: int) -> Timing:
    """The time of one call in a loop. `loop(n)` returns a function that runs n rounds of `calls` calls, on one device or several.

    The time comes from the difference between loops of two lengths. So the time to start a loop and to wait for it does not count.

    Raises:
        NotTimed: a call is so short that noise hides its time.
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
    for run in range(-3, 0):  # warms up, with other copies of the cache than those of the first timed runs
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
    """The kernels in a trace, in the order in which they started: start and duration in nanoseconds, and name."""
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
    """The length of the union of intervals, which are sorted by their beginnings. Time in which two kernels run counts once."""
    total, until = 0.0, -math.inf
    for begin, end in intervals:
        total += max(end - max(begin, until), 0)
        until = max(until, end)
    return total


def graph_times(torch: Any, call: Callable[[int], Any], runs: int) -> Timing:
    """Times of a PyTorch call from CUDA graphs. Each graph holds one run, and is replayed between two events."""
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
