"""How the suite runs each backend, and the assertions on its results. test_mutations.py runs faulty calls against the same
assertions."""

import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir

from ejk_ragged import Backend, explain, FwdParams, ragged_decode_attention
from ejk_ragged.testing import Case, oracle, verify
from ejk_ragged_mosaic_gpu import MosaicGpuBackend
from ejk_ragged_pallas_triton import PallasTritonBackend


@dataclasses.dataclass(frozen=True)
class Subject:
    """A backend under test. `make` returns what is passed as `backend=`: the backend's name, or an instance that runs on this
    machine.

    `call` is the call that tests make. A call that the backend does not take must be refused, and the test is then skipped. Cases
    that are written by hand use the first of `dtypes`.

    Attributes:
        name: name of the backend.
        dtypes: dtypes of a query that the backend takes.
        here: whether this JAX has what the backend needs.
        picky: whether the backend may refuse a call in one of `dtypes` if the call has pages, values of another width or an 8-bit
            cache. Such a backend takes only what copies lay out in tiles. The backend must take all other calls.
        dim: head dimension of the cases that are written by hand. The backend takes pages and 8-bit caches of this one.
    """

    name: str
    make: Callable[[], str | Backend]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    here: bool = True
    picky: bool = False
    dim: int = 16

    @functools.cached_property
    def backend(self) -> str | Backend:
        return self.make()

    def call(self, query, key, *args, **kwargs):
        taken = self.here and query.dtype.name in self.dtypes
        value = args[0] if args else kwargs["value"]
        plain = "page_table" not in kwargs and value is not None and value.shape[-1] == key.shape[-1] and key.dtype == query.dtype
        try:
            result = ragged_decode_attention(query, key, *args, **kwargs, backend=self.backend)
        except ValueError as error:
            if (taken and (plain or not self.picky)) or f"backend '{self.name}' cannot do this call" not in str(error):
                raise
        else:
            assert taken, f"{self.name} does not refuse {query.dtype.name}"
            return result
        pytest.skip("refused, as it must be")

    def takes(self, case) -> bool:
        """Whether the backend takes a case in one of `dtypes`."""
        if not self.picky or not self.here:
            return True
        try:
            with warnings.catch_warnings(action="ignore"):
                explain(**case.draw(), backend=self.backend)
        except ValueError as error:
            if f"backend '{self.name}' cannot do this call" not in str(error):
                raise
            return False
        return True

    def on_cpus(self) -> str | Backend:
        """What is passed as `backend=` where a call runs on several CPU devices."""
        if self.name == "mosaic_gpu":
            pytest.skip("JAX interprets these kernels by callbacks, which a program for several devices cannot have")
        return PallasTritonBackend(interpret=True) if self.name == "pallas_triton" else self.backend


def pallas_triton() -> str | Backend:
    """The kernels on a GPU that can run them, otherwise the same kernels in Pallas' interpreter."""
    return "pallas_triton" if jax.default_backend() == "gpu" else PallasTritonBackend(interpret=True)


def mosaic_gpu() -> str | Backend:
    """Like `pallas_triton`. The interpreter prints the races that it finds."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return "mosaic_gpu" if capability.startswith("9.") else MosaicGpuBackend(interpret=True, detect_races=True)


# Sequences of 101 rows begin at every number of rows after a multiple of 8. Ranges begin or end with their sequence, or lie within.
END_TO_END = ("ranges", (3, 101), (0, 101), (7, 7), (0, 5), (60, 70), (90, 101), (1, 64), (0, 101))

# Backends that need settings. `subject` names the other backends and runs them as they are.
HAS_MOSAIC_GPU = MosaicGpuBackend().unavailable() is None
has_mosaic_gpu = pytest.mark.skipif(
    not HAS_MOSAIC_GPU,
    reason="JAX before 0.11 has no interpreter for Mosaic GPU kernels; `nox -s pythons-3.12` runs these tests with JAX 0.11",
)
SUBJECTS = {
    "mosaic_gpu": Subject("mosaic_gpu", mosaic_gpu, ("bfloat16", "float16"), HAS_MOSAIC_GPU, picky=True, dim=64),
    "pallas_triton": Subject("pallas_triton", pallas_triton),
    "xla": Subject("xla", lambda: "xla", ("float32", "bfloat16", "float16", "float64")),
}


def subject(name: str) -> Subject:
    return SUBJECTS.get(name) or Subject(name, lambda: name)


def combinations(*values):
    """All combinations of the values, as parameters. Our code alone decides what a combination does. So those of a diagonal, which
    have each value, are tested on every release of JAX, and the others on one."""

    def param(places):
        chosen = [x[i] for x, i in zip(values, places, strict=True)]
        diagonal = sum(places) % min(map(len, values)) == 0
        return pytest.param(*chosen, id="-".join(map(name_of, chosen)), marks=[] if diagonal else [pytest.mark.once])

    return [param(places) for places in itertools.product(*[range(len(x)) for x in values])]


def name_of(x) -> str:
    return x.name if isinstance(x, Case) else str(x)


def array(x, dtype=None) -> jax.Array:
    """`x` on the default device, like `jnp.asarray(x, dtype)`, which compiles a program for each shape."""
    return jax.device_put(np.asarray(x, None if dtype is None else jnp.dtype(dtype)))


def stack(*arrays) -> jax.Array:
    """The arrays along a new axis in front. NumPy makes it, so no program is compiled."""
    return array(np.stack([np.asarray(x) for x in arrays]))


def assert_right(call, arguments, **options):
    """Output, lse, gradients and their exact zeros must be those of the oracle."""
    wrong = [str(verdict) for verdict in verify(call, arguments, **options) if not verdict.ok]
    assert not wrong, "; ".join(wrong)


def expected(arguments):
    """The oracle's output."""
    on_host: dict[str, Any] = {name: np.asarray(x) if hasattr(x, "shape") else x for name, x in arguments.items()}
    return oracle(**on_host)[0]


def assert_repeatable(call, arguments):
    """Two runs must give the same bits, forward and backward."""
    first, second = ([np.asarray(x) for x in everything(call, arguments)] for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(_bits(x), _bits(y))


def assert_batch_invariant(call, arguments):
    """With `num_key_splits` given, the first sequence's output and lse must keep their bits, whatever the rest of the batch is."""
    call = functools.partial(call, fwd_params=FwdParams(num_key_splits=3))
    on_device = functools.partial(jax.tree.map, lambda x: array(x) if isinstance(x, np.ndarray) else x)
    alone = {name: x[:1] if np.shape(x)[:1] == arguments["query"].shape[:1] else x for name, x in arguments.items()}
    others = arguments | {"sequence_end": np.concatenate([arguments["sequence_end"][:1], arguments["sequence_end"][:0:-1] // 2])}
    others["query"] = np.concatenate([arguments["query"][:1], -arguments["query"][1:]])
    results = [[_bits(np.asarray(x[0])) for x in call(**on_device(a), return_lse=True)] for a in (arguments, alone, others)]
    for result in results[1:]:
        for x, y in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(x, y)


def floats_of(arguments):
    """Names of the arguments that have a gradient."""
    frozen = arguments["key"].dtype != arguments["query"].dtype or "page_table" in arguments
    floating = ("query", "softmax_aux") if frozen else ("query", "key", "value", "softmax_aux")
    return [name for name in floating if arguments.get(name) is not None]


def everything(call, arguments):
    """Output and lse, then the gradients, for cotangents that differ from element to element."""
    names = floats_of(arguments)
    function = lambda *args: call(**arguments | dict(zip(names, args, strict=True)), return_lse=True)
    results, pullback = jax.vjp(function, *[array(arguments[name]) for name in names])
    return *results, *pullback(jax.tree.map(weights, results))


def weights(x):
    """A different number for each element."""
    return array(np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), x.dtype)


def _bits(x):
    return np.atleast_1d(x).view(np.uint8)


def kernels_of(lowered) -> list[str]:
    """The kernels of a lowered call of mosaic_gpu, as Mosaic GPU gets them."""
    module: Any = lowered.compiler_ir()
    found = []

    def visit(operation):
        if "mhlo.backend_config" in operation.attributes:
            config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
            found.append(ir.StringAttr(config["module"]).value_bytes)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    module.context.allow_unregistered_dialects = True
    with module.context:
        return [str(ir.Module.parse(kernel)) for kernel in found]


def unsigned_lines(kernel) -> list[str]:
    """The lines of a kernel that take numbers as if they had no sign."""
    unsigned = re.compile(r"arith\.(maxui|minui|cmpi\W.*predicate = [6-9]).*i32")
    return [line for line in kernel.splitlines() if unsigned.search(line)]


def planned(lowered) -> Any:
    """The compiled program. On a CPU its memory and its HLO are those that users have, and its machine code is not optimised: XLA
    plans the memory before LLVM makes the code, and optimising the code takes half of the time."""
    return lowered.compile({"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None)


def draw(case, seed=0) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case's arrays, on the default device, and its settings."""
    arguments = case.draw(seed)
    arrays = {name: array(arguments.pop(name)) for name in list(arguments) if isinstance(arguments[name], np.ndarray)}
    return arrays, arguments


def assert_close(got, want, tolerance=1e-5):
    """Two trees of arrays must agree. Equal infinities agree."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance)
