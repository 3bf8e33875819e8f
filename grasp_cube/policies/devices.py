"""The device that a policy runs on, chosen when it is loaded. Imports torch inside its functions."""

import math
import os
import sys
from pathlib import Path
from typing import Any

from grasp_cube.policies.policy import PolicyError

__all__ = ["choose_device", "describe_device", "device_memory", "free_device_cache", "is_out_of_memory"]

# How libraries that have no type for it say that memory ran out: torch on the CPU and on Apple's GPUs, cuBLAS and
# cuDNN, JAX.
_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "RESOURCE_EXHAUSTED")


def choose_device(wanted: str | None) -> Any:
    """The `torch.device` asked for, else cuda where there is one, else mps, else cpu.

    Raises `PolicyError` when it is not there, rather than falling back: a policy that is a hundred times slower
    than its operator thinks is a fault of its own.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise PolicyError(f"the device {wanted!r} is unknown: cpu, cuda, cuda:0 or mps was expected")
    if device.type == "cuda" and not cuda:
        why = "torch finds no GPU here" if torch.version.cuda else "this torch was built without CUDA"
        raise PolicyError(
            f"the device {wanted!r} is not available ({why}): use --device cpu, which is slower"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise PolicyError(
            f"the device {wanted!r} is not available: this machine has {torch.cuda.device_count()} GPU(s), "
            "numbered from 0"
        )
    if device.type == "mps" and not mps:
        raise PolicyError(f"the device {wanted!r} is not available here: use --device cpu, which is slower")
    return device


def describe_device(device: Any) -> str:
    """The device in words."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def device_memory() -> float:
    """Bytes that this process takes on its GPUs; of the machine's memory where it uses none. NaN: not known."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        return float(sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count())))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return math.nan
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an inference failed because it did not fit into memory, the device's or the machine's."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def free_device_cache() -> None:
    """Give back what torch keeps of a GPU's memory for later, so that a smaller attempt finds room in one piece."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
