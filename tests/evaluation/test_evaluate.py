"""The command, on what the repository ships."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from needs_gl import needs_gl

from grasp_cube.evaluation.over_the_wire import run_over_the_wire

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grasp_cube.evaluate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)


@pytest.mark.slow
@needs_gl
@pytest.mark.parametrize("checkpoint", ["lift_act", "lift_diffusion", "stack_act"])
def test_the_shipped_checkpoints_solve_their_task_over_the_wire_and_in_process(
    tmp_path: Path, checkpoint: str
) -> None:
    """Three processes, two unseen seeds each way; table, picture and plain values say the same."""
    done = run(
        "--policy.path", f"checkpoints/{checkpoint}", "--task", checkpoint.split("_")[0], "--episodes", "2",
        "--seed", "1002", "--in-process", "--output-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    wire, alone = report["runs"]["over the wire"], report["runs"]["in-process"]
    assert [episode["seed"] for episode in wire["per_episode"]] == [1002, 1003]
    assert alone["successes"] >= 1
    assert wire["successes"] >= 1
    assert wire["round_trip_ms"]["p50"] > 0
    assert 0 < wire["inner_step_rad"] < 0.06
    assert f"{wire['successes']} of 2" in done.stdout
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@needs_gl
def test_the_shipped_checkpoint_sorts(tmp_path: Path) -> None:
    """Two seeds that it solves without a second try; in real time, where it takes a minute, others are left to chance."""
    done = run(
        "--policy.path", "checkpoints/sort_act", "--task", "sort", "--episodes", "2", "--seed", "1034", "--in-process",
        "--no-wire", "--output-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    alone = json.loads((tmp_path / "report.json").read_text())["runs"]["in-process"]
    assert alone["successes"] >= 1


def test_the_summary_of_an_earlier_run_is_not_this_ones(tmp_path: Path) -> None:
    """The client finds no server: its exit code and sentence are told, whatever lay in the folder."""
    stale = {"episodes": [{"episode": 0, "success": True, "steps": 9, "starved": 0}]}
    (tmp_path / "client.json").write_text(json.dumps(stale))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(RuntimeError, match=r"exit code 2 after 0 of 1 episodes: .*no policy server"):
            run_over_the_wire(
                nobody.getsockname()[1],
                "lift",
                [1000],
                tmp_path,
                time_s=5.0,
                arguments=["--connect-timeout-s", "1"],
                on_episode=lambda done: None,
            )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--episodes", "0"), "--episodes is 0"),
        (("--no-wire",), "--no-wire leaves nothing to run"),
        (("--task", "juggle"), "juggle"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    """Before anything is loaded."""
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
