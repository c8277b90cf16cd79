"""Global average pool of (N, C, L) in either memory order, with ReLU before it, and the goodness of the result.

One read of h, and N x C floats out. Where there are samples enough, a program pools a whole one and squares what it
pooled; else a sample's tiles are shared out and a second launch adds their sums, in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ... import ops
from . import config
from .config import cdiv, next_power_of_2
from .launch import Launch, kinds, on, planned, processors
from .rows import TILE, activation, floats, rounding, store_gradient, vector_unit, warps_for
from .tiles import elements_apart

FILL = 8  # programs a multiprocessor that keep enough loads in flight


@dataclass(frozen=True)
class Maps:
    """Tiles of a sample, channels x positions, and how many programs share its channels and its positions."""

    last: bool  # channels are the dense dimension
    channels: int
    positions: int
    warps: int
    unit: int  # elements a thread may load at once
    channel_parts: int
    position_parts: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.positions} w{self.warps}{' NLC' if self.last else ' NCL'}"

    @property
    def constants(self) -> dict:
        return {"LAST": self.last, "CHANNELS": self.channels, "POSITIONS": self.positions, "UNIT": self.unit}

    @property
    def options(self) -> dict:
        return {"num_warps": self.warps}


def maps(rows: int, channels: int, length: int, last: bool, unit: int, chip: str, chip_processors: int) -> Maps:
    """The cut of (rows, channels, length) maps: tiles long in the dense dimension, programs enough to fill the chip."""
    # Loads of one element each need an address each: fewer of them a thread.
    tile, longest = (256, 32) if chip == "interpret" else (TILE if unit > 1 else TILE // 4, 512)
    dense, other = (channels, length) if last else (length, channels)
    side = min(longest, next_power_of_2(dense))
    across = min(tile // side, next_power_of_2(other))
    c, p = (side, across) if last else (across, side)
    channel_tiles, position_tiles = cdiv(channels, c), cdiv(length, p)
    wanted = cdiv(FILL * chip_processors, rows)
    if wanted <= FILL // 2:
        wanted = 1
    channel_parts = _even(channel_tiles, wanted)
    position_parts = _even(position_tiles, cdiv(wanted, channel_parts))
    return Maps(last, c, p, warps_for(TILE, chip), unit, channel_parts, position_parts)


def _even(tiles: int, parts: int) -> int:
    """Parts of at least one and equally many tiles, at most `parts` of them."""
    return cdiv(tiles, cdiv(tiles, min(tiles, parts)))


def maps_of(kinds: tuple) -> Maps:
    device, (dtype, (rows, channels, length), (step, _, dense), _), *_ = kinds
    last = dense != 1
    unit = vector_unit(dtype, channels if last else length, step)
    return maps(rows, channels, length, last, unit, config.family(device), processors(device))


@triton.jit
def sizes(channels, length, LAST: tl.constexpr, UNIT: tl.constexpr):
    """(C, L) from kernel arguments, the dense one of which counts UNIT elements."""
    if LAST:
        c, n = channels * UNIT, length
    else:
        c, n = channels, length * UNIT
    return c, n


@triton.jit
def places(channel, position, c, n, LAST: tl.constexpr):
    """(offsets, mask) of a tile within its sample, the dense dimension last."""
    if LAST:
        at = position.to(tl.int64)[:, None] * c + channel[None, :]
        mask = (position < n)[:, None] & (channel < c)[None, :]
    else:
        at = channel.to(tl.int64)[:, None] * n + position[None, :]
        mask = (channel < c)[:, None] & (position < n)[None, :]
    return at, mask


# How it works: a program walks its channels by its positions, CHANNELS x POSITIONS a step, and adds along positions in
# registers. WHOLE: it has all of a sample, so it writes means and goodness; else sums, one slot a share of positions.
# Bound by memory: one read; feature maps of odd size (7 x 7) are read an element a thread.
@triton.jit(do_not_specialize=["channel_parts", "position_parts", "channel_tiles", "position_tiles"])
def pool_kernel(h, goodness, pooled, channels, length, sample_step, channel_parts, position_parts, channel_tiles,
                position_tiles, inverse_length, goodness_factor, UNIT: tl.constexpr, CHANNELS: tl.constexpr,
                POSITIONS: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr, RELU: tl.constexpr):
    pid = tl.program_id(0)
    sample = (pid // (channel_parts * position_parts)).to(tl.int64)
    share = (pid % position_parts).to(tl.int64)
    c, n = sizes(channels, length, LAST, UNIT)
    source = h + sample * elements_apart(sample_step, UNIT)
    first = pid // position_parts % channel_parts * channel_tiles
    squares = tl.zeros((CHANNELS,), dtype=tl.float32)
    for i in range(first, first + channel_tiles):
        channel = i * CHANNELS + tl.arange(0, CHANNELS)
        if LAST:
            total = tl.zeros((POSITIONS, CHANNELS), dtype=tl.float32)
        else:
            total = tl.zeros((CHANNELS, POSITIONS), dtype=tl.float32)
        for j in range(0, position_tiles):
            position = (share * position_tiles + j) * POSITIONS + tl.arange(0, POSITIONS)
            at, mask = places(channel, position, c, n, LAST)
            total += activation(source + at, mask, RELU)
        if LAST:
            sums = tl.sum(total, 0)
        else:
            sums = tl.sum(total, 1)
        if WHOLE:
            sums *= inverse_length
            squares += sums * sums
        tl.store(pooled + (sample * position_parts + share) * c + channel, sums, mask=channel < c)
    if WHOLE:
        tl.store(goodness + sample, tl.sum(squares, 0) * goodness_factor)


# How it works: a program adds a sample's shares in their order, CHANNELS at a time, and squares the means.
# Bound by latency: a few kilobytes a sample.
@triton.jit(do_not_specialize=["shares"])
def pool_finish_kernel(sums, goodness, pooled, c, shares, inverse_length, goodness_factor, CHANNELS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, c, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        mask = channel < c
        total = tl.zeros((CHANNELS,), dtype=tl.float32)
        for share in range(0, shares):
            total += tl.load(sums + (sample * shares + share) * c + channel, mask=mask, other=0.0)
        total *= inverse_length
        tl.store(pooled + sample * c + channel, total, mask=mask)
        squares += total * total
    tl.store(goodness + sample, tl.sum(squares, 0) * goodness_factor)


# How it works: a program writes one tile: a channel's gradient at all its positions, nothing where ReLU gave zero.
# Bound by memory: one write, and one read of h where ReLU needs its sign.
@triton.jit(do_not_specialize=["channel_tiles", "position_tiles"])
def pool_backward_kernel(h, pooled, grad_goodness, grad_pooled, dh, channels, length, sample_step, channel_tiles,
                         position_tiles, inverse_length, goodness_factor, UNIT: tl.constexpr, CHANNELS: tl.constexpr,
                         POSITIONS: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr):
    pid = tl.program_id(0)
    sample = (pid // (channel_tiles * position_tiles)).to(tl.int64)
    c, n = sizes(channels, length, LAST, UNIT)
    channel = pid // position_tiles % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    position = pid % position_tiles * POSITIONS + tl.arange(0, POSITIONS)
    at, mask = places(channel, position, c, n, LAST)
    grad = tl.zeros((CHANNELS,), dtype=tl.float32)
    if grad_goodness is not None:
        p = tl.load(pooled + sample * c + channel, mask=channel < c, other=0.0)
        grad += tl.load(grad_goodness + sample) * goodness_factor * 2.0 * p
    if grad_pooled is not None:
        grad += tl.load(grad_pooled + sample * c + channel, mask=channel < c, other=0.0)
    grad *= inverse_length
    if LAST:
        d = tl.broadcast_to(grad[None, :], (POSITIONS, CHANNELS))
    else:
        d = tl.broadcast_to(grad[:, None], (CHANNELS, POSITIONS))
    a = d
    if RELU:
        a = activation(h + sample * elements_apart(sample_step, UNIT) + at, mask, RELU)
    store_gradient(dh + sample * c * n + at, d, a, mask, RELU, PRECISION)


def _sizes(kinds: tuple, cut: Maps) -> tuple[int, int, int]:
    """Kernel arguments channels, length and sample_step: the dense dimension and the stride count cut.unit."""
    _, (_, channels, length), (step, *_), _ = kinds[1]
    if cut.last:
        channels //= cut.unit
    else:
        length //= cut.unit
    return channels, length, step // cut.unit


def pool_goodness_forward(h, mean, relu):
    goodness, pooled = floats(h, h.shape[0]), floats(h, *h.shape[:2])
    with on(h):
        shape, pool, finish = _forward(kinds(h), mean, relu)
        sums = floats(h, *shape) if shape else pooled
        pool(h, goodness, sums)
        if finish:
            finish(sums, goodness, pooled)
    return goodness, pooled


@planned
def _forward(kinds: tuple, mean: bool, relu: bool) -> tuple[tuple | None, Launch, Launch | None]:
    """Shape of the sums, where they are not what is pooled, the launch that makes them, and what finishes them."""
    rows, channels, length = kinds[1][1]
    cut = maps_of(kinds)
    whole = cut.channel_parts * cut.position_parts == 1
    factors = 1.0 / length, 1.0 / channels if mean else 1.0
    pool = Launch(
        pool_kernel, (rows * cut.channel_parts * cut.position_parts, 1, 1),
        (
            *_sizes(kinds, cut), cut.channel_parts, cut.position_parts,
            cdiv(cdiv(channels, cut.channels), cut.channel_parts),
            cdiv(cdiv(length, cut.positions), cut.position_parts), *factors,
        ),
        **cut.constants, WHOLE=whole, RELU=relu, **cut.options,
    )  # fmt: skip
    if whole:
        return None, pool, None
    block = min(1024, next_power_of_2(channels))
    scalars = channels, cut.position_parts, *factors
    finish = Launch(pool_finish_kernel, (rows, 1, 1), scalars, CHANNELS=block, num_warps=4)
    return None if cut.position_parts == 1 else (rows, cut.position_parts, channels), pool, finish


def pool_goodness_backward(h, pooled, grad_goodness, grad_pooled, mean, relu):
    dh = ops.empty_pooled_like(h)
    with on(h):
        launch = _backward(kinds(h, pooled, grad_goodness, grad_pooled), mean, relu)
        launch(h, pooled, grad_goodness, grad_pooled, dh)
    return dh


@planned
def _backward(kinds: tuple, mean: bool, relu: bool) -> Launch:
    rows, channels, length = kinds[1][1]
    cut = maps_of(kinds)
    tiles = cdiv(channels, cut.channels), cdiv(length, cut.positions)
    scalars = *_sizes(kinds, cut), *tiles, 1.0 / length, 1.0 / channels if mean else 1.0
    how = rounding(kinds[0])
    return Launch(
        pool_backward_kernel, (rows * tiles[0] * tiles[1], 1, 1), scalars,
        **cut.constants, RELU=relu, PRECISION=how, **cut.options,
    )  # fmt: skip
