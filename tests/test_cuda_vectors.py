"""What the CUDA panels read of normalisers (csrc/similarity_vectors.cu), against the formula in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import emulated, emulated_module  # noqa: F401
from guards import guarded  # noqa: F401
from torch import Tensor

from ffcl_fast.backends import cuda_similarity

LOG2E = math.log2(math.e)
GAIN = 2.0**14


def unit_of(scale: Tensor) -> float:
    """Powers of two in a nat, by the factor that the kernels use."""
    return LOG2E if scale == 0 else float((scale * LOG2E).double() / scale.double())


def formula(sides, cache, scale, gain):
    """Weights, shifts and parts (3, n) of all sides, one after the other, and the frame, all in float64; the largest of
    what the centre is the mean of."""
    lse, grad = (torch.cat(x).double() for x in zip(*sides, strict=True))
    unit = unit_of(scale)
    finite, empty = lse.isfinite(), lse == -torch.inf
    exact = lse * unit if not len(cache) else (lse + cache[: len(lse)].double()) * unit
    seen = lse[finite] * unit
    low, high = (seen.amin(), seen.amax()) if len(seen) else (0.0, 0.0)
    centre = 0.5 * (low + high)
    sizes = grad.abs()[grad.isfinite()]
    largest = sizes.amax() if len(sizes) and sizes.amax() > 0 else 1.0
    shift = exact.float().double()
    shift = torch.where(finite, shift, torch.where(empty, torch.inf, lse))
    lost = torch.where(finite & (exact.abs() < (2.0**46 if len(cache) else 2.0**23)), shift - exact, 0.0)
    weight = torch.where(empty, 0.0, grad * gain / largest * torch.exp2(lost))
    part = torch.where(empty, 0.0, weight * torch.exp2(centre - shift))
    one = len(seen) == 0 or (high - low <= 120 and max(high, -low) < 65536)
    frame = torch.tensor([centre, one, scale * largest / gain], dtype=torch.float64)
    return torch.stack((weight, shift, part)), frame, max(abs(low), abs(high))


def made(sides, cache, scale, gain):
    q, k = (torch.zeros(len(lse), 8, dtype=torch.bfloat16) for lse, _ in (sides[0], sides[-1]))
    return cuda_similarity._vectors(cuda_similarity._problem(q, k, scale, None, None, 0), sides, cache, gain)


def compare(sides, cache, scale, gain=GAIN) -> Tensor:
    found, frame = made(sides, cache, scale, gain)
    again, same = made(sides, cache, scale, gain)
    for x, y in zip((*found, frame), (*again, same), strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))
    truth, true_frame, size = formula(sides, cache, scale, gain)
    weight, shift, part = torch.cat(found, 1).double()
    torch.testing.assert_close(weight, truth[0], rtol=2e-6, atol=0.0, equal_nan=True)
    torch.testing.assert_close(shift, truth[1], rtol=1.5e-7, atol=0.0, equal_nan=True)
    # centre - shift is rounded: up to 100 powers of two in 24 bits.
    torch.testing.assert_close(part, truth[2], rtol=5e-5, atol=1e-38, equal_nan=True)
    assert abs(float(frame[0] - true_frame[0])) <= 2e-7 * size
    torch.testing.assert_close(frame[1:].double(), true_frame[1:], rtol=1e-6, atol=1e-30)
    return frame


def side(n: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    return spread * torch.randn(n) + 5, torch.randn(n) / n


@pytest.mark.parametrize("rests", (False, True))
@pytest.mark.parametrize("sizes", ((1,), (257, 1), (1023, 1025), (1, 3000)), ids=str)
def test_vectors(sizes, rests, emulated, guarded):  # noqa: F811
    sides = [side(n) for n in sizes]
    cache = 1e-7 * torch.randn(sum(sizes) + 11) if rests else torch.empty(0)
    for scale in (20.0, -3.0, 0.0):
        assert compare(sides, cache, torch.tensor(scale))[1] == 1


def test_more_rows_than_ranges(emulated):  # noqa: F811
    n = 1024 * 128 + 300
    sides = [side(n), side(70)]
    sides[0][0][-1], sides[1][0][69], sides[0][1][n - 2] = 60.0, -70.0, 3.0  # what the last strides alone can see
    assert compare(sides, torch.empty(0), torch.tensor(2.0))[1] == 0


@pytest.mark.parametrize("far", (200.0, 70000.0, -70000.0))
def test_two_exponentials(far, emulated):  # noqa: F811
    """Normalisers far apart, or large and near."""
    lse, grad = side(300)
    lse = lse + far if abs(far) > 1000 else torch.where(torch.arange(300) == 7, lse - far, lse)
    frame = made([(lse, grad)], torch.empty(0), torch.tensor(1.0), 1.0)[1]
    assert frame[1] == 0


@pytest.mark.parametrize("size", (1e6, 1e8, 1e15))
@pytest.mark.parametrize("rests", (False, True))
def test_large_normalisers(rests, size, emulated):  # noqa: F811
    """What rounding takes from a shift counts while it is less than a power of two, with rests far longer."""
    sides = [(size * (1 + 1e-6 * torch.rand(50)), torch.randn(50))]
    cache = size * 2.0**-26 * torch.randn(50) if rests else torch.empty(0)
    found, _ = made(sides, cache, torch.tensor(3.0), 1.0)
    weight, shift, _ = found[0].double()
    # Probabilities are 2^(t - shift) weight: what a shift is off by is in the weight.
    exact = (sides[0][0].double() + (cache.double() if rests else 0.0)) * unit_of(torch.tensor(3.0))
    lost = torch.log2(weight / sides[0][1].double() * sides[0][1].abs().max().double())
    expected = shift - exact if size < (1e13 if rests else 5e6) else torch.zeros(50)
    torch.testing.assert_close(lost, expected.double(), rtol=1e-5, atol=1e-6)


def test_tiny_gradients(emulated):  # noqa: F811
    for gain in (1.0, GAIN):
        for power in (-110, -120, -130, -148):
            lse, grad = side(40)
            found, frame = made(
                [(lse, torch.ldexp(grad * 40, torch.tensor(power)))], torch.empty(0), torch.tensor(1.0), gain
            )
            assert found[0].isfinite().all() and frame.isfinite().all()
            torch.testing.assert_close(
                found[0][0].double() * frame[2].double(), torch.ldexp(grad * 40, torch.tensor(power)).double(),
                rtol=1e-5, atol=2.0**-149,
            )  # fmt: skip


def test_lengths_are_checked(emulated):  # noqa: F811
    lse, grad = side(40)
    for wrong, cache in (
        ((lse, grad[:39]), torch.empty(0)), ((lse[:3], grad[:3]), torch.empty(0)),
        ((lse, grad[:, None]), torch.empty(0)), ((lse, grad), torch.zeros(39)),
    ):  # fmt: skip
        p = cuda_similarity._problem(*(torch.zeros(40, 8).bfloat16(),) * 2, torch.tensor(1.0), None, None, 0)
        with pytest.raises(ValueError, match="40"):
            cuda_similarity._vectors(p, [wrong], cache, 1.0)


def test_no_keys_and_no_queries(emulated, guarded):  # noqa: F811
    x, none = torch.randn(5, 8).bfloat16(), torch.zeros(0, 8).bfloat16()
    for q, k in ((x, none), (none, x)):
        sides = torch.zeros(len(q)), torch.zeros(len(k)), torch.ones(len(q)), torch.ones(len(k))
        dq, dk = cuda_similarity.similarity_backward(
            q, k, torch.tensor(1.0), None, None, 0, *sides, torch.empty(0), True, True
        )
        assert torch.equal(dq, torch.zeros_like(q)) and torch.equal(dk, torch.zeros_like(k))


def test_numbers_that_are_not_finite(emulated, guarded):  # noqa: F811
    sides = [side(40), side(33)]
    for i, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        sides[0][0][i], sides[1][0][32 - i], sides[0][1][10 + i], sides[1][1][i + 5] = value, value, value, value
    cache = torch.zeros(73)
    assert compare(sides, cache, torch.tensor(7.0))[1] == 1
    nothing = [(torch.full((5,), -torch.inf), torch.zeros(5))]
    assert compare(nothing, torch.empty(0), torch.tensor(7.0)).tolist() == [0, 1, 7 / GAIN]


def test_gradients_may_be_expanded_and_of_any_dtype(emulated):  # noqa: F811
    lse = torch.randn(60, dtype=torch.float64)[::2]
    compare([(lse.float().double(), torch.tensor(0.25).expand(30))], torch.empty(0), torch.tensor(3.0))


def test_refusals_launch_nothing(emulated):  # noqa: F811
    lse, scale, out = torch.zeros(4), torch.ones(()), torch.empty(400)
    good, none = (lse.data_ptr(), 0, lse.data_ptr(), 4, out.data_ptr()), (0, 0, 0, 0, 0)
    rest = scale.data_ptr(), 1.0, out.data_ptr(), out.data_ptr(), 0, 0
    before = emulated.launches()
    for rows, cols in (
        (none, none), (none, good), ((0, *good[1:]), none), (good, (*good[:3], -1, good[4])),
        (good, (*good[:4], 0)), ((*good[:3], 1 << 31, good[4]), none),
    ):  # fmt: skip
        assert emulated.similarity_vectors_cuda(rows, cols, *rest) == 1
    for i, wrong in ((0, 0), (1, 0.0), (1, math.nan), (2, 0), (3, 0)):
        assert emulated.similarity_vectors_cuda(good, none, *rest[:i], wrong, *rest[i + 1 :]) == 1
    assert emulated.launches() == before
