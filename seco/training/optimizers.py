"""The optimizers of pre-training: SGD as in the paper, AdamW and LARS as in MoCo v3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from seco.config import PretrainConfig, optimizer_of, peak_lr

_TRUST = 0.001  # MoCo v3
_BETA2 = 0.999  # torch's default, as in MoCo v3


class LARS(torch.optim.Optimizer):
    """SGD whose steps are scaled, for each weight, by its norm over that of its gradient.

    For large batches (You et al., "Large batch training of convolutional networks", 2017), as in
    MoCo v3: norms and biases, all with one dimension, are neither scaled nor decayed.

    Args:
        parameters: to train.
        lr: learning rate.
        momentum: of the scaled steps.
        weight_decay: added to the gradient before its norm is taken.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the parameters by their gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                change = parameter.grad
                if parameter.ndim > 1:
                    change = change.add(parameter, alpha=group["weight_decay"])
                    norm, size = parameter.norm(), change.norm()
                    scale = torch.where((norm > 0) & (size > 0), _TRUST * norm / size, 1.0)
                    change = change * scale
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                moved = state["momentum_buffer"].mul_(group["momentum"]).add_(change)
                parameter.add_(moved, alpha=-group["lr"])


def optimizer_for(parameters: list[nn.Parameter], config: PretrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a run.

    Args:
        parameters: those that are trained.
        config: resolved settings.
    """
    kind, lr, decay = optimizer_of(config), peak_lr(config), config.weight_decay or 0.0
    if kind == "lars":
        return LARS(parameters, lr, config.momentum, decay)
    groups: Any = parameters
    if config.decay_weights_only:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if kind == "adamw":
        betas = (config.momentum, _BETA2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, weight_decay=decay, fused=True)
