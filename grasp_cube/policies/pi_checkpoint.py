"""A LeRobot checkpoint of type pi0 or pi05 -> a ready `PiPolicy`, strictly, without a network.

Life cycle: the files, the tokenizer's place, the task and the embodiment are checked before LeRobot is imported; then
the model is built and filled (`pi_model`), and the tokenizer compared with it.
Error policy: `PolicyError`. LeRobot itself would print a line and serve random weights.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.devices import choose_device, describe_device
from grasp_cube.policies.lerobot_checkpoint import describe, processor_overrides, stay_offline
from grasp_cube.policies.lerobot_files import (
    EMPTY_CAMERA,
    POSTPROCESSOR,
    PREPROCESSOR,
    PROMPT_STEPS,
    WEIGHTS,
    CheckpointFiles,
    read_checkpoint,
)
from grasp_cube.policies.lerobot_imports import know_old_steps
from grasp_cube.policies.pi_model import PI_DTYPES, build_pi, vocabulary_size
from grasp_cube.policies.pi_rtc import RtcMode
from grasp_cube.policies.pi_tensors import SafetensorsFile
from grasp_cube.policies.policy import Policy, PolicyError
from grasp_cube.policies.tokenizer import find_tokenizer, foreign_tokens, load_tokenizer, tokenizer_name

__all__ = ["RTC_DEFAULT", "check_pi_options", "load"]

TOKENIZER_STEP = "tokenizer_processor"
# docs/real-time-chunking.md says why.
RTC_DEFAULT: RtcMode = "prefix"


def load(config: PolicyConfig, report: Callable[[str], None]) -> Policy:
    """`config.path` and `config.type` are set. Raises `PolicyError`."""
    kind = config.type or ""
    folder = Path(config.path or ".")
    files = read_checkpoint(folder, PROMPT_STEPS)
    views = {name: size for name, size in files.images.items() if not name.startswith(EMPTY_CAMERA)}
    if not views:
        raise PolicyError(f"the {kind} policy in {folder} names no camera; at least one was expected")
    if TOKENIZER_STEP not in files.preprocessor_steps:
        raise PolicyError(
            f"{folder / PREPROCESSOR} has no step {TOKENIZER_STEP}, so nothing would read the prompt: copy the whole "
            "checkpoint folder"
        )
    values = _overridden(files, config)
    steps, rtc = check_pi_options(config, int(values.get("num_inference_steps", 10)))
    described = describe(
        replace(files, images=views),
        config,
        report,
        type=kind.removeprefix("tiny_"),
        horizon=_horizon(values, folder, config),
        wants_prompt=True,
        supports_rtc=steps > 1,
    )
    if described.spec.default_prompt:
        report(f"prompt of requests that name none: {described.spec.default_prompt!r}")
    tokens = find_tokenizer(
        folder, config.tokenizer_path, tokenizer_name(folder / PREPROCESSOR), report=report
    )
    device = choose_device(config.device)
    stay_offline()
    model_config = _decoded(kind, values, folder)
    tokenizer = load_tokenizer(tokens)
    model = build_pi(
        model_config,
        SafetensorsFile(folder / WEIGHTS),
        device=device,
        dtype=config.dtype,
        where=str(folder / WEIGHTS),
        report=report,
    )
    foreign = foreign_tokens(tokenizer, vocabulary_size(model), tokens)
    from lerobot.policies.factory import make_pre_post_processors

    know_old_steps()
    pre_overrides, post_overrides = processor_overrides(files, str(device))
    preprocessor, postprocessor = make_pre_post_processors(
        model_config,
        pretrained_path=str(folder),
        preprocessor_overrides=pre_overrides | {TOKENIZER_STEP: {"tokenizer": tokenizer}},
        postprocessor_overrides=post_overrides,
        preprocessor_config_filename=PREPROCESSOR,
        postprocessor_config_filename=POSTPROCESSOR,
    )
    report(f"device {describe_device(device)}, {steps} denoising steps, real-time chunking: {rtc or 'no'}")
    from grasp_cube.policies.pi_policy import PiPolicy

    return PiPolicy(
        described.spec,
        described.metadata,
        model,
        preprocessor,
        postprocessor,
        device,
        features=described.features,
        embodiment=described.embodiment,
        noise_seed=config.noise_seed,
        optimize=config.optimize == "auto",
        rtc=rtc or RTC_DEFAULT,
        foreign_tokens=foreign,
    )


def check_pi_options(config: PolicyConfig, steps: int) -> tuple[int, RtcMode | None]:
    """(denoising steps, how the last chunk is continued; None: it cannot be). `steps` is the checkpoint's own number.

    Raises `PolicyError` for flags that Pi0 and Pi0.5 cannot honour.
    """
    if config.noise_scheduler is not None:
        raise PolicyError("--policy.noise_scheduler is for Diffusion; Pi0 and Pi0.5 have none")
    if config.dtype is not None and config.dtype not in PI_DTYPES:
        raise PolicyError(
            f"--policy.dtype is {config.dtype!r}; Pi0 and Pi0.5 run in {' or '.join(PI_DTYPES)}, because float16 "
            "overflows in them"
        )
    steps = config.num_inference_steps or steps
    if steps > 1:
        return steps, config.rtc or RTC_DEFAULT  # type: ignore[return-value]
    if config.rtc is not None:
        raise PolicyError(
            f"--policy.rtc {config.rtc} needs at least 2 denoising steps, because the first one sees nothing but noise: "
            "raise --policy.num_inference_steps, or leave --policy.rtc out"
        )
    return steps, None


def _overridden(files: CheckpointFiles, config: PolicyConfig) -> dict[str, Any]:
    """config.json's values with the flags laid over them."""
    values = dict(files.config) | {"device": "cpu", "compile_model": False, "gradient_checkpointing": False}
    if config.num_inference_steps is not None:
        values["num_inference_steps"] = config.num_inference_steps
    return values


def _horizon(values: dict[str, Any], folder: Path, config: PolicyConfig) -> int:
    most = int(values.get("chunk_size", 50))
    if config.n_action_steps is not None and config.n_action_steps > most:
        raise PolicyError(
            f"--policy.n_action_steps is {config.n_action_steps}, but the checkpoint in {folder} predicts {most} actions: "
            f"at most {most} was expected"
        )
    return config.n_action_steps or most


def _decoded(kind: str, values: dict[str, Any], folder: Path) -> Any:
    """LeRobot's config of these values. Raises `PolicyError`."""
    import draccus
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies import factory  # noqa: F401 (registers the types)

    if kind.startswith("tiny_"):
        from grasp_cube.policies import pi_tiny  # noqa: F401 (registers them)
    try:
        return draccus.decode(
            PreTrainedConfig.get_choice_class(kind),
            {key: value for key, value in values.items() if key != "type"},
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PolicyError(
            f"LeRobot cannot read the policy that {folder / 'config.json'} describes ({reason:.300}): was it saved by a newer "
            "LeRobot, or edited by hand?"
        ) from error
