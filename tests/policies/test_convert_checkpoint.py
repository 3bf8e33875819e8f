"""The command convert_checkpoint, and the file that it writes tensor by tensor."""

import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
from openpi_checkpoints import save_openpi

from grasp_cube.convert_checkpoint import main
from grasp_cube.policies.policy import PolicyError
from grasp_cube.policies.tensor_file import write_tensors


class Source:
    """Tensors made when they are asked for; remembers how many of them lived at once."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str = "float32", value: float = 1.5):
        self.shapes, self._dtype, self._value = shapes, dtype, value
        self._alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def keys(self):
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        return self._dtype

    def get(self, name: str):
        import torch

        value = torch.full(self.shapes[name], self._value, dtype=getattr(torch, self._dtype))
        self._alive.add(value)
        self.most = max(self.most, len(self._alive))
        return value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_what_the_library_reads(tmp_path, dtype):
    """Names, shapes, scalars, empty tensors; at most one tensor more than the one that is written is ever alive."""
    from safetensors.torch import load_file

    shapes = {"a": (3, 5), "b": (), "nothing": (0, 4), "c": (2, 3, 4), "d": (7,)}
    source = Source(shapes, dtype)
    size = write_tensors(tmp_path / "x.safetensors", source, {f"model.{name}": name for name in shapes})
    found = load_file(tmp_path / "x.safetensors")
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        f"model.{name}": shape for name, shape in shapes.items()
    }
    assert all((value == 1.5).all() and str(value.dtype).endswith(dtype) for value in found.values())
    assert size == sum(value.numel() * value.element_size() for value in found.values())
    assert source.most <= 2
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_unfinished_file_never_gets_its_name(tmp_path):
    """Values that are not finite, a type that is no weight's, a folder that is not there."""
    with pytest.raises(PolicyError, match=r"tensor a .* not finite"):
        write_tensors(tmp_path / "x.safetensors", Source({"a": (2,)}, value=float("nan")), {"a": "a"})
    with pytest.raises(PolicyError, match="tensor a is int64"):
        write_tensors(tmp_path / "x.safetensors", Source({"a": (2,)}, "int64"), {"a": "a"})
    with pytest.raises(PolicyError, match="cannot be written"):
        write_tensors(tmp_path / "no" / "x.safetensors", Source({"a": (2,)}), {"a": "a"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--from", "lerobot", "x", "--to", "lerobot", "y"), "--from lerobot .* `--from openpi FOLDER`"),
        (("--from", "openpi", "x", "--to", "onnx", "y"), "--to onnx .* `--to lerobot FOLDER`"),
        (("--from", "openpi", "x"), "to-lerobot"),
        (("--from", "openpi", "/nowhere", "--to", "lerobot", "y"), "no folder /nowhere"),
        (("--from", "openpi", ".", "--to", "lerobot", "/tmp"), "/tmp exists already"),
    ],
)
def test_a_wrong_line_is_one_sentence(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(words, said), said


@pytest.mark.slow
def test_the_command_from_jax_parameters(tmp_path, one_thread, capsys):
    """A training run of one's own, with its own config, by its command line."""
    source = save_openpi(tmp_path / "run", "pi05", layout="jax", trained=True, dim=6, asset_id="me/arm")
    settings = "{model: tiny_pi05, embodiment: so101, asset_id: me/arm, horizon: 12, delta: [5, -1]}"
    (tmp_path / "mine.yaml").write_text(settings)
    out = tmp_path / "deep" / "out"
    line = ("--from", "openpi", source, "--to", "lerobot", out, "--config-name", tmp_path / "mine.yaml")
    main([*map(str, line), "--prompt", "pick up the cube"])
    said = capsys.readouterr().out
    assert "none missing and none left over" in said
    assert f"serve_policy --policy.path {out}" in said
    config = json.loads((out / "config.json").read_text())
    assert config["chunk_size"] == 12
    assert config["use_relative_actions"]
    assert config["relative_exclude_joints"] == ["gripper.pos"]
    from grasp_cube.policies.load import load_policy

    policy = load_policy(out, device="cpu", noise_seed=1)
    assert policy.spec.default_prompt == "pick up the cube"
    assert [camera.name for camera in policy.spec.cameras] == ["front", "wrist"]
    image = np.zeros((48, 64, 3), np.uint8)
    obs = {"images": {"front": image, "wrist": image}, "states": {"arm": np.zeros(6, np.float32)}}
    assert policy.get_actions(obs).shape == (12, 6)
    assert Path(out / "tokenizer" / "tokenizer.json").is_file()
