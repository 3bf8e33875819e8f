"""A checkpoint in the hands of openpi itself, where openpi is installed.

openpi and LeRobot pin versions that exclude each other, so this is for an environment built for openpi; elsewhere
LeRobot's modules serve the same checkpoints (`openpi_lerobot`). Nothing of openpi is imported before `load`.
Life cycle: used by one thread, the one that owns the device. openpi infers one observation at a time.
Error policy: `PolicyError` while loading, with openpi's own reason; `WireError` INTERNAL when openpi fails on a request.
"""

import importlib.util
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from env_client.wire import CameraSpec, ErrorCode, InvalidInput, PolicySpec, WireError

from grasp_cube.policies.chunk import check_chunk
from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.conversions import NO_CONVERSIONS
from grasp_cube.policies.devices import is_out_of_memory
from grasp_cube.policies.embodiment import Embodiment
from grasp_cube.policies.observation import Frame, ObservationReader, resolve_prompt
from grasp_cube.policies.openpi_checkpoint import openpi_embodiment, slotted_cameras
from grasp_cube.policies.openpi_config import load_openpi_config
from grasp_cube.policies.places import checkpoint_name
from grasp_cube.policies.policy import Policy, PolicyError, PolicyRequest
from grasp_cube.policies.unit import choose_unit

__all__ = ["OpenpiPolicy", "installed", "load"]

logger = logging.getLogger(__name__)

# Pixels on a side of the images that openpi's models take.
RESOLUTION = 224


def installed() -> bool:
    """Whether openpi can be imported here; nothing is imported to find out."""
    found = importlib.util.find_spec("openpi")
    # A folder of that name, such as openpi's repository, is no package.
    return found is not None and found.origin is not None


def load(config: PolicyConfig, report: Callable[[str], None]) -> Policy:
    """The policy that openpi's own `create_trained_policy` makes of `config.path`. Raises `PolicyError`."""
    folder = Path(config.path or ".")
    if config.config_name is None:
        raise PolicyError(
            f"openpi needs the name of the training config that made {folder}: give it as --policy.config_name"
        )
    trained = load_openpi_config(config.config_name, unknown_ok=True)
    embodiment = openpi_embodiment(config, folder, trained)
    try:
        from openpi.policies import policy_config
        from openpi.training import config as training_config

        train = training_config.get_config(config.config_name)
        options: dict[str, Any] = {"default_prompt": embodiment.prompt}
        if config.num_inference_steps is not None:
            options["sample_kwargs"] = {"num_steps": config.num_inference_steps}
        if config.device is not None:
            options["pytorch_device"] = config.device
        policy = policy_config.create_trained_policy(train, str(folder), **options)
    except Exception as error:
        raise PolicyError(
            f"openpi cannot make a policy of {folder} with the config {config.config_name!r}: {type(error).__name__}: "
            f"{' '.join(str(error).split()):.300}"
        ) from error
    unit, unit_source, known = choose_unit(embodiment, {}, embodiment.action_names, folder)
    spec = PolicySpec(
        type="openpi",
        action_dim=len(embodiment.action_names),
        horizon=int(train.model.action_horizon),
        action_names=embodiment.action_names,
        unit=unit,
        unit_source=unit_source,
        cameras=tuple(
            CameraSpec(
                camera.name, RESOLUTION, RESOLUTION, camera.resize or embodiment.resize, camera.optional
            )
            for camera in slotted_cameras(embodiment)
        ),
        states=embodiment.states,
        fps=embodiment.fps,
        wants_prompt=True,
        default_prompt=embodiment.prompt,
    )
    report(
        f"checkpoint {folder}: openpi's {config.config_name}, chunks of {spec.horizon} x {spec.action_dim}"
    )
    report(f"embodiment {embodiment.name}: unit {spec.unit} ({known}), {spec.fps or 'unknown'} Hz")
    metadata = {
        **(getattr(policy, "metadata", None) or {}),
        "name": config.name or checkpoint_name(folder),
        "checkpoint": checkpoint_name(folder),
        "embodiment": embodiment.name,
    }
    noise_shape = (spec.horizon, int(train.model.action_dim))
    return OpenpiPolicy(spec, metadata, policy, embodiment, noise_shape, config.noise_seed)


class OpenpiPolicy:
    """openpi's policy behind ours. openpi normalises, resizes and converts by itself."""

    def __init__(
        self,
        spec: PolicySpec,
        metadata: dict[str, Any],
        policy: Any,
        embodiment: Embodiment,
        noise_shape: tuple[int, int],
        noise_seed: int | None = None,
    ):
        self.spec = spec
        self.metadata = metadata
        self._policy = policy
        self._embodiment = embodiment
        # openpi has its own conversions between the robot's values and the model's.
        self._reader = ObservationReader.of(spec, replace(embodiment, convert=NO_CONVERSIONS))
        self._noise_shape = noise_shape
        self._noise_seed = noise_seed

    def warm_up(self) -> None:
        """One inference: the first one compiles."""
        images = {c.name: np.full((c.height, c.width, 3), 127, np.uint8) for c in self.spec.cameras}
        states = {part.name: np.zeros(part.size, np.float32) for part in self.spec.states}
        self.get_actions({"images": images, "states": states}, prompt="warm up")

    def check(self, request: PolicyRequest) -> Hashable:
        """Raises `InvalidInput`."""
        if request.rtc is not None:
            raise InvalidInput(
                "the request carries rtc, but a policy in openpi's own hands cannot follow it: leave it out, or serve "
                "the checkpoint where openpi is not installed"
            )
        self._reader.check(request)
        resolve_prompt(request, self.spec)
        return None

    def get_actions(self, obs: dict[str, Any], **request: Any) -> np.ndarray:
        """(horizon, action_dim) float32. Raises `InvalidInput` for a misfit, `WireError` when openpi fails."""
        one = PolicyRequest(obs, **request)
        self.check(one)
        return self.get_actions_batch([one])[0]

    def get_actions_batch(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray]:
        """One chunk for each request, one after the other."""
        return [self._infer(request) for request in requests]

    def close(self) -> None:
        """Let go of the model."""
        self._policy = None

    def _infer(self, request: PolicyRequest) -> np.ndarray:
        frame = self._reader.frames(request)[-1]
        obs = self._openpi_observation(frame, resolve_prompt(request, self.spec) or "")
        noise = {}
        if self._noise_seed is not None:
            random = np.random.default_rng(self._noise_seed)
            noise["noise"] = random.standard_normal(self._noise_shape, np.float32)
        try:
            actions = np.asarray(self._policy.infer(obs, **noise)["actions"])
        except Exception as error:
            if is_out_of_memory(error):  # the scheduler's to answer
                raise
            logger.exception("openpi failed")
            raise WireError(
                ErrorCode.INTERNAL,
                f"openpi failed on this observation: {type(error).__name__}; the server's log has more",
            ) from error
        return check_chunk(actions, self.spec)

    def _openpi_observation(self, frame: Frame, prompt: str) -> dict[str, Any]:
        """What openpi's clients send for this robot; a key with slashes both as it stands and as nested maps, because
        openpi's robots differ in which they read."""
        first = "channels_first" in self._embodiment.image_forms
        obs: dict[str, Any] = {"prompt": prompt}
        for camera in self._embodiment.cameras:
            if camera.name in frame.images:
                image = frame.images[camera.name]
                key = camera.keys[0] if camera.keys else f"images/{camera.name}"
                _put(obs, key, np.ascontiguousarray(image.transpose(2, 0, 1)) if first else image)
        keys, at = dict(self._embodiment.state_keys), 0
        for part in self.spec.states:
            key = keys.get(part.name, ("state",))[0]
            _put(obs, key, frame.state[at : at + part.size])
            at += part.size
        return obs


def _put(obs: dict[str, Any], key: str, value: Any) -> None:
    obs[key] = value
    *above, last = key.split("/")
    below = obs
    for part in above:
        below = below.setdefault(part, {})
    below[last] = value
