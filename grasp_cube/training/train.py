"""`train_checkpoint`: a small ACT or Diffusion checkpoint from a LeRobot dataset, on two cores and resumable.

    load_frames -> Trainer.run -> write_checkpoint (half precision)
                   `-> its state, every --save-every steps   `-> load it again, strictly -> replay --eval-dataset

LeRobot's own trainer decodes full-size video for every sample and has no place for the robot's resize, so the
loop is ours; the policies, processors, sampler, optimizers, schedulers and the saved state are LeRobot's.
Nothing here needs a network.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from env_client.cli import fail, parse

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
    # ACT checkpoint whose image encoder a Diffusion policy takes over and keeps as it is; a step is then far cheaper.
    backbone: str | None = None
    # Checkpoint of the same type and form, an ACT also for another robot, whose weights the run begins with; default: random ones.
    start_from: str | None = None
    # Keep the first half of the ResNet of --start-from as it is (act only); a step then takes half the time.
    freeze_stem: bool = False
    # Peak of the learning rate, reached after the warm-up; it then falls to zero as a cosine.
    learning_rate: float = 2e-4
    # Steps of warm-up.
    warmup: int = 100
    # Random brightness and shifts of the images by up to 1.5 % of their size.
    augment: bool = True
    # How often the frames of the two seconds before a gripper shuts are drawn, where others are drawn once.
    repeat_grasps: int = 1
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
    # Unit of the dataset's states and actions: normalized, degrees or rad; default: the checkpoint does not declare one.
    unit: str | None = None
    # Prompt that the checkpoint names; default: the dataset's first task.
    prompt: str | None = None

    def __post_init__(self) -> None:
        _ = self.height_width
        if self.backbone is not None and (self.type != "diffusion" or self.augment):
            raise ValueError(
                "--backbone goes with --type diffusion --no-augment: the frames are encoded once"
            )
        if self.freeze_stem and (self.type != "act" or self.augment or self.start_from is None):
            raise ValueError(
                "--freeze-stem goes with --type act --start-from CHECKPOINT --no-augment: the frames are encoded once"
            )
        for name in ("steps", "batch_size", "chunk", "width", "save_every", "repeat_grasps"):
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


def train_checkpoint(config: TrainConfig) -> dict[str, Any]:
    """Trains, writes the checkpoint, and returns what `training.json` in it holds.

    Raises `ValueError` for a dataset, a state or an option that does not fit, `FileExistsError` when a run with
    a saved state is there and `resume` is False.
    """
    import torch

    from grasp_cube.training.checkpoint import replay_error, write_checkpoint
    from grasp_cube.training.frames import load_frames
    from grasp_cube.training.report import write_report
    from grasp_cube.training.trainer import Trainer, recover

    state = config.run / "state"
    recover(state)
    if state.exists() and not config.resume:
        raise FileExistsError(f"{state} holds an earlier run; add --resume to go on, or remove {config.run}")
    if config.threads:
        torch.set_num_threads(config.threads)
    height, width = config.height_width
    frames = load_frames(Path(config.dataset), config.run / "frames", height, width, config.resize)
    trainer = Trainer(config, frames)
    losses = trainer.run(state)
    embodiment = {
        "base": config.embodiment,
        **({"unit": config.unit} if config.unit else {}),
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


if __name__ == "__main__":
    main()
