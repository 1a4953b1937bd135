"""Losses, queue and learning rates against the authors' numbers and against plain loops."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor

from seco.models.losses import inter_loss, intra_loss, order_loss
from seco.models.queue import NegativeQueue
from seco.schedule import learning_rate
from tests.data import golden


def unit(*shape: int, seed: int = 0) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1)


def test_three_steps_of_the_authors_code() -> None:
    numbers = {k: torch.from_numpy(np.asarray(v)) for k, v in golden("official_losses.npz").items()}
    queue = NegativeQueue(40, 128, "uniform", torch.Generator())
    queue.rows.copy_(numbers["memory_before"])
    for step in range(3):

        def of(name: str, step: int = step) -> Tensor:
            return numbers[f"step{step}_{name}"]

        query = of("q_inter").requires_grad_()
        keys = torch.stack([of(f"k{i}_inter") for i in (1, 2, 3)])
        loss, _ = inter_loss(query, keys, queue.rows.clone(), 0.1)
        loss.backward()
        torch.testing.assert_close(loss.detach(), of("loss_inter"), atol=1e-5, rtol=0)
        torch.testing.assert_close(query.grad, of("grad_q_inter"), atol=1e-6, rtol=0)
        queue.append(keys.flatten(0, 1), torch.zeros(18, dtype=torch.long))
        assert torch.equal(queue.rows, of("memory_after"))
        assert int(queue.next_slot) == int(of("next_slot"))

        query = of("q_intra").requires_grad_()
        keys = torch.stack([of(f"k{i}_intra") for i in (1, 2, 3)])
        loss, _ = intra_loss(query, keys, 0.1, "pairwise")
        loss.backward()
        torch.testing.assert_close(loss.detach(), of("loss_intra"), atol=1e-5, rtol=0)
        torch.testing.assert_close(query.grad, of("grad_q_intra"), atol=1e-6, rtol=0)


def test_every_learning_rate_of_the_authors_code() -> None:
    numbers = golden("official_losses.npz")
    base, divisor, warmup, epochs, steps, final = numbers["lr_meta"]
    rates = [
        learning_rate(
            step,
            base_lr=base,
            final_lr=final,
            warmup_epochs=int(warmup),
            epochs=int(epochs),
            steps_per_epoch=int(steps),
            warmup_divisor=divisor,
        )
        for step in range(len(numbers["lr_per_step"]))
    ]
    np.testing.assert_allclose(rates, numbers["lr_per_step"], rtol=1e-9, atol=1e-12)


def test_the_papers_schedule_is_a_plain_cosine_to_zero() -> None:
    def rate(step: int) -> float:
        return learning_rate(
            step, base_lr=0.2, final_lr=0.0, warmup_epochs=0, epochs=4, steps_per_epoch=25
        )

    assert rate(0) == 0.2
    assert rate(50) == pytest.approx(0.1)
    assert rate(99) == pytest.approx(0.1 * (1 + math.cos(math.pi * 0.99)))
    assert rate(100) == pytest.approx(0.0)


@pytest.mark.parametrize("masking", [False, True])
def test_inter_equals_a_loop_over_equation_2(masking: bool) -> None:
    query, keys, rows = unit(5, 8, seed=1), unit(3, 5, 8, seed=2), unit(11, 8, seed=3)
    masked = torch.rand(5, 11, generator=torch.Generator().manual_seed(4)) < 0.3
    terms, right = [], []
    for n in range(5):
        kept = [row for k, row in enumerate(rows) if not (masking and masked[n, k])]
        others = [math.exp(float(query[n] @ row) / 0.1) for row in kept]
        for i in range(3):
            positive = math.exp(float(query[n] @ keys[i, n]) / 0.1)
            terms.append(-math.log(positive / (positive + sum(others))))
            right.append(positive > max(others))
    loss, accuracy = inter_loss(query, keys, rows, 0.1, masked if masking else None)
    assert float(loss) == pytest.approx(sum(terms) / 15, abs=1e-12)
    assert float(accuracy) == pytest.approx(sum(right) / 15)


@pytest.mark.parametrize("block", [1, 7, 40, 10**6])
def test_blocks_of_negatives_change_neither_loss_nor_gradient(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    keys, rows = unit(3, 5, 8, seed=2), unit(11, 8, seed=3)
    masked = torch.rand(5, 11, generator=torch.Generator().manual_seed(4)) < 0.3
    query, plain = unit(5, 8, seed=1).requires_grad_(), unit(5, 8, seed=1).requires_grad_()
    monkeypatch.setattr("seco.models.queue._BLOCK_LOGITS", {"cpu": block})
    loss, _ = inter_loss(query, keys, rows, 0.1, masked)
    loss.backward()
    positive = (plain * keys).sum(-1) / 0.1
    negative = (plain @ rows.t() / 0.1).masked_fill(masked, float("-inf"))
    logits = torch.cat([positive[..., None], negative.expand(3, -1, -1)], dim=2)
    expected = -logits.log_softmax(2)[..., 0].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(query.grad, plain.grad)
    assert torch.autograd.gradcheck(
        lambda q: inter_loss(q, keys, rows, 0.5, masked)[0], (unit(5, 8, seed=6).requires_grad_(),)
    )


def test_a_query_whose_negatives_are_all_masked_has_no_loss_and_sound_gradients() -> None:
    keys, rows = unit(3, 2, 8, seed=2), unit(4, 8, seed=3)
    masked = torch.tensor([[True] * 4, [True, False, False, True]])
    query = unit(2, 8, seed=1).requires_grad_()
    loss, _ = inter_loss(query, keys, rows, 0.1, masked)
    loss.backward()
    assert bool(torch.isfinite(loss)) and query.grad is not None
    assert torch.equal(query.grad[0], torch.zeros_like(query.grad[0]))
    assert bool(torch.isfinite(query.grad).all()) and bool(query.grad[1].any())


def test_intra_forms_equal_loops() -> None:
    query, keys = unit(6, 8, seed=1), unit(3, 6, 8, seed=2)
    three, pairs = [], []
    for n in range(6):
        e = [math.exp(float(query[n] @ keys[i, n]) / 0.1) for i in range(3)]
        three.append(-math.log(e[0] / sum(e)))
        pairs += [-math.log(e[0] / (e[0] + e[i])) for i in (1, 2)]
    assert float(intra_loss(query, keys, 0.1, "three-way")[0]) == pytest.approx(sum(three) / 6)
    assert float(intra_loss(query, keys, 0.1, "pairwise")[0]) == pytest.approx(sum(pairs) / 12)
    with pytest.raises(ValueError, match="unknown form"):
        intra_loss(query, keys, 0.1, "other")


def test_order_is_cross_entropy_of_equation_4() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    order = torch.tensor([0, 1, 1])
    expected = (
        -math.log(1 / (1 + math.exp(-2)))
        - math.log(1 / (1 + math.exp(-1)))
        - math.log(1 / (1 + math.exp(4)))
    ) / 3
    loss, accuracy = order_loss(logits, order)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(accuracy) == pytest.approx(2 / 3)


@pytest.mark.parametrize("batch", [1, 4, 7, 10, 23])
def test_the_queue_is_a_deque(batch: int) -> None:
    queue = NegativeQueue(10, 4, "unit", torch.Generator().manual_seed(0))
    model = deque(queue.rows.clone(), maxlen=10)
    for step in range(6):
        keys = unit(batch, 4, seed=step).float()
        queue.append(keys, torch.arange(batch) + 100 * step)
        model.extend(keys)
        slot = int(queue.next_slot)
        oldest_first = torch.cat([queue.rows[slot:], queue.rows[:slot]])
        assert torch.equal(oldest_first, torch.stack(list(model)))
        assert queue.fill == min(1.0, batch * (step + 1) / 10)
    newest = int((queue.next_slot - 1) % 10)
    assert int(queue.videos[newest]) == 500 + batch - 1


def test_the_queues_first_rows() -> None:
    unit_rows = NegativeQueue(500, 16, "unit", torch.Generator().manual_seed(0)).rows
    torch.testing.assert_close(unit_rows.norm(dim=1), torch.ones(500))
    uniform = NegativeQueue(500, 16, "uniform", torch.Generator().manual_seed(0)).rows
    bound = 1 / math.sqrt(16 / 3)
    assert float(uniform.abs().max()) <= bound
    assert float(uniform.abs().max()) > 0.95 * bound
    again = NegativeQueue(500, 16, "unit", torch.Generator().manual_seed(0)).rows
    assert torch.equal(unit_rows, again)
