"""Temporal ensembling, and the requests of real-time chunking, in simulated time."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from control_doubles import FPS, Bench, counting_chunk, numbers, policy_spec, reply
from env_client.control.chunks import SourceOptions

TICK = 1 / FPS


# ------------------------------------------------------------------------------------------- ensemble


def test_the_ensemble_is_the_weighted_mean_of_all_living_chunks() -> None:
    """w_i = exp(-m i) with i = 0 for the oldest chunk, as in ACT."""
    bench = Bench(
        "ensemble",
        lambda request: reply(np.full((4, 3), float(request.consumed**2)), request),
        0.0,
        options=SourceOptions(ensemble_decay=0.5),
    )
    actions = bench.run(10)
    assert actions[0] is None
    # A chunk is asked for at every tick and answered for the next one: at action n the chunks of n-3 .. n-1 live.
    for n, action in enumerate(numbers(actions)[5:], start=5):
        captured = [request.consumed for request in bench.server.taken if 0 < n - request.consumed <= 3]
        weights = np.exp(-0.5 * np.arange(len(captured)))
        assert action == pytest.approx(np.average(np.square(captured, dtype=float), weights=weights))


def test_the_ensemble_asks_as_fast_as_the_server_answers() -> None:
    """A chunk per 0.1 s when an answer takes that long, always with the newest observation."""
    bench = Bench("ensemble", latency_s=0.1)
    bench.run(301)
    assert bench.source.stats.chunks == 100
    gaps = np.diff([request.observation.capture_time for request in bench.server.taken])
    assert gaps.max() <= 0.1 + 1e-6


# ------------------------------------------------------------------------------------------------ rtc


def test_rtc_is_refused_for_a_policy_that_cannot() -> None:
    """The sentence names the policy and what to use instead."""
    with pytest.raises(ValueError, match=r"'act' cannot.*async.*ensemble"):
        Bench("rtc", spec=policy_spec(type="act"))


def test_rtc_requests_carry_the_rest_of_the_plan() -> None:
    """prev starts at the request's tick; delay <= mask_end = H - s; prev covers the delay."""
    bench = Bench("rtc", lambda request: counting_chunk(request, 50), 0.3, policy_spec(supports_rtc=True))
    bench.run(300)
    guided = [request for request in bench.server.taken if request.rtc is not None]
    assert len(guided) == len(bench.server.taken) - 1
    assert bench.source.stats.rtc_fallbacks == 0
    for request in guided:
        rtc = request.rtc
        assert rtc is not None
        assert rtc.prev.dtype == np.float32
        np.testing.assert_allclose(rtc.prev[:, 0], request.consumed + np.arange(len(rtc.prev)), atol=1e-4)
        assert rtc.delay == 10
        # s = H / 2 unless told otherwise.
        assert rtc.mask_end == 25
        assert rtc.delay <= rtc.mask_end <= len(rtc.prev)


@pytest.mark.parametrize(("wanted", "mask_end"), [(0, 25), (5, 40), (20, 30), (49, 10)])
def test_the_rtc_execution_horizon_stays_feasible(wanted: int, mask_end: int) -> None:
    """d <= s <= H - d with d = 10, H = 50: s is 25, 10, 20 and 40."""
    options = SourceOptions(rtc_execution_horizon=wanted)
    bench = Bench("rtc", counting_chunk, 0.3, policy_spec(supports_rtc=True), options)
    bench.run(200)
    assert {request.rtc.mask_end for request in bench.server.taken[2:] if request.rtc} == {mask_end}


def test_an_infeasible_delay_falls_back_to_async(caplog: pytest.LogCaptureFixture) -> None:
    """At 1 s and 50 actions there is no s: requests go without a prefix, and it is said once."""
    bench = Bench("rtc", counting_chunk, 1.0, policy_spec(supports_rtc=True))
    with caplog.at_level(logging.WARNING):
        bench.run(400)
    assert all(request.rtc is None for request in bench.server.taken)
    assert bench.source.stats.rtc_fallbacks > 2
    assert sum("not feasible" in record.message for record in caplog.records) == 1
