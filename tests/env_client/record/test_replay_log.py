"""A log's questions, asked again: of the same server, of another one, and from a torn log."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from env_client.record.inference_log import InferenceLog
from env_client.record.replay_log import LoggedRun, main
from env_client.wire import EncodedImage, decode_image, encode_image
from numpy_policy import Options, expected_chunk, write_checkpoint
from processes import ROOT, running
from record_parts import HORIZON, begin, only, picture, run_info, ticks

# It looks at three ticks and two cameras; its answer is another one for every pixel that changes.
OPTIONS = {
    "horizon": HORIZON,
    "n_obs_steps": 3,
    "cameras": tuple({"name": n, "height": 96, "width": 128, "resize": "none"} for n in ("front", "wrist")),
}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory):
    """A real server."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("policy") / "policy", **OPTIONS)
    command = [sys.executable, "-m", "grasp_cube.serve_policy", "--policy.path", str(checkpoint)]
    with running(*command, "--host", "127.0.0.1", "--port", "0", cwd=ROOT) as server:
        yield server.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)")[1]


def jpeg(number: int) -> EncodedImage:
    image = encode_image(picture(number), "jpeg")
    assert isinstance(image, EncodedImage)
    return image


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """The log of a run whose cameras give JPEGs, as far as the server answered what it answers today."""
    log = InferenceLog(tmp_path / "logs")
    log.begin_run(run_info(action_names=tuple(f"joint_{k}.pos" for k in range(6))))
    begin(log, 0)
    seen: list[dict] = []
    for tick in ticks(0, 30):
        images = {"front": jpeg(tick.tick), "wrist": jpeg(tick.tick + 30)}
        assert tick.state is not None
        seen.append(
            {
                "images": {name: decode_image(image) for name, image in images.items()},
                "states": {"arm": np.round(tick.state.astype(np.float64), 5).astype(np.float32)},
                "task": tick.prompt,
            }
        )
        changes: dict = {"images": images}
        if tick.chunk is not None:
            changes["chunk"] = expected_chunk(Options(**OPTIONS), seen[-1], seen[-3:-1], tick.prompt)
        log.tick(replace(tick, **changes))
    log.close()
    return only(tmp_path / "logs")


def replay(session: Path, port: str, output: Path) -> dict:
    with pytest.raises(SystemExit) as ended:
        main([str(session), "--port", port, "--output-dir", str(output)])
    assert ended.value.code == 0
    return json.loads((output / "summary.json").read_text())


def test_the_same_server_answers_the_same(session: Path, port: str, tmp_path: Path) -> None:
    """Pictures, states, prompt and history arrive as they were: every chunk comes back."""
    summary = replay(session, port, tmp_path / "out")
    assert (summary["chunks"], summary["left_out"]) == (3, 0)
    assert max(summary["largest_difference"].values()) < 1e-4
    assert (tmp_path / "out/answers.png").stat().st_size > 10_000


def test_another_answer_is_shown_where_it_is(
    session: Path, port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A joint that was logged otherwise in one chunk: its frame, its name and by how much."""
    path = session / "inference_log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row in lines[20]["chunk"]["actions"]:
        row[3] += 2.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = replay(session, port, tmp_path / "out")
    worst = summary["worst_chunks"][0]
    assert (worst["frame"], worst["joint"]) == (20, "joint_3.pos")
    assert worst["largest_difference"] == pytest.approx(2.5, abs=1e-3)
    assert "frame     20" in capsys.readouterr().out
    assert [joint for joint, value in summary["mean_difference"].items() if value > 0.01] == ["joint_3.pos"]


def test_a_torn_log_is_replayed_as_far_as_it_goes(session: Path, port: str, tmp_path: Path) -> None:
    """Half a line and half a picture: what is whole is asked, what is not is said."""
    path = session / "inference_log.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    torn = session / "images/frame_000010/front.jpg"
    torn.write_bytes(torn.read_bytes()[:8])
    summary = replay(session, port, tmp_path / "out")
    assert (summary["chunks"], summary["left_out"], summary["torn_episodes"]) == (2, 1, [0])
    assert "frame_000010/front.jpg is no JPEG" in summary["why_left_out"][0]
    assert len(LoggedRun(session).lines) == 29


def test_a_folder_that_is_no_log_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2, before any server is waited for."""
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    assert "inference_logs/session_" in capsys.readouterr().err
