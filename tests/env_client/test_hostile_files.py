"""Files that somebody wrote to do harm: settings, datasets and logs. Each is a sentence, at once, and touches nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from env_client.cli import CliError
from env_client.cli.configs import read_config_file
from env_client.client_config import find_task
from env_client.envs.astribot_layout import layout_names, read_hardware
from env_client.envs.cameras import read_camera_file
from env_client.envs.dataset_files import LeRobotFiles
from env_client.envs.env import EnvError
from env_client.envs.make import read_robot_file
from env_client.envs.robots import SO101Config
from env_client.record.files import read_json, write_json
from env_client.record.inference_log import FORMAT
from env_client.record.replay_log import LoggedRun
from env_client.text_files import load_yaml
from env_client.wire import InvalidInput, encode_image
from processes import ROOT

from grasp_cube.policies.embodiment import load_embodiment
from grasp_cube.policies.policy import PolicyError
from grasp_cube.policies.task import load_task

# Nine levels of ten references each: a billion words, if anybody wrote them out.
LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
HOSTILE = {
    "code": "!!python/object/apply:os.system ['touch it-ran']\n",
    "code in a value": "type: !!python/object/apply:os.system ['touch it-ran']\n",
    "nesting": "[" * 100_000,
    "nesting by dashes": "- " * 50_000,
    "nesting by question marks": "? " * 50_000,
    "a billion laughs": LAUGHS
    + "type: *a9\nprompt: *a9\nunit: *a9\naction_names: *a9\nparts: *a9\nfps: *a9\n",
    "an empty number": "prompt: !!int ''\n",
    "a day that is none": "prompt: 2024-13-45\n",
    "a time that is none": "prompt: !!timestamp x\n",
    "ten megabytes": "prompt: " + "x" * 10_000_000,
    "bytes": "\udcff\udcfe",
    "nothing": "",
}
READERS = {
    "task of the server": lambda file: load_task(str(file)),
    "task of the client": lambda file: find_task(str(file)),
    "embodiment": lambda file: load_embodiment(str(file)),
    "cameras": read_camera_file,
    "robot": lambda file: read_robot_file(SO101Config(robot_config_path=str(file)), "so101"),
    "astribot": read_hardware,
    "layout": lambda file: layout_names(str(file)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_settings(tmp_path, monkeypatch, name, reader):
    """No code is run, nothing is written out or parsed for minutes, and the error is a short one of the reader's own."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "settings.yaml"
    file.write_bytes(HOSTILE[name].encode(errors="surrogateescape"))
    with pytest.raises((EnvError, PolicyError, CliError)) as caught:
        READERS[reader](file)
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "it-ran").exists()


def test_option_files(tmp_path):
    """An empty one is no error: it sets nothing."""
    file = tmp_path / "options.yaml"
    for name, text in HOSTILE.items():
        file.write_bytes(text.encode(errors="surrogateescape"))
        if name in ("nothing", "a billion laughs"):
            continue
        with pytest.raises(CliError):
            read_config_file(file)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 10_000, '{"a": ', "\ud800".encode("utf-8", "surrogatepass")]
)
def test_json(tmp_path, text):
    """Nesting, numbers that Python refuses, halves of a file and of a character."""
    file = tmp_path / "file.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError):
        read_json(file)
    with pytest.raises(ValueError):
        load_yaml(file) if isinstance(text, bytes) or text[0] != "1" else read_json(file)


# ------------------------------------------------------------------------------------------- datasets


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A copy of the shipped one, without its videos."""
    ignored = shutil.ignore_patterns("*.mp4")
    return Path(shutil.copytree(ROOT / "datasets" / "lift", tmp_path / "dataset", ignore=ignored))


def edit(root: Path, **changes) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_path": "../outside/{file_index:03d}.parquet"}, "inside the dataset"),
        ({"data_path": "/etc/passwd"}, "inside the dataset"),
        ({"video_path": "../../{video_key}.mp4"}, "inside the dataset"),
        # What str.format would do with it: a gigabyte of blanks, and an attribute of the interpreter's.
        ({"data_path": "{chunk_index:>1000000000}"}, "missing"),
        ({"data_path": "{chunk_index.__class__}"}, "missing"),
        ({"data_path": "{nothing}"}, "nothing"),
        ({"data_path": 7}, "LeRobot v3.0"),
        ({"fps": 0}, "above 0"),
        ({"fps": float("nan")}, "above 0"),
        ({"fps": []}, "LeRobot v3.0"),
        ({"features": 3}, "LeRobot v3.0"),
        ({"features": {"action": {"dtype": "float32", "shape": [10**12]}}}, "at most"),
        ({"features": {"action": {"shape": "x"}}}, "LeRobot v3.0"),
        ({"features": {"action": None}}, "LeRobot v3.0"),
    ],
)
def test_datasets(dataset, changes, said):
    """What leads out of the folder, fills the memory, or is of another kind."""
    edit(dataset, **changes)
    with pytest.raises(EnvError, match=said):
        LeRobotFiles(dataset).read_episode(0)


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", "\x1b[2J", ""])
def test_a_camera_s_name_leads_nowhere(dataset, name):
    """Logs and videos of a replay are named after it."""
    info = json.loads((dataset / "meta" / "info.json").read_text())
    front = next(key for key in info["features"] if key.startswith("observation.images."))
    info["features"][f"observation.images.{name}"] = info["features"].pop(front)
    (dataset / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(EnvError, match="without slashes"):
        LeRobotFiles(dataset)


# ------------------------------------------------------------------------------------------------ logs


def write_log(folder: Path, picture: str = "front.jpg", **changes) -> Path:
    folder.mkdir()
    (folder / "front.jpg").write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8), "jpeg").data)
    metadata = {"format": FORMAT, "cameras": ["front"], "states": {"arm": 1}, "episodes": []}
    write_json(folder / "metadata.json", metadata)
    line = {
        "episode": 0, "tick": 0, "frame": 0, "capture_time": 1.0, "prompt": "", "state": [0.0], "images": {"front": picture},
        "chunk": {"chunk_id": 1, "capture_time": 1.0, "actions": [[0.0]]},
    }  # fmt: skip
    (folder / "inference_log.jsonl").write_text(json.dumps(line | changes) + "\n")
    return folder


def test_a_log_s_pictures_lie_inside_it(tmp_path):
    """A picture elsewhere would be sent to a server."""
    assert LoggedRun(write_log(tmp_path / "good")).observation(0).images["front"].shape == (8, 8, 3)
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "good" / "front.jpg").read_bytes())
    (tmp_path / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for number, place in enumerate(("../secret.jpg", str(tmp_path / "secret.jpg"), "../link.jpg")):
        run = LoggedRun(write_log(tmp_path / str(number), picture=place))
        with pytest.raises(InvalidInput, match="outside of the log"):
            run.observation(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"episode": []},
        {"capture_time": {}},
        {"chunk": 3},
        {"state": "x"},
        {"images": 3},
    ],
)
def test_logs(tmp_path, changes):
    """A value that is missing or of another kind is a sentence that names the log."""

    def read() -> None:
        run = LoggedRun(write_log(tmp_path / "log", **changes))
        assert len(list(run.chunks())) <= 1
        run.observation(0)

    with pytest.raises((ValueError, InvalidInput)):
        read()
