"""Local training: cut a network's graph at its layers, each trained by its own loss on a detached input.

One layer's graph is alive at a time: a layer's loss is back-propagated, and its graph freed, before the next runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

# Called with a layer's name and activation, in order of depth; back-propagates it when training. Returns what the next
# layer gets, if not the activation itself.
Visit = Callable[[str, Tensor], Tensor | None]

GOODNESS = "goodness of "  # and a layer's name: its mean of squares in the records of a validation
_SHORTCUTS = ("downsample", "shortcut")  # what ResNets call the convolution beside a block


class BlockWalk:
    """Layers are named blocks of the network, skip connections included; what runs between two of them counts to the
    later one. ``stem`` is all before the first block and ``tail`` all after the last, where that has parameters
    (told by the order in which modules are registered)."""

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        self.backbone = backbone
        self.names = list(names)
        parameters = [name for name, _ in backbone.named_parameters()]
        self.has_stem = bool(parameters) and not parameters[0].startswith(self.names[0] + ".")
        self.has_tail = bool(parameters) and not parameters[-1].startswith(self.names[-1] + ".")
        self.layers = ["stem"] * self.has_stem + self.names + ["tail"] * self.has_tail
        self.before_relu: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def _cuts(self, visit: Visit) -> Iterator[None]:
        def before_first(module: nn.Module, args: tuple) -> tuple:
            x = args[0]
            if self.has_stem:
                x = _handed_on(visit("stem", x), x)
            return (x.detach(), *args[1:])

        def after(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                if not isinstance(output, Tensor):
                    raise UserError(
                        f"layers: {name} returns a {type(output).__name__}, but the local stage needs one tensor from"
                        " each layer; name other modules as layers"
                    )
                return _handed_on(visit(name, output), output).detach()

            return hook

        blocks = [self.backbone.get_submodule(name) for name in self.names]
        handles = [blocks[0].register_forward_pre_hook(before_first)]
        handles += [block.register_forward_hook(after(name)) for name, block in zip(self.names, blocks, strict=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, x: Tensor, visit: Visit, raw: bool = False) -> None:
        with self._cuts(visit):
            output = self.backbone(x)
        if self.has_tail:
            visit("tail", output)


def _handed_on(replaced: Tensor | None, activation: Tensor) -> Tensor:
    return activation if replaced is None else replaced


class LeafWalk:
    """Layers are the leaf modules in the order they run, one after another as if there were no skip connections.

    As in FFCL's notebook: a convolution's (or linear layer's) output passes ReLU before its loss, a BatchNorm has its
    own loss, modules without parameters only pass data on, and shortcut convolutions get no update.
    What goes on to the next module is the module's own output, as in the whole network. A ``raw`` walk leaves the ReLU
    to the visitor: ``before_relu`` names the layers that it is for.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.leaves = [
            (name, module)
            for name, module in backbone.named_modules()
            if not any(True for _ in module.children()) and not any(part in _SHORTCUTS for part in name.split("."))
        ]
        self.layers = [name for name, module in self.leaves if any(True for _ in module.parameters())]
        self.before_relu = frozenset(n for n, module in self.leaves if isinstance(module, nn.Conv2d | nn.Linear))

    def __call__(self, x: Tensor, visit: Visit, raw: bool = False) -> None:
        for name, module in self.leaves:
            try:
                x = module(x.detach())
            except (RuntimeError, ValueError, TypeError) as error:
                raise UserError(
                    f"local_layers leaves: {name} does not follow on the module before it ({error}); use blocks"
                ) from None
            if not isinstance(x, Tensor):
                raise UserError(f"local_layers leaves: {name} returns a {type(x).__name__}, not one tensor; use blocks")
            if any(True for _ in module.parameters()):
                x = _handed_on(visit(name, F.relu(x) if name in self.before_relu and not raw else x), x)
            if isinstance(module, nn.AdaptiveAvgPool2d):
                x = torch.flatten(x, 1)


def walk(backbone: nn.Module, local_layers: str, names: Sequence[str] | None = None) -> BlockWalk | LeafWalk:
    """The walk that ``config.local_layers`` names; ``names`` are layers of the caller's own choice."""
    from .model import block_names

    if local_layers == "leaves":
        return LeafWalk(backbone)
    return BlockWalk(backbone, block_names(backbone, names))
