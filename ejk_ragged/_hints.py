"""The file of tuned hints: the best hints that the tuner found, per backend, kind of device and class of problems.

The file is JSON, in the user's cache folder. `python -m ejk_ragged tune` writes the file, and calls read it without being asked to.
The content of a file is a `Tuned`. A `Tuned` is part of the static settings of a call, so a change of the file recompiles calls.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ._backend import Backend, Target
from ._problem import FwdParams, Problem


FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The content of a file. Two are equal if their files hold the same bytes."""

    digest: str
    entries: Mapping[str, FwdParams] = dataclasses.field(compare=False, repr=False)

    def best(self, backend: Backend, problem: Problem, target: Target) -> FwdParams | None:
        """The best hints for the class of `problem`, or None if the class was not tuned."""
        return self.entries.get(key_of(backend, problem, target) or "")


def key_of(backend: Backend, problem: Problem, target: Target) -> str | None:
    """The file's key for a class of problems, with one version of a backend, on one kind of device.

    None if there is no key, because a size is symbolic or this machine has no device of the target's platform.
    """
    kind = getattr(target.device, "device_kind", None)
    if kind is None or not all(isinstance(n, int) for n in problem.sizes):
        return None
    batch, num_tokens, seq_len = (1 << max(n - 1, 0).bit_length() for n in problem.sizes[:3])
    cache = f", {problem.cache_dtype.name} cache" if problem.quantised else ""
    value = "" if problem.value_dim == problem.head_dim else f":{problem.value_dim}"
    value += "" if problem.value_columns is None else " in rows"
    pages = f", pages of {problem.page_size}" if problem.paged else ""
    cap = "" if problem.logits_soft_cap is None else ", cap"
    return (
        f"{backend.name} {backend.version}; {kind}; {problem.dtype.name}{cache}, heads {problem.num_q_heads}:"
        f"{problem.num_kv_heads}, D {problem.head_dim}{value}{pages}{cap}, B to {batch}, T to {num_tokens}, S to {seq_len}"
    )


_NOT_GIVEN = object()
_given: contextvars.ContextVar[Any] = contextvars.ContextVar("ejk_ragged_tuned_hints", default=_NOT_GIVEN)
_reading = threading.Lock()


@contextlib.contextmanager
def tuned_hints(file: str | os.PathLike | None) -> Iterator[None]:
    """A context in which calls take their tuned hints from `file`, or use no tuned hints if `file` is None.

    `python -m ejk_ragged tune --file` writes such a file. The context applies to calls that are made inside, or are traced inside
    under `jax.jit`. A function that is already compiled keeps its hints. A damaged file gives one warning, and is then ignored.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = None if file is None else pathlib.Path(file)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"There is no file of tuned hints at {path}; `python -m ejk_ragged tune --file {path}` makes one.")
    token = _given.set(path)
    try:
        yield
    finally:
        _given.reset(token)


def current() -> Tuned | None:
    """The tuned hints that calls use now: from the file that `tuned_hints` gives, or else from the file in the user's cache folder.

    None if there is no file. The file is read again only if its date, size or inode has changed.
    """
    given = _given.get()
    path = default_file() if given is _NOT_GIVEN else given
    if path is None:
        return None
    try:
        stat = os.stat(path)
    except OSError:  # nothing is tuned yet
        return None
    with _reading:  # one thread reads, and warns once
        return _load(path, (stat.st_mtime_ns, stat.st_size, stat.st_ino))


@functools.cache
def default_file() -> pathlib.Path | None:
    """The path of the file in the user's cache folder. None without platformdirs, which the tuner needs to write the file."""
    try:
        import platformdirs
    except ModuleNotFoundError:
        return None
    return platformdirs.user_cache_path("ejk-ragged", appauthor=False) / "tuned.json"


class Newer(ValueError):
    """A newer version of this package wrote the file."""


@functools.lru_cache(maxsize=32)
def _load(path, stamp) -> Tuned | None:
    """The content of the file at `path`. `stamp` identifies the version of the file, for the `lru_cache`."""
    try:
        text = path.read_bytes()
        return Tuned(hashlib.sha256(text).hexdigest(), entries_of(json.loads(text)))
    except Newer as error:
        why = f"{error} Update ejk-ragged, or choose another file with `ejk_ragged.tuned_hints`."
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}. Delete the file or tune again."
    warnings.warn(f"The tuned hints in {path} are ignored: {why}", RuntimeWarning, stacklevel=3)
    return None


def entries_of(data: Any) -> dict[str, FwdParams]:
    """The hints by key, from the parsed content of a file. Raises a `Newer`, or another error if the file is damaged."""
    found = data["format"]
    if isinstance(found, int) and found > FORMAT:
        raise Newer(f"A newer version of ejk-ragged wrote the file, in format {found}; this version knows format {FORMAT}.")
    if found != FORMAT:
        raise ValueError(f"format {found!r} is not {FORMAT}")
    return {key: FwdParams(**entry["fwd_params"]) for key, entry in data["entries"].items()}
