"""How a client's images travel: as they are, compressed, or by what the link was seen to carry ("auto").

Life cycle: one `ImageSender` for each client; it lives on when the client reconnects. For each request `encoded`, whose
images are compressed while it is sent, and `answered` when its reply is there. Only "jpeg" and "auto" ever change a pixel.

"auto" weighs what each way costs a request, all of it: compressing, the link, decompressing; not the model. It begins
with JPEG, because the first uncompressed images on a slow link could take a minute, tries the other way as soon as that
is known to be bearable, and again after every `TRY_EVERY` requests, since links change.
"""

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from env_client.wire.codec import LaterImage
from env_client.wire.errors import InvalidInput
from env_client.wire.images import IMAGE_CODECS, ImageCodec, encode_images_later

__all__ = ["CodecChoice", "ImageSender"]

CodecChoice = Literal["raw", "jpeg", "png", "auto"]

# Requests of the way in use between two trials of the other, and of one trial.
TRY_EVERY = 100
TRIAL = 3
# A way is left for one that costs less than this share of it: what is alike is not worth going to and fro.
WORTH = 0.8
# Uncompressed images are not tried where they are expected to take longer, in seconds; JPEG is not where they take less:
# compressing and decompressing costs as much.
BEARABLE_S = 0.5
CHEAP_S = 0.004
# Requests that a way is judged by.
REMEMBERED = 5


class ImageSender:
    """Encodes the images of requests. `quality` is JPEG's, 1..100.

    codec: of the requests from here on, "raw" or "jpeg" while it is chosen by itself.
    """

    def __init__(self, codec: CodecChoice = "raw", quality: int = 90):
        if codec not in (*IMAGE_CODECS, "auto"):
            raise InvalidInput(
                f"the image codec {codec!r}; one of {', '.join(IMAGE_CODECS)}, auto was expected"
            )
        self.quality = quality
        self._chooses = codec == "auto"
        self.codec: ImageCodec = "jpeg" if codec == "auto" else codec
        # Seconds of the last requests of each way.
        self._costs: dict[ImageCodec, deque[float]] = {
            way: deque(maxlen=REMEMBERED) for way in ("raw", "jpeg")
        }
        # The way that the request in flight took, if it can be weighed, and the images that it compressed.
        self._sent: ImageCodec | None = None
        self._compressed: list[LaterImage] = []
        # How much smaller the last compressed images were.
        self._shrunk = 1.0
        # The way in use, and the requests until another look at it, or until its trial ends.
        self._settled: ImageCodec = self.codec
        self._left = TRIAL

    def encoded(
        self, observations: Sequence[dict[str, Any]], readable: Collection[str]
    ) -> list[dict[str, Any]]:
        """The observations with their images as they are to travel to a server that reads the codecs `readable`."""
        codec = self.codec if self.codec in readable else "raw"
        done = [_encoded(obs, codec, self.quality) for obs in observations]
        self._sent = None
        if self._chooses and "jpeg" in readable:
            # What cameras compressed themselves goes as it is either way.
            if any(isinstance(image, np.ndarray) for obs in observations for image in _images(obs)):
                self._sent = codec
            self._compressed = [
                image for obs in done for image in _images(obs) if isinstance(image, LaterImage)
            ]
        return done

    def answered(self, elapsed_s: float, reply: Mapping[str, Any]) -> str | None:
        """Weigh a request that took `elapsed_s` from its encoding to its reply; a sentence when the way changes."""
        if self._sent is None:
            return None
        timing = reply.get("server_timing") or {}
        model_s = sum(float(timing.get(name, 0.0)) for name in ("queue_ms", "infer_ms")) / 1e3
        self._costs[self._sent].append(max(0.0, elapsed_s - model_s))
        self._sent = None
        if self._compressed:
            pixels = sum(math.prod(image.shape) for image in self._compressed)
            self._shrunk = pixels / sum(len(image.data) for image in self._compressed)
            self._compressed = []
        if self._left > 1:
            self._left -= 1
            return None
        if self.codec != self._settled:
            return self._choose()
        self._try_other()
        return None

    def _try_other(self) -> None:
        other: ImageCodec = "raw" if self._settled == "jpeg" else "jpeg"
        cost = statistics.median(self._costs[self._settled])
        # Where the round trip is long and the link is not, raw images are expected to be slower than they are.
        may = cost * self._shrunk <= BEARABLE_S if other == "raw" else cost >= CHEAP_S
        if may:
            self.codec = other
            # Only what is seen now counts.
            self._costs[other].clear()
        self._left = TRIAL if may else TRY_EVERY

    def _choose(self) -> str | None:
        """At the end of a trial."""
        tried, used = self.codec, self._settled
        cost, other_cost = (statistics.median(self._costs[way]) for way in (tried, used))
        self._left = TRY_EVERY
        if cost >= WORTH * other_cost:
            self.codec = used
            return None
        self._settled = tried
        form = f"as JPEG of quality {self.quality}" if tried == "jpeg" else "uncompressed"
        return (
            f"Images go {form} from here on: {cost * 1e3:.1f} ms a request on this link, "
            f"{other_cost * 1e3:.1f} ms the other way."
        )


def _images(obs: dict[str, Any]) -> list[Any]:
    images = obs.get("images")
    return list(images.values()) if isinstance(images, dict) else []


def _encoded(obs: dict[str, Any], codec: ImageCodec, quality: int) -> dict[str, Any]:
    images = obs.get("images")
    if codec == "raw" or not isinstance(images, dict):
        return obs
    return obs | {"images": encode_images_later(images, codec, quality)}
