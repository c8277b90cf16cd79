"""Several processes train as one does on all their batches: torchrun starts them, Lightning Fabric connects them.

Exactly as one: BatchNorm takes its statistics over all processes, contrastive losses their negatives, and gradients are
averaged after every step. Not DistributedDataParallel, which expects one backward pass outside the forward pass: the
local stage has one for every layer inside it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ffcl_fast import distributed

from .config import Config
from .errors import UserError


def device_for(config: Config) -> torch.device:
    """The device that ``config.device`` names. Raises UserError for cuda where there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def join(backend: str, timeout: datetime.timedelta | None = None) -> bool:
    """Join torchrun's process group; False where there is none to join, or the caller has joined."""
    if dist.is_initialized() or "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    limit = {} if timeout is None else {"timeout": timeout}
    # torchrun keeps its store over restarts: without a prefix of its own a restarted process may read where another one
    # listened before the restart, and fails to connect to it.
    store, rank, world = next(dist.rendezvous("env://", **limit))
    store = dist.PrefixStore(f"ffcl/restart/{restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, **limit)
    return True


def restarts() -> int:
    """How often torchrun has started its processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def fabric_for(config: Config) -> Any:
    """A launched Fabric for this process: its device, precision and place among torchrun's processes.

    gloo connects processes on CPUs, NCCL those on GPUs. Raises UserError where there are fewer GPUs than processes.
    """
    from lightning_fabric import Fabric

    device = device_for(config)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    options: dict[str, Any] = {"accelerator": device.type, "precision": "bf16-mixed" if bf16 else "32-true"}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if device.type == "cuda" and torch.cuda.device_count() < local:
            raise UserError(f"device {config.device}: {torch.cuda.device_count()} GPUs for {local} processes")
        join("nccl" if device.type == "cuda" else "gloo")
        fabric = Fabric(devices=local, num_nodes=world // local, strategy="ddp", **options)
    else:
        fabric = Fabric(devices=1, **options)
    fabric.launch()
    return fabric


class _Sum(torch.autograd.Function):
    """The sum over processes; so is its gradient, since the loss of each depends on the sum."""

    @staticmethod
    def forward(ctx, x):
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over processes, differentiable; without gradients (in validation) and alone ``x`` itself."""
    world = distributed.world_size()
    return x if world == 1 or not torch.is_grad_enabled() else _Sum.apply(x) / world


def everyone(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows of all processes, with gradients where they have them; as they are in validation and alone.

    A loss of these rows is the same in every process, and its parameters' gradients are right once averaged.
    """
    if distributed.world_size() == 1 or not torch.is_grad_enabled():
        return tensors
    return tuple(distributed.gather_with_grad(x) if x.is_floating_point() else distributed.gather(x) for x in tensors)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, in one message."""
    world = distributed.world_size()
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world == 1 or not gradients:
        return
    flat = torch.cat([g.reshape(-1).float() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def average_scalars(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over processes, in one message."""
    if distributed.world_size() == 1:
        return scalars
    values = torch.stack([value.double() for value in scalars.values()])
    dist.all_reduce(values)
    return dict(zip(scalars, values / distributed.world_size(), strict=True))


def same_weights(network: nn.Module) -> None:
    """Give every process the tensors of the first."""
    if distributed.world_size() > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def share(batches: list[list[int]]) -> list[list[int]]:
    """This process's part of every batch, as long as everyone's: up to world - 1 samples of a batch are left out."""
    world, rank = distributed.world_size(), distributed.rank()
    parts = [batch[rank : len(batch) // world * world : world] for batch in batches]
    return [part for part in parts if part]


def synchronized() -> AbstractContextManager:
    """Within it, BatchNorm in training takes its statistics over all processes, whatever module asks for it.

    ``torch.nn.SyncBatchNorm`` would be one class of module, and for GPUs only.
    """
    return _SyncedBatchNorm() if distributed.world_size() > 1 else nullcontext()


class _SyncedBatchNorm(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm and kwargs["training"]:  # it hands on three arguments by place and the rest by name
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` in training; every process has as many samples, so a mean of means is one."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    h = x.float()
    mu = mean(h.mean(dims))
    centred = h - mu.view(shape)
    var = mean(centred.square().mean(dims))
    if running_mean is not None:
        count = x.numel() // x.shape[1] * distributed.world_size()
        with torch.no_grad():
            running_mean.lerp_(mu.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
    out = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    return out.to(x.dtype)
