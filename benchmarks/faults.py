"""The fault matrix: processes killed and stopped, networks, disk and clock that fail, each in a run of its own.

    uv run python benchmarks/faults.py [--runs 200] [--seconds 0] [--seeds 7,8] [--results FILE]

Each run starts a policy server, a virtual SO-101 (the servo bus of `virtual_so101` without physics) and `run_env_client`, does
what its seed says (`tests/fault_plan.py`), and reads the servos' own log, the records and the process table
(`tests/fault_evidence.py`). A line is appended to the results as soon as a run is over, and runs that are there are not done
again: stopped at any moment (or by itself after `--seconds`), the same command goes on. At the end it prints the table.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from env_client.record.files import JsonLines, read_lines
from tqdm import tqdm
from wire import HERE

sys.path.insert(0, str(HERE.parent / "tests"))
from fault_plan import FAULTS, RUNS, plan_of
from fault_run import carry_out
from fault_world import checkpoint

RESULTS = HERE / "results" / "faults.jsonl"


def run(seeds: list[int], results: Path, seconds: float) -> None:
    """Carry out what is not in `results` yet; no run begins after `seconds` (0: all)."""
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {line["seed"] for line in read_lines(results)} if results.exists() else set()
    left = [seed for seed in seeds if seed not in done]
    lines, end = JsonLines(results), time.monotonic() + (seconds or float("inf"))
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        served: dict[str, Path] = {}
        for seed in tqdm(left, unit="run", initial=len(seeds) - len(left), total=len(seeds)):
            if time.monotonic() > end:
                break
            plan = plan_of(seed)
            if plan.policy not in served:
                served[plan.policy] = checkpoint(plan.policy, Path(folder))
            with tempfile.TemporaryDirectory(dir=folder) as own:
                result = carry_out(plan, Path(own), served[plan.policy])
            lines.write(result.plain())
            for problem in result.problems:
                tqdm.write(f"{plan}: {problem}")
    lines.close()


def table(lines: list[dict[str, Any]]) -> None:
    """One row for each kind of fault; the seconds are of faults in the middle of an episode of the NumPy policy."""
    rows = defaultdict(list)
    for line in lines:
        rows[line["victim"], line["how"]].append(line)
    print(
        "| fault | runs | the arm moved again | after s, p50 / max | it was ending anyway | the client ended and said why | problems |"
    )
    print("|---|---|---|---|---|---|---|")
    for fault in FAULTS:
        mine = rows[fault]
        moved = [line for line in mine if line["back_s"] is not None]
        back = [line["back_s"] for line in moved if (line["phase"], line["policy"]) == ("run", "numpy")]
        times = f"{np.median(back):.1f} / {max(back):.1f}" if back else "–"
        ending = sum(line["phase"] == "end" for line in mine)
        bad = sum(not line["ok"] for line in mine)
        ended = len(mine) - len(moved) - ending
        print(f"| {' '.join(fault)} | {len(mine)} | {len(moved)} | {times} | {ending} | {ended} | {bad} |")
    seconds = [line["seconds"] for line in lines]
    good = sum(line["ok"] for line in lines)
    print(
        f"\n{good} of {len(lines)} runs without a problem; {sum(line['goals'] for line in lines)} goals at the servos, "
        f"{sum(line['lines'] for line in lines)} lines in the logs, {sum(line['lost_ticks'] for line in lines)} ticks counted "
        f"as lost, {sum(line['frames'] for line in lines)} frames of video; {np.median(seconds):.1f} s a run (p50)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=RUNS, help="how many seeds, from 0 on")
    parser.add_argument("--seeds", help="only these, with commas between them")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no run after so many; 0: do all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that grows")
    options = parser.parse_args()
    # So that a run's processes are ended before this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else list(range(options.runs))
    run(seeds, options.results, options.seconds)
    lines = list(read_lines(options.results)) if options.results.exists() else []
    if options.seeds:
        print(json.dumps([line for line in lines if line["seed"] in seeds], indent=1))
    table(lines)


if __name__ == "__main__":
    main()
