"""The command line: the help and the arguments of each command."""

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

Prints a report, which takes about a minute:
  - the versions and the devices;
  - the installed backends, which of them would run on each platform, and why the others would not;
  - a check of each backend that can run here against a float64 oracle: output, log-sum-exp and gradients;
  - the time of one decode step, and that of jax.nn.dot_product_attention.

`bench` measures speed in detail, `tune` searches for the fastest hints, and `explain` says what would run for given shapes.
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
  python -m ejk_ragged bench --peers        times, next to other implementations
  python -m ejk_ragged explain 64,16384,32:8,128,bfloat16
"""

BENCH_HELP = "time realistic cases, next to other implementations"
BENCH = """\
Measures decode steps on this machine. Each realistic case is checked against a float64 oracle and then timed.

On a GPU, the time is that of the kernels, as JAX's profiler sees them. Runs take turns on several copies of the cache, so
that no run finds its cache in the GPU's own caches. On a CPU, the time is wall time, the least of several runs. The memory's
bandwidth is measured in the same run. "Fraction" is the live bytes of K and V, divided by the time and by the bandwidth. For
gradients, "fraction" is that of the backward operation: it reads the live K and V, writes gradients of the whole cache, and
is compared with the bandwidth of copying. Lengths and data are drawn anew for every run. The seed is printed.

--tokens and --cache-dtype add variants with several query tokens and with quantised caches. The bytes of a quantised cache
include its scales. Only the query has a gradient then. "Beside plain" is the time of a variant, divided by the time of the
same case with one token and a cache of the query's dtype.

--page-size adds the same with the cache in pages, in random order. The bytes are those of the padded cache and of the
entries of the page table. Only the query has a gradient then. "Padded" is the fraction of the same call on a padded cache.
"Beside padded" is the time, divided by the time of the same call on a padded cache.

A peer is not timed if it is not installed, cannot express a case, fails, or differs from the oracle. The output has the reason.
"""
LISTED = "\n".join(
    textwrap.fill(" ".join(case.name for case in some), 110, initial_indent=f"  {group:9}", subsequent_indent=" " * 11)
    for group, some in cases.GROUPS.items()
)
BENCH_EPILOG = f"""\
cases, by group:
{LISTED}
Without --cases: the groups shapes and models, or the group cpu on a CPU. Also how time follows live tokens and cache size.
A case that does not fit into memory gets fewer sequences or is skipped. The output says so.

examples:
  python -m ejk_ragged bench
  python -m ejk_ragged bench --cases shapes --peers --grad --out results
  python -m ejk_ragged bench --cases ragged skew --backends pallas_triton xla --dtype float16
  python -m ejk_ragged bench --cases full ragged --tokens 4 16 --cache-dtype int8
  python -m ejk_ragged bench --cases full mla --page-size 64 16 --peers
  python -m ejk_ragged bench --cases full one --split only
"""

TUNE_HELP = "search for the fastest hints on this device, and save them"
TUNE = """\
Tries the tuning hints that a backend suggests for a problem, and saves the best hints.

Each candidate is compiled, compared with a float64 oracle, and timed as `bench` does. A candidate that is wrong or does not
compile is left out. The best hints are saved per version of a backend, device, and class of problems. A class has the dtypes
of query and cache, the heads, the head dimension, soft cap or none, and batch, query tokens and cache length up to the next
power of two. Calls without hints of their own use saved hints, and `ejk_ragged.explain` says so. No call ever tunes.
"""
TUNE_EPILOG = """\
examples:
  python -m ejk_ragged tune                                     the cases of `bench`
  python -m ejk_ragged tune --problem 64,16384,32:8,128,bfloat16
  python -m ejk_ragged tune --problem 16,8192,16:8,256,bfloat16,cap --limit 60
  python -m ejk_ragged tune --problem 64,16384,32:8,128,bfloat16,int8,T4    an int8 cache, four query tokens
  python -m ejk_ragged tune --cases cpu-skew --file hints.json  then: with ejk_ragged.tuned_hints("hints.json"): ...
"""

EXPLAIN_HELP = "say which backend would run for given shapes on each platform, and why the others would not"
EXPLAIN = f"""\
Says which backend would run on each platform for problems of given shapes, and why the other backends would not.

No large array is made, and no GPU is needed. A problem is written {PROBLEM}:
batch, rows of the cache, query heads and kv heads, head dimension, dtype. Three parts are optional: the dtype of a quantised
cache, the number of query tokens, and the word cap for a soft cap. The name of a case of `bench` is a problem too.
"""
EXPLAIN_EPILOG = """\
examples:
  python -m ejk_ragged explain 64,16384,32:8,128,bfloat16
  python -m ejk_ragged explain 64,16384,32:8,128,bfloat16,int8,T4 gpt-oss-120b
  python -m ejk_ragged explain 8,4096,32:8,128,float32 --backend xla --json
"""


def parser(report: Callable, bench: Callable, tune: Callable, explain: Callable) -> argparse.ArgumentParser:
    """The parser. Parsed arguments have the function that runs the command in `run`, and the command's own parser in `command`."""
    whole = argparse.ArgumentParser(
        prog="python -m ejk_ragged",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"ejk-ragged {__version__}")
    whole.add_argument("--json", action="store_true", help="print JSON to standard output, and nothing else")
    whole.add_argument("--checks", nargs="+", metavar="NAME", help="check only these cases of the list below")
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
        # No default here: it would undo a --json that stands before the command's name.
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
    if number is None or not number >= least:  # true for NaN too
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return number


def _named_cases(command, text, default):
    """The option `--cases`. Its former name, `--rows`, still works."""
    command.add_argument("--cases", nargs="+", metavar="NAME", dest="names", default=default, help=text)
    command.add_argument("--rows", nargs="+", dest="names", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _bench_arguments(command):
    _named_cases(command, "cases or groups to measure", default=None)
    command.add_argument(
        "--backends",
        nargs="+",
        default=[],
        metavar="NAME",
        help="backends to measure, the first as reference; default: the automatic choice",
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype for all cases; default: each case has its own"
    )
    command.add_argument(
        "--tokens",
        nargs="+",
        default=[],
        type=positive,
        metavar="N",
        help="also measure N query tokens per sequence: all named cases, but only some cases of a group",
    )
    command.add_argument(
        "--cache-dtype",
        nargs="+",
        default=[],
        choices=list(QUANTISED),
        dest="cache_dtypes",
        help="also measure quantised caches, with one token and with --tokens",
    )
    command.add_argument(
        "--page-size",
        nargs="+",
        default=[],
        type=natural,
        metavar="N",
        dest="page_sizes",
        help="also measure caches in pages of N rows, next to padded caches; 0 means padded caches only",
    )
    command.add_argument(
        "--scales",
        choices=cases.SCALES,
        default="row",
        help="quantised caches have one scale per row, per sequence and head, per head, or one number (row)",
    )
    command.add_argument(
        "--grad",
        nargs="?",
        const="also",
        choices=("also", "only"),
        help="also measure gradients, or only gradients: all named cases, but only some cases of a group",
    )
    command.add_argument("--peers", action="store_true", help="also measure the other implementations that are installed")
    command.add_argument(
        "--split",
        nargs="?",
        const="also",
        choices=("also", "only"),
        help="also (or only) measure caches split over all devices: all named cases, but only some cases of a group",
    )
    command.add_argument(
        "--scaling", action=argparse.BooleanOptionalAction, help="measure how time follows live tokens and the cache's size"
    )
    command.add_argument("--seed", type=natural, metavar="N", help="seed of lengths and data; default: a random one")
    command.add_argument("--runs", type=positive, default=15, metavar="N", help="number of runs of each call (15)")
    command.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="folder for DEVICE.json, and for pictures if matplotlib is installed"
    )
    command.add_argument("--name", help="name of this run: its file is DEVICE-NAME.json, so that other runs do not replace it")


def _tune_arguments(command):
    _named_cases(command, "cases or groups of the benchmark to tune for", default=[])
    command.add_argument("--problem", nargs="+", default=[], metavar=PROBLEM, help="problems to tune for")
    command.add_argument(
        "--backends", nargs="+", default=[], metavar="NAME", help="backends to tune; default: the automatic choice"
    )
    command.add_argument(
        "--limit", type=seconds, default=300, metavar="SECONDS", help="time limit for all problems together, in seconds (300)"
    )
    command.add_argument(
        "--file", type=pathlib.Path, metavar="PATH", help="file for the hints; default: a file in the user's cache folder"
    )
    command.add_argument("--seed", type=natural, metavar="N", help="seed of lengths and data; default: a random one")
    command.add_argument("--runs", type=positive, default=15, metavar="N", help="number of runs of each call (15)")


def _explain_arguments(command):
    command.add_argument("problems", nargs="+", metavar="PROBLEM", help=f"{PROBLEM}, or the name of a case of `bench`")
    command.add_argument("--backend", metavar="NAME", help="the backend= of the call; default: the automatic choice")
