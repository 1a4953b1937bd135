"""Is the run healthy? Losses beside their chance levels, and warnings a user can act on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from seco.config import TASKS, PretrainConfig, negative_count

_ORDER_TRIAL_EPOCHS = 20  # at chance after so many: the clips may have no direction of time
_CHANCE_BAND = 0.02  # of the accuracy; 0.5 is chance
_COLLAPSED = 0.1  # of the spread; 1 is evenly over the sphere
_WAITS_TOO_LONG = 0.2  # share of the time
_SETTLED_STEPS = 50  # the loader fills its buffers first
_ORDER_LOOKS = 20  # at least
_MEMORY = 0.9  # of the running mean of the order accuracy


def chance_levels(config: PretrainConfig) -> dict[str, float]:
    """The loss of each task when nothing is known: ln(1 + K), ln 3 or ln 2, ln 2."""
    intra = 3 if config.intra == "three-way" else 2
    return {
        "inter": math.log(1 + negative_count(config.queue_size, config.batch_size)),
        "intra": math.log(intra),
        "order": math.log(2),
    }


def status(metrics: Mapping[str, Any], speed: Mapping[str, float]) -> str:
    """The end of the progress line."""
    parts = [f"{t} {metrics[f'loss_{t}']:.3f}" for t in TASKS if f"loss_{t}" in metrics]
    accuracies = [f"{metrics[f'acc_{t}']:.0%}" for t in TASKS if f"acc_{t}" in metrics]
    queue = f"queue {metrics['queue_fill']:.0%}, " if "queue_fill" in metrics else ""
    return (
        f"loss {metrics['loss']:.3f} ({', '.join(parts)}), right {'/'.join(accuracies)}, "
        f"spread {metrics['feature_std']:.2f}, {queue}"
        f"{speed['images_per_s']:.0f} images/s, {speed['data_wait']:.0%} waiting for data"
    )


class Health:
    """Looks at every logged step and says each kind of trouble once.

    Args:
        config: resolved settings.
        say: shows a line to the user.
    """

    def __init__(self, config: PretrainConfig, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()
        self._begun_at: int | None = None
        self._order: float | None = None
        self._looks = 0
        chance = chance_levels(config)
        levels = ", ".join(f"{t} {chance[t]:.3f}" for t in TASKS if t in config.tasks.split(","))
        say(f"loss at chance: {levels}")

    def look(self, step: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        """Warn of what these figures show.

        Args:
            step: steps done.
            metrics: of the step.
            speed: since the last look.
        """
        if self._begun_at is None:
            self._begun_at = step
        if "acc_order" in metrics:
            accuracy = float(metrics["acc_order"])
            before = accuracy if self._order is None else self._order
            self._order = _MEMORY * before + (1 - _MEMORY) * accuracy
            self._looks += 1
            at_chance = self._looks >= _ORDER_LOOKS and abs(self._order - 0.5) < _CHANCE_BAND
            if metrics["epoch"] >= _ORDER_TRIAL_EPOCHS and at_chance:
                self._warn(
                    "order",
                    f"order is still guessed after {metrics['epoch']} epochs: the clips may have "
                    "no direction of time; --tasks inter,intra leaves the task out",
                )
        if metrics["feature_std"] < _COLLAPSED:
            self._warn(
                "spread",
                f"the embeddings collapse (spread {metrics['feature_std']:.3f} of 1): lower --lr",
            )
        if step - self._begun_at > _SETTLED_STEPS and speed["data_wait"] > _WAITS_TOO_LONG:
            self._warn(
                "data",
                f"{speed['data_wait']:.0%} of the time goes in waiting for data: raise --workers, "
                "keep the shards on a local disk, or give --decode nvjpeg on a GPU",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(f"warning: {message}")
