"""The control socket and lock step, on the stand-in world."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from virtual_so101.control import ControlClient, ControlError, ControlServer, main


@pytest.fixture
def controlled(make_twin):
    """A twin in lock step with a client on its control socket."""
    twin = make_twin(camera_port=0, realtime=False)
    server = ControlServer()
    server.start(twin, {"robot_id": "virtual"})
    with ControlClient(server.port) as client:
        yield twin, client
    server.close()


def test_status_reset_success_and_info(controlled):
    """The basic ops answer."""
    twin, client = controlled
    status = client.status()
    assert status["mode"] == "lockstep"
    assert status["success"] is False
    assert status["buses"][0]["plugged"] is True
    client.step(0.5)
    assert client.status()["time"] == pytest.approx(0.5)
    client.reset(seed=7)
    assert twin.world.seed == 7
    assert client.status()["time"] == 0.0
    assert client.info() == {"robot_id": "virtual"}


def test_time_stands_still_between_steps_and_steps_add_up(controlled):
    """Steps that are no multiple of the physics' own sum up without drift."""
    _, client = controlled
    for _ in range(30):
        client.step(1 / 30)
    assert client.status()["time"] == pytest.approx(1.0, abs=0.003)


def test_a_step_without_pictures(controlled):
    """Time moves, the cameras keep the last picture."""
    twin, client = controlled
    rounds = twin.cameras.rounds
    assert client.step(0.5, pictures=False)["time"] == pytest.approx(0.5)
    assert twin.cameras.rounds == rounds


def test_a_web_page_is_turned_away(controlled):
    """A request that speaks HTTP is not answered, and its body is not read as an op."""
    twin, client = controlled
    before = twin.world.seed
    with socket.create_connection(client._socket.getpeername(), timeout=10.0) as page:
        page.sendall(b'POST / HTTP/1.1\r\n\r\n{"op": "reset", "seed": 99}\n')
        with contextlib.suppress(ConnectionResetError):
            assert page.recv(100) == b""
    assert twin.world.seed == before


def test_hand_success_and_render(controlled):
    """A hand moves the arm, the task sees it, the picture shows it."""
    import cv2

    twin, client = controlled
    client.hand((twin.chains[0].calibration.middle + np.array([1.2, 0, 0, 0, 0, 0])).tolist())
    reply = client.step(1.0)
    assert reply["success"] is True
    assert client.success() is True
    images = client.render()
    assert set(images) == {"front", "wrist"}
    front = cv2.imdecode(np.frombuffer(images["front"], np.uint8), cv2.IMREAD_COLOR)
    assert front[10, 10].argmax() == 0
    client.hand(None)


def test_pause_and_resume(controlled):
    """Real time runs by itself; a step is refused then, and the connection survives the refusal."""
    _, client = controlled
    client.resume()
    with pytest.raises(ControlError, match="send pause before step"):
        client.step(0.1)
    client.pause()
    before = client.status()["time"]
    client.step(0.1)
    assert client.status()["time"] == pytest.approx(before + 0.1, abs=0.003)


def test_faults_and_log(controlled):
    """A fault arrives, is logged, and a wrong one is refused."""
    _, client = controlled
    client.fault("lost:0.25")
    with pytest.raises(ControlError, match="unknown fault"):
        client.fault("boom")
    assert client.servo_log()[-1]["fault"] == "lost:0.25"


def test_bad_requests_get_a_sentence(controlled):
    """Each bad line is answered, on a connection that stays open."""
    _, client = controlled
    for op, fields, message in (
        ("nothing", {}, "unknown op"),
        ("step", {}, "does not take these fields"),
        ("step", {"dt": -1}, "more than 0"),
        ("step", {"dt": "x"}, "number of seconds"),
        ("reset", {"seed": "x"}, "whole number"),
        ("hand", {"positions": [1, 2]}, "6 finite"),
    ):
        with pytest.raises(ControlError, match=message):
            client.call(op, **fields)
    client._socket.sendall(b"garbage\n")
    assert b"expected one JSON object" in client._file.readline()
    assert client.status()["mode"] == "lockstep"


def test_ops_from_a_shell(controlled, capsys):
    """One op per call, its reply as JSON; refusals go to standard error."""
    twin, client = controlled
    port = str(client._socket.getpeername()[1])
    assert main(["--port", port, "reset", "9"]) == 0
    assert twin.world.seed == 9
    assert main(["--port", port, "step", "0.5"]) == 0
    capsys.readouterr()
    assert main(["--port", port, "status"]) == 0
    assert json.loads(capsys.readouterr().out)["time"] == pytest.approx(0.5)
    assert main(["--port", port, "fault", "boom"]) == 1
    assert "unknown fault" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--port", port, "pause", "7"])


def test_a_client_without_a_robot_says_so():
    """The error names the address and the command."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ControlError, match="is virtual_so101 running"):
            ControlClient(unused.getsockname()[1])


def test_the_client_is_light():
    """Other processes import it without MuJoCo, LeRobot, ZeroMQ or numpy."""
    code = "import sys, virtual_so101.control; print([m for m in ('mujoco','lerobot','zmq','torch','numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_lock_step_with_the_driver_repeats_exactly(make_twin, make_follower, pose, connect):
    """Two runs of the same commands through the bus give the same positions, bit for bit."""
    pytest.importorskip("lerobot")
    runs = []
    for _ in range(2):
        twin = make_twin(realtime=False)
        follower = make_follower(twin)
        connect(follower)
        twin.reset(3)
        sent = twin.chains[0].goal_packets
        trace = []
        for tick in range(20):
            trace.append([follower.get_observation()[k] for k in pose(0)])
            follower.send_action(pose(2.0 * tick))
            twin.step(1 / 30, goals=[sent + tick + 1])
        runs.append((trace, twin.world.positions(0)))
        follower.disconnect()
        twin.close()
    assert runs[0][0] == runs[1][0]
    assert np.array_equal(runs[0][1], runs[1][1])
    assert runs[0][1][0] > 0.2


def test_step_without_counts_waits_for_the_bus(make_twin, make_follower, pose, connect):
    """What was sent right before a step takes part in it."""
    pytest.importorskip("lerobot")
    twin = make_twin(realtime=False)
    follower = make_follower(twin)
    connect(follower)
    follower.send_action(pose(50.0))
    twin.step(1.0)
    assert follower.get_observation()["shoulder_pan.pos"] == pytest.approx(50.0, abs=1.0)


def test_step_reports_goals_that_never_came(make_twin):
    """Waiting for goals ends with the numbers."""
    twin = make_twin(realtime=False)
    with pytest.raises(TimeoutError, match=r"goal packets \[5\], saw \[0\]"):
        twin.step(0.1, goals=[5])
