"""One loss at every layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goodness_cases import activations

from ffcl_fast import (
    GoodnessLoss,
    InfoNCELoss,
    LayerwiseLoss,
    NTXentLoss,
    PairCosineLoss,
    SupConLoss,
    functional,
)

SHAPES = ((6, 4, 8, 8), (6, 8, 5, 5), (6, 16))  # two convolutions, one linear layer


def layers(shapes=SHAPES) -> list[torch.Tensor]:
    return [activations(*shape).requires_grad_() for shape in shapes]


def targets() -> torch.Tensor:
    return torch.tensor([1, -1, 1, -1, -1, 1])


@pytest.mark.parametrize("weights", (None, [0.5, 0.0, 2.0]))
def test_pair_cosine_on_every_layer(weights):
    """The sum, its parts, and each layer's gradient: that of its own weighted loss."""
    first, second, target = layers(), layers(), targets()
    total, parts = LayerwiseLoss(PairCosineLoss(), weights)(first, second, target, return_layers=True)
    w = weights or [1.0, 1.0, 1.0]
    expected = [
        w[i] * F.cosine_embedding_loss(a.flatten(1), b.flatten(1), target)
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    torch.testing.assert_close(total, sum(expected))
    torch.testing.assert_close(parts, [e.detach() for e in expected])
    assert not any(p.requires_grad for p in parts)
    total.backward()
    for a, b, e in zip(first, second, expected, strict=True):
        torch.testing.assert_close((a.grad, b.grad), torch.autograd.grad(e, (a, b)))
    torch.testing.assert_close(LayerwiseLoss(PairCosineLoss(), weights)(first, second, target), total)


def test_goodness_on_every_layer():
    first, second = layers(), layers()
    loss = GoodnessLoss("mean_squares")
    expected = sum(loss(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(LayerwiseLoss(loss)(first, second), expected)
    with pytest.raises(ValueError, match="target must be None: GoodnessLoss takes none"):
        LayerwiseLoss(loss)(first, second, targets())


@pytest.mark.parametrize("loss", (InfoNCELoss(), NTXentLoss()), ids=("InfoNCE", "NTXent"))
def test_contrast_of_pooled_views(loss):
    first, second = layers(), layers()
    expected = sum(
        w * loss(a.flatten(2).mean(2) if a.dim() > 2 else a, b.flatten(2).mean(2) if b.dim() > 2 else b)
        for w, a, b in zip((1.0, 2.0, 3.0), first, second, strict=True)
    )
    total = LayerwiseLoss(loss, (1.0, 2.0, 3.0))(first, second)
    torch.testing.assert_close(total, expected)
    inputs = [*first, *second]
    torch.testing.assert_close(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs))
    with pytest.raises(ValueError, match="target must be None"):
        LayerwiseLoss(loss)(first, second, targets())


@pytest.mark.parametrize("labels", (None, torch.tensor([0, 1, 0, 2, 1, 0])), ids=("views", "labels"))
def test_sup_con_of_pooled_views(labels):
    first, second, loss = layers(), layers(), SupConLoss()
    expected = 0.0
    for pair in zip(first, second, strict=True):
        views = [F.normalize(h.flatten(2).mean(2) if h.dim() > 2 else h, dim=1) for h in pair]
        expected = expected + loss(torch.stack(views, 1), labels)
    torch.testing.assert_close(LayerwiseLoss(loss)(first, second, labels), expected)


def test_any_function():
    first, second = layers(), layers()
    function = functional.layerwise
    torch.testing.assert_close(
        function(lambda a, b: (a - b).square().mean(), first, second, weights=[1, 2, 3]),
        sum(w * (a - b).square().mean() for w, a, b in zip((1, 2, 3), first, second, strict=True)),
    )
    target = targets()
    torch.testing.assert_close(
        function(functional.pair_cosine, first, second, target, [1.0, 0.5, 1.0]),
        LayerwiseLoss(PairCosineLoss(), [1.0, 0.5, 1.0])(first, second, target),
    )
    total, parts = function(functional.pair_cosine, first, second, target, return_layers=True)
    torch.testing.assert_close(sum(parts), total.detach())
    module = LayerwiseLoss(lambda a, b, t: (a.flatten(1).sum(1) * t).sum())
    torch.testing.assert_close(module(first, second, target), sum((a.flatten(1).sum(1) * target).sum() for a in first))


def test_compiles():
    first, second, target = layers(), layers(), targets()
    loss = LayerwiseLoss(PairCosineLoss(), [1.0, 2.0, 0.5])
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    total = compiled(first, second, target)
    torch.testing.assert_close(total, loss(first, second, target))
    inputs = [*first, *second]
    torch.testing.assert_close(
        torch.autograd.grad(total, inputs), torch.autograd.grad(loss(first, second, target), inputs)
    )


def test_bad_arguments():
    first, second, target, loss = layers(), layers(), targets(), LayerwiseLoss(PairCosineLoss())
    for call, error, words in (
        (lambda: loss([], [], target), ValueError, "activations_1 must hold at least one layer"),
        (lambda: loss(first, second[:2], target), ValueError, "got 3 and 2"),
        (lambda: loss(first[0], second, target), TypeError, "activations_1 must be a list of tensors, .* got Tensor"),
        (lambda: loss(first, second[0], target), TypeError, "activations_2 must be a list"),
        (
            lambda: LayerwiseLoss(PairCosineLoss(), [1.0])(first, second, target),
            ValueError,
            "weights must hold one number",
        ),
        (lambda: LayerwiseLoss(PairCosineLoss(), 2.0), TypeError, "weights must be a list of numbers.* got 2.0"),
        (lambda: LayerwiseLoss(PairCosineLoss(), ["a"]), TypeError, "weights must be a list of numbers"),
        (lambda: LayerwiseLoss("cosine"), TypeError, "loss must be a loss module or function; got str"),
        (lambda: loss(first, second, target[:2]), ValueError, "target must have shape"),
    ):
        with pytest.raises(error, match=words):
            call()
