"""What many episodes say together."""

from grasp_cube.evaluation.episodes import Episode, format_table, summarize


def test_failures_are_named_and_do_not_count_as_fast() -> None:
    """Steps to success are those of the solved episodes only; a seed that failed can be looked at again."""
    episodes = [
        Episode(1000, True, 100, starved=0, boundary_step=0.02, inner_step=0.03, round_trips=(50.0, 60.0)),
        Episode(1001, False, 450, starved=2, boundary_step=0.04, inner_step=0.01, round_trips=(70.0,)),
        Episode(1002, True, 120, starved=0, boundary_step=0.01, inner_step=0.02),
    ]
    summary = summarize(episodes)
    assert (summary["successes"], summary["episodes"], summary["failed_seeds"]) == (2, 3, [1001])
    assert summary["steps_to_success"]["p50"] == 110
    assert summary["starved"] == 2
    assert (summary["boundary_step_rad"], summary["inner_step_rad"]) == (0.04, 0.03)
    assert summary["round_trip_ms"]["p50"] == 60
    table = format_table({"over the wire": summary})
    assert "2 of 3" in table
    assert "67% (21% to 94%)" in table
    assert "1001" in table


def test_what_was_not_measured_is_not_shown_as_zero() -> None:
    """An in-process run has no round trips and no starved ticks."""
    summary = summarize([Episode(7, False, 450)])
    assert summary["starved"] is None
    assert summary["round_trip_ms"] is None
    assert summary["steps_to_success"] is None
    rows = dict(line.split("  ", 1) for line in format_table({"in-process": summary}).splitlines()[1:])
    assert rows["starved ticks"].strip() == "-"
    assert rows["round trip, p50 (p99)"].strip() == "-"
