"""The clocks: the times that they compute from events. No test is about how fast anything is."""

import jax
import jax.numpy as jnp
import pytest

from ejk_ragged._tools import machine, timing


def test_kernel_times_of_events():
    """Two runs of two kernels each, in nanoseconds. The second kernel of the first run runs while the first kernel does."""
    events = [(0, 3000, "a"), (1000, 1000, "b"), (5000, 2000, "a"), (7000, 2000, "b")]
    found = timing._of_events(events, 2)
    assert found.clock == "kernels"
    assert found.seconds == found.time.median == pytest.approx(3.5e-6)
    assert found.time.least == pytest.approx(3e-6)
    assert found.span is not None
    assert found.span.least == pytest.approx(3e-6)
    assert found.span.median == pytest.approx(3.5e-6)
    assert found.kernels == (("a", pytest.approx(2.5e-6)), ("b", pytest.approx(1.5e-6)))


@pytest.mark.parametrize("count", [0, 3])
def test_kernels_that_do_not_fit_the_runs(count):
    with pytest.raises(timing.NotTimed, match=f"saw {count} kernels in 2 runs"):
        timing._of_events([(i, 1, "a") for i in range(count)], 2)


def test_trace_without_kernels():
    """Work on the CPU leaves no kernels in the trace, also on a machine with a GPU."""
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(timing.NotTimed, match="0 kernels in 2 runs"):
        timing.kernel_times(lambda run: jnp.ones(3) + run, 2)


def test_wall_times_take_turns():
    seen = []
    timings = timing.wall_times({"a": lambda run: seen.append(("a", run)), "b": lambda run: seen.append(("b", run))}, 2)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert timings["a"].time.p10 <= timings["a"].time.median <= timings["a"].time.p90


def test_the_first_run_is_not_counted(monkeypatch):
    now = [0.0]

    def call(run):
        now[0] += 100 if run == 0 else run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    time = timing.wall_times({"a": call}, 2)["a"].time
    assert (time.least, time.median) == (1, 1.5)


def test_too_short_for_a_loop(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", iter(range(1000)).__next__)
    with pytest.raises(timing.NotTimed, match="too short"):
        timing.loop_times(lambda rounds: lambda: None, 1, 3)


def test_loop_times(monkeypatch):
    """A call of 0.01 s, where starting and waiting take 5 s."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def loop(rounds):
        def run():
            clock[0] += 5 + rounds * 3 * 0.01

        return run

    found = timing.loop_times(loop, 3, 4)
    assert (found.clock, found.seconds) == ("loop", pytest.approx(0.01))


def test_bandwidths():
    assert machine.read_bandwidth("cpu", 1 << 26) > 0
    assert machine.copy_bandwidth("cpu", 1 << 26) > 0


def test_machine(monkeypatch):
    monkeypatch.setattr(machine, "read_bandwidth", lambda platform, memory: memory * 1.0)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda platform, memory: memory * 2.0)
    here = machine.Machine.here()
    assert here.copy is None
    assert here.memory > 1 << 28
    assert (machine.Machine.here(copying=True).copy or 0) > 0
    assert here.counts_kernels == (here.platform in ("cuda", "rocm"))
