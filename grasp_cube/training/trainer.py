"""One training run: its batches, its steps, and the state from which it goes on after an interruption.

    Frames.batch -> augment_images -> preprocessor -> policy.forward -> optimizer, scheduler -> state

A resumed run sees the samples, the random numbers and the learning rates that the whole run would have seen.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lerobot.common.train_utils import load_training_state, save_training_state
from lerobot.datasets import EpisodeAwareSampler, compute_sampler_state
from lerobot.optim.schedulers import DiffuserSchedulerConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.random_utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from tqdm import tqdm

from grasp_cube.training.augment import augment_images
from grasp_cube.training.backbone import FEATURES, adopt_backbone, freeze_stem, load_features
from grasp_cube.training.frames import Frames, before_grasps
from grasp_cube.training.losses import policy_loss
from grasp_cube.training.small_policies import (
    DEFAULT_CHUNK,
    DEFAULT_WIDTH,
    calibrate_backbone,
    make_policy_config,
    new_policy,
)

if TYPE_CHECKING:
    from grasp_cube.training.train import TrainConfig

__all__ = ["Trainer", "recover"]

# ACT's layers whose size is that of the robot: of a checkpoint for another robot they begin at random.
_ROBOTS_OWN = ("model.encoder_robot_state_input_proj.", "model.action_head.")
# What a resumed run may change: everything else belongs to the weights or to the order of the samples.
_FREE_ON_RESUME = {
    "steps",
    "save_every",
    "resume",
    "eval_dataset",
    "threads",
    "device",
    "out",
    "prompt",
    "embodiment",
}


class Trainer:
    """One run: the policy, its processors, and the state that a later run takes up."""

    def __init__(self, config: "TrainConfig", frames: Frames):
        set_seed(config.seed)
        height, width = config.height_width
        self.config = config
        self.frames = frames
        self.policy_config = make_policy_config(
            config.type,
            frames.meta,
            height,
            width,
            chunk=config.chunk or DEFAULT_CHUNK[config.type],
            width_model=config.width or DEFAULT_WIDTH[config.type],
            learning_rate=config.learning_rate,
            batch_norm=config.backbone is not None,
        )
        self.policy_config.device = config.device
        self.policy = new_policy(self.policy_config)
        self.processors = make_pre_post_processors(self.policy_config, dataset_stats=frames.meta.stats)
        self.optimizer = self.policy_config.get_optimizer_preset().build(self.policy.get_optim_params())
        for group in self.optimizer.param_groups:
            # One pass over the weights instead of one for each operation: a step of it takes a fifth of the time.
            group["fused"], group["foreach"] = True, False
        warmup = min(config.warmup, config.steps // 10)
        scheduler = DiffuserSchedulerConfig(name="cosine", num_warmup_steps=warmup)
        self.scheduler = scheduler.build(self.optimizer, config.steps)
        self.losses: list[float] = []
        self._features: dict[str, np.ndarray] | None = None

    def run(self, state: Path) -> list[float]:
        """The rest of the steps; returns the loss of every step so far."""
        if state.exists():
            self._load(state)
        elif self.config.start_from is not None:
            _start_from(self.policy, Path(self.config.start_from))
        self.policy.to(memory_format=torch.channels_last)
        _lay_out_as_weights(self.optimizer)
        self.encode_frames()
        batches = self._batches(len(self.losses))
        if not self.losses and self._features is None and self.config.start_from is None:
            calibrate_backbone(self.policy, self._processed(next(self._batches(0, 32))))
        bar = tqdm(total=self.config.steps, initial=len(self.losses), desc=self.config.type, disable=None)
        self.policy.train()
        while len(self.losses) < self.config.steps:
            self.losses.append(self._step(self._processed(next(batches))))
            bar.update()
            bar.set_postfix(loss=f"{sum(self.losses[-20:]) / len(self.losses[-20:]):.4f}")
            if len(self.losses) % self.config.save_every == 0 or len(self.losses) == self.config.steps:
                self._save(state)
        bar.close()
        return self.losses

    def encode_frames(self) -> None:
        """Freezes what of the ResNet is to be kept, if any: batches hold its feature maps from here on."""
        if self.config.backbone is not None:
            frozen = adopt_backbone(self.policy, Path(self.config.backbone))
        elif self.config.freeze_stem:
            frozen = freeze_stem(self.policy)
        else:
            return
        maps = load_features(self.frames, frozen, self.processors[0], self.config.run / "frames")
        self._features = {f"{FEATURES}.{camera}": found for camera, found in maps.items()}

    def _step(self, batch: dict[str, torch.Tensor]) -> float:
        device = torch.device(self.config.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss = policy_loss(self.policy, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        value = float(loss.item())
        if not math.isfinite(value):
            raise ValueError(f"the loss is not a number at step {len(self.losses)}; lower --learning-rate")
        return value

    def _batches(self, step: int, size: int = 0) -> Iterator[list[int]]:
        """Frame numbers of the batches from `step` on: the same ones whether the run was interrupted or not."""
        # To the sampler a stretch that is to be drawn again is one more episode.
        again = before_grasps(self.frames) * (self.config.repeat_grasps - 1)
        sampler = EpisodeAwareSampler(
            [*self.frames.starts.tolist(), *(start for start, _ in again)],
            [*self.frames.ends.tolist(), *(end for _, end in again)],
            shuffle=True,
            seed=self.config.seed,
        )
        size = min(size or self.config.batch_size, len(sampler))
        sampler.load_state_dict(compute_sampler_state(step, len(sampler), size, 1))
        while True:
            batch: list[int] = []
            for index in sampler:
                batch.append(index)
                if len(batch) == size:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def _processed(self, indices: list[int]) -> dict[str, torch.Tensor]:
        config = self.policy_config
        batch = self.frames.batch(
            indices, config.observation_delta_indices, config.action_delta_indices, self._features
        )
        if self.config.augment:
            augment_images(batch, list(self.frames.images))
        return self.processors[0](batch)

    def _save(self, state: Path) -> None:
        """The state, complete or not at all: a run may be ended at any moment."""
        fresh = state.with_name("state.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        self.policy.save_pretrained(fresh / "policy")
        save_training_state(
            fresh,
            len(self.losses),
            self.optimizer,
            self.scheduler,
            batch_size=self.config.batch_size,
            optim_state_dict=_contiguous(self.optimizer.state_dict()),
        )
        (fresh / "losses.json").write_text(json.dumps(self.losses))
        (fresh / "config.json").write_text(json.dumps(dataclasses.asdict(self.config)))
        old = _old(state)
        if state.exists():
            state.rename(old)
        fresh.rename(state)
        shutil.rmtree(old, ignore_errors=True)

    def _load(self, state: Path) -> None:
        saved = json.loads((state / "config.json").read_text())
        now = dataclasses.asdict(self.config)
        for name in sorted(set(now) - _FREE_ON_RESUME):
            if saved.get(name) != now[name]:
                raise ValueError(
                    f"the run in {state} has {name} {saved.get(name)!r}, this command {now[name]!r}; "
                    "a resumed run keeps it"
                )
        load_model(self.policy, state / "policy" / "model.safetensors", strict=True)
        load_training_state(state, self.optimizer, self.scheduler)
        self.losses = json.loads((state / "losses.json").read_text())


def _start_from(policy: Any, folder: Path) -> None:
    """Raises `ValueError` when the folder holds no weights of this policy, be it for another robot."""
    try:
        tensors = load_file(folder / "model.safetensors")
        for name, own in policy.state_dict().items():
            if name.startswith(_ROBOTS_OWN) and name in tensors and tensors[name].shape != own.shape:
                tensors[name] = own
        policy.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--start-from {folder} is no checkpoint: {error}") from error
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"--start-from {folder} holds another policy than this one: {what}") from error


def recover(state: Path) -> None:
    """Puts the last complete state back in place when a run was ended while it replaced it."""
    if not state.exists() and _old(state).exists():
        _old(state).rename(state)


def _old(state: Path) -> Path:
    return state.with_name("state.old")


def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Gives moments that were read from a file the memory order of their weights, which the fused kernel takes for granted."""
    for weight, entry in optimizer.state.items():
        for name, value in entry.items():
            if value.shape == weight.shape:
                entry[name] = torch.empty_like(weight).copy_(value)


def _contiguous(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without the memory order of its channels-last weights, which safetensors refuses."""
    moments = {
        number: {name: value.contiguous() for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": moments}
