"""Ctrl-C in a long-running command: one line that says what is kept, and the exit status that shells expect."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


STATUS = 130  # as shells have it: 128 and the number of the signal


@contextlib.contextmanager
def says(kept: Callable[[], str]) -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once, with a line in which `kept` says what is kept, and where.

    No KeyboardInterrupt is raised. Compiled code that calls Python back may take one for an error of that Python code. And an
    interpreter that ends in the usual way waits for the threads that compile, or aborts because of them. So nothing may have to be
    tidied up after the end: files are replaced as a whole.
    """

    def end(number, frame):
        with contextlib.suppress(Exception):  # what is interrupted may be writing there
            sys.stdout.flush()
        terminal = "\r\033[K\033[?25h" if sys.stderr.isatty() else ""  # over a bar, which hides the cursor
        os.write(2, f"{terminal}Interrupted. {kept()}\n".encode())  # `sys.stderr` may be busy
        os._exit(STATUS)

    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield  # whoever started the process wants no Ctrl-C here, or handles it
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
