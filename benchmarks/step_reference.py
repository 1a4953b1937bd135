"""What a training step is compared with: its bare cost, and the plain way to write it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seco.config import PretrainConfig, peak_lr
from seco.models.backbones import build_backbone, feature_dim


def bare_cost(
    config: PretrainConfig,
    views: Tensor,
    device: torch.device,
    *,
    bf16: bool,
    layout: torch.memory_format,
    compiled: bool = False,
) -> Callable[[], None]:
    """One forward and backward, and three forwards without gradients, of the backbone alone.

    Args:
        config: gives the architecture.
        views: (4, N, 3, S, S) float32.
        device: of all of it.
        bf16: under autocast.
        layout: of images and weights.
        compiled: by torch.compile.
    """
    _let_cudnn_choose(device)
    network = build_backbone(config.arch).train()
    network.to(device).to(memory_format=layout)
    if compiled:
        network.compile(dynamic=False)
    query, keys = (
        part.contiguous(memory_format=layout) for part in (views[0], views[1:].flatten(0, 1))
    )

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                for part in keys.chunk(3):
                    network(part)
            loss = network(query).float().sum()
        network.zero_grad(set_to_none=True)
        loss.backward()

    return step


class PlainStep:
    """A step as it is plainly written: float32, a forward a key, all logits, a loop of updates.

    Args:
        config: resolved settings.
        device: of all of it.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self._config = config
        _let_cudnn_choose(device)
        network = build_backbone(config.arch)
        width = feature_dim(config.arch)
        network.fc = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.embedding_dim)
        )
        self._query = network.to(device).train()
        self._key = copy.deepcopy(self._query)
        self._order = nn.Linear(3 * config.embedding_dim, 2).to(device)
        self._queue = F.normalize(torch.randn(config.queue_size, config.embedding_dim)).to(device)
        self._slot = 0
        self._optimizer = torch.optim.SGD(
            [*self._query.parameters(), *self._order.parameters()],
            lr=peak_lr(config),
            momentum=config.momentum,
            weight_decay=config.weight_decay or 0.0,
            foreach=False,
        )

    def __call__(self, views: Tensor, order: Tensor) -> None:
        """Train on (4, N, 3, S, S) views with (N,) orders."""
        config = self._config
        query = F.normalize(self._query(views[0]))
        with torch.no_grad():
            keys = []
            for view in views[1:]:
                shuffle = torch.randperm(len(view), device=view.device)
                keys.append(F.normalize(self._key(view[shuffle]))[torch.argsort(shuffle)])
        repeated, positives = query.repeat(3, 1), torch.cat(keys)
        positive = (repeated * positives).sum(1, keepdim=True)
        logits = torch.cat([positive, repeated @ self._queue.t()], dim=1) / config.temperature
        nobody = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        inter = F.cross_entropy(logits, nobody)
        within = torch.stack([(query * key).sum(1) for key in keys], dim=1) / config.temperature
        intra = F.cross_entropy(within, nobody[: len(query)])
        ordering = F.cross_entropy(self._order(torch.cat([query, keys[1], keys[2]], dim=1)), order)
        self._optimizer.zero_grad()
        (inter + intra + ordering).backward()
        self._optimizer.step()
        with torch.no_grad():
            for key, own in zip(self._key.parameters(), self._query.parameters(), strict=True):
                key.data = key.data * config.ema + own.data * (1 - config.ema)
            slots = (self._slot + torch.arange(len(positives))) % len(self._queue)
            self._queue[slots.to(views.device)] = positives
            self._slot = int(slots[-1] + 1)


def _let_cudnn_choose(device: torch.device) -> None:
    """Convolutions by the algorithms that are fastest here, as in a run."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
