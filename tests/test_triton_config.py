"""What Triton kernels are chosen and launched by: precision, aligned operands. No GPU is used."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from ffcl_fast.backends import aligned  # noqa: E402
from ffcl_fast.backends.triton import config  # noqa: E402


def test_what_is_off_16_bytes_is_copied_to_where_it_is_not():
    x = torch.randn(64, 72).bfloat16()
    for fine in (x, x[::2], x[:, 8:40], torch.zeros(0, 72)):
        assert aligned.is_aligned(fine) and aligned.aligned_rows(fine) is fine
    for odd in (
        x[:, 1:65],  # its base is off 16 bytes
        x[:, :9],  # its rows end off them
        torch.randn(64, 9).bfloat16(),  # and begin there
        x[:1].expand(9, 72),  # its rows are one
        x.view(-1).as_strided((20, 64), (8, 1)),  # they overlap
        x.T,
        x[:, 3:4],
    ):
        copy = aligned.aligned_rows(odd)
        assert not aligned.is_aligned(odd) and aligned.is_aligned(copy)
        assert torch.equal(copy[:, : odd.shape[1]], odd) and not bool(copy[:, odd.shape[1] :].any())
        assert copy.shape[1] - odd.shape[1] < 8


def test_float32_is_float32_unless_torch_allows_tf32(monkeypatch):
    x, gpu = torch.zeros(2, 2), torch.device("cuda", 0)

    class OnGpu:
        def __init__(self, dtype):
            self.dtype, self.device = dtype, gpu

    for dtype in (torch.bfloat16, torch.float16):
        assert config.precision(OnGpu(dtype)) == "ieee"
    assert config.precision(OnGpu(torch.float32)) == "ieee" and config.precision(x) == "interpret"
    # No monkeypatch: torch's switch is no attribute that can be deleted again.
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert config.precision(OnGpu(torch.float32)) == "tf32"
        monkeypatch.setattr(config, "has_tf32", lambda device: False)
        assert config.precision(OnGpu(torch.float32)) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
