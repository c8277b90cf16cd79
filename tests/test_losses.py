"""The modules: options, state, printing, deep copies, memory bank."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from similarity_cases import vectors
from torch import nn

import ffcl_fast as ff
import ffcl_fast.functional as fn
from ffcl_fast.losses.memory_bank import MemoryBank


def test_modules_are_the_functions():
    x, y, z, labels = vectors(12, 6), vectors(12, 6), vectors(9, 6), torch.arange(12) % 3
    features = torch.stack((x, y), 1)
    bias = torch.tensor(-3.0)
    for module, arguments, expected in (
        (ff.InfoNCELoss(), (x, y), fn.info_nce(x, y)),
        (ff.InfoNCELoss(0.2, "sum"), (x, y, z), fn.info_nce(x, y, z, 0.2, "sum")),
        (ff.InfoNCELoss(decoupled=True), (x, y), fn.info_nce(x, y, decoupled=True)),
        (ff.NTXentLoss(), (x, y), fn.nt_xent(x, y)),
        (ff.NTXentLoss(0.1, decoupled=True), (x, y), fn.nt_xent(x, y, 0.1, decoupled=True)),
        (ff.SupConLoss(), (features, labels), fn.sup_con(features, labels)),
        (ff.SupConLoss(0.2, "one", 0.1), (features,), fn.sup_con(features, None, None, 0.2, "one", 0.1)),
        (ff.ClipLoss(), (x, y, 7.0), fn.clip(x, y, 7.0)),
        (ff.SigLipLoss(), (x, y, 7.0, bias), fn.siglip(x, y, 7.0, bias)),
    ):
        assert torch.equal(module(*arguments), expected)
        assert torch.equal(copy.deepcopy(module)(*arguments), expected)
        assert type(module).__name__ in repr(module)


def test_repr_tells_what_is_not_as_usual():
    usual = "InfoNCELoss(temperature=0.1, reduction='mean', negative_mode='unpaired'"
    assert repr(ff.InfoNCELoss()) == f"{usual})"
    assert repr(ff.InfoNCELoss(decoupled=True, distributed="ring", backend="cpu")) == (
        f"{usual}, decoupled=True, distributed='ring', backend='cpu')"
    )
    assert repr(ff.GoodnessLoss(backend="reference")).endswith("relu=False, backend='reference')")
    assert repr(ff.ClipLoss(backend="panels")) == ("ClipLoss(local_loss=False, rank=0, world_size=1, backend='panels')")


def test_defaults_are_those_of_the_libraries():
    assert ff.InfoNCELoss().temperature == 0.1 and ff.InfoNCELoss().reduction == "mean"
    assert ff.NTXentLoss().temperature == 0.5
    assert ff.SupConLoss().temperature == ff.SupConLoss().base_temperature == 0.07
    assert ff.ClipLoss(cache_labels=True).state_dict() == ff.NTXentLoss().state_dict() == {}


@pytest.mark.parametrize("cls", (ff.InfoNCELoss, ff.NTXentLoss, ff.SupConLoss))
def test_temperature_as_a_parameter(cls):
    loss = cls(nn.Parameter(torch.tensor(0.2)))
    x, y = vectors(12, 6), vectors(12, 6)
    inputs = (torch.stack((x, y), 1),) if cls is ff.SupConLoss else (x, y)
    loss(*inputs).backward()
    assert list(dict(loss.named_parameters())) == ["temperature"]
    step = 1e-4
    ends = [cls(0.2 + d)(*(x.double() for x in inputs)) for d in (step, -step)]
    torch.testing.assert_close(loss.temperature.grad.double(), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    (
        lambda: ff.InfoNCELoss(0.0),
        lambda: ff.InfoNCELoss(float("inf")),
        lambda: ff.InfoNCELoss(reduction="max"),
        lambda: ff.InfoNCELoss(negative_mode="both"),
        lambda: ff.NTXentLoss(backend="tpu"),
        lambda: ff.NTXentLoss(1e-9),
        lambda: ff.NTXentLoss(memory_bank_size=(4, 0)),
        lambda: ff.NTXentLoss(memory_bank_size=-3),
        lambda: ff.SupConLoss(contrast_mode="some"),
        lambda: ff.ClipLoss(rank=2, world_size=2),
        lambda: ff.ClipLoss(use_horovod=True),
        lambda: ff.SigLipLoss(dist_impl="tree"),
        lambda: ff.SigLipLoss(world_size=0),
    ),
)
def test_impossible_options(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("cls", [ff.InfoNCELoss, ff.NTXentLoss, ff.SupConLoss])
@pytest.mark.parametrize("temperature", ["0.1", None, [0.1], True])
def test_a_temperature_of_another_type_is_named(cls, temperature):
    with pytest.raises(TypeError, match="temperature must be a number or a one-element tensor, got"):
        cls(temperature)


@pytest.mark.parametrize("size", [1.5, True, "9", (8, 2.0)])
def test_a_memory_bank_of_another_type_is_named(size):
    with pytest.raises(ValueError, match="memory_bank_size must be"):
        ff.NTXentLoss(memory_bank_size=size)


def test_memory_bank_is_saved_and_restored():
    loss = ff.NTXentLoss(memory_bank_size=(10, 6))
    loss(vectors(4, 6).requires_grad_(), vectors(4, 6))
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = ff.NTXentLoss(memory_bank_size=(10, 6))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.memory_bank.bank, loss.memory_bank.bank) and other.memory_bank.bank_ptr == 4
    x, y = vectors(4, 6), vectors(4, 6)
    assert torch.equal(other(x, y), loss(x, y))
    narrow = ff.NTXentLoss(memory_bank_size=10)  # its width comes with the state
    narrow.load_state_dict(loss.state_dict())
    assert torch.equal(narrow(x, y), loss(x, y))


def test_memory_bank_keeps_the_last_embeddings():
    bank = MemoryBank((7, 2))
    rows = torch.arange(20.0).view(10, 2)
    kept = bank.keys(2)
    bank.enqueue(rows[:3])
    bank.enqueue(rows[3:5])
    assert torch.equal(bank.bank[:5], rows[:5]) and bank.bank_ptr == 5
    bank.enqueue(rows[5:8])  # cut at the end, as lightly does
    assert torch.equal(bank.bank, rows[:7]) and bank.bank_ptr == 0
    bank.enqueue(rows)  # larger than the bank
    assert torch.equal(bank.bank, rows[:7]) and bank.bank_ptr == 0
    assert kept.data_ptr() == bank.keys(2).data_ptr()


@pytest.mark.parametrize("decoupled", (False, True))
def test_a_memory_bank_is_written_before_the_backward_pass(decoupled):
    """A symmetric loss, as MoCo's users write it: each half has the gradients of the bank that it was computed with."""
    temperature = nn.Parameter(torch.tensor(0.3))
    loss = ff.NTXentLoss(temperature, memory_bank_size=(10, 5), decoupled=decoupled)
    bank = loss.memory_bank.bank
    x, y = (vectors(4, 5).requires_grad_() for _ in range(2))
    truth = []
    for a, b in ((x, y), (y, x)):
        leaves = [v.detach().double().requires_grad_() for v in (a, b, temperature)]
        p, q = (nn.functional.normalize(v, dim=1) for v in leaves[:2])
        positive = (p * q).sum(1, keepdim=True)
        logits = torch.cat((positive, p @ bank.double().T), 1) / leaves[2]
        ((logits[:, decoupled:].logsumexp(1) - logits[:, 0]).mean()).backward()
        truth.append([v.grad for v in leaves])
        if a is x:
            value = loss(x, y)
            assert torch.equal(bank[:4], nn.functional.normalize(y.detach()))
    (value + loss(y, x)).backward()
    assert loss.memory_bank.bank is bank and torch.equal(bank[4:8], nn.functional.normalize(x.detach()))
    (x0, y0, t0), (y1, x1, t1) = truth
    for ours, expected in ((x.grad, x0 + x1), (y.grad, y0 + y1), (temperature.grad, t0 + t1)):
        torch.testing.assert_close(ours.double(), expected, rtol=3e-5, atol=3e-6)


def test_memory_bank_of_a_bare_size_and_wrong_width():
    loss = ff.NTXentLoss(memory_bank_size=8)
    loss(vectors(4, 6), vectors(4, 6))
    assert loss.memory_bank.bank.shape == (8, 6)
    with pytest.raises(ValueError, match="memory bank"):
        loss(vectors(4, 5), vectors(4, 5))


def test_memory_bank_is_updated_for_training_only():
    loss = ff.NTXentLoss(memory_bank_size=(8, 6))
    before = loss.memory_bank.bank.clone()
    loss(vectors(4, 6), vectors(4, 6))
    assert torch.equal(loss.memory_bank.bank, before)
    loss(vectors(4, 6).requires_grad_(), vectors(4, 6)).backward()
    assert not torch.equal(loss.memory_bank.bank, before)


def test_memory_bank_made_under_inference_mode_can_be_trained_with():
    loss = ff.NTXentLoss(memory_bank_size=8)
    with torch.inference_mode():
        loss(vectors(4, 6), vectors(4, 6))
    out0, out1 = vectors(4, 6).requires_grad_(), vectors(4, 6)
    loss(out0, out1).backward()
    assert out0.grad is not None
    torch.testing.assert_close(loss.memory_bank.bank[:4], nn.functional.normalize(out1))


def test_a_refused_batch_leaves_the_memory_bank_alone():
    loss = ff.NTXentLoss(memory_bank_size=(8, 6))
    before = loss.memory_bank.bank.clone()
    with pytest.raises(ValueError, match="out1 must have as many rows as out0"):
        loss(vectors(4, 6).requires_grad_(), vectors(3, 6))
    assert torch.equal(loss.memory_bank.bank, before) and loss.memory_bank.bank_ptr == 0


def test_a_used_memory_bank_of_a_bare_size_takes_an_unused_ones_state():
    loss = ff.NTXentLoss(memory_bank_size=8)
    start = copy.deepcopy(loss.state_dict())
    loss(vectors(4, 6).requires_grad_(), vectors(4, 6))
    loss.load_state_dict(start)
    assert loss(vectors(4, 5).requires_grad_(), vectors(4, 5)).isfinite()


@pytest.mark.parametrize("cls", [ff.InfoNCELoss, ff.NTXentLoss, ff.SupConLoss])
def test_built_without_memory(cls):
    with torch.device("meta"):
        assert cls().temperature == cls().temperature
        assert cls(nn.Parameter(torch.tensor(0.1))).temperature.is_meta


def test_shapes_without_memory():
    x, y = vectors(4, 6).to("meta").requires_grad_(), vectors(4, 6).to("meta")
    for loss in (
        ff.InfoNCELoss()(x, y),
        ff.NTXentLoss()(x, y),
        ff.SupConLoss()(torch.stack((x, y), 1)),
        ff.ClipLoss()(x, y, 7.0),
        ff.SigLipLoss()(x, y, 7.0, -3.0),
    ):
        loss.backward()
        assert loss.shape == () and x.grad.shape == x.shape


def test_memory_bank_compiles():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = ff.NTXentLoss(memory_bank_size=(10, 6))
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x, y = vectors(4, 6), vectors(4, 6)
        results = []
        for loss in (plain, compiled):
            leaf = x.clone().requires_grad_()
            value = loss(leaf, y)
            value.backward()
            results.append((value.detach(), leaf.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_modules_move_and_cast():
    loss = ff.NTXentLoss(memory_bank_size=(8, 6)).double()
    assert loss.memory_bank.bank.dtype == torch.float64
    x = vectors(4, 6, torch.float64)
    assert loss(x, x.flip(0)).dtype == torch.float64
    half = ff.NTXentLoss(memory_bank_size=(8, 6)).bfloat16()
    assert half(x.bfloat16(), x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("value", (0, 0.0, True, "0.07", float("nan"), float("inf"), None))
def test_a_base_temperature_that_cannot_be_is_refused_when_built(value):
    with pytest.raises(ValueError, match="base_temperature must be a finite number other than zero, got"):
        ff.SupConLoss(base_temperature=value)
