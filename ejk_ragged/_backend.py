"""What a backend is: the abstract `Backend`, where it runs (`Target`), and which gradients it may be asked for (`Wanted`)."""

import abc
import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax

from ._problem import Cache, FwdParams, Problem, Queries


Direction = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a call would run: JAX's name of the platform, and one of its devices when this process has any."""

    platform: str
    device: Any = None

    @classmethod
    def of(cls, platform: str) -> "Target":
        try:
            return cls(platform, jax.local_devices(backend=platform)[0])
        except RuntimeError:  # lowering for a platform that this machine lacks
            return cls(platform)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients are asked for: d_query, and d_key with d_value."""

    query: bool = True
    key_value: bool = True


class BackendFailed(RuntimeError):
    """A backend raised where the registry asked it something; chained to what it raised."""


class Backend(abc.ABC):
    """One implementation of the decode operation. Instances hold no arrays, and are equal where class and fields are, so that calls
    with equal ones share what was compiled.

    Operands come folded: windows, causality and padding are bounds of each token, sinks are one logit per head, scales have an
    axis for each of sequence (or page), kv head and row. What the caller did not say is None. `Queries`, `Cache` and `Settings`
    say what a backend must keep to, and `ejk_ragged.testing.verify_backend` tries a backend on each point.

    Attributes:
        name: what users write in `backend=`.
        platforms: the JAX platforms it runs on, or None for all.
        priority: automatic selection asks backends of higher priority first.
        version: changes whenever hints that were tuned before may no longer be the best.
    """

    name: ClassVar[str]
    platforms: ClassVar[frozenset[str] | None] = None
    priority: ClassVar[int] = 0
    version: ClassVar[str] = "1"

    def __eq__(self, other):
        if type(self) is not type(other):
            return NotImplemented
        return self is other or vars(self) == vars(other)

    def __hash__(self):
        return hash(type(self))  # fields may change while JAX holds the instance, and need not have a hash

    def unavailable(self) -> str | None:
        """Why it cannot run in this installation at all, or None."""
        return None

    @abc.abstractmethod
    def supports(self, problem: Problem, target: Target) -> str | None:
        """Why it cannot do the forward operation of `problem` on `target`, or None. Only asked on its own platforms."""

    def supports_backward(self, problem: Problem, target: Target) -> str | None:
        """Likewise for the backward operation. Where it can't, automatic selection finds another for the gradients."""
        if type(self).backward is Backend.backward:
            return "it has no backward operation"
        return self.supports(problem, target)

    def fwd_params(self, problem: Problem, target: Target) -> FwdParams:
        """The hints it would use: the caller's, with its own defaults in the gaps.

        Raises:
            ValueError: a given hint cannot work, naming the field.
        """
        del target
        return problem.fwd_params

    def candidates(self, problem: Problem, target: Target) -> Iterable[FwdParams]:
        """Hints that the tuner should try for `problem` beside the defaults; the order says what to try first."""
        del problem, target
        return ()

    def lowering(self, target: Target) -> contextlib.AbstractContextManager:
        """What must surround the lowering of its operations for `target`: a device to assume, warnings to keep from users."""
        del target
        return contextlib.nullcontext()

    @abc.abstractmethod
    def forward(self, problem: Problem, target: Target, queries: Queries, cache: Cache) -> tuple[jax.Array, jax.Array]:
        """Output and log-sum-exp.

        With `x_j = softmax_scale * q . (k_j * key_scale_j)`, then capped, over the keys j of a token's own range:
        `lse = log(sum_j exp(x_j) + exp(sink))`, `out = sum_j exp(x_j - lse) v_j * value_scale_j`, and 0 for an empty range.

        Args:
            problem: the static facts.
            target: where it runs.
            queries: the tokens, with their bounds, which may lie outside the cache (`Queries.bounds` clips them), and their sinks.
            cache: the keys and values, with their scales and page table (`Cache.pages` clips its entries).

        Returns:
            out [B, T, Hq, Dv] in `problem.out_dtype`, and lse [B, T, Hq] in the accumulation dtype.
        """

    def backward(
        self, problem: Problem, target: Target, queries: Queries, cache: Cache, lse, d_out, delta, *, wanted: Wanted
    ) -> list[jax.Array]:
        """Gradients, from d_logit_j = p_j (d_out . v_j * value_scale_j - delta) with p_j = exp(x_j - lse).

        Args:
            problem, target, queries, cache: as in `forward`.
            lse: accumulation dtype [B, T, Hq], what `forward` returned.
            d_out: [B, T, Hq, Dv], the output's cotangent.
            delta: accumulation dtype [B, T, Hq], d_out . out - d_lse.
            wanted: which gradients to return; never those of a quantised cache or of a pool.

        Returns:
            [d_query] if `wanted.query`, in `problem.out_dtype`, then [d_key, d_value] if `wanted.key_value`, in the cache's dtype,
            with exact zeros in the rows that no token sees; shaped like their primals. Where the value is in the key's rows, d_key
            alone, the sum of both uses, 0 in columns that neither uses.
        """
        raise NotImplementedError
