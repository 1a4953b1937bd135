"""Training on a GPU against the CPU, and what only a GPU can get wrong: copies beside kernels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from seco.config import PretrainConfig, resolve_pretrain
from seco.data.gpu_transforms import decode_frames
from seco.data.loader import BatchRing, DeviceCopies, DeviceViews
from seco.data.transforms import VIEW_DRAWS, ViewConfig
from seco.models.seco import SeCo
from seco.processes.ranks import Ranks
from seco.training.step import GlobalRows, TrainingStep, for_device
from tests.seco.test_crops import jpeg, texture
from tests.seco.test_device_decode import tensor

N, SIZE = 16, 64
CONFIG = PretrainConfig(
    arch="resnet18",
    batch_size=N,
    bn_group=8,
    crop_size=SIZE,
    queue_size=64,
    lr=0.01,
    precision="fp32",
    compile=False,
)


def trained(config: PretrainConfig, name: str) -> tuple[list[float], Tensor, int]:
    """Losses of two steps on the same views, the first layer then, and the optimizer's tensors."""
    device = torch.device(name)
    config = for_device(resolve_pretrain(config), device)
    torch.manual_seed(0)
    model = SeCo(config).to(device).train()
    views = DeviceViews(device, SIZE, ViewConfig())
    step = TrainingStep(model, config, ViewConfig(), views, Ranks(), device)
    rng = np.random.default_rng(0)
    known = GlobalRows(rng.random((4, N, VIEW_DRAWS)), torch.arange(N) % 2, torch.arange(N))
    images = torch.from_numpy(rng.standard_normal((4, N, 3, SIZE, SIZE), dtype=np.float32))
    losses = [float(step.run(images.to(device), known, n, config.lr).loss) for n in range(2)]
    weight = model.query_encoder.backbone.conv1.weight
    assert isinstance(weight, Tensor)
    return losses, weight.detach().cpu(), len(step.optimizer.state)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_computes_what_the_cpu_does(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected, weight, count = trained(dataclasses.replace(CONFIG, channels_last=False), "cpu")
    losses, ours, state = trained(dataclasses.replace(CONFIG, channels_last=True), device)
    assert losses[0] == pytest.approx(expected[0], abs=1e-4)
    assert losses[1] == pytest.approx(expected[1], abs=0.02)
    torch.testing.assert_close(ours, weight, atol=1e-3, rtol=0)
    assert state == count


def busy(device: torch.device) -> None:
    """Queue some 10 ms of kernels."""
    a = torch.ones(4096, 4096, device=device)
    for _ in range(8):
        a = a @ a


@pytest.mark.gpu
def test_batches_arrive_whole_while_kernels_are_behind() -> None:
    device = torch.device("cuda", 0)
    copies, ring = DeviceCopies(device), BatchRing(2, (1 << 24,), "uint8")
    assert ring.pin()
    wrong = torch.zeros((), dtype=torch.long, device=device)
    for step in range(24):
        host = torch.from_numpy(ring[step % 2])
        host.fill_(step)
        batch = copies.copy(host)
        busy(device)
        wrong += (batch != step).sum()
    assert int(wrong) == 0
    ring.close()


@pytest.mark.gpu
def test_decoding_leaves_memory_alone_that_queued_kernels_read() -> None:
    device = torch.device("cuda", 0)
    files = [tensor(jpeg(texture(n, 128, 96))) for n in range(16)]
    expected = torch.stack([f.cpu() for f in decode_frames(files, device).frames if f is not None])
    original = torch.randint(256, expected.shape, dtype=torch.uint8)
    for _ in range(8):
        freed = [image.to(device) for image in original]
        busy(device)
        read = torch.stack(freed)  # queued behind the products
        del freed
        frames = decode_frames(files, device).frames
        assert torch.equal(read.cpu(), original)
        assert torch.equal(torch.stack([f.cpu() for f in frames if f is not None]), expected)
