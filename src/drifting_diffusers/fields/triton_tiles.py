"""The drifting field of problems too large for one program, in tiles of rows (queries) and columns (targets); distances lie in memory.

A softmax over queries needs all rows and one over targets all columns, so there are four passes over the distances: they are written with the minima of their
rows and columns, summed on both axes, multiplied for the norms, multiplied for the velocity. What tiles find is stored apart and added up afterwards, in
one order: no atomic sums, so that two runs agree to the last bit.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .triton_kernels import (
    affinities,
    keep_tile,
    kept_tile,
    logits_of,
    masses_of,
    places,
    product,
    roots,
    roots_of_softmax,
    row_squares,
    samples,
    shifted,
    weighted,
)


@triton.jit
@no_type_check
def _problem_and_tile(tiles):
    """Of this program, where every problem has so many tiles, neighbours in the grid. A grid's other axes end at 65535."""
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles


@triton.jit
@no_type_check
def tile_distances(
    x, y, bx, by, sx, sy, centres, masses, own, kept, totals, near_rows, near_columns,
    n, d, first, count, targets, tile0, tiles,
    N: tl.constexpr, T: tl.constexpr, D: tl.constexpr, PRODUCTS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """A program per tile of one piece: its distances, its part of sum w_j dist_ij, and its rows' and columns' minima, own pairs left out."""
    row_tiles = tl.cdiv(n, N)
    problem, tile = _problem_and_tile(row_tiles * tl.cdiv(count, T))
    row_tile, column_tile = tile % row_tiles, tile // row_tiles
    i, j = row_tile * N + tl.arange(0, N), column_tile * T + tl.arange(0, T)
    x, y, centres = x + problem * bx, y + problem * by, centres + problem * d
    g, xs, ys = tl.zeros((N, T), tl.float32), tl.zeros((N,), tl.float32), tl.zeros((T,), tl.float32)
    for start in range(0, d, D):
        dims = start + tl.arange(0, D)
        centre = tl.load(centres + dims, mask=dims < d, other=0.0)
        q, p = shifted(samples(x, sx, i, n, dims, d), centre, PRODUCTS), shifted(samples(y, sy, j, count, dims, d), centre, PRODUCTS)
        g, xs, ys = product(q, p.T, g, PRODUCTS), xs + row_squares(q), ys + row_squares(p)
    distance = roots(g, i, first + j, xs, ys, own)
    keep_tile(kept + problem * n * targets, distance, i, first, j, n, count, targets)
    inside = (i[:, None] < n) & (j[None, :] < count)
    mass = masses_of(masses + problem * targets + first, j, count, WEIGHTED)
    total = tl.sum(tl.sum(tl.where(inside, distance * mass[None, :], 0.0), 1), 0)
    tl.store(totals + (problem * row_tiles + row_tile) * tiles + tile0 + column_tile, total)
    others = inside & ((i[:, None] != first + j[None, :]) | (i[:, None] >= own))
    distance = tl.where(others, distance, float("inf"))
    tl.store(near_rows + (problem * tiles + tile0 + column_tile) * n + i, tl.min(distance, 1), mask=i < n)
    tl.store(near_columns + (problem * row_tiles + row_tile) * targets + first + j, tl.min(distance, 0), mask=j < count)


@triton.jit
@no_type_check
def tile_sums(
    kept, near_rows, near_columns, problems, own, lengths, rates, self_mask, row_sums, column_sums,
    n, targets, N: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A program per tile: its part of what both softmaxes divide by, for every temperature: row_sums [R, b, tiles, n], column_sums [R, b, tiles, targets]."""
    row_tiles = tl.cdiv(n, N)
    column_tiles = tl.cdiv(targets, T)
    problem, tile = _problem_and_tile(row_tiles * column_tiles)
    row_tile, column_tile = tile % row_tiles, tile // row_tiles
    i, j = row_tile * N + tl.arange(0, N), column_tile * T + tl.arange(0, T)
    distance = kept_tile(kept + problem * n * targets, i, 0, j, n, targets, targets)
    logits = logits_of(distance, i, j, 0, n, targets, own, tl.load(lengths + problem), self_mask)
    near_row = tl.load(near_rows + problem * n + i, mask=i < n, other=0.0)
    near_column = tl.load(near_columns + problem * targets + j, mask=j < targets, other=0.0)
    for r in range(R):
        rate = tl.load(rates + r)
        over_targets = roots_of_softmax(logits, near_row[:, None], rate)
        over_queries = roots_of_softmax(logits, near_column[None, :], rate)
        place = r * problems + problem
        row_place, column_place = place * column_tiles + column_tile, place * row_tiles + row_tile
        tl.store(row_sums + row_place * n + i, tl.sum(over_targets * over_targets, 1), mask=i < n)
        tl.store(column_sums + column_place * targets + j, tl.sum(over_queries * over_queries, 0), mask=j < targets)


@triton.jit
@no_type_check
def _tile_affinities(logits, i, j, near_row, near_columns, row_scale, column_scales, mass, rate, floor, n, count):
    near_column = tl.load(near_columns + j, mask=j < count, other=0.0)
    column_scale = tl.load(column_scales + j, mask=j < count, other=0.0)
    over_targets, over_queries = roots_of_softmax(logits, near_row[:, None], rate), roots_of_softmax(logits, near_column[None, :], rate)
    inside = (i[:, None] < n) & (j[None, :] < count)
    return affinities(over_targets, over_queries, row_scale, column_scale, mass, floor, inside)


@triton.jit
@no_type_check
def _pulled(
    force, total, y, sy, kept, near_row, near_columns, row_scale, column_scales, masses, i, dims, centre, length, self_mask, own, rate, floor,
    n, d, first, count, targets, T: tl.constexpr,
    PRODUCTS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Force + sum_j a_ij y_j and total + sum_j a_ij over one piece."""
    for start in range(0, count, T):
        j = start + tl.arange(0, T)
        logits = logits_of(kept_tile(kept, i, first, j, n, count, targets), i, j, first, n, count, own, length, self_mask)
        mass = masses_of(masses + first, j, count, WEIGHTED)
        a = _tile_affinities(logits, i, j, near_row, near_columns + first, row_scale, column_scales + first, mass, rate, floor, n, count)
        total += tl.sum(a, 1)
        force = weighted(a, shifted(samples(y, sy, j, count, dims, d), centre, PRODUCTS), force, PRODUCTS)
    return force, total


@triton.jit
@no_type_check
def tile_forces(
    y0, y1, y2, b0, b1, b2, s0, s1, s2, centres, masses, problems, own, kept, near_rows, near_columns, row_scales, column_scales, lengths, rates, floor,
    self_mask, repelled_sides, attracted_sides, squares,
    n, d, k0, k1, k2, N: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    PRODUCTS: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A program per temperature, tile of dimensions and tile of rows, neighbours in this order so that they find the same distances in the cache.

    Stores its sum of squares, squares [R, b, tiles], and A-, A+ of its rows, each [R, b, n].
    """
    targets = k0 + k1 + k2
    row_tiles = tl.cdiv(n, N)
    d_tiles = tl.cdiv(d, D)
    problem, tile = _problem_and_tile(R * d_tiles * row_tiles)
    r, d_tile, row_tile = tile % R, tile // R % d_tiles, tile // R // d_tiles
    i, dims, place = row_tile * N + tl.arange(0, N), d_tile * D + tl.arange(0, D), r * problems + problem
    rate, length, centre = tl.load(rates + r), tl.load(lengths + problem), tl.load(centres + problem * d + dims, mask=dims < d, other=0.0)
    near_row = tl.load(near_rows + problem * n + i, mask=i < n, other=0.0)
    row_scale = tl.load(row_scales + place * n + i, mask=i < n, other=0.0)
    kept, near_columns, column_scales = kept + problem * n * targets, near_columns + problem * targets, column_scales + place * targets
    masses, y0, y1, y2 = masses + problem * targets, y0 + problem * b0, y1 + problem * b1, y2 + problem * b2
    push, repelled = tl.zeros((N, D), tl.float32), tl.zeros((N,), tl.float32)
    push, repelled = _pulled(push, repelled, y0, s0, kept, near_row, near_columns, row_scale, column_scales, masses, i, dims, centre, length,
                             self_mask, own, rate, floor, n, d, 0, k0, targets, T, PRODUCTS, WEIGHTED)  # fmt: skip
    push, repelled = _pulled(push, repelled, y1, s1, kept, near_row, near_columns, row_scale, column_scales, masses, i, dims, centre, length,
                             self_mask, own, rate, floor, n, d, k0, k1, targets, T, PRODUCTS, WEIGHTED)  # fmt: skip
    pull, attracted = tl.zeros((N, D), tl.float32), tl.zeros((N,), tl.float32)
    pull, attracted = _pulled(pull, attracted, y2, s2, kept, near_row, near_columns, row_scale, column_scales, masses, i, dims, centre, length,
                              self_mask, own, rate, floor, n, d, k0 + k1, k2, targets, T, PRODUCTS, WEIGHTED)  # fmt: skip
    force = tl.where((i[:, None] < n) & (dims[None, :] < d), repelled[:, None] * pull - attracted[:, None] * push, 0.0)
    tl.store(squares + (place * row_tiles + row_tile) * d_tiles + d_tile, tl.sum(tl.sum(force * force, 1), 0))
    once = tl.where(d_tile == 0, n, 0)
    tl.store(repelled_sides + place * n + i, repelled, mask=i < once)
    tl.store(attracted_sides + place * n + i, attracted, mask=i < once)


@triton.jit
@no_type_check
def _moved(
    force, sign, y, sy, kept, near_row, near_columns, row_scales, column_scales, others, masses, factors, rates, problem, problems, i, dims, centre,
    length, self_mask, own, floor,
    n, d, first, count, targets, N: tl.constexpr, T: tl.constexpr,
    PRODUCTS: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Force + sign sum_j (sum_R factor_R A_R a_R)_ij y_j over one piece, A the affinity to the other side: one product for all temperatures."""
    for start in range(0, count, T):
        j = start + tl.arange(0, T)
        logits = logits_of(kept_tile(kept, i, first, j, n, count, targets), i, j, first, n, count, own, length, self_mask)
        mass = masses_of(masses + first, j, count, WEIGHTED)
        coefficients = tl.zeros((N, T), tl.float32)
        for r in range(R):
            place = r * problems + problem
            row_scale = tl.load(row_scales + place * n + i, mask=i < n, other=0.0)
            other = tl.load(others + place * n + i, mask=i < n, other=0.0) * tl.load(factors + place)
            a = _tile_affinities(
                logits, i, j, near_row, near_columns + first, row_scale, column_scales + place * targets + first, mass, tl.load(rates + r),
                floor, n, count,
            )  # fmt: skip
            coefficients += (sign * other)[:, None] * a
        force = weighted(coefficients, shifted(samples(y, sy, j, count, dims, d), centre, PRODUCTS), force, PRODUCTS)
    return force


@triton.jit
@no_type_check
def tile_velocity(
    y0, y1, y2, b0, b1, b2, s0, s1, s2, centres, masses, problems, own, kept, near_rows, near_columns, row_scales, column_scales, lengths, rates, floor,
    self_mask, repelled_sides, attracted_sides, factors, velocity,
    n, d, k0, k1, k2, N: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    PRODUCTS: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A program per tile of dimensions and tile of rows."""
    targets = k0 + k1 + k2
    d_tiles = tl.cdiv(d, D)
    problem, tile = _problem_and_tile(d_tiles * tl.cdiv(n, N))
    d_tile, row_tile = tile % d_tiles, tile // d_tiles
    i, dims = row_tile * N + tl.arange(0, N), d_tile * D + tl.arange(0, D)
    length, centre = tl.load(lengths + problem), tl.load(centres + problem * d + dims, mask=dims < d, other=0.0)
    near_row = tl.load(near_rows + problem * n + i, mask=i < n, other=0.0)
    kept, near_columns, masses = kept + problem * n * targets, near_columns + problem * targets, masses + problem * targets
    y0, y1, y2 = y0 + problem * b0, y1 + problem * b1, y2 + problem * b2
    force = tl.zeros((N, D), tl.float32)
    force = _moved(force, -1.0, y0, s0, kept, near_row, near_columns, row_scales, column_scales, attracted_sides, masses, factors, rates, problem, problems,
                   i, dims, centre, length, self_mask, own, floor, n, d, 0, k0, targets, N, T, PRODUCTS, WEIGHTED, R)  # fmt: skip
    force = _moved(force, -1.0, y1, s1, kept, near_row, near_columns, row_scales, column_scales, attracted_sides, masses, factors, rates, problem, problems,
                   i, dims, centre, length, self_mask, own, floor, n, d, k0, k1, targets, N, T, PRODUCTS, WEIGHTED, R)  # fmt: skip
    force = _moved(force, 1.0, y2, s2, kept, near_row, near_columns, row_scales, column_scales, repelled_sides, masses, factors, rates, problem, problems,
                   i, dims, centre, length, self_mask, own, floor, n, d, k0 + k1, k2, targets, N, T, PRODUCTS, WEIGHTED, R)  # fmt: skip
    tl.store(velocity + problem * n * d + places(i, dims, d), force, mask=(i[:, None] < n) & (dims[None, :] < d))
