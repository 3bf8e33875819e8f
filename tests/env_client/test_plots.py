"""The plot of an episode."""

import numpy as np
import pytest
from env_client.record.plots import plot_actions


@pytest.mark.parametrize(("values", "ticks"), [(6, 60), (12, 5), (1, 1)])
def test_plot_has_a_row_for_each_joint(tmp_path, values, ticks):
    """It grows with the number of joints, and holes in the prediction do not disturb it."""
    from matplotlib import image

    recorded = np.sin(np.arange(ticks)[:, None] / 9 + np.arange(values)).astype(np.float32)
    predicted = recorded + 0.1
    predicted[ticks // 2 :] = np.nan
    path = tmp_path / "plot.png"
    plot_actions(
        path, recorded, predicted, boundaries=range(0, ticks, 16), names=[f"joint_{i}.pos" for i in range(values)],
        fps=30.0, unit="normalized", title="lift, episode 0",
    )  # fmt: skip
    pixels = image.imread(path)
    assert pixels.shape[:2] == (round(100 * (0.9 + 1.45 * values)), 1200)
    # Recorded, predicted and boundary colours are all there.
    for colour in ("#3b3b3b", "#c9d3dc"):
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(pixels[..., :3] - wanted).max(axis=-1) < 0.02).sum() > 20


@pytest.mark.parametrize("horizon", [1, 8])
def test_predictions_are_visible(tmp_path, horizon):
    """Chunks of a single action are drawn as well."""
    from matplotlib import image

    path = tmp_path / "plot.png"
    values = np.arange(32, dtype=np.float32)[:, None]
    plot_actions(
        path, values, values[::-1], boundaries=range(0, 32, horizon), names=["a"], fps=30.0, unit="rad", title="t"
    )  # fmt: skip
    pixels = image.imread(path)[40:]  # below the legend
    red = np.array([0xD1, 0x49, 0x5B]) / 255
    assert (np.abs(pixels[..., :3] - red).max(axis=-1) < 0.05).sum() > 50


def test_no_prediction_at_all(tmp_path):
    """An episode that was never answered still draws what was recorded."""
    path = tmp_path / "plot.png"
    plot_actions(
        path, np.zeros((4, 2), np.float32), np.full((4, 2), np.nan, np.float32), boundaries=[], names=["a", "b"],
        fps=30.0, unit="rad", title="t",
    )  # fmt: skip
    assert path.stat().st_size > 1000
