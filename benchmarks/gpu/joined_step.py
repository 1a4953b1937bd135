"""The training step as it was before it took one BatchNorm group at a time: for comparison only.

All queries went through one forward and all keys through another, in contiguous layout, and
BatchNorm put each group's channels side by side. Results are the same, see tests/seco/test_method.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.step_ways import StepWays
from seco.config import PretrainConfig
from seco.models.seco import KEYS, Embeddings, SeCo
from seco.training.step import TrainingStep
from tests.seco.grouped_batchnorm import joined_forward, with_grouped_layers


class _JoinedEncoder(nn.Module):
    """An encoder that normalises its images in groups, in one forward."""

    def __init__(self, encoder: nn.Module, group: int, passes: int) -> None:
        super().__init__()
        self.encoder = with_grouped_layers(encoder)
        self._group = group
        self._passes = passes

    def forward(self, images: Tensor) -> Embeddings:
        """(N, 3, S, S) → for each head (N, D)."""
        return joined_forward(self.encoder, images, self._group, self._passes)


class _JoinedSeCo(SeCo):
    """A model whose ``bn_group`` is for its layers, not for the step that feeds it."""

    def __init__(self, config: PretrainConfig, group: int) -> None:
        super().__init__(config)
        self.query_encoder = _JoinedEncoder(self.query_encoder, group, 1)  # type: ignore[assignment]
        self.key_encoder = _JoinedEncoder(self.key_encoder, group, KEYS)  # type: ignore[assignment]

    @torch.no_grad()
    def encode_keys(self, groups: Iterable[Tensor], per_key: int) -> Embeddings:
        """All keys in one forward."""
        return self.key_encoder(torch.cat(list(groups)))  # type: ignore[no-any-return]


def joined_step(ways: StepWays) -> TrainingStep:
    """A step of the same settings, whose queries and keys are each encoded in one forward."""
    given = ways.config
    whole = dataclasses.replace(
        given, bn_group=given.batch_size, channels_last=False, compile=False
    )
    group = given.bn_group or given.batch_size
    return ways.step(whole, functools.partial(_JoinedSeCo, group=group))
