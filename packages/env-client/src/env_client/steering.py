"""What a person may ask of a run, from the page or from the terminal: begin, stop, hold, judge, edit the prompt, end.

    control thread:  next_episode -> enter("moving") -> enter("running") -> finished -> next_episode -> …
    any thread:      command({"name": "stop"}), end()

Life cycle: one `Steering` per run. A run that nobody touches goes from episode to episode by itself. Whoever ends
an episode, or asked for an attended run, is waited for: nothing begins before Start.

Every command acts at once or not at all. What does not fit the moment (a Reset between two episodes, a Hold after the end)
is dropped and never kept for later; a command that names an episode which is over is dropped as well. A Stop is never dropped while something
moves. No command raises: what comes from a browser cannot harm the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

__all__ = ["ACTIVE", "WAITING", "Controls", "Steering"]

# Phases in which a Stop has something to stop, and phases in which a Start begins something.
ACTIVE = ("starting", "teleoperation", "moving", "running", "paused")
WAITING = ("waiting", "judging")
# The longest prompt and the longest note that a page may send, in characters.
_PROMPT, _NOTE = 1000, 2000


class Controls(Protocol):
    """What steering does to the run itself. Called from any thread; each call returns at once."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def set_prompt(self, prompt: str) -> None: ...


class Steering:
    """The state of a run with a person. All methods may be called from any thread."""

    def __init__(
        self,
        controls: Controls,
        *,
        episodes: int,
        attended: bool = False,
        publish: Callable[[dict[str, Any]], None] = lambda state: None,
        on_mark: Callable[[int, bool, str], None] = lambda episode, success, note: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`episodes`: so many begin by themselves; a person may ask for more. `publish` gets the state whenever it
        changes; it and `on_mark` must return at once."""
        # Set while whatever moves must end; it is what `ControlLoop` takes as its stop event.
        self.stop = threading.Event()
        # Set by a Stop after the run's end, when the robot goes or is about to go to its rest pose.
        self._halt = threading.Event()
        self.prompt = self._own_prompt = ""
        self._controls, self._episodes, self._attended = controls, episodes, attended
        self._live_prompt = False
        self._publish, self._on_mark, self._say = publish, on_mark, say
        self._lock = threading.RLock()
        self._go = threading.Event()
        self._phase = "starting"
        self._number = 0
        # Why `stop` is set: start (the leader's turn is over), reset or stop; empty while it is not.
        self._why = ""
        self._ended = False
        self._must_wait = attended
        # A person asked for the next episode, also beyond `episodes`.
        self._asked = False
        self._mark: tuple[bool, str] | None = None
        # The last episode that ended, which is the one that Success and Failure judge between episodes.
        self._last: int | None = None
        self._outcome = ""

    def describe(self, prompt: str, *, live_prompt: bool) -> None:
        """The prompt that the run begins with. `live_prompt`: the policy reads it, so it may change in an episode."""
        self.prompt = self._own_prompt = prompt
        self._live_prompt = live_prompt

    # ------------------------------------------------------------------------------------- the control thread

    def next_episode(self, idle: Callable[[threading.Event], None]) -> int | None:
        """The number of the episode that begins now, None when the run is over. Where a person has the say,
        `idle` is called with an event and returns when that is set: Start was pressed, or the run ends."""
        while self._waits():
            idle(self._go)
        with self._lock:
            if self._ended or not (self._number < self._episodes or self._asked):
                self._enter("finished")
                return None
            self._asked = False
            self._must_wait = self._must_wait or self._attended
            if self._phase != "starting":
                self._enter("starting")
            return self._number

    def _waits(self) -> bool:
        """Whether a person has the say now. Asked again after each Start: a Stop may have followed it at once."""
        with self._lock:
            if self._why in ("reset", "start"):
                self._clear()
            if not self._must_wait or self._ended:
                return False
            self._go.clear()
            if self._ended:  # `end` may have come just before the line above
                self._go.set()
            self._enter("judging" if self._phase == "judging" else "waiting")
            return True

    def enter(self, phase: str) -> bool:
        """`phase` (one of ACTIVE) begins. False when a person stopped the run meanwhile: it must not begin."""
        with self._lock:
            if self._why == "start":
                self._clear()
            if self.stop.is_set():
                return False
            self._enter(phase)
            return True

    def finished(self, outcome: str) -> None:
        """The episode is over; a judgement that was given during it is told now."""
        with self._lock:
            self._controls.resume()
            self._last, self._outcome = self._number, outcome
            self._number += 1
            self._enter("judging" if self._must_wait else "starting")
            if self._mark is not None:
                self._on_mark(self._last, *self._mark)

    def leave(self) -> threading.Event:
        """The run is over and the robot goes to its rest pose; the stop event for that way."""
        with self._lock:
            self._enter("leaving")
        return self._halt

    # ------------------------------------------------------------------------------------------- any thread

    def end(self) -> None:
        """End the run: within one tick, and for good. Takes no lock: a signal handler may call it at any point."""
        self._ended = True
        self.stop.set()
        self._go.set()

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def outcome(self) -> str:
        """By whom or what `stop` was set; empty while it is not."""
        return {"reset": "reset", "stop": "stopped by a person"}.get(self._why, "")

    def command(self, command: Mapping[str, Any]) -> None:
        """Do what a person asked for. Unknown and unfitting commands do nothing."""
        act = _ACTS.get(str(command.get("name")))
        if act is None:
            return
        with self._lock:
            act(self, command)
            self._tell()

    def state(self) -> dict[str, Any]:
        """What a page shows beside the ticks, as plain values."""
        with self._lock:
            return {
                "phase": self._phase,
                "episode": self._number,
                "episodes": self._episodes,
                "attended": self._attended,
                "prompt": self.prompt,
                "prompt_editable": self._phase not in ("running", "paused") or self._live_prompt,
                "last_episode": self._last,
                "last_outcome": self._outcome,
                "mark": None if self._mark is None else {"success": self._mark[0], "note": self._mark[1]},
            }

    def _start(self, command: Mapping[str, Any]) -> None:
        if not self._is_current(command):
            return
        if self._phase == "teleoperation" and not self.stop.is_set():
            self._interrupt("start")
        elif self._phase in WAITING and not self._ended:
            self._clear()
            self._asked, self._must_wait, self._mark = True, False, None
            self._phase = "starting"
            self._go.set()

    def _reset(self, command: Mapping[str, Any]) -> None:
        if self._phase in WAITING:
            self._start(command)
        # Behind a Stop of the same moment it has nothing to say any more.
        elif self._phase in ("running", "paused") and not self.stop.is_set() and self._is_current(command):
            self._asked, self._must_wait = True, False
            self._interrupt("reset")

    def _stop(self, command: Mapping[str, Any]) -> None:
        if self._ended or self._phase in ("finished", "leaving"):
            self._halt.set()
        elif self._phase in ACTIVE:
            self._must_wait, self._asked = True, False
            self._interrupt("stop")
            self._say("Stopped by a person: the robot holds, and nothing begins before Start.")

    def _hold(self, command: Mapping[str, Any]) -> None:
        if self._phase == "running" and self._is_current(command):
            self._controls.pause()
            self._phase = "paused"

    def _resume(self, command: Mapping[str, Any]) -> None:
        if self._phase == "paused" and self._is_current(command):
            self._controls.resume()
            self._phase = "running"

    def _judge(self, command: Mapping[str, Any]) -> None:
        success, note = command["name"] == "success", _text(command.get("note"), _NOTE)
        if self._phase in ("running", "paused") and self._is_current(command):
            self._mark = (success, note)
            self._stop(command)
        elif (
            self._phase == "judging"
            and self._last is not None
            and command.get("episode") in (None, self._last)
        ):
            self._mark = (success, note)
            self._on_mark(self._last, success, note)

    def _set_prompt(self, command: Mapping[str, Any]) -> None:
        if self._phase in ("running", "paused") and not self._live_prompt:
            return
        self.prompt = _text(command.get("prompt"), _PROMPT) or self._own_prompt
        self._controls.set_prompt(self.prompt)

    def _quit(self, command: Mapping[str, Any]) -> None:
        self._say("The run was ended by a person.")
        self.end()

    # ------------------------------------------------------------------------------------------- within

    def _is_current(self, command: Mapping[str, Any]) -> bool:
        return command.get("episode") in (None, self._number)

    def _interrupt(self, why: str) -> None:
        self._why = why
        self.stop.set()

    def _clear(self) -> None:
        self._why = ""
        self.stop.clear()
        if self._ended:  # `end` may have come between the two lines above
            self.stop.set()

    def _enter(self, phase: str) -> None:
        if phase == "running":
            self._mark = None
        self._phase = phase
        self._tell()

    def _tell(self) -> None:
        self._publish(self.state())


def _text(value: Any, limit: int) -> str:
    return " ".join(value.split())[:limit] if isinstance(value, str) else ""


_ACTS: dict[str, Callable[[Steering, Mapping[str, Any]], None]] = {
    "start": Steering._start,
    "reset": Steering._reset,
    "stop": Steering._stop,
    "hold": Steering._hold,
    "resume": Steering._resume,
    "success": Steering._judge,
    "failure": Steering._judge,
    "prompt": Steering._set_prompt,
    "quit": Steering._quit,
}
