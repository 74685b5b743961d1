"""The pictures of the concepts page, made by running the library.

    python docs/make_pictures.py            all of them, into docs/images: less than a minute of one core
    python docs/make_pictures.py idea       one of them

`idea` draws with the shipped model, so it follows that model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor, nn

from drifting_diffusers import DriftingField, DriftingPipeline, drift_loss, shipped_model
from drifting_diffusers.evaluation import energy_distance
from drifting_diffusers.fields import MeanShiftField

IMAGES = Path(__file__).parent / "images"
REAL, SAMPLE, PULL, PUSH, INK = "#c3cad1", "#00798c", "#2a9d5c", "#d1495b", "#33424d"
FIELD = DriftingField(temperatures=(0.05, 0.2, 1.0), affinity_floor=0.0)  # plane: no floor, and one width that spans the picture


def spiral(n: int, rng: torch.Generator) -> Tensor:
    angle = torch.pi * (0.5 + 3 * torch.rand(n, generator=rng).sqrt())
    line = torch.stack([angle.cos(), angle.sin()], dim=-1) * angle[:, None] / (3.5 * torch.pi)
    return line + 0.02 * torch.randn(n, 2, generator=rng)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)]
    with torch.no_grad():
        layers[0].weight.mul_(8)  # steep, so that the plane can be torn apart
        layers[-1].weight.mul_(0.3)
    return nn.Sequential(*layers)


def trained(steps: int, watched: Sequence[int], data: Tensor) -> tuple[dict[int, Tensor], list[dict[str, float]]]:
    """A one-step generator of the spiral: 600 points of the same noise before the watched steps, and what was measured at every tenth."""
    model, rng = network(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / (steps + 1))
    noise, shown, found = torch.randn(600, 2, generator=rng), {}, []
    for step in range(steps + 1):
        x, real = model(torch.randn(256, 2, generator=rng)), spiral(512, rng)
        loss, drift = drift_loss(x[None], real[None], field=FIELD)
        with torch.no_grad():
            if step in watched:
                shown[step] = model(noise)
            if step % 10 == 0:
                distance = energy_distance(model(noise), data)
                found.append({"step": step, "loss": float(loss), "energy": distance, "strength": float(drift.strength.mean())})
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        schedule.step()
    return shown, found


def pull_and_push(x: Tensor, real: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both halves of eq. 10 at x [n, 2]. A query that repels itself alone is not pushed, so what is left is the pull; the rest is the push."""
    field = MeanShiftField((temperature,), normalise_distance=False, normalise_force=False)
    whole = field(x, positives=real, negatives=x).velocity
    alone = field(x[:, None], positives=real.expand(len(x), -1, -1), negatives=x[:, None].clone(), own=0).velocity[:, 0]
    return alone, whole - alone


def bare(panel: Axes, reach: float = 1.15) -> Axes:
    panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    return panel


def title(figure: Figure, x: float, number: str, head: str, text: str) -> None:
    figure.text(x, 0.945, f"{number}  {head}", fontsize=13, color=INK, weight="bold", va="center")
    figure.text(x, 0.055, text, fontsize=10.5, color="#5b6b77", va="center")


def arrow(figure: Figure, start: tuple[float, float], end: tuple[float, float]) -> None:
    figure.add_artist(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, lw=1.6, color="#8797a3", transform=figure.transFigure)
    )


def draw_call(figure: Figure, names: Sequence[str]) -> None:
    """Noise, the network, images."""
    pipe = DriftingPipeline.from_pretrained(shipped_model("fashion-mnist"))
    config, rngs = pipe.transformer.config, [torch.Generator().manual_seed(seed) for seed in range(len(names))]
    noise = torch.cat([torch.randn(1, config.in_channels, config.sample_size, config.sample_size, generator=rng) for rng in rngs])
    images = pipe(list(names), latents=noise, generator=rngs, output_type="np").images
    height, width, top = 0.165, 0.0605, 0.685
    for row, name in enumerate(names):
        low = top - row * 0.19
        for left, picture in ((0.02, noise[row, 0].numpy()), (0.222, images[row, ..., 0])):
            panel = figure.add_axes((left, low, width, height))
            panel.imshow(picture, cmap="gray_r" if left > 0.1 else "gray", interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color("#d5dbe0")
        figure.text(0.288, low + height / 2, name.lower(), fontsize=9, color="#5b6b77", va="center")
        arrow(figure, (0.086, low + height / 2), (0.117, low + height / 2))
        arrow(figure, (0.187, low + height / 2), (0.2185, low + height / 2))
    shape = "round,pad=0.004,rounding_size=0.012"
    figure.add_artist(FancyBboxPatch((0.124, 0.125), 0.056, 0.715, boxstyle=shape, fc="#0b5563", ec="none", transform=figure.transFigure))
    figure.text(0.152, 0.48, "generator", fontsize=12, color="white", rotation=90, ha="center", va="center", weight="bold")


def draw_field(figure: Figure, place: tuple[float, float, float, float]) -> None:
    """Samples that crowd below an arc of data: green arrows to the data, red ones away from each other, dark ones where that leads."""
    rng = torch.Generator().manual_seed(0)
    angle = torch.linspace(-0.08, 1.08, 44) * torch.pi
    real = torch.stack([angle.cos(), 1.15 * angle.sin() - 0.25], dim=1) * (0.9 + 0.035 * torch.randn(44, 1, generator=rng))
    x = torch.tensor(
        [
            [-0.3, -0.1],
            [0.02, 0.12],
            [0.34, -0.08],
            [-0.12, -0.3],
            [0.16, -0.32],
            [-0.42, -0.42],
            [0.46, -0.44],
            [0.0, -0.56],
            [-0.24, -0.66],
        ]
    )
    pull, push = pull_and_push(x, real, 0.22)
    panel = bare(figure.add_axes(place), 1.03)
    panel.scatter(*real.T.tolist(), s=30, color=REAL, linewidths=0)
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1.7, "headwidth": 4.2, "headlength": 4.6, "headaxislength": 4.2}
    for force, colour, width in ((pull, PULL, 0.0075), (push, PUSH, 0.0075), (pull + push, INK, 0.009)):
        panel.quiver(*x.T.tolist(), *force.T.tolist(), color=colour, width=width, **arrows)
    panel.scatter(*x.T.tolist(), s=54, color=SAMPLE, linewidths=0.9, edgecolors="white", zorder=5)
    words = {"real": "#98a3ad", "generated": SAMPLE, "pull": PULL, "push": PUSH, "drift = both": INK}
    for left, (word, colour) in zip((0.365, 0.405, 0.488, 0.527, 0.573), words.items(), strict=True):
        figure.text(left, 0.125, word, fontsize=10.5, color=colour, va="center", weight="bold")


MOMENTS = (0, 30, 100, 1000)  # of the training of the spiral


def idea(folder: Path) -> None:
    """What it is, in three panels."""
    data = spiral(1500, torch.Generator().manual_seed(1))
    shown, _ = trained(MOMENTS[-1], MOMENTS, data)
    figure = plt.figure(figsize=(12, 4.3))
    title(figure, 0.02, "1", "Drawing is one network call", "no steps, no noise schedule, no second network")
    title(figure, 0.365, "2", "A field says where to go", "when both distributions agree, all arrows cancel")
    title(figure, 0.7, "3", "Training follows it", "samples are regressed onto where they drift")
    draw_call(figure, ["Sneaker", "Trouser", "Bag", "Ankle boot"])
    draw_field(figure, (0.365, 0.16, 0.27, 0.745))
    for i, step in enumerate(MOMENTS):
        panel = bare(figure.add_axes((0.695 + 0.15 * (i % 2), 0.52 - 0.415 * (i // 2), 0.145, 0.4)), 1.2)
        panel.scatter(*data.T.tolist(), s=2.2, color=REAL, linewidths=0)
        panel.scatter(*shown[step].T.tolist(), s=3.4, color=SAMPLE, linewidths=0)
        panel.text(-1.15, 1.02, f"step {step:,}", fontsize=9, color="#5b6b77")
    figure.savefig(folder / "idea.png", dpi=150)
    plt.close(figure)


def loss(folder: Path) -> None:
    """The same training as in `idea`, as its loss sees it, as a distance does, and as the field's strength does."""
    _, found = trained(MOMENTS[-1], (), spiral(1500, torch.Generator().manual_seed(1)))
    figure, panels = plt.subplots(1, 3, figsize=(10, 2.7), layout="constrained")
    curves = {
        "loss": ("the loss: flat", PUSH),
        "energy": ("energy distance to the data", SAMPLE),
        "strength": ("strength of the field", PULL),
    }
    for panel, (name, (text, colour)) in zip(panels, curves.items(), strict=True):
        panel.plot([row["step"] for row in found], [row[name] for row in found], color=colour, lw=1.6)
        panel.set_title(text, fontsize=11, color=INK)
        panel.set_xlabel("step", fontsize=9, color="#5b6b77")
        panel.tick_params(labelsize=8, colors="#5b6b77")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(0, 14) if name == "loss" else panel.set_yscale("log")
    figure.savefig(folder / "loss.png", dpi=115)
    plt.close(figure)


def temperatures(folder: Path) -> None:
    """The pull over the plane at three temperatures, in mean distances of the data: directions as arrows, lengths as shade."""
    real = spiral(1500, torch.Generator().manual_seed(2))
    axis, width = torch.linspace(-1.1, 1.1, 23), float(torch.pdist(real).mean())
    grid = torch.cartesian_prod(axis, axis)
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    for panel, temperature in zip(panels, (0.05, 0.2, 1.0), strict=True):
        pull, _ = pull_and_push(grid, real, temperature * width)
        length = pull.norm(dim=1, keepdim=True)
        colours = {"cmap": "Greens", "clim": (-0.5 * float(length.max()), float(length.max()))}
        panel.quiver(*grid.T.tolist(), *(pull / length).T.tolist(), length[:, 0].tolist(), width=0.006, scale=26, **colours)
        bare(panel, 1.2).scatter(*real.T.tolist(), s=2.5, color="#8797a3", linewidths=0)
        panel.set_title(f"temperature {temperature:g}", fontsize=11, color=INK)
    figure.savefig(folder / "temperatures.png", dpi=115)
    plt.close(figure)


PICTURES = {"idea": idea, "loss": loss, "temperatures": temperatures}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The pictures of the concepts page")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; all if none is given")
    parser.add_argument("--folder", type=Path, default=IMAGES)
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in PICTURES]
    if unknown:
        parser.error(f"no picture {', '.join(unknown)}: there are {', '.join(PICTURES)}")
    for name in arguments.names or PICTURES:
        PICTURES[name](arguments.folder)
        print(f"saved {arguments.folder / name}.png")


if __name__ == "__main__":
    main()
