"""Deadlines in simulated time: late ticks are counted and never bunched."""

from __future__ import annotations

import platform
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from env_client.control.clock import MonotonicClock, Pacer, SendPhase, Timing, steady_interpreter
from env_client.control.motion import MinimumJerk
from env_client.control.simulated import SimulatedClock
from hypothesis import given, settings
from hypothesis import strategies as st

PERIOD = 1 / 30


def test_ticks_keep_to_absolute_deadlines() -> None:
    """Work inside a tick does not shift the ticks after it."""
    clock = SimulatedClock(100.0)
    pacer = Pacer(clock, PERIOD)
    for index in range(1000):
        tick = pacer.wait()
        assert tick.index == index
        assert tick.skipped == 0
        assert tick.started == pytest.approx(100 + index * PERIOD)
        clock.advance(0.02)


def test_a_slightly_late_tick_is_used_and_a_very_late_one_skipped() -> None:
    """A deadline may have passed by a quarter of a period; later than that the next one counts."""
    clock = SimulatedClock()
    pacer = Pacer(clock, PERIOD)
    pacer.wait()
    clock.advance(1.2 * PERIOD)
    late = pacer.wait()
    assert (late.index, late.skipped) == (1, 0)
    assert late.started - late.deadline == pytest.approx(0.2 * PERIOD)
    clock.advance(1.2 * PERIOD)
    skipped = pacer.wait()
    assert (skipped.index, skipped.skipped) == (3, 1)
    assert skipped.started == pytest.approx(3 * PERIOD)


@settings(max_examples=200, deadline=None)
@given(reads=st.lists(st.sampled_from((0.001, 0.003, 0.005)), min_size=20, max_size=60))
def test_commands_leave_evenly_however_unevenly_the_robot_is_read(reads: list[float]) -> None:
    """Once the slowest reading was seen, commands are a period apart; the waiting sinks when readings are fast again."""
    clock = SimulatedClock()
    pacer, phase, left = Pacer(clock, PERIOD), SendPhase(PERIOD), []
    for read in (0.005, *reads, *[0.001] * 900):
        tick = pacer.wait()
        clock.advance(read)
        phase.wait(clock, tick)
        left.append(clock.now())
    assert np.abs(np.diff(left) - PERIOD).max() < 0.0005
    assert left[-1] - tick.deadline < 0.0015


def test_a_robot_that_is_read_slowly_is_commanded_at_once() -> None:
    """Nothing waits for longer than a quarter of a period."""
    clock = SimulatedClock()
    pacer, phase = Pacer(clock, PERIOD), SendPhase(PERIOD)
    for read, left in ((0.02, 0.02), (0.001, PERIOD / 4), (0.02, 0.02)):
        tick = pacer.wait()
        clock.advance(read)
        phase.wait(clock, tick)
        assert clock.now() - tick.deadline == pytest.approx(left, rel=0.01)


@settings(max_examples=200, deadline=None)
@given(work=st.lists(st.floats(0, 0.3), min_size=1, max_size=60))
def test_ticks_are_never_bunched(work: list[float]) -> None:
    """However late, two ticks never start closer than three quarters of a period, and no deadline comes twice."""
    clock = SimulatedClock()
    pacer, timing = Pacer(clock, PERIOD), Timing(PERIOD)
    starts, indices, skipped = [], [], 0
    for busy in work:
        tick = pacer.wait()
        timing.ticked(tick)
        starts.append(tick.started)
        indices.append(tick.index)
        skipped += tick.skipped
        clock.advance(busy)
        timing.finished(tick, clock.now())
    assert (np.diff(starts) >= 0.75 * PERIOD - 1e-9).all()
    assert (np.diff(indices) >= 1).all()
    assert indices[-1] == len(work) - 1 + skipped
    assert timing.skipped == skipped


def test_the_timing_counts_and_sorts() -> None:
    """Overruns, lateness and the deviation of intervals, with a histogram that sums up."""
    clock = SimulatedClock()
    pacer, timing = Pacer(clock, PERIOD), Timing(PERIOD)
    for index in range(100):
        tick = pacer.wait()
        timing.ticked(tick)
        clock.advance(0.05 if index == 50 else 0.001)
        timing.sent(clock.now())
        timing.finished(tick, clock.now())
    summary = timing.summary()
    assert summary["ticks"] == 100
    assert summary["overruns"] == 1
    assert summary["skipped"] == 1
    assert summary["jitter_p50_ms"] == 0
    assert summary["jitter_max_ms"] == pytest.approx(49, abs=1)
    assert sum(timing.histogram().values()) == 99
    timing.interrupted()
    assert timing.last_sent is None


def test_the_machines_clock_does_not_return_early() -> None:
    """And a deadline that has passed is no reason to wait."""
    clock = MonotonicClock()
    deadline = clock.now() + 0.005
    clock.sleep_until(deadline)
    assert clock.now() >= deadline
    clock.sleep_until(deadline - 10)


def test_the_interpreter_is_given_back_as_it_was() -> None:
    """The switch interval and the garbage collector's generations."""
    import gc
    import sys

    before = sys.getswitchinterval()
    with steady_interpreter():
        assert sys.getswitchinterval() <= 1e-3
        assert gc.get_freeze_count() > 0
    assert sys.getswitchinterval() == before
    assert gc.get_freeze_count() == 0


def test_the_loops_thread_takes_short_turns_while_it_runs() -> None:
    """Read back from the kernel, where it tells."""
    kernel = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    about_me = Path(f"/proc/self/task/{threading.get_native_id()}/sched")
    if platform.system() != "Linux" or kernel < (6, 12) or not about_me.is_file():
        pytest.skip(
            "the kernel does not tell how long a thread's turns are (Linux 6.12 and later with SCHED_DEBUG)"
        )

    def turn_ns() -> int:
        return int(re.search(r"se\.slice\s*:\s*(\d+)", about_me.read_text()).group(1))  # type: ignore[union-attr]

    before = turn_ns()
    with steady_interpreter():
        assert turn_ns() == 100_000 < before
    assert turn_ns() == before


def test_a_minimum_jerk_path_starts_and_ends_at_rest_within_its_speed() -> None:
    """Peak speed 15/8 of the mean, at the joint that has furthest to go for its limit."""
    path = MinimumJerk(np.array([0.0, 10.0]), np.array([30.0, 0.0]), np.array([10.0, 10.0]))
    assert path.duration_s == pytest.approx(15 / 8 * 3)
    times = np.linspace(0, path.duration_s, 10_001)
    way = np.array([path.at(time) for time in times])
    speed = np.abs(np.diff(way, axis=0)) / np.diff(times)[:, None]
    assert speed[:, 0].max() == pytest.approx(10, rel=1e-3)
    assert speed[:, 1].max() <= 10
    assert speed[[0, -1]].max() < 0.01
    np.testing.assert_allclose(way[[0, -1]], [[0, 10], [30, 0]])
    assert MinimumJerk(np.ones(2), np.ones(2), np.ones(2)).duration_s == 0
