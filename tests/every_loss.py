"""Every public function once, on small inputs: for tests of what must hold for all of them alike."""

from __future__ import annotations

import torch
from torch import Tensor

import ffcl_fast.functional as fn

N, D = 16, 24


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, y (N, D), maps (N, 6, 2, 2), a learnable scale () and bias (), none of which requires a gradient yet."""
    x, y = torch.randn(N, D, device=device), torch.randn(N, D, device=device)
    maps = torch.randn(N, 6, 2, 2, device=device)
    return x, y, maps, torch.full((), 5.0, device=device), torch.full((), -2.0, device=device)


def _labels(x: Tensor) -> Tensor:
    return torch.arange(N, device=x.device) % 5


def _target(x: Tensor) -> Tensor:
    return torch.ones(N, device=x.device) - 2 * (_labels(x) == 0)


LOSSES = {
    "info_nce": lambda x, y, m, s, b: fn.info_nce(x, y, temperature=1 / s),
    "info_nce queue": lambda x, y, m, s, b: fn.info_nce(
        x, y, y.flip(0), 1 / s, ids=_labels(x), negative_ids=_labels(x)
    ),
    "info_nce paired": lambda x, y, m, s, b: fn.info_nce(x, y, m.view(N, 1, D), 1 / s, "mean", "paired"),
    "nt_xent": lambda x, y, m, s, b: fn.nt_xent(x, y, 1 / s),
    "nt_xent bank": lambda x, y, m, s, b: fn.nt_xent(x, y, 1 / s, m.view(N, D)),
    "sup_con": lambda x, y, m, s, b: fn.sup_con(torch.stack((x, y), 1), _labels(x), temperature=1 / s),
    "sup_con one": lambda x, y, m, s, b: fn.sup_con(torch.stack((x, y), 1), _labels(x), None, 1 / s, "one"),
    "sup_con mask": lambda x, y, m, s, b: fn.sup_con(x[:, None], mask=torch.ones(N, N, device=x.device)),
    "clip": lambda x, y, m, s, b: fn.clip(x, y, s, b),
    "siglip": lambda x, y, m, s, b: fn.siglip(x, y, s, b),
    "similarity_lse": lambda x, y, m, s, b: sum(v.sum() for v in fn.similarity_lse(x, y, s, normalize=True)),
    "goodness": lambda x, y, m, s, b: fn.goodness(x, relu=True).sum(),
    "goodness over channels": lambda x, y, m, s, b: fn.goodness(m, over="channels").sum(),
    "goodness of groups": lambda x, y, m, s, b: fn.channel_group_loss(m, _labels(x) % 3, 3),
    "goodness_normalize": lambda x, y, m, s, b: (fn.goodness_normalize(m, relu=True) * m.detach()).sum(),
    "pool_goodness": lambda x, y, m, s, b: fn.pool_goodness(m)[0].sum() + fn.pool_goodness(m)[1].sum(),
    "goodness_many": lambda x, y, m, s, b: sum(g.sum() for g in fn.goodness_many([x, y[:3]])),
    "linear_goodness": lambda x, y, m, s, b: fn.linear_goodness(x, y).sum(),
    "pair_cosine": lambda x, y, m, s, b: fn.pair_cosine(x, y, _target(x)),
    "pair_cosine rows": lambda x, y, m, s, b: fn.pair_cosine(x, y, _target(x), reduction="none").sum(),
    "layerwise": lambda x, y, m, s, b: fn.layerwise(fn.pair_cosine, [x, m], [y, m.flip(0)], _target(x)),
    "goodness_loss": lambda x, y, m, s, b: fn.goodness_loss(fn.goodness(x), fn.goodness(y), threshold=20.0),
    "margin_sup_con": lambda x, y, m, s, b: fn.margin_sup_con(x, _labels(x), 0.1),
}


# Which of x, y, maps, scale and bias each has a gradient for.
LEAVES = {
    "info_nce": (0, 1, 3),
    "info_nce queue": (0, 1, 3),
    "info_nce paired": (0, 1, 2, 3),
    "nt_xent": (0, 1, 3),
    "nt_xent bank": (0, 1, 3),
    "sup_con": (0, 1, 3),
    "sup_con one": (0, 1, 3),
    "sup_con mask": (0,),
    "clip": (0, 1, 3, 4),
    "siglip": (0, 1, 3, 4),
    "similarity_lse": (0, 1, 3),
    "goodness": (0,),
    "goodness over channels": (2,),
    "goodness of groups": (2,),
    "goodness_normalize": (2,),
    "pool_goodness": (2,),
    "goodness_many": (0, 1),
    "linear_goodness": (0, 1),
    "pair_cosine": (0, 1),
    "pair_cosine rows": (0, 1),
    "layerwise": (0, 1, 2),
    "goodness_loss": (0, 1),
    "margin_sup_con": (0,),
}


def run(name: str, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The value, and the gradients of the leaves that want one and that the loss depends on."""
    value = LOSSES[name](*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    if not value.requires_grad:
        return [value.detach()]
    return [value.detach(), *(g for g in torch.autograd.grad(value, wanted, allow_unused=True) if g is not None)]
