"""The process's own memory."""

import ctypes
import gc
import sys

__all__ = ["give_back"]


def give_back() -> None:
    """After a policy was let go of: free what only cycles hold, and give the pages back to the system.

    What is left is not looked through again until the next time: with a model in memory that takes tenths of a second.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
