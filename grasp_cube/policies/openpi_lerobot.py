"""An openpi checkpoint in LeRobot's form: its config, its processors, and its tensors, whose names are openpi's.

LeRobot's Pi modules are ports of openpi's PyTorch model, so each tensor has its place there under the same name; what
differs is around the model, and is said here: which step of LeRobot's processors computes which of openpi's transforms.
The same form is served from memory and written to disk, so a checkpoint answers alike before and after conversion.
Error policy: `PolicyError`.
"""

from pathlib import Path
from typing import Any

from grasp_cube.policies.openpi_checkpoint import OpenpiCheckpoint
from grasp_cube.policies.policy import PolicyError

__all__ = ["lerobot_config", "lerobot_processors"]

# A weight whose precision stands for the model's.
_TYPICAL = "paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn.q_proj.weight"


def lerobot_config(checkpoint: OpenpiCheckpoint) -> Any:
    """LeRobot's config of the same model (PI0Config, PI05Config or a small one of ours)."""
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature

    side = checkpoint.resolution
    inputs = {
        camera.feature: PolicyFeature(FeatureType.VISUAL, (3, side, side)) for camera in checkpoint.cameras
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (checkpoint.state_size,))
    mode = NormalizationMode(checkpoint.norm_mode)
    names, exclude = _relative(checkpoint)
    return _config_class(checkpoint.type)(
        device="cpu",
        push_to_hub=False,
        dtype="bfloat16" if checkpoint.tensors.dtype(_TYPICAL) == "bfloat16" else "float32",
        chunk_size=checkpoint.horizon,
        n_action_steps=checkpoint.horizon,
        max_state_dim=checkpoint.model_dim,
        max_action_dim=checkpoint.model_dim,
        image_resolution=(side, side),
        tokenizer_max_length=checkpoint.max_tokens,
        use_relative_actions=any(checkpoint.delta),
        relative_exclude_joints=exclude,
        action_feature_names=names,
        normalization_mapping={
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": mode,
            "ACTION": mode,
        },
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (checkpoint.action_dim,))},
    )


def lerobot_processors(checkpoint: OpenpiCheckpoint, config: Any, tokenizer: Path) -> tuple[Any, Any]:
    """LeRobot's pre- and postprocessor with the checkpoint's statistics; `tokenizer` is the tokenizer's folder.

    The conversions of the robot's values are ours, around both.
    """
    import torch

    from grasp_cube.policies.pi_processors import pi_processors

    stats = {
        feature: {name: torch.tensor(values, dtype=torch.float32) for name, values in group.items()}
        for feature, group in checkpoint.stats.items()
    }
    processors = pi_processors(config, stats, str(tokenizer), state_in_prompt=checkpoint.state_in_prompt)
    for processor in processors:
        for step in processor.steps:
            if hasattr(step, "eps"):
                # The statistics carry openpi's own.
                step.eps = 0.0
    return processors


def _config_class(kind: str) -> Any:
    if kind.startswith("tiny_"):
        from grasp_cube.policies import pi_tiny

        return {"tiny_pi0": pi_tiny.TinyPI0Config, "tiny_pi05": pi_tiny.TinyPI05Config}[kind]
    from lerobot.policies.pi0 import PI0Config
    from lerobot.policies.pi05 import PI05Config

    return {"pi0": PI0Config, "pi05": PI05Config}[kind]


def _relative(checkpoint: OpenpiCheckpoint) -> tuple[list[str], list[str]]:
    """(action names, names that stay absolute) with which LeRobot's step builds the mask.

    The step keeps an action absolute when an excluded word occurs anywhere in its name, so names that contain each
    other need others in their place. Raises `PolicyError` when not even those give the mask.
    """
    from lerobot.processor import RelativeActionsProcessorStep

    numbered = [f"action_{i:03d}" for i in range(checkpoint.action_dim)]
    for names in (list(checkpoint.embodiment.action_names), numbered):
        exclude = [name for name, relative in zip(names, checkpoint.delta, strict=True) if not relative]
        step = RelativeActionsProcessorStep(enabled=True, exclude_joints=exclude, action_names=names)
        if not any(checkpoint.delta) or tuple(step._build_mask(checkpoint.action_dim)) == checkpoint.delta:
            return names, exclude
    raise PolicyError(f"LeRobot's relative actions cannot express the mask {list(checkpoint.delta)}")
