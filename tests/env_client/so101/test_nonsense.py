"""A server that answers nonsense: what of it reaches the servos, by the servos' own log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from env_client.wire import PROTOCOL, pack, unpack
from kinematic_robot import calibration, until
from numpy_policy import Options
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

Make = Callable[..., Any]

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
HORIZON = 20
# What good answers ask for stays this close to where the arm began, in normalized units; nonsense asks for 90 more.
GOOD_RANGE = 12.0
STALL_S = 5.0


class NonsenseServer:
    """Speaks the protocol; each kind of nonsense is given three times, between answers that are good."""

    def __init__(self) -> None:
        self.kinds = [
            "NaN",
            "infinite",
            "wrong dimension",
            "not an array",
            "another episode",
            "an old request",
        ]
        self.todo = [kind for kind in self.kinds for _ in range(3)] + ["stall"]
        self.given: list[str] = []
        self.good = 0
        self._base: np.ndarray | None = None

    def __call__(self, connection: Any) -> None:
        spec = Options(horizon=HORIZON).spec().to_wire()
        connection.send(pack({"protocol": PROTOCOL, "policy": spec, "image_codecs": ["raw"]}))
        try:
            for frame in connection:
                request, _ = unpack(frame)
                if request.get("op") != "infer":
                    connection.send(pack({"reset": True}))
                    continue
                # Two good answers first, and one between each two bad ones.
                kind = self.todo.pop(0) if self.todo and self.good >= 2 and self.good % 2 == 0 else "good"
                self.answer(connection, request, kind)
        except ConnectionClosed:
            pass

    def answer(self, connection: Any, request: dict[str, Any], kind: str) -> None:
        if self._base is None:
            self._base = np.array(request["obs"]["states"]["arm"])
        wave = 5 * np.sin(0.1 * (np.arange(HORIZON) + self.good * 7))
        good = (self._base + wave[:, None]).astype(np.float32)
        far = good + np.float32(90)
        reply = {"op": "infer", "seq": request["seq"], "episode": request["episode"], "chunk_id": 1}
        reply |= {"capture_time": request.get("capture_time"), "server_timing": {"infer_ms": 1.0}}
        bad: dict[str, dict[str, Any]] = {
            "NaN": {"actions": np.where(np.arange(HORIZON)[:, None] == 5, np.float32(np.nan), far)},
            "infinite": {"actions": np.where(np.arange(HORIZON)[:, None] == 5, np.float32(np.inf), far)},
            "wrong dimension": {"actions": far[:, :5]},
            "not an array": {"actions": "forward"},
            "another episode": {"actions": far, "episode": request["episode"] + 1},
            "an old request": {"actions": far, "seq": request["seq"] - 1},
            "stall": {"actions": good},
            "good": {"actions": good},
        }
        if kind == "stall":
            time.sleep(STALL_S)
        answered = reply | bad[kind]
        connection.send(pack(answered | {"action": answered["actions"]}))
        if kind == "an old request":
            # Every request gets its answer in the end.
            connection.send(pack(reply | bad["good"]))
        if kind == "good":
            self.good += 1
        else:
            self.given.append(kind)
            # So that a good answer lies between this one and the next.
            self.good += 1


@pytest.mark.slow
def test_nonsense_never_reaches_a_servo(start_robot: Make, start_client: Make) -> None:
    """NaN, infinity, a wrong dimension, no array, a chunk of another episode, the answer to an old request, and a
    network that stalls for five seconds: the arm follows the good answers only, within limits, and goes on."""
    robot, nonsense = start_robot(), NonsenseServer()
    with serve(nonsense, "127.0.0.1", 0, max_size=None, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.socket.getsockname()[1])
        client = start_client(robot, None, "--port", port, "--on-exit", "hold", "--episode-time-s", "120")
        assert until(lambda: "stall" in nonsense.given, 100), client.output
        before = nonsense.good
        assert until(lambda: nonsense.good > before + 2, 30), client.output
        client.process.terminate()
        client.wait(30)
        server.shutdown()
    assert nonsense.given.count("NaN") == 3
    assert set(nonsense.kinds) < set(nonsense.given)
    goals = robot.goals()
    calibrated = calibration(0)
    for index, joint in enumerate(JOINTS):
        commands = goals[0, joint]
        pose = np.zeros((len(commands.ticks), 6))
        pose[:, index] = commands.ticks
        asked = np.array(
            [calibrated.to_normalized(calibrated.from_ticks(row))[index] for row in pose.astype(int)]
        )
        assert np.ptp(asked) < 2 * GOOD_RANGE, joint
        assert np.ptp(asked) > 2, joint
