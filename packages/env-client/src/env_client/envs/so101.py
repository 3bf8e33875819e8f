"""The SO-101, one arm or two, with its cameras, as an `Env`.

Arms and cameras are independent: each arm has its own bus (`so101_arm.py`), each camera its own thread
(`cameras.py`). Images are named as in the camera file; the state is `arm`, or `left_arm` and `right_arm`; the
action is 6 values, or 12 with the left arm first.

Units are declared, never guessed: `normalized` (-100..100 over each joint's calibrated range, gripper 0..100)
or `degrees` (zero in the middle of the range, gripper 0..100). Limits and scales come from the calibration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from env_client.control.heartbeat import StopPlan
from env_client.envs.cameras import CameraRig, read_camera_file
from env_client.envs.env import EnvError, EnvSpec, Observation
from env_client.envs.robots import BiSO101Config, SO101Config
from env_client.envs.so101_arm import JOINTS, TICKS_PER_TURN, ArmConfig, Joint, SO101Arm
from env_client.envs.so101_bus import ticks, torque_off
from env_client.wire.spec import StateSpec

__all__ = ["SO101Env", "make_so101"]

# LeRobot's degrees: 360 of them are 4095 ticks, not 4096.
_TICKS_PER_DEGREE = 4095 / 360
_TICKS_PER_RAD = TICKS_PER_TURN / (2 * math.pi)
_GRIPPER = JOINTS.index("gripper")


def make_so101(config: SO101Config | BiSO101Config, *, task: str = "", dry_run: bool = False) -> SO101Env:
    """The env that a config describes, not yet connected.

    `dry_run`: the motors are neither switched on nor commanded. Raises `EnvError` for a bad camera file.
    """
    robot = config.robot
    folder = Path(robot.calibration_dir) if robot.calibration_dir else None
    parts: list[tuple[str, ArmConfig, str]]
    if isinstance(config, SO101Config):
        parts = [("arm", config.robot, config.robot.id)]
    else:
        pair = config.robot
        parts = [
            ("left_arm", pair.left_arm_config, f"{pair.id}_left"),
            ("right_arm", pair.right_arm_config, f"{pair.id}_right"),
        ]
    arms = [
        SO101Arm(
            arm,
            name=f"the {name.replace('_', ' ')}",
            robot_id=robot_id,
            calibration_dir=folder,
            use_degrees=config.use_degrees,
            passive=dry_run,
        )
        for name, arm, robot_id in parts
    ]
    cameras = CameraRig(
        read_camera_file(Path(config.camera_config_path)) if config.camera_config_path else {},
        frozen_after_s=config.frozen_camera_s,
    )
    return SO101Env(arms, cameras, [name for name, _, _ in parts], use_degrees=config.use_degrees, task=task)


class SO101Env:
    """One arm or two. Life cycle: `connect` (everything can be read, nothing is switched on), `engage` (or `reset`,
    which does it as well), then the `Env` protocol, then `close` (torque stays on).

    Where one of two arms fails, the observation is refused and both hold: the other one by a command, the
    failed one because its servos keep their last goal.
    """

    def __init__(
        self,
        arms: Sequence[SO101Arm],
        cameras: CameraRig,
        parts: Sequence[str],
        *,
        use_degrees: bool = False,
        task: str = "",
    ) -> None:
        self.arms = tuple(arms)
        self.cameras = cameras
        self.parts = tuple(parts)
        self.task = task
        self.use_degrees = use_degrees
        self._spec: EnvSpec | None = None
        self._calibration: list[dict[str, Joint]] = []
        self._measured: np.ndarray | None = None
        self._held: np.ndarray | None = None

    # ----------------------------------------------------------------------------------- life cycle

    def connect(self) -> None:
        """Open cameras and arms and read the calibration. The motors stay as they are. Raises `EnvError`."""
        try:
            self.cameras.connect()
            for arm in self.arms:
                arm.connect()
                self._calibration.append(arm.joints)
        except EnvError:
            self.close()
            raise
        self._spec = self._make_spec()

    def engage(self) -> None:
        """Switch all motors on where the arms stand. Raises `EnvError` after having tried each arm."""
        self._each(lambda index, arm: arm.engage())

    def close(self) -> None:
        """Close ports and cameras; torque and goals stay as they are."""
        for arm in self.arms:
            arm.close()
        self.cameras.close()

    def relax(self) -> None:
        """Switch the torque of all arms off. Raises `EnvError` after having tried each arm."""
        self._each(lambda index, arm: arm.relax())

    def without_torque(self) -> list[str]:
        """The joints whose motors are off, as the servos say it. Raises `EnvError`."""
        return [f"{arm.name}'s {name}" for arm in self.arms for name in arm.ask(torque_off)]

    def ticks(self) -> dict[str, tuple[int, int, int]]:
        """Each joint's position, smallest and largest calibrated position, in ticks. Raises `EnvError`."""
        return {f"{arm.name}'s {name}": at for arm in self.arms for name, at in arm.ask(ticks).items()}

    @property
    def spec(self) -> EnvSpec:
        """Known after `connect`."""
        if self._spec is None:
            raise EnvError("the robot is not connected yet: call connect first")
        return self._spec

    @property
    def done(self) -> bool:
        return False

    def reset(self, seed: int | None = None) -> Observation:
        """Begin an episode: motors that are off, or had lost their power, are switched on where they stand."""
        self.engage()
        self._held = None
        return self.get_observation()

    def success(self) -> bool | None:
        return None

    # ----------------------------------------------------------------------------------- every tick

    def get_observation(self) -> Observation:
        """Joints now and the newest pictures; 0.3 to 5 ms for each arm. Raises `EnvError`."""
        started = time.monotonic()
        states = {name: arm.read() for name, arm in zip(self.parts, self.arms, strict=True)}
        read = time.monotonic()
        measured = np.concatenate(list(states.values()))
        self._note_motion(measured)
        frames = self.cameras.frames()
        return Observation(
            images=frames.images,
            states=states,
            task=self.task,
            capture_time=read,
            image_age=frames.ages,
            # The first arm's reading is older than the second's.
            state_age=read - started,
        )

    def apply_action(self, action: np.ndarray) -> None:
        """Command (6,) or (12,) values, left arm first, in the spec's unit."""
        size = len(JOINTS) * len(self.arms)
        action = np.asarray(action, np.float32)
        if action.shape != (size,) or not np.all(np.isfinite(action)):
            raise EnvError(f"the robot was commanded {action!r:.120}; {size} finite numbers were expected")
        self._held = None
        self._each(lambda index, arm: arm.write(action[6 * index : 6 * index + 6]))

    def hold(self) -> None:
        """Command the measured pose. Called again and again it stays the pose of the first call: an arm that is
        told its own sagging pose each time would creep down."""
        if self._held is None or not np.all(np.isfinite(self._held)):
            held = np.full(len(JOINTS) * len(self.arms), np.nan, np.float32)
            self._each(lambda index, arm: held.__setitem__(slice(6 * index, 6 * index + 6), arm.read()))
            self._held = held
        held = self._held
        self._each(lambda index, arm: arm.write(held[6 * index : 6 * index + 6]))

    def _each(self, act: Any) -> None:
        """Do the same with every arm; a failing one keeps none of the others from it."""
        problems = []
        for index, arm in enumerate(self.arms):
            try:
                act(index, arm)
            except EnvError as error:
                problems.append(str(error))
        if problems:
            raise EnvError("; ".join(problems))

    def _note_motion(self, measured: np.ndarray) -> None:
        if self._measured is not None:
            distance = np.abs(measured - self._measured) / self.spec.unit_per_rad
            self.cameras.moved(float(np.sum(distance[~self.spec.gripper])))
        self._measured = measured

    # -------------------------------------------------------------------------------- spec and poses

    def _make_spec(self) -> EnvSpec:
        lower, upper, per_rad = [], [], []
        for joints in self._calibration:
            for name in JOINTS:
                ticks = joints[name].range_max - joints[name].range_min
                if ticks <= 0:
                    raise EnvError(f"the calibration of {name} spans {ticks} ticks; calibrate this arm anew")
                if name == "gripper":
                    limits, scale = (0.0, 100.0), 1.0
                elif self.use_degrees:
                    limits = (-ticks / 2 / _TICKS_PER_DEGREE, ticks / 2 / _TICKS_PER_DEGREE)
                    scale = _TICKS_PER_RAD / _TICKS_PER_DEGREE
                else:
                    limits, scale = (-100.0, 100.0), _TICKS_PER_RAD * 200.0 / ticks
                lower.append(limits[0])
                upper.append(limits[1])
                per_rad.append(scale)
        sides = [""] if len(self.arms) == 1 else ["left_", "right_"]
        count = len(self.arms)
        return EnvSpec(
            type="so101" if count == 1 else "bi_so101",
            action_names=tuple(f"{side}{joint}.pos" for side in sides for joint in JOINTS),
            unit="degrees" if self.use_degrees else "normalized",
            lower=np.array(lower, np.float32),
            upper=np.array(upper, np.float32),
            unit_per_rad=np.array(per_rad, np.float64),
            gripper=np.array([joint == "gripper" for joint in JOINTS] * count),
            state_index=np.arange(len(JOINTS) * count),
            states=tuple(StateSpec(name, len(JOINTS)) for name in self.parts),
            cameras=self.cameras.names,
        )

    def pose(self, values: Sequence[float], unit: str) -> np.ndarray:
        """A pose from a robot file, (action_dim,) in `unit`, in this env's own unit. Raises `EnvError`."""
        pose = np.asarray(values, np.float64)
        spec = self.spec
        if pose.shape != (spec.action_dim,):
            raise EnvError(f"a pose of {pose.size} values; this robot has {spec.action_dim}")
        if unit == spec.unit:
            return pose.astype(np.float32)
        if {unit, spec.unit} != {"normalized", "degrees"}:
            raise EnvError(f"a pose in {unit!r}; normalized or degrees was expected")
        ranges = np.array([j.range_max - j.range_min for c in self._calibration for j in c.values()])
        per_degree = _TICKS_PER_DEGREE * 200.0 / ranges
        scaled = pose / per_degree if spec.unit == "degrees" else pose * per_degree
        return np.where(spec.gripper, pose, scaled).astype(np.float32)

    def stop_plan(self, on_exit: str, rest_pose: np.ndarray | None, speed_rad_s: float) -> StopPlan:
        """How the supervisor stops these arms when this process cannot. `rest_pose` in this env's unit."""
        arms = []
        for index, (arm, joints) in enumerate(zip(self.arms, self._calibration, strict=True)):
            part = slice(6 * index, 6 * index + 6)
            arms.append(
                {
                    "port": arm.port,
                    "ids": [joint.id for joint in joints.values()],
                    "lower": [joint.range_min for joint in joints.values()],
                    "upper": [joint.range_max for joint in joints.values()],
                    "rest": None if rest_pose is None else self._ticks(rest_pose[part], joints),
                }
            )
        return StopPlan(
            "env_client.envs.feetech_stop:stop",
            {"arms": arms, "on_exit": on_exit, "ticks_per_s": speed_rad_s * _TICKS_PER_RAD},
        )

    def _ticks(self, pose: np.ndarray, joints: dict[str, Joint]) -> list[int]:
        ticks = []
        for index, (value, joint) in enumerate(zip(pose, joints.values(), strict=True)):
            span = joint.range_max - joint.range_min
            if index == _GRIPPER:
                ticks.append(round(joint.range_min + float(value) / 100.0 * span))
            elif self.use_degrees:
                ticks.append(
                    round((joint.range_min + joint.range_max) / 2 + float(value) * _TICKS_PER_DEGREE)
                )
            else:
                ticks.append(round(joint.range_min + (float(value) + 100.0) / 200.0 * span))
        return ticks
