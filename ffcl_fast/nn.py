"""Building blocks of networks that train layer by layer, without back-propagation through layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .functional.goodness import check_eps, goodness_and_normalize, goodness_normalize
from .losses.goodness import GoodnessLoss

__all__ = ["ForwardForwardLayer", "goodness_normalize"]


class ForwardForwardLayer(nn.Module):
    """A layer that trains itself: its input is detached and its own optimiser minimises its own loss.

    In training mode, a call with two inputs runs the module on both, takes one optimiser step on the loss of the two
    outputs and returns the outputs, detached, for the next layer; they are those from before the step, so that the
    module runs once. Otherwise it only runs the module, without a gradient for it or its input.

        layer = ForwardForwardLayer(nn.Linear(784, 500), GoodnessLoss("mean_squares"),
                                    lambda p: torch.optim.Adam(p, 1e-3), relu=True, normalize=True)
        h_pos, h_neg = layer(x_pos, x_neg)

    Args:
        module: any module of one tensor. Without trainable parameters it only passes its output through.
        loss: called with the two outputs, and with the target where one is given; returns a 0-dimensional tensor.
        optimizer_factory: makes the optimiser from the module's parameters. Called once, at construction.
        relu: apply ReLU to the module's output, before the loss.
        normalize: divide what goes to the next layer by its root mean square (:func:`goodness_normalize`), so that it
            does not carry this layer's goodness. With a :class:`GoodnessLoss` this, the ReLU and the goodness are one
            pass over the output.
        eps: of that division, > 0.

    Attributes:
        last_loss: the loss of the last training call, detached, or None.
        optimizer: what ``optimizer_factory`` made, or None. Its state is part of the layer's ``state_dict``.

    Not for use inside DistributedDataParallel, which expects one backward pass outside its forward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor],
        optimizer_factory: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        relu: bool = False,
        normalize: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
        for name, value in (("loss", loss), ("optimizer_factory", optimizer_factory)):
            if not callable(value):
                raise TypeError(f"{name} must be callable; got {type(value).__name__}")
        check_eps(eps)
        self.module = module
        self.loss = loss
        self.relu = relu
        self.normalize = normalize
        self.eps = eps
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = optimizer_factory(parameters) if parameters else None
        self.last_loss: Tensor | None = None

    def forward(
        self, x_1: Tensor, x_2: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run on one input, or on two (positive and negative samples, or two views) and train on them.

        Args:
            x_1, x_2: inputs of the module; detached here.
            target: third argument of the loss, or None for a loss of two.

        Returns:
            The detached output for ``x_1``, or both.
        """
        if x_2 is None:
            with torch.no_grad():
                return self._next(self._output(x_1))
        if not self.training or self.optimizer is None:
            with torch.no_grad():
                return self._next(self._output(x_1)), self._next(self._output(x_2))
        with torch.enable_grad():
            return self._train(x_1.detach(), x_2.detach(), target)

    def _train(self, x_1: Tensor, x_2: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = self.loss
        fused = self.normalize and isinstance(loss, GoodnessLoss) and target is None and (self.relu or not loss.relu)
        if fused:
            h_1, h_2 = self.module(x_1), self.module(x_2)
            options = dict(eps=self.eps, relu=self.relu, backend=loss.backend)
            g_1, next_1 = goodness_and_normalize(h_1, loss.goodness, **options)
            g_2, next_2 = goodness_and_normalize(h_2, loss.goodness, **options)
            value = loss.of_goodness(g_1, g_2, h_1[0].numel())
        else:
            next_1, next_2 = self._output(x_1), self._output(x_2)
            value = loss(next_1, next_2, *(() if target is None else (target,)))
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        self.last_loss = value.detach()
        next_1, next_2 = next_1.detach(), next_2.detach()
        return (next_1, next_2) if fused else (self._next(next_1), self._next(next_2))

    def _output(self, x: Tensor) -> Tensor:
        h = self.module(x)
        return torch.relu(h) if self.relu else h

    def _next(self, h: Tensor) -> Tensor:
        return goodness_normalize(h, self.eps) if self.normalize else h

    def get_extra_state(self) -> Any:
        return None if self.optimizer is None else self.optimizer.state_dict()

    def set_extra_state(self, state: Any) -> None:
        if self.optimizer is not None and state is not None:
            self.optimizer.load_state_dict(state)

    def extra_repr(self) -> str:
        return f"relu={self.relu}, normalize={self.normalize}"
