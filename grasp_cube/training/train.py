"""`train_checkpoint`: a small ACT or Diffusion checkpoint from a LeRobot dataset, on two cores and resumable.

    load_frames -> Frames.batch -> preprocessor -> policy.forward -> LeRobot's optimizer and scheduler
                                                                  `-> state, every --save-every steps
    the last state -> write_checkpoint (half precision) -> load it again, strictly -> replay --eval-dataset

LeRobot's own trainer decodes full-size video for every sample and has no place for the robot's resize, so the
loop is ours; the policies, processors, sampler, optimizers, schedulers and the saved state are LeRobot's.
Nothing here needs a network.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from env_client.cli import fail, parse

if TYPE_CHECKING:
    import torch

    from grasp_cube.training.frames import Frames

__all__ = ["TrainConfig", "main", "train_checkpoint"]

_PROG = "train_checkpoint"


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, and for how long."""

    # LeRobot v3.0 dataset to learn from.
    dataset: str
    # Folder of the finished checkpoint; the frames and the state of the run lie beside it in OUT.run.
    out: str
    # Policy family: act or diffusion.
    type: Literal["act", "diffusion"] = "act"
    # Training steps in all; a resumed run does the rest of them.
    steps: int = 2500
    # Samples in one step.
    batch_size: int = 8
    # Size at which the policy sees images, height x width.
    image_size: str = "96x128"
    # How a camera image is brought to that size: stretch, pad or crop.
    resize: Literal["stretch", "pad", "crop"] = "stretch"
    # Actions in one chunk; default: 50 for act, 16 for diffusion.
    chunk: int | None = None
    # Width of ACT's transformer (default: 128), or of the first level of Diffusion's U-Net (default: 32).
    width: int | None = None
    # Peak of the learning rate, reached after the warm-up; it then falls to zero as a cosine.
    learning_rate: float = 2e-4
    # Steps of warm-up.
    warmup: int = 100
    # Random brightness and shifts of the images by up to 4 % of their size.
    augment: bool = True
    # Arithmetic of the forward pass: bfloat16 or float32; the weights stay float32.
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    # cpu, cuda or mps.
    device: str = "cpu"
    # Processor threads; 0 leaves the choice to torch.
    threads: int = 0
    # Seed of the weights, the order of the samples and the noise.
    seed: int = 0
    # Steps between two saved states.
    save_every: int = 250
    # Go on from the last saved state, if there is one.
    resume: bool = False
    # Dataset of held-out episodes: the finished checkpoint is replayed against it.
    eval_dataset: str | None = None
    # Embodiment in configs/embodiments that the checkpoint names.
    embodiment: str = "so101"
    # Unit of the dataset's states and actions: normalized, degrees or rad.
    unit: str = "normalized"
    # Prompt that the checkpoint names; default: the dataset's first task.
    prompt: str | None = None

    def __post_init__(self) -> None:
        _ = self.height_width
        for name in ("steps", "batch_size", "chunk", "width", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {value}; at least 1 was expected")

    @property
    def height_width(self) -> tuple[int, int]:
        """`image_size` as two numbers."""
        height, cross, width = self.image_size.partition("x")
        if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
            raise ValueError(
                f"--image-size is {self.image_size!r}; HEIGHTxWIDTH was expected, such as 96x128"
            )
        return int(height), int(width)

    @property
    def run(self) -> Path:
        """Where the run keeps what is not shipped: frames, state, losses."""
        out = Path(self.out)
        return out.with_name(out.name + ".run")


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


def train_checkpoint(config: TrainConfig) -> dict[str, Any]:
    """Trains, writes the checkpoint, and returns what `training.json` in it holds.

    Raises `ValueError` for a dataset, a state or an option that does not fit, `FileExistsError` when a run with
    a saved state is there and `resume` is False.
    """
    import torch

    from grasp_cube.training.checkpoint import replay_error, write_checkpoint
    from grasp_cube.training.frames import load_frames
    from grasp_cube.training.report import write_report

    state = config.run / "state"
    if state.exists() and not config.resume:
        raise FileExistsError(f"{state} holds an earlier run; add --resume to go on, or remove {config.run}")
    if config.threads:
        torch.set_num_threads(config.threads)
    height, width = config.height_width
    frames = load_frames(Path(config.dataset), config.run / "frames", height, width, config.resize)
    trainer = _Trainer(config, frames)
    losses = trainer.run(state)
    embodiment = {
        "base": config.embodiment,
        "unit": config.unit,
        "resize": config.resize,
        "fps": frames.meta.fps,
        "prompt": config.prompt or str(frames.meta.tasks.index[0]),
    }
    out = Path(config.out)
    trainer.policy.to("cpu")
    write_checkpoint(out, trainer.policy, trainer.processors, embodiment, losses)
    recent = losses[-100:]
    report: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "episodes": len(frames.starts),
        "frames": len(frames.actions),
        "loss": round(sum(recent) / len(recent), 4),
    }
    if config.eval_dataset is not None:
        held = load_frames(
            Path(config.eval_dataset), config.run / "eval_frames", height, width, config.resize
        )
        report["error"] = replay_error(out, trainer.policy, held)
    write_report(out, report)
    return report


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(
        TrainConfig, argv, prog=_PROG, description="Trains a small ACT or Diffusion checkpoint, resumably."
    )
    try:
        report = train_checkpoint(config)
    except (ValueError, OSError) as error:
        fail(_PROG, str(error))
    from grasp_cube.training.report import summary

    print(summary(Path(config.out), report))


class _Trainer:
    """One run: the policy, its processors, and the state that a later run takes up."""

    def __init__(self, config: TrainConfig, frames: "Frames"):
        from lerobot.optim.schedulers import DiffuserSchedulerConfig
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.utils.random_utils import set_seed

        from grasp_cube.training.small_policies import (
            DEFAULT_CHUNK,
            DEFAULT_WIDTH,
            make_policy_config,
            new_policy,
        )

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
        )
        self.policy_config.device = config.device
        self.policy = new_policy(self.policy_config)
        self.processors = make_pre_post_processors(self.policy_config, dataset_stats=frames.meta.stats)
        self.optimizer = self.policy_config.get_optimizer_preset().build(self.policy.get_optim_params())
        warmup = min(config.warmup, config.steps // 10)
        scheduler = DiffuserSchedulerConfig(name="cosine", num_warmup_steps=warmup)
        self.scheduler = scheduler.build(self.optimizer, config.steps)
        self.losses: list[float] = []

    def run(self, state: Path) -> list[float]:
        """The rest of the steps; returns the loss of every step so far."""
        import torch
        from tqdm import tqdm

        from grasp_cube.training.small_policies import calibrate_backbone

        if state.exists():
            self._load(state)
        self.policy.to(memory_format=torch.channels_last)
        batches = self._batches(len(self.losses))
        if not self.losses:
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

    def _step(self, batch: "dict[str, torch.Tensor]") -> float:
        import torch

        device = torch.device(self.config.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss, _ = self.policy.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        value = float(loss.item())
        if value != value:
            raise ValueError(f"the loss is not a number at step {len(self.losses)}; lower --learning-rate")
        return value

    def _batches(self, step: int, size: int = 0) -> Iterator[list[int]]:
        """Frame numbers of the batches from `step` on: the same ones whether the run was interrupted or not."""
        from lerobot.datasets import EpisodeAwareSampler, compute_sampler_state

        sampler = EpisodeAwareSampler(
            self.frames.starts.tolist(), self.frames.ends.tolist(), shuffle=True, seed=self.config.seed
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

    def _processed(self, indices: list[int]) -> "dict[str, torch.Tensor]":
        from grasp_cube.training.augment import augment_images

        config = self.policy_config
        batch = self.frames.batch(indices, config.observation_delta_indices, config.action_delta_indices)
        if self.config.augment:
            augment_images(batch, list(self.frames.images))
        return self.processors[0](batch)

    def _save(self, state: Path) -> None:
        """The state, complete or not at all: a run may be ended at any moment."""
        from lerobot.common.train_utils import save_training_state

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
        old = state.with_name("state.old")
        if state.exists():
            state.rename(old)
        fresh.rename(state)
        shutil.rmtree(old, ignore_errors=True)

    def _load(self, state: Path) -> None:
        from lerobot.common.train_utils import load_training_state
        from safetensors.torch import load_model

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


def _contiguous(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without the memory order of its channels-last weights, which safetensors refuses."""
    moments = {
        number: {name: value.contiguous() for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": moments}


if __name__ == "__main__":
    main()
