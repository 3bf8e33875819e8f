"""The one thread that talks to the server, with clients that are slow, broken or wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from control_doubles import observation, policy_spec
from env_client.control.network import ChunkRequest, NetworkThread, Outcome, encode_observation
from env_client.wire import CameraSpec, ErrorCode, InvalidInput, StateSpec, WireError

# Nothing here takes long; a test that waits for this much has failed.
PATIENCE_S = 20.0


class Client:
    """An `infer` that does what it is told and notes what it was asked."""

    def __init__(self, act: Callable[[int], Any] = lambda count: {"actions": np.ones((2, 3))}):
        self.act = act
        self.calls: list[dict[str, Any]] = []
        self.at_once = 0
        self.most_at_once = 0
        self.threads: set[str] = set()

    def infer(self, obs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        self.threads.add(threading.current_thread().name)
        self.calls.append({"obs": obs, **kwargs})
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.act(len(self.calls))
        finally:
            self.at_once -= 1


def request(seq: int, generation: int = 0, **changes: Any) -> ChunkRequest:
    fields: dict[str, Any] = {
        "observation": observation(np.zeros(3), float(seq)),
        "history": (),
        "seq": seq,
        "episode": 4,
        "generation": generation,
        "consumed": 0,
        "prompt": "lift",
    }
    return ChunkRequest(**(fields | changes))


def outcomes(network: NetworkThread, count: int = 1) -> list[Outcome]:
    """The next `count` outcomes; fails when they do not come."""
    got: list[Outcome] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(got) < count:
        got += network.poll()
        assert time.monotonic() < deadline, f"{len(got)} of {count} outcomes came"
        time.sleep(0.001)
    return got


def make(client: Client, **options: float) -> NetworkThread:
    return NetworkThread(client, policy_spec(), **({"retry_min_s": 0.001, "retry_max_s": 0.01} | options))


def test_a_request_is_answered_in_the_other_thread() -> None:
    """Everything that the request holds reaches the client; the reply and its latency come back."""
    client = Client()
    network = make(client)
    assert network.submit(request(1))
    outcome = outcomes(network)[0]
    assert outcome.reply is not None
    assert outcome.latency_s >= 0
    call = client.calls[0]
    assert (call["seq"], call["episode"], call["prompt"], call["capture_time"]) == (1, 4, "lift", 1.0)
    assert call["history"] is None
    assert client.threads == {"env-client-network"}
    network.close()


def test_one_request_is_in_flight_and_the_newest_waits() -> None:
    """While one is answered a second of the same generation is refused, or takes the waiting one's place."""
    gate = threading.Event()
    client = Client(lambda count: (gate.wait(PATIENCE_S) and {}) or {})
    network = make(client)
    assert network.submit(request(1))
    while not client.calls:
        time.sleep(0.001)
    assert not network.submit(request(2))
    for seq in (3, 4, 5):
        assert network.submit(request(seq), replace=True)
    assert network.submit(request(6, generation=1))
    gate.set()
    assert [outcome.request.seq for outcome in outcomes(network, 2)] == [1, 6]
    assert client.most_at_once == 1
    network.close()


def test_an_answer_that_waits_to_be_fetched_is_in_flight() -> None:
    """A request made in the moment between would have the answer before it taken for an old one."""
    client = Client()
    network = make(client)
    deadline = time.monotonic() + PATIENCE_S
    for count in (1, 2):
        assert network.submit(request(count, generation=count))
        # The second is only asked when the first one's answer is there.
        while len(client.calls) < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert not network.submit(request(3, generation=1))
    outcomes(network, 2)
    network.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WireError(ErrorCode.OVERLOADED, "too many robots", retry_after_ms=1), "OVERLOADED"),
        (InvalidInput("no such camera"), "INVALID_INPUT"),
        (ConnectionError("refused"), "CONNECTION"),
        (TimeoutError("no answer in 5 s"), "CONNECTION"),
        (OSError("no route"), "CONNECTION"),
        (KeyError("actions"), "CLIENT"),
    ],
)
def test_every_failure_is_an_outcome(error: Exception, code: str) -> None:
    """And the thread lives: the next request is answered."""

    def act(count: int) -> dict[str, Any]:
        if count == 1:
            raise error
        return {}

    network = make(Client(act))
    network.submit(request(1))
    failed = outcomes(network)[0]
    assert failed.reply is None
    assert failed.code == code
    assert failed.error
    network.submit(request(2))
    assert outcomes(network)[0].reply == {}
    network.close()


def test_a_failing_server_is_asked_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses double; what waits meanwhile is the newest observation."""

    def act(count: int) -> dict[str, Any]:
        raise ConnectionError("refused")

    client = Client(act)
    network = make(client, retry_min_s=0.05, retry_max_s=30.0)
    seq = 0
    deadline = time.monotonic() + PATIENCE_S
    while len(client.calls) < 4 and time.monotonic() < deadline:
        seq += 1
        network.poll()
        network.submit(request(seq))
        time.sleep(0.002)
    network.close()
    asked = [call["seq"] for call in client.calls]
    assert len(asked) >= 4
    gaps = np.diff(asked)
    # 0.05, 0.1 and 0.2 s in steps of at least 2 ms: fewer requests than ticks, and each of a newer one.
    assert (gaps > 1).all()
    assert asked == sorted(set(asked))


def test_a_server_that_comes_back_gets_the_newest_observation() -> None:
    """While the connection is being opened, the waiting request goes on being replaced; it is no latency."""

    class Away(Client):
        there = threading.Event()

        def connect(self) -> None:
            self.there.wait(PATIENCE_S)

    client = Away()
    network = make(client)
    for seq in range(1, 6):
        assert network.submit(request(seq))
        time.sleep(0.002)
    client.there.set()
    assert outcomes(network)[0].request.seq == 5
    assert [call["seq"] for call in client.calls] == [5]
    network.close()


def test_what_is_discarded_is_not_sent() -> None:
    """A reset forgets the request that waits."""
    gate = threading.Event()
    client = Client(lambda count: (gate.wait(PATIENCE_S) and {}) or {})
    network = make(client)
    network.submit(request(1))
    while not client.calls:
        time.sleep(0.001)
    network.submit(request(2), replace=True)
    network.discard()
    gate.set()
    assert [outcome.request.seq for outcome in outcomes(network)] == [1]
    network.submit(request(3))
    assert [outcome.request.seq for outcome in outcomes(network)] == [3]
    network.close()


def test_a_closed_thread_takes_nothing() -> None:
    """close may be called twice, and before anything was asked."""
    client = Client()
    network = make(client)
    network.close()
    network.close()
    assert not network.submit(request(1))
    assert client.calls == []


def test_close_does_not_wait_for_a_stuck_server() -> None:
    """The thread is a daemon; a hanging request keeps nobody."""
    gate = threading.Event()
    network = make(Client(lambda count: (gate.wait(PATIENCE_S) and {}) or {}))
    network.submit(request(1))
    network.close(timeout_s=0.01)
    gate.set()


def test_the_observation_is_brought_to_the_policys_taste() -> None:
    """Its cameras in its sizes and its parts; nothing else travels."""
    spec = policy_spec(
        cameras=(CameraSpec("front", 4, 6, "stretch"),), states=(StateSpec("arm", 3),), n_obs_steps=2
    )
    images = {"front": np.full((8, 12, 3), 9, np.uint8), "wrist": np.zeros((8, 12, 3), np.uint8)}
    seen = observation(np.zeros(3), images=images)
    seen.states["extra"] = np.zeros(2, np.float32)
    plain = encode_observation(seen, spec)
    assert {name: image.shape for name, image in plain["images"].items()} == {"front": (4, 6, 3)}
    assert list(plain["states"]) == ["arm"]
    assert plain["task"] == "do it"
    assert set(seen.images) == {"front", "wrist"}
    client = Client()
    network = NetworkThread(client, spec)
    network.submit(request(1, observation=seen, history=(seen,)))
    assert outcomes(network)[0].reply is not None
    assert client.calls[0]["history"][0]["images"]["front"].shape == (4, 6, 3)
    network.close()


def test_a_missing_camera_or_part_is_a_sentence() -> None:
    """What the policy wants, and what this robot has."""
    seen = observation(np.zeros(3), images={"front": np.zeros((2, 2, 3), np.uint8)})
    with pytest.raises(InvalidInput, match=r"'wrist'.*has front"):
        encode_observation(seen, policy_spec(cameras=(CameraSpec("wrist", 2, 2),)))
    with pytest.raises(InvalidInput, match=r"left_arm.*has arm"):
        encode_observation(seen, policy_spec(states=(StateSpec("left_arm", 6),)))
