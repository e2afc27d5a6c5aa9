"""The command line, which the benchmark and the process that it starts share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

ENVIRONMENTS = ("default", "fast")
PARTS = ("compute", "request", "overload", "swap", "faults")


def parse_options(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``parts`` are all unless some were chosen."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    parser.add_argument("--scratch", default=None, help="directory for the home, on a local disk")
    parser.add_argument("--env", choices=ENVIRONMENTS, default="default", help="see cluster/env")
    parser.add_argument("--quick", action="store_true", help="try that it runs; no real figures")
    parser.add_argument("--overload-s", type=float, default=None, help="length of the overload")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure only these"
    )
    return parser.parse_args(argv)
