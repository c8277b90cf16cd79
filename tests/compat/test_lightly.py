"""NTXentLoss against lightly."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_agrees, assert_same_start
from similarity_cases import BACKENDS

import ffcl_fast as ff

lightly = pytest.importorskip("lightly.loss")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((1, 3), (2, 4), (33, 96), (128, 128), (300, 200)), ids=str)
@pytest.mark.parametrize("temperature", (0.5, 0.1, 0.05))
def test_agrees(backend, shape, temperature):
    out0 = torch.randn(shape)
    # Views that a trained network gives, where the loss is small, and independent ones.
    for out1 in (out0 + 0.5 * torch.randn(shape), torch.randn(shape)):
        ours, original = ff.NTXentLoss(temperature, backend=backend), lightly.NTXentLoss(temperature)
        assert_agrees(ours, original, out0, out1, scale=1 / temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", (64, 48, 10))
def test_memory_bank(backend, size):
    """Ten steps with a bank larger than, no multiple of and smaller than the batch; the same bank before and after."""
    torch.manual_seed(3)
    ours = ff.NTXentLoss(0.1, memory_bank_size=(size, 16), backend=backend)
    torch.manual_seed(3)
    theirs = lightly.NTXentLoss(0.1, memory_bank_size=(size, 16))
    assert torch.equal(ours.memory_bank.bank, theirs.memory_bank.bank)
    for step in range(10):
        out0, out1 = torch.randn(20, 16), torch.randn(20, 16)
        results = []
        for loss in (ours, theirs):
            a, b = out0.clone().requires_grad_(step != 4), out1.clone().requires_grad_()
            value = loss(a, b)
            value.backward()
            results.append((value.detach(), a.grad if step != 4 else value.detach(), b.grad))
        for x, y in zip(*results, strict=True):
            assert (x - y).norm() <= 1e-6 * y.norm()
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank, rtol=1e-6, atol=1e-7)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


def test_loads_a_checkpoint_of_the_original():
    """lightly's bank is not in its state dict: a strict load must still pass."""
    ours = ff.NTXentLoss(memory_bank_size=(8, 4))
    before = ours.memory_bank.bank.clone()
    ours.load_state_dict(lightly.NTXentLoss(memory_bank_size=(8, 4)).state_dict())
    assert torch.equal(ours.memory_bank.bank, before)


def test_signatures():
    assert_same_start(ff.NTXentLoss.__init__, lightly.NTXentLoss.__init__)
    assert_same_start(ff.NTXentLoss.forward, lightly.NTXentLoss.forward)


@pytest.mark.parametrize("options", ({"temperature": 0.0}, {"memory_bank_size": -1}, {"memory_bank_size": (1, 2, 3)}))
def test_same_errors(options):
    for cls in (ff.NTXentLoss, lightly.NTXentLoss):
        with pytest.raises(ValueError):
            cls(**options)
