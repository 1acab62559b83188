"""What the registry is asked, and what it answers."""

import dataclasses
from typing import Literal

import jax

from ._backend import Backend, Target
from ._hints import Tuned
from ._problem import Problem, Settings


HintsFrom = Literal["given", "tuned", "default"]


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """An installed backend.

    Attributes:
        name: the name that users pass as `backend=`.
        distribution: name of the distribution that registers the backend.
        platforms: the JAX platforms on which the backend runs, or None for all.
        broken: why the backend cannot be used in this installation, or None.
        faulty: True if `broken` is an error that the backend raised. False if it names something that the installation lacks.
    """

    name: str
    distribution: str
    platforms: frozenset[str] | None
    broken: str | None
    faulty: bool = False


@dataclasses.dataclass(frozen=True)
class Selection:
    """The backend that was selected for one direction of one problem on one platform.

    `problem` has the resolved hints. `passed_over` has pairs (name, reason). `not_for` names the caller's hints that are not for
    this backend. For the other fields see `Choice`.
    """

    backend: Backend
    problem: Problem
    target: Target
    passed_over: tuple[tuple[str, str], ...] = ()
    hints_from: HintsFrom = "default"
    not_for: tuple[str, ...] = ()
    preferred: str = ""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Request:
    """The static half of a call. A request accompanies the operation, and `Registry.select` finds its backend.

    Attributes:
        settings: the settings that the selected backend must obey.
        backend: the named backend, or None for automatic selection.
        tuned: the tuned hints. None if the caller gave hints, or if there is no file of tuned hints.
    """

    settings: Settings
    backend: Backend | None = None
    tuned: Tuned | None = None
