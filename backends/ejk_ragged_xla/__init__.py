"""The XLA backend: every problem, on every platform, in plain JAX."""

import dataclasses
from typing import ClassVar

from ejk_ragged import Backend, FwdParams, Problem, Target, Wanted

from ._backward import backward
from ._chunks import default_rows
from ._forward import forward


class XlaBackend(Backend):
    """Loops over chunks of the live range. Total: it refuses nothing, and comes last."""

    name: ClassVar[str] = "xla"
    priority: ClassVar[int] = -100

    def supports(self, problem: Problem, target: Target) -> str | None:
        del problem, target
        return None

    def fwd_params(self, problem: Problem, target: Target) -> FwdParams:
        """`block_size_keys` is the rows of a chunk; the other hints have no meaning here."""
        return problem.fwd_params.over(FwdParams(block_size_keys=default_rows(target)))

    def forward(self, problem, target, query, key, value, start, end, sink):
        problem = dataclasses.replace(problem, fwd_params=self.fwd_params(problem, target))
        return forward(problem, target, query, key, value, start, end, sink)

    def backward(self, problem, target, query, key, value, start, end, lse, d_out, delta, *, wanted: Wanted):
        problem = dataclasses.replace(problem, fwd_params=self.fwd_params(problem, target))
        return backward(problem, target, query, key, value, start, end, lse, d_out, delta, wanted)
