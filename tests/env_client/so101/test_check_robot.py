"""`check_robot`: the tables, the pictures, and what is not in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from env_client.check_robot import main

Make = Callable[..., Any]


def check(folder: Path, *flags: str) -> int:
    common = ["--env.robot.port", str(folder / "port0"), "--env.robot.id", "virtual", "--time-s", "0.5"]
    common += [
        "--env.robot.calibration-dir",
        str(folder / "calibration"),
        "--output-dir",
        str(folder / "out"),
    ]
    common += ["--env.camera-config-path", str(folder / "cameras.json")]
    with pytest.raises(SystemExit) as ended:
        main([*common, *flags])
    return int(ended.value.code or 0)


def test_all_in_order(make_twin: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Joints, limits, calibration, rates and pictures; nothing is switched on."""
    twin = make_twin(camera_port=0, bus_process=True)
    assert check(tmp_path) == 0
    said = capsys.readouterr().out
    assert "so101: 6 joints, unit normalized" in said
    assert "shoulder_pan.pos" in said
    assert "calibrated ticks shoulder_pan" in said
    assert "640x480" in said
    assert "✓ cameras, joints and calibration are in order" in said
    assert (tmp_path / "out" / "front.png").stat().st_size > 1000
    assert not [event for event in twin.log.events() if event["kind"] in ("goal", "torque")]


def test_what_is_wrong_is_said(make_twin: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A camera that the task needs and the robot lacks is exit code 1; a missing calibration is 2."""
    make_twin(camera_port=0, bus_process=True)
    cameras = (tmp_path / "cameras.json").read_text().replace('"wrist": {', '"side": {')
    (tmp_path / "cameras.json").write_text(cameras)
    assert check(tmp_path, "--task", "lift") == 1
    assert "✗ camera wrist, which the task needs, is missing" in capsys.readouterr().out
    assert check(tmp_path, "--env.robot.id", "nobody") == 2
    assert "has no calibration file" in capsys.readouterr().err


def test_each_check_can_fail(make_twin: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A joint calibrated over 20 ticks, one outside its range, a slow camera: each by name, and the torque as it was."""
    twin = make_twin(camera_port=0, camera_fps=2)
    path = tmp_path / "calibration" / "virtual.json"
    content = json.loads(path.read_text())
    for servo, name, span in ((0, "shoulder_pan", 20), (1, "shoulder_lift", 700)):
        at = twin.chains[0].servos[servo].position
        low = at - 10 if span == 20 else at + 100
        content[name].update(range_min=low, range_max=low + span)
        twin.chains[0].servos[servo].put("min_limit", low)
        twin.chains[0].servos[servo].put("max_limit", low + span)
    path.write_text(json.dumps(content))
    assert check(tmp_path, "--time-s", "2") == 1
    said = capsys.readouterr().out
    assert (
        "the arm's shoulder_pan is calibrated over 20 ticks, at least 500 (44 degrees) were expected" in said
    )
    assert "the arm's shoulder_lift stands at" in said
    assert "camera front gives" in said
    assert "30 were expected (--fps)" in said
    assert "in order" not in said
    assert not [event for event in twin.log.events() if event["kind"] in ("goal", "torque")]
