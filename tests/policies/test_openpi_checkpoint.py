"""Checkpoints in openpi's layouts, served without openpi and converted: equal to openpi's arithmetic done by hand."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from env_client.wire import RtcPrefix
from openpi_checkpoints import FULL_SIZE, Leaf, jax_shapes, load_openpi, tiny_model
from serving_parts import client, serving

from grasp_cube.convert_checkpoint import ConvertConfig, convert
from grasp_cube.policies.load import load_policy

HORIZON = 8


def aloha(seed: int = 0) -> dict:
    """As openpi's ALOHA client sends it, without the right wrist's camera."""
    random = np.random.default_rng(seed)
    images = {
        name: random.integers(0, 256, (3, 240, 320), np.uint8) for name in ("cam_high", "cam_left_wrist")
    }
    state = random.uniform(-1.5, 1.5, 14)
    state[[6, 13]] = [0.2, 0.9]
    return {"images": images, "state": state, "prompt": " uncap_the\npen"}


def libero(seed: int = 0) -> dict:
    """As openpi's LIBERO client sends it."""
    random = np.random.default_rng(seed)
    image, wrist = random.integers(0, 256, (2, 256, 256, 3), np.uint8)
    state = random.uniform(-2.5, 2.5, 8)
    return {
        "observation/image": image,
        "observation/wrist_image": wrist,
        "observation/state": state,
        "prompt": "put_it away ",
    }


class ByHand:
    """openpi's transforms as published, one observation at a time, around the flow model alone."""

    def __init__(self, folder: Path, kind: str, asset_id: str):
        from transformers import AutoTokenizer

        self.kind = kind
        self.model = tiny_model(kind, 5).eval()
        self.model.config.chunk_size = HORIZON
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
        stats = json.loads((folder / "assets" / asset_id / "norm_stats.json").read_text())["norm_stats"]
        self.stats = {name: {k: np.array(v) for k, v in group.items()} for name, group in stats.items()}

    def normal(self, state: np.ndarray) -> np.ndarray:
        s = self.stats["state"]
        if self.kind == "pi0":
            return (state - s["mean"]) / (s["std"] + 1e-6)
        return (state - s["q01"]) / (s["q99"] - s["q01"] + 1e-6) * 2 - 1

    def robot(self, actions: np.ndarray) -> np.ndarray:
        s = self.stats["actions"]
        if self.kind == "pi0":
            return actions * (s["std"] + 1e-6) + s["mean"]
        return (actions + 1) / 2 * (s["q99"] - s["q01"] + 1e-6) + s["q01"]

    def text(self, prompt: str, normal: np.ndarray, state_in_prompt: bool) -> str:
        cleaned = prompt.strip().replace("_", " ").replace("\n", " ")
        if not state_in_prompt:
            return cleaned + "\n"
        # 256 equal bins from -1 to 1; below is -1, above is 255.
        bins = [min(255, max(-1, math.floor((x + 1) * 128))) for x in normal]
        return f"Task: {cleaned}, State: {' '.join(map(str, bins))};\nAction: "

    def chunk(self, images, state, prompt: str, dim: int, *, state_in_prompt: bool) -> np.ndarray:
        """`images` are (H, W, 3) uint8 in the model's order, None for a missing one; the actions are not converted."""
        import torch
        from PIL import Image

        pictures, masks = [], []
        for image in images:
            canvas = Image.new("RGB", (224, 224))
            if image is not None:
                height, width = image.shape[:2]
                ratio = max(width / 224, height / 224)
                size = (int(width / ratio), int(height / ratio))
                scaled = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
                canvas.paste(scaled, (int((224 - size[0]) / 2), int((224 - size[1]) / 2)))
            pixels = np.asarray(canvas, np.float32) / 255 * 2 - 1
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            masks.append(torch.tensor([image is not None]))
        normal = self.normal(state)
        room = 48 if self.kind == "pi0" else 200
        ids = self.tokenizer(self.text(prompt, normal, state_in_prompt))["input_ids"]
        tokens = torch.zeros(1, room, dtype=torch.long)
        tokens[0, : len(ids)] = torch.tensor(ids)
        mask = torch.arange(room)[None] < len(ids)
        padded = np.zeros(32, np.float32)
        padded[: len(normal)] = normal
        noise = torch.randn((1, HORIZON, 32), generator=torch.Generator().manual_seed(3))
        inputs = [pictures, masks, tokens, mask]
        if self.kind == "pi0":
            inputs.append(torch.from_numpy(padded)[None])
        with torch.no_grad():
            actions = self.model.sample_actions(*inputs, noise=noise, num_steps=10)
        return self.robot(actions[0, :, :dim].numpy().astype(np.float64))


def test_relative_actions_of_two_arms_are_openpis(made):
    """ALOHA: flipped joints, grippers as angles, z-scores, a view that is missing, steps added to the state, and back."""
    obs = aloha()
    flip = np.array([1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1])
    state = obs["state"] * flip
    for i in (6, 13):
        finger = obs["state"][i] * (0.058 - 0.01844) + 0.01844
        angle = math.asin((0.022**2 + finger**2 - 0.036**2) / (2 * 0.022 * finger))
        state[i] = (angle - 0.5476) / (1.6296 - 0.5476)
    images = [obs["images"][name].transpose(1, 2, 0) for name in ("cam_high", "cam_left_wrist")]
    hand = ByHand(made / "pi0", "pi0", "trossen")
    expected = hand.chunk([*images, None], state, obs["prompt"], 14, state_in_prompt=False)
    relative = np.array([True] * 6 + [False] + [True] * 6 + [False])
    expected += np.where(relative, state, 0)
    expected *= flip
    expected[:, [6, 13]] = (expected[:, [6, 13]] + 0.5476 + 0.6213) / (1.4910 + 0.6213)
    policy = load_openpi(made, "pi0", "pi0")
    np.testing.assert_allclose(policy.get_actions(obs), expected, atol=1e-4)
    assert policy.spec.type == "pi0"
    assert policy.spec.action_names[6] == "left_gripper"
    # Our own client's spelling is the same observation.
    ours = {"images": {}, "states": {"arms": obs["state"].astype(np.float32)}, "task": obs["prompt"]}
    ours["images"] = {name: np.ascontiguousarray(i.transpose(1, 2, 0)) for name, i in obs["images"].items()}
    np.testing.assert_allclose(policy.get_actions(ours), expected, atol=1e-4)


@pytest.mark.parametrize("settings", ["pi05", "silent"])
def test_actions_of_one_arm_are_openpis(made, settings):
    """LIBERO: quantiles that are not clipped, the state as text or not at all, two views of three."""
    obs = libero()
    hand = ByHand(made / "pi05", "pi05", "me/cubes")
    expected = hand.chunk(
        [obs["observation/image"], obs["observation/wrist_image"], None],
        obs["observation/state"],
        obs["prompt"],
        7,
        state_in_prompt=settings == "pi05",
    )
    policy = load_openpi(made, "pi05", settings)
    np.testing.assert_allclose(policy.get_actions(obs), expected, atol=1e-4)
    nested = {
        "prompt": obs["prompt"],
        "observation": {k.split("/")[1]: v for k, v in obs.items() if "/" in k},
    }
    np.testing.assert_array_equal(policy.get_actions(nested), policy.get_actions(obs))


def test_the_prompts_text(made):
    """Pi0: the cleaned prompt and a line break. Pi0.5: bins of 1/128, numbered from -1 below to 255."""
    hand = ByHand(made / "pi05", "pi05", "me/cubes")
    normal = np.array([-1.1, -1.0, -0.9999, 0.0, 0.5, 0.9999, 1.0, 9.0])
    text = hand.text(" uncap_the\npen ", normal, True)
    assert text == "Task: uncap the pen, State: -1 0 0 128 192 255 255 255;\nAction: "
    assert hand.text(" uncap_the\npen ", normal, False) == "uncap the pen\n"
    s = hand.stats["state"]
    state = (normal + 1) / 2 * (s["q99"] - s["q01"] + 1e-6) + s["q01"]
    # Half a bin off the edges, where single and double precision agree.
    state += 0.5 / 256 * (s["q99"] - s["q01"])
    policy = load_openpi(made, "pi05", "pi05")
    obs = libero() | {"observation/state": state, "prompt": " uncap_the\npen "}
    said = []
    tokens = next(step for step in policy._preprocessor.steps if hasattr(step, "input_tokenizer"))
    inner = tokens.input_tokenizer
    tokens.input_tokenizer = lambda texts, **options: said.extend(texts) or inner(texts, **options)
    policy.get_actions(obs)
    assert said == ["Task: uncap the pen, State: -1 0 0 128 192 255 255 255;\nAction: "]


def test_jax_parameters_give_the_same_chunk(made):
    """The same weights in both layouts, each served as it lies there."""
    chunks = [load_openpi(made, name, "pi05").get_actions(libero()) for name in ("pi05", "pi05_jax")]
    np.testing.assert_allclose(*chunks, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "obs"),
    [("pi0", "pi0", aloha()), ("pi05", "silent", libero()), ("pi05_jax", "pi05", libero())],
)
def test_the_same_chunk_before_and_after_conversion(made, tmp_path, name, settings, obs):
    """Through the command's own function; OUT needs no flag, serves both clients, and its tensors are all there."""
    before = load_openpi(made, name, settings).get_actions(obs)
    out = convert(
        ConvertConfig(str(made / name), str(tmp_path / "out"), config_name=str(made / f"{settings}.yaml"))
    )
    after = load_policy(out, device="cpu", noise_seed=3, optimize="none")
    np.testing.assert_allclose(after.get_actions(obs), before, atol=1e-6)
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(("kind", "tensors"), [("pi0", 778), ("pi05", 813)])
def test_the_full_size_has_a_place_for_every_parameter(kind, tensors):
    """openpi's published sizes against LeRobot's model of four billion parameters, by names and shapes alone."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0 import PI0Config
    from lerobot.policies.pi05 import PI05Config

    from grasp_cube.policies.openpi_jax import JaxTensors
    from grasp_cube.policies.pi_model import check_names, empty_pi

    leaves = {name: Leaf(shape) for name, shape in jax_shapes(kind, **FULL_SIZE).items()}
    source = JaxTensors(leaves, lambda name: pytest.fail(f"{name} was read"), "full size")
    inputs = {"observation.images.base_0_rgb": PolicyFeature(FeatureType.VISUAL, (3, 224, 224))}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (32,))}
    config = (PI05Config if kind == "pi05" else PI0Config)(
        device="cpu", input_features=inputs, output_features=outputs
    )
    assert len(check_names(empty_pi(config).state_dict(), source, "full size")) == tensors


def test_every_tensor_arrives_unchanged(made, tmp_path):
    """Each of openpi's, under LeRobot's name, in its own precision; bfloat16 as well."""
    import torch
    from safetensors.torch import load_file, save_file

    half = Path(shutil.copytree(made / "pi05", tmp_path / "half"))
    theirs = {name: value.bfloat16() for name, value in load_file(half / "model.safetensors").items()}
    save_file(theirs, half / "model.safetensors")
    out = convert(ConvertConfig(str(half), str(tmp_path / "out"), config_name=str(made / "pi05.yaml")))
    ours = load_file(out / "model.safetensors")
    assert {f"model.{name}" for name in theirs} <= set(ours)
    for name, value in ours.items():
        # openpi's file holds the word embedding under one of its two names.
        inner = name.removeprefix("model.")
        inner = inner if inner in theirs else "paligemma_with_expert.paligemma.lm_head.weight"
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, theirs[inner]), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_real_time_chunking_continues_relative_actions(made):
    """The actions that are still to be executed come in the robot's values: through the gripper's curve, the flipped
    joints, the state they are relative to, and the statistics; where the prefix holds they come back as they went."""
    obs = aloha()
    policy = load_openpi(made, "pi0", "pi0", rtc="prefix")
    last = policy.get_actions(aloha(seed=9))
    rtc = RtcPrefix(last[2:], delay=3, mask_end=6)
    chunk = policy.get_actions(obs, rtc=rtc)
    np.testing.assert_allclose(chunk[:3], last[2:5], atol=1e-4)
    assert np.abs(policy.get_actions(obs)[:3] - last[2:5]).max() > 0.05


def test_plain_lerobot_loads_what_was_converted(made, tmp_path):
    """LeRobot alone, strictly, with its own processors: the same actions from an image of the model's size."""
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    from grasp_cube.policies.pi_tiny import TinyPI05Policy

    out = convert(
        ConvertConfig(str(made / "pi05"), str(tmp_path / "out"), config_name=str(made / "pi05.yaml"))
    )
    config = PreTrainedConfig.from_pretrained(out)
    from lerobot.policies.pretrained import PreTrainedPolicy

    policy = PreTrainedPolicy.from_pretrained.__func__(TinyPI05Policy, out, config=config, strict=True)
    pre, post = make_pre_post_processors(config, pretrained_path=str(out))
    random = np.random.default_rng(2)
    pixels = random.integers(0, 256, (2, 224, 224, 3), np.uint8)
    state = random.uniform(-2, 2, 8).astype(np.float32)
    names = ("image", "wrist_image")
    frame = {
        f"observation.images.{name}": torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        for name, image in zip(names, pixels, strict=True)
    }
    frame |= {"observation.state": torch.from_numpy(state)[None], "task": "go"}
    noise = torch.randn((1, HORIZON, 32), generator=torch.Generator().manual_seed(3))
    theirs = post(policy.predict_action_chunk(pre(frame), noise=noise))[0].numpy()
    obs = {"images": dict(zip(names, pixels, strict=True)), "states": {"end_effector": state}, "prompt": "go"}
    ours = load_policy(out, device="cpu", noise_seed=3, optimize="none").get_actions(obs)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
def test_served_by_the_command_over_the_wire(made):
    """openpi's client's own observation to the real server, the same chunk as in-process."""
    flags = ("--policy.type", "openpi", "--policy.config_name", made / "pi05.yaml", "--device", "cpu")
    more = ("--policy.path", made / "pi05", "--policy.noise_seed", 3, "--policy.optimize", "none")
    expected = load_openpi(made, "pi05", "pi05").get_actions(libero())
    with serving(*flags, *more) as (server, port), client(port) as policy:
        np.testing.assert_allclose(policy.infer(libero())["actions"], expected, atol=1e-5)
        assert "statistics of me/cubes" in server.output
        assert policy.spec.cameras[0].resize == "openpi"
