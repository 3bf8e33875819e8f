"""Pictures on their way from the control process to the sidecar, in shared memory.

The writer copies a picture behind the last one, over whatever lies there, and never waits. A message on another way
carries the picture's position; the reader copies it out and then looks whether the writer has overtaken it: such a
picture is torn and counts as dropped. Positions count bytes since the beginning and never wrap.

Life cycle: the memory has no name. It belongs to the file descriptor that both processes hold, and is gone with
them, however they end.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

__all__ = ["RING_BYTES", "Ring"]

# Room for 36 ticks of two 640x480 cameras: a second in which the reader may be busy otherwise.
RING_BYTES = 64 * 1024 * 1024
# The head, an unsigned 64-bit number, has a cache line for itself.
_HEAD = 64


class Ring:
    """One writer, one reader. `fd` may be handed to another process, which makes its own `Ring` of it."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = _anonymous_file(_HEAD + RING_BYTES) if fd is None else fd
        self._size = os.fstat(self.fd).st_size - _HEAD
        self._map = mmap.mmap(self.fd, _HEAD + self._size)
        whole = np.frombuffer(self._map, np.uint8)
        self._head = whole[:8].view(np.uint64)
        self._data = whole[_HEAD:]

    def write(self, data: np.ndarray) -> int | None:
        """Copy a uint8 array of any shape; its position, or None when it is larger than the ring allows."""
        size = data.size
        if size > self._size // 4:
            return None
        position = int(self._head[0])
        room = self._size - position % self._size
        if size > room:
            position += room
        # First the claim, then the bytes: a reader that copied meanwhile sees that it was overtaken.
        self._head[0] = position + size
        start = position % self._size
        np.copyto(self._data[start : start + size].reshape(data.shape), data)
        return position

    def read(self, position: int, shape: tuple[int, ...]) -> np.ndarray | None:
        """A copy of what lies at `position`; None when the writer has overtaken it."""
        size = int(np.prod(shape))
        start = position % self._size
        copy = self._data[start : start + size].reshape(shape).copy()
        return copy if int(self._head[0]) <= position + self._size else None

    def close(self) -> None:
        """Let go of the descriptor; the memory goes with the last of the arrays and processes that use it."""
        os.close(self.fd)


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("env-client-ring", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
