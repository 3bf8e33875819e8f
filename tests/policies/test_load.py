"""Every checkpoint and option that cannot be served is refused with its own sentence, before any weight is used."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import HEIGHT, WIDTH, observation

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import PolicyError

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


def test_old_checkpoints_name_the_converter(broken):
    """Before its processors, LeRobot kept the normalisation inside the weights."""
    edit_tensors(broken, lambda t: t.update({"normalize_inputs.buffer_action.mean": torch.zeros(6)}))
    assert "migrate_policy_normalization" in refusal(broken)
    (broken / "policy_preprocessor.json").unlink()
    assert "migrate_policy_normalization" in refusal(broken)


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
    file = broken / "policy_preprocessor.json"
    renames = {"observation.images.cam": "observation.images.front"}
    edit_step(file, "rename_observations_processor", lambda step: step["config"].update(rename_map=renames))
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
