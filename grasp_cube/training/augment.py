"""Small random changes of training images, so that a policy does not learn one light and one camera mount."""

import torch

__all__ = ["augment_images"]

_BRIGHTNESS = 0.12
# Small: what a cube moves by in the image is what the arm has to move by.
_SHIFT = 0.015


def augment_images(batch: dict[str, torch.Tensor], cameras: list[str]) -> None:
    """Changes the images of `batch` in place: (B, [T,] 3, H, W) float in [0, 1].

    Each sample gets its own brightness (up to 12 %) and shift (up to 1.5 % of the size, edges repeated); the
    ticks of one sample get the same.
    """
    for camera in cameras:
        images = batch[camera]
        count, (height, width) = len(images), images.shape[-2:]
        gain = 1.0 + _BRIGHTNESS * (2.0 * torch.rand(count) - 1.0)
        down = _shifts(count, height)
        right = _shifts(count, width)
        for number in range(count):
            rows = (torch.arange(height) + down[number]).clamp(0, height - 1)
            columns = (torch.arange(width) + right[number]).clamp(0, width - 1)
            moved = images[number].index_select(-2, rows).index_select(-1, columns)
            images[number] = (moved * gain[number]).clamp(0.0, 1.0)


def _shifts(count: int, size: int) -> torch.Tensor:
    most = int(size * _SHIFT)
    return torch.randint(-most, most + 1, (count,))
