"""What tracking is compared with: its bare cost, and the plain way to write it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from seco.config import EXEMPLAR_PX, SEARCH_PX, STRIDE, TRAIN_SEARCH_PX, TrackerConfig
from seco.data.crops import Pixels
from seco.data.pairs import target_of
from seco.data.transforms import normalise
from seco.models.siamfc import SiamFC
from seco.training.track import balanced_loss, response_labels


def bare_tracking(model: SiamFC, device: torch.device, scales: int) -> Callable[[], Tensor]:
    """Forward of the search crops of all scales and their correlation, on crops that are there."""
    crops = torch.randn(scales, 3, SEARCH_PX, SEARCH_PX, device=device)
    with torch.inference_mode():
        exemplar = model.head.exemplar(
            model.backbone(torch.randn(1, 3, EXEMPLAR_PX, EXEMPLAR_PX, device=device))
        )

    def work() -> Tensor:
        with torch.inference_mode():
            return model.head.correlation(exemplar, model.head.search(model.backbone(crops)))

    return work


def bare_training(model: SiamFC, device: torch.device, pairs: int) -> Callable[[], object]:
    """Forward of the backbone alone, on normalised crops that are there."""
    crops = [
        torch.randn(pairs, 3, size, size, device=device) for size in (EXEMPLAR_PX, TRAIN_SEARCH_PX)
    ]

    def work() -> object:
        with torch.inference_mode():
            return [model.backbone(part) for part in crops]

    return work


class PlainTracker:
    """As it is plainly written: a padded copy of the frame and a forward for each scale.

    Args:
        model: on ``device``.
        config: of the inference.
        device: where the network computes; the rest is done in numpy.
    """

    def __init__(self, model: SiamFC, config: TrackerConfig, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device
        self._size = ((SEARCH_PX - EXEMPLAR_PX) // STRIDE + 1) * config.upsampling
        window = np.outer(np.hanning(self._size), np.hanning(self._size))
        self._window = window / window.sum()
        around = config.scales // 2
        self._factors = config.scale_step ** np.arange(-around, around + 1)

    def init(self, frame: Pixels, box: Sequence[float]) -> None:
        """Take the target from a frame."""
        target = target_of(box)
        self._centre = np.array([target.x, target.y])
        self._side = target.exemplar_side
        self._mean = frame.mean((0, 1))
        crop = self._crop(frame, self._side, EXEMPLAR_PX)
        with torch.inference_mode():
            self._exemplar = self._model.head.exemplar(self._model.backbone(self._input(crop)))

    def update(self, frame: Pixels) -> NDArray[np.float64]:
        """Search the next frame; returns the centre."""
        side = self._side * SEARCH_PX / EXEMPLAR_PX
        larger = []
        for factor in self._factors:
            crop = self._crop(frame, side * factor, SEARCH_PX)
            with torch.inference_mode():
                search = self._model.head.search(self._model.backbone(self._input(crop)))
                response = F.conv2d(search, self._exemplar)[0, 0].float().cpu().numpy()
            image = Image.fromarray(response).resize((self._size,) * 2, Image.Resampling.BICUBIC)
            penalty = 1.0 if factor == 1 else self._config.scale_penalty
            larger.append(np.asarray(image) * penalty)
        scale = int(np.argmax([one.max() for one in larger]))
        chosen = larger[scale] - larger[scale].min()
        mixed = chosen / (chosen.sum() + 1e-16) * (1 - self._config.window)
        mixed = mixed + self._config.window * self._window
        row, column = np.unravel_index(mixed.argmax(), mixed.shape)
        away = np.array([column, row]) - (self._size - 1) / 2
        moved = away * STRIDE / self._config.upsampling * side * self._factors[scale] / SEARCH_PX
        height, width = frame.shape[:2]
        self._centre = np.clip(self._centre + moved, 0, [width - 1, height - 1])
        return self._centre

    def _crop(self, frame: Pixels, side: float, size: int) -> Pixels:
        edge = round(side)
        corner = np.round(self._centre - (edge - 1) / 2).astype(int)
        height, width = frame.shape[:2]
        pad = max(0, *(-corner), *(corner + edge - np.array([width, height])))
        padded = np.empty((height + 2 * pad, width + 2 * pad, 3), np.uint8)
        padded[:] = self._mean
        padded[pad : pad + height, pad : pad + width] = frame
        x, y = corner + pad
        patch = Image.fromarray(padded[y : y + edge, x : x + edge])
        return np.asarray(patch.resize((size, size), Image.Resampling.BILINEAR))

    def _input(self, crop: Pixels) -> Tensor:
        return normalise(torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].to(self._device))


class PlainStep:
    """A training step with a grouped convolution, and the backbone within autograd's sight."""

    def __init__(self, model: SiamFC, device: torch.device, scale: float) -> None:
        self._model, self._device, self._scale = model, device, scale
        self._optimizer = torch.optim.SGD(model.trained_parameters(), lr=1e-3, momentum=0.9)
        cells = math.ceil(TRAIN_SEARCH_PX / STRIDE) - math.ceil(EXEMPLAR_PX / STRIDE) + 1
        self._labels = response_labels(cells, 16.0).to(device)

    def __call__(self, exemplars: Tensor, searches: Tensor) -> None:
        """(n, 3, 127, 127) and (n, 3, 239, 239) uint8 crops."""
        head, n = self._model.head, len(exemplars)
        exemplar = head.exemplar(self._model.backbone(normalise(exemplars.to(self._device))))
        search = head.search(self._model.backbone(normalise(searches.to(self._device))))
        joined = search.reshape(1, -1, *search.shape[2:])
        responses = F.conv2d(joined, exemplar, groups=n)[0] * self._scale + head.bias
        loss = balanced_loss(responses, self._labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
