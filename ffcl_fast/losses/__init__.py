"""Everything as modules."""

from .contrastive import ClipLoss, InfoNCELoss, NTXentLoss, SigLipLoss, SupConLoss
from .goodness import GoodnessLoss, PairCosineLoss
from .layerwise import LayerwiseLoss
from .queue import Queue

__all__ = [
    "ClipLoss",
    "GoodnessLoss",
    "InfoNCELoss",
    "LayerwiseLoss",
    "NTXentLoss",
    "PairCosineLoss",
    "Queue",
    "SigLipLoss",
    "SupConLoss",
]
