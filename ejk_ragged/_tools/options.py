"""What the commands take: their help, and their arguments."""

import argparse
import pathlib
import sys
import textwrap
from collections.abc import Callable

from ejk_ragged import __version__
from ejk_ragged._formats import QUANTISED
from ejk_ragged.testing import CHECKS

from . import cases
from .tune import PROBLEM


DESCRIPTION = """\
Ragged decode attention for JAX: what is installed here, and whether it works.

Prints the versions and devices, every installed backend, which backend would run on each platform and why the
others would not, a check of each backend that can run here against a float64 oracle (output, log-sum-exp and
gradients), and the time of one decode step beside jax.nn.dot_product_attention. The report takes about a minute.

`bench` measures speed at length, `tune` searches the fastest hints, and `explain` says what would run for shapes of your own.
`python -m ejk_ragged bench --help` says more.
"""
EPILOG = f"""\
The exit status is 0 if all is well, 1 if a check failed or no backend works here, 2 for a wrong argument, 130 after Ctrl-C.

checks:
{textwrap.fill(" ".join(case.name for case in CHECKS), 118, initial_indent="  ", subsequent_indent="  ")}

examples:
  python -m ejk_ragged                      the whole report
  python -m ejk_ragged --checks window cap  only these checks
  python -m ejk_ragged --json               the same for a program
  python -m ejk_ragged bench --peers        how fast, beside other implementations
  python -m ejk_ragged explain 64,16384,32:8,128,bfloat16
"""

BENCH_HELP = "how fast: realistic cases, beside other implementations"
BENCH = """\
How fast decode steps are here: realistic cases, each checked against a float64 oracle and then timed.

On a GPU the time is that of the kernels, as JAX's profiler sees them, with the cache rotated so that none of it comes
from the GPU's own caches; on a CPU it is wall time, the least of several runs. The output also has the memory's bandwidth,
measured in the same run: "fraction" is the live bytes of K and V, divided by the time and by that bandwidth. For
gradients it is the backward operation's: the live K and V read, and gradients of the whole cache written, beside the
bandwidth of copying. Lengths and data are drawn afresh for every run; the seed is printed.

With --tokens and --cache-dtype cases are measured with several query tokens and with quantised caches as well, whose
bytes count their scales and whose gradient is the query's alone. "Beside plain" is their time, divided by that of the same
case without.

With --page-size all of this is measured with the cache in pages as well, which are in random order. The bytes are those of
the padded cache and the entries of the page table, and the gradient is the query's alone. "Padded" is the fraction of the
same call on a padded cache, and "beside padded" is the time, divided by that call's.

A peer that is not installed, cannot express a case, fails, or differs from the oracle is named with the reason, not timed.
"""
LISTED = "\n".join(
    textwrap.fill(" ".join(case.name for case in some), 110, initial_indent=f"  {group:9}", subsequent_indent=" " * 11)
    for group, some in cases.GROUPS.items()
)
BENCH_EPILOG = f"""\
cases, by group:
{LISTED}
Without --cases: shapes and models, or on a CPU the cases for it, and how time follows live tokens and the cache's size.
Cases that do not fit into memory are given fewer sequences, or skipped, and it is said.

examples:
  python -m ejk_ragged bench
  python -m ejk_ragged bench --cases shapes --peers --grad --out results
  python -m ejk_ragged bench --cases ragged skew --backends pallas_triton xla --dtype float16
  python -m ejk_ragged bench --cases full ragged --tokens 4 16 --cache-dtype int8
  python -m ejk_ragged bench --cases full mla --page-size 64 16 --peers
  python -m ejk_ragged bench --cases full one --split only
"""

TUNE_HELP = "search the fastest hints for this device, and remember them"
TUNE = """\
Searches the tuning hints that a backend declares, for problems as they are met here, and remembers the best.

Every candidate is compiled, compared with a float64 oracle and timed as `bench` does it; those that are wrong or do not
compile are left out. The best is saved by backend and its version, device, and class of problem (dtypes of query and
cache, heads, head dimension, soft cap or none, and batch, query tokens and cache length up to the next power of two).
Calls that give no hints of their own pick it up by themselves, and `ejk_ragged.explain` says so. Nothing is ever tuned
inside a call.
"""
TUNE_EPILOG = """\
examples:
  python -m ejk_ragged tune                                     the cases of `bench`
  python -m ejk_ragged tune --problem 64,16384,32:8,128,bfloat16
  python -m ejk_ragged tune --problem 16,8192,16:8,256,bfloat16,cap --limit 60
  python -m ejk_ragged tune --problem 64,16384,32:8,128,bfloat16,int8,T4    an int8 cache, four query tokens
  python -m ejk_ragged tune --cases cpu-skew --file hints.json  then: with ejk_ragged.tuned_hints("hints.json"): ...
"""

EXPLAIN_HELP = "which backend would run for these shapes on each platform, and why not the others"
EXPLAIN = f"""\
Which backend would run on each platform, and why not the others, for problems given by their shapes.

Nothing of the problem's size is made, and no GPU is needed: a problem is written {PROBLEM},
that is batch, rows of the cache, query heads and kv heads, head dimension, dtype; then, where they apply, the dtype of a
quantised cache, the number of query tokens, and that there is a soft cap. The name of a case of `bench` is a problem too.
"""
EXPLAIN_EPILOG = """\
examples:
  python -m ejk_ragged explain 64,16384,32:8,128,bfloat16
  python -m ejk_ragged explain 64,16384,32:8,128,bfloat16,int8,T4 gpt-oss-120b
  python -m ejk_ragged explain 8,4096,32:8,128,float32 --backend xla --json
"""


def parser(report: Callable, bench: Callable, tune: Callable, explain: Callable) -> argparse.ArgumentParser:
    """The command line. What runs a command is in `run` of the parsed arguments, and the command's own parser in `command`."""
    whole = argparse.ArgumentParser(
        prog="python -m ejk_ragged",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"ejk-ragged {__version__}")
    whole.add_argument("--json", action="store_true", help="print JSON; nothing else goes to standard output")
    whole.add_argument("--checks", nargs="+", metavar="NAME", help="check only these cases, of those below")
    whole.set_defaults(run=report, command=whole)
    commands = whole.add_subparsers(title="commands", metavar="COMMAND")
    for name, run, arguments, texts in (
        ("bench", bench, _bench_arguments, (BENCH_HELP, BENCH, BENCH_EPILOG)),
        ("tune", tune, _tune_arguments, (TUNE_HELP, TUNE, TUNE_EPILOG)),
        ("explain", explain, _explain_arguments, (EXPLAIN_HELP, EXPLAIN, EXPLAIN_EPILOG)),
    ):
        texts = dict(zip(("help", "description", "epilog"), texts, strict=True))
        command = commands.add_parser(name, **texts, formatter_class=argparse.RawDescriptionHelpFormatter)
        arguments(command)
        # Without a default, which would undo a --json that is given before the command's name.
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text")
        command.set_defaults(run=run, command=command)
    return whole


def positive(text: str) -> int:
    return _number(int, text, 1, "a whole number of at least 1")


def natural(text: str) -> int:
    return _number(int, text, 0, "a whole number of at least 0")


def seconds(text: str) -> float:
    return _number(float, text, sys.float_info.min, "a number of seconds above 0")


def _number(kind, text, least, what):
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not number >= least:  # NaN is not
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return number


def _named_cases(command, text, default):
    """`--cases`, and `--rows` as the option was called before."""
    command.add_argument("--cases", nargs="+", metavar="NAME", dest="names", default=default, help=text)
    command.add_argument("--rows", nargs="+", dest="names", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _bench_arguments(command):
    _named_cases(command, "cases, or groups of them", default=None)
    command.add_argument(
        "--backends", nargs="+", default=[], metavar="NAME", help="backends, the first one in front; default: automatic"
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="instead of each case's own")
    command.add_argument(
        "--tokens",
        nargs="+",
        default=[],
        type=positive,
        metavar="N",
        help="also with N query tokens a sequence: named cases, and some of a group",
    )
    command.add_argument(
        "--cache-dtype",
        nargs="+",
        default=[],
        choices=list(QUANTISED),
        dest="cache_dtypes",
        help="also with quantised caches, alone and with these tokens",
    )
    command.add_argument(
        "--page-size",
        nargs="+",
        default=[],
        type=natural,
        metavar="N",
        dest="page_sizes",
        help="also with the cache in pages of N rows, beside the padded cache; 0 is the padded cache alone",
    )
    command.add_argument("--scales", choices=cases.SCALES, default="row", help="of quantised caches: one for each (row)")
    command.add_argument(
        "--grad",
        nargs="?",
        const="also",
        choices=("also", "only"),
        help="gradients too, or only them: of named cases, and of some of a group",
    )
    command.add_argument("--peers", action="store_true", help="other implementations too, those that are installed")
    command.add_argument(
        "--split",
        nargs="?",
        const="also",
        choices=("also", "only"),
        help="steps whose cache is split over all devices too, or only them: of named cases, and of some of a group",
    )
    command.add_argument(
        "--scaling", action=argparse.BooleanOptionalAction, help="how time follows live tokens and the cache's size"
    )
    command.add_argument("--seed", type=natural, metavar="N", help="of lengths and data; default: a new one")
    command.add_argument("--runs", type=positive, default=15, metavar="N", help="of each call (15)")
    command.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="write DEVICE.json there, and pictures if matplotlib is installed"
    )
    command.add_argument("--name", help="of this run, for DEVICE-NAME.json; so that another does not replace it")


def _tune_arguments(command):
    _named_cases(command, "cases of the benchmark, or groups of them", default=[])
    command.add_argument("--problem", nargs="+", default=[], metavar=PROBLEM, help="problems of your own")
    command.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="backends; default: the automatic choice")
    command.add_argument("--limit", type=seconds, default=300, metavar="SECONDS", help="of time, shared among the problems (300)")
    command.add_argument("--file", type=pathlib.Path, metavar="PATH", help="where to save; default: the user's cache folder")
    command.add_argument("--seed", type=natural, metavar="N", help="of lengths and data; default: a new one")
    command.add_argument("--runs", type=positive, default=15, metavar="N", help="of each call (15)")


def _explain_arguments(command):
    command.add_argument("problems", nargs="+", metavar="PROBLEM", help=f"{PROBLEM}, or the name of a case of `bench`")
    command.add_argument("--backend", metavar="NAME", help="as `backend=` in a call; default: the automatic choice")
