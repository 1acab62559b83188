"""The command line: `python -m ejk_ragged`, and its subcommands."""

import sys
from collections.abc import Sequence

from ._tools import interrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with interrupt.says(lambda: "Nothing is kept."):
        from ._tools import commands  # what it imports takes a moment, in which Ctrl-C may come

        return commands.run(argv)


if __name__ == "__main__":
    sys.exit(main())
