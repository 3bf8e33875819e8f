"""docker_entrypoint.sh: what the environment variables become, with and without the server behind it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from env_client.wire import RemoteError
from numpy_policy import write_checkpoint
from processes import ROOT, running
from serving_parts import CAMERAS, client, make_observation

SCRIPT = ROOT / "docker_entrypoint.sh"
# Stands where serve_policy is installed, and tells how it was called.
TOLD = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in ("API_KEY", "GRASP_CUBE_API_KEY")}}]))
"""


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def stub(tmp_path) -> Path:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "serve_policy"
    command.write_text(TOLD)
    command.chmod(0o755)
    return command.parent


def test_the_defaults_serve_the_lift_task(stub):
    done = start(stub)
    flags, keys = json.loads(done.stdout)
    assert flags == [
        *("--host", "0.0.0.0", "--port", "8000", "--policy.device", "cuda", "--policy.task", "lift")
    ]
    assert keys == {"API_KEY": None, "GRASP_CUBE_API_KEY": None}


def test_variables_and_further_arguments(stub, tmp_path):
    """The key travels by the environment, where other users of the machine do not see it."""
    checkpoint = tmp_path / "my checkpoint"
    checkpoint.mkdir()
    variables = {
        "TASK": "sort",
        "MODEL_PATH": str(checkpoint),
        "DEVICE": "cuda:1",
        "HOST": "::",
        "PORT": "9001",
    }
    done = start(stub, "--batch-size", "4", "--verbose", API_KEY="a key", **variables)
    flags, keys = json.loads(done.stdout)
    assert flags == [
        *("--host", "::", "--port", "9001", "--policy.device", "cuda:1", "--policy.task", "sort"),
        *("--policy.path", str(checkpoint), "--batch-size", "4", "--verbose"),
    ]
    assert keys == {"API_KEY": None, "GRASP_CUBE_API_KEY": "a key"}


def test_without_a_task_a_client_names_the_checkpoint(stub):
    flags, _ = json.loads(start(stub, TASK="").stdout)
    assert flags[-2:] == ["--policy.root", "/checkpoints"]
    assert "--policy.task" not in flags


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PORT": "http"}, "PORT is 'http'; a number from 1 to 65535"),
        ({"PORT": "0"}, "PORT is '0'"),
        ({"PORT": "65536"}, "PORT is '65536'"),
        ({"PORT": "99999999999999999999"}, "PORT is '9999"),
        ({"DEVICE": "gpu"}, "DEVICE is 'gpu'; cuda, cuda:N or cpu"),
        ({"DEVICE": "cuda:x"}, "DEVICE is 'cuda:x'"),
        ({"MODEL_PATH": "/no/such"}, "MODEL_PATH is '/no/such', which is not in the container: mount"),
        ({"MODEL_PATH": "/etc/passwd"}, "MODEL_PATH is '/etc/passwd', a file; the folder"),
    ],
)
def test_a_wrong_value_ends_with_one_line(stub, variables, words):
    done = start(stub, **variables)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TASK": "fold"}, "'fold' is not one of the tasks"),
        ({"HOST": "no.such.host.invalid"}, "no.such.host.invalid"),
    ],
)
def test_a_value_that_only_the_server_can_judge_ends_with_one_line(variables, words):
    done = start(Path(sys.executable).parent, DEVICE="cpu", **variables)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_server_takes_the_process_over(tmp_path):
    """A checkpoint by MODEL_PATH is served with the key; SIGTERM to the very process that was started ends it."""
    checkpoint = write_checkpoint(tmp_path / "numpy", cameras=CAMERAS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TASK": "",
        "MODEL_PATH": str(checkpoint),
        "DEVICE": "cpu",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "API_KEY": "secret",
    }
    with running(SCRIPT, env=variables) as server:
        server.wait_for("Waiting for client connections")
        with pytest.raises(RemoteError, match="refused the key"):
            client(port)
        assert client(port, api_key="secret").infer(make_observation())["action"].shape == (16, 6)
        assert server.end(signal.SIGTERM) == 0
        server.wait_for(r"Stopped\.")
