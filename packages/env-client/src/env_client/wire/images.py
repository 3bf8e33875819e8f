"""Images on the wire: raw RGB arrays, JPEG and PNG, and the one resize that robots and training share.

OpenCV is imported inside the functions: a server that only receives raw images never loads it.
"""

import struct
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from env_client.wire.codec import EncodedImage, LaterImage
from env_client.wire.errors import InvalidInput

__all__ = [
    "IMAGE_CODECS",
    "MAX_IMAGE_PIXELS",
    "ImageCodec",
    "Resize",
    "check_image",
    "decode_image",
    "encode_image",
    "encode_images_later",
    "image_size",
    "resize_image",
]

ImageCodec = Literal["raw", "jpeg", "png"]
Resize = Literal["none", "stretch", "pad", "crop", "openpi"]

IMAGE_CODECS: tuple[ImageCodec, ...] = get_args(ImageCodec)

# Larger images are refused before they are decompressed (a few kB of PNG can unpack to gigabytes).
MAX_IMAGE_PIXELS = 4096 * 4096
# A progressive JPEG has about ten scans; each one is a pass over all pixels, however few bytes it has.
MAX_SCANS = 32
# An animation's parts, whose sizes are not the image's.
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")


def encode_image(image: np.ndarray, codec: ImageCodec, quality: int = 90) -> np.ndarray | EncodedImage:
    """An (H, W, 3) uint8 RGB image as it travels: itself for "raw", else an `EncodedImage`.

    `quality` is JPEG's 1..100; PNG is lossless. Raises `InvalidInput` for another shape, dtype or codec.
    """
    check_image(image)
    if codec == "raw":
        return image
    if codec not in IMAGE_CODECS:
        raise InvalidInput(f"the image codec {codec!r}; one of {', '.join(IMAGE_CODECS)} was expected")
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if codec == "jpeg" else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    done, data = cv2.imencode("." + codec, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise InvalidInput(f"OpenCV could not encode an image of shape {image.shape} as {codec}")
    height, width = image.shape[:2]
    return EncodedImage(codec, data.tobytes(), (height, width, 3))


def encode_images_later(images: Mapping[str, Any], codec: ImageCodec, quality: int = 90) -> dict[str, Any]:
    """Each array in a map as a `LaterImage`; what is compressed already stays as it is.

    Raises `InvalidInput` as `encode_image` does, but for what OpenCV alone finds out when it compresses.
    """

    def later(image: np.ndarray) -> LaterImage:
        check_image(image)
        height, width = image.shape[:2]
        return LaterImage(codec, (height, width, 3), lambda: encode_image(image, codec, quality).data)  # type: ignore[arg-type,return-value]

    return {name: later(image) if isinstance(image, np.ndarray) else image for name, image in images.items()}


def decode_image(image: np.ndarray | EncodedImage) -> np.ndarray:
    """The (H, W, 3) uint8 RGB array of an image that came over the wire.

    Raises `InvalidInput` when it is not such an image, when the compressed data is damaged, or when its own
    size is not the declared one (checked in its header, before anything is decompressed).
    """
    if isinstance(image, np.ndarray):
        check_image(image)
        return image
    height, width = image.shape[:2]
    if height * width > MAX_IMAGE_PIXELS:
        raise InvalidInput(
            f"an image of {height}x{width} pixels; at most {MAX_IMAGE_PIXELS} pixels are decoded"
        )
    data = bytes(image.data)
    inside = image_size(image.codec, data)
    if inside != (height, width):
        found = "no size" if inside is None else f"{inside[0]}x{inside[1]}"
        raise InvalidInput(f"a {image.codec} image declared as {height}x{width} has {found} in its header")
    if not (_png_is_sound(data) if image.codec == "png" else data.count(b"\xff\xda") <= MAX_SCANS):
        raise _damaged(image)
    import cv2

    # From 4.10 on OpenCV decodes into RGB itself, which saves a pass over the pixels.
    in_rgb = getattr(cv2, "IMREAD_COLOR_RGB", None)
    form = (cv2.IMREAD_COLOR if in_rgb is None else in_rgb) | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), form)
    except cv2.error as error:
        raise _damaged(image) from error
    if decoded is None or decoded.shape != (height, width, 3):
        raise _damaged(image)
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB) if in_rgb is None else decoded


def _damaged(image: EncodedImage) -> InvalidInput:
    height, width = image.shape[:2]
    return InvalidInput(
        f"the {image.codec} data of a {height}x{width} image is damaged, or of an unusual kind ({len(image.data)} bytes)"
    )


def resize_image(image: np.ndarray, height: int, width: int, mode: Resize) -> np.ndarray:
    """An (H, W, 3) uint8 image brought to (height, width, 3) by the rule of a policy's spec.

    "none" only checks the size; "stretch" ignores the aspect ratio, but refuses a picture on its side; "pad" keeps it and fills with black,
    centred; "crop" keeps it and cuts the overhang, centred. Shrinking averages areas, growing interpolates.
    "openpi" pads as well, but to the pixel as openpi does it: sizes rounded down, Pillow's bilinear filter.
    Robots, dataset makers and training all call this, so that a policy meets the pixels that it learned from.
    """
    check_image(image)
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    if mode == "none":
        raise InvalidInput(
            f"an image of {w}x{h} (width x height) where the policy takes {width}x{height} and its resize rule is 'none': set the "
            "camera to that size, or the embodiment's resize to stretch, pad or crop"
        )
    if mode == "stretch":
        if (h - w) * (height - width) < 0:
            raise InvalidInput(
                f"an image of {w}x{h} (width x height) where the policy takes {width}x{height}: it lies on its side, and is "
                'not stretched; turn it ("rotation": 90 or -90 in the camera file), or serve with --policy.resize pad'
            )
        return _scale(image, height, width)
    if mode not in get_args(Resize):
        raise InvalidInput(f"the resize rule {mode!r}; one of {', '.join(get_args(Resize))} was expected")
    if mode == "openpi":
        return _openpi_pad(image, height, width)
    fit = min if mode == "pad" else max
    ratio = fit(height / h, width / w)
    inner_h, inner_w = max(1, round(h * ratio)), max(1, round(w * ratio))
    scaled = _scale(image, inner_h, inner_w)
    top, left = abs(height - inner_h) // 2, abs(width - inner_w) // 2
    if mode == "crop":
        return np.ascontiguousarray(scaled[top : top + height, left : left + width])
    padded = np.zeros((height, width, 3), np.uint8)
    padded[top : top + inner_h, left : left + inner_w] = np.asarray(scaled)
    return padded


def _scale(image: np.ndarray, height: int, width: int) -> np.ndarray:
    import cv2

    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _openpi_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise InvalidInput(
            "the resize rule 'openpi' needs Pillow, which is not installed here: `pip install pillow`, or send images of "
            f"{height}x{width}"
        ) from error
    h, w = image.shape[:2]
    ratio = max(w / width, h / height)
    inner_h, inner_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    scaled = Image.fromarray(image).resize((inner_w, inner_h), Image.Resampling.BILINEAR)
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    padded = np.zeros((height, width, 3), np.uint8)
    padded[top : top + inner_h, left : left + inner_w] = np.asarray(scaled)
    return padded


def check_image(image: object) -> None:
    """Raises `InvalidInput` unless `image` is an (H, W, 3) uint8 array with at least one pixel."""
    if not isinstance(image, np.ndarray):
        raise InvalidInput(
            f"an image of type {type(image).__name__}; an (H, W, 3) uint8 RGB array was expected"
        )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise InvalidInput(
            f"an image of shape {list(image.shape)} and dtype {image.dtype}; (H, W, 3) uint8 RGB was expected"
        )


def image_size(codec: str, data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels by the header of a "jpeg" or "png" image; None when there is no such header.

    Nothing is decompressed, so it is safe on data of any origin.
    """
    return _png_size(data) if codec == "png" else _jpeg_size(data)


def _png_size(data: bytes) -> tuple[int, int] | None:
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def _png_is_sound(data: bytes) -> bool:
    """Whether the chunks fill the data to the end and hold one still image.

    OpenCV takes memory for the length that a chunk declares, up to gigabytes, before it looks for its bytes.
    """
    at = 8
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        at += 12 + length
        if kind in _ANIMATION or at > len(data):
            return False
        if kind == b"IEND":
            return True
    return False


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        # The frame headers are SOF0..SOF15 without the tables DHT, JPG and DAC that share their range.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return height, width
        if marker == 0xFF:
            at += 1  # a fill byte
        else:
            at += 2 + length
    return None
