"""A policy at the arms until it fails, and the expert that takes over from there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from needs_gl import needs_gl
from numpy_policy import write_checkpoint
from serving_parts import serving
from virtual_so101 import dataset
from virtual_so101.dataset import main
from virtual_so101.expert import MAX_GOAL_SPEED, TICK, EmptyJaws, Misses, expert, follow
from virtual_so101.learner import until_it_fails
from virtual_so101.world import World


def ticks(world: World, misses: Misses | None) -> Iterator[None]:
    """The expert in the place of a policy: one that misses, or one that does not."""
    for goals in expert(world, misses):
        follow(world, goals)
        yield


def after_misses(world: World, count: int) -> None:
    """Let an expert that misses work until its so many-th miss is over."""
    misses, over, before = Misses(np.random.default_rng(1)), 0, False
    for goals in expert(world, misses):
        over += before and not misses.under_way
        if over == count:
            return
        follow(world, goals)
        before = misses.under_way
    raise AssertionError(f"only {over} misses")


@pytest.mark.parametrize("misses", [1, 3])
def test_the_expert_goes_on_from_where_another_failed(misses: int) -> None:
    """Arms anywhere, jaws shut, cubes on their mats or not: no goal jumps, and the cubes are sorted in the end."""
    world = World("sort", seed=300001)
    after_misses(world, misses)
    last = np.concatenate([world.goal(arm) for arm in range(2)])
    for goals in expert(world):
        assert np.abs(goals - last).max() / TICK <= MAX_GOAL_SPEED + 1e-3
        last = goals
        follow(world, goals)
    assert world.success()


def test_what_is_sorted_stays_where_it_is() -> None:
    """An expert that finds its work done goes home and ends."""
    world = World("sort", seed=0)
    for goals in expert(world):
        follow(world, goals)
    cubes = [cube.name for cube in world.task.layout.cubes]
    before = np.array([world.cube_position(name) for name in cubes])
    count = 0
    for goals in expert(world):
        follow(world, goals)
        count += 1
    assert count * TICK < 5.0
    after = np.array([world.cube_position(name) for name in cubes])
    np.testing.assert_allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("task", ["lift", "sort"])
def test_a_grasp_that_comes_up_empty_is_seen(task: str) -> None:
    """Not one of those that succeed, of either arm."""
    world = World(task, seed=3)
    jaws = [EmptyJaws(world, arm) for arm in range(world.n_arms)]
    for goals in expert(world):
        follow(world, goals)
        assert [jaw.come_up() for jaw in jaws] == [False] * world.n_arms
    assert world.success()

    world.reset(3)
    misses, seen = Misses(np.random.default_rng(1)), 0
    for goals in expert(world, misses):
        follow(world, goals)
        came_up = sum([jaw.come_up() for jaw in jaws])
        assert misses.under_way or not came_up
        seen += came_up
    assert seen >= world.n_arms


def test_a_learner_is_stopped_at_a_failure_and_not_before() -> None:
    """One that solves the task is left alone; one that misses is stopped with empty jaws, now and then after a second miss."""
    world = World("lift", seed=3)
    assert not until_it_fails(world, ticks(world, None))
    assert world.success()
    stopped = 0
    for seed in range(6):
        world.reset(seed)
        failed = until_it_fails(world, ticks(world, Misses(np.random.default_rng(1))))
        assert failed is not world.success()
        assert failed is bool(world.cube_position("red_cube")[2] < 0.02)
        stopped += failed
    assert 0 < stopped < 6


@needs_gl
def test_what_follows_a_served_policys_failure_is_recorded(tmp_path: Path) -> None:
    """Over a real socket: the first frame shows the arm where the policy left it, and the expert lifts the cube."""
    pytest.importorskip("lerobot")
    root = tmp_path / "lift"
    cameras = [{"name": name, "height": 24, "width": 32, "resize": "stretch"} for name in ("front", "wrist")]
    checkpoint = write_checkpoint(tmp_path / "wave", amplitude=8.0, cameras=cameras)
    wanted = f"--root {root} --episodes 1 --image-size 96x128 --seed 40 --shrink 2".split()
    with serving("--policy.path", checkpoint) as (_, port):
        assert main([*wanted, "--learner", f"ws://127.0.0.1:{port}"]) == 0
    note = json.loads((root / "virtual_so101.json").read_text())
    assert note["seeds"] == [40]
    assert len(note["settings"]["learner"]) > 8

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    first = LeRobotDataset("local/lift", root=root, video_backend="pyav")[0]
    world = World("lift", seed=40)
    start = world.calibrations[0].to_normalized(world.positions(0))
    assert np.abs(first["observation.state"].numpy() - start).max() > 3.0


@needs_gl
def test_a_learner_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server at the address; a policy of another robot. Nothing is recorded."""
    monkeypatch.setattr(dataset, "_CONNECT_S", 0.5)
    root = tmp_path / "sort"
    wanted = ["--task", "sort", "--root", str(root), "--episodes", "1", "--image-size", "96x128"]
    assert main([*wanted, "--learner", "ws://127.0.0.1:9"]) == 1
    assert "no policy server answered" in capsys.readouterr().err
    checkpoint = write_checkpoint(tmp_path / "one_arm")
    with serving("--policy.path", checkpoint) as (_, port):
        assert main([*wanted, "--learner", f"ws://127.0.0.1:{port}"]) == 1
    assert (
        "the policy gives 6 actions in normalized; the virtual robot of sort takes 12"
        in capsys.readouterr().err
    )
