"""The files of a LeRobot checkpoint, read and checked before anything heavy is imported.

LeRobot itself lets several kinds of damage pass in silence: a policy without normalisation stats runs on raw values,
a missing tensor stays random. Whatever can be seen in the files is refused here, in well under a second.
Error policy: `PolicyError`, one sentence that names the file.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from env_client.wire import shown
from env_client.wire.images import MAX_IMAGE_PIXELS
from safetensors import SafetensorError, safe_open

from grasp_cube.policies.config_files import read_json
from grasp_cube.policies.policy import PolicyError

__all__ = [
    "ACTION",
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
_OLD_PREFIXES = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


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
    # {feature: {statistic: values}} of state and action; those of relative actions are left out, as they have no unit bound.
    stats: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def read_checkpoint(folder: Path, more_steps: frozenset[str] = frozenset()) -> CheckpointFiles:
    """Read and check everything but the weights' values. `more_steps`: names of steps that the processors of this family
    may have besides the common ones. Raises `PolicyError`."""
    config = _read_json(folder / CONFIG)
    images, state_size = _inputs(config, folder)
    action_dim = _action_dim(config, folder)
    _check_weights(folder)
    features = dict.fromkeys(images, ("VISUAL", 3))
    if state_size:
        features[STATE] = ("STATE", state_size)
    steps = []
    stats: dict[str, dict[str, np.ndarray]] = {}
    for name, needed in ((PREPROCESSOR, features), (POSTPROCESSOR, {ACTION: ("ACTION", action_dim)})):
        entries = _processor_steps(folder / name, _STEPS | more_steps)
        kind = "normalizer_processor" if name == PREPROCESSOR else "unnormalizer_processor"
        found = [entry for entry in entries if entry.get("registry_name") == kind]
        stats |= _check_stats(folder / name, found, needed, _map(config.get("normalization_mapping")))
        steps.append(tuple(entry["registry_name"] for entry in entries))
    if any("relative" in step or "delta" in step or "absolute" in step for step in (*steps[0], *steps[1])):
        stats.pop(ACTION, None)
    return CheckpointFiles(folder, config, images, state_size, action_dim, steps[0], steps[1], stats)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except FileNotFoundError:
        raise PolicyError(
            f"{file.parent} holds no {file.name}: copy the whole checkpoint folder; one that an older LeRobot saved "
            "is first converted with `python -m lerobot.processor.migrate_policy_normalization`"
        ) from None
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


def _inputs(config: dict[str, Any], folder: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """({image feature: (height, width)}, size of observation.state)"""
    file = folder / CONFIG
    features = config.get("input_features")
    if not isinstance(features, dict) or not features:
        raise PolicyError(f"{file} names no input_features, so what the policy looks at is unknown")
    images: dict[str, tuple[int, int]] = {}
    state_size = 0
    for name, value in features.items():
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
            raise PolicyError(
                f"the policy in {folder} takes {name} ({kind}, shape {list(shape)}), which no robot sends; images and "
                f"{STATE} were expected"
            )
    return images, state_size


def _action_dim(config: dict[str, Any], folder: Path) -> int:
    file = folder / CONFIG
    features = config.get("output_features")
    if not isinstance(features, dict) or ACTION not in features:
        raise PolicyError(f"{file} names no output feature {ACTION!r}")
    shape = _feature(features[ACTION], ACTION, file)[1]
    if len(shape) != 1:
        raise PolicyError(f"the action in {file} has shape {list(shape)}; one dimension was expected")
    return shape[0]


def _check_weights(folder: Path) -> None:
    file = folder / WEIGHTS
    if not file.is_file():
        pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
        if pickles:
            raise PolicyError(
                f"{folder} holds its weights as {pickles[0]}, a pickle that could run any code when it is opened: "
                f"save them as {WEIGHTS}"
            )
        raise PolicyError(f"{folder} holds no {WEIGHTS}: copy the whole checkpoint folder")
    names = list(_open(file))
    old = [name for name in names if name.startswith(_OLD_PREFIXES)]
    if old:
        raise PolicyError(
            f"{file} was saved by an older LeRobot, with its normalisation inside the weights ({old[0]}): convert it with "
            "`python -m lerobot.processor.migrate_policy_normalization --pretrained-path FOLDER`"
        )


def _open(file: Path, read: Iterable[str] = ()) -> dict[str, np.ndarray | None]:
    """The tensors' names in a safetensors file, with the values of those that are to be read. Raises `PolicyError`."""
    wanted = set(read)
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_tensor(name) if name in wanted else None for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise PolicyError(
            f"{file} is truncated or damaged ({error}; {file.stat().st_size} bytes): copy the checkpoint again"
        ) from error


def _processor_steps(file: Path, allowed: frozenset[str]) -> list[dict[str, Any]]:
    values = _read_json(file)
    steps = values.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise PolicyError(f"{file} has no list of steps; a processor that LeRobot saved was expected")
    for step in steps:
        name = step.get("registry_name")
        if not isinstance(name, str) or name not in allowed:
            asked = step.get("class") if name is None else name
            raise PolicyError(
                f"{file} has the step {asked!r:.80}, which processors of this family do not have: a checkpoint may not "
                f"choose code; {', '.join(sorted(allowed))} were expected"
            )
        state = step.get("state_file")
        if state is not None:
            if not isinstance(state, str) or Path(state).name != state:
                raise PolicyError(f"{file} names the state file {state!r}; a file beside it was expected")
            if not (file.parent / state).is_file():
                raise PolicyError(
                    f"{file.parent} holds no {state}, which {file.name} needs: copy the whole folder"
                )
    return steps


def _check_stats(
    file: Path,
    normalizers: list[dict[str, Any]],
    features: dict[str, tuple[str, int]],
    mapping: dict[str, str],
) -> dict[str, dict[str, np.ndarray]]:
    """Each feature {name: (type, size)} that is normalised must have its stats, of that size and finite; the stats of
    state and action."""
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
        for stat in _STATS.get(mode, ()):
            value = stats.get(f"{name}.{stat}")
            if value is None:
                raise PolicyError(
                    f"the normalisation stats of {name} are missing ({stat}, for {mode}, in {file.name}): without them "
                    "the policy's actions would be meaningless, so save the checkpoint again with its dataset's stats"
                )
            if value.size != size or not np.isfinite(value.astype(np.float64)).all():
                raise PolicyError(
                    f"the normalisation stats of {name} ({stat}) in {file.name} have {value.size} values of which "
                    f"{int(np.isfinite(value.astype(np.float64)).sum())} are finite; {size} were expected"
                )
        if mode not in _STATS:
            raise PolicyError(
                f"{file} normalises {name} by {mode!r}; one of {', '.join(_STATS)} was expected"
            )
    vectors: dict[str, dict[str, np.ndarray]] = {}
    for key, value in stats.items():
        feature, _, stat = key.rpartition(".")
        if feature in features and feature in (STATE, ACTION) and value is not None:
            vectors.setdefault(feature, {})[stat] = value
    return vectors


def count_differences(missing: list[str], extra: list[str]) -> str:
    """What a file lacks and what it has too many: how many, and one of each by name; empty when there is nothing."""
    return ", ".join(
        f"{len(names)} {word} ({names[0]})"
        for names, word in ((missing, "missing"), (extra, "extra"))
        if names
    )
