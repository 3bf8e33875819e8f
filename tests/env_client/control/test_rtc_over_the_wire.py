"""`--execution rtc` against a served Pi0.5: the real loop, source, socket and server; only the time is simulated.

The clock stands still while the server computes, and an answer arrives when the test says, so that the numbers are the
same on every machine.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from control_doubles import FPS, Arm, env_spec
from env_client.control import ControlLoop, SafetyConfig, SafetyFilter, make_source
from env_client.control.network import ChunkRequest, encode_observation
from env_client.control.simulated import SimulatedServer
from env_client.websocket_client_policy import WebsocketClientPolicy
from pi_reference import PATIENCE_S, pi_server
from serving_parts import client

from grasp_cube.tiny_checkpoint import make_tiny_checkpoint

# Two imports of LeRobot, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE_S)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Iterator[WebsocketClientPolicy]:
    """A connection to a served Pi0.5 with one camera, whose noise is fresh for each chunk."""
    checkpoint = make_tiny_checkpoint(tmp_path_factory.mktemp("pi") / "pi05", "pi05", cameras=("front",))
    with pi_server("--policy.path", checkpoint) as port, client(port) as connection:
        connection.connect()
        yield connection


class Run:
    """An episode of the arm, with every request and its chunk."""

    def __init__(self, policy: WebsocketClientPolicy, execution: str, latency_s: float, ticks: int):
        arm = Arm(env_spec(6))
        random = np.random.default_rng(0)
        # A picture that changes all the time, so that no two chunks agree by themselves.
        arm.on_read = lambda count: {
            "images": {"front": random.integers(0, 256, (224, 224, 3), dtype=np.uint8)}
        }
        spec = policy.spec
        assert spec is not None
        self.turns: list[tuple[ChunkRequest, np.ndarray]] = []

        def answer(request: ChunkRequest) -> dict[str, Any]:
            reply = policy.infer(
                encode_observation(request.observation, spec),
                prompt=request.prompt,
                episode=request.episode,
                seq=request.seq,
                rtc=request.rtc,
            )
            self.turns.append((request, reply["actions"]))
            return reply

        server = SimulatedServer(arm.clock, answer, latency_s)
        source = make_source(execution, None, spec, FPS, requester=server)
        loop = ControlLoop(arm, source, SafetyFilter(arm.spec, SafetyConfig(), FPS), FPS, clock=arm.clock)
        self.stats = source.stats
        self.result = loop.run_episode(max_steps=ticks)

    def gaps(self, rows: int) -> list[float]:
        """How far the first rows of each chunk are from what the chunk before said of the same ticks."""
        return [
            float(np.abs(after[:rows] - before[asked.consumed - earlier.consumed :][:rows]).max())
            for (earlier, before), (asked, after) in itertools.pairwise(self.turns)
        ]


def test_chunks_continue_what_is_being_executed_and_nothing_starves(policy):
    """What is executed while an answer is on its way is what the answer begins with; without rtc it is not."""
    guided, free = Run(policy, "rtc", 0.1, 240), Run(policy, "async", 0.1, 240)
    assert guided.result.starved == free.result.starved == 0
    assert len(guided.turns) >= 8
    assert guided.stats.rtc_requests == len(guided.turns) - 1
    assert guided.stats.rtc_fallbacks == 0
    assert max(guided.gaps(3)) < 1e-2, "0.01 of the robot's 200 units"
    assert min(free.gaps(3)) > 10 * max(guided.gaps(3))
    for request, actions in guided.turns[1:]:
        assert request.rtc is not None
        np.testing.assert_allclose(
            actions[: request.rtc.delay], request.rtc.prev[: request.rtc.delay], atol=1e-2
        )


def test_a_delay_that_is_not_feasible_falls_back_and_says_so(policy, caplog):
    """A second at 30 Hz is more than half of a chunk of 50: requests go without a prefix, and the log says why."""
    with caplog.at_level(logging.WARNING, logger="env_client"):
        run = Run(policy, "rtc", 1.0, 240)
    assert len(run.turns) >= 3
    assert [request.rtc for request, _ in run.turns] == [None] * len(run.turns)
    assert (run.stats.rtc_requests, run.stats.rtc_fallbacks > 0) == (0, True)
    assert "real-time chunking is not feasible" in caplog.text
    assert "as with --execution async" in caplog.text
