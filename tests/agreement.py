"""The rule for drop-in modules: 1e-6 relative from the original, or its error against float64 where that is larger."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-6


def value_and_gradients(loss: Callable[..., Tensor], inputs: tuple, weight: Tensor | None = None) -> list[Tensor]:
    """The loss and its gradient in every floating tensor of ``inputs``; ``weight`` for a loss that is no scalar."""
    leaves = [x.detach().clone().requires_grad_() if _floating(x) else x for x in inputs]
    value = loss(*leaves)
    value.backward(None if weight is None else weight.to(value.dtype))
    return [value.detach()] + [x.grad for x in leaves if _floating(x)]


def assert_agrees(
    ours: Callable, original: Callable, *inputs, truth: Callable | None = None, weight=None, scale: float = 1.0
) -> None:
    """``ours(*inputs)`` agrees with ``original(*inputs)`` in float32, value and gradients, norm-relative per tensor.

    ``truth`` is what float64 inputs are given to, the original itself by default. Where two float32 results differ by
    more than 1e-6, ours must be within 1e-6 of the truth, or its error at most twice the original's (the project's
    rule for errors: two roundings of the same size differ by luck). ``scale`` is the size of the largest logit. A loss
    of one or two terms is a ratio of exponentials, so its relative error is the absolute one of two logits. Each is the
    product of two embeddings normalised in float32 and is rounded itself: three roundings of 2^-24 scale, six for two
    logits. They seldom all point the same way: the rule allows four, 2^-22 scale, which passes 1e-6 from a scale of 4.
    The original rounds its logits in float64 too, so what it calls the truth is known to 2^-52 scale and no better.
    """
    exact = value_and_gradients(truth or original, tuple(x.double() if _floating(x) else x for x in inputs), weight)
    a = value_and_gradients(ours, inputs, weight)
    b = value_and_gradients(original, inputs, weight)
    names = ["value"] + [f"gradient of input {i}" for i, x in enumerate(inputs) if _floating(x)]
    scalars = [None] + [x for x in inputs if _floating(x)]
    for name, x, y, z, given in zip(names, a, b, exact, scalars, strict=True):
        assert x is not None, f"{name}: ours has none"
        y = torch.zeros_like(x) if y is None else y
        z = torch.zeros_like(x, dtype=torch.float64) if z is None else z
        assert x.shape == y.shape == z.shape, f"{name}: shapes {x.shape}, {y.shape}, {z.shape}"
        size = z.norm().clamp_min(scale * 2.0**-52 / TOLERANCE)
        if given is not None and given.dim() == 0 and inputs[0].dim() == 2:
            # The gradient of a scale is a sum over rows, <q_i, dq_i> / scale, and may cancel to any size; so may each
            # of these, the difference of two cosines that are rounded themselves: |q_i| |dq_i| does not.
            rows = inputs[0].double().norm(dim=1) * exact[1].norm(dim=1)
            size = max(size, rows.sum() / given.double().abs())
        apart, error, other = (float((u.double() - v.double()).norm() / size) for u, v in ((x, y), (x, z), (y, z)))
        assert apart <= TOLERANCE or error <= max(TOLERANCE, scale * 2.0**-22, 2 * other), (
            f"{name}: {apart:.2e} apart; ours {error:.2e} from float64, the original {other:.2e}"
        )


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def assert_same_start(ours, theirs):
    """Every argument of ``theirs``, in its order and with its default; ours may add keyword-only ones."""
    a, b = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    assert [(p.name, p.default) for p in a[: len(b)]] == [(p.name, p.default) for p in b]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in a[len(b) :])
