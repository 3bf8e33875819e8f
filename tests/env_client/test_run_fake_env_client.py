"""The fake client as a real process against a real server process."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from env_client.control.network import encode_observation
from env_client.envs.dataset import DatasetEnv, DatasetEnvConfig
from env_client.run_fake_env_client import main
from env_client.wire import pack, unpack
from numpy_policy import Options, expected_chunk, write_checkpoint
from websockets.sync.server import serve

JOINTS = [
    f"{name}.pos"
    for name in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
]
# A policy that takes one of the dataset's cameras, in another size, and looks at three ticks.
OPTIONS = {
    "horizon": 7,
    "n_obs_steps": 3,
    "action_names": tuple(JOINTS),
    "cameras": ({"name": "front", "height": 48, "width": 64, "resize": "stretch"},),
}
START_S = 60
# Neither page nor log: other tests are about these.
QUIET = ("--no-panel", "--no-enable-logging")


class Server:
    """`serve_policy` as a process."""

    def __init__(self, checkpoint: Path, port: int = 0):
        command = [sys.executable, "-m", "grasp_cube.serve_policy", "--policy.path", str(checkpoint)]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        timer = threading.Timer(START_S, self.process.kill)
        timer.start()
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            found = re.search(r"Waiting for client connections at ws://127.0.0.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                break
        else:
            raise AssertionError("the server did not start: " + "".join(lines))
        timer.cancel()
        # Nobody reads its later lines, and a full pipe would stop it.
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **OPTIONS))
    yield running
    running.kill()


def client(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "env_client.run_fake_env_client", *QUIET, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(*arguments: str, **options) -> tuple[int, str, str]:
    process = client(*arguments, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def episodes(times: int) -> tuple[str, str]:
    """All three of "video", so many times: long enough for a busy machine to do something in their middle."""
    return "--episodes", ",".join("012" * times)


def wait_for_ticks(process: subprocess.Popen, count: int) -> None:
    """Until the progress bar on stderr has come so far."""
    assert process.stderr is not None
    text = b""
    while not any(int(ticks) >= count for ticks in re.findall(rb"(\d+)/\d+ \[", text)):
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, text.decode()
        text += piece


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of a command line that ends with code 2 and one line; in this process, for speed."""
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *QUIET])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.err.count("\n") == 1
    return captured.out, captured.err


def is_png(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 10_000


def expected_errors(dataset: Path, episodes: tuple[int, ...], prompt: str | None = None) -> np.ndarray:
    """(ticks, 6) absolute errors, from the policy's own arithmetic on the dataset's own values."""
    options = Options(**OPTIONS)
    env = DatasetEnv(DatasetEnvConfig(dataset_path=dataset, episodes=episodes))
    errors = []
    for _ in episodes:
        seen, recorded = [env.reset()], env.recorded_actions
        while not env.done:
            env.hold()
            seen.append(env.get_observation())
        sent = [encode_observation(observation, options.spec()) for observation in seen]
        for tick in range(env.length):
            start = tick - tick % options.horizon
            chunk = expected_chunk(
                options, sent[start], sent[max(0, start - 2) : start], prompt or sent[start]["task"]
            )
            errors.append(np.abs(chunk[tick - start] - recorded[tick]))
    env.close()
    return np.stack(errors)


def test_replay_against_the_real_server(datasets, server, tmp_path):
    """The table, the summary and the plots are there, and each number is what the policy's arithmetic gives."""
    arguments = [
        f"--env.dataset-path={datasets / 'video'}", "--server", f"127.0.0.1:{server.port}",
        "--episodes", "0,2", "--fast", "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "2 of 3 episodes, 54 ticks at 30 Hz" in out
    assert "Connected!" in out
    assert "54/54" in err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    errors = expected_errors(datasets / "video", (0, 2))
    assert summary["mean_absolute_error"] == pytest.approx(errors.mean(), rel=1e-5)
    assert list(summary["mean_absolute_error_per_joint"]) == JOINTS
    assert list(summary["mean_absolute_error_per_joint"].values()) == pytest.approx(
        errors.mean(axis=0), rel=1e-5
    )
    assert summary["ticks"] == 54
    assert [episode["chunk_starts"] for episode in summary["episodes"]] == [
        [0, 7, 14, 21],
        [0, 7, 14, 21, 28],
    ]
    assert summary["chunks"] == 9
    assert summary["round_trip_ms"]["p99"] >= summary["round_trip_ms"]["p50"] > 0
    assert summary["first_inference_ms"] > 0
    assert summary["policy"]["type"] == "numpy_test"
    for name in JOINTS:
        assert re.search(rf"{re.escape(name)} +{summary['mean_absolute_error_per_joint'][name]:.3f}", out)
    assert re.search(rf"in all +{errors.mean():.3f}", out)
    assert "round trip       p50" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.json", "episode_0_actions.png", "episode_2_actions.png",
    }  # fmt: skip
    assert is_png(tmp_path / "out" / "episode_2_actions.png")


def test_images_in_parquet_with_a_prompt_and_jpeg(datasets, server, tmp_path):
    """A dataset without videos replays as well; --task replaces the prompt; the default folder has the date."""
    dataset = datasets / "images"
    code, out, err = run(
        "--dataset-path", str(dataset), "--port", str(server.port), "--fast", "--task", "sing",
        "--no-plots", "--num-episodes", "1", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    folder = next((tmp_path / "outputs" / "fake_env_client").iterdir())
    assert [path.name for path in folder.iterdir()] == ["summary.json"]
    summary = json.loads((folder / "summary.json").read_text())
    errors = expected_errors(dataset, (0,), "sing")
    assert summary["mean_absolute_error"] == pytest.approx(errors.mean(), rel=1e-5)
    code, out, err = run(
        "--dataset-path", str(dataset), "--port", str(server.port), "--fast", "--image-codec", "jpeg",
        "--no-plots", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "21 ticks" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["two_arms"], ["actions of 6 values", "has 12", "left_arm (6), right_arm (6)"]),
        (["video", "--env.unit", "degrees"], ["normalized", "degrees"]),
        (["video", "--env.cameras", "front=top"], ["front, which the dataset", "it has top, wrist"]),
        (["nothing"], ["does not exist"]),
        (["video", "--episodes", "0,9"], ["episode 9", "it has 3: 0 to 2"]),
        (["video", "--num-episodes", "0"], ["--num-episodes is 0"]),
        (["video", "--output-dir", "/dev/null/x"], ["--output-dir"]),
        (["video", "--episods", "1"], ["did you mean --episodes?"]),
    ],
)
def test_what_cannot_run_is_one_line(datasets, server, arguments, words, capsys):
    """Misfits and mistakes are one line on stderr with exit code 2, before anything is replayed."""
    name, *rest = arguments
    _, err = refused(capsys, "--env.dataset-path", str(datasets / name), "--port", str(server.port), *rest)
    for word in words:
        assert word in err


def test_no_server(datasets, capsys):
    """It says that it waits, and at the end what to look at."""
    dataset = str(datasets / "video")
    out, err = refused(capsys, "--env.dataset-path", dataset, "--port", "9", "--connect-timeout-s", "1")
    assert "Waiting for a policy server at ws://127.0.0.1:9" in out
    assert "is it running" in err
    assert "firewall" in err


def test_ctrl_c_is_not_lost_in_a_decoder(datasets, server, tmp_path):
    """An exception that comes up in a callback of C code ends there; the replay ends all the same, with its results."""
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, signal\n"
        "from env_client.envs.dataset import DatasetEnv\n"
        "from env_client.run_fake_env_client import main\n"
        "plain, count = DatasetEnv.get_observation, 0\n"
        "def read(self):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 3:\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
        "    return plain(self)\n"
        "DatasetEnv.get_observation = read\n"
        "main()\n"
    )
    arguments = [
        "--env.dataset-path",
        datasets / "video",
        "--port",
        server.port,
        "--output-dir",
        tmp_path / "out",
    ]
    command = [sys.executable, script, "--no-panel", "--no-enable-logging", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr[-2000:]
    assert "interrupted" in done.stderr
    assert (tmp_path / "out" / "summary.json").is_file()


def test_ctrl_c_keeps_the_results(datasets, server, tmp_path):
    """What was replayed until then is reported, plotted and written; the exit code is 130."""
    process = client(
        "--env.dataset-path",
        str(datasets / "video"),
        "--port",
        str(server.port),
        "--output-dir",
        str(tmp_path),
        *episodes(20),
    )
    wait_for_ticks(process, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "in all" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 3 <= summary["ticks"] < 20 * 71
    assert summary["stopped"].startswith("interrupted")
    assert summary["episodes"][-1]["complete"] is False
    assert is_png(tmp_path / "episode_0_actions.png")


def test_server_killed_half_way(datasets, tmp_path):
    """The loss is told, the recording waits, and with a new server the replay ends as if nothing had been."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **OPTIONS)
    first = Server(checkpoint)
    process = client(
        "--env.dataset-path", str(datasets / "video"), "--port", str(first.port), "--output-dir", str(tmp_path / "out"),
        "--no-plots", *episodes(4),
    )  # fmt: skip
    wait_for_ticks(process, 8)
    first.kill()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Waiting for a policy server" in line:
            break
    second = Server(checkpoint, first.port)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        second.kill()
    assert process.returncode == 0, err
    text = "".join(lines) + out
    assert "Connecting again" in text
    assert "Connected again" in text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["reconnects"], summary["ticks"]) == (1, 4 * 71)
    assert summary["mean_absolute_error"] == pytest.approx(
        expected_errors(datasets / "video", (0, 1, 2)).mean(), rel=1e-5
    )


def test_server_gone_for_good(datasets, tmp_path):
    """When nobody comes back, what was replayed is reported and the exit code is 2."""
    server = Server(write_checkpoint(tmp_path / "checkpoint", **OPTIONS))
    process = client(
        "--env.dataset-path", str(datasets / "video"), "--port", str(server.port), "--output-dir", str(tmp_path / "out"),
        "--no-plots", "--connect-timeout-s", "1", *episodes(20),
    )  # fmt: skip
    wait_for_ticks(process, 8)
    server.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no policy server answered" in err
    assert "in all" in out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["ticks"] > 0


def test_plain_openpi_server(datasets, tmp_path):
    """A server that only speaks openpi, and describes nothing, is sent bare observations."""
    seen = []

    def answer(connection):
        connection.send(pack({"config": "plain"}))
        for frame in connection:
            observation, _ = unpack(frame)
            seen.append(observation)
            chunk = np.tile(observation["states"]["arm"] + 2.0, (4, 1)).astype(np.float32)
            connection.send(pack({"actions": chunk, "server_timing": {"infer_ms": 1.0}}))

    with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        port = plain.socket.getsockname()[1]
        code, out, err = run(
            "--env.dataset-path", str(datasets / "video"), "--port", str(port), "--fast", "--episodes", "1",
            "--output-dir", str(tmp_path), "--no-plots",
        )  # fmt: skip
        plain.shutdown()
    assert code == 0, err
    assert "plain openpi server" in out
    assert len(seen) == 5
    assert set(seen[0]) == {"images", "states", "task"}
    # The recorded action is the state plus 2: the first tick of each chunk is predicted exactly.
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["mean_absolute_error"] < 20


def test_help_is_quick_and_light():
    """The help takes well under a second alone and imports nothing heavy."""
    code = (
        "import sys\nfrom env_client.run_fake_env_client import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "bad = {'torch', 'cv2', 'lerobot', 'pyarrow', 'matplotlib', 'av', 'pandas'} & set(sys.modules)\nassert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    for flag in (
        "--env.dataset-path",
        "--env.episodes",
        "--num-episodes",
        "--fast",
        "--output-dir",
        "--server",
        "--task",
    ):
        assert flag in done.stdout
