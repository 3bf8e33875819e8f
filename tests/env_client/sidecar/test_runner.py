"""A consumer's queue under pressure."""

import threading
import time
from typing import Any

from env_client.sidecar.runner import Runner
from env_client.sidecar.types import EpisodeEnd, EpisodeStart, Mark, RunInfo, TickData
from record_parts import result, ticks


class Slow:
    """A consumer that stands still until it is let go."""

    def __init__(self, fails_at: str = "") -> None:
        self.go = threading.Event()
        self.busy = threading.Event()
        self.seen: list[tuple[str, Any]] = []
        self._fails_at = fails_at

    def _take(self, event: str, value: Any) -> None:
        self.busy.set()
        assert self.go.wait(20)
        self.seen.append((event, value))
        if event == self._fails_at:
            raise OSError(28, "No space left on device")

    def begin_run(self, run: RunInfo) -> None:
        self._take("begin_run", run)

    def begin_episode(self, start: EpisodeStart) -> None:
        self._take("begin_episode", start)

    def tick(self, tick: TickData) -> None:
        self._take("tick", tick)

    def end_episode(self, end: EpisodeEnd) -> None:
        self._take("end_episode", end)

    def mark(self, mark: Mark) -> None:
        self._take("mark", mark)

    def state(self, state: dict[str, Any]) -> None:
        self._take("state", state)

    def close(self) -> None:
        self._take("close", None)


def overloaded(runner: Runner, slow: Slow, count: int) -> list[TickData]:
    """The ticks that arrive of `count` that came while the consumer stood still."""
    for index, tick in enumerate(ticks(0, count)):
        runner.put("tick", tick)
        if index == 0:
            assert slow.busy.wait(20)
    runner.put("end_episode", EpisodeEnd(0, result(0, count)))
    slow.go.set()
    # What comes now would take the pictures of whatever still waits.
    end = time.monotonic() + 20
    while not any(event == "end_episode" for event, _ in slow.seen) and time.monotonic() < end:
        time.sleep(0.005)
    runner.put("tick", next(ticks(1, 1)))
    runner.close()
    assert runner.join(20)
    return [value for event, value in slow.seen if event == "tick"]


def test_pictures_go_first_then_ticks_and_events_never() -> None:
    """Each tick says what was dropped of it, and how many were lost before it."""
    slow, said = Slow(), list[str]()
    seen = overloaded(Runner("it", slow, said.append), slow, 1200)
    assert [len(tick.images) for tick in seen[:31]] == [2] * 31
    assert all((tick.images, tick.dropped) == ({}, 2) for tick in seen[31:901])
    assert sum(1 + tick.lost for tick in seen) == 1201
    assert [event for event, _ in slow.seen[-3:] if event != "tick"] == ["end_episode", "close"]
    assert not said


def test_a_viewer_gets_the_newest_picture_and_every_row() -> None:
    """What waits before the newest tick keeps its numbers and loses its pictures."""
    slow = Slow()
    seen = overloaded(Runner("it", slow, print, latest=True), slow, 50)
    assert [tick.tick for tick in seen] == [*range(50), 0]
    assert [tick.tick for tick in seen[1:50] if tick.images] == [49]


def test_a_consumer_that_fails_ends_alone_and_says_why() -> None:
    """One sentence, one close, and nothing is kept for it any more."""
    slow, said = Slow(fails_at="tick"), list[str]()
    slow.go.set()
    runner = Runner("The inference log", slow, said.append)
    for tick in ticks(0, 5):
        runner.put("tick", tick)
    assert runner.join(20)
    runner.put("mark", Mark(0, True))
    runner.close()
    assert [event for event, _ in slow.seen] == ["tick", "close"]
    assert said == ["The inference log stopped (No space left on device); everything else goes on."]


def test_events_come_in_their_order() -> None:
    """A consumer is called by one thread, in the order in which things happened."""
    slow = Slow()
    slow.go.set()
    runner = Runner("it", slow, print)
    runner.put("begin_episode", EpisodeStart(0, 1.0))
    for tick in ticks(0, 3):
        runner.put("tick", tick)
    runner.put("end_episode", EpisodeEnd(0, result(0, 3)))
    runner.put("mark", Mark(0, True))
    runner.close()
    assert runner.join(20)
    assert [event for event, _ in slow.seen] == [
        "begin_episode",
        *["tick"] * 3,
        "end_episode",
        "mark",
        "close",
    ]
