"""Which backend does a call: the installed ones (entry points, imported when first needed), and the selection, with its reasons.

Distributions announce backends in the entry-point group `ejk_ragged.backends`; nothing here knows one by name.
"""

import dataclasses
import importlib.metadata
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import jax

from ._backend import Backend, Direction, Target
from ._hints import Tuned
from ._problem import FwdParams, Problem, Settings


GROUP = "ejk_ragged.backends"
KNOWN_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # what JAX can lower for by these names; others take its default rule
HintsFrom = Literal["given", "tuned", "default"]


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """An installed backend. `broken` says why it cannot be used here, or is None; `platforms` None means all."""

    name: str
    distribution: str
    platforms: frozenset[str] | None
    broken: str | None


@dataclasses.dataclass(frozen=True)
class Selection:
    """A backend, chosen for one direction of one problem on one platform.

    Attributes:
        backend: the chosen one.
        problem: what it will be asked to do, tuning hints resolved.
        target: where.
        passed_over: names of the backends that were asked before, with their reasons.
        hints_from: whether the tuning hints are the caller's ("given"), the tuner's ("tuned") or the backend's own ("default").
    """

    backend: Backend
    problem: Problem
    target: Target
    passed_over: tuple[tuple[str, str], ...] = ()
    hints_from: HintsFrom = "default"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Request:
    """What a caller asked for that is static: it travels with the operation, and `Registry.select` answers it.

    Attributes:
        settings: what every backend is told.
        backend: the named one, or None for automatic selection.
        tuned: what the tuner found, where the caller gave no hints.
    """

    settings: Settings
    backend: Backend | None = None
    tuned: Tuned | None = None


class Registry:
    """Backends by name. Entry points come as an argument, so that tests can make them up."""

    def __init__(self, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None):
        self._given = entry_points
        self.clear()

    def clear(self):
        """Forget what was found and loaded; the next question looks again."""
        self._entries: dict[str, importlib.metadata.EntryPoint] | None = None
        self._loaded: dict[str, Backend | Exception] = {}
        self._warned: set[str] = set()

    def entries(self) -> dict[str, importlib.metadata.EntryPoint]:
        """Entry points by name, nothing imported."""
        if self._entries is None:
            found = importlib.metadata.entry_points(group=GROUP) if self._given is None else self._given
            entries: dict[str, importlib.metadata.EntryPoint] = {}
            for entry in found:
                other = entries.setdefault(entry.name, entry)
                if other is not entry and (other.value, _distribution(other)) != (entry.value, _distribution(entry)):
                    raise RuntimeError(
                        f"Two distributions register a backend named {entry.name!r}: {_distribution(other)} ({other.value}) and "
                        f"{_distribution(entry)} ({entry.value}). Uninstall one of them."
                    )
            self._entries = dict(sorted(entries.items()))
        return self._entries

    def names(self) -> tuple[str, ...]:
        return tuple(self.entries())

    def _load(self, name: str) -> Backend | Exception:
        if name not in self._loaded:
            try:
                backend = self.entries()[name].load()
                if isinstance(backend, type):
                    backend = backend()
                if not isinstance(backend, Backend):
                    raise TypeError(f"its entry point is {backend!r}, not an ejk_ragged.Backend")
                if backend.name != name:
                    raise ValueError(f"its entry point is named {name!r} but the backend calls itself {backend.name!r}")
                self._loaded[name] = backend
            except Exception as error:  # whatever a plug-in raises, the others go on
                self._loaded[name] = error
        return self._loaded[name]

    def get(self, name: str) -> Backend:
        """The backend of that name.

        Raises:
            ValueError: no such name.
            RuntimeError: it is installed but cannot be loaded; chained to the reason.
        """
        if name not in self.entries():
            raise ValueError(f"backend must be None, 'auto', a Backend or one of {', '.join(self.names())}; got {name!r}.")
        backend = self._load(name)
        if isinstance(backend, Exception):
            entry = self.entries()[name]
            raise RuntimeError(f"The backend {name!r} of {_distribution(entry)} cannot be loaded: {_reason(backend)}.") from backend
        return backend

    def resolve(self, backend: "str | Backend | None") -> Backend | None:
        """What `backend=` means: a Backend, or None for automatic selection."""
        if backend is None or backend == "auto":
            return None
        if isinstance(backend, Backend):
            return backend
        if isinstance(backend, str):
            return self.get(backend)
        raise TypeError(
            f"backend must be None, 'auto', a Backend instance or one of {', '.join(self.names())}; "
            f"got {backend!r} of type {type(backend).__name__}."
        )

    def backends(self) -> tuple[BackendInfo, ...]:
        """Every installed backend, broken ones with why."""
        infos = []
        for name, entry in self.entries().items():
            backend = self._load(name)
            if isinstance(backend, Exception):
                infos.append(BackendInfo(name, _distribution(entry), None, _reason(backend)))
            else:
                infos.append(BackendInfo(name, _distribution(entry), backend.platforms, backend.unavailable()))
        return tuple(infos)

    def automatic(self) -> list[Backend]:
        """The backends that load, highest priority first. One that doesn't is warned about once."""
        loaded = []
        for name in self.names():
            backend = self._load(name)
            if isinstance(backend, Backend):
                loaded.append(backend)
            elif name not in self._warned:
                self._warned.add(name)
                distribution = _distribution(self.entries()[name])
                warnings.warn(
                    f"The backend {name!r} of {distribution} cannot be loaded and is passed over: {_reason(backend)}.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return sorted(loaded, key=lambda backend: (-backend.priority, backend.name))

    def refusal(self, backend: Backend, problem: Problem, target: Target, direction: Direction = "forward") -> str | None:
        """Why `backend` cannot do it, or None."""
        if backend.platforms is not None and target.platform not in backend.platforms:
            return f"it runs on {', '.join(sorted(backend.platforms))}, not on {target.platform}"
        ask = backend.supports if direction == "forward" else backend.supports_backward
        return backend.unavailable() or ask(problem, target)

    def select(
        self,
        platform: str,
        problem: Problem,
        backend: "str | Backend | None" = None,
        direction: Direction = "forward",
        tuned: Tuned | None = None,
    ) -> Selection:
        """The backend that does `problem` on `platform`: the named one, or the first that gives no reason against it.

        Raises:
            ValueError: an unknown name, a named backend that cannot do it, or hints that cannot work.
        """
        target = Target.of(platform)
        named = self.resolve(backend)
        passed_over = []
        for candidate in ([named] if named else []) + self.automatic() * (named is None or direction == "backward"):
            reason = self.refusal(candidate, problem, target, direction)
            if reason is None:
                hints, hints_from = self._hints(candidate, problem, target, direction, tuned)
                problem = dataclasses.replace(problem, fwd_params=hints)
                return Selection(candidate, problem, target, tuple(passed_over), hints_from)
            passed_over.append((candidate.name, reason))
        if named is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over) or "none is installed"
            raise ValueError(f"No backend can do {_asked(direction)} ({problem}) on {platform}: {reasons}.")
        raise self._refused(named, passed_over[0][1], problem, target, direction)

    def _hints(self, backend, problem, target, direction, tuned) -> tuple[FwdParams, HintsFrom]:
        """The hints for a call and where they come from: given, or else tuned (for the forward operation, which is what the tuner
        times), or else the backend's own. Given ones stand alone: what was tuned was tuned together."""
        if problem.fwd_params != FwdParams():
            return backend.fwd_params(problem, target), "given"
        best = tuned and direction == "forward" and tuned.best(backend, problem, target)
        if best:
            try:
                return backend.fwd_params(dataclasses.replace(problem, fwd_params=best), target), "tuned"
            except ValueError as error:  # of another device of the same name, or edited by hand
                if str(error) not in self._warned:
                    self._warned.add(str(error))
                    warnings.warn(f"Tuned hints are ignored: {error}", RuntimeWarning, stacklevel=2)
        return backend.fwd_params(problem, target), "default"

    def check_named(self, backend: Backend | None, problem: Problem):
        """A named backend that cannot do `problem` on any of its platforms is refused before anything is lowered.

        Raises:
            ValueError: with its reason, and who can.
        """
        if backend is None:
            return
        targets = [Target.of(platform) for platform in sorted(backend.platforms or KNOWN_PLATFORMS)]
        reasons = [self.refusal(backend, problem, target) for target in targets]
        if all(reasons):
            raise self._refused(backend, reasons[0], problem, targets[0], "forward")

    def _refused(self, backend, reason, problem, target, direction):
        able = [other.name for other in self.automatic() if self.refusal(other, problem, target, direction) is None]
        return ValueError(
            f"backend {backend.name!r} cannot do {_asked(direction)} ({problem}) on {target.platform}: {reason}. "
            f"Backends that can: {', '.join(able) or 'none of those installed'}."
        )


def _asked(direction: Direction) -> str:
    return "this call" if direction == "forward" else "the gradients of this call"


def _distribution(entry) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def platform_of(device: Any) -> str:
    """The name by which JAX lowers for `device`; its `platform` says "gpu" for both kinds of GPU."""
    if device.platform == "gpu":
        return "rocm" if "rocm" in getattr(device.client, "platform_version", "") else "cuda"
    return device.platform


registry = Registry()


def backends() -> tuple[BackendInfo, ...]:
    """The installed backends, with their platforms; for one that cannot be used here, why."""
    return registry.backends()
