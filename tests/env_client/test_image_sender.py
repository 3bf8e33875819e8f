"""How images travel: by name, or by what the link carries."""

import numpy as np
import pytest
from env_client.image_sender import TRIAL, TRY_EVERY, ImageSender
from env_client.wire import InvalidInput, LaterImage, decode_image, encode_image

READABLE = ("raw", "jpeg", "png")
# What compressing and decompressing costs in these tests, in seconds.
CODEC_S = 0.006


def picture(seed: int = 0) -> np.ndarray:
    rows = np.linspace(0, 255, 120)[:, None, None]
    noise = np.random.default_rng(seed).normal(0, 3, (120, 160, 3))
    return np.clip(rows + noise, 0, 255).astype(np.uint8)


class Link:
    """What a sender sees of a link: latency, and bytes in a second."""

    def __init__(self, sender: ImageSender, rate: float, latency_s: float = 0.001):
        self.sender, self.rate, self.latency_s = sender, rate, latency_s
        self.said: list[str] = []

    def ask(self, times: int = 1) -> list[str]:
        """The codecs of so many requests."""
        used = []
        for _ in range(times):
            (sent,) = self.sender.encoded([{"images": {"front": picture()}}], READABLE)
            image = sent["images"]["front"]
            compressed = isinstance(image, LaterImage)
            size = len(image.data) if compressed else image.nbytes
            took = self.latency_s + size / self.rate + (CODEC_S if compressed else 0.0)
            # A model that takes a second, and a queue, must not matter.
            timing = {"queue_ms": 20.0, "infer_ms": 1000.0, "batch_size": 1.0}
            said = self.sender.answered(took + 1.02, {"server_timing": timing})
            self.said += [said] if said else []
            used.append(image.codec if compressed else "raw")
        return used


def test_a_slow_link_gets_jpeg_and_is_never_left_for_long():
    """One trial of uncompressed images, then JPEG; a trial again after a while."""
    link = Link(ImageSender("auto"), rate=1e6)
    assert link.ask(TRIAL) == ["jpeg"] * TRIAL
    assert link.ask(TRIAL) == ["raw"] * TRIAL
    assert link.ask(TRY_EVERY) == ["jpeg"] * TRY_EVERY
    assert link.ask(TRIAL) == ["raw"] * TRIAL
    assert link.ask(5) == ["jpeg"] * 5
    assert link.said == []


def test_a_fast_link_gets_the_pixels_as_they_are():
    """After the first requests; JPEG is not even tried again, where it cannot pay."""
    link = Link(ImageSender("auto"), rate=1e9)
    link.ask(2 * TRIAL)
    assert set(link.ask(3 * TRY_EVERY)) == {"raw"}
    assert len(link.said) == 1
    assert "uncompressed" in link.said[0]


def test_a_link_that_changes_is_followed():
    """In both directions, within a hundred requests, and said."""
    link = Link(ImageSender("auto"), rate=1e9)
    link.ask(2 * TRIAL)
    link.rate = 1e6
    link.ask(TRY_EVERY + TRIAL)
    assert link.ask() == ["jpeg"]
    link.rate = 1e9
    link.ask(TRY_EVERY + TRIAL)
    assert link.ask() == ["raw"]
    assert ["JPEG" in said for said in link.said] == [False, True, False]


def test_uncompressed_images_are_not_tried_on_a_link_that_would_take_seconds():
    link = Link(ImageSender("auto"), rate=2e4)
    assert set(link.ask(3 * TRY_EVERY)) == {"jpeg"}


def test_only_what_the_server_reads_is_sent():
    """A plain openpi server names no codec."""
    for codec in ("jpeg", "png", "auto"):
        sender = ImageSender(codec)
        obs = {"images": {"front": picture()}, "states": {}}
        assert sender.encoded([obs], ()) == [obs]
        assert sender.answered(1.0, {}) is None


@pytest.mark.parametrize(("codec", "same"), [("raw", True), ("png", True), ("jpeg", False)])
def test_a_codec_by_name_stays(codec, same):
    """Whatever the link does; only JPEG changes a pixel."""
    sender = ImageSender(codec)
    for _ in range(2 * TRY_EVERY):
        (sent,) = sender.encoded([{"images": {"front": picture()}}], READABLE)
        assert sender.answered(3.0, {"server_timing": {"infer_ms": 1.0}}) is None
    assert np.array_equal(decode_image(sent["images"]["front"]), picture()) is same


def test_what_a_camera_compressed_goes_as_it_is():
    """It says nothing about the other way, so that nothing is weighed."""
    sender = ImageSender("auto")
    image = encode_image(picture(), "jpeg")
    for _ in range(2 * TRY_EVERY):
        (sent,) = sender.encoded([{"images": {"front": image}}], READABLE)
        assert sent["images"]["front"] is image
        assert sender.answered(3.0, {}) is None


def test_a_codec_that_is_none_is_named():
    with pytest.raises(InvalidInput, match="'gif'"):
        ImageSender("gif")  # type: ignore[arg-type]
