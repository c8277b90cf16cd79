"""Goodness of many layers at once: every backend against one layer at a time, and the function on top."""

from __future__ import annotations

import pytest
import torch
from goodness_cases import BACKENDS, DTYPES, activations

from ffcl_fast import GoodnessLoss, functional
from ffcl_fast import functional as ff
from ffcl_fast.functional.goodness import KINDS
from ffcl_fast.functional.objectives import OBJECTIVES, TwoThreshold

_ops = torch.ops.ffcl_fast
SHAPES = ((5, 31), (17, 8), (3, 5000), (1, 1))
LAYERS = ((6, 2, 2), (40,), (7, 3))  # without the batch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mean", "relu"), ((False, False), (True, True)), ids=("sum-linear", "mean-relu"))
def test_many_is_one_after_the_other(backend, dtype, mean, relu):
    h = [activations(*shape, dtype=dtype) for shape in SHAPES]
    h.append(activations(9, 40, dtype=dtype)[::2, 3:30])
    together = _ops.goodness_many(h, mean, relu, backend)
    each = [_ops.goodness_forward(x, mean, relu, False, 0.0, backend)[0] for x in h]
    assert together.dtype == torch.float32 and torch.equal(together, torch.cat(each))
    grad = torch.randn(together.shape[0])
    dh = _ops.goodness_many_backward(h, grad, mean, relu, backend)
    for x, d, g in zip(h, dh, grad.split([x.shape[0] for x in h]), strict=True):
        assert d.is_contiguous()
        assert torch.equal(d, _ops.goodness_backward(x, g, g, None, mean, relu, 0.0, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    h = [activations(3, 7), activations(2, 5)]
    torch.library.opcheck(_ops.goodness_many.default, (h, True, True, backend))
    torch.library.opcheck(_ops.goodness_many_backward.default, (h, torch.randn(5), True, True, backend))


def test_function_and_its_gradient():
    h = [activations(3, 4, 2, 2).to(memory_format=torch.channels_last), activations(2, 7), activations(3, 1, 5)]
    h = [x.double().requires_grad_(i != 1) for i, x in enumerate(h)]  # the second needs no gradient
    for kind, relu in (("sum_squares", False), ("mean_squares", True)):
        got = ff.goodness_many(h, kind, relu=relu)
        for ours, x in zip(got, h, strict=True):
            torch.testing.assert_close(ours, ff.goodness(x, kind, relu=relu))
        assert torch.autograd.gradcheck(
            lambda a, c, kind=kind, relu=relu: torch.cat(ff.goodness_many([a, h[1], c], kind, relu=relu)), (h[0], h[2])
        )


def test_layerwise_groups_the_goodness_losses(monkeypatch):
    pos, neg = ([activations(n, *s).requires_grad_() for s in ((6, 4, 4), (40,))] for n in (3, 5))
    loss = GoodnessLoss("mean_squares", relu=True)
    calls, run = [], GoodnessLoss.of_layers
    monkeypatch.setattr(GoodnessLoss, "of_layers", lambda *arguments: calls.append(1) or run(*arguments))
    total, layers = functional.layerwise(loss, pos, neg, weights=[1.0, 0.5], return_layers=True)
    each = [loss(p, q) * w for p, q, w in zip(pos, neg, (1.0, 0.5), strict=True)]
    assert calls == [1]
    torch.testing.assert_close(layers, [x.detach() for x in each])
    grads = torch.autograd.grad(total, pos + neg)
    torch.testing.assert_close(grads, torch.autograd.grad(sum(each), pos + neg))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("penalty", (0.0, 0.3))
def test_all_layers_at_once_are_each_layer_alone(objective, kind, penalty):
    constants = TwoThreshold(1.5, 0.5, None, 3.0, penalty)
    loss = GoodnessLoss(kind, objective, two_threshold=constants)
    for negatives, last in ((3, 3), (5, 3), (5, 4)):  # the last layer's samples: as many as the others' or not
        if objective == "symba" and negatives != 3:
            continue
        sizes = [(3, negatives)] * 2 + [(last, negatives)]
        pos, neg = (
            [activations(n[i], *s, dtype=torch.float64).requires_grad_() for n, s in zip(sizes, LAYERS, strict=True)]
            for i in (0, 1)
        )
        each = [loss(p, q) for p, q in zip(pos, neg, strict=True)]
        together = loss.of_layers(pos, neg)
        assert isinstance(together, torch.Tensor) == (last == 3)
        torch.testing.assert_close(list(together), each)
        learned = [0.5, torch.tensor(2.0, dtype=torch.float64, requires_grad=True), 1]
        for weights in (None, [0.5, 2, 0.0], learned):
            total, layers = functional.layerwise(loss, pos, neg, weights=weights, return_layers=True)
            expected = [x * w for x, w in zip(each, weights or (1, 1, 1), strict=True)]
            assert all(not x.requires_grad for x in layers)
            torch.testing.assert_close(layers, [x.detach() for x in expected])
            leaves = [*pos, *neg, *learned[1:2]] if weights is learned else [*pos, *neg]
            grads = torch.autograd.grad(sum(expected), leaves, retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(total, leaves), grads)


def test_inference_mode_then_training():
    loss = GoodnessLoss()  # a threshold a layer
    pos, neg = ([activations(n, *s) for s in LAYERS] for n in (3, 5))
    with torch.inference_mode():
        expected = functional.layerwise(loss, pos, neg, weights=[0.5, 2.0, 1.0])
    for x in pos:
        x.requires_grad_()
    torch.testing.assert_close(functional.layerwise(loss, pos, neg, weights=[0.5, 2.0, 1.0]), expected.clone())


@pytest.mark.compiler
@pytest.mark.parametrize("goodness", KINDS)
def test_one_graph_takes_all_layers_and_any_number_of_samples(goodness):
    loss = GoodnessLoss(goodness)

    def step(pos, neg):
        return functional.layerwise(loss, pos, neg, weights=[0.5, 2.0, 1.0])

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for n in (4, 3, 6, 7, 9):
            pos, neg = ([activations(m, *s).requires_grad_() for s in LAYERS] for m in (n, n + 5))
            torch.testing.assert_close(compiled(pos, neg), step(pos, neg))


def test_losses_of_ones_own_are_taken_as_they_are():
    pos, neg = ([activations(4, 8) for _ in range(3)] for _ in range(2))
    loss = GoodnessLoss()
    loss.of_goodness = lambda g_pos, g_neg, width: g_pos.sum() * 0 + 7
    assert functional.layerwise(loss, pos, neg) == 21

    def own(p, q):
        raise AssertionError

    for value in (torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2, 3]), [torch.tensor(x) for x in (1, 2, 3)]):
        own.of_layers = lambda p, q, value=value: value
        assert functional.layerwise(own, pos, neg, weights=[0.5, 1.0, 1.5]) == 7
        assert functional.layerwise(own, pos, neg, weights={0: 0.5, 1: 1.0, 2: 1.5}) == 7


def test_a_layer_that_is_not_finite_is_the_only_one():
    pos, neg = ([activations(n, *s) for s in LAYERS] for n in (3, 5))
    pos[1][2, 3] = float("inf")
    assert GoodnessLoss().of_layers(pos, neg).isnan().tolist() == [False, True, False]


def test_layers_of_several_dtypes_and_losses_of_ones_own_go_one_by_one():
    class Doubled(GoodnessLoss):
        def forward(self, h_pos, h_neg):
            return 2 * super().forward(h_pos, h_neg)

    pos = [activations(3, 8), activations(3, 9, dtype=torch.bfloat16)]
    neg = [activations(4, 8), activations(4, 9, dtype=torch.bfloat16)]
    one = GoodnessLoss()
    torch.testing.assert_close(functional.layerwise(one, pos, neg), one(pos[0], neg[0]) + one(pos[1], neg[1]))

    class Constant(GoodnessLoss):
        def of_goodness(self, g_pos, g_neg, width):
            return g_pos.sum() * 0 + width

    alone = functional.layerwise(one, pos[:1], neg[:1])
    assert functional.layerwise(Constant(), pos[:1] * 2, neg[:1] * 2) == 16
    torch.testing.assert_close(functional.layerwise(Doubled(), pos[:1], neg[:1]), 2 * alone)


def test_bad_arguments():
    h = activations(3, 4)
    for call, error, words in (
        (lambda: ff.goodness_many(h), TypeError, "activations must be a list of tensors; got Tensor"),
        (lambda: ff.goodness_many([]), ValueError, "at least one tensor"),
        (lambda: ff.goodness_many([h, 3]), TypeError, r"activations\[1\] must be a tensor; got int"),
        (lambda: ff.goodness_many([h, h[0]]), ValueError, r"activations\[1\] must have a batch"),
        (lambda: ff.goodness_many([h, h.double()]), TypeError, "one dtype; got torch.float32 and, at 1, torch.float64"),
        (lambda: ff.goodness_many([h], "cubes"), ValueError, "kind must be"),
        (lambda: ff.goodness_many([h], backend="gpu"), ValueError, "backend"),
    ):
        with pytest.raises(error, match=words):
            call()
    layers = [h, h], [h[:1], h[:1]]
    for loss, error, words in (
        (GoodnessLoss(objective="symba"), ValueError, "compares pairs"),
        (GoodnessLoss(threshold="2"), TypeError, "threshold must be a number"),
        (GoodnessLoss(alpha="2"), TypeError, "alpha must be a number"),
        (GoodnessLoss(objective="two_threshold", two_threshold=3), TypeError, "two_threshold must be"),
    ):
        for call in (lambda loss=loss: loss.of_layers(*layers), lambda loss=loss: loss(h, h[:1])):
            with pytest.raises(error, match=words):
                call()
    with pytest.raises(ValueError, match="at least one tensor"):
        GoodnessLoss().of_layers([], [])
    with pytest.raises(ValueError, match="activations of one layer"):
        functional.layerwise(GoodnessLoss(), [h, h], [h, h[:, :3]])
