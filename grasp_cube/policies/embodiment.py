"""An embodiment: how a robot's observation becomes a checkpoint's features, and what its actions mean.

A checkpoint says shapes, but neither its unit, nor its control rate, nor where its state comes from. That is told by
configs/embodiments/<name>.yaml and, for one checkpoint, by an `embodiment.yaml` beside its config.json: the same
settings, each optional, and `base` (the embodiment that they change) and `prompt`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from env_client.wire import CameraSpec, StateSpec
from env_client.wire.images import Resize

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.config_files import Fields, find_config, read_yaml
from grasp_cube.policies.policy import PolicyError
from grasp_cube.policies.task import Task

__all__ = ["RESIZES", "Embodiment", "choose_embodiment", "load_embodiment"]

RESIZES: tuple[str, ...] = get_args(Resize)
IMAGE_PREFIX = "observation.images."
OWN_FILE = "embodiment.yaml"
# What a checkpoint without any word about its robot is taken for, by the number of its state and action values.
BY_SIZE = {6: "so101", 12: "bi_so101"}


@dataclass(frozen=True)
class Embodiment:
    """One robot as checkpoints see it."""

    name: str
    # Unit of states and actions.
    unit: str = "normalized"
    # Control rate of the recordings in Hz; None when unknown.
    fps: float | None = None
    # One name for each value of an action; empty: the values are numbered.
    action_names: tuple[str, ...] = ()
    # The parts that make up the feature observation.state, in order; empty: one part named state.
    states: tuple[StateSpec, ...] = ()
    # (camera on the wire, feature, its own resize rule or None)
    cameras: tuple[tuple[str, str, Resize | None], ...] = ()
    resize: Resize = "none"
    # Used when a request names none.
    prompt: str | None = None

    def state_parts(self, size: int) -> tuple[StateSpec, ...]:
        """The parts of an observation.state of `size` values (0: none). Raises `PolicyError` when they do not add up."""
        if size == 0:
            return ()
        parts = self.states or (StateSpec("state", size),)
        total = sum(part.size for part in parts)
        if total != size:
            names = ", ".join(f"{part.name} {part.size}" for part in parts)
            raise PolicyError(
                f"the checkpoint takes a state of {size} values, but the embodiment {self.name!r} has {total} ({names}): "
                "choose another with --policy.embodiment, or put an embodiment.yaml into the checkpoint's folder"
            )
        return parts

    def names(self, action_dim: int) -> tuple[str, ...]:
        """One name for each action value. Raises `PolicyError` when their number is another."""
        if not self.action_names:
            return tuple(f"action_{i}" for i in range(action_dim))
        if len(self.action_names) != action_dim:
            raise PolicyError(
                f"the checkpoint gives actions of {action_dim} values, but the embodiment {self.name!r} has "
                f"{len(self.action_names)}: choose another with --policy.embodiment, or put an embodiment.yaml into "
                "the checkpoint's folder"
            )
        return self.action_names

    def camera_specs(self, features: dict[str, tuple[int, int]]) -> dict[str, CameraSpec]:
        """{feature: camera} for a checkpoint's image features {feature: (height, width)}, in their order.

        The checkpoint decides which cameras there are; a feature that no camera of the embodiment claims is filled by
        the camera of the feature's own name. Raises `PolicyError` when one camera would fill two features.
        """
        claimed = {feature: (name, rule) for name, feature, rule in self.cameras}
        specs: dict[str, CameraSpec] = {}
        for feature, (height, width) in features.items():
            own = feature.removeprefix(IMAGE_PREFIX)
            # A checkpoint with one nameless image calls the feature `observation.image`.
            name, rule = claimed.get(feature, ("front" if own == "observation.image" else own, None))
            specs[feature] = CameraSpec(name, height, width, rule or self.resize)
        taken = [spec.name for spec in specs.values()]
        double = sorted({name for name in taken if taken.count(name) > 1})
        if double:
            raise PolicyError(
                f"the camera {double[0]!r} would fill {taken.count(double[0])} of the checkpoint's images "
                f"({', '.join(features)}): map them in the embodiment {self.name!r}"
            )
        return specs


def load_embodiment(name: str) -> Embodiment:
    """The embodiment of that name, or in that yaml file. Raises `PolicyError`."""
    file = find_config("embodiments", name)
    return _read(read_yaml(file), Embodiment(name=file.stem))


def choose_embodiment(
    config: PolicyConfig, folder: Path, task: Task | None, state_size: int, action_dim: int
) -> Embodiment:
    """The embodiment of a checkpoint: the flag, else the checkpoint's own file, else the task, else by its sizes.

    The flags unit, resize and prompt change single settings. A task's prompt goes before the checkpoint's, because
    the operator named the task. Raises `PolicyError`.
    """
    own = folder / OWN_FILE
    own_prompt = None
    if own.is_file():
        fields = read_yaml(own)
        base = fields.take("base", str) or (
            task.embodiment if task else BY_SIZE.get(state_size or action_dim)
        )
        embodiment = _read(fields, load_embodiment(base) if base else Embodiment(name=folder.name))
        own_prompt = embodiment.prompt
        if config.embodiment:
            embodiment = load_embodiment(config.embodiment)
    elif config.embodiment:
        embodiment = load_embodiment(config.embodiment)
    elif task is not None:
        embodiment = load_embodiment(task.embodiment)
    elif action_dim in BY_SIZE and state_size in (0, action_dim):
        embodiment = load_embodiment(BY_SIZE[action_dim])
    else:
        embodiment = Embodiment(name="generic", unit="unknown")
    prompt = config.prompt or (task.prompt if task else None) or own_prompt or embodiment.prompt
    embodiment = replace(embodiment, prompt=prompt)
    if config.unit:
        embodiment = replace(embodiment, unit=config.unit)
    if config.resize:
        rule = _rule(config.resize, "--policy.resize")
        cameras = tuple((name, feature, None) for name, feature, _ in embodiment.cameras)
        embodiment = replace(embodiment, resize=rule, cameras=cameras)
    return embodiment


def _read(fields: Fields, base: Embodiment) -> Embodiment:
    """`base` with the settings of a file laid over it."""
    fps = fields.take("fps", (int, float), base.fps)
    if fps is not None and fps <= 0:
        raise PolicyError(f"fps in {fields.file} is {fps}; a rate in Hz was expected")
    states = fields.take("states", list)
    embodiment = replace(
        base,
        name=fields.take("name", str, base.name),
        unit=fields.take("unit", str, base.unit),
        fps=None if fps is None else float(fps),
        action_names=fields.strings("action_names") or base.action_names,
        states=base.states if states is None else tuple(_state(item, fields.file) for item in states),
        resize=_rule(fields.take("resize", str, base.resize), f"resize in {fields.file}"),
        prompt=fields.take("prompt", str, base.prompt),
    )
    cameras = {name: (name, feature, rule) for name, feature, rule in base.cameras}
    for name, value in fields.take("cameras", dict, {}).items():
        cameras[str(name)] = _camera(str(name), value, fields.file)
    fields.end()
    return replace(embodiment, cameras=tuple(cameras.values()))


def _state(value: object, file: Path) -> StateSpec:
    if isinstance(value, dict) and set(value) == {"name", "size"} and isinstance(value["name"], str):
        size = value["size"]
        if type(size) is int and size > 0:
            return StateSpec(value["name"], size)
    raise PolicyError(f"a state in {file} is {value!r:.60}; {{name: arm, size: 6}} was expected")


def _camera(name: str, value: object, file: Path) -> tuple[str, str, Resize | None]:
    if value is None:
        value = {}
    if isinstance(value, str):
        value = {"feature": value}
    if not isinstance(value, dict) or not set(value) <= {"feature", "resize"}:
        raise PolicyError(
            f"the camera {name} in {file} is {value!r:.60}; {{feature: observation.images.{name}, resize: none}} was expected"
        )
    rule = value.get("resize")
    feature = str(value.get("feature", IMAGE_PREFIX + name))
    return name, feature, None if rule is None else _rule(rule, f"resize of the camera {name} in {file}")


def _rule(value: object, where: str) -> Resize:
    if value not in RESIZES:
        raise PolicyError(f"{where} is {value!r}; one of {', '.join(RESIZES)} was expected")
    return value  # type: ignore[return-value]
