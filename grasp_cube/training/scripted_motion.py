"""A scripted SO-101 that lifts a cube: simple kinematics, a joint plan and the lag of real servos.

Everything is in the SO-101's own `normalized` unit (-100..100 over each joint's range, gripper 0..100) and in
metres, x forward, y left, z up, the robot's foot at the origin. No physics: the cube follows the closed jaws.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = [
    "CUBE_SIZE",
    "FPS",
    "JOINTS",
    "Cube",
    "GripperPose",
    "ScriptedEpisode",
    "arm_points",
    "gripper_pose",
    "jaw_angle",
    "plan_lift",
    "reach",
]

JOINTS: Final = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
FPS: Final = 30
CUBE_SIZE: Final = 0.03

# Half of each joint's range in radians: what 100 normalised units are. The gripper is apart (0..100).
_HALF_RANGE: Final = np.array([1.91986, 1.74533, 1.69, 1.65806, 2.79])
_JAW_CLOSED, _JAW_OPEN = -0.174533, 1.74533

# The arm's plane at the zero pose, as offsets (forward, up) in metres: pan axis -> shoulder -> elbow -> wrist
# -> roll joint -> tip. The sideways offsets of the real arm (under 2 cm) are left out.
_PAN_X: Final = 0.039
_SHOULDER: Final = np.array([0.030, 0.117])
_UPPER_ARM: Final = np.array([0.028, 0.112])
_FOREARM: Final = np.array([0.135, 0.005])
_HAND: Final = np.array([0.061, 0.0])
_WRIST_TO_TIP: Final = np.array([0.159, -0.007])

# Where a recording starts and how the fingers stand: folded above the base, half open.
_REST: Final = np.array([0.0, -98.0, 96.0, 74.0, 0.0, 20.0])
_OPEN, _CLOSED, _CUBE_STOPS_JAW = 54.0, 20.0, 27.0
# The approach looks down and a little forward, in radians below the horizon.
_GRASP_PITCH: Final = 1.25


@dataclass(frozen=True)
class Cube:
    """Where the cube lies: its centre on the table (metres) and its yaw (radians)."""

    x: float
    y: float
    yaw: float


@dataclass(frozen=True)
class GripperPose:
    """The gripper in the world: its tip (3,), and a rotation (3, 3) whose columns are
    forward (towards the tip), sideways, and the direction in which the jaw opens."""

    tip: np.ndarray
    rotation: np.ndarray


@dataclass(frozen=True)
class ScriptedEpisode:
    """One lift: `actions` and `states` (T, 6) float32 normalised, `cubes` (T, 4, 4) poses, `lifted` at the end."""

    actions: np.ndarray
    states: np.ndarray
    cubes: np.ndarray

    @property
    def lifted(self) -> bool:
        """Whether the cube ends at least 3 cm above the table."""
        return bool(self.cubes[-1, 2, 3] > 0.03 + CUBE_SIZE / 2)


def plan_lift(cube: Cube, rng: np.random.Generator) -> ScriptedEpisode:
    """The motion that reaches `cube`, closes and lifts it; `rng` varies speed and height a little.

    Raises `ValueError` when the cube is out of reach.
    """
    plan = _joint_plan(cube, rng)
    actions = _follow(plan)
    states, cubes = _play(actions, cube)
    return ScriptedEpisode(actions.astype(np.float32), states.astype(np.float32), cubes)


def arm_points(state: np.ndarray) -> np.ndarray:
    """(5, 3) metres: shoulder, elbow, wrist, roll joint and tip of a normalised (6,) state."""
    pan, lift, elbow, wrist = state[:4] / 100.0 * _HALF_RANGE[:4]
    at = _SHOULDER
    plane = [at]
    pitch = 0.0
    for turn, link in ((lift, _UPPER_ARM), (elbow, _FOREARM)):
        pitch += turn
        at = at + _pitched(link, pitch)
        plane.append(at)
    pitch += wrist
    plane += [at + _pitched(_HAND, pitch), at + _pitched(_WRIST_TO_TIP, pitch)]
    ahead = np.array([np.cos(pan), -np.sin(pan), 0.0])
    return np.array([[_PAN_X, 0.0, 0.0] + r * ahead + [0.0, 0.0, z] for r, z in plane])


def gripper_pose(state: np.ndarray) -> GripperPose:
    """Where the gripper of a normalised (6,) state is."""
    pan, lift, elbow, wrist, roll = state[:5] / 100.0 * _HALF_RANGE
    pitch = lift + elbow + wrist
    ahead = np.array([np.cos(pan), -np.sin(pan), 0.0])
    up = np.array([0.0, 0.0, 1.0])
    forward = np.cos(pitch) * ahead - np.sin(pitch) * up
    above = np.sin(pitch) * ahead + np.cos(pitch) * up
    side = np.cross(above, forward)
    opening = np.cos(roll) * above + np.sin(roll) * side
    return GripperPose(
        arm_points(state)[-1], np.stack([forward, np.cross(opening, forward), opening], axis=1)
    )


def jaw_angle(gripper: float) -> float:
    """Radians between the fixed and the moving jaw for a gripper value of 0..100."""
    return max(0.0, _JAW_CLOSED + gripper / 100.0 * (_JAW_OPEN - _JAW_CLOSED))


def reach(x: float, y: float, z: float, pitch: float, roll: float, gripper: float) -> np.ndarray:
    """The normalised (6,) pose that brings the tip to (x, y, z) metres, pointing `pitch` radians down.

    Raises `ValueError` where the arm is too short or a joint would leave its range.
    """
    radius = float(np.hypot(x - _PAN_X, y))
    wrist = np.array([radius, z]) - _pitched(_WRIST_TO_TIP, pitch)
    span = wrist - _SHOULDER
    a, b, c = np.linalg.norm(_UPPER_ARM), np.linalg.norm(_FOREARM), np.linalg.norm(span)
    if not abs(a - b) < c < a + b:
        raise ValueError(f"the point ({x:.3f}, {y:.3f}, {z:.3f}) m is out of the arm's reach")
    # The elbow is above the line from shoulder to wrist; angles are measured above the horizon.
    inner = np.arccos((a**2 + c**2 - b**2) / (2 * a * c))
    upper = np.arctan2(span[1], span[0]) + inner
    knee = _SHOULDER + a * np.array([np.cos(upper), np.sin(upper)])
    fore = np.arctan2(*(wrist - knee)[::-1])
    lift = np.arctan2(_UPPER_ARM[1], _UPPER_ARM[0]) - upper
    elbow = np.arctan2(_FOREARM[1], _FOREARM[0]) - fore - lift
    angles = np.array([np.arctan2(-y, x - _PAN_X), lift, elbow, pitch - lift - elbow, roll])
    pose = np.append(angles / _HALF_RANGE * 100.0, gripper)
    if np.any(np.abs(pose[:5]) > 100.0):
        raise ValueError(f"the point ({x:.3f}, {y:.3f}, {z:.3f}) m needs a joint outside its range")
    return pose


def _joint_plan(cube: Cube, rng: np.random.Generator) -> list[tuple[np.ndarray, int]]:
    """The poses to pass and the ticks from each to the next."""
    # The jaw opens along the arm's own plane; a cube looks the same every quarter turn.
    bearing = np.arctan2(cube.y, cube.x - _PAN_X)
    quarter = np.pi / 2
    roll = (cube.yaw - bearing + quarter / 2) % quarter - quarter / 2
    grasp = (cube.x, cube.y, CUBE_SIZE / 2)
    above = reach(*grasp[:2], 0.085, _GRASP_PITCH, roll, _OPEN)
    down = reach(*grasp, _GRASP_PITCH, roll, _OPEN)
    closed = np.append(down[:5], _CLOSED)
    lifted = reach(*grasp[:2], rng.uniform(0.11, 0.13), _GRASP_PITCH - 0.2, roll, _CLOSED)
    pace = rng.uniform(0.95, 1.05)
    return [
        (_REST + np.append(rng.uniform(-1.0, 1.0, 5), 0.0), 4),
        (above, round(54 * pace)),
        (down, round(30 * pace)),
        (closed, round(18 * pace)),
        (closed, 6),
        (lifted, round(39 * pace)),
        (lifted, 12),
    ]


def _follow(plan: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """(T, 6) actions: minimum-jerk motion from pose to pose."""
    pose = plan[0][0]
    rows = []
    for goal, ticks in plan:
        s = np.arange(1, ticks + 1)[:, None] / ticks
        rows.append(pose + (goal - pose) * (10 * s**3 - 15 * s**4 + 6 * s**5))
        pose = goal
    return np.concatenate(rows)


def _play(actions: np.ndarray, cube: Cube) -> tuple[np.ndarray, np.ndarray]:
    """What the servos and the cube do: the state trails the action, and the cube stops the closing jaw."""
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(cube.yaw), -np.sin(cube.yaw)], [np.sin(cube.yaw), np.cos(cube.yaw)]]
    pose[:3, 3] = cube.x, cube.y, CUBE_SIZE / 2
    state = actions[0].copy()
    held: np.ndarray | None = None
    opened = False
    states, cubes = [], []
    for action in actions:
        state = state + 0.45 * (action - state)
        opened |= bool(state[5] > _OPEN - 5)
        if opened:
            state[5] = max(state[5], _CUBE_STOPS_JAW)
        gripper = gripper_pose(state)
        frame = np.eye(4)
        frame[:3, :3], frame[:3, 3] = gripper.rotation, gripper.tip
        if held is None and opened and state[5] <= _CUBE_STOPS_JAW:
            held = np.linalg.inv(frame) @ pose
        if held is not None:
            pose = frame @ held
        # A servo reports whole steps: 4096 in a turn, about 0.08 normalised units.
        states.append(np.round(state / 0.08) * 0.08)
        cubes.append(pose.copy())
    return np.array(states), np.array(cubes)


def _pitched(link: np.ndarray, pitch: float) -> np.ndarray:
    """A link (forward, up) turned `pitch` radians downwards."""
    c, s = np.cos(pitch), np.sin(pitch)
    return np.array([link[0] * c + link[1] * s, -link[0] * s + link[1] * c])
