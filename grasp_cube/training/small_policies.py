"""ACT and Diffusion, small enough for a repository and for two processor cores, as LeRobot's own classes."""

from typing import Any, Literal

import torch

__all__ = [
    "DEFAULT_CHUNK",
    "DEFAULT_WIDTH",
    "PolicyType",
    "calibrate_backbone",
    "make_policy_config",
    "new_policy",
]

PolicyType = Literal["act", "diffusion"]

# With these the weights stay under 25 MB in half precision, of which the ResNet-18 alone takes 22.4.
DEFAULT_WIDTH: dict[PolicyType, int] = {"act": 128, "diffusion": 32}
DEFAULT_CHUNK: dict[PolicyType, int] = {"act": 50, "diffusion": 16}


def make_policy_config(
    kind: PolicyType,
    meta: Any,
    height: int,
    width: int,
    *,
    chunk: int,
    width_model: int,
    learning_rate: float,
    batch_norm: bool = False,
) -> Any:
    """LeRobot's config for a dataset whose images are served at (height, width).

    `chunk` is the number of actions predicted for one observation; `width_model` the width of ACT's transformer
    and of Diffusion's first U-Net level; `batch_norm` keeps the norms of Diffusion's ResNet. Raises `ValueError` for a chunk that the type cannot have.
    """
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.utils.feature_utils import dataset_to_policy_features

    features = dataset_to_policy_features(meta.features)
    inputs = {
        name: PolicyFeature(FeatureType.VISUAL, (3, height, width)) if name in meta.camera_keys else feature
        for name, feature in features.items()
        if name in meta.camera_keys or feature.type is FeatureType.STATE
    }
    common: dict[str, Any] = {
        "input_features": inputs,
        "output_features": {name: f for name, f in features.items() if f.type is FeatureType.ACTION},
        # ImageNet's weights would be fetched from the network, by training and again by every load.
        "pretrained_backbone_weights": None,
        "optimizer_lr": learning_rate,
        "device": "cpu",
        "push_to_hub": False,
    }
    if kind == "act":
        return ACTConfig(
            **common,
            chunk_size=chunk,
            n_action_steps=chunk,
            dim_model=width_model,
            n_heads=4,
            dim_feedforward=2 * width_model,
            n_encoder_layers=3,
            # An expert of one mode leaves no choice: the variational part has nothing to explain.
            use_vae=False,
            dropout=0.0,
            optimizer_lr_backbone=learning_rate,
        )
    if chunk % 2 or chunk < 4:
        raise ValueError(f"--chunk is {chunk}; an even number of at least 4 was expected for diffusion")
    # The U-Net halves the horizon twice; the actions before "now" belong to it as well.
    horizon = -(-(chunk + 1) // 8) * 8
    return DiffusionConfig(
        **common,
        n_obs_steps=2,
        horizon=horizon,
        n_action_steps=chunk,
        drop_n_last_frames=0,
        use_group_norm=not batch_norm,
        use_separate_rgb_encoder_per_camera=False,
        spatial_softmax_num_keypoints=32,
        down_dims=(width_model, 2 * width_model, 4 * width_model),
        kernel_size=3,
        diffusion_step_embed_dim=64,
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
        scheduler_warmup_steps=100,
    )


def new_policy(config: Any) -> Any:
    """An untrained policy of the config's type, on its device."""
    from lerobot.policies.factory import get_policy_class

    return get_policy_class(config.type)(config).to(config.device)


def calibrate_backbone(policy: Any, batch: dict[str, torch.Tensor]) -> int:
    """Sets the frozen batch norms of ACT's backbone to what a preprocessed batch shows; returns their number.

    LeRobot freezes them because ImageNet's statistics come with ImageNet's weights. Without those weights they
    would be the identity, and activations would double from block to block.
    """
    from torchvision.ops import FrozenBatchNorm2d

    def measure(layer: FrozenBatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        layer.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        layer.running_var.copy_(inputs[0].var(dim=(0, 2, 3)).clamp_min(1e-3))

    norms = [module for module in policy.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        with torch.no_grad():
            policy.forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return len(norms)
