"""The loop over a simulated robot and server: what is sent when, what never is, and who may watch."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np
import pytest
from control_doubles import FPS, Arm, counting_chunk, policy_spec, reply
from env_client.control import ControlLoop, SafetyConfig, SafetyFilter, TickRecord, make_source
from env_client.control.network import ChunkRequest, Outcome
from env_client.envs.env import EnvError
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_rig import TICK, Rig, away

# ------------------------------------------------------------------------------------------ an episode


def test_an_episode_runs_at_its_rate_and_ends_at_its_steps() -> None:
    """One command per period; waiting for the first chunk is no starving."""
    rig = Rig()
    result = rig.loop.run_episode(max_steps=300)
    assert result.outcome == "steps"
    assert result.steps == 300
    assert result.starved == 0
    assert result.waiting == 3
    assert result.refused == {}
    assert result.timing["overruns"] == result.timing["skipped"] == 0
    np.testing.assert_allclose(np.diff(rig.times), TICK)
    np.testing.assert_allclose(rig.sent[-1], 20)
    rig.check_speed()


@pytest.mark.parametrize(
    ("kwargs", "outcome"), [({"time_s": 2.0}, "time"), ({"max_steps": 10}, "steps"), ({}, "done")]
)
def test_how_an_episode_ends(kwargs: dict[str, Any], outcome: str) -> None:
    """After its time, its steps, or when the env says so."""
    rig = Rig()
    rig.arm.ends_after = 100
    rig.arm.solved = True
    result = rig.loop.run_episode(seed=5, **kwargs)
    assert result.outcome == outcome
    assert result.success is True
    assert rig.arm.resets == [5]
    if outcome == "time":
        assert result.duration_s == pytest.approx(2.0, abs=TICK)


def test_stop_acts_within_one_tick() -> None:
    """Nothing is sent after the tick in which it was set."""
    rig, stop = Rig(), threading.Event()
    rig.arm.on_send = lambda count: stop.set() if count == 50 else None
    result = rig.loop.run_episode(stop=stop)
    assert result.outcome == "stopped"
    assert len(rig.arm.sent) == 50


def test_a_stop_that_comes_while_the_robot_is_read_holds_back_this_ticks_command() -> None:
    """Also when the command was known already and waited for its moment."""
    rig, stop = Rig(), threading.Event()
    rig.arm.on_read = lambda count: stop.set() if count == 50 else None
    assert rig.loop.run_episode(stop=stop).outcome == "stopped"
    # The first of the 50 readings was for the beginning, the last is this tick's.
    assert len(rig.arm.sent) == 48


def test_episodes_count_up_and_start_fresh() -> None:
    """Each has its own number, its own counters and its own chunks."""
    rig = Rig()
    first = rig.loop.run_episode(max_steps=40)
    second = rig.loop.run_episode(max_steps=40)
    assert (first.episode, second.episode) == (0, 1)
    assert (first.waiting, second.waiting) == (3, 3)
    assert {request.episode for request in rig.server.taken} == {0, 1}
    rig.check_speed()


def test_the_first_command_is_limited_against_the_measured_pose() -> None:
    """Wherever the arm stands when the episode begins."""
    rig = Rig(lambda request: reply(np.full((50, 3), 90.0), request))
    rig.arm.pose = np.array([-60.0, 30.0, 5.0], np.float32)
    rig.loop.run_episode(max_steps=20)
    assert (np.abs(rig.sent[0] - [-60, 30, 5]) <= rig.safety.speed * TICK).all()
    rig.check_speed()


def test_a_starved_loop_repeats_its_last_command() -> None:
    """sync: one latency of holding per chunk, at the same rate."""
    rig = Rig(lambda request: counting_chunk(request, 16), 0.3, "sync")
    result = rig.loop.run_episode(time_s=10)
    assert result.starved > 50
    np.testing.assert_allclose(np.diff(rig.times), TICK)
    rig.check_speed()


# ---------------------------------------------------------------------------------------- a slow robot


def test_a_slow_robot_skips_deadlines_and_never_bunches() -> None:
    """Every 20th reading takes three periods: counted, and the arm is never given two steps at once."""
    rig = Rig(lambda request: reply(np.full((50, 3), 90.0), request))

    def slow(count: int) -> None:
        if count % 20 == 0:
            rig.clock.advance(3 * TICK)

    rig.arm.on_read = slow
    result = rig.loop.run_episode(time_s=10)
    assert result.timing["overruns"] >= 10
    assert result.timing["skipped"] >= 20
    gaps = np.diff(rig.times)
    steps = np.abs(np.diff(rig.sent, axis=0))
    # Also in the short interval behind a late command the arm is not asked to be faster.
    allowed = rig.safety.speed * np.minimum(gaps, TICK)[:, None]
    assert (steps <= allowed * (1 + 1e-5) + 1e-5).all()


# ----------------------------------------------------------------------------------- what must not move


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_of_a_broken_chunk_reaches_the_robot(bad: float) -> None:
    """The arm keeps its pose for as long as the server talks nonsense."""
    rig = Rig(lambda request: reply(np.full((50, 3), bad), request))
    result = rig.loop.run_episode(time_s=2)
    assert (rig.sent == 0).all()
    assert result.source["dropped"]["not finite"] > 1


def test_a_source_that_fails_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    """A defect in the source holds the robot and is said once."""
    rig = Rig()
    rig.source._wants_chunk = lambda: 1 / 0  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        result = rig.loop.run_episode(time_s=1)
    assert result.source_errors == 30
    assert len(caplog.records) == 1
    assert (rig.sent == 0).all()


def test_a_source_that_lies_is_caught_by_the_filter() -> None:
    """NaN and another width, straight from a source."""
    rig = Rig()
    bad = iter([np.full(3, np.nan), np.zeros(5)] * 20)
    rig.source._pop = lambda: next(bad)  # type: ignore[method-assign]
    result = rig.loop.run_episode(time_s=1)
    assert result.refused == {"not finite": 15, "wrong dimension": 15}
    assert (rig.sent == 0).all()


@pytest.mark.parametrize(
    "stale", [{"image_age": {"front": 0.6}}, {"state_age": 0.3}, {"image_age": {"front": float("nan")}}]
)
def test_old_observations_hold_the_pose(stale: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A frozen camera or an old reading: no action is computed from it; afterwards new chunks are asked for."""
    rig = Rig(counting_chunk)
    rig.arm.on_read = lambda count: stale if 40 <= count < 70 else None
    with caplog.at_level(logging.WARNING):
        result = rig.loop.run_episode(time_s=4)
    assert result.old_observations == 30
    held = rig.sent[39:68]
    assert (held == held[0]).all()
    assert len({request.generation for request in rig.server.taken}) == 2
    assert len(caplog.records) == 1
    np.testing.assert_allclose(np.diff(rig.times), TICK)


ANSWERS = st.sampled_from(
    ["good", "jump", "nan", "huge", "short", "wide", "flat", "old", "other episode", "nothing", "gone"]
)


def odd_reply(kind: str, request: ChunkRequest) -> Any:
    """An answer of a server that has lost its mind."""
    rng = np.random.default_rng(request.seq)
    rows: Any = rng.uniform(-150, 150, (20, 3)) if kind != "good" else np.full((20, 3), 10.0)
    match kind:
        case "nan":
            rows[7, 1] = np.nan
        case "huge":
            rows *= 1e300
        case "short":
            rows = rows[:1]
        case "wide":
            rows = np.zeros((20, 4))
        case "flat":
            rows = rows[0]
        case "nothing":
            rows = None
        case "gone":
            return Outcome(request, None, "gone", "CONNECTION")
    changes = {"old": {"seq": request.seq - 1}, "other episode": {"episode": 99}}.get(kind, {})
    return reply(rows, request, **changes)


@settings(max_examples=40, deadline=None)
@given(
    execution=st.sampled_from(["sync", "async", "ensemble"]),
    answers=st.lists(ANSWERS, min_size=1, max_size=20),
    latencies=st.lists(st.floats(0, 0.8), min_size=1, max_size=5),
    trouble=st.dictionaries(
        st.integers(2, 150),
        st.sampled_from(
            ["away", "long away", "slow", "very slow", "frozen", "pause", "no write", "half write"]
        ),
        max_size=8,
    ),
)
def test_whatever_happens_no_command_leaves_the_limits_or_is_too_fast(
    execution: str, answers: list[str], latencies: list[float], trouble: dict[int, str]
) -> None:
    """The whole chain against servers that talk nonsense and robots that come and go."""
    rig = Rig(
        lambda request: odd_reply(answers[request.seq % len(answers)], request),
        lambda request: latencies[request.seq % len(latencies)],
        execution,
    )
    gone_until = [0]

    def on_read(count: int) -> dict[str, Any] | None:
        what = trouble.get(count)
        if what in ("away", "long away"):
            gone_until[0] = count + (2 if what == "away" else 20)
        if count < gone_until[0]:
            raise EnvError("away")
        if what in ("slow", "very slow"):
            rig.clock.advance(0.04 if what == "slow" else 0.5)
        if what == "pause":
            rig.loop.resume() if rig.loop.paused else rig.loop.pause()
        return {"image_age": {"front": 9.0}} if what == "frozen" else None

    def failing(how: str) -> Any:
        def on_send(count: int) -> None:
            # Three ticks of trouble with writing.
            if how in [trouble.get(rig.arm.reads - ago) for ago in range(3)]:
                raise EnvError("port is in use")

        return on_send

    rig.arm.on_read = on_read
    rig.arm.on_send, rig.arm.after_send = failing("no write"), failing("half write")
    result = rig.loop.run_episode(time_s=6)
    assert result.outcome == "time"
    assert result.source_errors == 0
    assert np.isfinite(rig.sent).all()
    assert (rig.sent >= rig.arm.spec.lower).all()
    assert (rig.sent <= rig.arm.spec.upper).all()
    # Behind a slow reading two commands may leave shortly after one another: the second is all the smaller.
    gaps = np.minimum(np.diff(rig.times), TICK)[:, None]
    assert (np.abs(np.diff(rig.sent, axis=0)) <= rig.safety.speed * gaps * (1 + 1e-6) + 1e-9).all()


# ------------------------------------------------------------------------------------ pause and dry run


def test_a_pause_holds_and_resuming_asks_anew() -> None:
    """The clock goes on, the command stays, the chunks from before the pause are forgotten."""
    rig = Rig(counting_chunk)

    def on_send(count: int) -> None:
        if count == 40:
            rig.loop.pause()
        if count == 70:
            rig.loop.resume()

    rig.arm.on_send = on_send
    result = rig.loop.run_episode(time_s=4)
    assert (rig.sent[39:70] == rig.sent[39]).all()
    assert result.starved == 0
    assert len({request.generation for request in rig.server.taken}) == 2
    np.testing.assert_allclose(np.diff(rig.times), TICK)


def test_a_dry_run_sends_nothing() -> None:
    """Everything else happens: the records hold what would have been sent."""
    rig = Rig(dry_run=True)
    tap = rig.loop.subscribe(size=100)
    result = rig.loop.run_episode(max_steps=20)
    assert result.steps == 20
    assert rig.arm.sent == []
    records = [tap.pull() for _ in range(23)]
    assert records[-1] is not None
    assert records[-1].sent is not None


# ------------------------------------------------------------------------------------------- observers


def test_an_observer_can_neither_stall_nor_crash_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    """One that never returns and one that always raises: every tick runs, and the drops are counted."""
    rig, gate = Rig(), threading.Event()

    def stuck(record: TickRecord) -> None:
        gate.wait(20)

    def broken(record: TickRecord) -> None:
        raise RuntimeError("no disk")

    slow, bad = rig.loop.attach(stuck), rig.loop.attach(broken, size=1000)
    result = rig.loop.run_episode(max_steps=200)
    assert result.steps == 200
    assert slow.tap.pushed == result.timing["ticks"]
    gate.set()
    bad.close(10)
    slow.close(10)
    assert bad.errors == bad.tap.pulled > 1
    assert sum("observer" in record.message for record in caplog.records) == 1
    assert slow.tap.dropped + slow.tap.pulled == slow.tap.pushed


def test_a_tap_keeps_the_newest() -> None:
    """A late reader sees the last records, in order, and how many it missed."""
    rig = Rig()
    tap = rig.loop.subscribe(size=3)
    rig.loop.run_episode(max_steps=50)
    ticks = []
    while (record := tap.pull()) is not None:
        ticks.append(record.tick)
    assert ticks == [50, 51, 52]
    assert tap.dropped == 50


def test_a_record_tells_what_happened_in_its_tick() -> None:
    """Phases, requested and sent actions, and why a tick held."""
    rig = Rig()
    tap = rig.loop.subscribe(size=1000)
    rig.arm.on_read = away(30, 32)
    rig.loop.move_to(np.array([5.0, 0.0, 0.0]))
    rig.loop.run_episode(max_steps=40)
    records = []
    while (record := tap.pull()) is not None:
        records.append(record)
    assert {record.phase for record in records} == {"move", "run"}
    failed = [record for record in records if record.error]
    assert failed
    assert failed[0].observation is None
    assert failed[0].sent is None
    last = records[-1]
    assert last.origin is not None
    assert last.observation is not None
    np.testing.assert_allclose(last.requested, 20)
    assert last.sent is not None


def test_the_heartbeat_beats_in_every_tick_and_cannot_break_the_loop() -> None:
    """Also in moves; one that raises is dropped."""
    beats = []
    rig = Rig(heartbeat=lambda: beats.append(1))
    result = rig.loop.run_episode(max_steps=20)
    assert len(beats) >= result.timing["ticks"]
    broken = Rig(heartbeat=lambda: 1 / 0)
    assert broken.loop.run_episode(max_steps=20).steps == 20


def test_the_loop_runs_on_the_machines_clock_too() -> None:
    """A second of real time with the real thread in between: it ends, and nothing starves."""

    class Client:
        def infer(self, obs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            time.sleep(0.05)
            return {"actions": np.full((50, 3), 10.0), "seq": kwargs["seq"], "episode": kwargs["episode"]}

    arm = Arm()
    source = make_source("async", Client(), policy_spec(), FPS)
    loop = ControlLoop(arm, source, SafetyFilter(arm.spec, SafetyConfig(), FPS), FPS)
    result = loop.run_episode(max_steps=25)
    source.close()
    assert result.outcome == "steps"
    assert result.starved == 0
    np.testing.assert_allclose(arm.sent[-1][1], 10, rtol=1e-5)
