"""Single questions to the bus of LeRobot's follower driver, for `so101_arm`.

Life cycle: functions of a driver object, in any state. Errors are the driver's own.
"""

from __future__ import annotations

import logging
import time
from typing import Any

__all__ = ["PAUSE", "let_go", "said", "silent", "torque_off"]

logger = logging.getLogger(__name__)

# Between two attempts, seconds: late answers arrive meanwhile.
PAUSE = 0.05
# A servo that is silent for so long while the line is opened counts as dead, seconds.
PATIENCE = 1.0


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
