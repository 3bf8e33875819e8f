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
from env_client.wire import CameraSpec, InvalidInput, PolicySpec, StateSpec, resize_image, shown
from env_client.wire.images import check_image

from grasp_cube.policies.embodiment import Embodiment
from grasp_cube.policies.policy import PolicyRequest

__all__ = ["Frame", "ObservationReader", "resolve_prompt"]

# Where a client without a `states` map may put the whole state, as the datasets and openpi clients name it.
FLAT_STATE_KEYS = ("observation.state", "observation/state", "state")
# The same for an image: the prefix before the camera's name.
FLAT_IMAGE_PREFIXES = ("observation.images.", "observation/images/", "images/")
# And for a checkpoint whose images have no folder of their own (observation.image).
BARE_IMAGE_PREFIXES = ("observation.", "observation/")


@dataclass(frozen=True)
class Frame:
    """One tick as the policy takes it."""

    # {camera name: (height, width, 3) uint8 RGB at the spec's size}; an optional camera that did not come is left out.
    images: dict[str, np.ndarray]
    # (n,) float32: the state parts in the spec's order, in the checkpoint's convention. Empty for a policy without
    # state.
    state: np.ndarray


class ObservationReader:
    """Reads observations for one policy spec."""

    def __init__(
        self,
        cameras: Sequence[CameraSpec],
        states: Sequence[StateSpec],
        n_obs_steps: int = 1,
        embodiment: Embodiment | None = None,
    ):
        """`embodiment` adds where else a client may put a camera or a state part, in which form, and conversions."""
        self.cameras = tuple(cameras)
        self.states = tuple(states)
        self.n_obs_steps = n_obs_steps
        embodiment = embodiment or Embodiment(name="none")
        self._camera_keys = {camera.name: camera.keys for camera in embodiment.cameras}
        self._state_keys = dict(embodiment.state_keys)
        self._optional = frozenset(camera.name for camera in embodiment.cameras if camera.optional)
        self._forms = embodiment.image_forms
        self._convert = embodiment.convert

    @classmethod
    def of(cls, spec: PolicySpec, embodiment: Embodiment | None = None) -> "ObservationReader":
        return cls(spec.cameras, spec.states, spec.n_obs_steps, embodiment)

    def check(self, request: PolicyRequest) -> None:
        """Validate a request without resizing an image. Raises `InvalidInput`."""
        for where, obs in self._ticks(request):
            self._state(obs, where)
            for camera, image in self._images(obs, where):
                if camera.resize == "none" and image.shape[:2] != (camera.height, camera.width):
                    _resized(image, camera, where)

    def cameras_in(self, obs: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the cameras whose image came with an observation. Raises `InvalidInput`."""
        return tuple(camera.name for camera, _ in self._images(obs, "the observation"))

    def frames(self, request: PolicyRequest) -> list[Frame]:
        """The `n_obs_steps` frames of a request, oldest first; the last one is now.

        A history that is too short is padded by repeating its oldest frame, as LeRobot does at the start of an
        episode. Raises `InvalidInput`.
        """
        frames = [self.frame(obs, where) for where, obs in self._ticks(request)]
        return [frames[0]] * (self.n_obs_steps - len(frames)) + frames

    def frame(self, obs: Mapping[str, Any], where: str = "the observation") -> Frame:
        """One observation as a frame. Raises `InvalidInput`."""
        images = {camera.name: _resized(image, camera, where) for camera, image in self._images(obs, where)}
        return Frame(images, self._convert.state(self._state(obs, where)))

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

    def _images(self, obs: Mapping[str, Any], where: str) -> list[tuple[CameraSpec, np.ndarray]]:
        """The (H, W, 3) uint8 image of each camera that came; at least one."""
        found = [(camera, self._image(obs, camera, where)) for camera in self.cameras]
        came = [(camera, image) for camera, image in found if image is not None]
        if found and not came:
            raise self._no_camera(obs, self.cameras[0], where)
        return came

    def _image(self, obs: Mapping[str, Any], camera: CameraSpec, where: str) -> np.ndarray | None:
        images = obs.get("images")
        if images is not None and not isinstance(images, Mapping):
            raise InvalidInput(
                f"images in {where} is {_kind(images)}; a map from camera name to (H, W, 3) uint8 image was expected"
            )
        image = None if images is None else images.get(camera.name)
        if image is None:
            prefixes = FLAT_IMAGE_PREFIXES + BARE_IMAGE_PREFIXES
            image = _at(obs, (*(p + camera.name for p in prefixes), *self._keys_of(camera)))
        if image is None and camera.name in self._optional:
            return None
        if image is None:
            raise self._no_camera(obs, camera, where)
        image = _plain(image, self._forms)
        try:
            check_image(image)
        except InvalidInput as error:
            raise InvalidInput(f"the camera {camera.name!r} in {where} holds {error.message}") from None
        return image

    def _keys_of(self, camera: CameraSpec) -> tuple[str, ...]:
        return self._camera_keys.get(camera.name, ())

    def _no_camera(self, obs: Mapping[str, Any], camera: CameraSpec, where: str) -> InvalidInput:
        images = obs.get("images")
        came = sorted(map(str, images)) if images else _flat_cameras(obs)
        also = f" (or the key {self._keys_of(camera)[0]!r})" if self._keys_of(camera) else ""
        return InvalidInput(
            f"the camera {camera.name!r} is missing in {where}: came {_names(came)}, "
            f"expected {_names([c.name for c in self.cameras])}{also}"
        )

    def _state(self, obs: Mapping[str, Any], where: str) -> np.ndarray:
        if not self.states:
            return np.zeros(0, np.float32)
        total = sum(part.size for part in self.states)
        states = obs.get("states")
        if states is None:
            key = next((key for key in FLAT_STATE_KEYS if key in obs), None)
            if key is None and all(part.name in self._state_keys for part in self.states):
                return self._parts(obs, where)
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

    def _parts(self, obs: Mapping[str, Any], where: str) -> np.ndarray:
        """The state from the keys that the embodiment names for each part."""
        parts = []
        for part in self.states:
            keys = self._state_keys[part.name]
            value = _at(obs, keys)
            if value is None:
                raise InvalidInput(
                    f"the state part {part.name!r} is missing in {where}: came the keys "
                    f"{_names(sorted(map(str, obs)))}, expected {keys[0]!r} with {part.size} values"
                )
            parts.append(_vector(value, part.size, keys[0], where))
        return np.concatenate(parts)

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


def _at(obs: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The first value that is there: under the key as it stands, or along its parts through nested maps."""
    for key in keys:
        if obs.get(key) is not None:
            return obs[key]
        value: Any = obs
        for part in key.split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _plain(image: Any, forms: Sequence[str]) -> Any:
    """An image of another form that the embodiment allows, as (H, W, 3) uint8; anything else as it came."""
    if not forms or not isinstance(image, np.ndarray):
        return image
    if "channels_first" in forms and image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = np.ascontiguousarray(image.transpose(1, 2, 0))
    if "float" in forms and image.dtype.kind == "f" and image.size and 0 <= image.min() <= image.max() <= 1:
        image = (255 * image).astype(np.uint8)
    return image


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
    return f"{shown(value)} ({type(value).__name__})"
