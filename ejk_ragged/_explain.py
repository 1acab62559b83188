"""Which backend a call would run on each platform, and why not the others."""

import dataclasses
import inspect
from typing import Any

import jax

from ._api import ragged_decode_attention
from ._backend import BackendFailed
from ._canonical import canonical, checked
from ._platforms import gpu_platform, KNOWN_PLATFORMS
from ._problem import FwdParams, Problem
from ._registry import HintsFrom, registry


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one platform would do with a call.

    Attributes:
        platform: JAX's name of it.
        forward: name of the backend that computes the output, or None.
        backward: name of the one that computes the gradients, or None.
        fwd_params: the tuning hints it would use.
        hints_from: where they come from: "given" by the caller, "tuned" by `python -m ejk_ragged tune`, or the backend's "default".
        passed_over: reasons by backend, for those asked before the chosen one and for gradients.
        error: what a call there would raise, or its gradient, or None.
        not_for_backward: names of the given hints that are for the backend of the forward, and not for another of the gradients.
    """

    platform: str
    forward: str | None
    backward: str | None
    fwd_params: FwdParams
    passed_over: dict[str, str]
    error: str | None = None
    hints_from: HintsFrom = "default"
    not_for_backward: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What every platform would do with a call; `str()` of it is for reading."""

    problem: Problem
    choices: dict[str, Choice]

    def __getitem__(self, platform: str) -> Choice:
        """The choice of a platform, by JAX's name of it. "gpu" is the kind of GPU that is here, or else cuda."""
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
            lines.append(f"  {choice.platform:<5} {choice.forward}{gradients}{_show_hints(choice)}")
            if choice.not_for_backward:
                lines.append(f"        hints that are not for {choice.backward}: {', '.join(choice.not_for_backward)}")
            lines += [f"        not {name}: {reason}" for name, reason in choice.passed_over.items()]
        return "\n".join(lines)


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Which backend `ragged_decode_attention(*args, **kwargs)` would run on each platform, and why not the others.

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError, TypeError: as the call itself would.
    """
    call = inspect.signature(ragged_decode_attention).bind(*args, **kwargs)
    call.apply_defaults()
    del call.arguments["return_lse"]
    arguments, request = checked(**call.arguments)
    queries, cache = jax.eval_shape(canonical, arguments)
    problem = Problem.of(queries, cache, request.settings)
    registry.check_named(request.backend, problem)
    return Explanation(problem, {platform: _choose(platform, problem, request) for platform in KNOWN_PLATFORMS})


def _show_hints(choice) -> str:
    if choice.hints_from == "default":
        return ""
    hints = {name: value for name, value in dataclasses.asdict(choice.fwd_params).items() if value is not None}
    return f"; {choice.hints_from} hints: " + ", ".join(f"{name} {value}" for name, value in hints.items())


def _choose(platform, problem, request) -> Choice:
    try:
        forward = registry.select(platform, problem, request.backend, "forward", request.tuned)
    except (ValueError, BackendFailed) as error:
        return Choice(platform, None, None, problem.fwd_params, {}, str(error))
    choice = Choice(platform, forward.backend.name, None, forward.problem.fwd_params, dict(forward.passed_over))
    choice = dataclasses.replace(choice, hints_from=forward.hints_from)
    try:
        backward = registry.select(platform, problem, request.backend, "backward")
    except (ValueError, BackendFailed) as error:
        return dataclasses.replace(choice, error=str(error))
    gradients = {name: f"for gradients, {why}" for name, why in backward.passed_over}
    return dataclasses.replace(
        choice,
        backward=backward.backend.name,
        passed_over=gradients | choice.passed_over,
        not_for_backward=backward.not_for,
    )
