"""The loop, a real socket and a real server that is killed in the middle of an episode."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import numpy as np
from control_doubles import FPS, PER_RAD, Arm, env_spec
from env_client.control import ControlLoop, SafetyConfig, SafetyFilter, TickRecord, make_source
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from processes import policy_server, running

# What a test may wait for on a busy machine, in seconds.
PATIENCE_S = 120.0


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_an_episode_survives_nonsense_and_a_restarted_server(tmp_path: Path) -> None:
    """NaN chunks and a killed server hold the arm; when answers are good again the same episode goes on."""
    checkpoint = write_checkpoint(
        tmp_path / "wave",
        action_dim=3,
        horizon=20,
        cameras=(),
        states=({"name": "arm", "size": 3},),
        behaviour="nan",
        behaviour_prompt="broken",
    )
    arm = Arm(env_spec())
    stop, records = threading.Event(), []

    def watch(record: TickRecord) -> None:
        records.append(record)

    with policy_server(checkpoint) as (server, port):
        client = WebsocketClientPolicy("127.0.0.1", port, on_status=lambda sentence: None)
        assert client.spec is not None
        source = make_source("async", client, client.spec, FPS)
        safety = SafetyFilter(arm.spec, SafetyConfig(), FPS)
        loop = ControlLoop(arm, source, safety, FPS)
        loop.attach(watch, size=10_000)
        results = []
        runner = threading.Thread(target=lambda: results.append(loop.run_episode(stop=stop)), daemon=True)
        runner.start()
        stats = source.stats
        wait_until(lambda: stats.consumed > 20)

        source.prompt = "broken"
        wait_until(
            lambda: sum(stats.errors.values()) + stats.dropped["not finite"] >= 2 and stats.starved > 3
        )
        source.prompt = None
        consumed = stats.consumed
        wait_until(lambda: stats.consumed > consumed + 20)

        server.end(signal.SIGKILL)
        starved = stats.starved
        wait_until(lambda: stats.errors["CONNECTION"] >= 1 and stats.starved > starved + 3)
        consumed = stats.consumed
        command = [*server.process.args][:-1]  # type: ignore[misc]
        with running(*command, str(port)):
            wait_until(lambda: stats.consumed > consumed + 20)
            stop.set()
            runner.join(PATIENCE_S)
            client.close()
            source.close()
    assert results[0].outcome == "stopped"
    assert results[0].episode == 0
    sent = np.array([action for _, action in arm.sent])
    assert np.isfinite(sent).all()
    assert np.abs(np.diff(sent, axis=0))[:, :2].max() <= 1.5 / FPS * PER_RAD * (1 + 1e-6)
    # The clock went on all the while, and every tick had a command: all but the one in which the stop came, and the next.
    assert records[-1].tick > results[0].steps
    assert len(arm.sent) >= results[0].timing["ticks"] - 2
