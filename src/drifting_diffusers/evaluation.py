r"""The meters. A drifting model is judged by distances between samples and held-out real images, because its loss is flat by construction."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .shapes import Float, Int


def energy_distance(x: Float[Tensor, "n *shape"], y: Float[Tensor, "m *shape"]) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over the flattened samples, in their unit (Szekely and Rizzo 2013); at least 0.

    All pairs count, the pairs of a sample with itself too, so two samples of one distribution are (1/n + 1/m) E|x - x'| apart on average:
    compare it with the same figure for real images at the same n and m.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def spread(x: Float[Tensor, "n *shape"]) -> float:
    """The mean distance of two different samples; 0 for a collapsed class.

    Raises:
        ValueError: for fewer than two samples.
    """
    if len(x) < 2:
        raise ValueError(f"a spread needs at least 2 samples, got {len(x)}")
    distances = torch.cdist(x.flatten(1).double(), x.flatten(1).double())
    return float(distances.sum() / (len(x) * (len(x) - 1)))


def per_class(
    meter: Callable[..., float], samples: Tensor, labels: Int[Tensor, " n"], *others: tuple[Tensor, Int[Tensor, " m"]]
) -> dict[int, float]:
    """The meter for every class of `labels`, on its samples and on the samples of that class of every other (samples, labels).

    Raises:
        ValueError: for a class that one of the others lacks.
    """
    found = {}
    for label in labels.unique().tolist():
        parts = [s[ls == label] for s, ls in ((samples, labels), *others)]
        if any(len(part) == 0 for part in parts):
            raise ValueError(f"class {label} has no sample to compare with; leave it out of the evaluation or add held-out images of it")
        found[label] = meter(*parts)
    return found


def compare(
    generated: tuple[Float[Tensor, "n *shape"], Int[Tensor, " n"]],
    reference: tuple[Float[Tensor, "m *shape"], Int[Tensor, " m"]],
    control: tuple[Float[Tensor, "k *shape"], Int[Tensor, " k"]],
) -> dict[str, float]:
    """How far generated samples are from held-out real ones, beside the same figures for other real ones; (samples, labels) each.

    Returns:
        `energy`, `energy_real`: the energy distance to the reference, of the generated and of the control samples, mean over classes.
        `spread`, `spread_real`: the mean distance within a class, of the generated and of the reference samples, mean over classes.
    """
    average = lambda found: sum(found.values()) / len(found)
    return {
        "energy": average(per_class(energy_distance, *generated, reference)),
        "energy_real": average(per_class(energy_distance, *control, reference)),
        "spread": average(per_class(spread, *generated)),
        "spread_real": average(per_class(spread, *reference)),
    }


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], batch_size: int = 500) -> float:
    """The share of images that the classifier gives their label."""
    right = [(classifier(x).argmax(1) == y).sum() for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)]
    return float(torch.stack(right).sum() / len(labels))
