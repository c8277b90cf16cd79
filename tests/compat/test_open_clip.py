"""ClipLoss and SigLipLoss against open_clip; several processes are in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees, assert_same_start
from similarity_cases import BACKENDS, vectors

import ffcl_fast as ff

original = pytest.importorskip("open_clip.loss")

SHAPES = ((1, 3), (2, 3), (65, 96), (128, 512), (300, 200))


def clip_truth(image, text, scale):
    """The symmetric loss without cancellation: float64's own log_softmax is 0 below 1e-16."""
    s = scale * image @ text.T
    odds = (s - s.diagonal()[:, None]).exp(), (s - s.diagonal()[None, :]).exp()
    off = 1 - torch.eye(len(s), dtype=s.dtype)
    return (torch.log1p((odds[0] * off).sum(1)) + torch.log1p((odds[1] * off).sum(0))).mean() / 2


def _features(shape, kind):
    """Matching rows. A little alike even untrained: cosines around zero would cancel in the gradient of the scale."""
    image = vectors(*shape)
    return image, F.normalize((0.7 if kind == "trained" else 0.3) * image + vectors(*shape), dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", (14.3, 30.0, 100.0))
@pytest.mark.parametrize("kind", ("untrained", "trained"))
def test_clip(backend, shape, scale, kind):
    # A loss of one or two tiny terms has the relative error of their logits, small by luck alone.
    scale = min(scale, 5.0) if shape[0] < 10 else scale
    features = _features(shape, kind)
    inputs = (*features, torch.tensor(scale))
    assert_agrees(ff.ClipLoss(backend=backend), original.ClipLoss(), *inputs, truth=clip_truth, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_with_a_bias(backend):
    """A softmax does not depend on it: same value, and a gradient of zero where autograd leaves rounding noise."""
    features = _features((40, 32), "trained")
    inputs = [x.clone().requires_grad_() for x in (*features, torch.tensor(20.0), torch.tensor(-3.0))]
    loss = ff.ClipLoss(backend=backend)(*inputs)
    loss.backward()
    torch.testing.assert_close(loss, original.ClipLoss()(*features, 20.0, torch.tensor(-3.0)), rtol=1e-6, atol=0)
    assert inputs[3].grad == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("scale,bias", ((10.0, -10.0), (117.0, -12.9)))
@pytest.mark.parametrize("kind", ("untrained", "trained"))
def test_siglip(backend, shape, scale, bias, kind):
    inputs = (*_features(shape, kind), torch.tensor(scale), torch.tensor(bias))
    assert_agrees(ff.SigLipLoss(backend=backend), original.SigLipLoss(), *inputs, scale=scale)


@pytest.mark.parametrize("name", ("ClipLoss", "SigLipLoss"))
def test_scale_of_one_element_and_dictionary(name):
    features = _features((20, 16), "untrained")
    scale, bias = torch.tensor([10.0]), torch.tensor([-10.0])
    ours, theirs = (getattr(m, name)()(*features, scale, bias, output_dict=True) for m in (ff, original))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["contrastive_loss"], theirs["contrastive_loss"].reshape(()), rtol=1e-6, atol=0)


def test_gradient_of_a_scale_of_one_element():
    features = _features((20, 16), "untrained")
    scale = torch.tensor([10.0], requires_grad=True)
    ff.ClipLoss()(*features, scale).backward()
    assert scale.grad.shape == (1,)


def test_signatures():
    assert_same_start(ff.ClipLoss.__init__, original.ClipLoss.__init__)
    assert_same_start(ff.ClipLoss.forward, original.ClipLoss.forward)
    assert_same_start(ff.SigLipLoss.__init__, original.SigLipLoss.__init__)
    assert_same_start(ff.SigLipLoss.forward, original.SigLipLoss.forward)
