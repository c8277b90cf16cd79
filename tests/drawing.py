"""What the property tests draw: shapes, dtypes, memory layouts, magnitudes, devices and backends.

In `make test` the draws are the same on every run, so that it cannot fail by chance; `FFCL_EXAMPLES=100` (in
`make test-long`) draws that many others for each test.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from ffcl_fast import backends

EXAMPLES = int(os.environ.get("FFCL_EXAMPLES", "0"))
_health = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
drawn = settings(
    max_examples=EXAMPLES or 12,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=_health,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "every second", "inside", "expanded")
# Powers of two, so that a result can be brought back to the usual size without a rounding. float16 has fewer: the
# gradient of what is normalised is as large as the row is short, and ends at 65504.
POWERS = {torch.float32: (-13, -7, 0, 5), torch.bfloat16: (-13, -7, 0, 5), torch.float16: (-4, 0, 5)}
ROW_POWERS = {torch.float32: 5, torch.bfloat16: 5, torch.float16: 2}

sizes = st.one_of(st.integers(1, 4), st.integers(5, 40), st.sampled_from((95, 96, 97, 130)))
widths = st.one_of(st.integers(1, 4), st.integers(5, 70), st.sampled_from((127, 128, 129, 384)))
shapes_of_maps = st.one_of(
    st.tuples(sizes, widths), st.tuples(st.integers(1, 9), st.integers(1, 33), st.integers(1, 9), st.integers(1, 9))
)
dtypes = st.sampled_from(DTYPES)
scales = st.sampled_from((0.1, 1.0, 5.0, 14.0, 50.0, 100.0))
reductions = st.sampled_from(("mean", "sum", "none"))


@st.composite
def tensors(
    draw: st.DrawFn,
    *shapes: tuple[int, ...],
    dtype: torch.dtype,
    unit: bool = False,
    device: str = "cpu",
    any_size: bool = False,
    by: tuple[float, ...] = (),
) -> list[Tensor]:
    """Random tensors of these shapes in any memory layout, each times its number in ``by``.

    ``any_size``: each of a magnitude of its own, and half of them with rows of theirs.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = []
    for shape, factor in zip(shapes, by or [1.0] * len(shapes), strict=True):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = factor * (F.normalize(x, dim=-1) if unit else x)
        if any_size:
            x = x * 2.0 ** draw(st.sampled_from(POWERS[dtype]))
            if draw(st.booleans()):
                most = ROW_POWERS[dtype]
                powers = torch.randint(-most, most + 1, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
                x = x * 2.0**powers
        x = x.to(device, dtype)
        layout = draw(st.sampled_from(LAYOUTS))
        if layout == "transposed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "every second":
            wide = x.new_full((*shape[:-1], 2 * shape[-1]), torch.nan)
            wide[..., ::2] = x
            x = wide[..., ::2]
        elif layout == "inside":
            wide = x.new_full((*shape[:-1], shape[-1] + 5), torch.nan)
            wide[..., 2:-3] = x
            x = wide[..., 2:-3]
        elif layout == "expanded":
            x = x[:1].expand(shape)
        found.append(x)
    return found


def powers(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """The powers of two nearest to the root mean squares of ``x`` along ``dim``, float32; 1 for zeros.

    What a gradient is multiplied by, or a value divided by, to be of the usual size, exactly.
    """
    size = x.detach().double().square().mean(dim, keepdim=True).sqrt()
    return torch.where(size > 0, 2.0 ** size.clamp_min(1e-30).log2().round(), 1.0).float()


def opposed(data, dtype: torch.dtype) -> tuple[float, float]:
    """Powers of two whose product is 1: what two sides may be multiplied by without a change of their products."""
    power = data.draw(st.sampled_from((-3, 0, 3) if dtype == torch.float16 else (-9, 0, 9)))
    return 2.0**power, 2.0**-power


def integers(data, count: int, low: int, high: int, device: str = "cpu") -> Tensor:
    """(count,) integers between low and high, both included."""
    return torch.tensor(data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), device=device)


@functools.cache
def _places(op: str) -> list[tuple[str, str]]:
    found = []
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        x = torch.zeros(1, 16, device=device)
        names = ("cpu", "panels", "reference") if device == "cpu" else ("triton", "cuda", "panels")
        able = [name for name in names if backends.load(name).unavailable(op, x) is None]
        found += [(device, name) for name in ("auto", *able)]
    return found


def places(op: str) -> st.SearchStrategy[tuple[str, str]]:
    """(device, backend) of what runs ``op`` on this machine, GPUs first where there are any."""
    return st.sampled_from(_places(op)[::-1])
