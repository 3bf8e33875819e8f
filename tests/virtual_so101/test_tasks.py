"""Resets and success tests of the three tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from virtual_so101.tasks import TASKS, get_task, goal_slots

PROMPTS = {
    "lift": "lift up the red cube",
    "sort": "sort the cubes by color",
    "stack": "stack the red cube on the green cube",
}


@dataclass
class Table:
    """Cubes where a test wants them."""

    positions: dict[str, tuple[float, float, float]]
    speeds: dict[str, float] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)

    def cube_position(self, name: str) -> np.ndarray:
        """Centre of a cube."""
        return np.array(self.positions[name])

    def cube_speed(self, name: str) -> float:
        """Speed of a cube."""
        return self.speeds.get(name, 0.0)

    def held(self, name: str) -> bool:
        """Whether an arm touches it."""
        return name in self.touched


@pytest.mark.parametrize("name", sorted(TASKS))
def test_prompts_and_arms(name: str) -> None:
    """The prompts that policies are trained with; sort needs two arms, the others one."""
    task = get_task(name)
    assert task.prompt == PROMPTS[name]
    assert task.arms == (2 if name == "sort" else 1)
    assert len(task.start_poses) == task.arms


def test_unknown_tasks_and_arm_numbers_are_refused() -> None:
    """With a sentence that says what there is."""
    with pytest.raises(ValueError, match="choose one of lift, sort, stack"):
        get_task("fold")
    with pytest.raises(ValueError, match="2 arms, not with 1"):
        get_task("sort", 1)


@pytest.mark.parametrize(
    ("name", "arms"), [("lift", 1), ("lift", 2), ("stack", 1), ("stack", 2), ("sort", 2)]
)
def test_cubes_lie_apart_and_within_reach(name: str, arms: int) -> None:
    """For many seeds: on the table before the arms, with room for the jaws between any two cubes."""
    task = get_task(name, arms)
    names = {cube.name for cube in task.layout.cubes}
    spots = []
    for seed in range(100):
        placed = task.place(np.random.default_rng(seed))
        assert set(placed) == names
        points = np.array([spot[:2] for spot in placed.values()])
        assert np.all((points[:, 0] >= 0.15) & (points[:, 0] <= 0.30))
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[:i]]
        assert min(gaps, default=1.0) >= 0.065
        spots.append(points[0])
    assert np.ptp(spots, axis=0).min() > 0.08


def test_lift_wants_five_centimetres() -> None:
    """The cube's centre starts at 1.5 cm."""
    condition = get_task("lift").condition
    assert condition(Table({"red_cube": (0.2, 0.0, 0.066)}))
    assert not condition(Table({"red_cube": (0.2, 0.0, 0.064)}))


def test_stack_wants_the_red_cube_on_the_green_one_and_let_go() -> None:
    """On top, at rest, untouched; beside it, held, or moving is not enough."""
    condition = get_task("stack").condition
    on_top = {"green_cube": (0.2, 0.0, 0.015), "red_cube": (0.205, 0.0, 0.045)}
    assert condition(Table(on_top))
    assert not condition(Table(on_top, touched={"red_cube"}))
    assert not condition(Table(on_top, speeds={"red_cube": 0.1}))
    assert not condition(Table({**on_top, "red_cube": (0.23, 0.0, 0.045)}))
    assert not condition(Table({**on_top, "red_cube": (0.24, 0.0, 0.015)}))


def test_sort_wants_every_cube_on_its_mat() -> None:
    """Red to the left, blue to the right, all let go."""
    condition = get_task("sort").condition
    done = {
        f"{color}_cube_{number}": (*slot, 0.015)
        for color in ("red", "blue")
        for number, slot in enumerate(goal_slots(color), start=1)
    }
    assert condition(Table(done))
    assert not condition(Table(done, touched={"blue_cube_2"}))
    swapped = {**done, "red_cube_1": done["blue_cube_1"], "blue_cube_1": done["red_cube_1"]}
    assert not condition(Table(swapped))
    assert not condition(Table({**done, "red_cube_2": (0.2, 0.0, 0.015)}))
    assert done["red_cube_1"][1] > 0 > done["blue_cube_1"][1]
