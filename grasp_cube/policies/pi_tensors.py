"""Where the weights of a Pi checkpoint come from: one tensor at a time, under LeRobot's names.

Life cycle: a `TensorSource` is opened with its metadata only; a tensor is read when it is asked for, and belongs to
whoever asked. Four billion parameters therefore pass through in the memory of the model and of one tensor.
Error policy: `PolicyError` that names the file.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from grasp_cube.policies.places import unreadable
from grasp_cube.policies.policy import PolicyError

__all__ = ["SafetensorsFile", "TensorSource"]

# The types of safetensors that weights come in, as torch names them.
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class TensorSource(Protocol):
    """Named tensors that are read one by one."""

    def keys(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """As torch names it: float32, bfloat16, … Known without reading the values."""
        ...

    def get(self, name: str) -> Any:
        """The values as a torch tensor on the CPU that nobody else holds. Raises `PolicyError`."""
        ...


class SafetensorsFile:
    """The tensors of one safetensors file.

    The values are read into memory of their own, not mapped: a file that is replaced or cut short while the server
    runs would otherwise change the weights under it, or end the process.
    """

    def __init__(self, file: Path):
        """Reads the header. Raises `PolicyError` for a file that is damaged, or shorter than its header says."""
        self.file = file
        try:
            # The library checks that the tensors lie side by side and fill the file to its end.
            with safe_open(file, framework="numpy"):
                pass
            with open(file, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                self._header: dict[str, Any] = json.loads(stream.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
            raise unreadable(
                file, f"{file} is truncated or damaged ({error}): copy the checkpoint again"
            ) from error
        self._header.pop("__metadata__", None)
        self._start = 8 + length

    def keys(self) -> Iterable[str]:
        return self._header.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> str:
        stored = self._header[name]["dtype"]
        return _TORCH_NAMES.get(stored, str(stored))

    def get(self, name: str) -> Any:
        import torch

        dtype = self.dtype(name)
        if dtype not in _TORCH_NAMES.values():
            raise PolicyError(
                f"the tensor {name} in {self.file} is {dtype}; floating-point weights were expected"
            )
        value = torch.empty(self.shape(name), dtype=getattr(torch, dtype))
        begin, _ = self._header[name]["data_offsets"]
        try:
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self._start + begin)
                left = (
                    memoryview(value.view(-1).view(torch.uint8).numpy()) if value.numel() else memoryview(b"")
                )
                while left:
                    # One call reads at most 2 GB.
                    count = stream.readinto(left)
                    if not count:
                        raise PolicyError(
                            f"{self.file} became shorter while it was read: copy the checkpoint again"
                        )
                    left = left[count:]
        except OSError as error:
            raise unreadable(self.file, f"{self.file} cannot be read ({error})") from error
        return value
