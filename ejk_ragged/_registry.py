"""The registry: finds the installed backends, and selects the backend for a call.

Distributions register backends in the entry-point group `ejk_ragged.backends`. A backend is imported when it is first needed. The
registry contains no backend's name.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import math
import sys
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import jax

from ._backend import Backend, BackendFailed, Direction, Target
from ._fingerprint import fingerprint
from ._hints import Tuned
from ._messages import shown
from ._platforms import KNOWN_PLATFORMS
from ._problem import FwdParams, Problem
from ._selection import BackendInfo, HintsFrom, Request, Selection


GROUP = "ejk_ragged.backends"


class Registry:
    """The backends by name. Any number of threads may use a registry. Tests pass entry points of their own."""

    def __init__(self, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None):
        self._given = entry_points
        self._lock = threading.RLock()  # reentrant: a plug-in may use the registry while it is imported
        self.clear()

    def clear(self):
        """Forgets the entry points and the loaded backends. The next call finds and loads them again."""
        with self._lock:
            self._entries: dict[str, importlib.metadata.EntryPoint] | None = None
            self._loaded: dict[str, Backend | Exception] = {}
            self._installed: list[Any] | None = None
            self._warned: set[str] = set()

    def entries(self) -> dict[str, importlib.metadata.EntryPoint]:
        """The entry points by name. Imports nothing.

        Raises:
            RuntimeError: two distributions register a backend with the same name.
        """
        with self._lock:
            if self._entries is None:
                entries: dict[str, importlib.metadata.EntryPoint] = {}
                for entry in importlib.metadata.entry_points(group=GROUP) if self._given is None else self._given:
                    other = entries.setdefault(entry.name, entry)
                    if (other.value, _distribution(other)) != (entry.value, _distribution(entry)):
                        raise RuntimeError(
                            f"Two distributions register a backend named {entry.name!r}: {_distribution(other)} ({other.value}) "
                            f"and {_distribution(entry)} ({entry.value}). Uninstall one of them."
                        )
                self._entries = dict(sorted(entries.items()))
            return self._entries

    def names(self) -> tuple[str, ...]:
        return tuple(self.entries())

    def _load(self, name: str) -> Backend | Exception:
        with self._lock:
            if name not in self._loaded:
                try:
                    backend = self.entries()[name].load()
                    if isinstance(backend, type):
                        backend = backend()
                    if not isinstance(backend, Backend):
                        raise TypeError(f"its entry point is {backend!r}, not an ejk_ragged.Backend")
                    if backend.name != name:
                        raise ValueError(f"its entry point is named {name!r} but the backend calls itself {backend.name!r}")
                    if not isinstance(backend.priority, int | float):
                        raise TypeError(f"its priority must be a number, got {backend.priority!r}")
                    self._loaded[name] = backend
                except Exception as error:  # an error of one plug-in must not stop the others
                    self._loaded[name] = error
            return self._loaded[name]

    def get(self, name: str) -> Backend:
        """The backend with this name.

        Raises:
            ValueError: there is no such name.
            RuntimeError: the backend is installed but cannot be loaded. The exception is chained to the reason.
        """
        if name not in self.entries():
            raise ValueError(f"backend must be None, 'auto', a Backend or one of {', '.join(self.names())}; got {name!r}.")
        backend = self._load(name)
        if isinstance(backend, Exception):
            entry = self.entries()[name]
            raise RuntimeError(f"The backend {name!r} of {_distribution(entry)} cannot be loaded: {_reason(backend)}.") from backend
        return backend

    def resolve(self, backend: "str | Backend | None") -> Backend | None:
        """The backend that a caller's `backend=` names, or None for automatic selection."""
        if backend is None or backend == "auto":
            return None
        if isinstance(backend, Backend):
            return backend
        if isinstance(backend, str):
            return self.get(backend)
        raise TypeError(
            f"backend must be None, 'auto', a Backend instance or one of {', '.join(self.names())}; "
            f"got {shown(backend)} of type {type(backend).__name__}."
        )

    def backends(self) -> tuple[BackendInfo, ...]:
        """Every installed backend. A broken backend has the reason with it."""
        infos = []
        for name, entry in self.entries().items():
            backend, platforms, faulty = self._load(name), None, True
            try:
                if isinstance(backend, Exception):
                    broken = _reason(backend)
                else:
                    platforms = self._platforms(backend)
                    broken, faulty = self._ask(backend, "unavailable"), False
            except BackendFailed as failure:
                broken = str(failure)
            infos.append(BackendInfo(name, _distribution(entry), platforms, broken, faulty))
        return tuple(infos)

    def automatic(self) -> list[Backend]:
        """The backends that can be loaded, highest priority first. Each backend that cannot be loaded gives one warning."""
        loaded = []
        for name, entry in self.entries().items():
            backend = self._load(name)
            if isinstance(backend, Backend):
                loaded.append(backend)
            else:
                what = f"The backend {name!r} of {_distribution(entry)} cannot be loaded and is passed over: {_reason(backend)}."
                self._warn_once(name, what)
        return sorted(loaded, key=lambda backend: (-backend.priority, backend.name))

    def _ranked(self, problem: Problem, target: Target) -> list[tuple[Backend, str]]:
        """The backends that load, in the order in which to ask them about the forward operation of `problem`, each with the reason
        for its priority, or ""."""
        ranked = [(backend, *self._priority(backend, problem, target)) for backend in self.automatic()]
        return [(backend, why) for backend, _, why in sorted(ranked, key=lambda one: (-one[1], one[0].name))]

    def _priority(self, backend: Backend, problem: Problem, target: Target) -> tuple[float, str]:
        """The backend's priority for the forward operation of `problem`, and the reason for it, or "". A backend that fails when
        asked keeps its general priority."""
        try:
            platforms = self._platforms(backend)
        except BackendFailed:  # `refusal` will say so
            platforms = ()
        if platforms is not None and target.platform not in platforms:
            return backend.priority, ""
        try:
            with self._asking(backend, "priority_for"):
                priority, why = backend.priority_for(problem, target)
                if not isinstance(priority, int | float) or math.isnan(priority) or not isinstance(why, str):
                    raise TypeError(f"it must return a number and a text, got {priority!r} and {why!r}")
                return priority, why
        except BackendFailed as failure:
            self._warn_once(f"{backend.name} priority_for", f"{failure} Its general priority counts.")
            return backend.priority, ""

    def fingerprint(self, request: Request) -> str:
        """A text that identifies everything that `select` depends on for `request`, apart from the device. See `fingerprint` for
        what is the same in every process."""
        with self._lock:
            if self._installed is None:
                self._installed = [
                    (name, entry.value, _distribution(entry), getattr(entry.dist, "version", None), _described(self._load(name)))
                    for name, entry in self.entries().items()
                ]
            installed = self._installed
        versions = sys.modules[__name__.partition(".")[0]].__version__, jax.__version__
        facts = (versions, request.settings, request.tuned, _described(request.backend), installed)
        return hashlib.sha256(fingerprint(facts).encode()).hexdigest()[:32]

    def _warn_once(self, key: str, message: str):
        with self._lock:
            if key in self._warned:
                return
            self._warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _ask(self, backend: Backend, method: str, *args: Any, passes: tuple[type[Exception], ...] = ()) -> Any:
        """What a method of a backend returns.

        Raises:
            BackendFailed: the backend raised an error that is not in `passes`.
        """
        with self._asking(backend, method, passes):
            return getattr(backend, method)(*args)

    @contextlib.contextmanager
    def _asking(self, backend: Backend, what: str, passes: tuple[type[Exception], ...] = ()):
        """A context for asking a backend, which turns errors from its attribute or method `what` into `BackendFailed`."""
        try:
            yield
        except passes:
            raise
        except Exception as error:  # a plug-in may raise anything
            raise BackendFailed(
                f"The backend {backend.name!r} of {self._origin(backend)} raised in `{what}`: {_reason(error)}."
            ) from error

    def _origin(self, backend: Backend) -> str:
        """The distribution that registers the backend's class. For an unregistered class, its module and name."""
        entry = self.entries().get(backend.name)
        if entry is not None and type(self._load(backend.name)) is type(backend):
            return _distribution(entry)
        return f"{type(backend).__module__}.{type(backend).__qualname__}"

    def refusal(self, backend: Backend, problem: Problem, target: Target, direction: Direction = "forward") -> str | None:
        """Why `backend` cannot do the operation, or None if it can.

        Raises:
            BackendFailed: the backend raised an error when asked.
        """
        platforms = self._platforms(backend)
        if platforms is not None and target.platform not in platforms:
            return f"it runs on {', '.join(sorted(platforms))}, not on {target.platform}"
        method = "supports" if direction == "forward" else "supports_backward"
        return self._ask(backend, "unavailable") or self._ask(backend, method, problem, target)

    def _platforms(self, backend: Backend) -> frozenset[str] | None:
        with self._asking(backend, "platforms"):
            return None if backend.platforms is None else frozenset(backend.platforms)

    def select(
        self,
        platform: str,
        problem: Problem,
        backend: "str | Backend | None" = None,
        direction: Direction = "forward",
        tuned: Tuned | None = None,
    ) -> Selection:
        """Selects the backend for `problem` on `platform`: the named backend, or else the first backend that does not refuse.

        A named backend that refuses the backward operation is replaced by the first backend that does not refuse. A backend that
        raises an error when asked counts as refusing, with a warning.

        Raises:
            ValueError: the name is unknown, the named backend or every backend refuses, or a given hint cannot work.
            BackendFailed: the named backend raised an error when asked.
        """
        target = Target.of(platform)
        named = self.resolve(backend)
        passed_over = []
        candidates = [(named, "")] if named else []
        if direction == "backward":
            candidates += [(candidate, "") for candidate in self.automatic()]
        elif named is None:
            candidates = self._ranked(problem, target)
        for candidate, why in candidates:
            try:
                reason = self.refusal(candidate, problem, target, direction)
                if reason is None:
                    hints, hints_from, not_for = self._hints(candidate, problem, target, direction, named, tuned)
                    with self._asking(candidate, "lowering"), candidate.lowering(target):
                        pass  # checks that the context can be entered
                    problem = dataclasses.replace(problem, fwd_params=hints)
                    return Selection(candidate, problem, target, tuple(passed_over), hints_from, not_for, why)
            except BackendFailed as failure:
                if candidate is named:
                    raise
                reason = self._passed_over(candidate, failure)
            passed_over.append((candidate.name, reason))
        if named is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over) or "none is installed"
            raise ValueError(f"No backend can do {_asked(direction)} ({problem}) on {platform}: {reasons}.")
        raise self._refused(named, passed_over[0][1], problem, target, direction)

    def _passed_over(self, backend, failure) -> str:
        self._warn_once(f"{backend.name} failed", f"{failure} It is passed over.")
        return str(failure).removesuffix(".")

    def _hints(self, backend, problem, target, direction, named, tuned) -> tuple[FwdParams, HintsFrom, tuple[str, ...]]:
        """The hints for a call, their origin, and the names of given hints that are for another backend only.

        Given hints come first, then tuned hints, then the backend's defaults. The tuner times the forward operation only, and finds
        the best combination of all hints. So tuned hints are for the forward operation, and never mixed with given hints.
        """
        given = self._given_for(backend, problem, target, direction, named)
        not_for = tuple(name for name, value in vars(problem.fwd_params).items() if value != getattr(given, name))
        problem = dataclasses.replace(problem, fwd_params=given)
        if given != FwdParams():
            return self._ask(backend, "fwd_params", problem, target, passes=(ValueError,)), "given", not_for
        best = tuned and direction == "forward" and tuned.best(backend, problem, target)
        if best:
            kept = dataclasses.replace(problem, fwd_params=best)
            try:
                return self._ask(backend, "fwd_params", kept, target, passes=(ValueError,)), "tuned", not_for
            except ValueError as error:  # tuned on another device of the same kind, or edited by hand
                self._warn_once(str(error), f"Tuned hints are ignored: {error}")
        return self._ask(backend, "fwd_params", problem, target), "default", not_for

    def _given_for(self, backend, problem, target, direction, named) -> FwdParams:
        """The caller's hints for `backend`. They are for the backend of the forward operation. Only `num_key_splits` is for every
        backend, because it asks for batch invariance."""
        given = problem.fwd_params
        for_all = FwdParams(num_key_splits=given.num_key_splits)
        if direction == "forward" or given == for_all:
            return given
        try:
            forward = named or self.select(target.platform, problem).backend
        except ValueError:  # no backend does the forward operation with these hints
            return for_all
        return given if backend == forward else for_all

    def check_named(self, backend: Backend | None, problem: Problem):
        """Checks, before anything is lowered, that a named backend can do `problem` on one of its platforms at least.

        Raises:
            ValueError: the backend cannot do it on any platform. The message has the reason, and the backends that can.
            BackendFailed: the backend raised an error for one platform, and can do it on no other platform.
        """
        if backend is None:
            return
        targets = [Target.of(platform) for platform in sorted(self._platforms(backend) or KNOWN_PLATFORMS)]
        reasons, failure = [], None
        for target in targets:
            try:
                reasons.append(self.refusal(backend, problem, target))
            except BackendFailed as error:
                failure = failure or error
        if all(reasons):
            raise failure or self._refused(backend, reasons[0], problem, targets[0], "forward")

    def _refused(self, backend, reason, problem, target, direction):
        able = []
        for other in self.automatic():
            try:
                if self.refusal(other, problem, target, direction) is None:
                    able.append(other.name)
            except BackendFailed as failure:
                self._passed_over(other, failure)
        return ValueError(
            f"backend {backend.name!r} cannot do {_asked(direction)} ({problem}) on {target.platform}: {reason}. "
            f"Backends that can: {', '.join(able) or 'none of those installed'}."
        )


def _asked(direction: Direction) -> str:
    return "this call" if direction == "forward" else "the gradients of this call"


def _distribution(entry) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def _described(backend) -> Any:
    """The facts that tell one backend from another. For a backend that cannot be loaded, the type of its error."""
    if isinstance(backend, Backend):
        return type(backend), backend.name, backend.version, vars(backend)
    return backend and type(backend)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


registry = Registry()


def backends() -> tuple[BackendInfo, ...]:
    """The installed backends, with their platforms. A backend that cannot be used in this installation has the reason with it."""
    return registry.backends()
