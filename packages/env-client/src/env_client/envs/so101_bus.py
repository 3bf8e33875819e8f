"""Single questions and orders to the Feetech bus of a LeRobot driver, for `so101_arm` and `lerobot`.

Life cycle: functions of a driver object, in any state. Errors are the driver's own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

__all__ = ["PAUSE", "calibrated", "let_go", "lives_on", "said", "silent", "stand", "ticks", "torque_off"]

logger = logging.getLogger(__name__)

# Between two attempts, seconds: late answers arrive meanwhile.
PAUSE = 0.05
# A servo that is silent for so long while the line is opened counts as dead, seconds.
PATIENCE = 1.0
# Speed of a joint from outside its calibrated range to its goal, ticks/s (0.3 rad/s), and the longest step, seconds.
_INWARDS, _STEP = 195.0, 0.05
# A joint that stands no further outside than this (1 degree, ticks) counts as inside.
_NEAR = 11
# The end of the encoder that lets a joint stand outside its range, by the limit's register.
_WIDE = {"Min_Position_Limit": 0, "Max_Position_Limit": 4095}


def lives_on() -> None:
    """From here on, robots and leaders that nobody refers to keep their torque: LeRobot's finalizers drop it."""
    from lerobot.robots import Robot
    from lerobot.teleoperators import Teleoperator

    for kind in (Robot, Teleoperator):
        kind.__del__ = lambda self: None


def ticks(robot: Any) -> dict[str, tuple[int, int, int]]:
    """{joint: (position, smallest, largest position of its calibration)} in ticks; LeRobot's own reading is cut."""
    now = robot.bus.sync_read("Present_Position", normalize=False, num_retry=2)
    ranges = robot.bus.calibration
    return {name: (at, ranges[name].range_min, ranges[name].range_max) for name, at in now.items()}


def calibrated(robot: Any) -> bool:
    """Whether the servos hold the driver's calibration; a limit that `stand` opened is no other calibration."""
    if robot.is_calibrated:
        return True
    found = robot.bus.read_calibration()
    return set(found) == set(robot.calibration) and all(
        servo.homing_offset == file.homing_offset
        and (servo.range_min, servo.range_max)
        in ((file.range_min, file.range_max), (0, file.range_max), (file.range_min, 4095))
        for servo, file in ((found[name], robot.calibration[name]) for name in found)
    )


def stand(robot: Any, switch: Callable[[], None] = lambda: None) -> None:
    """Make each joint hold the position that it has. `switch` switches the motors on.

    A servo cuts its goal to its limits, and LeRobot cuts goals to the calibrated range: both would make a joint
    outside jump to the edge. Its limit is opened until slow goals (0.3 rad/s) have brought it to what is commanded.
    """
    bus, stray = robot.bus, {}
    vars(bus).pop("sync_write", None)
    for name, (at, low, high) in ticks(robot).items():
        if low - _NEAR <= at <= high + _NEAR:
            continue
        limit = "Min_Position_Limit" if at < low else "Max_Position_Limit"
        # Locked: the limit is open until the servo's power is off, at the longest.
        bus.write("Lock", name, 1, num_retry=2)
        bus.write(limit, name, _WIDE[limit], num_retry=2)
        stray[name] = limit
        logger.warning(
            "%s stands at %d ticks, outside its calibrated range %d to %d: it moves inwards at 0.3 rad/s",
            name, at, low, high,
        )  # fmt: skip
    switch()
    now = {
        name: at if name in stray else min(max(at, low), high)
        for name, (at, low, high) in ticks(robot).items()
    }
    bus.sync_write("Goal_Position", now, normalize=False)
    if stray:
        _bring_in(bus, stray, {name: float(now[name]) for name in stray})


def _bring_in(bus: Any, limits: dict[str, str], at: dict[str, float]) -> None:
    """Slow down the goals of the joints in `at` (their goals, ticks) until each has caught up with its command."""
    plain, last = type(bus).sync_write, time.monotonic()

    def send(register: str, values: dict[str, float], *, normalize: bool = True, num_retry: int = 0) -> None:
        nonlocal last
        if register != "Goal_Position" or not normalize:
            plain(bus, register, values, normalize=normalize, num_retry=num_retry)
            return
        raw = bus._unnormalize({bus.motors[name].id: value for name, value in values.items()})
        goals = {name: raw[bus.motors[name].id] for name in values}
        now = time.monotonic()
        step, last = _INWARDS * min(now - last, _STEP), now
        arrived = []
        for name in at.keys() & goals:
            gap = goals[name] - at[name]
            if abs(gap) <= step:
                arrived.append(name)
            else:
                at[name] += step if gap > 0 else -step
                goals[name] = round(at[name])
        plain(bus, register, goals, normalize=False, num_retry=num_retry)
        for name in arrived:
            calibration = bus.calibration[name]
            is_lower = limits[name] == "Min_Position_Limit"
            bus.write(
                limits[name], name, calibration.range_min if is_lower else calibration.range_max, num_retry=2
            )
            del at[name]
        if not at:
            del bus.sync_write

    bus.sync_write = send


def torque_off(robot: Any) -> list[str]:
    """The motors that are off."""
    state = robot.bus.sync_read("Torque_Enable", num_retry=2)
    return [name for name, value in state.items() if not value]


def silent(robot: Any) -> list[str]:
    """The servos that answer no ping, in several rounds: a busy machine or a lost packet is no dead servo."""
    missing = dict(robot.bus.motors)
    end = time.monotonic() + PATIENCE
    while missing:
        robot.bus.port_handler.ser.reset_input_buffer()
        missing = {name: motor for name, motor in missing.items() if robot.bus.ping(name) is None}
        if time.monotonic() > end:
            break
        # A late answer to one ping would be taken for the answer to the next.
        time.sleep(PAUSE if missing else 0.0)
    return [f"{name} (id {motor.id})" for name, motor in missing.items()]


def let_go(robot: Any) -> None:
    """Close the port of a driver object in any state."""
    try:
        robot.bus.port_handler.closePort()
    except Exception as error:  # a pulled plug: closing fails as well
        logger.debug("closing %s: %s", robot, error)
        robot.bus.port_handler.is_open = False


def said(error: BaseException) -> str:
    """An error of the driver as one line."""
    return " ".join(str(error).split()) or type(error).__name__
