r"""Kernel sums through a few landmarks, and those of a whole dataset: what the Nystrom field looks up and what it remembers.

With landmarks U and W = k(U, U), the kernel is replaced by its projection psi(x).psi(y) = k(x, U) (W + ridge)^-1 k(U, y), psi(x) = k(x, U) A and
A = (W + ridge)^-1/2 (arXiv 2605.12183). Sums over samples y then need no query, and sums of parts of the data add up:

    psi(x).s = k(x, U) beta,     beta = (W + ridge)^-1 sum_y w k(U, y)                 [M]
    psi(x) B = k(x, U) gamma,    gamma = (W + ridge)^-1 sum_y w k(U, y) y^T            [M, d]

Kept are the sums without the inverse, in float64: only so do they survive a matrix whose inverse has entries of the order 1 / ridge.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import Kernel
from ..shapes import Float
from .frame import BLOCK

LEAST_EIGENVALUE = 1e-8
"""Of W + ridge, as in the release: rounding may leave it below the ridge."""


class Projection(NamedTuple):
    """Landmarks and what a mass seen through them is: for each of some problems, at one temperature."""

    points: Float[Tensor, "b k d"]
    present: Tensor
    """[b, k], whether the landmark is one: classes may have fewer, and masses may be 0."""
    mass: Float[Tensor, "b k"]
    """beta"""
    moment: Float[Tensor, "b k d"]
    """gamma"""
    inverse: Float[Tensor, "b k k"]
    """(W + ridge)^-1, in float64, for those who project more than the sums; empty where nobody does."""


def exact(values: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def distance(x: Float[Tensor, "*b n d"], y: Float[Tensor, "*b k d"]) -> Float[Tensor, "*b n k"]:
    """Between float64 points. Coinciding ones are 1e-7 apart, above rounding; `LEAST_DISTANCE` would take more from the diagonal of W than a ridge adds."""
    squares = (x @ y.mT).mul_(-2).add_(x.square().sum(-1)[..., :, None]).add_(y.square().sum(-1)[..., None, :])
    return squares.clamp_(min=1e-14).sqrt_()


def kernel_matrix(kernel: Kernel, temperature: float, x: Float[Tensor, "*b n d"], y: Float[Tensor, "*b k d"]) -> Float[Tensor, "*b n k"]:
    """The kernel between float64 points."""
    return kernel.log_value(distance(x, y), temperature).exp()


def inverse(w: Float[Tensor, "*b k k"], ridge: float) -> Float[Tensor, "*b k k"]:
    """(W + ridge)^-1 = A A by eigenvalues, none of them below `LEAST_EIGENVALUE`. Of a matrix that is not finite it is NaN."""
    finite = w.isfinite().all(-1).all(-1)[..., None, None]  # eigh would stop the run; NaN is for the loss to notice
    values, vectors = torch.linalg.eigh(w.where(finite, 0.0) + ridge * torch.eye(w.shape[-1], dtype=w.dtype, device=w.device))
    return ((vectors / values.clamp(min=LEAST_EIGENVALUE)[..., None, :]) @ vectors.mT).where(finite, torch.nan)


def project(
    points: Float[Tensor, "b k d"],
    present: Tensor,
    y: Float[Tensor, "b p d"],
    masses: Tensor | None,
    kernel: Kernel,
    tau: float,
    ridge: float,
) -> Projection:
    """Masses at y seen through landmarks; all of it in float64 on the way."""
    there, place = exact(present), exact(points)
    w = kernel_matrix(kernel, tau, place, place) * there[..., None] * there[:, None]
    nothing = place.new_zeros(())
    found = projected(Projection(place, present, nothing, nothing, inverse(w, ridge)), y, masses, kernel, tau)
    return Projection(points, present, found.mass.to(y), found.moment.to(y), found.inverse)


def projected(seen: Projection, y: Float[Tensor, "b m d"], masses: Tensor | None, kernel: Kernel, tau: float) -> Projection:
    """Other masses seen through the same landmarks; in float64."""
    points, y, there, solved = exact(seen.points), exact(y), exact(seen.present), exact(seen.inverse)
    between = kernel_matrix(kernel, tau, points, y) * there[..., None]
    between = between if masses is None else between * exact(masses)[:, None]
    mass, moment = solved @ between.sum(-1, keepdim=True), solved @ (between @ y)
    return Projection(points, seen.present.to(points.device), mass[..., 0], moment, solved)


class _Class:
    """The sums of one class: at first its samples themselves, until there are enough to choose landmarks."""

    def __init__(self, **state: Tensor):
        self.pending: list[Tensor] = []  # [n, l, d] each
        self.__dict__.update(state)

    points: Tensor
    """[l, k, d], about the centre, in lengths; so are all moments."""
    centre: Tensor
    """[l, 1, d], in the coordinates of the samples."""
    length: Tensor
    """[], mean distance of two different landmarks."""
    mass: Tensor
    """[t, l, k], sum_y k(U, y)."""
    moment: Tensor
    """[t, l, k, d], sum_y k(U, y) y^T."""

    NAMES = ("points", "centre", "length", "mass", "moment")

    @property
    def chosen(self) -> bool:
        return "points" in self.__dict__

    @property
    def waiting(self) -> Tensor:
        """All that is pending, where the last of it is: what a checkpoint brought back is on the CPU."""
        return torch.cat([some.to(self.pending[-1].device) for some in self.pending])

    def state(self) -> dict[str, Tensor]:
        if not self.chosen:
            return {"pending": self.waiting.cpu()}
        return {name: getattr(self, name).cpu() for name in self.NAMES}

    def to(self, device: torch.device) -> None:
        self.__dict__.update({name: getattr(self, name).to(device) for name in self.NAMES})


class AttractionSums:
    """The sums of all real samples, by feature, class and location; an `Observer`.

    Landmarks are the first samples of a class, so show the data in random order. A class with fewer samples has them all as landmarks. Widths are
    temperatures times the mean distance of two different landmarks of the class, over all of its locations: one number per (feature, class).

    Per feature and class it holds l M d (1 + t) numbers of 8 bytes, l locations and t temperatures: they are in every checkpoint, and on the CPU as soon
    as the sums are used. Those that are used are 2 t l M d more, and t l M^2 with `projected`, on the device of the first queries.

    Args:
        landmarks: M, at most, per class.
        temperatures: in mean distances, or in plain distances if not `normalised`.
        kernel: a positive definite one.
        ridge: added to the eigenvalues of W.
        normalised: whether widths are in mean distances.
        least_length: the least mean distance.
        projected: whether (W + ridge)^-1 is kept, for negatives seen through the same landmarks.
    """

    def __init__(
        self,
        landmarks: int,
        temperatures: Sequence[float],
        kernel: Kernel,
        ridge: float,
        *,
        normalised: bool = True,
        least_length: float = 1e-3,
        projected: bool = False,
    ):
        self.landmarks, self.temperatures, self.kernel, self.ridge = landmarks, tuple(temperatures), kernel, ridge
        self.normalised, self.least_length, self.projected = normalised, least_length, projected
        self._classes: dict[str, dict[int, _Class]] = {}
        self._ready: dict[str, Ready] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What sums must have in common to be added; plain values."""
        numbers = {name: getattr(self, name) for name in ("landmarks", "temperatures", "ridge", "normalised", "least_length")}
        return {**numbers, "kernel": repr(self.kernel)}

    def __contains__(self, feature: str) -> bool:
        return feature in self._classes

    @torch.no_grad()
    def observe(self, feature: str, values: Float[Tensor, "n l d"], labels: Tensor | None) -> None:
        """Some more real samples: each is to be shown once.

        Args:
            feature: name of what is compared.
            values: n samples at l locations.
            labels: classes [n]; None is one class, 0.

        Raises:
            ValueError: for values that are not finite: they would stay in the sums for ever.
        """
        values = exact(values)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"feature {feature!r} of the real samples holds NaN or infinite values; all must be finite")
        self._ready.pop(feature, None)
        labels = values.new_zeros(len(values)).long() if labels is None else labels.to(values.device)
        for label in labels.unique().tolist():
            one = self._classes.setdefault(feature, {}).setdefault(int(label), _Class())
            new = values[labels == label]
            if one.chosen:
                self._add(one, new)
                continue
            one.pending.append(new)
            if sum(map(len, one.pending)) >= self.landmarks:
                self._choose(feature, int(label), one)

    def _choose(self, feature: str, label: int, one: _Class) -> None:
        """The first samples become landmarks; the sums begin with all that waited for them."""
        waiting = one.waiting
        points = waiting[: self.landmarks].transpose(0, 1)  # (l, k, d)
        count = points.shape[1]
        centre = points.mean(dim=1, keepdim=True)
        distance = torch.cdist(points - centre, points - centre)
        length = distance.sum() / (len(points) * count * max(1, count - 1))
        if self.normalised and not bool(length > 0):
            raise ValueError(
                f"class {label} of feature {feature!r} has {count} landmarks that do not differ, so there is no mean distance; show at least two "
                "different samples of every class, or leave the class out"
            )
        length = length.clamp(min=self.least_length)
        scaled = (points - centre) / (length if self.normalised else 1.0)
        mass = points.new_zeros(len(self.temperatures), *points.shape[:2])
        one.__dict__.update(points=scaled, centre=centre, length=length, mass=mass, moment=mass[..., None] * scaled, pending=[])
        self._add(one, waiting)

    def _add(self, one: _Class, values: Float[Tensor, "n l d"]) -> None:
        one.to(values.device)
        size = max(1, BLOCK // one.points[..., 0].numel())
        for some in values.split(size):
            y = (some.transpose(0, 1) - one.centre) / (one.length if self.normalised else 1.0)
            for t, tau in enumerate(self.temperatures):
                between = kernel_matrix(self.kernel, tau, one.points, y)
                one.mass[t] += between.sum(-1)
                one.moment[t] += between @ y

    # -- parts of the data

    def shard(self) -> "AttractionSums":
        """The same landmarks and lengths, and no sums: for another part of the data, to be added to these. Classes without landmarks stay here."""
        new = self._alike()
        for feature, classes in self._classes.items():
            chosen = {label: one for label, one in classes.items() if one.chosen}
            empty = lambda one: {**{n: getattr(one, n) for n in _Class.NAMES}, "mass": 0 * one.mass, "moment": 0 * one.moment}
            new._classes[feature] = {label: _Class(**empty(one)) for label, one in chosen.items()}
        return new

    def merged(self, other: "AttractionSums") -> "AttractionSums":
        """The sums of both: of different classes, or of different samples through the same landmarks.

        Raises:
            ValueError: for other settings, or a class whose landmarks are not the same: take those of `shard`.
        """
        self._check(other.settings)
        new = self._alike()
        for feature in [*self._classes, *(f for f in other._classes if f not in self._classes)]:
            mine, theirs = self._classes.get(feature, {}), other._classes.get(feature, {})
            new._classes[feature] = {
                label: self._sum(feature, label, mine.get(label), theirs.get(label)) for label in sorted({*mine, *theirs})
            }
        return new

    __add__ = merged

    def _sum(self, feature: str, label: int, *parts: _Class | None) -> _Class:
        there = [part for part in parts if part is not None]
        states = [part.state() for part in there]
        if len(there) == 1:
            one = _Class(**{name: value.clone() for name, value in states[0].items() if name != "pending"})
            one.pending = [*there[0].pending]
            return one
        a, b = states
        if not all(part.chosen for part in there) or not all(torch.equal(a[n], b[n]) for n in ("points", "centre", "length")):
            raise ValueError(
                f"class {label} of feature {feature!r} has other landmarks in the other shard; make shards with `shard()` once the landmarks are chosen"
            )
        return _Class(**{**a, "mass": a["mass"] + b["mass"], "moment": a["moment"] + b["moment"]})

    def _alike(self) -> "AttractionSums":
        more = {"normalised": self.normalised, "least_length": self.least_length, "projected": self.projected}
        return AttractionSums(self.landmarks, self.temperatures, self.kernel, self.ridge, **more)

    def _check(self, settings: dict[str, Any]) -> None:
        wrong = {name: value for name, value in settings.items() if self.settings.get(name) != value}
        if wrong:
            mine = {name: self.settings.get(name) for name in wrong}
            raise ValueError(f"these sums were made with {wrong}, and {mine} is asked for; take the same, or observe the data again")

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and plain containers."""
        states = {feature: {label: one.state() for label, one in classes.items()} for feature, classes in self._classes.items()}
        return {"settings": self.settings, "classes": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave.

        Raises:
            ValueError: for sums of other settings.
        """
        self._check(state["settings"])
        self._ready, self._classes = {}, {}
        for feature, classes in state["classes"].items():
            self._classes[feature] = {}
            for label, tensors in classes.items():
                one = _Class(**{name: value.clone() for name, value in tensors.items() if name != "pending"})
                one.pending = [tensors["pending"].clone()] if "pending" in tensors else []
                self._classes[feature][int(label)] = one

    # -- looking it up

    def at(self, feature: str, labels: Tensor | None) -> "Place":
        """What problems of these classes look at; the first look at a feature ends its waiting for landmarks.

        Raises:
            ValueError: for a class that no sample was seen of.
        """
        if feature not in self._ready:
            self._ready[feature] = self._finish(feature)
        ready = self._ready[feature]
        wanted = [0] if labels is None else labels.tolist()
        missing = sorted({label for label in wanted if label not in ready.rows})
        if missing:
            raise ValueError(f"no real sample of classes {missing} was observed for feature {feature!r}; there are {sorted(ready.rows)}")
        return Place(torch.tensor([ready.rows[label] for label in wanted]), labels is not None, ready)

    def _finish(self, feature: str) -> "Ready":
        classes = self._classes[feature]
        for label, one in classes.items():
            if not one.chosen:
                self._choose(feature, label, one)
        most = max(one.points.shape[1] for one in classes.values())
        found = [[self._project(one, t, most) for one in classes.values()] for t in range(len(self.temperatures))]
        beside = lambda parts: torch.stack([part.to(parts[0].device) for part in parts])  # some may be of a checkpoint, on the CPU
        projections = [Projection(*map(beside, zip(*one, strict=True))) for one in found]
        centre, length = (beside([getattr(one, name) for one in classes.values()]) for name in ("centre", "length"))
        for one in classes.values():
            one.to(torch.device("cpu"))  # from here on for checkpoints and other shards alone
        return Ready({label: row for row, label in enumerate(classes)}, projections, centre, length)

    def _project(self, one: _Class, t: int, most: int) -> Projection:
        """Of one class, [l, ...], with absent landmarks at the end."""
        more = most - one.points.shape[1]
        solved = inverse(kernel_matrix(self.kernel, self.temperatures[t], one.points, one.points), self.ridge)
        mass, moment = solved @ one.mass[t][..., None], solved @ one.moment[t]
        pad = torch.nn.functional.pad
        present = pad(torch.ones_like(mass[..., 0], dtype=torch.bool), (0, more))
        wide = lambda values: pad(values, (0, 0, 0, more))
        kept = pad(solved, (0, more, 0, more)) if self.projected else solved[..., :0, :0]
        return Projection(wide(one.points), present, wide(mass)[..., 0], wide(moment), kept)


class Ready:
    """All classes of a feature side by side, [c, l, ...], with one projection per temperature, and the row of every class."""

    def __init__(self, rows: dict[int, int], projections: list[Projection], centre: Tensor, length: Tensor):
        self.rows, self.projections, self.centre, self.length = rows, projections, centre, length
        self._settled = False

    def near(self, device: torch.device) -> "Ready":
        """On the device of the first queries, moved once: after a resume all is on the CPU. It stays there for MPS, which has no float64."""
        if not self._settled and device.type != "mps":
            self.projections = [Projection(*(values.to(device) for values in one)) for one in self.projections]
            self.centre, self.length, self._settled = self.centre.to(device), self.length.to(device), True
        return self


class Place:
    """The sums that the problems (label, location) of one call look at, labels first."""

    def __init__(self, rows: Tensor, labelled: bool, ready: Ready):
        self.rows, self.labelled, self._ready = rows, labelled, ready
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def problems(self, b: int, device: torch.device) -> Tensor:
        """Class row and location of each of b problems, [2, b]. Copied to a device once, because every copy waits for it.

        Raises:
            ValueError: if b is not labels times locations.
        """
        if (b, device) in self._indices:
            return self._indices[b, device]
        locations = self._ready.centre.shape[1]
        rows = self.rows if self.labelled else self.rows.expand(max(1, b // locations))
        if len(rows) * locations != b:
            raise ValueError(
                f"{b} problems cannot be {len(rows)} labels at the {locations} locations that were observed; say the labels of the step"
            )
        found = torch.stack([rows.repeat_interleave(locations), torch.arange(locations).repeat(len(rows))])
        return self._indices.setdefault((b, device), found.to(device))

    def _gather(self, values: Tensor, part: slice, b: int) -> Tensor:
        rows, locations = self.problems(b, values.device)[:, part]
        return values[rows, locations]

    def centre(self, like: Float[Tensor, "b n d"]) -> Float[Tensor, "b 1 d"]:
        return self._gather(self._ready.near(like.device).centre, slice(None), len(like)).to(like)

    def length(self, like: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        length = self._ready.near(like.device).length
        return length[self.problems(len(like), length.device)[0]].to(like)

    def projection(self, t: int, like: Float[Tensor, "b n d"], part: slice) -> Projection:
        """Of some of the problems, at the t-th temperature."""
        one = self._ready.near(like.device).projections[t]
        take = lambda values, **to: self._gather(values, part, len(like)).to(**{"device": like.device, "dtype": like.dtype, **to})
        kept = self._gather(one.inverse, part, len(like))
        kept = kept if like.device.type == "mps" else kept.to(like.device)  # float64
        return Projection(take(one.points), take(one.present, dtype=torch.bool), take(one.mass), take(one.moment), kept)
