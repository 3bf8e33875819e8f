"""The first twenty runs of the fault matrix: each kind of fault at least once. `benchmarks/faults.py` runs all two hundred."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fault_evidence import read_records, violations
from fault_plan import FAULTS, REAL, RUNS, plan_of
from fault_run import carry_out
from fault_world import checkpoint
from kinematic_robot import calibration
from needs_browser import needs_browser
from virtual_so101.calibration import JOINTS

IN_CI = 20


def seeds() -> list:
    marked = []
    for seed in range(IN_CI):
        plan = plan_of(seed)
        marks = [needs_browser] if plan.victim == "browser" else []
        marked.append(pytest.param(seed, id=f"{seed}-{plan.victim}-{plan.how}-{plan.phase}", marks=marks))
    return marked


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", seeds())
def test_a_fault(seed: int, tmp_path: Path) -> None:
    """No limit violated at the servos, no record lost beyond the second, it goes on or says why, nobody is left over."""
    plan = plan_of(seed)
    own = tmp_path / "run"
    own.mkdir()
    result = carry_out(plan, own, checkpoint(plan.policy, tmp_path))
    assert not result.problems, f"{plan}\n" + "\n".join(result.problems)


def test_the_plans_are_what_the_matrix_promises() -> None:
    """Two hundred of them, always the same; each fault ten times; the first twenty hold each; real checkpoints have a few."""
    plans = [plan_of(seed) for seed in range(RUNS)]
    assert plans == [plan_of(seed) for seed in range(RUNS)]
    kinds = [(plan.victim, plan.how) for plan in plans]
    assert set(kinds[:IN_CI]) == set(FAULTS)
    assert min(kinds.count(fault) for fault in FAULTS) >= 10
    assert {plan.policy for plan in plans} == {"numpy", "act", "diffusion", "pi05"}
    assert len(REAL) == 9


def write_log(path: Path, step: int) -> None:
    """Goals of the shoulder at 30 Hz, `step` ticks apart."""
    joint = calibration().joints[0]
    middle = (joint.range_min + joint.range_max) // 2
    events = [
        {"kind": "goal", "time": 0, "wall": n / 30, "arm": 0, "goal": {JOINTS[0]: middle + step * n}}
        for n in range(30)
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize(("step", "fine"), [(30, True), (60, False), (400, False)])
def test_the_evidence_sees_what_is_too_fast_and_too_far(tmp_path: Path, step: int, fine: bool) -> None:
    """1.4 rad/s pass; twice that, and a goal beyond the range, do not."""
    write_log(tmp_path / "servos.jsonl", step)
    assert (violations(tmp_path / "servos.jsonl", 1.5) == []) is fine


def test_the_evidence_sees_lost_lines(tmp_path: Path) -> None:
    """Many commands and no log; and a log that lacks more than a second of them."""
    assert read_records(tmp_path, 20, since="it").problems == []
    assert read_records(tmp_path, 40, since="it").problems == ["40 commands and no inference log"]
    log = tmp_path / "logs/session"
    log.mkdir(parents=True)
    line = '{"sent": [0], "images": {}}\n'
    (log / "inference_log.jsonl").write_text(
        line * 50 + '{"sent": [0], "images": {}, "lost_ticks": 10}\n' + line[:9]
    )
    (log / "metadata.json").write_text('{"episodes": [{"ended": null}]}')
    records = read_records(tmp_path, 90, since="it")
    assert (records.sent, records.lost, records.problems) == (51, 10, [])
    assert "32 of 93 commands before it are neither" in read_records(tmp_path, 93, since="it").problems[0]
    assert records.outcomes == [None]
