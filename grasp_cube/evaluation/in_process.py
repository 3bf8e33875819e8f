"""The policy and the physics in one process, in lock step: what a policy can do without a network and without haste.

Each chunk is asked for at the moment it is used, and executed up to its `chunk_steps`-th action. The same seed
gives the same episode.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grasp_cube.evaluation.episodes import Episode
from grasp_cube.policies.policy import Policy

if TYPE_CHECKING:
    from virtual_so101.world import World

__all__ = ["run_in_process"]


def run_in_process(
    policy: Policy, task: str, seeds: Sequence[int], *, chunk_steps: int, time_s: float
) -> Iterator[Episode]:
    """Yields each seed's episode of at most `time_s` seconds; it ends early when the task is solved.

    Raises `ValueError` when the policy's actions are not those of the task's arms.
    """
    from virtual_so101.calibration import ArmCalibration
    from virtual_so101.expert import TICK
    from virtual_so101.world import World

    world = World(task, seed=seeds[0])
    expected = 6 * world.n_arms
    if policy.spec.action_dim != expected or policy.spec.unit != "normalized":
        raise ValueError(
            f"the policy gives {policy.spec.action_dim} actions in {policy.spec.unit}; the virtual robot of {task} takes "
            f"{expected} in normalized"
        )
    arms = [
        ArmCalibration.of_limits(world.joint_lower, world.joint_upper, arm) for arm in range(world.n_arms)
    ]
    try:
        for seed in seeds:
            world.reset(seed)
            yield _episode(policy, world, arms, seed, chunk_steps, round(time_s / TICK), TICK)
    finally:
        world.close()


def _episode(
    policy: Policy, world: "World", arms: list[Any], seed: int, chunk_steps: int, limit: int, period: float
) -> Episode:
    history: deque[dict[str, Any]] = deque(maxlen=max(1, policy.spec.n_obs_steps - 1))
    chunk: list[np.ndarray] = []
    for step in range(limit):
        # Drawn are the ticks that the next request shows.
        obs = _observation(world, arms) if len(chunk) < policy.spec.n_obs_steps else None
        if not chunk:
            assert obs is not None
            past = tuple(history) if policy.spec.n_obs_steps > 1 else ()
            chunk = list(policy.get_actions(obs, history=past, prompt=world.task.prompt)[:chunk_steps])
        if obs is not None:
            history.append(obs)
        action = chunk.pop(0)
        for arm, calibration in enumerate(arms):
            world.set_goal(arm, calibration.from_normalized(action[6 * arm : 6 * arm + 6]))
        world.step(period)
        if world.success():
            return Episode(seed, True, step + 1)
    return Episode(seed, False, limit)


def _observation(world: "World", arms: list[Any]) -> dict[str, Any]:
    names = ("arm",) if len(arms) == 1 else ("left_arm", "right_arm")
    return {
        "images": {camera: world.render(camera) for camera in world.camera_names},
        "states": {
            name: calibration.to_normalized(world.positions(arm)).astype(np.float32)
            for arm, (name, calibration) in enumerate(zip(names, arms, strict=True))
        },
        "task": world.task.prompt,
    }
