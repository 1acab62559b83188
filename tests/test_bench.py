"""The benchmark's measurements: what is drawn, what is checked, and what gets no time. No test is about how fast anything is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ejk_ragged._tools import bench, devices, inputs, peers, timing
from ejk_ragged._tools.cases import label, SCALES, variants
from ejk_ragged._tools.machine import Machine
from ejk_ragged.testing import Case, oracle, TextbookBackend


TINY = Case("tiny", 3, 48, 4, 2, 64, lengths=("uniform", 3, 40))
FEATURES = Case("features", 3, 48, 4, 2, 64, "bfloat16", ("skew", 3, 9), 0.2, (20, 0), 1.5, ("query", 1))
TOKENS, INT8, BOTH = variants(FEATURES, [3], ["int8"])[1:]
LATENT = dataclasses.replace(TINY, num_kv_heads=1, softmax_scale=0.2, value_columns=(0, 48))
NARROW = dataclasses.replace(TINY, value_dim=32, lengths=("full",))
IN_PAGES = [variants(case, page_sizes=[20])[-1] for case in (TINY, BOTH, LATENT, NARROW)]  # 20 does not divide 48
CASES = [TINY, FEATURES, TOKENS, INT8, BOTH, LATENT, NARROW, *IN_PAGES]
MACHINE = Machine("cpu", "a test", 1 << 30, 1e9, 2e9)
OURS = bench.Candidate("ours", functools.partial(bench.decode_step, backend=TextbookBackend()), ours=True)  # compiles quickly

by_label = pytest.mark.parametrize("case", CASES, ids=str)


def measure(case=TINY, gradients=False, others=()):
    entrants = [OURS] + [bench.Candidate(peer.name, peer.call) for peer in others]
    row = bench.measure(case, MACHINE, entrants, seed=5, runs=2, gradients=gradients)
    return row, {found["name"]: found for found in row["candidates"]}


def peer(call, **fields):
    return peers.Peer("made up", lambda case: call, platforms=("cpu",), gradients=True, **fields)


# ---------------------------------------------------------------------------------------------------------------------------
# Cases


@pytest.mark.parametrize("case", [TINY, BOTH], ids=label)
def test_forward(case):
    row, found = measure(case)
    assert found["ours"]["ok"]
    timing = found["ours"]["timings"]["forward"]
    assert timing["clock"] == "wall"
    assert timing["seconds"] == timing["time"]["least"] > 0
    assert row["live_bytes"] == row["moved_bytes"] == case.live_bytes(5)
    assert found["ours"]["fraction"] == pytest.approx(case.live_bytes(5) / timing["seconds"] / MACHINE.read)
    assert found["ours"]["ratio"] == 1
    assert (row["num_tokens"], row["cache_dtype"], row["group"]) == (case.num_tokens or 1, case.cache_dtype, 2)


@pytest.mark.parametrize("case", [TINY, TOKENS, BOTH], ids=label)
def test_gradient(case):
    """A quantised cache has no gradient to write. So the bytes of the backward pass are the bytes that are read."""
    row, found = measure(case, gradients=True)
    assert found["ours"]["ok"]
    assert set(found["ours"]["timings"]) == {"gradient", "backward"}
    written = 0 if case.cache_dtype else 2 * 3 * 48 * 2 * 64 * (4 if case is TINY else 2)
    assert row["moved_bytes"] == case.live_bytes(5) + written
    assert row["differentiated"] == (["query"] if case.cache_dtype else ["query", "key", "value"])
    bandwidth = MACHINE.read if case.cache_dtype else MACHINE.copy
    seconds = found["ours"]["timings"]["backward"]["seconds"]
    assert found["ours"]["fraction"] == pytest.approx(row["moved_bytes"] / seconds / bandwidth)


@pytest.mark.parametrize("case", [LATENT, NARROW, *IN_PAGES], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_pages_and_widths(case, gradients):
    """The bytes of a pool are the bytes of the padded cache and of the table's entries. A pool has no gradient."""
    row, found = measure(case, gradients=gradients)
    assert found["ours"].get("refused") is None
    padded = dataclasses.replace(case, page_size=None)
    entries = 4 * -(-padded.live_tokens(5) // 20) if case.page_size else 0
    assert row["live_bytes"] == padded.live_bytes(5)
    written = inputs.cache_bytes(case) if gradients and case.page_size is None else 0
    assert row["moved_bytes"] == padded.live_bytes(5) + entries + written
    assert row["page_size"] == case.page_size
    names = ["query"] if case.page_size else ["query", "key"] if case.value_columns else ["query", "key", "value"]
    assert row["differentiated"] == (names if gradients else [])


@pytest.mark.parametrize("case", IN_PAGES, ids=str)
def test_a_pool_in_random_order(case):
    """Each sequence has pages of its own. Reading the pages in another order gives another answer, and the check finds that."""
    drawn = inputs.draw(case, 5, 2, on_device=False)
    table = np.asarray(drawn.rest["page_table"])
    assert sorted(table.flat) == list(range(table.size))
    assert (np.diff(table) != 1).any()
    assert all(cache["key"].shape[:2] == (table.size, 20) for cache in drawn.caches)
    padded = inputs.draw(inputs.padded(case), 5, 1, on_device=False)
    np.testing.assert_array_equal(drawn.rest["sequence_end"], padded.rest["sequence_end"])

    def other_order(case):
        call = bench.decode_step(case, backend=TextbookBackend())
        return lambda page_table, **rest: call(page_table=page_table[:, ::-1], **rest)

    entrants = [bench.Candidate("ours", other_order, ours=True)]
    (found,) = bench.measure(case, MACHINE, entrants, seed=5, runs=2)["candidates"]
    assert found["refused"].startswith("differs from the oracle: out ")


@pytest.mark.parametrize(("case", "what"), [(TOKENS, "d_key"), (BOTH, "d_query")], ids=["tokens", "both"])
def test_wrong_gradients_are_found(case, what):
    class Wrong(TextbookBackend):
        def backward(self, *args, **kwargs):
            gradients = super().backward(*args, **kwargs)
            wrong = 1 if what == "d_key" else 0
            return [x * 2 if i == wrong else x for i, x in enumerate(gradients)]

    entrants = [bench.Candidate("wrong", functools.partial(bench.decode_step, backend=Wrong()), ours=True)]
    (found,) = bench.measure(case, MACHINE, entrants, seed=5, runs=2, gradients=True)["candidates"]
    assert found["refused"].startswith(f"differs from the oracle: {what} ")


@by_label
def test_sample(case):
    """The oracle's answer for a sample is its answer for the whole. The check finds a head or a token that is wrong in the
    sample."""
    drawn = inputs.draw(case, 5, 1, on_device=False)
    arguments = {name: np.asarray(x) for name, x in drawn.arguments().items()}
    out, _ = oracle(**arguments, **inputs.settings(case))
    sample = inputs.Sample(case, drawn, gradients=False)
    verdict = sample.compare({"out": out}, strict=True)
    assert verdict["ok"]
    assert verdict["error"] < 1e-7
    out[int(arguments["sequence_end"].argmax()), ..., -1, :] += 1
    assert not sample.compare({"out": out}, strict=False)["ok"]
    assert sample.compare({"out": out * np.nan}, strict=False)["error"] is None


def test_fresh_data():
    first, again, other = (inputs.draw(BOTH, seed, 2, on_device) for seed, on_device in ((1, False), (1, False), (2, True)))
    for name, x in first.arguments().items():
        np.testing.assert_array_equal(x, again.arguments()[name])
    assert not np.array_equal(first.rest["sequence_end"], other.rest["sequence_end"])
    for drawn in (first, other):
        assert all(not np.array_equal(drawn.caches[0][name], drawn.caches[1][name]) for name in inputs.CACHE)
    assert first.arguments(3)["key"] is first.caches[1]["key"]


@pytest.mark.parametrize(
    ("scales", "page_size", "letters"),
    [
        *zip(SCALES, [None] * 4, ("bhs", "bh", "h", ""), strict=True),
        ("row", 16, "phr"),
        ("head", 16, "h"),
        ("number", 16, ""),
    ],
)
def test_caches_are_alike_wherever_they_are_drawn(scales, page_size, letters):
    case = dataclasses.replace(BOTH, scales=scales, page_size=page_size)
    here, there = (inputs.draw(case, 1, 1, on_device).arguments() for on_device in (False, True))
    assert {name: (x.shape, x.dtype) for name, x in here.items()} == {name: (x.shape, x.dtype) for name, x in there.items()}
    for arguments in (here, there):
        meant = np.asarray(arguments["key"], np.float32) * np.asarray(arguments["key_scale"]).mean()
        assert 0.7 < meant.std() < 1.4
        assert inputs.letters_of("key_scale", arguments["key_scale"], case) == letters


def test_memory():
    large = dataclasses.replace(TINY, batch=100)
    per_sequence = inputs.cache_bytes(large) // 100
    assert inputs.fit(large, 20 * per_sequence, 2).batch == 6
    assert inputs.fit(large, 1000 * per_sequence, 2) is not None
    with pytest.raises(inputs.TooLarge, match="one sequence needs"):
        inputs.fit(large, per_sequence, 1)


@by_label
def test_bytes(case):
    """The bytes of a case are the bytes of the arrays that are drawn, scales included."""
    (cache,) = inputs.draw(case, 1, 1, on_device=True).caches
    assert inputs.cache_bytes(case) == sum(x.nbytes for x in cache.values())


def test_scaling_goes_on_without_a_point(monkeypatch):
    """If a size has no room, or something fails, the other points remain."""
    found = {"timings": {"forward": {"seconds": 1.0, "time": {}}}}

    def fake(case, *args):
        if case.seq_len == 24:
            raise ArithmeticError("not today")
        wrong = case.lengths == ("uniform", 4, 8)
        return {"candidates": [{"refused": "wrong"} if wrong else found], "live_tokens": case.lengths[2], "live_bytes": 1}

    monkeypatch.setattr(bench, "measure", fake)
    base = dataclasses.replace(TINY, seq_len=48)
    machine = dataclasses.replace(MACHINE, memory=int(1.5 * inputs.cache_bytes(base) / 0.6))
    points = bench.scaling(machine, base, seed=5)
    assert [point["seq_len"] for point in points["size"]] == [12, 48]
    assert [point["live_tokens"] for point in points["live"]] == [16, 24, 32, 40, 48]
    assert points["left_out"] == {
        "8 of 48 rows": {"refused": "wrong"},
        "12 of 24 rows": {"refused": "ArithmeticError: not today"},
        "12 of 96 rows": {"cannot": "not all sequences fit into memory"},
        "12 of 192 rows": {"cannot": "not all sequences fit into memory"},
    }


# ---------------------------------------------------------------------------------------------------------------------------
# The candidates


def test_peer_beside_us():
    _, found = measure(others=[peer(peers.jax_nn(TINY, "xla"))])
    assert found["made up"]["timings"]
    assert found["made up"]["ratio"] > 0


@pytest.mark.parametrize("gradients", [False, True])
def test_wrong_peer_is_not_timed(gradients):
    def wrong(sequence_end, **rest):
        return peers.jax_nn(TINY, "xla")(sequence_end=sequence_end - 1, **rest)

    _, found = measure(others=[peer(wrong)], gradients=gradients)
    assert found["made up"]["refused"].startswith("differs from the oracle")
    assert "timings" not in found["made up"]
    assert found["ours"]["timings"]


def test_failing_peer():
    def failing(**arrays):
        raise ArithmeticError("not today\nand a long story")

    _, found = measure(others=[peer(failing)])
    assert found["made up"]["refused"] == "ArithmeticError: not today"


def test_absent_peer():
    def make(case):
        import no_such_module  # noqa: F401  # pyright: ignore

    _, found = measure(others=[dataclasses.replace(peer(None), make=make)])
    assert found["made up"]["refused"] == "no_such_module is not installed"


def test_kernels_are_what_counts_on_a_gpu(monkeypatch):
    """On a GPU each candidate is traced by itself, on copies of the cache that differ."""
    traced = []

    def trace(call, runs, wait):
        traced.append([np.asarray(call(run)) for run in range(runs)])
        return timing.Timing("kernels", timing.Spread(2e-6, 1e-6, 4e-6, 1e-6))

    monkeypatch.setattr(bench, "kernel_times", trace)
    monkeypatch.setattr(Machine, "counts_kernels", property(lambda self: True))
    row, found = measure()
    assert row["copies"] == 2
    (results,) = traced
    assert not np.array_equal(results[0], results[1])
    assert found["ours"]["bytes_per_second"] == pytest.approx(TINY.live_bytes(5) / 2e-6)

    def cannot(*arguments):
        raise timing.NotTimed("the profiler saw nothing")

    monkeypatch.setattr(bench, "kernel_times", cannot)
    assert measure()[1]["ours"]["refused"] == "the profiler saw nothing"


# ---------------------------------------------------------------------------------------------------------------------------
# Many devices

SPLIT = Case("split", 4, 48, 8, 4, 16, lengths=("uniform", 3, 40), sinks=("query", 1))


def test_split(monkeypatch):
    """Each way to split has run in a loop before it is timed."""

    def loop_times(loop, calls, runs):
        out = loop(3)()
        assert (calls, runs) == (1, 2)
        assert bool(jnp.isfinite(out).all())
        return timing.Timing("loop", timing.Spread.of([len(out.sharding.device_set) ** -0.5]))

    *_, case = variants(SPLIT, [2], ["int8"])
    monkeypatch.setattr(devices, "loop_times", loop_times)
    row = devices.measure(case, MACHINE, jax.devices()[:4], 5, TextbookBackend(), runs=2)
    assert (row["devices"], row["live_bytes"]) == (4, case.live_bytes(5))
    assert {name: (way.get("clock"), way.get("speedup"), way.get("refused")) for name, way in row["ways"].items()} == {
        "one device": ("loop", None, None),
        "batch": ("loop", 2, None),
        "kv heads": ("loop", 2, None),
        "rows": ("loop", 2, None),
    }


def test_split_with_a_narrow_value(monkeypatch):
    """The loop works although the output is narrower than the query."""
    shapes = []
    timing_of = lambda loop, *args: shapes.append(loop(3)().shape) or timing.Timing("loop", timing.Spread.of([1.0]))
    monkeypatch.setattr(devices, "loop_times", timing_of)
    case = dataclasses.replace(SPLIT, value_dim=8, sinks=None)
    row = devices.measure(case, MACHINE, jax.devices()[:2], 5, TextbookBackend(), runs=2)
    assert all("seconds" in way for way in row["ways"].values())
    assert set(shapes) == {(4, 8, 16)}


def test_only_what_is_right_is_timed(monkeypatch):
    """The cache and its scales are where the way to split says. A wrong result there gets no time."""
    case = dataclasses.replace(SPLIT, cache_dtype="int8", scales="row")
    seen: dict[str, list] = {"key": [], "key_scale": [], "query": [], "sequence_end": []}

    def decode_step(case, backend):
        right = bench.decode_step(case, TextbookBackend())

        def call(**arrays):
            for name, shapes in seen.items():
                shape = arrays[name].shape
                keep = lambda sharding, shapes=shapes, shape=shape: shapes.append(sharding.shard_shape(shape))
                jax.debug.inspect_array_sharding(arrays[name], callback=keep)
            return right(**arrays) + 1

        return call

    monkeypatch.setattr(devices, "decode_step", decode_step)
    row = devices.measure(case, MACHINE, jax.devices()[:2], seed=5, runs=2)
    assert all("differs from the oracle" in way["refused"] for way in row["ways"].values())
    assert seen == {
        "key": [(4, 48, 4, 16), (2, 48, 4, 16), (4, 48, 2, 16), (4, 24, 4, 16)],
        "key_scale": [(4, 4, 48), (2, 4, 48), (4, 2, 48), (4, 4, 24)],
        "query": [(4, 8, 16), (2, 8, 16), (4, 4, 16), (4, 8, 16)],
        "sequence_end": [(4,)] * 4,
    }


def test_what_cannot_be_split(monkeypatch):
    monkeypatch.setattr(devices, "_timed", lambda *args: {})
    row = devices.measure(dataclasses.replace(SPLIT, batch=3), MACHINE, jax.devices()[:2], seed=5, runs=1)
    assert row["ways"]["batch"] == {"cannot": "batch 3 is no multiple of 2 devices"}
