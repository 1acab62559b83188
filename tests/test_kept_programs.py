"""Programs of calls with automatic axes that JAX keeps on disk. Each request has a program of its own, and the next process finds
it again.

XLA's partitioner learns what to put into such a program from a callback into Python. The program holds the callback's address.
If JAX is told to, it leaves the address out of the key under which the program is kept.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from made_up import backend, entries, Entry

from ejk_ragged import FwdParams
from ejk_ragged._fingerprint import fingerprint
from ejk_ragged._hints import Tuned
from ejk_ragged._problem import Settings
from ejk_ragged._registry import Registry, registry, Request
from ejk_ragged.testing import TextbookBackend


SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import ejk_ragged
from ejk_ragged import FwdParams, ragged_decode_attention
from ejk_ragged.testing import TextbookBackend

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_raise_persistent_cache_errors", True)


class Doubled(TextbookBackend):
    def forward(self, *args):
        out, lse = super().forward(*args)
        return 2 * out, lse


CALLS = {
    "plain": {},
    "scale": {"softmax_scale": 2.0},
    "cap": {"logits_soft_cap": 0.5},
    "window": {"sliding_window": (2, 0)},
    "wide window": {"sliding_window": (20, 0)},
    "hints": {"fwd_params": FwdParams(block_size_keys=16)},
    "backend": {"backend": TextbookBackend()},
    "double": {"backend": Doubled()},
}
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
query = jax.random.normal(jax.random.key(0), (4, 4, 16))
cache = jax.random.normal(jax.random.key(1), (4, 64, 2, 16))
split = jax.device_put(cache, NamedSharding(mesh, P(None, "x")))
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.extend([event] * event.endswith("compilation_cache/cache_hits")))


def results(cache, options):
    def loss(query):
        out = ragged_decode_attention(query, cache, cache, **options)
        return jnp.sum(jnp.cos(out)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(query)
    return np.concatenate([np.ravel(out), np.ravel(gradient)])


report = {}
for name in sys.argv[1:]:
    before = len(hits)
    got = results(split, CALLS[name])
    found = len(hits) > before
    report[name] = [float(np.abs(got - results(cache, CALLS[name])).max()), found]
print(json.dumps(report))
"""


def run(folder, *calls):
    """Runs this file in a new process. Returns, per call, the error against one device, and whether the program was on disk."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",
    }
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *calls], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NAMED = ["plain", "scale", "cap", "window", "wide window", "hints", "backend"]


def test_each_request_has_its_own(tmp_path):
    """Processes run one after another with the same shapes. The numbers are right, and each process finds what was compiled
    before."""
    first = run(tmp_path, *NAMED, "double")
    assert {name: error for name, (error, _) in first.items() if error > 1e-4} == {}
    assert not any(found for _, found in first.values())
    second = run(tmp_path, "double", *reversed(NAMED))
    assert {name: error for name, (error, _) in second.items() if error > 1e-4} == {}
    # In the next process, a class of a script may be another class.
    assert {name for name, (_, found) in second.items() if not found} == {"double"}


# ---------------------------------------------------------------------------------------------------------------------------
# The name of a request


SETTINGS = Settings(softmax_scale=0.25)
REQUEST = Request(SETTINGS)

OTHERS = {
    "scale": {"settings": dataclasses.replace(SETTINGS, softmax_scale=np.nextafter(0.25, 1))},
    "cap": {"settings": dataclasses.replace(SETTINGS, logits_soft_cap=30.0)},
    "hints": {"settings": dataclasses.replace(SETTINGS, fwd_params=FwdParams(num_warps=4))},
    "precision": {"settings": dataclasses.replace(SETTINGS, precision=jax.lax.Precision.HIGH)},
    "columns": {"settings": dataclasses.replace(SETTINGS, value_columns=(0, 8))},
    "accumulation dtype": {"settings": dataclasses.replace(SETTINGS, keeps_accum_dtype=True)},
    "junk between tokens": {"settings": dataclasses.replace(SETTINGS, junk_between_tokens=True)},
    "most keys": {"settings": dataclasses.replace(SETTINGS, most_keys=16)},
    "maps": {"settings": dataclasses.replace(SETTINGS, maps=(2,))},
    "backend": {"backend": TextbookBackend()},
    "tuned": {"tuned": Tuned("some bytes", {})},
    "tuned otherwise": {"tuned": Tuned("other bytes", {})},
}


def test_names_differ_where_requests_do():
    requests = [REQUEST, *(dataclasses.replace(REQUEST, **changes) for changes in OTHERS.values())]
    named = {registry.fingerprint(request) for request in requests}
    assert len(named) == len(requests)
    for field in dataclasses.fields(Settings):  # no field is missing above
        assert any(getattr(request.settings, field.name) != getattr(SETTINGS, field.name) for request in requests)
    alike = dataclasses.replace(REQUEST, tuned=Tuned("some bytes", {"a": FwdParams()}))  # alike, because they are equal
    assert registry.fingerprint(alike) in named


def test_names_differ_where_installations_do(monkeypatch):
    def named(*given):
        return Registry(given).fingerprint(REQUEST)

    one = backend("one")
    names = [named(), named(Entry("one", one)), named(Entry("one", one, "other-dist")), named(Entry("one", ImportError()))]
    newer = Entry("one", one)
    monkeypatch.setattr(Entry, "dist", property(lambda self: type("Dist", (), {"name": "made-up", "version": "2"})))
    names.append(named(newer))
    monkeypatch.setattr("ejk_ragged.__version__", "another")
    names.append(named(newer))
    monkeypatch.setattr(one, "version", "another")
    names.append(named(newer))
    assert len(set(names)) == len(names)


def test_names_differ_where_a_backends_fields_do():
    class Plain(TextbookBackend):
        def __init__(self, tile):
            self.tile = tile

    named = [registry.fingerprint(Request(SETTINGS, Plain(tile))) for tile in (1, 2, 1, [1], (1,), {"a": 1}, "1", 1.0, True)]
    assert named[0] == named[2]
    assert len(set(named)) == len(named) - 1


def test_names_are_alike_in_every_process():
    """The names do not depend on the order in which sets are walked through."""
    script = (
        "from ejk_ragged._registry import registry, Request\n"
        "from ejk_ragged._problem import Settings\n"
        "from ejk_ragged.testing import TextbookBackend\n"
        "print(registry.fingerprint(Request(Settings(softmax_scale=0.25), TextbookBackend())))"
    )
    names = {
        subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(names) == 1


@pytest.mark.parametrize("value", [lambda: 0, object(), iter(())], ids=lambda value: type(value).__name__)
def test_what_cannot_be_named_is_never_alike(value):
    assert fingerprint(value) != fingerprint(value)
    assert fingerprint((1, [value])) != fingerprint((1, [value]))


def test_classes_that_cannot_be_imported_are_those_of_this_process():
    """Two such classes of the same name differ."""
    one, other = backend("one"), backend("one")
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    assert Registry(entries(one)).fingerprint(REQUEST) != Registry(entries(other)).fingerprint(REQUEST)
