"""The libraries that our kernels are measured beside, each imported only when it is called.

A peer's ``build`` returns ``loss(q, k, scale)`` on unit rows, or raises what its library raises where it is not
installed or cannot run here; what it cannot take is in ``fits``. Settings are those that make it compute the same as
ours, however little it would compute by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 20.0  # of every workload: some peers take a number where others take a tensor
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A library's loss for workloads of the family, "clip", "nt_xent", "sup_con", "siglip" or "info_nce"."""

    name: str
    family: str
    build: Callable[[], Loss]
    # Of (rows, width). Else it reads past its inputs, does not run, or takes many seconds.
    fits: Callable[[int, int], bool] = lambda rows, width: True


def _both_sides(one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """A symmetric loss from a one-sided cross-entropy(rows, classes, targets), called once a side."""

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        target = torch.arange(q.shape[0], device=q.device)
        return 0.5 * (one(q * scale.to(q.dtype), k, target) + one(k * scale.to(k.dtype), q, target))

    return loss


def _memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda q, k, scale: loss(q, k)  # the temperature gets no gradient


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    return lambda q, k, s: 0.5 * (cal_flash_loss(q, k, scale=s).mean() + cal_flash_loss(k, q, scale=s).mean())


def _open_clip() -> Loss:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda q, k, scale: loss(q, k, scale)


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _both_sides(lambda x, classes, target: loss(classes, x, target))


def _cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    # Its default drops gradient blocks below 2^-12: up to 72 % of a contrastive gradient.
    return _both_sides(lambda x, classes, target: linear_cross_entropy(x, classes, target, filter_eps=None))


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _both_sides(chunked_linear_cross_entropy)


def _siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    bias = torch.tensor(-10.0, device="cuda", requires_grad=True)
    return lambda q, k, scale: fused_siglip_loss(q, k, scale.log(), bias)


def _lightly() -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(1 / SCALE)
    return lambda q, k, scale: loss(*q.chunk(2))


def _metric_learning() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(1 / SCALE)
    return lambda q, k, scale: loss(q, torch.arange(q.shape[0] // 2, device=q.device).repeat(2))


def _sup_con() -> Loss:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=0.07)
    return lambda q, k, scale: loss(q, (torch.arange(q.shape[0] // 2, device=q.device) % 10).repeat_interleave(2))


def _info_nce() -> Loss:
    from info_nce import InfoNCE

    loss = InfoNCE(1 / SCALE, negative_mode="unpaired")
    return lambda q, k, scale: loss(q, k[: q.shape[0]], k)


def _linear_cross_entropy() -> Loss:
    fused = F.linear_cross_entropy  # in recent PyTorch only
    return _both_sides(fused)


PEERS = (
    Peer("memeff", "clip", _memeff),
    Peer("inf-cl", "clip", _inf_cl, lambda rows, width: rows % 64 == 0 and width % 256 == 0 and rows <= 32768),
    Peer("open_clip", "clip", _open_clip, lambda rows, width: rows <= 65536),  # it stores N x N
    Peer("liger", "clip", _liger, lambda rows, width: rows <= 65536),
    Peer("cut-cross-entropy, exact", "clip", _cce, lambda rows, width: rows <= 32768),
    Peer("quack", "clip", _quack, lambda rows, width: rows % 128 == 0),
    Peer("F.linear_cross_entropy", "clip", _linear_cross_entropy, lambda rows, width: rows <= 65536),
    Peer("siglip-kernel", "siglip", _siglip_kernel),
    Peer("lightly", "nt_xent", _lightly, lambda rows, width: rows <= 65536),
    Peer("pytorch-metric-learning", "nt_xent", _metric_learning, lambda rows, width: rows <= 32768),
    Peer("pytorch-metric-learning", "sup_con", _sup_con),
    Peer("info-nce-pytorch", "info_nce", _info_nce, lambda rows, width: rows <= 4096),
)


def problem_of(error: BaseException) -> str:
    """One line on why a peer gave no result."""
    kind = "not installed" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {(str(error).strip().splitlines() or ['no message'])[0]}"
