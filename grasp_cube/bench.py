"""`bench`: the benchmarks of a clone, with the table of ratios. The benchmarks are no part of the installed package.

Error policy: exit code 1 when a ratio is worse than its bound by more than this run's noise, or a part failed; 2 when the
command line or the folder is wrong.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measures everything as a ratio to a peer in the same run; takes about ten minutes on two cores. Writes "
        "benchmarks/results/*.json and plots.png, and prints the table of ratios.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="about a minute: the ratios that CI watches; writes nothing"
    )
    parser.add_argument(
        "--only", metavar="PART,PART", help="wire, server_cost, link, forward, start, recording, growth"
    )
    parser.add_argument(
        "--json", metavar="FOLDER", type=Path, help="where the figures go, in place of benchmarks/results"
    )
    options = parser.parse_args(argv)
    if not (FOLDER / "suite.py").is_file():
        print(f"bench: there is no {FOLDER}: run it from a clone of the repository", file=sys.stderr)
        raise SystemExit(2)
    # As under serve_policy; the peers must not be slower for it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, str(FOLDER))
    raise SystemExit(importlib.import_module("suite").main(options))


if __name__ == "__main__":
    main()
