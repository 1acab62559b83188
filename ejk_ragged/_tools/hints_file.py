"""Writes the file of tuned hints, which `ejk_ragged._hints` reads."""

import contextlib
import json
import os
import pathlib
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

from ejk_ragged._hints import entries_of, FORMAT, Newer


def save(path: pathlib.Path, entries: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Adds entries to the file: {key: {"fwd_params": {...}, ...}}. An entry replaces an older entry with the same key.

    Readers see the old file or the new file, and never a part of one. If several processes or threads save, one waits for another.

    Returns:
        None if the entries are saved, otherwise the reason. A file of a newer version of the package is not changed, and gives a
        warning.

    Raises:
        OSError: the file cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_suffix(".lock")):
        try:
            old = _kept(path)
        except Newer as error:
            why = f"{error} Update ejk-ragged, or choose another file."
            warnings.warn(f"The tuned hints are not saved in {path}: {why}", RuntimeWarning, stacklevel=2)
            return why
        old["entries"] |= entries
        _replace(path, json.dumps(old, indent=1, sort_keys=True))
    return None


def cannot_save(path: pathlib.Path) -> str | None:
    """The reason why `save` would not change the file, or None."""
    try:
        _kept(path)
    except Newer as error:
        return str(error)
    return None


def _kept(path) -> dict[str, Any]:
    """The content of the file, which `save` extends. A damaged or missing file counts as empty."""
    nothing = {"format": FORMAT, "entries": {}}
    try:
        old = json.loads(path.read_bytes())
        entries_of(old)
    except Newer:
        raise
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return nothing
    return old


def _replace(path, text):
    """Replaces the file at `path` by one that holds `text`. The mode is the old file's, or else the mode that the umask gives."""
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # not from `tempfile`: only the owner may read its files
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
    """Holds the operating system's lock on the file at `path`. The lock ends with the process, however the process ends."""
    with _saving:  # for the threads of this process: on some file systems the lock below works between processes only
        file = _locked(path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows does not remove an open file; the file may stay
                os.unlink(path)
            os.close(file)


def _locked(path) -> int:
    """Opens and locks the file at `path`. Returns the file descriptor."""
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
        os.close(file)  # the previous holder has removed this file: others now lock a new one


try:
    import fcntl

    def _wait_for(file: int):  # pyright: ignore[reportRedeclaration]
        fcntl.flock(file, fcntl.LOCK_EX)

except ModuleNotFoundError:  # Windows
    import msvcrt

    def _wait_for(file: int):
        while True:
            try:
                return msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
            except OSError:
                time.sleep(0.02)
