"""Both softmaxes of a matrix of distances, at several temperatures, from one or two exponentials; see `engine`."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import LEAST_DISTANCE
from ..shapes import Float

HIGHEST_POWER = 64
"""Of an exponential that is taken by multiplication; other ratios of temperatures by `torch.pow`."""
LEAST_AT_ONCE = 1e-20
"""Temperature above which a distance over it is finite, so that differences may be taken afterwards, in one pass with the division."""


class Softmaxes:
    """The affinities of some problems: every one is sqrt(softmax over targets x softmax over queries).

    Args:
        distance: of queries and targets; it is written to.
        nearest_target: the least distance of every row, own pairs apart.
        nearest_query: the least distance of every column, own pairs apart.
        own: how many of the leading targets are the queries.
        set_own: writes into the own pairs of some rows.
        length: what distances are measured in, [] or [c].
        self_mask: added to the distance of own pairs, in lengths.
        widest: the largest temperature.
        exponents: the largest temperature over each.
        rows: blocks of rows; several for one huge problem.
        out: memory for the affinities of a block of rows, [c, r, rows, t].
        one_exponential: whether to look whether one is enough.
        buffer: memory by name and shape.
    """

    def __init__(
        self,
        distance: Float[Tensor, "c n t"],
        nearest_target: Float[Tensor, "c n 1"],
        nearest_query: Float[Tensor, "c 1 t"],
        *,
        own: int,
        set_own: Callable[[Tensor, slice, Any], Tensor],
        length: Tensor,
        self_mask: float,
        widest: float,
        exponents: Sequence[float],
        rows: Iterable[slice],
        out: Tensor,
        one_exponential: bool,
        buffer: Callable[..., Tensor],
    ):
        self.distance, self.out, self.exponents, self.buffer = distance, out, exponents, buffer
        one = lambda value: value if value.ndim == 0 else value[:, None, None]
        masked, self.scale = one(length * self_mask + LEAST_DISTANCE), one(1 / (length * widest))
        nearest = nearest_target.clone(), nearest_query.clone()
        nearest[0][:, :own].copy_(torch.minimum(nearest[0][:, :own], masked))
        nearest[1][:, :, :own].copy_(torch.minimum(nearest[1][:, :, :own], masked))
        self.of_rows, self.of_columns = nearest
        self.at_once = self.scale.ndim == 0 and self.scale.device.type == "cpu" and widest > LEAST_AT_ONCE
        self.once = one_exponential and self._close()
        self.one_block = len(rows := list(rows)) == 1
        for block in rows:
            set_own(distance[:, block], block, masked if masked.ndim == 0 else masked[:, :, 0])
        self._sum(rows)

    def affinities(self, rows: slice) -> Float[Tensor, "c r q t"]:
        """Those of some rows, in memory that is used again."""
        found = self._out(rows)
        if not (self.once and self.one_block):  # else the powers lie there already
            self._powers(*(self._first(rows) if self.once else self._middle(rows)))
        return found.mul_(self.row_factors[:, :, rows]).mul_(self.column_factors)

    def _sum(self, rows: list[slice]) -> None:
        """The sums of both softmaxes, for whole rows and columns."""
        c, n, t = self.distance.shape
        r, powers = len(self.exponents), self.distance.new_tensor(self.exponents).view(1, -1, 1, 1)
        sums, columns = self.distance.new_empty(c, r, n, 1), self.distance.new_zeros(c, r, 1, t)
        weights = ((self.least - self.of_rows).mul_(self.scale)[:, None] * powers).exp_() if self.once else None  # g
        for block in rows:
            if weights is not None:
                found = self._powers(*self._exponential(self.of_rows[:, block], block, keep=True))
                columns += weights[:, :, block].mT @ found
            else:
                columns += self._powers(*self._exponential(self.of_columns, block)).sum(2, keepdim=True)
                found = self._powers(*self._exponential(self.of_rows[:, block], block))
            torch.sum(found, -1, keepdim=True, out=sums[:, :, block])
        self.column_factors = columns.rsqrt_()
        self.row_factors = sums.rsqrt_() if weights is None else weights.div_(sums).sqrt_()

    # -- exponentials

    def _close(self) -> bool:
        """Whether nearest neighbours are so equally near that one exponential can be shifted by the minima of rows for both axes."""
        self.least = self.of_rows.amin((1, 2), keepdim=True)
        most = torch.maximum(self.of_rows.amax((1, 2), keepdim=True), self.of_columns.amax((1, 2), keepdim=True))
        bound = 60 if self.distance.dtype == torch.float32 else 600  # exp(-87) and exp(-708) are the least normal numbers
        return bool(((most - self.least).mul_(self.scale) * max(self.exponents) < bound).all())

    def _exponential(self, shift: Tensor, rows: slice, keep: bool = False) -> tuple[Tensor, Tensor]:
        """exp((shift - d) / (s tau_0)) of some rows, and where its powers go. It lies in place of the distances, if it is kept for later, or where its first power goes."""
        out = self._out(rows)
        found = self.distance[:, rows] if keep and not self.one_block else out[:, self.exponents.index(1.0)]
        if self.at_once:
            torch.sub(shift * self.scale, self.distance[:, rows], alpha=float(self.scale), out=found)
        else:
            torch.sub(shift, self.distance[:, rows], out=found).mul_(self.scale)
        return found.exp_(), out

    def _first(self, rows: slice) -> tuple[Tensor, Tensor]:
        """What `_exponential` kept."""
        return self.distance[:, rows], self._out(rows)

    def _middle(self, rows: slice) -> tuple[Tensor, Tensor]:
        """sqrt(R C) of some rows."""
        return self._exponential((self.of_rows[:, rows] + self.of_columns).mul_(0.5), rows)

    def _out(self, rows: slice) -> Tensor:
        return self.out[:, :, : rows.stop - rows.start]

    # -- powers

    def _powers(self, first: Tensor, out: Tensor) -> Tensor:
        """Every power of an exponential, each from smaller ones."""
        done = {1: first}
        for i in sorted(range(len(self.exponents)), key=self.exponents.__getitem__):
            exponent, there = self.exponents[i], out[:, i]
            power = round(exponent)
            if abs(exponent - power) > 1e-9 or power > HIGHEST_POWER:
                torch.pow(first, exponent, out=there)
            elif power in done:
                if done[power].data_ptr() != there.data_ptr():
                    there.copy_(done[power])
            else:
                done[power] = self._power(power, done, there)
        return out

    def _power(self, power: int, done: dict[int, Tensor], out: Tensor | None = None) -> Tensor:
        """One product of two powers, which are made first if need be."""
        if power in done:
            return done[power]
        half = next((p for p in sorted(done, reverse=True) if power - p in done), None)
        if half is None:
            half = power // 2 if power % 2 == 0 else 1 << (power.bit_length() - 1)
        first, second = self._power(half, done), self._power(power - half, done)
        shape = first.shape
        out = self.buffer(f"power {power}", *self.out.shape[:1], *self.out.shape[2:])[: shape[0], : shape[1]] if out is None else out
        done[power] = torch.mul(first, second, out=out)
        return out


def exponents_of(temperatures: Sequence[float]) -> tuple[float, list[float]]:
    """The largest temperature, and what it is over each."""
    widest = max(temperatures)
    return widest, [1.0 if math.isclose(widest, t, rel_tol=1e-12) else widest / t for t in temperatures]
