"""The SeCo model: query and key encoder, queue, order classifier, and the losses of a batch.

A query and its keys must not be normalised with the statistics of the same images (paper §5.2:
shuffling BN). Each of the three keys has a permutation of the global batch; a run of consecutive
places of it is one BatchNorm group. Rank r encodes the places r·n … (r+1)·n - 1 of each, so no rank
receives more images than it normalises, and the groups are the same for any number of ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from seco.config import PretrainConfig, default_group, resolve_pretrain, task_list
from seco.models.backbones import backbone_shape, build_backbone, feature_dim
from seco.models.batchnorm import running_statistics
from seco.models.losses import inter_loss, intra_loss, order_loss
from seco.models.queue import NegativeQueue
from seco.processes.device import to_device
from shards.settings import require

KEYS = 3
Ints = NDArray[np.int64]


class KeyShuffle:
    """Which rank encodes which key images in one step; the plan is consistent across ranks.

    Args:
        batch: N, the global batch.
        rank: this process's rank.
        size: number of ranks; divides N.
        generator: with the same seed on all ranks; None: nothing is shuffled.

    Attributes:
        wanted: (3n,) which of the 3N key images (k1 of all rows, then k2, then k3) this rank
            encodes, by key and place; n = N / size.
        sent: (3n,) the order in which this rank's own 3n key images are sent, by receiving rank.
        sent_counts: how many go to each rank.
        received_counts: how many come from each rank.
        arrived: (3n,) the position of each wanted image among the received ones.
    """

    def __init__(self, batch: int, rank: int, size: int, generator: torch.Generator | None) -> None:
        share = batch // size
        self._batch = batch
        self._share = share
        self._permutations = torch.stack(
            [
                torch.arange(batch)
                if generator is None
                else torch.randperm(batch, generator=generator)
                for _ in range(KEYS)
            ]
        )
        rows = self._permutations.numpy().reshape(KEYS, size, share)
        numbers = rows + batch * np.arange(KEYS)[:, None, None]
        self.wanted: Ints = numbers[:, rank].reshape(-1)
        owners = rows // share  # (3, R, n)
        own = owners == rank
        self.sent_counts: list[int] = own.sum(axis=(0, 2)).tolist()
        local = rows - rank * share + share * np.arange(KEYS)[:, None, None]
        self.sent: Ints = np.concatenate([local[:, to][own[:, to]] for to in range(size)])
        coming = owners[:, rank].reshape(-1)
        self.received_counts: list[int] = np.bincount(coming, minlength=size).tolist()
        self.arrived: Ints = np.empty(KEYS * share, dtype=np.int64)
        self.arrived[np.argsort(coming, kind="stable")] = np.arange(KEYS * share)

    def by_row(self, vectors: Tensor) -> Tensor:
        """Unshuffle (R · 3n, D), by rank, key and place, to (3, N, D), by key and global row."""
        size = self._batch // self._share
        by_place = vectors.view(size, KEYS, self._share, -1).transpose(0, 1)
        by_place = by_place.reshape(KEYS, self._batch, -1)
        rows = to_device(self._permutations, vectors.device)[:, :, None].expand_as(by_place)
        return torch.empty_like(by_place).scatter_(1, rows, by_place)


class Encoder(nn.Module):
    """Backbone and heads; outputs L2-normalised embeddings.

    Args:
        arch: name of the backbone.
        heads: names of the heads, ``("shared",)`` or the tasks (paper §5.2: C → C → D with ReLU).
        embedding_dim: D.
    """

    def __init__(self, arch: str, heads: Iterable[str], embedding_dim: int) -> None:
        super().__init__()
        width = feature_dim(arch)
        self.backbone = build_backbone(arch)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, embedding_dim)
                )
                for name in heads
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) to unit vectors (N, D) per head, in float32 even under autocast."""
        feature = self.backbone(images)
        vectors = {name: head(feature) for name, head in self.heads.items()}
        return {
            name: F.normalize(vector.to(torch.promote_types(vector.dtype, torch.float32)))
            for name, vector in vectors.items()
        }


Embeddings = dict[str, Tensor]  # by head


class TripletViews(Protocol):
    """A batch of N triplets, from ``seco.triplet_loader`` or a ``DataLoader``."""

    @property
    def views(self) -> Tensor | Sequence[Tensor]:
        """Query, k1 (both from the anchor), k2 and k3: (N, 3, S, S) each, normalised."""

    @property
    def order(self) -> Tensor:
        """(N,) 0 if the anchor is before k2 and k3, 1 if it is after."""

    @property
    def video(self) -> Tensor:
        """(N,) video numbers."""


@dataclass
class SeCoOutput:
    """The summed loss of some queries, and detached metrics by name.

    Each metric is a mean over rows, so averaging over groups of equal size, or over ranks, gives
    the metric of the batch.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    moments: Tensor  # (2, D) means of the first task's embeddings and of their squares
    keys: Embeddings = field(default_factory=dict)  # the batch's keys, for SeCo.update
    videos: Tensor | None = None


class Negatives(NamedTuple):
    """K keys that are positives of no query, except of queries from their own video."""

    rows: Tensor  # (K, D)
    videos: Tensor  # (K,) -1: of no video


class SeCo(nn.Module):
    """The SeCo model (paper §4): query and key encoder, queue, order classifier, losses.

    In a training loop of your own, on one device::

        model = seco.SeCo("resnet50", queue_size=65_536).cuda()
        optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.1, momentum=0.9)
        for batch in loader:
            out = model(batch.to("cuda"))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            model.update(out)

    On several GPUs, :func:`seco.pretrain` runs the same parts (:class:`TrainingStep`).

    Args:
        arch: name of the backbone, or the resolved settings of a run.
        settings: the model options of ``seco pretrain``, with the same defaults: ``tasks``,
            ``heads``, ``embedding_dim``, ``queue_size``, ``queue_init``, ``mask_same_video``,
            ``temperature``, ``intra``, ``intra_temperature``, ``ema``, ``bn_group``, ``preset``,
            ``seed`` (of the queue's initial rows).

    Raises:
        InputError: unknown architecture or task, or a value out of range.
    """

    def __init__(self, arch: str | PretrainConfig = "resnet50", **settings: Any) -> None:
        super().__init__()
        if isinstance(arch, PretrainConfig):
            config, self._bn_group = arch, arch.bn_group
        else:
            self._bn_group = settings.pop("bn_group", None)
            config = resolve_pretrain(PretrainConfig(arch=arch, **settings))
        self.config = config
        self.tasks = task_list(config)
        self.head_of = {t: t if config.heads == "separate" else "shared" for t in self.tasks}
        heads = dict.fromkeys(self.head_of.values())
        # Without BatchNorm, no image tells anything of the others it is encoded with.
        self.shuffles_keys = backbone_shape(config.arch).has_batchnorm
        self.query_encoder = Encoder(config.arch, heads, config.embedding_dim)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.order_classifier = nn.Linear(3 * config.embedding_dim, 2)
        self.order_classifier.requires_grad_("order" in self.tasks)
        self.queue: NegativeQueue | None = None  # None: the batch's keys are the negatives
        if config.queue_size:
            self.queue = NegativeQueue(
                config.queue_size,
                config.embedding_dim,
                config.queue_init or "unit",
                torch.Generator().manual_seed(config.seed),
            )
        masks = config.mask_same_video or config.negatives != "all"
        self._mask_same_video = masks or not config.queue_size

    def forward(self, batch: TripletViews) -> SeCoOutput:
        """Compute the loss of a batch, on one device.

        Keys are shuffled across BatchNorm groups of ``bn_group`` images (default: a quarter of the
        batch) with torch's global generator, unless the backbone has no BatchNorm. The activations
        of all queries are kept until ``backward``.

        Raises:
            InputError: ``bn_group`` does not divide the batch.
        """
        views, order, videos = batch.views, batch.order, batch.video
        count = len(order)
        group = default_group(count) if self._bn_group is None else self._bn_group
        require(count % group == 0, "bn_group", f"{group} does not divide the batch of {count}")
        generator = torch.default_generator if self.shuffles_keys else None
        shuffle = KeyShuffle(count, 0, 1, generator)
        groups = (
            views[1 + part[0] // count][to_device(torch.from_numpy(part % count), order.device)]
            for part in np.split(shuffle.wanted, KEYS * count // group)
        )
        encoded = self.encode_keys(groups, count // group)
        keys = {name: shuffle.by_row(vectors) for name, vectors in encoded.items()}
        negatives = self.negatives(keys, videos)
        results = []
        for begin in range(0, count, group):
            rows = slice(begin, begin + group)
            some = {name: vectors[:, rows] for name, vectors in keys.items()}
            results.append(
                self.losses(views[0][rows], some, order[rows], videos[rows], negatives, begin == 0)
            )
        out = mean_output(results)
        out.keys, out.videos = keys, videos
        return out

    def update(self, out: SeCoOutput) -> None:
        """Update the key encoder and append the batch's keys; call after the optimizer's step."""
        if out.videos is not None:
            self.append_keys(out.keys, out.videos)
        self.update_key_encoder()

    @torch.no_grad()
    def encode_keys(self, groups: Iterable[Tensor], per_key: int) -> Embeddings:
        """Encode this rank's key images, one BatchNorm group at a time.

        Args:
            groups: (g, 3, S, S) each, in the order of :class:`seco.models.seco.KeyShuffle`: k1's
                groups, then k2's, then k3's. Consumed one at a time, so a generator needs memory
                for one only.
            per_key: groups per key. The first of them updates the running statistics, as rank 0
                does in the authors' code, which has one forward per key.

        Returns:
            Unit vectors (3n, D) per head, in the groups' order.
        """
        encoded: list[Embeddings] = []
        for number, images in enumerate(groups):
            with running_statistics(self.key_encoder, follow=number % per_key == 0):
                encoded.append(self.key_encoder(images))
        return {name: torch.cat([group[name] for group in encoded]) for name in encoded[0]}

    def negatives(self, keys: Mapping[str, Tensor], videos: Tensor) -> Negatives:
        """Return the queue's rows or, without a queue, the keys of the batch.

        Args:
            keys: (3, N, D) per head.
            videos: (N,) video numbers.
        """
        if self.queue is not None:
            return Negatives(self.queue.rows, self.queue.videos)
        rows = keys[self.head_of.get("inter", next(iter(keys)))]
        return Negatives(rows.flatten(0, 1), videos.repeat(KEYS))

    def losses(
        self,
        images: Tensor,
        keys: Mapping[str, Tensor],
        order: Tensor,
        videos: Tensor,
        negatives: Negatives,
        first: bool = True,
    ) -> SeCoOutput:
        """Compute the losses of the g queries of one BatchNorm group.

        Args:
            images: (g, 3, S, S) query views.
            keys: (3, g, D) per head, k1, k2, k3 of the same rows.
            order: (g,) 0 if the anchor is before k2 and k3, 1 if it is after.
            videos: (g,) video numbers.
            negatives: the same for all groups of a batch.
            first: whether this is a step's first group, which updates BatchNorm's running
                statistics.
        """
        config = self.config
        with running_statistics(self.query_encoder, follow=first):
            queries: Embeddings = self.query_encoder(images)
        metrics: dict[str, Tensor] = {}
        total = torch.zeros((), device=images.device)
        # Cosines divided by a temperature of 0.1 need more than bfloat16's 8 bits of mantissa.
        with torch.autocast(images.device.type, enabled=False):
            for task in self.tasks:
                query, key = queries[self.head_of[task]], keys[self.head_of[task]]
                if task == "inter":
                    rows, owners = negatives
                    masked = videos[:, None] == owners if self._mask_same_video else None
                    loss, accuracy = inter_loss(query, key, rows, config.temperature, masked)
                elif task == "intra":
                    loss, accuracy = intra_loss(
                        query, key, config.intra_temperature, config.intra or "three-way"
                    )
                else:
                    sequence = torch.cat([query, key[1], key[2]], dim=1)  # (g, 3D), Eq. 4
                    loss, accuracy = order_loss(self.order_classifier(sequence), order)
                total = total + loss
                metrics |= {f"loss_{task}": loss.detach(), f"acc_{task}": accuracy}
        vectors = queries[self.head_of[self.tasks[0]]].detach()
        moments = torch.stack([vectors.mean(0), vectors.square().mean(0)])
        return SeCoOutput(total, metrics, moments)

    def append_keys(self, keys: Mapping[str, Tensor], videos: Tensor) -> None:
        """Append the keys of the global batch, (3, N, D) per head, to the queue."""
        if self.queue is not None and "inter" in self.tasks:
            self.queue.append(keys[self.head_of["inter"]].flatten(0, 1), videos.repeat(KEYS))

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Apply Eq. 6, after the optimizer's step; parameters only (BN buffers stay its own)."""
        key = [p.detach() for p in self.key_encoder.parameters()]
        query = [p.detach() for p in self.query_encoder.parameters()]
        torch._foreach_lerp_(key, query, 1 - self.config.ema)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters for the optimizer: the query encoder and the order classifier."""
        parameters = list(self.query_encoder.parameters())
        return parameters + (
            list(self.order_classifier.parameters()) if "order" in self.tasks else []
        )


def mean_output(results: Sequence[SeCoOutput]) -> SeCoOutput:
    """Mean over groups of equal size."""
    if len(results) == 1:
        return results[0]
    metrics = {
        name: torch.stack([result.metrics[name] for result in results]).mean()
        for name in results[0].metrics
    }
    return SeCoOutput(
        torch.stack([result.loss for result in results]).mean(),
        metrics,
        torch.stack([result.moments for result in results]).mean(0),
    )


def spread(moments: Tensor) -> Tensor:
    """Feature std: 1 if embeddings are spread evenly over the sphere, 0 if they have collapsed."""
    mean, square = moments
    deviation: Tensor = (square - mean.square()).clamp_min(0).sqrt()
    value: Tensor = deviation.mean() * len(mean) ** 0.5
    return value
