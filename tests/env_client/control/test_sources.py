"""The four ways of executing chunks, in simulated time, against an oracle that counts.

The oracle: row k of every chunk says `consumed + k`, the number of the action in the whole run. Whatever the
latencies are, the n-th action that a source hands out must therefore be n.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from control_doubles import FPS, Bench, counting_chunk, numbers, policy_spec, reply
from env_client.control.chunks import EXECUTIONS, SourceOptions, make_source
from env_client.control.network import ChunkRequest, Outcome
from hypothesis import given, settings
from hypothesis import strategies as st

TICK = 1 / FPS


def starved_after_first(actions: list[np.ndarray | None]) -> int:
    first = next(index for index, action in enumerate(actions) if action is not None)
    return sum(action is None for action in actions[first:])


# ------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("execution", EXECUTIONS)
@settings(max_examples=30, deadline=None)
@given(
    latencies=st.lists(st.floats(0, 1.2), min_size=1, max_size=12),
    horizon=st.integers(1, 60),
    blend_s=st.sampled_from([0.0, 0.1, 0.2]),
)
def test_actions_come_in_order_whatever_the_latency(
    execution: str, latencies: list[float], horizon: int, blend_s: float
) -> None:
    """Nothing is skipped, repeated or taken from the past; every tick without an action is counted."""
    bench = Bench(
        execution,
        lambda request: counting_chunk(request, horizon),
        lambda request: latencies[request.seq % len(latencies)],
        policy_spec(horizon=horizon, supports_rtc=True),
        SourceOptions(blend_s=blend_s),
    )
    actions = bench.run(250)
    got = numbers(actions)
    np.testing.assert_allclose(got, np.arange(len(got)), atol=1e-3)
    stats = bench.source.stats
    assert stats.consumed == len(got)
    assert stats.waiting + stats.starved == 250 - len(got)
    if got:
        assert stats.starved == starved_after_first(actions)


@pytest.mark.parametrize(("latency", "horizon"), [(0.0, 16), (0.1, 16), (0.3, 50), (1.0, 100), (0.3, 100)])
@pytest.mark.parametrize("execution", ["async", "rtc"])
def test_asking_ahead_never_starves_where_it_is_feasible(
    execution: str, latency: float, horizon: int
) -> None:
    """3,000 ticks without a hold once the first chunk is there, with 20 % of jitter in the latency."""
    bench = Bench(
        execution,
        lambda request: counting_chunk(request, horizon),
        lambda request: latency * (0.8 + 0.2 * (request.seq * 7919 % 13) / 13),
        policy_spec(horizon=horizon, supports_rtc=True),
    )
    bench.run(3000)
    stats = bench.source.stats
    assert stats.starved == 0
    assert not stats.infeasible
    assert stats.consumed == 3000 - stats.waiting


def test_sync_starves_for_one_latency_per_chunk() -> None:
    """Closed form: after each chunk of 16, the ticks that an answer takes."""
    bench = Bench("sync", lambda request: counting_chunk(request, 16), 0.3)
    actions = bench.run(9 + 10 * (16 + 9))
    assert bench.source.stats.waiting == 9
    assert bench.source.stats.starved == 9 * 10
    assert bench.source.stats.chunks == 10
    assert starved_after_first(actions) == 9 * 10


def test_async_asks_at_the_point_that_the_latency_demands() -> None:
    """Delay 9 ticks + margin 1 + blend 6: with 16 actions left of 50."""
    bench = Bench("async", lambda request: counting_chunk(request, 50), 0.3)
    bench.run(200)
    asked = [request.consumed for request in bench.server.taken]
    # Each chunk starts at its request's action; 16 left of 50 means 34 later.
    assert asked[:4] == [0, 34, 68, 102]


def test_a_horizon_below_twice_the_delay_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """One line with both numbers; the robot holds between chunks and the actions still come in order."""
    bench = Bench("async", lambda request: counting_chunk(request, 16), 0.3)
    with caplog.at_level(logging.WARNING):
        actions = bench.run(10)
        assert len(caplog.records) == 1
        actions += bench.run(500)
    assert "16 actions" in caplog.text
    assert "takes 9 ticks" in caplog.text
    assert "(18)" in caplog.text
    assert len(caplog.records) == 1
    assert bench.source.stats.infeasible
    assert bench.source.stats.starved > 0
    got = numbers(actions)
    np.testing.assert_allclose(got, np.arange(len(got)), atol=1e-4)


def test_where_no_chunk_bridges_the_delay_async_is_no_worse_than_sync() -> None:
    """With fewer actions than ticks of delay, asking early would cut off what was executed meanwhile."""
    held = {}
    for execution in ("sync", "async"):
        bench = Bench(execution, lambda request: counting_chunk(request, 16), 1.0)
        bench.run(2000)
        held[execution] = bench.source.stats.starved
    assert held["async"] <= held["sync"]


# -------------------------------------------------------------------------------------------- the seams


def noisy_chunk(request: ChunkRequest, horizon: int = 50, jump: float = 12.0) -> dict[str, Any]:
    """A smooth motion with an offset that differs from chunk to chunk, as when a policy changes its mind."""
    at = request.consumed + np.arange(horizon)
    offset = jump * np.sin(12.9898 * request.seq)
    rows = 30 * np.sin(at / 20)[:, None] + offset + np.zeros((1, 3))
    return reply(rows.astype(np.float32), request)


@pytest.mark.parametrize(("latency", "horizon"), [(0.1, 16), (0.3, 50), (1.0, 100), (1.0, 50), (0.3, 16)])
def test_async_never_steps_further_at_a_boundary_than_inside_chunks(latency: float, horizon: int) -> None:
    """Also where it starves, and where the chunks disagree by far more than a step."""
    bench = Bench("async", lambda request: noisy_chunk(request, horizon), latency)
    steps, last, inner = [], None, 1.5 * (1 + 1e-5)
    for _ in range(2000):
        action = bench.step()
        if action is None:
            continue
        if last is not None:
            steps.append(float(np.abs(action - last).max()))
        last = action
    assert max(steps) <= inner
    naive = Bench("sync", lambda request: noisy_chunk(request, horizon), latency)
    jumps = np.abs(np.diff(numbers(naive.run(2000))))
    assert jumps.max() > 4 * inner


def test_the_boundary_is_marked_once() -> None:
    """True for the first action of each chunk and after a pause, else False; it names the chunk's step."""
    bench = Bench("async", lambda request: noisy_chunk(request, 50), 0.3)
    marks = []
    for _ in range(100):
        if bench.step() is not None:
            origin = bench.source.origin
            assert origin is not None
            marks.append(origin.boundary)
            assert origin.inner_step[0] == pytest.approx(1.5, rel=1e-2)
        else:
            assert bench.source.origin is None
    assert marks[0]
    assert sum(marks) == bench.source.stats.chunks


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"actions": np.full((50, 3), np.nan, np.float32)}, "not finite"),
        ({"actions": np.where(np.arange(150).reshape(50, 3) == 77, np.inf, 0)}, "not finite"),
        ({"actions": np.full((50, 3), 1e39)}, "not finite"),
        ({"actions": np.zeros((50, 4), np.float32)}, "wrong dimension"),
        ({"actions": np.zeros(3, np.float32)}, "wrong dimension"),
        ({"actions": np.zeros((0, 3), np.float32)}, "wrong dimension"),
        ({"actions": np.zeros((1001, 3), np.float32)}, "wrong dimension"),
        ({"actions": None}, "wrong dimension"),
        ({"actions": "left"}, "not finite"),
        ({"seq": 0}, "old chunk"),
        ({"seq": 99}, "old chunk"),
        ({"episode": 7}, "other episode"),
    ],
)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_wrong_chunk_is_refused_as_a_whole(execution: str, change: dict[str, Any], reason: str) -> None:
    """Not a single row is used; the source asks again and goes on with the next good one."""
    bad = [True]

    def answer(request: ChunkRequest) -> dict[str, Any]:
        good = counting_chunk(request)
        return good | change if bad[0] else good

    bench = Bench(execution, answer, 0.1, policy_spec(supports_rtc=True))
    assert numbers(bench.run(30)) == []
    assert set(bench.source.stats.dropped) == {reason}
    assert bench.source.stats.dropped[reason] > 1
    bad[0] = False
    assert numbers(bench.run(30))[0] == 0


def test_a_refused_chunk_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Thirty NaN chunks, one log line."""
    bench = Bench("async", lambda request: reply(np.full((50, 3), np.nan), request), 0.0)
    with caplog.at_level(logging.WARNING):
        bench.run(30)
    assert len(caplog.records) == 1
    assert bench.source.stats.dropped["not finite"] > 10


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_answer_to_the_episode_before_is_dropped(execution: str) -> None:
    """reset while a request is in flight: its chunk never moves the robot."""
    bench = Bench(
        execution,
        lambda request: reply(np.full((50, 3), float(request.episode)), request),
        0.3,
        policy_spec(supports_rtc=True),
    )
    bench.run(5)
    bench.source.reset(1)
    actions = bench.run(60)
    assert set(numbers(actions)) == {1.0}
    assert bench.source.stats.dropped["other episode"] == 1


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_reset_forgets_the_plan(execution: str) -> None:
    """The actions left over from the old episode are not executed."""
    bench = Bench(execution, latency_s=0.1, spec=policy_spec(supports_rtc=True))
    bench.run(20)
    bench.source.reset(1)
    assert bench.step() is None


def test_an_answer_after_a_stall_is_dropped_unless_that_is_the_new_pace() -> None:
    """A fresh observation is answered sooner than one of five seconds ago is worth."""
    slow = [False]
    bench = Bench("async", counting_chunk, lambda request: 5.0 if slow[0] else 0.1)
    bench.run(100)
    slow[0] = True
    bench.run(80)
    slow[0] = False
    actions = bench.run(200)
    assert bench.source.stats.dropped == {"stale": 1}
    assert all(action is not None for action in actions[-50:])
    slow[0] = True
    assert len(numbers(bench.run(1500))) > 100
    assert bench.source.stats.dropped["stale"] == 2


def test_an_action_knows_when_it_was_meant_for() -> None:
    """The tick of its row after the observation: as long as nothing was held, that is now."""
    bench = Bench("async", counting_chunk, 0.3)
    for _ in range(200):
        if bench.step() is not None:
            origin = bench.source.origin
            assert origin is not None
            # The first chunk was waited for.
            assert bench.clock.now() - origin.due == pytest.approx(
                0.3 if bench.source.stats.chunks == 1 else 0
            )


def test_a_server_that_echoes_nothing_is_believed() -> None:
    """A bare openpi server knows neither seq nor episode."""
    bench = Bench("async", lambda request: {"actions": np.ones((10, 3))}, 0.1)
    assert numbers(bench.run(20))


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_failures_are_survived_counted_and_said_once(
    execution: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The plan is used up, the robot holds, and when the server is back the source goes on."""
    down = [False]

    def answer(request: ChunkRequest) -> Any:
        if down[0]:
            return Outcome(request, None, "the server is gone", "CONNECTION", 0.1)
        return counting_chunk(request, 16)

    bench = Bench(execution, answer, 0.1, policy_spec(supports_rtc=True))
    before = numbers(bench.run(40))
    down[0] = True
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        during = bench.run(90)
    assert during[-1] is None
    assert bench.source.stats.errors["CONNECTION"] > 2
    assert sum("the server is gone" in record.message for record in caplog.records) == 1
    down[0] = False
    after = numbers(bench.run(60))
    assert after
    np.testing.assert_allclose(
        [*before, *numbers(during), *after], np.arange(bench.source.stats.consumed), atol=1e-3
    )


# -------------------------------------------------------------------------------------------- history


def test_the_history_is_of_consecutive_ticks() -> None:
    """n_obs_steps - 1 observations right before the request's tick, oldest first; none across a gap."""
    bench = Bench("sync", lambda request: counting_chunk(request, 4), 0.0, policy_spec(n_obs_steps=3))
    for state in range(20):
        if state == 12:
            bench.tick += 1  # a skipped deadline
        bench.step(float(state))
    histories = [
        [float(seen.states["arm"][0]) for seen in (*request.history, request.observation)]
        for request in bench.server.taken
    ]
    assert histories[0] == [0.0]
    for states in histories[1:]:
        assert states == [states[-1] + k for k in range(1 - len(states), 1)]
        assert len(states) == 3 or states[-1] in (12.0, 13.0)


def test_a_new_episode_has_no_history() -> None:
    """The last frames of the episode before are not shown to the policy."""
    bench = Bench("sync", latency_s=0.0, spec=policy_spec(n_obs_steps=2))
    bench.run(3)
    bench.source.reset(1)
    bench.step()
    assert bench.server.taken[-1].history == ()


def test_the_prompt_is_the_sources_own_or_the_observations() -> None:
    """A prompt set while the robot runs wins over the task."""
    bench = Bench("sync", lambda request: counting_chunk(request, 1), 0.0)
    bench.run(2)
    bench.source.prompt = "stack"
    bench.run(4)
    prompts = [request.prompt for request in bench.server.taken]
    assert prompts[0] == "do it"
    assert prompts[-1] == "stack"


# ------------------------------------------------------------------------------------------- the maker


def test_an_unknown_execution_is_an_error() -> None:
    """The sentence lists what there is."""
    with pytest.raises(ValueError, match="sync, async, ensemble, rtc"):
        make_source("fast", None, policy_spec(), FPS)
    with pytest.raises(ValueError, match="client"):
        make_source("sync", None, policy_spec(), FPS)
    with pytest.raises(ValueError, match="blend_s"):
        SourceOptions(blend_s=-1)
