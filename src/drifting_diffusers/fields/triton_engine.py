r"""The exact drifting field on a GPU: `TritonEngine` is the three stages of a step, between which means over all processes are taken.

    measure()         sum w_j dist_ij and its weights, of which the length s is made
    forces(s)         |F_R|^2 of every temperature R, of which its rms is made
    velocity(1/rms)   sum_R factor_R F_R

Forward only: the gradient of the loss is -2 V / (n S s_in B), without a graph.

**Whole problems** (up to `triton_plan.WHOLE` entries of queries times targets): a program each, everything between reading samples and writing a result in registers, forces
of the temperatures squared where they are made. With S = (n + t) d samples of so many bytes (t d where the queries are targets), M = 4 n t bytes of distances:

    stage      reads                        writes
    measure    S                            M if kept
    forces     S, or t d and M if kept      4 R a problem and share
    velocity   S, or t d and M if kept      n d

Distances are kept where M is small beside S, or where a problem's dimensions are shared among programs; else they are computed again, and the second
reading of the same samples by the same program comes out of the cache. The floor is two readings and one writing: with the shapes of the paper
(64/64/16 of 256 dimensions, bfloat16) this is 1.4 times the floor (3 S + n d).

**Tiles** (all others): M is written once and read three times (sums, norms, velocity), with tiles of the same distances beside each other, so that the
temperatures find them in the cache; samples are read once a tile of the other side, and what tiles sum is M / 32 or so.

Rounding. Everything is float32, and centred: forces are translation invariant, so a problem's targets are shifted by a value of each dimension. `products`:

    ieee     float32 products (the default of float32 and float16 samples)
    tf32x3   three TF32 products for one of float32: tensor cores, 21 bits
    bf16     (the default of bfloat16 samples, and for them alone) tensor cores. The centre is chosen such that differences are bfloat16 numbers, so
             that distances are made of exact products; coefficients are two halves of together 16 bits
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ..kernels import LEAST_DISTANCE
from ..shapes import Float
from .triton_plan import Plan as Plan
from .triton_plan import available as available
from .triton_plan import check_samples, padded, pieces_of, plan_of, products_of


class TritonEngine:
    """The drifting field of some problems: kernel Laplace, two-sided softmax, masses after it, masses of 0 present.

    Stages are called in order, each once or more. Every result is on the device; nothing waits for it.

    Args:
        queries: [b, n, d] in float32, bfloat16 or float16, on a CUDA device.
        targets: what repels, then what attracts, [b, k_i, d], one after the other along axis 1; the first may be `queries` itself, and is then read once.
        own: how many of the leading targets are the queries, in order: those pairs (i, i) are masked.
        negatives: how many of all targets repel.
        masses: [b, t] of all targets; None where all are 1.
        temperatures: kernel widths, in lengths.
        floor: the least affinity.
        self_mask: added to the distance, in lengths, of own pairs.
        products: "ieee", "tf32x3" or "bf16", see above; "auto" is "bf16" for bfloat16 samples and "ieee" for all others.
        plan: how the work is cut; by default as `plan_of` says.

    Raises:
        ImportError: without Triton.
        ValueError: for another device or dtype, or shapes that do not fit.
    """

    def __init__(
        self,
        queries: Float[Tensor, "b n d"],
        targets: tuple[Tensor, ...],
        own: int,
        negatives: int,
        masses: Float[Tensor, "b t"] | None,
        temperatures: tuple[float, ...],
        floor: float,
        self_mask: float,
        *,
        products: str = "auto",
        plan: Plan | None = None,
    ):
        check_samples(queries, targets, own, negatives, masses, products)
        self.x, self.pieces = pieces_of(queries, targets, negatives)
        self.b, self.n, self.d = self.x.shape
        self.counts = [piece.shape[1] for piece in self.pieces]
        self.own, self.floor, self.self_mask, self.temperatures = own, float(floor), float(self_mask), tuple(map(float, temperatures))
        self.masses = None if masses is None else masses.to(torch.float32).contiguous()
        self.products = products_of(products, self.x.dtype)
        self.plan = plan or plan_of(self.x, self.counts, own, self.products)
        self.rates = torch.tensor([0.5 / tau for tau in self.temperatures], dtype=torch.float32).to(self.x.device, non_blocking=True)
        self.lengths: Tensor | None = None
        self._stages: Any = (_Whole if self.plan.whole else _Tiles)(self)

    @property
    def targets(self) -> int:
        """T, of all pieces."""
        return sum(self.counts)

    def measure(self) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """(sum_ij w_j dist_ij, n sum_j w_j) of every problem: totals and weights of the mean distance."""
        with _on(self.x.device):
            totals = self._stages.measure()
        weights = totals.new_full((self.b,), float(self.n * self.targets)) if self.masses is None else self.n * self.masses.sum(1)
        return totals, weights

    def forces(self, length: Tensor) -> Float[Tensor, "r b"]:
        """|F_R|^2, summed over queries and dimensions, of every temperature and problem, for a length [] or [b]."""
        self._stages.ready()
        self.lengths = length.to(self.x.device, torch.float32).expand(self.b).contiguous()
        with _on(self.x.device):
            return self._stages.forces()

    def velocity(self, factors: Tensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "b n d"]:
        """sum_R factors_R F_R, at the length of the last call of `forces`, for factors [R] or [R, b]."""
        if self.lengths is None:
            raise RuntimeError(
                "velocity needs the length that forces(length) was called with; call measure(), forces(length), velocity(factors)"
            )
        factors = factors.to(self.x.device, torch.float32)
        factors = (factors[:, None] if factors.ndim == 1 else factors).expand(len(self.temperatures), self.b).contiguous()
        found = torch.empty((self.b, self.n, self.d), dtype=dtype, device=self.x.device)
        with _on(self.x.device):
            self._stages.velocity(factors, found)
        return found

    def empty(self, *shape: int) -> Tensor:
        """A float32 tensor on the device, not yet filled."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)


class _Whole:
    """A program per problem."""

    def __init__(self, engine: TritonEngine):
        self.engine = engine
        sizes = [padded(engine.n), *map(padded, engine.counts)]
        self.kept: Tensor | None = None
        self.sizes = dict(zip(("N", "T0", "T1", "T2"), sizes, strict=True))
        self.warps = 4 if sizes[0] * sum(sizes[1:]) <= 2**12 else 8

    def measure(self) -> Tensor:
        e = self.engine
        if e.plan.keep:
            self.kept = e.empty(e.b, e.n, e.targets)
        totals = e.empty(e.b)
        _whole().whole_measure[(e.b,)](*self._samples(), self._kept(), totals, **self._shape(), **_options(self.warps))
        return totals

    def ready(self) -> None:
        if self.engine.plan.keep and self.kept is None:
            self.measure()

    def forces(self) -> Tensor:
        e = self.engine
        squares = e.empty(len(e.temperatures), e.b, e.plan.shares)
        _whole().whole_forces[(e.b, e.plan.shares)](*self._samples(), *self._law(), squares, **self._steps(), **_options(self.warps))
        return squares.sum(2)

    def velocity(self, factors: Tensor, found: Tensor) -> None:
        e = self.engine
        _whole().whole_velocity[(e.b, e.plan.shares)](
            *self._samples(), *self._law(), factors, found, **self._steps(), **_options(self.warps)
        )

    def _kept(self) -> Tensor:
        return self.engine.rates if self.kept is None else self.kept  # what is not kept is not looked at

    def _samples(self) -> tuple[Any, ...]:
        e = self.engine
        masses = e.rates if e.masses is None else e.masses
        tensors = (e.x, *e.pieces)
        return (*tensors, *(t.stride(0) for t in tensors), *(t.stride(1) for t in tensors), masses, e.own)

    def _law(self) -> tuple[Any, ...]:
        e = self.engine
        return self._kept(), e.lengths, e.rates, e.floor, e.self_mask

    def _shape(self) -> dict[str, Any]:
        e = self.engine
        counts = dict(zip(("k0", "k1", "k2"), e.counts, strict=True))
        choices = {"D": e.plan.dimensions, "PRODUCTS": e.products, "WEIGHTED": e.masses is not None, "KEEP": e.plan.keep}
        return {"n": e.n, "d": e.d, **counts, **self.sizes, **choices}

    def _steps(self) -> dict[str, Any]:
        e = self.engine
        return {**self._shape(), "R": len(e.temperatures)}


class _Tiles:
    """Many programs per problem."""

    def __init__(self, engine: TritonEngine):
        e = self.engine = engine
        self.row_tiles, self.tiles = math.ceil(e.n / e.plan.rows), [math.ceil(count / e.plan.columns) for count in e.counts]
        self.d_tiles = math.ceil(e.d / e.plan.dimensions)
        self.kept: Tensor | None = None

    def measure(self) -> Tensor:
        e = self.engine
        self.kept, self.centres = e.empty(e.b, e.n, e.targets), _centres(e.x, e.pieces, e.products)
        totals, tiles = e.empty(e.b, self.row_tiles, sum(self.tiles)), sum(self.tiles)
        near_rows, near_columns = e.empty(e.b, tiles, e.n), e.empty(e.b, self.row_tiles, e.targets)
        for k, (y, count) in enumerate(zip(e.pieces, e.counts, strict=True)):
            if count:
                first = {"first": sum(e.counts[:k]), "count": count, "targets": e.targets, "tile0": sum(self.tiles[:k]), "tiles": tiles}
                _tiled().tile_distances[(e.b * self.row_tiles * self.tiles[k],)](
                    *(e.x, y, e.x.stride(0), y.stride(0), e.x.stride(1), y.stride(1), self.centres, self._masses(), e.own),
                    *(self.kept, totals, near_rows, near_columns),
                    **first, **self._sizes(32), **self._products(), **_options(4),
                )  # fmt: skip
        self.near_rows, self.near_columns = near_rows.amin(1), near_columns.amin(1)
        return totals.sum((1, 2))

    def ready(self) -> None:
        if self.kept is None:
            self.measure()

    def forces(self) -> Tensor:
        e, r = self.engine, len(self.engine.temperatures)
        self._sum()
        self.sides, squares = e.empty(2, r, e.b, e.n), e.empty(r, e.b, self.row_tiles, self.d_tiles)
        _tiled().tile_forces[(e.b * r * self.d_tiles * self.row_tiles,)](
            *self._law(), *self.sides, squares, **self._counts(), **self._sizes(), **self._products(), R=r, **_options(8)
        )
        return squares.sum((2, 3))

    def velocity(self, factors: Tensor, found: Tensor) -> None:
        e = self.engine
        _tiled().tile_velocity[(e.b * self.d_tiles * self.row_tiles,)](
            *self._law(),
            *self.sides,
            factors,
            found,
            **self._counts(),
            **self._sizes(),
            **self._products(),
            R=len(e.temperatures),
            **_options(8),
        )

    def _sum(self) -> None:
        """What both softmaxes divide by, as 1 / root, and what they are shifted by: minima of distances in lengths, own pairs now among them."""
        e, r = self.engine, len(self.engine.temperatures)
        lengths: Any = e.lengths
        self.shifts = [near / lengths[:, None] for near in (self.near_rows, self.near_columns)]
        for near in self.shifts:
            near[:, : e.own] = near[:, : e.own].minimum(LEAST_DISTANCE / lengths[:, None] + e.self_mask)
        column_tiles = math.ceil(e.targets / e.plan.columns)
        row_sums, column_sums = e.empty(r, e.b, column_tiles, e.n), e.empty(r, e.b, self.row_tiles, e.targets)
        sizes = {"n": e.n, "targets": e.targets, "N": e.plan.rows, "T": e.plan.columns}
        _tiled().tile_sums[(e.b * self.row_tiles * column_tiles,)](
            self.kept, *self.shifts, e.b, e.own, lengths, e.rates, e.self_mask, row_sums, column_sums, **sizes, R=r, **_options(4)
        )
        self.scales = [row_sums.sum(2).rsqrt(), column_sums.sum(2).rsqrt()]

    def _masses(self) -> Tensor:
        return self.engine.rates if self.engine.masses is None else self.engine.masses

    def _law(self) -> tuple[Any, ...]:
        e = self.engine
        strides = (*(y.stride(0) for y in e.pieces), *(y.stride(1) for y in e.pieces))
        near = (self.kept, *self.shifts, *self.scales)
        return (*e.pieces, *strides, self.centres, self._masses(), e.b, e.own, *near, e.lengths, e.rates, e.floor, e.self_mask)

    def _counts(self) -> dict[str, int]:
        return dict(zip(("k0", "k1", "k2"), self.engine.counts, strict=True))

    def _sizes(self, dimensions: int | None = None) -> dict[str, int]:
        e = self.engine
        return {"n": e.n, "d": e.d, "N": e.plan.rows, "T": e.plan.columns, "D": min(dimensions or e.plan.dimensions, e.plan.dimensions)}

    def _products(self) -> dict[str, Any]:
        return {"PRODUCTS": self.engine.products, "WEIGHTED": self.engine.masses is not None}


def _centres(x: Tensor, pieces: list[Tensor], products: str) -> Float[Tensor, "b d"]:
    """What tiles are centred about, as `triton_kernels` does it for whole problems."""
    if products not in ("bf16", "widened"):
        total = torch.stack([y.sum(1, dtype=torch.float32) for y in pieces]).sum(0)
        return total / sum(y.shape[1] for y in pieces)
    bounds = [y.aminmax(dim=1) for y in (x, *pieces) if y.shape[1]]
    low, high = torch.stack([lo for lo, _ in bounds]).amin(0).float(), torch.stack([hi for _, hi in bounds]).amax(0).float()
    middle = ((low + high) / 2).to(torch.bfloat16).float()
    exact = ((low >= middle / 2) & (high <= middle * 2)) | ((low >= middle * 2) & (high <= middle / 2))
    return middle.where(exact, 0.0).contiguous()


def _options(warps: int) -> dict[str, Any]:
    """Multiply-adds are fused, as in other kernels; Triton 3.9 warns unless somebody says so."""
    return {"num_warps": warps, "enable_fp_fusion": True}


def _on(device: torch.device) -> Any:
    """Triton starts programs on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _whole() -> Any:
    from . import triton_kernels

    return triton_kernels


def _tiled() -> Any:
    from . import triton_tiles

    return triton_tiles
