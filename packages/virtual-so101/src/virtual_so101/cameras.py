"""The rendered cameras as LeRobot's `ZMQCamera` reads them: JPEG in JSON on ZeroMQ PUB sockets.

Each camera has a port of its own, from the first port upwards: a `ZMQCamera` that does not find its name in a
message takes the first image there is, so a camera that stops must not leave another one's picture behind.

    {"images": {"front": "<base64 JPEG>"}, "timestamps": {"front": unix seconds}, "sim_time": seconds}

`ZMQCamera` hands out what OpenCV decodes, without swapping channels. The RGB picture is therefore encoded as
it lies: the driver gets RGB, while an ordinary viewer would see red and blue swapped (LeRobot's own image
server does the same).

One thread renders, encodes and sends, as `render` must always be called from the same thread. In real time
it works at `fps` against absolute deadlines and leaves out what it misses; otherwise it renders on `publish`
only and repeats the last pictures meanwhile, so that the driver does not take its cameras for dead.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["CAMERA_HEIGHT", "CAMERA_WIDTH", "CameraServer", "PortBusyError", "camera_config"]

CAMERA_WIDTH, CAMERA_HEIGHT = 640, 480
_ADDRESS = "127.0.0.1"
# While nothing is rendered the last pictures go out this often, seconds: ZMQCamera gives up after 1 s.
_REPEAT = 0.1
# ZMQCamera's disconnect waits 2 s for its reader and then closes the socket under it, which aborts the whole
# process; its own default of 5 s per wait therefore kills a driver whose camera fell silent. Milliseconds.
_READER_TIMEOUT = 1500
# A slow reader loses pictures rather than keeps old ones.
_SEND_QUEUE = 2


class PortBusyError(RuntimeError):
    """A port is in use; the message says which one."""


def camera_config(names: Sequence[str], ports: Sequence[int], fps: int) -> dict[str, dict[str, Any]]:
    """What LeRobot needs to read these cameras: name -> fields of a `ZMQCameraConfig`, with its type."""
    return {
        name: {
            "type": "zmq",
            "server_address": _ADDRESS,
            "port": port,
            "camera_name": name,
            "width": CAMERA_WIDTH,
            "height": CAMERA_HEIGHT,
            "fps": fps,
            "timeout_ms": _READER_TIMEOUT,
        }
        for name, port in zip(names, ports, strict=True)
    }


class CameraServer:
    """Serves `names` from `render(name) -> (480, 640, 3) uint8 RGB`, which is called in this thread only.

    `finish` is called there at the end. `port` is the first camera's; 0 lets the system choose. Raises `PortBusyError` where one is in use.
    """

    def __init__(
        self,
        names: Sequence[str],
        render: Callable[[str], np.ndarray],
        *,
        port: int = 0,
        fps: int = 30,
        quality: int = 95,
        clock: Callable[[], float] = lambda: 0.0,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        import zmq

        self.names = tuple(names)
        self.fps = fps
        self.ports: list[int] = []
        # Rounds of pictures rendered since the start, and rounds that came too late and were left out.
        self.rounds = 0
        self.missed = 0
        # What ended the thread, if anything did: the twin reports it.
        self.error: BaseException | None = None
        self._render = render
        self._quality = quality
        self._clock = clock
        self._finish = finish
        self._frozen: set[str] = set()
        self._blind: set[str] = set()
        self._messages: dict[str, str] = {}
        self._images: dict[str, str] = {}
        self._times: deque[float] = deque(maxlen=2 * fps)
        self._realtime = False
        self._running = False
        self._wanted = self._served = 0
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="cameras", daemon=True)
        self._context = zmq.Context()
        self._sockets: dict[str, Any] = {}
        try:
            for i, name in enumerate(self.names):
                self._bind(name, port + i if port else 0)
        except PortBusyError:
            self._context.destroy(linger=0)
            raise

    def _bind(self, name: str, port: int) -> None:
        import zmq

        socket = self._context.socket(zmq.PUB)
        socket.set(zmq.SNDHWM, _SEND_QUEUE)
        socket.set(zmq.LINGER, 0)
        try:
            socket.bind(f"tcp://{_ADDRESS}:{port or '*'}")
        except zmq.ZMQError as error:
            socket.close()
            raise PortBusyError(
                f"camera port {port} ({name}) cannot be opened: {error}; stop what uses it or pass another "
                "--camera-port"
            ) from error
        self._sockets[name] = socket
        endpoint = str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self.ports.append(int(endpoint.rstrip("\0").rpartition(":")[2]))

    @property
    def config(self) -> dict[str, dict[str, Any]]:
        """The camera config file's content."""
        return camera_config(self.names, self.ports, self.fps)

    @property
    def measured_fps(self) -> float:
        """Rounds per second of the last two seconds; 0 while nothing is rendered."""
        times = list(self._times)
        if len(times) < 2 or time.monotonic() - times[-1] > 1.0:
            return 0.0
        return (len(times) - 1) / max(times[-1] - times[0], 1e-9)

    def start(self, *, realtime: bool) -> None:
        """Start the thread; the first pictures are out when this returns. Raises what rendering raises."""
        self._running = True
        self._thread.start()
        # The first picture costs a quarter of a second; the clock starts after it.
        self.publish(limit=60.0)
        self.set_realtime(realtime)

    def close(self) -> None:
        """End the thread and close the sockets. Safe to call twice."""
        with self._wake:
            was_running, self._running = self._running, False
            self._wake.notify_all()
        if was_running:
            self._thread.join(10.0)
        self._context.destroy(linger=0)

    def set_realtime(self, realtime: bool) -> None:
        """Render at `fps` (True), or only when `publish` asks for it (False)."""
        with self._wake:
            self._realtime = realtime
            self._wake.notify_all()

    def publish(self, limit: float = 10.0) -> dict[str, str]:
        """Render all cameras now and send them; returns name -> base64 JPEG.

        From any thread; returns when the pictures are handed to the sockets. Raises `TimeoutError` after
        `limit` seconds, and `RuntimeError` where rendering has failed.
        """
        with self._wake:
            self._wanted += 1
            ticket = self._wanted
            self._wake.notify_all()
            done = self._wake.wait_for(lambda: self._served >= ticket or self.error is not None, limit)
            if self.error is not None:
                raise RuntimeError(f"the cameras stopped: {self.error}") from self.error
            if not done:
                raise TimeoutError(f"the cameras did not deliver within {limit:g} s")
            return dict(self._images)

    def freeze(self, name: str = "") -> None:
        """Repeat the last picture of this camera (all of them without a name) from now on."""
        self._frozen |= self._named(name)

    def blind(self, name: str = "") -> None:
        """Send nothing more from this camera (all of them without a name)."""
        self._blind |= self._named(name)

    def clear(self) -> None:
        """End all camera faults."""
        self._frozen.clear()
        self._blind.clear()

    def _named(self, name: str) -> set[str]:
        if name and name not in self.names:
            raise ValueError(f"no camera is called {name!r}; there are {', '.join(self.names)}")
        return {name} if name else set(self.names)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            with self._wake:
                self.error = error
                self._wake.notify_all()
        finally:
            self._finish()

    def _loop(self) -> None:
        period = 1.0 / self.fps
        deadline = repeat = time.monotonic()
        while True:
            with self._wake:
                wait = (deadline if self._realtime else repeat) - time.monotonic()
                if self._running and self._wanted == self._served and wait > 0:
                    self._wake.wait(wait)
                if not self._running:
                    return
                ticket = self._wanted
                asked, realtime = ticket > self._served, self._realtime
            now = time.monotonic()
            due = realtime and now >= deadline
            if asked or due:
                self._round()
                with self._wake:
                    self._served = ticket
                    self._wake.notify_all()
                repeat = now + _REPEAT
            elif not realtime and now >= repeat:
                self._send()
                repeat = now + _REPEAT
            if due:
                deadline += period
                late = int((time.monotonic() - deadline) / period)
                if late > 0:
                    self.missed += late
                    deadline += late * period
            elif not realtime:
                deadline = time.monotonic() + period

    def _round(self) -> None:
        simulated, stamp = self._clock(), time.time()
        for name in self.names:
            if name in self._frozen and name in self._messages:
                continue
            self._images[name] = self._encode(self._render(name))
            self._messages[name] = json.dumps(
                {
                    "images": {name: self._images[name]},
                    "timestamps": {name: stamp},
                    "sim_time": simulated,
                }
            )
        self.rounds += 1
        self._times.append(time.monotonic())
        self._send()

    def _encode(self, image: np.ndarray) -> str:
        import cv2

        done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self._quality])
        if not done:
            raise RuntimeError(f"OpenCV cannot encode a picture of shape {image.shape} as JPEG")
        return base64.b64encode(data).decode("ascii")

    def _send(self) -> None:
        import zmq

        for name, message in self._messages.items():
            if name not in self._blind:
                # A PUB socket drops for slow readers and never blocks.
                self._sockets[name].send_string(message, zmq.NOBLOCK)
