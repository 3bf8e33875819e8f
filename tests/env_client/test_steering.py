"""What a person may ask of a run, at every moment of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from env_client.steering import Steering
from hypothesis import given, settings
from hypothesis import strategies as st


class Run:
    """Steering, and what it did to the run; `begin` is what the control thread does up to an episode's first tick."""

    def __init__(self, episodes: int = 3, attended: bool = False, live_prompt: bool = False) -> None:
        self.calls: list[str] = []
        self.marks: list[tuple[int, bool, str]] = []
        self.states: list[dict[str, Any]] = []
        self.waited = 0
        self.steering = Steering(
            self,
            episodes=episodes,
            attended=attended,
            publish=self.states.append,
            on_mark=lambda *mark: self.marks.append(mark),
        )
        self.steering.describe("lift", live_prompt=live_prompt)

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def set_prompt(self, prompt: str) -> None:
        self.calls.append(prompt)

    @property
    def phase(self) -> str:
        return self.steering.state()["phase"]

    def begin(self, *while_waiting: dict[str, Any]) -> int | None:
        """The next episode, running; `while_waiting` is what the person does when they are waited for."""

        def idle(go: threading.Event) -> None:
            self.waited += 1
            for command in while_waiting:
                assert not go.is_set()
                self.steering.command(command)
            assert go.is_set(), f"nothing of {while_waiting} lets the run go on"

        number = self.steering.next_episode(idle)
        if number is not None:
            assert self.steering.enter("moving")
            assert self.steering.enter("running")
        return number

    def do(self, name: str, **more: Any) -> None:
        self.steering.command({"name": name, **more})


def test_a_run_that_nobody_touches_waits_for_nobody() -> None:
    """The episodes follow each other and the run ends after the last one."""
    run = Run(episodes=2)
    for number in range(2):
        assert run.begin() == number
        run.steering.finished("time")
    assert run.begin() is None
    assert run.waited == 0
    assert run.phase == "finished"


def test_whoever_stops_an_episode_is_waited_for() -> None:
    """Stop ends the episode; nothing begins before Start, and then the others follow by themselves."""
    run = Run(episodes=3)
    run.begin()
    run.do("stop")
    assert run.steering.stop.is_set()
    assert run.steering.outcome == "stopped by a person"
    run.steering.finished("stopped")
    assert run.phase == "judging"
    assert run.begin({"name": "start"}) == 1
    assert not run.steering.stop.is_set()
    run.steering.finished("time")
    assert run.begin() == 2
    assert run.waited == 1


def test_a_stop_on_the_way_to_the_episode() -> None:
    """A Stop while the arm moves to its ready pose keeps the episode from beginning; Start begins the same one."""
    run = Run()
    assert run.steering.next_episode(lambda go: None) == 0
    assert run.steering.enter("moving")
    run.do("stop")
    assert not run.steering.enter("running")
    assert run.begin({"name": "start"}) == 0


def test_reset_begins_the_next_episode_at_once() -> None:
    """In the middle of the last episode as well: a person asked for one more."""
    run = Run(episodes=1)
    run.begin()
    run.do("reset", episode=0)
    assert run.steering.stop.is_set()
    run.steering.finished("stopped")
    assert run.begin() == 1
    assert run.waited == 0
    run.steering.finished("time")
    assert run.begin() is None


@pytest.mark.parametrize("late", [{"name": "reset", "episode": 0}, {"name": "start", "episode": 0}])
def test_a_click_that_comes_too_late_does_nothing(late: dict[str, Any]) -> None:
    """A Reset meant for an episode that has just ended neither ends the next one nor begins anything."""
    run = Run(episodes=3)
    run.begin()
    run.steering.finished("time")
    run.begin()
    run.do(**late)
    assert not run.steering.stop.is_set()
    run.do("stop")
    run.steering.finished("stopped")
    run.do(**late)
    assert run.phase == "judging"
    assert run.begin({"name": "start", "episode": 2}) == 2


def test_a_reset_behind_a_stop_begins_nothing() -> None:
    """Both within one tick: the Stop holds."""
    run = Run()
    run.begin()
    run.do("stop")
    run.do("reset")
    run.steering.finished("stopped")
    assert run.begin({"name": "start"}) == 1
    assert run.waited == 1


def test_a_stop_right_behind_a_start() -> None:
    """Even where Start asked for one episode more than planned: the run waits again, it neither begins nor ends."""
    run = Run(episodes=1)
    run.begin()
    run.do("stop")
    run.steering.finished("stopped")
    clicks = iter([("start", "stop"), ("start",)])

    def idle(go: threading.Event) -> None:
        for name in next(clicks):
            run.do(name)

    assert run.steering.next_episode(idle) == 1
    assert run.steering.enter("running")


def test_success_in_an_episode_ends_and_judges_it() -> None:
    """The judgement is told when the episode is over, and may be changed until the next one begins."""
    run = Run()
    run.begin()
    run.do("success", note="  neat  ", episode=0)
    assert run.steering.stop.is_set()
    assert run.marks == []
    run.steering.finished("stopped")
    assert run.marks == [(0, True, "neat")]
    run.do("failure", note="dropped it later", episode=0)
    assert run.marks[-1] == (0, False, "dropped it later")
    assert run.states[-1]["mark"] == {"success": False, "note": "dropped it later"}
    run.begin({"name": "start"})
    assert run.states[-1]["mark"] is None
    run.do("failure", episode=0)
    assert len(run.marks) == 2


def test_an_attended_run_waits_before_and_after_each_episode() -> None:
    """It goes on for as long as the person wants, and ends when they end it."""
    run = Run(episodes=1, attended=True)
    assert run.begin({"name": "start"}) == 0
    run.steering.finished("time")
    assert run.begin({"name": "success", "episode": 0}, {"name": "start"}) == 1
    run.steering.finished("time")
    assert run.begin({"name": "quit"}) is None
    assert run.marks == [(0, True, "")]


def test_hold_and_resume() -> None:
    """Only in an episode; its end resumes, so that the next one does not begin on hold."""
    run = Run()
    run.do("hold")
    run.begin()
    run.do("hold", episode=0)
    assert run.phase == "paused"
    run.do("resume", episode=0)
    assert run.phase == "running"
    run.do("hold", episode=0)
    run.steering.finished("time")
    assert run.calls == ["pause", "resume", "pause", "resume"]


@pytest.mark.parametrize("live", [False, True])
def test_the_prompt(live: bool) -> None:
    """Changes between episodes, and in the middle of one where the policy reads it; empty means the run's own."""
    run = Run(live_prompt=live)
    run.do("prompt", prompt="stack")
    run.begin()
    run.do("prompt", prompt="sort " + "x" * 5000)
    assert run.states[-1]["prompt_editable"] is live
    run.steering.finished("time")
    run.do("prompt", prompt="  ")
    changes = [call for call in run.calls if call != "resume"]
    assert [call[:5] for call in changes] == (["stack", "sort ", "lift"] if live else ["stack", "lift"])
    assert max(map(len, changes)) <= 1000


def test_the_way_to_the_rest_pose_can_be_stopped() -> None:
    """The run is over by then, and what ended it must not stop that way; a Stop just before it counts as well."""
    for early in (False, True):
        run = Run()
        run.begin()
        run.steering.end()
        if early:
            run.do("stop")
        halt = run.steering.leave()
        assert halt.is_set() is early
        run.do("stop")
        assert halt.is_set()


_CLICKS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(
            ["start", "reset", "stop", "hold", "resume", "success", "failure", "prompt", "nonsense"]
        )
    },
    optional={"episode": st.none() | st.integers(-1, 4), "note": st.text(max_size=9) | st.integers()},
)
_STEPS = st.lists(st.one_of(_CLICKS, st.sampled_from(["moves", "runs", "ends"])), max_size=60)


@settings(max_examples=300, deadline=None)
@given(_STEPS, st.booleans())
def test_after_a_stop_nothing_moves_before_start(steps: list[Any], attended: bool) -> None:
    """Whatever is clicked, in whatever order: a Stop lets nothing begin until somebody asks for it while waited for."""
    run = Run(episodes=2, attended=attended)
    steering, coming, stopped = run.steering, iter(steps), False

    def idle(go: threading.Event) -> None:
        nonlocal stopped
        for step in coming:
            if isinstance(step, dict):
                steering.command(step)
                if go.is_set():
                    assert step["name"] in ("start", "reset")
                    stopped = False
                    return
        steering.end()

    while steering.next_episode(idle) is not None:
        assert not stopped
        for step in coming:
            phase = run.phase
            if isinstance(step, dict):
                steering.command(step)
                if step["name"] == "stop":
                    assert steering.stop.is_set()
                    stopped = True
            elif step != "ends" and phase in ("starting", "moving"):
                if not steering.enter("moving" if step == "moves" else "running"):
                    break
                assert not stopped
            elif step == "ends" and phase in ("running", "paused"):
                steering.finished("stopped" if steering.stop.is_set() else "time")
                break
        else:
            steering.end()
    assert run.phase == "finished"
