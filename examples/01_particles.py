"""The idea without a network: 256 particles drift onto a spiral.

    python examples/01_particles.py --output_dir outputs/particles

Every step adds the field to the particles. `normalise_force` is off: normalised, the velocity stays large however close the particles
are, and they would tremble for ever under a constant step (with it on, let the step decrease); off, it fades as they arrive.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from drifting_diffusers.fields import DriftingField

# Kernel widths in mean distances. The largest reaches the whole spiral from the corner, the smallest draws its line. There is no affinity
# floor: 1e-3 is made for about 100 targets, and over 1000 of them it would drown the affinities, whose mean is 2e-3.
FIELD = DriftingField(temperatures=(0.02, 0.1, 0.5), affinity_floor=0.0, normalise_force=False)


def spiral(n: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * (0.5 + 3 * torch.rand(n, generator=generator).sqrt())
    line = torch.stack([angle.cos(), angle.sin()], dim=-1) * angle[:, None] / (3.5 * math.pi)
    return line + 0.02 * torch.randn(n, 2, generator=generator)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased: 0 in the mean where both have one law, and below 0 by chance."""
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


def flow(x: Tensor, data: Tensor, steps: int) -> list[Tensor]:
    """Where the particles are before every step and after the last."""
    path = [x]
    for _ in range(steps):
        x = x + FIELD(x, positives=data, negatives=x).velocity
        path.append(x)
    return path


def draw(path: list[Tensor], data: Tensor, steps: list[int], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(steps), figsize=(2.6 * len(steps), 2.9), layout="constrained")
    for panel, step in zip(panels, steps, strict=True):
        panel.scatter(*data.T.tolist(), s=3, color="0.82", linewidths=0)
        panel.scatter(*path[step].T.tolist(), s=7, color="#d1495b", linewidths=0)
        panel.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=[], yticks=[])
        panel.set_title(f"step {step}", fontsize=10, color="0.25")
        panel.spines[:].set_color("0.85")
    figure.savefig(file, dpi=160)
    plt.close(figure)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="256 particles drift onto a spiral")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/particles"))
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--data", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    generator = torch.Generator().manual_seed(args.seed)
    data = spiral(args.data, generator)
    x = torch.tensor([0.85, -0.85]) + 0.08 * torch.randn(args.particles, 2, generator=generator)
    path = flow(x, data, args.steps)
    shown = sorted({0, *(min(args.steps, 2**k) for k in range(4)), args.steps})
    for step in shown:
        print(f"step {step:4d}: energy distance {energy_distance(path[step], data):+.4f}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(path, data, shown, args.output_dir / "particles.png")
    print(f"saved {args.output_dir / 'particles.png'}")
    return energy_distance(path[-1], data)


if __name__ == "__main__":
    main()
