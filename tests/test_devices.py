"""Arrays are computed where they are, by the backend of that platform, whatever other devices the machine has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, draw

from ejk_ragged import explain, ragged_decode_attention, Target
from ejk_ragged._platforms import platform_of
from ejk_ragged.testing import Case, TextbookBackend


CASE = Case("devices", 2, 20, 4, 2, 8, lengths=("uniform", 0, 20))


class Recorder(TextbookBackend):
    """A backend that notes the platforms on which it is asked to run."""

    def __init__(self):
        super().__init__()
        self.targets = []

    def forward(self, problem, target, queries, cache):
        self.targets.append(target)
        return super().forward(problem, target, queries, cache)


def on(device):
    arrays, _ = draw(CASE)
    return {name: jax.device_put(x, device) for name, x in arrays.items()}


def test_arrays_on_a_cpu():
    """Also on a machine whose default device is an accelerator."""
    (device, *_) = jax.devices("cpu")
    recorder = Recorder()
    out = ragged_decode_attention(**on(device), backend=recorder)
    assert out.devices() == {device}
    assert [target.platform for target in recorder.targets] == ["cpu"]
    assert_close(ragged_decode_attention(**on(device)), out)


@pytest.mark.parametrize("default", ["gpu", "tpu"])
def test_the_default_backend_is_not_asked(default, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: default)
    recorder = Recorder()
    ragged_decode_attention(**on(jax.devices("cpu")[0]), backend=recorder)
    assert [target.platform for target in recorder.targets] == ["cpu"]


def test_no_jit_looks_at_the_arrays():
    recorder = Recorder()
    with jax.disable_jit():
        ragged_decode_attention(**on(jax.devices("cpu")[0]), backend=recorder)
    assert [target.platform for target in recorder.targets] == ["cpu"]


def test_each_platform_asks_for_itself():
    """If a call is lowered for two platforms at once, the backend is asked for both."""
    recorder = Recorder()
    arrays, _ = draw(CASE)
    jitted = jax.jit(lambda **kw: ragged_decode_attention(**kw, backend=recorder))
    jitted.trace(**arrays).lower(lowering_platforms=("cpu", "cuda", "tpu"))
    assert sorted(target.platform for target in recorder.targets) == ["cpu", "cuda", "tpu"]


def test_targets():
    assert Target.of("cpu").device == jax.devices("cpu")[0]
    assert Target.of("cpu").platform == platform_of(jax.devices("cpu")[0]) == "cpu"
    missing = next(platform for platform in ("cuda", "tpu") if not _has(platform))
    assert Target.of(missing) == Target(missing, None)


def _has(platform):
    try:
        return bool(jax.devices(platform))
    except RuntimeError:
        return False


@pytest.mark.parametrize(("version", "platform"), [("cuda 12090", "cuda"), ("rocm 60200", "rocm"), ("", "cuda")])
def test_both_kinds_of_gpu(version, platform):
    """A device says "gpu" for both kinds. JAX lowers for each kind by its own name."""

    class Client:
        platform_version = version

    class Device:
        client = Client()
        platform = "gpu"

    assert platform_of(Device()) == platform


def test_explain_agrees_with_what_runs():
    arrays, _ = draw(CASE)
    chosen = explain(**arrays)["cpu"]
    assert chosen.error is None
    on_cpu = {name: jax.device_put(x, jax.devices("cpu")[0]) for name, x in arrays.items()}
    assert jnp.array_equal(ragged_decode_attention(**on_cpu), ragged_decode_attention(**on_cpu, backend=chosen.forward))


@pytest.mark.parametrize("converted", [("query",), ("query", "key", "value")], ids=["query", "all"])
def test_explain_converts_as_the_call_does(converted):
    """NumPy's float64 counts as float32 unless 64-bit types are enabled, also together with arrays of JAX."""
    arrays, _ = draw(CASE)
    arrays |= {name: np.asarray(arrays[name], np.float64) for name in converted}
    explanation = explain(**arrays)
    assert (explanation.problem.dtype, explanation.problem.cache_dtype) == (jnp.float32, jnp.float32)
    assert explanation["cpu"].error is None
    out = ragged_decode_attention(**arrays)
    assert out.dtype == jnp.float32
    assert jnp.array_equal(out, ragged_decode_attention(**draw(CASE)[0]))
