"""Every ratio in one run: `uv run bench` (`grasp_cube.bench` finds this file in the clone).

    uv run bench [--quick] [--only wire,link] [--json FOLDER]

The full form takes about ten minutes and writes `benchmarks/results/<part>.json` and `benchmarks/results/plots.png`, one page
of curves. `--quick` takes about a minute and writes nothing.

Both print the table of ratios and end with an error when one is above its bound (`bounds.json`) by more than the noise that
this run measured. A ratio that seems to be is measured again, up to `TRIES` times, and the best counts: what else the machine
does makes figures worse and never better. A part that fails says so, and is an error as well; the others go on.
"""

import importlib
import json
import time
import traceback
from argparse import Namespace
from pathlib import Path

from ratios import BOUNDS, Part, Ratio, show, table, worse
from tqdm import tqdm

__all__ = ["PARTS", "main"]

# In the order in which they run: (module, whether the quick form has it).
PARTS = {
    "wire": True,
    "server_cost": True,
    "forward": True,
    "link": False,
    "start": False,
    "recording": False,
    "growth": False,
}
TRIES = 3
RESULTS = Path(__file__).parent / "results"


def main(options: Namespace) -> int:
    """The exit code."""
    bounds: dict[str, float] = json.loads(BOUNDS.read_text())
    wanted = (
        options.only.split(",")
        if options.only
        else [name for name, quick in PARTS.items() if quick or not options.quick]
    )
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        print(f"bench: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
        return 2
    parts, failed, began = [], [], time.monotonic()
    progress = tqdm(wanted, unit="part")
    for name in progress:
        progress.set_description(name)
        try:
            part = measured(name, options.quick, bounds)
        except Exception:
            progress.write(traceback.format_exc())
            failed.append(f"{name} could not be measured, its error is above")
            continue
        parts.append(part)
        if not options.quick:
            write(part, options.json or RESULTS)
    progress.close()
    for part in parts:
        show(part, bounds)
    ratios = [ratio for part in parts for ratio in part.ratios]
    print(
        f"\nAll of it, in {time.monotonic() - began:.0f} s; below 1 ours is better\n{table(ratios, bounds)}"
    )
    if not options.quick:
        from page import draw

        page = (options.json or RESULTS) / "plots.png"
        draw(parts, bounds, page)
        print(f"\nFigures in {page.parent}, plots in {page}")
    problems = failed + worse(ratios, bounds)
    for problem in problems:
        print(f"✗ {problem}")
    if not problems:
        print(f"✓ {sum(ratio.name in bounds for ratio in ratios)} ratios are within their bounds")
    return 1 if problems else 0


def measured(name: str, quick: bool, bounds: dict[str, float]) -> Part:
    """A part, measured again while one of its ratios is above its bound."""
    run = importlib.import_module(name).run
    part: Part = run(quick)
    for _ in range(TRIES - 1):
        if not worse(part.ratios, bounds):
            break
        part = better(part, run(quick))
    return part


def better(first: Part, second: Part) -> Part:
    """The second, with each ratio of the first that is lower."""
    before = {ratio.name: ratio for ratio in first.ratios}

    def best(ratio: Ratio) -> Ratio:
        return min(ratio, before.get(ratio.name, ratio), key=lambda each: each.ratio)

    second.ratios = [best(ratio) for ratio in second.ratios]
    return second


def write(part: Part, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part.name}.json").write_text(json.dumps(part.plain(), indent=1) + "\n")
