"""The interface of backends: the abstract `Backend`, where a call runs (`Target`), and which gradients it needs (`Wanted`)."""

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
    """Where a call runs: JAX's name of the platform, and one device of the platform, or None if this process has none."""

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
    """Which gradients a backward operation must return: d_query, and d_key together with d_value."""

    query: bool = True
    key_value: bool = True


class BackendFailed(RuntimeError):
    """A backend raised an error when the registry asked it a question. The exception is chained to that error."""


class Backend(abc.ABC):
    """One implementation of the decode operation.

    Operands are in canonical form. Windows, causality and padding are bounds of each token. Sinks are one logit per query head.
    Scales have three axes: sequence (or page), kv head and row. What the caller did not pass is None. The docstrings of `Queries`,
    `Cache` and `Settings` say what a backend must obey. `ejk_ragged.testing.verify_backend` tests a backend on each point.

    An instance holds no arrays. Two instances are equal if their classes and fields are equal. Calls with equal instances share
    compiled programs.

    Attributes:
        name: the name that users pass as `backend=`.
        platforms: the JAX platforms on which the backend runs, or None for all.
        priority: automatic selection asks the backend with the highest priority first. `priority_for` may differ by problem.
        version: version of the backend for the tuner. A new version makes hints that were tuned before invalid.
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
        return hash(type(self))  # the fields may change while JAX holds the instance, and may have no hash

    def unavailable(self) -> str | None:
        """Why the backend cannot run in this installation at all, or None if it can."""
        return None

    def priority_for(self, problem: Problem, target: Target) -> tuple[float, str]:
        """The priority for the forward operation of `problem` on `target`, and the reason if it is not `priority`.

        A backend that is faster than others for some problems gives these a priority of their own. `explain` shows the reason.
        """
        return self.priority, ""

    @abc.abstractmethod
    def supports(self, problem: Problem, target: Target) -> str | None:
        """Why the backend cannot do the forward operation of `problem` on `target`, or None if it can.

        The registry asks only about the platforms of the backend.
        """

    def supports_backward(self, problem: Problem, target: Target) -> str | None:
        """Why the backend cannot do the backward operation, or None if it can.

        If it cannot, automatic selection uses another backend for the gradients.
        """
        if type(self).backward is Backend.backward:
            return "it has no backward operation"
        return self.supports(problem, target)

    def fwd_params(self, problem: Problem, target: Target) -> FwdParams:
        """The hints that the backend would use: the hints in `problem`, with the backend's defaults for fields that are None.

        Raises:
            ValueError: a given hint cannot work. The message names the field.
        """
        return problem.fwd_params

    def candidates(self, problem: Problem, target: Target) -> Iterable[FwdParams]:
        """Hints that the tuner tries for `problem` in addition to the defaults, the most promising hints first."""
        return ()

    def lowering(self, target: Target) -> contextlib.AbstractContextManager:
        """A context manager for lowering the backend's operations. It can set a device to assume, or hide warnings from users."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def forward(self, problem: Problem, target: Target, queries: Queries, cache: Cache) -> tuple[jax.Array, jax.Array]:
        """Output and log-sum-exp.

        The logit of key j is `x_j = softmax_scale * q . (k_j * key_scale_j)`, then capped. Over the keys j of a token's range:
        `lse = log(sum_j exp(x_j) + exp(sink))` and `out = sum_j exp(x_j - lse) v_j * value_scale_j`. For an empty range, out is 0.

        Args:
            problem: the static facts.
            target: where the operation runs.
            queries: the tokens, their bounds and their sinks. Bounds may lie outside the cache: `Queries.bounds` clips them.
            cache: the keys and values, their scales and the page table. Entries of the page table may lie outside the pool:
                `Cache.pages` clips them.

        Returns:
            A pair (out, lse): out [B, T, Hq, Dv] in `problem.out_dtype`, and lse [B, T, Hq] in the accumulation dtype.
        """

    def backward(
        self,
        problem: Problem,
        target: Target,
        queries: Queries,
        cache: Cache,
        lse: jax.Array,
        d_out: jax.Array,
        delta: jax.Array,
        *,
        wanted: Wanted,
    ) -> list[jax.Array]:
        """The gradients, from d_logit_j = p_j (d_out . v_j * value_scale_j - delta) with p_j = exp(x_j - lse).

        Args:
            problem, target, queries, cache: as in `forward`.
            lse: [B, T, Hq] in the accumulation dtype, as `forward` returned it.
            d_out: [B, T, Hq, Dv], the cotangent of the output.
            delta: [B, T, Hq] in the accumulation dtype, d_out . out - d_lse.
            wanted: which gradients to return. Gradients of a quantised cache or of a pool are never wanted.

        Returns:
            A list of the wanted gradients, each in the shape of its primal. If `wanted.query`: d_query in `problem.out_dtype`.
            Then, if `wanted.key_value`: d_key and d_value in the cache's dtype, exactly 0 in the rows that no token sees. If the
            value is in the key's rows, there is no d_value. d_key is then the sum over both uses, and 0 in unused columns.
        """
        raise NotImplementedError
