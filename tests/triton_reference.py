"""The drifting field in float64, stage by stage, as its equations stand, and samples to try it on."""

import torch
from torch import Tensor


class Reference:
    """The three stages, and the sums that they are made of."""

    def __init__(self, x, targets, own, negatives, masses, temperatures, floor, self_mask):
        y = torch.cat([t.double() for t in targets], dim=1)
        centre = y.mean(1, keepdim=True)
        self.y, self.negatives, self.temperatures, self.floor, self.self_mask = y - centre, negatives, temperatures, floor, self_mask
        self.masses = y.new_ones(y.shape[:2]) if masses is None else masses.double()
        self.distance = torch.cdist(x.double() - centre, self.y, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-4)
        self.distance[:, range(own), range(own)] = 1e-4
        self.own = own

    def measure(self) -> tuple[Tensor, Tensor]:
        return (self.distance * self.masses[:, None]).sum((1, 2)), self.distance.shape[1] * self.masses.sum(1)

    def force(self, length: Tensor, tau: float) -> Tensor:
        logits = -self.distance / length.double().reshape(-1, 1, 1)
        logits[:, range(self.own), range(self.own)] -= self.self_mask
        log_a = ((logits / tau).log_softmax(2) + (logits / tau).log_softmax(1)) / 2
        a, m = log_a.exp().clamp(min=self.floor) * self.masses[:, None], self.negatives
        attraction = (a[..., m:] * a[..., :m].sum(-1, keepdim=True)) @ self.y[:, m:]
        return attraction - (a[..., :m] * a[..., m:].sum(-1, keepdim=True)) @ self.y[:, :m]

    def forces(self, length: Tensor) -> Tensor:
        return torch.stack([self.force(length, tau) for tau in self.temperatures])


def relative(found: Tensor, right: Tensor) -> float:
    """Below 1e-30 float32 has no digits: what should be 1e-70 is 0."""
    return ((found.double().to(right.device) - right).norm() / right.norm().clamp(min=1e-30)).item()


def samples(b: int, n: int, m: int, p: int, d: int, own: int, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Queries, and targets of which `own` are the queries, m repel beside them and p attract."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda k, shift: torch.randn(b, k, d, generator=rng) + shift + offset
    x, negatives, positives = normal(n, 0.2), normal(m, 0.0), normal(p, -0.1)
    return x, (*((x if own == n else x[:, :own],) if own else ()), *((negatives,) if m else ()), positives)


def some_masses(targets: tuple[Tensor, ...], seed: int = 1) -> Tensor:
    b, t = len(targets[0]), sum(points.shape[1] for points in targets)
    masses = 3 * torch.rand(b, t, generator=torch.Generator().manual_seed(seed))
    if t > 2:
        masses[:, t // 2] = 0  # present, and weightless
    return masses
