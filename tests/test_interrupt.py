"""Ctrl-C in a command: one line says what is kept and where, the status is 130, and there is no traceback."""

import signal
import subprocess
import sys

import pytest


pytestmark = pytest.mark.skipif(
    sys.platform == "win32",
    reason="on Windows all processes of a console get Ctrl-C, so the test would interrupt pytest too",
)

# If the tests run in the background, SIGINT is ignored, and processes inherit this.
HEARD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
# A part that has begun waits for the signal, so that the test need not be quick.
BEFORE = """
import itertools, sys, time
from ejk_ragged import __main__
from ejk_ragged._tools import bench, cases, report, tune
from ejk_ragged._tools.machine import Machine
from ejk_ragged.testing import Case

tiny = Case("tiny", 3, 48, 4, 2, 64, lengths=("uniform", 3, 40))
cases.GROUPS["cpu"] = (tiny,)
Machine.here = classmethod(lambda cls, copying=False: cls("cpu", "a test", 1 << 30, 1e9, 2e9))

def waits_after(count, function):
    calls = itertools.count()
    return lambda *args, **options: function(*args, **options) if next(calls) < count else time.sleep(600)
"""
RUN = "\nsys.exit(__main__.main(sys.argv[1:]))"
IMPORTING = """
import sys, time
import ejk_ragged

class Slow:
    def find_spec(self, name, path, target=None):
        if name == "ejk_ragged._tools.commands":
            print("importing", file=sys.stderr, flush=True)
            time.sleep(600)

sys.meta_path.insert(0, Slow())
from ejk_ragged import __main__
"""


def interrupted(script, *arguments, until, on="stderr"):
    """Both output streams and the status of a command that gets Ctrl-C after a line that begins with `until`."""
    command = [sys.executable, "-c", HEARD + script + RUN, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in getattr(process, on):
                lines.append(line)
                if line.startswith(until):
                    break
            else:
                raise AssertionError(f"no line begins with {until!r}: {''.join(lines)} {process.communicate()}")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return out, err


def test_bench_with_a_folder(tmp_path):
    script = BEFORE + "bench.measure = waits_after(1, bench.measure)"
    arguments = ["bench", "--cases", "tiny", "--tokens", "2", "--runs", "1", "--out", str(tmp_path)]
    out, err = interrupted(script, *arguments, until="2 of 2: ")
    assert out == ""
    assert err == f"Interrupted. What was measured is kept in {tmp_path / 'a-test.json'} (parts: 1).\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a-test.json"]


def test_bench_without_a_folder():
    script = BEFORE + "bench.measure = waits_after(0, None)"
    assert interrupted(script, "bench", "--cases", "tiny", until="1 of 1: ") == (
        "",
        "Interrupted. Nothing is kept, because --out DIR was not given.\n",
    )


@pytest.mark.parametrize("saved", [0, 1])
def test_tune(saved, tmp_path):
    file = tmp_path / "hints.json"
    script = BEFORE + f"tune.tune = waits_after({saved}, tune.tune)"
    problems = ["1,1024,2:2,16,float32", "1,2048,2:2,16,float32"]
    out, err = interrupted(script, "tune", "--problem", *problems, "--file", str(file), "--runs", "1", until=f"{saved + 1} of 2: ")
    assert out == ""
    kept = f"The best hints of 1 of 2 problems are saved in {file}." if saved else "Nothing is saved."
    assert err == f"Interrupted. {kept}\n"
    assert file.exists() == bool(saved)


def test_report():
    script = BEFORE + "report.checks = waits_after(0, None)"
    _, err = interrupted(script, until="Versions", on="stdout")
    assert err == "Interrupted. Nothing is kept.\n"


def test_while_it_begins():
    """The handler is installed before the commands' modules are imported."""
    assert interrupted(IMPORTING, "bench", until="importing") == ("", "Interrupted. Nothing is kept.\n")
