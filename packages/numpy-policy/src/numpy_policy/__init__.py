"""A policy without a model: deterministic, quick, and as slow or as faulty as a test wants it.

Life cycle: as of any `Policy`. `config.json` holds `{"type": "numpy_test"}` and the fields of `Options`.
Error policy: observations are validated like everyone's; the faults that `behaviour` names are let out raw, so
that a test sees what the server makes of them.
"""

import json
import time
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from env_client.wire import CameraSpec, PolicySpec, StateSpec

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.observation import Frame, ObservationReader, resolve_prompt
from grasp_cube.policies.policy import PolicyError, PolicyRequest

__all__ = [
    "BEHAVIOURS",
    "NumpyPolicy",
    "Options",
    "OutOfMemoryError",
    "expected_chunk",
    "load",
    "write_checkpoint",
]

TYPE = "numpy_test"
BEHAVIOURS = ("ok", "constant", "nan", "raise", "wrong_dim", "hang", "fail_warm_up")


class OutOfMemoryError(RuntimeError):
    """What torch raises when a GPU's memory is full, by the same name."""


@dataclass(frozen=True)
class Options:
    """The fields of config.json."""

    action_dim: int = 6
    horizon: int = 16
    # Seconds that one inference takes, whatever the batch.
    delay_s: float = 0.0
    # Seconds that loading takes.
    load_s: float = 0.0
    # Megabytes that a loaded policy holds.
    hold_mb: int = 0
    # Seconds that warming up takes.
    warm_up_s: float = 0.0
    # ok | constant (zeros, without a look at the pixels: an empty policy for benchmarks) | nan (one value is NaN) | raise (a RuntimeError) | hang (for hang_s) | fail_warm_up (the same, in warm_up) | wrong_dim (one value too many in each action).
    behaviour: str = "ok"
    # Seconds that a hanging inference takes.
    hang_s: float = 3600.0
    # Requests that fit into the device's memory at once; more raise an OutOfMemoryError. None: any number.
    fits: int | None = None
    # The behaviour shows only when the prompt is this one; None: always.
    behaviour_prompt: str | None = None
    # How far the wave goes around the present state, in the policy's unit.
    amplitude: float = 5.0
    n_obs_steps: int = 1
    # Each {"name", "height", "width", "resize"}.
    cameras: tuple[dict[str, Any], ...] = (
        {"name": "front", "height": 480, "width": 640, "resize": "none"},
        {"name": "wrist", "height": 480, "width": 640, "resize": "none"},
    )
    # Each {"name", "size"}.
    states: tuple[dict[str, Any], ...] = ({"name": "arm", "size": 6},)
    action_names: tuple[str, ...] = ()
    unit: str = "normalized"
    fps: float | None = 30.0
    wants_prompt: bool = False
    default_prompt: str | None = None

    def spec(self) -> PolicySpec:
        return PolicySpec(
            type=TYPE,
            action_dim=self.action_dim,
            horizon=self.horizon,
            action_names=tuple(self.action_names) or tuple(f"joint_{i}.pos" for i in range(self.action_dim)),
            unit=self.unit,
            cameras=tuple(CameraSpec(**camera) for camera in self.cameras),
            states=tuple(StateSpec(**state) for state in self.states),
            n_obs_steps=self.n_obs_steps,
            fps=self.fps,
            wants_prompt=self.wants_prompt,
            default_prompt=self.default_prompt,
        )


def write_checkpoint(folder: str | Path, **options: Any) -> Path:
    """Write a folder that `serve_policy --policy.path` takes; `options` are the fields of `Options`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"type": TYPE} | asdict(Options(**options)), indent=2))
    return folder


def load(config: PolicyConfig) -> "NumpyPolicy":
    """The entry point. Raises `PolicyError` for a config.json with other fields."""
    path = Path(config.path or ".")
    values = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
    values.pop("type", None)
    unknown = sorted(set(values) - {field.name for field in fields(Options)})
    if unknown:
        raise PolicyError(f"{path / 'config.json'} has the unknown fields {', '.join(unknown)}")
    if config.prompt is not None:
        values["default_prompt"] = config.prompt
    if config.n_action_steps is not None:
        values["horizon"] = config.n_action_steps
    options = Options(**values)
    if options.behaviour not in BEHAVIOURS:
        raise PolicyError(f"the behaviour {options.behaviour!r}; one of {', '.join(BEHAVIOURS)} was expected")
    time.sleep(options.load_s)
    return NumpyPolicy(options, name=config.name or path.resolve().name)


def expected_chunk(
    options: Options,
    obs: dict[str, Any],
    history: Sequence[dict[str, Any]] = (),
    prompt: str | None = None,
) -> np.ndarray:
    """What a well-behaved policy of these options answers: (horizon, action_dim) float32.

    Every pixel, every state value, every tick that counts and the prompt change it.
    """
    spec = options.spec()
    request = PolicyRequest(obs, tuple(history), prompt)
    return _chunk(options, spec, ObservationReader.of(spec).frames(request), resolve_prompt(request, spec))


def _chunk(options: Options, spec: PolicySpec, frames: Sequence[Frame], prompt: str | None) -> np.ndarray:
    seed = zlib.crc32((prompt or "").encode())
    for frame in frames:
        for image in frame.images.values():
            seed = zlib.crc32(np.ascontiguousarray(image), seed)
        seed = zlib.crc32(frame.state.tobytes(), seed)
    # A slow wave around the present state, so that a robot that follows it moves gently.
    now = np.resize(frames[-1].state, spec.action_dim) if frames[-1].state.size else np.zeros(spec.action_dim)
    phase = 2 * np.pi * (seed / 2**32 + np.arange(spec.action_dim) / spec.action_dim)
    ticks = np.arange(spec.horizon)[:, None]
    return (now + options.amplitude * np.sin(phase + 0.05 * ticks)).astype(np.float32)


class NumpyPolicy:
    """A `Policy` whose answers are arithmetic on the observation's bytes."""

    def __init__(self, options: Options, name: str = TYPE):
        self.options = options
        self.spec = options.spec()
        self.metadata: dict[str, Any] = {"name": name}
        self.closed = False
        # Ones, since the system gives memory only when something is written.
        self._held: np.ndarray | None = np.ones(options.hold_mb * 1_000_000, np.uint8)
        self._reader = ObservationReader.of(self.spec)

    def warm_up(self) -> None:
        time.sleep(self.options.warm_up_s)
        if self.options.behaviour == "fail_warm_up":
            raise RuntimeError("numpy_test fails to warm up, as its config.json asks")

    def check(self, request: PolicyRequest) -> Hashable:
        self._reader.check(request)
        resolve_prompt(request, self.spec)
        return None

    def get_actions(self, obs: dict[str, Any], **request: Any) -> np.ndarray:
        return self.get_actions_batch([PolicyRequest(obs, **request)])[0]

    def get_actions_batch(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray]:
        # To sleep for nothing takes 0.06 ms.
        if self.options.delay_s:
            time.sleep(self.options.delay_s)
        if self.options.fits is not None and len(requests) > self.options.fits:
            raise OutOfMemoryError(f"{len(requests)} requests do not fit: numpy_test's config.json says so")
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        self.closed = True
        self._held = None

    def _answer(self, request: PolicyRequest) -> np.ndarray:
        if self.options.behaviour == "constant":
            return np.zeros((self.spec.horizon, self.spec.action_dim), np.float32)
        prompt = resolve_prompt(request, self.spec)
        actions = _chunk(self.options, self.spec, self._reader.frames(request), prompt)
        faulty = self.options.behaviour_prompt in (None, prompt)
        match self.options.behaviour if faulty else "ok":
            case "hang":
                time.sleep(self.options.hang_s)
            case "raise":
                raise RuntimeError("numpy_test raises, as its config.json asks")
            case "nan":
                actions[len(actions) // 2, 0] = np.nan
            case "wrong_dim":
                actions = np.concatenate([actions, actions[:, :1]], axis=1)
        return actions
