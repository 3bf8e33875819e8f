"""docs/adding-a-robot.md, word for word; then what its robot was told, and its control process killed."""

import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import Running
from walkthrough import Place, read_document

LOWER, UPPER, REST = np.array([-90, -30]), np.array([90, 60]), np.array([0, -25])


def told(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def moves(events: list[dict]) -> np.ndarray:
    """(n, 2) the commanded poses, in degrees."""
    return np.array([event["told"][1:] for event in events if event["told"][0] == "move"], float)


def control_process(client: Running) -> psutil.Process:
    """The child that owns the robot; an assertion error when there is none."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(client.process.pid).children():
            if "env_client.rollout" in child.cmdline():
                return child
        time.sleep(0.05)
    raise AssertionError(f"no control process:\n{client.output}")


@pytest.fixture
def document() -> tuple[dict[str, str], list[str]]:
    found = read_document("adding-a-robot.md")
    return found.files, found.commands


def test_the_package_of_the_document_drives_its_robot(place: Place, document):
    """Built, installed, found by its entry point, looked at, and driven through an episode by a served policy."""
    files, (build, install, simulate, check, make, serve, drive) = document
    place.write(files)
    for command in (build, install, make):
        place.run(command)
    log = place.folder / "told.jsonl"
    with (
        place.start(simulate.replace("7600", "0")) as head,
        place.start(serve.replace("8000", "0")) as server,
    ):
        robot_port = head.wait_for(r"a pan-tilt head at 127\.0\.0\.1:(\d+)")[1]
        seen = place.run(check.replace("7600", robot_port))
        assert "✓ cameras, joints and calibration are in order" in seen
        assert told(log) == [], "looking must not move it"
        port = server.wait_for(r"Waiting for client connections at ws://0\.0\.0\.0:(\d+)")[1]
        # A busy machine must not look like a hang to the supervisor.
        drive = drive.replace("7600", robot_port).replace("8000", port) + " --hang-timeout-s 60"

        output = place.run(drive)
        assert "The robot lies in its rest pose, torque off." in output
        events = told(log)
        poses = moves(events)
        # Switched on where it stood, switched off in its rest pose, and nothing unsafe in between.
        assert [e["told"] for e in events[:2]] == [["move", "12.000", "-8.000"], ["torque", "1"]]
        assert events[-1]["told"] == ["torque", "0"]
        np.testing.assert_allclose(events[-1]["pose"], REST, atol=math.degrees(0.1))
        assert (poses >= LOWER).all()
        assert (poses <= UPPER).all()
        assert np.abs(np.diff(poses, axis=0)).max() <= math.degrees(1.5) / 30 + 0.01
        # It really followed the policy: behind the ready pose its waves lead away from the straight way to the rest.
        ready = int(np.argmin(np.abs(poses).max(1)))
        assert np.abs(poses[ready:, 0]).max() > 0.5

        _killed(place, drive.replace("--episode-time-s 3", "").replace("rest-pose", "relax"), log)


def _killed(place: Place, drive: str, log: Path) -> None:
    """The plan in the document's driver is carried out by the supervisor when the control process is dead."""
    before = len(told(log))
    with place.start(drive) as client:
        child = control_process(client)
        deadline = time.monotonic() + 60
        while len(moves(told(log)[before:])) < 20:
            assert time.monotonic() < deadline, client.output
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        client.wait_for("the supervisor stopped the robot: torque off")
        assert client.process.wait(20) == 1
    *_, hold, on, off = [event["told"] for event in told(log)]
    assert (hold[0], on, off) == ("move", ["torque", "1"], ["torque", "0"])
