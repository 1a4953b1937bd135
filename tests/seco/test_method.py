"""A training forward against a reference that does everything one by one, in float64."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import seco.training.step
from seco.config import PretrainConfig, negative_count, resolve_pretrain
from seco.data.loader import DeviceViews
from seco.data.transforms import VIEW_DRAWS, ViewConfig
from seco.models.backbones import build_backbone, feature_dim
from seco.models.batchnorm import running_statistics
from seco.models.seco import Encoder, KeyShuffle, SeCo, SeCoOutput
from seco.processes.ranks import Ranks
from seco.training.step import GlobalRows, TrainingStep, for_device, step_seed
from tests.seco.grouped_batchnorm import joined_forward, with_grouped_layers

N, GROUP, SIZE, DIM = 4, 2, 32, 16


def settings(**changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "arch": "resnet18",
        "batch_size": N,
        "bn_group": GROUP,
        "queue_size": 10,
        "crop_size": SIZE,
        "embedding_dim": DIM,
    }
    return resolve_pretrain(PretrainConfig(**{**values, **changes}))


def made_input() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(4, N, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return views, torch.tensor([0, 1, 1, 0]), torch.tensor([7, 3, 9, 5])


def plain_copy(encoder: Encoder) -> tuple[nn.Module, nn.ModuleDict]:
    """The same weights in a stock torchvision network with stock BatchNorm."""
    backbone = torchvision.models.resnet18(weights=None).double()
    backbone.fc = nn.Identity()
    backbone.load_state_dict(encoder.backbone.state_dict(), strict=True)
    return backbone.train(), copy.deepcopy(encoder.heads)


def embed(network: tuple[nn.Module, nn.ModuleDict], images: Tensor, head: str) -> Tensor:
    vectors = network[1][head](network[0](images))
    return vectors / vectors.norm(dim=1, keepdim=True)


@dataclass
class Views:
    """A batch as a user's own loop hands it over."""

    views: Tensor
    order: Tensor
    video: Tensor


def forward(model: SeCo, views: Tensor, order: Tensor, videos: Tensor, seed: int) -> SeCoOutput:
    """Forward, backward and queue of one step of a loop of one's own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model(Views(views, order, videos))
    out.loss.backward()
    model.append_keys(out.keys, out.videos)
    return out


def step_of(model: SeCo, config: PretrainConfig) -> TrainingStep:
    device = torch.device("cpu")
    views = DeviceViews(device, config.crop_size, ViewConfig())
    return TrainingStep(model, for_device(config, device), ViewConfig(), views, Ranks(), device)


def test_the_key_encoders_running_statistics_change_no_key() -> None:
    """After --init they are the file's here, and new in the authors' code."""
    images = made_input()[0][1:].flatten(0, 1)
    model = SeCo(settings()).double().train()
    other = copy.deepcopy(model)
    for name, buffer in other.key_encoder.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    encoded = [each.encode_keys(images.split(GROUP), N // GROUP) for each in (model, other)]
    assert encoded[0].keys() == encoded[1].keys()
    for name, keys in encoded[0].items():
        assert torch.equal(keys, encoded[1][name])


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_one_step_equals_the_reference(preset: str) -> None:
    config = settings(preset=preset, warmup_epochs=0)
    torch.manual_seed(0)
    model = SeCo(config).double().train()
    for parameter in model.key_encoder.parameters():  # so that the encoders differ
        parameter.data += 0.01 * torch.randn_like(parameter)
    views, order, videos = made_input()
    query_network = plain_copy(model.query_encoder)
    key_network = plain_copy(model.key_encoder)
    classifier = copy.deepcopy(model.order_classifier)
    rows_before = model.queue.rows.clone()

    result = forward(model, views, order, videos, 5)

    # Reference: groups one by one, keys one by one, losses term by term.
    shuffle = torch.Generator().manual_seed(5)
    permutations = [torch.randperm(N, generator=shuffle) for _ in range(3)]
    heads = list(model.query_encoder.heads)
    head = {task: task if preset == "authors" else "shared" for task in ("inter", "intra", "order")}
    query: dict[str, list[Any]] = {name: [None] * N for name in heads}
    for start in range(0, N, GROUP):
        for name in heads:
            vectors = embed(query_network, views[0][start : start + GROUP], name)
            query[name][start : start + GROUP] = list(vectors)
    keys: dict[str, list[list[Any]]] = {name: [[None] * N for _ in range(3)] for name in heads}
    with torch.no_grad():
        for i, permutation in enumerate(permutations):
            for start in range(0, N, GROUP):
                members = permutation[start : start + GROUP]
                for name in heads:
                    vectors = embed(key_network, views[1 + i][members], name)
                    for member, vector in zip(members.tolist(), vectors, strict=True):
                        keys[name][i][member] = vector
    inter, intra, ordering = [], [], []
    for n in range(N):
        q, k = query[head["inter"]][n], [keys[head["inter"]][i][n] for i in range(3)]
        negatives = sum(torch.exp(q @ row / 0.1) for row in rows_before)
        for i in range(3):
            positive = torch.exp(q @ k[i] / 0.1)
            inter.append(-torch.log(positive / (positive + negatives)))
        q, k = query[head["intra"]][n], [keys[head["intra"]][i][n] for i in range(3)]
        e = [torch.exp(q @ k[i] / 0.1) for i in range(3)]
        if preset == "paper":
            intra.append(-torch.log(e[0] / (e[0] + e[1] + e[2])))
        else:
            intra.append(-torch.log(e[0] / (e[0] + e[1])) / 2 - torch.log(e[0] / (e[0] + e[2])) / 2)
        q, k = query[head["order"]][n], [keys[head["order"]][i][n] for i in range(3)]
        logits = classifier(torch.cat([q, k[1], k[2]]))
        ordering.append(-torch.log_softmax(logits, 0)[order[n]])
    expected = [sum(terms) / len(terms) for terms in (inter, intra, ordering)]
    for task, value in zip(("inter", "intra", "order"), expected, strict=True):
        assert float(result.metrics[f"loss_{task}"]) == pytest.approx(float(value), abs=1e-9)
    total = sum(expected)
    assert isinstance(total, Tensor)
    total.backward()
    plain_gradients = {f"backbone.{k}": p.grad for k, p in query_network[0].named_parameters()}
    plain_gradients |= {f"heads.{k}": p.grad for k, p in query_network[1].named_parameters()}
    for name, parameter in model.query_encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, plain_gradients[name], atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(model.order_classifier.weight.grad, classifier.weight.grad)
    assert all(p.grad is None for p in model.key_encoder.parameters())
    appended = torch.stack([keys[head["inter"]][i][n] for i in range(3) for n in range(N)])
    kept = torch.cat([appended[10:], appended[2:10]])  # 12 keys through 10 rows
    torch.testing.assert_close(model.queue.rows, kept)
    assert model.queue.videos.tolist() == [9, 5, 9, 5, 7, 3, 9, 5, 7, 3]


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_two_whole_steps_equal_plain_ones(preset: str) -> None:
    """Gradient, SGD, queue and Eq. 6, written out parameter by parameter in float64."""
    config = settings(preset=preset, warmup_epochs=0, ema=0.9)
    torch.manual_seed(0)
    model = SeCo(config).double().train()
    plain = copy.deepcopy(model)
    views, order, videos = made_input()
    step = step_of(model, config)
    known = GlobalRows(np.random.default_rng(0).random((4, N, VIEW_DRAWS)), order, videos)
    velocity: dict[str, Tensor] = {}
    for number, lr in ((0, 0.05), (1, 0.03)):
        result = step.run(views + number, known, number, lr)
        for parameter in plain.parameters():
            parameter.grad = None
        expected = forward(plain, views + number, order, videos, step_seed(config.seed, number))
        torch.testing.assert_close(result.loss, expected.loss.detach())
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name.startswith("key_encoder"):
                    continue
                assert parameter.grad is not None, name
                slope = parameter.grad + config.weight_decay * parameter
                before = velocity.get(name, torch.zeros_like(slope))
                velocity[name] = config.momentum * before + slope
                parameter -= lr * velocity[name]
            for key, query in zip(
                plain.key_encoder.parameters(), plain.query_encoder.parameters(), strict=True
            ):
                key.copy_(0.9 * key + 0.1 * query)
    state, other = model.state_dict(), plain.state_dict()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-9, rtol=1e-6, msg=name)


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_a_group_at_a_time_equals_all_groups_in_one_forward(preset: str) -> None:
    """Losses, gradients, keys and running statistics, in float64; half a step a forward, too."""
    config = settings(preset=preset, batch_size=8, queue_size=40)
    torch.manual_seed(0)
    model = SeCo(config).double().train()
    generator = torch.Generator().manual_seed(2)
    views = torch.randn(4, 8, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    order, videos = torch.arange(8) % 2, torch.arange(8)
    known = GlobalRows(np.zeros((4, 8, VIEW_DRAWS)), order, videos)
    joined, halves = copy.deepcopy(model), copy.deepcopy(model)
    result = step_of(model, config).run(views, known, 3, 0.0)
    shuffle = KeyShuffle(8, 0, 1, torch.Generator().manual_seed(step_seed(config.seed, 3)))
    for other, parts in ((joined, 1), (halves, 2)):
        with torch.no_grad():
            images = views[1:].flatten(0, 1)[torch.from_numpy(shuffle.wanted)]
            key_encoder = with_grouped_layers(other.key_encoder)
            places = joined_forward(key_encoder, images, GROUP, passes=3)
            keys = {name: shuffle.by_row(vectors) for name, vectors in places.items()}
        query_encoder = with_grouped_layers(other.query_encoder)
        total = torch.zeros((), dtype=torch.float64)
        for part in torch.arange(8).chunk(parts):
            before = copy.deepcopy(dict(other.query_encoder.named_buffers()))
            embedded = joined_forward(query_encoder, views[0][part], GROUP, passes=1)
            if part[0] > 0:  # a later part moves no running statistics
                other.query_encoder.load_state_dict(before, strict=False)
            other.query_encoder.forward = lambda _, found=embedded: found  # type: ignore[method-assign,assignment,misc]
            some = {name: vectors[:, part] for name, vectors in keys.items()}
            found = other.losses(
                views[0][part], some, order[part], videos[part], other.negatives(keys, videos)
            )
            del other.query_encoder.forward
            (found.loss / parts).backward()
            total += found.loss.detach() / parts
        torch.testing.assert_close(result.loss, total, atol=1e-12, rtol=0)
        for (name, ours), theirs in zip(
            model.query_encoder.named_parameters(), other.query_encoder.parameters(), strict=True
        ):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-8, msg=name)
        other.append_keys(keys, videos)
        torch.testing.assert_close(model.queue.rows, other.queue.rows, atol=1e-11, rtol=0)
        for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0, msg=name)


def test_running_statistics_follow_the_first_group_of_a_pass() -> None:
    torch.manual_seed(0)
    layer, first = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    groups = torch.randn(3, 4, 5, 6, 6)
    outputs = []
    for number, group in enumerate(groups):
        with running_statistics(nn.Sequential(layer), follow=number == 0):
            outputs.append(layer(group.requires_grad_()))
    first(groups[0])
    for ours, theirs in zip(layer.buffers(), first.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    for group, output in zip(groups, outputs, strict=True):
        assert torch.equal(output, nn.BatchNorm2d(5)(group))
    torch.cat(outputs).square().sum().backward()  # what was put back is no input of it
    with pytest.raises(ZeroDivisionError), running_statistics(layer, follow=False):
        layer(groups[1])
        raise ZeroDivisionError
    assert torch.equal(layer.running_mean, first.running_mean)


def test_every_forward_of_a_step_is_one_static_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU compiles: no graph breaks, no symbolic shapes, nothing compiled anew."""
    from torch._dynamo.utils import counters

    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        assert not any(isinstance(value, torch.SymInt) for value in inputs)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(seco.training.step, "_BACKEND", record)
    monkeypatch.setattr(seco.training.step, "compiler_works", lambda device: True)
    config = settings(batch_size=8, compile=True, channels_last=True)
    torch.manual_seed(0)
    model = SeCo(config).train()
    plain = copy.deepcopy(model)
    generator = np.random.default_rng(0)
    crops = torch.from_numpy(generator.integers(0, 256, (4, 8, 3, SIZE, SIZE), dtype=np.uint8))
    known = GlobalRows(generator.random((4, 8, VIEW_DRAWS)), torch.arange(8) % 2, torch.arange(8))
    steps = step_of(model, config), step_of(plain, dataclasses.replace(config, compile=False))
    for number in range(3):
        ours, theirs = (step.run(crops, known, number, 0.01) for step in steps)
        torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2  # the keys' and the queries'
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_no_convolution_leaves_channels_last() -> None:
    config = settings(arch="resnet50", channels_last=True)
    model = SeCo(config).train()
    step, formats = step_of(model, config), []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        last = torch.channels_last
        formats.append(all(t.is_contiguous(memory_format=last) for t in (*inputs, output)))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    crops = torch.zeros(4, N, 3, SIZE, SIZE, dtype=torch.uint8)
    known = GlobalRows(np.random.default_rng(0).random((4, N, VIEW_DRAWS)), *made_input()[1:])
    step.run(crops, known, 0, 0.01)
    assert len(formats) == 53 * 4 * (N // GROUP)
    assert all(formats)


def test_the_key_encoder_follows_by_equation_6() -> None:
    model = SeCo(settings(ema=0.9))
    before = [p.clone() for p in model.key_encoder.parameters()]
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter += 1.0
    model.update_key_encoder()
    for old, new, query in zip(
        before, model.key_encoder.parameters(), model.query_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * query)
        assert not new.requires_grad


def test_without_a_queue_the_negatives_are_the_keys_of_the_batchs_other_videos() -> None:
    config = settings(queue_size=0, tasks="inter", ema=0.0)
    torch.manual_seed(0)
    model = SeCo(config).double().train()
    views, order, videos = made_input()
    known = GlobalRows(np.zeros((4, N, VIEW_DRAWS)), order, videos)
    step = step_of(model, config)
    step.run(views, known, 0, 0.0)  # no key of an earlier step must count
    result = step.run(views + 1, known, 1, 0.0)
    assert model.queue is None
    keys = result.keys["shared"]
    with torch.no_grad():
        queries = torch.cat([model.query_encoder(g)["shared"] for g in (views[0] + 1).split(GROUP)])
    losses = []
    for i, key in itertools.product(range(N), range(3)):
        others = [keys[k, j] for k in range(3) for j in range(N) if j != i]
        logits = torch.stack([keys[key, i], *others]) @ queries[i] / config.temperature
        losses.append(torch.logsumexp(logits, 0) - logits[0])
    assert len(losses) == 3 * N
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())
    assert negative_count(config.queue_size, N) == len(others)


def test_masking_keeps_a_videos_own_keys_out_of_its_negatives() -> None:
    views, order, videos = made_input()
    owners = torch.tensor([7, 3, 9, 5, 100, 101, 102, 103, 104, 7])

    def losses(masked: bool, **given: Any) -> tuple[Tensor, Tensor]:
        """The model's, and the same term by term."""
        config = settings(tasks="inter", **(given or {"mask_same_video": masked}))
        torch.manual_seed(0)
        model = SeCo(config).double().train()
        assert model.queue is not None
        model.queue.videos[:] = owners
        rows = model.queue.rows.clone()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            out = model(Views(views, order, videos))
        keys, terms = out.keys["shared"], []
        with torch.no_grad():
            queries = torch.cat([model.query_encoder(g)["shared"] for g in views[0].split(GROUP)])
        for i, key in itertools.product(range(N), range(3)):
            kept = owners != videos[i] if masked else torch.ones(len(owners), dtype=torch.bool)
            logits = torch.cat([keys[key, i][None], rows[kept]]) @ queries[i] / config.temperature
            terms.append(torch.logsumexp(logits, 0) - logits[0])
        return out.loss.detach(), torch.stack(terms).mean()

    for masked in (True, False):
        torch.testing.assert_close(*losses(masked))
    # With groups, the numbers are those of the groups.
    for negatives in ("other-videos", "other-groups"):
        torch.testing.assert_close(*losses(True, negatives=negatives))
    assert losses(masked=True)[0] < losses(masked=False)[0]


@pytest.mark.parametrize(("arch", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_backbones_are_torchvisions(arch: str, width: int) -> None:
    assert feature_dim(arch) == width
    network = build_backbone(arch)
    stock = torchvision.models.get_model(arch, weights=None)
    expected = {k: v.shape for k, v in stock.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in network.state_dict().items()} == expected
    features = network.eval()(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, width)
    vectors = Encoder(arch, ["inter", "order"], 128).eval()(torch.randn(2, 3, 64, 64))
    assert set(vectors) == {"inter", "order"}
    torch.testing.assert_close(vectors["order"].norm(dim=1), torch.ones(2))
