"""Many threads, each of which makes its first call at the same time. Nothing fails, and each warning is given once."""

import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import pytest
from made_up import backend, entries, Entry, PROBLEM

from ejk_ragged._registry import Registry
from ejk_ragged_schedule.warning_filters import ignore_warning


THREADS = 24

SCRIPT = """
import json, sys, threading, warnings
import jax, jax.numpy as jnp, numpy as np
import ejk_ragged
from ejk_ragged._registry import GROUP, registry
import importlib.metadata

jax.config.update("jax_platforms", "cpu")
made_up = [importlib.metadata.EntryPoint(name, "no_such_module:Backend", GROUP) for name in ("broken", "other")]
registry._given = [*importlib.metadata.entry_points(group=GROUP), *made_up]
query, cache = np.ones((2, 4, 16), np.float32), np.ones((2, 32, 2, 16), np.float32)
told, failed = [], []
warnings.showwarning = lambda message, *_: told.append(str(message))
warnings.simplefilter("always")
barrier = threading.Barrier(24)


def first(i):
    try:
        barrier.wait()
        if i % 3 == 0:
            ejk_ragged.explain(query, cache, cache)
        elif i % 3 == 1:
            out = ejk_ragged.ragged_decode_attention(query, cache, cache)
            np.testing.assert_allclose(out, 1, rtol=1e-5)
        else:
            cuda = jax.jit(ejk_ragged.ragged_decode_attention).trace(query[:, :, : 8 + i], cache[..., : 8 + i], cache[..., : 8 + i])
            assert "triton" in cuda.lower(lowering_platforms=("cuda",)).as_text()
        warnings.warn(f"of thread {i}")
    except BaseException as error:
        failed.append(repr(error))


threads = [threading.Thread(target=first, args=(i,)) for i in range(24)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([sorted(told), failed]))
"""


@pytest.mark.parametrize("attempt", range(int(os.environ.get("EJK_RAGGED_ATTEMPTS", "3"))))
def test_first_calls(attempt):
    """The tests that run in a new process: calls on the CPU, lowered for a GPU, and explained, with two plug-ins that cannot be
    loaded."""
    environment = os.environ | {"PYTHONHASHSEED": str(attempt)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told, failed = json.loads(done.stdout)
    assert failed == []
    own = [text for text in told if text.startswith("of thread")]
    assert own == sorted(f"of thread {i}" for i in range(THREADS))
    rest = [text for text in told if text not in own]
    assert [text.partition(" of ")[0] for text in rest] == ["The backend 'broken'", "The backend 'other'"]


def at_once(function):
    """The results of the function in many threads at once."""
    barrier = threading.Barrier(THREADS)

    def one():
        barrier.wait()
        return function()

    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        return [done.result() for done in [threads.submit(one) for _ in range(THREADS)]]


def test_the_registry_looks_and_loads_once():
    """Loading is slow here, so that all threads meet."""
    looked = []

    class Slow(Entry):
        def load(self):
            time.sleep(0.05)
            return super().load()

    class Found(list):
        def __iter__(self):
            looked.append(1)
            time.sleep(0.05)
            return super().__iter__()

    given = Found([Slow("a", backend("a")), Slow("bad", ImportError("no such library"))])
    made = Registry(given)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chosen = at_once(lambda: made.select("cpu", PROBLEM).backend)
    assert len({id(one) for one in chosen}) == 1
    assert [entry.loads for entry in list.__iter__(given)] == [1, 1]
    assert len(looked) == 1
    assert len(told) == 1


def test_a_fault_is_told_of_once():
    def supports(self, problem, target):
        time.sleep(0.02)
        raise KeyError("it was careless")

    made = Registry(entries(backend("faulty", 9, supports=supports), backend("good")))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chosen = at_once(lambda: made.select("cpu", PROBLEM).backend.name)
    assert chosen == ["good"] * THREADS
    assert len(told) == 1


def test_a_plug_in_may_ask_the_registry_while_it_is_loaded():
    class Curious(Entry):
        def load(self):
            assert "curious" in made.names()
            return super().load()

    given: list[Any] = [Curious("curious", backend("curious"))]
    made = Registry(given)
    assert at_once(lambda: made.get("curious").name) == ["curious"] * THREADS


def test_a_warning_that_is_ignored():
    """The filters of others stay. Our filter is there once, in front of any filter that would show the warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ignore_warning("something (old)", DeprecationWarning)
        before = list(warnings.filters)
        at_once(lambda: ignore_warning("something (old)", DeprecationWarning))
        assert warnings.filters == before
        warnings.simplefilter("error")
        ignore_warning("something (old)", DeprecationWarning)
        warnings.warn("something (old) is deprecated", DeprecationWarning, stacklevel=1)
        for text, category in (("something old", DeprecationWarning), ("something (old)", RuntimeWarning)):
            with pytest.raises(category):
                warnings.warn(text, category, stacklevel=1)
    assert told == []
