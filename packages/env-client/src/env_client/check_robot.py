"""`check_robot`: what a robot's cameras, joints, calibration and rates are, without any policy.

    check_robot --env.robot.port /dev/ttyACM0

Nothing is switched on and nothing moves. Each camera's picture is saved as a PNG. Exit codes: 0 when everything
is in order, 1 when something is not, 2 with one sentence when the robot cannot be opened.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from env_client.cli import CliError, fail, parse
from env_client.client_config import find_task, with_env_type
from env_client.envs.config import EnvConfig
from env_client.envs.env import EnvError, EnvSpec, Observation
from env_client.envs.plug_ins import register_robots
from env_client.envs.robots import SO101Config, VirtualConfig
from env_client.wire import decode_image

__all__ = ["CheckConfig", "main"]

PROG = "check_robot"
DESCRIPTION = (
    "Show a robot's cameras, joints, calibration and rates. Nothing is switched on and nothing moves."
)
ALIASES: dict[str, Any] = {
    "camera-config-path": "env.camera_config_path",
    "use-degrees": "env.use_degrees",
}

# A camera that gives less than this share of the rate, and a joint calibrated over fewer ticks, are out of order.
_LEAST_RATE, _LEAST_TICKS = 0.5, 500


@dataclass(frozen=True)
class CheckConfig:
    """Everything that `check_robot` can be told."""

    # A task in configs/tasks (lift, sort, stack): chooses the robot and says which cameras it needs.
    task: str | None = None
    # The robot.
    env: EnvConfig = field(default_factory=SO101Config)
    # How long the robot is read, in seconds.
    time_s: float = 3.0
    # The rate at which it is read, in Hz.
    fps: float = 30.0
    # Folder for one PNG of each camera.
    output_dir: Path = Path("outputs/check_robot")

    def __post_init__(self) -> None:
        if self.time_s <= 0 or self.fps <= 0:
            raise ValueError("--time-s and --fps are above 0")


@dataclass
class Readings:
    """What a few seconds of reading gave."""

    # Seconds that each reading took.
    took: list[float]
    # (n, action_dim) measured values, in the robot's unit.
    states: np.ndarray
    # Errors in place of a reading.
    errors: list[str]
    last: Observation


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    register_robots(lambda sentence: print(f"{PROG}: {sentence}", file=sys.stderr))
    try:
        config = parse(
            CheckConfig, with_env_type(arguments), prog=PROG, description=DESCRIPTION, aliases=ALIASES
        )
        wanted = find_task(config.task).cameras
        code = _run(config, wanted)
    except (EnvError, CliError) as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        fail(PROG, "interrupted", 130)
    raise SystemExit(code)


def _run(config: CheckConfig, wanted: Sequence[str]) -> int:
    from env_client.envs.make import make_env

    if isinstance(config.env, VirtualConfig) and config.env.control_port is None:
        raise EnvError(
            "give the control port of a virtual robot that runs (virtual_so101, --env.control-port)"
        )
    env = make_env(config.env, dry_run=True)
    try:
        env.connect()
        readings = _read(env, config)
        print(_joints_table(env.spec, readings))
        print(_bus_table(env, readings, config.fps))
        table, camera_problems = _camera_table(env, readings, config)
        print(table)
        problems = [*camera_problems, *_joint_problems(env, readings)]
        problems += [
            f"camera {name}, which the task needs, is missing"
            for name in wanted
            if name not in env.spec.cameras
        ]
        problems += (
            [f"{len(readings.errors)} readings failed: {readings.errors[-1]}"] if readings.errors else []
        )
    finally:
        env.close()
    for problem in problems:
        print(f"✗ {problem}")
    if not problems:
        print("✓ cameras, joints and calibration are in order")
    return 1 if problems else 0


def _read(env: Any, config: CheckConfig) -> Readings:
    took: list[float] = []
    states: list[np.ndarray] = []
    errors: list[str] = []
    last: Observation | None = None
    start = time.monotonic()
    for tick in range(max(1, round(config.time_s * config.fps))):
        time.sleep(max(0.0, start + tick / config.fps - time.monotonic()))
        began = time.monotonic()
        try:
            last = env.get_observation()
        except EnvError as error:
            errors.append(str(error))
            continue
        took.append(time.monotonic() - began)
        state = np.concatenate([last.states[part.name] for part in env.spec.states])
        states.append(state[env.spec.state_index])
    if last is None:
        raise EnvError(errors[-1])
    return Readings(took, np.array(states), errors, last)


def _joints_table(spec: EnvSpec, readings: Readings) -> str:
    unit = spec.unit
    rows = [("joint", f"now [{unit}]", "moved", "limits", f"{unit} per rad")]
    for index, name in enumerate(spec.action_names):
        values = readings.states[:, index]
        scale = "gripper" if spec.gripper[index] else f"{spec.unit_per_rad[index]:.2f}"
        limits = f"{spec.lower[index]:.1f} to {spec.upper[index]:.1f}"
        rows.append((name, f"{values[-1]:.2f}", f"{np.ptp(values):.2f}", limits, scale))
    return f"{spec.type}: {spec.action_dim} joints, unit {unit}\n{_table(rows)}\n"


def _bus_table(env: Any, readings: Readings, fps: float) -> str:
    took = np.array(readings.took) * 1e3
    rows = [
        ("reading", "p50", "p99", "max"),
        (
            "joints and pictures",
            *(f"{value:.2f} ms" for value in (*np.percentile(took, (50, 99)), took.max())),
        ),
    ]
    text = f"{len(took)} readings at {fps:g} Hz, {len(readings.errors)} failed\n{_table(rows)}\n"
    for arm in getattr(env, "arms", ()):
        ranges = ", ".join(
            f"{name} {joint.range_min}..{joint.range_max}" for name, joint in arm.joints.items()
        )
        text += f"{arm.name} on {arm.port}: calibrated ticks {ranges}\n"
    return text


def _camera_table(env: Any, readings: Readings, config: CheckConfig) -> tuple[str, list[str]]:
    import cv2

    spec, problems, folder = env.spec, [], config.output_dir
    rows = [("camera", "size", "fps", "age", "picture")]
    # A robot of another package may read its cameras by itself.
    rates = env.cameras.rates() if hasattr(env, "cameras") else {}
    for name in spec.cameras:
        image = decode_image(readings.last.images[name])
        path = folder / f"{name}.png"
        folder.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
            problems.append(f"{path} cannot be written")
        age = readings.last.image_age[name]
        rows.append(
            (
                name,
                f"{image.shape[1]}x{image.shape[0]}",
                f"{rates[name]:.1f}" if name in rates else "-",
                f"{age * 1e3:.0f} ms",
                str(path),
            )
        )
        if age > 0.5:
            problems.append(
                f"camera {name}'s last picture is {age:.1f} s old; look at its cable and its light"
            )
        if rates.get(name, config.fps) < _LEAST_RATE * config.fps:
            problems.append(
                f"camera {name} gives {rates[name]:.1f} pictures per second, {config.fps:g} were expected (--fps): give "
                "it more light, a USB port of its own, or fewer pixels (width, height, fps in the camera file)"
            )
        if int(image.max()) - int(image.min()) < 8:
            problems.append(f"camera {name} shows one colour only; is its cap on?")
    if not spec.cameras:
        return "no cameras\n", problems
    return f"{_table(rows)}\n", problems


def _joint_problems(env: Any, readings: Readings) -> list[str]:
    """Joints outside their limits, and ranges that nobody swept: with another arm's calibration there often are."""
    spec, last = env.spec, readings.states[-1]
    cure = "calibrate this arm anew (lerobot-calibrate)"
    ticks = env.ticks() if hasattr(env, "ticks") else {}
    if not ticks:
        room = 0.02 * (spec.upper - spec.lower)
        outside = (last < spec.lower - room) | (last > spec.upper + room)
        return [
            f"{name} stands at {at:.1f}, its limits are {low:.1f} to {high:.1f}; {cure}"
            for name, at, low, high, is_out in zip(
                spec.action_names, last, spec.lower, spec.upper, outside, strict=True
            )
            if is_out
        ]
    problems = []
    for name, (at, low, high) in ticks.items():
        if high - low < _LEAST_TICKS:
            problems.append(
                f"{name} is calibrated over {high - low} ticks, at least {_LEAST_TICKS} (44 degrees) were expected: "
                f"move it from stop to stop while you {cure}"
            )
        if not low - 0.02 * (high - low) <= at <= high + 0.02 * (high - low):
            problems.append(
                f"{name} stands at {at} ticks, its calibrated range is {low} to {high}: move it inside by hand, or {cure}"
            )
    return problems


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
