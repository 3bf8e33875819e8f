"""The files of a LeRobot checkpoint, read and checked before anything heavy is imported.

LeRobot itself lets several kinds of damage pass in silence: a policy without normalisation stats runs on raw values,
a missing tensor stays random. Whatever can be seen in the files is refused here, in well under a second.
Error policy: `PolicyError`, one sentence that names the file.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from env_client.wire import shown
from env_client.wire.images import MAX_IMAGE_PIXELS
from safetensors import SafetensorError, safe_open

from grasp_cube.policies.config_files import read_json
from grasp_cube.policies.lerobot_imports import RENAMED_STEPS
from grasp_cube.policies.places import other_form, unreadable
from grasp_cube.policies.policy import PolicyError

__all__ = [
    "ACTION",
    "COMPUTED",
    "EMPTY_CAMERA",
    "OLD_STATS",
    "POSTPROCESSOR",
    "PREPROCESSOR",
    "PROMPT_STEPS",
    "STATE",
    "WEIGHTS",
    "CheckpointFiles",
    "count_differences",
    "read_checkpoint",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
STATE = "observation.state"
ACTION = "action"

# The statistics that each normalisation mode reads.
_STATS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
# The steps of the processors that LeRobot saves with these policies. Its registry has many more, and some of those run
# code that they find in a folder which their settings name.
_STEPS = frozenset(
    {
        "absolute_actions_processor",
        "device_processor",
        "normalizer_processor",
        "relative_actions_processor",
        "rename_observations_processor",
        "to_batch_processor",
        "unnormalizer_processor",
    }
)
# Those of policies that read a prompt; whoever lets them in gives the tokenizer.
PROMPT_STEPS = frozenset(
    {
        "pi05_prepare_state_tokenizer_processor_step",
        "pi0_new_line_processor",
        "tokenizer_processor",
    }
)
# Values in a state or an action, far more than a robot has.
MAX_VALUES = 100_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Where LeRobot before 0.4 kept the statistics, among the weights.
OLD_STATS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
# Endings of tensors that a module computes for itself, and older releases saved.
COMPUTED = (".position_ids", ".inv_freq", ".num_batches_tracked")
# Policies add these images themselves, and nobody sends them.
EMPTY_CAMERA = "observation.images.empty_camera_"
# Types of features that no policy here reads; of those of the robot's state only observation.state is.
UNREAD_TYPES = ("STATE", "LANGUAGE", "ACTION", "REWARD")
# The types of policies that read the state of a simulation, too.
READ_WHOLE = ("act", "diffusion")


@dataclass(frozen=True)
class CheckpointFiles:
    """What the files of one checkpoint say."""

    folder: Path
    # config.json as it stands.
    config: dict[str, Any]
    # {feature: (height, width)} in the order in which the policy takes its images.
    images: dict[str, tuple[int, int]]
    # Values in observation.state; 0 when the policy takes none.
    state_size: int
    action_dim: int
    # Names of the steps of the processors, as LeRobot's registry knows them.
    preprocessor_steps: tuple[str, ...]
    postprocessor_steps: tuple[str, ...]
    # Inputs that config.json lists and the model never reads.
    unread: tuple[str, ...] = ()
    # {feature: the key under which the robot has it}, from the checkpoint's rename_map.
    renamed: Mapping[str, str] = field(default_factory=dict)
    # {feature: {statistic: values}} where the processors are made anew, because the files hold none that can be used.
    stats: dict[str, dict[str, np.ndarray]] | None = None
    # {feature: {statistic: values}} of state and action; those of relative actions are left out: they have no bounds.
    ranges: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def read_checkpoint(folder: Path, more_steps: frozenset[str] = frozenset()) -> CheckpointFiles:
    """Read and check everything but the weights' values. `more_steps`: names of steps that the processors of this family
    may have besides the common ones. Raises `PolicyError`."""
    config = _read_json(folder / CONFIG)
    images, state_size, unread = _inputs(config, folder)
    action_dim = _action_dim(config, folder)
    old = _check_weights(folder)
    features = {name: ("VISUAL", 3) for name in images if not name.startswith(EMPTY_CAMERA)}
    if state_size:
        features[STATE] = ("STATE", state_size)
    mapping = _map(config.get("normalization_mapping"))
    if old and not any((folder / name).exists() for name in (PREPROCESSOR, POSTPROCESSOR)):
        if config.get("type") not in READ_WHOLE:
            raise PolicyError(
                f"{folder} was saved by LeRobot before 0.4, whose {config.get('type')} no later LeRobot reads: train it again "
                "with the LeRobot of today, or serve that model's openpi checkpoint"
            )
        needed = features | {ACTION: ("ACTION", action_dim)}
        taken = _stats_in_weights(folder / WEIGHTS, old, needed, mapping)
        vectors = {name: taken[name] for name in (STATE, ACTION) if name in taken}
        return CheckpointFiles(
            folder, config, images, state_size, action_dim, (), (), unread, stats=taken, ranges=vectors
        )
    steps: list[tuple[str, ...]] = []
    renamed: dict[str, str] = {}
    rebuilt: dict[str, dict[str, np.ndarray]] = {}
    misnamed: list[str] = []
    ranges: dict[str, dict[str, np.ndarray]] = {}
    for name, needed in ((PREPROCESSOR, features), (POSTPROCESSOR, {ACTION: ("ACTION", action_dim)})):
        entries = _processor_steps(folder / name, _STEPS | more_steps)
        kind = "normalizer_processor" if name == PREPROCESSOR else "unnormalizer_processor"
        found = [entry for entry in entries if entry.get("registry_name") == kind]
        rebuilt |= _check_stats(folder / name, found, needed, mapping, misnamed, ranges)
        steps.append(tuple(entry["registry_name"] for entry in entries))
        for entry in entries:
            for before, now in _map(_map(entry.get("config")).get("rename_map")).items():
                renamed[str(now)] = str(before)
    stats = rebuilt if misnamed else None
    if any("relative" in step or "delta" in step or "absolute" in step for step in (*steps[0], *steps[1])):
        ranges.pop(ACTION, None)
    return CheckpointFiles(
        folder, config, images, state_size, action_dim, steps[0], steps[1], unread, renamed, stats, ranges
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except FileNotFoundError:
        raise PolicyError(f"{file.parent} holds no {file.name}: copy the whole checkpoint folder") from None
    if not isinstance(values, dict):
        raise PolicyError(f"{file} holds {type(values).__name__}; a map was expected")
    return values


def _feature(value: Any, name: str, file: Path) -> tuple[str, tuple[int, ...]]:
    shape = value.get("shape") if isinstance(value, dict) else None
    if (
        not isinstance(value, dict)
        or not isinstance(shape, list)
        or not 0 < len(shape) <= 4
        or not all(type(n) is int and n > 0 for n in shape)
    ):
        raise PolicyError(
            f"the feature {name} in {file} is {shown(value, 80)}; a type and a shape were expected"
        )
    if math.prod(shape) > (MAX_VALUES if len(shape) == 1 else 3 * MAX_IMAGE_PIXELS):
        raise PolicyError(
            f"the feature {name} in {file} has shape {shown(shape)}, more than a robot can send"
        )
    return str(value.get("type")), tuple(shape)


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _inputs(config: dict[str, Any], folder: Path) -> tuple[dict[str, tuple[int, int]], int, tuple[str, ...]]:
    """({image feature: (height, width)}, size of observation.state, features that the model never reads)"""
    file = folder / CONFIG
    features = config.get("input_features")
    if not isinstance(features, dict) or not features:
        raise PolicyError(f"{file} names no input_features, so what the policy looks at is unknown")
    images: dict[str, tuple[int, int]] = {}
    state_size = 0
    unread = []
    whole = config.get("type") in READ_WHOLE
    for name, value in features.items():
        kind = value.get("type") if isinstance(value, dict) else None
        if (kind in UNREAD_TYPES and name != STATE) or (kind == "ENV" and not whole):
            unread.append(name)
            continue
        kind, shape = _feature(value, name, file)
        if kind == "VISUAL":
            if len(shape) != 3 or shape[0] != 3:
                raise PolicyError(
                    f"the image {name} in {file} has shape {list(shape)}; [3, height, width] was expected"
                )
            images[name] = (shape[1], shape[2])
        elif kind == "STATE" and name == STATE and len(shape) == 1:
            state_size = shape[0]
        else:
            what = "the state of a simulation, " if kind == "ENV" else ""
            raise PolicyError(
                f"the policy in {folder} takes {name} ({kind}, shape {list(shape)}), {what}which no robot sends; images "
                f"and {STATE} were expected"
            )
    if config.get("type") == "diffusion" and not state_size:
        raise PolicyError(
            f"the diffusion policy in {folder} takes no {STATE}, and LeRobot's cannot be built without: train it with one"
        )
    return images, state_size, tuple(unread)


def _action_dim(config: dict[str, Any], folder: Path) -> int:
    file = folder / CONFIG
    features = config.get("output_features")
    if not isinstance(features, dict) or ACTION not in features:
        raise PolicyError(f"{file} names no output feature {ACTION!r}")
    shape = _feature(features[ACTION], ACTION, file)[1]
    if len(shape) != 1:
        raise PolicyError(f"the action in {file} has shape {list(shape)}; one dimension was expected")
    return shape[0]


def _check_weights(folder: Path) -> list[str]:
    """The tensors that hold the normalisation, as LeRobot before 0.4 saved it. Raises `PolicyError`."""
    file = folder / WEIGHTS
    if not os.path.lexists(file):
        if (other := other_form(folder)) is not None:
            raise PolicyError(other)
        pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
        if pickles:
            raise PolicyError(
                f"{folder} holds its weights as {pickles[0]}, a pickle that could run any code when it is opened: "
                f"save them as {WEIGHTS}"
            )
        raise PolicyError(f"{folder} holds no {WEIGHTS}: copy the whole checkpoint folder")
    return [name for name in _open(file) if name.startswith(OLD_STATS)]


def _stats_in_weights(
    file: Path, names: list[str], features: dict[str, tuple[str, int]], mapping: dict[str, str]
) -> dict[str, dict[str, np.ndarray]]:
    """The statistics {feature: {statistic: values}} in the tensors `normalize_inputs.buffer_observation_state.mean` etc.

    There a feature's dots became underscores; only config.json tells which of them were dots. Raises `PolicyError`.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    stored = _open(file, names)
    for name, (kind, size) in features.items():
        mode = str(mapping.get(kind, "IDENTITY"))
        place = "unnormalize_outputs" if name == ACTION else "normalize_inputs"
        buffer = f"{place}.buffer_{name.replace('.', '_')}"
        own = {stat: stored.get(f"{buffer}.{stat}") for stat in _wanted(mode, name, file)}
        found[name] = _checked(own, name, size, mode, file)
    return {name: values for name, values in found.items() if values}


def _wanted(mode: str, name: str, file: Path) -> tuple[str, ...]:
    """The statistics that a normalisation mode reads. Raises `PolicyError` for an unknown one."""
    if mode != "IDENTITY" and mode not in _STATS:
        raise PolicyError(f"{file} normalises {name} by {mode!r}; one of {', '.join(_STATS)} was expected")
    return _STATS.get(mode, ())


def _checked(
    values: Mapping[str, np.ndarray | None], name: str, size: int, mode: str, file: Path
) -> dict[str, np.ndarray]:
    """The statistics {statistic: values} of one feature, when they are all there. Raises `PolicyError`."""
    for stat, value in values.items():
        if value is None:
            raise PolicyError(
                f"the normalisation stats of {name} are missing ({stat}, for {mode}, in {file.name}): without them "
                "the policy's actions would be meaningless, so save the checkpoint again with its dataset's stats"
            )
        finite = int(np.isfinite(value.astype(np.float64)).sum())
        if value.size != size or finite != size:
            raise PolicyError(
                f"the normalisation stats of {name} ({stat}) in {file.name} have {value.size} values of which "
                f"{finite} are finite; {size} were expected"
            )
    return {stat: value for stat, value in values.items() if value is not None}


def _open(file: Path, read: Iterable[str] = ()) -> dict[str, np.ndarray | None]:
    """The tensors' names in a safetensors file, with the values of those that are to be read. Raises `PolicyError`."""
    wanted = set(read)
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_tensor(name) if name in wanted else None for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise unreadable(
            file, f"{file} is truncated or damaged ({error}): copy the checkpoint again"
        ) from error


def _processor_steps(file: Path, allowed: frozenset[str]) -> list[dict[str, Any]]:
    values = _read_json(file)
    steps = values.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise PolicyError(f"{file} has no list of steps; a processor that LeRobot saved was expected")
    for step in steps:
        name = step.get("registry_name")
        if not isinstance(name, str) or RENAMED_STEPS.get(name, name) not in allowed:
            asked = step.get("class") if name is None else name
            raise PolicyError(
                f"{file} has the step {asked!r:.80}, which processors of this family do not have: a checkpoint may not "
                f"choose code; {', '.join(sorted(allowed))} were expected"
            )
        state = step.get("state_file")
        if state is not None:
            if not isinstance(state, str) or Path(state).name != state:
                raise PolicyError(f"{file} names the state file {state!r}; a file beside it was expected")
            if not os.path.lexists(file.parent / state):
                raise PolicyError(
                    f"{file.parent} holds no {state}, which {file.name} needs: copy the whole folder"
                )
    return steps


def _check_stats(
    file: Path,
    normalizers: list[dict[str, Any]],
    features: dict[str, tuple[str, int]],
    mapping: dict[str, str],
    misnamed: list[str],
    ranges: dict[str, dict[str, np.ndarray]],
) -> dict[str, dict[str, np.ndarray]]:
    """Each feature {name: (type, size)} that is normalised must have its stats, of that size and finite.

    Returns them. LeRobot's migration of old checkpoints writes `cam.high` for `cam_high`: such stats are found, too,
    and added to `misnamed`. All stats of state and action are added to `ranges`.
    """
    checked: dict[str, dict[str, np.ndarray]] = {}
    settings: dict[str, Any] = {}
    stats: dict[str, np.ndarray | None] = {}
    if normalizers:
        settings = _map(normalizers[0].get("config"))
        state = normalizers[0].get("state_file")
        if state is not None:
            stats_file = file.parent / state
            stats = _open(stats_file, _open(stats_file))
    norm_map = _map(settings.get("norm_map"))
    listed = _map(settings.get("features"))
    only = settings.get("normalize_observation_keys")
    for name, (kind, size) in features.items():
        mode = str(norm_map.get(kind, "IDENTITY"))
        # What is not listed there would pass through unchanged, without a word.
        skipped = name != ACTION and (name not in listed or (isinstance(only, list) and name not in only))
        if mode == "IDENTITY" or skipped:
            wanted = mapping.get(kind, "IDENTITY")
            if wanted == "IDENTITY":
                continue
            raise PolicyError(
                f"{file} does not normalise {name}, but the checkpoint was trained with {wanted}: the normalisation "
                "stats are missing, so its actions would be meaningless"
            )
        own = {
            stat: stats.get(f"{name}.{stat}", stats.get(f"{name.replace('_', '.')}.{stat}"))
            for stat in _wanted(mode, name, file)
        }
        checked[name] = _checked(own, name, size, mode, file)
        if f"{name}.{next(iter(own))}" not in stats:
            misnamed.append(name)
    for key, value in stats.items():
        feature, _, stat = key.rpartition(".")
        if feature in features and feature in (STATE, ACTION) and value is not None:
            ranges.setdefault(feature, {})[stat] = value
    return checked


def count_differences(missing: list[str], extra: list[str]) -> str:
    """What a file lacks and what it has too many: how many, and one of each by name; empty when there is nothing."""
    return ", ".join(
        f"{len(names)} {word} ({names[0]})"
        for names, word in ((missing, "missing"), (extra, "extra"))
        if names
    )
