"""Images: codecs, their limits, and the resize that robots and training share."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from env_client.wire import EncodedImage, InvalidInput, decode_image, encode_image, resize_image


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth gradient with red growing to the right, green growing down."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    return image


def test_png_is_exact_and_keeps_rgb():
    """PNG gives the same array back, channels in order."""
    assert np.array_equal(decode_image(encode_image(picture(), "png")), picture())


def test_jpeg_is_close_and_keeps_rgb():
    """JPEG at quality 90 stays within a few grey levels and does not swap red and blue."""
    decoded = decode_image(encode_image(picture(), "jpeg", 90))
    assert decoded.shape == (48, 64, 3)
    assert np.abs(decoded.astype(int) - picture()).mean() < 3


def test_raw_is_the_array_itself():
    """Nothing is copied."""
    image = picture()
    assert encode_image(image, "raw") is image
    assert decode_image(image) is image


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_a_size_that_differs_from_the_declared_one_is_refused(codec):
    """The header is compared before anything is decompressed."""
    encoded = encode_image(picture(), codec)
    with pytest.raises(InvalidInput, match="declared as 48x63 has 48x64"):
        decode_image(EncodedImage(codec, encoded.data, (48, 63, 3)))


def test_a_decompression_bomb_is_refused_by_its_header():
    """A PNG that claims 60000x60000 pixels is never decompressed, whatever is declared."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(InvalidInput, match="at most"):
        decode_image(EncodedImage("png", bomb, (60000, 60000, 3)))
    with pytest.raises(InvalidInput, match="declared as 4x4 has 60000x60000"):
        decode_image(EncodedImage("png", bomb, (4, 4, 3)))


def lying_length(data: bytes) -> bytes:
    at = data.index(b"IDAT")
    return data[: at - 4] + b"\xb0\0\0\0" + data[at:]


def animated(data: bytes) -> bytes:
    chunk = b"acTL" + struct.pack(">II", 1000, 0)
    at = data.index(b"IDAT") - 4
    return data[:at] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]


def many_scans(data: bytes) -> bytes:
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 100_000 + data[-2:]


@pytest.mark.parametrize(
    ("codec", "bomb"),
    [("png", lying_length), ("png", animated), ("jpeg", many_scans)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_what_costs_more_than_its_pixels_is_never_decompressed(codec, bomb, monkeypatch):
    """A PNG's chunk that declares 3 GB, which OpenCV would take; an animation; a JPEG that passes over its pixels for ever."""
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1] if codec == "jpeg" else []
    data = cv2.imencode(f".{codec}", picture(), options)[1].tobytes()
    assert decode_image(EncodedImage(codec, data, (48, 64, 3))).shape == (48, 64, 3)
    monkeypatch.setattr(cv2, "imdecode", lambda *given: pytest.fail("OpenCV was asked"))
    with pytest.raises(InvalidInput, match="unusual kind"):
        decode_image(EncodedImage(codec, bomb(data), (48, 64, 3)))


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_damaged_data_is_refused(codec):
    """Cut or foreign data gives a sentence."""
    data = bytes(encode_image(picture(), codec).data)
    for damaged in (b"", b"\xff\xd8", data[:30], b"GIF89a" + data):
        with pytest.raises(InvalidInput):
            decode_image(EncodedImage(codec, damaged, (48, 64, 3)))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        "x",
    ],
)
def test_what_is_no_image_is_refused(image):
    """Shape and dtype are named."""
    with pytest.raises(InvalidInput, match="uint8 RGB"):
        encode_image(image, "jpeg")


def test_an_image_of_the_right_size_is_not_touched():
    """Whatever the rule."""
    image = picture()
    assert all(resize_image(image, 48, 64, mode) is image for mode in ("none", "stretch", "pad", "crop"))


def test_none_refuses_another_size():
    """Both sizes are said."""
    with pytest.raises(InvalidInput, match=r"64x48 \(width x height\) where the policy takes 32x24"):
        resize_image(picture(), 24, 32, "none")


def test_stretch_averages_areas_when_it_shrinks():
    """Shrinking by two is the mean of each 2x2 block."""
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    blocks = image.reshape(24, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(resize_image(image, 24, 32, "stretch") - blocks).max() <= 0.5


def test_pad_keeps_the_aspect_ratio_and_centres():
    """A 40x20 image in a 20x20 frame: 5 black columns left and right."""
    padded = resize_image(np.full((40, 20, 3), 200, np.uint8), 20, 20, "pad")
    assert (padded[:, 5:15] == 200).all()
    assert (padded[:, :5] == 0).all()
    assert (padded[:, 15:] == 0).all()


def test_crop_keeps_the_aspect_ratio_and_cuts_the_overhang():
    """A 20x40 image in a 20x20 frame: the middle columns."""
    image = picture(20, 40)
    assert np.array_equal(resize_image(image, 20, 20, "crop"), image[:, 10:30])


def test_growing_interpolates():
    """A ramp stays a ramp."""
    grown = resize_image(picture(), 96, 128, "stretch")
    assert np.abs(grown.astype(int) - cv2.resize(picture(), (128, 96))).max() == 0
    assert (np.diff(grown[0, :, 0].astype(int)) >= 0).all()


def test_a_picture_on_its_side_is_not_stretched():
    """Portrait where the policy takes landscape; a square takes both."""
    portrait = np.zeros((64, 48, 3), np.uint8)
    with pytest.raises(
        InvalidInput, match=r"48x64 \(width x height\) where the policy takes 32x24: it lies on its side"
    ):
        resize_image(portrait, 24, 32, "stretch")
    assert resize_image(portrait, 24, 24, "stretch").shape == (24, 24, 3)
    assert resize_image(portrait, 24, 32, "pad").shape == (24, 32, 3)
