"""The whole fleet: `serve_fleet` on Ray Serve, real servers, and robots that must not notice what happens to them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from env_client.websocket_client_policy import WebsocketClientPolicy
from processes import Running, running
from robots import all_go_on, checkpoint, robots, wait_until
from serving_parts import client, get

pytest.importorskip("ray", reason="the fleet's extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SERVE = (sys.executable, "-m", "grasp_cube.serve_fleet")
PATIENCE_S = 400.0


def write(folder: Path, **group: object) -> Path:
    """A fleet's file."""
    wave = {"path": str(folder / "wave"), "gpus": 0} | group
    config = {"policies": {"wave": wave}, "host": "127.0.0.1", "port": 0, "downscale_delay_s": 1}
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(config | {"upscale_delay_s": 1, "drain_s": 60}))
    return path


@contextmanager
def fleet(config: Path) -> Iterator[tuple[Running, int]]:
    """`serve_fleet`, ready; with its port. Ended by a signal, so that Ray ends as well."""
    with running(*SERVE, "--config", config) as process:
        try:
            found = process.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)", PATIENCE_S)
            yield process, int(found[1])
        finally:
            process.end(timeout_s=PATIENCE_S)


def replicas(port: int) -> list[dict]:
    return json.loads(get(port, "/status")[1])["policies"]["wave"]["replicas"]


def ready(port: int) -> list[dict]:
    return [replica for replica in replicas(port) if replica["ready"] and not replica["draining"]]


def update(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SERVE, "--config", config, "--update"], capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_robots_go_on_whatever_happens_to_the_fleet(tmp_path: Path) -> None:
    """3 replicas and 12 robots: one replica is killed, one drained by a smaller fleet, and then the checkpoint is
    updated. No episode is lost or has two policies, and what is failed for is one chunk of each robot at most."""
    checkpoint(tmp_path / "wave")
    config = write(tmp_path, min_replicas=3, max_replicas=3)
    with fleet(config) as (process, port):
        wait_until(lambda: len(ready(port)) == 3, "the third replica")
        with robots(12, f"ws://127.0.0.1:{port}/wave", episode_s=4.0) as working:
            before = {replica["replica"] for replica in replicas(port)}
            os.kill(ready(port)[0]["pid"], signal.SIGKILL)
            all_go_on(working, 30)
            lost = [robot.failed for robot in working]
            assert max(lost) <= 1
            assert all(robot.starved_beyond <= 0 for robot in working)
            wait_until(lambda: len(ready(port)) == 3, "another replica in its place")
            assert before - {replica["replica"] for replica in replicas(port)}

            # A smaller fleet: one is drained, and nobody's request fails.
            done = update(write(tmp_path, min_replicas=2, max_replicas=2))
            assert done.returncode == 0, done.stdout + done.stderr
            wait_until(lambda: len(replicas(port)) == 2, "a smaller fleet")
            all_go_on(working, 30)
            assert [robot.failed for robot in working] == lost

            # Another checkpoint of the same spec.
            (old,) = {replica["generation"] for replica in ready(port)}
            checkpoint(tmp_path / "wave", amplitude=4.0)
            done = update(config.parent / "fleet.yaml")
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout.strip().endswith("Updated.")
            assert old not in {replica["generation"] for replica in replicas(port)}
            episodes = [len(robot.results) for robot in working]
            wait_until(
                lambda: all(len(r.results) > n + 1 for r, n in zip(working, episodes, strict=True)),
                "another episode of each robot",
            )
            assert [robot.failed for robot in working] == lost
            assert all(robot.starved_beyond <= 0 for robot in working)

            # One that cannot be loaded changes nothing.
            (tmp_path / "wave" / "config.json").write_text('{"type": "numpy_test", "nonsense": 1}')
            done = update(config.parent / "fleet.yaml")
            assert done.returncode == 1, done.stdout + done.stderr
            assert re.search(r"cannot be served.*nonsense", done.stdout, re.DOTALL)
            all_go_on(working, 30)

            page = get(port, "/metrics")[1].decode()
            assert len(set(re.findall(r'grasp_cube_sessions\{policy="wave",replica="(\w+)"\}', page))) == 2
        assert all(len(served) == 1 for robot in working for served in robot.policies.values())
        assert all(len(set.union(*robot.policies.values())) == 2 for robot in working)
        assert {result.outcome for robot in working for result in robot.results[:-1]} == {"time"}
    assert process.output.endswith("Stopped.")


def test_the_fleet_grows_with_its_load_and_shrinks_without(tmp_path: Path) -> None:
    """By the requests that wait and run; clients of the replica that goes are not told of an error."""
    checkpoint(tmp_path / "wave")
    obs = {"states": {"arm": np.zeros(3, np.float32)}}
    with (
        fleet(write(tmp_path, min_replicas=1, max_replicas=2, target_queue=2)) as (_, port),
        ExitStack() as stack,
    ):
        stop = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(8))
        stack.callback(stop.set)

        def ask(policy: WebsocketClientPolicy) -> None:
            while not stop.is_set():
                policy.infer(obs)

        clients = [stack.enter_context(client(port, path="wave")) for _ in range(8)]
        asking = [pool.submit(ask, policy) for policy in clients]
        wait_until(lambda: len(ready(port)) == 2, "another replica")
        stop.set()
        for future in asking:
            future.result()
        wait_until(lambda: len(replicas(port)) == 1, "one replica less")
        for policy in clients:
            assert len(policy.infer(obs)["actions"]) == 60
