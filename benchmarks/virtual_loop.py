"""The whole robot side on the virtual SO-101: starved ticks, rate, jitter and seams for each way of executing chunks.

    uv run python benchmarks/virtual_loop.py [--steps 3000] [--modes sync,async,rtc] [--json FILE]

Everything is a real process: LeRobot's unmodified driver over the servo bus, MuJoCo and two rendered 480x640 cameras,
images sent as JPEG and written to the inference log, `serve_policy` with a policy that takes the given time. `sync`, `async` and
`ensemble` follow a slow wave; `rtc` (prefix), `rtc-guided` and `async-pi` follow a small Pi0.5 of random weights, each of whose
chunks is another sample of its flow. `asked` is the step that the policy's chunks ask for, at a seam and inside chunks (95th
percentile over ticks, largest joint); the servos' own log gives the largest step that was commanded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy_policy import write_checkpoint
from numpy_policy.slowed import write_slowed
from tqdm import tqdm
from virtual_so101.servo_log import goals_of, read_servo_log
from wire import start

from grasp_cube.tiny_checkpoint import make_tiny_checkpoint

# (seconds that one inference takes, actions in a chunk)
CASES = ((0.3, 50), (1.0, 100))
FPS = 30
# The Pi0.5 sees 224x224.
RESIZE = ("--policy.resize", "pad")
# Name in the table: (--execution, flags of a server with a Pi0.5, None for the wave).
MODES: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "sync": ("sync", None),
    "async": ("async", None),
    "ensemble": ("ensemble", None),
    "rtc": ("rtc", ("--policy.rtc", "prefix")),
    "rtc-guided": ("rtc", ("--policy.rtc", "guided")),
    "async-pi": ("async", ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help="commands of the policy in each run")
    parser.add_argument("--modes", default="sync,async,ensemble,rtc", help=", ".join(MODES))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    runs = [(mode, *case) for case in CASES for mode in options.modes.split(",")]
    rows = []
    for run in tqdm(runs, desc=f"{options.steps / FPS:.0f} s each"):
        rows.append(measure(*run, options.steps))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(
        f"\n{os.cpu_count()} cores, {options.steps} steps each, 30 Hz, two 480x640 cameras as JPEG, recorded"
    )
    print(
        f"{'mode':11}{'model':>6}{'horizon':>8}{'starved':>9}{'rate Hz':>9}{'jitter p50':>12}{'p99':>7}{'max ms':>8}"
        f"{'asked: seam':>13}{'inside':>8}{'sent, largest rad':>19}"
    )
    for row in rows:
        print(
            f"{row['mode']:11}{row['delay_s']:5.1f}s{row['horizon']:8}{row['starved']:9}{row['rate_hz']:9.2f}"
            f"{row['jitter_p50_ms']:12.2f}{row['jitter_p99_ms']:7.2f}{row['jitter_max_ms']:8.2f}"
            f"{row['asked_seam_rad']:13.3f}{row['asked_inside_rad']:8.3f}{row['largest_step_rad']:19.3f}"
        )


def measure(mode: str, delay_s: float, horizon: int, steps: int) -> dict[str, Any]:
    """One run of the three processes."""
    execution, pi_flags = MODES[mode]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if pi_flags is None:
            checkpoint = write_checkpoint(folder / "policy", delay_s=delay_s, horizon=horizon)
        else:
            pi = make_tiny_checkpoint(folder / "pi", chunk_size=horizon)
            checkpoint = write_slowed(folder / "policy", pi, delay_s)
        serve = ("-m", "grasp_cube.serve_policy", "--policy.path", str(checkpoint), "--host", "127.0.0.1")
        server, port = start(*serve, "--port", "0", *(() if pi_flags is None else (*RESIZE, *pi_flags)))
        command = [
            sys.executable,
            "-m",
            "env_client.run_env_client",
            "--task",
            "lift",
            "--env.type",
            "virtual",
        ]
        command += ["--port", str(port), "--execution", execution, "--max-steps", str(steps)]
        command += ["--episode-time-s", str(steps / FPS * 3), "--image-codec", "jpeg", "--on-exit", "relax"]
        command += ["--no-panel", "--log-dir", str(folder / "logs")]
        command += ["--summary-path", str(folder / "summary.json")]
        command += ["--env.servo-log", str(folder / "servo.jsonl")]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        finally:
            server.kill()
        if not (folder / "summary.json").is_file():
            raise RuntimeError(f"{' '.join(command)} wrote no summary:\n{done.stdout}\n{done.stderr}")
        episodes = json.loads((folder / "summary.json").read_text())["episodes"]
        if not episodes:
            raise RuntimeError(f"{' '.join(command)} ran no episode:\n{done.stdout}\n{done.stderr}")
        episode = episodes[0]
        timing = episode["timing"]
        seam, inside = asked_steps(folder / "logs")
        return {
            "mode": mode,
            "delay_s": delay_s,
            "horizon": horizon,
            "starved": episode["starved"],
            "rate_hz": timing["ticks"] / episode["duration_s"],
            "asked_seam_rad": seam,
            "asked_inside_rad": inside,
            "largest_step_rad": largest_step(folder / "servo.jsonl"),
        } | {f"jitter_{key}_ms": timing[f"jitter_{key}_ms"] for key in ("p50", "p99", "max")}


def asked_steps(logs: Path) -> tuple[float, float]:
    """95th percentiles of the steps that chunks asked for, in rad over the body's joints: at seams, and inside chunks."""
    (session,) = logs.glob("session_*")
    run = json.loads((session / "metadata.json").read_text())
    body = np.array(["gripper" not in name for name in run["action_names"]])
    entries = [json.loads(line) for line in (session / "inference_log.jsonl").open()]
    steps: dict[bool, list[float]] = {True: [], False: []}
    for before, now in pairwise(entries):
        if now["tick"] == before["tick"] + 1 and None not in (before["requested"], now["requested"]):
            change = np.subtract(now["requested"], before["requested"]) / run["unit_per_rad"]
            steps[now["boundary"]].append(float(np.abs(change)[body].max()))
    return (
        float(np.percentile(steps[True], 95)) if steps[True] else float("nan"),
        float(np.percentile(steps[False], 95)),
    )


def largest_step(log: Path) -> float:
    """The largest difference between two commanded goals that follow each other, in rad, over the body's joints."""
    goals = goals_of(read_servo_log(log))
    steps = [np.abs(np.diff(given.ticks)) for (_, joint), given in goals.items() if joint != "gripper"]
    return float(max(step.max() for step in steps if step.size) * 2 * np.pi / 4096)


if __name__ == "__main__":
    main()
