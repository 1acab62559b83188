"""Hides warnings of JAX and NumPy about which users of a backend can do nothing."""

import re
import threading
import warnings


_lock = threading.Lock()


def ignore_warning(message: str, category: type[Warning]):
    """Hides warnings whose text begins with `message`, from now on.

    `warnings.catch_warnings` is no alternative: at its end it restores the filters of all threads. A filter that was added before
    may have been removed by a `catch_warnings` elsewhere, or may have other filters in front. So each call checks the filters, and
    adds a filter only if the warning is not ignored.
    """
    with _lock:
        if _action(message, category) != "ignore":
            warnings.filterwarnings("ignore", re.escape(message), category)


def _action(message, category) -> str | None:
    """The action of the first filter that matches the warning, or None."""
    for action, text, kind, _, _ in warnings.filters:
        if issubclass(category, kind) and (text is None or re.compile(text).match(message)):
            return action
    return None
