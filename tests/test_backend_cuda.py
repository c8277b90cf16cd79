"""The CUDA backend: it says why it cannot run, is never chosen unasked, and on a GPU agrees with the reference."""

from __future__ import annotations

import pytest
import torch

from ffcl_fast import backends, ops, reference
from ffcl_fast.backends import cuda, native
from helpers import assert_close_to_reference


class WithoutCuda:
    """A native module built for the CPU alone."""

    @staticmethod
    def cuda_built() -> bool:
        return False


class WithCuda:
    @staticmethod
    def cuda_built() -> bool:
        return True

    @staticmethod
    def cuda_error(status: int) -> str:
        return f"reason {status}"


def test_refuses_cpu_tensors(monkeypatch):
    monkeypatch.setattr(native, "module", WithCuda)
    h = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run goodness_forward on cpu.*CUDA tensors only"):
        torch.ops.ffcl_fast.goodness_forward(h, False, False, False, 1e-8, "cuda")


def test_refuses_where_it_was_not_built(monkeypatch):
    h = torch.randn(3, 5)
    monkeypatch.setattr(native, "module", WithoutCuda)
    assert "built without the CUDA kernels" in cuda.unavailable("goodness_forward", h)
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "problem", "no compiled part")
    assert cuda.unavailable("goodness_forward", h) == "no compiled part"


def test_refuses_operators_it_lacks():
    q = torch.randn(3, 5)
    assert cuda.unavailable("siglip", q) == "not written in CUDA"


def test_auto_never_means_cuda():
    for op in ("goodness_forward", "goodness_backward", "similarity_forward"):
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                assert backends.choose(op, device, dtype)[0] != "cuda"


def test_a_failed_launch_names_kernel_shapes_and_reason(monkeypatch):
    monkeypatch.setattr(native, "module", WithCuda)
    h = torch.randn(3, 5, dtype=torch.bfloat16)
    with pytest.raises(
        RuntimeError, match=r"CUDA kernel goodness_forward failed: reason 1209 \(h: \(3, 5\) torch.bfloat16"
    ):
        cuda._check(1209, "goodness_forward", h=h)
    with pytest.raises(ValueError, match="CUDA kernel goodness_forward refused its arguments"):
        cuda._check(1, "goodness_forward", h=h)


@pytest.mark.skipif(native.module is None or not native.module.cuda_built(), reason="built without the CUDA kernels")
def test_without_a_driver_a_launch_fails_and_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    h, goodness = torch.randn(3, 8), torch.empty(3)
    args = native.module.GoodnessRows(h.data_ptr(), 3, 8, 8, 0, False, False, 1e-8, 0, 0)
    status = native.module.goodness_forward_cuda(args, goodness.data_ptr(), 0)
    assert status > 1000
    with pytest.raises(RuntimeError, match="CUDA kernel goodness_forward failed: .*CUDA"):
        cuda._check(status, "goodness_forward", h=h)


@pytest.mark.gpu
@pytest.mark.skipif(native.module is None or not native.module.cuda_built(), reason="built without the CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_goodness_agrees_with_the_reference(dtype, rng):
    for dim in (1, 7, 96, 256, 1000, 1032, 2056, 8256, 20000):  # a warp or a block a row, whole packs or not
        for padding in (0, 3, 8):
            for mean, relu in ((False, False), (True, True)):
                check_goodness(dtype, dim, padding, mean, relu, rng)


def check_goodness(dtype, dim, padding, mean, relu, rng):
    h = torch.randn(13, dim + padding, generator=rng).to(dtype).cuda()[:, :dim]
    grad_goodness = torch.randn(13, generator=rng).cuda()
    grad_out = torch.randn(13, dim, generator=rng).to(dtype).cuda()
    eps = 1e-4
    goodness, out = torch.ops.ffcl_fast.goodness_forward(h, mean, relu, True, eps, "cuda")
    eager = reference.goodness_forward(h, mean, relu, True, eps)
    truth = reference.goodness_forward(h.double(), mean, relu, True, eps)
    assert_close_to_reference(goodness, eager[0], truth[0], name="goodness")
    assert_close_to_reference(out, eager[1], truth[1], name="normalised")

    for of_goodness, of_out in ((grad_goodness, grad_out), (grad_goodness, None), (None, grad_out)):
        ours = torch.ops.ffcl_fast.goodness_backward(h, goodness, of_goodness, of_out, mean, relu, eps, "cuda")
        eager_grad = reference.goodness_backward(h, goodness, of_goodness, of_out, mean, relu, eps)
        doubles = [None if x is None else x.double() for x in (h, goodness, of_goodness, of_out)]
        true_grad = reference.goodness_backward(*doubles, mean, relu, eps)
        assert_close_to_reference(ours, eager_grad, true_grad, factor=3, name="gradient")
    assert ops.accumulator_dtype(h) == goodness.dtype
