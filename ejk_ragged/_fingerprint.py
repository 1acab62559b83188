"""A text for a value, the same in every process, so that programs that are kept on disk can be told apart by it."""

import dataclasses
import enum
import hashlib
import pathlib
import sys
import uuid
import weakref
from typing import Any


def fingerprint(x: Any) -> str:
    """Equal texts mean equal values. A value that has no text of its own, such as a function, gets another one each time."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    match x:
        case type():
            return f"class {_class(x)}"
        case enum.Enum():
            return f"{kind}.{x.name}"
        case dict():
            return _listed(kind, sorted(f"{fingerprint(key)}: {fingerprint(value)}" for key, value in x.items()))
        case set() | frozenset():
            return _listed(kind, sorted(map(fingerprint, x)))
        case tuple() | list():
            return _listed(kind, map(fingerprint, x))
    if dataclasses.is_dataclass(x):
        values = {field.name: getattr(x, field.name) for field in dataclasses.fields(x) if field.compare}
        return _listed(f"class {_class(type(x))}", [fingerprint(values)])
    text = repr(x)
    if " at 0x" in text:  # a place in memory, which says nothing of the value
        text = uuid.uuid4().hex
    return _listed(kind, [text])


def _listed(kind, texts) -> str:
    return f"{kind}({', '.join(texts)})"


_tokens: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()  # of classes that no other process can name


def _class(x: type) -> str:
    """A class by its name and its module's source. A class that nobody can import from its module by that name is another one in
    each process."""
    module = sys.modules.get(x.__module__)
    found: Any = module
    for part in x.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not x or x.__module__ == "__main__":
        return _tokens.setdefault(x, uuid.uuid4().hex)
    return f"{x.__module__}.{x.__qualname__} {_source(module)}"


def _source(module) -> str:
    try:
        return hashlib.sha256(pathlib.Path(module.__file__).read_bytes()).hexdigest()
    except (AttributeError, TypeError, OSError):  # built in, or from somewhere without files
        return ""
