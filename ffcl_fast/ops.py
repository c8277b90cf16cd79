"""Schemas and shape functions of every operator: the one contract that all backends implement.

Each operator is registered once under ``torch.ops.ffcl_fast`` and forwards to the backend that
:func:`ffcl_fast.backends.get` returns for its ``backend`` argument, so a compiled graph holds one opaque node however
many backends there are. None of them is differentiable: :mod:`ffcl_fast.functional` puts autograd on top.

Shapes use N = rows (queries), M = columns (keys), D = embedding width. Accumulation and every normaliser are
float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import backends

# How a pair (i, j) is left out of the similarity matrix (argument ``exclude``).
EXCLUDE_NONE = 0
EXCLUDE_DIAGONAL = 1  # i == j
EXCLUDE_SAME_ID = 2  # row_ids[i] == col_ids[j]
EXCLUDE_SAME_ID_OFF_DIAGONAL = 3  # row_ids[i] == col_ids[j] and i != j: false negatives, the positive stays
EXCLUDE_DIFFERENT_ID = 4  # row_ids[i] != col_ids[j]: contrast inside groups only

_library = torch.library.Library("ffcl_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """dtype in which losses and normalisers of ``x`` are accumulated and returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def away_from_zero(scale: Tensor) -> Tensor:
    """A copy of ``scale``, no nearer to 0 than SMALLEST_SCALE: dscale = <q, dq> / scale is no 0 / 0 then."""
    return torch.copysign(scale.abs().clamp_min(SMALLEST_SCALE), scale)  # three launches on a GPU; torch.where: four


def pairs_of(q: Tensor, k: Tensor | None, scale, row_ids, col_ids, exclude: int, *_) -> backends.Pairs:
    """What the choice of a backend is told of a similarity operator's arguments."""
    return backends.Pairs(exclude > EXCLUDE_DIAGONAL, (q if k is None else k).shape[0], k is None)


def define(schema: str, fake: Callable, pairs: Callable[..., backends.Pairs] = lambda *_: backends.Pairs()) -> None:
    """Register the operator of ``schema``; ``fake`` is its shape function, ``pairs`` makes of its arguments what the
    choice of a backend is told of them.

    The schema's first argument must be a tensor or a list of them (the first one's device chooses the backend) and its
    last ``str backend``.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=_TAGS)

    def call(*args):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        run = getattr(backends.get(args[-1], name, first, pairs(*args)), name)
        device = first.device.type
        if torch.is_autocast_enabled(device):  # the inputs' dtype is what was asked for: no product may change it
            with torch.autocast(device, enabled=False):
                return run(*args[:-1])
        return run(*args[:-1])

    _library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffcl_fast::{name}", fake, lib=_library)


# ---------------------------------------------------------------------------------------------------------------------
# Similarity: S = scale * q @ k.T, never materialised. k = None stands for k = q and lets a backend use S's symmetry;
# then col_ids = row_ids, `col_lse` is the same as `row_lse` (returned empty) and dq is the whole gradient.
#
#   similarity_forward  -> row_lse (N,) = logsumexp over j, col_lse (M,) = logsumexp over i (empty unless `both`),
#                          cache (any,) = whatever the backend wants back in the backward pass (empty unless `save`);
#                          "auto" may give that to another one, where both are for GPUs: theirs is the same.
#                          A row or column with every pair excluded has -inf.
#                          The backward pass takes it with these normalisers and no others; with others, an empty one.
#   similarity_backward -> dq (N, D), dk (M, D) for G_ij = row_grad_i exp(S_ij - row_lse_i)
#                                                       + col_grad_j exp(S_ij - col_lse_j):
#                          dq = scale G k, dk = scale G.T q, in the dtype of q and k; empty where not needed.
#                          A normaliser of -inf contributes 0.
# ---------------------------------------------------------------------------------------------------------------------


def _similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save, backend):
    acc = accumulator_dtype(q)
    rows = q.shape[0]
    cols = rows if k is None else k.shape[0]
    cache = backends.cache_size(backend, q, k) if save else 0
    return (
        q.new_empty(rows, dtype=acc),
        q.new_empty(cols if both and k is not None else 0, dtype=acc),
        q.new_empty(cache, dtype=torch.float32),
    )


def _similarity_backward(
    q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k, backend
):
    need_k = need_k and k is not None
    return (
        q.new_empty(q.shape if need_q else (0, q.shape[1])),
        q.new_empty(k.shape if need_k else (0, q.shape[1])),
    )


define(
    "similarity_forward(Tensor q, Tensor? k, Tensor scale, Tensor? row_ids, Tensor? col_ids, int exclude, bool both,"
    " bool save, str backend) -> (Tensor, Tensor, Tensor)",
    _similarity_forward,
    pairs_of,
)
define(
    "similarity_backward(Tensor q, Tensor? k, Tensor scale, Tensor? row_ids, Tensor? col_ids, int exclude,"
    " Tensor row_lse, Tensor col_lse, Tensor row_grad, Tensor col_grad, Tensor cache, bool need_q, bool need_k,"
    " str backend) -> (Tensor, Tensor)",
    _similarity_backward,
    pairs_of,
)

# ---------------------------------------------------------------------------------------------------------------------
# Contrast: a whole loss over the same S in one call each way, without a copy of any (N, D) tensor.
#
# Rows are q's, then those of `tail` where given (two views); N counts both. With `unit_q` (`unit_k`) z = x / max(|x|,
# UNIT_EPS) stands for every row x of q, tail and positive (of k), else z = x; S is of the z. The positives of row i are
# one of: the other rows of its class (k is None; `order` lists the rows class by class, `group` has the class of each
# entry of `order`); row i of `positive`; row i of k. With p_i the mean of the positives' logits and
# x_i = row_lse_i - p_i, row i of the loss is by `kind`
#   CONTRAST_SOFTPLUS   log(1 + exp x): cross-entropy, where `exclude` keeps the positives out of S
#   CONTRAST_DECOUPLED  x, or 0 for a row without negatives
#   CONTRAST_MEAN       SupCon, with classes: x over all other rows, 0 for a row without positives; for a row with one
#                       positive it is left out of S and the loss is log(1 + exp x). `exclude` must be EXCLUDE_SAME_ID
#                       and row_ids None: the classes make the ids.
# and where `both` the columns' loss is added, with col_lse in place of row_lse (N == M).
#
#   contrast_forward  -> loss (N,); count (N,) = the number of positives, empty unless CONTRAST_MEAN; state (any,) =
#                        what the backend wants back in the backward pass, which is there to be had with `save` only.
#   contrast_backward -> dq (N, D), dk (M, D), dpositive (N, D) in q's dtype, empty where not needed, and dscale ().
#
# A scale nearer to 0 than SMALLEST_SCALE stands for that, of either sign: dscale = <q, dq> / scale then holds at 0 too.
# ---------------------------------------------------------------------------------------------------------------------

CONTRAST_SOFTPLUS = 0
CONTRAST_DECOUPLED = 1
CONTRAST_MEAN = 2
UNIT_EPS = 1e-12  # as torch.nn.functional.normalize
SMALLEST_SCALE = 2.0**-40


def _contrast_forward(
    q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind, save, backend
):
    acc = accumulator_dtype(q)
    rows = q.shape[0] + (0 if tail is None else tail.shape[0])
    size = backends.get(backend, "contrast_forward", q).contrast_state_size
    return (
        q.new_empty(rows, dtype=acc),
        q.new_empty(rows if kind == CONTRAST_MEAN else 0, dtype=acc),
        q.new_empty(size(rows, k, positive, unit_q, unit_k, both, save), dtype=acc),
    )


def _contrast_backward(
    q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind, count, state,
    grad, need_q, need_k, need_positive, need_scale, backend,
):  # fmt: skip
    rows, dim = q.shape[0] + (0 if tail is None else tail.shape[0]), q.shape[1]
    return (
        q.new_empty((rows if need_q else 0, dim)),
        q.new_empty((k.shape[0] if need_k and k is not None else 0, dim)),
        q.new_empty((rows if need_positive and positive is not None else 0, dim)),
        q.new_empty((), dtype=accumulator_dtype(q)),
    )


define(
    "contrast_forward(Tensor q, Tensor? tail, Tensor? k, Tensor? positive, Tensor scale, Tensor? row_ids,"
    " Tensor? col_ids, int exclude, Tensor? order, Tensor? group, bool unit_q, bool unit_k, bool both, int kind,"
    " bool save, str backend) -> (Tensor, Tensor, Tensor)",
    _contrast_forward,
)
define(
    "contrast_backward(Tensor q, Tensor? tail, Tensor? k, Tensor? positive, Tensor scale, Tensor? row_ids,"
    " Tensor? col_ids, int exclude, Tensor? order, Tensor? group, bool unit_q, bool unit_k, bool both, int kind,"
    " Tensor count, Tensor state, Tensor grad, bool need_q, bool need_k, bool need_positive, bool need_scale,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _contrast_backward,
)

# ---------------------------------------------------------------------------------------------------------------------
# The positives of a contrast whose normalisers leave them out. Row i's positive is row i of `positive`
# (POSITIVE_GIVEN), or where that is None another row of q: i +- N/2 (POSITIVE_STACKED) or i ^ 1
# (POSITIVE_INTERLEAVED).
#
#   positive_odds  -> with p_i = scale <q_i, positive_i>, x_i = row_lse_i - p_i and y_i = col_lse_i - p_i:
#                     loss (N,) = softplus(x_i), or x_i where `decoupled` (0 for a row without negatives), plus the
#                     same of y_i unless col_lse is empty; slope (N,) and col_slope (N,), or empty, its derivatives by
#                     x_i and y_i; logit (N,) = p_i.
#   add_positives_ -> with w_i = grad_i (slope_i + col_slope_i), the upstream gradient grad being (N,): dq_i, which
#                     comes with the normalisers' part, -= scale w_i positive_i (and what q_i gets as the positive of
#                     another); d_positive_i -= scale w_i q_i. Either may be empty. Returns inner (N,), whose sum is
#                     scale dloss/dscale: <q_i, dq_i> as it came, half of it in self-similarity, less w_i p_i; empty
#                     without dq. dq and d_positive are dense and have q's dtype.
# ---------------------------------------------------------------------------------------------------------------------

POSITIVE_GIVEN = 0
POSITIVE_STACKED = 1
POSITIVE_INTERLEAVED = 2


def _positive_odds(q, positive, scale, row_lse, col_lse, pairing, decoupled, backend):
    return tuple(row_lse.new_empty(x.shape) for x in (row_lse, row_lse, col_lse, row_lse))


def _add_positives(q, positive, scale, grad, slope, col_slope, logit, dq, d_positive, pairing, backend):
    return slope.new_empty(dq.shape[0])


define(
    "positive_odds(Tensor q, Tensor? positive, Tensor scale, Tensor row_lse, Tensor col_lse, int pairing,"
    " bool decoupled, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _positive_odds,
)
define(
    "add_positives_(Tensor q, Tensor? positive, Tensor scale, Tensor grad, Tensor slope, Tensor col_slope,"
    " Tensor logit, Tensor(a!) dq, Tensor(b!) d_positive, int pairing, str backend) -> Tensor",
    _add_positives,
)

# ---------------------------------------------------------------------------------------------------------------------
# The positives of SupCon, for rows q of self-similarity: all other rows of a row's class, group (N,) int64 in
# [0, classes). With b_i the mean of row i's positives and n_i their number, p_i = scale <q_i, b_i> and
# x_i = row_lse_i - p_i.
#
#   class_sums          -> sums (classes, D) = sum of weight_i x_i, or of x_i where weight is None, over each class's
#                          rows; an element that is not finite makes itself, or all of its class, infinite or NaN.
#                          counts (classes,) = the number of its rows. Both float32, or float64 for float64. Kernels add
#                          integers, for the same bits on every run, each rounded by at most N 2^-61 of the largest
#                          element of all classes.
#   class_odds          -> from sums and counts of q itself: loss (N,) = x_i, or softplus(x_i) where n_i is 1 (that
#                          positive is then left out of S), or 0 where n_i is 0; slope (N,) = dloss/dx_i; and
#                          logit (N,) = p_i.
#   add_class_positives -> with share_i the upstream gradient times slope_i and `taken` = class_sums of q weighted by
#                          share: dq, which comes with the normalisers' part, less the positives' part, (N, D) in its
#                          dtype; and inner (N,), whose sum is scale dloss/dscale.
# ---------------------------------------------------------------------------------------------------------------------


def _class_sums(x, group, weight, classes, backend):
    acc = accumulator_dtype(x)
    return x.new_empty((classes, x.shape[1]), dtype=acc), x.new_empty(classes, dtype=acc)


def _class_odds(q, sums, counts, group, scale, row_lse, backend):
    return tuple(row_lse.new_empty(row_lse.shape) for _ in range(3))


def _add_class_positives(q, sums, taken, counts, group, scale, share, logit, dq, backend):
    return dq.new_empty(dq.shape), share.new_empty(share.shape)


define("class_sums(Tensor x, Tensor group, Tensor? weight, int classes, str backend) -> (Tensor, Tensor)", _class_sums)
define(
    "class_odds(Tensor q, Tensor sums, Tensor counts, Tensor group, Tensor scale, Tensor row_lse, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _class_odds,
)
define(
    "add_class_positives(Tensor q, Tensor sums, Tensor taken, Tensor counts, Tensor group, Tensor scale, Tensor share,"
    " Tensor logit, Tensor dq, str backend) -> (Tensor, Tensor)",
    _add_class_positives,
)

# ---------------------------------------------------------------------------------------------------------------------
# SigLIP (Zhai et al. 2023): x_ij = scale <q_i, k_j> + bias, z_ij = 1 on the diagonal (where `positives`), -1 elsewhere.
#   siglip -> loss () = sum_ij softplus(-z_ij x_ij), and its gradients dq (N, D), dk (M, D) from the same pass, empty
#             where not needed; dbias () where either is, else 0. The gradient of the scale is <q, dq> / scale.
# ---------------------------------------------------------------------------------------------------------------------


def _siglip(q, k, scale, bias, positives, need_q, need_k, backend):
    acc = accumulator_dtype(q)
    return (
        q.new_empty((), dtype=acc),
        q.new_empty(q.shape if need_q else (0, q.shape[1])),
        q.new_empty(k.shape if need_k else (0, q.shape[1])),
        q.new_empty((), dtype=acc),
    )


define(
    "siglip(Tensor q, Tensor k, Tensor scale, Tensor bias, bool positives, bool need_q, bool need_k, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _siglip,
)

# ---------------------------------------------------------------------------------------------------------------------
# L2-normalisation of the rows of x (N, D).
#   normalize_forward  -> z (N, D) = x / norm in `dtype`; norm (N,) = max(|x|, eps) in x's accumulator dtype.
#   normalize_backward -> dx (N, D) = (dz - z <z, dz>) / norm in `dtype`, without the projection where norm <= eps;
#                         z and norm are the forward's, dz has z's dtype.
# ---------------------------------------------------------------------------------------------------------------------


def _normalize_forward(x, eps, dtype, backend):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=accumulator_dtype(x))


def _normalize_backward(z, norm, dz, eps, dtype, backend):
    return z.new_empty(z.shape, dtype=dtype)


define("normalize_forward(Tensor x, float eps, ScalarType dtype, str backend) -> (Tensor, Tensor)", _normalize_forward)
define(
    "normalize_backward(Tensor z, Tensor norm, Tensor dz, float eps, ScalarType dtype, str backend) -> Tensor",
    _normalize_backward,
)

# ---------------------------------------------------------------------------------------------------------------------
# Goodness. Here h is (N, D), one sample's whole activation a row, rows dense (stride(1) == 1), any row stride.
# a = max(h, 0) where `relu` (h is then a pre-activation), else a = h. NaN propagates. A row whose a is all zero has
# goodness 0, out 0 and no gradient through its norm.
#
#   goodness_forward  -> goodness (N,) = sum_j a_j^2, or the mean over j where `mean`;
#                        out (N, D) = a / (|a| / sqrt(D) + eps) in h's dtype where `normalize`, else empty (0, D).
#   goodness_backward -> dh (N, D) in h's dtype. A gradient that is None is zero; grad_out is dense, in h's dtype.
#
#   pair_cosine_forward  -> cos_i = <a1_i, a2_i> / (n1 n2), n = sqrt(|a|^2 + 1e-12) as torch.nn.CosineEmbeddingLoss;
#                        loss (N,) = 1 - cos where target == 1, max(0, cos - margin) where target == -1, else 0 (not
#                        scaled, not reduced); coefficients (N, 3) with w = dloss/dcos, 0 at cos == margin:
#                        w / (n1 n2), w cos / n1^2, w cos / n2^2;
#                        d1, d2 (N, D) = scale * dloss/dh1, dloss/dh2 in h1's dtype, empty (0, D) where not needed.
#                        target (N,) has the accumulator dtype. One visit a sample: its second read hits the cache.
#   pair_cosine_backward -> d1 = grad_i (c0 h2 - c1 h1), d2 = grad_i (c0 h1 - c2 h2), masked by h > 0 where `relu`.
#   scale_               -> x *= factor (0-dim, x's device) in place; a kernel that finds 1 leaves without reading x.
#
# Pooling: h is (N, C, L), dense in one of the orders NCL and NLC ("channels last"), any sample stride.
#   pool_goodness_forward  -> pooled (N, C) = mean over L of a, in the accumulator dtype; goodness (N,) = sum over C of
#                        pooled^2, or the mean over C where `mean`.
#   pool_goodness_backward -> dh (N, C, L) in h's dtype and memory order.
#
# Many layers at once: h is a non-empty list of (N_i, D_i) of one dtype and device, rows as above.
#   goodness_many          -> goodness (sum of N_i,), the layers' goodness one after the other.
#   goodness_many_backward -> [dh_i (N_i, D_i)] from grad_goodness (sum of N_i,), dense.
#
# Scoring: x is (N, K), weight (H, K), bias (H,) or None, one dtype.
#   linear_goodness -> goodness (N,) of the activation x weight^T + bias, which is never stored whole.
# ---------------------------------------------------------------------------------------------------------------------

PAIR_COSINE_EPS = 1e-12  # added to the squared norms, as in ATen's cosine_embedding_loss


def _goodness_forward(h, mean, relu, normalize, eps, backend):
    return h.new_empty(h.shape[0], dtype=accumulator_dtype(h)), h.new_empty(h.shape if normalize else (0, h.shape[1]))


def _goodness_backward(h, goodness, grad_goodness, grad_out, mean, relu, eps, backend):
    return h.new_empty(h.shape)


def _pair_cosine_forward(h1, h2, target, margin, relu, scale, need_1, need_2, backend):
    acc = accumulator_dtype(h1)
    return (
        h1.new_empty(h1.shape[0], dtype=acc),
        h1.new_empty((h1.shape[0], 3), dtype=acc),
        h1.new_empty(h1.shape if need_1 else (0, h1.shape[1])),
        h1.new_empty(h1.shape if need_2 else (0, h1.shape[1])),
    )


def _pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2, backend):
    return (
        h1.new_empty(h1.shape if need_1 else (0, h1.shape[1])),
        h1.new_empty(h1.shape if need_2 else (0, h1.shape[1])),
    )


def _pool_goodness_forward(h, mean, relu, backend):
    acc = accumulator_dtype(h)
    return h.new_empty(h.shape[0], dtype=acc), h.new_empty(h.shape[:2], dtype=acc)


def _pool_goodness_backward(h, pooled, grad_goodness, grad_pooled, mean, relu, backend):
    return empty_pooled_like(h)


def empty_pooled_like(h: Tensor) -> Tensor:
    """An empty dense (N, C, L) tensor in the memory order (NCL or NLC) of ``h``."""
    n, c, length = h.shape
    if h.stride(2) == 1:
        return h.new_empty((n, c, length))
    return h.new_empty((n, length, c)).transpose(1, 2)


def _goodness_many(h, mean, relu, backend):
    return h[0].new_empty(sum(x.shape[0] for x in h), dtype=accumulator_dtype(h[0]))


def _goodness_many_backward(h, grad_goodness, mean, relu, backend):
    return [x.new_empty(x.shape) for x in h]


def _linear_goodness(x, weight, bias, mean, relu, backend):
    return x.new_empty(x.shape[0], dtype=accumulator_dtype(x))


define(
    "goodness_forward(Tensor h, bool mean, bool relu, bool normalize, float eps, str backend) -> (Tensor, Tensor)",
    _goodness_forward,
)
define(
    "goodness_backward(Tensor h, Tensor goodness, Tensor? grad_goodness, Tensor? grad_out, bool mean, bool relu,"
    " float eps, str backend) -> Tensor",
    _goodness_backward,
)
define(
    "pair_cosine_forward(Tensor h1, Tensor h2, Tensor target, float margin, bool relu, float scale, bool need_1,"
    " bool need_2, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _pair_cosine_forward,
)
define(
    "pair_cosine_backward(Tensor h1, Tensor h2, Tensor coefficients, Tensor grad, bool relu, bool need_1,"
    " bool need_2, str backend) -> (Tensor, Tensor)",
    _pair_cosine_backward,
)
define("scale_(Tensor(a!) x, Tensor factor, str backend) -> ()", lambda x, factor, backend: None)
define("pool_goodness_forward(Tensor h, bool mean, bool relu, str backend) -> (Tensor, Tensor)", _pool_goodness_forward)
define(
    "pool_goodness_backward(Tensor h, Tensor pooled, Tensor? grad_goodness, Tensor? grad_pooled, bool mean, bool relu,"
    " str backend) -> Tensor",
    _pool_goodness_backward,
)
define("goodness_many(Tensor[] h, bool mean, bool relu, str backend) -> Tensor", _goodness_many)
define(
    "goodness_many_backward(Tensor[] h, Tensor grad_goodness, bool mean, bool relu, str backend) -> Tensor[]",
    _goodness_many_backward,
)
define(
    "linear_goodness(Tensor x, Tensor weight, Tensor? bias, bool mean, bool relu, str backend) -> Tensor",
    _linear_goodness,
)
