"""From the command to "ready" with the shipped ACT, in turn with a plain script that uses LeRobot's factories.

    uv run python benchmarks/start.py [--quick] [--json FILE]

Both are new processes that import, load, warm up with one inference and listen. The full form also shows where our time
goes: the modules whose import costs the most, each with what it imports.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable

from ratios import Part, Ratio, main
from tqdm import tqdm
from wire import HERE, start, start_ours

CHECKPOINT = HERE.parent / "checkpoints" / "lift_act"
# What the server imports for such a checkpoint.
IMPORTS = "import grasp_cube.serve_policy, grasp_cube.policies.lerobot_policy, grasp_cube.serving.server"
SHOWN = 12


def run(quick: bool) -> Part:
    mine, theirs = [], []
    for number in tqdm(range(1 if quick else 5), desc="start", leave=False):
        turns = ((ours, mine), (plain, theirs))
        for call, times in turns[:: 1 if number % 2 == 0 else -1]:
            times.append(call())
    what = "from the command to ready, the shipped ACT on the CPU"
    part = Part("start", [Ratio("start.lift_act", what, "s", mine, theirs)])
    if not quick:
        part.tables["milliseconds that our imports take, each with what it imports"] = profile()
    return part


def ours() -> float:
    return seconds(lambda: start_ours(CHECKPOINT))


def plain() -> float:
    return seconds(lambda: start(str(HERE / "plain_lerobot.py"), "--checkpoint", str(CHECKPOINT)))


def seconds(begin: Callable[[], tuple[subprocess.Popen[str], int]]) -> float:
    started = time.perf_counter()
    process, _ = begin()
    took = time.perf_counter() - started
    process.kill()
    process.wait()
    return took


def profile() -> dict[str, float]:
    """Milliseconds of the modules that cost the most, of each package the first."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    total: dict[str, float] = {}
    for own, both, name in re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)", done.stderr):
        package = name.split(".")[0]
        total[package] = max(total.get(package, 0.0), int(both) / 1e3)
        del own
    return dict(sorted(total.items(), key=lambda item: -item[1])[:SHOWN])


if __name__ == "__main__":
    main(run, __doc__)
