"""A path -> a ready `Policy`. The family is read in the checkpoint's config.json, never guessed from the path's text.

Importing this module loads no torch: each family is imported when its checkpoint is loaded. A family of another
package is found through the entry-point group `grasp_cube.policies`: the name is the `type` in config.json (or
`--policy.type`), the object is a function `load(config: PolicyConfig) -> Policy`.
Error policy: everything that an operator can mend is a `PolicyError` of one sentence.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from grasp_cube.policies.config import DTYPES, NOISE_SCHEDULERS, OPTIMIZE, RTC_MODES, PolicyConfig
from grasp_cube.policies.config_files import read_json
from grasp_cube.policies.embodiment import RESIZES
from grasp_cube.policies.places import access_problem, checkpoint_name, hub_snapshot, other_form, remote_hint
from grasp_cube.policies.policy import Policy, PolicyError
from grasp_cube.policies.task import Task, load_task

__all__ = ["ENTRY_POINTS", "FAMILIES", "checkpoint_folder", "load_policy"]

ENTRY_POINTS = "grasp_cube.policies"

# The family whose checkpoints need no config.json: only the flag names it.
OPENPI = "openpi"

# One line for each policy family: the type in config.json -> where its `load(config, report)` is.
FAMILIES = {
    "act": "grasp_cube.policies.lerobot_checkpoint:load",
    "diffusion": "grasp_cube.policies.lerobot_checkpoint:load",
    "pi0": "grasp_cube.policies.pi_checkpoint:load",
    "pi05": "grasp_cube.policies.pi_checkpoint:load",
    # Their small forms for tests and dry runs, which make_tiny_checkpoint writes.
    "tiny_pi0": "grasp_cube.policies.pi_checkpoint:load",
    "tiny_pi05": "grasp_cube.policies.pi_checkpoint:load",
    "openpi": "grasp_cube.policies.openpi_load:load",
}

Report = Callable[[str], None]


def load_policy(
    path_or_config: str | Path | PolicyConfig | None = None, *, report: Report | None = None, **options: Any
) -> Policy:
    """Load the policy of a checkpoint folder, strictly.

    `path_or_config` is a folder or a whole `PolicyConfig`; `options` are further fields of `PolicyConfig`
    (`load_policy("checkpoints/lift_act", device="cpu").get_actions(obs)`). `report` is called with a line for
    each thing that was loaded. Raises `PolicyError`, before any weight is used.
    """
    if isinstance(path_or_config, PolicyConfig):
        config = replace(path_or_config, **options)
    else:
        path = None if path_or_config is None else str(path_or_config)
        config = PolicyConfig(**({"path": path} | options))
    report = report or (lambda line: None)
    _check_options(config)
    task = load_task(config.task) if config.task else None
    folder = _folder(config, task)
    config = replace(config, path=str(folder))
    kind = _type(config, folder)
    try:
        if kind in FAMILIES:
            module, _, name = FAMILIES[kind].partition(":")
            policy = getattr(importlib.import_module(module), name)(replace(config, type=kind), report)
        else:
            policy = _plug_in(kind)(_with_task(config, kind, task))
            report(f"policy {kind!r} of a plug-in from {folder}")
    except PolicyError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise PolicyError(
            f"{folder} could not be loaded as {kind!r}: {type(error).__name__}: {reason[0] if reason else 'no reason given'}"
        ) from error
    if task is not None:
        task.check(policy.spec.action_dim, folder)
    return policy


def checkpoint_folder(config: PolicyConfig) -> Path:
    """The absolute folder that `load_policy` reads for this config. Raises `PolicyError` when there is none."""
    return _folder(config, load_task(config.task) if config.task else None)


def _check_options(config: PolicyConfig) -> None:
    for field, allowed in (
        ("dtype", DTYPES),
        ("noise_scheduler", NOISE_SCHEDULERS),
        ("optimize", OPTIMIZE),
        ("resize", RESIZES),
        ("rtc", RTC_MODES),
    ):
        value = getattr(config, field)
        if value is not None and value not in allowed:
            raise PolicyError(f"--policy.{field} is {value!r}; one of {', '.join(allowed)} was expected")
    for field in ("num_inference_steps", "n_action_steps"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise PolicyError(f"--policy.{field} is {value}; at least 1 was expected")


def _folder(config: PolicyConfig, task: Task | None) -> Path:
    """The absolute folder of the checkpoint."""
    if config.path is not None:
        text = config.path.removeprefix("file://")
        folder = Path(text).expanduser()
        if not os.path.lexists(folder) and (cached := hub_snapshot(text)) is not None:
            folder = cached
    elif task is not None and task.checkpoint is not None:
        folder = task.checkpoint
    elif task is not None:
        raise PolicyError(f"the task {task.name!r} has no checkpoint of its own: name one with --policy.path")
    else:
        raise PolicyError("no checkpoint was named: give --policy.path FOLDER or --policy.task lift")
    absolute = folder.absolute()
    if (problem := access_problem(absolute)) is not None:
        raise PolicyError(problem)
    if not absolute.exists():
        hint = "check the spelling"
        remote = remote_hint(config.path or "")
        if "://" in (config.path or "") and remote is not None:
            raise PolicyError(f"{config.path} is not on this machine: {remote}")
        if not folder.is_absolute():
            hint = "a relative path counts from the folder in which the command runs: run it from the project's root, or give an absolute path"
        if absolute.is_symlink():
            hint = f"it is a link to {os.readlink(absolute)}, which is not there"
        raise PolicyError(f"there is no checkpoint at {absolute}: {'; '.join(filter(None, (hint, remote)))}")
    if not absolute.is_dir():
        raise PolicyError(f"{absolute} is a file; the folder that holds config.json was expected")
    return absolute


def _type(config: PolicyConfig, folder: Path) -> str:
    """The policy family, from config.json or the flag."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        if config.type is not None and (config.type == OPENPI or config.type not in FAMILIES):
            return config.type
        inner = sorted(str(found.parent.relative_to(folder)) for found in folder.glob("*/config.json"))
        inner += sorted(str(found.parent.relative_to(folder)) for found in folder.glob("*/*/config.json"))
        hint = (
            f"it lies in {', '.join(inner[:3])} below it" if inner else "is this the checkpoint's own folder?"
        )
        if (folder / "assets").is_dir() or (folder / "params").is_dir():
            hint = f"a checkpoint that openpi trained is named by --policy.type {OPENPI} --policy.config_name NAME"
        other = other_form(folder)
        raise PolicyError(other or f"the folder {folder} holds no config.json: {hint}")
    values = read_json(file)
    if isinstance(values, dict) and "input_shapes" in values and "type" not in values:
        raise PolicyError(
            f"{folder} was saved by a LeRobot of 2024, whose config.json no later one reads: train it again"
        )
    kind = values.get("type") if isinstance(values, dict) else None
    if kind is not None and not isinstance(kind, str):
        kind = None
    if config.type is not None:
        if kind is not None and kind != config.type and config.type in FAMILIES:
            raise PolicyError(
                f"--policy.type is {config.type!r}, but {file} says {kind!r}: leave the flag out"
            )
        return config.type
    if kind is None:
        raise PolicyError(
            f"{file} has no `type`, so the policy family is unknown: one of {_known()} was expected; a checkpoint that "
            f"openpi trained is named by --policy.type {OPENPI} --policy.config_name NAME"
        )
    return kind


def _plug_in(kind: str) -> Callable[[PolicyConfig], Policy]:
    found = [point for point in entry_points(group=ENTRY_POINTS) if point.name == kind]
    if not found:
        raise PolicyError(f"the policy type {kind!r} is unknown: one of {_known()} was expected")
    try:
        return found[0].load()
    except Exception as error:
        raise PolicyError(
            f"the plug-in for the policy type {kind!r} ({found[0].value}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _known() -> str:
    return ", ".join(sorted({*FAMILIES, *(point.name for point in entry_points(group=ENTRY_POINTS))}))


def _with_task(config: PolicyConfig, kind: str, task: Task | None) -> PolicyConfig:
    """What a plug-in need not look up by itself."""
    prompt = config.prompt or (task.prompt if task else None)
    return replace(config, type=kind, prompt=prompt, name=config.name or checkpoint_name(config.path or "."))
