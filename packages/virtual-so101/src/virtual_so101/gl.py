"""Which OpenGL MuJoCo draws with. Imports nothing heavy: it must run before MuJoCo is imported.

MuJoCo reads the environment variable MUJOCO_GL once, when it is imported, and without it wants a display.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["PACKAGES", "gl_backend", "prefer_offscreen"]

PACKAGES = (
    "Rendering needs OpenGL without a display: install the system packages libegl1, libegl-mesa0 and libgl1-mesa-dri, "
    "or libosmesa6, and start again (MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses between them)."
)
_LIBRARIES = {
    "egl": ("libEGL.so.1", "libEGL.so"),
    "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),
}


def gl_backend() -> str | None:
    """What MuJoCo can draw with off-screen here: "egl", "osmesa", what MUJOCO_GL says, or None.

    On systems other than Linux MuJoCo's own default is right, named "default".
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen:
        return None if chosen in ("disable", "disabled", "off", "0", "false") else chosen
    if not sys.platform.startswith("linux"):
        return "default"
    return next((name for name, files in _LIBRARIES.items() if any(map(_loads, files))), None)


def prefer_offscreen() -> None:
    """Let MuJoCo draw off-screen where it can, unless MUJOCO_GL says otherwise; call it before its import."""
    backend = gl_backend()
    if backend is not None and backend != "default":
        os.environ["MUJOCO_GL"] = backend


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
