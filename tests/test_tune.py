"""The tuner: how it finds the fastest hints among those with right results, for problems of every kind, and what it saves."""

import dataclasses
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from tuning import Notes, PROBLEM, TARGET

import ejk_ragged_pallas_triton._tuning as pallas_triton
from ejk_ragged import _hints, Backend, explain, FwdParams, Target, tuned_hints
from ejk_ragged.__main__ import main
from ejk_ragged._registry import registry
from ejk_ragged._tools import tune as _tune
from ejk_ragged._tools.machine import Machine
from ejk_ragged._tools.timing import Spread, Timing
from ejk_ragged.testing import Case
from ejk_ragged_xla import XlaBackend


CASE = Case("tiny", 3, 48, 4, 2, 64, lengths=("uniform", 3, 40))
MACHINE = Machine("cpu", "a test", 1 << 30, 1e9, None)
pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture
def backend():
    return Notes()


@pytest.fixture
def clock(monkeypatch):
    """Times in seconds by num_warps, in place of measured times."""
    seconds = {1: 1.0, 2: 0.5, 4: 0.25}
    spread = lambda s: Timing("wall", Spread(s, s, s, s))

    def times(calls, runs):
        return {hints: spread(seconds[hints.num_warps]) for hints in calls}

    monkeypatch.setattr(_tune, "wall_times", times)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, copying=False: MACHINE))
    return seconds


def tune(backend, deadline=float("inf")):
    return _tune.tune(CASE, MACHINE, backend, seed=1, deadline=deadline)


@pytest.mark.parametrize(
    "case", [CASE, dataclasses.replace(CASE, num_tokens=3, cache_dtype="int8", scales="row")], ids=["plain", "all"]
)
def test_the_best_that_is_right(case, backend, clock):
    result = _tune.tune(case, MACHINE, backend, seed=1, deadline=float("inf"))
    assert result["best"] == {"fwd_params": {"num_warps": 4}, "seconds": 0.25}
    assert result["default"]["fwd_params"] == {"num_warps": 1}
    refused = {one["fwd_params"]["num_warps"]: one["refused"] for one in result["tried"] if "refused" in one}
    assert refused[5] == "ArithmeticError: five is too many"
    assert refused[7].startswith("differs from the oracle: out 1.0e+00")
    assert sorted(refused) == [5, 7]
    changed = {"num_tokens": 3, "cache_dtype": np.dtype("int8")} if case.cache_dtype else {}
    assert result["key"] == _hints.key_of(backend, dataclasses.replace(PROBLEM, **changed), TARGET)


def test_noise_is_no_gain(backend, clock):
    clock |= {2: 0.99, 4: 0.985}
    assert tune(backend)["best"]["fwd_params"] == {"num_warps": 1}


def test_no_candidate_is_timed_from_a_cache_that_the_gpu_still_holds(backend, clock, monkeypatch):
    traced = []

    def trace(call, runs):
        traced.append({np.asarray(call(run)).tobytes() for run in range(runs)})
        return Timing("kernels", Spread(1.0, 1.0, 1.0, 1.0))

    monkeypatch.setattr(_tune, "kernel_times", trace)
    monkeypatch.setattr(Machine, "counts_kernels", property(lambda self: True))
    tune(backend)
    assert [len(results) for results in traced] == [15, 15, 15]  # as many copies of the cache as runs, because the cache is small


def test_time_limit(backend, clock, monkeypatch):
    monkeypatch.setattr(_tune, "AT_ONCE", 2)
    result = tune(backend, deadline=0)
    assert len(result["tried"]) == 2
    assert result["left_out"] == 3
    assert result["best"]["fwd_params"] == {"num_warps": 2}


def test_command(backend, clock, file, monkeypatch, capsys):
    """The command saves an entry per problem. Calls of the same problem use the entry, and other calls do not."""
    monkeypatch.setattr(registry, "get", lambda name: backend)
    problems = ["3,48,4:2,64,float32", "3,48,4:2,64,bfloat16,cap", "3,48,4:2,64,bfloat16,int8,T3"]
    assert main(["tune", "--problem", *problems, "--backends", "notes", "--file", str(file)]) == 0
    out = capsys.readouterr().out
    assert "3,48,4:2,64,float32 (notes): num_warps 4: 250000.0 us, 4.00x the speed of the default; 5 tried, 2 refused" in out
    assert f"Saved in {file}" in out
    entries = json.loads(file.read_text())["entries"]
    assert [entry["problem"] for entry in entries.values()] == [
        "B 3, S 48, heads 4:2, D 64, bfloat16, soft cap 50",
        "B 3, T 3, S 48, heads 4:2, D 64, bfloat16, int8 cache",
        "B 3, S 48, heads 4:2, D 64, float32",
    ]
    with tuned_hints(file):
        for text, hints_from in [*((text, "tuned") for text in problems), ("3,48,4:2,64,bfloat16,int8", "default")]:
            arguments = _tune.parse(text).draw()
            assert explain(**arguments, backend=backend)[TARGET.platform].hints_from == hints_from


def test_problems():
    """A part that is left out has its default."""
    case = _tune.parse("64,16384, 32:8,128,bfloat16")
    assert case == Case(case.name, 64, 16384, 32, 8, 128, "bfloat16", ("uniform", 2048, 16384))
    more = _tune.parse("1,4,4:2,64,float32,float8_e5m2,T12,cap")
    assert (more.cache_dtype, more.scales, more.num_tokens, more.logits_soft_cap) == ("float8_e5m2", "row", 12, 50.0)
    assert (more.lengths, more.batch, more.dtype) == (("uniform", 1, 4), 1, "float32")


def test_command_out_of_time(clock, file, capsys):
    assert main(["tune", "--problem", "3,48,4:2,64,float32", "--file", str(file), "--limit", "1e-9", "--json"]) == 1
    (result,) = json.loads(capsys.readouterr().out)
    assert result["refused"] == "the time limit had come"
    assert not file.exists()


def test_nothing_to_tune(clock, backend, file, monkeypatch, capsys):
    monkeypatch.setattr(Notes, "candidates", Backend.candidates)
    monkeypatch.setattr(registry, "get", lambda name: backend)
    assert main(["tune", "--problem", "3,48,4:2,64,float32", "--backends", "notes", "--file", str(file)]) == 1
    assert "nothing saved: ValueError: notes declares no hints to try" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        *("", "1,2,3", "3,48,4,64,float32", "3,48,4:2,64,int8", "3,48,4:2,64,float32,sinks"),
        *("3,48,4:2,64,float32,T0", "3,48,4:2,64,float32,T2,int8", "3,48,4:2,64,float32,int4"),
    ],
)
def test_problems_that_cannot_be_read(text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["tune", "--problem", text])
    assert exit.value.code == 2
    assert "a problem is written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit", "-5"], "argument --limit: must be a number of seconds above 0, got '-5'"),
        (["--limit", "nan"], "argument --limit: must be a number of seconds above 0, got 'nan'"),
        (["--runs", "0"], "argument --runs: must be a whole number of at least 1, got '0'"),
        (["--cases", "nonsense"], "nonsense not known; choose from full,"),
        (["--backends", "nonsense"], "nonsense"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["tune", *arguments])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("usage: python -m ejk_ragged tune ")


def test_candidates_of_the_xla_backend():
    with warnings.catch_warnings(action="error"):
        hints = list(XlaBackend().candidates(PROBLEM, TARGET))
    assert all(list(one.given) == ["block_size_keys"] for one in hints)


def test_hints_in_a_file():
    hints = FwdParams(num_warps=4, others={"depth": 3})
    assert _tune.as_dict(hints) == {"num_warps": 4, "others": {"depth": 3}}
    assert FwdParams(**_tune.as_dict(hints)) == hints
    assert _tune.show(hints) == _tune.show(_tune.as_dict(hints)) == "num_warps 4, depth 3"
    assert _tune.show({}) == "none"


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "int8")], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_candidates_of_the_pallas_triton_backend(head_dim, dtype, cache_dtype, num_tokens):
    """Every candidate can be given as hints."""
    dtypes = {"dtype": np.dtype(jnp.dtype(dtype)), "cache_dtype": np.dtype(jnp.dtype(cache_dtype))}
    problem = dataclasses.replace(PROBLEM, head_dim=head_dim, num_tokens=num_tokens, **dtypes)
    hints = list(pallas_triton.candidates(problem, Target("cuda")))
    assert len(hints) >= 4
    for one in hints:
        pallas_triton.resolve(dataclasses.replace(problem, fwd_params=one), Target("cuda"))
