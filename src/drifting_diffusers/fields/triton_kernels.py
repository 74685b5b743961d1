r"""The drifting field in Triton: what one program does. `triton_engine` says which program when, and how many bytes move.

    L_ij = dist_ij / s (+ self mask on own pairs)
    a_ij = max( sqrt( softmax_j(-L / tau) softmax_i(-L / tau) ), floor ) w_j
    F_i  = sum_{j in +} a_ij A-_i y_j  -  sum_{j in -} a_ij A+_i y_j,      A+-_i = sum_{j in +-} a_ij

Targets come in three pieces, y0 and y1 that repel and y2 that attracts, each its own tensor; any may be empty. `whole_*` kernels hold one whole problem in
registers, `tile_*` kernels a tile of rows (queries) and columns (targets) of one whose distances lie in memory.

Two traps: the self mask is finite, so an own pair may be the nearest of its row, and it takes part in every minimum and sum; and each axis is shifted by its
own minimum, because one shift for both lets column sums underflow. Both softmaxes are kept as square roots, exp(-(L - min) / 2 tau) / sqrt(sum of squares):
the product of two softmaxes underflows in float32 long before its root does.

Triton compiles the source of a function and looks names up in its module: `no_type_check` keeps the shape checks of the tests from wrapping it.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

FAR = tl.constexpr(1e30)
"""L of what lies beside a tile's edge: farther than anything, and finite, so that differences of two such are numbers."""

LEAST = tl.constexpr(1e-4)
"""`kernels.LEAST_DISTANCE`."""


@triton.jit
@no_type_check
def samples(points, stride, rows, count, dims, d):
    """A tile of samples in float32, 0 beside the edges."""
    inside = (rows[:, None] < count) & (dims[None, :] < d)
    return tl.load(points + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def product(a, b, total, PRODUCTS: tl.constexpr):
    """Total + a @ b, accumulated in float32. "widened" is "bf16" for the interpreter, whose NumPy multiplies no bfloat16."""
    if PRODUCTS == "bf16":
        return tl.dot(a, b, total)
    elif PRODUCTS == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRODUCTS)


@triton.jit
@no_type_check
def weighted(coefficients, y, total, PRODUCTS: tl.constexpr):
    """Total + coefficients @ y for coefficients of float32: in 16 bits they are two halves, together 16 bits long."""
    if PRODUCTS == "bf16" or PRODUCTS == "widened":
        high = coefficients.to(tl.bfloat16)
        low = (coefficients - high.to(tl.float32)).to(tl.bfloat16)
        return product(high, y, product(low, y, total, PRODUCTS), PRODUCTS)
    else:
        return product(coefficients, y, total, PRODUCTS)


@triton.jit
@no_type_check
def shifted(y, centre, PRODUCTS: tl.constexpr):
    """About a centre; in 16 bits exactly so, see `_middle`."""
    moved = y - centre[None, :]
    if PRODUCTS == "bf16" or PRODUCTS == "widened":
        moved = moved.to(tl.bfloat16)
    return moved


@triton.jit
@no_type_check
def _centre(low, high, PRODUCTS: tl.constexpr):
    """What a tile is centred about, from bounds of its columns (in float32 both are the mean).

    In 16 bits a c of which every y in [low, high] has a bfloat16 difference: c/2 <= y <= 2c (Sterbenz), or 0, and then nothing is shifted: some sample is
    farther from the middle than half the way to the origin, so that float32 sums lose less than bfloat16 had lost when it stored the samples.
    """
    if PRODUCTS == "bf16" or PRODUCTS == "widened":
        middle = ((low + high) * 0.5).to(tl.bfloat16).to(tl.float32)
        exact = ((low >= middle * 0.5) & (high <= middle * 2)) | ((low >= middle * 2) & (high <= middle * 0.5))
        return tl.where(exact, middle, 0.0)
    else:
        return low


@triton.jit
@no_type_check
def _least(y, rows, count):
    return tl.min(tl.where(rows[:, None] < count, y, float("inf")), 0)


@triton.jit
@no_type_check
def _most(y, rows, count):
    return tl.max(tl.where(rows[:, None] < count, y, float("-inf")), 0)


@triton.jit
@no_type_check
def _whole_targets(
    y0, y1, y2, s0, s1, s2, dims, d, k0, k1, k2,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """All targets of a problem at some dimensions, and the bounds that say their centre: no pass of its own is needed for it."""
    j0, j1, j2 = tl.arange(0, T0), tl.arange(0, T1), tl.arange(0, T2)
    p0, p1, p2 = samples(y0, s0, j0, k0, dims, d), samples(y1, s1, j1, k1, dims, d), samples(y2, s2, j2, k2, dims, d)
    if PRODUCTS == "bf16" or PRODUCTS == "widened":
        low = tl.minimum(tl.minimum(_least(p0, j0, k0), _least(p1, j1, k1)), _least(p2, j2, k2))
        high = tl.maximum(tl.maximum(_most(p0, j0, k0), _most(p1, j1, k1)), _most(p2, j2, k2))
    else:
        low = (tl.sum(p0, 0) + tl.sum(p1, 0) + tl.sum(p2, 0)) / (k0 + k1 + k2)
        high = low
    return p0, p1, p2, low, high


@triton.jit
@no_type_check
def row_squares(y):
    wide = y.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
@no_type_check
def roots(products, rows, columns, x_squares, y_squares, own):
    """Distances from scalar products; a NaN stays one."""
    squares = x_squares[:, None] + y_squares[None, :] - 2 * products
    distance = tl.sqrt(tl.maximum(squares, LEAST * LEAST, propagate_nan=tl.PropagateNan.ALL))
    return tl.where((rows[:, None] == columns[None, :]) & (rows[:, None] < own), LEAST, distance)


@triton.jit
@no_type_check
def _computed(
    x, sx, y0, y1, y2, s0, s1, s2, own, n, d, k0, k1, k2,
    N: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, D: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """All distances of a problem, D dimensions at a time."""
    i, j0, j1, j2 = tl.arange(0, N), tl.arange(0, T0), tl.arange(0, T1), tl.arange(0, T2)
    g0, g1, g2 = tl.zeros((N, T0), tl.float32), tl.zeros((N, T1), tl.float32), tl.zeros((N, T2), tl.float32)
    xs, q0, q1, q2 = tl.zeros((N,), tl.float32), tl.zeros((T0,), tl.float32), tl.zeros((T1,), tl.float32), tl.zeros((T2,), tl.float32)
    for start in range(0, d, D):
        dims = start + tl.arange(0, D)
        q = samples(x, sx, i, n, dims, d)
        p0, p1, p2, low, high = _whole_targets(y0, y1, y2, s0, s1, s2, dims, d, k0, k1, k2, T0, T1, T2, PRODUCTS)
        if PRODUCTS == "bf16" or PRODUCTS == "widened":  # the queries, too, must be shifted exactly
            low, high = tl.minimum(low, _least(q, i, n)), tl.maximum(high, _most(q, i, n))
        centre = _centre(low, high, PRODUCTS)
        q, p0 = shifted(q, centre, PRODUCTS), shifted(p0, centre, PRODUCTS)
        p1, p2 = shifted(p1, centre, PRODUCTS), shifted(p2, centre, PRODUCTS)
        g0, g1, g2 = product(q, p0.T, g0, PRODUCTS), product(q, p1.T, g1, PRODUCTS), product(q, p2.T, g2, PRODUCTS)
        xs, q0, q1, q2 = xs + row_squares(q), q0 + row_squares(p0), q1 + row_squares(p1), q2 + row_squares(p2)
    return roots(g0, i, j0, xs, q0, own), roots(g1, i, k0 + j1, xs, q1, own), roots(g2, i, k0 + k1 + j2, xs, q2, own)


@triton.jit
@no_type_check
def places(rows, columns, width):
    """Where the entries of a matrix stand: 64 bits, because one matrix may have more than 2^31."""
    return rows.to(tl.int64)[:, None] * width + columns[None, :]


@triton.jit
@no_type_check
def logits_of(distance, rows, columns, first, n, count, own, length, self_mask):
    """L of a tile whose columns are targets `first` and on; FAR beside its edges."""
    found = distance / length
    found = tl.where((rows[:, None] == first + columns[None, :]) & (rows[:, None] < own), found + self_mask, found)
    return tl.where((rows[:, None] < n) & (columns[None, :] < count), found, FAR)


@triton.jit
@no_type_check
def roots_of_softmax(logits, nearest, rate):
    """Not yet divided by the root of the sum of its squares. The rate is 1 / (2 tau)."""
    return tl.exp((nearest - logits) * rate)


@triton.jit
@no_type_check
def affinities(over_targets, over_queries, row_scale, column_scale, mass, floor, inside):
    found = (over_targets * row_scale[:, None]) * (over_queries * column_scale[None, :])
    return tl.where(inside, tl.maximum(found, floor, propagate_nan=tl.PropagateNan.ALL), 0.0) * mass[None, :]


@triton.jit
@no_type_check
def _whole_affinities(logits, row_roots, row_scale, mass, rate, floor, rows, columns, n, count):
    """Of all queries to one piece, so that a softmax over queries is complete."""
    over_queries = roots_of_softmax(logits, tl.min(logits, 0)[None, :], rate)
    column_scale = tl.rsqrt(tl.sum(over_queries * over_queries, 0))
    inside = (rows[:, None] < n) & (columns[None, :] < count)
    return affinities(row_roots, over_queries, row_scale, column_scale, mass, floor, inside)


@triton.jit
@no_type_check
def _signed(l0, l1, l2, w0, w1, w2, rate, floor, n, k0, k1, k2, N: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr):
    """The coefficients of the targets in the force of one temperature: -a A+ for those that repel, a A- for those that attract."""
    i, j0, j1, j2 = tl.arange(0, N), tl.arange(0, T0), tl.arange(0, T1), tl.arange(0, T2)
    nearest = tl.minimum(tl.minimum(tl.min(l0, 1), tl.min(l1, 1)), tl.min(l2, 1))[:, None]
    r0, r1, r2 = roots_of_softmax(l0, nearest, rate), roots_of_softmax(l1, nearest, rate), roots_of_softmax(l2, nearest, rate)
    scale = tl.rsqrt(tl.sum(r0 * r0, 1) + tl.sum(r1 * r1, 1) + tl.sum(r2 * r2, 1))
    a0 = _whole_affinities(l0, r0, scale, w0, rate, floor, i, j0, n, k0)
    a1 = _whole_affinities(l1, r1, scale, w1, rate, floor, i, j1, n, k1)
    a2 = _whole_affinities(l2, r2, scale, w2, rate, floor, i, j2, n, k2)
    repelled, attracted = tl.sum(a0, 1) + tl.sum(a1, 1), tl.sum(a2, 1)
    return -a0 * attracted[:, None], -a1 * attracted[:, None], a2 * repelled[:, None]


@triton.jit
@no_type_check
def masses_of(masses, columns, count, WEIGHTED: tl.constexpr):
    """Of some columns, 0 beside the edge."""
    if WEIGHTED:
        return tl.load(masses + columns, mask=columns < count, other=0.0)
    else:
        return tl.where(columns < count, 1.0, 0.0)


@triton.jit
@no_type_check
def kept_tile(kept, rows, first, columns, n, count, targets):
    """A tile of distances from memory."""
    inside = (rows[:, None] < n) & (columns[None, :] < count)
    return tl.load(kept + places(rows, first + columns, targets), mask=inside, other=0.0)


@triton.jit
@no_type_check
def keep_tile(kept, distance, rows, first, columns, n, count, targets):
    inside = (rows[:, None] < n) & (columns[None, :] < count)
    tl.store(kept + places(rows, first + columns, targets), distance, mask=inside)


@triton.jit
@no_type_check
def _whole_distances(
    x, sx, y0, y1, y2, s0, s1, s2, own, kept, n, d, k0, k1, k2,
    N: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, D: tl.constexpr, PRODUCTS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Those of `whole_measure` from memory, or once more from the samples, which is less to read where there are few dimensions."""
    if KEEP:
        i, j0, j1, j2 = tl.arange(0, N), tl.arange(0, T0), tl.arange(0, T1), tl.arange(0, T2)
        d0, d1 = kept_tile(kept, i, 0, j0, n, k0, k0 + k1 + k2), kept_tile(kept, i, k0, j1, n, k1, k0 + k1 + k2)
        d2 = kept_tile(kept, i, k0 + k1, j2, n, k2, k0 + k1 + k2)
    else:
        d0, d1, d2 = _computed(x, sx, y0, y1, y2, s0, s1, s2, own, n, d, k0, k1, k2, N, T0, T1, T2, D, PRODUCTS)
    return d0, d1, d2


@triton.jit
@no_type_check
def _whole_coefficients(
    d0, d1, d2, length, self_mask, own, masses, rate, floor, n, k0, k1, k2,
    N: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    i, j0, j1, j2 = tl.arange(0, N), tl.arange(0, T0), tl.arange(0, T1), tl.arange(0, T2)
    w0, w1, w2 = (
        masses_of(masses, j0, k0, WEIGHTED),
        masses_of(masses + k0, j1, k1, WEIGHTED),
        masses_of(masses + k0 + k1, j2, k2, WEIGHTED),
    )
    l0 = logits_of(d0, i, j0, 0, n, k0, own, length, self_mask)
    l1 = logits_of(d1, i, j1, k0, n, k1, own, length, self_mask)
    l2 = logits_of(d2, i, j2, k0 + k1, n, k2, own, length, self_mask)
    return _signed(l0, l1, l2, w0, w1, w2, rate, floor, n, k0, k1, k2, N, T0, T1, T2)


@triton.jit
@no_type_check
def whole_measure(
    x, y0, y1, y2, bx, b0, b1, b2, sx, s0, s1, s2, masses, own, kept, totals,
    n, d, k0, k1, k2, N: tl.constexpr, T0: tl.constexpr,
    T1: tl.constexpr, T2: tl.constexpr, D: tl.constexpr, PRODUCTS: tl.constexpr, WEIGHTED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A program per problem: its sum of w_j dist_ij, and the distances if they are to be kept."""
    problem = tl.program_id(0).to(tl.int64)
    i, j0, j1, j2 = tl.arange(0, N), tl.arange(0, T0), tl.arange(0, T1), tl.arange(0, T2)
    x, y0, y1, y2 = x + problem * bx, y0 + problem * b0, y1 + problem * b1, y2 + problem * b2
    d0, d1, d2 = _computed(x, sx, y0, y1, y2, s0, s1, s2, own, n, d, k0, k1, k2, N, T0, T1, T2, D, PRODUCTS)
    targets = k0 + k1 + k2
    if KEEP:
        kept += problem * n * targets
        keep_tile(kept, d0, i, 0, j0, n, k0, targets)
        keep_tile(kept, d1, i, k0, j1, n, k1, targets)
        keep_tile(kept, d2, i, k0 + k1, j2, n, k2, targets)
    masses += problem * targets
    rows = _row_totals(d0, masses_of(masses, j0, k0, WEIGHTED)) + _row_totals(d1, masses_of(masses + k0, j1, k1, WEIGHTED))
    rows += _row_totals(d2, masses_of(masses + k0 + k1, j2, k2, WEIGHTED))
    tl.store(totals + problem, tl.sum(tl.where(i < n, rows, 0.0), 0))


@triton.jit
@no_type_check
def _row_totals(distance, mass):
    """Columns beside the edge have no mass, and finite distances unless a query's is not."""
    return tl.sum(distance * mass[None, :], 1)


@triton.jit
@no_type_check
def whole_forces(
    x, y0, y1, y2, bx, b0, b1, b2, sx, s0, s1, s2, masses, own, kept, lengths, rates, floor, self_mask, squares,
    n, d, k0, k1, k2, N: tl.constexpr, T0: tl.constexpr,
    T1: tl.constexpr, T2: tl.constexpr, D: tl.constexpr, PRODUCTS: tl.constexpr, WEIGHTED: tl.constexpr, KEEP: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """A program per problem and share of the dimensions: the sum of squares of the force of every temperature, squares [R, b, shares]."""
    problem, share, shares = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x, y0, y1, y2 = x + problem * bx, y0 + problem * b0, y1 + problem * b1, y2 + problem * b2
    targets = k0 + k1 + k2
    kept += problem * n * targets
    d0, d1, d2 = _whole_distances(x, sx, y0, y1, y2, s0, s1, s2, own, kept, n, d, k0, k1, k2, N, T0, T1, T2, D, PRODUCTS, KEEP)
    masses, length = masses + problem * targets, tl.load(lengths + problem)
    for r in range(R):
        rate = tl.load(rates + r)
        c0, c1, c2 = _whole_coefficients(d0, d1, d2, length, self_mask, own, masses, rate, floor, n, k0, k1, k2, N, T0, T1, T2, WEIGHTED)
        entries = tl.zeros((N, D), tl.float32)
        for start in range(share * D, d, shares * D):
            dims = start + tl.arange(0, D)
            force = _whole_force(c0, c1, c2, y0, y1, y2, s0, s1, s2, dims, d, k0, k1, k2, N, T0, T1, T2, D, PRODUCTS)
            entries += force * force
        tl.store(squares + (r * tl.num_programs(0) + problem) * shares + share, tl.sum(tl.sum(entries, 1), 0))


@triton.jit
@no_type_check
def _whole_force(
    c0, c1, c2, y0, y1, y2, s0, s1, s2, dims, d, k0, k1, k2,
    N: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, D: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Coefficients times targets at some dimensions; rows of coefficients sum to 0, so the centre is taken off for the rounding alone."""
    p0, p1, p2, low, high = _whole_targets(y0, y1, y2, s0, s1, s2, dims, d, k0, k1, k2, T0, T1, T2, PRODUCTS)
    centre = _centre(low, high, PRODUCTS)
    force = weighted(c0, shifted(p0, centre, PRODUCTS), tl.zeros((N, D), tl.float32), PRODUCTS)
    force = weighted(c1, shifted(p1, centre, PRODUCTS), force, PRODUCTS)
    return weighted(c2, shifted(p2, centre, PRODUCTS), force, PRODUCTS)


@triton.jit
@no_type_check
def whole_velocity(
    x, y0, y1, y2, bx, b0, b1, b2, sx, s0, s1, s2, masses, own, kept, lengths, rates, floor, self_mask, factors, velocity,
    n, d, k0, k1, k2, N: tl.constexpr, T0: tl.constexpr,
    T1: tl.constexpr, T2: tl.constexpr, D: tl.constexpr, PRODUCTS: tl.constexpr, WEIGHTED: tl.constexpr, KEEP: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """A program per problem and share of the dimensions: the coefficients of all temperatures are added before the one product."""
    problem, share, shares = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x, y0, y1, y2 = x + problem * bx, y0 + problem * b0, y1 + problem * b1, y2 + problem * b2
    targets = k0 + k1 + k2
    kept += problem * n * targets
    d0, d1, d2 = _whole_distances(x, sx, y0, y1, y2, s0, s1, s2, own, kept, n, d, k0, k1, k2, N, T0, T1, T2, D, PRODUCTS, KEEP)
    masses, length = masses + problem * targets, tl.load(lengths + problem)
    t0, t1, t2 = tl.zeros((N, T0), tl.float32), tl.zeros((N, T1), tl.float32), tl.zeros((N, T2), tl.float32)
    for r in range(R):
        rate, factor = tl.load(rates + r), tl.load(factors + r * tl.num_programs(0) + problem)
        c0, c1, c2 = _whole_coefficients(d0, d1, d2, length, self_mask, own, masses, rate, floor, n, k0, k1, k2, N, T0, T1, T2, WEIGHTED)
        t0, t1, t2 = t0 + factor * c0, t1 + factor * c1, t2 + factor * c2
    velocity, i = velocity + problem * n * d, tl.arange(0, N)
    for start in range(share * D, d, shares * D):
        dims = start + tl.arange(0, D)
        force = _whole_force(t0, t1, t2, y0, y1, y2, s0, s1, s2, dims, d, k0, k1, k2, N, T0, T1, T2, D, PRODUCTS)
        tl.store(velocity + places(i, dims, d), force, mask=(i[:, None] < n) & (dims[None, :] < d))
