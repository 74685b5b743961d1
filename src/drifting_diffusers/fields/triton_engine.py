r"""The exact drifting field on a GPU: `TritonEngine` is the three stages of a step, between which means over all processes are taken.

    measure()         sum w_j dist_ij and its weights, of which the length s is made
    forces(s)         |F_R|^2 of every temperature R, of which its rms is made
    velocity(1/rms)   sum_R factor_R F_R

Forward only: the gradient of the loss is -2 V / (n S s_in B), without a graph.

**Whole problems** (up to `WHOLE` entries of queries times targets): a program each, everything between reading samples and writing a result in registers, forces
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
from dataclasses import dataclass
from functools import cache
from importlib import util
from typing import Any

import torch
from torch import Tensor

from ..shapes import Float

WHOLE = 2**15
"""Entries, padded to powers of two, that a program holds in registers at most: 128 queries and 256 targets."""

PRODUCTS = ("auto", "ieee", "tf32x3", "bf16")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device | str) -> bool:
    """Whether the engine runs there: Triton is installed, and it is a GPU that multiplies bfloat16 (or Triton's interpreter is on)."""
    if util.find_spec("triton") is None:
        return False
    if _interpreted():
        return True
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True)
class Plan:
    """How the work is cut; `plan_of` says how by default, and no choice changes more than the rounding.

    Attributes:
        whole: whether a program holds a whole problem.
        keep: whether distances are kept between stages rather than computed again. Tiles always keep them.
        shares: how many programs share the dimensions of a whole problem; more than one need kept distances.
        rows: queries of a tile, a power of 2 from 16.
        columns: targets of a tile, likewise.
        dimensions: dimensions that are multiplied at a time, likewise.
    """

    whole: bool
    keep: bool
    shares: int
    rows: int = 64
    columns: int = 64
    dimensions: int = 64

    def __post_init__(self):
        if self.shares < 1 or (self.shares > 1 and not self.keep):
            raise ValueError(f"shares must be 1, or more with keep=True, got {self.shares} and keep={self.keep}")
        for name in ("rows", "columns", "dimensions"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of 2 from 16, got {size}")


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
        _check(queries, targets, own, negatives, masses, products)
        self.x, self.pieces = _pieces(queries, targets, negatives)
        self.b, self.n, self.d = self.x.shape
        self.counts = [piece.shape[1] for piece in self.pieces]
        self.own, self.floor, self.self_mask, self.temperatures = own, float(floor), float(self_mask), tuple(map(float, temperatures))
        self.masses = None if masses is None else masses.to(torch.float32).contiguous()
        self.products = _products(products, self.x.dtype)
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
            raise RuntimeError("velocity needs the length that forces(length) was called with; call measure(), forces(length), velocity(factors)")
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
        sizes = [_power(engine.n), *map(_power, engine.counts)]
        self.kept: Tensor | None = None
        self.sizes = dict(zip(("N", "T0", "T1", "T2"), sizes, strict=True))
        self.warps = 4 if sizes[0] * sum(sizes[1:]) <= 2**12 else 8 if sizes[0] * sum(sizes[1:]) <= 2**14 else 16

    def measure(self) -> Tensor:
        e = self.engine
        if e.plan.keep:
            self.kept = e.empty(e.b, e.n, e.targets)
        totals = e.empty(e.b)
        _whole().whole_measure[(e.b,)](*self._samples(), self._kept(), totals, **self._shape(), num_warps=self.warps)
        return totals

    def ready(self) -> None:
        if self.engine.plan.keep and self.kept is None:
            self.measure()

    def forces(self) -> Tensor:
        e = self.engine
        squares = e.empty(len(e.temperatures), e.b, e.plan.shares)
        _whole().whole_forces[(e.b, e.plan.shares)](*self._samples(), *self._law(), squares, **self._steps(), num_warps=self.warps)
        return squares.sum(2)

    def velocity(self, factors: Tensor, found: Tensor) -> None:
        e = self.engine
        _whole().whole_velocity[(e.b, e.plan.shares)](*self._samples(), *self._law(), factors, found, **self._steps(), num_warps=self.warps)

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
        return {**self._shape(), "R": len(e.temperatures), "STEPS": math.ceil(e.d / (e.plan.dimensions * e.plan.shares))}


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
                    **first, **self._sizes(32), **self._products(),
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
            *self._law(), self.sides, squares, **self._counts(), **self._sizes(), **self._products(), R=r
        )
        return squares.sum((2, 3))

    def velocity(self, factors: Tensor, found: Tensor) -> None:
        e = self.engine
        _tiled().tile_velocity[(e.b * self.d_tiles * self.row_tiles,)](
            *self._law(), self.sides, factors, found, **self._counts(), **self._sizes(), **self._products(), R=len(e.temperatures)
        )

    def _sum(self) -> None:
        """What both softmaxes divide by, as 1 / root, and what they are shifted by: minima of distances in lengths, own pairs now among them."""
        e, r = self.engine, len(self.engine.temperatures)
        lengths: Any = e.lengths
        self.shifts = [near / lengths[:, None] for near in (self.near_rows, self.near_columns)]
        for near in self.shifts:
            near[:, : e.own] = near[:, : e.own].minimum(1e-4 / lengths[:, None] + e.self_mask)
        column_tiles = math.ceil(e.targets / e.plan.columns)
        row_sums, column_sums = e.empty(r, e.b, column_tiles, e.n), e.empty(r, e.b, self.row_tiles, e.targets)
        sizes = {"n": e.n, "targets": e.targets, "N": e.plan.rows, "T": e.plan.columns}
        _tiled().tile_sums[(e.b * self.row_tiles * column_tiles,)](
            self.kept, *self.shifts, e.b, e.own, lengths, e.rates, e.self_mask, row_sums, column_sums, **sizes, R=r
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


def plan_of(queries: Float[Tensor, "b n d"], counts: list[int], own: int, products: str) -> Plan:
    """How problems of these shapes are cut, from arithmetic (no GPU was at hand to measure): see the bytes at the head of this module."""
    b, n, d = queries.shape
    tensor_cores = products in ("bf16", "widened")
    dimensions = min(_power(d), 64 if tensor_cores else 32)
    if _power(n) > 128 or _power(n) * sum(map(_power, counts)) > WHOLE:
        return Plan(whole=False, keep=True, shares=1, dimensions=min(_power(d), 128 if tensor_cores else 64))
    shares = max(1, min(2 * _processors(queries.device) // b, math.ceil(d / dimensions)))
    samples = queries.element_size() * d * (sum(counts) + n - own)
    return Plan(whole=True, keep=shares > 1 or samples > 4 * 4 * n * sum(counts), shares=shares, dimensions=dimensions)


def _check(queries: Tensor, targets: tuple[Tensor, ...], own: int, negatives: int, masses: Tensor | None, products: str) -> None:
    if util.find_spec("triton") is None:
        raise ImportError("this engine needs Triton, which comes with PyTorch for CUDA on Linux: pip install triton, or take another engine")
    if not available(queries.device):
        raise ValueError(f"samples must be on a CUDA device of compute capability 8.0 or above, got {queries.device}; take another engine")
    b, n, d = queries.shape
    total = sum(t.shape[1] for t in targets)
    if not all(t.dtype in _TYPES for t in (queries, *targets)):
        raise ValueError(f"samples must be of one of {_TYPES}, got {[t.dtype for t in (queries, *targets)]}; float64 needs another engine")
    if not total or 0 in (b, n, d) or any((t.shape[0], t.shape[2]) != (b, d) for t in targets):
        raise ValueError(f"targets must be [{b}, k, {d}] as queries {list(queries.shape)}, at least one, got {[list(t.shape) for t in targets]}")
    if not (0 <= negatives <= total and 0 <= own <= min(n, negatives)):
        raise ValueError(f"of {total} targets, {negatives} repel and {own} of these are queries, of {n}: each must be at most the one before")
    if masses is not None and tuple(masses.shape) != (b, total):
        raise ValueError(f"masses must be [{b}, {total}], one per target, got {list(masses.shape)}")
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {PRODUCTS}, got {products!r}")


def _pieces(queries: Tensor, targets: tuple[Tensor, ...], negatives: int) -> tuple[Tensor, list[Tensor]]:
    """The queries and three tensors of one dtype: two that repel and one that attracts, empty ones included; nothing is copied that need not be."""
    dtype = queries.dtype
    for t in targets:
        dtype = torch.promote_types(dtype, t.dtype)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    start = 0
    for t in targets:
        cut = min(max(negatives - start, 0), t.shape[1])
        for side, part in zip(parts, (t[:, :cut], t[:, cut:]), strict=True):
            side.extend([part] if part.shape[1] else [])
        start += t.shape[1]
    none = queries[:, :0]
    repelling, attracting = parts
    joined = [repelling[:1], repelling[1:], attracting]
    ready = [_rows_in_one(torch.cat(some, dim=1) if len(some) > 1 else some[0] if some else none, dtype) for some in joined]
    return _rows_in_one(queries, dtype), ready


def _rows_in_one(points: Tensor, dtype: torch.dtype) -> Tensor:
    """Of this dtype, with the dimensions of a sample beside each other."""
    points = points.to(dtype)
    return points if points.stride(2) == 1 or points.numel() == 0 else points.contiguous()


def _products(products: str, dtype: torch.dtype) -> str:
    if products == "bf16" and dtype != torch.bfloat16:
        raise ValueError(f'products="bf16" are exact for bfloat16 samples alone, got {dtype}; take "ieee" or "tf32x3"')
    chosen = ("bf16" if dtype == torch.bfloat16 else "ieee") if products == "auto" else products
    return "widened" if chosen == "bf16" and _interpreted() else chosen


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


def _power(count: int) -> int:
    """The least power of 2 that holds so many, from 16, the least that Triton multiplies."""
    return max(16, 1 << (count - 1).bit_length())


def _interpreted() -> bool:
    from triton import knobs  # pyright: ignore[reportMissingImports]

    return bool(knobs.runtime.interpret)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(device: torch.device) -> Any:
    """Triton starts programs on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _whole() -> Any:
    from . import triton_kernels

    return triton_kernels


def _tiled() -> Any:
    from . import triton_tiles

    return triton_tiles
