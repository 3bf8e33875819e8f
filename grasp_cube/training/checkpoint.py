"""The folder that a finished run leaves, and how closely what was saved follows recorded episodes."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from grasp_cube.training.frames import Frames

__all__ = ["load_checkpoint", "replay_error", "write_checkpoint"]

# LeRobot's pre- and postprocessor.
Processors = tuple[Any, Any]


def write_checkpoint(
    out: Path, policy: Any, processors: Processors, embodiment: dict[str, Any], losses: list[float]
) -> None:
    """Writes a folder that LeRobot and `serve_policy` load: config, weights in half precision, processors,
    `embodiment.yaml`, and `loss.png`."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(policy.config)
    config.device = "cpu"
    config.pretrained_path = None
    config.pretrained_backbone_weights = None
    config.save_pretrained(out)
    weights = {name: _half(tensor) for name, tensor in policy.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for processor in processors:
        processor.save_pretrained(out)
    (out / "embodiment.yaml").write_text(yaml.safe_dump(embodiment, sort_keys=False))
    _draw_losses(losses, out / "loss.png")


def load_checkpoint(folder: Path) -> tuple[Any, Processors]:
    """A checkpoint as LeRobot loads it, strictly: a missing, extra or misshapen tensor raises."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    overrides = {"device_processor": {"device": "cpu"}}
    processors = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides=overrides
    )
    return policy.eval(), processors


def replay_error(folder: Path, trained: Any, frames: Frames) -> dict[str, Any]:
    """How far the saved checkpoint is from recorded episodes, in the recording's units.

    The policy sees the recorded observation at the start of every chunk, and each of the chunk's actions is
    compared with the one recorded for its tick. `holding_still` is the error of repeating the state, and
    `half_precision` the largest difference of an action from the policy before it was saved.
    """
    saved, processors = load_checkpoint(folder)
    trained.eval()
    errors, still, drift = [], [], 0.0
    for start, end in zip(frames.starts, frames.ends, strict=True):
        for first in range(start, end, saved.config.n_action_steps):
            count = min(saved.config.n_action_steps, end - first)
            chunk = _predict(saved, processors, frames, first)[:count]
            exact = _predict(trained, processors, frames, first)[:count]
            recorded = frames.actions[first : first + count]
            errors.append(np.abs(chunk - recorded))
            still.append(np.abs(frames.states[first] - recorded))
            drift = max(drift, float(np.abs(chunk - exact).max()))
    by_joint = np.concatenate(errors).mean(axis=0)
    names = frames.meta.features["action"]["names"]
    return {
        "joints": {name: round(float(value), 3) for name, value in zip(names, by_joint, strict=True)},
        "all": round(float(by_joint.mean()), 3),
        "holding_still": round(float(np.concatenate(still).mean()), 3),
        "half_precision": round(drift, 4),
    }


def _predict(policy: Any, processors: Processors, frames: Frames, index: int) -> np.ndarray:
    """The (n_action_steps, n) actions for the observation of one frame; Diffusion's noise is the same each time."""
    config = policy.config
    batch = frames.batch([index], config.observation_delta_indices, config.action_delta_indices)
    inputs = {name: value for name, value in batch.items() if name.startswith("observation.")}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chunk = policy.predict_action_chunk(processors[0](inputs))
        actions: np.ndarray = processors[1](chunk).cpu().numpy()[0]
    return actions[: config.n_action_steps]


def _half(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not torch.isfinite(half).all():
        raise ValueError("a weight does not fit into half precision; train with a lower --learning-rate")
    return half


def _draw_losses(losses: list[float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    values = np.asarray(losses)
    axes.plot(np.arange(1, len(values) + 1), values, color="#b9c6d6", linewidth=0.6, label="each step")
    window = max(1, min(50, len(values) // 4))
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(window, len(values) + 1), smooth, color="#1f4e8c", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss (normalised)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
