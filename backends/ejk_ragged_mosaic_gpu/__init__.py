"""The Mosaic GPU backend: NVIDIA GPUs of the Hopper family. Nothing of Pallas is imported before such a GPU is asked for."""

import dataclasses
import importlib.util
import types
from typing import ClassVar

import jax
import jax.numpy as jnp

from ejk_ragged import Backend, FwdParams, Problem, Target


LANGUAGE = "jax.experimental.pallas.mosaic_gpu"
FIRST = 110  # priority for problems on which its kernels are the fastest


@dataclasses.dataclass(frozen=True)
class MosaicGpuBackend(Backend):
    """Decode attention as two Pallas kernels for Mosaic GPU, with copies by TMA and products of whole warpgroups. Forward only.

    Attributes:
        interpret: run the kernels in Pallas' interpreter, on any platform. The interpreter is slow, and is for tests. It takes a
            thread of JAX's CPU client per warpgroup. On a machine with few cores a call may raise `RuntimeError`, because there
            are too few threads. There are more after `jax.config.update("jax_num_cpu_devices", 8)`, before JAX is used.
        detect_races: the interpreter looks for races between threads and copies of a kernel.
        programs: number of programs that share the work in the interpreter.
    """

    interpret: bool = False
    detect_races: bool = False
    programs: int = 4

    name: ClassVar[str] = "mosaic_gpu"
    priority: ClassVar[int] = 90
    version: ClassVar[str] = "4"

    @property
    def platforms(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.interpret else frozenset({"cuda"})

    def unavailable(self) -> str | None:
        # Before JAX 0.11 there is no interpreter for these kernels, so they cannot be checked without a GPU, and the import takes a
        # package that JAX does not require.
        if jax.__version_info__ < (0, 11):
            return f"it needs JAX 0.11 (Python 3.12) or newer, not JAX {jax.__version__}"
        needs = f"it needs the Mosaic GPU backend of JAX 0.11 or newer, not {jax.__version__}"
        try:
            found = importlib.util.find_spec(LANGUAGE) and importlib.import_module(LANGUAGE)
        except Exception as error:  # no Pallas at all, or what Mosaic GPU's part of Pallas needs
            return f"{needs}, in which {LANGUAGE} is missing ({type(error).__name__}: {error})"
        return None if found else needs

    def priority_for(self, problem: Problem, target: Target) -> tuple[float, str]:
        from ._leads import leads

        why = leads(problem, target)
        return (FIRST, why) if why else (self.priority, "")

    def supports(self, problem: Problem, target: Target) -> str | None:
        from ._tuning import cannot_copy, does_not_fit

        if not all(isinstance(n, int) for n in problem.sizes):
            return "its kernels need sizes known when they are lowered, not symbolic ones"
        if problem.quantised and problem.dtype != jnp.bfloat16:
            return (
                f"it widens quantised caches for queries of bfloat16, whose range their scales share, not of {problem.dtype.name}"
            )
        if problem.dtype not in (jnp.bfloat16, jnp.float16):
            return f"its products are of bfloat16 and float16, not {problem.dtype.name}"
        for name, most in (("head_dim", 640), ("value_dim", 512)):
            if getattr(problem, name) % 8 or getattr(problem, name) > most:
                return f"its kernels hold a {name} of up to {most} that is a multiple of 8, not {getattr(problem, name)}"
        capability = getattr(target.device, "compute_capability", None)
        if capability is not None and not 9.0 <= float(capability) < 10.0:
            return f"its products are those of a GPU of compute capability 9, not {capability}"
        return cannot_copy(problem) or does_not_fit(problem, target)

    def supports_backward(self, problem: Problem, target: Target) -> str | None:
        del problem, target
        return "it has no backward operation"

    def fwd_params(self, problem: Problem, target: Target) -> FwdParams:
        from ._tuning import resolve

        return resolve(problem, target)

    def candidates(self, problem: Problem, target: Target):
        from ._tuning import candidates

        return candidates(problem, target)

    def forward(self, problem, target, queries, cache):
        from ._forward import forward

        if self.interpret:  # by which no program goes faster for the others
            target = Target(target.platform, types.SimpleNamespace(core_count=self.programs))
        return forward(problem, target, queries, cache, interpret=self.interpret, detect_races=self.detect_races)
