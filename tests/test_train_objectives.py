"""The losses of the first two stages, and the items that they are given."""

from __future__ import annotations

import pytest
import torch
from train_cases import TinyNet, tiny

from ffcl_fast.functional import clip, goodness, goodness_loss, info_nce, nt_xent, siglip, sup_con
from ffcl_fast.train import config as settings
from ffcl_fast.train.batches import Views, augmentation, scaled
from ffcl_fast.train.data import Split
from ffcl_fast.train.model import build
from ffcl_fast.train.objectives import objective
from ffcl_fast.train.stages import DownstreamStage, GlobalStage, LocalStage

LOSSES = ("pair_cosine", *settings.GOODNESS, *settings.CONTRASTIVE)


@pytest.fixture
def split(rng) -> Split:
    labels = torch.randint(0, 3, (50,), generator=rng)
    labels[:6] = torch.arange(6) % 3
    return Split(torch.randint(0, 256, (50, 1, 8, 8), generator=rng, dtype=torch.uint8), labels)


def test_the_names_are_those_of_the_losses():
    from ffcl_fast.functional.goodness import KINDS
    from ffcl_fast.functional.objectives import OBJECTIVES

    assert set(settings.GOODNESS) == set(KINDS) and tuple(settings.OBJECTIVES) == OBJECTIVES


def find(split: Split, image: torch.Tensor) -> int:
    return next(i for i in range(len(split)) if torch.equal(split.images[i], image))


def test_balanced_pairs_are_of_equal_class_every_other_time(split, seed):
    views = Views(split, None, "pairs", seed, balanced=True)
    targets = []
    for repeat in range(20):
        views.seed = seed + 1000 * repeat
        for index in range(len(split)):
            first, second, target = views[index]
            assert torch.equal(first, split.images[index])
            equal = split.labels[find(split, second)] == split.labels[index]
            assert target == (1 if equal else -1)
            targets.append(int(target))
    assert abs(sum(targets) / len(targets)) < 0.2  # six standard deviations of 1000 fair coins


def test_the_other_class_is_drawn_from_all_of_its_images(split, seed):
    torch.manual_seed(seed)
    views = Views(split, None, "sides", seed)
    for label in range(3):
        for equal in (True, False):
            wanted = set(((split.labels == label) == equal).nonzero().flatten().tolist())
            assert {views._of_class(label, equal) for _ in range(3000)} == wanted


def test_sides_are_means_of_two_images(split, seed):
    views = Views(split, None, "sides", seed)
    for index in range(5):
        positive, negative, label = views[index]
        assert label == split.labels[index]
        for side, equal in ((positive, True), (negative, False)):
            rows = ((split.labels == label) == equal).nonzero().flatten()
            means = (split.images[rows].int() + split.images[index].int()) // 2
            assert (means == side.int()).flatten(1).all(1).any()


def test_views_are_one_image_augmented_twice(split, seed):
    first, second, label = Views(split, None, "views", seed)[7]
    assert torch.equal(first, split.images[7]) and torch.equal(second, first) and label == split.labels[7]
    crops = Views(split, augmentation("crops", 8), "views", seed)
    assert any(not torch.equal(*crops[i][:2]) for i in range(5)) and crops[0][0].shape == (1, 8, 8)


def two(rng, n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h1, h2 = torch.randn(2, n, 5, 4, 4, generator=rng).unbind()
    return h1, h2, torch.arange(n) // 2


def test_contrastive_losses_are_those_of_pooled_activations(tmp_path, rng):
    h1, h2, labels = two(rng)
    p1, p2 = h1.mean((2, 3)), h2.mean((2, 3))
    unit = torch.stack([torch.nn.functional.normalize(p, dim=1) for p in (p1, p2)], 1)
    expected = {
        "info_nce": info_nce(p1, p2, temperature=0.3),
        "nt_xent": nt_xent(p1, p2, temperature=0.3),
        "sup_con": sup_con(unit, labels, temperature=0.3),
        "clip": clip(*unit.unbind(1), 1 / 0.3),
        "siglip": siglip(*unit.unbind(1), 1 / 0.3, -10.0),
    }
    assert expected.keys() == set(settings.CONTRASTIVE)
    for name, value in expected.items():
        got = objective(name, tiny(tmp_path, temperature=0.3))
        assert got.items == "views"
        torch.testing.assert_close(got.loss(h1, h2, labels), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", settings.GOODNESS)
def test_goodness_has_a_positive_and_a_negative_side(tmp_path, rng, kind):
    h1, h2, labels = two(rng)
    config = tiny(tmp_path, goodness_objective="silu", threshold=1.5)
    got = objective(kind, config)
    assert got.items == "sides" and got.normalize
    expected = goodness_loss(goodness(h1, kind), goodness(h2, kind), "silu", 1.5)
    torch.testing.assert_close(got.loss(h1, h2, labels), expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layers", ["blocks", "leaves"])
def test_every_layer_gets_a_gradient_from_its_own_loss_only(tmp_path, rng, name, layers):
    config = tiny(tmp_path, local_loss=name, local_layers=layers, threshold=0.5)
    stage = LocalStage(build(config, 8, 2, backbone=TinyNet()), config)
    images = torch.randint(0, 256, (2, 6, 1, 8, 8), generator=rng, dtype=torch.uint8)
    third = torch.tensor([1, -1, 1, 1, -1, -1]) if stage.items == "pairs" else torch.arange(6) // 2
    scalars = stage.step([images[0], images[1], third], train=True)
    assert list(scalars) == ["loss", *stage.walk.layers]
    trained = {n for n, p in stage.network.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {n for n, _ in stage.network.backbone.named_parameters() if layers == "blocks" or "downsample" not in n}
    assert trained == expected


@pytest.mark.parametrize("layers", ["blocks", "leaves"])
def test_greedy_training_updates_one_layer_and_runs_none_after_it(tmp_path, rng, layers):
    config = tiny(tmp_path, local_schedule="greedy", local_layers=layers)
    stage = LocalStage(build(config, 8, 2, backbone=TinyNet()), config)
    assert stage.phases == len(stage.walk.layers) == (3 if layers == "blocks" else 5)
    images = torch.randint(0, 256, (2, 6, 1, 8, 8), generator=rng, dtype=torch.uint8)
    stage.begin(1)
    ran = []
    stage.network.backbone.stages[1].register_forward_hook(lambda *_: ran.append(1))
    scalars = stage.step([images[0], images[1], torch.tensor([1, -1, 1, 1, -1, -1])], train=True)
    layer = stage.walk.layers[1]
    assert list(scalars) == ["loss", layer] and not ran
    assert all(n.startswith(layer) for n, p in stage.network.backbone.named_parameters() if p.grad is not None)


def test_sum_of_squares_hands_on_unit_mean_squares(tmp_path, rng):
    net = TinyNet()
    config = tiny(tmp_path, local_loss="sum_squares")
    stage = LocalStage(build(config, 8, 2, backbone=net), config)
    seen = []
    net.stages[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randint(0, 256, (2, 6, 1, 8, 8), generator=rng, dtype=torch.uint8)
    stage.step([images[0], images[1], torch.arange(6) % 2], train=True)
    # a sample whose activation is all zero has nothing to bring to 1
    squares = [m for m in seen[0].square().mean((1, 2, 3)).tolist() if m]
    assert squares and squares == pytest.approx([1.0] * len(squares), rel=1e-3)


@pytest.mark.parametrize("name", ["pair_cosine", *settings.CONTRASTIVE])
def test_the_output_loss_reaches_every_parameter(tmp_path, rng, name):
    config = tiny(tmp_path, global_loss=name)
    stage = GlobalStage(build(config, 8, 2, backbone=TinyNet()), config)
    images = torch.randint(0, 256, (2, 6, 1, 8, 8), generator=rng, dtype=torch.uint8)
    third = torch.tensor([1, -1, 1, 1, -1, -1]) if stage.items == "pairs" else torch.arange(6) // 2
    assert stage.step([images[0], images[1], third], train=True)["loss"].isfinite()
    assert all(p.grad is not None for p in stage.network.backbone.parameters())


def test_a_frozen_backbone_keeps_weights_and_statistics(tmp_path, split):
    config = tiny(tmp_path, downstream="frozen")
    network = build(config, 8, 3, backbone=TinyNet())
    stage = DownstreamStage(network, config, split)
    before = {k: v.clone() for k, v in network.backbone.state_dict().items()}
    network.train()
    stage.step([split.images, split.labels], train=True)
    assert set(stage.parameters()) == set(network.head.parameters()) and network.head.weight.grad.any()
    assert all(p.grad is None for p in network.backbone.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.backbone.state_dict().items())
    network.eval()
    assert torch.equal(network(scaled(split.images)), stage._logits(scaled(split.images)))
