"""Pictures through shared memory: whole or not at all."""

import os

import numpy as np
import pytest
from env_client.sidecar import ring as ring_module
from env_client.sidecar.ring import Ring


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Ring:
    """A writer's end of 40,000 bytes."""
    monkeypatch.setattr(ring_module, "RING_BYTES", 40_000)
    return Ring()


def picture(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_the_newest_pictures_are_whole_and_overtaken_ones_are_none(ring: Ring) -> None:
    """The reader gets what still lies there, bit for bit, however often the writer has gone round."""
    reader = Ring(os.dup(ring.fd))
    positions: list[int] = []
    for number in range(40):
        position = ring.write(picture(number))
        assert position is not None
        positions.append(position)
        for back, (seed, place) in enumerate(zip(range(number, -1, -1), reversed(positions), strict=True)):
            found = reader.read(place, (50, 50, 3))
            if found is not None:
                np.testing.assert_array_equal(found, picture(seed))
            # 7,500 bytes each, and up to one of them unused before the end.
            assert (found is not None) or back >= 4
            assert (found is None) or back <= 5


def test_sizes_may_differ_and_strides_do_not_matter(ring: Ring) -> None:
    """Cameras of different sizes share it, and cut-out views are copied as they look."""
    wide = picture(1, 60)[:, ::2]
    first, second = ring.write(wide), ring.write(picture(2, 20))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(ring.read(first, wide.shape), wide)
    np.testing.assert_array_equal(ring.read(second, (20, 20, 3)), picture(2, 20))


def test_what_is_too_large_is_refused(ring: Ring) -> None:
    """One picture may not push out all others."""
    assert ring.write(np.zeros((110, 100, 1), np.uint8)) is None
    assert ring.write(np.zeros((100, 100, 1), np.uint8)) is not None
