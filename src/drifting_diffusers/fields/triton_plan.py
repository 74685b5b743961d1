"""What the Triton engine accepts and how it cuts the work; nothing here imports Triton before it is known to be there."""

import math
from dataclasses import dataclass
from functools import cache
from importlib import util

import torch
from torch import Tensor

from ..shapes import Float

WHOLE = 5 * 2**12
"""Entries, padded to powers of two, that a program holds in registers at most, 64 queries and 320 targets or 128 and 160. Compiled for compute capability
9.0, 64 by 144 spill at most 1.1 KB a thread, 128 by 272 spill 4.6 KB."""

SHARED = 160 * 1024
"""Bytes of shared memory that a block may ask for on the GPUs that the larger tiles are for (8.0, 9.0, 10.0); others have about 100 KB."""

PRODUCTS = ("auto", "ieee", "tf32x3", "bf16")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device | str) -> bool:
    """Whether the engine runs there: Triton is installed, and it is a GPU that multiplies bfloat16 (or Triton's interpreter is on)."""
    if util.find_spec("triton") is None:
        return False
    if _interpreted():
        return True
    device = torch.device(device)
    return (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


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


def plan_of(queries: Float[Tensor, "b n d"], counts: list[int], own: int, products: str) -> Plan:
    """How problems of these shapes are cut: from the bytes at the head of this module and what the compiler says of registers, not from timings."""
    b, n, d = queries.shape
    dimensions = min(padded(d), 64 if products in ("bf16", "widened") else 32)
    if _shared(queries.device) < SHARED:
        return Plan(whole=False, keep=True, shares=1, rows=32, columns=32, dimensions=min(padded(d), 32))
    if padded(n) > 128 or padded(n) * sum(map(padded, counts)) > WHOLE:
        return Plan(whole=False, keep=True, shares=1, dimensions=min(padded(d), 64))
    shares = max(1, min(2 * _processors(queries.device) // b, math.ceil(d / dimensions)))
    samples = queries.element_size() * d * (sum(counts) + n - own)
    return Plan(whole=True, keep=shares > 1 or samples > 4 * 4 * n * sum(counts), shares=shares, dimensions=dimensions)


def check_samples(queries: Tensor, targets: tuple[Tensor, ...], own: int, negatives: int, masses: Tensor | None, products: str) -> None:
    if util.find_spec("triton") is None:
        raise ImportError(
            "this engine needs Triton, which comes with PyTorch for CUDA on Linux: pip install triton, or take another engine"
        )
    if not available(queries.device):
        raise ValueError(f"samples must be on a CUDA device of compute capability 8.0 or above, got {queries.device}; take another engine")
    b, n, d = queries.shape
    total = sum(t.shape[1] for t in targets)
    if not all(t.dtype in _TYPES for t in (queries, *targets)):
        raise ValueError(f"samples must be of one of {_TYPES}, got {[t.dtype for t in (queries, *targets)]}; float64 needs another engine")
    if not total or 0 in (b, n, d) or any((t.shape[0], t.shape[2]) != (b, d) for t in targets):
        raise ValueError(
            f"targets must be [{b}, k, {d}] as queries {list(queries.shape)}, at least one, got {[list(t.shape) for t in targets]}"
        )
    if not (0 <= negatives <= total and 0 <= own <= min(n, negatives)):
        raise ValueError(
            f"of {total} targets, {negatives} repel and {own} of these are queries, of {n}: each must be at most the one before"
        )
    if masses is not None and tuple(masses.shape) != (b, total):
        raise ValueError(f"masses must be [{b}, {total}], one per target, got {list(masses.shape)}")
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {PRODUCTS}, got {products!r}")


def pieces_of(queries: Tensor, targets: tuple[Tensor, ...], negatives: int) -> tuple[Tensor, list[Tensor]]:
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


def products_of(products: str, dtype: torch.dtype) -> str:
    if products == "bf16" and dtype != torch.bfloat16:
        raise ValueError(f'products="bf16" are exact for bfloat16 samples alone, got {dtype}; take "ieee" or "tf32x3"')
    chosen = ("bf16" if dtype == torch.bfloat16 else "ieee") if products == "auto" else products
    return "widened" if chosen == "bf16" and _interpreted() else chosen


def padded(count: int) -> int:
    """The least power of 2 that holds so many, from 16, the least that Triton multiplies."""
    return max(16, 1 << (count - 1).bit_length())


def _interpreted() -> bool:
    from triton import knobs  # pyright: ignore[reportMissingImports]

    return bool(knobs.runtime.interpret)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _shared(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else SHARED
