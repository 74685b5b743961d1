"""A one-step generator of two plane distributions, from three bad starts: no mode is lost.

    python examples/02_toy_2d.py --output_dir outputs/toy_2d

A small network maps noise to points in one call and is trained with the drift loss alone. It starts between the modes, far from all of
them, or collapsed onto one. A GIF shows the way, a picture the end, a table the share of every mode and what lies outside.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from drifting_diffusers import DriftingField, drift_loss

# Kernel widths in mean distances of the batch: the paper's three, which draw the edges, and 1.0, which spans the picture. That one hears of
# the data from far away, and it moves mass from one mode to another, which 0.2 does too slowly from a collapsed start. The affinity floor
# is off: the mean affinity of 256 samples and 768 targets is 2e-3, so that a floor of 1e-3 (made for about 100 targets in many dimensions)
# would bind on most of them, and its pull to the mean of the data freezes such toys between the modes.
FIELD = DriftingField(temperatures=(0.02, 0.05, 0.2, 1.0), affinity_floor=0.0)


@dataclass(frozen=True)
class Target:
    """Equally likely modes: a centre plus a draw of one shape; `reach` is how far from its centre that shape extends (in a norm of order p)."""

    centres: Tensor
    shape: Callable[[int, torch.Generator], Tensor]
    reach: float
    p: float

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.centres[torch.randint(len(self.centres), (n,), generator=generator)] + self.shape(n, generator)

    def coverage(self, x: Tensor) -> tuple[Tensor, float]:
        """The mass of every mode, where 1 is its due, and the share of samples outside all of them."""
        distance, mode = torch.cdist(x, self.centres, p=self.p).min(dim=1)
        mass = torch.bincount(mode, minlength=len(self.centres)) * len(self.centres) / len(x)
        return mass, float((distance > self.reach).float().mean())


def gaussians() -> Target:
    angle = torch.arange(8) * torch.pi / 4
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return Target(centres, lambda n, generator: 0.15 * torch.randn(n, 2, generator=generator), reach=0.45, p=2.0)


def checkerboard() -> Target:
    centres = torch.tensor([[1.25 * (i - 1.5), 1.25 * (j - 1.5)] for i in range(4) for j in range(4) if (i + j) % 2 == 0])
    return Target(centres, lambda n, generator: 1.25 * (torch.rand(n, 2, generator=generator) - 0.5), reach=0.625, p=torch.inf)


TARGETS = {"gaussians": gaussians, "checkerboard": checkerboard}
STARTS = {
    "between": lambda target: torch.zeros(2),
    "far": lambda target: torch.tensor([8.0, 8.0]),
    "collapsed": lambda target: target.centres[0],
}


def build(target: Target, start: str, width: int = 128) -> nn.Sequential:
    """Noise [n, 2] -> points [n, 2]. The first layer is steep, so that the network can tear the plane apart; the last sets where it starts."""
    layers = [nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
    with torch.no_grad():
        layers[0].weight.mul_(8)
        layers[-1].bias.copy_(STARTS[start](target))
        layers[-1].weight.mul_(1e-2 if start == "collapsed" else 1.0)
    return nn.Sequential(*layers)


def train(target: Target, start: str, *, steps: int, samples: int, frames: int, seed: int) -> list[Tensor]:
    """What the generator makes of one fixed noise at `frames` moments of its training, denser at the beginning; the last is larger."""
    torch.manual_seed(seed)  # the initial weights
    model, generator = build(target, start), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    noise = torch.randn(1000, 2, generator=generator)
    moments, film = {round(steps * (i / frames) ** 2) for i in range(frames)}, []
    for step in range(steps):
        if step in moments:
            film.append(model(noise).detach())
        x, data = model(torch.randn(samples, 2, generator=generator)), target.sample(2 * samples, generator)
        loss, _ = drift_loss(x[None], data[None], field=FIELD)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        schedule.step()
    last = torch.cat([noise, torch.randn(19_000, 2, generator=generator)])
    return [*film, model(last).detach()]


def paint(panel, points: Tensor, data: Tensor) -> None:
    panel.clear()
    panel.scatter(*data.T.tolist(), s=2, color="0.85", linewidths=0)
    panel.scatter(*points[:1000].T.tolist(), s=3, color="#00798c", linewidths=0)
    panel.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])
    panel.spines[:].set_color("0.85")
    if (points.mean(dim=0) > 3.2).all():
        panel.annotate(
            "all up there", (3.1, 3.1), (-1.1, -0.2), color="#00798c", fontsize=8, arrowprops={"arrowstyle": "->", "color": "#00798c"}
        )


def draw(films: dict[tuple[str, str], list[Tensor]], output_dir: Path) -> None:
    """`toy_2d.png`, the end, and `toy_2d.gif`, the way: a row for each target, a column for each start."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    rows, columns = (list(dict.fromkeys(key[i] for key in films)) for i in (0, 1))
    figure, panels = plt.subplots(
        len(rows), len(columns), figsize=(2.4 * len(columns), 2.4 * len(rows) + 0.3), squeeze=False, layout="constrained"
    )
    data = {name: TARGETS[name]().sample(2000, torch.Generator().manual_seed(1)) for name in rows}

    def frame(i: int) -> None:
        for (name, start), film in films.items():
            panel = panels[rows.index(name), columns.index(start)]
            paint(panel, film[min(i, len(film) - 1)], data[name])
            if name == rows[0]:
                panel.set_title(f"start: {start}", fontsize=10, color="0.25")

    last = max(map(len, films.values())) - 1
    frame(last)
    figure.savefig(output_dir / "toy_2d.png", dpi=160)
    FuncAnimation(figure, frame, [*range(last + 1), *[last] * 8], init_func=lambda: None).save(
        output_dir / "toy_2d.gif", writer=PillowWriter(fps=8), dpi=60
    )
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[tuple[str, str], tuple[Tensor, float]]:
    parser = argparse.ArgumentParser(description="A one-step generator of two plane distributions from three bad starts")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/toy_2d"))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    films, table = {}, {}
    print(f"{'target':14}{'start':12}{'mass of the least and the largest mode (1 is right)':>52}{'outside':>10}")
    for name in args.targets:
        target = TARGETS[name]()
        for start in args.starts:
            film = train(target, start, steps=args.steps, samples=args.samples, frames=args.frames, seed=args.seed)
            mass, outside = table[name, start] = target.coverage(film[-1])
            films[name, start] = film
            print(f"{name:14}{start:12}{mass.min():>46.3f}{mass.max():>6.3f}{outside:>9.1%}", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(films, args.output_dir)
    print(f"saved {args.output_dir / 'toy_2d.png'} and toy_2d.gif beside it")
    return table


if __name__ == "__main__":
    main()
