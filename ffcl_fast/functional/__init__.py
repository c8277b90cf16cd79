"""Everything as functions: losses, goodness and the primitives under them."""

from .contrastive import clip, info_nce, nt_xent, siglip, sup_con
from .goodness import goodness, goodness_and_normalize, goodness_normalize, pool_goodness
from .goodness_many import goodness_many
from .layerwise import layerwise
from .linear_goodness import linear_goodness
from .objectives import TwoThreshold, channel_group_loss, goodness_loss, margin_sup_con
from .pair_cosine import pair_cosine
from .similarity import similarity_lse

__all__ = [
    "TwoThreshold",
    "channel_group_loss",
    "clip",
    "goodness",
    "goodness_and_normalize",
    "goodness_loss",
    "goodness_many",
    "goodness_normalize",
    "info_nce",
    "layerwise",
    "linear_goodness",
    "margin_sup_con",
    "nt_xent",
    "pair_cosine",
    "pool_goodness",
    "siglip",
    "similarity_lse",
    "sup_con",
]
