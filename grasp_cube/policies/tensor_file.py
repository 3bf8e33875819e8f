"""Writing a safetensors file one tensor at a time: the library's own writer wants all of them in memory.

The format is a header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, place), and the values
side by side. Reading is the library's.
Error policy: `PolicyError` when the disk refuses; an unfinished file never gets its final name.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from grasp_cube.policies.pi_tensors import TensorSource
from grasp_cube.policies.policy import PolicyError

__all__ = ["write_tensors"]

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}


def write_tensors(
    file: Path,
    source: TensorSource,
    names: Mapping[str, str],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Write {name in the file: name in `source`}, in that order; the number of bytes.

    `progress` is called with the bytes that are written, and with all there are. Raises `PolicyError`.
    """
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, inner in names.items():
        shape, dtype = source.shape(inner), source.dtype(inner)
        if dtype not in _NAMES:
            raise PolicyError(f"the tensor {inner} is {dtype}; one of {', '.join(_NAMES)} was expected")
        size = _BYTES[_NAMES[dtype]]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The values begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    unfinished = file.with_name(f".{file.name}.unfinished")
    done = 0
    try:
        with open(unfinished, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for inner in names.values():
                value = source.get(inner).contiguous()
                if tuple(value.shape) != tuple(source.shape(inner)):
                    raise PolicyError(f"the tensor {inner} changed its shape while it was read")
                if not torch.isfinite(value).all():
                    raise PolicyError(
                        f"the tensor {inner} holds values that are not finite: its training diverged, or the file is damaged"
                    )
                stream.write(memoryview(value.view(-1).view(torch.uint8).numpy()))
                done += value.numel() * value.element_size()
                progress(done, at)
        os.replace(unfinished, file)
    except OSError as error:
        raise PolicyError(f"{file} cannot be written ({error.strerror or error})") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return done
