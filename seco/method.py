"""SeCo itself: query and key encoder, queue, order classifier, and one training forward."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seco.batchnorm import group_order, set_groups
from seco.config import PretrainConfig, task_list
from seco.contrast import NegativeQueue
from seco.encoder import Encoder
from seco.losses import inter_loss, intra_loss, order_loss


@dataclass
class StepResult:
    """What one forward gives: the summed loss, and detached figures by name for the log."""

    loss: Tensor
    figures: dict[str, Tensor]


class SeCo(nn.Module):
    """The model of paper §4 with every switch of its settings.

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
        generator = torch.Generator().manual_seed(config.seed)
        self.queue = NegativeQueue(
            config.queue_size, config.embedding_dim, config.queue_init or "unit", generator
        )

    def forward(
        self, views: Tensor, order: Tensor, videos: Tensor, shuffle: torch.Generator
    ) -> StepResult:
        """One training forward; the keys are appended to the queue after the losses.

        Args:
            views: (4, N, 3, S, S): query, k1 (both of the anchor frame), k2, k3.
            order: (N,) 0 when the anchor is before k2 and k3, 1 when after.
            videos: (N,) numbers of the videos.
            shuffle: source of the keys' permutations; the same on all ranks.
        """
        config = self.config
        queries = self._encode_query(views[0])
        keys = self._encode_keys(views[1:], shuffle)
        figures: dict[str, Tensor] = {}
        total = views.new_zeros(())
        for task in self.tasks:
            query, key = queries[self.head_of[task]], keys[self.head_of[task]]
            if task == "inter":
                masked = self.queue.same_video(videos) if config.mask_same_video else None
                rows = self.queue.rows.clone()  # the queue changes before backward needs them
                loss, accuracy = inter_loss(query, key, rows, config.temperature, masked)
            elif task == "intra":
                loss, accuracy = intra_loss(
                    query, key, config.intra_temperature, config.intra or "three-way"
                )
            else:
                sequence = torch.cat([query, key[1], key[2]], dim=1)  # (N, 3D), Eq. 4
                loss, accuracy = order_loss(self.order_classifier(sequence), order)
            total = total + loss
            figures |= {f"loss_{task}": loss.detach(), f"acc_{task}": accuracy}
        spread = queries[self.head_of[self.tasks[0]]].detach().std(0).mean()
        # 1 for vectors spread evenly over the sphere, 0 when all collapse into one.
        figures["feature_std"] = spread * config.embedding_dim**0.5
        if "inter" in self.tasks:
            self.queue.append(keys[self.head_of["inter"]].flatten(0, 1), videos.repeat(3))
        return StepResult(total, figures)

    def _encode_query(self, images: Tensor) -> dict[str, Tensor]:
        groups = len(images) // (self.config.bn_group or len(images))
        order = group_order(torch.arange(len(images)), groups).to(images.device)
        set_groups(self.query_encoder, groups)
        encoded = self.query_encoder(images[order])
        return {name: _put_back(vectors, order) for name, vectors in encoded.items()}

    @torch.no_grad()
    def _encode_keys(self, images: Tensor, shuffle: torch.Generator) -> dict[str, Tensor]:
        """(3, N, …) → for each head (3, N, D); each of the three has a permutation of its own.

        The three forwards of the authors' code are joined into one: no group mixes them, so the
        statistics are the same.
        """
        n = images.shape[1]
        groups = n // (self.config.bn_group or n)
        permutations = [torch.randperm(n, generator=shuffle) + n * i for i in range(3)]
        order = group_order(torch.cat(permutations), 3 * groups).to(images.device)
        set_groups(self.key_encoder, 3 * groups, passes=3)
        encoded = self.key_encoder(images.flatten(0, 1)[order])
        return {name: _put_back(vectors, order).view(3, n, -1) for name, vectors in encoded.items()}

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


def _put_back(vectors: Tensor, order: Tensor) -> Tensor:
    """Undo ``images[order]``; differentiable."""
    return vectors[torch.argsort(order)]
