"""Driving a run's page in Chromium, and reading what the virtual servos were told meanwhile: for tests and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["PRESSES", "Press", "begin", "changed_goals", "frames", "phase", "press", "wait"]

# How Stop is pressed, and the browser event that is the press.
PRESSES = {"click": "pointerdown", "space": "keydown"}


@dataclass(frozen=True)
class Press:
    """One press on Stop, as the browser stamped it."""

    # In seconds of this process's monotonic clock.
    at: float
    # Until the page's own code heard of it, ms.
    heard_ms: float


def wait(condition: Callable[[], Any], said: Callable[[], str] = str, limit_s: float = 60.0) -> None:
    """Until `condition` holds; after `limit_s` seconds an assertion error with what `said` gives."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, said() or "it did not happen"
        time.sleep(0.02)


def phase(page: Any, *wanted: str) -> None:
    """Until the page says that the run is in one of these phases."""
    page.wait_for_function("wanted => wanted.includes(document.body.dataset.phase)", arg=list(wanted))


def begin(page: Any) -> None:
    """Until an episode runs; Start is pressed where the run waits for it."""
    phase(page, "running", "waiting", "judging")
    if page.evaluate("document.body.dataset.phase") != "running":
        page.click("#start")
    phase(page, "running")


def frames(page: Any, camera: str) -> int:
    """How many pictures of that camera the page has drawn."""
    return int(page.get_attribute(f"[data-camera={camera}] canvas", "data-frames") or 0)


def press(page: Any, how: str) -> Press:
    """Press Stop, `how` is one of `PRESSES`."""
    page.evaluate(
        """kind => addEventListener(kind, event => {
            window.pressed = [performance.timeOrigin + event.timeStamp, performance.now() - event.timeStamp];
        }, {capture: true, once: true})""",
        PRESSES[how],
    )
    if how == "space":
        page.keyboard.press("Space")
    else:
        page.click("#stop")
    at, heard_ms = page.evaluate("window.pressed")
    return Press(at / 1e3 - (time.time() - time.monotonic()), heard_ms)


def changed_goals(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those goals in a servo log, oldest first, that differ from the one before: a robot that holds gets none."""
    goals = [event for event in events if event["kind"] == "goal"]
    return [goal for goal, before in zip(goals[1:], goals, strict=False) if goal["goal"] != before["goal"]]
