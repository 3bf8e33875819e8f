"""`serve_fleet` as a person types it: help and mistakes, without Ray."""

from pathlib import Path

import pytest
import yaml
from env_client.cli import parse
from numpy_policy import write_checkpoint
from processes import ROOT, help_of

from grasp_cube.fleet.config import FleetConfig, GroupConfig
from grasp_cube.serve_fleet import main


def test_help_needs_nothing_heavy() -> None:
    """Help is answered without Ray, aiohttp, torch or the server's own modules."""
    said, imported = help_of("serve_fleet", "ray", "aiohttp", "torch", "lerobot", "websockets")
    assert "--surge-percent" in said
    assert imported == []


@pytest.mark.parametrize(
    ("policies", "sentence"),
    [
        ({}, "the fleet serves no policy"),
        ({"lift": {"path": "no/such/folder"}}, "is no folder"),
        ({"lift": {"path": ""}}, "policies is"),
        ({"up/down": {"path": "x"}}, "letters, digits and _ were expected"),
        ({"lift": {"path": "x", "min_replicas": 3}}, "policies is"),
        ({"lift": {"path": "x", "replicas": 3}}, "policies is"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policies: dict, sentence: str
) -> None:
    """It names what is wrong, and nothing is started."""
    config = tmp_path / "fleet.yaml"
    config.write_text(yaml.safe_dump({"policies": policies, "port": 0}))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line


def test_the_shipped_file_is_read() -> None:
    """configs/fleet.yaml names real fields, and a checkpoint that is there."""
    config = parse(FleetConfig, ["--config-path", str(ROOT / "configs" / "fleet.yaml")], prog="serve_fleet")
    config.check_paths()
    assert config.policies["lift"].flags("lift")[:2] == ["--policy.path", "lift=checkpoints/lift_act"]


def test_a_changed_checkpoint_is_another_generation(tmp_path: Path) -> None:
    """By its files, its flags and its devices, not by how many replicas there are."""
    path = str(write_checkpoint(tmp_path / "wave"))
    first = GroupConfig(path).generation()
    assert GroupConfig(path, max_replicas=5).generation() == first
    assert GroupConfig(path, gpus=0).generation() != first
    assert GroupConfig(path, arguments=("--verbose",)).generation() != first
    write_checkpoint(tmp_path / "wave", amplitude=1.0)
    assert GroupConfig(path).generation() != first
