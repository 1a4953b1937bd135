"""Frozen means frozen: a check that a backbone is still the one that was loaded.

A BatchNorm left in training mode moves with every batch, and features then depend on their order.
"""

from __future__ import annotations

from seco.checkpoints.weights import Backbone
from seco.model.backbones import tensors_sha256
from shards.errors import InputError


class BackboneChanged(InputError):
    """The weights are not those that were loaded: results would be of nobody knows what."""


class BackboneGuard:
    """Notices when a backbone that should be frozen has moved.

    Args:
        backbone: as loaded.
        meanwhile: when it must not move, and what becomes of the results if it does.
    """

    def __init__(
        self,
        backbone: Backbone,
        meanwhile: str = "while features were extracted; none of these is kept",
    ) -> None:
        self._backbone = backbone
        self._meanwhile = meanwhile
        self._statistics = self._of_buffers()

    def require_same_statistics(self) -> None:
        """The running statistics are as they were: cheap, and what moves first by mistake.

        Raises:
            BackboneChanged: they are not.
        """
        if self._of_buffers() != self._statistics:
            raise self._changed("BatchNorm statistics")

    def require_unchanged(self) -> None:
        """Every tensor is as it was.

        Raises:
            BackboneChanged: one is not.
        """
        if tensors_sha256(self._backbone.network.state_dict()) != self._backbone.sha256:
            raise self._changed("weights")

    def _of_buffers(self) -> str:
        return tensors_sha256(dict(self._backbone.network.named_buffers()))

    def _changed(self, what: str) -> BackboneChanged:
        return BackboneChanged(
            f"its {what} changed {self._meanwhile}",
            self._backbone.source,
            "please report this",
        )
