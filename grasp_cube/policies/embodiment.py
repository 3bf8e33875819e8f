"""An embodiment: how a robot's observation becomes a checkpoint's features, and what its actions mean.

A checkpoint says shapes, but neither its unit, nor its control rate, nor where its state comes from. That is told by
configs/embodiments/<name>.yaml and, for one checkpoint, by an `embodiment.yaml` beside its config.json: the same
settings, each optional. `base` names the embodiment that they change. docs/embodiments.md explains each of them.
Error policy: `PolicyError` that names the file and the setting.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from env_client.wire import CameraSpec, StateSpec, shown
from env_client.wire.images import Resize

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.config_files import Fields, find_config, read_yaml
from grasp_cube.policies.conversions import NO_CONVERSIONS, Conversions, read_conversion
from grasp_cube.policies.policy import PolicyError
from grasp_cube.policies.task import Task

__all__ = [
    "IMAGE_FORMS",
    "OWN_FILE",
    "RESIZES",
    "SLOTS",
    "Camera",
    "Embodiment",
    "choose_embodiment",
    "delta_mask",
    "load_embodiment",
    "read_delta",
]

RESIZES: tuple[str, ...] = get_args(Resize)
IMAGE_PREFIX = "observation.images."
OWN_FILE = "embodiment.yaml"
# As `base` of a checkpoint's own file: it says everything itself.
NO_BASE = "none"
# What a checkpoint without any word about its robot is taken for, by the number of its state and action values.
BY_SIZE = {6: "so101", 12: "bi_so101"}
# What a client may send besides (H, W, 3) uint8: (3, H, W), and floats from 0 to 1.
IMAGE_FORMS = ("channels_first", "float")
# The three images of Pi0 and Pi0.5 as openpi trains them, in the order in which the model takes them.
SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True)
class Camera:
    """One camera of a robot, and where its image goes."""

    # The name under `images` in an observation.
    name: str
    # The checkpoint's feature that it fills.
    feature: str
    # Its own rule; None: the embodiment's.
    resize: Resize | None = None
    # The image of an openpi checkpoint that it fills, one of `SLOTS`.
    slot: str | None = None
    # Where else a client may put it: a flat key, or a path through nested maps.
    keys: tuple[str, ...] = ()
    # Whether an observation without it is answered all the same (Pi0 and Pi0.5 then leave the image out).
    optional: bool = False


@dataclass(frozen=True)
class Embodiment:
    """One robot as checkpoints see it."""

    name: str
    # Unit of states and actions; None: it is the checkpoint's own (an SO-101 is recorded in two).
    unit: str | None = None
    # Control rate of the recordings in Hz; None when unknown.
    fps: float | None = None
    # One name for each value of an action; empty: the values are numbered.
    action_names: tuple[str, ...] = ()
    # The parts that make up the feature observation.state, in order; empty: one part named state.
    states: tuple[StateSpec, ...] = ()
    # Where else a client may put a part of the state: (part, keys)
    state_keys: tuple[tuple[str, tuple[str, ...]], ...] = ()
    cameras: tuple[Camera, ...] = ()
    resize: Resize = "none"
    # What is read besides (H, W, 3) uint8, of `IMAGE_FORMS`.
    image_forms: tuple[str, ...] = ()
    # Between the robot's convention of a value and the checkpoint's.
    convert: Conversions = NO_CONVERSIONS
    # Which values of an action an openpi checkpoint gives relative to the state, as runs: (6, -1) is six that are and
    # one that is not. None: not said.
    delta: tuple[int, ...] | None = None
    # Whether underscores and line breaks in a prompt become spaces, as openpi does it.
    clean_prompt: bool = False
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

    def prompt_text(self, prompt: str) -> str:
        """A prompt as the checkpoint's tokenizer takes it."""
        return prompt.strip().replace("_", " ").replace("\n", " ") if self.clean_prompt else prompt

    def camera_specs(
        self, features: dict[str, tuple[int, int]], renamed: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, CameraSpec]:
        """{feature: camera} for a checkpoint's image features {feature: (height, width)}, in their order.

        The checkpoint decides which cameras there are; a feature that no camera of the embodiment claims is filled by
        the camera of the feature's own name, or of its name in `renamed` {feature: as the robot has it}.
        Raises `PolicyError` when one camera would fill two features.
        """
        claimed = {camera.feature: camera for camera in self.cameras}
        specs: dict[str, CameraSpec] = {}
        for feature, (height, width) in features.items():
            before = renamed.get(feature, feature)
            own = before.removeprefix(IMAGE_PREFIX).removeprefix("observation.")
            camera = claimed.get(before) or Camera(own, before)
            rule = camera.resize or self.resize
            specs[feature] = CameraSpec(camera.name, height, width, rule, camera.optional)
        taken = [spec.name for spec in specs.values()]
        double = sorted({name for name in taken if taken.count(name) > 1})
        if double:
            raise PolicyError(
                f"the camera {double[0]!r} would fill {taken.count(double[0])} of the checkpoint's images "
                f"({', '.join(features)}): map them in the embodiment {self.name!r}"
            )
        return specs


def load_embodiment(name: str, *, _above: tuple[Path, ...] = ()) -> Embodiment:
    """The embodiment of that name, or in that yaml file. Raises `PolicyError`."""
    file = find_config("embodiments", name)
    if file in _above:
        raise PolicyError(f"{file} is its own base, by way of {_above[-1]}: another embodiment was expected")
    fields = read_yaml(file)
    base = fields.take("base", str)
    start = load_embodiment(base, _above=(*_above, file)) if base else Embodiment(name=file.stem)
    return _read(fields, replace(start, name=file.stem))


def delta_mask(runs: tuple[int, ...], action_dim: int) -> tuple[bool, ...]:
    """Runs such as (6, -1) as one truth for each value of an action; what they leave out is not relative."""
    mask = [run > 0 for run in runs for _ in range(abs(run))]
    return tuple(mask[:action_dim] + [False] * (action_dim - len(mask)))


def read_delta(
    value: list | None, file: Path, default: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    """Runs such as [6, -1] from a file; absent ones are `default`. Raises `PolicyError`."""
    if value is None:
        return default
    if not all(type(run) is int and run != 0 for run in value):
        raise PolicyError(
            f"delta in {file} is {shown(value)}; runs such as [6, -1] (six relative values, one absolute) or [] were expected"
        )
    return tuple(value)


def choose_embodiment(
    config: PolicyConfig, folder: Path, task: Task | None, state_size: int, action_dim: int
) -> Embodiment:
    """The embodiment of a checkpoint: the flag, else the checkpoint's own file, else the task, else by its sizes.

    The flags unit, resize and prompt change single settings. A task's prompt goes before the checkpoint's, because
    the operator named the task. Raises `PolicyError`.
    """
    own = folder / OWN_FILE
    own_prompt = None
    # A broken link is no reason to drive with another unit: reading it says so.
    if os.path.lexists(own):
        fields = read_yaml(own)
        base = fields.take("base", str) or (
            task.embodiment if task else BY_SIZE.get(state_size or action_dim)
        )
        start = load_embodiment(base) if base not in (None, NO_BASE) else Embodiment(name=folder.name)
        embodiment = _read(fields, start)
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
        cameras = tuple(replace(camera, resize=None) for camera in embodiment.cameras)
        embodiment = replace(embodiment, resize=rule, cameras=cameras)
    return embodiment


def _read(fields: Fields, base: Embodiment) -> Embodiment:
    """`base` with the settings of a file laid over it."""
    fps = fields.take("fps", (int, float), base.fps)
    if fps is not None and fps <= 0:
        raise PolicyError(f"fps in {fields.file} is {fps}; a rate in Hz was expected")
    states, state_keys = base.states, base.state_keys
    entries = fields.take("states", list)
    if entries is not None:
        parts = [_state(entry, fields.file) for entry in entries]
        states = tuple(part for part, _ in parts)
        state_keys = tuple((part.name, keys) for part, keys in parts if keys)
    convert = fields.take("convert", list)
    forms = fields.strings("image_forms")
    for form in forms or ():
        if form not in IMAGE_FORMS:
            raise PolicyError(
                f"image_forms in {fields.file} names {form!r}; {', '.join(IMAGE_FORMS)} were expected"
            )
    embodiment = replace(
        base,
        name=fields.take("name", str, base.name),
        unit=fields.take("unit", str, base.unit),
        fps=None if fps is None else float(fps),
        action_names=fields.strings("action_names") or base.action_names,
        states=states,
        state_keys=state_keys,
        resize=_rule(fields.take("resize", str, base.resize), f"resize in {fields.file}"),
        image_forms=base.image_forms if forms is None else forms,
        convert=base.convert
        if convert is None
        else Conversions([read_conversion(entry, fields.file) for entry in convert]),
        delta=read_delta(fields.take("delta", list), fields.file, base.delta),
        clean_prompt=fields.take("clean_prompt", bool, base.clean_prompt),
        prompt=fields.take("prompt", str, base.prompt),
    )
    cameras = {camera.name: camera for camera in base.cameras}
    for name, value in fields.take("cameras", dict, {}).items():
        if value is False:
            cameras.pop(str(name), None)
        else:
            cameras[str(name)] = _camera(str(name), value, fields.file)
    fields.end()
    slots = [camera.slot for camera in cameras.values() if camera.slot]
    if len(slots) != len(set(slots)):
        raise PolicyError(
            f"two cameras in {fields.file} have the same slot ({', '.join(slots)}): one each was expected"
        )
    return replace(embodiment, cameras=tuple(cameras.values()))


def _state(value: object, file: Path) -> tuple[StateSpec, tuple[str, ...]]:
    if isinstance(value, dict) and {"name", "size"} <= set(value) <= {"name", "size", "keys"}:
        name, size, keys = value["name"], value["size"], value.get("keys")
        if isinstance(name, str) and type(size) is int and size > 0:
            return StateSpec(name, size), _keys(keys, f"the state {name}", file)
    raise PolicyError(f"a state in {file} is {shown(value)}; {{name: arm, size: 6}} was expected")


def _camera(name: str, value: object, file: Path) -> Camera:
    if value is None:
        value = {}
    if isinstance(value, str):
        value = {"feature": value}
    if not isinstance(value, dict) or not set(value) <= {"feature", "resize", "slot", "keys", "optional"}:
        raise PolicyError(
            f"the camera {name} in {file} is {shown(value)}; {{feature: observation.images.{name}, resize: none}} was expected"
        )
    rule, slot, optional = value.get("resize"), value.get("slot"), value.get("optional", False)
    if slot is not None and slot not in SLOTS:
        raise PolicyError(
            f"slot of the camera {name} in {file} is {shown(slot, 40)}; one of {', '.join(SLOTS)} was expected"
        )
    if not isinstance(optional, bool):
        raise PolicyError(
            f"optional of the camera {name} in {file} is {shown(optional, 40)}; true or false was expected"
        )
    return Camera(
        name,
        str(value.get("feature", IMAGE_PREFIX + name)),
        None if rule is None else _rule(rule, f"resize of the camera {name} in {file}"),
        slot,
        _keys(value.get("keys"), f"the camera {name}", file),
        optional,
    )


def _keys(value: Any, where: str, file: Path) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(key, str) and key for key in value):
        raise PolicyError(
            f"keys of {where} in {file} are {shown(value)}; a list such as [observation/image] was expected"
        )
    return tuple(value)


def _rule(value: object, where: str) -> Resize:
    if value not in RESIZES:
        raise PolicyError(f"{where} is {value!r}; one of {', '.join(RESIZES)} was expected")
    return value  # type: ignore[return-value]
