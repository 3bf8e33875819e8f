"""Pi0 and Pi0.5 in this process: batches, speed-ups, real-time chunking, and every broken checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from env_client.wire import InvalidInput, RtcPrefix
from pi_reference import PATIENCE_S, PiReference, pi_observation
from processes import ROOT
from safetensors.torch import load_file, save_file

from grasp_cube import tiny_checkpoint
from grasp_cube.policies.load import load_policy
from grasp_cube.policies.policy import PolicyError, PolicyRequest
from grasp_cube.tiny_checkpoint import make_tiny_checkpoint

SEED = 7
KINDS = ("pi0", "pi05")
UNIT = 60  # of the robot, in one normalised value


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, one_thread) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pi")
    return {kind: make_tiny_checkpoint(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def plain(checkpoints):
    """LeRobot's arithmetic."""
    return {kind: opened(folder, optimize="none") for kind, folder in checkpoints.items()}


@pytest.fixture(scope="module")
def fast(checkpoints):
    return {kind: opened(folder) for kind, folder in checkpoints.items()}


def opened(folder: Path, **options):
    return load_policy(folder, **({"device": "cpu", "noise_seed": SEED} | options))


def rest(seed: int, rows: int = 40) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).normal(0, 2, (rows, 6)), axis=0).astype(np.float32)


# ------------------------------------------------------------------------------------- batches and speed


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_changes_nobodys_answer(kind, plain, fast):
    """Prompts of different length, with and without LeRobot's arithmetic: to 1e-5 normalised."""
    requests = [
        PolicyRequest(pi_observation(1, "lift")),
        PolicyRequest(
            pi_observation(2, "put every single cube into the box on the left hand side of the table")
        ),
        PolicyRequest(pi_observation(3), prompt="sort"),
    ]
    for policy in (plain[kind], fast[kind]):
        assert len({policy.check(request) for request in requests}) == 1
        alone = [policy.get_actions_batch([request])[0] for request in requests]
        for one, other in zip(policy.get_actions_batch(requests), alone, strict=True):
            np.testing.assert_allclose(one, other, atol=UNIT * 1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rtc", ["guided", "prefix"])
def test_the_speed_ups_change_nothing(kind, rtc, checkpoints):
    """Alone, without a camera, and continuing a chunk: to 1e-4 normalised of LeRobot's arithmetic."""
    exact, quick = (opened(checkpoints[kind], optimize=optimize, rtc=rtc) for optimize in ("none", "auto"))
    for obs in (pi_observation(1), pi_observation(2, cameras=("front",))):
        for prefix in (None, RtcPrefix(rest(1), 5, 25), RtcPrefix(rest(2, 12), 12, 30)):
            np.testing.assert_allclose(
                quick.get_actions(obs, rtc=prefix),
                exact.get_actions(obs, rtc=prefix),
                atol=UNIT * 1e-4,
                rtol=1e-4,
            )


def test_bfloat16_is_lerobots_own(checkpoints):
    """The same weights in the same precision: vision and norms stay in float32, and the answers are equal."""
    policy = opened(checkpoints["pi05"], optimize="none", dtype="bfloat16")
    reference = PiReference(checkpoints["pi05"], dtype="bfloat16")
    kinds = {parameter.dtype for parameter in policy._model.parameters()}
    assert kinds == {torch.float32, torch.bfloat16}
    obs = pi_observation(1)
    np.testing.assert_allclose(policy.get_actions(obs), reference.chunk(obs, SEED), atol=UNIT * 1e-4, rtol=0)


def test_steps_of_denoising_and_rows_of_a_chunk_are_options(checkpoints):
    policy = opened(checkpoints["pi0"], num_inference_steps=2, n_action_steps=9)
    assert policy.get_actions(pi_observation(1)).shape == (9, 6)
    assert (
        np.abs(
            policy.get_actions(pi_observation(1))
            - opened(checkpoints["pi0"]).get_actions(pi_observation(1))[:9]
        ).max()
        > 0.1
    )


def test_noise_is_fresh_unless_a_seed_is_given(checkpoints, fast):
    policy = load_policy(checkpoints["pi0"], device="cpu")
    assert np.abs(policy.get_actions(pi_observation(1)) - policy.get_actions(pi_observation(1))).max() > 1e-3
    same = [fast["pi0"].get_actions(pi_observation(1)) for _ in range(2)]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_comes_leaves_its_mark(kind, fast):
    """Prompt, state and each image move the actions, so the equalities above are not those of constants."""
    base = pi_observation(1)
    other = pi_observation(2)
    chunk = fast[kind].get_actions(base)
    for changed in (
        base | {"task": "sort the cubes by color"},
        base | {"states": other["states"]},
        base | {"images": base["images"] | {"front": other["images"]["front"]}},
        base | {"images": base["images"] | {"wrist": other["images"]["wrist"]}},
    ):
        assert np.abs(fast[kind].get_actions(changed) - chunk).max() > 0.05


def test_prompt_of_the_request_then_of_the_server(checkpoints):
    policy = opened(checkpoints["pi0"], prompt="lift up the red cube")
    silent = {key: value for key, value in pi_observation(1).items() if key != "task"}
    np.testing.assert_array_equal(policy.get_actions(silent), policy.get_actions(pi_observation(1)))
    assert np.abs(policy.get_actions(silent, prompt="sort") - policy.get_actions(silent)).max() > 0.05


def test_the_command_makes_one_for_any_robot(tmp_path, capsys):
    """Three cameras and 22 actions, as an Astribot S1 has; a second time into the same folder is refused."""
    command = ["--type", "pi05", str(tmp_path / "s1"), "--cameras", "head,left_wrist,right_wrist"]
    command += ["--action-dim", "22", "--chunk-size", "10", "--span", "1"]
    tiny_checkpoint.main(command)
    assert "✓" in capsys.readouterr().out
    policy = opened(tmp_path / "s1")
    cameras = ("head", "left_wrist", "right_wrist")
    assert tuple(camera.name for camera in policy.spec.cameras) == cameras
    obs = pi_observation(1, cameras=cameras, dim=22)
    assert policy.get_actions(obs | {"states": obs["states"]["arm"] / 60}).shape == (10, 22)
    assert sum(p.numel() for p in policy._model.parameters()) < 500_000
    with pytest.raises(SystemExit) as ended:
        tiny_checkpoint.main(command)
    assert ended.value.code == 2
    assert "exists already" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- real-time chunking


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_holds_the_first_rows_exactly(kind, fast, plain):
    for policy in (fast[kind], plain[kind]):
        left = rest(4)
        chunk = policy.get_actions(pi_observation(1), rtc=RtcPrefix(left, 6, 25))
        np.testing.assert_allclose(chunk[:6], left[:6], atol=UNIT * 1e-5, rtol=1e-5)


def test_relative_actions_are_anchored_anew(tmp_path):
    """A prefix in robot units means the same positions whatever state the new chunk starts from."""
    policy = opened(make_tiny_checkpoint(tmp_path / "relative", "pi0", use_relative_actions=True))
    left = rest(5)
    for seed in (1, 2):
        chunk = policy.get_actions(pi_observation(seed), rtc=RtcPrefix(left, 6, 25))
        np.testing.assert_allclose(chunk[:6], left[:6], atol=UNIT * 1e-5, rtol=1e-5)


def test_only_equal_prefixes_share_a_batch(fast):
    obs, check = pi_observation(1), fast["pi0"].check
    group = check(PolicyRequest(obs, rtc=RtcPrefix(rest(1), 5, 25)))
    assert group == check(PolicyRequest(pi_observation(2), rtc=RtcPrefix(rest(2), 5, 25)))
    for other in (None, RtcPrefix(rest(1), 4, 25), RtcPrefix(rest(1), 5, 24), RtcPrefix(rest(1, 20), 5, 25)):
        assert group != check(PolicyRequest(obs, rtc=other))
    assert group != check(PolicyRequest(pi_observation(1, cameras=("front",)), rtc=RtcPrefix(rest(1), 5, 25)))


def test_one_denoising_step_cannot_follow(checkpoints):
    policy = opened(checkpoints["pi0"], num_inference_steps=1)
    assert not policy.spec.supports_rtc
    with pytest.raises(InvalidInput, match="denoises in one step"):
        policy.get_actions(pi_observation(1), rtc=RtcPrefix(rest(1), 5, 25))
    assert "at least 2 denoising steps" in refusal(checkpoints["pi0"], num_inference_steps=1, rtc="prefix")


# ----------------------------------------------------------------------------------- broken checkpoints


def refusal(folder: Path, **options) -> str:
    """The sentence with which loading ends."""
    with pytest.raises(PolicyError) as caught:
        load_policy(folder, **({"device": "cpu"} | options))
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


@pytest.fixture
def broken(checkpoints, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoints["pi05"], tmp_path / "broken"))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.action_in_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NAME), "1 missing (model.action_in_proj.weight)"),
        (lambda t: t.update({"model.more.weight": torch.zeros(2)}), "1 extra (model.more.weight)"),
        (lambda t: t.update({NAME: t[NAME][:, :8].clone()}), "has shape [64, 8]"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int32)}), "floating-point weights were expected"),
        (lambda t: t[NAME].fill_(float("nan")), "not finite"),
    ],
    ids=["missing", "extra", "shape", "type", "nan"],
)
def test_other_tensors_than_the_configs_are_refused(change, words, broken):
    edit_tensors(broken, change)
    assert words in refusal(broken)


def test_a_head_of_another_vocabulary_is_refused(broken):
    """The heads that predict words are never used, but a wrong one means that the file is another model's."""
    name = "model.paligemma_with_expert.gemma_expert.lm_head.weight"
    edit_tensors(broken, lambda t: t.update({name: t[name][:100].clone()}))
    assert "has shape [100, 64]" in refusal(broken)


def test_one_name_for_embedding_and_head_is_enough(broken, fast):
    """Where both are one tensor, safetensors stores it under one name; openpi's own files have no prefix."""

    def rename(tensors) -> None:
        del tensors["model.paligemma_with_expert.paligemma.lm_head.weight"]
        for name in list(tensors):
            old = name.removeprefix("model.")
            # As transformers before 4.52 called PaliGemma's parts.
            old = old.replace("paligemma.model.language_model", "paligemma.language_model.model")
            old = old.replace("paligemma.model.", "paligemma.")
            tensors[old] = tensors.pop(name)
        tower = "paligemma_with_expert.paligemma.vision_tower.embeddings.position_ids"
        tensors[tower] = torch.arange(4)[None]

    edit_tensors(broken, rename)
    np.testing.assert_array_equal(
        opened(broken).get_actions(pi_observation(1)), fast["pi05"].get_actions(pi_observation(1))
    )


def test_a_truncated_file_is_refused(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "truncated or damaged" in refusal(broken)


def test_missing_stats_are_refused(broken):
    file = broken / "policy_preprocessor.json"
    values = json.loads(file.read_text())
    for step in values["steps"]:
        step.pop("state_file", None)
    file.write_text(json.dumps(values))
    assert "normalisation stats of observation.state are missing" in refusal(broken)


def test_no_tokenizer_says_where_to_put_one(broken, tmp_path, monkeypatch, checkpoints, fast):
    """Neither in the folder nor in the cache: both places are named. The flag then finds one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    shutil.rmtree(broken / "tokenizer")
    message = refusal(broken)
    assert str(broken / "tokenizer") in message
    assert "--policy.tokenizer_path" in message
    assert "is no tokenizer" in refusal(broken, tokenizer_path=str(tmp_path))
    policy = opened(broken, tokenizer_path=str(checkpoints["pi05"] / "tokenizer"))
    np.testing.assert_array_equal(
        policy.get_actions(pi_observation(1)), fast["pi05"].get_actions(pi_observation(1))
    )


def test_a_tokenizer_in_the_hub_cache_is_found(broken, tmp_path, monkeypatch):
    """As `hf download google/paligemma-3b-pt-224` leaves it."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    place = cache / "models--google--paligemma-3b-pt-224"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots").mkdir()
    shutil.move(broken / "tokenizer", place / "snapshots" / "abc")
    lines: list[str] = []
    opened(broken, report=lines.append)
    assert any("hub cache" in line for line in lines)


def test_the_checkpoints_own_tokenizer_comes_first_and_says_so(broken, checkpoints):
    lines: list[str] = []
    opened(broken, tokenizer_path=str(checkpoints["pi0"] / "tokenizer"), report=lines.append)
    assert any("the checkpoint's own; --policy.tokenizer_path" in line for line in lines)


def test_a_damaged_tokenizer_is_refused(broken):
    (broken / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "cannot be read" in refusal(broken)


def test_ids_beyond_the_vocabulary_are_refused(broken):
    """Ordinary text with such an id means another model's tokenizer; a special mark may have one, but no prompt it."""
    file = broken / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    words = values["model"]["vocab"]
    words |= {f"word{number}": number for number in range(len(words), 512)}
    mark = {"id": 512, "content": "<image>", "special": True}
    mark |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    file.write_text(json.dumps(values | {"added_tokens": [*values["added_tokens"], mark]}))
    policy = opened(broken)
    with pytest.raises(InvalidInput, match="<image>"):
        policy.check(PolicyRequest(pi_observation(1, "look at <image>")))
    policy.check(PolicyRequest(pi_observation(1)))

    words["zebra"] = 512
    file.write_text(json.dumps(values))
    assert "has ids up to 512, but the model knows 512" in refusal(broken)


def test_options_that_mean_nothing_are_refused(checkpoints):
    folder = checkpoints["pi0"]
    assert "float32 or bfloat16" in refusal(folder, dtype="float16")
    assert "is for Diffusion" in refusal(folder, noise_scheduler="DDIM")
    assert "at most 50" in refusal(folder, n_action_steps=51)
    assert "one of guided, prefix" in refusal(folder, rtc="hard")


@pytest.mark.timeout(PATIENCE_S)
def test_the_command_refuses_with_one_sentence_before_it_listens(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    command = [sys.executable, "-m", "grasp_cube.serve_policy", "--policy.path", str(broken)]
    done = subprocess.run(
        [*command, "--host", "127.0.0.1", "--port", "0", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Waiting for client" not in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "serve_policy" in line]
    assert "truncated or damaged" in line
