"""ACT and Diffusion through our policy against LeRobot's own path, written here with LeRobot's public functions."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from env_client.wire import ErrorCode, InvalidInput, RtcPrefix, WireError
from lerobot_reference import Reference
from small_checkpoints import observation, save_act, save_diffusion

from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import Policy, PolicyError, PolicyRequest

SEED = 42
# In robot units (the joints span 200): float32 through two routes that should do the same arithmetic.
EXACT = 1e-5


@pytest.fixture(scope="module")
def our_act(act) -> Policy:
    return load_policy(act, device="cpu", optimize="none")


@pytest.fixture(scope="module")
def our_diffusion(diffusion) -> Policy:
    """DDPM, 20 steps, with noise that repeats."""
    return load_policy(diffusion, device="cpu", optimize="none", noise_seed=SEED)


def test_act_equals_lerobot(act, our_act):
    """The chunk, its shape and its units are those of LeRobot's in-process path."""
    reference = Reference(act)
    for seed in range(3):
        obs = observation(seed)
        actions = our_act.get_actions(obs)
        assert actions.shape == (our_act.spec.horizon, our_act.spec.action_dim) == (10, 6)
        assert actions.dtype == np.float32
        np.testing.assert_allclose(actions, reference.chunk(obs), atol=EXACT, rtol=0)


def test_auto_speed_ups_stay_within_their_tolerance(act, our_act):
    """optimize=auto changes an action by less than 1e-4 of its range of about 100."""
    quick = load_policy(act, device="cpu")
    for seed in range(3):
        obs = observation(seed)
        np.testing.assert_allclose(quick.get_actions(obs), our_act.get_actions(obs), atol=0.01, rtol=0)


def test_diffusion_ddpm_with_history_equals_lerobot(diffusion, our_diffusion):
    """Two consecutive ticks, fixed noise, the noise of every DDPM step included."""
    before, now = observation(1), observation(2)
    actions = our_diffusion.get_actions(now, history=(before,))
    assert actions.shape == (5, 6)
    np.testing.assert_allclose(
        actions, Reference(diffusion).chunk(before, now, seed=SEED), atol=EXACT, rtol=0
    )


def test_diffusion_ddim_with_history_equals_lerobot(diffusion):
    """The overrides of the scheduler and its steps are LeRobot's own settings."""
    options = {"noise_scheduler": "DDIM", "num_inference_steps": 4, "optimize": "none"}
    ours = load_policy(diffusion, device="cpu", noise_seed=SEED, **options)
    reference = Reference(diffusion, noise_scheduler_type="DDIM", num_inference_steps=4)
    before, now = observation(1), observation(2)
    np.testing.assert_allclose(
        ours.get_actions(now, history=(before,)), reference.chunk(before, now, seed=SEED), atol=EXACT, rtol=0
    )


def test_without_history_the_current_frame_is_repeated(our_diffusion):
    """A first tick looks like two equal ticks; of a history that is too long only the last ticks count."""
    now, before, long_ago = observation(2), observation(1), observation(0)
    alone = our_diffusion.get_actions(now)
    np.testing.assert_array_equal(alone, our_diffusion.get_actions(now, history=(now,)))
    with_history = our_diffusion.get_actions(now, history=(before,))
    assert not np.allclose(alone, with_history)
    np.testing.assert_array_equal(with_history, our_diffusion.get_actions(now, history=(long_ago, before)))


def test_noise_is_fresh_without_a_seed_and_repeats_with_one(diffusion, our_diffusion):
    now = observation(2)
    np.testing.assert_array_equal(our_diffusion.get_actions(now), our_diffusion.get_actions(now))
    fresh = load_policy(diffusion, device="cpu", noise_scheduler="DDIM", num_inference_steps=2)
    assert not np.allclose(fresh.get_actions(now), fresh.get_actions(now))


@pytest.mark.parametrize("family", ["our_act", "our_diffusion"])
def test_a_batch_gives_each_request_what_it_gets_alone(family, request):
    """Also the noise of each DDPM step is the request's own."""
    policy = request.getfixturevalue(family)
    requests = [PolicyRequest(observation(i), history=(observation(i + 50),)) for i in range(3)]
    assert len({policy.check(one) for one in requests}) == 1
    together = policy.get_actions_batch(requests)
    for one, actions in zip(requests, together, strict=True):
        alone = policy.get_actions_batch([one])[0]
        np.testing.assert_allclose(actions, alone, atol=1e-3, rtol=0)


def test_the_spec_says_what_the_policy_takes_and_gives(our_diffusion):
    spec = our_diffusion.spec
    assert (spec.type, spec.n_obs_steps, spec.horizon, spec.action_dim, spec.fps) == (
        "diffusion",
        2,
        5,
        6,
        30.0,
    )
    assert [(c.name, c.height, c.width, c.resize) for c in spec.cameras] == [
        ("front", 48, 64, "none"),
        ("wrist", 48, 64, "none"),
    ]
    assert [(part.name, part.size) for part in spec.states] == [("arm", 6)]
    assert spec.action_names[5] == "gripper.pos"
    assert spec.unit == "normalized"
    assert isinstance(our_diffusion, Policy)


def test_n_action_steps_cuts_the_chunk(act, our_act, diffusion):
    """For ACT it shortens the same chunk; for Diffusion it may also lengthen it up to what is predicted."""
    obs = observation(1)
    short = load_policy(act, device="cpu", optimize="none", n_action_steps=4)
    assert short.spec.horizon == 4
    np.testing.assert_array_equal(short.get_actions(obs), our_act.get_actions(obs)[:4])
    options = {"device": "cpu", "noise_scheduler": "DDIM", "num_inference_steps": 2}
    longest = load_policy(diffusion, n_action_steps=7, **options)
    assert longest.get_actions(obs).shape == (7, 6)
    with pytest.raises(PolicyError, match="n_action_steps is 8, but the checkpoint predicts 7"):
        load_policy(diffusion, n_action_steps=8, **options)
    with pytest.raises(PolicyError, match="n_action_steps is 11, but the checkpoint predicts 10"):
        load_policy(act, n_action_steps=11)


def test_a_half_precision_checkpoint_runs_in_float32(tmp_path, our_act):
    """Checkpoints ship in float16; the arithmetic stays float32 and the answer close."""
    policy = load_policy(save_act(tmp_path / "half", half=True), device="cpu", optimize="none")
    assert {p.dtype for p in policy._model.parameters()} == {torch.float32}
    obs = observation(1)
    np.testing.assert_allclose(policy.get_actions(obs), our_act.get_actions(obs), atol=1.0)


def test_bfloat16_answers_in_float32(act, our_act):
    policy = load_policy(act, device="cpu", dtype="bfloat16")
    actions = policy.get_actions(observation(1))
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, our_act.get_actions(observation(1)), atol=4.0)


def test_two_arms_with_a_camera_of_their_own(tmp_path):
    """12 values of state are two arms, left first; a camera that only the checkpoint knows keeps its name."""
    cameras = ("front", "left_wrist", "right_wrist", "ceiling")
    policy = load_policy(save_act(tmp_path / "two", cameras, dim=12), device="cpu")
    assert [part.name for part in policy.spec.states] == ["left_arm", "right_arm"]
    assert policy.spec.action_names[0] == "left_shoulder_pan.pos"
    assert tuple(camera.name for camera in policy.spec.cameras) == cameras
    obs = observation(1, cameras, dim=12)
    actions = policy.get_actions(obs)
    assert actions.shape == (10, 12)
    swapped = obs | {
        "states": {"left_arm": obs["states"]["right_arm"], "right_arm": obs["states"]["left_arm"]}
    }
    assert not np.allclose(actions, policy.get_actions(swapped))


def test_a_checkpoint_saved_while_compiled_loads_strictly(tmp_path, diffusion, our_diffusion):
    """The compiler's names are read, and the U-Net is never left random."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(diffusion, tmp_path / "compiled")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("diffusion.unet.", "diffusion.unet._orig_mod."): t for name, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"compile_model": True}))
    policy = load_policy(folder, device="cpu", optimize="none", noise_seed=SEED)
    obs = observation(4)
    np.testing.assert_array_equal(policy.get_actions(obs), our_diffusion.get_actions(obs))


def test_one_observed_tick_needs_no_history(tmp_path):
    """A Diffusion checkpoint with n_obs_steps 1 gets its time axis all the same."""
    folder = save_diffusion(tmp_path / "one", ("front",), n_obs_steps=1)
    policy = load_policy(folder, device="cpu", noise_seed=SEED, optimize="none")
    obs = observation(1, ("front",))
    np.testing.assert_allclose(
        policy.get_actions(obs), Reference(folder).chunk(obs, seed=SEED), atol=EXACT, rtol=0
    )


def test_nothing_that_was_passed_in_changes(our_act):
    obs = observation(1)
    for image in obs["images"].values():
        image.flags.writeable = False
    before = copy.deepcopy(obs)
    our_act.get_actions(obs)
    for name, image in before["images"].items():
        np.testing.assert_array_equal(image, obs["images"][name])
    np.testing.assert_array_equal(before["states"]["arm"], obs["states"]["arm"])
    assert obs.keys() == before.keys()


def test_actions_that_are_not_finite_never_leave(act, monkeypatch):
    """The server turns this into an INTERNAL error; no number of it reaches a motor."""
    policy = load_policy(act, device="cpu", optimize="none")
    bad = torch.zeros(1, 10, 6)
    bad[0, 3, 2] = float("nan")
    monkeypatch.setattr(policy._model, "predict_action_chunk", lambda batch: bad)
    with pytest.raises(WireError, match="not finite") as caught:
        policy.get_actions(observation(1))
    assert caught.value.code == ErrorCode.INTERNAL


def test_real_time_chunking_is_refused_where_there_is_no_flow(our_act):
    prefix = RtcPrefix(np.zeros((4, 6), np.float32), delay=2, mask_end=4)
    with pytest.raises(InvalidInput, match="rtc"):
        our_act.check(PolicyRequest(observation(1), rtc=prefix))


def test_warm_up_and_close(act):
    policy = load_policy(act, device="cpu")
    policy.warm_up()
    policy.close()
