"""A policy in lock step with the physics."""

from typing import Any

import numpy as np
import pytest
from env_client.wire import PolicySpec
from needs_gl import needs_gl
from virtual_so101.dataset import record_episode
from virtual_so101.world import World

from grasp_cube.evaluation.in_process import run_in_process

SEED = 1000


class Replay:
    """Gives back the actions of a recorded episode from where it was asked, in chunks of twenty."""

    def __init__(self, actions: np.ndarray, executed: int, n_obs_steps: int = 1) -> None:
        self.spec = PolicySpec("replay", actions.shape[1], 20, n_obs_steps=n_obs_steps)
        self.metadata: dict[str, Any] = {}
        self.actions, self.executed, self.asked = actions, executed, 0
        self.observations: list[dict[str, Any]] = []
        self.histories: list[tuple[dict[str, Any], ...]] = []

    def get_actions(self, obs: dict[str, Any], *, history: Any = (), prompt: str | None = None) -> np.ndarray:
        assert prompt == "lift up the red cube"
        start = self.asked * self.executed
        self.asked += 1
        self.observations.append(obs)
        self.histories.append(history)
        rows = np.minimum(np.arange(start, start + 20), len(self.actions) - 1)
        return self.actions[rows]


@pytest.fixture(scope="module")
def recorded() -> np.ndarray:
    """What the expert did in the episode of `SEED`, in the robot's unit."""
    world = World("lift", seed=SEED)
    try:
        (frames,) = record_episode(world, size=(48, 64))
    finally:
        world.close()
    return np.stack([frame.action for frame in frames])


@needs_gl
def test_the_experts_own_actions_solve_its_episode(recorded: np.ndarray) -> None:
    """Chunk after chunk: ten actions of each are executed, and the episode ends when the cube is up."""
    policy = Replay(recorded, executed=10)
    (episode,) = run_in_process(policy, "lift", [SEED], chunk_steps=10, time_s=8)
    assert episode.success
    assert policy.asked == -(-episode.steps // 10)
    assert set(policy.observations[0]["images"]) == {"front", "wrist"}
    assert policy.observations[0]["images"]["front"].shape == (480, 640, 3)
    # The arm follows: what is seen after twenty ticks is near what was asked for then.
    assert np.abs(policy.observations[2]["states"]["arm"] - recorded[19]).max() < 12


@needs_gl
def test_another_seed_is_another_episode(recorded: np.ndarray) -> None:
    """The same motion at another cube lifts nothing, and runs to the end of its time."""
    policy = Replay(recorded, executed=20)
    (episode,) = run_in_process(policy, "lift", [SEED + 3], chunk_steps=20, time_s=5)
    assert not episode.success
    assert episode.steps == 150


@needs_gl
def test_a_policy_with_a_history_sees_the_tick_before(recorded: np.ndarray) -> None:
    """None at the first tick; then the observation of the tick right before, not of the last request."""
    policy = Replay(recorded, executed=5, n_obs_steps=2)
    list(run_in_process(policy, "lift", [SEED], chunk_steps=5, time_s=0.5))
    assert [len(history) for history in policy.histories] == [0, 1, 1]
    before, now = policy.histories[1][0], policy.observations[1]
    moved = np.abs(now["states"]["arm"] - before["states"]["arm"]).max()
    assert 0 < moved < np.abs(now["states"]["arm"] - policy.observations[0]["states"]["arm"]).max()


def test_a_policy_of_another_robot_is_refused() -> None:
    """Both numbers are in the sentence."""
    policy = Replay(np.zeros((30, 12), np.float32), executed=10)
    with pytest.raises(ValueError, match=r"12 actions.*takes 6"):
        list(run_in_process(policy, "lift", [SEED], chunk_steps=10, time_s=1))
