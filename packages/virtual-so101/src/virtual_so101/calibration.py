"""Joint angles (rad) <-> servo ticks <-> the units of LeRobot, and the calibration file that says how.

One convention for the whole virtual robot, so that a dataset recorded in-process and a robot driven over
the bus agree: the middle of a joint's mechanical range reads 2047 ticks, which is where LeRobot's own
calibration puts it, and the calibrated range is the mechanical range, for all six joints. The normalised
unit follows: -100 at the lower limit, 100 at the upper one; the gripper 0 closed, 100 open.

Imports numpy only.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = [
    "HOMING_OFFSETS",
    "JOINTS",
    "MID_TICK",
    "TICKS_PER_RAD",
    "TICKS_PER_TURN",
    "ArmCalibration",
    "JointCalibration",
    "arm_ids",
]

# Joint names in servo order, ids 1 to 6: the names of LeRobot's driver.
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
TICKS_PER_TURN = 4096
TICKS_PER_RAD = TICKS_PER_TURN / (2.0 * math.pi)
# Where LeRobot's calibration puts the pose that it is told is the middle: int(4095 / 2).
MID_TICK = 2047
# A horn is never mounted at the encoder's zero; both signs and nearly the largest magnitude (2047) occur.
HOMING_OFFSETS = ((-1173, 842, 1507, -96, 1985, -1480), (655, -1930, 318, 1204, -777, 12))


def arm_ids(robot_id: str, arms: int) -> tuple[str, ...]:
    """Names under which LeRobot looks for the calibration of each arm: `id`, or `id_left` and `id_right`."""
    return (robot_id,) if arms == 1 else (f"{robot_id}_left", f"{robot_id}_right")


@dataclass(frozen=True)
class JointCalibration:
    """One joint's entry of a LeRobot calibration file; ticks."""

    id: int
    drive_mode: int
    homing_offset: int
    range_min: int
    range_max: int


@dataclass(frozen=True)
class ArmCalibration:
    """Six joints between radians and ticks; every array is (6,), in the order of `JOINTS`."""

    joints: tuple[JointCalibration, ...]
    # Middle of each joint's mechanical range, rad: reads MID_TICK.
    middle: np.ndarray

    @classmethod
    def of_limits(cls, lower: np.ndarray, upper: np.ndarray, arm: int = 0) -> ArmCalibration:
        """The calibration of an arm with these mechanical limits (rad); `arm` 0 or 1 picks the offsets."""
        lower, upper = np.asarray(lower, dtype=float), np.asarray(upper, dtype=float)
        if lower.shape != (6,) or upper.shape != (6,) or not np.all(lower < upper):
            raise ValueError(
                f"joint limits have shapes {lower.shape} and {upper.shape}; expected (6,) and (6,), rad, "
                "each lower limit below its upper one"
            )
        # Rounded inwards, so that no tick of the calibrated range lies beyond the mechanical stop.
        half = np.floor((upper - lower) / 2.0 * TICKS_PER_RAD).astype(int)
        joints = tuple(
            JointCalibration(
                id=i + 1,
                drive_mode=0,
                homing_offset=HOMING_OFFSETS[arm][i],
                range_min=int(MID_TICK - half[i]),
                range_max=int(MID_TICK + half[i]),
            )
            for i in range(6)
        )
        return cls(joints=joints, middle=(lower + upper) / 2.0)

    @property
    def range_min(self) -> np.ndarray:
        """Lowest calibrated tick of each joint."""
        return np.array([j.range_min for j in self.joints])

    @property
    def range_max(self) -> np.ndarray:
        """Highest calibrated tick of each joint."""
        return np.array([j.range_max for j in self.joints])

    def to_ticks(self, positions: np.ndarray) -> np.ndarray:
        """Joint angles (rad) as the servos report them: whole ticks."""
        ticks = np.rint((np.asarray(positions, dtype=float) - self.middle) * TICKS_PER_RAD) + MID_TICK
        return ticks.astype(int)

    def from_ticks(self, ticks: np.ndarray) -> np.ndarray:
        """Ticks -> joint angles, rad."""
        return (np.asarray(ticks, dtype=float) - MID_TICK) / TICKS_PER_RAD + self.middle

    def to_normalized(self, positions: np.ndarray) -> np.ndarray:
        """Joint angles (rad) in LeRobot's normalised unit, through whole ticks as the driver sees them."""
        low, high = self.range_min, self.range_max
        share = (np.clip(self.to_ticks(positions), low, high) - low) / (high - low)
        return np.where(np.arange(6) == 5, share * 100.0, share * 200.0 - 100.0)

    def from_normalized(self, values: np.ndarray) -> np.ndarray:
        """LeRobot's normalised unit -> joint angles, rad; range and whole ticks as the driver cuts them."""
        values = np.asarray(values, dtype=float)
        share = np.where(np.arange(6) == 5, values / 100.0, (values + 100.0) / 200.0)
        low, high = self.range_min, self.range_max
        return self.from_ticks(np.floor(np.clip(share, 0.0, 1.0) * (high - low) + low))

    def save(self, path: Path) -> None:
        """Write the file that LeRobot reads as `<calibration_dir>/<id>.json`."""
        entries = {name: vars(joint) for name, joint in zip(JOINTS, self.joints, strict=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries, indent=4) + "\n")
