"""The contrastive losses as modules with the constructors and calls of the libraries they stand in for.

Embeddings may be float16, bfloat16, float32 or float64; losses are float32, or float64 for float64. ``backend`` is one
of :data:`ffcl_fast.backends.NAMES`. What else is common to all is said in :mod:`ffcl_fast.functional.contrastive`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import distributed
from ..functional import _checks, contrastive
from ..functional.similarity import normalized, prepare
from .memory_bank import MemoryBank


class InfoNCELoss(nn.Module):
    """InfoNCE as ``info_nce.InfoNCE`` of info-nce-pytorch: embeddings are L2-normalised here.

    Args:
        temperature: divides the cosines; a number, or a one-element tensor or parameter that gets a gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        negative_mode: ``"unpaired"``: negative_keys (M, D) serve every row; ``"paired"``: (N, M, D), each row its own.

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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.choice("negative_mode", negative_mode, contrastive.NEGATIVE_MODES)
        _checks.backend(backend)
        _check_temperature(temperature)
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode
        self.decoupled = decoupled
        self.backend = backend

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Loss of query (N, D) and positive_key (N, D); see :func:`ffcl_fast.functional.info_nce`."""
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
        return f"temperature={self.temperature}, reduction={self.reduction!r}, negative_mode={self.negative_mode!r}"


class NTXentLoss(nn.Module):
    """NT-Xent as ``lightly.loss.NTXentLoss``: embeddings are L2-normalised here.

    Args:
        temperature: divides the cosines; a number, or a one-element tensor or parameter that gets a gradient.
        memory_bank_size: 0 for SimCLR's loss; (size, D) for MoCo's, whose negatives are the last ``size`` rows of
            ``out1``; a bare size takes D from the first batch. The bank is a buffer and is saved with the module.
        gather_distributed: contrast with the rows of all processes, which get their gradients; or fill the memory bank
            with them.

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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.backend(backend)
        _check_temperature(temperature)
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)
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
            _checks.embeddings("out0", out0)
            _checks.embeddings("out1", out1)
            _checks.alike("out1", out1, "out0", out0, rows=True)  # before the bank takes them in
            negatives = self.memory_bank(prepare(out1.detach(), True), update=out0.requires_grad)
            return contrastive.nt_xent(out0, out1, self.temperature, negatives, **options)
        if not self.gather_distributed or distributed.world_size() == 1:
            return contrastive.nt_xent(out0, out1, self.temperature, **options)
        _checks.embeddings("out0", out0)
        _checks.embeddings("out1", out1)
        _checks.alike("out1", out1, "out0", out0, rows=True)
        scale = _checks.inverse_temperature(self.temperature, out0)
        # Cast for autocast after the gather: the gradients of all processes are then summed in the outputs' dtype.
        z = normalized(torch.cat((out0, out1)), out0.dtype)
        world, n = distributed.world_size(), out0.shape[0]
        # Sample numbers over all processes; each process holds both views of its own.
        everyone = torch.arange(world * n, device=z.device).view(world, 1, n).expand(world, 2, n)
        own = distributed.rank() * n + torch.arange(n, device=z.device)
        all_z, all_ids = prepare(distributed.gather_with_grad(z), False), everyone.reshape(-1)
        return contrastive.two_views(prepare(z, False), scale, own, all_z=all_z, all_ids=all_ids, **options).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"


class SupConLoss(nn.Module):
    """Supervised contrastive loss as SupContrast's ``SupConLoss``: normalise the features first.

    Anchors without a positive contribute 0 and are left out of the mean, see
    :func:`ffcl_fast.functional.sup_con`.

    Args:
        temperature: divides the dot products; a number, or a one-element tensor or parameter that gets a gradient.
        contrast_mode: ``"all"``: every view is an anchor; ``"one"``: the first one only.
        base_temperature: the loss is multiplied by temperature / base_temperature.

    Raises:
        ValueError: an unknown option, or a temperature of zero.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("contrast_mode", contrast_mode, contrastive.CONTRAST_MODES)
        _checks.backend(backend)
        _check_temperature(temperature)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.backend = backend

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Loss () of features (B, views, ...) with labels (B,), a mask (B, B), or neither for SimCLR's loss."""
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
        return f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}"


class ClipLoss(nn.Module):
    """CLIP's symmetric loss as ``open_clip.ClipLoss``.

    Args:
        local_loss: with several processes, contrast this one's rows with everyone's instead of all with all.
        gather_with_grad: with several processes, send the gradients of gathered features back to their owners.
        cache_labels: accepted for compatibility: no labels are ever made.
        rank: this process's number.
        world_size: the number of processes.
        use_horovod: must be false.

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
        backend: str = "auto",
    ) -> None:
        super().__init__()
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
        if self.world_size == 1:
            loss = contrastive.clip(image_features, text_features, logit_scale, logit_bias, backend=self.backend)
        else:
            loss = self._across_processes(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _across_processes(self, image_features, text_features, logit_scale, logit_bias) -> Tensor:
        contrastive.check_pair(image_features, text_features)
        if self.gather_with_grad:
            gather = distributed.gather_with_grad
        else:
            gather = distributed.gather if self.local_loss else distributed.gather_own_grad
        all_images, all_texts = gather(image_features), gather(text_features)
        if not self.local_loss:
            return contrastive.clip(all_images, all_texts, logit_scale, logit_bias, backend=self.backend)
        first = self.rank * image_features.shape[0]
        loss = (
            contrastive.clip_local(image_features, all_texts, logit_scale, first, self.backend)
            + contrastive.clip_local(text_features, all_images, logit_scale, first, self.backend)
        ) / 2
        return contrastive.with_bias(loss, logit_bias, image_features)

    def extra_repr(self) -> str:
        return f"local_loss={self.local_loss}, rank={self.rank}, world_size={self.world_size}"


class SigLipLoss(nn.Module):
    """SigLIP's pairwise sigmoid loss as ``open_clip.SigLipLoss``.

    Args:
        cache_labels: accepted for compatibility: no labels are ever made.
        rank: this process's number.
        world_size: the number of processes; each contrasts its images with the texts of all.
        dist_impl: None, ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``. Value and gradients are the same for
            all of them, and here so is the way: one gather of the texts.

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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_world(rank, world_size)
        _checks.backend(backend)
        self.dist_impl = dist_impl or "bidir"
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
        args = {"logit_scale": logit_scale, "logit_bias": logit_bias, "backend": self.backend}
        loss = contrastive.siglip(image_features, text_features, **args)
        if self.world_size > 1:
            texts = distributed.gather_with_grad(text_features).split(text_features.shape[0])
            others = torch.cat([t for i, t in enumerate(texts) if i != self.rank])
            loss = loss + contrastive.siglip(image_features, others, negative_only=True, **args)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"


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
