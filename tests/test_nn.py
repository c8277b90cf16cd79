"""Layers that train themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ffcl_fast import GoodnessLoss, PairCosineLoss, functional
from ffcl_fast.nn import ForwardForwardLayer, goodness_normalize


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def copy_of(module: nn.Module) -> nn.Module:
    other = type(module)(module.in_features, module.out_features)
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("loss", (GoodnessLoss("mean_squares"), GoodnessLoss(relu=True)), ids=("plain", "with-relu"))
def test_one_step_is_one_step(relu, normalize, loss):
    """The same parameters, outputs and loss as the step written out with plain PyTorch's optimiser."""
    module = nn.Linear(5, 7)
    twin = copy_of(module)
    layer = ForwardForwardLayer(module, loss, sgd, relu=relu, normalize=normalize)
    x_pos, x_neg = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    outputs = layer(x_pos, x_neg)

    optimizer = sgd(twin.parameters())
    h = [torch.relu(twin(x.detach())) if relu else twin(x.detach()) for x in (x_pos, x_neg)]
    value = loss(*h)
    value.backward()
    optimizer.step()
    expected = [goodness_normalize(a.detach()) if normalize else a.detach() for a in h]
    torch.testing.assert_close(outputs, tuple(expected))
    torch.testing.assert_close(layer.last_loss, value.detach())
    torch.testing.assert_close(module.state_dict(), twin.state_dict())
    assert not any(o.requires_grad for o in outputs) and x_pos.grad is None and x_neg.grad is None


def test_pairs_with_a_target():
    layer = ForwardForwardLayer(nn.Conv2d(1, 3, 3), PairCosineLoss(), sgd, relu=True)
    before = layer.module.weight.detach().clone()
    x_1, x_2 = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    target = torch.tensor([1, -1, 1, -1])
    h_1, h_2 = layer(x_1, x_2, target)
    torch.testing.assert_close(layer.last_loss, functional.pair_cosine(h_1, h_2, target))
    assert not torch.equal(before, layer.module.weight)


def test_a_network_of_layers_learns_and_no_gradient_crosses():
    torch.manual_seed(0)  # whether thirty steps are enough depends on the draw

    def adam(parameters):
        return torch.optim.Adam(parameters, 0.01)

    layers = [
        ForwardForwardLayer(nn.Linear(a, b), GoodnessLoss("mean_squares"), adam, relu=True, normalize=True)
        for a, b in ((10, 32), (32, 32))
    ]
    losses = []
    for _ in range(30):
        h_pos = torch.randn(64, 10) + torch.linspace(-2, 2, 10)
        h_neg = torch.randn(64, 10) - torch.linspace(-2, 2, 10)
        for layer in layers:
            h_pos, h_neg = layer(h_pos, h_neg)
        losses.append([float(layer.last_loss) for layer in layers])
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < 0.7 * first
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        x = torch.randn(3, 10)
        by_hand = x
        for layer in layers:
            by_hand = goodness_normalize(torch.relu(layer.module(by_hand)))
        torch.testing.assert_close(net(x), by_hand)


def test_without_training():
    """In eval mode and with one input nothing changes; a module without parameters only passes through."""
    layer = ForwardForwardLayer(nn.Linear(4, 4), GoodnessLoss(), sgd)
    before = layer.module.weight.detach().clone()
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(layer(x), layer.module(x)) and not layer(x).requires_grad
    layer.eval()
    out_1, out_2 = layer(x, 2 * x)
    assert torch.equal(out_1, layer.module(x)) and torch.equal(out_2, layer.module(2 * x))
    assert torch.equal(before, layer.module.weight) and layer.last_loss is None
    pool = ForwardForwardLayer(nn.AvgPool2d(2), PairCosineLoss(), sgd)
    maps = torch.randn(2, 3, 4, 4)
    assert pool.optimizer is None
    assert torch.equal(pool(maps, maps, torch.tensor([1, 1]))[0], nn.functional.avg_pool2d(maps, 2))


def test_training_under_no_grad():
    """A loop over frozen features may run under no_grad: the layer still trains."""
    layer = ForwardForwardLayer(nn.Linear(4, 4), GoodnessLoss(), sgd)
    before = layer.module.weight.detach().clone()
    with torch.no_grad():
        layer(torch.randn(3, 4), torch.randn(3, 4))
    assert not torch.equal(before, layer.module.weight)


def test_state_dict_holds_the_optimizer(tmp_path):
    def make():
        return ForwardForwardLayer(nn.Linear(4, 4), GoodnessLoss(), lambda p: torch.optim.Adam(p, 0.1))

    layer, other = make(), make()
    batches = [(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(4)]
    for batch in batches[:2]:
        layer(*batch)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for batch in batches[2:]:
        layer(*batch)
        other(*batch)
    assert torch.equal(layer.module.weight, other.module.weight)


def test_bad_arguments():
    for args, words in (
        ((lambda x: x, GoodnessLoss(), sgd), "module must be a torch.nn.Module; got function"),
        ((nn.Linear(2, 2), None, sgd), "loss must be callable; got NoneType"),
        (
            (nn.Linear(2, 2), GoodnessLoss(), torch.optim.SGD([torch.zeros(1)], 0.1)),
            "optimizer_factory must be callable",
        ),
    ):
        with pytest.raises(TypeError, match=words):
            ForwardForwardLayer(*args)
    for error, eps in ((TypeError, "a"), (ValueError, 0.0), (ValueError, float("nan"))):
        with pytest.raises(error, match="eps must be"):
            ForwardForwardLayer(nn.Linear(2, 2), GoodnessLoss(), sgd, eps=eps)
