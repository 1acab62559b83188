"""The memory of the tuner: which hints were best for which class of problems, on which device, by which backend.

A JSON file in the user's cache folder, which `python -m ejk_ragged tune` writes and calls read by themselves. What a file says is
held as a `Tuned`, which travels with a call's static settings, so that compiled calls are compiled again when it changes.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ._backend import Backend, Target
from ._problem import FwdParams, Problem


FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a file says. Two are equal when their files hold the same bytes."""

    digest: str
    entries: Mapping[str, FwdParams] = dataclasses.field(compare=False, repr=False)

    def best(self, backend: Backend, problem: Problem, target: Target) -> FwdParams | None:
        """The hints that were found best for the class of `problem`, or None."""
        return self.entries.get(key_of(backend, problem, target) or "")


def key_of(backend: Backend, problem: Problem, target: Target) -> str | None:
    """The class of a problem, for a backend of one version on one kind of device; None where there is none: sizes that are
    symbolic, or a platform without a device here."""
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


# ---------------------------------------------------------------------------------------------------------------------------
# Reading


_NOT_GIVEN = object()
_given: contextvars.ContextVar[Any] = contextvars.ContextVar("ejk_ragged_tuned_hints", default=_NOT_GIVEN)
_reading = threading.Lock()
_read: dict[pathlib.Path, tuple[Any, Tuned | None]] = {}  # by path: what stat said of the file, and what was in it


@contextlib.contextmanager
def tuned_hints(file: str | os.PathLike | None) -> Iterator[None]:
    """Inside, calls take tuned hints from `file` (as `python -m ejk_ragged tune --file` writes it), or, given None, from nowhere.

    It holds for calls that are made, or traced under `jax.jit`, inside; what is compiled already keeps its hints. A damaged file is
    warned about once and counts as none.

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
    """What calls use now: a given file, or the one in the user's cache folder, or nothing. Costs a look at the file's date."""
    given = _given.get()
    path = default_file() if given is _NOT_GIVEN else given
    if path is None:
        return None
    try:
        stat = os.stat(path)
    except OSError:  # nothing was tuned
        return None
    stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    with _reading:  # by one of several threads, which also warns
        if path not in _read or _read[path][0] != stamp:
            _read[path] = (stamp, _load(path))
        return _read[path][1]


@functools.cache
def default_file() -> pathlib.Path | None:
    """The file in the user's cache folder."""
    try:
        import platformdirs
    except ModuleNotFoundError:  # then nothing has been tuned either
        return None
    return platformdirs.user_cache_path("ejk-ragged", appauthor=False) / "tuned.json"


class _Newer(ValueError):
    """A newer version of this package wrote the file."""


def _load(path) -> Tuned | None:
    try:
        text = path.read_bytes()
        return Tuned(hashlib.sha256(text).hexdigest(), _entries(json.loads(text)))
    except _Newer as error:
        why = f"{error} Update ejk-ragged, or choose another file with `ejk_ragged.tuned_hints`."
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}. Delete the file or tune again."
    warnings.warn(f"The tuned hints in {path} are ignored: {why}", RuntimeWarning, stacklevel=3)
    return None


def _entries(data) -> dict[str, FwdParams]:
    found = data["format"]
    if isinstance(found, int) and found > FORMAT:
        raise _Newer(f"A newer version of ejk-ragged wrote the file, in format {found}; this version knows format {FORMAT}.")
    if found != FORMAT:
        raise ValueError(f"format {found!r} is not {FORMAT}")
    return {key: FwdParams(**entry["fwd_params"]) for key, entry in data["entries"].items()}


# ---------------------------------------------------------------------------------------------------------------------------
# Writing


def save(path: pathlib.Path, entries: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Adds entries, {"fwd_params": {...}, ...} by key, to those in the file. Readers see the old file or the new one. Processes and
    threads that save at once wait for each other.

    Returns:
        None if the entries are saved; otherwise why not. A file that a newer version wrote is left alone, with a warning.

    Raises:
        OSError: the file cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_suffix(".lock")):
        try:
            old = _kept(path)
        except _Newer as error:
            why = f"{error} Update ejk-ragged, or choose another file."
            warnings.warn(f"The tuned hints are not saved in {path}: {why}", RuntimeWarning, stacklevel=2)
            return why
        old["entries"] |= entries
        _replace(path, json.dumps(old, indent=1, sort_keys=True))
    return None


def cannot_save(path: pathlib.Path) -> str | None:
    """Why `save` would leave the file alone, or None."""
    try:
        _kept(path)
    except _Newer as error:
        return str(error)
    return None


def _kept(path) -> dict[str, Any]:
    """What the file holds. A damaged file holds nothing."""
    nothing = {"format": FORMAT, "entries": {}}
    try:
        old = json.loads(path.read_bytes())
        _entries(old)
    except _Newer:
        raise
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return nothing
    return old


def _replace(path, text):
    """Puts a file with `text` in the place of `path`, with the mode of the old file, or the mode that the umask gives."""
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # not from `tempfile`, whose files are their owner's alone
    try:
        new.write_text(text)
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


_saving = threading.Lock()


@contextlib.contextmanager
def _lock(path):
    """Holds the operating system's lock on the file at `path`. The lock ends with the process that holds it, whatever ends that."""
    with _saving:  # threads of one process; on some file systems the lock below is one for each process
        file = _locked(path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file; there it stays, and does no harm
                os.unlink(path)
            os.close(file)


def _locked(path) -> int:
    """The open file at `path`, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait_for(file)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the one who held it before has removed it, so others lock another file by now


try:
    import fcntl

    def _wait_for(file: int):
        fcntl.flock(file, fcntl.LOCK_EX)

except ModuleNotFoundError:  # Windows
    import msvcrt

    def _wait_for(file: int):  # pyright: ignore[reportRedeclaration]
        while True:
            try:
                return msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
            except OSError:
                time.sleep(0.02)
