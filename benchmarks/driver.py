"""LeRobot's driver by itself on the virtual SO-101: how steadily a 30 Hz loop runs with both cameras.

    uv run python benchmarks/driver.py [--seconds 600] [--json FILE]

`virtual_so101` runs as its own process (servo bus, physics, two rendered 480x640 cameras at 30 fps). Here LeRobot's unmodified
`SO101Follower` with its `ZMQCamera`s is read and commanded as in LeRobot's own record loop: `get_observation`, `send_action`,
`precise_sleep`; none of our robot side takes part. `new pictures` counts ticks whose picture differs from the one before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

FPS = 30
CAMERAS = ("front", "wrist")
# The driver must hold this on average, Hz.
WANTED_HZ = 29.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), options.seconds)
    print(
        f"\n{os.cpu_count()} cores, {figures['ticks']} ticks in {figures['seconds']:.1f} s: {figures['rate_hz']:.2f} Hz"
    )
    print(
        f"worst minute {figures['worst_minute_hz']:.2f} Hz; interval p50 {figures['interval_p50_ms']:.2f}, ",
        end="",
    )
    print(f"p99 {figures['interval_p99_ms']:.2f}, longest {figures['interval_max_ms']:.1f} ms")
    print("new pictures: " + ", ".join(f"{camera} {figures['new'][camera]:.3f}" for camera in CAMERAS))
    print(f"{'held' if figures['rate_hz'] >= WANTED_HZ else 'NOT held'}: {WANTED_HZ} Hz")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "virtual_so101.cli",
        "--task",
        "lift",
        "--exit-with-parent",
        "--state-dir",
        str(folder),
    ]
    command += ["--port-link", str(folder / "port"), "--camera-port", "0", "--control-port", "0"]
    robot = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not (folder / "robot.json").exists():
            if robot.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended at once")
            time.sleep(0.1)
        follower = connect(json.loads((folder / "robot.json").read_text()))
        try:
            return drive(follower, seconds)
        finally:
            follower.disconnect()
    finally:
        robot.terminate()
        robot.wait(10)


def connect(info: dict[str, Any]) -> Any:
    """LeRobot's follower on the virtual robot's port, with LeRobot's cameras."""
    from lerobot.cameras.zmq import ZMQCameraConfig
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    cameras = json.loads(Path(info["camera_config_path"]).read_text())
    for camera in cameras.values():
        assert camera.pop("type") == "zmq"
    follower = SO101Follower(
        SO101FollowerConfig(
            port=info["ports"][0],
            id=info["robot_id"],
            calibration_dir=Path(info["calibration_dir"]),
            use_degrees=False,
            cameras={name: ZMQCameraConfig(**fields) for name, fields in cameras.items()},
        )
    )
    follower.connect()
    return follower


def drive(follower: Any, seconds: float) -> dict[str, Any]:
    from lerobot.utils.robot_utils import precise_sleep

    start = follower.get_observation()
    pose = {key: value for key, value in start.items() if key.endswith(".pos")}
    sent: list[float] = []
    fresh = dict.fromkeys(CAMERAS, 0)
    before: dict[str, np.ndarray] = {}
    began = time.perf_counter()
    for tick in tqdm(range(round(seconds * FPS)), desc="ticks", unit="tick", disable=None):
        at = time.perf_counter()
        observation = follower.get_observation()
        for camera in CAMERAS:
            # A few rows tell: the arm moves in both pictures.
            rows = observation[camera][::16]
            fresh[camera] += not np.array_equal(rows, before.get(camera, 0))
            before[camera] = rows.copy()
        wave = 15.0 * np.sin(2 * np.pi * tick / (4 * FPS))
        follower.send_action({key: value + wave * ("gripper" not in key) for key, value in pose.items()})
        sent.append(time.perf_counter())
        precise_sleep(max(1 / FPS - (time.perf_counter() - at), 0.0))
    took = time.perf_counter() - began
    gaps = np.diff(sent) * 1e3
    minutes = [gaps[first : first + 60 * FPS] for first in range(0, len(gaps), 60 * FPS)]
    return {
        "ticks": len(sent),
        "seconds": took,
        "rate_hz": len(sent) / took,
        "worst_minute_hz": float(min(1e3 / minute.mean() for minute in minutes)),
        "interval_p50_ms": float(np.percentile(gaps, 50)),
        "interval_p99_ms": float(np.percentile(gaps, 99)),
        "interval_max_ms": float(gaps.max()),
        "new": {camera: count / len(sent) for camera, count in fresh.items()},
    }


if __name__ == "__main__":
    main()
