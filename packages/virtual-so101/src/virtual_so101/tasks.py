"""The three tasks: what stands on the table, where a seed puts it, and when it is done.

lift   "lift up the red cube": the cube at least 5 cm above the table for half a second; one arm.
sort   "sort the cubes by color": red cubes on the red mat to the left, blue ones on the blue mat to the
       right, all let go and at rest; two arms.
stack  "stack the red cube on the green cube": the red one on the green one, let go and at rest; one arm.

lift and stack also run with two arms at the table: the left arm works, the right one is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from virtual_so101.scene import CUBE_EDGE, Cube, Layout, Mat

__all__ = ["TASKS", "Placement", "State", "Task", "get_task", "goal_slots", "on_its_mat"]

# Where every episode starts, rad, zero = mid range: the gripper over the near edge of the work area, half open.
_START = (0.0, -1.15, 1.0, 1.3, 0.05, -0.2)
# Two arms that share the middle of the table start turned away from it.
_START_ASIDE = ((-0.9, *_START[1:]), (0.9, *_START[1:]))
# Rise of the cube that counts as lifted, metres.
LIFT_HEIGHT = 0.05
# A cube slower than this is at rest, m/s.
REST_SPEED = 0.02
# Room that the jaws need between the centres of two cubes, metres.
_CLEARANCE = 0.065

# How far a cube in the work area is turned against the arm's heading, rad.
_TURN = 0.6

_RED, _GREEN, _BLUE = (0.80, 0.07, 0.06), (0.10, 0.55, 0.15), (0.08, 0.22, 0.75)
_ONE_ARM = ((0.0, 0.0, 0.0),)
_TWO_ARMS = ((0.0, 0.13, 0.0), (0.0, -0.13, 0.0))
# Pan axis ahead of an arm's base, and how near and far of it a cube can be grasped from above, metres.
_PAN_AXIS, _REACH = 0.0388, (0.115, 0.275)

# Pose of a cube on the table: x, y in metres, yaw in rad.
Placement = tuple[float, float, float]


class State(Protocol):
    """What a success test may ask of the world."""

    def cube_position(self, name: str) -> np.ndarray:
        """(3,) centre of a cube, metres."""
        ...

    def cube_speed(self, name: str) -> float:
        """Speed of a cube's centre, m/s."""
        ...

    def held(self, name: str) -> bool:
        """Whether any part of an arm touches the cube."""
        ...


@dataclass(frozen=True)
class Task:
    """One task with a number of arms: its scene, its resets, its success test."""

    name: str
    prompt: str
    layout: Layout
    # Longest episode, seconds.
    duration: float
    # How long the condition must hold, seconds.
    hold: float
    place: Callable[[np.random.Generator], dict[str, Placement]]
    condition: Callable[[State], bool]
    # Where each arm starts, rad, zero = mid range.
    start_poses: tuple[tuple[float, ...], ...]

    @property
    def arms(self) -> int:
        """1 or 2."""
        return len(self.layout.bases)

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Cameras in the order in which they are recorded."""
        wrists = ("wrist",) if self.arms == 1 else ("left_wrist", "right_wrist")
        return ("front", *wrists)


def get_task(name: str, arms: int | None = None) -> Task:
    """The task of this name with this many arms; None is the number that the task is meant for.

    Raises:
        ValueError: when there is no such task, or it cannot run with so many arms.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
    make, allowed = TASKS[name]
    arms = allowed[0] if arms is None else arms
    if arms not in allowed:
        raise ValueError(f"The task {name} runs with {' or '.join(map(str, allowed))} arms, not with {arms}.")
    return make(arms)


def goal_slots(color: str) -> tuple[tuple[float, float], ...]:
    """Where on its mat the first and the second cube of a colour ("red" or "blue") go, (x, y) in metres."""
    side = 1.0 if color == "red" else -1.0
    x, y = _MAT_CENTER
    return ((x + 0.03, side * y), (x - 0.03, side * y))


def on_its_mat(name: str, position: np.ndarray) -> bool:
    """Whether a cube's centre (3,), metres, lies within the mat of its colour."""
    side = 1.0 if name.startswith("red") else -1.0
    off = np.abs(position[:2] - [_MAT_CENTER[0], side * _MAT_CENTER[1]])
    return bool(np.all(off <= _MAT_HALF)) and bool(position[2] < CUBE_EDGE)


_MAT_CENTER, _MAT_HALF = (0.16, 0.30), (0.065, 0.055)


def _lift(arms: int) -> Task:
    def place(rng: np.random.Generator) -> dict[str, Placement]:
        return {"red_cube": _in_work_area(rng, y_center=layout.bases[0][1])}

    def condition(state: State) -> bool:
        return bool(state.cube_position("red_cube")[2] >= CUBE_EDGE / 2.0 + LIFT_HEIGHT)

    layout = _layout(arms, (Cube("red_cube", _RED),))
    return Task(
        "lift",
        "lift up the red cube",
        layout,
        duration=8.0,
        hold=0.5,
        place=place,
        condition=condition,
        start_poses=(_START,) * arms,
    )


def _stack(arms: int) -> Task:
    def place(rng: np.random.Generator) -> dict[str, Placement]:
        y_center = layout.bases[0][1]
        green = _in_work_area(rng, y_center, shrink=0.015)
        while True:
            red = _in_work_area(rng, y_center)
            if _distance(red, green) >= 0.075:
                return {"red_cube": red, "green_cube": green}

    def condition(state: State) -> bool:
        red, green = state.cube_position("red_cube"), state.cube_position("green_cube")
        on_top = abs(red[2] - green[2] - CUBE_EDGE) < 0.004 and np.hypot(*(red - green)[:2]) < 0.6 * CUBE_EDGE
        return bool(on_top) and not state.held("red_cube") and state.cube_speed("red_cube") < REST_SPEED

    layout = _layout(arms, (Cube("red_cube", _RED), Cube("green_cube", _GREEN)))
    prompt = "stack the red cube on the green cube"
    return Task(
        "stack",
        prompt,
        layout,
        duration=12.0,
        hold=0.5,
        place=place,
        condition=condition,
        start_poses=(_START,) * arms,
    )


def _sort(arms: int) -> Task:
    names = ("red_cube_1", "blue_cube_1", "red_cube_2", "blue_cube_2")

    def place(rng: np.random.Generator) -> dict[str, Placement]:
        # Rejection, restarted as a whole: a bad first cube could otherwise leave no room for the last one.
        while True:
            placed: dict[str, Placement] = {}
            for name in names:
                base = layout.bases[0 if name.startswith("red") else 1]
                x, y = float(rng.uniform(0.15, 0.255)), float(rng.uniform(-0.10, 0.10))
                spot = (x, y, _yaw(rng, x, y - base[1]))
                apart = all(_distance(spot, other) >= _CLEARANCE for other in placed.values())
                if not (_reachable(spot, base) and apart):
                    break
                placed[name] = spot
            if len(placed) == len(names):
                return placed

    def condition(state: State) -> bool:
        for name in names:
            if not on_its_mat(name, state.cube_position(name)):
                return False
            if state.held(name) or state.cube_speed(name) >= REST_SPEED:
                return False
        return True

    cubes = tuple(Cube(name, _RED if name.startswith("red") else _BLUE) for name in names)
    mats = (
        Mat("red_mat", (_MAT_CENTER[0], _MAT_CENTER[1]), _MAT_HALF, (0.85, 0.55, 0.52)),
        Mat("blue_mat", (_MAT_CENTER[0], -_MAT_CENTER[1]), _MAT_HALF, (0.52, 0.62, 0.85)),
    )
    layout = _layout(arms, cubes, mats)
    return Task(
        "sort",
        "sort the cubes by color",
        layout,
        duration=35.0,
        hold=0.5,
        place=place,
        condition=condition,
        start_poses=_START_ASIDE,
    )


def _layout(arms: int, cubes: tuple[Cube, ...], mats: tuple[Mat, ...] = ()) -> Layout:
    if arms == 1:
        return Layout(_ONE_ARM, cubes, mats)
    return Layout(_TWO_ARMS, cubes, mats, front_eye=(0.70, 0.0, 0.52), front_target=(0.13, 0.0, 0.03))


def _in_work_area(rng: np.random.Generator, y_center: float, shrink: float = 0.0) -> Placement:
    """A spot in the 15 x 16 cm before an arm."""
    while True:
        x = float(rng.uniform(0.15 + shrink, 0.30 - shrink))
        y = float(rng.uniform(y_center - 0.08 + shrink, y_center + 0.08 - shrink))
        spot = (x, y, _yaw(rng, x, y - y_center))
        if _reachable(spot, (0.0, y_center, 0.0)):
            return spot


def _yaw(rng: np.random.Generator, x: float, y: float) -> float:
    """A turn at a spot in the frame of the base of the arm that is to grasp there.

    Against the arm's heading it is less than an eighth turn: which way to grasp is never a toss-up.
    """
    return float(np.arctan2(y, x - _PAN_AXIS)) + float(rng.uniform(-_TURN, _TURN))


def _reachable(spot: Placement, base: tuple[float, float, float]) -> bool:
    reach = np.hypot(spot[0] - base[0] - _PAN_AXIS, spot[1] - base[1])
    return bool(_REACH[0] <= reach <= _REACH[1])


def _distance(a: Placement, b: Placement) -> float:
    return float(np.hypot(a[0] - b[0], a[1] - b[1]))


# Name -> (what makes the task, the numbers of arms that it runs with, its own first).
TASKS: dict[str, tuple[Callable[[int], Task], tuple[int, ...]]] = {
    "lift": (_lift, (1, 2)),
    "sort": (_sort, (2,)),
    "stack": (_stack, (1, 2)),
}
