r"""The released force, fast and exact: what `DriftingField.force` says, in the fewest passes over memory that torch allows.

With Z = d / (s tau_0), tau_0 the largest temperature and e = tau_0 / tau, the affinity of temperature tau is

    a_ij = sqrt( R_ij^e / sum_j R_ij^e  *  C_ij^e / sum_i C_ij^e ),    R_ij = exp(min_j Z_ij - Z_ij),    C_ij = exp(min_i Z_ij - Z_ij)

so one distance matrix and two exponentials serve every temperature: the others are powers. Each axis is shifted by its own minimum. One shift for both
underflows where nearest neighbours are not equally near; where all minima of some problems lie close to each other, which is looked at, it does not, and
a second exponential is saved:

    a_ij = R_ij^e sqrt(g_i^e / sum_j R_ij^e) / sqrt(sum_i g_i^e R_ij^e),    g_i = exp(min_ij Z_ij - min_j Z_ij)

Problems are taken in chunks that stay in the cache, one huge problem in blocks of rows, twice: sums over queries first. Where there are many more dimensions than
targets, squares of forces come from the Gram matrix K of the targets, ||A Y||^2 = tr(A K A^T), and forces of all temperatures are summed before the one
product with the targets. Points are centred per problem: forces do not change, and their rounding error in float32 falls from 1e-3 to 1e-6 where means are 30
standard deviations.

An engine has three stages, because means over all problems of a step, and all processes, stand between them: `measure`, `forces`, `velocity`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..kernels import CHUNK, LEAST_DISTANCE, fill_distances
from ..shapes import Float
from .softmaxes import Softmaxes, exponents_of
from .workspace import WORKSPACE

BLOCK = 2**19
"""Entries of some rows of a huge problem: products with few rows waste what a processor can do."""


@dataclass(frozen=True)
class Sides:
    """Queries and targets of a step's problems, as an engine takes them.

    Attributes:
        queries: [b, n, d], in any floating-point type.
        targets: tensors [b, k, d] that follow one another, those that repel first. Where the first one is `queries`, the same object, less is computed.
        negatives: how many of all t targets repel.
        own: how many of the leading targets belong to the queries, in order, and are masked for them; they need not lie where those do.
        masses: [b, t] in float32, or None where all are 1.
    """

    queries: Tensor
    targets: tuple[Tensor, ...]
    negatives: int
    own: int = 0
    masses: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: at least float32."""
        found = torch.float32
        for points in (self.queries, *self.targets):
            found = torch.promote_types(found, points.dtype)
        return found

    @property
    def count(self) -> int:
        """Targets of a problem."""
        return sum(points.shape[1] for points in self.targets)

    def with_masses(self, masses: Sequence[Tensor | None]) -> "Sides":
        """With the masses of each tensor of targets, all 1 where there are none."""
        if all(mass is None for mass in masses):
            return self
        one = lambda points: torch.ones(points.shape[:2], device=points.device, dtype=self.dtype)
        found = [one(points) if mass is None else mass.detach().to(self.dtype) for points, mass in zip(self.targets, masses, strict=True)]
        return replace(self, masses=torch.cat(found, dim=1))


@runtime_checkable
class Engine(Protocol):
    """Three stages, each called once and in this order."""

    def measure(self) -> tuple[Tensor, Tensor]:
        """Totals [b] of the distances of every problem, weighted with the masses of the targets, and the weights [b] to divide them by."""
        ...

    def forces(self, length: Tensor) -> Float[Tensor, "r b"]:
        """The sum of squares of the force of each temperature, in the coordinates of the queries. Length, [] or [b]: what a temperature of 1 means."""
        ...

    def velocity(self, factors: Tensor) -> Float[Tensor, "b n d"]:
        """The sum of the forces, each times its factor, [r] or [r, b]."""
        ...


class TorchEngine:
    """The engine in torch's own operations, for any device.

    Args:
        sides: what is compared.
        temperatures: kernel widths in lengths, above 0.
        floor: the least affinity, before the masses.
        self_mask: added to the distance of a query to itself, in lengths.
        one_exponential: whether to save the second one where that is exact. It looks at values, so a GPU would wait: not given, on a CPU alone.
        gram: whether squares are taken from the Gram matrix; not given, where that is no more work.
        chunk: entries of a chunk; a problem of more is taken in blocks of rows.
        block: entries of a block of rows.
    """

    def __init__(
        self,
        sides: Sides,
        temperatures: Sequence[float],
        floor: float,
        self_mask: float,
        *,
        one_exponential: bool | None = None,
        gram: bool | None = None,
        chunk: int = CHUNK,
        block: int = BLOCK,
    ):
        self.sides, self.floor, self.self_mask = sides, floor, self_mask
        self.widest, self.exponents = exponents_of(temperatures)
        self.b, self.n, self.d = sides.queries.shape
        self.t = sides.count
        on_cpu = sides.queries.device.type == "cpu"
        self.one_exponential = on_cpu if one_exponential is None else one_exponential
        chunk, block = (chunk, block) if on_cpu else (chunk * 64, block * 64)  # launches cost more than caches save
        entries = self.n * self.t
        chunks = max(1, round(self.b / max(1, chunk // entries)))
        self.at_once = max(1, -(-self.b // chunks))  # problems, as many in each chunk
        self.whole = entries <= max(chunk, block)
        self.rows_at_once = self.n if self.whole else max(1, block // self.t)
        self.gram = self.whole and (self._gram_is_less() if gram is None else gram)
        self.dtype = sides.dtype
        self._buffers: dict[str, Tensor] = {}
        self._centred: slice | None = None  # the problems whose targets are in their buffer
        self._over = self.whole and not self.gram  # whether forces may lie where distances did
        # by the first problem of each chunk, so that what a stage needs no longer goes as it proceeds
        self._distance: dict[int, Tensor] = {}
        self._products: dict[int, Tensor] = {}  # of targets, on the Gram route
        self._made: dict[int, Tensor] = {}  # forces of each temperature; on the Gram route affinities

    # -- stages

    def measure(self) -> tuple[Tensor, Tensor]:
        b, n, t, masses = self.b, self.n, self.t, self.sides.masses
        self.centre, self.nearest_target, self.nearest_query = self._new(b, 1, self.d), self._new(b, n, 1), self._new(b, 1, t)
        totals = self._new(b)
        for part in self._parts():
            columns = self._distances(part)
            totals[part] = columns.sum(1) if masses is None else (columns * masses[part]).sum(1)
        return totals, totals.new_full((b,), float(n * t)) if masses is None else n * masses.sum(1)

    def forces(self, length: Tensor) -> Float[Tensor, "r b"]:
        squares = self._new(len(self.exponents), self.b)
        for part in self._parts():
            softmaxes = self._softmaxes(part, length if length.ndim == 0 else length[part])
            squares[:, part] = self._forces(part, softmaxes).T
            if not self._over:
                WORKSPACE.give(softmaxes.distance)
        return squares

    def velocity(self, factors: Tensor) -> Float[Tensor, "b n d"]:
        b, n, t, r = self.b, self.n, self.t, len(self.exponents)
        factors = (factors.T if factors.ndim == 2 else factors.expand(b, r))[:, None].contiguous()  # [b, 1, r]
        found = self._new(b, n, self.d)
        for part in self._parts():
            made = self._made.pop(part.start).view(-1, r, n * (t if self.gram else self.d))
            if self.gram:
                torch.bmm(torch.bmm(factors[part], made).view(-1, n, t), self._targets(part), out=found[part])
            else:
                torch.bmm(factors[part], made, out=found[part].view(-1, 1, n * self.d))
            WORKSPACE.give(made)
        self._centred = None
        while self._buffers:
            WORKSPACE.give(self._buffers.popitem()[1])
        return found

    # -- distances

    def _distances(self, part: slice) -> Float[Tensor, "c t"]:
        """Distances of some problems and the nearest of every row and column; returns their sums over queries."""
        sides, c = self.sides, part.stop - part.start
        distance = self._distance[part.start] = self._room_of_distances(c)
        self.centre[part] = sum(points[part].sum(dim=1, keepdim=True, dtype=self.dtype) for points in sides.targets) / self.t
        targets = self._targets(part)
        mine = sides.targets[0] is sides.queries  # own pairs may lie apart: a wrapper may move queries and not negatives
        queries = targets[:, : self.n] if mine else sides.queries[part] - self.centre[part]
        products = torch.bmm(targets, targets.mT, out=self._lent(c, self.t, self.t)) if self.gram else None
        if products is not None:
            self._products[part.start] = products
        square = lambda points: torch.linalg.vector_norm(points, dim=-1).square_()
        of_targets = square(targets) if products is None else products.diagonal(dim1=1, dim2=2)
        of_queries = of_targets[:, : self.n] if mine else square(queries)
        total, nearest = targets.new_zeros(len(targets), self.t), self.nearest_query[part].fill_(math.inf)
        for rows in self._rows():
            found = distance[:, rows]
            if products is not None and mine:
                torch.add(of_queries[:, rows, None], of_targets[:, None, :], out=found)
                found.sub_(products[:, rows], alpha=2).clamp_(min=LEAST_DISTANCE**2).sqrt_()
            else:
                fill_distances(found, queries[:, rows], targets, of_queries[:, rows], of_targets)
            total += self._set_own(found, rows, LEAST_DISTANCE).sum(1)
            self._set_own(found, rows, math.inf)  # how far the mask puts them depends on the length, which is not known yet
            torch.amin(found, dim=2, keepdim=True, out=self.nearest_target[part, rows])
            nearest.copy_(torch.minimum(nearest, found.amin(dim=1, keepdim=True)))
        return total

    def _targets(self, part: slice) -> Float[Tensor, "c t d"]:
        """The targets of some problems, centred, in memory that is used again: to centre them once more costs less than fresh memory."""
        found = self._buffer("targets", self.at_once, self.t, self.d)[: part.stop - part.start]
        if self._centred != part:
            begin = 0
            for points in self.sides.targets:
                end = begin + points.shape[1]
                torch.sub(points[part], self.centre[part], out=found[:, begin:end])
                begin = end
            self._centred = part
        return found

    # -- forces

    def _softmaxes(self, part: slice, length: Tensor) -> Softmaxes:
        c, r = part.stop - part.start, len(self.exponents)
        return Softmaxes(
            self._distance.pop(part.start),
            self.nearest_target[part],
            self.nearest_query[part],
            own=self.sides.own,
            set_own=self._set_own,
            length=length,
            self_mask=self.self_mask,
            widest=self.widest,
            exponents=self.exponents,
            rows=self._rows(),
            out=self._lent(c, r, self.n, self.t)
            if self.gram
            else self._buffer("affinities", self.at_once, r, self.rows_at_once, self.t)[:c],
            one_exponential=self.one_exponential,
            buffer=self._buffer,
        )

    def _forces(self, part: slice, softmaxes: Softmaxes) -> Float[Tensor, "c r"]:
        """The forces of some problems, or what they are made from, and the sums of their squares."""
        c, r, m = part.stop - part.start, len(self.exponents), self.sides.negatives
        products = self._products.pop(part.start) if self.gram else None
        targets = None if self.gram else self._targets(part)
        made = self._made[part.start] = softmaxes.out if self.gram else self._room_of_forces(c, softmaxes.distance)
        squares = self._new(c, r).zero_()
        for rows in self._rows():
            found = softmaxes.affinities(rows)
            if self.floor:
                found.clamp_(min=self.floor)
            if self.sides.masses is not None:
                found.mul_(self.sides.masses[part, None, None, :])
            negative, positive = found[..., :m], found[..., m:]
            repulsion, attraction = negative.sum(-1, keepdim=True), positive.sum(-1, keepdim=True)
            negative.mul_(attraction.neg_())  # both sides carry the same total mass, so the terms in x cancel
            positive.mul_(repulsion)
            if products is not None:
                flat = found.view(c, -1, self.t)
                force = torch.bmm(flat, products, out=self._buffer("squares", self.at_once, r * self.n, self.t)[:c]).mul_(flat)
                squares += force.view(c, r, -1).sum(-1)
                continue
            assert targets is not None
            force = made[:, :, rows]
            if self.whole:
                torch.bmm(found.view(c, -1, self.t), targets, out=force.view(c, -1, self.d))
            else:  # of one problem
                flat = found[0].flatten(0, 1)
                force.copy_(
                    torch.mm(flat, targets[0], out=self._buffer("force", r * self.rows_at_once, self.d)[: len(flat)]).view_as(force)
                )
            squares += torch.linalg.vector_norm(force, dim=-1).square_().sum(-1)  # of rows first: a norm of millions loses digits
        if products is not None:
            WORKSPACE.give(products)
        return squares

    # -- pieces

    def _gram_is_less(self) -> bool:
        """Products of all targets, squares and the velocity, t^2 d + r n t^2 + n t d, beside distances and forces, n t d + r n t d."""
        n, t, d, r = self.n, self.t, self.d, len(self.exponents)
        return t * d + r * n * t + n * d <= (1 + r) * n * d

    def _parts(self) -> Iterator[slice]:
        return (slice(i, min(i + self.at_once, self.b)) for i in range(0, self.b, self.at_once))

    def _rows(self) -> Iterator[slice]:
        return (slice(i, min(i + self.rows_at_once, self.n)) for i in range(0, self.n, self.rows_at_once))

    def _set_own(self, matrix: Float[Tensor, "c q t"], rows: slice, value: float | Tensor) -> Tensor:
        """Write a value, a number or [c, 1], into the entries of some rows that pair a query with itself, in place."""
        count = max(0, min(self.sides.own - rows.start, matrix.shape[1]))
        matrix.diagonal(offset=rows.start, dim1=1, dim2=2)[:, :count] = value
        return matrix

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.sides.queries.device)

    def _room_of_distances(self, c: int) -> Tensor:
        """For distances of some problems, and later, where that can be, for their forces."""
        size = c * self.n * self.t
        return self._lent(max(size, c * self.n * self.d * len(self.exponents) if self._over else 0))[:size].view(c, self.n, self.t)

    def _room_of_forces(self, c: int, distance: Tensor) -> Tensor:
        """Over their distances, of which nothing is left when the first force is written; or beside, where rows come one after another."""
        shape = (c, len(self.exponents), self.n, self.d)
        return distance.as_strided((math.prod(shape),), (1,)).view(shape) if self._over else self._lent(*shape)

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that every chunk writes anew: fresh memory costs as much as a pass over it."""
        if name not in self._buffers:
            self._buffers[name] = self._lent(*shape)
        return self._buffers[name]

    def _lent(self, *shape: int) -> Tensor:
        return WORKSPACE.take(shape, self.dtype, self.sides.queries.device)
