"""No pickle is read and no code of a checkpoint is run: watched by the interpreter's own audit events in a serving process."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from env_client.wire import RemoteError
from processes import ROOT, Running, running
from serving_parts import client

AUDITED = Path(__file__).with_name("audited_server.py")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def plant(folder: Path, mark: Path) -> None:
    """Every kind of pickle under the names that libraries look for, and code that asks to be trusted."""
    evil = pickle.dumps(Evil(mark))
    for name in (
        "pytorch_model.bin", "model.pt", "training_state.pt", "optimizer_state.pkl", "scaler.joblib",
        "policy_preprocessor_step_3_normalizer_processor.pt", "tokenizer.pkl", "adapter_model.bin",
    ):  # fmt: skip
        (folder / name).write_bytes(evil)
    np.save(folder / "stats.npy", np.array([Evil(mark)], object), allow_pickle=True)
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    named = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "code.Evil")
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": named}))


def audit(server: Running) -> list[str]:
    return [line for line in server.lines if line.startswith("AUDIT")]


def audited(*flags: object):
    command = (sys.executable, AUDITED, *map(str, flags))
    return running(*command, "--host", "127.0.0.1", "--port", "0", "--device", "cpu")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_folder_full_of_pickles_is_served_by_its_safetensors(tmp_path):
    """Loaded at the start, configured again by a client, and asked: nothing of it is unpickled or run. A step of its
    processor that would run code is refused."""
    mark, good, bad = tmp_path / "it-ran", tmp_path / "root" / "good", tmp_path / "root" / "bad"
    for folder in (good, bad):
        shutil.copytree(ROOT / "checkpoints" / "lift_act", folder)
        plant(folder, mark)
    processor = json.loads((bad / "policy_preprocessor.json").read_text())
    step = {"registry_name": "action_tokenizer_processor", "config": {"action_tokenizer_name": str(bad)}}
    processor["steps"].append(step)
    (bad / "policy_preprocessor.json").write_text(json.dumps(processor))
    with audited(tmp_path, "--policy.path", good, "--policy.root", tmp_path / "root") as server:
        port = int(server.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)", 300)[1])
        with client(port, timeout_s=120) as policy:
            assert policy.spec is not None
            cameras = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in policy.spec.cameras}
            obs = {"images": cameras, "states": {"arm": np.zeros(6, np.float32)}, "task": "lift"}
            assert np.isfinite(policy.infer(obs)["actions"]).all()
            with pytest.raises(RemoteError, match="may not choose code"):
                policy.configure(path=str(bad))
            assert np.isfinite(policy.infer(obs)["actions"]).all()
        assert audit(server) == []
    assert not mark.exists()


def test_the_watch_itself_sees_what_it_is_for(tmp_path):
    """A pickle that is read and code that is run by the same process are told."""
    mark = tmp_path / "it-ran"
    (tmp_path / "bait.pkl").write_bytes(pickle.dumps(Evil(mark)))
    (tmp_path / "grasp_cube").mkdir()
    (tmp_path / "grasp_cube" / "__init__.py").write_text("")
    (tmp_path / "grasp_cube" / "serve_policy.py").write_text(
        "import pathlib, pickle\n\n\ndef main():\n"
        f"    with open({str(tmp_path / 'bait.pkl')!r}, 'rb') as file:\n        pickle.load(file)\n"
    )
    with running(
        sys.executable, AUDITED, tmp_path, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path
    ) as process:
        process.wait_for("AUDIT pickle")
        assert process.process.wait(30) == 0
        told = [line.split()[1] for line in audit(process)]
    assert {"ran", "pickle"} <= set(told)
    assert mark.exists()
