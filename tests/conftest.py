"""Backends as a parameter, a marker each (`pytest -m xla`), and the settings under which everything is tested."""

import functools
import os

import hypothesis
import jax
import pytest
from made_up import entries
from meshes import make_mesh
from support import subject

from ejk_ragged import ragged_decode_attention, tuned_hints
from ejk_ragged._registry import registry
from ejk_ragged_mosaic_gpu import MosaicGpuBackend


# For the tests of many devices. The other tests are as fast beside them.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling is most of what the tests take, so XLA need not try hard but for those marked `optimised`; see `_compiler`. In JAX 0.10
# it also has an older way to make code, which takes half as long. A process has either, and has it if it leaves those tests out.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" if jax.__version_info__ < (0, 11) else ""

# Nobody's arrays should be promoted behind their back.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# HYPOTHESIS_PROFILE=thorough looks further. What fails is not made smaller: it is small, and every try is compiled.
AS_DRAWN = {"deadline": None, "phases": (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)}
hypothesis.settings.register_profile("default", max_examples=20, derandomize=True, **AS_DRAWN)
hypothesis.settings.register_profile("brief", max_examples=5, derandomize=True, **AS_DRAWN)
hypothesis.settings.register_profile("thorough", max_examples=500, **AS_DRAWN)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config):
    if "not optimised" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", QUICK)
    config.addinivalue_line("markers", "optimised: what XLA makes for CPUs is under test, as users have it")
    for name in registry.names():
        config.addinivalue_line("markers", f"{name}: the shared suite's share of the backend {name}")


def pytest_generate_tests(metafunc):
    if "subject" in metafunc.fixturenames:
        names = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in registry.names()]
        metafunc.parametrize("subject", names, indirect=True, scope="session")


@pytest.fixture(name="subject", scope="session")
def subject_fixture(request):
    """A backend as `support.Subject`; a test that takes it runs once for each."""
    return subject(request.param)


@pytest.fixture(autouse=True, scope="session")
def _untuned():
    """What was tuned on this machine does not change the tests."""
    with tuned_hints(None):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled():
    """What a file compiled goes with it: a process may hold so many mappings of memory, and some hundred tests reach that."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _compiler(request):
    """XLA optimises where its code for CPUs is under test."""
    optimised = request.node.get_closest_marker("optimised") is not None
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu" and not optimised)


@pytest.fixture
def promoted_ranks():
    """As JAX has it: for what people write, and for functions of others."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    """Of simulated devices; `auto` of one kind only."""
    return make_mesh(*[request.param] * 3)


@pytest.fixture
def auto():
    return make_mesh("Auto", "Auto", "Auto")


@pytest.fixture
def on_a_cpu():
    """Also where there is a GPU: what is tuned in a test pretends to be a machine without one."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture
def file(tmp_path):
    """Where tuned hints are kept."""
    return tmp_path / "tuned.json"


@pytest.fixture
def install(monkeypatch):
    """Puts made-up backends in the place of the installed ones."""

    def install(*classes):
        monkeypatch.setattr(registry, "_given", entries(*classes))
        registry.clear()

    yield install
    registry.clear()


@pytest.fixture
def interpreted(capfd):
    """A function of `FwdParams` and programs to the call of mosaic_gpu, in the interpreter; in the end, no race was found."""

    def call(fwd_params=None, programs=4):
        backend = MosaicGpuBackend(interpret=True, detect_races=True, programs=programs)
        return functools.partial(ragged_decode_attention, backend=backend, fwd_params=fwd_params)

    yield call
    assert "RACE DETECTED" not in capfd.readouterr().out
