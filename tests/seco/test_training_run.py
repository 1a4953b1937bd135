"""What the training loop does whatever it trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from seco.processes.ranks import Ranks
from seco.training.loop import TrainingRun
from shards.errors import InputError


class BesideOne(Ranks):
    """The first of two ranks; the other one says what it is told to."""

    def __init__(self, stopped: bool, unreadable: int) -> None:
        super().__init__(0, 2)
        self._other = np.array([[float(stopped), float(unreadable)]])

    def gather_host(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([rows, self._other])


class ARun(TrainingRun[Any, Any]):
    """Without steps."""

    command, replaced_by = "train", "sequence"
    _batches = _train_step = _learning_rate = _figures = _status = cast(Any, None)


def a_run(ranks: Ranks) -> ARun:
    run = ARun()
    run.ranks = ranks
    run.config = SimpleNamespace(batch_size=8, max_unreadable=1.0)
    run.state = cast(Any, SimpleNamespace(step=0, unreadable=0))
    return run


def batch(unreadable: int) -> SimpleNamespace:
    return SimpleNamespace(unreadable=["its disk is gone"] * unreadable)


def test_unreadable_samples_of_all_ranks_count(capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(BesideOne(stopped=False, unreadable=3))
    assert not run._stopping(batch(2))
    assert run.state.unreadable == 5
    said = "seco train: unreadable, replaced by another sequence: its disk is gone"
    assert capsys.readouterr().err.splitlines() == [said] * 2


def test_a_batch_that_is_not_trained_on_counts_when_it_comes_again() -> None:
    run = a_run(BesideOne(stopped=True, unreadable=0))
    assert run._stopping(batch(2))  # another rank was told to stop
    assert run._stopping(None)
    measured = a_run(BesideOne(stopped=False, unreadable=0))
    assert not measured._stopping(batch(2), counted=False)
    assert run.state.unreadable == measured.state.unreadable == 0


def test_too_many_end_the_run() -> None:
    with pytest.raises(InputError, match="11 samples could not be read by step 1"):
        a_run(BesideOne(stopped=False, unreadable=11))._stopping(batch(0))
