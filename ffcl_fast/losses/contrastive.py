"""The contrastive losses as modules with the constructors and calls of the libraries they stand in for.

Embeddings may be float16, bfloat16, float32 or float64; losses are float32, or float64 for float64. ``backend`` is one
of :data:`ffcl_fast.backends.NAMES`. What else is common to all is said in :mod:`ffcl_fast.functional.contrastive`.

Across processes, every loss takes ``distributed="auto"`` ("gather" or "ring" to choose the way) and an optional process
``group``: the batch is then that of all processes, which may hold different numbers of rows, and after the averaging of
DistributedDataParallel every parameter has the gradient of the single-process loss on the concatenated batch. The mean
over processes of the returned values is that loss. Without a process group, or with one process, nothing changes.
Arguments that are wrong, not finite or unlike the other ranks' raise on every rank; a rank that is gone raises
:class:`ffcl_fast.distributed.LostRank` on the others within the group's timeout. See docs/large_batches.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from .. import distributed as processes
from ..distributed import losses as across
from ..functional import _checks, contrastive
from ..functional.similarity import prepare
from .described import described
from .memory_bank import MemoryBank
from .queue import Queue


class _Spread(nn.Module):
    """What all have in common: the options ``distributed`` and ``group``."""

    def __init__(self, distributed: str | None, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        if distributed is not None:
            _checks.choice("distributed", distributed, processes.STRATEGIES)
        self.distributed = distributed
        self.group = group

    @property
    def _spread(self) -> bool:
        return self.distributed is not None and processes.world_size(self.group) > 1


class InfoNCELoss(_Spread):
    """InfoNCE as ``info_nce.InfoNCE`` of info-nce-pytorch: embeddings are L2-normalised here.

    Args:
        temperature: divides the cosines; a number, or a one-element tensor or parameter that gets a gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        negative_mode: ``"unpaired"``: negative_keys (M, D) serve every row; ``"paired"``: (N, M, D), each row its own.
        distributed: None, or the exact loss across processes: "auto", "gather" or "ring"; see the module's text.
        group: the processes; None for all.

    Raises:
        ValueError: an unknown option, or a temperature of zero.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        decoupled: bool = False,
        distributed: str | None = None,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(distributed, group)
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.choice("negative_mode", negative_mode, contrastive.NEGATIVE_MODES)
        _checks.backend(backend)
        _check_temperature(temperature)
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode
        self.decoupled = decoupled
        self.backend = backend

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | Queue | None = None) -> Tensor:
        """Loss of query (N, D) and positive_key (N, D); see :func:`ffcl_fast.functional.info_nce`.

        ``negative_keys`` may be a :class:`Queue`, read without a copy. Across processes unpaired negative_keys of all
        serve every row, and a queue must be the same on all; ``"none"`` gives this process's rows.
        """
        queue = negative_keys.keys if isinstance(negative_keys, Queue) else None
        if queue is not None and self.negative_mode == "paired":
            raise ValueError("negative_keys must be (N, M, D) with negative_mode='paired', not a Queue")
        if self._spread:
            return across.info_nce(
                query,
                positive_key,
                negative_keys if queue is None else queue,
                self.temperature,
                self.reduction,
                self.negative_mode,
                self.group,
                self.distributed,
                decoupled=self.decoupled,
                position=negative_keys.position if isinstance(negative_keys, Queue) else None,
                backend=self.backend,
            )
        if queue is not None:
            options = {"decoupled": self.decoupled, "reduction": self.reduction, "backend": self.backend}
            return contrastive.nt_xent(query, positive_key, self.temperature, queue, **options)
        return contrastive.info_nce(
            query,
            positive_key,
            negative_keys,
            self.temperature,
            self.reduction,
            self.negative_mode,
            decoupled=self.decoupled,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return described(self, "temperature", "reduction", "negative_mode")


class NTXentLoss(_Spread):
    """NT-Xent as ``lightly.loss.NTXentLoss``: embeddings are L2-normalised here.

    Args:
        temperature: divides the cosines; a number, or a one-element tensor or parameter that gets a gradient.
        memory_bank_size: 0 for SimCLR's loss; (size, D) for MoCo's, whose negatives are the last ``size`` rows of
            ``out1``; a bare size takes D from the first batch. The bank is a buffer, saved with the module and read
            without a copy where it has the embeddings' dtype (or autocast's).
        gather_distributed: contrast with the rows of all processes, which get their gradients; or fill the memory bank
            with them.
        distributed: None, or the exact loss across processes: "auto", "gather" or "ring"; see the module's text.
        group: the processes; None for all.

    Raises:
        ValueError: an impossible memory bank, or a temperature of zero.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        decoupled: bool = False,
        distributed: str | None = None,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(distributed, group)
        _checks.backend(backend)
        _check_temperature(temperature)
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed, group)
        if self.memory_bank.size and distributed is not None:
            raise ValueError("distributed must be None with a memory bank: take InfoNCELoss and a Queue")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.decoupled = decoupled
        self.backend = backend

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss () of two views (N, D) of the same samples.

        With a memory bank out1 is added to it, after use, where out0 requires a gradient.
        """
        options = {"decoupled": self.decoupled, "backend": self.backend}
        if self.memory_bank.size:
            return self._with_bank(out0, out1, options)
        strategy = self.distributed or ("auto" if self.gather_distributed else None)
        if strategy is None or processes.world_size(self.group) == 1:
            return contrastive.nt_xent(out0, out1, self.temperature, **options)
        return across.nt_xent(out0, out1, self.temperature, self.group, strategy, **options)

    def _with_bank(self, out0: Tensor, out1: Tensor, options: dict) -> Tensor:
        def check() -> Tensor:
            _checks.embeddings("out0", out0)
            _checks.embeddings("out1", out1)
            _checks.alike("out1", out1, "out0", out0, rows=True)  # before a bank of a bare size takes out1's width
            self.memory_bank.check_width(out1.shape[1])
            return out1.detach()

        keys = None
        validates = isinstance(out0, Tensor) and out0.is_floating_point() and not out0.requires_grad
        if self.memory_bank.gathers and not validates:
            # before the loss, so that no process is left waiting by another one's wrong arguments
            inputs = (("out0", out0), ("out1", out1))
            keys = self.memory_bank.gathered(inputs, lambda: prepare(check(), True))
        else:
            check()
        loss = contrastive.nt_xent(out0, out1, self.temperature, self.memory_bank.keys(out1.shape[1]), **options)
        if out0.requires_grad:
            self.memory_bank.put(prepare(out1.detach(), True) if keys is None else keys)
        return loss

    def extra_repr(self) -> str:
        return described(self, "temperature", "gather_distributed")


class SupConLoss(_Spread):
    """Supervised contrastive loss as SupContrast's ``SupConLoss``: normalise the features first.

    Anchors without a positive contribute 0 and are left out of the mean, see
    :func:`ffcl_fast.functional.sup_con`.

    Args:
        temperature: divides the dot products; a number, or a one-element tensor or parameter that gets a gradient.
        contrast_mode: ``"all"``: every view is an anchor; ``"one"``: the first one only.
        base_temperature: the loss is multiplied by temperature / base_temperature.
        distributed: None, or the exact loss across processes: "auto", "gather" or "ring"; see the module's text.
        group: the processes; None for all.

    Raises:
        ValueError: an unknown option, or a temperature or base temperature of zero.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        distributed: str | None = None,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(distributed, group)
        _checks.choice("contrast_mode", contrast_mode, contrastive.CONTRAST_MODES)
        _checks.backend(backend)
        _check_temperature(temperature)
        contrastive.check_base_temperature(base_temperature)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.backend = backend

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Loss () of features (B, views, ...) with labels (B,), a mask (B, B), or neither for SimCLR's loss."""
        if self._spread:
            return across.sup_con(
                features,
                labels,
                mask,
                self.temperature,
                self.contrast_mode,
                self.base_temperature,
                self.group,
                self.distributed,
                self.backend,
            )
        return contrastive.sup_con(
            features,
            labels,
            mask,
            self.temperature,
            self.contrast_mode,
            self.base_temperature,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return described(self, "temperature", "contrast_mode")


class ClipLoss(_Spread):
    """CLIP's symmetric loss as ``open_clip.ClipLoss``.

    Args:
        local_loss: with several processes, return the loss of this one's rows instead of the whole.
        gather_with_grad: with several processes, send the gradients of gathered features back to their owners. As in
            open_clip, without it the gradients are not those of the whole batch: take ``distributed`` for those, or
            ``gather_with_grad``, whose features get the same.
        cache_labels: accepted for compatibility: no labels are ever made.
        rank: this process's number.
        world_size: the number of processes.
        use_horovod: must be false.
        distributed: None, or the exact loss across processes: "auto", "gather" or "ring"; see the module's text.
        group: the processes; None for all.

    Raises:
        ValueError: ``use_horovod``, or a rank outside the world.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        distributed: str | None = None,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(distributed, group)
        if use_horovod:
            raise ValueError("use_horovod must be False: only torch.distributed is supported")
        _check_world(rank, world_size)
        _checks.backend(backend)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss () of matching rows (N, D) and (N, D), or ``{"contrastive_loss": loss}`` with ``output_dict``.

        The softmax does not depend on ``logit_bias``; it gets a gradient of 0.
        """
        options = (logit_scale, logit_bias)
        if self._spread:
            loss, _ = across.clip(
                image_features, text_features, *options, self.group, self.distributed, self.backend, "ClipLoss"
            )
        elif self.world_size == 1:
            loss = contrastive.clip(image_features, text_features, *options, backend=self.backend)
        else:
            _check_group(self.rank, self.world_size, self.group)
            loss = self._as_open_clip(image_features, text_features, *options)
        return {"contrastive_loss": loss} if output_dict else loss

    def _as_open_clip(self, image_features, text_features, logit_scale, logit_bias) -> Tensor:
        """Each option's value and gradients of the features; the scale's is the mean over processes."""
        if self.local_loss and not self.gather_with_grad:
            return across.clip_own_anchors(
                image_features, text_features, logit_scale, logit_bias, self.group, self.backend
            )
        if not self.gather_with_grad:  # own rows only, of the whole loss: DDP's averaging makes that 1 / world_size
            image_features, text_features = (_times(x, 1 / self.world_size) for x in (image_features, text_features))
        name = f"ClipLoss {self.local_loss} {self.gather_with_grad}"
        share, meeting = across.clip(
            image_features, text_features, logit_scale, logit_bias, self.group, "auto", self.backend, name
        )
        return share if self.local_loss else across.mean_value(share, meeting)

    def extra_repr(self) -> str:
        return described(self, "local_loss", "rank", "world_size")


class SigLipLoss(_Spread):
    """SigLIP's pairwise sigmoid loss as ``open_clip.SigLipLoss``.

    Args:
        cache_labels: accepted for compatibility: no labels are ever made.
        rank: this process's number.
        world_size: the number of processes; each contrasts its images with the texts of all.
        dist_impl: None, ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``. Value and gradients are the same for
            all of them: here ``"bidir"`` and ``"shift"`` are the ring, ``"gather"`` and ``"reduce"`` the gather, None
            the one that memory allows.
        distributed: None, or the exact loss across processes: "auto", "gather" or "ring"; see the module's text.
        group: the processes; None for all.

    Raises:
        ValueError: an unknown ``dist_impl``, or a rank outside the world.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        distributed: str | None = None,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(distributed, group)
        _check_world(rank, world_size)
        _checks.backend(backend)
        self.dist_impl = dist_impl or "bidir"
        self._strategy = {None: "auto", "bidir": "ring", "shift": "ring"}.get(dist_impl, "gather")
        _checks.choice("dist_impl", self.dist_impl, ("bidir", "shift", "reduce", "gather"))
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss () of matching rows (N, D) and (N, D), or ``{"contrastive_loss": loss}`` with ``output_dict``."""
        args = (image_features, text_features, logit_scale, logit_bias)
        if self._spread:
            loss = across.siglip(*args, self.group, self.distributed, self.backend)
        elif self.world_size > 1:
            _check_group(self.rank, self.world_size, self.group)
            loss = across.siglip(*args, self.group, self._strategy, self.backend, mean=False)
        else:
            loss = contrastive.siglip(*args, backend=self.backend)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return described(self, "rank", "world_size")


def _check_temperature(temperature: float | Tensor) -> None:
    # A tensor is checked too: a module is built once, so reading its value costs nothing that matters.
    if isinstance(temperature, Tensor):
        if temperature.is_meta:  # built under torch.device("meta"): it has no value yet
            return
        value = float(temperature.detach()) if temperature.numel() == 1 else math.nan
    elif isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a one-element tensor, got {type(temperature).__name__}")
    else:
        value = float(temperature)
    if not math.isfinite(value) or abs(value) < 1e-8:
        raise ValueError(f"temperature must be one finite number other than zero, got {temperature}")


def _check_world(rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size): got rank={rank}, world_size={world_size}")


def _check_group(rank: int, world_size: int, group: dist.ProcessGroup | None) -> None:
    actual = processes.world_size(group)
    if actual != world_size:
        raise ValueError(f"world_size must be that of the process group: got {world_size}, it has {actual}")
    if processes.rank(group) != rank:
        raise ValueError(f"rank must be this process's own: got {rank}, it is {processes.rank(group)}")


def _times(x: Tensor, factor: float) -> Tensor:
    """``x``, whose gradient is multiplied by ``factor``."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda grad: grad * factor)
    return x
