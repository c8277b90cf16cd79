"""Goodness of the samples of many layers in one launch, and its gradient in another.

Small layers leave a chip idle one at a time, and a launch costs more than their work. Sizes come from a table in
device memory that depends on shapes alone, so it is made once for a list of shapes and kept for good: nothing is copied
to the device in a step, and a captured CUDA graph, which holds its address, may be replayed whatever ran since.
Addresses of layers change with every step and are kernel arguments.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .config import cdiv, next_power_of_2
from .goodness import goodness_backward, goodness_forward
from .launch import Launch, kinds, on, planned, processors, rows_of
from .rows import LONGEST, TILE, activation, floats, rounding, store_gradient, vector_unit, warps_for

MOST = 32  # layers a launch: 512 bytes of addresses


@dataclass(frozen=True)
class Plan:
    """The order of a launch's layers, their sizes on the device, and its tiles."""

    order: tuple[int, ...]  # layers, the widest first: what is long starts early
    table: Tensor  # (5, slots) int64: first tile, rows, width, row stride (in units), first row of the result
    tiles: int
    rows: int
    block: int
    warps: int

    @property
    def constants(self) -> dict:
        return {"SLOTS": self.table.shape[1], "ROWS": self.rows, "BLOCK": self.block}


def cut(widths: list[int], rows: list[int], chip: str) -> tuple[int, int, int]:
    """(rows, block, warps) of the tiles of a launch: one shape for all layers, made for the widest."""
    tile = 256 if chip == "interpret" else TILE
    block = min(tile, next_power_of_2(max(widths)))
    return max(1, min(tile // block, next_power_of_2(max(rows)))), block, warps_for(tile, chip)


@planned
def plan(shapes: tuple[tuple[int, int, int], ...], firsts: tuple[int, ...], unit: int, device: torch.device) -> Plan:
    """The launch for layers of ``shapes`` (rows, width, row stride), results from rows ``firsts``."""
    order = sorted(range(len(shapes)), key=lambda i: -shapes[i][1])
    side, block, warps = cut([s[1] for s in shapes], [s[0] for s in shapes], config.family(device))
    columns, tile = [], 0
    for i in order:
        rows, width, stride = shapes[i]
        columns.append((tile, rows, width // unit, stride // unit, firsts[i]))
        tile += cdiv(rows, side)
    return Plan(tuple(order), _on_device(tuple(columns), device), tile, side, block, warps)


@functools.cache  # not @planned, which forgets: a captured graph would read memory that is another's by then
def _on_device(columns: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    table = torch.zeros(5, next_power_of_2(len(columns)), dtype=torch.int64)
    table[0] = 1 << 62  # no tile reaches a slot without a layer
    table[:, : len(columns)] = torch.tensor(columns).T
    return table.to(device)


@triton.jit
def layer_of(table, tile, SLOTS: tl.constexpr):
    """(layer, its first tile, rows, width, stride, first result) of a tile."""
    first = tl.load(table + tl.arange(0, SLOTS))
    layer = tl.sum((first <= tile).to(tl.int32), 0) - 1
    at = table + layer
    return (layer, tl.load(at), tl.load(at + SLOTS), tl.load(at + 2 * SLOTS), tl.load(at + 3 * SLOTS),
            tl.load(at + 4 * SLOTS))  # fmt: skip


@triton.jit
def chosen(pointers, layer, SLOTS: tl.constexpr):
    """pointers[layer], for a layer known only at run time."""
    pointer = pointers[0]
    for i in tl.static_range(1, SLOTS):
        pointer = tl.where(layer == i, pointers[i], pointer)
    return pointer


# How it works: a program finds the layer of its tile, ROWS samples, in the table and walks their width in steps of
# BLOCK, adding squares in registers. The widest layers come first, so the last programs to start are short ones.
# Bound by memory: one read; for lists of small layers by the latency of one launch.
@triton.jit
def many_kernel(pointers, table, goodness, UNIT: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr, MEAN: tl.constexpr, RELU: tl.constexpr):
    tile = tl.program_id(0)
    layer, first, rows, width, stride, result = layer_of(table, tile, SLOTS)
    row = (tile - first) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    elements = width * UNIT
    kept = (row < rows)[:, None]
    source = chosen(pointers, layer, SLOTS) + (row * (stride * UNIT))[:, None] + col
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, elements, BLOCK):
        a = activation(source + start, kept & (col < elements - start), RELU)
        squares += a * a
    total = tl.sum(squares, 1)
    if MEAN:
        total *= tl.div_rn(1.0, elements.to(tl.float32))
    tl.store(goodness + result + row, total, mask=row < rows)


# How it works: the same walk, writing dh = 2 grad a.
# Bound by memory: one read and one write.
@triton.jit
def many_backward_kernel(pointers, gradients, table, grad, UNIT: tl.constexpr, SLOTS: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr, MEAN: tl.constexpr, RELU: tl.constexpr,
                         PRECISION: tl.constexpr):
    tile = tl.program_id(0)
    layer, first, rows, width, stride, result = layer_of(table, tile, SLOTS)
    row = (tile - first) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    elements = width * UNIT
    kept = (row < rows)[:, None]
    source = chosen(pointers, layer, SLOTS) + (row * (stride * UNIT))[:, None] + col
    to = chosen(gradients, layer, SLOTS) + (row * elements)[:, None] + col
    factor = 2.0 * tl.load(grad + result + row, mask=row < rows, other=0.0)
    if MEAN:
        factor *= tl.div_rn(1.0, elements.to(tl.float32))
    for start in range(0, elements, BLOCK):
        mask = kept & (col < elements - start)
        a = activation(source + start, mask, RELU)
        store_gradient(to + start, factor[:, None] * a, a, mask, RELU, PRECISION)


class Group(NamedTuple):
    """One launch: the layers in its slots, the last again in those that have none, and their sizes."""

    slots: tuple[int, ...]
    table: Tensor
    launch: Launch

    def pointers(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple([tensors[i] for i in self.slots])


def goodness_many(h, mean, relu):
    h = [rows_of(x) for x in h]
    with on(h[0]):
        groups = _forward(kinds(*h), mean, relu)
        if not groups:
            return torch.cat([goodness_forward(x, mean, relu, False, 0.0)[0] for x in h])
        goodness = floats(h[0], sum([x.shape[0] for x in h]))
        for group in groups:
            group.launch(group.pointers(h), group.table, goodness)
    return goodness


@planned
def _forward(kinds: tuple, mean: bool, relu: bool) -> list[Group]:
    device, *layers = kinds
    return _groups(many_kernel, device, layers, MEAN=mean, RELU=relu)


def goodness_many_backward(h, grad_goodness, mean, relu):
    h = [rows_of(x) for x in h]
    with on(h[0]):
        groups = _backward(kinds(grad_goodness, *h), mean, relu)
        if not groups:
            grads = grad_goodness.split([x.shape[0] for x in h])
            return [goodness_backward(x, g, g, None, mean, relu, 0.0) for x, g in zip(h, grads, strict=True)]
        dh = [x.new_empty(x.shape) for x in h]
        for group in groups:
            group.launch(group.pointers(h), group.pointers(dh), group.table, grad_goodness)
    return dh


@planned
def _backward(kinds: tuple, mean: bool, relu: bool) -> list[Group]:
    device, _, *layers = kinds
    return _groups(many_backward_kernel, device, layers, MEAN=mean, RELU=relu, PRECISION=rounding(device))


def _groups(
    kernel: triton.runtime.KernelInterface, device: torch.device, layers: list, **constants: object
) -> list[Group]:
    """The launches of a kernel for layers of these kinds. None where samples are too few and too long for one program
    each: then each layer shares its rows out by itself."""
    shapes = [(*shape, stride[0]) for _, shape, stride, _ in layers]
    firsts = [0, *itertools.accumulate([rows for rows, _, _ in shapes])]
    if firsts[-1] < 2 * processors(device) and max(width for _, width, _ in shapes) > LONGEST:
        return []
    groups = []
    for begin in range(0, len(shapes), MOST):
        some = tuple(shapes[begin : begin + MOST])
        unit = vector_unit(layers[0][0], *itertools.chain.from_iterable([sizes[1:] for sizes in some]))
        tiles = plan(some, tuple(firsts[begin : begin + len(some)]), unit, device)
        slots = [begin + i for i in tiles.order]
        slots += slots[-1:] * (tiles.table.shape[1] - len(slots))
        launch = Launch(
            kernel, (tiles.tiles, 1, 1), (), UNIT=unit, **tiles.constants, **constants, num_warps=tiles.warps
        )
        groups.append(Group(tuple(slots), tiles.table, launch))
    return groups
