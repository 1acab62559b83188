"""`explain`: which backend a call would run on each platform, and why the other backends would not run."""

import dataclasses
import inspect
from typing import Any

import jax

from ._api import ragged_decode_attention
from ._backend import BackendFailed
from ._canonical import canonical, checked
from ._platforms import gpu_platform, KNOWN_PLATFORMS
from ._problem import FwdParams, Problem
from ._registry import registry
from ._selection import HintsFrom


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backends that one platform would use for a call.

    Attributes:
        platform: JAX's name of the platform.
        forward: name of the backend that computes the output. None if no backend can.
        backward: name of the backend that computes the gradients. None if no backend can.
        fwd_params: tuning hints of the forward operation.
        passed_over: the backends that were asked first and refused, with their reasons. A reason that concerns only the gradients
            says so.
        error: the error that the call or its gradient would raise on the platform, or None.
        hints_from: origin of the hints: "given" by the caller, "tuned" by `python -m ejk_ragged tune`, or "default", which is the
            backend's own choice.
        not_for_backward: names of the given hints that the backward operation does not use, because another backend does it.
        preferred: why the backend of the forward operation was asked earlier or later than its general priority says, or "".
    """

    platform: str
    forward: str | None
    backward: str | None
    fwd_params: FwdParams
    passed_over: dict[str, str]
    error: str | None = None
    hints_from: HintsFrom = "default"
    not_for_backward: tuple[str, ...] = ()
    preferred: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The choices of every platform for a call. `str()` gives a text for reading."""

    problem: Problem
    choices: dict[str, Choice]

    def __getitem__(self, platform: str) -> Choice:
        """The choice of a platform, by JAX's name of the platform. "gpu" means this machine's kind of GPU, or cuda without one."""
        if platform == "gpu":
            platform = gpu_platform()
        if platform not in self.choices:
            raise KeyError(f"platform must be gpu or one of {', '.join(self.choices)}; got {platform!r}")
        return self.choices[platform]

    def __str__(self):
        lines = [f"ragged_decode_attention of {self.problem}"]
        for choice in self.choices.values():
            if choice.forward is None:
                lines.append(f"  {choice.platform:<5} error: {choice.error}")
                continue
            gradients = "" if choice.backward == choice.forward else f"; gradients by {choice.backward or 'none'}"
            hints = ", ".join(f"{name} {value}" for name, value in choice.fwd_params.given.items())
            hints = "" if choice.hints_from == "default" else f"; {choice.hints_from} hints: {hints}"
            why = f" ({choice.preferred})" if choice.preferred else ""
            lines.append(f"  {choice.platform:<5} {choice.forward}{why}{gradients}{hints}")
            if choice.not_for_backward:
                lines.append(f"        hints that are not for {choice.backward}: {', '.join(choice.not_for_backward)}")
            lines += [f"        not {name}: {reason}" for name, reason in choice.passed_over.items()]
        return "\n".join(lines)


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Which backend `ragged_decode_attention(*args, **kwargs)` would run on each platform, and why the others would not run.

    Nothing is computed. Arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError, TypeError: the same errors that the call would raise.
    """
    call = inspect.signature(ragged_decode_attention).bind(*args, **kwargs)
    call.apply_defaults()
    del call.arguments["return_lse"]
    arguments, request = checked(**call.arguments)
    queries, cache = jax.eval_shape(canonical, arguments)
    problem = Problem.of(queries, cache, request.settings)
    registry.check_named(request.backend, problem)
    return Explanation(problem, {platform: _choose(platform, problem, request) for platform in KNOWN_PLATFORMS})


def _choose(platform, problem, request) -> Choice:
    facts: dict[str, Any] = {"forward": None, "backward": None, "fwd_params": problem.fwd_params, "passed_over": {}}
    try:
        chosen = registry.select(platform, problem, request.backend, "forward", request.tuned)
        facts |= {"forward": chosen.backend.name, "fwd_params": chosen.problem.fwd_params, "passed_over": dict(chosen.passed_over)}
        facts |= {"hints_from": chosen.hints_from, "preferred": chosen.preferred}
        chosen = registry.select(platform, problem, request.backend, "backward")
        gradients = {name: f"for gradients, {why}" for name, why in chosen.passed_over}
        facts |= {"backward": chosen.backend.name, "not_for_backward": chosen.not_for}
        facts["passed_over"] = gradients | facts["passed_over"]
    except (ValueError, BackendFailed) as error:
        facts["error"] = str(error)
    return Choice(platform, **facts)
