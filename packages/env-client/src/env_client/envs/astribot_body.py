"""The S1's joints through its SDK: vectors of the whole robot in, vectors of the whole robot out.

Life cycle: `open` (nothing is commanded), `engage` (the robot takes commands), `read` and `send` at each tick, `stop`
(it stands and takes no more commands), `close`. The SDK is called in one thread of its own (`astribot_sdk.py`), so a
call that hangs costs the loop no more than `call_timeout_s`; the optional executor sends its set-points from that
thread too.

Error policy: whatever goes wrong between here and the robot is an `EnvError`. The control rights are asked for with
each reading and before each command. `set_joints_position` returns None also when all is well, so whether the robot
takes its commands is seen from its desired positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from env_client.envs.astribot_config import AstribotConfig
from env_client.envs.astribot_executor import SetPoints
from env_client.envs.astribot_layout import Hardware, Part
from env_client.envs.astribot_sdk import Obedience, SdkThread, answered, construct, import_sdk, need_rights
from env_client.envs.env import EnvError

__all__ = ["PATIENCE_S", "AstribotBody"]

# The rate of the robot's own loop, in Hz.
FREQ = 250.0
# A joint that stands further outside its limits than this (rad) is not commanded at all.
OUTSIDE = 0.05
# Seconds that switching on, stopping and registering cameras may take.
PATIENCE_S = 5.0


class AstribotBody:
    """One S1 as a (size,) vector in the SDK's order and unit. One thread at a time may call it."""

    def __init__(self, config: AstribotConfig, hardware: Hardware, sdk_path: str | None) -> None:
        """`sdk_path`: where the SDK is imported from; None: it is importable already."""
        self.hardware = hardware
        self._config, self._sdk_path = config, sdk_path
        self._sdk = SdkThread(config.executor_hz)
        self._set_points = SetPoints(config.executor_blend_s)
        self._obedience = Obedience()
        # Lowest and highest position, and largest speed; known after `open`.
        self.lower = self.upper = self.speed = np.zeros(hardware.size)
        # The parts that are commanded.
        self.parts: Sequence[Part] = ()
        # Called in the SDK's thread with each reading.
        self.also_read: Callable[[Any], object] = lambda sdk: None
        # The last reading, the last command, and the pose that is held.
        self.pose: np.ndarray | None = None
        self._sent: np.ndarray | None = None
        self._held: np.ndarray | None = None
        self._restarted = False

    # ------------------------------------------------------------------------------------- life cycle

    def open(self) -> None:
        """Find the robot and its limits. Nothing is commanded. Raises `EnvError`."""
        settings = self._config.astribot
        make = import_sdk(self._sdk_path)

        def build() -> Any:
            return construct(make, freq=FREQ, high_control_rights=settings.high_control_rights)

        self._sdk.open(build, settings.connect_timeout_s)
        self.call(self._find_limits, PATIENCE_S)
        self.read()

    def engage(self) -> None:
        """Make the robot take commands, where it stands: the first time after a stop of an earlier run too. What
        somebody stops after that stays stopped. Raises `EnvError`."""

        def restart(sdk: Any) -> None:
            need_rights(sdk)
            if not self._restarted:
                answered(sdk.restart_robot(), "restart_robot")

        self.call(restart, PATIENCE_S)
        self._restarted = True

    def stop(self) -> str:
        """Stop the robot: it stands where it is and takes no more commands. Raises `EnvError` when it cannot be."""
        self._rest()

        def stop(sdk: Any) -> str:
            if not sdk.get_control_rights_status():
                return "another program has the control rights: the robot is in its hands and was not stopped here"
            answered(sdk.stop_robot(), "stop_robot")
            return "The robot was stopped and stands."

        return str(self.call(stop, PATIENCE_S))

    def close(self) -> None:
        """Let go of the SDK. May be called twice."""
        self._sdk.close()

    # ------------------------------------------------------------------------------------- every tick

    def begin_episode(self) -> None:
        """Forget what was commanded and held before."""
        self._held = None
        self._obedience = Obedience()

    def read(self) -> np.ndarray:
        """The measured pose. Raises `EnvError`, also when the robot does not take its commands."""
        names = [part.sdk for part in self.hardware.parts]

        def read(sdk: Any) -> tuple[np.ndarray, np.ndarray]:
            need_rights(sdk)
            both = (sdk.get_current_joints_position(names), sdk.get_desired_joints_position(names))
            self.also_read(sdk)
            measured, desired = (self._vector(answered(values, "reading the joints")) for values in both)
            return measured, desired

        measured, desired = self.call(read)
        self.pose = measured
        joints = np.zeros(self.hardware.size, bool)
        for part in self.parts:
            joints[part.where] = not part.is_gripper
        self._obedience.check(desired, self._sent, joints)
        return measured

    def send(self, vector: np.ndarray) -> None:
        """Command the pose. Raises `EnvError`."""
        self._held = None
        self._send(vector)

    def hold(self) -> None:
        """Command the pose that is measured at the first of a row of calls. Raises `EnvError`."""
        if self._held is None:
            self._held = self.read()
        self._set_points.clear()
        self._send(self._held)

    def call(self, act: Callable[[Any], Any], timeout_s: float | None = None) -> Any:
        """What `act(sdk)` returns, run in the SDK's thread. Raises `EnvError`."""
        try:
            return self._sdk.call(act, timeout_s or self._config.astribot.call_timeout_s)
        except EnvError:
            # Whatever is commanded next starts from where the robot stands then.
            self._rest()
            raise

    # -------------------------------------------------------------------------------------- the inside

    def _send(self, vector: np.ndarray) -> None:
        if self.pose is None:
            raise EnvError("the robot was not read yet: nothing can be commanded")
        target = self._inside(vector)
        if not self._config.executor_hz:
            self.call(lambda sdk: self._command(sdk, target))
            return
        begun_from = self._inside(self.pose)

        def aim(sdk: Any) -> None:
            need_rights(sdk)
            now = time.monotonic()
            self._set_points.begin(begun_from, now)
            self._set_points.aim(target, now)
            self._sdk.cycle = self._turn

        self.call(aim)

    def _turn(self, sdk: Any) -> None:
        """One set-point of the executor, in the SDK's thread. At the target nothing more is sent."""
        point = self._set_points.at(time.monotonic())
        if point is not None and (self._sent is None or not np.array_equal(self._sent, point)):
            self._command(sdk, point)

    def _command(self, sdk: Any, vector: np.ndarray) -> None:
        """In the SDK's thread."""
        need_rights(sdk)
        names = [part.sdk for part in self.parts]
        values = [vector[part.where].tolist() for part in self.parts]
        # A set-point of the executor is smooth already; smoothed twice it would only come later.
        way = "direct" if self._config.executor_hz else self._config.control_way
        # Without the last two words the SDK would move the torso, and others, on its own.
        sdk.set_joints_position(names, values, control_way=way, use_wbc=False, add_default_torso=False)
        self._sent = vector

    def _rest(self) -> None:
        self._sdk.cycle = None
        self._set_points.clear()
        self._sent = None

    def _vector(self, parts: Any) -> np.ndarray:
        values = [value for part in parts for value in part]
        if len(values) != self.hardware.size:
            raise EnvError(f"the SDK told {len(values)} joints; {self.hardware.size} were expected")
        return np.array(values, np.float64)

    def _find_limits(self, sdk: Any) -> None:
        need_rights(sdk)
        names = [part.sdk for part in self.hardware.parts]
        lower, upper = answered(sdk.get_joints_position_limit(names), "get_joints_position_limit")
        speed = answered(sdk.get_joints_velocity_limit(names), "get_joints_velocity_limit")
        self.lower, self.upper, self.speed = (self._vector(values) for values in (lower, upper, speed))

    def _inside(self, vector: np.ndarray) -> np.ndarray:
        """The vector cut to the joints' limits. Raises `EnvError` for a joint that stands far outside of them."""
        excess = np.maximum(self.lower - vector, vector - self.upper)
        for part in self.parts:
            worst = float(excess[part.where].max())
            if worst > OUTSIDE:
                raise EnvError(
                    f"{part.name} stands {worst:.2f} rad outside its limits: move it inside by hand"
                )
        return np.clip(vector, self.lower, self.upper)
