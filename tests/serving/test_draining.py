"""A server that ends sends its clients elsewhere without taking an answer or an episode along."""

import signal
import socket
import threading
import time

import pytest
from env_client.policy_server import SamePolicy
from env_client.websocket import Connection, NothingSent
from env_client.websocket_client_policy import ConnectionLost
from env_client.wire import InvalidInput, pack, unpack
from numpy_policy import write_checkpoint
from processes import policy_server
from serving_parts import CAMERAS, client, get, make_observation, serving
from websockets.sync.server import serve

OBS = make_observation()
LIMIT_S = 60.0


def opened(port: int) -> Connection:
    connection = Connection.open(f"ws://127.0.0.1:{port}")
    connection.recv(LIMIT_S)
    return connection


def ask(connection: Connection, **fields: object) -> dict:
    connection.send(pack({"op": "infer", "obs": OBS} | fields), LIMIT_S)
    return unpack(connection.recv(LIMIT_S))[0]


def closed_by(connection: Connection) -> NothingSent:
    with pytest.raises(NothingSent) as ended:
        connection.recv(LIMIT_S)
    return ended.value


def test_what_was_asked_is_answered_and_then_the_client_is_told_to_connect_again(tmp_path):
    """Idle clients at once, the others after their answers; both by 1012, and the command ends with 0."""
    checkpoint = write_checkpoint(tmp_path / "slow", cameras=CAMERAS, delay_s=1.0)
    with policy_server(checkpoint) as (server, port):
        idle, busy = opened(port), opened(port)
        busy.send(pack({"op": "infer", "seq": 5, "obs": OBS}), LIMIT_S)
        while not get(port, "/status")[1].count(b'"running": 1'):
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert closed_by(idle).code == 1012
        # While the answer is on its way: alive, and nothing for another robot.
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/readyz")[0] == 503
        reply, _ = unpack(busy.recv(LIMIT_S))
        assert (reply["seq"], reply["actions"].shape) == (5, (16, 6))
        assert closed_by(busy).code == 1012
        assert server.process.wait(LIMIT_S) == 0
        server.wait_for("Stopped")


def test_an_episode_is_finished_first(tmp_path):
    """With --drain-s a client stays until it begins another episode; who asked nothing yet goes at once."""
    checkpoint = write_checkpoint(tmp_path / "quick", cameras=CAMERAS)
    with serving("--policy.path", checkpoint, "--drain-s", "600") as (server, port):
        new, working, bare = opened(port), opened(port), opened(port)
        assert ask(working, episode=7, seq=1)["seq"] == 1
        bare.send(pack(OBS), LIMIT_S)
        bare.recv(LIMIT_S)
        server.process.send_signal(signal.SIGTERM)
        assert closed_by(new).code == 1012
        assert ask(working, episode=7, seq=2)["seq"] == 2
        with pytest.raises(ConnectionLost, match=r"503.*shutting down"):
            client(port, connect_timeout_s=0)
        with pytest.raises(NothingSent):
            ask(working, episode=8, seq=3)
        # Clients of the older kinds say by a reset that an episode begins.
        bare.send(pack({"reset": True}), LIMIT_S)
        assert closed_by(bare).code == 1012
        assert server.process.wait(LIMIT_S) == 0


def test_a_second_signal_waits_for_no_episode(tmp_path):
    """Nor does the end of --drain-s."""
    checkpoint = write_checkpoint(tmp_path / "quick", cameras=CAMERAS)
    with serving("--policy.path", checkpoint, "--drain-s", "600") as (server, port):
        working = opened(port)
        ask(working, episode=7)
        server.process.send_signal(signal.SIGTERM)
        assert ask(working, episode=7)["episode"] == 7
        server.process.send_signal(signal.SIGTERM)
        assert closed_by(working).code == 1012
        assert server.process.wait(LIMIT_S) == 0
    with serving("--policy.path", checkpoint, "--drain-s", "0.5") as (server, port):
        working = opened(port)
        ask(working, episode=7)
        server.process.send_signal(signal.SIGTERM)
        assert closed_by(working).code == 1012


def test_what_came_too_late_is_asked_again_by_itself(tmp_path):
    """A server that answers a request with 1012 did not begin it: the client asks another one, and raises nothing, though
    two more end before they can be asked."""
    checkpoint = write_checkpoint(tmp_path / "quick", cameras=CAMERAS)
    with serving("--policy.path", checkpoint) as (_, port):
        other = opened(port)
        with client(port) as policy:
            greeting = pack(policy.metadata)
        other.close()
        seen = []

        def front(connection) -> None:
            """The first connection ends when it is asked, the next two before and after their greeting, all others are the
            server's."""
            seen.append(connection)
            if len(seen) <= 3:
                if len(seen) != 2:
                    connection.send(greeting)
                if len(seen) == 1:
                    connection.recv()
                connection.close(1012, "connect again")
                return
            behind = opened(port)
            connection.send(greeting)
            for message in connection:
                behind.send(message, LIMIT_S)
                connection.send(bytes(behind.recv(LIMIT_S)))
            behind.close()

        with (
            socket.create_server(("127.0.0.1", 0)) as sock,
            serve(front, sock=sock, compression=None) as proxy,
        ):
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            with client(sock.getsockname()[1]) as policy:
                assert policy.infer(OBS, seq=9)["seq"] == 9
            proxy.shutdown()
        assert len(seen) == 4


def test_another_checkpoint_is_taken_between_two_episodes_and_never_inside_one(tmp_path):
    """As after a fleet's update: of the same spec, and said once."""
    old = write_checkpoint(tmp_path / "old", cameras=CAMERAS)
    new = write_checkpoint(tmp_path / "new", cameras=CAMERAS, amplitude=4.0)
    said = []
    with serving("--policy.path", old) as (server, port):
        policy = client(port)
        checked = SamePolicy(policy, said.append)
        checked.infer(OBS, episode=1)
        before = policy.identity
        server.end()
    with policy, serving("--policy.path", new, "--port", str(port)):
        with pytest.raises(ConnectionLost, match="another policy"):
            checked.infer(OBS, episode=1)
        with pytest.raises(InvalidInput, match="another policy"):
            checked.infer(OBS, episode=1)
        assert said == []
        for _ in range(2):
            assert len(checked.infer(OBS, episode=2)["actions"]) == 16
        assert len(said) == 1
        assert policy.identity[0] == before[0]
        assert policy.identity != before
