"""`serve_policy` on a device with little memory: `python short_of_memory.py FILE serve_policy's flags`.

The models are real. Each convolution of more images than the number in FILE raises the error that torch raises when a
GPU is full.
"""

import sys
from pathlib import Path

import torch

FITS = Path(sys.argv.pop(1))


def check_memory(module: torch.nn.Module, inputs: tuple) -> None:
    if isinstance(module, torch.nn.Conv2d) and inputs[0].shape[0] > int(FITS.read_text()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


torch.nn.modules.module.register_module_forward_pre_hook(check_memory)

from grasp_cube.serve_policy import main  # noqa: E402

main()
