"""Our client against our server, against a plain openpi server, and against servers that go away."""

import contextlib
import itertools
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import InvalidInput, pack, unpack
from numpy_policy import Options, expected_chunk, write_checkpoint
from processes import Running, policy_server, running
from serving_parts import CAMERAS, make_observation
from websockets.sync.server import ServerConnection, serve

SERVE = (sys.executable, "-m", "grasp_cube.serve_policy")


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "numpy", cameras=CAMERAS)


def plain_port(server: Running) -> int:
    return int(server.wait_for(r"listening at ws://127\.0\.0\.1:(\d+)")[1])


def test_it_waits_for_the_server_and_says_so(checkpoint):
    """A client that is started first prints that it waits, then connects by itself."""
    with policy_server(checkpoint) as (server, port):
        server.end()
    said: list[str] = []
    made: list[WebsocketClientPolicy] = []
    thread = threading.Thread(
        target=lambda: made.append(
            WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=60, on_status=said.append)
        )
    )
    thread.start()
    while not said:
        time.sleep(0.01)
    with running(*SERVE, "--policy.path", checkpoint, "--host", "127.0.0.1", "--port", str(port)):
        thread.join(60)
        with made[0] as policy:
            assert policy.infer(make_observation())["action"].shape == (16, 6)
    assert f"Waiting for a policy server at ws://127.0.0.1:{port}" in said[0]
    assert "is there" in said[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_reconnects_to_a_restarted_server(checkpoint, number):
    """The call in between raises ConnectionLost, the next one connects again and loses nothing."""
    obs = make_observation(1)
    with policy_server(checkpoint) as (server, port):
        policy = WebsocketClientPolicy(
            "127.0.0.1", port, connect_timeout_s=60, on_status=lambda sentence: None
        )
        policy.infer(obs)
        server.end(number)
    with pytest.raises(ConnectionLost):
        policy.infer(obs)
    assert not policy.connected
    with policy, running(*SERVE, "--policy.path", checkpoint, "--host", "127.0.0.1", "--port", str(port)):
        assert np.array_equal(policy.infer(obs)["action"], expected_chunk(Options(cameras=CAMERAS), obs))


def test_history_travels_with_the_request(tmp_path):
    """A policy that looks at three ticks sees exactly those that were sent, on any connection."""
    checkpoint = write_checkpoint(tmp_path / "history", cameras=CAMERAS, n_obs_steps=3)
    options = Options(cameras=CAMERAS, n_obs_steps=3)
    past, obs = [make_observation(seed) for seed in (1, 2)], make_observation(3)
    with policy_server(checkpoint) as (_, port):
        for _ in range(2):
            with WebsocketClientPolicy("127.0.0.1", port) as policy:
                assert policy.spec is not None
                assert policy.spec.n_obs_steps == 3
                assert np.array_equal(
                    policy.infer(obs, history=past)["action"], expected_chunk(options, obs, past)
                )
                alone = policy.infer(obs)["action"]
                assert np.array_equal(alone, expected_chunk(options, obs, [obs, obs]))


def test_a_plain_openpi_server_works():
    """Bare observations, a prompt inside, no protocol; `action` and `actions` both readable; reset sends nothing."""
    with (
        running(sys.executable, "benchmarks/plain_server.py", "--port", "0") as server,
        WebsocketClientPolicy("127.0.0.1", plain_port(server)) as policy,
    ):
        assert not policy.speaks_protocol
        assert policy.spec is None
        policy.reset()
        reply = policy.infer(make_observation(2), history=[make_observation(1)], prompt="x", seq=3, episode=1)
        assert np.array_equal(reply["action"][0], make_observation(2)["states"]["arm"])
        assert reply["actions"] is reply["action"]
        assert (reply["seq"], reply["episode"]) == (3, 1)
        with pytest.raises(InvalidInput, match="plain openpi"):
            policy.status()


@pytest.mark.slow
def test_it_survives_a_first_inference_of_two_minutes():
    """A plain server that blocks its event loop answers no ping for 121 s; the client still gets its chunk."""
    command = (sys.executable, "benchmarks/plain_server.py", "--port", "0", "--first-delay-s", "121")
    with running(*command) as server, WebsocketClientPolicy("127.0.0.1", plain_port(server)) as policy:
        assert policy.infer(make_observation())["action"].shape == (16, 6)


def test_a_late_answer_is_given_up_and_never_taken_for_the_next_one():
    """After a time-out the connection is dropped, so the next reply belongs to the next request."""
    command = (sys.executable, "benchmarks/plain_server.py", "--port", "0", "--first-delay-s", "2")
    with running(*command) as server:
        policy = WebsocketClientPolicy("127.0.0.1", plain_port(server), timeout_s=10, first_timeout_s=0.3)
        policy.timeout_s = 0.3
        with policy:
            with pytest.raises(ConnectionLost, match=r"within 0\.3 s"):
                policy.infer(make_observation(1))
            policy.timeout_s = 10
            reply = policy.infer(make_observation(2))
            assert np.array_equal(reply["action"][0], make_observation(2)["states"]["arm"])


def test_close_ends_a_waiting_call():
    """From another thread, also while it waits for a server that never comes."""
    holder: list[WebsocketClientPolicy] = []
    lost = threading.Event()
    policy = WebsocketClientPolicy.__new__(WebsocketClientPolicy)

    def wait() -> None:
        try:
            policy.__init__("127.0.0.1", 1, on_status=lambda sentence: holder.append(policy))  # type: ignore[misc]
        except ConnectionLost:
            lost.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    while not holder:
        time.sleep(0.01)
    policy.close()
    assert lost.wait(10)


@contextlib.contextmanager
def one_answer_each(metadata: Callable[[int], dict]) -> Iterator[tuple[int, list[int]]]:
    """A server that closes each connection after its answer; its port and the answers' connection numbers."""
    answered: list[int] = []
    opened = itertools.count()

    def handle(socket: ServerConnection) -> None:
        number = next(opened)
        socket.send(pack(metadata(number)))
        request, _ = unpack(socket.recv())
        answered.append(number)
        socket.send(pack({"actions": np.zeros((1, 6), np.float32), "seq": request.get("seq")}))

    with serve(handle, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.socket.getsockname()[1], answered
        server.shutdown()


def wait_for_the_end(policy: WebsocketClientPolicy) -> None:
    """Until the server's close has come; the client has not looked yet."""
    assert policy._connection is not None
    assert select.select([policy._connection._sock], [], [], 10)[0]
    time.sleep(0.05)


def test_a_connection_that_ended_while_idle_is_opened_again_without_an_error():
    """Nothing had been sent on it, and the same policy answers."""
    with (
        one_answer_each(lambda number: {"protocol": "grasp-cube/1"}) as (port, answered),
        WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=5) as policy,
    ):
        for _ in range(3):
            assert policy.infer(make_observation())["action"].shape == (1, 6)
            wait_for_the_end(policy)
    assert answered == [0, 1, 2]


def test_another_policy_behind_the_same_address_is_told():
    """The caller made its plans for the first one; the next call is answered by the second."""
    with (
        one_answer_each(lambda number: {"protocol": "grasp-cube/1", "name": min(number, 1)}) as (
            port,
            answered,
        ),
        WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=5) as policy,
    ):
        policy.infer(make_observation())
        wait_for_the_end(policy)
        with pytest.raises(ConnectionLost, match="another policy"):
            policy.infer(make_observation())
        assert policy.metadata["name"] == 1
        policy.infer(make_observation())
    assert answered == [0, 1]


def test_a_lost_prompt_is_told():
    """A prompt belongs to its connection, so that its end is no secret."""
    with (
        one_answer_each(lambda number: {"protocol": "grasp-cube/1"}) as (port, answered),
        WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=5) as policy,
    ):
        policy.set_prompt("stack the cubes")
        wait_for_the_end(policy)
        with pytest.raises(ConnectionLost):
            policy.infer(make_observation())
        assert policy.infer(make_observation())["action"].shape == (1, 6)
    assert answered == [0, 1]


@pytest.mark.parametrize("silent_from_the_start", [True, False])
def test_closing_ends_a_call_that_waits(silent_from_the_start):
    """For the metadata as well as for an answer."""

    def handle(socket: ServerConnection) -> None:
        if not silent_from_the_start:
            socket.send(pack({"protocol": "grasp-cube/1"}))
        for _ in socket:
            pass

    ended = threading.Event()
    policy = WebsocketClientPolicy.__new__(WebsocketClientPolicy)

    def wait(port: int) -> None:
        try:
            policy.__init__("127.0.0.1", port)  # type: ignore[misc]
            policy.infer(make_observation())
        except ConnectionLost:
            ended.set()

    with serve(handle, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Thread(target=wait, args=(server.socket.getsockname()[1],), daemon=True).start()
        time.sleep(0.5)
        policy.close()
        assert ended.wait(5)
        server.shutdown()


@pytest.mark.parametrize("first", [b"\xc1", pack([1]), pack({"policy": {"type": 3}})])
def test_a_server_that_is_no_policy_server_is_named(first):
    """A foreign first frame is an error that says so, not a crash later."""
    with serve(lambda socket: socket.send(first), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        with pytest.raises(InvalidInput):
            WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=5)
        server.shutdown()


def test_an_address_that_is_none_is_named():
    """Instead of waiting for ever."""
    with pytest.raises(InvalidInput, match="not a WebSocket address"):
        WebsocketClientPolicy("ws://", None, connect_timeout_s=5)
