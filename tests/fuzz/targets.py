"""What is fuzzed: the raw arguments of the native module, and the public functions.

A target draws from ``pick`` and returns, or raises what a user may see; anything else is a finding, a crash above all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Protocol

import torch

import ffcl_fast.functional as fn
from ffcl_fast.backends import native


class Pick(Protocol):
    """A source of choices: random numbers, or the bytes of a coverage-guided fuzzer."""

    def integer(self, low: int, high: int) -> int: ...

    def of(self, values: Any) -> Any: ...


class RandomPick:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def of(self, values: Any) -> Any:
        return self.random.choice(values)


# ----------------------------------------------------------------------------------------------------- the raw binding

ARENA = 1 << 16  # floats of each buffer: more than any honest problem below reads or writes
_arenas = [torch.zeros(ARENA) for _ in range(9)]
_ids = [torch.zeros(ARENA, dtype=torch.int64) for _ in range(2)]
OBJECTS = (None, "4", 1.5, b"x", [], {}, 1 << 70, -1, float("nan"), object())  # where a number is expected


def _size(pick: Pick, most: int) -> int:
    """A size whose memory is there, or one that no memory could hold."""
    return pick.integer(1, most) if pick.integer(0, 5) else pick.of((0, -1, -(2**63), 2**61, 2**62, 2**63 - 1))


def _stride(pick: Pick, dim: int) -> int:
    return max(dim, 0) + pick.integer(0, 3) if pick.integer(0, 7) else pick.of((0, 1))


def _pointer(pick: Pick, number: int, bank: list[torch.Tensor] = _arenas) -> int:
    return bank[number].data_ptr() if pick.integer(0, 9) else 0


def _dtype(pick: Pick) -> int:
    return pick.integer(0, 2) if pick.integer(0, 5) else pick.of((-1, 3, 7, 2**31 - 1, -(2**31)))


def _number(pick: Pick) -> float:
    return pick.of((0.0, 1.0, 14.0, -3.0, 300.0, 1e30, float("inf"), float("nan"), 1e-40))


def _spoiled(pick: Pick, arguments: list) -> list:
    """Now and then one of them is of another type."""
    if not pick.integer(0, 19):
        arguments[pick.integer(0, len(arguments) - 1)] = pick.of(OBJECTS)
    return arguments


def _problem(pick: Pick):
    rows, cols, dim = _size(pick, 40), _size(pick, 40), _size(pick, 60)
    return native.module.Similarity(
        *_spoiled(
            pick,
            [
                _pointer(pick, 0), _pointer(pick, 1) if pick.integer(0, 3) else 0, rows, cols, dim, _stride(pick, dim),
                _stride(pick, dim), _dtype(pick), _number(pick), _pointer(pick, 0, _ids), _pointer(pick, 1, _ids),
                pick.integer(0, 4) if pick.integer(0, 5) else pick.of((-1, 5, 99)), pick.of((1, 2, 3, 0, -4, 1000)),
            ],
        )
    )  # fmt: skip


def _rows(pick: Pick):
    rows, dim = _size(pick, 40), _size(pick, 90)
    fields = [
        _pointer(pick, 0),
        rows,
        dim,
        _stride(pick, dim),
        _dtype(pick),
        pick.of((True, False)),
        pick.of((1, 2, -1)),
    ]
    return native.module.Activations(*_spoiled(pick, fields)), dim


def _contrast(pick: Pick):
    rows, cols, dim = _size(pick, 20), _size(pick, 20), _size(pick, 60)
    if pick.integer(0, 1):
        cols = rows
    some = lambda pointer: pointer if pick.integer(0, 1) else 0  # noqa: E731
    fields = [
        _pointer(pick, 0), some(_pointer(pick, 1)), some(_pointer(pick, 2)), some(_pointer(pick, 3)), rows,
        pick.of((1, 2, rows, rows - 1, 0, -1, 2**62)), cols, dim, *(_stride(pick, dim) for _ in range(4)), _dtype(pick),
        _number(pick), _pointer(pick, 0, _ids), _pointer(pick, 1, _ids),
        pick.integer(0, 4) if pick.integer(0, 5) else pick.of((-1, 5, 99)),
        *(some(_pointer(pick, n, _ids)) for n in (0, 1)), pick.of((True, False)), pick.of((True, False)), _number(pick),
        pick.of((True, False)), pick.of((0, 1, 2, 3, -1)), pick.of((1, 2, 3, 0, -4, 1000)),
    ]  # fmt: skip
    return native.module.ContrastLoss(*_spoiled(pick, fields))


def _maps(pick: Pick):
    samples, channels, positions = _size(pick, 9), _size(pick, 30), _size(pick, 30)
    stride = max(channels * positions, 0) % 2**62 + pick.integer(0, 2)
    return native.module.Maps(
        *_spoiled(
            pick,
            [
                _pointer(pick, 0), samples, channels, positions, stride, pick.of((True, False)), _dtype(pick),
                pick.of((True, False)), pick.of((1, 2, -1)),
            ],
        )
    )  # fmt: skip


def binding(pick: Pick) -> None:
    """One call of the native module. Buffers hold what sizes say, or sizes are impossible: no other promise is made."""
    entry, p = pick.integer(0, 10), lambda n: _pointer(pick, n)
    cache_size = pick.of((0, 1, 16, 100, 200, ARENA, -1, -(2**63)))
    module, flag, x = native.module, pick.of((True, False)), _number(pick)
    if entry == 0:
        call, arguments = module.similarity_forward, [_problem(pick), p(2), p(3), p(4), cache_size]
    elif entry == 1:
        buffers = [p(2), p(3), p(5), p(6), p(4)]
        # A cache says how its forward pass went: what no forward pass wrote is not followed, so it is cleared here.
        _arenas[4].zero_()
        call, arguments = module.similarity_backward, [_problem(pick), *buffers, cache_size, p(7), p(8)]
    elif entry == 2:
        call, arguments = module.siglip, [_problem(pick), x, flag, p(2), p(3), p(7), p(8)]
    elif entry == 3:
        call, arguments = module.goodness_forward, [_rows(pick)[0], flag, x, p(2), p(7)]
    elif entry == 4:
        call, arguments = module.goodness_backward, [_rows(pick)[0], flag, x, p(2), p(3), p(5), p(7)]
    elif entry == 5:
        rows, dim = _rows(pick)
        call, arguments = (
            module.pair_cosine_forward,
            [rows, p(1), _stride(pick, dim), p(2), x, x, p(3), p(4), p(7), p(8)],
        )
    elif entry == 6:
        rows, dim = _rows(pick)
        call, arguments = module.pair_cosine_backward, [rows, p(1), _stride(pick, dim), p(4), p(3), p(7), p(8)]
    elif entry == 7:
        call, arguments = module.pool_goodness_forward, [_maps(pick), flag, p(2), p(3)]
    elif entry == 8:
        call, arguments = module.pool_goodness_backward, [_maps(pick), flag, p(3), p(2), p(5), p(7)]
    elif entry == 9:
        call, arguments = module.contrast_forward, [_contrast(pick), p(4), cache_size, p(5), p(6)]
    else:  # ids are all 0: an order that holds its rows
        _arenas[4].zero_()
        buffers = [p(5), p(6), p(7), p(8), p(3), p(2)]
        call, arguments = module.contrast_backward, [_contrast(pick), p(4), cache_size, *buffers]
    status = call(*_spoiled(pick, arguments))
    if status not in (0, 1, 2):
        raise AssertionError(f"{call.__name__}: status {status}")


# ------------------------------------------------------------------------------------------------- the public functions

_DTYPES = (
    torch.float32,
    torch.float32,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.bool,
)


def _tensor(pick: Pick, n: int, d: int) -> Any:
    """Nearly always an (n, d) embedding, in some layout; else another shape, dtype, kind of tensor or no tensor."""
    kind = pick.integer(0, 24)
    dtype = torch.float32 if pick.integer(0, 3) else pick.of(_DTYPES)
    if kind == 0:
        return pick.of((None, 3.0, [1.0], "x", n))
    if kind == 1:
        shape = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 4)))
        return torch.ones(shape).to(dtype)
    if kind == 2:
        return torch.ones(n, d).to_sparse() if pick.integer(0, 1) else torch.nested.nested_tensor([torch.ones(d)] * n)
    x = (torch.arange(n * d).reshape(n, d) % 7 - 3).to(dtype)
    if kind == 4:
        x = x.T.contiguous().T
    elif kind == 5:
        x = x[:1].expand(n, d)
    elif kind == 6 and x.is_floating_point():
        x = x * pick.of((float("nan"), float("inf"), 0.0, 1e30))
    return x.requires_grad_() if x.is_floating_point() and pick.integer(0, 1) else x


def _middle(x: Any) -> Any:
    """(n, 1, d) of an (n, d), where that can be."""
    return (
        x[:, None] if isinstance(x, torch.Tensor) and not x.is_nested and x.layout == torch.strided and x.dim() else x
    )


def _other(pick: Pick, usual: Any) -> Any:
    """Nearly always ``usual``."""
    if pick.integer(0, 11):
        return usual
    return pick.of(
        (None, 0, -1, 0.0, float("nan"), float("inf"), "mean", True, 10**30, [1], torch.ones(2), torch.tensor(0.5))
    )


def _vector(pick: Pick, n: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    n = n if pick.integer(0, 11) else pick.integer(0, 9)
    return (torch.arange(n) % 3).to(dtype if pick.integer(0, 11) else pick.of(_DTYPES))


def functions(pick: Pick) -> None:
    """One call of a public function, and of its backward pass."""
    n, d = pick.integer(1, 9), pick.integer(1, 17)
    x, y, z = (_tensor(pick, n, d) for _ in range(3))
    number = _other(pick, pick.of((0.07, 1.0, 14.0)))
    reduction = _other(pick, pick.of(("mean", "sum", "none")))
    backend = _other(pick, "auto") if pick.integer(0, 9) else pick.of(("triton", "cuda", "panels", "cpu", "reference"))
    ids = _other(pick, None) if pick.integer(0, 2) else _vector(pick, n)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: fn.info_nce(x, y, None, number, reduction, ids=ids, backend=backend),
        lambda: fn.info_nce(x, y, z, number, reduction, ids=ids, negative_ids=ids, backend=backend),
        lambda: fn.info_nce(x, y, _middle(z), number, "mean", "paired"),
        lambda: fn.nt_xent(x, y, number, _other(pick, None), ids=ids, reduction=reduction, backend=backend),
        lambda: fn.nt_xent(x, y, number, z, backend=backend),
        lambda: fn.sup_con(_middle(x), ids, None, number, backend=backend),
        lambda: fn.sup_con(x, ids, _other(pick, torch.eye(n)), number, _other(pick, "one"), backend=backend),
        lambda: fn.clip(x, y, number, _other(pick, None), ids=ids, backend=backend),
        lambda: fn.siglip(x, y, number, _other(pick, -10.0), backend=backend),
        lambda: fn.similarity_lse(
            x, y, number, row_ids=ids, col_ids=ids, exclude=_other(pick, "same_id"), backend=backend
        ),
        lambda: fn.goodness(x, _other(pick, "mean_squares"), relu=bool(pick.integer(0, 1)), groups=_other(pick, None)),
        lambda: fn.goodness_normalize(x, _other(pick, 1e-6), backend=backend),
        lambda: fn.pool_goodness(x, backend=backend),
        lambda: fn.goodness_many(_other(pick, [x, y]), backend=backend),
        lambda: fn.linear_goodness(x, y, _other(pick, None), backend=backend),
        lambda: fn.pair_cosine(x, y, _vector(pick, n).float() * 0 + 1, _other(pick, 0.1), reduction, backend=backend),
        lambda: fn.layerwise(fn.pair_cosine, _other(pick, [x]), [y], torch.ones(n), _other(pick, None)),
        lambda: fn.goodness_loss(x, y, _other(pick, "logistic"), _other(pick, 2.0), _other(pick, 4.0)),
        lambda: fn.margin_sup_con(x, _vector(pick, n), _other(pick, 0.1), number),
        lambda: fn.channel_group_loss(x, _vector(pick, n), _other(pick, pick.of((1, 3))), backend=backend),
    )
    results = pick.of(calls)()
    results = results if isinstance(results, list | tuple) else (results,)
    total = sum(r.sum() for r in results if isinstance(r, torch.Tensor) and r.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()


ALLOWED = {binding: (TypeError, ValueError, OverflowError), functions: (TypeError, ValueError, OverflowError)}
TARGETS = {"binding": binding, "functions": functions}


def once(target: Callable[[Pick], None], pick: Pick) -> bool:
    """Whether the call went through; False where it was refused as it may be. Raises what may not be."""
    try:
        target(pick)
    except ALLOWED[target]:
        return False
    except RuntimeError as error:  # a backend that cannot run this, in words of its own
        if not str(error).startswith("backend="):
            raise
        return False
    return True
