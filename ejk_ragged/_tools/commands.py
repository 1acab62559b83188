"""Runs the commands, with the arguments that `options` has parsed."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from ejk_ragged import _hints, explain
from ejk_ragged._registry import registry

from . import cases, hints_file, interrupt, options, suite, tables
from . import report as tool
from . import tune as tuner
from .inputs import types
from .progress import progress


PAGED_SCALES = [scales for scales in cases.SCALES if scales != "sequence"]


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    whole = options.parser(report, bench, tune, explain_shapes)
    arguments = whole.parse_args(argv)
    if arguments.checks is not None and arguments.command is not whole:
        whole.error("argument --checks: only the report takes it, not a command")
    return arguments.run(arguments.command, arguments)


def bench(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Runs the benchmark. The exit status is 1 if a backend of this package was wrong or failed."""
    try:
        cases.named(arguments.names or [])
        for name in arguments.backends:
            registry.get(name)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if arguments.split and len(jax.devices()) < 2:
        parser.error("argument --split: there is only one device here")
    if any(arguments.page_sizes) and arguments.cache_dtypes and arguments.scales == "sequence":
        parser.error(f"argument --scales: a pool of pages has no scales per sequence; choose from {', '.join(PAGED_SCALES)}")
    folder, parts = arguments.out, []
    if folder:
        _make(parser, "--out", folder)
    _say(f"Results are kept in {folder}, after each part." if folder else "Results are printed at the end. --out DIR keeps them.")
    not_asked = ("run", "command", "checks", "json", "out", *(["seed"] if arguments.seed is None else []))
    how = {name: x for name, x in vars(arguments).items() if name not in not_asked}
    keep = (lambda data: parts.append(suite.write(data, folder))) if folder else (lambda data: None)
    lost = "Nothing is kept." if folder else "Nothing is kept, because --out DIR was not given."
    with interrupt.says(lambda: f"What was measured is kept in {parts[-1]} (parts: {len(parts)})." if parts else lost):
        data = suite.run(**how, keep=keep)
    if arguments.json:
        print(json.dumps(data, indent=1, allow_nan=False))
    else:
        tables.show(data)
    if folder:
        for file in (suite.write(data, folder), *suite.draw(data, folder)):
            _say(f"wrote {file}")
    return 1 if suite.failed(data) else 0


def _say(text: str):
    """Prints to standard error, because standard output may be JSON."""
    print(text, file=sys.stderr, flush=True)


def _make(parser, option, folder):
    """Makes the folder for results before the measurement starts, so that an error costs no time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument {option}: {error}")


def tune(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Runs the tuner. The exit status is 1 if nothing was saved."""
    try:
        chosen = [*cases.named(arguments.names), *map(tuner.parse, arguments.problem)]
        for name in arguments.backends:
            registry.get(name)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    file = arguments.file or _hints.default_file()
    if file is None:
        parser.error("without --file it needs platformdirs, which is not installed: pip install 'ejk-ragged[tune]'")
    _make(parser, "--file", file.parent)
    try:
        why = hints_file.cannot_save(file)
    except OSError as error:
        why = str(error)
    if why:
        parser.error(f"nothing could be saved in {file}: {why} Choose another with --file.")
    chosen = chosen or suite.default_cases()
    seed = suite.new_seed() if arguments.seed is None else arguments.seed
    total, kept = len(chosen) * max(len(arguments.backends), 1), []
    said = lambda: f"The best hints of {len(kept)} of {total} problems are saved in {file}." if kept else "Nothing is saved."
    _say(f"The best hints are saved in {file}, after each problem.")
    with interrupt.says(said), progress(total) as advance:
        results = tuner.run(chosen, arguments.backends, file, arguments.limit, seed, arguments.runs, advance, kept.append)
    print(json.dumps(results, indent=1) if arguments.json else tuner.text(results, file))
    return 0 if any(map(tuner.saved, results)) else 1


def explain_shapes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Prints which backend would run on each platform. The exit status is 1 if a call would refuse one of the problems."""
    try:
        registry.resolve(arguments.backend)
        chosen = [case for text in arguments.problems for case in ([tuner.parse(text)] if "," in text else cases.named([text]))]
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    found: list[dict[str, Any]] = []
    for case in chosen:
        try:
            explanation = explain(**types(case), backend=arguments.backend)
        except ValueError as error:
            found.append({"problem": case.name, "error": str(error)})
        else:
            found.append(tool.dispatch(explanation))
            if not arguments.json:
                print(explanation)
    if arguments.json:
        print(json.dumps(found, indent=1))
    for one in found:
        if "error" in one:
            _say(f"{one['problem']}: {one['error']}")
    return 1 if any("error" in one for one in found) else 0


def report(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Prints the report. The exit status is 1 if a check or the timed step failed."""
    chosen = tool.CHECKS
    if arguments.checks:
        known = {case.name: case for case in chosen}
        if unknown := [name for name in arguments.checks if name not in known]:
            parser.error(f"argument --checks: {', '.join(unknown)} not known; choose from {', '.join(known)}")
        chosen = [known[name] for name in arguments.checks]

    sections = (
        ("installation", tool.installation, tool.show_installation),
        ("dispatch", lambda: tool.dispatch(explain(**types(tool.realistic()))), tool.show_dispatch),
        ("checks", lambda: tool.checks(chosen), tool.show_checks),
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
