"""From a picture to pictures: the lower half of a garment is given, one network call draws what the upper half may be.

    python examples/03_conditional_translation.py --output_dir outputs/translation

There are no classes and no trainer here. Every condition has one real answer, but many are right. So no condition can be a problem of its
own; instead the condition, weighted, is appended to the answer, and all pairs (answer, condition) of a batch form one problem. A
generated pair then listens to real pairs whose conditions are near its own (a neighbourhood in key space, as in arXiv 2603.14056); the
weight says how near, and the gradient reaches the answer alone, because nothing made the condition.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drifting_diffusers import DriftingField, drift_loss

FIELD = DriftingField(temperatures=(0.02, 0.05, 0.2), affinity_floor=0.0)
DATA = Path(__file__).parent / "data/fashion_mnist"
NOISE = 32


def garments(split: str, count: int) -> Tensor:
    """Images [n, 1, 28, 28] in [-1, 1]."""
    from datasets import Dataset

    from drifting_diffusers.data import LabelledImages

    rows = Dataset.from_parquet(str(DATA / f"{split}.parquet")).select(range(count))
    return LabelledImages(rows, size=(28, 28), channels=1, num_classes=0, image_column="image", label_column="label").gather(range(count))[
        0
    ]


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """The condition, the lower half, and the answer, the upper half, [n, 1, 14, 28] each."""
    return images[:, :, 14:], images[:, :, :14]


class Generator(nn.Module):
    """(condition [n, 1, 14, 28], noise [n, 32]) -> answers [n, 1, 14, 28] in one call."""

    def __init__(self, width: int = 512):
        super().__init__()
        layers = [nn.Linear(14 * 28 + NOISE, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 14 * 28), nn.Tanh())

    def forward(self, condition: Tensor, noise: Tensor) -> Tensor:
        return self.layers(torch.cat([condition.flatten(1), noise], dim=1)).unflatten(1, (1, 14, 28))


def pairs(answer: Tensor, condition: Tensor, key: float) -> dict[str, Tensor]:
    """What is compared, [n, d] each: pixels and coarse pixels of the answer, each with the condition behind it."""
    coarse = lambda t: F.avg_pool2d(t, 4, stride=2).flatten(1)
    return {
        "pixels": torch.cat([answer.flatten(1), key * condition.flatten(1)], dim=1),
        "coarse": torch.cat([coarse(answer), key * coarse(condition)], dim=1),
    }


def train(images: Tensor, *, steps: int, batch: int, key: float, seed: int) -> Generator:
    """Two answers for every condition of a batch, against the real pairs of these conditions and of as many others again."""
    torch.manual_seed(seed)  # the initial weights
    model, generator = Generator(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        conditions, answers = halves(images[torch.randint(len(images), (2 * batch,), generator=generator)])
        asked = conditions[:batch].repeat_interleave(2, dim=0)
        drawn = model(asked, torch.randn(2 * batch, NOISE, generator=generator))
        made, real = pairs(drawn, asked, key), pairs(answers, conditions, key)
        loss = sum(drift_loss(made[name][None], real[name][None], field=FIELD)[0].mean() for name in made)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, in mean distances of y."""
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    return float((2 * torch.cdist(x, y).mean() - within(x) - within(y)) / within(y))


@torch.no_grad()
def judge(model: Generator, train_images: Tensor, test_images: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Distances between laws of pairs, all to the first half of the held-out ones, asked with the conditions of the second."""
    joint = lambda answer, condition: torch.cat([answer.flatten(1), condition.flatten(1)], dim=1)
    count = len(test_images) // 2
    (conditions, answers), (asked, truth) = halves(test_images[:count]), halves(test_images[count : 2 * count])
    noise = lambda: torch.randn(count, NOISE, generator=generator)
    one, other = model(asked, noise()), model(asked, noise())
    real, order = joint(answers, conditions), torch.randperm(count, generator=generator)
    known = halves(train_images)
    neighbour = torch.cdist(asked.flatten(1), known[0].flatten(1)).topk(2, largest=False).indices
    apart = lambda a, b: float((a - b).flatten(1).norm(dim=1).mean())
    return {
        "energy distance, generated": energy_distance(joint(one, asked), real),
        "energy distance, real": energy_distance(joint(truth, asked), real),
        "energy distance, answers shuffled": energy_distance(joint(truth[order], asked), real),
        "two answers to one condition": apart(one, other),
        "real answers of its two nearest conditions": apart(known[1][neighbour[:, 0]], known[1][neighbour[:, 1]]),
        "real answers of any two conditions": apart(truth, truth[order]),
    }


def draw(model: Generator, images: Tensor, generator: torch.Generator, file: Path) -> None:
    """A row for each condition: what was given, four answers, the truth."""
    import matplotlib.pyplot as plt

    conditions, answers = halves(images)
    with torch.no_grad():
        drawn = [model(conditions, torch.randn(len(images), NOISE, generator=generator)) for _ in range(4)]
    hidden = torch.full_like(answers, -0.6)
    columns = [torch.cat([top, conditions], dim=2) for top in (hidden, *drawn, answers)]
    titles = ["given", "", "four answers", "", "", "truth"]
    half = (len(images) + 1) // 2
    figure, panels = plt.subplots(half, 12, figsize=(9, 0.75 * half + 0.25), squeeze=False, layout="constrained")
    for i in range(2 * half):
        for j, column in enumerate(columns):
            panel = panels[i % half, j + 6 * (i // half)]
            panel.axis("off")
            if i < len(images):
                panel.imshow(-column[i, 0], cmap="gray", vmin=-1, vmax=1)
            if i % half == 0:
                panel.set_title(titles[j], fontsize=8, color="0.25", loc="left" if j == 2 else "center")
    figure.savefig(file, dpi=160)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Upper halves of garments from their lower halves, several each, in one call")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/translation"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=96, help="conditions per step")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--held_out", type=int, default=2000)
    parser.add_argument("--key", type=float, default=1.0, help="weight of the condition: large is a narrow neighbourhood")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    images, test = garments("train", args.images), garments("test", args.held_out)
    model = train(images, steps=args.steps, batch=args.batch, key=args.key, seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed + 1)
    table = judge(model, images, test, generator)
    for name, value in table.items():
        print(f"{name:46}{value:9.4f}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(model, test[:16], generator, args.output_dir / "translation.png")
    print(f"saved {args.output_dir / 'translation.png'}")
    return table


if __name__ == "__main__":
    main()
