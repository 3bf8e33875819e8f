"""A checkpoint that openpi trained -> a ready policy: by openpi where it is installed, else by LeRobot's modules.

Error policy: `PolicyError`.
"""

from collections.abc import Callable

from env_client.wire import CameraSpec, PolicySpec

from grasp_cube.policies import openpi_policy
from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.devices import choose_device, describe_device
from grasp_cube.policies.openpi_checkpoint import OpenpiCheckpoint, read_openpi
from grasp_cube.policies.places import checkpoint_name
from grasp_cube.policies.policy import Policy, PolicyError
from grasp_cube.policies.unit import choose_unit

__all__ = ["load", "load_with_lerobot"]

# Denoising steps, where no flag says otherwise.
STEPS = 10


def load(config: PolicyConfig, report: Callable[[str], None]) -> Policy:
    """`config.path` is set. Raises `PolicyError`."""
    if openpi_policy.installed():
        return openpi_policy.load(config, report)
    return load_with_lerobot(config, report)


def load_with_lerobot(config: PolicyConfig, report: Callable[[str], None]) -> Policy:
    """The checkpoint in `config.path`, served by LeRobot's modules. Raises `PolicyError`."""
    checkpoint = read_openpi(config)
    embodiment, side = checkpoint.embodiment, checkpoint.resolution
    from grasp_cube.policies.lerobot_checkpoint import stay_offline
    from grasp_cube.policies.openpi_lerobot import lerobot_config, lerobot_processors
    from grasp_cube.policies.pi_checkpoint import RTC_DEFAULT, check_pi_options
    from grasp_cube.policies.pi_model import build_pi, vocabulary_size
    from grasp_cube.policies.tokenizer import find_tokenizer, foreign_tokens, load_tokenizer

    steps, rtc = check_pi_options(config, STEPS)
    unit, unit_source, known = choose_unit(
        embodiment,
        {} if any(checkpoint.delta) else checkpoint.stats,
        embodiment.action_names,
        checkpoint.folder,
    )
    spec = PolicySpec(
        type=checkpoint.type.removeprefix("tiny_"),
        action_dim=checkpoint.action_dim,
        horizon=_horizon(checkpoint, config),
        action_names=embodiment.action_names,
        unit=unit,
        unit_source=unit_source,
        cameras=tuple(
            CameraSpec(camera.name, side, side, camera.resize or embodiment.resize, camera.optional)
            for camera in checkpoint.cameras
        ),
        states=embodiment.states,
        fps=embodiment.fps,
        wants_prompt=True,
        supports_rtc=steps > 1,
        default_prompt=embodiment.prompt,
    )
    views = ", ".join(camera.name for camera in spec.cameras)
    report(
        f"checkpoint {checkpoint.folder}: openpi's {spec.type}, cameras {views} at {side}x{side}, chunks of "
        f"{spec.horizon} x {spec.action_dim}"
    )
    relative = [name for name, delta in zip(embodiment.action_names, checkpoint.delta, strict=True) if delta]
    report(
        f"embodiment {embodiment.name}: unit {spec.unit} ({known}), {spec.fps or 'unknown'} Hz, "
        f"{len(relative)} of {spec.action_dim} actions relative to the state; statistics of {checkpoint.asset_id}"
    )
    tokens = find_tokenizer(checkpoint.folder, config.tokenizer_path, report=report)
    device = choose_device(config.device)
    stay_offline()
    model_config = lerobot_config(checkpoint)
    model_config.num_inference_steps = steps
    model_config.device = str(device)
    tokenizer = load_tokenizer(tokens)
    model = build_pi(
        model_config,
        checkpoint.tensors,
        device=device,
        dtype=config.dtype,
        where=str(checkpoint.folder),
        report=report,
    )
    foreign = foreign_tokens(tokenizer, vocabulary_size(model), tokens)
    preprocessor, postprocessor = lerobot_processors(checkpoint, model_config, tokens)
    report(f"device {describe_device(device)}, {steps} denoising steps, real-time chunking: {rtc or 'no'}")
    from grasp_cube.policies.pi_policy import PiPolicy

    metadata = {
        "name": config.name or checkpoint_name(checkpoint.folder),
        "checkpoint": checkpoint_name(checkpoint.folder),
        "embodiment": embodiment.name,
        "task": config.task,
    }
    return PiPolicy(
        spec,
        metadata,
        model,
        preprocessor,
        postprocessor,
        device,
        features={camera.feature: camera.name for camera in checkpoint.cameras},
        embodiment=embodiment,
        noise_seed=config.noise_seed,
        optimize=config.optimize == "auto",
        rtc=rtc or RTC_DEFAULT,
        foreign_tokens=foreign,
    )


def _horizon(checkpoint: OpenpiCheckpoint, config: PolicyConfig) -> int:
    if config.n_action_steps is not None and config.n_action_steps > checkpoint.horizon:
        raise PolicyError(
            f"--policy.n_action_steps is {config.n_action_steps}, but {checkpoint.folder} predicts {checkpoint.horizon} "
            f"actions: at most {checkpoint.horizon} was expected"
        )
    return config.n_action_steps or checkpoint.horizon
