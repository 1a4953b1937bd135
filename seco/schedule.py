"""The learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

_WARMUP_DIVISOR = 100  # authors' code: warm-up starts from lr / 100


def learning_rate(
    step: int,
    *,
    base_lr: float,
    final_lr: float,
    warmup_epochs: int,
    epochs: int,
    steps_per_epoch: int,
    warmup_divisor: float = _WARMUP_DIVISOR,
) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine to ``final_lr``, per step.

    Paper §5.2 (``warmup_epochs`` 0, ``final_lr`` 0) and the authors' code (5 and 1e-6).
    """
    warmup = warmup_epochs * steps_per_epoch
    if step < warmup:
        first = base_lr / warmup_divisor
        return first + (base_lr - first) * step / warmup
    total = epochs * steps_per_epoch - warmup
    progress = min(1.0, (step - warmup) / max(1, total))
    return final_lr + (base_lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2


def step_decay(
    step: int, *, base_lr: float, decay_epochs: Iterable[int], steps_per_epoch: int
) -> float:
    """Learning rate of a fine-tuning step (from 0): ``base_lr``, times 0.1 after each decay epoch.

    The authors' schedule decays one epoch later (it adds its warm-up of -1 epochs to each): after
    51 and 101 of 150 epochs where their settings say 50 and 100.
    """
    passed = sum(step >= epoch * steps_per_epoch for epoch in decay_epochs)
    return base_lr / float(10**passed)
