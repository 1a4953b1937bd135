"""SeCo: encoder, losses, training and evaluation (Yao et al., AAAI 2021).

The public API is in :mod:`seco.api`; its names are loaded when they are first used::

    import seco

    run = seco.pretrain(shards="data/raw.json", out="runs/raw", epochs=100)
    backbone = seco.load_backbone(run.checkpoint)
    features = seco.extract(backbone, "data/raw.json")
    print(seco.probe(features, split="1").top1, seco.recall_at_k(features, k=1))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from seco.api import (
        Backbone as Backbone,
    )
    from seco.api import (
        Callback as Callback,
    )
    from seco.api import (
        Features as Features,
    )
    from seco.api import (
        InputError as InputError,
    )
    from seco.api import (
        ProbeResult as ProbeResult,
    )
    from seco.api import (
        Run as Run,
    )
    from seco.api import (
        SeCo as SeCo,
    )
    from seco.api import (
        SeCoOutput as SeCoOutput,
    )
    from seco.api import (
        Triplet as Triplet,
    )
    from seco.api import (
        TripletBatch as TripletBatch,
    )
    from seco.api import (
        TripletDataset as TripletDataset,
    )
    from seco.api import (
        export as export,
    )
    from seco.api import (
        extract as extract,
    )
    from seco.api import (
        load_backbone as load_backbone,
    )
    from seco.api import (
        prepare as prepare,
    )
    from seco.api import (
        pretrain as pretrain,
    )
    from seco.api import (
        probe as probe,
    )
    from seco.api import (
        publish as publish,
    )
    from seco.api import (
        read_features as read_features,
    )
    from seco.api import (
        recall_at_k as recall_at_k,
    )
    from seco.api import (
        triplet_loader as triplet_loader,
    )

__all__ = (
    "Backbone", "Callback", "Features", "InputError", "ProbeResult", "Run", "SeCo", "SeCoOutput",
    "Triplet", "TripletBatch", "TripletDataset", "export", "extract", "load_backbone", "prepare",
    "pretrain", "probe", "publish", "read_features", "recall_at_k", "triplet_loader",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name when it is used: ``import seco`` alone stays fast."""
    if name not in __all__:
        raise AttributeError(f"module 'seco' has no attribute {name!r}")
    from seco import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
