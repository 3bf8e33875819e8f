"""What a started virtual robot leaves for others: calibration, camera config, and the line to run.

The state folder holds

    calibration/<id>.json       LeRobot's calibration of the arm (two arms: <id>_left.json, <id>_right.json)
    cameras.json                camera name -> fields of LeRobot's ZMQCameraConfig with its type
    robot.json                  all of it for programs: see `describe`; written last, removed at the end
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from virtual_so101.calibration import JOINTS, arm_ids
from virtual_so101.twin import Twin

__all__ = [
    "client_command",
    "default_state_dir",
    "describe",
    "port_links",
    "remove_description",
    "write_state",
]

ROBOT_FILE = "robot.json"


def default_state_dir(link: Path) -> Path:
    """A folder in the user's cache that belongs to this port link."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = str(link.absolute()).strip("/").replace("/", "-")
    return cache / "virtual_so101" / name


def port_links(link: Path, arms: int) -> list[Path]:
    """One link per arm: the path itself, or the path with `_left` and `_right`."""
    return [link] if arms == 1 else [link.with_name(f"{link.name}_{side}") for side in ("left", "right")]


def describe(twin: Twin, *, task: str, prompt: str, robot_id: str, state_dir: Path) -> dict[str, Any]:
    """Everything that a program needs to use this robot, as plain values (the `info` op's reply)."""
    state_dir = state_dir.absolute()
    arms = len(twin.buses)
    calibration = twin.chains[0].calibration
    return {
        "pid": os.getpid(),
        "task": task,
        "prompt": prompt,
        "arms": arms,
        "env_type": "so101" if arms == 1 else "bi_so101",
        "robot_id": robot_id,
        "ports": [str(bus.link.absolute()) for bus in twin.buses],
        "calibration_dir": str(state_dir / "calibration"),
        "camera_config_path": str(state_dir / "cameras.json") if twin.cameras else None,
        "cameras": twin.cameras.config if twin.cameras else {},
        "joints": list(JOINTS),
        "joint_lower_rad": np.asarray(twin.world.joint_lower).tolist(),
        "joint_upper_rad": np.asarray(twin.world.joint_upper).tolist(),
        "range_min_ticks": calibration.range_min.tolist(),
        "range_max_ticks": calibration.range_max.tolist(),
    }


def write_state(twin: Twin, info: dict[str, Any]) -> None:
    """Write the files that `info` names, `robot.json` last: who sees it finds the others."""
    folder = Path(info["calibration_dir"])
    for chain, name in zip(twin.chains, arm_ids(info["robot_id"], info["arms"]), strict=True):
        chain.calibration.save(folder / f"{name}.json")
    if info["camera_config_path"]:
        Path(info["camera_config_path"]).write_text(json.dumps(info["cameras"], indent=2) + "\n")
    robot = folder.parent / ROBOT_FILE
    fresh = robot.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(info, indent=2) + "\n")
    os.replace(fresh, robot)


def remove_description(info: dict[str, Any]) -> None:
    """Take `robot.json` away when the robot ends, if it is still ours."""
    robot = Path(info["calibration_dir"]).parent / ROBOT_FILE
    try:
        if json.loads(robot.read_text()).get("pid") == info["pid"]:
            robot.unlink()
    except (OSError, ValueError):
        return


def client_command(info: dict[str, Any]) -> str:
    """The command line that runs the client on this robot."""
    quote = shlex.quote
    ports = [quote(port) for port in info["ports"]]
    if info["arms"] == 1:
        port_flags = [f"--env.robot.port {ports[0]}"]
    else:
        port_flags = [
            f"--env.robot.left_arm_config.port {ports[0]}",
            f"--env.robot.right_arm_config.port {ports[1]}",
        ]
    flags = [
        f"--env.type {info['env_type']}",
        *port_flags,
        f"--env.robot.id {quote(info['robot_id'])}",
        f"--env.robot.calibration_dir {quote(info['calibration_dir'])}",
    ]
    if info["camera_config_path"]:
        flags.append(f"--env.camera-config-path {quote(info['camera_config_path'])}")
    flags.append(f"--task {quote(info['prompt'])}")
    return " \\\n      ".join(["uv run run_env_client", *flags])
