"""An observation on the wire -> the frame that a policy looks at, with every misfit named.

Life cycle: one `ObservationReader` for each loaded policy; it holds no state and may be called from any thread.
Error policy: `InvalidInput` says which part, what came and what was expected. Nothing that is passed in is changed.

What a robot sends beyond what the policy takes (a further camera, another state part) is left unread: one robot
serves many policies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from env_client.wire import CameraSpec, InvalidInput, PolicySpec, StateSpec, resize_image
from env_client.wire.images import check_image

from grasp_cube.policies.policy import PolicyRequest

__all__ = ["Frame", "ObservationReader", "resolve_prompt"]

# Where a client without a `states` map may put the whole state, as the datasets and openpi clients name it.
FLAT_STATE_KEYS = ("observation.state", "observation/state", "state")
# The same for an image: the prefix before the camera's name.
FLAT_IMAGE_PREFIXES = ("observation.images.", "observation/images/", "images/")


@dataclass(frozen=True)
class Frame:
    """One tick as the policy takes it."""

    # {camera name: (height, width, 3) uint8 RGB at the spec's size}
    images: dict[str, np.ndarray]
    # (n,) float32: the state parts in the spec's order, in the spec's unit. Empty for a policy without state.
    state: np.ndarray


class ObservationReader:
    """Reads observations for one policy spec."""

    def __init__(self, cameras: Sequence[CameraSpec], states: Sequence[StateSpec], n_obs_steps: int = 1):
        self.cameras = tuple(cameras)
        self.states = tuple(states)
        self.n_obs_steps = n_obs_steps

    @classmethod
    def of(cls, spec: PolicySpec) -> "ObservationReader":
        return cls(spec.cameras, spec.states, spec.n_obs_steps)

    def check(self, request: PolicyRequest) -> None:
        """Validate a request without resizing an image. Raises `InvalidInput`."""
        for where, obs in self._ticks(request):
            self._state(obs, where)
            for camera in self.cameras:
                image = self._image(obs, camera, where)
                if camera.resize == "none" and image.shape[:2] != (camera.height, camera.width):
                    _resized(image, camera, where)

    def frames(self, request: PolicyRequest) -> list[Frame]:
        """The `n_obs_steps` frames of a request, oldest first; the last one is now.

        A history that is too short is padded by repeating its oldest frame, as LeRobot does at the start of an
        episode. Raises `InvalidInput`.
        """
        frames = [self.frame(obs, where) for where, obs in self._ticks(request)]
        return [frames[0]] * (self.n_obs_steps - len(frames)) + frames

    def frame(self, obs: Mapping[str, Any], where: str = "the observation") -> Frame:
        """One observation as a frame. Raises `InvalidInput`."""
        images = {
            camera.name: _resized(self._image(obs, camera, where), camera, where) for camera in self.cameras
        }
        return Frame(images, self._state(obs, where))

    def _ticks(self, request: PolicyRequest) -> list[tuple[str, Mapping[str, Any]]]:
        """The observations that count, each with its name in error messages."""
        wanted = self.n_obs_steps - 1
        first = max(0, len(request.history) - wanted)
        past = (
            [(f"history[{i}]", request.history[i]) for i in range(first, len(request.history))]
            if wanted
            else []
        )
        return [*past, ("the observation", request.obs)]

    def _image(self, obs: Mapping[str, Any], camera: CameraSpec, where: str) -> np.ndarray:
        images = obs.get("images")
        if images is not None and not isinstance(images, Mapping):
            raise InvalidInput(
                f"images in {where} is {_kind(images)}; a map from camera name to (H, W, 3) uint8 image was expected"
            )
        image = None if images is None else images.get(camera.name)
        if image is None:
            image = next((obs[p + camera.name] for p in FLAT_IMAGE_PREFIXES if p + camera.name in obs), None)
        if image is None:
            came = sorted(map(str, images)) if images else _flat_cameras(obs)
            raise InvalidInput(
                f"the camera {camera.name!r} is missing in {where}: came {_names(came)}, "
                f"expected {_names([c.name for c in self.cameras])}"
            )
        try:
            check_image(image)
        except InvalidInput as error:
            raise InvalidInput(f"the camera {camera.name!r} in {where} holds {error.message}") from None
        return image

    def _state(self, obs: Mapping[str, Any], where: str) -> np.ndarray:
        if not self.states:
            return np.zeros(0, np.float32)
        total = sum(part.size for part in self.states)
        states = obs.get("states")
        if states is None:
            key = next((key for key in FLAT_STATE_KEYS if key in obs), None)
            if key is None:
                raise InvalidInput(
                    f"the states are missing in {where}: came the keys {_names(sorted(map(str, obs)))}, "
                    f"expected states with {self._expected_states()}"
                )
            return _vector(obs[key], total, key, where)
        if not isinstance(states, Mapping):
            # A plain vector is unambiguous: the parts follow each other in the spec's order.
            return _vector(states, total, "states", where)
        parts = []
        for part in self.states:
            if part.name not in states:
                raise InvalidInput(
                    f"the state part {part.name!r} is missing in {where}: came {_names(sorted(map(str, states)))}, "
                    f"expected {self._expected_states()}"
                )
            parts.append(_vector(states[part.name], part.size, f"states.{part.name}", where))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _expected_states(self) -> str:
        return ", ".join(f"{part.name} ({part.size},)" for part in self.states)


def resolve_prompt(request: PolicyRequest, spec: PolicySpec) -> str | None:
    """The prompt of a request: its own, else the observation's `prompt`, else its `task`, else the policy's default.

    Raises `InvalidInput` when the policy needs one and there is none.
    """
    for prompt in (request.prompt, request.obs.get("prompt"), request.obs.get("task"), spec.default_prompt):
        if isinstance(prompt, str) and prompt.strip():
            return prompt
    if spec.wants_prompt:
        raise InvalidInput(
            "no prompt came, and this policy follows one: send it as `prompt` (or `task` in the observation), "
            "or start the server with --policy.prompt"
        )
    return None


def _resized(image: np.ndarray, camera: CameraSpec, where: str) -> np.ndarray:
    try:
        return resize_image(image, camera.height, camera.width, camera.resize)
    except InvalidInput as error:
        raise InvalidInput(f"the camera {camera.name!r} in {where} holds {error.message}") from None


def _vector(value: Any, size: int, name: str, where: str) -> np.ndarray:
    """`value` as (size,) finite float32; a list of numbers is taken like an array."""
    array = value
    if isinstance(value, list | tuple | int | float) and not isinstance(value, bool):
        try:
            array = np.asarray(value)
        except ValueError:  # ragged lists
            array = None
    if not isinstance(array, np.ndarray | np.generic) or array.dtype.kind not in "iuf":
        raise InvalidInput(f"{name} in {where} is {_kind(value)}; a ({size},) float32 array was expected")
    if array.shape != (size,) and not (size == 1 and array.shape == ()):
        raise InvalidInput(
            f"{name} in {where} has shape {list(array.shape)}; ({size},) was expected: {size} values in the order "
            "of the policy's action and state names"
        )
    with np.errstate(over="ignore"):
        vector = np.asarray(array, np.float32).reshape(size)
    if not np.isfinite(vector).all():
        where_bad = np.flatnonzero(~np.isfinite(vector)).tolist()
        raise InvalidInput(f"{name} in {where} holds values that are not finite, at index {where_bad}")
    return vector


def _flat_cameras(obs: Mapping[str, Any]) -> list[str]:
    keys = sorted(map(str, obs))
    return [key.removeprefix(p) for key in keys for p in FLAT_IMAGE_PREFIXES if key.startswith(p)]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)} and dtype {value.dtype}"
    return f"{value!r:.60} ({type(value).__name__})"
