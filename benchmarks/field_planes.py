"""Four distributions of the plane, and a small generator that is trained on each with any field, from the same seeds."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from drifting_diffusers.evaluation import energy_distance
from drifting_diffusers.fields import Situation, read_field, situated
from drifting_diffusers.losses import drift_loss

SAMPLES, POSITIVES, POINTS = 256, 512, 2000
CURVE, LOOKS = 12, 800
"""Moments at which the energy distance is taken, denser at the beginning, and of how many points."""


@dataclass(frozen=True)
class Target:
    """A law of the plane in pieces: what draws it, which piece a point is in (-1: none), and the share of every piece."""

    sample: Callable[[int, torch.Generator], Tensor]
    piece: Callable[[Tensor], Tensor]
    shares: Tensor

    def coverage(self, x: Tensor) -> dict[str, float]:
        """The share of pieces that have between half and twice their due, the least piece in units of its due, and what is in no piece."""
        piece = self.piece(x)
        due = torch.bincount(piece[piece >= 0], minlength=len(self.shares)) / len(x) / self.shares
        return {
            "modes": float(((due > 0.5) & (due < 2)).float().mean()),
            "least_mode": float(due.min()),
            "outside": float((piece < 0).float().mean()),
        }


def around(centres: Tensor, shares: Tensor, shape: Callable[[int, torch.Generator], Tensor], reach: float, p: float = 2.0) -> Target:
    def sample(n: int, generator: torch.Generator) -> Tensor:
        return centres[torch.multinomial(shares, n, replacement=True, generator=generator)] + shape(n, generator)

    def piece(x: Tensor) -> Tensor:
        distance, mode = torch.cdist(x, centres, p=p).min(dim=1)
        return torch.where(distance > reach, -1, mode)

    return Target(sample, piece, shares)


def normal(sd: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, generator: sd * torch.randn(n, 2, generator=generator)


def gaussians() -> Target:
    angle = torch.arange(8) * torch.pi / 4
    return around(2 * torch.stack([angle.cos(), angle.sin()], dim=1), torch.full((8,), 1 / 8), normal(0.15), reach=0.45)


def checkerboard() -> Target:
    centres = torch.tensor([[1.25 * (i - 1.5), 1.25 * (j - 1.5)] for i in range(4) for j in range(4) if (i + j) % 2 == 0])
    uniform = lambda n, generator: 1.25 * (torch.rand(n, 2, generator=generator) - 0.5)
    return around(centres, torch.full((8,), 1 / 8), uniform, reach=0.625, p=math.inf)


def clusters() -> Target:
    """Two far clusters of unequal masses, 0.9 and 0.1: what moves mass between them?"""
    return around(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), torch.tensor([0.9, 0.1]), normal(0.4), reach=1.6)


def spiral() -> Target:
    """Two turns, uniform along their length, in ten pieces of equal length."""
    fine = torch.linspace(0, 1, 2001)
    radius, angle = 0.3 + 2.5 * fine, 4 * torch.pi * fine
    line = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    length = torch.cat([torch.zeros(1), (line[1:] - line[:-1]).norm(dim=1).cumsum(0)])
    length = length / length[-1]

    def sample(n: int, generator: torch.Generator) -> Tensor:
        at = torch.searchsorted(length, torch.rand(n, generator=generator)).clamp(max=2000)
        return line[at] + 0.06 * torch.randn(n, 2, generator=generator)

    def piece(x: Tensor) -> Tensor:
        distance, nearest = torch.cdist(x, line).min(dim=1)
        return torch.where(distance > 0.2, -1, (length[nearest] * 10).long().clamp(max=9))

    return Target(sample, piece, torch.full((10,), 0.1))


TARGETS: dict[str, Callable[[], Target]] = {
    "checkerboard": checkerboard,
    "gaussians": gaussians,
    "clusters": clusters,
    "spiral": spiral,
}


def build(seed: int, width: int = 128) -> nn.Sequential:
    """Noise [n, 2] -> points [n, 2]. The first layer is steep, so that the network can tear the plane apart."""
    torch.manual_seed(seed)
    layers = [nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
    with torch.no_grad():
        layers[0].weight.mul_(8)
    return nn.Sequential(*layers)


def transport_distance(x: Tensor, y: Tensor) -> float:
    """The Wasserstein distance of order 2 of two sets of as many points, in their unit: the Sinkhorn distance at no entropy, and exact."""
    squares = torch.cdist(x.double(), y.double()).square().numpy()
    return math.sqrt(float(np.mean(squares[linear_sum_assignment(squares)])))


def train(text: str, target: str, *, seed: int, steps: int) -> dict:
    """Train with a field, and measure: energy distance of 2,000 points to as many real ones, transport distance, coverage, time, a curve.

    Args:
        text: the field, as `read_field` takes it.
        target: a name of `TARGETS`.
        seed: of weights, noise and data.
        steps: of training.
    """
    field, law, model = read_field(text), TARGETS[target](), build(seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    looking = torch.Generator().manual_seed(10_000 + seed)
    noise, real = torch.randn(POINTS, 2, generator=looking), law.sample(POINTS, looking)
    moments, curve, spent = {round(steps * (i / CURVE) ** 2) for i in range(1, CURVE)}, [], 0.0
    for step in range(steps):
        if step in moments:
            curve.append([step, round(spent, 3), energy_distance(model(noise[:LOOKS]).detach(), real[:LOOKS])])
        started = time.perf_counter()
        x, data = model(torch.randn(SAMPLES, 2, generator=generator)), law.sample(POSITIVES, generator)
        loss, _ = drift_loss(x[None], data[None], field=situated(field, Situation(step, steps)))
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        schedule.step()
        spent += time.perf_counter() - started
    x = model(noise).detach()
    curve.append([steps, round(spent, 3), energy_distance(x[:LOOKS], real[:LOOKS])])
    found = {
        "energy": energy_distance(x, real),
        "energy_real": energy_distance(law.sample(POINTS, looking), real),
        "transport": transport_distance(x[:1000], real[:1000]),
        "transport_real": transport_distance(law.sample(1000, looking), real[:1000]),
        **law.coverage(x),
        "ms_per_step": 1000 * spent / steps,
    }
    return {"curve": curve, "points": x[:600].mul(1000).round().int().tolist() if seed == 0 else None} | found
