"""Tasks, embodiments and the yaml files that they come from."""

import dataclasses
from pathlib import Path

import pytest
from env_client.wire import CameraSpec, StateSpec

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.config_files import find_config
from grasp_cube.policies.embodiment import Camera, Embodiment, choose_embodiment, load_embodiment
from grasp_cube.policies.load import checkpoint_folder
from grasp_cube.policies.policy import PolicyError
from grasp_cube.policies.task import load_task

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "dim", "cameras"), [("lift", 6, 2), ("sort", 12, 3), ("stack", 6, 2)])
def test_the_shipped_tasks_fit_their_embodiments(name, dim, cameras):
    task = load_task(name)
    embodiment = load_embodiment(task.embodiment)
    assert (
        task.action_dim == len(embodiment.action_names) == sum(part.size for part in embodiment.states) == dim
    )
    assert task.cameras == tuple(camera.name for camera in embodiment.cameras)
    assert len(task.cameras) == cameras
    assert task.prompt


@pytest.mark.parametrize("task", ["lift", "sort", "stack"])
def test_a_task_names_its_checkpoint_from_anywhere(monkeypatch, tmp_path, task):
    """Relative to the project's root, also when the command runs elsewhere."""
    monkeypatch.chdir(tmp_path)
    checkpoint = load_task(task).checkpoint
    assert checkpoint is not None
    assert checkpoint.name == f"{task}_act"
    assert checkpoint.is_dir()


def test_a_task_without_a_checkpoint_asks_for_one(tmp_path):
    (tmp_path / "fold.yaml").write_text("prompt: fold it\naction_dim: 6\n")
    with pytest.raises(
        PolicyError, match=r"'fold' has no checkpoint of its own: name one with --policy\.path"
    ):
        checkpoint_folder(PolicyConfig(task=str(tmp_path / "fold.yaml")))


def test_a_config_here_goes_before_the_shipped_one(monkeypatch, tmp_path):
    (tmp_path / "configs" / "tasks").mkdir(parents=True)
    (tmp_path / "configs" / "tasks" / "lift.yaml").write_text("prompt: up\naction_dim: 7\n")
    monkeypatch.chdir(tmp_path)
    assert load_task("lift").action_dim == 7
    assert load_task(str(tmp_path / "configs" / "tasks" / "lift.yaml")).prompt == "up"
    assert find_config("tasks", "sort").is_relative_to(ROOT)
    with pytest.raises(PolicyError, match="lift, sort, stack"):
        load_task("nothing")
    with pytest.raises(PolicyError, match="no tasks file"):
        load_task("nothing.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "a map of settings"),
        ("a: [\n", "not readable YAML"),
        ("prompt: up\n", "action_dim"),
        ("prompt: up\naction_dim: six\n", "int was expected"),
        ("prompt: up\naction_dim: 6\ncamera: front\n", "unknown settings camera"),
        ("prompt: up\naction_dim: 6\ncameras: [1, 2]\n", "a list of names"),
    ],
)
def test_mistakes_in_a_task_file_are_named(text, words, tmp_path):
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(PolicyError, match=words):
        load_task(str(tmp_path / "task.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resize: zoom\n", "none, stretch, pad, crop"),
        ("fps: -1\n", "a rate in Hz"),
        ("states: [{name: arm}]\n", "name: arm, size: 6"),
        ("states: [{name: arm, size: true}]\n", "name: arm, size: 6"),
        ("cameras: {front: {feature: a, rezise: pad}}\n", "camera front"),
        ("cameras: {front: {feature: a, resize: zoom}}\n", "camera front"),
        ("units: rad\n", "unknown settings units"),
    ],
)
def test_mistakes_in_an_embodiment_file_are_named(text, words, tmp_path):
    (tmp_path / "arm.yaml").write_text(text)
    with pytest.raises(PolicyError, match=words):
        load_embodiment(str(tmp_path / "arm.yaml"))


def test_the_order_of_who_says_the_embodiment(tmp_path):
    """Flag, then the checkpoint's own file, then the task, then the sizes, then a generic one."""

    def choose(task=None, state=6, action=6, **flags) -> Embodiment:
        return choose_embodiment(
            PolicyConfig(**flags), tmp_path, load_task(task) if task else None, state, action
        )

    assert choose().name == "so101"
    assert choose(state=12, action=12).name == "bi_so101"
    assert choose(state=0).name == "so101"
    generic = choose(state=22, action=25)
    assert (generic.name, generic.unit, generic.fps) == ("generic", "unknown", None)
    assert generic.state_parts(22) == (StateSpec("state", 22),)
    assert len(generic.names(25)) == 25
    assert choose(task="sort").name == "bi_so101"
    (tmp_path / "embodiment.yaml").write_text("base: so101\nname: my_arm\nunit: degrees\nprompt: own\n")
    assert (choose(task="sort").name, choose(task="sort").unit) == ("my_arm", "degrees")
    assert choose(embodiment="bi_so101", task="lift").name == "bi_so101"
    assert choose(unit="rad").unit == "rad"
    # A prompt that was asked for by task or flag goes before the checkpoint's.
    assert choose().prompt == "own"
    assert choose(task="lift").prompt == "lift up the red cube"
    assert choose(task="lift", prompt="flag").prompt == "flag"


def test_the_checkpoints_cameras_win():
    """A mapped feature takes its camera's name and rule, another one keeps its own name."""
    arm = dataclasses.replace(load_embodiment("so101"), resize="crop")
    arm = dataclasses.replace(
        arm, cameras=(Camera("top", "observation.images.cam_high", "pad"), *arm.cameras)
    )
    specs = arm.camera_specs(
        {
            "observation.images.cam_high": (10, 20),
            "observation.images.side": (30, 40),
            "observation.image": (5, 6),
        }
    )
    assert list(specs.values()) == [
        CameraSpec("top", 10, 20, "pad"),
        CameraSpec("side", 30, 40, "crop"),
        CameraSpec("image", 5, 6, "crop"),
    ]
    with pytest.raises(PolicyError, match="'top' would fill 2"):
        arm.camera_specs({"observation.images.cam_high": (10, 20), "observation.images.top": (10, 20)})


def test_sizes_that_do_not_add_up_say_both_numbers():
    arm = load_embodiment("so101")
    with pytest.raises(PolicyError, match=r"7 values, .* has 6"):
        arm.state_parts(7)
    with pytest.raises(PolicyError, match=r"7 values, .* has 6"):
        arm.names(7)
    assert arm.state_parts(0) == ()


def test_the_flags_parse_from_a_command_line():
    """draccus reads every field, and its help has a line for each."""
    import draccus

    config = draccus.parse(
        PolicyConfig, args=["--path", "a/b", "--task", "lift", "--num_inference_steps", "4"]
    )
    assert config == PolicyConfig(path="a/b", task="lift", num_inference_steps=4)
