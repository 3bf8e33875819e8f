"""The S1's colour cameras, as compressed as they come: the SDK's callbacks or its dictionary, ROS 1, ROS 2, rosbridge.

A JPEG is kept as its bytes (`EncodedImage`): the robot neither decodes nor encodes it, the server decodes it. What
the SDK has decoded already is BGR, as OpenCV's arrays are, and is turned into RGB here.

Life cycle: `Pictures` keeps the newest picture of each camera; a source `start`s threads that push into it, and ends
with `close`. `frames` never waits. Error policy: a source that cannot start, or a camera without a first picture, is
an `EnvError`; a picture that cannot be read is counted as none, and said once.

A camera that delivers on time but always the same picture is frozen: while the robot moves, its picture is as old as
its last change. The pictures of `get_images_dict` carry no time at all: they are as old as their last change always.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from env_client.envs.astribot_layout import CameraNames
from env_client.envs.cameras import Frames
from env_client.envs.env import EnvError
from env_client.wire import EncodedImage
from env_client.wire.images import image_size

__all__ = [
    "ImagesDict",
    "Pictures",
    "RosTopics1",
    "RosTopics2",
    "Rosbridge",
    "SdkCallbacks",
    "Source",
    "read_jpeg",
]

logger = logging.getLogger(__name__)

# How long a camera may take to its first picture, in seconds.
FIRST_S = 10.0
# How far the joints must have moved (rad, all together) before an unchanged picture is suspicious.
MOVED = 0.1
# How long a robot's bridge may take to answer, in seconds.
CONNECT_S = 5.0
MESSAGE = "sensor_msgs/CompressedImage"

# Runs a function of the SDK's object in the SDK's thread.
Call = Callable[[Callable[[Any], Any]], Any]


class Source(Protocol):
    """Where pictures come from."""

    def start(self, pictures: Pictures, cameras: Mapping[str, CameraNames]) -> None:
        """Begin to push. Raises `EnvError`."""
        ...

    def close(self) -> None: ...


class _Newest:
    """The newest picture of one camera."""

    def __init__(self) -> None:
        self.image: np.ndarray | EncodedImage | None = None
        self.arrived = self.changed = 0.0
        self.first, self.count = 0.0, 0
        self.moved = 0.0
        self.mark = 0


class Pictures:
    """The newest picture of each camera; `push` may come from any thread."""

    def __init__(
        self, names: tuple[str, ...], *, frozen_after_s: float = 1.0, timeless: bool = False
    ) -> None:
        self.names = names
        self._frozen_after_s, self._timeless = frozen_after_s, timeless
        self._lock = threading.Condition()
        self._newest = {name: _Newest() for name in names}
        # When it was last told of a motion.
        self._told = 0.0
        self._said: set[str] = set()

    def push(self, name: str, image: np.ndarray | EncodedImage) -> None:
        """A picture has come: an `EncodedImage`, or (H, W, 3) uint8 RGB."""
        data = image.data if isinstance(image, EncodedImage) else np.ascontiguousarray(image[::8, ::8])
        mark, now = zlib.crc32(data), time.monotonic()
        with self._lock:
            newest = self._newest[name]
            if mark != newest.mark or newest.image is None:
                newest.changed, newest.moved, newest.mark = now, 0.0, mark
            newest.first = newest.first or now
            newest.image, newest.arrived, newest.count = image, now, newest.count + 1
            self._lock.notify_all()

    def push_bytes(self, name: str, data: bytes) -> None:
        """A compressed picture has come; what is no JPEG or PNG is dropped."""
        image = read_jpeg(data)
        if image is None:
            if name not in self._said:
                self._said.add(name)
                logger.warning("camera %s sent %d bytes that are neither JPEG nor PNG", name, len(data))
            return
        self.push(name, image)

    def moved(self, distance: float) -> None:
        """The joints have moved: rad, all joints together, since the last call."""
        with self._lock:
            since, self._told = self._told, time.monotonic()
            for newest in self._newest.values():
                # A picture that came after that may show it.
                if since > newest.changed:
                    newest.moved += distance

    def wait_for_first(self) -> None:
        """Raises `EnvError` that names the cameras without a picture."""
        end = time.monotonic() + FIRST_S
        with self._lock:
            while missing := [name for name, newest in self._newest.items() if newest.image is None]:
                left = end - time.monotonic()
                if left <= 0:
                    raise EnvError(
                        f"no picture from {', '.join(missing)} within {FIRST_S:g} s: is the camera switched on, is "
                        "--env.camera-source the right one? --env.cameras names those that are there"
                    )
                self._lock.wait(left)

    def frames(self) -> Frames:
        """The newest pictures, at once."""
        images, ages, frozen = {}, {}, []
        with self._lock:
            now = time.monotonic()
            for name, newest in self._newest.items():
                assert newest.image is not None, "wait_for_first comes first"
                images[name] = newest.image
                ages[name] = now - newest.arrived
                unchanged = now - newest.changed
                suspicious = newest.moved > MOVED and 0 < self._frozen_after_s < unchanged
                if self._timeless or suspicious:
                    ages[name] = unchanged
                    frozen += [name] if suspicious else []
        return Frames(images, ages, tuple(frozen))  # type: ignore[arg-type]

    def rates(self) -> dict[str, float]:
        """Pictures per second of each camera since its first one."""
        with self._lock:
            return {
                name: (newest.count - 1) / max(newest.arrived - newest.first, 1e-6)
                if newest.count > 1
                else 0.0
                for name, newest in self._newest.items()
            }


def read_jpeg(data: bytes) -> EncodedImage | None:
    """A compressed picture with its size, which stands in its header; None for anything else."""
    for codec in ("jpeg", "png"):
        size = image_size(codec, data)
        if size is not None:
            return EncodedImage(codec, data, (*size, 3))
    return None


def _rgb(bgr: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(bgr, np.uint8)[..., ::-1])


class SdkCallbacks:
    """Newer SDKs: `activate_camera` and `register_image_callback`, undecoded."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def start(self, pictures: Pictures, cameras: Mapping[str, CameraNames]) -> None:
        def register(sdk: Any) -> None:
            sdk.activate_camera()
            for name, names in cameras.items():
                if not sdk.register_image_callback(
                    names.sdk, "color", _receiver(pictures, name), need_decode=False
                ):
                    raise EnvError(f"the SDK has no colour camera {names.sdk!r}")

        try:
            self._call(register)
        except AttributeError as error:
            raise EnvError(f"this SDK is older ({error}): use --env.camera-source images-dict") from error

    def close(self) -> None:
        """The callbacks end with the SDK's object; the cameras stay on for whoever else looks."""


def _receiver(pictures: Pictures, name: str) -> Callable[..., None]:
    def receive(_topic: str, message: Any, _width: int, _height: int, array: Any) -> None:
        if array is not None and np.ndim(array) == 3:
            pictures.push(name, _rgb(array))
        else:
            pictures.push_bytes(name, bytes(message.data))

    return receive


class ImagesDict:
    """Older SDKs: `get_images_dict` is asked with each reading of the joints (`poll`)."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._pictures: Pictures | None = None
        self._cameras: Mapping[str, CameraNames] = {}

    def start(self, pictures: Pictures, cameras: Mapping[str, CameraNames]) -> None:
        self._pictures, self._cameras = pictures, cameras
        end = time.monotonic() + FIRST_S
        self._call(lambda sdk: sdk.activate_camera())
        while not self._call(self.poll) and time.monotonic() < end:
            time.sleep(0.05)

    def poll(self, sdk: Any) -> bool:
        """Take what the SDK has now; whether it had every camera. For the SDK's thread."""
        assert self._pictures is not None
        colour: dict[str, Any] = (sdk.get_images_dict() or ({},))[0] or {}
        found = 0
        for name, names in self._cameras.items():
            image = colour.get(names.sdk, colour.get(names.older))
            if image is not None:
                self._pictures.push(name, _rgb(image))
                found += 1
        return found == len(self._cameras)

    def close(self) -> None: ...


class RosTopics1:
    """ROS 1: rospy, of the robot's own Python."""

    def __init__(self) -> None:
        self._subscribers: list[Any] = []

    def start(self, pictures: Pictures, cameras: Mapping[str, CameraNames]) -> None:
        try:
            import rospy
            from sensor_msgs.msg import CompressedImage
        except ImportError as error:
            raise EnvError(_no_ros("ROS 1", error)) from error
        if not rospy.core.is_initialized():
            # The handlers of SIGINT and SIGTERM are the supervisor's and the loop's.
            rospy.init_node("env_client", anonymous=True, disable_signals=True)
        for name, names in cameras.items():

            def receive(message: Any, name: str = name) -> None:
                pictures.push_bytes(name, bytes(message.data))

            self._subscribers.append(rospy.Subscriber(names.topic, CompressedImage, receive, queue_size=1))

    def close(self) -> None:
        for subscriber in self._subscribers:
            subscriber.unregister()
        self._subscribers.clear()


class RosTopics2:
    """ROS 2: rclpy, of the robot's own Python, in a context and a thread of its own."""

    def __init__(self) -> None:
        self._close: Callable[[], None] = lambda: None

    def start(self, pictures: Pictures, cameras: Mapping[str, CameraNames]) -> None:
        try:
            import rclpy
            from rclpy.executors import SingleThreadedExecutor
            from rclpy.qos import qos_profile_sensor_data
            from sensor_msgs.msg import CompressedImage
        except ImportError as error:
            raise EnvError(_no_ros("ROS 2", error)) from error
        context = rclpy.Context()
        rclpy.init(context=context)
        node = rclpy.create_node("env_client", context=context)
        for name, names in cameras.items():

            def receive(message: Any, name: str = name) -> None:
                pictures.push_bytes(name, bytes(message.data))

            node.create_subscription(CompressedImage, names.topic, receive, qos_profile_sensor_data)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        threading.Thread(target=executor.spin, name="ros2", daemon=True).start()

        def close() -> None:
            executor.shutdown()
            node.destroy_node()
            rclpy.shutdown(context=context)

        self._close = close

    def close(self) -> None:
        self._close()
        self._close = lambda: None


class Rosbridge:
    """rosbridge over a WebSocket, for machines without ROS."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise EnvError(
                f"--env.rosbridge is {address!r}; HOST:PORT was expected, such as 192.168.1.10:9090"
            )
        self._address = host, int(port)
        self._ros: Any = None

    def start(self, pictures: Pictures, cameras: Mapping[str, CameraNames]) -> None:
        try:
            import roslibpy
        except ImportError as error:
            raise EnvError(
                f"rosbridge needs roslibpy ({error}): install env-client with the extra astribot"
            ) from error
        host, port = self._address
        self._ros = roslibpy.Ros(host=host, port=port)
        try:
            self._ros.run(timeout=CONNECT_S)
        except Exception as error:  # roslibpy raises a kind of its own
            raise EnvError(
                f"no rosbridge server answers at {host}:{port} ({error}): is it running there?"
            ) from error
        for name, names in cameras.items():

            def receive(message: dict[str, Any], name: str = name) -> None:
                data = message.get("data")
                pictures.push_bytes(
                    name, base64.b64decode(data) if isinstance(data, str) else bytes(data or ())
                )

            # The newest picture only: a slow link must not queue old ones. It subscribes anew after a lost connection.
            roslibpy.Topic(self._ros, names.topic, MESSAGE, queue_length=1).subscribe(receive)

    def close(self) -> None:
        if self._ros is not None:
            self._ros.close()
            self._ros = None


def _no_ros(version: str, error: ImportError) -> str:
    return (
        f"{version} is not in this Python ({error}): start the client in the robot's environment, or subscribe from "
        "here with --env.camera-source rosbridge"
    )
