"""Ctrl-C in a long-running command: one line that says what is kept, and the exit status that shells expect."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


STATUS = 130  # the convention of shells: 128 plus the number of the signal


@contextlib.contextmanager
def says(kept: Callable[[], str]) -> Iterator[None]:
    """A context in which Ctrl-C ends the process at once. A last line says what is kept and where: the text that `kept` returns.

    No KeyboardInterrupt is raised, for two reasons. Compiled code that calls back into Python may treat a KeyboardInterrupt as an
    error of that Python code. And an interpreter that ends in the usual way waits for the threads that compile, or is aborted by
    them. So no code can clean up at the end. None is needed, because files are replaced as a whole.
    """

    def end(number, frame):
        with contextlib.suppress(Exception):  # the interrupted code may be writing to it
            sys.stdout.flush()
        terminal = "\r\033[K\033[?25h" if sys.stderr.isatty() else ""  # ends a progress bar: clears it, shows the cursor
        os.write(2, f"{terminal}Interrupted. {kept()}\n".encode())  # `sys.stderr` may be busy
        os._exit(STATUS)

    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C is ignored or handled outside Python, or this is another thread
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
