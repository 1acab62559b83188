"""The command line: `python -m ejk_ragged`, and its subcommands."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import jax

from ._formats import QUANTISED
from ._hints import default_file
from ._registry import registry
from ._tools import report as tool
from ._tools import rows, suite, tables
from ._tools import tune as tuner


DESCRIPTION = """\
Ragged decode attention for JAX: what is installed here, and whether it works.

Prints the versions and devices, every installed backend, which backend would run on each platform and why the
others would not, a check of each backend that can run here against a float64 oracle (output, log-sum-exp and
gradients), and the time of one decode step beside jax.nn.dot_product_attention. Takes less than a minute.

`bench` measures speed at length and `tune` searches the fastest hints; `python -m ejk_ragged bench --help` says more.
"""
EPILOG = """\
The exit status is 0 if all is well, 1 if a check failed or no backend works here, 2 for a wrong argument.

examples:
  python -m ejk_ragged                      the whole report
  python -m ejk_ragged --checks window cap  only these checks
  python -m ejk_ragged --json               the same for a program
  python -m ejk_ragged bench --peers        how fast, beside other implementations
"""

BENCH = """\
How fast decode steps are here: realistic rows, each checked against a float64 oracle and then timed.

On a GPU the time is that of the kernels, as JAX's profiler sees them, with the cache rotated so that none of it comes
from the GPU's own caches; on a CPU it is wall time, the least of several runs. Beside it stands the memory's bandwidth,
measured in the same run: "fraction" is the live bytes of K and V, divided by the time and by that bandwidth. For
gradients it is the backward operation's: the live K and V read, and gradients of the whole cache written, beside the
bandwidth of copying. Lengths and data are drawn afresh for every run; the seed is printed.

With --tokens and --cache-dtype rows are measured with several query tokens and with quantised caches as well, whose
bytes count their scales and whose gradient is the query's alone; "beside plain" is their time, beside that of the same
row without.

A peer that is not installed, cannot express a row, fails, or differs from the oracle is named with the reason, not timed.
"""
BENCH_EPILOG = """\
rows:
  shapes   full ragged skew one small many-small mha mqa window cap
  models   llama-3-8b llama-3-70b qwen-2.5-7b mistral-7b gemma-2-9b gpt-oss-120b
  cpu      cpu-full cpu-full-bf16 cpu-skew cpu-short-4096 cpu-short-32768
Without --rows: shapes and models, or on a CPU the rows for it, and how time follows live tokens and the cache's size.
Rows that do not fit into memory are given fewer sequences, or skipped, and it is said.

examples:
  python -m ejk_ragged bench
  python -m ejk_ragged bench --rows shapes --peers --grad --out results
  python -m ejk_ragged bench --rows ragged skew --backends pallas_triton xla --dtype float16
  python -m ejk_ragged bench --rows full ragged --tokens 4 16 --cache-dtype int8
  python -m ejk_ragged bench --rows full one --split only
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ejk_ragged",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON; nothing else goes to standard output")
    parser.add_argument("--checks", nargs="+", metavar="NAME", help="check only these cases")
    parser.set_defaults(run=report)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _bench_arguments(commands)
    _tune_arguments(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(parser, arguments)


def _bench_arguments(commands):
    command = commands.add_parser(
        "bench",
        help="how fast: realistic rows, beside other implementations",
        description=BENCH,
        epilog=BENCH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--rows", nargs="+", metavar="NAME", dest="names", help="rows, or groups of them")
    command.add_argument(
        "--backends", nargs="+", default=[], metavar="NAME", help="backends, the first one in front; default: automatic"
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="instead of each row's own")
    command.add_argument(
        "--tokens",
        nargs="+",
        default=[],
        type=positive,
        metavar="N",
        help="also with N query tokens a sequence: named rows, and some of a group",
    )
    command.add_argument(
        "--cache-dtype",
        nargs="+",
        default=[],
        choices=list(QUANTISED),
        dest="cache_dtypes",
        help="also with quantised caches, alone and with these tokens",
    )
    command.add_argument("--scales", choices=rows.SCALES, default="row", help="of quantised caches: one for each (row)")
    command.add_argument(
        "--grad",
        nargs="?",
        const="also",
        choices=("also", "only"),
        help="gradients too, or only them: of named rows, and of some of a group",
    )
    command.add_argument("--peers", action="store_true", help="other implementations too, those that are installed")
    command.add_argument(
        "--split",
        nargs="?",
        const="also",
        choices=("also", "only"),
        help="steps whose cache is split over all devices too, or only them: of named rows, and of some of a group",
    )
    command.add_argument(
        "--scaling", action=argparse.BooleanOptionalAction, help="how time follows live tokens and the cache's size"
    )
    command.add_argument("--seed", type=int, metavar="N", help="of lengths and data; default: a new one")
    command.add_argument("--runs", type=int, default=15, metavar="N", help="of each call (15)")
    command.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="write DEVICE.json there, and pictures if matplotlib is installed"
    )
    command.add_argument("--name", help="of this run, for DEVICE-NAME.json; so that another does not replace it")
    command.add_argument("--json", action="store_true", help="print the data as JSON instead of tables")
    command.set_defaults(run=bench)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def bench(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """The benchmark. The exit status is 1 if a backend of ours was wrong or failed."""
    try:
        rows.named(arguments.names or [])
        for name in arguments.backends:
            registry.get(name)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if arguments.split and len(jax.devices()) < 2:
        parser.error("argument --split: there is only one device here")
    options = {name: x for name, x in vars(arguments).items() if name not in ("run", "checks", "json", "out")}
    keep = (lambda data: suite.write(data, arguments.out)) if arguments.out else (lambda data: None)
    data = suite.run(**options, keep=keep)
    if arguments.json:
        print(json.dumps(data, indent=1, allow_nan=False))
    else:
        tables.show(data)
    if arguments.out:
        for file in (suite.write(data, arguments.out), *suite.draw(data, arguments.out)):
            print(f"wrote {file}", file=sys.stderr)
    return 1 if suite.failed(data) else 0


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
  python -m ejk_ragged tune                                     the rows of `bench`
  python -m ejk_ragged tune --problem 64,16384,32:8,128,bfloat16
  python -m ejk_ragged tune --problem 16,8192,16:8,256,bfloat16,cap --limit 60
  python -m ejk_ragged tune --problem 64,16384,32:8,128,bfloat16,int8,T4    an int8 cache, four query tokens
  python -m ejk_ragged tune --rows cpu-skew --file hints.json   then: with ejk_ragged.tuned_hints("hints.json"): ...
"""


def _tune_arguments(commands):
    command = commands.add_parser(
        "tune",
        help="search the fastest hints for this device, and remember them",
        description=TUNE,
        epilog=TUNE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="rows of the benchmark, or groups of them")
    command.add_argument("--problem", nargs="+", default=[], metavar=tuner.PROBLEM, help="problems of your own")
    command.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="backends; default: the automatic choice")
    command.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of time, shared among the problems (300)")
    command.add_argument("--file", type=pathlib.Path, metavar="PATH", help="where to save; default: the user's cache folder")
    command.add_argument("--seed", type=int, metavar="N", help="of lengths and data; default: a new one")
    command.add_argument("--runs", type=int, default=15, metavar="N", help="of each call (15)")
    command.add_argument("--json", action="store_true", help="print what was tried as JSON")
    command.set_defaults(run=tune)


def tune(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """The tuner. The exit status is 1 if nothing was saved."""
    try:
        cases = [*rows.named(arguments.rows), *map(tuner.parse, arguments.problem)]
        for name in arguments.backends:
            registry.get(name)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    file = arguments.file or default_file()
    if file is None:
        parser.error("without --file it needs platformdirs, which is not installed: pip install 'ejk-ragged[tune]'")
    cases = cases or suite.default_rows()
    seed = suite.new_seed() if arguments.seed is None else arguments.seed
    with suite.progress(len(cases) * max(len(arguments.backends), 1)) as advance:
        results = tuner.run(cases, arguments.backends, file, arguments.limit, seed, arguments.runs, advance)
    print(json.dumps(results, indent=1) if arguments.json else tuner.text(results, file))
    return 0 if any("best" in result for result in results) else 1


def report(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """The quick report."""
    cases = tool.CHECKS
    if arguments.checks:
        known = {case.name: case for case in cases}
        if unknown := [name for name in arguments.checks if name not in known]:
            parser.error(f"argument --checks: {', '.join(unknown)} not known; choose from {', '.join(known)}")
        cases = [known[name] for name in arguments.checks]

    sections = (
        ("installation", tool.installation, tool.show_installation),
        ("dispatch", lambda: tool.dispatch(tool.realistic()), tool.show_dispatch),
        ("checks", lambda: tool.checks(cases, tool.show_progress), tool.show_checks),
        ("step", lambda: tool.step(tool.realistic()), tool.show_step),
    )
    data = {}
    for name, gather, show in sections:
        data[name] = gather()
        if not arguments.json:
            print(show(data[name]), end="\n\n", flush=True)
    results = [check["ok"] for check in data["checks"]]
    data["ok"] = any(results) and False not in results and "error" not in data["step"]
    if arguments.json:
        print(json.dumps(data, indent=2, allow_nan=False))
    else:
        print(
            f"{results.count(True)} checks passed, {results.count(False)} failed. {'All is well.' if data['ok'] else 'NOT WELL.'}"
        )
    return 0 if data["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
