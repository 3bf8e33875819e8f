"""Pi0 and Pi0.5 at work: requests -> LeRobot's preprocessor, flow model and postprocessor -> chunks.

Life cycle: as `LeRobotPolicy`: built by a loader, used by the device's thread, `check` by anyone. Nothing is kept
between calls: the rest of the last chunk, which real-time chunking continues, comes with the request.
Error policy: `InvalidInput` for what does not fit; `WireError` INTERNAL for a chunk that must not leave.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from env_client.wire import InvalidInput, PolicySpec, RtcPrefix

from grasp_cube.policies.embodiment import Camera, Embodiment
from grasp_cube.policies.lerobot_files import ACTION
from grasp_cube.policies.lerobot_policy import LeRobotPolicy
from grasp_cube.policies.observation import Frame, resolve_prompt
from grasp_cube.policies.pi_rtc import Guide, RtcMode, check_rtc, prefix_rows
from grasp_cube.policies.pi_sampler import make_sampler
from grasp_cube.policies.policy import PolicyRequest

__all__ = ["PiPolicy"]


class PiPolicy(LeRobotPolicy):
    """A flow policy that follows a prompt, does without a camera, and continues its last chunk."""

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
        noise_seed: int | None = None,
        optimize: bool = False,
        rtc: RtcMode = "prefix",
        foreign_tokens: Collection[str] = (),
    ):
        """`model` is a PI0Policy or PI05Policy, as `build_pi` gives it; `preprocessor` tokenizes the prompt.

        `foreign_tokens` are texts that the tokenizer knows and the model does not: a prompt that holds one is refused.
        The other arguments are those of `LeRobotPolicy`.
        """
        embodiment = embodiment or Embodiment(name="none")
        super().__init__(
            spec,
            metadata,
            model,
            preprocessor,
            postprocessor,
            device,
            features=features,
            embodiment=_all_optional(embodiment, features),
            noise_seed=noise_seed,
        )
        self._left_out = {camera.name for camera in embodiment.cameras if camera.optional}
        self._foreign_tokens = tuple(foreign_tokens)
        self._rows = int(model.config.chunk_size)
        self._noise_shape = (1, self._rows, int(model.config.max_action_dim))
        self._sample = make_sampler(model, rtc, optimize=optimize)

    def warm_up(self) -> None:
        """A few inferences, with and without a chunk to continue; on a GPU they are recorded."""
        self._sample.recording = True
        try:
            super().warm_up()
            if self.spec.supports_rtc:
                rest = np.zeros((self.spec.horizon, self.spec.action_dim), np.float32)
                rtc = RtcPrefix(rest, self.spec.horizon // 4, self.spec.horizon // 2)
                self.get_actions(self._at_rest(), prompt="warm up", rtc=rtc)
        finally:
            self._sample.recording = False

    def check(self, request: PolicyRequest) -> Hashable:
        """Requests share a batch when they lack the same cameras and continue equally long prefixes.

        Raises `InvalidInput`.
        """
        bound = None
        if request.rtc is not None:
            if not self.spec.supports_rtc:
                raise InvalidInput(
                    "the request carries rtc, but this policy denoises in one step, which leaves none in which it could "
                    "follow the last chunk: leave rtc out, or start the server with --policy.num_inference_steps 2 or more"
                )
            bound = check_rtc(request.rtc, self.spec)
        self._reader.check(request)
        prompt = resolve_prompt(request, self.spec) or ""
        for token in self._foreign_tokens:
            if token in prompt:
                raise InvalidInput(
                    f"the prompt holds {token!r}, which stands for something else than text in this policy: say it in words"
                )
        return bound, self._missing(request.obs)

    def close(self) -> None:
        self._sample = None  # type: ignore[assignment]
        super().close()

    def _missing(self, obs: Mapping[str, Any]) -> tuple[str, ...]:
        """The cameras that an observation lacks.

        The model does without a camera, so a missing one is no error; but when another one came that the policy does
        not know, it is taken for a misspelt name, unless the embodiment says that this camera may be missing.
        """
        came = self._reader.cameras_in(obs)
        missing = tuple(camera.name for camera in self.spec.cameras if camera.name not in came)
        images = obs.get("images")
        others = (
            sorted(str(name) for name in images if name not in came) if isinstance(images, Mapping) else []
        )
        if others and any(name not in self._left_out for name in missing):
            raise InvalidInput(
                f"the camera {missing[0]!r} is missing in the observation and {others[0]!r} came, which this policy does not "
                f"know: send {', '.join(camera.name for camera in self.spec.cameras)}, or leave {others[0]!r} out if the "
                "robot really has fewer cameras"
            )
        return missing

    def _chunk(
        self, requests: Sequence[PolicyRequest], ticks: Sequence[Sequence[Frame]], prompts: Sequence[str]
    ) -> torch.Tensor:
        raw = self._raw(ticks[-1], prompts)
        prefixes = [request.rtc for request in requests if request.rtc is not None]
        if prefixes:
            prev = self._embodiment.convert.actions_back(prefix_rows(prefixes, self._rows))
            # Beside the state of the current tick: a checkpoint of relative actions re-anchors them there.
            raw[ACTION] = torch.from_numpy(prev).to(self.device)
        batch = self._preprocessor(raw)
        guide = None
        if prefixes:
            delay, mask_end = check_rtc(prefixes[0], self.spec)
            guide = Guide(batch[ACTION].to(self.device, torch.float32), delay, mask_end)
        return self._sample(batch, self._noise(len(requests)), guide)

    def _noise(self, size: int) -> torch.Tensor:
        """(B, rows, D) from which the flow starts; from one generator for each request where a seed is given.

        The generators live on the CPU: the same seed gives the same noise on every device.
        """
        if self._noise_seed is None:
            return torch.randn((size, *self._noise_shape[1:]), device=self.device)
        noise = [
            torch.randn(self._noise_shape, generator=torch.Generator().manual_seed(self._noise_seed))
            for _ in range(size)
        ]
        return torch.cat(noise).to(self.device)


def _all_optional(embodiment: Embodiment, features: Mapping[str, str]) -> Embodiment:
    """The embodiment with every camera of the checkpoint listed, and none of them needed."""
    known = {camera.name: camera for camera in embodiment.cameras}
    cameras = [
        replace(known.get(name, Camera(name, feature)), optional=True) for feature, name in features.items()
    ]
    return replace(embodiment, cameras=tuple(cameras))
