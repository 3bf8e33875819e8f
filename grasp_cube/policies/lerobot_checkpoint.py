"""A LeRobot ACT or Diffusion checkpoint -> a ready `LeRobotPolicy`, strictly.

Life cycle: `load` checks the files, then the task and the embodiment, and only then imports LeRobot (10-20 s), builds
the model with LeRobot's own classes and fills it. Nothing is ever fetched from a network.
Error policy: `PolicyError`; a missing, extra, misshapen or non-finite tensor ends the loading.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_client.wire import PolicySpec

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.devices import choose_device, describe_device
from grasp_cube.policies.embodiment import Embodiment, choose_embodiment
from grasp_cube.policies.lerobot_files import (
    COMPUTED,
    OLD_STATS,
    POSTPROCESSOR,
    PREPROCESSOR,
    WEIGHTS,
    CheckpointFiles,
    count_differences,
    read_checkpoint,
)
from grasp_cube.policies.lerobot_imports import RENAMED_STEPS, load_processors, model_class, new_processors
from grasp_cube.policies.places import checkpoint_name, unreadable
from grasp_cube.policies.policy import Policy, PolicyError
from grasp_cube.policies.task import load_task
from grasp_cube.policies.unit import choose_unit

__all__ = ["Description", "describe", "load", "load_model", "processor_overrides", "stay_offline"]


@dataclass(frozen=True)
class LoadedModel:
    """LeRobot's three parts of a policy, on the device."""

    model: Any
    preprocessor: Any
    postprocessor: Any
    device: Any
    parameters: int


@dataclass(frozen=True)
class Description:
    """What the files, the flags, the task and the embodiment say of a checkpoint, before its weights are read."""

    spec: PolicySpec
    embodiment: Embodiment
    # {image feature: camera on the wire}
    features: dict[str, str]
    metadata: dict[str, Any]


def load(config: PolicyConfig, report: Callable[[str], None]) -> Policy:
    """`config.path` and `config.type` are set. Raises `PolicyError`."""
    kind = config.type or ""
    files = read_checkpoint(Path(config.path or "."))
    if config.rtc is not None:
        raise PolicyError(
            f"--policy.rtc {config.rtc}: the {kind} policy in {files.folder} cannot continue its last chunk, because "
            "real-time chunking guides a flow (pi0, pi05); leave it out, and blend or ensemble the chunks on the robot"
        )
    values = _overridden(files, kind, config)
    described = describe(
        files,
        config,
        report,
        type=kind,
        horizon=_horizon(values, kind, config),
        n_obs_steps=int(values.get("n_obs_steps", 2 if kind == "diffusion" else 1)),
    )
    loaded = load_model(files, kind, values, config.device)
    report(
        f"weights: {loaded.parameters / 1e6:.1f} million parameters, strictly loaded, with normalisation stats"
    )
    report(f"device {describe_device(loaded.device)}")
    if kind == "diffusion":
        scheduler, steps = (
            values.get("noise_scheduler_type", "DDPM"),
            loaded.model.diffusion.num_inference_steps,
        )
        slow = loaded.device.type == "cpu" and steps > 20
        hint = (
            "; --policy.noise_scheduler DDIM --policy.num_inference_steps 10 is much quicker" if slow else ""
        )
        report(f"noise: {scheduler}, {steps} steps{hint}")

    from grasp_cube.policies.lerobot_policy import LeRobotDiffusionPolicy, LeRobotPolicy
    from grasp_cube.policies.speed import accelerate

    fast = None
    if config.optimize == "auto":
        sizes = list(files.images.values())
        ticks = described.spec.n_obs_steps
        fast = accelerate(kind, loaded.model, loaded.device, config.dtype, sizes, ticks, report)
    family = LeRobotDiffusionPolicy if kind == "diffusion" else LeRobotPolicy
    return family(
        described.spec,
        described.metadata,
        loaded.model,
        loaded.preprocessor,
        loaded.postprocessor,
        loaded.device,
        features=described.features,
        embodiment=described.embodiment,
        dtype=config.dtype,
        noise_seed=config.noise_seed,
        fast=fast,
    )


def describe(
    files: CheckpointFiles, config: PolicyConfig, report: Callable[[str], None], **fields: Any
) -> Description:
    """Bring the checkpoint, its task and its embodiment together, and report them.

    `fields` are those of `PolicySpec` that the family decides. Raises `PolicyError` when they do not fit each other.
    """
    folder = files.folder
    task = load_task(config.task) if config.task else None
    if task is not None:
        task.check(files.action_dim, folder)
    embodiment = choose_embodiment(config, folder, task, files.state_size, files.action_dim)
    embodiment.convert.check(files.state_size, files.action_dim, f"the embodiment {embodiment.name}")
    cameras = embodiment.camera_specs(files.images, files.renamed)
    names = embodiment.names(files.action_dim)
    unit, unit_source, known = choose_unit(embodiment, files.ranges, names, folder)
    spec = PolicySpec(
        action_dim=files.action_dim,
        action_names=names,
        unit=unit,
        unit_source=unit_source,
        cameras=tuple(cameras.values()),
        states=embodiment.state_parts(files.state_size),
        fps=embodiment.fps,
        default_prompt=embodiment.prompt,
        **fields,
    )
    views = ", ".join(f"{c.name} {c.height}x{c.width}" for c in spec.cameras) or "none"
    report(f"checkpoint {folder}: {spec.type}, cameras {views}, chunks of {spec.horizon} x {spec.action_dim}")
    if task is not None:
        report(f"task {task.name}: {task.prompt!r}")
    if files.unread:
        report(f"not asked for, because the model never reads them: {', '.join(files.unread)}")
    for feature in files.images.keys() & files.renamed:
        report(f"the robot's {files.renamed[feature]} fills {feature} (the checkpoint's rename_map)")
    if files.stats is not None:
        report("normalisation: brought from an older LeRobot's form into today's, in memory")
    report(f"embodiment {embodiment.name}: {spec.fps or 'unknown'} Hz")
    report(f"unit: {unit} ({known})")
    metadata = {
        "name": config.name or checkpoint_name(folder),
        "checkpoint": checkpoint_name(folder),
        "embodiment": embodiment.name,
        "task": task.name if task is not None else None,
    }
    features = {feature: camera.name for feature, camera in cameras.items()}
    return Description(spec, embodiment, features, metadata)


def load_model(
    files: CheckpointFiles, kind: str, values: dict[str, Any], device: str | None = None
) -> LoadedModel:
    """LeRobot's policy and processors of a checked checkpoint; `values` are its config.json with overrides.

    Raises `PolicyError`.
    """
    chosen = choose_device(device)
    stay_offline()
    import draccus
    from lerobot.configs.policies import PreTrainedConfig

    values = {key: value for key, value in values.items() if key != "type"} | {"device": str(chosen)}
    try:
        family = model_class(kind)
        config = draccus.decode(PreTrainedConfig.get_choice_class(kind), values)
        model = family(config)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PolicyError(
            f"LeRobot cannot build the policy that {files.folder / 'config.json'} describes ({reason:.300}): was it saved "
            "by a newer LeRobot, or edited by hand?"
        ) from error
    _fill(model, files.folder / WEIGHTS)
    model.eval().requires_grad_(False).to(chosen)
    model.reset()
    overrides = processor_overrides(files, str(chosen))
    if files.stats is not None:
        pre, post = new_processors(config, files.stats)
    else:
        pre, post = load_processors(config, str(files.folder), (PREPROCESSOR, POSTPROCESSOR), overrides)
    return LoadedModel(model, pre, post, chosen, sum(p.numel() for p in model.parameters()))


def processor_overrides(files: CheckpointFiles, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The saved processors name the device of the training and the names of the recording; we give our own."""
    pre: dict[str, Any] = {
        "device_processor": {"device": device},
        "rename_observations_processor": {"rename_map": {}},
    }
    post: dict[str, Any] = {"device_processor": {"device": "cpu"}}
    return (
        {
            step: pre[now]
            for step in files.preprocessor_steps
            if (now := RENAMED_STEPS.get(step, step)) in pre
        },
        {step: post[step] for step in files.postprocessor_steps if step in post},
    )


def _overridden(files: CheckpointFiles, kind: str, config: PolicyConfig) -> dict[str, Any]:
    """config.json's values with the flags laid over them. Raises `PolicyError`."""
    values = dict(files.config)
    # Otherwise LeRobot fetches ImageNet weights, which the checkpoint's own then replace.
    values["pretrained_backbone_weights"] = None
    if kind != "diffusion":
        for field in ("num_inference_steps", "noise_scheduler"):
            if getattr(config, field) is not None:
                raise PolicyError(f"--policy.{field} has no meaning for the {kind} policy in {files.folder}")
        return values
    # A compiled U-Net has other tensor names, so loading before compiling is the only strict way.
    values["compile_model"] = False
    if config.noise_scheduler is not None:
        values["noise_scheduler_type"] = config.noise_scheduler
    if config.num_inference_steps is not None:
        most = int(values.get("num_train_timesteps", 100))
        if config.num_inference_steps > most:
            raise PolicyError(
                f"--policy.num_inference_steps is {config.num_inference_steps}, but the checkpoint was trained with {most} "
                f"noise levels: at most {most} was expected"
            )
        values["num_inference_steps"] = config.num_inference_steps
    if config.n_action_steps is not None:
        values["n_action_steps"] = config.n_action_steps
    return values


def _horizon(values: dict[str, Any], kind: str, config: PolicyConfig) -> int:
    """Actions that come out of one inference. Raises `PolicyError` when more are asked for than are predicted."""
    if kind == "diffusion":
        # The prediction begins at the oldest observation; what lies before now is not an answer.
        most = int(values.get("horizon", 64)) - int(values.get("n_obs_steps", 2)) + 1
        wanted = int(values.get("n_action_steps", 32))
    else:
        most = int(values.get("chunk_size", 100))
        wanted = config.n_action_steps or most
    if config.n_action_steps is not None and config.n_action_steps > most:
        raise PolicyError(
            f"--policy.n_action_steps is {config.n_action_steps}, but the checkpoint predicts {most} actions: at most "
            f"{most} was expected"
        )
    return min(wanted, most)


def _fill(model: Any, file: Path) -> None:
    """Copy the file's tensors into the model; half precision becomes the model's own. Raises `PolicyError`."""
    import torch
    from safetensors.torch import load_file

    try:
        # A checkpoint that was saved while compiled carries the compiler's wrapper in its names.
        tensors = {name.replace("._orig_mod", ""): value for name, value in load_file(file).items()}
    except Exception as error:
        raise unreadable(
            file, f"{file} is truncated or damaged ({error}): copy the checkpoint again"
        ) from error
    expected = model.state_dict()
    left_out = (*OLD_STATS, *(name for name in tensors if name.endswith(COMPUTED) and name not in expected))
    tensors = {name: value for name, value in tensors.items() if not name.startswith(left_out)}
    # safetensors stores tensors that share memory once; the other names are filled with it.
    stored = {expected[name].data_ptr() for name in expected if name in tensors}
    missing = [
        n for n, t in expected.items() if n not in tensors and (t.numel() == 0 or t.data_ptr() not in stored)
    ]
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        raise PolicyError(
            f"the tensors in {file} are not those of the policy in its config.json: {count_differences(missing, extra)}; copy both files "
            "from the same checkpoint"
        )
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise PolicyError(
                f"the tensor {name} in {file} has shape {list(value.shape)}, but config.json makes it "
                f"{list(expected[name].shape)}: copy both files from the same checkpoint"
            )
        if value.is_floating_point() != expected[name].is_floating_point():
            raise PolicyError(
                f"the tensor {name} in {file} is {value.dtype}; {expected[name].dtype} was expected"
            )
        if not torch.isfinite(value).all():
            raise PolicyError(
                f"the tensor {name} in {file} holds values that are not finite: its training diverged"
            )
    model.load_state_dict(tensors, strict=False)


def stay_offline() -> None:
    """A server loads what lies on its disk: a missing file is an error, never a download."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
