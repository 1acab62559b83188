"""The XLA backend: every problem, on every platform, in plain JAX."""

from typing import ClassVar

from ejk_ragged import Backend, Problem, Target, Wanted

from ._backward import backward
from ._forward import forward


class XlaBackend(Backend):
    """Loops over chunks of the live range. Total: it refuses nothing, and comes last."""

    name: ClassVar[str] = "xla"
    priority: ClassVar[int] = -100

    def supports(self, problem: Problem, target: Target) -> str | None:
        del problem, target
        return None

    def forward(self, problem, target, query, key, value, start, end, sink):
        del target
        return forward(problem, query, key, value, start, end, sink)

    def backward(self, problem, target, query, key, value, start, end, lse, d_out, delta, *, wanted: Wanted):
        del target
        return backward(problem, query, key, value, start, end, lse, d_out, delta, wanted)
