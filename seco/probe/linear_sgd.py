"""A linear classifier trained by SGD on frozen features: softmax and cross-entropy, with biases.

MoCo's protocol (lr 30, batch 256, 100 epochs, momentum 0.9, no weight decay) is for features of
about unit length. Multiplying features by s changes nothing if the rate is divided by s², so the
rate here is divided by the mean squared length of the training rows: ``lr`` means the same for
every scale of features, and is MoCo's own for unit length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, linear

from seco.features.matrix import FeatureMatrix, FeaturesTooLarge
from seco.probe.svm_rows import Products
from seco.processes.device import exact_products
from seco.runs.schedule import learning_rate

_MOMENTUM = 0.9
_FIRST_DEVIATION = 0.01  # of the weights, as MoCo
_LARGEST_LENGTH = 1e15  # its square divides the learning rate


@dataclass(frozen=True)
class LinearClassifier:
    """A fitted classifier."""

    classes: NDArray[np.int64]  # (K,) ascending
    weights: NDArray[np.float32]  # (K, D)
    biases: NDArray[np.float32]  # (K,)

    def scores(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Logits (M, K) of features (M, D)."""
        logits: NDArray[np.float64] = features.astype(np.float64) @ self.weights.T + self.biases
        return logits


def fit_linear(
    features: FeatureMatrix,
    labels: NDArray[Any],
    *,
    lr: float = 30.0,
    epochs: int = 100,
    batch_size: int = 256,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    advance: Callable[[], object] = lambda: None,
) -> LinearClassifier:
    """Train on features (N, D) and labels (N,); the rate falls to 0 along a cosine.

    Rows come in a new order in every epoch and are read as they come, so that features may be
    larger than memory.

    Args:
        lr: divided by the mean squared length of a row.
        advance: called after each epoch.

    Raises:
        FeaturesTooLarge: the learning rate for them would be none in float32.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    products = Products(features, torch.device(device))
    target = torch.from_numpy(targets.astype(np.int64)).to(products.device)
    count = products.count
    square = sum(float(b.double().square().sum()) for _, b in products.blocks(torch.float32))
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(len(classes), products.dimension, generator=generator)
    length = math.sqrt(square / count) or 1.0
    if not length < _LARGEST_LENGTH:
        raise FeaturesTooLarge("rows too long for float32")
    # The first logits, too, are as they would be for unit length.
    weights = (first * (_FIRST_DEVIATION / length)).to(products.device).requires_grad_()
    biases = torch.zeros(len(classes), device=products.device, requires_grad=True)
    # A bias is the weight of a feature that is 1 everywhere, and is not divided.
    optimizer = torch.optim.SGD(
        [{"params": [weights]}, {"params": [biases]}],
        lr=lr, momentum=_MOMENTUM, weight_decay=weight_decay,
    )  # fmt: skip
    steps = math.ceil(count / batch_size)
    with exact_products():
        for epoch in range(epochs):
            order = torch.randperm(count, generator=generator)
            for step, rows in enumerate(order.split(batch_size)):
                rate = learning_rate(
                    epoch * steps + step, base_lr=lr, final_lr=0.0, warmup_epochs=0,
                    epochs=epochs, steps_per_epoch=steps,
                )  # fmt: skip
                optimizer.param_groups[0]["lr"] = rate / length**2
                optimizer.param_groups[1]["lr"] = rate
                # In order, because a file is read faster so.
                chosen = rows.sort().values.to(products.device)
                logits = linear(products.take(chosen), weights, biases)
                optimizer.zero_grad(set_to_none=True)
                cross_entropy(logits, target[chosen]).backward()
                optimizer.step()
            advance()
    return LinearClassifier(
        classes.astype(np.int64), weights.detach().cpu().numpy(), biases.detach().cpu().numpy()
    )
