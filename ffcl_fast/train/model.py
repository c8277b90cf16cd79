"""Backbones by name from torchvision or timm, made fit for one grey channel, and the classifier on top."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .config import Config
from .errors import UserError

SMALL_STEM_SIZE = 16  # up to this image size, a stride-4 stem would leave less than 4 x 4 to the first block


class Classifier(nn.Module):
    """``backbone``: (N, 1, S, S) to (N, F); ``head``: (N, F) to one logit for two classes, else to one a class."""

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = features
        self.outputs = 1 if classes == 2 else classes
        self.head = nn.Linear(features, self.outputs)

    def new_head(self) -> None:
        """A freshly drawn head, on the backbone's device."""
        self.head.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def build(
    config: Config,
    image_size: int,
    classes: int,
    backbone: nn.Module | None = None,
    initialise: bool = True,
    log: Callable[[str], None] | None = None,
) -> Classifier:
    """The classifier of a run, its weights drawn from the global generator and then, to ``initialise``, as
    ``config.init`` says.

    backbone: a module of the caller's own, (N, 1, S, S) to (N, F), in place of ``config.backbone``.
    log: called with a line on how much of a weight file was used.
    Raises UserError for an unknown name, a backbone that cannot take such images, or weights that cannot be read.
    """
    from . import weights

    own = backbone is not None
    if backbone is None:
        backbone = _named(config, pretrained=initialise and config.init == "imagenet")
        _grey_stem(backbone, config, image_size)
    what = type(backbone).__name__ if own else config.backbone
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            output = backbone(torch.zeros(2, 1, image_size, image_size))
    except Exception as error:  # any of the library's many complaints about sizes
        raise UserError(f"backbone {what}: cannot take {image_size} x {image_size} images ({error})") from None
    backbone.train(was_training)
    if not isinstance(output, Tensor):
        raise UserError(f"backbone {what}: expected one (N, features) tensor from it, got a {type(output).__name__}")
    shape = output.shape
    if len(shape) != 2 or shape[0] != 2:
        raise UserError(f"backbone {what}: expected (N, features) from it, got {tuple(shape)} for N = 2")
    if initialise and "downstream" in config.stages and 1 in (config.batch_size, config.epoch_samples):
        _check_single(backbone, what, image_size, "batch_size" if config.batch_size == 1 else "epoch_samples")
    network = Classifier(backbone, shape[1], classes)
    if initialise and config.init not in ("random", "imagenet"):
        found = weights.load_into(backbone, config.init)
        if log is not None:
            log(found)
    return network


def _check_single(backbone: nn.Module, what: str, image_size: int, setting: str) -> None:
    """UserError that names ``setting`` where the backbone cannot train on a batch of one image: BatchNorm cannot on a
    single 1 x 1 activation. Told before the stages that train on pairs, which would succeed."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            copy.deepcopy(backbone).train()(torch.zeros(1, 1, image_size, image_size))
        except ValueError as error:
            images = f"single {image_size} x {image_size} images"
            raise UserError(f"{setting} 1: {what} cannot train on {images} ({error}); use 2 or more") from None


def check_backbone(config: Config) -> None:
    """UserError for a backbone that no library has or weights that are not there, before anything is built."""
    from . import weights

    _library(config)
    if config.init not in ("random", "imagenet"):
        weights.require(config.init)


def _library(config: Config) -> str:
    """Which library has ``config.backbone``: torchvision where both do and none is named."""
    library, _, name = config.backbone.rpartition("/")
    if library not in ("", "timm", "torchvision"):
        raise UserError(f"backbone {config.backbone!r}: expected NAME, timm/NAME or torchvision/NAME")
    if library != "timm":
        import torchvision.models as vision

        if name in vision.list_models(module=vision):
            return "torchvision"
    if library != "torchvision":
        import timm

        if timm.is_model(name):
            return "timm"
    raise UserError(f"backbone {config.backbone!r}: torchvision and timm have no classification model of that name")


def _named(config: Config, pretrained: bool) -> nn.Module:
    """The model of that name without its classifier."""
    library, name = _library(config), config.backbone.rpartition("/")[2]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry; what failed is told below
    try:
        if library == "timm":
            import timm

            return timm.create_model(name, pretrained=pretrained, num_classes=0)
        import torchvision.models as vision

        return _headless(vision.get_model(name, weights="DEFAULT" if pretrained else None))
    except Exception as error:
        if not pretrained:
            raise UserError(f"backbone {config.backbone}: cannot be built ({error})") from None
        raise UserError(
            f"init imagenet: the weights of {config.backbone} could not be had ({error});"
            " give a local file with --init FILE"
        ) from None


def _headless(model: nn.Module) -> nn.Module:
    """torchvision has no switch for it: the last linear layer, the classifier in all its models, becomes nothing."""
    name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    _replace(model, name, nn.Identity())
    if hasattr(model, "aux_logits"):
        model.aux_logits = False  # GoogLeNet and Inception return a tuple in training otherwise
    return model


def _grey_stem(model: nn.Module, config: Config, image_size: int) -> None:
    """A new first convolution for one channel, and in a ResNet the small stem where asked for."""
    name, conv = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), (None, None))
    if name is None:
        raise UserError(f"backbone {config.backbone}: has no convolution to give one input channel")
    small = config.stem == "small" or (config.stem == "auto" and image_size <= SMALL_STEM_SIZE)
    can_be_small = isinstance(getattr(model, "maxpool", None), nn.Module) and name == "conv1"
    if config.stem == "small" and not can_be_small:
        raise UserError(f"stem small: only for ResNets (conv1 and maxpool), not for {config.backbone}")
    small = small and can_be_small
    new = nn.Conv2d(
        1,
        conv.out_channels,
        3 if small else conv.kernel_size,
        1 if small else conv.stride,
        1 if small else conv.padding,
        bias=conv.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNet draws it
    _replace(model, name, new)
    if small:
        model.maxpool = nn.Identity()


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def block_names(backbone: nn.Module, layers: Sequence[str] | None = None) -> list[str]:
    """Names of the layers that the local stage trains, in order of depth.

    Blocks are the composite members of the backbone's sequential stages: residual blocks in ResNets, inverted
    residuals in MobileNets and EfficientNets, transformer blocks. ``layers`` names others.
    Raises UserError where there is no block, or a name in ``layers`` is not the backbone's.
    """
    modules = dict(backbone.named_modules())
    if layers is not None:
        for name in layers:
            if name not in modules:
                raise UserError(f"layers: the backbone has no module {name!r}")
        return list(layers)
    found: list[str] = []
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]] if name else None
        inside = any(name.startswith(block + ".") for block in found)
        composite = any(True for _ in module.children()) and not isinstance(module, nn.Sequential | nn.ModuleList)
        if isinstance(parent, nn.Sequential | nn.ModuleList) and composite and not inside:
            found.append(name)
    if not found:
        raise UserError("local_layers blocks: the backbone has no residual or other blocks; use --local-layers leaves")
    return found
