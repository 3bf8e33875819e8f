"""A small pool of threads for what is done to images before the device's turn: decompressing and resizing.

Life cycle: one for each server, `close` at its end. What waits is bounded: more is refused rather than kept.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import numpy as np
from env_client.wire import (
    CameraSpec,
    EncodedImage,
    ErrorCode,
    PolicySpec,
    WireError,
    decode_image,
    resize_image,
)

from grasp_cube.policies.policy import PolicyRequest

__all__ = ["ImagePool"]


class ImagePool:
    """`threads` work, at most `max_waiting` pieces of work are in hand."""

    def __init__(self, threads: int, max_waiting: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
        self._max_waiting = max_waiting
        # Pieces of work that wait or are being done.
        self.waiting = 0

    async def run[T](self, *calls: Callable[[], T]) -> list[T]:
        """Each call's value; they are made side by side. Raises `WireError` OVERLOADED when too much waits."""
        if self.waiting + len(calls) > self._max_waiting:
            raise WireError(
                ErrorCode.OVERLOADED,
                f"{self.waiting} images wait already to be decoded: ask again later, or less often",
                retry_after_ms=100,
            )
        loop = asyncio.get_running_loop()
        self.waiting += len(calls)
        futures = [loop.run_in_executor(self._pool, call) for call in calls]
        for future in futures:
            future.add_done_callback(self._done)
        return list(await asyncio.gather(*futures))

    def _done(self, future: asyncio.Future[Any]) -> None:
        self.waiting -= 1
        # Where one image is damaged, nobody asks for the errors of the others.
        if not future.cancelled():
            future.exception()

    async def decoded(self, observations: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """The observations with every compressed image decoded."""
        encoded: list[EncodedImage] = []
        for item in observations:
            _collect(item, encoded)
        if not encoded:
            return observations
        # Each by itself, so that two cameras are decoded by two threads.
        arrays = await self.run(*(partial(decode_image, image) for image in encoded))
        decoded = dict(zip(map(id, encoded), arrays, strict=True))
        return tuple(_replaced(item, decoded) for item in observations)

    async def resized(self, request: PolicyRequest, spec: PolicySpec) -> PolicyRequest:
        """The request with its images at the sizes that the spec names, by the spec's rule.

        The policy would do it as well, but in the device's time. What is not a plain image is left to it.
        """
        work: dict[tuple[int, str], tuple[np.ndarray, CameraSpec]] = {}
        looked_at = max(0, len(request.history) - spec.n_obs_steps + 1)
        for obs in (request.obs, *request.history[looked_at:]):
            images = obs.get("images")
            if isinstance(images, dict):
                for camera in spec.cameras:
                    image = images.get(camera.name)
                    if _to_be_resized(image, camera):
                        work[id(image), camera.name] = (image, camera)
        if not work:
            return request
        calls = [
            partial(resize_image, image, camera.height, camera.width, camera.resize)
            for image, camera in work.values()
        ]
        done = dict(zip(work, await self.run(*calls), strict=True))
        obs, *history = (_with_images(item, done) for item in (request.obs, *request.history))
        return replace(request, obs=obs, history=tuple(history))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _collect(value: Any, found: list[EncodedImage]) -> None:
    """Every image that is still compressed. Runs on the event loop for each observation, so it is plain."""
    if isinstance(value, EncodedImage):
        found.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def _to_be_resized(image: Any, camera: CameraSpec) -> TypeGuard[np.ndarray]:
    return (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.shape[:2] != (camera.height, camera.width)
        and camera.resize != "none"
    )


def _with_images(obs: dict[str, Any], done: dict[tuple[int, str], np.ndarray]) -> dict[str, Any]:
    images = obs.get("images")
    if not isinstance(images, dict):
        return obs
    return obs | {"images": {name: done.get((id(image), name), image) for name, image in images.items()}}


def _replaced(value: Any, decoded: dict[int, np.ndarray]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, decoded) for key, item in value.items()}
    return decoded[id(value)] if isinstance(value, EncodedImage) else value
