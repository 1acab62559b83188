"""`fingerprint`: a text for a value that is the same in every process. The text identifies compiled programs in a cache on disk."""

import dataclasses
import enum
import hashlib
import pathlib
import sys
import uuid
import weakref
from typing import Any


def fingerprint(x: Any) -> str:
    """A text for `x`. Equal texts mean equal values. A value without a text of its own, such as a function, gets a new one each
    time."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    match x:
        case type():
            return f"class {_class(x)}"
        case enum.Enum():
            return f"{kind}.{x.name}"
        case dict():
            texts = sorted(f"{fingerprint(key)}: {fingerprint(value)}" for key, value in x.items())
        case set() | frozenset():
            texts = sorted(map(fingerprint, x))
        case tuple() | list():
            texts = map(fingerprint, x)
        case _ if dataclasses.is_dataclass(x):
            kind = f"class {_class(type(x))}"
            texts = [fingerprint({field.name: getattr(x, field.name) for field in dataclasses.fields(x) if field.compare})]
        case _:
            text = repr(x)  # an address in memory says nothing about the value
            texts = [uuid.uuid4().hex if " at 0x" in text else text]
    return f"{kind}({', '.join(texts)})"


_tokens: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()  # for classes that cannot be imported by name


def _class(x: type) -> str:
    """The name of a class and a hash of its module's source. A class that cannot be imported by its name gets a text that differs
    between processes."""
    module: Any = sys.modules.get(x.__module__)
    found = module
    for part in x.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not x or x.__module__ == "__main__":
        return _tokens.setdefault(x, uuid.uuid4().hex)
    try:
        source = hashlib.sha256(pathlib.Path(module.__file__).read_bytes()).hexdigest()
    except (AttributeError, TypeError, OSError):  # a built-in module, or a module without a file
        source = ""
    return f"{x.__module__}.{x.__qualname__} {source}"
