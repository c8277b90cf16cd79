"""Device functions that every similarity kernel shares: loads, the tile product, masks, the schedule, the offset.

S = scale x y^T is cut into tiles of BLOCK_ROWS x BLOCK_COLS; exponents are kept in base 2 (t = S log2 e) because the
hardware's exponential is exp2. Rows past the end are read as copies of the last one and columns of the embedding past
its width as zeros, so nothing outside a tensor is ever read; the masks take their contributions out again.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Exclusions: the numbers of ffcl_fast.ops, as compile-time constants of the kernels.
NO_PAIRS = tl.constexpr(0)
DIAGONAL = tl.constexpr(1)
SAME_ID = tl.constexpr(2)
SAME_ID_OFF_DIAGONAL = tl.constexpr(3)
DIFFERENT_ID = tl.constexpr(4)

# Where pairs are left out by id, which parts of S a launch has: all, those in which no row's id can be a column's, the
# others. Masks cost registers, hence large tiles or blocks side by side: what needs none has a launch of its own.
ANY_IDS = tl.constexpr(0)
IDS_APART = tl.constexpr(1)
IDS_MEET = tl.constexpr(2)

# One offset serves exponents about 195 powers of two below their bound; rows that are all lower are lost to it and
# rescued. Past this bound nearly every row would be: the rescue alone then does the work, online.
BOUND_LIMIT = tl.constexpr(512.0)


# How it works: a block a GRAIN of rows. Bound by launch latency: it reads n ids once.
@triton.jit(do_not_specialize=["n"])
def id_range_kernel(ids, ranges, n, GRAIN: tl.constexpr):
    at = tl.program_id(0)
    value = tl.load(ids + tl.minimum(at.to(tl.int64) * GRAIN + tl.arange(0, GRAIN), n - 1))
    tl.store(ranges + at * 2, tl.min(value, 0))
    tl.store(ranges + at * 2 + 1, tl.max(value, 0))


@triton.jit
def elements_apart(stride, UNIT: tl.constexpr):
    """Elements between rows, 64 bits wide: two rows of a narrow slice may lie further apart than 32 bits reach."""
    return tl.cast(stride, tl.int64) * UNIT


@triton.jit
def load_tile(x, row, depth, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
              UNIT: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """(BLOCK, DEPTH) tile of x (rows, WIDTH) from (row, depth); `stride` counts UNIT elements."""
    if DESCRIPTOR:
        tile = x.load([row, depth])
    else:
        r = tl.minimum(row + tl.arange(0, BLOCK), rows - 1).to(tl.int64)
        d = depth + tl.arange(0, DEPTH)
        pointers = x + (r * elements_apart(stride, UNIT))[:, None] + d[None, :]
        if WIDTH % DEPTH == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(d < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(panel, value, row, col, rows, cols, stride, DESCRIPTOR: tl.constexpr):
    """Write a tile at (row, col) of a panel. A descriptor stops at the panel's end, not at rows x cols."""
    if DESCRIPTOR:
        panel.store([row, col], value)
    else:
        r = row + tl.arange(0, value.shape[0])
        c = col + tl.arange(0, value.shape[1])
        tl.store(panel + r[:, None] * stride + c[None, :], value, mask=(r < rows)[:, None] & (c < cols)[None, :])


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. Triton's interpreter multiplies bfloat16 as integers, so there the operands are widened."""
    if PRECISION == "interpret":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """float32 x rounded to dtype, to nearest even (the interpreter alone would truncate)."""
    if PRECISION == "interpret":
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
            x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def product(x, y, row, col, rows, cols, x_stride, y_stride, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
            BLOCK_COLS: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr, DESCRIPTOR: tl.constexpr,
            PRECISION: tl.constexpr):
    """x[row:] y[col:]^T as a float32 (BLOCK_ROWS, BLOCK_COLS) tile, DEPTH of the embedding at a time."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for depth in range(0, WIDTH, DEPTH):
        a = load_tile(x, row, depth, rows, x_stride, WIDTH, BLOCK_ROWS, DEPTH, UNIT, DESCRIPTOR)
        b = load_tile(y, col, depth, cols, y_stride, WIDTH, BLOCK_COLS, DEPTH, UNIT, DESCRIPTOR)
        acc = dot(a, b.T, acc, PRECISION)
    return acc


@triton.jit
def touches_diagonal(row, col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    return (row < col + BLOCK_COLS) & (col < row + BLOCK_ROWS)


@triton.jit
def id_range(ranges, start, n, BLOCK: tl.constexpr, GRAIN: tl.constexpr):
    """Smallest and largest id of the rows from `start`, from the ranges of each GRAIN rows."""
    last = tl.cdiv(n, GRAIN) - 1
    first = tl.minimum(start // GRAIN, last)
    low = tl.load(ranges + first * 2)
    high = tl.load(ranges + first * 2 + 1)
    for i in tl.static_range(1, BLOCK // GRAIN):
        at = tl.minimum(first + i, last)
        low = tl.minimum(low, tl.load(ranges + at * 2))
        high = tl.maximum(high, tl.load(ranges + at * 2 + 1))
    return low, high


@triton.jit
def ids_meet(x_ranges, row, rows, y_ranges, col, cols, SIDE: tl.constexpr, GRAIN: tl.constexpr):
    """Whether of the SIDE rows from `row` and the SIDE columns from `col` two may have the same id."""
    x_low, x_high = wide_id_range(x_ranges, row, rows, SIDE, GRAIN)
    y_low, y_high = wide_id_range(y_ranges, col, cols, SIDE, GRAIN)
    return (x_low <= y_high) & (y_low <= x_high)


@triton.jit
def wide_id_range(ranges, start, n, SIDE: tl.constexpr, GRAIN: tl.constexpr):
    """Smallest and largest id of the SIDE rows from `start`, from the ranges of each GRAIN rows."""
    at = tl.minimum(start // GRAIN + tl.arange(0, SIDE // GRAIN), tl.cdiv(n, GRAIN) - 1)
    return tl.min(tl.load(ranges + at * 2), 0), tl.max(tl.load(ranges + at * 2 + 1), 0)


@triton.jit
def needs_mask(row, col, rows, cols, x_ranges, y_ranges, EXCLUDE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
               BLOCK_COLS: tl.constexpr, GRAIN: tl.constexpr):
    """Whether the tile may have a pair to leave out: a scalar, so inner tiles skip the masks. Equal ids need ranges
    that overlap: with ids that are mostly in order, those of views or samples, few tiles have them."""
    needed = (row + BLOCK_ROWS > rows) | (col + BLOCK_COLS > cols)
    if EXCLUDE == DIAGONAL:
        needed = needed | touches_diagonal(row, col, BLOCK_ROWS, BLOCK_COLS)
    elif EXCLUDE != NO_PAIRS:
        if x_ranges is None:
            needed = needed | (row >= 0)
        else:
            x_low, x_high = id_range(x_ranges, row, rows, BLOCK_ROWS, GRAIN)
            y_low, y_high = id_range(y_ranges, col, cols, BLOCK_COLS, GRAIN)
            needed = needed | ((x_low <= y_high) & (y_low <= x_high))
    return needed


@triton.jit
def kept(row, col, rows, cols, x_ids, y_ids, EXCLUDE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
         BLOCK_COLS: tl.constexpr):
    """(BLOCK_ROWS, BLOCK_COLS) mask of the pairs that count."""
    i = row + tl.arange(0, BLOCK_ROWS)
    j = col + tl.arange(0, BLOCK_COLS)
    # Of equal expressions these are the ones whose masks the compiler keeps in registers.
    keep = (j < cols)[None, :]
    if EXCLUDE == DIAGONAL:
        keep = (tl.where(i < rows, i, -1)[:, None] != j[None, :]) & keep
    elif EXCLUDE != NO_PAIRS:
        left = tl.load(x_ids + i, mask=i < rows, other=0)
        right = tl.load(y_ids + j, mask=j < cols, other=0)
        same = left[:, None] == right[None, :]
        if EXCLUDE == DIFFERENT_ID:
            keep = same & keep
        elif EXCLUDE == SAME_ID:
            keep = (same == 0) & keep
        elif BLOCK_ROWS < 128:
            keep = ((same & (i[:, None] != j[None, :])) == 0) & keep
        else:
            keep = ((same == 0) | ((i - row)[:, None] == (j - row)[None, :])) & keep
    return keep & (i < rows)[:, None]


@triton.jit
def masked(t, row, col, rows, cols, x_ids, y_ids, EXCLUDE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
           BLOCK_COLS: tl.constexpr, PIECE: tl.constexpr):
    """t, -inf where a pair does not count: PIECE columns at a time, which need the registers of their ids only."""
    if BLOCK_COLS <= PIECE:
        return tl.where(kept(row, col, rows, cols, x_ids, y_ids, EXCLUDE, BLOCK_ROWS, BLOCK_COLS), t, -float("inf"))
    else:
        half: tl.constexpr = BLOCK_COLS // 2
        left, right = tl.split(tl.permute(tl.reshape(t, (BLOCK_ROWS, 2, half)), (0, 2, 1)))
        left = masked(left, row, col, rows, cols, x_ids, y_ids, EXCLUDE, BLOCK_ROWS, half, PIECE)
        right = masked(right, row, col + half, rows, cols, x_ids, y_ids, EXCLUDE, BLOCK_ROWS, half, PIECE)
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_ROWS, BLOCK_COLS))


@triton.jit
def exponent(scale):
    """(s, L): t = s <x, y> in powers of two, and the float64 L that turns natural logarithms into them: t = L S.

    s is scale log2 e rounded to float32, so L is not quite log2 e. Using the same L for normalisers leaves only
    2^((t - L r)) with a relative error of 6e-8 |ln p|; log2 e itself would leave 6e-8 |S|, a hundred times as much.
    """
    s = scale * LOG2E
    ratio = s.to(tl.float64) / tl.where(scale == 0, 1.0, scale).to(tl.float64)
    return s, tl.where(scale == 0, tl.full((), LOG2E, tl.float64), ratio)


@triton.jit
def log2_of(x):
    """log2 x as float64 with an absolute error of 2^-22: the hardware's own is relative to a result that may be 100."""
    bits = x.to(tl.int32, bitcast=True)
    power = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exact = power.to(tl.float64) + tl.log2(mantissa).to(tl.float64)
    usual = (x > 1.2e-38) & (x < float("inf"))
    return tl.where(usual, exact, tl.log2(x).to(tl.float64))


@triton.jit
def largest_norms(norms, PARTS: tl.constexpr, SELF: tl.constexpr):
    """max |x_i| max |y_j| from the partial maxima that the norm kernel wrote (the second PARTS are y's)."""
    parts = tl.arange(0, PARTS)
    x = tl.max(tl.load(norms + parts), 0)
    if SELF:
        return x * x
    return x * tl.max(tl.load(norms + PARTS + parts), 0)


@triton.jit
def offset(scale, norms, headroom, PARTS: tl.constexpr, SELF: tl.constexpr):
    """(bound, c): |t_ij| <= bound, and sums of exp2(t_ij - c) <= 2^headroom stay finite in float32.

    No offset where none is needed: t - c is rounded, and small t are worth their own precision.
    """
    bound = tl.abs(scale) * LOG2E * largest_norms(norms, PARTS, SELF)
    return bound, tl.where(bound > headroom, bound - headroom, 0.0)


@triton.jit
def grouped(pid, height, width, GROUP: tl.constexpr):
    """Cell of a height x width grid in an order where GROUP rows walk the columns together: their operands share L2."""
    area = GROUP * width
    first = (pid // area) * GROUP
    size = tl.minimum(height - first, GROUP)
    return first + (pid % area) % size, (pid % area) // size


@triton.jit
def folded(pid, first, last, total, GROUP: tl.constexpr):
    """Cell (row, col >= row) of the rows first..last-1 of a total x total triangle; col = total where there is none.

    Row `first + a` and row `last - 1 - a` together always hold the same number of cells, so a pair of rows is one line
    of a rectangle and no block starts only to find itself below the diagonal.
    """
    height = (last - first + 1) // 2
    width = 2 * total - first - last + 1
    a, b = grouped(pid, height, width, GROUP)
    upper = first + a
    lower = last - 1 - a
    length = total - upper
    row = tl.where(b < length, upper, lower)
    col = tl.where(b < length, upper + b, lower + b - length)
    return row, tl.where((b >= length) & (upper == lower), total, col)
