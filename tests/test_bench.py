"""The benchmark: what it times, what it refuses to time and why, and what it leaves behind. How fast anything is, no test says."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ejk_ragged
from ejk_ragged import Backend, ragged_decode_attention
from ejk_ragged.__main__ import main
from ejk_ragged._registry import registry
from ejk_ragged._tools import bench, bench_report, devices, peers, timing
from ejk_ragged._tools.rows import ROWS
from ejk_ragged.testing import Case, oracle


TINY = Case("tiny", 3, 48, 4, 2, 64, lengths=("uniform", 3, 40))
FEATURES = Case("features", 3, 48, 4, 2, 64, "bfloat16", ("skew", 3, 9), 0.2, (20, 0), 1.5, ("query", 1))
MACHINE = bench.Machine("cpu", "a test", 1 << 30, 1e9, 2e9)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench_report, "CPU_ROWS", (TINY, FEATURES))
    monkeypatch.setitem(bench_report.GROUPS, "cpu", (TINY, FEATURES))
    monkeypatch.setitem(bench_report.SCALING, "cpu", dataclasses.replace(TINY, seq_len=24))
    monkeypatch.setattr(bench.Machine, "here", classmethod(lambda cls, copying=False: MACHINE))


def peer(call, **fields):
    return peers.Peer("made up", lambda case: call, ("cpu",), gradients=True, **fields)


def measure(case=TINY, gradients=False, peers=(), **options):
    entrants = bench.candidates("cpu", [None], False, gradients) + [bench.Candidate(p.name, p.make) for p in peers]
    row = bench.measure(case, MACHINE, entrants, seed=5, runs=2, gradients=gradients, **options)
    return row, {found["name"]: found for found in row["candidates"]}


# ---------------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("case", [TINY, FEATURES], ids=lambda case: case.name)
def test_forward(case):
    row, found = measure(case)
    ours = found["ejk-ragged"]
    assert ours["ok"]
    timing = ours["timings"]["forward"]
    assert timing["clock"] == "wall"
    assert timing["seconds"] == timing["time"]["least"] > 0
    assert row["live_bytes"] == row["moved_bytes"] == case.live_bytes(5)
    assert ours["fraction"] == pytest.approx(case.live_bytes(5) / timing["seconds"] / MACHINE.read)
    assert ours["ratio"] == 1


def test_gradient():
    row, found = measure(gradients=True)
    ours = found["ejk-ragged"]
    assert ours["ok"]
    assert set(ours["timings"]) == {"gradient", "backward"}
    assert row["moved_bytes"] == TINY.live_bytes(5) + 2 * 3 * 48 * 2 * 64 * 4
    assert ours["fraction"] == pytest.approx(row["moved_bytes"] / ours["timings"]["backward"]["seconds"] / MACHINE.copy)


@pytest.mark.parametrize("case", [TINY, FEATURES], ids=lambda case: case.name)
def test_sample(case):
    """What the oracle says of a sample is what it says of the whole."""
    inputs = bench.draw(case, 5, 1, on_device=False)
    query, key, value, start, end, aux = (None if x is None else np.asarray(x) for x in inputs.arguments())
    out, _ = oracle(query, key, value, start, end, case.softmax_scale, case.sliding_window, case.logits_soft_cap, aux)
    sample = bench.Sample(case, inputs, gradients=False)
    assert sample.compare([out], strict=True)["ok"]
    assert sample.compare([out], strict=True)["error"] < 1e-7
    out[int(end.argmax()), 0, 0] += 1
    assert not sample.compare([out], strict=False)["ok"]
    assert sample.compare([out * np.nan], strict=False)["error"] is None


def test_fresh_data():
    first, again, other = (bench.draw(FEATURES, seed, 2, on_device) for seed, on_device in ((1, False), (1, False), (2, True)))
    for x, y in zip(first.arguments(), again.arguments(), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(first.caches[0][0], first.caches[1][0])
    assert not np.array_equal(first.end, other.end)
    assert not np.array_equal(other.caches[0][0], other.caches[1][0])
    assert first.arguments(3)[1] is first.caches[1][0]


def test_memory():
    large = dataclasses.replace(TINY, batch=100)
    per_sequence = bench.cache_bytes(large) // 100
    assert bench.fit(large, 20 * per_sequence, 2).batch == 6
    assert bench.fit(large, 1000 * per_sequence, 2) is not None
    with pytest.raises(ValueError, match="one sequence needs"):
        bench.fit(large, per_sequence, 1)


def test_fewer_sequences_are_noted(monkeypatch):
    monkeypatch.setattr(bench, "fit", lambda case, memory, copies: dataclasses.replace(case, batch=2))
    (made,) = bench_report.run(rows=["tiny"], runs=1)["tables"]
    assert made["notes"] == ["B 2 sequences instead of 3, to fit into memory (tiny)"]


# ---------------------------------------------------------------------------------------------------------------------------
# Peers


def test_peer_beside_us():
    _, found = measure(peers=[peer(peers.jax_nn(TINY, "xla"))])
    assert found["made up"]["timings"]
    assert found["made up"]["ratio"] > 0


@pytest.mark.parametrize("gradients", [False, True])
def test_wrong_peer_is_not_timed(gradients):
    def wrong(query, key, value, start, end, aux):
        return peers.jax_nn(TINY, "xla")(query, key, value, start, end - 1, aux)

    _, found = measure(peers=[peer(wrong)], gradients=gradients)
    assert found["made up"]["refused"].startswith("differs from the oracle")
    assert "timings" not in found["made up"]
    assert found["ejk-ragged"]["timings"]


def test_failing_peer():
    def failing(*args):
        raise ArithmeticError("not today\nand a long story")

    _, found = measure(peers=[peer(failing)])
    assert found["made up"]["refused"] == "ArithmeticError: not today"


def test_absent_peer():
    def make(case):
        import no_such_module  # noqa: F401  # pyright: ignore

    _, found = measure(peers=[dataclasses.replace(peer(None), make=make)])
    assert found["made up"]["refused"] == "no_such_module is not installed"


@pytest.mark.parametrize("name", [p.name for p in peers.PEERS])
def test_peers_say_what_they_lack(name):
    """Each either is absent, or makes a call, or says what it cannot express; none takes a soft cap and drops it."""
    (found,) = (p for p in peers.PEERS if p.name == name)
    if name.startswith("ejkernel") and importlib.util.find_spec("ejkernel"):
        found.make(FEATURES)  # it takes all of it; the oracle decides
        return
    with pytest.raises((peers.CannotExpress, ImportError)):
        found.make(FEATURES)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"sliding_window": (3, 0)}, "no decode window"),
        ({"logits_soft_cap": 5.0}, "no soft cap"),
        ({"sinks": ("query", 1)}, "no sinks"),
    ],
)
def test_jax_nn_cannot_express(change, lacks):
    with pytest.raises(peers.CannotExpress, match=lacks):
        peers.jax_nn(dataclasses.replace(TINY, **change), "xla")


def _theirs(**given):
    """Stands in for a peer's function: whatever they call their arguments, it does what ours does."""
    return ragged_decode_attention(**{name: value for name, value in given.items() if value is not None})


def fake_tokamax(
    query, key, value, bias=None, mask=None, *, scale=None, key_value_seq_lengths=None, logits_soft_cap=None, implementation=None
):
    ours = {"softmax_scale": scale, "sequence_end": key_value_seq_lengths, "logits_soft_cap": logits_soft_cap}
    return _theirs(query=query[:, 0], key=key, value=value, **ours)[:, None]


def fake_flash_attention(
    q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, softmax_scale=None, is_causal=False, window_size=(-1, -1), num_splits=1
):
    ours = {"softmax_scale": softmax_scale, "sequence_end": cache_seqlens, "sliding_window": window_size}
    assert is_causal == (window_size != (-1, -1))
    assert num_splits >= 1
    return _theirs(query=q[:, 0], key=k_cache, value=v_cache, **ours)[:, None]


def fake_jax_pallas(q, k, v, start_idx=None, kv_seq_len=None, sm_scale=None):
    return _theirs(query=q, key=k, value=v, sequence_start=start_idx, sequence_end=kv_seq_len, softmax_scale=sm_scale)


def fake_ejkernel(query, key, value, sequence_start, sequence_end, **options):
    return _theirs(query=query, key=key, value=value, sequence_start=sequence_start, sequence_end=sequence_end, **options)


FAKES = {
    "tokamax": ("tokamax", "dot_product_attention", fake_tokamax),
    "flash-attn3-jax": ("flash_attn3_jax", "flash_mha_with_kvcache", fake_flash_attention),
    "jax pallas op": ("jax.experimental.pallas.ops.gpu.decode_attention", "gqa", fake_jax_pallas),
    "ejkernel pallas": ("ejkernel.kernels._pallas.gpu.ragged_decode_attention", "ragged_decode_attention", fake_ejkernel),
    "ejkernel triton": ("ejkernel.kernels._triton.ragged_decode_attention", "ragged_decode_attention", fake_ejkernel),
}


@pytest.mark.parametrize("name", FAKES)
def test_peers_are_asked_the_right_question(name, monkeypatch):
    """With the peer's signature and our meaning behind it, every case that it takes is answered right."""
    module, attribute, function = FAKES[name]
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        if parts[0] != "jax" or i == len(parts):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    setattr(sys.modules[module], attribute, function)
    (found,) = (p for p in peers.PEERS if p.name == name)
    cases = [TINY, dataclasses.replace(TINY, lengths=("full",)), FEATURES]
    cases += [
        dataclasses.replace(TINY, **{feature: getattr(FEATURES, feature)}) for feature in ("logits_soft_cap", "sliding_window")
    ]
    verdicts = []
    for case in cases:
        try:
            found.make(case)
        except peers.CannotExpress:
            continue
        _, results = measure(case, peers=[found])
        verdicts.append(results[name].get("refused"))
    assert verdicts == [None] * len(verdicts)
    assert len(verdicts) == {"tokamax": 3, "flash-attn3-jax": 3, "jax pallas op": 2}.get(name, 5)


def test_ejkernel_triton_is_spared_long_caches():
    with pytest.raises(peers.CannotExpress, match="unrolls"):
        peers.ejkernel(dataclasses.replace(TINY, seq_len=8192), "triton")


# ---------------------------------------------------------------------------------------------------------------------------
# Clocks


def test_kernel_times_of_events():
    """Two runs of two kernels each, nanoseconds; the second kernel of the first run overlaps the first one."""
    events = [(0, 3000, "a"), (1000, 1000, "b"), (5000, 2000, "a"), (7000, 2000, "b")]
    timing = timing._of_events(events, 2)
    assert timing.clock == "kernels"
    assert timing.seconds == timing.time.median == pytest.approx(4e-6)
    assert timing.span.least == pytest.approx(3e-6)
    assert timing.span.median == pytest.approx(3.5e-6)
    assert timing.kernels == (("a", pytest.approx(2.5e-6)), ("b", pytest.approx(1.5e-6)))


@pytest.mark.parametrize("count", [0, 3])
def test_kernels_that_do_not_fit_the_runs(count):
    with pytest.raises(timing.NotTimed, match=f"saw {count} kernels in 2 runs"):
        timing._of_events([(i, 1, "a") for i in range(count)], 2)


def test_trace_without_kernels():
    """What runs on the CPU leaves none, on a GPU machine too."""
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


def test_kernels_are_what_counts_on_a_gpu(monkeypatch):
    """There each candidate is traced by itself, on copies of the cache that differ."""
    traced = []

    def trace(call, runs, wait):
        traced.append([np.asarray(call(run)) for run in range(runs)])
        return timing.Timing("kernels", timing.Spread(2e-6, 1e-6, 4e-6, 1e-6))

    monkeypatch.setattr(bench, "kernel_times", trace)
    monkeypatch.setattr(bench.Machine, "counts_kernels", property(lambda self: True))
    row, found = measure()
    assert row["copies"] == 2
    (results,) = traced
    assert not np.array_equal(results[0], results[1])
    assert found["ejk-ragged"]["bytes_per_second"] == pytest.approx(TINY.live_bytes(5) / 2e-6)

    def cannot(*arguments):
        raise timing.NotTimed("the profiler saw nothing")

    monkeypatch.setattr(bench, "kernel_times", cannot)
    assert measure()[1]["ejk-ragged"]["refused"] == "the profiler saw nothing"


def test_bandwidths():
    assert timing.read_bandwidth("cpu", 1 << 26) > 0
    assert timing.copy_bandwidth("cpu", 1 << 26) > 0


# ---------------------------------------------------------------------------------------------------------------------------
# Many devices

SPLIT = Case("split", 4, 48, 8, 4, 16, lengths=("uniform", 3, 40), sinks=("query", 1))


def test_split(monkeypatch):
    """Each way has run in a loop before its time counts."""

    def loop_times(loop, calls, runs):
        out = loop(3)()
        assert (calls, runs) == (1, 2)
        assert bool(jnp.isfinite(out).all())
        return timing.Timing("loop", timing.Spread.of([len(out.sharding.device_set) ** -0.5]))

    monkeypatch.setattr(devices, "loop_times", loop_times)
    row = devices.measure(SPLIT, MACHINE, jax.devices()[:4], seed=5, runs=2)
    assert (row["devices"], row["live_bytes"]) == (4, SPLIT.live_bytes(5))
    assert {name: (way["clock"], way.get("speedup")) for name, way in row["ways"].items()} == {
        "one device": ("loop", None),
        "batch": ("loop", 2),
        "kv heads": ("loop", 2),
        "rows": ("loop", 2),
    }


def test_only_what_is_right_is_timed(monkeypatch):
    """The cache is where it is said to be, and what is wrong there has no time."""
    seen = []

    def decode_step(case, backend):
        right = bench.decode_step(case, backend)

        def call(query, key, value, *rest):
            out = right(query, key, value, *rest)
            jax.debug.inspect_array_sharding(key, callback=lambda sharding: seen.append(len(sharding.device_set)))
            return out + 1

        return call

    monkeypatch.setattr(devices, "decode_step", decode_step)
    row = devices.measure(SPLIT, MACHINE, jax.devices()[:2], seed=5, runs=2)
    assert all("differs from the oracle" in way["refused"] for way in row["ways"].values())
    assert seen == [1, 2, 2, 2]


def test_what_cannot_be_split(monkeypatch):
    monkeypatch.setattr(devices, "_timed", lambda *args: {})
    row = devices.measure(dataclasses.replace(SPLIT, batch=3), MACHINE, jax.devices()[:2], seed=5, runs=1)
    assert row["ways"]["batch"] == {"cannot": "batch 3 is no multiple of 2 devices"}


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

    timing = timing.loop_times(loop, 3, 4)
    assert (timing.clock, timing.seconds) == ("loop", pytest.approx(0.01))


# ---------------------------------------------------------------------------------------------------------------------------
# The command


def test_command(capsys, tmp_path):
    assert main(["bench", "--peers", "--grad", "--runs", "1", "--out", str(tmp_path), "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert "Decode steps on a test" in out
    assert "jax.nn xla" in out
    assert "no decode window, no soft cap, no sinks (features)" in out
    assert "live tokens:" in out
    assert "seed 7" in out
    data = json.loads((tmp_path / "a-test.json").read_text())
    assert data["seed"] == 7
    assert [row["row"] for row in data["rows"]] == ["tiny", "features"]  # the rows with gradients are others
    assert [point["seq_len"] for point in data["scaling"]["size"]] == [6, 12, 24, 48, 96]
    assert len({point["live_tokens"] for point in data["scaling"]["size"]}) == 1
    assert len({point["live_tokens"] for point in data["scaling"]["live"]}) == 6


def test_gradients_of_named_rows(capsys):
    assert main(["bench", "--rows", "tiny", "--grad", "only", "--runs", "1", "--json", "--dtype", "bfloat16"]) == 0
    data = json.loads(capsys.readouterr().out)
    (row,) = data["rows"]
    assert row["direction"] == "gradient"
    assert "bfloat16" in row["problem"]
    assert "scaling" not in data
    (made,) = data["tables"]
    assert made["columns"][2:4] == ["forward + backward", "backward"]


def test_command_split(monkeypatch, capsys, tmp_path):
    spread = timing.Spread.of([0.1])
    monkeypatch.setattr(devices, "loop_times", lambda *args: timing.Timing("loop", spread))
    assert main(["bench", "--rows", "tiny", "--split", "only", "--runs", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Decode steps on 8 of a test, the cache split" in out
    assert "100.0 ms (1.00x)" in out
    assert "batch: batch 3 is no multiple of 8 devices" in out
    data = json.loads((tmp_path / "a-test.json").read_text())
    assert data["rows"] == []
    assert [row["row"] for row in data["splits"]] == ["tiny"]
    monkeypatch.setattr(devices, "fit", lambda case, memory, copies: dataclasses.replace(case, batch=2))
    (made,) = bench_report.run(rows=["tiny"], split="only", runs=1)["tables"]
    assert "B 2 sequences instead of 3, to fit into memory (tiny)" in made["notes"]
    monkeypatch.setattr(jax, "devices", lambda: ["one"])
    with pytest.raises(SystemExit):
        main(["bench", "--split"])
    assert "there is only one device" in capsys.readouterr().err


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    data = bench_report.run(grad="also", runs=1, rows=["tiny"], scaling=True)
    files = bench_report.write(data, tmp_path)
    assert [file.name for file in files] == ["a-test.json", "a-test-forward.png", "a-test-gradient.png", "a-test-scaling.png"]


def test_page_of_results(tmp_path):
    """The documentation shows the same table."""
    file = pathlib.Path(__file__).parents[1] / "docs/hooks/results.py"
    spec = importlib.util.spec_from_file_location("results", file)
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    bench_report.write(bench_report.run(rows=["tiny"], runs=1, peers=True), tmp_path / "performance")
    page = results.on_page_markdown("before <!-- results --> after", None, types.SimpleNamespace(docs_dir=tmp_path), None)
    assert page.startswith("before ### a test")
    assert page.endswith("after")
    assert "| tiny | " in page
    assert "jax.nn&nbsp;xla" in page
    (tmp_path / "performance" / "a-test.json").unlink()
    assert "No results" in results.on_page_markdown("<!-- results -->", None, types.SimpleNamespace(docs_dir=tmp_path), None)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ejk_ragged._plots", None)
    monkeypatch.delattr(ejk_ragged, "_plots", raising=False)
    assert [file.name for file in bench_report.write(bench_report.run(rows=["tiny"], runs=1), tmp_path)] == ["a-test.json"]


def test_too_large_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(bench.Machine, "here", classmethod(lambda cls, copying=False: dataclasses.replace(MACHINE, memory=1000)))
    assert main(["bench", "--rows", "tiny"]) == 0
    assert "skipped tiny: tiny: one sequence needs" in capsys.readouterr().out


def test_wrong_backend_is_an_exit_status(monkeypatch, capsys):
    class Zeros(Backend):
        name = "zeros"
        platforms = frozenset({"cpu"})

        def supports(self, problem, target):
            return None

        def forward(self, problem, target, query, key, value, start, end, sink):
            return query * 0, sink

    monkeypatch.setattr(registry, "get", lambda name: Zeros())
    assert main(["bench", "--rows", "tiny", "--backends", "zeros"]) == 1
    assert "ejk-ragged zeros: differs from the oracle: out 1.0e+00" in capsys.readouterr().out


def test_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["bench", "--rows", "tiny", "--runs", "1", "--scaling"]) == 0
    out, err = capsys.readouterr()
    assert "fraction" in out
    assert "tiny" in out
    assert "live tokens:" in out
    assert "[1/2]" not in err


def test_machine(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(bench, "read_bandwidth", lambda platform, memory: memory * 1.0)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda platform, memory: memory * 2.0)
    machine = bench.Machine.here()
    assert machine.copy is None
    assert machine.memory > 1 << 28
    assert bench.Machine.here(copying=True).copy > 0
    assert machine.counts_kernels == (machine.platform in ("cuda", "rocm"))


@pytest.mark.parametrize("arguments", [["--rows", "nonsense"], ["--backends", "nonsense"]])
def test_unknown_names(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments])
    assert exit.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_help_names_the_rows(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    words = capsys.readouterr().out.split()
    assert {row.name for row in ROWS} <= set(words)
    assert set(bench_report.GROUPS) <= set(words)
