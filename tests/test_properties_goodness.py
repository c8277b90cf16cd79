"""Every loss of activations on drawn shapes, dtypes, layouts, magnitudes, devices and backends, against float64."""

from __future__ import annotations

import plain
import pytest
import torch
import torch.nn.functional as F
from drawing import drawn, dtypes, integers, places, powers, reductions, shapes_of_maps, sizes, tensors, widths
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import ffcl_fast
import ffcl_fast.functional as fn
from ffcl_fast.functional import TwoThreshold
from ffcl_fast.nn import ForwardForwardLayer

KINDS = ("sum_squares", "mean_squares")
OBJECTIVES = ("logistic", "silu", "symba", "two_threshold")
CONSTANTS = (None, (1.0, 1.0, None, None, 0.0), (0.5, 2.0, 3.0, 1.0, 0.1))
shapes_of_groups = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.sampled_from((1, 5, 8, 70)))


def size_of(h: Tensor, relu: bool, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The power of two nearest to the root mean square of each sample's activation."""
    return powers(F.relu(h) if relu else h, tuple(range(1, h.dim())) if dim is None else dim)


@given(st.data(), shapes_of_maps, dtypes, st.booleans(), st.booleans(), places("goodness_forward"))
@drawn
def test_goodness_and_its_normalisation(data, shape, dtype, mean, relu, place):
    device, backend = place
    inputs = data.draw(tensors(shape, dtype=dtype, any_size=True, device=device))
    options = {"relu": relu, "backend": backend}
    size, width = size_of(inputs[0], relu), inputs[0][0].numel()
    wanted = lambda h: plain.goodness(h, mean, relu)  # noqa: E731
    factors = [size.flatten() ** -2, 1 / size]
    ours = lambda h: fn.goodness(h, KINDS[mean], **options)  # noqa: E731
    plain.agree(ours, wanted, inputs, 1.0, 2.0 / (width if mean else 1), factors=factors)
    wanted = lambda h: plain.normalize(h, relu=relu)  # noqa: E731
    # one positive element in a row is divided by its own size: what is left of its gradient is a difference
    ours = lambda h: fn.goodness_normalize(h, **options)  # noqa: E731
    plain.agree(ours, wanted, inputs, 1.0, 2.0, factors=[1.0, size])


@given(st.data(), st.integers(1, 9), st.integers(1, 33), st.integers(1, 9), st.integers(1, 9), dtypes, st.booleans(),
       st.booleans(), places("pool_goodness_forward"))  # fmt: skip
@drawn
def test_pool_goodness(data, n, channels, height, width, dtype, mean, relu, place):
    device, backend = place
    inputs = data.draw(tensors((n, channels, height, width), dtype=dtype, any_size=True, device=device))
    if data.draw(st.booleans()):
        inputs = [inputs[0].contiguous(memory_format=torch.channels_last)]
    size, options = size_of(inputs[0], relu), {"relu": relu, "backend": backend}
    terms = 2.0 / (height * width)
    wanted = lambda h: plain.pooled(h, relu)  # noqa: E731
    ours = lambda h: fn.pool_goodness(h, KINDS[mean], **options)[1]  # noqa: E731
    plain.agree(ours, wanted, inputs, 1.0, terms, factors=[1 / size.flatten(1), 1.0])
    wanted = lambda h: plain.goodness(plain.pooled(h, relu), mean)  # noqa: E731
    ours = lambda h: fn.pool_goodness(h, KINDS[mean], **options)[0]  # noqa: E731
    plain.agree(ours, wanted, inputs, 1.0, terms, factors=[size.flatten() ** -2, 1 / size])


@given(st.data(), shapes_of_groups, dtypes, st.booleans(), st.booleans(), st.booleans(), places("goodness_forward"))
@drawn
def test_goodness_over_channels_and_groups_of_them(data, shape, dtype, mean, relu, channels, place):
    device, backend = place
    n, groups, each, width = shape
    (h,) = data.draw(tensors((n, groups * each, width), dtype=dtype, any_size=True, device=device))
    if channels:
        size = size_of(h, relu, 1)
        of_value = size.squeeze(1)
    else:
        of_value = size_of(h.reshape(n, groups, each * width), relu, -1).squeeze(-1)
        size = of_value.repeat_interleave(each, 1)[:, :, None]
    how = {"over": "channels"} if channels else {"groups": groups}
    ours = lambda h: fn.goodness(h, KINDS[mean], relu=relu, backend=backend, **how)  # noqa: E731
    wanted = lambda h: plain.goodness(h, mean, relu, None if channels else groups, channels)  # noqa: E731
    count = groups * each if channels else each * width
    plain.agree(ours, wanted, [h], 1.0, 2.0 / (count if mean else 1), factors=[of_value**-2, 1 / size])


@given(st.data(), shapes_of_maps, dtypes, st.booleans(), st.floats(-0.5, 0.5), reductions,
       places("pair_cosine_forward"))  # fmt: skip
@drawn
def test_pair_cosine(data, shape, dtype, relu, margin, reduction, place):
    device, backend = place
    inputs = data.draw(tensors(shape, shape, dtype=dtype, any_size=True, device=device))
    n = shape[0]
    target = 2.0 * integers(data, n, 0, 1, device) - 1
    near = plain.pair_cosine(*(x.double() for x in inputs), target, margin, relu)[target == -1]
    assume(not ((near > 0) & (near < 0.02)).any())  # there a rounding decides on which side of the margin a pair is
    assume(bool((inputs[0].double().norm(dim=-1) > 0).all()))

    def written_out(x, y):
        rows = plain.pair_cosine(x, y, target, margin, relu)
        return {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()

    options = {"relu": relu, "backend": backend}
    if data.draw(st.booleans()):
        ours = lambda x, y: fn.pair_cosine(x, y, target, margin, reduction, **options)  # noqa: E731
    else:
        module = ffcl_fast.PairCosineLoss(margin, reduction, **options)
        ours = lambda x, y: module(x, y, target)  # noqa: E731
    terms = (1 / n if reduction == "mean" else 1.0) / inputs[0][0].numel()
    factors = [1.0, *(size_of(x, relu) for x in inputs)]
    plain.agree(ours, written_out, inputs, float(n if reduction == "sum" else 1), terms, factors=factors)


@given(st.data(), st.lists(st.tuples(sizes, widths), min_size=1, max_size=4), dtypes, st.booleans(), st.booleans(),
       places("goodness_many"))  # fmt: skip
@drawn
def test_goodness_of_many_layers(data, shapes, dtype, mean, relu, place):
    device, backend = place
    inputs = data.draw(tensors(*shapes, dtype=dtype, any_size=True, device=device))
    ours = lambda *h: torch.cat(fn.goodness_many(list(h), KINDS[mean], relu=relu, backend=backend))  # noqa: E731
    written_out = lambda *h: torch.cat([plain.goodness(x, mean, relu) for x in h])  # noqa: E731
    sizes_of = [size_of(x, relu) for x in inputs]
    factors = [torch.cat(sizes_of).flatten() ** -2, *(1 / size for size in sizes_of)]
    terms = [2.0 / (x.shape[1] if mean else 1) for x in inputs]
    plain.agree(ours, written_out, inputs, 1.0, terms, factors=factors)


@given(st.data(), sizes, widths, widths, dtypes, st.booleans(), st.booleans(), st.booleans(), places("linear_goodness"))
@drawn
def test_linear_goodness(data, n, k, width, dtype, mean, relu, with_bias, place):
    device, backend = place
    powers_of = (-2, 0, 1) if dtype == torch.float16 else (-9, 0, 5)
    a, b = (2.0 ** data.draw(st.sampled_from(powers_of)) for _ in range(2))
    shapes = (n, k), (width, k), *[(width,)] * with_bias
    inputs = data.draw(tensors(*shapes, dtype=dtype, by=(a, b, a * b)[: len(shapes)], device=device))
    ours = lambda x, w, c=None: fn.linear_goodness(x, w, c, KINDS[mean], relu=relu, backend=backend)  # noqa: E731
    written_out = lambda x, w, c=None: plain.goodness(F.linear(x, w, c), mean, relu)  # noqa: E731
    factors = [(a * b) ** -2, a / (a * b) ** 2, b / (a * b) ** 2, 1 / (a * b)][: len(shapes) + 1]
    plain.agree(ours, written_out, inputs, 1.0, 1.0, factors=factors)


@given(st.data(), sizes, st.lists(widths, min_size=1, max_size=4), dtypes, st.floats(0.1, 3.0), st.booleans(),
       places("goodness_many"))  # fmt: skip
@drawn
def test_a_loss_of_every_layer(data, n, layers, dtype, weight, cosine, place):
    """Layerwise sums: of goodness losses, which are computed together, and of pair cosines, which fold their weight."""
    device, backend = place
    shapes = [(n, d) for d in layers for _ in range(2)]
    inputs = data.draw(tensors(*shapes, dtype=dtype, any_size=cosine, device=device))
    weights = [weight * (i + 1) for i in range(len(layers))]
    target = torch.ones(n, device=device) if cosine else None
    module = ffcl_fast.GoodnessLoss("mean_squares", relu=True, backend=backend)
    module = ffcl_fast.PairCosineLoss(backend=backend) if cosine else module

    def one(a, b):
        if cosine:
            return plain.pair_cosine(a, b, target.to(a.dtype)).mean()
        return plain.goodness_loss(a, b)

    ours = lambda *h: fn.layerwise(module, list(h[::2]), list(h[1::2]), target, weights)  # noqa: E731
    written_out = lambda *h: sum(w * one(a, b) for w, a, b in zip(weights, h[::2], h[1::2], strict=True))  # noqa: E731
    terms = [w / (n * d) for w, d in zip(weights, layers, strict=True) for _ in range(2)]
    factors = [1.0, *(size_of(x, False) if cosine else 1.0 for x in inputs)]
    plain.agree(ours, written_out, inputs, sum(weights), terms, factors=factors)


def slope_of(objective: str, alpha: float, constants: tuple | None) -> float:
    """The largest factor of a goodness inside the objective's softplus."""
    return {"symba": alpha, "two_threshold": max((constants or (1.0, 1.0))[:2])}.get(objective, 1.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(st.data(), sizes, sizes, widths, dtypes, st.booleans(), st.booleans(), st.sampled_from((None, 0.5, 20.0)),
       st.sampled_from((0.5, 4.0)), st.sampled_from(CONSTANTS), places("goodness_forward"))  # fmt: skip
@drawn
def test_objectives(objective, data, n, m, d, dtype, mean, relu, threshold, alpha, constants, place):
    device, backend = place
    m = n if objective == "symba" else m
    by = [2.0 ** data.draw(st.sampled_from((-7, -1, 0, 2))) for _ in range(2)]
    inputs = data.draw(tensors((n, d), (m, d), dtype=dtype, by=tuple(by), device=device))
    two = constants and TwoThreshold(*constants)
    options = {"two_threshold": two, "relu": relu, "backend": backend}
    module = ffcl_fast.GoodnessLoss(KINDS[mean], objective, threshold, alpha, **options)
    theta = threshold or (2.0 if mean else float(d))

    def written_out(a, b):
        g = (plain.goodness(h, mean, relu) for h in (a, b))
        return plain.objective(*g, objective, theta, alpha, constants or (1.0, 1.0, None, None, 0.0))

    # An exponent is a difference of goodness and threshold, and a slope is as many times off as an exponent.
    largest = max(float(plain.goodness(x.double(), mean, relu).max()) for x in inputs)
    slope = slope_of(objective, alpha, constants)
    exponent = slope * (theta + largest) if objective != "symba" else slope * largest
    one = [2 * slope * f / (rows * (d if mean else 1)) for f, rows in zip(by, (n, m), strict=True)]
    plain.agree(module, written_out, inputs, exponent, [size * max(1.0, exponent / 4) for size in one])


@given(st.data(), st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.sampled_from((1, 5, 49)), dtypes,
       st.booleans(), places("goodness_forward"))  # fmt: skip
@drawn
def test_channel_groups(data, n, classes, each, width, dtype, relu, place):
    device, backend = place
    by = 2.0 ** data.draw(st.sampled_from((-7, 0, 2)))
    inputs = data.draw(tensors((n, classes * each, width), dtype=dtype, by=(by,), device=device))
    labels = integers(data, n, 0, classes - 1, device)
    ours = lambda h: fn.channel_group_loss(h, labels, classes, relu=relu, backend=backend)  # noqa: E731
    wanted = lambda h: F.cross_entropy(plain.goodness(h, True, relu, classes), labels)  # noqa: E731
    largest = float(plain.goodness(inputs[0].double(), True, relu, classes).max())
    terms = 2 * by / (n * each * width) * max(1.0, largest / 4)
    plain.agree(ours, wanted, inputs, largest, terms)


@given(st.data(), sizes, sizes, widths, widths, dtypes, st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from((2**-7, 1.0, 4.0)), places("goodness_forward"))  # fmt: skip
@drawn
def test_a_layer_that_trains_itself(data, n, m, k, width, dtype, mean, relu, normalize, by, place):
    """Loss, the gradients that its optimiser sees, and outputs; nothing reaches its inputs."""
    device, backend = place
    shapes = (n, k), (m, k), (width, k), (width,)
    inputs = data.draw(tensors(*shapes, dtype=dtype, by=(by, by, k**-0.5, 0.1), device=device))
    x_pos, x_neg, weight, bias = inputs
    if dtype == torch.bfloat16:  # with AMX the layer of PyTorch 2.14 itself is NaN where NaN lies beside an odd row
        x_pos, x_neg = (x.clone(memory_format=torch.contiguous_format) for x in (x_pos, x_neg))
    module = nn.Linear(k, width, device=device, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(weight), module.bias.copy_(bias)
    loss = ffcl_fast.GoodnessLoss(KINDS[mean], "logistic", 2.0, relu=relu, backend=backend)
    layer = ForwardForwardLayer(module, loss, lambda p: torch.optim.SGD(p, 0.0), relu=relu, normalize=normalize)
    outputs = layer(x_pos.requires_grad_(), x_neg.requires_grad_())
    assert x_pos.grad is None and x_neg.grad is None and not any(o.requires_grad for o in outputs)

    def activations(w, b, *x):
        return [F.linear(v, w, b).relu() if relu else F.linear(v, w, b) for v in x]

    def of_loss(w, b):
        g = (plain.goodness(h, mean) for h in activations(w, b, x_pos.detach().to(w), x_neg.detach().to(w)))
        return plain.objective(*g, "logistic", 2.0)

    def of_output(w, b):
        h = activations(w, b, torch.cat((x_pos, x_neg)).detach().to(w))[0]
        return plain.normalize(h) if normalize else h

    mine = [layer.last_loss, *(p.grad * plain.upstream(layer.last_loss) for p in (module.weight, module.bias))]
    h = activations(weight.double(), bias.double(), x_pos.detach().double(), x_neg.detach().double())
    largest = max(float(plain.goodness(v, mean).max()) for v in h)
    one = 2 / (width if mean else 1) * max(1.0, largest / 4)
    plain.compare(mine, of_loss, [weight, bias], 2.0 + largest, [one * by, one])
    plain.compare([torch.cat(outputs), None, None], lambda w, b: of_output(w.detach(), b.detach()), [weight, bias], 1.0)
