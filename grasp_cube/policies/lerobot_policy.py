"""LeRobot's policies at work: requests -> LeRobot's preprocessor, model and postprocessor -> chunks.

Life cycle: built by `lerobot_checkpoint.load`; used by one thread, the one that owns the device; only `check` may be
called by others. It keeps nothing between calls: a Diffusion policy's history comes with the request, and LeRobot's
own queues stay empty (`select_action` is never called).
Error policy: `InvalidInput` for an observation that does not fit; `WireError` INTERNAL for a chunk that must not leave.
"""

import contextlib
import time
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from env_client.wire import InvalidInput, PolicySpec

from grasp_cube.policies.chunk import check_chunk
from grasp_cube.policies.embodiment import Embodiment
from grasp_cube.policies.lerobot_files import STATE
from grasp_cube.policies.observation import Frame, ObservationReader, resolve_prompt
from grasp_cube.policies.policy import PolicyRequest

__all__ = ["LeRobotDiffusionPolicy", "LeRobotPolicy"]

# Warming up ends after this many inferences, or when one takes longer than this many seconds.
WARM_UP_RUNS = 3
WARM_UP_SLOW_S = 5.0


class LeRobotPolicy:
    """A policy without history and without noise (ACT)."""

    def __init__(
        self,
        spec: PolicySpec,
        metadata: dict[str, Any],
        model: Any,
        preprocessor: Any,
        postprocessor: Any,
        device: torch.device,
        *,
        features: dict[str, str],
        embodiment: Embodiment | None = None,
        dtype: str | None = None,
        noise_seed: int | None = None,
        fast: Any = None,
    ):
        """`features` maps each image feature of the checkpoint to the camera on the wire; `embodiment` says what a
        client may send besides, and the conversions between the robot's values and the checkpoint's; `fast` is what
        `speed.accelerate` made of `model`, None leaves the arithmetic to LeRobot."""
        self.spec = spec
        self.metadata = metadata
        self.device = device
        self._model = model
        self._preprocessor = preprocessor
        self._postprocessor = postprocessor
        self._features = features
        self._noise_seed = noise_seed
        self._embodiment = embodiment or Embodiment(name="none")
        self._reader = ObservationReader.of(spec, self._embodiment)
        self._fast = fast
        # The fast form decides by itself where it computes in what.
        plain = fast is not None or dtype in (None, "float32")
        self._autocast = None if plain else getattr(torch, str(dtype))

    def warm_up(self) -> None:
        """A few inferences of grey images at rest; on a GPU the first one picks its kernels."""
        for _ in range(WARM_UP_RUNS):
            began = time.monotonic()
            self.get_actions(self._at_rest(), prompt="warm up")
            if time.monotonic() - began > WARM_UP_SLOW_S:
                break

    def _at_rest(self) -> dict[str, Any]:
        """An observation that fits."""
        return {
            "images": {c.name: np.full((c.height, c.width, 3), 127, np.uint8) for c in self.spec.cameras},
            "states": {part.name: np.zeros(part.size, np.float32) for part in self.spec.states},
        }

    def check(self, request: PolicyRequest) -> Hashable:
        """All requests may share a batch: after resizing they have one shape. Raises `InvalidInput`."""
        if request.rtc is not None and not self.spec.supports_rtc:
            raise InvalidInput(
                f"the request carries rtc, but the {self.spec.type} policy cannot follow it: leave it out, and blend or "
                "ensemble the chunks on the robot"
            )
        self._reader.check(request)
        resolve_prompt(request, self.spec)
        return None

    def get_actions(self, obs: dict[str, Any], **request: Any) -> np.ndarray:
        """The chunk for one observation: (horizon, action_dim) float32 in the spec's unit, finite.

        Raises `InvalidInput` for a misfit, `WireError` INTERNAL for a chunk that is not finite.
        """
        one = PolicyRequest(obs, **request)
        self.check(one)
        return self.get_actions_batch([one])[0]

    def get_actions_batch(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray]:
        """One chunk for each request, in order, from one pass through the model."""
        ticks = list(zip(*(self._reader.frames(request) for request in requests), strict=True))
        prompts = [
            self._embodiment.prompt_text(resolve_prompt(request, self.spec) or "") for request in requests
        ]
        # The scheduler halves a batch for which the memory does not suffice: that error leaves as it is.
        with torch.no_grad():
            with self._arithmetic():
                chunk = self._chunk(requests, ticks, prompts)
            actions = self._postprocessor(chunk[:, : self.spec.horizon].float())
        return [
            check_chunk(self._embodiment.convert.actions(one), self.spec) for one in actions.cpu().numpy()
        ]

    def close(self) -> None:
        """Let go of the model and the device's memory."""
        self._model = self._fast = self._preprocessor = self._postprocessor = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)

    def _chunk(
        self, requests: Sequence[PolicyRequest], ticks: Sequence[Sequence[Frame]], prompts: Sequence[str]
    ) -> torch.Tensor:
        """(batch, at least horizon, action_dim), still normalised; `ticks` are oldest first."""
        return self._predict([self._preprocessor(self._raw(frames, prompts)) for frames in ticks])

    def _raw(self, frames: Sequence[Frame], prompts: Sequence[str]) -> dict[str, Any]:
        """One tick of every request as the checkpoint's features, batch first."""
        raw: dict[str, Any] = {"task": list(prompts), "robot_type": ""}
        for feature, camera in self._features.items():
            if camera not in frames[0].images:  # an optional one; those of a batch lack the same
                continue
            # np.stack copies, so that what the client sent is neither changed nor kept.
            pixels = torch.from_numpy(np.stack([frame.images[camera] for frame in frames])).to(self.device)
            image = pixels.permute(0, 3, 1, 2)
            raw[feature] = (image.contiguous() if self._fast is None else image).type(torch.float32) / 255
        if self.spec.states:
            raw[STATE] = torch.from_numpy(np.stack([frame.state for frame in frames])).to(self.device)
        else:
            # LeRobot's ACT without a state still asks the robot's for its device, and Pi pads it with zeros.
            raw[STATE] = torch.zeros(len(frames), 1, device=self.device)
        return raw

    def _predict(self, ticks: Sequence[dict[str, Any]]) -> torch.Tensor:
        """The chunk for normalised ticks."""
        return (self._fast or self._model.predict_action_chunk)(ticks[-1])


class LeRobotDiffusionPolicy(LeRobotPolicy):
    """A policy that denoises: it sees `n_obs_steps` consecutive ticks, and starts from noise."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._generators: list[torch.Generator] | None = None
        if self._noise_seed is not None:
            # DDPM draws noise in every step as well; LeRobot passes it no generator, so it is handed in here.
            scheduler = self._model.diffusion.noise_scheduler
            step = scheduler.step
            scheduler.step = lambda output, t, sample, generator=None: step(
                output, t, sample, generator=self._generators
            )

    def _chunk(
        self, requests: Sequence[PolicyRequest], ticks: Sequence[Sequence[Frame]], prompts: Sequence[str]
    ) -> torch.Tensor:
        if self._fast is None:
            return super()._chunk(requests, ticks, prompts)
        key = self._fast.features.key
        keys = [
            {
                feature: [key(camera, frame.images[camera]) for frame in frames]
                for feature, camera in self._features.items()
            }
            for frames in ticks
        ]
        normalised = [self._preprocessor(self._raw(frames, prompts)) for frames in ticks]
        return self._fast(normalised, keys, self._noise(len(requests)))

    def _predict(self, ticks: Sequence[dict[str, Any]]) -> torch.Tensor:
        keys = [*self._features, *([STATE] if self.spec.states else [])]
        batch = {key: torch.stack([tick[key] for tick in ticks], dim=1) for key in keys}
        return self._model.predict_action_chunk(batch, noise=self._noise(len(batch[keys[0]])))

    def _noise(self, size: int) -> torch.Tensor | None:
        """The first noise, from one generator for each request, so that a batch changes nobody's answer.

        The generators live on the CPU: the same seed gives the same noise on every device.
        """
        if self._noise_seed is None:
            return None
        self._generators = [torch.Generator().manual_seed(self._noise_seed) for _ in range(size)]
        shape = (1, self._model.config.horizon, self.spec.action_dim)
        noise = [torch.randn(shape, generator=generator) for generator in self._generators]
        return torch.cat(noise).to(self.device)
