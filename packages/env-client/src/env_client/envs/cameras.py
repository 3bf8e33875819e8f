"""The cameras of a robot: a JSON file names them, LeRobot's classes read them, threads of their own wait for them.

    {"front": {"type": "opencv", "index_or_path": "/dev/video0", "width": 640, "height": 480, "fps": 30}}

`type` is opencv, realsense, zmq or any other camera type that LeRobot (or a plug-in of it) knows; the other
fields are those of LeRobot's config class.

Life cycle: `connect` opens every camera and waits for its first picture; then one thread for each camera waits
for new frames and, when its camera fails, opens it again, at most once a second. `frames` never waits: it
hands out the newest picture of each camera with its age; the control loop refuses old ones and holds.

A frozen camera delivers on time, but always the same picture. A picture that does not differ in one bit for
`frozen_after_s` while the arm moved (`moved`) is as old as its last change; while the arm stands still a
picture may stay the same, as that of a rendered or very clean camera does. The last picture that changed may show
the end of a motion whose joints are read only after it: motion counts where it began after that picture.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from env_client.envs.env import EnvError
from env_client.text_files import is_file_name, load_yaml
from env_client.wire import shown

__all__ = ["CameraRig", "Frames", "read_camera_file"]

logger = logging.getLogger(__name__)

# Names that people use -> LeRobot's names.
_TYPES = {"realsense": "intelrealsense"}
# How long a camera thread waits for one frame before it looks whether it should end, seconds.
_WAIT = 0.25
# Between two attempts to open a camera that failed, seconds.
_REOPEN = 1.0
# How long a camera may take to its first picture, seconds.
_FIRST = 15.0
# Silent for so long, a camera is closed and opened again, seconds.
_SILENT = 2.0
# How far the joints must have moved (rad, all joints together) before an unchanged picture is suspicious.
_MOVED = 0.1


def read_camera_file(path: Path) -> dict[str, dict[str, Any]]:
    """{camera: {"type": …, fields}} from a JSON (or YAML) file. Raises `EnvError` with what is wrong."""
    try:
        content = load_yaml(path)
    except (OSError, ValueError) as error:
        raise EnvError(f"the camera file {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str)
        and is_file_name(name)
        and isinstance(fields, dict)
        and isinstance(fields.get("type"), str)
        for name, fields in content.items()
    ):
        raise EnvError(
            f'the camera file {path} holds {shown(content, 80)}; {{"front": {{"type": "opencv", …}}, …}} '
            "was expected"
        )
    return content


@dataclass(frozen=True)
class Frames:
    """The newest picture of each camera."""

    # {name: (H, W, 3) uint8 RGB}; read-only for whoever gets it.
    images: dict[str, np.ndarray]
    # Seconds since each picture arrived; of a frozen camera, since it last changed.
    ages: dict[str, float]
    # Cameras whose picture is frozen.
    frozen: tuple[str, ...] = ()


class CameraRig:
    """All cameras of one robot. frozen_after_s: see the module's text; 0 switches that check off."""

    def __init__(self, cameras: dict[str, dict[str, Any]], *, frozen_after_s: float = 1.0) -> None:
        self.names = tuple(cameras)
        self._frozen_after = frozen_after_s
        self._cameras = {name: _Camera(name, fields) for name, fields in cameras.items()}
        # When it was last told of a motion.
        self._told = 0.0

    def connect(self) -> None:
        """Open all cameras, at the same time. Raises `EnvError` where one does not deliver."""
        for camera in self._cameras.values():
            camera.start()
        for camera in self._cameras.values():
            camera.wait_for_first()

    def moved(self, distance: float) -> None:
        """Tell the rig that the joints have moved: rad, all joints together, since the last call."""
        since, self._told = self._told, time.monotonic()
        for camera in self._cameras.values():
            camera.note_motion(distance, since)

    def frames(self) -> Frames:
        """The newest pictures, at once. Raises `EnvError` only for a camera that never delivered one."""
        now = time.monotonic()
        images, ages, frozen = {}, {}, []
        for name, camera in self._cameras.items():
            frame, arrived, changed = camera.latest()
            if frame is None:
                raise EnvError(f"camera {name} delivers no picture: {camera.problem or 'nothing came yet'}")
            images[name] = frame
            ages[name] = now - arrived
            if 0 < self._frozen_after < now - changed and camera.moved > _MOVED:
                ages[name] = now - changed
                frozen.append(name)
        return Frames(images, ages, tuple(frozen))

    def problems(self) -> dict[str, str]:
        """What is wrong with each camera that has a problem now."""
        return {name: camera.problem for name, camera in self._cameras.items() if camera.problem}

    def rates(self) -> dict[str, float]:
        """Pictures per second of each camera since it was opened."""
        return {name: camera.rate for name, camera in self._cameras.items()}

    def close(self) -> None:
        """Close all cameras. Safe to call twice."""
        for camera in self._cameras.values():
            camera.stopping.set()
        for camera in self._cameras.values():
            camera.join()


class _Camera:
    """One camera and the thread that waits for its frames."""

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.fields = fields
        self.stopping = threading.Event()
        # What went wrong last; empty while pictures come.
        self.problem = ""
        # How far the joints moved in motions that began after the picture last changed, rad.
        self.moved = 0.0
        self._lock = threading.Lock()
        self._frame: np.ndarray | None = None
        self._arrived = 0.0
        self._changed = 0.0
        self._mark = (0, 0)
        self._count = 0
        self._since = 0.0
        self._opened = threading.Event()
        # How often opening or reading it has failed.
        self._failed = 0
        self._thread = threading.Thread(target=self._run, name=f"camera-{name}", daemon=True)

    @property
    def rate(self) -> float:
        return self._count / max(self._arrived - self._since, 1e-6) if self._count > 1 else 0.0

    def start(self) -> None:
        self._device()  # a wrong field is known before any thread runs
        self._thread.start()

    def wait_for_first(self) -> None:
        end = time.monotonic() + _FIRST
        while not self._opened.wait(0.05) and time.monotonic() < end and self._failed < 2:
            pass
        if self._frame is None:
            raise EnvError(
                f"camera {self.name} ({self.fields['type']}) delivers no picture: "
                f"{self.problem or f'nothing came within {_FIRST:g} s'}; look at its entry in the camera file"
            )

    def latest(self) -> tuple[np.ndarray | None, float, float]:
        """The newest frame, when it arrived, and when a frame last differed from the one before."""
        with self._lock:
            return self._frame, self._arrived, self._changed

    def note_motion(self, distance: float, since: float) -> None:
        with self._lock:
            if since > self._changed:
                self.moved += distance

    def join(self) -> None:
        if self._thread.is_alive():
            self._thread.join(3.0)

    def _device(self) -> Any:
        """LeRobot's camera object, not yet opened."""
        try:
            from lerobot.cameras import CameraConfig, make_cameras_from_configs
            from lerobot.cameras.opencv import OpenCVCameraConfig  # noqa: F401  (registers its type)
            from lerobot.cameras.realsense import RealSenseCameraConfig  # noqa: F401
            from lerobot.cameras.zmq import ZMQCameraConfig  # noqa: F401
        except ImportError as error:
            raise EnvError(
                f"cameras need LeRobot ({error}); install env-client with the extra so101"
            ) from error
        fields = dict(self.fields)
        kind = str(fields.pop("type"))
        try:
            config_class = CameraConfig.get_choice_class(_TYPES.get(kind, kind))
        except (KeyError, ValueError) as error:
            known = ", ".join(sorted(CameraConfig.get_known_choices()))
            raise EnvError(f"camera {self.name} is of type {kind!r}; one of {known} was expected") from error
        if isinstance(fields.get("index_or_path"), str):
            fields["index_or_path"] = Path(fields["index_or_path"])
        try:
            return make_cameras_from_configs({self.name: config_class(**fields)})[self.name]
        except (TypeError, ValueError, ImportError) as error:
            raise EnvError(f"camera {self.name} ({kind}) is not set up correctly: {error}") from error

    def _run(self) -> None:
        while not self.stopping.is_set():
            device = None
            try:
                device = self._device()
                # Warming up would only make a camera that comes back wait.
                device.connect(warmup=False)
                self._read(device)
            except Exception as error:  # drivers raise anything; the loop holds meanwhile and we try again
                self.problem = " ".join(str(error).split()) or type(error).__name__
                self._failed += 1
                logger.warning("camera %s: %s", self.name, self.problem)
            finally:
                _close(device)
            self.stopping.wait(_REOPEN)

    def _read(self, device: Any) -> None:
        last = self._since = time.monotonic()
        self._count = 0
        while not self.stopping.is_set():
            try:
                frame = device.async_read(timeout_ms=_WAIT * 1000)
            except TimeoutError:
                if time.monotonic() - last > _SILENT:
                    raise
                continue
            last = time.monotonic()
            self._keep(frame, last)

    def _keep(self, frame: np.ndarray, now: float) -> None:
        # Every eighth pixel first; all of them only where those are the same.
        sample = zlib.crc32(np.ascontiguousarray(frame[::8, ::8]))
        mark = (sample, zlib.crc32(np.ascontiguousarray(frame)) if sample == self._mark[0] else 0)
        same = mark == self._mark or (sample == self._mark[0] and self._mark[1] == 0)
        with self._lock:
            if not same:
                self._changed = now
                self.moved = 0.0
            self._mark = mark
            self._frame = frame
            self._arrived = now
            self._count += 1
        self.problem = ""
        self._opened.set()


def _close(device: Any) -> None:
    try:
        if device is not None:
            device.disconnect()
    except Exception as error:  # closing what was never open
        logger.debug("closing a camera: %s", error)
