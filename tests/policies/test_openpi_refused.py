"""Checkpoints in openpi's layouts that are damaged, or do not fit what was said of them: refused, with what to do."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from openpi_checkpoints import load_openpi
from processes import running

from grasp_cube.convert_checkpoint import ConvertConfig, convert
from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import PolicyError


def broken(made: Path, folder: Path, how: str) -> Path:
    """A copy of the pi05 checkpoint, damaged."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(made / "pi05", folder)
    weights, stats = folder / "model.safetensors", folder / "assets" / "me" / "cubes" / "norm_stats.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how in ("missing", "extra", "shape", "nan", "lerobot"):
        tensors = load_file(weights)
        if how == "missing":
            del tensors["time_mlp_out.bias"]
        elif how == "extra":
            tensors["state_proj.weight"] = torch.zeros(2, 2)
        elif how == "shape":
            tensors["time_mlp_in.weight"] = torch.zeros(3, 3)
        elif how == "nan":
            tensors["time_mlp_in.weight"][0, 0] = math.nan
        else:
            tensors = {f"model.{name}": value for name, value in tensors.items()}
        save_file(tensors, weights)
    elif how == "no stats":
        shutil.rmtree(folder / "assets")
    elif how == "json":
        stats.write_text("{")
    elif how == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif how == "no weights":
        weights.unlink()
    return folder


BROKEN = [
    ("truncated", "truncated or damaged"),
    ("missing", r"1 missing \(model\.time_mlp_out\.bias\)"),
    ("extra", r"1 extra \(state_proj\.weight\)"),
    ("shape", r"time_mlp_in\.weight .* \[3, 3\].* \[64, 64\]"),
    ("nan", r"time_mlp_in\.weight .* not finite"),
    ("lerobot", "leave --policy.type out"),
    ("no stats", "no assets/<asset id>/norm_stats.json"),
    ("json", "not readable JSON"),
    ("no tokenizer", r"tokenizer is not on this machine.*--policy.tokenizer_path"),
    ("no weights", "neither model.safetensors nor params/"),
]


@pytest.mark.parametrize(("how", "words"), BROKEN)
def test_broken_checkpoints_are_refused(made, tmp_path, monkeypatch, how, words):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    folder = broken(made, tmp_path / "broken", how)
    with pytest.raises(PolicyError, match=words) as error:
        load_openpi(made, str(folder), "pi05")
    assert "\n" not in str(error.value)
    out = tmp_path / "out"
    with pytest.raises(PolicyError, match=words):
        convert(ConvertConfig(str(folder), str(out), config_name=str(made / "pi05.yaml")))
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_server_refuses_before_it_listens(made, tmp_path):
    """One of them through the command: one sentence, exit code 2, no port."""
    folder = broken(made, tmp_path / "broken", "no stats")
    flags = ["--policy.type", "openpi", "--policy.config_name", made / "pi05.yaml", "--policy.path", folder]
    with running(sys.executable, "-m", "grasp_cube.serve_policy", *flags, "--port", "0") as server:
        server.wait_for("serve_policy: .*norm_stats.json")
        assert server.process.wait(20) == 2
        assert "Waiting for" not in server.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"asset_id": "droid"}, r"'droid' is not in .* one of me/cubes"),
        ({"config_name": "pi0_aloha"}, "of pi0, but the tensors .* pi05"),
        ({"config_name": "pi05_libro"}, "did you mean pi05_libero"),
        ({"config_name": None}, "which robot .* --policy.config_name"),
        (
            {"config_name": None, "embodiment": "libero"},
            "relative to the state is not known: .*--policy.config_name",
        ),
        ({"config_name": None, "embodiment": "{delta}"}, "how many actions .* --policy.config_name"),
        ({"embodiment": "droid"}, "of state .* 8 values|of actions .* 7 values"),
        ({"embodiment": "{no_slot}"}, "no camera .* has a slot"),
        ({"embodiment": "{wide}"}, "40 action values.* at most 32"),
        ({"n_action_steps": 9}, "n_action_steps is 9.* at most 8"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_what_does_not_belong_together_is_told_with_the_flag(made, tmp_path, changes, words):
    (tmp_path / "delta.yaml").write_text("base: libero\ndelta: [6, -1]\n")
    (tmp_path / "no_slot.yaml").write_text(
        "base: libero\ncameras: {image: false, wrist_image: false, top: {}}\n"
    )
    names = ", ".join(f"a{i}" for i in range(40))
    (tmp_path / "wide.yaml").write_text(f"base: libero\naction_names: [{names}]\n")
    if str(changes.get("embodiment", "")).startswith("{"):
        changes = changes | {"embodiment": str(tmp_path / f"{changes['embodiment'].strip('{}')}.yaml")}
    with pytest.raises(PolicyError, match=words):
        load_openpi(made, "pi05", "pi05", **changes)


def test_openpis_own_config_json_says_the_horizon(made, tmp_path):
    """openpi's converter writes one, without a type: the horizon is taken from it, and compared."""
    folder = Path(shutil.copytree(made / "pi05", tmp_path / "converted"))
    (folder / "config.json").write_text(
        json.dumps({"action_dim": 32, "action_horizon": 8, "precision": "float32"})
    )
    (tmp_path / "mine.yaml").write_text("{model: tiny_pi05, embodiment: libero, delta: []}")
    policy = load_openpi(made, str(folder), "pi05", config_name=str(tmp_path / "mine.yaml"))
    assert policy.spec.horizon == 8
    (folder / "config.json").write_text(json.dumps({"action_horizon": 16}))
    with pytest.raises(PolicyError, match=r"chunks of 8 actions, but .* says 16"):
        load_openpi(made, str(folder), "pi05")


def test_the_loader_points_to_the_flag(made):
    with pytest.raises(PolicyError, match=r"--policy\.type openpi --policy\.config_name"):
        load_policy(made / "pi05")
