"""Lets the wall clock of a test's processes jump: with this folder on PYTHONPATH, `time.time` follows a file.

The file that GRASP_CUBE_CLOCK names holds one double: seconds that are added. Python's own `time.time` and `time.time_ns`
jump; `datetime.now`, file stamps and clocks inside native libraries do not, and no monotonic clock does (as on a real
machine whose clock is set).
"""

import mmap
import os
import struct
import time

_path = os.environ.get("GRASP_CUBE_CLOCK")
if _path:
    with open(_path, "rb") as _file:
        _shared = mmap.mmap(_file.fileno(), 8, prot=mmap.PROT_READ)
    _time, _time_ns = time.time, time.time_ns

    def _jumped() -> float:
        return _time() + struct.unpack("d", _shared[:8])[0]

    def _jumped_ns() -> int:
        return _time_ns() + int(struct.unpack("d", _shared[:8])[0] * 1e9)

    time.time, time.time_ns = _jumped, _jumped_ns
