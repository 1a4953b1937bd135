"""The three losses of SeCo (paper §4.2–4.4). All embeddings are unit vectors (N, D)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seco.models.queue import negative_logsumexp


def inter_loss(
    query: Tensor,
    keys: Tensor,
    negatives: Tensor,
    temperature: float,
    masked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Inter-frame instance discrimination, Eq. 2: the mean InfoNCE of the three positives.

    The sum over the negatives is the same for all three positives, so it is computed once, in
    blocks: neither the 3N × (K+1) logits of the plain form nor an N × K matrix is materialised.

    Args:
        query: (N, D).
        keys: (3, N, D), the positives k1, k2, k3.
        negatives: (K, D), the queue.
        temperature: τ of Eq. 1.
        masked: (N, K) bool, negatives to leave out; None for none.

    Returns:
        The loss, and the accuracy: the share of the 3N positives that score above all negatives.
    """
    positive = (query * keys).sum(-1) / temperature  # (3, N)
    rest, hardest = negative_logsumexp(query, negatives, temperature, masked)  # (N,), (N,)
    loss = (torch.logaddexp(positive, rest.expand_as(positive)) - positive).mean()
    with torch.no_grad():
        accuracy = (positive > hardest).float().mean()
    return loss, accuracy


def intra_loss(query: Tensor, keys: Tensor, temperature: float, form: str) -> tuple[Tensor, Tensor]:
    """Intra-frame instance discrimination, Eq. 3: k1 is from the query's frame, k2 and k3 are not.

    Args:
        query: (N, D).
        keys: (3, N, D).
        temperature: τ.
        form: ``three-way`` (Eq. 3) or ``pairwise`` (authors' code: the mean of the two 2-way
            terms k1 against k2 and k1 against k3).

    Returns:
        The loss, and the accuracy: the share of queries whose k1 scores highest.
    """
    logits = (query * keys).sum(-1).t() / temperature  # (N, 3)
    if form == "three-way":
        loss = F.cross_entropy(
            logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        )
    elif form == "pairwise":
        loss = F.softplus(logits[:, 1:] - logits[:, :1]).mean()
    else:
        raise ValueError(f"unknown form of the intra loss {form!r}")
    with torch.no_grad():
        accuracy = (logits[:, 0] > logits[:, 1:].amax(1)).float().mean()
    return loss, accuracy


def order_loss(logits: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Temporal order validation, Eq. 4, from the classifier's logits (N, 2) and labels (N,).

    Returns:
        The cross-entropy, and the accuracy.
    """
    with torch.no_grad():
        accuracy = (logits.argmax(1) == order).float().mean()
    return F.cross_entropy(logits, order), accuracy
