"""The NumPy policy: found by its entry point, deterministic, and as faulty as its config.json says."""

import subprocess
import sys

import numpy as np
import pytest
from env_client.wire import InvalidInput
from numpy_policy import Options, expected_chunk, write_checkpoint

from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import Policy, PolicyError, PolicyRequest

SMALL = ({"name": "front", "height": 12, "width": 16},)


def observation(shade: int = 0, reach: float = 0.0) -> dict:
    return {
        "images": {"front": np.full((12, 16, 3), shade, np.uint8)},
        "states": {"arm": np.full(6, reach, np.float32)},
        "task": "",
    }


def test_it_is_found_through_its_entry_point(tmp_path):
    """A checkpoint of a type that only a plug-in knows loads and answers in the declared shape."""
    policy = load_policy(write_checkpoint(tmp_path, horizon=7, cameras=SMALL))
    assert isinstance(policy, Policy)
    actions = policy.get_actions(observation())
    assert actions.shape == (7, 6)
    assert actions.dtype == np.float32


def test_the_answer_depends_on_pixels_state_history_and_prompt(tmp_path):
    """One changed pixel, state, tick or prompt changes the chunk; the same request repeats it."""
    options = {"n_obs_steps": 2, "cameras": SMALL}
    policy = load_policy(write_checkpoint(tmp_path, **options))
    base = policy.get_actions(observation(1))
    assert np.array_equal(base, policy.get_actions(observation(1)))
    assert np.array_equal(base, expected_chunk(Options(**options), observation(1)))
    for other in (
        policy.get_actions(observation(2)),
        policy.get_actions(observation(1, reach=0.5)),
        policy.get_actions(observation(1), history=(observation(9),)),
        policy.get_actions(observation(1), prompt="lift up the red cube"),
    ):
        assert not np.array_equal(base, other)


def test_a_batch_answers_like_each_alone(tmp_path):
    policy = load_policy(write_checkpoint(tmp_path, cameras=SMALL))
    requests = [PolicyRequest(observation(i)) for i in range(3)]
    for alone, together in zip(
        [policy.get_actions(r.obs) for r in requests], policy.get_actions_batch(requests), strict=True
    ):
        assert np.array_equal(alone, together)


def test_faults_come_as_configured(tmp_path):
    """NaN, a wrong dimension and an exception leave the policy raw, or only for one prompt."""

    def faulty(behaviour: str, **options):
        return load_policy(
            write_checkpoint(tmp_path / behaviour, behaviour=behaviour, cameras=SMALL, **options)
        )

    assert np.isnan(faulty("nan").get_actions(observation())).sum() == 1
    assert faulty("wrong_dim").get_actions(observation()).shape == (16, 7)
    with pytest.raises(RuntimeError, match="raises"):
        faulty("raise").get_actions(observation())
    sometimes = faulty("nan", behaviour_prompt="break")
    assert np.isfinite(sometimes.get_actions(observation())).all()
    assert np.isnan(sometimes.get_actions(observation(), prompt="break")).any()


def test_bad_observations_and_bad_options_are_named(tmp_path):
    policy = load_policy(write_checkpoint(tmp_path, cameras=SMALL))
    with pytest.raises(InvalidInput, match="'front' is missing"):
        policy.check(PolicyRequest({"images": {}, "states": {"arm": np.zeros(6, np.float32)}}))
    (tmp_path / "config.json").write_text('{"type": "numpy_test", "horizn": 3}')
    with pytest.raises(PolicyError, match="horizn"):
        load_policy(tmp_path)


def test_loading_needs_no_torch(tmp_path):
    """The loader and the plug-in stay light: neither torch nor LeRobot is imported."""
    folder = write_checkpoint(tmp_path)
    code = (
        "import sys; from grasp_cube.policies.load import load_policy; "
        f"load_policy({str(folder)!r}); print(sorted({{'torch', 'lerobot', 'cv2'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
