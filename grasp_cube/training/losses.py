"""What a training step minimises: LeRobot's losses, and Diffusion's with more than one noise for each image."""

from typing import Any

import torch
from torch.nn import functional

from grasp_cube.training.backbone import FEATURES, encode_features, finish_features

__all__ = ["policy_loss"]

# Noises for each sample of a Diffusion batch. Nearly all of a step is the ResNet on the images; the small U-Net
# sees each of its features under several noise levels at once, which quietens the gradient for next to nothing.
_DRAWS = 8


def policy_loss(policy: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a preprocessed batch, of images or of their feature maps: LeRobot's own for ACT, with `_DRAWS` noises
    for each image for Diffusion."""
    config = policy.config
    encoded = any(name.startswith(FEATURES) for name in batch)
    if config.type != "diffusion":
        return policy.forward(batch | finish_features(policy, batch) if encoded else batch)[0]
    model = policy.diffusion
    actions = batch["action"]
    if encoded:
        condition = encode_features(policy, batch)
    else:
        images = torch.stack([batch[name] for name in config.image_features], dim=-4)
        condition = model._prepare_global_conditioning(batch | {"observation.images": images})
        condition = condition.repeat_interleave(_DRAWS, dim=0)
        actions = actions.repeat_interleave(_DRAWS, dim=0)
    noise = torch.randn_like(actions)
    levels = model.noise_scheduler.config.num_train_timesteps
    level = torch.randint(0, levels, (len(actions),), device=actions.device)
    guess = model.unet(model.noise_scheduler.add_noise(actions, noise, level), level, global_cond=condition)
    return functional.mse_loss(guess, noise if config.prediction_type == "epsilon" else actions)
