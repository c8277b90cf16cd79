"""Comparison rules shared by the tests: ``from helpers import assert_close_to_reference``."""

from __future__ import annotations

import torch
from torch import Tensor

# What rounding alone costs an element of a tensor of this dtype, relative to the larger of that element and the
# tensor's root mean square: one unit in the last place, and for float32 and float64 the few that a sum adds.
DTYPE_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,  # a normaliser near 14 is rounded to 1e-6, and so is every exponential taken against it
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def assert_close_to_reference(
    ours: Tensor,
    eager_same_dtype: Tensor,
    float64_truth: Tensor,
    factor: float = 2.0,
    name: str = "result",
    terms: float | Tensor = 0.0,
) -> None:
    """The project's test rule: our error is at most ``factor`` times plain PyTorch's in the same dtype.

    Args:
        ours: what is tested, any shape.
        eager_same_dtype: the same quantity from plain PyTorch on the same inputs in the same dtype.
        float64_truth: the same from the float64 reference.
        factor: 2 for values, 3 for gradients.
        name: what the messages call it.
        terms: size of the terms whose difference the result is, where they may cancel: the dtype's tolerance is
            relative to them then. A root mean square, or each element's, in the result's shape.

    Three things are asserted. Where the truth is not finite, ours is the same. Each element's error is at most
    ``factor`` times the largest of four root mean squares of eager's errors in that row and in the whole tensor, and
    eager's largest error (eager is exact at some elements by luck, and where a softmax is peaked its errors have a long
    tail, the largest being up to 23 times their root mean square), plus the dtype's tolerance. The root mean square
    error is at most ``factor`` times eager's, plus that tolerance: the rule that a systematic loss of accuracy cannot
    pass.
    """
    assert ours.shape == float64_truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(float64_truth.shape)}"
    assert eager_same_dtype.shape == float64_truth.shape, f"{name}: eager has shape {tuple(eager_same_dtype.shape)}"
    assert float64_truth.dtype == torch.float64, f"{name}: the truth must be float64, not {float64_truth.dtype}"
    if not ours.numel():
        return
    device = ours.device if ours.is_cuda else "cpu"  # a GPU's results stay there: copies take longer than the kernels
    x, eager, truth = (t.detach().to(device, torch.float64) for t in (ours, eager_same_dtype, float64_truth))
    # An overflow of eager's in its own dtype says nothing about the accuracy that can be asked for.
    eager_error = (eager - truth).abs().nan_to_num(nan=0.0, posinf=0.0)
    usual_error = eager_error.square().mean(-1, keepdim=True).sqrt().clamp(min=_rms(eager_error)).expand_as(truth)
    finite = truth.isfinite()
    odd, expected = x[~finite], truth[~finite]
    assert bool(((odd == expected) | (odd.isnan() & expected.isnan())).all()), f"{name}: {odd} is not {expected}"
    x, eager, truth, eager_error, usual_error = (t[finite] for t in (x, eager, truth, eager_error, usual_error))
    if isinstance(terms, Tensor):
        terms = terms.to(device, torch.float64)[finite]
    if not x.numel():
        return
    assert bool(x.isfinite().all()), f"{name}: {int((~x.isfinite()).sum())} elements are not finite, the truth is"

    error = (x - truth).abs()
    tolerance = DTYPE_TOLERANCE[ours.dtype]
    scale = max(_rms(truth), _rms(terms) if isinstance(terms, Tensor) else terms)
    size = truth.abs().clamp(min=scale)
    if isinstance(terms, Tensor):
        size = size.maximum(terms)
    bound = factor * (4 * usual_error).clamp(min=float(eager_error.max())) + tolerance * size
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"{name}: {int((error > bound).sum())} of {error.numel()} elements too far off; worst at flat index {worst}: "
        f"{float(x[worst])!r}, truth {float(truth[worst])!r}, eager {float(eager[worst])!r}; error {error[worst]:.3e} "
        f"over {bound[worst]:.3e}"
    )
    limit = factor * _rms(eager_error) + tolerance * scale
    assert _rms(error) <= limit, f"{name}: root mean square error {_rms(error):.3e} over {limit:.3e}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
