"""`serve_policy` on a device with little memory: `python short_of_memory.py FITS serve_policy's flags`.

The models are real. Each forward of more than FITS observations raises the error that torch raises when a GPU is full.
"""

import sys

import torch

FITS = int(sys.argv.pop(1))


def check_memory(module: torch.nn.Module, inputs: tuple) -> None:
    size = next((value.shape[0] for value in inputs if isinstance(value, torch.Tensor)), 0)
    if type(module).__name__ == "Conv2d" and size > FITS:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


torch.nn.modules.module.register_module_forward_pre_hook(check_memory)

from grasp_cube.serve_policy import main  # noqa: E402

main()
