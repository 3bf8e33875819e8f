"""Robots for the tests of several servers: real control loops over real sockets, only their arms are doubles."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "env_client" / "control"))
from control_doubles import FPS, Arm, env_spec
from env_client.control import ControlLoop, EpisodeResult, SafetyConfig, SafetyFilter, make_source
from env_client.policy_server import SamePolicy
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint

# What a test may wait for on a busy machine, in seconds.
PATIENCE_S = 240.0
# What docs/safety.md allows on top of the time of one answer when a server of several is lost, in seconds.
RESERVE_S = 0.5


def checkpoint(folder: Path, **options: Any) -> Path:
    """A policy for three joints that answers in 50 ms."""
    fields = {"action_dim": 3, "horizon": 60, "cameras": (), "delay_s": 0.05}
    return write_checkpoint(folder, **(fields | {"states": ({"name": "arm", "size": 3},)} | options))


def wait_until(condition: Callable[[], Any], what: str = "it") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.02)


class Robot:
    """One run: episode after episode in `async`, in a thread of its own, until `end`."""

    def __init__(self, url: str, episode_s: float = 1e6):
        self.client = WebsocketClientPolicy(url, connect_timeout_s=5.0, on_status=lambda sentence: None)
        assert self.client.spec is not None
        self.results: list[EpisodeResult] = []
        # The policies that answered, by episode.
        self.policies: dict[int, set[str]] = {}
        self.slowest_s = 0.0
        self._same = SamePolicy(self.client)
        self._episode_s = episode_s
        self._stop = threading.Event()
        arm = Arm(env_spec())
        self.source = make_source("async", self, self.client.spec, FPS)
        self._loop = ControlLoop(arm, self.source, SafetyFilter(arm.spec, SafetyConfig(), FPS), FPS)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def connect(self) -> None:
        self._same.connect()

    def infer(self, obs: dict[str, Any], **request: Any) -> dict[str, Any]:
        asked = time.monotonic()
        reply = self._same.infer(obs, **request)
        self.slowest_s = max(self.slowest_s, time.monotonic() - asked)
        self.policies.setdefault(request["episode"], set()).add(self.client.identity[1])
        return reply

    def _run(self) -> None:
        while not self._stop.is_set():
            self.results.append(self._loop.run_episode(time_s=self._episode_s, stop=self._stop))

    @property
    def consumed(self) -> int:
        return self.source.stats.consumed

    @property
    def failed(self) -> int:
        """Requests that did not get their chunk, each of which was asked for again."""
        # The answer to an episode's last request may come when the next one has begun.
        dropped = {
            reason: count for reason, count in self.source.stats.dropped.items() if reason != "other episode"
        }
        return sum(self.source.stats.errors.values()) + sum(dropped.values())

    @property
    def starved_beyond(self) -> float:
        """Seconds without an action beyond what docs/safety.md allows for one lost server; at most 0 is expected."""
        return self.source.stats.starved / FPS - self.slowest_s - RESERVE_S

    def end(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        self.source.close()
        self.client.close()


@contextmanager
def robots(count: int, url: str, episode_s: float = 1e6) -> Iterator[list[Robot]]:
    """`count` robots that are at work, ended with the block."""
    working: list[Robot] = []
    try:
        for _ in range(count):
            working.append(Robot(url, episode_s))
        all_go_on(working, 20)
        yield working
    finally:
        for robot in working:
            robot._stop.set()
        for robot in working:
            robot.end()


def all_go_on(working: list[Robot], ticks: int) -> None:
    """Wait until each robot has executed so many more actions."""
    wanted = [robot.consumed + ticks for robot in working]
    wait_until(
        lambda: all(robot.consumed >= count for robot, count in zip(working, wanted, strict=True)),
        f"{ticks} more actions of each robot",
    )
