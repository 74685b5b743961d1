r"""A field made symmetric under a finite group G of rotations and reflections g, as in SymDrift (arXiv 2605.06140, of which only the idea was available):

    V(x) = mean over g of g^-1 F(g x; p, q)

For given positives and negatives it is equivariant, V(h x) = h V(x) for h in G, whether or not they are symmetric: they need not be augmented. It is the mean
of F(x; g^-1 p, g^-1 q), hence antisymmetric in p and q if F is; where p and q are symmetric already, as sets with masses, it is F itself.

All images are problems of one step for the field inside (ours): with grouping="batch" its lengths and rms are common to them, with grouping="problem" every
image has its own, whose mean is reported; moments that are remembered are those of all images. Sums over a dataset are of samples as they are,
not of their images, and are refused. Strengths are those of F, before the mean. The group acts about the origin of x: centre what is to be symmetric.

The own samples as negatives (ours). The queries are moved, the negatives are not, so that p and q are treated alike. Under every g the pair of a query with itself
stays masked, not only where g x_i and x_i coincide: a sample is absent from its own negatives with all its images, and each query sees the images of
the others alone. Its own images are no independent samples of q; they would push it away from every mirror (law: a single query feels no repulsion).
Own negatives move when their queries do: V(h x; p, h q) = h V(x; p, q) then holds for a force that is a sum of a part that depends on p and one that depends on
q, as the mean shift's is (its rms apart), but not for Algorithm 2, which couples them.

Known limits. It averages fields, not data: of data that lie on one side only every image pulls alike, however far it is, so a normalised field such as the mean
shift leads between the images (a test). It is meant for data that are symmetric in law, where it removes the asymmetry of a finite batch; otherwise augment the
data. Costs |G| times the field inside, in time and in memory.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..kernels import exact_products, in_float
from ..shapes import Float
from .choices import settle
from .protocol import Drift, Field, Mean, batch_mean, own_of
from .situation import Observer, memories

Matrix = tuple[tuple[float, ...], ...]

MOST_TURNS = 1024
"""The largest k of a named group: every image is one more problem, so a step with as many is far beyond any memory already."""


@dataclass(frozen=True)
class Symmetrised:
    """The mean of a field over a group.

    Attributes:
        field: any field.
        group: "sign" (x and -x), "rotations-k" (the k rotations of every plane of two consecutive coordinates, k at most 1024), "dihedral-k" (these and mirror images),
            or the orthogonal matrices themselves, as tuples of rows. A matrix smaller than x acts on consecutive coordinates, so 3 x 3 matrices
            act on atoms in a row.

    Raises:
        ValueError: for a group that is none: unknown, not orthogonal, or not closed under products; for a field with sums over a dataset; for x whose
            dimension the matrices do not divide.
    """

    field: Field
    group: str | tuple[Matrix, ...] = "sign"

    def __post_init__(self):
        object.__setattr__(self, "group", _as_rows(self.group))
        settle(self)
        if any(isinstance(memory, Observer) for memory in memories(self.field)):
            raise ValueError(
                "sums over a dataset are of the samples as they are, and a symmetrised field calls the field inside with their images; "
                "take sums='step' inside"
            )
        if not isinstance(self.group, str | tuple):
            raise ValueError(f"group must be the name of one or a tuple of square matrices, got {self.group!r}")
        self.matrices()

    def matrices(self) -> Float[Tensor, "g k k"]:
        """The group, in float64. Not to be written to: it is made once."""
        return _on(self.group, torch.float64, torch.device("cpu"))

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "*b n d"],
        *,
        positives: Float[Tensor, "*b p d"],
        negatives: Float[Tensor, "*b m d"],
        positive_weights: Float[Tensor, "*b p"] | None = None,
        negative_weights: Float[Tensor, "*b m"] | None = None,
        own: int | None = None,
        mean: Mean = batch_mean,
    ) -> Drift:
        """See `Field`."""
        own = own_of(x, negatives, own)
        one: Any = lambda t: None if t is None else (t[None] if x.ndim == 2 else t)
        group = _on(self.group, in_float(x).dtype, x.device)
        size, problems = len(group), one(x).shape[0]
        again: Any = lambda t: (
            None if t is None else one(t).repeat_interleave(size, dim=0)
        )  # [b g ...]: labels, then locations, then images
        with torch.autocast(x.device.type, enabled=False), exact_products():
            images = _act(group, in_float(one(x))).flatten(0, 1)
        drift = self.field(
            images,
            positives=again(positives),
            negatives=again(negatives),
            positive_weights=again(positive_weights),
            negative_weights=again(negative_weights),
            own=own,
            mean=mean,
        )
        with torch.autocast(x.device.type, enabled=False), exact_products():
            back = _act_each(group.mT, drift.velocity.unflatten(0, (problems, size))).mean(1)
        over_images = lambda t, of_the_step: t if t.ndim == of_the_step else t.unflatten(-1, (problems, size)).mean(-1)
        return Drift(
            back[0] if x.ndim == 2 else back, over_images(drift.unit, 0), over_images(drift.distance, 0), over_images(drift.strength, 1)
        )


def _act(group: Tensor, x: Tensor) -> Float[Tensor, "b g n d"]:
    """Every image g x."""
    return _act_each(group, x[:, None].expand(-1, len(group), -1, -1))


def _act_each(group: Tensor, x: Float[Tensor, "b g n d"]) -> Float[Tensor, "b g n d"]:
    """The g-th image of the g-th copy."""
    k, d = group.shape[-1], x.shape[-1]
    if d % k:
        raise ValueError(f"matrices of {k} x {k} act on {k} consecutive coordinates, but x has {d}; give matrices whose size divides {d}")
    return torch.einsum("gij,bgnaj->bgnai", group, x.unflatten(-1, (d // k, k))).flatten(-2)


def _as_rows(group: Any) -> Any:
    """Arrays and tensors as tuples, which can be compared and written down."""
    group = group.tolist() if hasattr(group, "tolist") else group
    return tuple(map(_as_rows, group)) if isinstance(group, tuple | list) else group


@lru_cache(maxsize=32)
def _on(group: str | tuple[Matrix, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A group where it is used; a device is waited for once. Those that are given are checked, those with a name are groups."""
    if dtype != torch.float64 or device.type != "cpu":
        return _on(group, torch.float64, torch.device("cpu")).to(device, dtype)
    if isinstance(group, str):
        return _named(group)
    matrices = _given(group)
    _check_group(matrices)
    return matrices


def _named(name: str) -> Tensor:
    kind, _, order = name.partition("-")
    if name == "sign":
        return torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64)
    known = kind in ("rotations", "dihedral") and order.isascii() and order.isdecimal() and len(order) <= len(str(MOST_TURNS))
    k = int(order) if known else 0
    if not 1 <= k <= MOST_TURNS:
        raise ValueError(
            f"group must be 'sign', 'rotations-k', 'dihedral-k' with k from 1 to {MOST_TURNS}, or a tuple of matrices, got {name[:100]!r}"
        )
    angles = [2 * math.pi * i / k for i in range(k)]
    turns = torch.tensor([[[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]] for t in angles], dtype=torch.float64)
    mirror = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    return turns if kind == "rotations" else torch.cat([turns, turns @ mirror])


def _given(group: Any) -> Tensor:
    try:
        return torch.tensor(group, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"group must be a tuple of square matrices of one size, each a tuple of rows, got {group!r}: {error}") from None


def _check_group(group: Tensor) -> None:
    if group.ndim != 3 or group.shape[1] != group.shape[2] or 0 in group.shape:
        raise ValueError(f"group must be a tuple of square matrices of one size, each a tuple of rows, got shape {list(group.shape)}")
    unity = torch.eye(group.shape[1], dtype=group.dtype)
    if (group @ group.mT - unity).abs().max() > 1e-6:
        raise ValueError("every matrix of a group must be orthogonal, g g^T = 1; their inverses are taken to be their transposes")
    apart = lambda a, b: torch.cdist(a.flatten(1), b.flatten(1), p=math.inf)
    if (apart(group, group) < 1e-6).sum() != len(group):
        raise ValueError("a group holds every matrix once")
    if any(apart(one @ group, group).amin(1).max() > 1e-6 for one in group):  # one by one: all products at once may be gigabytes
        raise ValueError(f"{len(group)} matrices are no group: some of their products are not among them; add those, and the identity")
