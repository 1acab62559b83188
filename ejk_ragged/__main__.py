"""The command line: `python -m ejk_ragged`."""

import argparse
import json
import sys
from collections.abc import Sequence


DESCRIPTION = """\
Ragged decode attention for JAX: what is installed here, and whether it works.

Prints the versions and devices, every installed backend, which backend would run on each platform and why the
others would not, a check of each backend that can run here against a float64 oracle (output, log-sum-exp and
gradients), and the time of one decode step beside jax.nn.dot_product_attention. Takes less than a minute.
"""
EPILOG = """\
The exit status is 0 if all is well, 1 if a check failed or no backend works here, 2 for a wrong argument.

examples:
  python -m ejk_ragged                      the whole report
  python -m ejk_ragged --checks window cap  only these checks
  python -m ejk_ragged --json               the same for a program
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
    arguments = parser.parse_args(argv)
    return arguments.run(parser, arguments)


def report(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """The quick report."""
    from . import _report  # here, so that --help does not wait for JAX

    cases = _report.CHECKS
    if arguments.checks:
        known = {case.name: case for case in cases}
        if unknown := [name for name in arguments.checks if name not in known]:
            parser.error(f"argument --checks: {', '.join(unknown)} not known; choose from {', '.join(known)}")
        cases = [known[name] for name in arguments.checks]

    sections = (
        ("installation", _report.installation, _report.show_installation),
        ("dispatch", lambda: _report.dispatch(_report.realistic()), _report.show_dispatch),
        ("checks", lambda: _report.checks(cases, _report.show_progress), _report.show_checks),
        ("step", lambda: _report.step(_report.realistic()), _report.show_step),
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
