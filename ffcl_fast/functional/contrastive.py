"""Contrastive losses as functions: InfoNCE, NT-Xent, SupCon, CLIP and SigLIP over the primitive of ``similarity.py``.

Each agrees with the library it is named after, defaults included, and never stores a similarity matrix. Common to all:

- Embeddings are float16, bfloat16, float32 or float64, contiguous or not; losses are float32, or float64 for float64.
- Under autocast the (normalised) embeddings are cast to autocast's dtype before the products, as autocast does to any
  matrix product; sums, normalisers and losses stay float32. Without autocast they are used in the dtype they have.
- ``temperature`` and ``logit_scale`` may be tensors of one element and get a gradient. Losses differentiate once.
- ``backend`` is one of :data:`ffcl_fast.backends.NAMES`.
- TypeError for a dtype that is unsupported or not the same, ValueError for a shape, device or option that does not fit;
  both name the argument.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, ops
from . import _checks
from .class_contrast import class_contrast_by_kernels
from .class_sums import class_sums
from .constant_keys import contrast_constant
from .contrast import INTERLEAVED, STACKED, class_contrast, contrast, fused
from .similarity import differentiable_once, prepare, raw_lse, row_dot, sigmoid_loss

NEGATIVE_MODES = ("unpaired", "paired")
CONTRAST_MODES = ("all", "one")


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    decoupled: bool = False,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) of L2-normalised embeddings, as info-nce-pytorch computes it.

    Row i: -log exp(p_i) / (exp(p_i) + sum of exp over the negatives), p_i = cos(query_i, positive_key_i) / temperature.

    Args:
        query: (N, D).
        positive_key: (N, D).
        negative_keys: None: the positive keys of the other rows; (M, D) for all rows with ``"unpaired"``;
            (N, M, D), M for each row, with ``"paired"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        negative_mode: ``"unpaired"`` or ``"paired"``, which is plain PyTorch on every device.
        ids: (N,) integers. A negative with the id of its row is left out as a false negative.
        negative_ids: (M,) the ids of unpaired ``negative_keys``.
        decoupled: leave the positive out of the normaliser (DCL, Yeh et al. 2022). A row without negatives has 0.

    Returns:
        () for ``"mean"`` and ``"sum"``, (N,) for ``"none"``.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.choice("negative_mode", negative_mode, NEGATIVE_MODES)
    _checks.backend(backend)
    _checks.embeddings("query", query)
    _checks.embeddings("positive_key", positive_key)
    _checks.alike("positive_key", positive_key, "query", query, rows=True)
    scale = _checks.inverse_temperature(temperature, query)
    ids = _checks.ids("ids", ids, query.shape[0], query.device)
    paired = negative_keys is not None and negative_mode == "paired"
    if negative_keys is not None:
        _checks.embeddings("negative_keys", negative_keys, 3 if paired else 2)
        _checks.alike("negative_keys", negative_keys, "query", query, rows=paired)
    if paired:
        if backend in ("triton", "cuda"):
            raise RuntimeError(f"backend={backend!r} cannot run info_nce with paired negative_keys: it has no kernel")
        if ids is not None or negative_ids is not None:
            raise ValueError("ids and negative_ids must be None with paired negative_keys: leave them out yourself")
        loss = _paired(query, positive_key, negative_keys, scale, decoupled)
        return _checks.reduce(loss, reduction)

    if (ids is None) != (negative_ids is None) and negative_keys is not None:
        raise ValueError("ids and negative_ids must be given together where negative_keys are")
    if negative_ids is not None and negative_keys is None:
        raise ValueError("negative_ids must be None without negative_keys")
    if negative_keys is None:
        exclude = ops.EXCLUDE_DIAGONAL if ids is None else ops.EXCLUDE_SAME_ID
        k, positive, col_ids = positive_key, None, ids
    else:
        exclude = ops.EXCLUDE_NONE if ids is None else ops.EXCLUDE_SAME_ID
        k, positive = negative_keys, positive_key
        col_ids = _checks.ids("negative_ids", negative_ids, negative_keys.shape[0], query.device)
    return contrast(
        query,
        k,
        scale,
        positive=positive,
        unit_q=True,
        unit_k=True,
        row_ids=ids,
        col_ids=col_ids,
        exclude=exclude,
        decoupled=decoupled,
        reduction=reduction,
        backend=backend,
    )


def _paired(query: Tensor, positive_key: Tensor, negative_keys: Tensor, scale: Tensor, decoupled: bool) -> Tensor:
    """InfoNCE with negatives of each row's own: N M D work, and nothing larger than the negatives to avoid."""
    q, positive, keys = prepare(query, True), prepare(positive_key, True), prepare(negative_keys, True)
    with torch.autocast(query.device.type, enabled=False):
        # N M numbers only, so in float64: logits rounded to float32 would cost every softmax scale * 2^-24.
        logits = _PairedDot.apply(q, keys) * scale
        largest = logits.detach().amax(1, keepdim=True)
        # Not logsumexp: its backward pass rounds the normaliser, which costs more than all the rest.
        positive_logit = row_dot(q, positive, torch.float64) * scale
        odds = (logits - largest).exp().sum(1).log() + (largest.squeeze(1) - positive_logit)
    odds = odds.to(scale.dtype)
    return odds if decoupled else F.softplus(odds, threshold=50.0)


class _PairedDot(torch.autograd.Function):
    """<q_i, keys_im> of (N, D) and (N, M, D), summed and returned in float64; (N, M).

    Not bmm: its float32 sum over D is off by several units in the last place, which the scale multiplies.
    """

    @staticmethod
    def forward(ctx, q, keys):
        ctx.save_for_backward(q, keys)
        return row_dot(keys, q.unsqueeze(1), torch.float64)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        q, keys = ctx.saved_tensors
        grad = grad.to(q.dtype)
        dq = torch.bmm(grad.unsqueeze(1), keys).squeeze(1) if ctx.needs_input_grad[0] else None
        return dq, grad.unsqueeze(2) * q.unsqueeze(1) if ctx.needs_input_grad[1] else None


def nt_xent(
    out0: Tensor,
    out1: Tensor,
    temperature: float | Tensor = 0.5,
    negatives: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    decoupled: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020) of L2-normalised embeddings, as lightly computes it.

    Row i of either view against the other 2N - 1 rows of both, its positive being the same row of the other view.

    Args:
        out0: (N, D) the first view.
        out1: (N, D) the second view.
        negatives: (M, D) a memory bank: out0 alone is contrasted, with out1 as positives and these as negatives. They
            are taken as they are, not normalised, get no gradient, and may be written over before the backward pass.
        ids: (N,) integers; rows with equal ids are no negatives of each other. Not with ``negatives``.
        decoupled: leave the positive out of the normaliser (DCL, Yeh et al. 2022). A row without negatives has 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        () for ``"mean"`` and ``"sum"``; for ``"none"`` (2N,), out0's rows first, or (N,) with ``negatives``.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.backend(backend)
    _checks.embeddings("out0", out0)
    _checks.embeddings("out1", out1)
    _checks.alike("out1", out1, "out0", out0, rows=True)
    scale = _checks.inverse_temperature(temperature, out0)
    if negatives is not None:
        _checks.embeddings("negatives", negatives)
        if ids is not None:
            raise ValueError("ids must be None where negatives are given")
        q, positive = prepare(out0, True, backend), prepare(out1, True, backend)
        bank = negatives.detach().to(device=q.device, dtype=q.dtype)
        _checks.alike("negatives", bank, "out0", q)
        loss = contrast_constant(q, bank, scale, positive, decoupled=decoupled, backend=backend)
        return _checks.reduce(loss, reduction)
    ids = _checks.ids("ids", ids, out0.shape[0], out0.device)
    if ids is None:
        ids = torch.arange(out0.shape[0], device=out0.device)
    return contrast(
        out0,
        None,
        scale,
        tail=out1,
        unit_q=True,
        pairing=STACKED,
        row_ids=ids.repeat(2),
        exclude=ops.EXCLUDE_SAME_ID,
        decoupled=decoupled,
        reduction=reduction,
        backend=backend,
    )


def two_views(
    z: Tensor,
    scale: Tensor,
    ids: Tensor,
    *,
    all_z: Tensor | None = None,
    all_ids: Tensor | None = None,
    interleaved: bool = False,
    decoupled: bool = False,
    backend: str = "auto",
) -> Tensor:
    """NT-Xent's (2N,) losses of z (2N, D), two views in STACKED or INTERLEAVED order, without checks.

    ``ids`` (N,) are the samples'; rows of equal ids are no negatives of each other. ``all_z`` (M, D) with ``all_ids``
    (M,) are the rows to contrast with where they are not ``z`` itself: those of every process.
    """
    row_ids = ids.repeat_interleave(2) if interleaved else ids.repeat(2)
    return contrast(
        z,
        all_z,
        scale,
        pairing=INTERLEAVED if interleaved else STACKED,
        row_ids=row_ids,
        col_ids=all_ids,
        exclude=ops.EXCLUDE_SAME_ID,
        decoupled=decoupled,
        backend=backend,
    )


def check_base_temperature(value: float) -> None:
    """Raises ValueError unless ``value`` is a finite number other than zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value == 0 or not -math.inf < value < math.inf:
        raise ValueError(f"base_temperature must be a finite number other than zero, got {value!r}")


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
    *,
    backend: str = "auto",
) -> Tensor:
    """SupCon (Khosla et al. 2020, L_out), as the authors' SupContrast computes it.

    Anchor i: -temperature / base_temperature times the mean of log softmax over its positives, the softmax running over
    all rows but itself. Features are used as they are: normalise them first.

    An anchor without a positive contributes 0 and is left out of the mean (SupContrast counts it in the mean; where
    every anchor has a positive the two are the same). Without any positive the loss is 0.

    Args:
        features: (B, views, ...); dimensions after the second are flattened.
        labels: B integers of any type, or booleans: rows of the same label are positives.
        mask: (B, B) mask[i, j] weighs sample j as a positive of i, 0 or 1 as a rule; may be asymmetric.
            With neither: the views of a sample are each other's positives (SimCLR).
        contrast_mode: ``"all"``: every view is an anchor; ``"one"``: the first one only.

    Returns:
        ().
    """
    _checks.choice("contrast_mode", contrast_mode, CONTRAST_MODES)
    _checks.backend(backend)
    if isinstance(features, Tensor):
        _checks.dense("features", features)
    if isinstance(features, Tensor) and features.dim() < 3:
        raise ValueError(f"features must be (batch, views, ...), got shape {tuple(features.shape)}")
    if isinstance(features, Tensor) and features.dim() > 3:
        features = features.flatten(2)
    _checks.embeddings("features", features, 3)
    batch, views, dim = features.shape
    if labels is not None and mask is not None:
        raise ValueError("labels and mask must not both be given")
    labels = _checks.ids("labels", labels, batch, features.device)
    if mask is not None and (not isinstance(mask, Tensor) or mask.is_complex()):
        raise TypeError(f"mask must be a real tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask is not None and tuple(mask.shape) != (batch, batch):
        raise ValueError(f"mask must have shape {(batch, batch)}, got {tuple(mask.shape)}")
    check_base_temperature(base_temperature)
    scale = _checks.inverse_temperature(temperature, features)
    factor = (
        scale.reciprocal() / base_temperature if isinstance(temperature, Tensor) else temperature / base_temperature
    )
    z = prepare(features, False)

    if contrast_mode == "all" and mask is None and fused(backend, features):
        return _class_loss(z, labels, scale, backend) * factor

    if labels is None and mask is None and contrast_mode == "all" and views == 2:
        ids = torch.arange(batch, device=z.device)
        return two_views(z.reshape(-1, dim), scale, ids, interleaved=True, backend=backend).mean() * factor

    if contrast_mode == "all" and mask is None:
        beside = backends.positives(backend, z.reshape(-1, dim), "class_odds")
        if beside:
            return _class_loss_by_kernels(z, labels, scale, backend, beside) * factor

    if contrast_mode == "all":
        anchors, keys = z.reshape(-1, dim), None
    else:
        keys = z.transpose(0, 1).reshape(-1, dim)  # the anchors first: an anchor is its own key on the diagonal
        anchors = keys[:batch]
    if mask is None:
        group = torch.arange(batch, device=z.device) if labels is None else _groups(labels)
        positive, count = _class_mean(z, group, contrast_mode)
    else:
        group = None
        positive, count = _masked_mean(z, mask, contrast_mode)
    row_ids = col_ids = None
    exclude = ops.EXCLUDE_DIAGONAL
    lonely = count == 1  # anchors with one positive: only their loss can be small, lse - positive would lose its digits
    if group is not None and views <= 2:
        exclude = ops.EXCLUDE_SAME_ID
        row_ids = _row_ids(group, lonely, views, contrast_mode)
        if keys is not None:
            row_ids, col_ids = row_ids[:batch], row_ids
    lse, _ = raw_lse(anchors, keys, scale, row_ids, col_ids, exclude, False, backend)
    loss = lse - row_dot(anchors, positive) * scale
    if exclude == ops.EXCLUDE_SAME_ID:
        loss = torch.where(lonely, F.softplus(loss, threshold=50.0), loss)
    valid = count > 0
    return torch.where(valid | loss.isnan(), loss, 0.0).sum() / valid.sum().clamp_min(1) * factor


def _class_loss(z: Tensor, labels: Tensor | None, scale: Tensor, backend: str) -> Tensor:
    """SupCon without its factor, every view an anchor, through the contrast operators."""
    batch, views, dim = z.shape
    if labels is None:
        group = order = torch.arange(batch, device=z.device)
    else:
        group, order = labels.sort(stable=True)
    if views > 1:
        group = group.repeat_interleave(views)
        order = (order[:, None] * views + torch.arange(views, device=z.device)).reshape(-1)
    loss, count = class_contrast(z.reshape(-1, dim), order, group, scale, backend)
    return loss.sum() / torch.count_nonzero(count).clamp_min(1)


def _class_loss_by_kernels(z: Tensor, labels: Tensor | None, scale: Tensor, backend: str, beside: str) -> Tensor:
    """The same through the operators on positives of backend ``beside``."""
    batch, views, dim = z.shape
    of_samples = torch.arange(batch, device=z.device) if labels is None else _groups(labels)
    group = of_samples.repeat_interleave(views, output_size=batch * views) if views > 1 else of_samples
    rows = z.reshape(-1, dim)
    sums, counts = torch.ops.ffcl_fast.class_sums.default(rows.detach(), group, None, batch, beside)
    count = counts[group] - 1
    row_ids = _row_ids(of_samples, count == 1, views, "all") if views <= 2 else None
    loss = class_contrast_by_kernels(rows, group, row_ids, sums, counts, scale, backend, beside)
    return loss.sum() / torch.count_nonzero(count).clamp_min(1)


def _class_mean(z: Tensor, group: Tensor, contrast_mode: str) -> tuple[Tensor, Tensor]:
    """The mean of every anchor's positives (anchors, D) and their number (anchors,), accumulator dtype, 0 for none.

    Class sums in place of pair lists: the positives of z_i add up to C_y - z_i. ``group`` (B,) numbers the classes.
    """
    batch, views, dim = z.shape
    own = z.to(ops.accumulator_dtype(z))
    total = own.sum(1)  # a sample's views together
    sums = _ClassSum.apply(total, group)
    members = total.new_zeros(batch).index_add_(0, group, total.new_ones(batch))[group]
    if contrast_mode == "one":
        rest, count = sums - own[:, 0], members * views - 1
    else:
        rest = (sums[:, None] - own).reshape(-1, dim)
        count = (members * views - 1).repeat_interleave(views)
    return rest / count.clamp_min(1)[:, None], count


def _masked_mean(z: Tensor, mask: Tensor, contrast_mode: str) -> tuple[Tensor, Tensor]:
    """As :func:`_class_mean` with the weights of ``mask`` (B, B), and their sums in place of numbers."""
    _, views, dim = z.shape
    acc = ops.accumulator_dtype(z)
    own = z.to(acc)
    weights = mask.to(device=z.device, dtype=acc)
    with torch.autocast(z.device.type, enabled=False):
        total = weights @ own.sum(1)
    itself = weights.diagonal()
    count = weights.sum(1) * views - itself
    if contrast_mode == "one":
        rest = total - own[:, 0] * itself[:, None]
    else:
        rest = (total[:, None] - own * itself[:, None, None]).reshape(-1, dim)
        count = count.repeat_interleave(views)
    return rest / count.clamp_min(1e-6)[:, None], torch.where(count < 1e-6, 0.0, count)


def _row_ids(group: Tensor, lonely: Tensor, views: int, contrast_mode: str) -> Tensor:
    """(B views,) ids that are equal for a row and itself, and for a row and its positive where it has one only.

    They follow the rows' order as far as they can, which lets a backend skip tiles that hold no equal ids.
    """
    batch = group.shape[0]
    sample = torch.arange(batch, device=group.device)
    if views == 1:
        return torch.where(lonely, batch + group, sample)
    if contrast_mode == "one":
        return torch.cat((sample, torch.where(lonely, sample, sample + batch)))
    first = 2 * sample
    return torch.stack((first, torch.where(lonely[::2], first, first + 1)), 1).reshape(-1)


class _ClassSum(torch.autograd.Function):
    """Every row's class total; (B, D). A symmetric map, so its backward is itself, and as deterministic."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.save_for_backward(group)
        return _class_sum(x, group)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        return _class_sum(grad.contiguous(), *ctx.saved_tensors), None


def _class_sum(x: Tensor, group: Tensor) -> Tensor:
    return class_sums(x, group, x.shape[0]).index_select(0, group)


def _groups(labels: Tensor) -> Tensor:
    """Class numbers 0, 1, ... of integer labels, (B,) int64; unlike torch.unique, shapes do not depend on the data."""
    ordered, order = labels.sort()
    return torch.empty_like(order).scatter_(0, order, _numbers(ordered))


def _numbers(ordered: Tensor) -> Tensor:
    """0, 1, ... for each run of equal elements, (B,) int64."""
    first = torch.zeros_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    return first.cumsum(0)


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021), as open_clip computes it: the mean of both cross-entropies.

    Args:
        image_features: (N, D), used as they are: normalise them first.
        text_features: (N, D), row i belonging to row i of ``image_features``.
        logit_scale: factor of the cosines, exp of the learnt parameter.
        logit_bias: a softmax does not depend on it: it gets a gradient of 0.
        ids: (N,) integers; pairs with equal ids off the diagonal are left out as false negatives.

    Returns:
        ().
    """
    q, k, scale = checked_pair(image_features, text_features, logit_scale, backend)
    ids = _checks.ids("ids", ids, q.shape[0], q.device)
    exclude = ops.EXCLUDE_DIAGONAL if ids is None else ops.EXCLUDE_SAME_ID
    options = {"row_ids": ids, "col_ids": ids, "exclude": exclude, "both": True, "backend": backend}
    return with_bias(contrast(q, k, scale, reduction="mean", **options), logit_bias, q)


def with_bias(loss: Tensor, logit_bias: float | Tensor | None, x: Tensor) -> Tensor:
    """``loss``, attached to a bias that it does not depend on, so that the bias has a gradient."""
    if logit_bias is None:
        return loss
    return loss + _checks.scalar("logit_bias", logit_bias, x) * 0.0


def clip_local(q: Tensor, all_k: Tensor, logit_scale: float | Tensor, first: int, backend: str) -> Tensor:
    """Mean cross-entropy of the rows of ``q`` (n, D) against ``all_k`` (M, D), row i's positive being ``first`` + i."""
    q, all_k, scale = checked_pair(q, all_k, logit_scale, backend, rows=False)
    n = q.shape[0]
    row_ids = torch.arange(first, first + n, device=q.device)
    col_ids = torch.arange(all_k.shape[0], device=q.device)
    return contrast(
        q,
        all_k,
        scale,
        positive=all_k[first : first + n],
        row_ids=row_ids,
        col_ids=col_ids,
        exclude=ops.EXCLUDE_SAME_ID,
        reduction="mean",
        backend=backend,
    )


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    negative_only: bool = False,
    backend: str = "auto",
) -> Tensor:
    """SigLIP's pairwise sigmoid loss (Zhai et al. 2023), as open_clip computes it: the sum over pairs over N.

    Args:
        image_features: (N, D), used as they are: normalise them first.
        text_features: (N, D), row i belonging to row i of ``image_features``; with ``negative_only`` any (M, D).
        logit_scale: factor of the cosines.
        logit_bias: added to every logit; None for 0.
        negative_only: no pair is a positive, as between the batches of two processes.

    Returns:
        ().
    """
    q, k, scale = checked_pair(image_features, text_features, logit_scale, backend, rows=not negative_only)
    bias = _checks.scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, q)
    if q.dtype == torch.float16:
        # The kernel's gradients are of the sum over pairs, which float16 cannot hold before the division by N.
        q, k = q.float(), k.float()
    return sigmoid_loss(q, k, scale, bias, not negative_only, backend) / q.shape[0]


def checked_pair(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, backend: str, rows: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Both features in the dtype that products run in, and the scale as a 0-dim tensor, after every check."""
    check_pair(image_features, text_features, rows)
    _checks.backend(backend)
    scale = _checks.scalar("logit_scale", logit_scale, image_features)
    return prepare(image_features, False), prepare(text_features, False), scale


def check_pair(image_features: Tensor, text_features: Tensor, rows: bool = True) -> None:
    """Raises TypeError or ValueError unless these are (N, D) and (M, D) of one dtype and device; N == M if ``rows``."""
    _checks.embeddings("image_features", image_features)
    _checks.embeddings("text_features", text_features)
    _checks.alike("text_features", text_features, "image_features", image_features, rows=rows)
