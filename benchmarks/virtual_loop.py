"""The whole robot side on the virtual SO-101: starved ticks, rate and jitter for each way of executing chunks.

    uv run python benchmarks/virtual_loop.py [--steps 3000] [--modes sync,async] [--json FILE]

Everything is a real process: LeRobot's unmodified driver over the servo bus, MuJoCo and two rendered 480x640 cameras,
images sent as JPEG, `serve_policy` with a policy that takes the given time. The servos' own log gives the largest
step and speed that was commanded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy_policy import write_checkpoint
from tqdm import tqdm
from virtual_so101.servo_log import goals_of, read_servo_log
from wire import start_ours

# (seconds that one inference takes, actions in a chunk)
CASES = ((0.3, 50), (1.0, 100))
FPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help="commands of the policy in each run")
    parser.add_argument("--modes", default="sync,async,ensemble")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    runs = [(mode, *case) for case in CASES for mode in options.modes.split(",")]
    rows = [measure(*run, options.steps) for run in tqdm(runs, desc=f"{options.steps / FPS:.0f} s each")]
    print(f"\n{os.cpu_count()} cores, {options.steps} steps each, 30 Hz, two 480x640 cameras as JPEG")
    print(
        f"{'mode':10}{'model':>8}{'horizon':>8}{'starved':>9}{'rate Hz':>9}{'jitter p50':>12}{'p99':>8}{'max ms':>9}"
        f"{'largest rad/tick':>18}"
    )
    for row in rows:
        print(
            f"{row['mode']:10}{row['delay_s']:7.1f}s{row['horizon']:8}{row['starved']:9}{row['rate_hz']:9.2f}"
            f"{row['jitter_p50_ms']:12.2f}{row['jitter_p99_ms']:8.2f}{row['jitter_max_ms']:9.2f}{row['largest_step_rad']:18.3f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(mode: str, delay_s: float, horizon: int, steps: int) -> dict[str, Any]:
    """One run of the three processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "policy", delay_s=delay_s, horizon=horizon)
        server, port = start_ours(checkpoint)
        command = [
            sys.executable,
            "-m",
            "env_client.run_env_client",
            "--task",
            "lift",
            "--env.type",
            "virtual",
        ]
        command += ["--port", str(port), "--execution", mode, "--max-steps", str(steps)]
        command += ["--episode-time-s", str(steps / FPS * 3), "--image-codec", "jpeg", "--on-exit", "relax"]
        command += [
            "--summary-path",
            str(folder / "summary.json"),
            "--env.servo-log",
            str(folder / "servo.jsonl"),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        finally:
            server.kill()
        if not (folder / "summary.json").is_file():
            raise RuntimeError(f"{' '.join(command)} wrote no summary:\n{done.stdout}\n{done.stderr}")
        episode = json.loads((folder / "summary.json").read_text())["episodes"][0]
        timing = episode["timing"]
        return {
            "mode": mode,
            "delay_s": delay_s,
            "horizon": horizon,
            "starved": episode["starved"],
            "rate_hz": timing["ticks"] / episode["duration_s"],
            "largest_step_rad": largest_step(folder / "servo.jsonl"),
        } | {f"jitter_{key}_ms": timing[f"jitter_{key}_ms"] for key in ("p50", "p99", "max")}


def largest_step(log: Path) -> float:
    """The largest difference between two commanded goals that follow each other, in rad, over the body's joints."""
    goals = goals_of(read_servo_log(log))
    steps = [np.abs(np.diff(given.ticks)) for (_, joint), given in goals.items() if joint != "gripper"]
    return float(max(step.max() for step in steps if step.size) * 2 * np.pi / 4096)


if __name__ == "__main__":
    main()
