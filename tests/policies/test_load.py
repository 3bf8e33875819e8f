"""Every checkpoint and option that cannot be served is refused with its own sentence, before any weight is used."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import HEIGHT, WIDTH, observation, save_act

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.load import load_policy
from grasp_cube.policies.places import checkpoint_name
from grasp_cube.policies.policy import PolicyError
from grasp_cube.serve_policy import ServedConfig

ROOT = Path(__file__).parents[2]


def refusal(path, **options) -> str:
    """The sentence with which loading ends."""
    with pytest.raises(PolicyError) as caught:
        load_policy(path, **({"device": "cpu"} | options))
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def edit(file: Path, **changes) -> None:
    """Change single values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_step(file: Path, name: str, change) -> None:
    """Change the step `name` of a processor file in place."""
    values = json.loads(file.read_text())
    change(next(step for step in values["steps"] if step["registry_name"] == name))
    file.write_text(json.dumps(values))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------- the folder


def test_a_missing_path_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal("checkpoints/nowhere")
    assert str(tmp_path / "checkpoints" / "nowhere") in message
    assert "project's root" in message


def test_a_file_or_an_empty_folder_is_no_checkpoint(tmp_path, act):
    assert "the folder that holds config.json" in refusal(act / "config.json")
    assert "no config.json" in refusal(tmp_path)


def test_the_folder_above_points_to_the_checkpoint(tmp_path):
    """LeRobot's training writes checkpoints/last/pretrained_model: the hint names what lies below."""
    (tmp_path / "last" / "pretrained_model").mkdir(parents=True)
    (tmp_path / "last" / "pretrained_model" / "config.json").write_text("{}")
    assert "last/pretrained_model" in refusal(tmp_path)


def test_a_config_that_is_not_json_or_has_no_type(broken):
    (broken / "config.json").write_text("{'type': ")
    assert "not readable JSON" in refusal(broken)
    (broken / "config.json").write_text('{"n_obs_steps": 1}')
    assert "has no `type`" in refusal(broken)
    (broken / "config.json").write_text("[1, 2]")
    assert "has no `type`" in refusal(broken)


def test_an_unknown_type_lists_the_known_ones(broken):
    edit(broken / "config.json", type="act2")
    message = refusal(broken)
    assert "'act2' is unknown" in message
    for known in ("act", "diffusion", "numpy_test"):
        assert known in message


def test_a_type_flag_against_the_config_is_refused(act):
    message = refusal(act, type="diffusion")
    assert "'diffusion'" in message
    assert "'act'" in message


def test_no_path_and_no_task():
    assert "--policy.path" in refusal(None)


# ------------------------------------------------------------------------------------------ the weights


def test_a_truncated_file(broken):
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "truncated or damaged" in refusal(broken)
    (broken / "model.safetensors").write_bytes(b"")
    assert "truncated or damaged" in refusal(broken)


def test_missing_weights_and_pickles(broken):
    (broken / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refusal(broken)
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickle" in refusal(broken)


def test_a_missing_an_extra_and_a_misshapen_tensor(broken):
    """Never a policy that is partly random."""
    name = "model.action_head.bias"
    edit_tensors(broken, lambda tensors: tensors.update(extra=torch.zeros(2)))
    assert "1 extra (extra)" in refusal(broken)
    edit_tensors(broken, lambda tensors: tensors.pop("extra"))
    edit_tensors(broken, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    assert f"{name} in " in refusal(broken)
    edit_tensors(broken, lambda tensors: tensors.pop(name))
    assert f"1 missing ({name})" in refusal(broken)


def test_weights_that_are_not_finite(broken):
    name = "model.action_head.bias"
    edit_tensors(broken, lambda tensors: tensors[name].fill_(float("inf")))
    assert "not finite" in refusal(broken)


def test_a_config_that_belongs_to_other_weights(broken):
    edit(broken / "config.json", dim_model=64)
    assert "config.json makes it" in refusal(broken)


def test_a_config_that_lerobot_does_not_understand(broken):
    edit(broken / "config.json", a_new_field=3)
    assert "a_new_field" in refusal(broken)


def age(folder: Path) -> None:
    """Bring a checkpoint into the form of LeRobot 0.3: statistics among the weights, no processors."""
    stats = load_file(next(folder.glob("policy_preprocessor*normalizer*.safetensors")))

    def put(tensors) -> None:
        for name, value in stats.items():
            feature, _, stat = name.rpartition(".")
            if stat not in ("mean", "std"):
                continue
            for place in (
                ["normalize_targets", "unnormalize_outputs"] if feature == "action" else ["normalize_inputs"]
            ):
                tensors[f"{place}.buffer_{feature.replace('.', '_')}.{stat}"] = value.clone()

    edit_tensors(folder, put)
    for file in folder.glob("policy_*processor*"):
        file.unlink()


def test_an_old_checkpoint_is_converted_in_memory(tmp_path):
    """LeRobot's migration is the judge; it calls cam_high `cam.high`, which is understood as well."""
    cameras = ("cam_high", "wrist")
    new = save_act(tmp_path / "new", cameras)
    old = Path(shutil.copytree(new, tmp_path / "old"))
    age(old)
    (old / "README.md").touch()
    code = "import sys; from lerobot.processor import migrate_policy_normalization as m\n"
    code += "from huggingface_hub import ModelCard; ModelCard.validate = lambda self, **k: None; m.main()"
    command = [sys.executable, "-c", code, "--pretrained-path", str(old)]
    subprocess.run(command, check=False, capture_output=True, timeout=300)
    obs = observation(3, cameras)
    chunks = {}
    for folder in (new, old, tmp_path / "old_migrated"):
        lines: list[str] = []
        chunks[folder.name] = load_policy(folder, device="cpu", report=lines.append).get_actions(obs)
        assert any("in memory" in line for line in lines) == (folder != new)
    np.testing.assert_allclose(chunks["old"], chunks["old_migrated"], atol=1e-6)
    np.testing.assert_allclose(chunks["old"], chunks["new"], atol=1e-6)
    name = "normalize_inputs.buffer_observation_images_cam_high.std"
    edit_tensors(old, lambda t: t[name].fill_(float("inf")))
    assert "stats of observation.images.cam_high (std)" in refusal(old)
    edit_tensors(old, lambda t: t.pop(name))
    assert "stats of observation.images.cam_high are missing (std" in refusal(old)


def add_input(folder: Path, name: str, kind: str, shape: list[int]) -> None:
    """One more input in config.json."""
    inputs = json.loads((folder / "config.json").read_text())["input_features"]
    edit(folder / "config.json", input_features=inputs | {name: {"type": kind, "shape": shape}})


def test_inputs_that_are_never_read_are_not_asked_for(broken, act):
    """LeRobot lists whatever the dataset has; a step's old name and a rename_map are LeRobot's own, too."""
    add_input(broken, "observation.effort", "STATE", [6])
    add_input(broken, "observation.task", "LANGUAGE", [1])
    file = broken / "policy_preprocessor.json"
    names = {"observation.images.laptop": "observation.images.front"}
    change = {"registry_name": "rename_processor", "config": {"rename_map": names}}
    edit_step(file, "rename_observations_processor", lambda step: step.update(change))
    edit_tensors(broken, lambda t: t.update({"model.encoder.position_ids": torch.arange(4)[None]}))
    lines: list[str] = []
    policy = load_policy(broken, device="cpu", report=lines.append)
    assert [camera.name for camera in policy.spec.cameras] == ["laptop", "wrist"]
    assert sum("observation.effort, observation.task" in line for line in lines) == 1
    assert sum("observation.images.laptop fills observation.images.front" in line for line in lines) == 1
    obs = observation(1)
    obs["images"]["laptop"] = obs["images"].pop("front")
    np.testing.assert_allclose(
        policy.get_actions(obs), load_policy(act, device="cpu").get_actions(observation(1)), atol=1e-5
    )
    add_input(broken, "observation.environment_state", "ENV", [16])
    assert "the state of a simulation, which no robot sends" in refusal(broken)


@pytest.mark.parametrize("optimize", ["auto", "none"])
def test_an_act_without_state_and_with_images_of_two_sizes(tmp_path, optimize, caplog):
    from lerobot.configs import FeatureType, PolicyFeature

    inputs = {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 64, 96)),
        "observation.image2": PolicyFeature(FeatureType.VISUAL, (3, 96, 64)),
        "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 64, 96)),
    }
    identity = dict.fromkeys(("VISUAL", "STATE"), "IDENTITY") | {"ACTION": "MEAN_STD"}
    folder = save_act(tmp_path / "act", input_features=inputs, normalization_mapping=identity)
    policy = load_policy(folder, device="cpu", optimize=optimize)
    assert not caplog.records
    assert [camera.name for camera in policy.spec.cameras] == ["image", "image2", "wrist"]
    assert policy.spec.states == ()
    random = np.random.default_rng(1)
    frames = {
        name: random.integers(0, 256, (*feature.shape[1:], 3), dtype=np.uint8)
        for name, feature in inputs.items()
    }
    from lerobot.policies.act.modeling_act import ACTPolicy

    model = ACTPolicy.from_pretrained(folder).eval()
    batch = {name: torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for name, image in frames.items()}
    chunk = model.predict_action_chunk(batch | {"observation.state": torch.zeros(1, 6)})[0]
    stats = load_file(next(folder.glob("policy_postprocessor*.safetensors")))
    wanted = chunk * stats["action.std"] + stats["action.mean"]
    np.testing.assert_allclose(
        policy.get_actions(frames), wanted.numpy(), atol=1e-2 if optimize == "auto" else 1e-4
    )


def test_a_diffusion_without_state_is_refused_before_anything_is_built(diffusion, tmp_path):
    folder = Path(shutil.copytree(diffusion, tmp_path / "diffusion"))
    inputs = json.loads((folder / "config.json").read_text())["input_features"]
    del inputs["observation.state"]
    edit(folder / "config.json", input_features=inputs)
    assert "takes no observation.state" in refusal(folder)


# ------------------------------------------------------------------------------------- places and names


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def replaced(name: str, content: bytes | str | None):
    """A change of a folder: `name` holds `content`, is a link to it, or a folder (None)."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is None:
            (folder / name).mkdir()
        elif isinstance(content, str):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_bytes(content)

    return change


STATS = "policy_preprocessor_step_3_normalizer_processor.safetensors"


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "policy_preprocessor.json", STATS, "embodiment.yaml"]
)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "run `git lfs pull` in"),
        (b"<!doctype html><html>", "is a web page"),
        ("../blobs/0abc", "is a link to ../blobs/0abc, which is not there"),
        (None, "is a folder; a file was expected"),
    ],
    ids=["lfs", "html", "link", "folder"],
)
def test_a_file_that_is_not_the_file_says_why(broken, file, content, words):
    replaced(file, content)(broken)
    assert words in refusal(broken)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("part", ["..", "", "config.json", "model.safetensors", STATS])
def test_what_may_not_be_read_names_the_permission(act, part):
    """As another user, in a process of its own; pytest's own folders are closed to others."""
    code = "import os, sys; from grasp_cube.policies.load import load_policy\n"
    code += "import grasp_cube.policies.lerobot_checkpoint; os.setuid(65534)\n"
    code += "load_policy(sys.argv[1], device='cpu')"
    with tempfile.TemporaryDirectory() as above:
        folder = Path(shutil.copytree(act, Path(above) / "act"))
        for path in (Path(above), folder, *folder.iterdir()):
            path.chmod(0o755)
        closed = (folder / part).resolve()
        closed.chmod(0)
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert f"PolicyError: {closed} may not be read by this user (user id 65534" in done.stderr
        assert "`sudo chmod " in done.stderr


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "gs://openpi-assets/checkpoints/pi05_droid",
            "gcloud storage cp -r gs://openpi-assets/checkpoints/pi05_droid",
        ),
        ("s3://bucket/runs/lift", "aws s3 cp --recursive s3://bucket/runs/lift checkpoints/lift"),
        ("hf://me/lift", "hf download me/lift --local-dir checkpoints/lift"),
        ("https://huggingface.co/me/lift/tree/main", "hf download me/lift --local-dir checkpoints/lift"),
        ("me/lift", "hf download me/lift --local-dir checkpoints/lift"),
        ("https://lab.example/lift.zip", "download the whole checkpoint folder first"),
    ],
)
def test_a_checkpoint_elsewhere_says_how_to_bring_it(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(path)


def test_a_hub_id_in_the_local_cache_is_served(act, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--me--lift"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0abc")
    shutil.copytree(act, place / "snapshots" / "0abc")
    assert load_policy("me/lift", device="cpu").metadata["name"] == "lift"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload()"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "in several files"),
        (["model.onnx"], "an ONNX export"),
    ],
)
def test_weights_of_another_form_say_how_they_become_one(broken, files, words):
    (broken / "model.safetensors").unlink()
    for name in files:
        (broken / name).touch()
    assert words in refusal(broken)
    (broken / "config.json").unlink()
    assert words in refusal(broken)


@pytest.mark.parametrize(
    ("path", "name", "with_step"),
    [
        ("outputs/train/RUN/checkpoints/050000/pretrained_model", "RUN", "RUN-050000"),
        ("outputs/train/RUN/checkpoints/last/pretrained_model/", "RUN", "RUN-last"),
        ("checkpoints/pi05_droid/lab/29999", "lab", "lab-29999"),
        ("hub/models--org--lift/snapshots/0abc", "lift", "lift"),
        ("checkpoints/lift_act/.", "lift_act", "lift_act"),
    ],
)
def test_a_checkpoint_is_called_as_its_run(path, name, with_step, tmp_path):
    assert checkpoint_name(tmp_path / path) == name
    assert checkpoint_name(tmp_path / path, with_step=True) == with_step
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / "pretrained_model").symlink_to(tmp_path / path)
    assert checkpoint_name(tmp_path / "best" / ".." / path) == name


def test_runs_are_served_under_their_names(tmp_path):
    def names(*paths: str) -> list[str]:
        return [name for name, _ in ServedConfig(path=paths).each()]

    one, two, three = (
        "a/checkpoints/010/pretrained_model",
        "a/checkpoints/020/pretrained_model",
        "b/checkpoints/010",
    )
    assert names(one, three) == ["a", "b"]
    assert names(one, two, three) == ["a-010", "a-020", "b"]
    assert names(f"old={one}", two) == ["old", "a"]
    assert names(one) == [""]


# -------------------------------------------------------------------------------- normalisation, processors


@pytest.mark.parametrize(
    ("which", "kind", "feature"),
    [("pre", "normalizer_processor", "observation"), ("post", "unnormalizer_processor", "action")],
)
def test_missing_stats(broken, which, kind, feature):
    """Without stats LeRobot would pass raw values through in silence."""
    edit_step(broken / f"policy_{which}processor.json", kind, lambda step: step.pop("state_file"))
    message = refusal(broken)
    assert "normalisation stats" in message
    assert feature in message


def test_stats_of_one_feature_missing_or_not_finite(broken):
    file = broken / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    stats = load_file(file)
    save_file(stats | {"observation.state.std": torch.full((6,), float("nan"))}, file)
    assert "observation.state (std)" in refusal(broken)
    save_file({k: v for k, v in stats.items() if k != "observation.state.std"}, file)
    assert "observation.state are missing (std" in refusal(broken)
    save_file(stats | {"observation.state.std": torch.ones(12)}, file)
    assert "12 values" in refusal(broken)


def test_a_feature_that_the_processor_forgets(broken):
    file = broken / "policy_preprocessor.json"
    edit_step(file, "normalizer_processor", lambda step: step["config"]["features"].pop("observation.state"))
    assert "does not normalise observation.state" in refusal(broken)


def test_missing_processor_files(broken):
    (broken / "policy_preprocessor_step_3_normalizer_processor.safetensors").unlink()
    assert "holds no policy_preprocessor_step_3" in refusal(broken)
    (broken / "policy_postprocessor.json").unlink()
    (broken / "policy_preprocessor_step_3_normalizer_processor.safetensors").touch()
    assert "truncated or damaged" in refusal(broken)


EVIL = """
from pathlib import Path

Path("FOLDER/it-ran").touch()


class Processor: ...
"""


@pytest.mark.parametrize(
    "step",
    [
        {"class": "antigravity.Fly"},
        # Any name in a module of LeRobot's would be called with what the checkpoint says.
        {"class": "lerobot.utils.utils.say", "config": {"text": "hello"}},
        # This one of LeRobot's own trusts the code in the folder that it is told, by default.
        {"registry_name": "action_tokenizer_processor", "config": {"action_tokenizer_name": "FOLDER"}},
        {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "FOLDER"}},
        {"registry_name": ["device_processor"]},
    ],
    ids=lambda step: str(step.get("class", step.get("registry_name"))),
)
def test_a_processor_may_not_choose_code(broken, step):
    """A step that these policies do not have is neither imported nor made, LeRobot's own included."""
    evil = broken / "evil"
    evil.mkdir()
    (evil / "code.py").write_text(EVIL.replace("FOLDER", str(evil)))
    named = dict.fromkeys(("AutoProcessor", "AutoTokenizer", "AutoConfig"), "code.Processor")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        (evil / name).write_text(json.dumps({"auto_map": named}))
    file = broken / "policy_preprocessor.json"
    values = json.loads(file.read_text())
    values["steps"].append(json.loads(json.dumps({"config": {}} | step).replace("FOLDER", str(evil))))
    file.write_text(json.dumps(values))
    assert "may not choose code" in refusal(broken)
    assert "antigravity" not in sys.modules
    assert not (evil / "it-ran").exists()


# --------------------------------------------------------------------------------------------- the options


def test_devices(act):
    if not torch.cuda.is_available():
        assert "--device cpu" in refusal(act, device="cuda")
    assert "unknown" in refusal(act, device="tpu9")


def test_options_out_of_range(act, diffusion):
    assert "DDPM, DDIM" in refusal(diffusion, noise_scheduler="EULER")
    assert "at least 1" in refusal(act, n_action_steps=0)
    assert "at most 20" in refusal(diffusion, num_inference_steps=21)
    assert "no meaning" in refusal(act, num_inference_steps=4)
    assert "stretch" in refusal(act, resize="zoom")
    assert "auto, none" in refusal(act, optimize="max")


def test_a_task_of_another_dimension_says_both_numbers(act, tmp_path):
    """A one-armed checkpoint for a two-armed task, before LeRobot is even imported."""
    message = refusal(act, task="sort")
    assert "12 values" in message
    assert "gives 6" in message


def test_an_unknown_task_lists_the_known_ones(act):
    message = refusal(act, task="juggle")
    assert "lift, sort, stack" in message


def test_a_task_without_a_checkpoint_asks_for_one(tmp_path):
    task = tmp_path / "fold.yaml"
    text = (ROOT / "configs" / "tasks" / "sort.yaml").read_text()
    task.write_text(text.replace("checkpoint: checkpoints/sort_act", "checkpoint: null"))
    assert "name one with --policy.path" in refusal(None, task=str(task))


def test_an_embodiment_of_another_size_says_both_numbers(act):
    message = refusal(act, embodiment="bi_so101")
    assert "12" in message
    assert "6 values" in message


# -------------------------------------------------------------------------------------------- what is said


def test_the_task_fills_the_prompt_and_each_step_is_reported(act):
    lines: list[str] = []
    policy = load_policy(PolicyConfig(path=str(act), task="lift", device="cpu"), report=lines.append)
    assert policy.spec.default_prompt == "lift up the red cube"
    assert policy.metadata["task"] == "lift"
    text = "\n".join(lines)
    for word in ("act", f"front {HEIGHT}x{WIDTH}", "so101", "million parameters", "cpu"):
        assert word in text


def test_a_checkpoint_from_a_gpu_with_backbone_weights_of_the_hub_loads_here_offline(broken, monkeypatch):
    """What training saved of its own machine is replaced, and no network is touched."""

    def no_network(*_):
        raise AssertionError("loading opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    edit(broken / "config.json", device="cuda", pretrained_backbone_weights="ResNet18_Weights.IMAGENET1K_V1")
    for which in ("pre", "post"):
        file = broken / f"policy_{which}processor.json"
        edit_step(file, "device_processor", lambda step: step["config"].update(device="cuda"))
    actions = load_policy(broken, device="cpu").get_actions(observation(1))
    assert actions.shape == (10, 6)


def test_the_checkpoints_own_embodiment_file(broken):
    """Unit, resize rule, rate and names that config.json does not say."""
    (broken / "embodiment.yaml").write_text(
        "base: so101\nunit: degrees\nfps: 15\nresize: pad\nprompt: pick it up\n"
        "cameras:\n  top: {feature: observation.images.front, resize: crop}\n"
    )
    spec = load_policy(broken, device="cpu").spec
    assert (spec.unit, spec.fps, spec.default_prompt) == ("degrees", 15.0, "pick it up")
    assert [(camera.name, camera.resize) for camera in spec.cameras] == [("top", "crop"), ("wrist", "pad")]
    flags = load_policy(broken, device="cpu", unit="rad", resize="stretch", prompt="lift").spec
    assert (flags.unit, flags.default_prompt) == ("rad", "lift")
    assert {camera.resize for camera in flags.cameras} == {"stretch"}


def test_importing_the_loader_is_light():
    """`serve_policy --help` imports this module: no torch, and no LeRobot."""
    code = (
        "import sys; import grasp_cube.policies.load; "
        "print(sorted({'torch', 'lerobot', 'transformers', 'cv2', 'draccus'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
