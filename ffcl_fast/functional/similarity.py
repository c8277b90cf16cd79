"""The primitive under every contrastive loss: normalisers of S = scale q k^T without S, and their gradients.

The mathematics (docs/mathematics.md): with u, v the gradients of the row and column normalisers,
G_ij = u_i exp(S_ij - row_lse_i) + v_j exp(S_ij - col_lse_j), dq = scale G k, dk = scale G^T q and
dscale = <q, dq> / scale (half of it where k is q).
Everything else here is O((N + M) D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends, ops
from . import _checks
from .finite import nothing_or_nan

EXCLUDE = {
    None: ops.EXCLUDE_NONE,
    "diagonal": ops.EXCLUDE_DIAGONAL,
    "same_id": ops.EXCLUDE_SAME_ID,
    "same_id_off_diagonal": ops.EXCLUDE_SAME_ID_OFF_DIAGONAL,
    "different_id": ops.EXCLUDE_DIFFERENT_ID,
}
_WITHOUT_IDS = (ops.EXCLUDE_NONE, ops.EXCLUDE_DIAGONAL)

_CHUNK = 1 << 20  # elements of a row-wise product kept at once: 4 MiB of float32
_DEVICE_CHUNK = 1 << 24  # on a GPU, where each piece costs launches


def similarity_lse(
    q: Tensor,
    k: Tensor | None,
    scale: float | Tensor,
    *,
    normalize: bool = False,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude: str | None = None,
    both: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``logsumexp`` of S = scale q k^T over columns and over rows from one pass, S never stored.

    Differentiable once in ``q``, ``k`` and ``scale``. Under autocast ``q`` and ``k`` are cast to autocast's dtype, as a
    matrix product would; without it they are used in the dtype they have. Sums are float32, or float64 for float64.

    Args:
        q: (N, D) queries, float16, bfloat16, float32 or float64.
        k: (M, D) keys of the same dtype. None, or ``q`` itself, means self-similarity: half the work, S is symmetric.
        scale: the inverse temperature, a number or a one-element tensor that may require a gradient.
        normalize: replace each row x by x / max(|x|, 1e-12) first.
        row_ids: (N,) integers, for ``exclude``.
        col_ids: (M,) integers; for self-similarity they are ``row_ids``.
        exclude: the pairs (i, j) left out of the sums. None; ``"diagonal"``: i == j; ``"same_id"``:
            row_ids[i] == col_ids[j]; ``"same_id_off_diagonal"``: those, but (i, i) stays; ``"different_id"``:
            row_ids[i] != col_ids[j].
        both: compute the column sums too.
        backend: one of :data:`ffcl_fast.backends.NAMES`.

    Returns:
        row_lse (N,) and col_lse (M,), or None instead of col_lse where ``both`` is false. For self-similarity both are
        the same tensor. A row or column with every pair left out has -inf and no gradient. An element that is infinite
        or NaN makes NaN of its row's sum, and of every other that its row enters.

    Raises:
        TypeError: a dtype that is not supported or not the same.
        ValueError: a shape, device, id vector or name that does not fit.
    """
    _checks.embeddings("q", q)
    _checks.backend(backend)
    if exclude not in EXCLUDE:
        raise ValueError(f"exclude must be one of {', '.join(map(repr, EXCLUDE))}; got {exclude!r}")
    same = k is None or (k is q and (col_ids is None or col_ids is row_ids))
    if same:
        if col_ids is not None and col_ids is not row_ids:
            raise ValueError("col_ids must be left out for self-similarity (k is None): they are row_ids")
        k = None
    else:
        _checks.embeddings("k", k)
        _checks.alike("k", k, "q", q)
    mode = EXCLUDE[exclude]
    row_ids = _checks.ids("row_ids", row_ids, q.shape[0], q.device)
    col_ids = None if k is None else _checks.ids("col_ids", col_ids, k.shape[0], q.device)
    if mode in _WITHOUT_IDS:
        if row_ids is not None or col_ids is not None:
            raise ValueError(f"row_ids and col_ids have no effect with exclude={exclude!r}")
    elif row_ids is None or (k is not None and col_ids is None):
        raise ValueError(f"exclude={exclude!r} needs row_ids, and col_ids where k is another tensor than q")
    scale = _checks.scalar("scale", scale, q)
    q = prepare(q, normalize, backend)
    k = None if k is None else prepare(k, normalize, backend)
    row_lse, col_lse = raw_lse(q, k, scale, row_ids, col_ids, mode, both, backend)
    spoilt = None if normalize else nothing_or_nan(q, k, row_ids, col_ids, mode)  # a division makes NaN of infinity
    if spoilt is not None:
        row_lse = row_lse + spoilt[0]
        col_lse = None if col_lse is None else col_lse + spoilt[1]
    return row_lse, (row_lse if k is None else col_lse) if both else None


def prepare(x: Tensor, normalize: bool, backend: str = "auto") -> Tensor:
    """``x`` in the dtype that products run in, its rows (last dimension) of unit length if ``normalize``."""
    dtype = _checks.compute_dtype(x)
    return normalized(x, dtype, backend=backend) if normalize else x.to(dtype)


def normalized(x: Tensor, dtype: torch.dtype, eps: float = 1e-12, backend: str = "auto") -> Tensor:
    """x / max(|x|, eps) along the last dimension, computed in the accumulator dtype, as ``dtype``.

    By one kernel where ``backend`` has one, else by plain PyTorch, which torch.compile fuses with its surroundings.
    """
    if x.dim() == 2 and backends.normalizes(backend, x):
        return _FusedNormalize.apply(x, eps, dtype, backend)
    return _Normalize.apply(x, eps, dtype)


def raw_lse(q, k, scale, row_ids, col_ids, exclude: int, both: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    """:func:`similarity_lse` without checks; ``exclude`` is one of ops.EXCLUDE_*, the second result None if k is."""
    both = both and k is not None
    k, col_ids = apart(k, q), apart(col_ids, row_ids)
    out = _SimilarityLSE.apply(q, k, scale, row_ids, col_ids, exclude, both, grad_wanted(q, k, scale), backend)
    return out if both else (out, None)


def sigmoid_loss(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, positives: bool, backend: str) -> Tensor:
    """SigLIP's loss summed over all pairs, () in the accumulator dtype; see ``siglip`` in :mod:`ffcl_fast.ops`."""
    k, bias = apart(k, q), apart(bias, scale)
    need_q, need_k = siglip_needs(*(grad_wanted(x) for x in (q, k, scale, bias)))
    return _SigLip.apply(q, k, scale, bias, positives, need_q, need_k, backend)


def siglip_needs(q: bool, k: bool, scale: bool, bias: bool) -> tuple[bool, bool]:
    """need_q and need_k of the operator for the gradients that are wanted: the scale's is made of dq, the bias's comes
    with either."""
    return q or scale or (bias and not k), k


def grad_wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def row_dot(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """<a, b> along the last dimension, summed in ``dtype``, by default the accumulator dtype.

    ``a`` is (N, ..., D) and ``b`` broadcasts to it, N aside. The products kept at once are bounded.
    """
    acc = ops.accumulator_dtype(a)
    chunk = _CHUNK if a.device.type == "cpu" else _DEVICE_CHUNK
    if torch.compiler.is_compiling() or a.numel() <= chunk:
        return (a.to(acc) * b).sum(-1, dtype=dtype)
    rows = max(1, chunk * a.shape[0] // a.numel())
    return torch.cat([(x.to(acc) * y).sum(-1, dtype=dtype) for x, y in zip(a.split(rows), b.split(rows), strict=True)])


def scale_grad(q: Tensor, k: Tensor | None, dq: Tensor, scale: Tensor) -> Tensor:
    """<dS, S> / scale from the gradient of ``q``; in self-similarity q takes the part of both sides of each product."""
    total = row_dot(q, dq).sum() / scale
    return total / 2 if k is None else total


def _spoilt_by(loss: Tensor, x: Tensor) -> Tensor:
    """``loss`` (), or NaN where an element of ``x`` is infinite or NaN."""
    least, largest = torch.aminmax(x)
    return loss.add(least, alpha=0.0).add_(largest, alpha=0.0)


class _Refuse(torch.autograd.Function):
    """x, whose derivative by anything, ``inputs`` among it, is an error."""

    @staticmethod
    def forward(ctx, x, *inputs):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("ffcl_fast's losses can be differentiated once: there is no second derivative")


def differentiable_once(backward: Callable) -> Callable:
    """As ``once_differentiable``, which lets gradients pass for constants where the incoming one is a constant: second
    derivatives, those of PyTorch's hvp and hessian too, would be zero in silence."""
    once = once_differentiable(backward)

    def wrapper(ctx, *grads):
        outputs = once(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        inputs = [x for x in ctx.saved_tensors if x is not None and x.requires_grad]
        return tuple(None if x is None else _Refuse.apply(x.detach().requires_grad_(), *inputs) for x in outputs)

    return wrapper


def apart(x: Tensor | None, *others: Tensor | None) -> Tensor | None:
    """``x``, as a view of its own where it is one of ``others``: torch.compile refuses the same input twice."""
    return x.view_as(x) if x is not None and any(x is other for other in others) else x


class _Normalize(torch.autograd.Function):
    """z = x / max(|x|, eps) along the last dimension, with dx = (dz - z <z, dz>) / |x|."""

    @staticmethod
    def forward(ctx, x, eps, dtype):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=ops.accumulator_dtype(x)).clamp_min(eps)
        z = x / norm
        if z.dtype != dtype:  # torch.compile of torch 2.11 loses the gradient of an output that `to` hands through
            z = z.to(dtype)
        ctx.save_for_backward(z, norm)
        ctx.eps, ctx.dtype = eps, x.dtype
        return z

    @staticmethod
    @differentiable_once
    def backward(ctx, dz):
        z, norm = ctx.saved_tensors
        # A row shorter than eps was divided by a constant: no projection.
        inner = (z.to(norm.dtype) * dz).sum(-1, keepdim=True).mul_(norm > ctx.eps)
        return torch.addcmul(dz, z, inner, value=-1.0).div_(norm).to(ctx.dtype), None, None


class _FusedNormalize(torch.autograd.Function):
    """The same of (N, D) rows by a backend's operator."""

    @staticmethod
    def forward(ctx, x, eps, dtype, backend):
        z, norm = torch.ops.ffcl_fast.normalize_forward.default(x, eps, dtype, backend)
        ctx.save_for_backward(z, norm)
        ctx.eps, ctx.dtype, ctx.backend = eps, x.dtype, backend
        return z

    @staticmethod
    @differentiable_once
    def backward(ctx, dz):
        z, norm = ctx.saved_tensors
        dx = torch.ops.ffcl_fast.normalize_backward.default(z, norm, dz, ctx.eps, ctx.dtype, ctx.backend)
        return dx, None, None, None


class _SimilarityLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, scale, row_ids, col_ids, exclude, both, save, backend):
        if ctx.needs_input_grad[2]:
            scale = ops.away_from_zero(scale)
        row_lse, col_lse, cache = torch.ops.ffcl_fast.similarity_forward.default(
            q, k, scale, row_ids, col_ids, exclude, both, save, backend
        )
        ctx.save_for_backward(q, k, scale, row_ids, col_ids, row_lse, col_lse, cache)
        ctx.exclude, ctx.backend = exclude, backend
        return (row_lse, col_lse) if both else row_lse

    @staticmethod
    @differentiable_once
    def backward(ctx, row_grad, col_grad=None):
        q, k, scale, row_ids, col_ids, row_lse, col_lse, cache = ctx.saved_tensors
        need_q, need_k, need_scale = ctx.needs_input_grad[:3]
        dq, dk = torch.ops.ffcl_fast.similarity_backward.default(
            q, k, scale, row_ids, col_ids, ctx.exclude, row_lse, col_lse, row_grad.contiguous(),
            row_lse.new_empty(0) if col_grad is None else col_grad.contiguous(), cache,
            need_q or need_scale, need_k, ctx.backend,
        )  # fmt: skip
        dscale = scale_grad(q, k, dq, scale) if need_scale else None
        return (dq if need_q else None, dk if need_k else None, dscale, *(None,) * 6)


class _SigLip(torch.autograd.Function):
    """Loss and gradients come from one pass.

    The first backward pass hands those gradients out, scaled in place by the upstream gradient (nothing else refers to
    them), so that they exist once; a later one, which needs ``retain_graph``, makes them anew.
    """

    @staticmethod
    def forward(ctx, q, k, scale, bias, positives, need_q, need_k, backend):
        if ctx.needs_input_grad[2]:
            scale = ops.away_from_zero(scale)
        ctx.options = positives, need_q, need_k, backend
        loss, *gradients = torch.ops.ffcl_fast.siglip.default(q, k, scale, bias, *ctx.options)
        # A sigmoid of infinity is a number: without this an overflow of the inputs could pass for a loss.
        loss = _spoilt_by(_spoilt_by(loss, q), k)
        ctx.gradients = _with_scale(q, scale, gradients, ctx.needs_input_grad)
        ctx.save_for_backward(q, k, scale, bias.clone())  # plain PyTorch needs no bias, so it may be changed in place
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        q, k, scale, bias = ctx.saved_tensors  # also raises, as everywhere, for a second pass without the graph
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = torch.ops.ffcl_fast.siglip.default(q, k, scale, bias, *ctx.options)
            gradients = _with_scale(q, scale, gradients, ctx.needs_input_grad)
        return *handed_out(gradients, grad, ctx.options[-1]), *(None,) * 4


def handed_out(gradients: Sequence[Tensor | None], factor: Tensor, backend: str) -> list[Tensor | None]:
    """``gradients`` that a forward pass has left, times ``factor`` (), in place where nothing else can see them.

    A traced backward pass may run again on the same buffers, and a batched factor makes several gradients of one. The
    clone is for ``torch._dynamo.config.compiled_autograd``, which loses what comes straight from the forward pass.
    """
    if torch.compiler.is_compiling() or batched(factor):
        return [None if d is None else d.clone() * factor for d in gradients]
    for d in gradients:
        if d is not None and d.dim() == 0:
            d.mul_(factor)
        elif d is not None:
            torch.ops.ffcl_fast.scale_.default(d, factor, backend)
    return list(gradients)


def batched(x: Tensor) -> bool:
    """Whether ``x`` is several tensors in one, as in ``is_grads_batched`` and ``torch.func.vmap``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def _with_scale(q: Tensor, scale: Tensor, gradients: list[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of q, k, scale and bias that are ``needed``, from the operator's of q, k and bias."""
    dq, dk, dbias = gradients
    need_q, need_k, need_scale, need_bias = needed[:4]
    dscale = row_dot(q, dq).sum() / scale if need_scale and dq.shape == q.shape else None
    return [dq if need_q else None, dk if need_k else None, dscale, dbias if need_bias else None]
