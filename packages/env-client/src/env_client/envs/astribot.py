"""The Astribot S1 as an `Env`: a policy's layout of its joints, and cameras as compressed as they come.

Life cycle: `suit` (which layout, unit and cameras the policy has), `connect` (SDK, limits, first pictures; nothing is
commanded), `engage` (the robot takes commands), the `Env` protocol, `stop` (the robot stands and takes no more
commands), `close`. The robot itself is `astribot_body.py`; what goes wrong there is an `EnvError`: the loop holds and
asks again.

Units: rad; grippers as the layout's unit says; the chassis in m and rad relative to its pose at the last `reset`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from env_client.control.heartbeat import StopPlan
from env_client.control.safety import SafetyConfig
from env_client.envs.astribot_body import PATIENCE_S, AstribotBody
from env_client.envs.astribot_cameras import ImagesDict, Pictures, Source
from env_client.envs.astribot_config import AstribotConfig
from env_client.envs.astribot_layout import (
    CHASSIS,
    ChassisFrame,
    Hardware,
    Layout,
    Part,
    layout_names,
    make_spec,
)
from env_client.envs.cameras import CameraRig
from env_client.envs.env import EnvError, EnvSpec, Observation
from env_client.wire.spec import PolicySpec

__all__ = ["AstribotEnv"]

# The cameras when a server does not say which ones it looks through.
CAMERAS = ("head", "left_wrist", "right_wrist")
# What the SDK finds the robot by, for a process that stops it.
ENVIRONMENT = ("ROBOT_TYPE", "VIRTUAL_ASTRIBOT")
# The layouts that are known by their number of values, and the one that is meant when nothing is said.
KNOWN_SIZES, USUAL = (16, 22, 25), 22


class AstribotEnv:
    """One S1. `sdk_path` is where its SDK is imported from; None: it is importable already."""

    def __init__(
        self,
        config: AstribotConfig,
        hardware: Hardware,
        *,
        sdk_path: str | None,
        make_source: Callable[[Callable[..., Any]], Source],
        rig: CameraRig | None = None,
        task: str = "",
        dry_run: bool = False,
    ) -> None:
        """`make_source` gets a function that runs others in the SDK's thread. `rig`: LeRobot's cameras instead."""
        self.config, self.hardware, self.task = config, hardware, task
        self._sdk_path, self._dry_run = sdk_path, dry_run
        self._body = AstribotBody(config, hardware, sdk_path)
        self._make_source, self._rig = make_source, rig
        self._source: Source | None = None
        # The eyes: moved, frames and rates.
        self.cameras: CameraRig | Pictures = rig or Pictures(())
        self._camera_names = config.cameras or CAMERAS
        self._layout = Layout(hardware, ())
        self._suited = False
        self._spec: EnvSpec | None = None
        self._frame: ChassisFrame | None = None

    # ------------------------------------------------------------------------------------- life cycle

    def suit(self, policy: PolicySpec | None, action_dim: int | None = None) -> None:
        """Take the layout, the unit and the cameras of a policy; of what it leaves open, the flags' and the defaults.

        `action_dim`: the number of values of a policy that says no more. Raises `EnvError`.
        """
        config, dim = self.config, action_dim
        names = layout_names(config.layout) if config.layout else None
        # A unit of another kind stays a mismatch, which is refused before anything moves.
        unit = "rad"
        if policy is not None:
            dim = policy.action_dim
            if (
                names is None
                and policy.action_names
                and set(policy.action_names) <= set(self.hardware.joint_names)
            ):
                names = policy.action_names
            if policy.unit in self.hardware.units:
                unit = policy.unit
            if policy.cameras and not config.cameras:
                wanted = tuple(camera.name for camera in policy.cameras)
                self._camera_names = (
                    tuple(name for name in wanted if name in self.hardware.cameras) or CAMERAS
                )
        size = dim if dim in KNOWN_SIZES else USUAL
        self._layout = Layout(self.hardware, names or layout_names(f"astribot_s1_{size}"), unit)
        self._body.parts = self._commanded
        self._suited = True

    def connect(self) -> None:
        """Find the robot and its limits, and wait for the first pictures. Nothing is commanded. Raises `EnvError`."""
        if not self._suited:
            self.suit(None)
        body = self._body
        try:
            body.open()
            self._open_cameras()
        except EnvError:
            self.close()
            raise
        names = self._camera_names if self._rig is None else self._rig.names
        limits = (body.lower, body.upper, body.speed)
        self._spec = make_spec(self._layout, limits, names if self.config.enable_camera else ())

    def engage(self) -> None:
        """Make the robot take commands, where it stands. Raises `EnvError`."""
        if not self._dry_run:
            self._body.engage()

    def stop(self) -> str:
        """Stop the robot: it stands where it is and takes no more commands. Raises `EnvError` when it cannot be."""
        return self._body.stop()

    def relax(self) -> None:
        """The SDK knows no motors without power. Raises `EnvError`."""
        raise EnvError("an Astribot cannot be relaxed by its SDK: --on-exit hold stops it where it stands")

    def close(self) -> None:
        """Let go of the cameras and of the SDK. May be called twice."""
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._rig is not None:
            self._rig.close()
        self._body.close()

    @property
    def spec(self) -> EnvSpec:
        """Known after `connect`."""
        if self._spec is None:
            raise EnvError("the robot is not connected yet: call connect first")
        return self._spec

    @property
    def done(self) -> bool:
        return False

    def success(self) -> bool | None:
        return None

    def reset(self, seed: int | None = None) -> Observation:
        """Begin an episode: from here on the chassis is measured from where it stands now."""
        self._frame = None
        self._body.begin_episode()
        return self.get_observation()

    # ------------------------------------------------------------------------------------- every tick

    def get_observation(self) -> Observation:
        """Joints now and the newest pictures. Raises `EnvError`."""
        started = time.monotonic()
        before, pose = self._body.pose, self._body.read()
        read = time.monotonic()
        if before is not None:
            self.cameras.moved(float(np.abs(pose - before)[~self.hardware.is_gripper].sum()))
        frames, relative = self.cameras.frames(), self._from_start(pose)
        layout = self._layout
        return Observation(
            images=frames.images,
            states={
                name: layout.convert(relative, index).astype(np.float32)
                for name, index in layout.state_parts().items()
            },
            task=self.task,
            capture_time=read,
            image_age=frames.ages,
            state_age=read - started,
        )

    def apply_action(self, action: np.ndarray) -> None:
        """Command (A,) values of the layout. Raises `EnvError`."""
        if not np.all(np.isfinite(action)):
            raise EnvError(f"the robot was commanded {action!r:.120}; finite numbers were expected")
        frame = self._frame
        if frame is None:
            raise EnvError("the robot was not read yet: nothing can be commanded")
        # Joints that the layout does not name keep what they had at the start of the episode.
        self._body.send(frame.absolute(self._layout.to_robot(action, frame.relative(frame.start))))

    def hold(self) -> None:
        """Command the pose that is measured at the first of a row of calls."""
        self._body.hold()

    def _from_start(self, pose: np.ndarray) -> np.ndarray:
        if self._frame is None:
            self._frame = ChassisFrame(self.hardware.part(CHASSIS).where, pose)
        return self._frame.relative(pose)

    # --------------------------------------------------------------------------- what belongs to the layout

    @property
    def holds(self) -> tuple[str, ...]:
        """The parts of the layout that keep their pose, whatever the policy says."""
        config = self.config
        held = {CHASSIS: not config.execute_chassis, "head": not config.head, "torso": not config.torso}
        return tuple(name for name, is_held in held.items() if is_held and name in self._layout.parts)

    @property
    def _commanded(self) -> list[Part]:
        named = set(self._layout.parts) - set(self.holds)
        return [part for part in self.hardware.parts if part.name in named]

    @property
    def plain_states(self) -> tuple[str, ...]:
        """The parts that a server reads which does not name its state, by `--env.state-layout`."""
        if self.config.state_layout is None:
            return ()
        return Layout(self.hardware, layout_names(self.config.state_layout)).parts

    def safety(self, config: SafetyConfig) -> SafetyConfig:
        """What the user said, with the parts that are held here, and with the thresholds of a gripper in this unit."""
        opened, closed = self.hardware.units[self._layout.unit]
        default, travel = SafetyConfig(), closed - opened
        given = (config.gripper_open_at, config.gripper_close_at)
        if given == (default.gripper_open_at, default.gripper_close_at):
            config = replace(
                config, gripper_open_at=opened + 0.4 * travel, gripper_close_at=opened + 0.6 * travel
            )
        return replace(config, hold=(*config.hold, *self.holds))

    def pose(self, values: Any, unit: str) -> np.ndarray:
        """A pose of the robot file ({part: values in the SDK's unit}) in the layout, (A,). Raises `EnvError`."""
        vector = self._from_start(self._body.read())
        for name, part in values.items():
            vector[self.hardware.part(name).where] = part
        return self._layout.from_robot(vector).astype(np.float32)

    def stop_plan(self, on_exit: str, rest_pose: np.ndarray | None, speed_rad_s: float) -> StopPlan:
        """How another process stops this robot: it takes the control rights and calls `stop_robot`. Raises `EnvError`."""
        if on_exit == "relax":
            self.relax()
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        arguments = {"sdk_path": self._sdk_path, "environment": environment}
        return StopPlan("env_client.envs.astribot_stop:stop", arguments)

    def _open_cameras(self) -> None:
        if not self.config.enable_camera:
            return
        if self._rig is not None:
            self._rig.connect()
            return
        unknown = [name for name in self._camera_names if name not in self.hardware.cameras]
        if unknown:
            raise EnvError(
                f"no camera {', '.join(unknown)}; the robot file has {', '.join(self.hardware.cameras)}"
            )
        source = self._source = self._make_source(lambda act: self._body.call(act, PATIENCE_S))
        timeless = isinstance(source, ImagesDict)
        pictures = Pictures(self._camera_names, frozen_after_s=self.config.frozen_camera_s, timeless=timeless)
        source.start(pictures, {name: self.hardware.cameras[name] for name in self._camera_names})
        if isinstance(source, ImagesDict):
            self._body.also_read = source.poll
        pictures.wait_for_first()
        self.cameras = pictures
