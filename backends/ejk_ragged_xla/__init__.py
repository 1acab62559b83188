"""The XLA backend: plain JAX. It does every problem on every platform."""

import dataclasses
from typing import ClassVar

from ejk_ragged import Backend, FwdParams, Problem, Target, Wanted

from ._backward import backward
from ._chunks import CHUNK_ROWS
from ._forward import forward


class XlaBackend(Backend):
    """Loops over chunks of the live ranges. It refuses no problem, and automatic selection asks it last."""

    name: ClassVar[str] = "xla"
    priority: ClassVar[int] = -100
    version: ClassVar[str] = "3"

    def supports(self, problem: Problem, target: Target) -> str | None:
        del problem, target
        return None

    def fwd_params(self, problem: Problem, target: Target) -> FwdParams:
        """The hint `block_size_keys` is the number of rows per chunk, or per large chunk on a CPU. Other hints are ignored."""
        del target
        return problem.fwd_params.over(FwdParams(block_size_keys=CHUNK_ROWS))

    def candidates(self, problem: Problem, target: Target):
        return [FwdParams(block_size_keys=rows) for rows in (128, 256, 512, 1024, 2048) if rows < 2 * problem.seq_len]

    def forward(self, problem, target, queries, cache):
        problem = dataclasses.replace(problem, fwd_params=self.fwd_params(problem, target))
        return forward(problem, target, queries, cache)

    def backward(self, problem, target, queries, cache, lse, d_out, delta, *, wanted: Wanted):
        problem = dataclasses.replace(problem, fwd_params=self.fwd_params(problem, target))
        return backward(problem, target, queries, cache, lse, d_out, delta, wanted)
