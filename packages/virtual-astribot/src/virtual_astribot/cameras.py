"""Moving pictures of the stand-in's cameras: a short film for each, compressed once and played for ever.

A real camera compresses in its own hardware; doing it once keeps the machine free for what is tested.
"""

import functools

import cv2
import numpy as np

from virtual_astribot.body import CAMERAS, Camera

__all__ = ["FPS", "film", "picture"]

FPS = 30.0
# Pictures of a film; half a second.
_LENGTH = 15
_QUALITY = 85


def picture(camera: Camera, index: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB: a table, a red square on the left, a blue one on the right, and a disc that wanders."""
    height, width = camera.height, camera.width
    image = np.empty((height, width, 3), np.uint8)
    shade = np.linspace(150, 90, height, dtype=np.uint8)[:, None]
    image[..., 0], image[..., 1], image[..., 2] = shade, shade, shade
    side = height // 4
    image[:side, :side] = (220, 20, 20)
    image[:side, -side:] = (20, 20, 220)
    phase = 2 * np.pi * index / _LENGTH
    seed = CAMERAS.index(camera)
    centre = (
        int(width * (0.5 + 0.3 * np.cos(phase + seed))),
        int(height * (0.6 + 0.2 * np.sin(phase + seed))),
    )
    cv2.circle(image, centre, height // 10, (40, 200, 60), -1)
    # Texture: an empty scene would compress to nothing, and say nothing of a real one.
    noise = np.random.default_rng(index).integers(0, 12, (height // 4, width // 4, 1), np.uint8)
    return image + cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]


@functools.cache
def film(camera: Camera) -> list[bytes]:
    """The JPEGs of one camera, in order."""
    frames = []
    for index in range(_LENGTH):
        bgr = cv2.cvtColor(picture(camera, index), cv2.COLOR_RGB2BGR)
        done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        if not done:
            raise RuntimeError(f"OpenCV could not compress a picture of {camera.name}")
        frames.append(data.tobytes())
    return frames
