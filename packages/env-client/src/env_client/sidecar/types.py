"""What flows between the control process and whoever records and shows the run. NumPy and plain values only."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, TypedDict

import numpy as np

from env_client.wire import EncodedImage
from env_client.wire.images import decode_image, encode_image

__all__ = [
    "Command",
    "Consumer",
    "EpisodeEnd",
    "EpisodeStart",
    "Image",
    "Mark",
    "RunInfo",
    "TickData",
    "TickOrigin",
    "has_frames",
]

# (H, W, 3) uint8 RGB, or the JPEG that a camera gave.
Image = np.ndarray | EncodedImage

# Of every JPEG that is made here: about 50 kB for 640x480, no difference to see.
JPEG_QUALITY = 90
# One picture is encoded at a time: whoever else wants the same one waits for it instead of doing it again.
_ENCODING = threading.Lock()


@dataclass(frozen=True)
class RunInfo:
    """What stays the same in a run."""

    # Date and time, as folders are named: 2026-11-21_13-45-00.
    run_id: str
    # Unix time.
    started: float
    # The command line and its config, as plain values.
    config: dict[str, Any]
    # so101 | bi_so101 | astribot | dataset | a LeRobot robot type.
    robot: str
    action_names: tuple[str, ...]
    # Of states and actions: normalized, degrees, rad, ...
    unit: str
    # (A,) the robot's limits.
    lower: np.ndarray
    upper: np.ndarray
    # (A,) index into the state of each action value's measurement.
    state_index: np.ndarray
    # (A,) how many of the unit make one radian; for a gripper one percent of its travel.
    unit_per_rad: np.ndarray
    # {part: number of values}, in the order in which the state is concatenated.
    states: dict[str, int]
    cameras: tuple[str, ...]
    fps: float
    # `PolicySpec.to_wire()`; None for a plain openpi server.
    policy: dict[str, Any] | None
    # HOST:PORT
    server: str
    prompt: str
    execution: str


@dataclass(frozen=True)
class EpisodeStart:
    """An episode begins."""

    episode: int
    # Unix time.
    unix: float
    seed: int | None = None
    prompt: str = ""


@dataclass(frozen=True)
class EpisodeEnd:
    """An episode is over; `result` are the fields of `EpisodeResult`, as plain values."""

    episode: int
    result: dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """What a person says of an episode. A later one of the same episode replaces it."""

    episode: int
    success: bool | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class TickOrigin:
    """Where a tick's action came from."""

    # Number of the request that the chunk answers; grows over the whole run.
    chunk_id: int
    # Row of the chunk.
    index: int
    # The first action of a new chunk.
    boundary: bool


@dataclass(frozen=True)
class TickData:
    """One turn of the loop. The arrays are shared between consumers: read them, never write."""

    episode: int
    # Number of the tick's deadline since the episode began; a gap means skipped deadlines.
    tick: int
    # run | move | paused | idle
    phase: str
    # When it started: in the loop's seconds, and as Unix time; and how late that was.
    time: float
    unix: float
    late_s: float
    # Empty where the robot could not be read, and where pictures were dropped on the way (`dropped`).
    images: dict[str, Image] = field(default_factory=dict)
    # Seconds, by camera.
    image_age: dict[str, float] = field(default_factory=dict)
    # (n,) float32, all parts one after the other; None when the robot could not be read. When that was, in the
    # loop's seconds.
    state: np.ndarray | None = None
    capture_time: float | None = None
    # (A,) what the policy asked for, and what was sent; None when there was nothing.
    requested: np.ndarray | None = None
    sent: np.ndarray | None = None
    # (A,) the target after each step of the safety filter, by the step's name; empty when held.
    stages: dict[str, np.ndarray] = field(default_factory=dict)
    refused: str | None = None
    held: bool = False
    prompt: str = ""
    origin: TickOrigin | None = None
    # (H, A) float32, only in the tick in which it arrived; row 0 belongs to the tick of its observation.
    chunk: np.ndarray | None = None
    # Of that chunk: its number, the `capture_time` of the observation that it answers, and seconds from its
    # request to the answer.
    chunk_id: int | None = None
    chunk_capture_time: float | None = None
    round_trip_s: float | None = None
    # Counters of the run so far: requests, chunks, starved, waiting, delay_ticks, horizon.
    counters: dict[str, int] = field(default_factory=dict)
    # {"state": "connected" | "waiting" | "trouble", "text": why}
    connection: dict[str, str] = field(default_factory=dict)
    read_s: float = 0.0
    think_s: float = 0.0
    send_s: float = 0.0
    error: str | None = None
    # Pictures of this tick that were dropped, and ticks lost right before it, on the way here.
    dropped: int = 0
    lost: int = 0
    _jpegs: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    def jpeg(self, camera: str) -> bytes:
        """The picture as a JPEG; encoded once, whoever asks first. A camera's own JPEG is passed on as it is."""
        image = self.images[camera]
        if isinstance(image, EncodedImage) and image.codec == "jpeg":
            return bytes(image.data)
        with _ENCODING:
            if camera not in self._jpegs:
                encoded = encode_image(self.rgb(camera), "jpeg", quality=JPEG_QUALITY)
                assert isinstance(encoded, EncodedImage)
                self._jpegs[camera] = bytes(encoded.data)
            return self._jpegs[camera]

    def rgb(self, camera: str) -> np.ndarray:
        """The picture as an (H, W, 3) uint8 RGB array."""
        image = self.images[camera]
        return decode_image(image) if isinstance(image, EncodedImage) else image


def has_frames(tick: TickData, cameras: tuple[str, ...]) -> bool:
    """Whether every camera's picture is there."""
    return bool(cameras) and all(camera in tick.images for camera in cameras)


class Command(TypedDict):
    """What a person asks for, from the page to the control process."""

    name: Literal["start", "reset", "stop", "hold", "resume", "success", "failure", "prompt", "quit"]
    note: NotRequired[str]
    prompt: NotRequired[str]
    episode: NotRequired[int]


class Consumer(Protocol):
    """Whoever records or shows a run. All calls come from one thread of its own, in the order of events; an
    exception ends this consumer, is told once, and touches no other."""

    def begin_run(self, run: RunInfo) -> None: ...

    def begin_episode(self, start: EpisodeStart) -> None: ...

    def tick(self, tick: TickData) -> None: ...

    def end_episode(self, end: EpisodeEnd) -> None: ...

    def mark(self, mark: Mark) -> None: ...

    def state(self, state: dict[str, Any]) -> None:
        """What a page shows beside the ticks: phase, episode, episodes, prompt, … (see `Steering.state`)."""
        ...

    def close(self) -> None:
        """The run is over, or its process is gone. Also called without `end_episode` before."""
        ...
