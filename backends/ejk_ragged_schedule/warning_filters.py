"""Warnings of JAX and NumPy that users of a backend can do nothing about."""

import re
import threading
import warnings


_lock = threading.Lock()


def ignore_warning(message: str, category: type[Warning]):
    """From now on nobody is told of a warning whose text begins with `message`.

    `warnings.catch_warnings` would put back, at its end, the filters that all threads had at its beginning. Nothing is done where
    the warning is ignored already. A filter that was added before may be gone, with somebody's `catch_warnings`, or behind others.
    """
    with _lock:
        if _action(message, category) != "ignore":
            warnings.filterwarnings("ignore", re.escape(message), category)


def _action(message, category) -> str | None:
    """What the first of the filters does that could be for the warning."""
    for action, text, kind, _, _ in warnings.filters:
        if issubclass(category, kind) and (text is None or re.compile(text).match(message)):
            return action
    return None
