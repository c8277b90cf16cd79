"""A training step whose batch is larger than the encoder's activations allow: gradients by chunks, one loss over all.

The method of GradCache (Gao et al. 2021, arXiv 2101.06983): encode in chunks without a graph, one loss over all
embeddings gives their gradients, then encode every chunk again, with a graph and the same random numbers, and send its
part of the gradients through. The encoder runs forward twice; activations of one chunk live at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def cached_step(
    encoders: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    loss: Callable[..., Tensor],
    chunk_size: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Forward and backward of ``loss(encoder(inputs[0]), encoder(inputs[1]), ...)``; gradients add up in ``.grad``.

    Equal to the plain step that encodes the same chunks, keeps every graph and calls ``backward`` once: dropout draws
    the same numbers, and random state and buffers (BatchNorm's statistics) end as after one forward pass. An encoder
    whose rows depend on each other (BatchNorm in training) sees a chunk where a plain step shows it the whole batch.

    Works under autocast (call it inside the ``with``; backward runs outside of it, as it should) and with encoders
    wrapped in DistributedDataParallel, whose gradients are averaged once, with the last chunk. Parameters that only the
    loss uses may belong to a wrapped encoder or to none; averaging the latter over processes is the loss's part
    (``distributed=`` of this library's losses does it). An encoder that talks to other processes in its forward pass
    (SyncBatchNorm) needs as many chunks on every process, else it waits for one that has no more: give every process as
    many samples. Frozen encoders are allowed, as long as one of the encoders or the loss learns.

    Args:
        encoders: one for all inputs (SimCLR), or one an input (CLIP); each returns embeddings (n, ...).
        inputs: what each embedding is made of: a tensor, a tuple of arguments or a dict of keyword arguments, whose
            tensors have the samples as their first dimension; what is no tensor is passed on as it is.
        loss: takes the embeddings of all samples, one argument an input, and returns a scalar.
        chunk_size: samples encoded at a time, at most; the chunks of an input are as even as they can be.
        scaler: its ``scale`` multiplies the loss before backward.

    Returns:
        The loss (), detached and not scaled.

    Raises:
        ValueError: a chunk size below 1, no inputs, encoders of another number, or inputs without a tensor or with
            tensors of different lengths, before anything is computed; or nothing that gets a gradient.
    """
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
    if not inputs:
        raise ValueError("inputs must not be empty: one entry for each embedding")
    encoders = [encoders] * len(inputs) if callable(encoders) else list(encoders)
    if len(encoders) != len(inputs):
        raise ValueError(f"encoders must be one, or one for each of the {len(inputs)} inputs; got {len(encoders)}")
    work: list[tuple[Any, Any]] = [
        (encoder, chunk)
        for i, (encoder, x) in enumerate(zip(encoders, inputs, strict=True))
        for chunk in _chunks(x, chunk_size, i)
    ]
    count = [sum(1 for _ in _chunks(x, chunk_size, i)) for i, x in enumerate(inputs)]
    devices = _devices(inputs, encoders)

    states, embeddings = [], []
    with torch.no_grad(), _buffers_kept(encoders), _no_sync(encoders):
        for encoder, chunk in work:
            states.append(_random_state(devices))
            embeddings.append(_call(encoder, chunk))
    rows = [x.shape[0] for x in embeddings]
    after = _random_state(devices)
    torch.clear_autocast_cache()  # it holds casts of the weights that were made without a graph

    parts = iter(embeddings)
    leaves = [torch.cat([next(parts) for _ in range(n)]).requires_grad_() for n in count]
    del embeddings, parts
    with _no_sync(encoders):
        value = loss(*leaves)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError("loss must return one number")
        parameters = _leaves_of(value)
        with _no_autocast(devices):
            (value if scaler is None else scaler.scale(value)).backward()
    value = value.detach()
    finished = _random_state(devices) if _differs(after, _random_state(devices)) else after

    gradients: list[Tensor | None] = []
    for leaf, n in zip(leaves, count, strict=True):
        sizes = rows[len(gradients) : len(gradients) + n]
        gradients += leaf.grad.split(sizes) if leaf.grad is not None else [None] * n
    last = {id(encoder): i for i, (encoder, _) in enumerate(work)}
    learns = bool(parameters - {id(leaf) for leaf in leaves})
    for i, ((encoder, chunk), grad, state) in enumerate(zip(work, gradients, states, strict=True)):
        final = last[id(encoder)] == i
        with contextlib.nullcontext() if final else _no_sync([encoder]):
            _restore(state)
            output = _call(encoder, chunk)
            learns |= output.requires_grad
            roots: list[Tensor] = []
            grads: list[Tensor] = []
            if output.requires_grad:  # not of a frozen encoder
                roots, grads = [output], [torch.zeros_like(output) if grad is None else grad]
            of_loss = []
            if final and isinstance(encoder, DistributedDataParallel):
                of_loss = [p for p in encoder.parameters() if id(p) in parameters]
            if of_loss and not encoder.find_unused_parameters:
                # what only the loss used has its gradient already: DDP waits to hear of it, and averages it
                roots += [p.expand_as(p) for p in of_loss]
                grads += [torch.zeros_like(p) for p in of_loss]
            with _no_autocast(devices):
                if roots:
                    torch.autograd.backward(roots, grads)
            if of_loss and encoder.find_unused_parameters:  # DDP has counted them as unused and left them alone
                for parameter in of_loss:
                    dist.all_reduce(parameter.grad, group=encoder.process_group)
                    parameter.grad /= dist.get_world_size(encoder.process_group)
    _restore(finished)
    torch.clear_autocast_cache()
    if not learns:
        raise ValueError("encoders must have a parameter that requires a gradient, where the loss has none: got none")
    return value


def _tensors(x: Any) -> list[Tensor]:
    values = [x] if isinstance(x, Tensor) else (x.values() if isinstance(x, Mapping) else x)
    return (
        [v for v in values if isinstance(v, Tensor) and v.dim()]
        if isinstance(x, Tensor | Mapping | tuple | list)
        else []
    )


def _chunks(x: Any, size: int, number: int) -> Iterator[Any]:
    lengths = {t.shape[0] for t in _tensors(x)}
    if len(lengths) != 1 or 0 in lengths:
        found = f"lengths {sorted(lengths)}" if lengths else "none"
        raise ValueError(f"inputs[{number}] must hold tensors of one length of at least 1; got {found}")
    length = lengths.pop()

    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() else value

    # even parts, no last chunk of one sample, on which BatchNorm could not train
    parts = -(-length // size)
    for i in range(parts):
        rows = slice(i * length // parts, (i + 1) * length // parts)
        if isinstance(x, Tensor):
            yield cut(x)
        elif isinstance(x, Mapping):
            yield {key: cut(value) for key, value in x.items()}
        else:
            yield tuple(cut(value) for value in x)


def _call(encoder: Callable[..., Tensor], chunk: Any) -> Tensor:
    if isinstance(chunk, Tensor):
        output = encoder(chunk)
    elif isinstance(chunk, Mapping):
        output = encoder(**chunk)
    else:
        output = encoder(*chunk)
    if not isinstance(output, Tensor):
        raise TypeError(f"encoders must return a tensor of embeddings, got {type(output).__name__}")
    return output


def _devices(inputs: Sequence[Any], encoders: Sequence[Callable]) -> set[torch.device]:
    """Where random numbers may be drawn: an encoder may move its inputs to where its weights are."""
    tensors = [t for x in inputs for t in _tensors(x)]
    for encoder in encoders:
        if isinstance(encoder, nn.Module):
            tensors += [*encoder.parameters(), *encoder.buffers()]
    return {torch.device("cpu")} | {t.device for t in tensors}


def _random_state(devices: set[torch.device]) -> list[tuple[torch.device, Tensor]]:
    return [
        (d, torch.get_rng_state() if d.type == "cpu" else getattr(torch, d.type).get_rng_state(d))
        for d in devices
        if d.type == "cpu" or hasattr(getattr(torch, d.type, None), "get_rng_state")
    ]


def _restore(states: list[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            getattr(torch, device.type).set_rng_state(state, device)


def _differs(a: list[tuple[torch.device, Tensor]], b: list[tuple[torch.device, Tensor]]) -> bool:
    return any(not torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


def _leaves_of(value: Tensor) -> set[int]:
    """ids of the leaf tensors that ``value``'s graph ends in."""
    found: set[int] = set()
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return found


@contextlib.contextmanager
def _no_sync(encoders: Sequence[Callable]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for encoder in {id(e): e for e in encoders}.values():
            if isinstance(encoder, DistributedDataParallel):
                stack.enter_context(encoder.no_sync())
        yield


@contextlib.contextmanager
def _buffers_kept(encoders: Sequence[Callable]) -> Iterator[None]:
    """Buffers move once a step, in the second pass."""
    modules = {id(e): e for e in encoders if isinstance(e, nn.Module)}.values()
    buffers = {id(b): b for module in modules if module.training for b in module.buffers()}.values()
    before = [(b, b.clone()) for b in buffers]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextlib.contextmanager
def _no_autocast(devices: set[torch.device]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in {d.type for d in devices}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
