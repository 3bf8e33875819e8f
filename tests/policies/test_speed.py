"""What `--policy.optimize auto` computes otherwise than LeRobot, against `none`, which is LeRobot's own arithmetic."""

import logging

import numpy as np
import pytest
import torch
from small_checkpoints import observation, save_act, save_diffusion
from torch import nn

from grasp_cube.policies.diffusion_fast import FeatureCache
from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import PolicyRequest
from grasp_cube.policies.speed import BFLOAT16_FROM_PIXELS, TOLERANCES, choose_dtype

SEED = 5
# Of the robot's range, about what one normalised value is in these checkpoints' statistics.
UNIT = 40
CLOSE = UNIT * TOLERANCES[torch.float32]

ACTS = {
    "as LeRobot's defaults": {"use_vae": True, "n_vae_encoder_layers": 1},
    "norms first, two decoder layers": {"pre_norm": True, "n_decoder_layers": 2, "n_encoder_layers": 2},
    "two decoder layers, gelu": {"n_decoder_layers": 2, "feedforward_activation": "gelu"},
}
DIFFUSIONS = {
    # Wide enough that its weights are packed.
    "wide, resized and cropped": {"down_dims": (16, 256), "resize_shape": (40, 56), "crop_ratio": 0.9},
    "an encoder for each camera": {"use_separate_rgb_encoder_per_camera": True},
    "group norm, no scale": {"use_group_norm": True, "use_film_scale_modulation": False},
}


def opened(folder, **options):
    return load_policy(folder, **({"device": "cpu", "noise_seed": SEED} | options))


def awake(folder):
    """A policy whose batch norms have seen something, so that folding them is not the identity."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    random = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".running_" in name or (".bn" in name and name.endswith(("weight", "bias"))):
            tensors[name] = 0.5 + torch.rand(tensor.shape, generator=random)
    save_file(tensors, file)
    return folder


def requests(count: int) -> list[PolicyRequest]:
    return [PolicyRequest(observation(i), history=(observation(i + 20),)) for i in range(count)]


def assert_same_answers(quick, exact, tolerance: float) -> None:
    """Alone and in a batch; and the answers are no constants."""
    asked = requests(3)
    expected = [exact.get_actions_batch([one])[0] for one in asked]
    assert np.abs(expected[0] - expected[1]).max() > 10 * tolerance
    np.testing.assert_allclose(quick.get_actions_batch(asked[:1])[0], expected[0], atol=tolerance, rtol=0)
    for ours, alone in zip(quick.get_actions_batch(asked), expected, strict=True):
        np.testing.assert_allclose(ours, alone, atol=tolerance, rtol=0)


def each(variants: dict[str, dict]) -> pytest.MarkDecorator:
    """All variants; the first one in every run."""
    first, *others = variants
    slow = [pytest.param(variants[name], id=name, marks=pytest.mark.slow) for name in others]
    return pytest.mark.parametrize("options", [pytest.param(variants[first], id=first), *slow])


@each(ACTS)
def test_act_at_speed_answers_as_lerobot(options, tmp_path, one_thread):
    folder = awake(save_act(tmp_path / "act", **options))
    quick, exact = opened(folder), opened(folder, optimize="none")
    assert quick._fast is not None
    assert exact._fast is None
    assert_same_answers(quick, exact, CLOSE)


def test_act_in_bfloat16_stays_within_its_tolerance(act):
    """Also on a processor that has to emulate it."""
    quick, exact = opened(act, dtype="bfloat16"), opened(act, optimize="none")
    assert quick._fast is not None
    for seed in range(3):
        ours, expected = (policy.get_actions(observation(seed)) for policy in (quick, exact))
        difference = np.abs(ours - expected).max()
        assert CLOSE < difference < UNIT * TOLERANCES[torch.bfloat16]


@each(DIFFUSIONS)
def test_diffusion_at_speed_answers_as_lerobot(options, tmp_path, one_thread):
    """DDIM, and DDPM with the noise of each of its steps."""
    folder = awake(save_diffusion(tmp_path / "diffusion", **options))
    for steps in ({"noise_scheduler": "DDIM", "num_inference_steps": 4}, {}):
        quick, exact = opened(folder, **steps), opened(folder, optimize="none", **steps)
        assert quick._fast is not None
        assert_same_answers(quick, exact, CLOSE)


def test_a_frame_is_encoded_once_however_often_it_comes(diffusion):
    """As history, for another request of the batch, and again later; the answers stay those of LeRobot."""
    quick = opened(diffusion, num_inference_steps=2, noise_scheduler="DDIM")
    exact = opened(diffusion, num_inference_steps=2, noise_scheduler="DDIM", optimize="none")
    first, second, third = (observation(seed) for seed in range(3))
    seen = quick._fast.features

    def answer(now, *history) -> int:
        """How many frames this request had encoded."""
        before = seen.encoded
        ours, expected = (policy.get_actions(now, history=history) for policy in (quick, exact))
        np.testing.assert_allclose(ours, expected, atol=CLOSE, rtol=0)
        return seen.encoded - before

    # Two cameras each.
    assert answer(first) == 2
    assert answer(second, first) == 2
    assert answer(third, second) == 2
    assert answer(third, second) == 0
    assert answer(first, third) == 0
    before = seen.encoded
    both = [PolicyRequest(observation(9), history=(third,)), PolicyRequest(observation(9), history=(second,))]
    ours, expected = quick.get_actions_batch(both), exact.get_actions_batch(both)
    np.testing.assert_allclose(ours, expected, atol=CLOSE, rtol=0)
    assert seen.encoded - before == 2
    # One changed value in one image is another frame.
    touched = {name: image.copy() for name, image in third["images"].items()}
    touched["front"][0, 0, 0] ^= 1
    assert answer(third | {"images": touched}, second) == 1
    # The same picture from another camera is another frame, too: it is normalised otherwise.
    swapped = {"front": third["images"]["wrist"], "wrist": third["images"]["front"]}
    assert answer(third | {"images": swapped}, second) == 2


def test_what_is_kept_of_frames_is_bounded():
    """The frame that was used longest ago goes first; shapes count, and where one camera's name ends."""
    cache = FeatureCache(size=2)
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    keys = [
        cache.key("front", pixels),
        cache.key("front", pixels.reshape(4, 2, 3)),
        cache.key("wrist", pixels),
    ]
    assert len(set(keys)) == 3
    cache.put(keys[0], torch.zeros(1))
    cache.put(keys[1], torch.ones(1))
    assert cache.get(keys[0]) is not None
    cache.put(keys[2], torch.ones(1))
    assert [cache.get(key) is not None for key in keys] == [True, False, True]


def test_bfloat16_is_for_large_images_on_a_processor_that_has_it(monkeypatch):
    large, small, cpu = BFLOAT16_FROM_PIXELS, BFLOAT16_FROM_PIXELS - 1, torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_dtype(None, cpu, large) == torch.bfloat16
    assert choose_dtype(None, cpu, small) == torch.float32
    assert choose_dtype("float32", cpu, large) == torch.float32
    assert choose_dtype(None, torch.device("cuda"), large) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    assert choose_dtype(None, cpu, large) == torch.float32
    assert choose_dtype("bfloat16", cpu, small) == torch.bfloat16


@pytest.mark.parametrize("fault", ["raises", "lies", "not finite"])
def test_a_fast_form_that_fails_its_probe_is_not_used(fault, act, monkeypatch, caplog):
    """The policy is LeRobot's then, to the last bit, and the log says so."""
    from grasp_cube.policies import act_fast

    def broken(self, x, places):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        return x + 1 if fault == "lies" else x * float("nan")

    monkeypatch.setattr(act_fast._EncoderLayer, "__call__", broken)
    with caplog.at_level(logging.WARNING):
        policy = opened(act)
    assert policy._fast is None
    assert "fast form of this policy" in caplog.text
    obs = observation(1)
    np.testing.assert_array_equal(policy.get_actions(obs), opened(act, optimize="none").get_actions(obs))


def test_a_network_that_is_no_resnet_is_left_to_lerobot(act, monkeypatch):
    from grasp_cube.policies import fast_layers

    monkeypatch.setattr(fast_layers, "FrozenBatchNorm2d", nn.Dropout)
    lines: list[str] = []
    policy = load_policy(act, device="cpu", report=lines.append)
    assert policy._fast is None
    assert any("LeRobot's own form" in line for line in lines)
    assert policy.get_actions(observation(1)).shape == (10, 6)
