"""A tiny problem on a CPU whose hints are tuned, and a backend that notes the hints that it gets."""

import jax
import numpy as np

from ejk_ragged import FwdParams, Problem, Target
from ejk_ragged._platforms import platform_of
from ejk_ragged.testing import TextbookBackend


DEVICE = jax.local_devices(backend="cpu")[0]
TARGET = Target(platform_of(DEVICE), DEVICE)
PROBLEM = Problem(
    batch=3,
    num_tokens=1,
    seq_len=48,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    dtype=np.dtype("float32"),
    cache_dtype=np.dtype("float32"),
    softmax_scale=0.125,
)


class Notes(TextbookBackend):
    """A backend that notes the hints with which it is traced. Its result is wrong for some hints."""

    name = "notes"
    traced: tuple = ()

    def fwd_params(self, problem, target):
        if problem.fwd_params.num_warps == 3:
            raise ValueError("FwdParams.num_warps must not be 3")
        return problem.fwd_params.over(FwdParams(num_warps=1))

    def candidates(self, problem, target):
        return [FwdParams(num_warps=warps) for warps in (2, 4, 5, 7)]

    def forward(self, problem, target, queries, cache):
        self.traced += (problem.fwd_params.num_warps,)
        if problem.fwd_params.num_warps == 5:
            raise ArithmeticError("five is too many")
        out, lse = super().forward(problem, target, queries, cache)
        return (out * 2 if problem.fwd_params.num_warps == 7 else out), lse
