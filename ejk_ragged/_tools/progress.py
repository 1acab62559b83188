"""Shows the progress of a long-running command, on standard error."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, lines: bool = True) -> Iterator[Callable[[str], None]]:
    """A context that gives a function. Call the function at the beginning of each of `total` parts, with the name of the part.

    A terminal shows a bar if rich is installed, and otherwise one line that is overwritten. If standard error is not a terminal,
    each part has a line of its own, or no line if `lines` is False.
    """
    numbers = itertools.count(1)
    count = lambda text: f"{next(numbers)} of {total}: {text}"
    if not sys.stderr.isatty():
        yield lambda text: print(count(text), file=sys.stderr, flush=True) if lines else None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda text: print(f"\r\033[K{count(text)}", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = itertools.count()
        yield lambda text: bar.update(task, completed=next(begun), description=count(text))
