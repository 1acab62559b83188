"""Fixtures: the backends as a parameter with a marker each (`pytest -m xla`), and the settings under which all tests run."""

import functools
import gc
import os

import hypothesis
import jax
import pytest
from made_up import entries
from meshes import make_mesh
from support import subject

from ejk_ragged import ragged_decode_attention, tuned_hints
from ejk_ragged._registry import registry
from ejk_ragged_mosaic_gpu import _joined, MosaicGpuBackend


# For the tests of many devices, and for the threads of Mosaic GPU's interpreter. The other tests are as fast with them.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling is most of the time of the tests. So XLA optimises only for the tests marked `optimised`, see `_compiler`. Before JAX
# 0.11 these flags also choose an older way to make code, which takes half as long. Flags hold for a whole process. So only a
# process that leaves the marked tests out has them.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" if jax.__version_info__ < (0, 11) else ""

# The package must not promote the arrays of its callers silently.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# HYPOTHESIS_PROFILE=thorough tries more examples. An example that fails is not shrunk: it is small already, and every try compiles.
AS_DRAWN = {"deadline": None, "phases": (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)}
hypothesis.settings.register_profile("default", max_examples=20, derandomize=True, **AS_DRAWN)
hypothesis.settings.register_profile("brief", max_examples=5, derandomize=True, **AS_DRAWN)
hypothesis.settings.register_profile("thorough", max_examples=500, **AS_DRAWN)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config):
    if "not optimised" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", QUICK)
    config.addinivalue_line("markers", "once: no release of JAX decides this, so one is enough")
    config.addinivalue_line("markers", "optimised: what XLA makes for CPUs is under test, as users have it")
    for name in registry.names():
        config.addinivalue_line("markers", f"{name}: the shared suite's share of the backend {name}")


def pytest_collection_finish():
    """Takes what is imported out of garbage collections, which would walk through all of it again and again."""
    gc.freeze()


def pytest_generate_tests(metafunc):
    if "subject" in metafunc.fixturenames:
        names = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in registry.names()]
        metafunc.parametrize("subject", names, indirect=True, scope="session")


@pytest.fixture(name="subject", scope="session")
def subject_fixture(request):
    """A backend as `support.Subject`. A test that takes it runs once per backend."""
    return subject(request.param)


@pytest.fixture(autouse=True, scope="session")
def _untuned():
    """The tests ignore what was tuned on this machine."""
    with tuned_hints(None):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled():
    """Drops what a file compiled. A process may hold a limited number of memory mappings, and some hundred tests reach that
    limit."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _compiler(request, monkeypatch):
    """Lets XLA optimise where its code for CPUs is under test. This holds for the processes that a test starts, too."""
    hasty = jax.default_backend() == "cpu" and request.node.get_closest_marker("optimised") is None
    jax.config.update("jax_disable_most_optimizations", hasty)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(hasty)))


@pytest.fixture
def promoted_ranks():
    """Lets JAX promote ranks, as it does by default: for code that users write, and for functions of other packages."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    """A mesh of simulated devices. `auto` is the mesh with automatic axes only."""
    return make_mesh(*[request.param] * 3)


@pytest.fixture
def auto():
    return make_mesh("Auto", "Auto", "Auto")


@pytest.fixture
def on_a_cpu():
    """Runs the test on a CPU, also where there is a GPU: what is tuned in a test is tuned for a machine without a GPU."""
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
def joins_always(monkeypatch):
    """Lets mosaic_gpu join kv heads of small problems, too, whatever the device."""
    monkeypatch.setattr(_joined, "has_fast_memory", lambda _: True)
    monkeypatch.setattr(_joined, "SHORT", 0)
    monkeypatch.setattr(_joined, "JOINED", {dim: how._replace(least_bytes=0) for dim, how in _joined.JOINED.items()})


@pytest.fixture
def interpreted(capfd):
    """A function that takes `FwdParams` and a number of programs, and returns the call of mosaic_gpu in the interpreter. After
    the test no race may have been found."""

    def call(fwd_params=None, programs=4):
        backend = MosaicGpuBackend(interpret=True, detect_races=True, programs=programs)
        return functools.partial(ragged_decode_attention, backend=backend, fwd_params=fwd_params)

    yield call
    assert "RACE DETECTED" not in capfd.readouterr().out
