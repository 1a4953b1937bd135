"""Batches copied beside the step: in which order a GPU would do things, played through on the CPU.

Streams are lists of operations that nothing has done yet; then they are done in the most hostile
order that their events allow.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from seco.data.loader import BatchRing, DeviceCopies

Operation = Callable[[], bool]  # whether it could be done


class Event:
    def __init__(self) -> None:
        self.recorded: list[bool] = [True]  # of the newest record; CUDA's starts as done

    def record(self, stream: Stream) -> None:
        done = self.recorded = [False]

        def mark() -> bool:
            done[0] = True
            return True

        stream.operations.append(mark)

    def synchronize(self) -> None:
        while not self.recorded[0]:
            assert run_one(), "a deadlock"


class Stream:
    def __init__(self, device: object = None) -> None:
        self.operations: list[Operation] = []
        streams.append(self)

    def wait_event(self, event: Event) -> None:
        done = event.recorded
        self.operations.append(lambda: done[0])

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


streams: list[Stream] = []
current: list[Stream] = []


def run_one() -> bool:
    """Do one operation: of the newest stream that can, so that copies overtake computing."""
    for stream in reversed(streams):
        if stream.operations and stream.operations[0]():
            stream.operations.pop(0)
            return True
    return False


class Buffer(torch.Tensor):
    """Device memory: what is copied into it arrives when its stream comes to that."""

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:
        assert non_blocking
        plain = self.as_subclass(torch.Tensor)

        def arrive() -> bool:
            plain.copy_(source)
            return True

        current[-1].operations.append(arrive)
        return self


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Stream:
    streams.clear()
    stream = Stream()
    current[:] = [stream]

    @contextlib.contextmanager
    def use(other: Stream) -> Iterator[None]:
        current.append(other)
        yield
        current.pop()

    empty_like = torch.empty_like
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(
        torch, "empty_like", lambda like, device: empty_like(like).as_subclass(Buffer)
    )
    return stream


@pytest.mark.parametrize("copies_first", [True, False])
def test_steps_see_their_batch_and_the_loader_may_write_anew(
    compute: Stream, copies_first: bool
) -> None:
    copies = DeviceCopies(torch.device("cpu"))
    if not copies_first:
        streams.reverse()
    ring = [torch.full((4,), -1) for _ in range(3)]  # a batch read, one on its way, one being made
    seen: list[list[int]] = []
    for step in range(9):
        host = ring[step % len(ring)]
        host.fill_(step)
        batch = copies.copy(host).as_subclass(torch.Tensor)

        def read(batch: torch.Tensor = batch) -> bool:
            seen.append(batch.tolist())
            return True

        compute.operations.append(read)
    while run_one():
        pass
    assert not any(stream.operations for stream in streams)
    assert seen == [[step] * 4 for step in range(9)]


def test_a_step_does_not_delay_the_copy_of_the_next_batch(compute: Stream) -> None:
    copies, numbers = DeviceCopies(torch.device("cpu")), itertools.count()
    host = torch.zeros(4)
    copies.copy(host)
    compute.operations.append(lambda: next(numbers) > 10**9)  # a step that does not end
    second = copies.copy(host.fill_(1)).as_subclass(torch.Tensor)
    while run_one():
        pass
    assert second.tolist() == [1, 1, 1, 1]


def test_the_driver_s_refusal_to_pin_is_no_error_of_the_next_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pending = []

    class Cudart:
        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
            pending.append("out of memory")
            return 2

    def kernel(*size: int, device: str) -> torch.Tensor:
        if pending:
            raise RuntimeError(pending.pop())
        return torch.zeros(size)

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch, "ones", kernel)
    ring = BatchRing(2, (3,), "uint8")
    assert not ring.pin()
    assert "cannot be pinned" in capsys.readouterr().err
    torch.ones(1, device="cuda")
    ring.close()
