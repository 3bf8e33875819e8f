"""Success rates and dataset statistics, against known values and NumPy."""

import numpy as np
import pytest
from env_client.record.statistics import ImageStats, merge_stats, vector_stats, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(successes: int, trials: int, low: float, high: float) -> None:
    """Wilson's interval, as a paper prints it."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_without_trials_there_is_no_interval() -> None:
    """Nothing was judged: nothing is claimed."""
    assert wilson(0, 0) is None
    assert wilson(3, 3)[1] == 1.0


def test_parts_merge_to_the_whole() -> None:
    """Minimum, maximum, mean, deviation and count of two episodes together are those of all their ticks."""
    values = np.random.default_rng(0).normal(size=(90, 4)) * [1, 5, 0.1, 30] + 7
    merged = merge_stats([vector_stats(values[:25]), vector_stats(values[25:])])
    whole = vector_stats(values)
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(merged[name], whole[name])
    assert np.all(np.abs(np.array(merged["q50"]) - whole["q50"]) < values.std(0))


def test_pictures_are_counted_exactly() -> None:
    """The statistics of the pixels that are looked at are NumPy's, in 0..1 and in the shape (3, 1, 1)."""
    images = np.random.default_rng(1).integers(20, 200, (6, 40, 40, 3), dtype=np.uint8)
    stats = ImageStats()
    for image in images:
        stats.add(image)
    result = stats.result()
    pixels = images[:, ::4, ::4].reshape(-1, 3) / 255.0
    assert np.shape(result["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(result["mean"]), pixels.mean(0))
    np.testing.assert_allclose(np.ravel(result["std"]), pixels.std(0))
    np.testing.assert_allclose(np.ravel(result["min"]), pixels.min(0))
    np.testing.assert_allclose(np.ravel(result["q90"]), np.quantile(pixels, 0.9, axis=0), atol=1 / 255)
    assert result["count"] == [len(pixels)]
