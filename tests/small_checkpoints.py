"""Small checkpoints made by LeRobot itself: tiny dimensions, random weights, real stats and processors.

    from small_checkpoints import save_act, save_diffusion      # a conftest puts tests/ on the path

They are written the way LeRobot's training writes them (`save_pretrained` of the policy and of both processors).
"""

from pathlib import Path
from typing import Any

import numpy as np

CAMERAS = ("front", "wrist")
HEIGHT, WIDTH = 48, 64


def stats(cameras: tuple[str, ...] = CAMERAS, dim: int = 6, seed: int = 3) -> dict[str, dict[str, Any]]:
    """Dataset statistics as LeRobot keeps them: images (3, 1, 1), state and action (dim,)."""
    import torch

    random = np.random.default_rng(seed)
    result: dict[str, dict[str, Any]] = {}
    for camera in cameras:
        mean, std = random.uniform(0.3, 0.6, (3, 1, 1)), random.uniform(0.1, 0.3, (3, 1, 1))
        result[f"observation.images.{camera}"] = {
            "mean": mean,
            "std": std,
            "min": mean * 0,
            "max": mean * 0 + 1,
        }
    for name in ("observation.state", "action"):
        low, high = random.uniform(-90, -20, dim), random.uniform(10, 90, dim)
        result[name] = {"min": low, "max": high, "mean": (low + high) / 2, "std": (high - low) / 4}
    return {
        name: {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
        for name, values in result.items()
    }


def features(
    cameras: tuple[str, ...], dim: int, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> dict[str, dict[str, Any]]:
    """The input and output features of a policy config; `size` is an image's (height, width)."""
    from lerobot.configs import FeatureType, PolicyFeature

    inputs: dict[str, Any] = {
        f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, *size)) for camera in cameras
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (dim,))
    return {
        "input_features": inputs,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (dim,))},
    }


def save_act(
    folder: Path,
    cameras: tuple[str, ...] = CAMERAS,
    dim: int = 6,
    half: bool = False,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **options: Any,
) -> Path:
    """An ACT checkpoint of 11 million parameters (its ResNet-18) and chunks of 10."""
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    small: dict[str, Any] = {
        "chunk_size": 10,
        "n_action_steps": 10,
        "dim_model": 32,
        "n_heads": 2,
        "dim_feedforward": 32,
    }
    small |= {"n_encoder_layers": 1, "use_vae": False, "pretrained_backbone_weights": None, "device": "cpu"}
    config = ACTConfig(**(features(cameras, dim, size) | small | options))
    return _save(folder, ACTPolicy, config, cameras, dim, half)


def save_diffusion(
    folder: Path,
    cameras: tuple[str, ...] = CAMERAS,
    dim: int = 6,
    half: bool = False,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **options: Any,
) -> Path:
    """A Diffusion checkpoint with one shared ResNet-18, two observed ticks and chunks of 5 out of 8."""
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    config = diffusion_config(cameras, dim, size, **options)
    return _save(folder, DiffusionPolicy, config, cameras, dim, half)


def diffusion_config(
    cameras: tuple[str, ...] = CAMERAS,
    dim: int = 6,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **options: Any,
) -> Any:
    """LeRobot's config of such a checkpoint."""
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    small: dict[str, Any] = {"horizon": 8, "n_action_steps": 5, "down_dims": (16, 32), "n_groups": 4}
    small |= {"diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 8, "num_train_timesteps": 20}
    small |= {
        "use_separate_rgb_encoder_per_camera": False,
        "pretrained_backbone_weights": None,
        "device": "cpu",
    }
    return DiffusionConfig(**(features(cameras, dim, size) | small | options))


def _save(
    folder: Path, policy_class: Any, config: Any, cameras: tuple[str, ...], dim: int, half: bool
) -> Path:
    import torch
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(11)
    policy = policy_class(config)
    if half:
        policy.half()
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(config, dataset_stats=stats(cameras, dim)):
        processor.save_pretrained(folder)
    return folder


def observation(
    seed: int, cameras: tuple[str, ...] = CAMERAS, dim: int = 6, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> dict[str, Any]:
    """A random observation as a robot sends it, of the size of these checkpoints."""
    random = np.random.default_rng(seed)
    state = random.uniform(-60, 60, dim).astype(np.float32)
    parts = {"arm": state} if dim == 6 else {"left_arm": state[:6], "right_arm": state[6:]}
    images = {camera: random.integers(0, 256, (*size, 3), dtype=np.uint8) for camera in cameras}
    return {"images": images, "states": parts, "task": "lift up the red cube"}
