"""What ``tools.gpu_measure`` measures: shapes, our calls, the plain losses, and the work that counts as useful.

The order is that of worth: a run that is cut has measured what the bars need first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ffcl_fast import GoodnessLoss, LayerwiseLoss, functional
from ffcl_fast.functional.similarity import normalized

from .gpu_peers import SCALE

PLAIN_LIMIT = 32768  # rows up to which the plain losses, which store N x M, are run beside ours
COMPILED_LIMIT = 8192  # and up to which torch.compile of them is tried: beyond, compiling takes minutes and gigabytes
PANELS_LIMIT = 8192  # rows and columns up to which our plain PyTorch is: it takes half a second at 32768
MILLION = 1 << 20


@dataclass(frozen=True)
class Products:
    """Similarity of (rows, width) with (cols, width): `work` is (forward, both passes) in units of 2 N M D."""

    name: str
    rows: int
    cols: int
    width: int
    work: tuple[float, float]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor] | None = None
    once: bool = False  # too long to repeat
    rivals: bool = True  # whether others are measured beside ours: compiling them all would take the whole of a run

    @property
    def key(self) -> str:
        return f"{self.name} {self.rows}x{self.cols}x{self.width}"

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        def unit(n: int) -> Tensor:
            return F.normalize(torch.randn(n, self.width, device=device), dim=1).bfloat16().requires_grad_()

        return unit(self.rows), unit(self.cols), torch.tensor(SCALE, device=device, requires_grad=True)

    def useful(self) -> tuple[float, float]:
        """Floating-point operations of the forward pass and of both."""
        unit = 2.0 * self.rows * self.cols * self.width
        return self.work[0] * unit, self.work[1] * unit

    def small(self) -> Products:
        return Products(self.name, 32, 32, 16, self.work, self.ours, self.plain)


@dataclass(frozen=True)
class Bytes:
    """Memory-bound work on tensors of `shape`: `reads` is how often (forward, both) they cross the memory bus."""

    name: str
    shape: tuple[int, ...]
    tensors: int
    reads: tuple[float, float]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor] | None = None
    once: bool = field(default=False, init=False)

    @property
    def key(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(self.shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(self.tensors)
        )

    def useful(self) -> tuple[float, float]:
        """Bytes of the forward pass and of both."""
        size = 2.0 * math.prod(self.shape)
        return self.reads[0] * size, self.reads[1] * size

    def small(self) -> Bytes:
        return replace(self, shape=(6, *(4,) * (len(self.shape) - 1)))


@dataclass(frozen=True)
class Layers(Bytes):
    """Memory-bound work on positive and negative samples, `shape` (N,), as ResNet-18 pools each block."""

    @property
    def widths(self) -> tuple[int, ...]:
        return (64, 64, 128, 128, 256, 256, 512, 512) * self.tensors

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        return tuple(torch.randn(self.shape[0], d, device=device).bfloat16().requires_grad_() for d in self.widths)

    def useful(self) -> tuple[float, float]:
        forward, both = super().useful()
        return forward * sum(self.widths), both * sum(self.widths)


Workload = Products | Bytes
WITHOUT_CUDA = ("siglip", "unit rows", "linear goodness")  # workloads whose kernel is written in Triton alone


def by_cuda(workload: Workload) -> Callable[..., Tensor] | None:
    """The workload by the CUDA C++ kernels, where they have it."""
    return None if workload.name in WITHOUT_CUDA else functools.partial(workload.ours, backend="cuda")


def by_auto(workload: Workload) -> Callable[..., Tensor]:
    """The workload by what "auto" takes, where both kinds of kernels have it."""
    return functools.partial(workload.ours, backend="auto")


def by_panels(workload: Workload) -> Callable[..., Tensor] | None:
    """The workload by our plain PyTorch, what `auto` takes where no kernel is confirmed; None where it takes long."""
    if isinstance(workload, Products) and workload.rows * workload.cols > PANELS_LIMIT**2:
        return None
    return functools.partial(workload.ours, backend="panels")


def clip(q: Tensor, k: Tensor, scale: Tensor, backend: str = "triton") -> Tensor:
    return functional.clip(q, k, scale, backend=backend)


def plain_clip(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    s, labels = scale * (q @ k.T).float(), torch.arange(q.shape[0], device=q.device)
    return 0.5 * (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels))


def info_nce(q: Tensor, k: Tensor, scale: Tensor, backend: str = "triton") -> Tensor:
    return functional.similarity_lse(q, k, scale, both=False, backend=backend)[0].mean()


def plain_info_nce(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return (scale * (q @ k.T).float()).logsumexp(1).mean()


def nt_xent(q: Tensor, k: Tensor, scale: Tensor, backend: str = "triton") -> Tensor:
    return functional.nt_xent(*q.chunk(2), 1 / scale, backend=backend)


def plain_nt_xent(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    z, n = F.normalize(q, dim=1), q.shape[0]
    s = (scale * (z @ z.T).float()).masked_fill(torch.eye(n, dtype=torch.bool, device=q.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(n, device=q.device).roll(n // 2))


def sup_con(q: Tensor, k: Tensor, scale: Tensor, backend: str = "triton") -> Tensor:
    labels = torch.arange(q.shape[0] // 2, device=q.device) % 10
    return functional.sup_con(q.unflatten(0, (-1, 2)), labels, backend=backend)


def plain_sup_con(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """As Khosla et al. write it, with a matrix of which pairs are positive."""
    labels = (torch.arange(q.shape[0] // 2, device=q.device) % 10).repeat_interleave(2)
    itself = torch.eye(q.shape[0], dtype=torch.bool, device=q.device)
    s = (q @ q.T).float() / 0.07
    log_probability = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = ((labels[:, None] == labels) & ~itself).float()
    return -((positive * log_probability).sum(1) / positive.sum(1)).mean()


def siglip(q: Tensor, k: Tensor, scale: Tensor, backend: str = "triton") -> Tensor:
    return functional.siglip(q, k, scale, -10.0, backend=backend)


def goodness(h: Tensor, backend: str = "triton") -> tuple[Tensor, Tensor]:
    return functional.goodness_and_normalize(h, relu=True, backend=backend)


def plain_goodness(h: Tensor) -> tuple[Tensor, Tensor]:
    a = h.relu()
    g = a.float().square().sum(1)
    return g, (a / ((g / h.shape[1]).sqrt() + 1e-6)[:, None]).to(h.dtype)


def pair_cosine(h1: Tensor, h2: Tensor, backend: str = "triton") -> Tensor:
    target = torch.ones(h1.shape[0], device=h1.device)
    return functional.pair_cosine(h1, h2, target, backend=backend)


def plain_pair_cosine(h1: Tensor, h2: Tensor) -> Tensor:
    return F.cosine_embedding_loss(h1.flatten(1), h2.flatten(1), torch.ones(h1.shape[0], device=h1.device))


def pool_goodness(h: Tensor, backend: str = "triton") -> tuple[Tensor, Tensor]:
    return functional.pool_goodness(h, "mean_squares", backend=backend)


def plain_pool_goodness(h: Tensor) -> tuple[Tensor, Tensor]:
    pooled = h.mean((2, 3), dtype=torch.float32)
    return pooled.square().mean(1), pooled


@functools.cache
def _layerwise_loss(backend: str) -> LayerwiseLoss:
    return LayerwiseLoss(GoodnessLoss("mean_squares", backend=backend))


def layerwise(*h: Tensor, backend: str = "triton") -> Tensor:
    n = len(h) // 2
    return _layerwise_loss(backend)(h[:n], h[n:])


def plain_layerwise(*h: Tensor) -> Tensor:
    n = len(h) // 2
    good, bad = ([x.float().square().mean(1) for x in side] for side in (h[:n], h[n:]))
    return sum(F.softplus(2 - p).mean() + F.softplus(q - 2).mean() for p, q in zip(good, bad, strict=True)) / 2


def linear_goodness(x: Tensor, weight: Tensor, scale: Tensor, backend: str = "triton") -> Tensor:
    return functional.linear_goodness(x, weight, relu=True, backend=backend)


def plain_linear_goodness(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight).relu().float().square().sum(1)


def unit_rows(x: Tensor, backend: str = "triton") -> Tensor:
    return normalized(x, x.dtype, backend=backend)


def plain_unit_rows(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


CLIP = [(65536, 512), (32768, 512), (32768, 768), (32768, 1024), (4096, 512), (8192, 512), (131072, 512)]
WORKLOADS: tuple[Workload, ...] = (
    *(Products("clip", n, n, d, (1, 4), clip, plain_clip, rivals=d == 512) for n, d in CLIP),
    *(
        Products(name, 32768, 32768, d, work, ours, plain, rivals=d == 128 and name != "clip")
        for d in (128, 256)
        for name, work, ours, plain in (
            ("clip", (1, 4), clip, plain_clip),
            ("nt_xent", (0.5, 2), nt_xent, plain_nt_xent),
            ("sup_con", (0.5, 2), sup_con, plain_sup_con),
        )
    ),
    Bytes("goodness + normalise", (65536, 2048), 1, (2, 5), goodness, plain_goodness),
    Bytes("goodness + normalise", (65536, 4096), 1, (2, 5), goodness, plain_goodness),
    Bytes("pair cosine", (65536, 2048), 2, (2, 4), pair_cosine, plain_pair_cosine),
    Bytes("pair cosine", (64, 64, 56, 56), 2, (2, 4), pair_cosine, plain_pair_cosine),
    Bytes("unit rows", (65536, 512), 1, (2, 5), unit_rows, plain_unit_rows),
    Products("siglip", 65536, 65536, 768, (1, 3), siglip),
    Products("clip, a million", MILLION, MILLION, 512, (1, 4), clip, once=True),
    Products("info_nce", 4096, 65536, 128, (1, 4), info_nce, plain_info_nce),
    Products("info_nce", 8192, 262144, 768, (1, 4), info_nce),
    *(Products("nt_xent", n, n, 128, (0.5, 2), nt_xent) for n in (8192, 131072)),
    Bytes("pool goodness", (64, 64, 56, 56), 1, (1, 2), pool_goodness, plain_pool_goodness),
    Layers("layerwise", (8192,), 2, (1, 3), layerwise, plain_layerwise),
    Products("linear goodness", 32768, 2048, 2048, (1, 4), linear_goodness, plain_linear_goodness),
    *(Products("ragged clip", 30011, 30011, d, (1, 4), clip) for d in (96, 200, 384, 1152)),
)
