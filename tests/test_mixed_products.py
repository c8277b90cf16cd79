"""Whether torch multiplies 16-bit panels into float32 sums: what is remembered of a failed try. No GPU is used."""

from __future__ import annotations

import pytest
import torch

from ffcl_fast.backends import mixed_products

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "error, capturing, remembered",
    [
        (RuntimeError("not for this dtype"), False, True),
        (torch.OutOfMemoryError("full"), False, False),
        (RuntimeError("not while capturing"), True, False),
    ],
    ids=["build", "memory", "graph"],
)
def test_only_what_the_build_lacks_is_remembered(error, capturing, remembered, monkeypatch, caplog):
    def zeros(*size, **options):
        raise error

    monkeypatch.setattr(mixed_products, "_mixed", {})
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert not mixed_products.mixed_product(GPU, torch.bfloat16)
    assert str(error) in caplog.text
    assert mixed_products._mixed == ({(GPU, torch.bfloat16): False} if remembered else {})
