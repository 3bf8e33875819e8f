"""Eyes that are trained already: what of a ResNet is frozen sees each frame once, and no step runs it again.

    ACT checkpoint --adopt_backbone--> Diffusion policy --,
    ACT checkpoint --start_from-> ACT --freeze_stem-------+--load_features--> frames as feature maps, once

Nearly all of a training step is the ResNet on the images. With its feature maps instead of images a step of Diffusion is
a hundred times cheaper, and what is left to learn is the part that is Diffusion's own; with those of the ResNet's first
half a step of ACT takes half the time, and the half that is left can still learn. The checkpoint is an ordinary one.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from grasp_cube.training.frames import Frames

__all__ = ["FEATURES", "adopt_backbone", "encode_features", "finish_features", "freeze_stem", "load_features"]

# What stands in a batch in place of "observation.images".
FEATURES = "observation.features"
# Modules of torchvision's ResNet by name, and by number in the sequence that LeRobot's Diffusion makes of them.
_MODULES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
_ACT = "model.backbone."
_STEM, _REST = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"), ("layer3", "layer4")
# Images that pass through the ResNet at a time.
_BATCH = 64
# Channels of an image.
_RGB = 3


def adopt_backbone(policy: Any, folder: Path) -> nn.Module:
    """Gives a Diffusion policy the ResNet of the ACT checkpoint in `folder`, and freezes it; the ResNet.

    Raises `ValueError` when the folder holds no ACT checkpoint or its ResNet is another one.
    """
    from safetensors.torch import load_file

    try:
        kind = json.loads((folder / "config.json").read_text()).get("type")
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise ValueError(f"--backbone {folder} is no checkpoint: {error}") from error
    if kind != "act":
        raise ValueError(f"--backbone {folder} holds a {kind} checkpoint; an ACT checkpoint was expected")
    taken = {}
    for name, tensor in tensors.items():
        if name.startswith(_ACT):
            module, _, rest = name.removeprefix(_ACT).partition(".")
            taken[f"{_MODULES[module]}.{rest}"] = tensor.float()
    backbone = policy.diffusion.rgb_encoder.backbone
    found = backbone.load_state_dict(taken, strict=False)
    # ACT's batch norms are frozen and count nothing.
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"--backbone {folder} has another ResNet: {(missing + found.unexpected_keys)[0]} does not fit"
        )
    return _frozen(backbone)


def freeze_stem(policy: Any) -> nn.Module:
    """Freezes the first half of an ACT's ResNet; that half.

    From here on the ResNet takes images as before, and what `finish_features` gives for what it would make of them.
    """
    backbone = policy.model.backbone
    whole = backbone.forward

    def forward(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return whole(inputs) if inputs.shape[1] == _RGB else {"feature_map": inputs}

    backbone.forward = forward
    return _frozen(nn.Sequential(*(backbone[name] for name in _STEM)))


def finish_features(policy: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{camera: (B, 512, h, w)}, what the other half of an ACT's ResNet makes of the frozen one's feature maps.

    All cameras go through it together: a few small maps are too little work for one convolution.
    """
    cameras = list(policy.config.image_features)
    maps = torch.cat([batch[f"{FEATURES}.{camera}"].float() for camera in cameras])
    maps = maps.contiguous(memory_format=torch.channels_last)
    for name in _REST:
        maps = policy.model.backbone[name](maps)
    return dict(zip(cameras, maps.chunk(len(cameras)), strict=True))


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def load_features(frames: Frames, frozen: nn.Module, preprocessor: Any, cache: Path) -> dict[str, np.ndarray]:
    """{camera feature: (N, C, h, w) float16}, what the frozen layers make of every frame; made once and kept in `cache`."""
    first = next(frozen.parameters())
    # The frames beside the feature maps say which dataset they are of.
    wanted = {
        "first_weights": float(first.double().sum()),
        "frames": json.loads((cache / "frames.json").read_text()),
    }
    index = cache / "features.json"
    fresh = not index.is_file() or json.loads(index.read_text()) != wanted
    if fresh:
        # Whatever ends the next minutes: feature maps of two kinds are never taken for those of one.
        index.unlink(missing_ok=True)
    features: dict[str, np.ndarray] = {}
    for camera in frames.images:
        file = cache / f"{camera}.features.npy"
        if fresh:
            _fill(frames, camera, frozen, preprocessor, file)
        features[camera] = np.load(file, mmap_mode="r")
    index.write_text(json.dumps(wanted))
    return features


def encode_features(policy: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The condition of the U-Net, (B, n), from feature maps (B, ticks, C, h, w) of every camera.

    What LeRobot's `_prepare_global_conditioning` does, from behind the ResNet on.
    """
    encoder = policy.diffusion.rgb_encoder
    parts = [batch["observation.state"]]
    for camera in policy.config.image_features:
        maps = batch[f"{FEATURES}.{camera}"]
        points = encoder.pool(maps.flatten(0, 1).float()).flatten(start_dim=1)
        parts.append(encoder.relu(encoder.out(points)).unflatten(0, maps.shape[:2]))
    return torch.cat(parts, dim=-1).flatten(start_dim=1)


def _fill(frames: Frames, camera: str, frozen: nn.Module, preprocessor: Any, file: Path) -> None:
    count = len(frames.actions)
    maps = None
    for start in tqdm(range(0, count, _BATCH), desc=f"{camera} through the ResNet", disable=None):
        batch = frames.batch(range(start, min(start + _BATCH, count)), None, [0])
        images = preprocessor(batch)[camera].to(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            found = frozen(images).half().cpu().numpy()
        if maps is None:
            maps = np.lib.format.open_memmap(file, "w+", np.float16, (count, *found.shape[1:]))
        maps[start : start + len(found)] = found
    assert maps is not None
    maps.flush()
