"""The fleet's address: HAProxy with real servers behind it, told at run time which ones there are."""

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from env_client.websocket_client_policy import WebsocketClientPolicy
from env_client.wire import RemoteError
from numpy_policy import write_checkpoint
from processes import running
from robots import wait_until
from serving_parts import CAMERAS, UPGRADE, client, get, make_observation, serving

from grasp_cube.fleet.directory import ReplicaEntry
from grasp_cube.fleet.front import Front, find_haproxy
from grasp_cube.policies.policy import PolicyError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OBS = make_observation()


def entry(policy: str, port: int, replica: str, **changes: bool) -> ReplicaEntry:
    return ReplicaEntry(replica, policy, "generation", "127.0.0.1", port, 0, **changes)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[tuple[Front, int]]:
    """For the policies quick and other, with a page of this process behind it; with the port."""
    try:
        command = find_haproxy(None)
    except PolicyError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        listening = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
        page = (sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", tmp_path)
        pages = stack.enter_context(running(*page))
        (tmp_path / "status").write_text("the fleet's page")
        port = int(pages.wait_for(r"port (\d+)")[1])
        front = Front(command, listening, {"quick": 2, "other": 1}, port)
        stack.callback(front.close)
        front.start()
        yield front, listening.getsockname()[1]


def test_replicas_come_drain_and_go_while_clients_are_served(front, tmp_path: Path) -> None:
    """Two policies by name, a replica that drains keeps its client, and pages are the fleet's own."""
    haproxy, port = front
    paths = [write_checkpoint(tmp_path / name, cameras=CAMERAS) for name in ("quick", "other")]
    write_checkpoint(paths[1], cameras=CAMERAS, horizon=7)
    named = [f"{path.name}={path}" for path in paths]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serving("--policy.path", flag))[1] for flag in (named[0], named[0], named[1])
        ]
        a, b = entry("quick", servers[0], "a"), entry("quick", servers[1], "b")
        c = entry("other", servers[2], "c")
        haproxy.follow([a, c])
        first = stack.enter_context(client(port))
        assert len(first.infer(OBS)["actions"]) == 16
        other = stack.enter_context(client(port, path="other"))
        assert len(other.infer(OBS)["actions"]) == 7
        assert get(port, "/third", headers=UPGRADE)[0] == 404
        assert get(port, "/status")[1] == b"the fleet's page"
        # Who comes through here is no local client, whatever its address.
        with pytest.raises(RemoteError, match="key"):
            first.configure(path="elsewhere")

        haproxy.follow([entry("quick", servers[0], "a", draining=True), b, c])
        second = stack.enter_context(client(port, path="quick"))
        assert len(second.infer(OBS)["actions"]) == 16
        assert len(first.infer(OBS)["actions"]) == 16
        assert [sessions(server) for server in servers] == [1, 1, 1]

        haproxy.follow([b, c])
        third = stack.enter_context(client(port))
        assert len(third.infer(OBS)["actions"]) == 16
        assert sessions(servers[1]) == 2


def test_haproxy_is_started_again_when_it_dies(front, tmp_path: Path) -> None:
    """Robots that were connected connect again by themselves."""
    haproxy, port = front
    path = write_checkpoint(tmp_path / "quick", cameras=CAMERAS)
    with serving("--policy.path", f"quick={path}") as (_, server):
        replicas = [entry("quick", server, "a")]
        haproxy.follow(replicas)
        with client(port) as policy:
            policy.infer(OBS)
            haproxy._process.kill()
            haproxy._process.wait()
            haproxy.follow(replicas)
            wait_until(lambda: len(asked(policy)) == 16)


def asked(policy: WebsocketClientPolicy) -> list:
    try:
        return policy.infer(OBS)["actions"]
    except OSError:
        return []


def sessions(port: int) -> int:
    return json.loads(get(port, "/status")[1])["sessions"]
