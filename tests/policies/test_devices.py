"""The device: what was asked for or a refusal, never a silent fallback."""

import pytest
import torch

from grasp_cube.policies.devices import choose_device, describe_device
from grasp_cube.policies.policy import PolicyError


def machine(monkeypatch, gpus: int, mps: bool = False) -> None:
    """Let torch report this hardware."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("gpus", "mps", "wanted", "given"),
    [
        (0, False, None, "cpu"),
        (0, True, None, "mps"),
        (2, True, None, "cuda"),
        (2, False, "cuda:1", "cuda:1"),
    ],
)
def test_the_best_device_or_the_one_asked_for(monkeypatch, gpus, mps, wanted, given):
    machine(monkeypatch, gpus, mps)
    assert str(choose_device(wanted)) == given


@pytest.mark.parametrize(
    ("gpus", "wanted", "words"),
    [
        (0, "cuda", "--device cpu"),
        (2, "cuda:2", r"2 GPU\(s\)"),
        (0, "mps", "--device cpu"),
        (0, "gpu", "cpu, cuda, cuda:0 or mps"),
        (0, "meta", "cpu, cuda, cuda:0 or mps"),
    ],
)
def test_what_is_not_there_is_refused(monkeypatch, gpus, wanted, words):
    machine(monkeypatch, gpus)
    with pytest.raises(PolicyError, match=words):
        choose_device(wanted)


def test_it_is_named_in_words():
    assert "threads" in describe_device(choose_device("cpu"))
