"""SeCo itself: query and key encoder, queue, order classifier, and the losses of a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seco.config import PretrainConfig, task_list
from seco.model.batchnorm import group_order, set_groups
from seco.model.contrast import NegativeQueue
from seco.model.encoder import Encoder
from seco.model.key_shuffle import KEYS, KeyShuffle
from seco.model.losses import inter_loss, intra_loss, order_loss
from seco.processes.device import to_device

Embeddings = dict[str, Tensor]  # by head


@dataclass
class StepResult:
    """What one forward gives: the summed loss, and detached figures by name for the log.

    Each of them is a mean over the rows, so those of all ranks are the means of theirs.
    """

    loss: Tensor
    figures: dict[str, Tensor]
    moments: Tensor  # (2, D) means of the first task's embeddings and of their squares


class SeCo(nn.Module):
    """The model of paper §4 with every switch of its settings.

    Its parts are called one after the other by :class:`seco.pretrain.step.TrainingStep`: the keys
    first, without gradients, then ``forward`` with the queries, then the queue.

    Args:
        config: resolved settings (:func:`seco.config.resolve`).
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.tasks = task_list(config)
        self.head_of = {t: t if config.heads == "separate" else "shared" for t in self.tasks}
        heads = dict.fromkeys(self.head_of.values())
        self.query_encoder = Encoder(config.arch, heads, config.embedding_dim)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.order_classifier = nn.Linear(3 * config.embedding_dim, 2)
        self.order_classifier.requires_grad_("order" in self.tasks)
        generator = torch.Generator().manual_seed(config.seed)
        self.queue = NegativeQueue(
            config.queue_size, config.embedding_dim, config.queue_init or "unit", generator
        )

    @torch.no_grad()
    def encode_keys(self, images: Tensor, shuffle: KeyShuffle) -> Embeddings:
        """This rank's key images (3n, 3, S, S), as ``shuffle`` stacks them, to (3n, D) by place.

        The authors' code has a forward for each key. They may be joined: no group mixes them, so
        the statistics are the same.
        """
        set_groups(self.key_encoder, shuffle.groups, passes=KEYS // shuffle.forwards)
        encoded = [self.key_encoder(part) for part in images.chunk(shuffle.forwards)]
        return {
            name: shuffle.unstacked(torch.cat([part[name] for part in encoded]))
            for name in encoded[0]
        }

    def forward(
        self,
        images: Tensor,
        keys: Mapping[str, Tensor],
        order: Tensor,
        videos: Tensor,
        first: bool = True,
    ) -> StepResult:
        """The losses of n queries.

        Args:
            images: (n, 3, S, S) query views, in the order of :meth:`query_stack`.
            keys: for each head (3, n, D), k1, k2, k3 of the same rows.
            order: (n,) 0 when the anchor is before k2 and k3, 1 when after.
            videos: (n,) numbers of the videos.
            first: of the micro-batches of a step: BatchNorm's running statistics follow it.
        """
        config = self.config
        stack = to_device(self.query_stack(len(images)), images.device)
        set_groups(self.query_encoder, self._groups(len(images)), passes=int(first))
        queries = {name: _put_back(v, stack) for name, v in self.query_encoder(images).items()}
        figures: dict[str, Tensor] = {}
        total = torch.zeros((), device=images.device)
        # Logits of unit vectors divided by 0.1 do not bear 8 bits of mantissa.
        with torch.autocast(images.device.type, enabled=False):
            for task in self.tasks:
                query, key = queries[self.head_of[task]], keys[self.head_of[task]]
                if task == "inter":
                    masked = self.queue.same_video(videos) if config.mask_same_video else None
                    rows = self.queue.rows
                    loss, accuracy = inter_loss(query, key, rows, config.temperature, masked)
                elif task == "intra":
                    loss, accuracy = intra_loss(
                        query, key, config.intra_temperature, config.intra or "three-way"
                    )
                else:
                    sequence = torch.cat([query, key[1], key[2]], dim=1)  # (n, 3D), Eq. 4
                    loss, accuracy = order_loss(self.order_classifier(sequence), order)
                total = total + loss
                figures |= {f"loss_{task}": loss.detach(), f"acc_{task}": accuracy}
        vectors = queries[self.head_of[self.tasks[0]]].detach()
        moments = torch.stack([vectors.mean(0), vectors.square().mean(0)])
        return StepResult(total, figures, moments)

    def query_stack(self, count: int) -> Tensor:
        """(n,) the order in which n queries must be stacked for their BatchNorm groups."""
        return group_order(torch.arange(count), self._groups(count))

    def _groups(self, count: int) -> int:
        return count // (self.config.bn_group or count)

    def append_keys(self, keys: Mapping[str, Tensor], videos: Tensor) -> None:
        """The keys of the global batch, for each head (3, N, D), become negatives."""
        if "inter" in self.tasks:
            self.queue.append(keys[self.head_of["inter"]].flatten(0, 1), videos.repeat(KEYS))

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Eq. 6, after the optimizer's step; parameters only (the key BN buffers are its own)."""
        key = [p.detach() for p in self.key_encoder.parameters()]
        query = [p.detach() for p in self.query_encoder.parameters()]
        torch._foreach_lerp_(key, query, 1 - self.config.ema)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps: the query encoder and the order classifier."""
        parameters = list(self.query_encoder.parameters())
        return parameters + (
            list(self.order_classifier.parameters()) if "order" in self.tasks else []
        )


def spread(moments: Tensor) -> Tensor:
    """1 for embeddings spread evenly over the sphere, 0 when all collapse into one."""
    mean, square = moments
    deviation: Tensor = (square - mean.square()).clamp_min(0).sqrt()
    value: Tensor = deviation.mean() * len(mean) ** 0.5
    return value


def _put_back(vectors: Tensor, order: Tensor) -> Tensor:
    """Undo ``images[order]``; differentiable."""
    return vectors[torch.argsort(order)]
