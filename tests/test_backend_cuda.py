"""The CUDA backend: it says why it cannot run, or is not what was measured. On a GPU: test_gpu_cuda.py."""

from __future__ import annotations

import pytest
import torch

from ffcl_fast import backends
from ffcl_fast.backends import cuda, native


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


@pytest.mark.parametrize("capability, built", ((90, True), (90, False), (80, False)))
def test_what_was_measured_are_the_kernels_for_sm_90a(capability, built, monkeypatch):
    """A build without them runs on that chip by its others, which "auto" leaves to who names the backend."""

    class Native(WithCuda):
        @staticmethod
        def sm90_built() -> bool:
            return built

    monkeypatch.setattr(native, "module", Native)
    monkeypatch.setattr(cuda, "chip", lambda device: cuda.Chip(capability, 132))
    problem = cuda.doubtful(torch.zeros(1))
    assert (problem is not None and "sm_90a" in problem) == (capability == 90 and not built)


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


def test_refuses_more_rows_than_32_bits_count(monkeypatch):
    monkeypatch.setattr(native, "module", WithCuda)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    row = torch.zeros((), dtype=torch.bfloat16)
    assert cuda.unavailable("similarity_forward", row.expand(2**31 - 4097, 8)) is None
    assert "at most 2147479551 rows" in cuda.unavailable("similarity_forward", row.expand(2**31 - 4096, 8))


@pytest.mark.parametrize(
    "archs, runs",
    (
        (["80", "90a", "100"], (80, 86, 90, 100, 120)),
        (["90a"], (90,)),
        (["80-real", "90"], (80, 86, 90, 100, 120)),
        (["80-real"], (80, 86)),
        (["100f"], (100,)),
        ([], ()),
    ),
)
def test_which_chips_a_build_is_for(archs, runs):
    assert tuple(c for c in (75, 80, 86, 90, 100, 120) if cuda.runs_on(c, archs)) == runs


def test_a_sample_of_no_dimension_is_told_not_stumbled_over(monkeypatch):
    monkeypatch.setattr(native, "module", WithCuda)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    assert cuda.unavailable("goodness_forward", torch.zeros(0, 4)) is None
    assert "at most 1073741823 elements" in cuda.unavailable("goodness_forward", torch.zeros(()).expand(2, 2**30))


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
