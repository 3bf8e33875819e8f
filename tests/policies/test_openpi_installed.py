"""Where openpi is installed, its own `create_trained_policy` is called, and what its policy infers is served.

openpi cannot be installed beside LeRobot, so a stand-in with the signatures of the three functions that are called
takes its place on the child's path. It computes from what it is given, records how it was called, and fails when told.
"""

import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from env_client.wire import WireError
from processes import running
from serving_parts import client, serving

SOURCES = {
    "openpi/__init__.py": "",
    "openpi/training/__init__.py": "",
    "openpi/training/config.py": """
        from types import SimpleNamespace

        def get_config(config_name):
            if config_name == "nowhere":
                raise ValueError("Config 'nowhere' not found.")
            return SimpleNamespace(name=config_name, model=SimpleNamespace(action_horizon=4, action_dim=32))
        """,
    "openpi/policies/__init__.py": "",
    "openpi/policies/policy_config.py": """
        import json
        import pathlib

        import numpy as np

        def create_trained_policy(train_config, checkpoint_dir, *, repack_transforms=None, sample_kwargs=None,
                                  default_prompt=None, norm_stats=None, pytorch_device=None):
            folder = pathlib.Path(checkpoint_dir)
            if not (folder / "params").is_dir():
                raise FileNotFoundError(f"Model params not found at: {folder / 'params'}")
            said = dict(config=train_config.name, dir=str(folder), sample_kwargs=sample_kwargs,
                        default_prompt=default_prompt, pytorch_device=pytorch_device)
            (folder / "called.json").write_text(json.dumps(said))
            return Policy(train_config.model.action_horizon)

        class Policy:
            metadata = {"reset_pose": [0, -1.5]}

            def __init__(self, horizon):
                self._horizon = horizon

            def infer(self, obs, *, noise=None):
                if obs["prompt"] == "fail":
                    raise KeyError("observation/joint_position")
                if obs["prompt"] == "nan":
                    return {"actions": np.full((self._horizon, 14), np.nan)}
                state = np.asarray(obs["state"])
                # All that must have arrived, each in a value of its own.
                high = np.asarray(obs["images"]["cam_high"])
                assert high.shape == (3, 224, 224) and high.dtype == np.uint8, (high.shape, high.dtype)
                actions = np.tile(state, (self._horizon, 1))
                actions[:, 0] = high[0, 112, 112]
                actions[:, 1] = "cam_left_wrist" in obs["images"]
                actions[:, 2] = len(obs["prompt"])
                actions[:, 3] = 0 if noise is None else noise[0, 0]
                return {"actions": actions, "policy_timing": {"infer_ms": 1.0}}
        """,
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """The folder to put on PYTHONPATH."""
    root = tmp_path_factory.mktemp("site")
    for name, text in SOURCES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    (tmp_path / "step" / "params").mkdir(parents=True)
    return tmp_path / "step"


def observation(**changes) -> dict:
    image = np.zeros((480, 640, 3), np.uint8)
    image[..., 0] = 200
    state = np.arange(14, dtype=np.float32)
    return {"images": {"cam_high": image}, "states": {"arms": state}, "task": "uncap it"} | changes


def test_openpis_policy_is_made_and_served(stand_in, checkpoint):
    """Its arguments, its answers, a failure inside it and a chunk that is not finite; the server goes on."""
    flags = (
        "--policy.type",
        "openpi",
        "--policy.config_name",
        "pi0_aloha_towel",
        "--policy.path",
        checkpoint,
    )
    more = ("--policy.num_inference_steps", 5, "--device", "cpu", "--policy.noise_seed", 3)
    with serving(*flags, *more, PYTHONPATH=str(stand_in)) as (server, port), client(port) as policy:
        called = json.loads((checkpoint / "called.json").read_text())
        assert called == {
            "config": "pi0_aloha_towel",
            "dir": str(checkpoint),
            "sample_kwargs": {"num_steps": 5},
            "default_prompt": "fold the towel",
            "pytorch_device": "cpu",
        }
        assert policy.spec.horizon == 4
        assert policy.spec.action_dim == 14
        assert policy.spec.wants_prompt
        assert policy.metadata["reset_pose"] == [0, -1.5]
        noise = np.random.default_rng(3).standard_normal((4, 32), np.float32)
        expected = np.tile(np.arange(14, dtype=np.float32), (4, 1))
        expected[:, :4] = [200, 0, len("uncap it"), noise[0, 0]]
        np.testing.assert_array_equal(policy.infer(observation())["actions"], expected)
        # As openpi's own clients send it: channels first, the state flat.
        obs = {
            "images": {name: np.full((3, 480, 640), 9, np.uint8) for name in ("cam_high", "cam_left_wrist")},
            "state": np.arange(14, dtype=np.float64),
            "prompt": "go",
        }
        expected[:, :3] = [9, 1, len("go")]
        np.testing.assert_array_equal(policy.infer(obs)["actions"], expected)
        with pytest.raises(WireError, match="openpi failed on this observation: KeyError"):
            policy.infer(observation(task="fail"))
        with pytest.raises(WireError, match="not finite"):
            policy.infer(observation(task="nan"))
        np.testing.assert_array_equal(policy.infer(obs)["actions"], expected)
        assert "Traceback" in server.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "needs the name of the training config .* --policy.config_name"),
        (("--policy.config_name", "nowhere"), "which robot .* --policy.embodiment"),
        (
            ("--policy.config_name", "nowhere", "--policy.embodiment", "aloha"),
            "openpi cannot make a policy .* 'nowhere': ValueError: Config 'nowhere' not found",
        ),
        (
            ("--policy.config_name", "pi0_aloha"),
            "openpi cannot make a policy .* FileNotFoundError: Model params not found",
        ),
    ],
)
def test_what_openpi_cannot_make_is_one_sentence(stand_in, checkpoint, flags, words):
    (checkpoint / "params").rmdir()
    command = (
        "-m",
        "grasp_cube.serve_policy",
        "--policy.type",
        "openpi",
        "--policy.path",
        checkpoint,
        *flags,
    )
    with running(sys.executable, *command, "--port", "0", env={"PYTHONPATH": str(stand_in)}) as server:
        server.wait_for(f"serve_policy: .*{words}")
        assert server.process.wait(20) == 2
        assert "Traceback" not in server.output
