r"""The idea in the plane, to look at: particles that a field carries onto a target, and a one-step generator that learns the target from the same field.

    particles    x <- x + eta V(x),      eta falls over the run: V is divided by its own size and never fades (see `fields.drifting`)
    generator    x = start(z) + f(z),    f a small network that starts at zero and is trained by `drift_loss` alone

Both start from the same points, start(z), and both are measured by their energy distance to points that neither has seen. A target is a law on the unit
square, y upwards; a drawing is one too. All of it is float32 on the CPU and a function of the seed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fields import Field, Situation, read_field, situated
from .losses import drift_loss
from .schedules import exponential
from .shapes import Float

Target = Callable[[int, torch.Generator], Tensor]
"""(n, generator) -> points [n, 2] in the unit square."""

MOST_STEPS, MOST_PARTICLES, MOST_PIXELS = 2000, 2000, 2**22
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.02, 5.0

# -- targets


def spiral(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """One and a half turns, as dense everywhere."""
    angle = math.pi * (0.5 + 3 * torch.rand(n, generator=generator).sqrt())
    return 0.5 + 0.43 * (_circle(angle) * angle[:, None] / (3.5 * math.pi)) + _blur(n, 0.008, generator)


def checkerboard(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """The eight dark squares of four by four."""
    square = torch.randint(8, (n,), generator=generator)
    row, column = square // 2, square % 2 * 2 + square // 2 % 2
    return 0.06 + 0.22 * (torch.stack([column, row], dim=1) + torch.rand(n, 2, generator=generator))


def gaussians(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """Eight on a circle."""
    return 0.5 + 0.36 * _circle(torch.randint(8, (n,), generator=generator) * torch.pi / 4) + _blur(n, 0.027, generator)


def moons(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """Two half circles, each with an end inside the other."""
    angle, lower = torch.pi * torch.rand(n, generator=generator), torch.randint(2, (n, 1), generator=generator).bool()
    upper = _circle(angle) * 0.27 + torch.tensor([0.365, 0.44])
    return torch.where(lower, 1 - upper, upper) + _blur(n, 0.015, generator)


def rings(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """One in the other, the outer one with twice the mass."""
    radius = torch.tensor([0.2, 0.4, 0.4])[torch.randint(3, (n, 1), generator=generator)]
    return 0.5 + radius * _circle(2 * torch.pi * torch.rand(n, generator=generator)) + _blur(n, 0.012, generator)


def heart(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """A line."""
    t = 2 * torch.pi * torch.rand(n, generator=generator)
    x, y = 16 * t.sin() ** 3, 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
    return torch.stack([0.5 + x / 40, 0.54 + y / 40], dim=1) + _blur(n, 0.008, generator)


LETTERS = """\
####.. ####.. #### ##### #####
#...## #...## .##. ##... ..#..
#....# #...## .##. ##... ..#..
#....# ####.. .##. ####. ..#..
#....# #.##.. .##. ##... ..#..
#...## #..##. .##. ##... ..#..
####.. #...## #### ##... ..#..
"""


def letters(n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """A word."""
    rows = [[1.0 if pixel == "#" else 0.0 for pixel in line] for line in LETTERS.splitlines()]
    points = points_from_drawing(torch.tensor(rows), n, generator)
    return (points - 0.5) * torch.tensor([0.94, 1.9]) + 0.5  # as high as two pixels of a letter are wide


def _circle(angle: Tensor) -> Float[Tensor, "n 2"]:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _blur(n: int, deviation: float, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """Normal noise, cut at three deviations so that no point leaves the square."""
    return deviation * torch.randn(n, 2, generator=generator).clamp(-3, 3)


TARGETS: dict[str, Target] = {
    "spiral": spiral,
    "checkerboard": checkerboard,
    "eight Gaussians": gaussians,
    "two moons": moons,
    "two rings": rings,
    "heart": heart,
    "letters": letters,
}
"""Every target by its name."""


def points_from_drawing(ink: Float[Tensor, "h w"], n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
    """Points drawn from the ink of a picture, as if it were a density, and anywhere within their pixel.

    Args:
        ink: how much there is at each pixel, finite and at least 0; the first row is the top. A picture that is no square keeps its form.
        n: how many.
        generator: draws them.

    Raises:
        ValueError: without any ink, with a negative or infinite amount, or for too many pixels.
    """
    if ink.numel() > MOST_PIXELS:
        raise ValueError(f"a drawing has at most {MOST_PIXELS:,} pixels, got {ink.numel():,}: make it smaller")
    if not bool((ink.isfinite() & (ink >= 0)).all()):
        raise ValueError(
            f"ink is finite and at least 0, got values from {ink.min():g} to {ink.max():g}: take what is darker than the paper"
        )
    if not ink.numel() or not bool(ink.any()):
        raise ValueError("the drawing is empty: draw a line first, or choose one of the targets")
    pixel = torch.multinomial(ink.flatten() / ink.max(), n, replacement=True, generator=generator)
    height, width = ink.shape
    place = torch.stack([pixel % width, height - 1 - pixel // width], dim=1) + torch.rand(n, 2, generator=generator)
    return 0.5 + (place - torch.tensor([width / 2, height / 2])) / max(height, width)


# -- fields


@dataclass(frozen=True)
class Choice:
    """A field of the plane.

    Attributes:
        caption: what it is, in one line.
        spelled: as `read_field` reads it, {t} where the temperature stands.
        moving: the same for particles, where they need another one: they are the same samples from step to step.
        temperature: one that suits it, in the field's own unit; None where it has none.
    """

    caption: str
    spelled: str
    moving: str | None = None
    temperature: float | None = 0.2


PLAIN = "drifting(temperatures=({t},), affinity_floor=0.0)"  # the floor is made for features of many dimensions, see `fields.drifting`

CHOICES: dict[str, Choice] = {
    "drifting": Choice("the paper's: softmax over rows and columns", PLAIN),
    "mean_shift": Choice("difference of two mean shifts, the plain idea", "mean_shift(temperatures=({t},))"),
    "score": Choice("difference of smoothed scores, by a Gaussian kernel", "score(temperatures=({t},))"),
    "sharp": Choice("normalised so that it is the gradient of a potential", "sharp(temperatures=({t},))", temperature=0.5),
    "kernel_gradient": Choice("gradient of the log ratio of kernel densities", "kernel_gradient(temperatures=({t},))"),
    "divergence": Choice("descends a divergence, here Kullback-Leibler's", "divergence(temperatures=({t},))"),
    "sinkhorn": Choice(
        "optimal transport, blurred by the temperature",
        'sinkhorn(temperatures=({t},), own_term="masked")',
        moving='sinkhorn(temperatures=({t},), own_term="same")',
        temperature=0.05,
    ),
    "nystrom": Choice("attraction through 64 landmarks only", "nystrom(temperatures=({t},), landmarks=64)", temperature=0.5),
    "frechet": Choice("matches mean and covariance and sees no more", "frechet(normalise_force=True)", temperature=None),
    "lookahead": Choice("the paper's, averaged with where it leads next", f"lookahead({PLAIN}, terms=1)"),
    "friction": Choice("the paper's, damped more and more", f"friction({PLAIN}, linear(0.0, 0.9))"),
}
"""Fields that move particles, by their names in `fields.FIELDS`."""

LEFT_OUT = {
    "combined": "a sum of several fields, there is no one temperature to choose",
    "velocity_guidance": "needs unconditional samples",
    "symmetrised": "needs a group that the target is symmetric under",
}
"""The other fields, and why they are not in the playground."""


def find_field(name: str, temperature: float | None = None, *, moving: bool = False) -> Field:
    """The field of a choice.

    Args:
        name: one of `CHOICES`.
        temperature: kernel width in mean distances, from `LEAST_TEMPERATURE` to `MOST_TEMPERATURE`; the one that suits it if not given.
        moving: whether for particles, which stay the same from step to step, or for a generator, whose samples are new in every one.

    Raises:
        ValueError: for another name or temperature.
    """
    if name not in CHOICES:
        why = f", which {LEFT_OUT[name]}" if name in LEFT_OUT else ""
        raise ValueError(f"the playground has no field {name!r}{why}: take one of {', '.join(CHOICES)}")
    choice = CHOICES[name]
    temperature = choice.temperature if temperature is None else temperature
    if temperature is not None and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        raise ValueError(f"temperature must lie from {LEAST_TEMPERATURE} to {MOST_TEMPERATURE} mean distances, got {temperature}")
    return read_field(((moving and choice.moving) or choice.spelled).format(t=temperature))


# -- what moves


@dataclass(frozen=True)
class Start:
    """Where both begin: centre + spread z, with z ~ N(0, 1)."""

    centre: tuple[float, float]
    spread: float

    def __call__(self, noise: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        return torch.tensor(self.centre) + self.spread * noise


STARTS = {"middle": Start((0.5, 0.5), 0.05), "corner": Start((0.1, 0.1), 0.03), "everywhere": Start((0.5, 0.5), 0.22)}
"""Every start by its name."""


class Particles:
    """Points that a field moves, with nothing to learn.

    Attributes:
        x: where they are, [n, 2].
        data: what attracts them, [p, 2].
        field: carries them.
    """

    def __init__(self, x: Float[Tensor, "n 2"], data: Float[Tensor, "p 2"], field: Field):
        self.x, self.data, self.field = x, data, field

    def step(self, step: int, steps: int) -> None:
        """Move them once; the size of a step falls from 0.03 to 0.002 over the run."""
        field = situated(self.field, Situation(step, steps))
        self.x = self.x + exponential(0.03, 0.002).at(step, steps) * field(self.x, positives=self.data, negatives=self.x).velocity


class PlaneGenerator(nn.Module):
    """Noise [n, 2] -> points [n, 2] in one call: the start, plus a network of two hidden layers whose last one starts at zero.

    Args:
        start: what it is before any training.
        generator: draws the initial weights.
        width: of the hidden layers.
    """

    def __init__(self, start: Start, generator: torch.Generator, width: int = 128):
        super().__init__()
        sizes = [(2, width), (width, width), (width, 2)]
        linears: Any = [nn.utils.skip_init(nn.Linear, *size) for size in sizes]  # torch's own draws are of one global generator
        for linear in linears:
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(2), generator=generator)
            nn.init.uniform_(linear.bias, -1, 1, generator=generator)
        with torch.no_grad():
            linears[0].weight.mul_(3)  # steep, so that it can tear the plane apart
        nn.init.zeros_(linears[2].weight)
        nn.init.zeros_(linears[2].bias)
        self.start = start
        self.layers = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])

    def forward(self, noise: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        return self.start(noise) + self.layers(noise)


class Learner:
    """A generator and what trains it.

    Attributes:
        model: the generator.
        target: what it learns; every step sees new points of it.
        field: teaches it.
    """

    def __init__(self, model: PlaneGenerator, target: Target, field: Field, *, samples: int = 256, learning_rate: float = 2e-3):
        self.model, self.target, self.field, self.samples = model, target, field, samples
        self.learning_rate, self.optimiser = learning_rate, torch.optim.Adam(model.parameters(), lr=learning_rate)

    def step(self, step: int, steps: int, generator: torch.Generator) -> None:
        """Regress one batch onto where the field carries it; the learning rate falls linearly to a tenth over the run."""
        x = self.model(torch.randn(self.samples, 2, generator=generator))
        data = self.target(2 * self.samples, generator)
        loss, _ = drift_loss(x[None], data[None], field=situated(self.field, Situation(step, steps)))
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * (1 - 0.9 * step / steps)
        self.optimiser.zero_grad()
        loss.mean().backward()
        self.optimiser.step()


def energy_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased: 0 in the mean where both have one law, and below 0 by chance."""
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


# -- the play


@dataclass(frozen=True)
class Frame:
    """A moment of a play.

    Attributes:
        step: how many steps were taken.
        particles: where they are, [n, 2].
        generated: what the generator makes of the same noise in every frame, [n, 2].
        particle_energy: distance of the particles to the target.
        generator_energy: that of the generated points.
    """

    step: int
    particles: Tensor
    generated: Tensor
    particle_energy: float
    generator_energy: float


def play(
    target: Target,
    field: str = "drifting",
    temperature: float | None = None,
    *,
    start: str = "middle",
    steps: int = 240,
    particles: int = 256,
    seed: int = 0,
) -> Iterator[Frame]:
    """The frames before the first step and after each.

    Args:
        target: one of `TARGETS`, or any law on the unit square.
        field: one of `CHOICES`.
        temperature: see `find_field`.
        start: one of `STARTS`.
        steps: from 1 to `MOST_STEPS`.
        particles: from 2 to `MOST_PARTICLES`, and as many generated points.
        seed: of everything that is drawn.

    Raises:
        ValueError: at once, for a choice that there is not.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps must be from 1 to {MOST_STEPS}, got {steps}")
    if not 2 <= particles <= MOST_PARTICLES:
        raise ValueError(f"particles must be from 2 to {MOST_PARTICLES}, got {particles}")
    draws = torch.Generator().manual_seed(seed)
    noise, data = torch.randn(particles, 2, generator=draws), target(512, draws)
    cloud = Particles(STARTS[start](noise), data, find_field(field, temperature, moving=True))
    learner = Learner(PlaneGenerator(STARTS[start], draws), target, find_field(field, temperature))
    return _frames(cloud, learner, noise, target(512, draws), steps, draws)


def _frames(cloud: Particles, learner: Learner, noise: Tensor, unseen: Tensor, steps: int, generator: torch.Generator) -> Iterator[Frame]:
    for step in range(steps + 1):
        with torch.no_grad():
            made = learner.model(noise)
        yield Frame(step, cloud.x, made, energy_distance(cloud.x, unseen), energy_distance(made, unseen))
        if step < steps:
            cloud.step(step, steps)
            learner.step(step, steps, generator)
