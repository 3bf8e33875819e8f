"""The policy and the physics in one process, in lock step: what a policy can do without a network and without haste.

Each chunk is asked for at the moment it is used, and executed up to its `chunk_steps`-th action. The same seed
gives the same episode.
"""

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
    from virtual_so101.expert import TICK
    from virtual_so101.world import World

    world = World(task, seed=seeds[0])
    try:
        for seed in seeds:
            world.reset(seed)
            yield _episode(policy, world, seed, chunk_steps, round(time_s / TICK))
    finally:
        world.close()


def _episode(policy: Policy, world: "World", seed: int, chunk_steps: int, limit: int) -> Episode:
    from virtual_so101.learner import drive

    def chunks(obs: dict[str, Any], history: tuple[dict[str, Any], ...]) -> np.ndarray:
        return policy.get_actions(obs, history=history, prompt=world.task.prompt)

    ticks = drive(world, policy.spec, chunks, chunk_steps)
    for step in range(limit):
        next(ticks)
        if world.success():
            return Episode(seed, True, step + 1)
    return Episode(seed, False, limit)
