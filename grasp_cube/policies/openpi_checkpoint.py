"""A checkpoint that openpi trained, read and checked before anything heavy is imported.

It is `model.safetensors` (openpi's PyTorch layout) or `params/` (JAX), and `assets/<asset id>/norm_stats.json`. Whether
it is Pi0 or Pi0.5 is read from its tensors; what no file of it says comes from `--policy.config_name`, and from flags.
Error policy: `PolicyError` of one sentence: what is missing or contradicts, and the flag to give.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.config_files import read_json
from grasp_cube.policies.embodiment import SLOTS, Camera, Embodiment, choose_embodiment, delta_mask
from grasp_cube.policies.openpi_config import OpenpiConfig, load_openpi_config
from grasp_cube.policies.openpi_norm import find_norm_stats
from grasp_cube.policies.pi_tensors import SafetensorsFile, TensorSource
from grasp_cube.policies.policy import PolicyError
from grasp_cube.policies.task import load_task

__all__ = [
    "OpenpiCheckpoint",
    "openpi_embodiment",
    "read_openpi",
    "slotted_cameras",
]

WEIGHTS = "model.safetensors"
PARAMS = "params"
# Room for the prompt's tokens, unless the config says otherwise.
MAX_TOKENS = {"pi0": 48, "pi05": 200}
_SIZES = ("patch", "position")
_EMBEDDINGS = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings"


@dataclass(frozen=True)
class OpenpiCheckpoint:
    """All that is needed to serve or to convert it."""

    folder: Path
    # LeRobot's name of the model: pi0 or pi05, or a small one for tests, tiny_pi0 or tiny_pi05.
    type: str
    # Under openpi's PyTorch names.
    tensors: TensorSource
    horizon: int
    # Values in a state and an action as the model pads them.
    model_dim: int
    # Pixels on each side of an image.
    resolution: int
    max_tokens: int
    # Whether the prompt carries the state as text.
    state_in_prompt: bool
    embodiment: Embodiment
    # The embodiment's cameras in the order in which the model takes them.
    cameras: tuple[Camera, ...]
    state_size: int
    action_dim: int
    # One truth for each value of an action: relative to the state.
    delta: tuple[bool, ...]
    asset_id: str
    # MEAN_STD or QUANTILES.
    norm_mode: str
    # {feature: statistics} as LeRobot's processors take them.
    stats: dict[str, dict[str, Any]]


def read_openpi(config: PolicyConfig) -> OpenpiCheckpoint:
    """`config.path` is set. Raises `PolicyError`."""
    folder = Path(config.path or ".")
    trained = load_openpi_config(config.config_name)
    tensors, kind = _tensors(folder)
    if trained.model is not None and trained.model.removeprefix("tiny_") != kind:
        raise PolicyError(
            f"the config {trained.name!r} is of {trained.model}, but the tensors in {folder} are those of {kind}: name "
            "the config that the checkpoint was trained with"
        )
    embodiment = openpi_embodiment(config, folder, trained)
    cameras = slotted_cameras(embodiment)
    state_size, action_dim = sum(part.size for part in embodiment.states), len(embodiment.action_names)
    embodiment.convert.check(state_size, action_dim, f"the embodiment {embodiment.name}")
    model_dim = _shape(tensors, "action_in_proj.weight", 2, folder)[1]
    if max(state_size, action_dim) > model_dim:
        raise PolicyError(
            f"the embodiment {embodiment.name!r} has {state_size} state and {action_dim} action values, but the model in "
            f"{folder} takes at most {model_dim}: choose another with --policy.embodiment"
        )
    mode = "QUANTILES" if kind == "pi05" else "MEAN_STD"
    asset_id, stats = find_norm_stats(folder, config.asset_id or trained.asset_id)
    delta = trained.delta if trained.delta is not None else embodiment.delta
    if delta is None:
        raise PolicyError(
            f"whether the actions of {folder} are relative to the state is not known: name its training config with "
            "--policy.config_name (one in configs/openpi.yaml, or a yaml file of your own), or set `delta` in the "
            "embodiment"
        )
    mask = delta_mask(delta, action_dim)
    if any(mask) and state_size < action_dim:
        raise PolicyError(
            f"delta {list(delta)} makes actions of {action_dim} values relative to a state of {state_size}: the state must "
            "begin with the values that the actions have"
        )
    return OpenpiCheckpoint(
        folder=folder,
        type=trained.model or kind,
        tensors=tensors,
        horizon=_horizon(config, folder, trained),
        model_dim=model_dim,
        resolution=_resolution(tensors, folder),
        max_tokens=trained.max_tokens or MAX_TOKENS[kind],
        state_in_prompt=(kind == "pi05") if trained.state_in_prompt is None else trained.state_in_prompt,
        embodiment=embodiment,
        cameras=cameras,
        state_size=state_size,
        action_dim=action_dim,
        delta=mask,
        asset_id=asset_id,
        norm_mode=mode,
        stats=stats.for_lerobot(mode, state_size, action_dim),
    )


def _tensors(folder: Path) -> tuple[TensorSource, str]:
    """(tensors by their name in the PyTorch layout, pi0 or pi05). Raises `PolicyError`."""
    file = folder / WEIGHTS
    if file.is_file():
        stored = SafetensorsFile(file)
        names = set(stored.keys())
        if any(name.startswith("model.") for name in names):
            raise PolicyError(
                f"{file} has LeRobot's tensor names: it is a LeRobot checkpoint, so leave --policy.type out"
            )
        for name in ("action_in_proj.weight", *(f"{_EMBEDDINGS}.{part}_embedding.weight" for part in _SIZES)):
            if name not in names:
                raise PolicyError(
                    f"{file} holds no {name}: the tensors of Pi0 or Pi0.5 as openpi saves them were expected"
                )
        return stored, "pi05" if "time_mlp_in.weight" in names else "pi0"
    if (folder / PARAMS).is_dir():
        from grasp_cube.policies.openpi_jax import open_params

        params = open_params(folder / PARAMS)
        return params, params.kind
    steps = sorted(f"{found.parent.name}/" for found in folder.glob(f"*/{PARAMS}"))
    hint = f": the step folders {', '.join(steps[:4])} hold one" if steps else ""
    raise PolicyError(f"{folder} holds neither {WEIGHTS} nor {PARAMS}/, a checkpoint of openpi{hint}")


def openpi_embodiment(config: PolicyConfig, folder: Path, trained: OpenpiConfig) -> Embodiment:
    """The robot's description: the flag's, else the checkpoint's own file, else the task's, else the config's.

    Raises `PolicyError` when there is none.
    """
    task = load_task(config.task) if config.task else None
    if trained.embodiment and not (config.embodiment or (folder / "embodiment.yaml").is_file() or task):
        config = replace(config, embodiment=trained.embodiment)
    if config.prompt is None and task is None:
        config = replace(config, prompt=trained.prompt)
    embodiment = choose_embodiment(config, folder, task, 0, 0)
    if not embodiment.states or not embodiment.action_names:
        raise PolicyError(
            f"which robot {folder} was trained for is not known: name its training config with --policy.config_name, or "
            "an embodiment with states and action_names with --policy.embodiment"
        )
    # Whatever the robot, openpi cleans the prompt, and fits images in one way.
    embodiment = replace(embodiment, clean_prompt=True)
    if config.resize is None:
        cameras = tuple(replace(camera, resize=None) for camera in embodiment.cameras)
        embodiment = replace(embodiment, resize="openpi", cameras=cameras)
    return embodiment


def slotted_cameras(embodiment: Embodiment) -> tuple[Camera, ...]:
    """The cameras in the order in which the model takes them. Raises `PolicyError` when no camera has a slot."""
    cameras = tuple(camera for slot in SLOTS for camera in embodiment.cameras if camera.slot == slot)
    if not cameras:
        raise PolicyError(
            f"no camera of the embodiment {embodiment.name!r} has a slot, so which image the model takes it for is not "
            f"known: give each of its cameras one of {', '.join(SLOTS)}"
        )
    return cameras


def _horizon(config: PolicyConfig, folder: Path, trained: OpenpiConfig) -> int:
    """Actions in a chunk: the config's, else what openpi's converter wrote. The tensors do not say it."""
    written = None
    file = folder / "config.json"
    if file.is_file():
        values = read_json(file)
        written = values.get("action_horizon") if isinstance(values, dict) else None
        if type(written) is not int or written < 1:
            written = None
    if written and trained.horizon and written != trained.horizon:
        raise PolicyError(
            f"the config {trained.name!r} has chunks of {trained.horizon} actions, but {file} says {written}: name the "
            "config that the checkpoint was trained with"
        )
    horizon = trained.horizon or written
    if horizon is None:
        raise PolicyError(
            f"how many actions a chunk of {folder} has is not known: name its training config with --policy.config_name "
            "(one in configs/openpi.yaml, or a yaml file of your own)"
        )
    return horizon


def _resolution(tensors: TensorSource, folder: Path) -> int:
    """Pixels on a side: patches are square, and there is one position for each."""
    positions = _shape(tensors, f"{_EMBEDDINGS}.position_embedding.weight", 2, folder)[0]
    return math.isqrt(positions) * _shape(tensors, f"{_EMBEDDINGS}.patch_embedding.weight", 4, folder)[-1]


def _shape(tensors: TensorSource, name: str, rank: int, folder: Path) -> tuple[int, ...]:
    shape = tensors.shape(name)
    if len(shape) != rank:
        raise PolicyError(
            f"the tensor {name} in {folder} has shape {list(shape)}; {rank} dimensions were expected"
        )
    return shape
