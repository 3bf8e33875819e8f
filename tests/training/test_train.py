"""train_checkpoint: three steps, an interruption, and a folder that LeRobot loads strictly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grasp_cube.training.train import TrainConfig, main, train_checkpoint


def small(dataset: Path, out: Path, **options: Any) -> TrainConfig:
    """Three steps of two samples."""
    # One thread: models this small are no faster on two, and far slower where the machine is busy.
    usual: dict[str, Any] = {"steps": 3, "batch_size": 2, "image_size": "32x40", "width": 16, "save_every": 1}
    usual["threads"] = 1
    return TrainConfig(str(dataset), str(out), **(usual | {"precision": "float32"} | options))


@pytest.fixture(scope="module")
def act(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, dict[str, Any]]:
    """A finished ACT run and its report."""
    out = tmp_path_factory.mktemp("act") / "lift_act"
    config = small(recording, out, chunk=10, eval_dataset=str(recording))
    return config, train_checkpoint(config)


def test_the_folder_is_complete_and_small(act: tuple[TrainConfig, dict[str, Any]]) -> None:
    """Half precision on disk, no weights to fetch from a network, the embodiment beside the config."""
    from safetensors import safe_open

    out = Path(act[0].out)
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained_backbone_weights"] is None
    assert config["pretrained_path"] is None
    assert config["device"] == "cpu"
    assert config["input_features"]["observation.images.front"]["shape"] == [3, 32, 40]
    assert yaml.safe_load((out / "embodiment.yaml").read_text()) == {
        "base": "so101",
        "resize": "stretch",
        "fps": 30,
        "prompt": "lift up the red cube",
    }
    with safe_open(out / "model.safetensors", "pt") as weights:
        kinds = {str(weights.get_tensor(name).dtype) for name in weights.keys()}  # noqa: SIM118
    assert kinds == {"torch.float16"}
    assert (out / "model.safetensors").stat().st_size < 25e6
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    readme = (out / "README.md").read_text()
    assert f"uv run train_checkpoint --dataset {act[0].dataset}" in readme
    assert "| shoulder_pan.pos |" in readme


def test_what_was_saved_is_what_was_trained(act: tuple[TrainConfig, dict[str, Any]]) -> None:
    """The folder, loaded strictly, gives the actions of the policy before it was saved, to half precision."""
    error = act[1]["error"]
    assert error["half_precision"] < 0.5
    assert set(error["joints"]) == {f"{name}.pos" for name in _JOINTS}


def test_a_missing_tensor_is_an_error(act: tuple[TrainConfig, dict[str, Any]], tmp_path: Path) -> None:
    """Loading is strict: a checkpoint that lost one weight is refused."""
    import shutil

    from safetensors.torch import load_file, save_file

    from grasp_cube.training.checkpoint import load_checkpoint

    folder = tmp_path / "broken"
    shutil.copytree(act[0].out, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="Missing key"):
        load_checkpoint(folder)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    act: tuple[TrainConfig, dict[str, Any]], recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended after one of three steps and resumed, it sees the same samples and reaches the same losses and weights."""
    import torch
    from safetensors.torch import load_file

    from grasp_cube.training.trainer import Trainer

    config = small(recording, tmp_path / "again", chunk=10)
    step = Trainer._step

    def dies_at_the_second(trainer: Trainer, batch: Any) -> float:
        if len(trainer.losses) == 1:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "_step", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_checkpoint(config)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="add --resume"):
        train_checkpoint(config)
    with pytest.raises(ValueError, match="batch_size 2, this command 3"):
        train_checkpoint(dataclasses.replace(config, resume=True, batch_size=3))
    train_checkpoint(dataclasses.replace(config, resume=True))
    whole = json.loads((act[0].run / "state" / "losses.json").read_text())
    assert json.loads((config.run / "state" / "losses.json").read_text()) == pytest.approx(whole, rel=1e-4)
    # A step changes a weight by up to 2e-4.
    runs = [load_file(c.run / "state" / "policy" / "model.safetensors") for c in (act[0], config)]
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, rtol=0.0, atol=1e-6, msg=name)


def test_the_way_to_a_grasp_is_drawn_more_often(recording: Path, tmp_path: Path) -> None:
    """The two seconds before the jaws shut, three times in each pass over the frames; every other frame once."""
    from collections import Counter

    from grasp_cube.training.frames import before_grasps, load_frames
    from grasp_cube.training.trainer import Trainer

    frames = load_frames(recording, tmp_path / "frames", 32, 40, "stretch")
    stretches = before_grasps(frames)
    assert len(stretches) == len(frames.starts)
    for (first, last), start, end in zip(stretches, frames.starts, frames.ends, strict=True):
        assert start <= first < last <= end
        jaw = frames.actions[first:last, 5]
        assert jaw[0] > 35
        assert jaw[-1] < 25
        assert last - first <= 66
    trainer = Trainer(small(recording, tmp_path / "act", chunk=10, repeat_grasps=3), frames)
    drawn: Counter[int] = Counter()
    for batch in trainer._batches(0):
        drawn.update(batch)
        if drawn.total() >= len(frames.actions) + 2 * sum(last - first for first, last in stretches):
            break
    often = {frame for first, last in stretches for frame in range(first, last)}
    assert drawn == {frame: 3 if frame in often else 1 for frame in range(len(frames.actions))}


def test_a_run_ended_while_it_replaced_its_state_keeps_the_last_one(tmp_path: Path) -> None:
    """The state that was being replaced comes back; a complete one is not touched."""
    from grasp_cube.training.trainer import recover

    state, old = tmp_path / "state", tmp_path / "state.old"
    old.mkdir()
    (old / "losses.json").write_text("[1.0]")
    recover(state)
    assert (state / "losses.json").read_text() == "[1.0]"
    recover(state)
    assert not old.exists()


def test_diffusion_trains_and_loads(recording: Path, tmp_path: Path) -> None:
    """One shared encoder, DDIM, two observed ticks, under 25 MB."""
    from grasp_cube.training.checkpoint import load_checkpoint

    out = tmp_path / "lift_diffusion"
    train_checkpoint(small(recording, out, type="diffusion", steps=1, width=None))
    saved, _ = load_checkpoint(out)
    assert saved.config.noise_scheduler_type == "DDIM"
    assert saved.config.n_obs_steps == 2
    assert saved.config.n_action_steps == 16
    assert (out / "model.safetensors").stat().st_size < 25e6


def test_diffusion_on_the_eyes_of_an_act(
    act: tuple[TrainConfig, dict[str, Any]], recording: Path, tmp_path: Path
) -> None:
    """The ResNet is ACT's own and stays so; what is trained on feature maps is what is served on images."""
    import torch
    from safetensors.torch import load_file

    from grasp_cube.training.backbone import encode_features
    from grasp_cube.training.checkpoint import load_checkpoint
    from grasp_cube.training.frames import load_frames
    from grasp_cube.training.trainer import Trainer

    eyes = load_file(Path(act[0].out) / "model.safetensors")
    config = small(
        recording, tmp_path / "lift_diffusion", type="diffusion", backbone=act[0].out, augment=False, steps=1
    )
    train_checkpoint(config)
    saved, _ = load_checkpoint(Path(config.out))
    own = saved.state_dict()
    assert torch.equal(
        own["diffusion.rgb_encoder.backbone.4.0.conv1.weight"].half(),
        eyes["model.backbone.layer1.0.conv1.weight"],
    )
    assert torch.equal(
        own["diffusion.rgb_encoder.backbone.1.running_var"].half(), eyes["model.backbone.bn1.running_var"]
    )

    frames = load_frames(recording, config.run / "frames", 32, 40, "stretch")
    trainer = Trainer(config, frames)
    trainer.policy.load_state_dict(own)
    trainer.policy.eval()
    trainer.encode_frames()
    maps = trainer._processed([5, 90])
    names = list(trainer.policy_config.image_features)
    assert not any(name in maps for name in names)
    seen = trainer.processors[0](frames.batch([5, 90], [-1, 0], [0]))
    images = torch.stack([seen[name] for name in names], dim=-4)
    with torch.no_grad():
        served = trainer.policy.diffusion._prepare_global_conditioning(seen | {"observation.images": images})
        trained = encode_features(trainer.policy, maps)
    # Feature maps are kept in half precision and made in bfloat16.
    assert (served - trained).abs().max() < 0.05 * served.abs().max()


def test_eyes_that_do_not_fit_are_refused(recording: Path, tmp_path: Path) -> None:
    """No checkpoint, or options that would need the images."""
    with pytest.raises(ValueError, match="--no-augment"):
        small(recording, tmp_path / "out", type="diffusion", backbone="somewhere")
    config = small(recording, tmp_path / "out", type="diffusion", backbone=str(tmp_path), augment=False)
    with pytest.raises(ValueError, match="is no checkpoint"):
        train_checkpoint(config)


def test_the_first_half_of_the_resnet_stays_and_the_other_learns(
    act: tuple[TrainConfig, dict[str, Any]], recording: Path, tmp_path: Path
) -> None:
    """The frozen layers are those of the start, also after a resume; the loss of feature maps is that of their images."""
    import torch
    from safetensors.torch import load_file

    from grasp_cube.training.frames import load_frames
    from grasp_cube.training.losses import policy_loss
    from grasp_cube.training.trainer import Trainer

    options: dict[str, Any] = {"chunk": 10, "start_from": act[0].out, "augment": False, "freeze_stem": True}
    config = small(recording, tmp_path / "more", steps=1, eval_dataset=str(recording), **options)
    train_checkpoint(config)
    train_checkpoint(dataclasses.replace(config, steps=2, resume=True))
    before = load_file(Path(act[0].out) / "model.safetensors")
    after = load_file(Path(config.out) / "model.safetensors")
    frozen = ("conv1", "bn1", "layer1", "layer2")
    for name, tensor in before.items():
        layer = name.removeprefix("model.backbone.").split(".")[0]
        learnt = name.startswith("model.backbone.") and layer not in frozen and "conv" in name
        assert torch.equal(tensor, after[name]) or layer not in frozen, name
        assert not (learnt and torch.equal(tensor, after[name])), name

    trainer = Trainer(config, load_frames(recording, config.run / "frames", 32, 40, "stretch"))
    trainer.policy.load_state_dict(after)
    trainer.policy.train()
    images = policy_loss(trainer.policy, trainer._processed([5, 90]))
    trainer.encode_frames()
    encoded = trainer._processed([5, 90])
    assert not any(name in encoded for name in trainer.policy_config.image_features)
    # Feature maps are kept in half precision and made in bfloat16.
    assert policy_loss(trainer.policy, encoded).item() == pytest.approx(images.item(), rel=0.05)


def test_feature_maps_of_an_interrupted_run_are_made_again(
    act: tuple[TrainConfig, dict[str, Any]], recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights began to replace them and were ended: the first ones find none of theirs in their place."""
    from grasp_cube.training import backbone
    from grasp_cube.training.frames import load_frames
    from grasp_cube.training.trainer import Trainer

    options: dict[str, Any] = {"chunk": 10, "start_from": act[0].out, "augment": False, "freeze_stem": True}
    config = small(recording, tmp_path / "more", **options)
    frames = load_frames(recording, config.run / "frames", 32, 40, "stretch")

    def encoded(seed: int) -> dict[str, Any]:
        trainer = Trainer(dataclasses.replace(config, seed=seed), frames)
        trainer.encode_frames()
        assert trainer._features is not None
        return {name: maps[:3].copy() for name, maps in trainer._features.items()}

    first = encoded(0)
    fill = backbone._fill

    def dies_at_the_second(frames: Any, camera: str, *rest: Any) -> None:
        if camera != next(iter(frames.images)):
            raise KeyboardInterrupt
        fill(frames, camera, *rest)

    monkeypatch.setattr(backbone, "_fill", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        encoded(1)
    monkeypatch.undo()
    again = encoded(0)
    assert all((again[name] == maps).all() for name, maps in first.items())


def test_a_frozen_half_without_weights_to_keep_is_refused(recording: Path, tmp_path: Path) -> None:
    """Nor goes it with images that change from epoch to epoch."""
    with pytest.raises(ValueError, match="--start-from"):
        small(recording, tmp_path / "out", freeze_stem=True, augment=False)
    with pytest.raises(ValueError, match="--no-augment"):
        small(recording, tmp_path / "out", freeze_stem=True, start_from="somewhere")


def test_a_run_that_starts_from_a_checkpoint_has_its_weights_and_its_norms(
    act: tuple[TrainConfig, dict[str, Any]], recording: Path, tmp_path: Path
) -> None:
    """At a learning rate of nearly nothing the finished weights are those it started from; the README says which. Once it
    has a state of its own it needs them no more."""
    import shutil

    from safetensors.torch import load_file

    start = shutil.copytree(act[0].out, tmp_path / "start")
    options: dict[str, Any] = {"chunk": 10, "start_from": str(start), "learning_rate": 1e-12}
    config = small(recording, tmp_path / "more", steps=1, **options)
    train_checkpoint(config)
    shutil.rmtree(start)
    train_checkpoint(dataclasses.replace(config, steps=2, resume=True))
    before = load_file(Path(act[0].out) / "model.safetensors")
    after = load_file(Path(config.out) / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.float() - after[name].float()).abs().max() < 1e-3, name
    assert f"the weights of `{start}`" in (Path(config.out) / "README.md").read_text()


def test_a_start_from_another_robots_checkpoint_begins_the_robots_own_layers_anew(
    act: tuple[TrainConfig, dict[str, Any]], recording: Path, tmp_path: Path
) -> None:
    """From one arm with two cameras to two arms with three: what reads states and writes actions is new, the rest is kept."""
    from safetensors.torch import load_file

    two_arms = recording.with_name("sort")
    config = small(two_arms, tmp_path / "sort", chunk=10, start_from=act[0].out, learning_rate=1e-12, steps=1)
    train_checkpoint(config)
    before = load_file(Path(act[0].out) / "model.safetensors")
    after = load_file(Path(config.out) / "model.safetensors")
    changed = {name for name, tensor in before.items() if tensor.shape != after[name].shape}
    layers = ("encoder_robot_state_input_proj.weight", "action_head.weight", "action_head.bias")
    assert changed == {f"model.{layer}" for layer in layers}
    for name in before.keys() - changed:
        assert (before[name].float() - after[name].float()).abs().max() < 1e-3, name


def test_a_start_that_does_not_fit_is_refused(
    act: tuple[TrainConfig, dict[str, Any]], recording: Path, tmp_path: Path
) -> None:
    """No checkpoint, or one of another form."""
    with pytest.raises(ValueError, match="is no checkpoint"):
        train_checkpoint(small(recording, tmp_path / "out", start_from=str(tmp_path)))
    with pytest.raises(ValueError, match="holds another policy"):
        train_checkpoint(small(recording, tmp_path / "out", chunk=12, start_from=act[0].out))


def test_a_folder_that_is_no_dataset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command names the folder and ends with 2."""
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "is no LeRobot dataset" in capsys.readouterr().err


_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
