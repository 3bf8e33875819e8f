"""Diffusion's U-Net as products of matrices, and DDIM's step with known coefficients, beside LeRobot's own."""

import pytest
import torch
from lerobot.policies.diffusion.modeling_diffusion import DiffusionConditionalUnet1d
from small_checkpoints import diffusion_config, observation, save_diffusion
from torch import nn

from grasp_cube.policies.diffusion_fast import _step, _UNet
from grasp_cube.policies.fast_layers import Unsupported
from grasp_cube.policies.load import load_policy
from grasp_cube.policies.unet_rows import KEPT_SIZES, RowsUNet

CONDITION = 10


def unet(**options) -> tuple[nn.Module, int]:
    """LeRobot's, of random weights, and its horizon."""
    torch.manual_seed(0)
    config = diffusion_config(**options)
    return DiffusionConditionalUnet1d(config, CONDITION).eval(), config.horizon


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 5, "down_dims": (16, 24, 40), "n_groups": 4},
        {"use_film_scale_modulation": False},
    ],
    ids=["kernel of 3", "kernel of 5, three levels", "no scale"],
)
def test_every_batch_size_gives_what_lerobot_gives(options, one_thread):
    """Also when sizes alternate, since each keeps its own memory, and in and out of inference mode."""
    own, horizon = unet(**options)
    ours = _UNet(own, [7])
    assert isinstance(ours._layers, RowsUNet)
    for number, batch in enumerate((1, 3, 1, 2, 3)):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(batch, horizon, 6, generator=generator)
        condition = torch.randn(batch, CONDITION, generator=generator)
        with torch.inference_mode() if number % 2 else torch.no_grad():
            found = ours(x, ours.films(condition)[0])
            expected = own(x, torch.full((batch,), 7), global_cond=condition)
        assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def test_an_answer_is_not_written_over_by_the_next(one_thread):
    own, horizon = unet()
    ours = _UNet(own, [7])
    with torch.no_grad():
        film = ours.films(torch.zeros(1, CONDITION))[0]
        first = ours(torch.zeros(1, horizon, 6), film)
        kept = first.clone()
        ours(torch.ones(1, horizon, 6), film)
    assert torch.equal(first, kept)


def test_memory_is_kept_for_a_few_batch_sizes_only(one_thread):
    own, horizon = unet()
    ours = _UNet(own, [7])
    with torch.no_grad():
        for batch in range(1, KEPT_SIZES + 4):
            ours(torch.zeros(batch, horizon, 6), ours.films(torch.zeros(batch, CONDITION))[0])
    assert len(ours._layers._memories) == KEPT_SIZES


def test_a_narrow_unet_is_computed_in_one_thread(tmp_path, monkeypatch):
    """And torch's number of threads is as before, also when it fails."""
    policy = load_policy(save_diffusion(tmp_path / "small"), device="cpu")
    seen: list[int] = []
    fails = False
    plain = RowsUNet.__call__

    def watched(self, x, films):
        seen.append(torch.get_num_threads())
        if fails:
            raise RuntimeError("no memory")
        return plain(self, x, films)

    monkeypatch.setattr(RowsUNet, "__call__", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        policy.get_actions(observation(0))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        fails = True
        with pytest.raises(RuntimeError, match="no memory"):
            policy.get_actions(observation(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_convolution_of_another_form_is_not_taken():
    own, _ = unet()
    own.down_modules[0][2] = nn.Conv1d(16, 16, 3, 2, 1, dilation=2)
    with pytest.raises(Unsupported, match="dilation"):
        RowsUNet(own)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [4, 10])
def test_ddim_steps_are_the_schedulers(clip, steps):
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=clip, clip_sample_range=0.8)
    scheduler.set_timesteps(steps)
    step = _step(scheduler)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 6, generator=generator)
    for time in scheduler.timesteps:
        predicted = torch.randn(2, 8, 6, generator=generator)
        expected = scheduler.step(predicted, time, x).prev_sample
        before = x.clone()
        found = step(predicted, time, x)
        assert torch.equal(x, before)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        x = expected


@pytest.mark.parametrize("other", [{"prediction_type": "sample"}, {"thresholding": True}])
def test_other_schedules_take_their_own_steps(other):
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(100, clip_sample=False, **other)
    scheduler.set_timesteps(5)
    x, predicted = torch.randn(1, 8, 6), torch.randn(1, 8, 6)
    time = scheduler.timesteps[1]
    torch.testing.assert_close(
        _step(scheduler)(predicted, time, x), scheduler.step(predicted, time, x).prev_sample
    )
