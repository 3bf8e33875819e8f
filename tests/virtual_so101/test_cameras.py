"""LeRobot's unmodified ZMQCamera on the virtual cameras."""

from __future__ import annotations

import time

import numpy as np
import pytest
from virtual_so101.cameras import CameraServer, PortBusyError
from virtual_so101.faults import Fault

pytest.importorskip("lerobot")


@pytest.fixture
def open_camera():
    """Connect ZMQCameras by the twin's own config; they are closed at the end."""
    from lerobot.cameras.zmq import ZMQCamera, ZMQCameraConfig

    cameras = []

    def make(config, name):
        fields = dict(config[name])
        assert fields.pop("type") == "zmq"
        cameras.append(ZMQCamera(ZMQCameraConfig(**fields)))
        cameras[-1].connect()
        return cameras[-1]

    yield make
    for camera in cameras:
        camera.disconnect()


def bar(image):
    """Column of the bright bar that shows the first joint's angle."""
    return int(np.argmax(image[240].sum(axis=1)))


def test_the_driver_reads_rgb_pictures_of_both_cameras(make_twin, open_camera):
    """The right camera, the right size, red where the world is red."""
    twin = make_twin(camera_port=0)
    front, wrist = (open_camera(twin.cameras.config, name) for name in ("front", "wrist"))
    for camera, channel in ((front, 0), (wrist, 1)):
        image = camera.read()
        assert image.shape == (480, 640, 3)
        assert image.dtype == np.uint8
        corner = image[10, 10].astype(int)
        assert corner[channel] == pytest.approx(200, abs=6)
        assert np.delete(corner, channel).max() < 10


def test_pictures_follow_the_arm_at_camera_rate(make_twin, open_camera):
    """Frames keep coming, and they show a motion soon after it happened."""
    twin = make_twin(camera_port=0)
    camera = open_camera(twin.cameras.config, "front")
    before = bar(camera.read())
    target = twin.chains[0].calibration.middle + np.array([1.0, 0, 0, 0, 0, 0])
    twin.move_by_hand(0, target)
    start = twin.cameras.rounds
    time.sleep(1.0)
    assert bar(camera.read_latest()) - before == pytest.approx(150, abs=15)
    # A generous bound: this runs on shared cores.
    assert 15 <= twin.cameras.rounds - start <= 35


def test_a_frozen_camera_repeats_its_picture(make_twin, open_camera):
    """Frames go on arriving, so the driver notices nothing; the other camera still moves."""
    twin = make_twin(camera_port=0)
    front, wrist = (open_camera(twin.cameras.config, name) for name in ("front", "wrist"))
    twin.apply(Fault.parse("freeze:front"))
    time.sleep(0.2)
    old_front, old_wrist = bar(front.read()), bar(wrist.read())
    twin.move_by_hand(0, twin.chains[0].calibration.middle + np.array([1.0, 0, 0, 0, 0, 0]))
    time.sleep(0.8)
    assert bar(front.read()) == old_front
    assert bar(wrist.read()) > old_wrist + 100
    twin.apply(Fault.parse("clear"))
    time.sleep(0.3)
    assert bar(front.read()) > old_front + 100


def test_a_blind_camera_times_out(make_twin, open_camera):
    """Nothing more arrives: the driver says that its latest frame is too old, for this camera only."""
    twin = make_twin(camera_port=0)
    front, wrist = (open_camera(twin.cameras.config, name) for name in ("front", "wrist"))
    twin.apply(Fault.parse("blind:wrist"))
    time.sleep(1.3)
    with pytest.raises(TimeoutError, match="too old"):
        wrist.read_latest()
    front.read_latest()


def test_in_lock_step_the_last_picture_stays_alive(make_twin, open_camera):
    """While time stands still pictures are repeated; a step brings a new one."""
    twin = make_twin(camera_port=0, realtime=False)
    camera = open_camera(twin.cameras.config, "front")
    before = bar(camera.read_latest())
    rounds = twin.cameras.rounds
    time.sleep(1.2)
    assert bar(camera.read_latest()) == before
    assert twin.cameras.rounds == rounds
    twin.move_by_hand(0, twin.chains[0].calibration.middle + np.array([1.0, 0, 0, 0, 0, 0]))
    twin.step(1.0)
    time.sleep(0.2)
    assert bar(camera.read_latest()) - before == pytest.approx(150, abs=15)


def test_a_busy_port_is_named():
    """The error says which port and which flag."""
    first = CameraServer(("front",), lambda name: np.zeros((480, 640, 3), np.uint8))
    try:
        with pytest.raises(PortBusyError, match=rf"{first.ports[0]}.*--camera-port"):
            CameraServer(("front",), lambda name: np.zeros((480, 640, 3), np.uint8), port=first.ports[0])
    finally:
        first.close()


def test_a_renderer_that_fails_is_reported():
    """The first picture's error reaches whoever starts the cameras."""

    def render(name):
        raise OSError("no OpenGL here")

    server = CameraServer(("front",), render)
    try:
        with pytest.raises(RuntimeError, match="no OpenGL here"):
            server.start(realtime=True)
    finally:
        server.close()
