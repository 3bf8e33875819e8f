"""Pictures from each of the five sources: the right colours, the right age, and not one byte decoded."""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from astribot_parts import CAMERAS, MakeEnv, Robot
from env_client.envs import astribot_cameras as cameras
from env_client.envs.astribot_cameras import Pictures, read_jpeg
from env_client.envs.astribot_layout import Hardware
from env_client.envs.env import EnvError
from env_client.wire import EncodedImage, decode_image
from websockets.sync.server import serve

PATIENCE_S = 20.0


def red_and_blue(height: int = 36, width: int = 64, shift: int = 0) -> np.ndarray:
    """(H, W, 3) RGB: red on the left, blue on the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = (250 - shift, 10, 10)
    image[:, width // 2 :] = (10, 10, 250 - shift)
    return image


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def assert_red_and_blue(image: np.ndarray | EncodedImage) -> None:
    """Red on the left: not the other way round."""
    pixels = decode_image(image)
    left, right = pixels[8, 8].astype(int), pixels[8, -8].astype(int)
    assert left[0] > left[2] + 100, f"the left is {left}, red was expected"
    assert right[2] > right[0] + 100, f"the right is {right}, blue was expected"


@pytest.fixture
def names(hardware: Hardware) -> dict[str, Any]:
    return {name: hardware.cameras[name] for name in CAMERAS}


@pytest.mark.parametrize("source", ["sdk", "images-dict"])
def test_the_sdks_pictures(source: str, make_env: MakeEnv, robot: Robot) -> None:
    """As JPEG by callback, as arrays from the older dictionary: red stays red, and a silent camera grows old."""
    env = make_env(camera_source=source)
    obs = env.get_observation()
    assert set(obs.images) == set(CAMERAS)
    for name, image in obs.images.items():
        assert isinstance(image, EncodedImage) == (source == "sdk"), name
        assert image.shape == ((720, 1280, 3) if name == "head" else (360, 640, 3))
        assert_red_and_blue(image)
    robot.control.drop_cameras(["right_wrist_rgbd"])
    deadline = time.monotonic() + PATIENCE_S
    while (obs := env.get_observation()).image_age["right_wrist"] < 0.6:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert min(obs.image_age["head"], obs.image_age["left_wrist"]) < 0.5


def test_only_the_cameras_that_are_asked_for(make_env: MakeEnv) -> None:
    assert set(make_env(cameras=("torso",)).get_observation().images) == {"torso"}
    env = make_env(enable_camera=False, high_control_rights=True)
    assert env.spec.cameras == ()
    assert env.get_observation().images == {}


def test_an_unknown_camera_is_named(make_env: MakeEnv) -> None:
    with pytest.raises(EnvError, match="no camera front; the robot file has head, left_wrist"):
        make_env(cameras=("front",))


def test_age_and_frozen_pictures() -> None:
    """A picture is as old as its arrival; the same one again and again while the robot moves, as its last change."""
    pictures = Pictures(("head",), frozen_after_s=0.05)
    pictures.moved(0.0)
    pictures.push("head", red_and_blue())
    time.sleep(0.08)
    pictures.push("head", red_and_blue())
    assert pictures.frames().ages["head"] < 0.05
    pictures.moved(0.5)
    assert pictures.frames().frozen == ()  # it may show what moved since it came
    pictures.moved(0.5)
    frames = pictures.frames()
    assert frames.frozen == ("head",)
    assert frames.ages["head"] >= 0.08
    pictures.push("head", red_and_blue(shift=9))
    assert pictures.frames().frozen == ()
    assert pictures.rates()["head"] > 0


def test_pictures_without_a_time_are_as_old_as_their_last_change() -> None:
    pictures = Pictures(("head",), timeless=True)
    pictures.push("head", red_and_blue())
    time.sleep(0.05)
    pictures.push("head", red_and_blue())
    assert pictures.frames().ages["head"] >= 0.05


def test_what_is_no_picture_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """And said once; the camera then simply grows old."""
    pictures = Pictures(("head",))
    for _ in range(3):
        pictures.push_bytes("head", b"no jpeg at all")
    assert sum("neither JPEG nor PNG" in record.message for record in caplog.records) == 1
    assert read_jpeg(b"") is None
    assert read_jpeg(jpeg(red_and_blue())) == EncodedImage("jpeg", jpeg(red_and_blue()), (36, 64, 3))


# ------------------------------------------------------------------------------------------------ rosbridge


class Bridge:
    """A rosbridge server as its protocol describes it: `subscribe` is answered by `publish`ed messages."""

    def __init__(self, frames: dict[str, bytes]) -> None:
        self.frames = frames
        self.subscriptions: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._server = serve(self._serve, "127.0.0.1", 0, compression=None)
        self.port = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _serve(self, connection: Any) -> None:
        lock = threading.Lock()

        def publish() -> None:
            while not self._stop.wait(0.03):
                for subscription in list(self.subscriptions):
                    topic = subscription["topic"]
                    data = base64.b64encode(self.frames[topic]).decode()
                    message = {"header": {"stamp": {"secs": 1, "nsecs": 2}}, "format": "jpeg", "data": data}
                    with lock:
                        connection.send(json.dumps({"op": "publish", "topic": topic, "msg": message}))

        publisher = threading.Thread(target=publish, daemon=True)
        for text in connection:
            request = json.loads(text)
            if request["op"] == "subscribe":
                self.subscriptions.append(request)
                if not publisher.is_alive():
                    publisher.start()

    def close(self) -> None:
        self._stop.set()
        self._server.shutdown()


@pytest.fixture
def bridge(names: dict[str, Any]) -> Iterator[Bridge]:
    found = Bridge(
        {camera.topic: jpeg(red_and_blue(camera.height, camera.width)) for camera in names.values()}
    )
    yield found
    found.close()


def test_rosbridge_over_a_real_socket(bridge: Bridge, make_env: MakeEnv) -> None:
    """A machine without ROS: the robot's topics over a WebSocket, by `--env.camera-source rosbridge`."""
    env = make_env(camera_source="rosbridge", rosbridge=f"127.0.0.1:{bridge.port}")
    obs = env.get_observation()
    for name, image in obs.images.items():
        assert isinstance(image, EncodedImage)
        assert_red_and_blue(image)
        assert obs.image_age[name] < 5
    assert {entry["type"] for entry in bridge.subscriptions} == {"sensor_msgs/CompressedImage"}
    assert {entry["topic"].split("/")[2] for entry in bridge.subscriptions} == {
        "head_rgbd", "left_wrist_rgbd", "right_wrist_rgbd",
    }  # fmt: skip


@pytest.mark.parametrize("address", ["localhost", "host:x", ":9090"])
def test_a_wrong_rosbridge_address(address: str) -> None:
    with pytest.raises(EnvError, match="HOST:PORT was expected"):
        cameras.Rosbridge(address)


def test_no_rosbridge_server(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cameras, "CONNECT_S", 0.5)
    with pytest.raises(EnvError, match=r"no rosbridge server answers at 127\.0\.0\.1:1"):
        cameras.Rosbridge("127.0.0.1:1").start(Pictures(CAMERAS), names)


# ---------------------------------------------------------------------------------------------- ROS 1 and 2


class Topics:
    """Stands in for the ROS of a robot, which no package index has: topics by name, callbacks in another thread."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.frames = {
            camera.topic: jpeg(red_and_blue(camera.height, camera.width)) for camera in names.values()
        }
        self.gone: list[str] = []
        self.nodes: list[dict[str, Any]] = []

    def subscribe(self, topic: str, message_type: type, callback: Any) -> types.SimpleNamespace:
        assert message_type.__name__ == "CompressedImage"
        # ROS 1 gives bytes, ROS 2 an array of them.
        message = types.SimpleNamespace(data=self.frames[topic], format="jpeg")
        threading.Thread(target=callback, args=(message,), daemon=True).start()
        return types.SimpleNamespace(unregister=lambda: self.gone.append(topic))


def modules(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    compressed = type("CompressedImage", (), {})
    message = types.ModuleType("sensor_msgs.msg")
    message.CompressedImage = compressed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sensor_msgs", types.ModuleType("sensor_msgs"))
    monkeypatch.setitem(sys.modules, "sensor_msgs.msg", message)
    for name, content in found.items():
        module = types.ModuleType(name.replace("__", "."))
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_ros_1_topics(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """rospy leaves our signals alone, and its subscribers end with us."""
    topics = Topics(names)
    modules(
        monkeypatch,
        rospy={
            "core": types.SimpleNamespace(is_initialized=lambda: bool(topics.nodes)),
            "init_node": lambda name, **options: topics.nodes.append({"name": name} | options),
            "Subscriber": lambda topic, kind, callback, queue_size: topics.subscribe(topic, kind, callback),
        },
    )
    source, pictures = cameras.RosTopics1(), Pictures(CAMERAS)
    source.start(pictures, names)
    pictures.wait_for_first()
    for image in pictures.frames().images.values():
        assert_red_and_blue(image)
    assert topics.nodes == [{"name": "env_client", "anonymous": True, "disable_signals": True}]
    source.close()
    assert sorted(topics.gone) == sorted(topics.frames)


def test_ros_2_topics(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """rclpy in a context of its own, with the sensors' quality of service."""
    topics = Topics(names)
    spun, shut = threading.Event(), []
    node = types.SimpleNamespace(
        create_subscription=lambda kind, topic, callback, qos: topics.subscribe(topic, kind, callback),
        destroy_node=lambda: shut.append("node"),
    )
    modules(
        monkeypatch,
        rclpy={
            "Context": lambda: "context",
            "init": lambda context: topics.nodes.append({"context": context}),
            "create_node": lambda name, context: node,
            "shutdown": lambda context: shut.append(context),
        },
        rclpy__executors={
            "SingleThreadedExecutor": lambda context: types.SimpleNamespace(
                add_node=lambda added: None, spin=spun.set, shutdown=lambda: shut.append("executor")
            )
        },
        rclpy__qos={"qos_profile_sensor_data": "sensor data"},
    )
    source, pictures = cameras.RosTopics2(), Pictures(CAMERAS)
    source.start(pictures, names)
    pictures.wait_for_first()
    assert spun.wait(PATIENCE_S)
    for image in pictures.frames().images.values():
        assert_red_and_blue(image)
    source.close()
    source.close()
    assert shut == ["executor", "node", "context"]


@pytest.mark.parametrize(("source", "version"), [("RosTopics1", "ROS 1"), ("RosTopics2", "ROS 2")])
def test_a_machine_without_ros_is_told_of_rosbridge(source: str, version: str, names: dict[str, Any]) -> None:
    with pytest.raises(EnvError, match=rf"{version} is not in this Python .*rosbridge"):
        getattr(cameras, source)().start(Pictures(CAMERAS), names)
