"""One SO-101 arm on one serial bus, through LeRobot's own follower driver, which is not changed.

What this adds around the driver are the traps of its bus:

- **the calibration** is checked before the motors are switched on; nothing ever waits for the keyboard;
- **late replies** put every later read one cycle behind, without an error. Bytes that wait before a request are
  such replies: they are thrown away. After a transaction that was slow, failed or found such bytes, a read is
  believed only when the line stays silent for a moment behind it, otherwise it is repeated once, or refused;
- **a lost line** (plug pulled, a servo silent three times in a row): reads and commands are refused at once,
  without touching the port, while a thread opens a fresh driver object twice a second. The servos keep their
  last goal meanwhile, as their torque stays on;
- **power that was off** is not switched on again in the middle of an episode: somebody may have pulled it on
  purpose. The next episode (`engage`) does it.

All methods but the recovery's are called from one thread. Errors are `EnvError`.
"""

from __future__ import annotations

import logging
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from env_client.envs.env import EnvError
from env_client.envs.so101_bus import (
    PAUSE,
    calibrated,
    let_go,
    lives_on,
    said,
    silent,
    stand,
    torque_off,
)

__all__ = ["JOINTS", "ArmConfig", "Joint", "SO101Arm"]

logger = logging.getLogger(__name__)

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
TICKS_PER_TURN = 4096
# A healthy read takes 0.3 to 5 ms; LeRobot gives up a packet after 50 ms. Seconds.
_SLOW = 0.02
# How long the line must be silent behind a read that is not believed yet, seconds.
_SETTLE = 0.005
# Failed reads in a row after which the line counts as lost.
_FAILURES = 3
# Attempts to connect, and to switch motors on, that a lost packet may cost.
_TRIES = 3
# Between two attempts to open a lost line, seconds.
_RETRY = 0.5


@dataclass(frozen=True)
class ArmConfig:
    """LeRobot's config of one follower arm."""

    # Serial port of the arm's bus.
    port: str = "/dev/ttyACM0"
    # Position gains, written to the servos when the arm is connected.
    position_p_coefficient: int = 16
    position_i_coefficient: int = 0
    position_d_coefficient: int = 32
    # Further attempts of a read that failed; each may take 50 ms.
    num_read_retries: int = 1


@dataclass(frozen=True)
class Joint:
    """One joint of the calibration, in ticks (4096 per turn)."""

    id: int
    range_min: int
    range_max: int


class SO101Arm:
    """One arm. `name` is for messages; `robot_id` and `calibration_dir` name the calibration file."""

    def __init__(
        self,
        config: ArmConfig,
        *,
        name: str,
        robot_id: str,
        calibration_dir: Path | None,
        use_degrees: bool,
        passive: bool = False,
    ) -> None:
        self.name = name
        self.port = config.port
        # Never switches torque on or writes a goal.
        self.passive = passive
        # Late replies thrown away, and lines found again.
        self.flushed = 0
        self.recovered = 0
        self._config = config
        self._robot_id = robot_id
        self._calibration_dir = calibration_dir
        self._use_degrees = use_degrees
        self._lock = threading.Lock()
        self._robot: Any = None
        self._joints: dict[str, Joint] = {}
        self._lost = ""
        self._limp = ""
        self._engaged = False
        self._suspect = False
        self._failures = 0
        self._closed = threading.Event()
        self._recovery: threading.Thread | None = None

    # ----------------------------------------------------------------------------------- life cycle

    def connect(self) -> None:
        """Open the bus, check servos and calibration. Motors stay as they are found; positions can be read."""
        if not self.port:
            raise EnvError(
                f"the port of {self.name} is not given; add --env.robot.port (see lerobot-find-port)"
            )
        for attempt in range(_TRIES):
            try:
                self._robot = self._open()
                self._joints = {
                    name: Joint(c.id, c.range_min, c.range_max) for name, c in self._robot.calibration.items()
                }
                return
            except EnvError as error:
                # LeRobot does not retry while it connects: one lost packet would end the run. What is wrong with
                # the arm itself (no cause) does not get better by asking again.
                if error.__cause__ is None or attempt == _TRIES - 1:
                    raise

    def engage(self) -> None:
        """Switch the motors on where the arm stands; also after they lost their torque (see `_without_torque`).

        Does nothing when they are on already. Raises `EnvError`.
        """
        robot = self._usable(limp_is_fine=True)
        if self.passive or (self._engaged and not self._limp):
            return
        for attempt in range(_TRIES):
            try:
                stand(robot, robot.configure)
                break
            except Exception as error:
                if attempt == _TRIES - 1 or not isinstance(error, ConnectionError):
                    raise self._failed(error) from error
                # A late confirmation would be taken for that of the next write.
                time.sleep(PAUSE)
                robot.bus.port_handler.ser.reset_input_buffer()
        self._engaged, self._limp = True, ""

    def relax(self) -> None:
        """Switch the torque off."""
        robot = self._usable(limp_is_fine=True)
        try:
            robot.bus.disable_torque(num_retry=3)
            if not robot.is_calibrated:  # limits that `stand` opened
                robot.bus.write_calibration(robot.calibration)
        except Exception as error:
            raise self._failed(error) from error
        self._engaged = False

    def close(self) -> None:
        """Close the port; torque and goals stay as they are. Safe to call twice."""
        self._closed.set()
        with self._lock:
            robot, self._robot = self._robot, None
            self._lost = self._lost or "it was closed"
        if self._recovery is not None:
            self._recovery.join(3.0)
        if robot is not None:
            let_go(robot)

    @property
    def joints(self) -> dict[str, Joint]:
        """The calibration, by joint name; known after `connect`."""
        return {name: self._joints[name] for name in JOINTS}

    # ----------------------------------------------------------------------------------- every tick

    def read(self) -> np.ndarray:
        """(6,) float32 measured positions, in the arm's unit. Refused while motors are without torque that should
        have it: an arm that was taken out of service is not driven on."""
        robot = self._usable()
        try:
            for _ in range(2):
                values, believed = self._transaction(robot)
                if believed:
                    self._failures = 0
                    return values
        except Exception as error:  # termios.error is neither an OSError nor a ConnectionError
            raise self._failed(error) from error
        raise EnvError(f"{self.name}: late replies on {self.port}; the positions just read are too old")

    def write(self, positions: np.ndarray) -> None:
        """Command (6,) goal positions in the arm's unit."""
        if self.passive:
            return
        if not self._engaged:
            raise EnvError(f"the motors of {self.name} are off; call engage (or reset) first")
        if positions.shape != (len(JOINTS),) or not np.all(np.isfinite(positions)):
            raise EnvError(f"{self.name} was commanded {positions!r}; 6 finite numbers were expected")
        robot = self._usable()
        try:
            robot.send_action({f"{j}.pos": float(p) for j, p in zip(JOINTS, positions, strict=True)})
        except Exception as error:
            raise self._failed(error) from error

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """What a function of `so101_bus` reads from the driver, such as `ticks`."""
        robot = self._usable(limp_is_fine=True)
        try:
            return question(robot)
        except Exception as error:
            raise self._failed(error) from error

    # ------------------------------------------------------------------------------------- insides

    def _transaction(self, robot: Any) -> tuple[np.ndarray, bool]:
        line = robot.bus.port_handler.ser
        if line.in_waiting:
            self._flush(line)
        started = time.monotonic()
        observation = robot.get_observation()
        if time.monotonic() - started > _SLOW:
            self._suspect = True
        values = np.array([observation[f"{j}.pos"] for j in JOINTS], np.float32)
        if self._suspect:
            time.sleep(_SETTLE)
            if line.in_waiting:
                self._flush(line)
                return values, False
            self._suspect = False
        return values, True

    def _flush(self, line: Any) -> None:
        line.reset_input_buffer()
        self._suspect = True
        self.flushed += 1
        logger.warning("%s: late replies on %s were thrown away", self.name, self.port)

    def _usable(self, *, limp_is_fine: bool = False) -> Any:
        with self._lock:
            if self._robot is None:
                raise EnvError(f"{self.name}: {self._lost or 'it is not connected'}")
            if self._limp and not limp_is_fine:
                raise EnvError(f"{self.name}: {self._limp}")
            return self._robot

    def _failed(self, error: Exception) -> EnvError:
        """Count a failure; when the line is lost start looking for it. The error to raise."""
        self._suspect = True
        self._failures += 1
        # LeRobot says ConnectionError for a servo that did not answer; that may pass. What the port itself
        # raises (termios.error, SerialException) does not, and neither does a port left "in use".
        gone = isinstance(error, termios.error) or (
            isinstance(error, OSError) and not isinstance(error, ConnectionError)
        )
        if gone or "in use" in str(error) or self._failures >= _FAILURES:
            self._lose(f"the bus on {self.port} is lost ({said(error)}); looking for it")
            return EnvError(f"{self.name}: {self._lost}")
        return EnvError(f"{self.name} on {self.port} did not answer: {said(error)}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            robot, self._robot = self._robot, None
            self._lost = reason
            if self._closed.is_set() or robot is None:
                return
        logger.warning("%s: %s", self.name, reason)
        self._recovery = threading.Thread(
            target=self._recover, args=(robot,), name=f"recover-{self.name}", daemon=True
        )
        self._recovery.start()

    def _recover(self, old: Any) -> None:
        let_go(old)
        told = ""
        while not self._closed.wait(_RETRY):
            try:
                robot = self._open()
                limp = self._without_torque(robot) if self._engaged else ""
                if self._engaged and not limp:
                    stand(robot)
            except Exception as error:
                reason = said(error)
                with self._lock:
                    self._lost = f"the bus is lost ({reason}); looking for it"
                if reason != told:
                    logger.warning("%s is still away: %s", self.name, reason)
                told = reason
                continue
            with self._lock:
                if self._closed.is_set():
                    let_go(robot)
                    return
                self._limp = limp
                self._failures, self._suspect = 0, True
                self.recovered += 1
                self._robot = robot
            logger.warning("%s: the bus on %s is back%s", self.name, self.port, f"; {limp}" if limp else "")
            return

    def _open(self) -> Any:
        """A fresh driver object, connected, its calibration checked; torque as it was found."""
        if not Path(self.port).exists():
            raise EnvError(
                f"the port {self.port} of {self.name} does not exist; is the arm plugged in and powered? "
                "lerobot-find-port names the ports"
            )
        robot = self._driver()
        if not robot.calibration:
            raise EnvError(
                f"{self.name} has no calibration file {robot.calibration_fpath}; calibrate it with LeRobot "
                "(lerobot-calibrate --robot.type so101_follower --robot.id ID), or give --env.robot.id and "
                "--env.robot.calibration-dir as they were then"
            )
        missing = [joint for joint in JOINTS if joint not in robot.calibration]
        if missing:
            raise EnvError(
                f"{robot.calibration_fpath} says nothing about {', '.join(missing)}; calibrate anew"
            )
        try:
            robot.bus.connect(handshake=False)
            quiet = silent(robot)
            if quiet:
                raise EnvError(
                    f"on {self.port} these servos of {self.name} do not answer: {', '.join(quiet)}; look at their "
                    "power and cables"
                )
            if not calibrated(robot):
                raise EnvError(
                    f"the calibration in the servos of {self.name} is not that of {robot.calibration_fpath}: is "
                    "this the right arm for --env.robot.id? Nothing was moved; calibrate it with LeRobot, or "
                    "give the right id"
                )
        except EnvError:
            let_go(robot)
            raise
        except Exception as error:
            let_go(robot)
            raise EnvError(f"{self.name} on {self.port} cannot be reached: {said(error)}") from error
        return robot

    def _driver(self) -> Any:
        try:
            from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig
        except ImportError as error:
            raise EnvError(
                f"the SO-101 needs LeRobot ({error}); install env-client with the extra so101"
            ) from error
        lives_on()
        return SO101Follower(
            SO101FollowerConfig(
                port=self.port,
                id=self._robot_id,
                calibration_dir=self._calibration_dir,
                use_degrees=self._use_degrees,
                # Torque is ours to switch: closing a port must not drop an arm.
                disable_torque_on_disconnect=False,
                position_p_coefficient=self._config.position_p_coefficient,
                position_i_coefficient=self._config.position_i_coefficient,
                position_d_coefficient=self._config.position_d_coefficient,
                num_read_retries=self._config.num_read_retries,
            )
        )

    def _without_torque(self, robot: Any) -> str:
        """Empty when every motor is on, otherwise a sentence that names those that are not."""
        off = torque_off(robot)
        if off:
            # A late reply of a bus that has just come back may have been taken for this one: what is said twice is believed.
            time.sleep(_SETTLE)
            robot.bus.port_handler.ser.reset_input_buffer()
            off = [name for name in torque_off(robot) if name in off]
        if not off:
            return ""
        return (
            f"{', '.join(off)} came back without torque, so the power was off; it is not switched on in the middle "
            "of an episode: the next one does it"
        )
