"""Scripted experts: they know where the cubes are and solve each task with joint goals alone.

`expert(world)` yields the goals of one 30 Hz tick after the other, (6,) or (12,) rad, left arm first; its
caller lets the arms `follow` them and asks for the next. A plan is a chain of smooth moves whose goals
never change faster than `MAX_GOAL_SPEED`; the grasp is always the same one: fingers straight down, the
fixed jaw towards the base, the jaws square to the cube. With `Misses` each grasp comes after one that goes wrong.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import numpy as np

from virtual_so101.kinematics import ArmKinematics, GraspPose, UnreachableError
from virtual_so101.scene import CUBE_EDGE
from virtual_so101.tasks import goal_slots, on_its_mat
from virtual_so101.world import World

__all__ = ["MAX_GOAL_SPEED", "TICK", "EmptyJaws", "Misses", "expert", "follow", "run_episode"]

# Seconds between two goals.
TICK = 1.0 / 30.0
# Fastest change of any goal, rad/s; clients commonly allow 1.5.
MAX_GOAL_SPEED = 1.3
# A smooth-step move is half as fast again in its middle as on average.
_PEAK = 1.5
# Jaw goals, rad: open as in the start pose; shut beyond the cube, so that the servo squeezes at its torque limit.
_OPEN, _SHUT = -0.2, -0.72
# Point of the gripper (its own frame, metres) at which the cube's centre lies: flush with the fixed pad, and with
# the clearance that the fixed jaw needs on the way down.
_FLUSH = np.array([0.007, 0.0, -0.094])
_CLEAR = np.array([0.012, 0.0, -0.094])
# Heights of the cube's centre above the table, metres.
_ON_TABLE, _HOVER, _CARRY = CUBE_EDGE / 2.0, 0.07, 0.075
# The wrist cannot bend far enough to point straight down when high up, and less so far out: it leans outwards, by so
# many rad per metre above a height (metres) that falls with the reach (metres from the pan axis).
_LEAN_RATE, _MAX_LEAN = 8.0, 0.45
_LEAN_REACH, _LEAN_FROM = (0.21, 0.27), (0.05, 0.015)

# The hold after the last move that ends an episode, seconds.
_REST = 0.7
# How a grasp misses: metres beside the cube, rad of a wrong turn.
_MISS_BESIDE, _MISS_TURN = (0.012, 0.035), 0.4
# Misses drawn until one is within reach.
_TRIES = 50
# What the arms of sort take, left arm first; nearer to the middle line, metres, a gripper is in the other one's way.
_COLORS, _MIDDLE = ("red", "blue"), 0.17
# Jaws count as shut beyond this goal, rad; when they have been so long, ticks, a cube between them is so
# near, metres, to the point where it is held, and its centre so high.
_SHUT_BEYOND, _UP_AFTER, _NEAR, _HELD_UP = -0.6, 25, 0.05, 0.8 * CUBE_EDGE
_CENTRED = np.zeros(2)

Goals = Generator[np.ndarray, None, None]


class Misses:
    """Grasps that go wrong, one before each that succeeds.

    Attributes:
        rng: where and when they end.
        under_way: whether the goals handed out last belong to one, of whichever arm.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.under_way = False


def expert(world: World, misses: Misses | None = None) -> Iterator[np.ndarray]:
    """The goals that solve the world's task, tick by tick; ends a moment after the last move.

    It begins where the arms are: one that is not in its start pose goes there first, with open jaws. Cubes that are sorted
    stay where they are.
    """
    arms = [_Arm(world, index, misses) for index in range(world.n_arms)]
    plans: list[Goals]
    match world.task.name:
        case "lift":
            plans = [_lift(arms[0])]
        case "stack":
            plans = [_stack(arms[0])]
        case "sort":
            centre, first = _Turn(), min(arms, key=_Arm.precedence)
            plans = [
                _sort_side(arm, color, centre, first=arm is first)
                for arm, color in zip(arms, _COLORS, strict=True)
            ]
        case other:
            raise ValueError(f"There is no expert for the task {other!r}.")
    rest = round(_REST / TICK)
    while rest > 0:
        moved = False
        for arm, plan in zip(arms, plans, strict=False):
            goal = next(plan, None)
            if goal is not None:
                arm.goal, moved = goal, True
        rest -= not moved
        yield np.concatenate([arm.goal for arm in arms])


def follow(world: World, goals: np.ndarray) -> None:
    """One tick in which every arm gets its goals: (6,) or (12,) rad, left arm first."""
    for arm in range(world.n_arms):
        world.set_goal(arm, goals[6 * arm : 6 * arm + 6])
    world.step(TICK)


def run_episode(world: World) -> bool:
    """Let the expert work in lock step until it succeeds or the task's time is over; whether it succeeded."""
    for goals in expert(world):
        follow(world, goals)
        if world.success() or world.time >= world.task.duration:
            break
    return world.success()


class _Turn:
    """Whose turn it is in the middle of the table, where both arms would meet."""

    def __init__(self) -> None:
        self.owner: int | None = None

    def take(self, arm: _Arm) -> Goals:
        while self.owner is not None:
            yield arm.goal
        self.owner = arm.index

    def give(self) -> None:
        self.owner = None


class EmptyJaws:
    """Sees a grasp of one arm come up without a cube."""

    def __init__(self, world: World, arm: int) -> None:
        self._world, self._arm = world, arm
        self._kinematics = ArmKinematics(world.model, world.task.layout.prefixes[arm])
        self._shut = 0

    def come_up(self) -> bool:
        """To be asked once in every tick: true in the one in which a grasp is known to be empty."""
        self._shut = self._shut + 1 if self._world.goal(self._arm)[5] < _SHUT_BEYOND else 0
        if self._shut != _UP_AFTER:
            return False
        at, _ = self._kinematics.forward(self._world.positions(self._arm), _FLUSH)
        cubes = [self._world.cube_position(cube.name) for cube in self._world.task.layout.cubes]
        return not any(cube[2] > _HELD_UP and np.linalg.norm(cube - at) < _NEAR for cube in cubes)


class _Arm:
    """One arm's goal and the moves that change it."""

    def __init__(self, world: World, index: int, misses: Misses | None) -> None:
        self.world, self.index, self.misses = world, index, misses
        self.kinematics = ArmKinematics(world.model, world.task.layout.prefixes[index])
        self.goal = world.goal(index)
        self.home = np.array(world.task.start_poses[index], dtype=float)

    # Moves

    def wait(self, seconds: float) -> Goals:
        """Hold the goal."""
        for _ in range(round(seconds / TICK)):
            yield self.goal

    def joints(self, target: np.ndarray, speed: float = MAX_GOAL_SPEED) -> Goals:
        """Move in joint space, all joints at once, smoothly."""
        start = self.goal
        distance = float(np.abs(target - start).max())
        for share in _smooth(math.ceil(_PEAK * distance / (speed * TICK))):
            yield start + share * (target - start)

    def jaw(self, angle: float, speed: float = MAX_GOAL_SPEED) -> Goals:
        """Move the jaw alone."""
        yield from self.joints(np.array([*self.goal[:5], angle]), speed)

    def line(self, target: np.ndarray, yaw: float, offset: np.ndarray, seconds: float) -> Goals:
        """Move the gripper's point `offset` straight to `target`, in at least `seconds`."""
        start, _ = self.kinematics.forward(self.goal, offset)
        ticks = max(1, round(seconds / TICK))
        while True:
            path = [self.goal]
            for share in _smooth(ticks):
                path.append(self._at(start + share * (target - start), yaw, offset, path[-1]))
            fastest = float(np.abs(np.diff(path, axis=0)).max()) / TICK
            if fastest <= MAX_GOAL_SPEED:
                break
            ticks = math.ceil(ticks * max(1.05, fastest / MAX_GOAL_SPEED))
        yield from path[1:]

    def over(self, target: np.ndarray, yaw: float, offset: np.ndarray) -> Goals:
        """Move in joint space until the gripper's point `offset` is at `target`, the jaw unchanged."""
        yield from self.joints(self._at(target, yaw, offset, self._ready(target)))

    def _ready(self, target: np.ndarray) -> np.ndarray:
        """A guess near the wanted pose: turned towards the target, elbow up."""
        heading = math.atan2(*(target[:2] - self.kinematics.pan_axis)[::-1])
        return np.array([-heading, -0.2, 0.6, 1.1, 0.0, self.goal[5]])

    def _at(self, point: np.ndarray, yaw: float, offset: np.ndarray, start: np.ndarray) -> np.ndarray:
        reach = float(np.hypot(*(point[:2] - self.kinematics.pan_axis)))
        lean_from = float(np.interp(reach, _LEAN_REACH, _LEAN_FROM))
        tilt = min(_MAX_LEAN, max(0.0, (point[2] - lean_from) * _LEAN_RATE))
        angles = self.kinematics.solve(GraspPose(point, yaw, tilt), offset, start)
        return np.array([*angles, self.goal[5]])

    def _reaches(self, point: np.ndarray, yaw: float) -> bool:
        """Whether the arm can come down to a point from above."""
        try:
            for target in (_raised(point, _HOVER - _ON_TABLE), point):
                self._at(target, yaw, _CLEAR, self._ready(target))
        except UnreachableError:
            return False
        return True

    # What is there

    def precedence(self) -> tuple[bool, int]:
        """Which arm of sort goes first, the smallest one: who is in the middle, then who has more left to do."""
        here, _ = self.kinematics.forward(self.goal, _FLUSH)
        return abs(here[1]) > _MIDDLE, -len(self.waiting(_COLORS[self.index]))

    def waiting(self, color: str) -> list[str]:
        """The cubes of a colour that are not on their mat."""
        return [name for name in _cubes(color) if not on_its_mat(name, self.world.cube_position(name))]

    # Skills

    def _beside(self, cube: str, beside: np.ndarray) -> np.ndarray:
        """The point at which the gripper grasps a cube on the table, or so far (2,) beside it, metres."""
        return np.array([*(self.world.cube_position(cube)[:2] + beside), _ON_TABLE])

    def grasp_yaw(self, cube: str) -> float:
        """The direction in which the jaws open: square to the cube, as nearly away from the base as can be."""
        position, rotation = self.world.cube_position(cube), self.world.cube_rotation(cube)
        heading = math.atan2(*(position[:2] - self.kinematics.pan_axis)[::-1])
        return _nearest_quarter(math.atan2(rotation[1, 0], rotation[0, 0]), heading)

    def ready(self) -> Goals:
        """Rise from the table and go to the start pose with open jaws; nothing to do for an arm that is there."""
        if np.allclose(self.goal, self.home):
            return
        here, rotation = self.kinematics.forward(self.goal, _CLEAR)
        if here[2] < _HOVER:
            yaw = math.atan2(rotation[1, 0], rotation[0, 0])
            # Not in a straight line: the wrist may be tilted in another way than a line would have it.
            yield from self.joints(self._at(np.array([*here[:2], _HOVER]), yaw, _CLEAR, self.goal))
        yield from self.joints(self.home)

    def pick(self, cube: str) -> Goals:
        """Grasp a cube and raise it."""
        if self.misses is not None:
            self.misses.under_way = True
            yield from self._miss(cube, self.misses.rng)
            self.misses.under_way = False
            if self.world.cube_position(cube)[2] > CUBE_EDGE:
                return  # caught all the same
            yield from self.ready()
        yield from self._grasp(cube)

    def _grasp(self, cube: str, beside: np.ndarray = _CENTRED, turn: float = 0.0) -> Goals:
        """Come down over a cube, shut the jaws, and rise; `beside` (2,) metres and `turn` (rad) miss it."""
        at, yaw = self._beside(cube, beside), self.grasp_yaw(cube) + turn
        yield from self.over(_raised(at, _HOVER - _ON_TABLE), yaw, _CLEAR)
        yield from self.line(at, yaw, _CLEAR, 0.6)
        yield from self.jaw(_SHUT)
        yield from self.wait(0.2)
        held, _ = self.kinematics.forward(self.goal, _FLUSH)
        yield from self.line(np.array([*held[:2], _CARRY]), yaw, _FLUSH, 0.6)

    def _miss(self, cube: str, rng: np.random.Generator) -> Goals:
        """Grasp beside a cube, and any part of the way home with shut jaws."""
        for _ in range(_TRIES):
            side = rng.uniform(-math.pi, math.pi)
            beside = rng.uniform(*_MISS_BESIDE) * np.array([math.cos(side), math.sin(side)])
            turn = rng.uniform(-_MISS_TURN, _MISS_TURN)
            if self._reaches(self._beside(cube, beside), self.grasp_yaw(cube) + turn):
                break
        yield from self._grasp(cube, beside, turn)
        way_home = list(self.joints(np.array([*self.home[:5], _SHUT])))
        yield from way_home[: rng.integers(len(way_home) + 1)]

    def place(self, cube: str, target: np.ndarray, yaw: float, hover: float) -> Goals:
        """Bring the held cube over `target`, put it down there, let go and rise."""
        offset = self._held_at(cube)
        above = _raised(target, hover)
        yield from self.over(above, yaw, offset)
        yield from self.wait(0.2)
        # What the cube moved between the pads since the grasp is known now.
        offset = self._held_at(cube)
        yield from self.line(target, yaw, offset, 0.8)
        yield from self.wait(0.2)
        yield from self.jaw(_OPEN)
        back = target - 0.006 * np.array([math.cos(yaw), math.sin(yaw), 0.0])
        yield from self.line(back, yaw, offset, 0.2)
        yield from self.line(_raised(back, hover), yaw, offset, 0.5)

    def _held_at(self, cube: str) -> np.ndarray:
        """Where the cube's centre really is in the gripper's frame."""
        origin, rotation = self.kinematics.forward(self.world.positions(self.index), np.zeros(3))
        return rotation.T @ (self.world.cube_position(cube) - origin)


def _lift(arm: _Arm) -> Goals:
    yield from arm.ready()
    yield from arm.pick("red_cube")
    yield from arm.joints(np.array([*arm.home[:5], _SHUT]))


def _stack(arm: _Arm) -> Goals:
    yield from arm.ready()
    yield from arm.pick("red_cube")
    target = _raised(arm.world.cube_position("green_cube"), CUBE_EDGE + 0.001)
    yield from arm.place("red_cube", target, arm.grasp_yaw("green_cube"), hover=0.04)
    yield from arm.joints(arm.home)


def _sort_side(arm: _Arm, color: str, centre: _Turn, first: bool) -> Goals:
    if first:
        yield from centre.take(arm)
    else:
        # The other arm begins; asking one tick later settles who does.
        yield arm.goal
    yield from arm.ready()
    side = math.copysign(1.0, goal_slots(color)[0][1])
    left = arm.waiting(color)
    for slot in _free_slots(arm, color, left):
        if centre.owner != arm.index:
            yield from centre.take(arm)
        # The one further out, by what is seen: cubes of a colour look the same, and so no name can tell which is next.
        cube = max(left, key=lambda name: side * arm.world.cube_position(name)[1])
        left.remove(cube)
        yield from arm.pick(cube)
        way_out = list(arm.joints(np.array([*arm.home[:5], _SHUT])))
        for tick, goal in enumerate(way_out):
            # The other arm needs as long to come in as this one to be gone.
            if tick == len(way_out) // 2:
                centre.give()
            yield goal
        target = np.array([*slot, _ON_TABLE + 0.001])
        heading = math.atan2(*(target[:2] - arm.kinematics.pan_axis)[::-1])
        yield from arm.place(cube, target, heading, hover=0.06)
    yield from arm.joints(arm.home)


def _free_slots(arm: _Arm, color: str, left: list[str]) -> list[tuple[float, float]]:
    """A place on the mat for each cube that is left, in their own order, those first that are furthest from the cubes that lie there."""
    there = [arm.world.cube_position(name)[:2] for name in _cubes(color) if name not in left]

    def taken(slot: tuple[float, float]) -> float:
        return -min((float(np.hypot(*(cube - slot))) for cube in there), default=math.inf)

    return sorted(goal_slots(color), key=taken)[: len(left)]


def _cubes(color: str) -> tuple[str, str]:
    return f"{color}_cube_1", f"{color}_cube_2"


def _raised(point: np.ndarray, height: float) -> np.ndarray:
    return point + np.array([0.0, 0.0, height])


def _smooth(ticks: int) -> Iterator[float]:
    """Shares of a move after each tick: a cubic smooth-step that ends at 1."""
    for tick in range(1, max(1, ticks) + 1):
        share = tick / max(1, ticks)
        yield share * share * (3.0 - 2.0 * share)


def _nearest_quarter(yaw: float, wanted: float) -> float:
    """The angle nearest to `wanted` among `yaw` and its quarter turns: all look the same on a cube."""
    return yaw + round((wanted - yaw) / (math.pi / 2.0)) * (math.pi / 2.0)
