"""An `Observation` of the gRPC stack -> the observation map that policies read.

Cameras: an image goes to the policy's camera of the same name. Where there is none, to the one that is another
name of the same place, by this table (one line, one place; `*_rgbd` are the Astribot S1's topics, the last column
is openpi's and ALOHA's):

    head          head_rgbd          cam_head, cam_high, base_0_rgb
    left_wrist    left_wrist_rgbd    wrist_left, cam_left_wrist, left_wrist_0_rgb
    right_wrist   right_wrist_rgbd   wrist_right, cam_right_wrist, right_wrist_0_rgb
    torso         torso_rgbd         cam_torso

Images of other cameras are neither decoded nor used. Nothing here is guessed: two images for one camera, or an
alias that fits two cameras, is refused.

State: the flat vector, in the policy's order and unit, under `state`.

Error policy: `InvalidInput` says which part, what came and what was expected. Everything may be called from any
thread; decoding is slow (tens of ms) and belongs in a pool.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from env_client.openpi_grpc import openpi_inference_pb2 as pb2
from env_client.wire import CameraSpec, EncodedImage, InvalidInput, PolicySpec, decode_image
from env_client.wire.images import MAX_IMAGE_PIXELS, image_size

__all__ = ["CAMERA_ALIASES", "MAX_STATE", "camera_of", "decode", "read_observation"]

# Each line holds the names of one place on a robot.
CAMERA_ALIASES = (
    ("head", "head_rgbd", "cam_head", "cam_high", "base_0_rgb"),
    ("left_wrist", "left_wrist_rgbd", "wrist_left", "cam_left_wrist", "left_wrist_0_rgb"),
    ("right_wrist", "right_wrist_rgbd", "wrist_right", "cam_right_wrist", "right_wrist_0_rgb"),
    ("torso", "torso_rgbd", "cam_torso"),
)
# State values, far more than a robot has: a message of 100 MB could hold 25 million.
MAX_STATE = 4096
# Images in one observation, far more than a robot has.
MAX_IMAGES = 32
# What `encoding` may say, in lower case -> how the bytes are read.
ENCODINGS = {
    "jpeg": "jpeg",
    "jpg": "jpeg",
    "png": "png",
    "raw": "rgb8",
    "rgb": "rgb8",
    "rgb8": "rgb8",
    "bgr": "bgr8",
    "bgr8": "bgr8",
}


def read_observation(message: pb2.Observation, spec: PolicySpec) -> dict[str, Any]:
    """`{"state": (n,) float32, "images": {camera: (H, W, 3) uint8 RGB}}` for a policy of this spec.

    What the message leaves out is left out: the policy's own check names it. Raises `InvalidInput`.
    """
    if len(message.state) > MAX_STATE:
        raise InvalidInput(f"a state of {len(message.state)} values; at most {MAX_STATE} are read")
    if len(message.images) > MAX_IMAGES:
        raise InvalidInput(f"{len(message.images)} images in one observation; at most {MAX_IMAGES} are read")
    obs: dict[str, Any] = {}
    if message.state:
        obs["state"] = np.array(message.state, np.float32)
    chosen = _choose(message.images, spec.cameras)
    if chosen:
        obs["images"] = {name: decode(image) for name, image in chosen.items()}
    elif message.images and spec.cameras:
        came = ", ".join(sorted(image.camera_name for image in message.images))
        raise InvalidInput(
            f"no image is for a camera of this policy: came {came:.200}, expected "
            f"{', '.join(camera.name for camera in spec.cameras)}"
        )
    return obs


def camera_of(name: str, cameras: Sequence[CameraSpec]) -> str | None:
    """The policy's camera that an image named `name` is for; None when the policy does not look at it.

    Raises `InvalidInput` when an alias fits more than one of the policy's cameras.
    """
    known = [camera.name for camera in cameras]
    if name in known:
        return name
    places = next((line for line in CAMERA_ALIASES if name in line), ())
    found = [camera for camera in known if camera in places]
    if len(found) > 1:
        raise InvalidInput(
            f"the camera {name!r} may be {' or '.join(found)} of this policy: send each image under the policy's name"
        )
    return found[0] if found else None


def _choose(images: Iterable[pb2.ImageData], cameras: Sequence[CameraSpec]) -> dict[str, pb2.ImageData]:
    """{the policy's camera: the image for it}"""
    chosen: dict[str, pb2.ImageData] = {}
    for image in images:
        name = camera_of(image.camera_name, cameras)
        if name is None:
            continue
        if name in chosen:
            raise InvalidInput(
                f"two images came for the camera {name!r}, named {chosen[name].camera_name!r} and "
                f"{image.camera_name!r}; one was expected"
            )
        chosen[name] = image
    return chosen


def decode(image: pb2.ImageData) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises `InvalidInput`, in which the camera is named."""
    try:
        return _decode(image)
    except InvalidInput as error:
        raise InvalidInput(f"the camera {image.camera_name!r} sent {error.message}") from None


def _decode(image: pb2.ImageData) -> np.ndarray:
    kind = ENCODINGS.get(image.encoding.lower())
    if kind is None:
        raise InvalidInput(
            f"an image with the encoding {image.encoding!r:.40}; one of {', '.join(ENCODINGS)} was expected"
        )
    height, width = image.height, image.width
    if kind in ("jpeg", "png"):
        if not image.data:
            raise InvalidInput(f"a {kind} image without data")
        if (height, width) == (0, 0):
            # Robots that forward the camera's own JPEG do not know its size: the header does.
            height, width = _header_size(kind, image.data)
        if height <= 0 or width <= 0:
            raise InvalidInput(
                f"a {kind} image declared as {height}x{width}; two positive numbers, or 0x0 to leave it to the "
                "data, were expected"
            )
        return decode_image(EncodedImage(kind, image.data, (height, width, 3)))
    if height <= 0 or width <= 0:
        raise InvalidInput(f"a raw image of {height}x{width} pixels; its height and width were expected")
    if height * width > MAX_IMAGE_PIXELS:
        raise InvalidInput(f"a raw image of {height}x{width} pixels; at most {MAX_IMAGE_PIXELS} are read")
    if len(image.data) != height * width * 3:
        raise InvalidInput(
            f"{len(image.data)} bytes for a raw image of {height}x{width}; {height * width * 3}, height by width "
            "by 3, were expected"
        )
    pixels = np.frombuffer(image.data, np.uint8).reshape(height, width, 3)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if kind == "bgr8" else pixels


def _header_size(kind: str, data: bytes) -> tuple[int, int]:
    size = image_size(kind, data)
    if size is None:
        raise InvalidInput(f"a {kind} image of {len(data)} bytes without a {kind} header")
    return size
