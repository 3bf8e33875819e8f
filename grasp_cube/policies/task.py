"""A task: what one of configs/tasks/*.yaml says, and whether a checkpoint fits it."""

from dataclasses import dataclass
from pathlib import Path

from grasp_cube.policies.config_files import find_config, read_yaml
from grasp_cube.policies.policy import PolicyError

__all__ = ["Task", "load_task"]


@dataclass(frozen=True)
class Task:
    """One task of the house."""

    name: str
    # What a policy that follows language is told.
    prompt: str
    # The robot type (--env.type) that the task is meant for.
    robot: str
    # The cameras that the task is recorded with.
    cameras: tuple[str, ...]
    # Values in one action; a checkpoint with another number is refused.
    action_dim: int
    # A name in configs/embodiments.
    embodiment: str
    # Folder of the checkpoint that is served when none is named.
    checkpoint: Path | None = None

    def check(self, action_dim: int, checkpoint: Path) -> None:
        """Raises `PolicyError` when a checkpoint acts in another number of dimensions."""
        if action_dim != self.action_dim:
            raise PolicyError(
                f"the task {self.name!r} needs actions of {self.action_dim} values ({self.embodiment}), but the "
                f"checkpoint {checkpoint} gives {action_dim}: choose the checkpoint or the task that belongs to it"
            )


def load_task(name: str) -> Task:
    """The task of that name, or in that yaml file. Raises `PolicyError`."""
    file = find_config("tasks", name)
    fields = read_yaml(file)
    prompt = fields.take("prompt", str)
    action_dim = fields.take("action_dim", int)
    if prompt is None or action_dim is None:
        raise PolicyError(f"{file} needs both a prompt and an action_dim")
    embodiment = fields.take("embodiment", str, "so101")
    checkpoint = fields.take("checkpoint", str)
    task = Task(
        name=file.stem,
        prompt=prompt,
        robot=fields.take("robot", str, embodiment),
        cameras=fields.strings("cameras") or (),
        action_dim=action_dim,
        embodiment=embodiment,
        checkpoint=None if checkpoint is None else _checkpoint(file, checkpoint),
    )
    fields.end()
    return task


def _checkpoint(file: Path, checkpoint: str) -> Path:
    """A relative folder counts from where the command runs; failing that, from the root that holds configs/."""
    here = Path(checkpoint).expanduser()
    beside = file.parents[2] / here if len(file.parents) > 2 else here
    return beside if not here.exists() and beside.exists() else here
