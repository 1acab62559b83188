"""The Pallas-Triton backend for NVIDIA GPUs. It imports Pallas only when it is asked about a GPU."""

import dataclasses
import importlib.util
from typing import ClassVar

import jax.numpy as jnp

from ejk_ragged import Backend, FwdParams, Problem, Target


LANGUAGE = "jax.experimental.pallas.triton"


@dataclasses.dataclass(frozen=True)
class PallasTritonBackend(Backend):
    """Decode attention as two Pallas kernels that Triton compiles.

    Attributes:
        interpret: whether to run the kernels in Pallas' interpreter, on any platform. Slow, for tests.
    """

    interpret: bool = False

    name: ClassVar[str] = "pallas_triton"
    priority: ClassVar[int] = 100
    version: ClassVar[str] = "4"

    @property
    def platforms(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.interpret else frozenset({"cuda"})

    def unavailable(self) -> str | None:
        # JAX has deprecated its Triton backend. A future JAX may not have it.
        try:
            found = importlib.util.find_spec(LANGUAGE) and importlib.import_module(LANGUAGE)
        except Exception as error:  # no Pallas, or a dependency of its Triton part is missing
            return f"this JAX has no {LANGUAGE} ({type(error).__name__}: {error})"
        return None if found else f"this JAX has no {LANGUAGE}"

    def supports(self, problem: Problem, target: Target) -> str | None:
        if not all(isinstance(n, int) for n in problem.sizes):
            return "its kernels need sizes known when they are lowered, not symbolic ones"
        if problem.dtype == jnp.float64:
            return "its kernels have no float64"
        if problem.head_dim > 640 or problem.value_dim > 512:
            dims = f"{problem.head_dim} and {problem.value_dim}"
            return f"its kernels hold a head_dim of up to 640 and a value's of up to 512, not {dims}"
        rows = (problem.num_pages or problem.batch) * (problem.page_size or problem.seq_len)
        elements = rows * problem.num_kv_heads * max(problem.row_dim, problem.value_dim)
        if problem.quantised and 2**31 < elements <= 2**32:
            # Offsets count elements. JAX's lowering uses 64-bit offsets only for an array of more than 2**32 bytes.
            return f"JAX addresses a cache of {elements} bytes with 32 bits, one of which is the sign"
        capability = getattr(target.device, "compute_capability", None)
        # Triton converts from float8_e4m3fn only if the hardware does.
        least, what = (8.9, " for float8_e4m3fn") if problem.cache_dtype == jnp.float8_e4m3fn else (8.0, "")
        if capability is not None and float(capability) < least:
            return f"it needs a GPU of compute capability {least} or newer{what}, not {capability}"
        return None

    def supports_backward(self, problem: Problem, target: Target) -> str | None:
        from ._tuning import refuses_backward

        return self.supports(problem, target) or refuses_backward(problem, target)

    def fwd_params(self, problem: Problem, target: Target) -> FwdParams:
        from ._tuning import resolve

        return resolve(problem, target)

    def candidates(self, problem: Problem, target: Target):
        from ._tuning import candidates

        return candidates(problem, target)

    def lowering(self, target: Target):
        from ._jax import lowering

        return lowering(target)

    def forward(self, problem, target, queries, cache):
        from ._forward import forward

        return forward(problem, target, queries, cache, interpret=self.interpret)

    def backward(self, problem, target, queries, cache, lse, d_out, delta, *, wanted):
        from ._backward import backward

        return backward(problem, target, queries, cache, lse, d_out, delta, wanted=wanted, interpret=self.interpret)
