"""Episodes of the scripted experts. `python expert_runs.py TASK FIRST STOP STEP` prints the seeds that were not solved, as JSON."""

import json
import sys
from collections.abc import Iterable

from virtual_so101.expert import run_episode
from virtual_so101.world import World

__all__ = ["failures"]


def failures(task: str, seeds: Iterable[int], arms: int | None = None) -> list[int]:
    """Seeds at which the expert does not solve the task within its time."""
    world = World(task, arms)
    failed = []
    for seed in seeds:
        world.reset(seed)
        if not run_episode(world):
            failed.append(seed)
    return failed


if __name__ == "__main__":
    print(json.dumps(failures(sys.argv[1], range(*map(int, sys.argv[2:])))))
