"""The contrastive losses of a batch that is spread over processes, with exact gradients.

The contract: with L the single-process loss of the concatenated batch (rank 0's rows first) and W processes,

- the mean over processes of what a function here returns is L;
- its backward pass gives the embeddings of process r the gradient W dL/dz_r, so that after the averaging of
  DistributedDataParallel, (1/W) sum_r (dz_r/dtheta)^T W dL/dz_r = dL/dtheta, every parameter's gradient is L's own;
- temperature, scale and bias get dL/d., the same on every process, whether DDP averages it again or not.

Each process returns W / N times the sum over its own rows, N being all rows: the mean of its own where all have as
many, and right where the last batch is uneven. Every process must call backward, with the same incoming gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import _checks, contrastive
from ..functional.constant_keys import contrast_constant
from ..functional.similarity import prepare, row_dot
from . import similarity
from .exchange import all_reduce, gather_rows
from .meeting import Meeting, Same, meet
from .pairwise import class_sum, mean_grad, sigmoid_loss


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale,
    logit_bias,
    group,
    strategy: str,
    backend: str,
    name: str,
) -> tuple[Tensor, Meeting]:
    """CLIP's symmetric loss, one pass for both sums; this process's share () and the meeting."""

    q, k, scale, meeting = _meet_pair(
        name, image_features, text_features, logit_scale, logit_bias, group, strategy, backend
    )
    scale = mean_grad(scale, group)
    ids = torch.arange(q.shape[0], device=q.device) + meeting.own(meeting.rows).start
    row, col = similarity.lse(q, k, scale, meeting, row_ids=ids, col_ids=ids, both=True, backend=backend)
    logit = row_dot(q, k) * scale
    loss = (_odds_loss(row - logit, False) + _odds_loss(col - logit, False)) / 2
    return contrastive.with_bias(_share(loss, "mean", meeting), logit_bias, q), meeting


def clip_own_anchors(
    image_features: Tensor, text_features: Tensor, logit_scale, logit_bias, group, backend: str
) -> Tensor:
    """open_clip's ``local_loss`` without ``gather_with_grad``: () of this process's anchors, the keys being constant.

    No gradient goes through what was gathered, so it takes two products and is outside of the contract above.
    """
    q, k, scale, meeting = _meet_pair(
        "ClipLoss True False", image_features, text_features, logit_scale, logit_bias, group, "gather", backend
    )
    images, texts = (gather_rows(x, meeting.rows, group) for x in (q, k))
    first = meeting.own(meeting.rows).start
    row = contrastive.clip_local(q, texts, scale, first, backend)
    col = contrastive.clip_local(k, images, scale, first, backend)
    return contrastive.with_bias((row + col) / 2, logit_bias, q)


def _meet_pair(name: str, image_features, text_features, logit_scale, logit_bias, group, strategy: str, backend: str):
    def check() -> tuple[Tensor, Tensor, Tensor]:
        checked = contrastive.checked_pair(image_features, text_features, logit_scale, backend)
        _checks.scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        return checked

    return meet(name, check, group, strategy, (("image_features", image_features), ("text_features", text_features)))


def siglip(
    image_features: Tensor, text_features: Tensor, logit_scale, logit_bias, group, strategy: str, backend: str,
    mean: bool = True,
) -> Tensor:  # fmt: skip
    """SigLIP's loss; () this process's share. ``mean``: scale and bias get the mean of the processes' gradients."""

    bias = None

    def check() -> tuple[Tensor, Tensor, Tensor]:
        nonlocal bias
        q, k, scale = contrastive.checked_pair(image_features, text_features, logit_scale, backend)
        bias = _checks.scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        return q, k, scale

    inputs = (("image_features", image_features), ("text_features", text_features), ("logit_bias", logit_bias))
    q, k, scale, meeting = meet(
        "SigLipLoss", check, group, strategy, inputs, lambda: [Same("logit_bias", bias, exact=False)]
    )
    if mean:
        scale, bias = mean_grad(scale, group), mean_grad(bias, group)
    if q.dtype == torch.float16:  # as in functional.siglip: sums over pairs leave float16's range
        q, k = q.float(), k.float()
    return sigmoid_loss(q, k, scale, bias, meeting, backend) * (meeting.world / sum(meeting.rows))


def nt_xent(
    out0: Tensor, out1: Tensor, temperature, group, strategy: str, *, decoupled: bool = False, backend: str = "auto"
) -> Tensor:
    """NT-Xent's; () this process's share."""

    def check() -> tuple[Tensor, Tensor, Tensor]:
        _checks.backend(backend)
        _checks.embeddings("out0", out0)
        _checks.embeddings("out1", out1)
        _checks.alike("out1", out1, "out0", out0, rows=True)
        scale = _checks.inverse_temperature(temperature, out0)
        z = prepare(torch.cat((out0, out1)), True, backend)
        return z, z, scale

    z, _, scale, meeting = meet(f"NTXentLoss {decoupled}", check, group, strategy, (("out0", out0), ("out1", out1)))
    return _share(_two_views(z, mean_grad(scale, group), meeting, decoupled, backend), "mean", meeting)


def _two_views(z: Tensor, scale: Tensor, meeting: Meeting, decoupled: bool, backend: str) -> Tensor:
    """The (2n,) losses of z (2n, D), the first views before the second ones."""
    n = z.shape[0] // 2
    ids = (torch.arange(n, device=z.device) + meeting.own(meeting.rows).start).repeat(2)
    row, _ = similarity.lse(z, None, scale, meeting, row_ids=ids, backend=backend)
    logit = (row_dot(z[:n], z[n:]) * scale).repeat(2)
    return _odds_loss(row - logit, decoupled)


def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys, temperature, reduction: str, negative_mode: str,
    group, strategy: str, *, decoupled: bool = False, position: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """InfoNCE's; this process's share, or its rows' losses (n,) for ``"none"``.

    Unpaired ``negative_keys`` are contrasted with the rows of every process: those of all processes, or, if they have
    a ``position``, one queue that all processes hold (rows of unit length already, no gradient), whose next key to be
    replaced that is ().
    """
    shared = position is not None
    local = negative_keys is not None and (negative_mode == "paired" or shared)

    def check() -> tuple[Tensor, Tensor, Tensor]:
        _checks.backend(backend)
        _checks.embeddings("query", query)
        _checks.embeddings("positive_key", positive_key)
        _checks.alike("positive_key", positive_key, "query", query, rows=True)
        if negative_keys is not None:
            paired = negative_mode == "paired"
            _checks.embeddings("negative_keys", negative_keys, 3 if paired else 2)
            _checks.alike("negative_keys", negative_keys, "query", query, rows=paired)
        scale = _checks.inverse_temperature(temperature, query)
        keys = positive_key if negative_keys is None or local else negative_keys
        return prepare(query, True, backend), prepare(keys, True, backend), scale

    inputs = [("query", query), ("positive_key", positive_key)]
    if negative_keys is not None and not shared:
        inputs.append(("negative_keys", negative_keys))
    kind = "keys" if negative_keys is None else ("shared" if shared else negative_mode)

    def queue() -> list[Same]:
        if position is None:
            return []
        # the oldest key tells apart queues that began from other random keys
        oldest = negative_keys.index_select(0, position.reshape(1))[0, 0]
        size = negative_keys.shape[0]
        return [
            Same("queue's size", size),
            Same("queue's position", position),
            Same("queue's oldest key", oldest, exact=False),
        ]

    name = f"InfoNCELoss {reduction} {kind} {decoupled}"
    q, k, scale, meeting = meet(name, check, group, strategy, inputs, queue)
    scale = mean_grad(scale, group)
    if local and not shared:
        loss = contrastive._paired(query, positive_key, negative_keys, scale, decoupled)
    elif local:
        bank = negative_keys.detach().to(q.dtype)
        loss = contrast_constant(q, bank, scale, k, decoupled=decoupled, backend=backend)
    else:
        ids = None
        if negative_keys is None:
            ids = torch.arange(q.shape[0], device=q.device) + meeting.own(meeting.rows).start
        row, _ = similarity.lse(q, k, scale, meeting, row_ids=ids, col_ids=ids, backend=backend)
        positive = k if negative_keys is None else prepare(positive_key, True, backend)
        loss = _odds_loss(row - row_dot(q, positive) * scale, decoupled)
    return _share(loss, reduction, meeting)


def sup_con(
    features: Tensor, labels, mask, temperature, contrast_mode: str, base_temperature: float,
    group, strategy: str, backend: str,
) -> Tensor:  # fmt: skip
    """SupCon's, a positive being of the same label on any process; () this process's share."""

    def check() -> tuple[Tensor, Tensor, Tensor]:
        nonlocal features, labels
        _checks.backend(backend)
        if mask is not None:
            raise ValueError("mask must be None across processes, whose samples it cannot name: give labels")
        if isinstance(features, Tensor) and features.dim() < 3:
            raise ValueError(f"features must be (batch, views, ...), got shape {tuple(features.shape)}")
        if isinstance(features, Tensor) and features.dim() > 3:
            features = features.flatten(2)
        _checks.embeddings("features", features, 3)
        labels = _checks.ids("labels", labels, features.shape[0], features.device)
        scale = _checks.inverse_temperature(temperature, features)
        z = prepare(features, False)
        return z, z, scale

    views = features.shape[1] if isinstance(features, Tensor) and features.dim() > 1 else 0
    kind = f"SupConLoss {contrast_mode} {base_temperature} {labels is not None} {views}"
    z, _, scale, meeting = meet(kind, check, group, strategy, (("features", features),))
    plain_scale, scale = scale, mean_grad(scale, group)
    factor = (
        scale.reciprocal() / base_temperature if isinstance(temperature, Tensor) else temperature / base_temperature
    )
    batch, views, dim = z.shape
    own, total = meeting.own(meeting.rows), sum(meeting.rows)
    sample = torch.arange(own.start, own.stop, device=z.device)
    everyone = None
    if labels is not None:  # numbered alike on all processes: 8 bytes a sample
        everyone = contrastive._groups(gather_rows(labels, meeting.rows, group))
        members = torch.bincount(everyone, minlength=1)
        group_id, classes = everyone[own], int(members.shape[0])
        count = members[group_id] * views - 1
        anchors_of = members * (views if contrast_mode == "all" else 1)
        valid = int((anchors_of * (members * views > 1)).sum())
        in_class = class_sum(z.to(plain_scale.dtype).sum(1), group_id, classes, meeting)
    else:
        group_id = sample
        count = torch.full((batch,), views - 1, device=z.device)
        valid = total * (views if contrast_mode == "all" else 1) * (views > 1)
        in_class = z.to(plain_scale.dtype).sum(1)
    positive, row_ids, col_ids, anchors = _anchors(z, sample, group_id, count, in_class, contrast_mode, total)
    keys = None if contrast_mode == "all" else z.reshape(-1, dim)
    across = labels is not None and views == 1  # only then can two samples share an id
    row, _ = similarity.lse(
        anchors, keys, scale, _wider(meeting, views, contrast_mode), row_ids=row_ids, col_ids=col_ids, across=across,
        backend=backend,
    )  # fmt: skip
    count = count.repeat_interleave(views) if contrast_mode == "all" else count
    loss = row - row_dot(anchors, positive) * scale
    lonely = (count == 1) & (views <= 2)
    loss = torch.where(lonely, F.softplus(loss, threshold=50.0), loss)
    loss = torch.where(count > 0, loss, 0.0).sum()
    return loss * (meeting.world / max(valid, 1)) * factor


def _anchors(z, sample, group_id, count, in_class, contrast_mode, total):
    """Mean positives, ids of anchors and keys, and the anchors; see functional.contrastive's one-process version.

    Ids are equal for a row and itself and, where an anchor has one positive only, for that one too.
    """
    batch, views, dim = z.shape
    own = z.to(in_class.dtype)
    lonely = (count == 1) & (views <= 2)
    if views == 1:
        ids = torch.where(lonely, total + group_id, sample)[:, None]
    else:
        ids = sample[:, None] * views + torch.arange(views, device=z.device)
        if views == 2:
            ids[:, 1] = torch.where(lonely, ids[:, 0], ids[:, 1])
    if contrast_mode == "one":
        rest, anchors, row_ids = in_class - own[:, 0], z[:, 0], ids[:, 0]
    else:
        rest, anchors, row_ids = (in_class[:, None] - own).reshape(-1, dim), z.reshape(-1, dim), ids.reshape(-1)
        count = count.repeat_interleave(views)
    mean = rest / count.clamp_min(1).to(rest.dtype)[:, None]
    return mean, row_ids.contiguous(), ids.reshape(-1), anchors


def _wider(meeting: Meeting, views: int, contrast_mode: str) -> Meeting:
    """The meeting in rows of embeddings in place of samples."""
    keys = tuple(n * views for n in meeting.rows)
    return Meeting(meeting.group, keys if contrast_mode == "all" else meeting.rows, keys, meeting.strategy)


def _odds_loss(odds: Tensor, decoupled: bool) -> Tensor:
    """softplus(lse of the negatives - positive logit), or that itself with 0 for no negatives."""
    if decoupled:
        return torch.where(odds == -torch.inf, 0.0, odds)
    return F.softplus(odds, threshold=50.0)


def _share(loss: Tensor, reduction: str, meeting: Meeting) -> Tensor:
    if reduction == "none":
        return loss
    anchors = sum(meeting.rows) if reduction == "mean" else 1
    return loss.sum() * (meeting.world / anchors)


def mean_value(share: Tensor, meeting: Meeting) -> Tensor:
    """The mean of all processes' shares, with the gradient of this one's."""
    mean = all_reduce(share.detach().clone(), meeting.group) / meeting.world
    return share + (mean - share.detach())


def gather_keys(
    name: str, inputs: Sequence[tuple[str, object]], check: Callable[[], Tensor], size: int, position: Tensor, group
) -> Tensor:
    """``check()``'s keys (n, D) of all processes for the queue or bank ``name``: (sum of n, D), no gradient.

    ``size`` and ``position`` (one element), where the next key goes, must be the same on all; n may be 0.
    """

    def checked() -> tuple[Tensor, Tensor, Tensor]:
        ready = check()
        return ready, ready, ready.new_ones((), dtype=torch.float32)

    def queue() -> list[Same]:
        return [Same(f"{name}'s size", size), Same(f"{name}'s position", position)]

    with torch.no_grad():
        ready, _, _, meeting = meet(f"enqueue to a {name}", checked, group, "gather", inputs, queue)
        return gather_rows(ready, meeting.rows, group)
