"""Pi0.5 at its full size, four billion parameters, with random weights made here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import ROOT

# What must be free: the weights in memory and in the page cache, and some air.
NEEDED_GB = 20
DISK_GB = 12

# Loads, answers once, and tells what it took; a process of its own, because a peak is a process's.
CHILD = """
import json, resource, sys
import numpy as np
from grasp_cube.policies.load import load_policy

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
policy = load_policy(sys.argv[1], dtype="bfloat16", device="cpu", num_inference_steps=2, report=print)
loaded = peak()
images = {name: np.full((224, 224, 3), 90, np.uint8) for name in ("front", "wrist")}
chunk = policy.get_actions({"images": images, "states": {"arm": np.zeros(6, np.float32)}, "task": "lift"})
held = sum(p.numel() * p.element_size() for p in policy._model.parameters())
print(json.dumps({"loaded": loaded, "answered": peak(), "held": held, "shape": chunk.shape,
                  "finite": bool(np.isfinite(chunk).all())}))
"""


def write_full_size(folder: Path) -> Path:
    """A checkpoint of type pi05 as LeRobot saves one in bfloat16; every tensor repeats one block of random values."""
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi05 import PI05Config

    from grasp_cube.policies.pi_model import empty_pi
    from grasp_cube.policies.pi_processors import pi_processors
    from grasp_cube.tiny_checkpoint import make_tiny_tokenizer

    inputs = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224))
        for name in ("front", "wrist")
    }
    config = PI05Config(
        device="cpu",
        dtype="bfloat16",
        input_features={**inputs, "observation.state": PolicyFeature(FeatureType.STATE, (6,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (6,))},
    )
    folder.mkdir()
    config._save_pretrained(folder)
    make_tiny_tokenizer(folder / "tokenizer")
    ends = {"q01": torch.full((6,), -60.0), "q99": torch.full((6,), 60.0)}
    stats = {"observation.state": ends, "action": ends}
    for processor in pi_processors(config, stats, str(folder / "tokenizer"), state_in_prompt=True):
        processor.save_pretrained(folder)

    header, at = {}, 0
    for name, value in empty_pi(config).state_dict().items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(value.shape),
            "data_offsets": [at, at + 2 * value.numel()],
        }
        at += 2 * value.numel()
    text = json.dumps(header).encode()
    block = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    data = memoryview(block.view(torch.uint8).numpy())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while at:
            at -= file.write(data[: min(at, len(data))])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    psutil.virtual_memory().total < NEEDED_GB * 2**30, reason=f"needs {NEEDED_GB} GB of memory"
)
def test_it_loads_in_bfloat16_without_a_peak_and_answers(tmp_path):
    """The most memory that the process ever had is below 1.15 times its weights, libraries and the answer included."""
    if shutil.disk_usage(tmp_path).free < DISK_GB * 2**30:
        pytest.skip(f"needs {DISK_GB} GB of disk")
    folder = write_full_size(tmp_path / "pi05")
    weights = (folder / "model.safetensors").stat().st_size
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder)],
            capture_output=True,
            text=True,
            timeout=1700,
            cwd=ROOT,
            check=False,
        )
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert weights > 8e9
    assert told["answered"] < 1.15 * weights, told | {"weights": weights}
    assert told["finite"]
    assert np.array_equal(told["shape"], (50, 6))
