"""Features of your own, on data that are no images: a one-step generator of waveforms that are compared by what they sound like.

    python examples/05_bring_your_own_features.py --output_dir outputs/own_features

A feature map is any callable `samples -> {name: [n, locations, d]}` that is differentiable in the samples; the objective asks for nothing
else. A waveform is an image of one row here. Two plucked strings with any phase are far apart sample by sample, so raw samples as
features teach little about what is heard; spectra of several window lengths do not see the phase. Each of both trains the same generator;
both are judged by windows of another length that neither has seen. Nothing is free: what a feature does not see, here the law of the
phase, it does not teach.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from drifting_diffusers import DriftingField, DriftingObjective, Pixels

FIELD = DriftingField(temperatures=(0.05, 0.2, 0.5), affinity_floor=0.0)
LENGTH = 256


def plucked(n: int, generator: torch.Generator) -> Tensor:
    """Waveforms [n, 1, 1, LENGTH] in [-1, 1]: one of three notes, a little out of tune, with an overtone, dying away from a random start."""
    draw = lambda low, high: low + (high - low) * torch.rand(n, 1, generator=generator)
    note = torch.tensor([6.0, 11.0, 19.0])[torch.randint(0, 3, (n,), generator=generator)][:, None] * draw(0.97, 1.03)
    time, begin = torch.arange(LENGTH) / LENGTH, draw(0.0, 0.35)
    phase = 2 * math.pi * note * time
    wave = (phase + draw(0, 2 * math.pi)).sin() + draw(0.2, 0.6) * (2 * phase + draw(0, 2 * math.pi)).sin()
    envelope = ((time - begin) * 60).clamp(0, 1) * (-draw(2.0, 6.0) * (time - begin).clamp(min=0)).exp()
    return (0.6 * wave * envelope)[:, None, None]


def spectra(waves: Tensor, window: int) -> Tensor:
    """Magnitudes [n, frames, window / 2 + 1] of overlapping windows. The root has a slope at 0 because something is added under it."""
    pieces = waves.flatten(1).unfold(1, window, window // 2) * torch.hann_window(window, device=waves.device)
    found = torch.fft.rfft(pieces, norm="ortho")
    return (found.real.square() + found.imag.square() + 1e-4).sqrt()


class Spectra:
    """The feature map: every window length is a feature; `whole` joins its frames into one location, which fixes their order in time.

    Locations are problems of their own: frame by frame alone, the field would not know which frames belong together.
    """

    windows = (32, 64, 128)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        found = {f"spectra_{window}": spectra(images, window) for window in self.windows}
        return found | {f"whole_{window}": values.flatten(1)[:, None] for window, values in found.items()} | self.raw(images)

    def raw(self, waves: Tensor) -> dict[str, Tensor]:
        """Short pieces of the wave itself: they see clicks and noise, which magnitudes forgive."""
        return {"raw_16": waves.flatten(1).unfold(1, 16, 16)}


class Generator(nn.Module):
    """Noise [n, 32] -> waveforms in one call."""

    def __init__(self, noise: int = 32, width: int = 384):
        super().__init__()
        self.noise = noise
        layers = [nn.Linear(noise, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, LENGTH), nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise)[:, None, None]


def train(objective: DriftingObjective, *, steps: int, batch: int, seed: int) -> Generator:
    torch.manual_seed(seed)  # the initial weights
    model, generator = Generator(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        waves = model(torch.randn(batch, model.noise, generator=generator))
        loss, _ = objective(waves[None], plucked(batch, generator)[None])  # one label: all of them are one distribution
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, in mean distances of y."""
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    return float((2 * torch.cdist(x, y).mean() - within(x) - within(y)) / within(y))


def judged(waves: Tensor, real: Tensor) -> dict[str, float]:
    heard = lambda t: spectra(t, 96).flatten(1)
    return {"by spectra": energy_distance(heard(waves), heard(real)), "by samples": energy_distance(waves.flatten(1), real.flatten(1))}


def draw(rows: dict[str, Tensor], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(rows), 6, figsize=(11, 1.25 * len(rows) + 0.2), squeeze=False, layout="constrained")
    for line, (name, waves) in zip(panels, rows.items(), strict=True):
        for panel, wave in zip(line, waves[:6].flatten(1), strict=True):
            panel.plot(wave.tolist(), color="0.45" if name == "real" else "#00798c", linewidth=0.9)
            panel.set(ylim=(-1.05, 1.05), xticks=[], yticks=[])
            panel.spines[:].set_color("0.85")
        line[0].set_ylabel(name, fontsize=9, color="0.25")
    figure.savefig(file, dpi=160)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description="Waveforms from one call, by features of your own")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/own_features"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--samples", type=int, default=1000, help="waveforms that are judged")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    generator = torch.Generator().manual_seed(args.seed + 1)
    real, noise = plucked(args.samples, generator), torch.randn(args.samples, 32, generator=generator)
    rows, table = {"real": plucked(args.samples, generator)}, {}
    for name, features in (("raw samples", Pixels()), ("own features", Spectra())):
        model = train(DriftingObjective(features, FIELD), steps=args.steps, batch=args.batch, seed=args.seed)
        with torch.no_grad():
            rows[name] = model(noise)
    print(f"{'trained with':14}{'energy distance: by spectra':>30}{'by samples':>14}")
    for name, waves in rows.items():
        table[name] = judged(waves, real)
        print(f"{name:14}{table[name]['by spectra']:>30.4f}{table[name]['by samples']:>14.4f}", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(rows, args.output_dir / "own_features.png")
    print(f"saved {args.output_dir / 'own_features.png'}")
    return table


if __name__ == "__main__":
    main()
