r"""Mean and covariance of real and generated samples: of a step, of a queue of the last steps, or averaged over all steps.

A queue of samples is remembered as the sums that its moments are made of, in blocks of steps: it has the same moments (ours; it costs 2 d^2 numbers a
block instead of d a sample, and the oldest samples leave a block at a time).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shapes import Float
from .frame import BLOCK
from .landmarks import exact
from .protocol import Mean, batch_mean

BLOCKS = 16
"""Into how many blocks a queue's window is divided; it holds between its window and 2 / BLOCKS more."""


class Gaussian(NamedTuple):
    """The moments of one side, in float64: of all problems, or of each."""

    mean: Float[Tensor, "*b 1 d"]
    covariance: Float[Tensor, "*b d d"]

    def in_lengths(self, length: Tensor) -> "Gaussian":
        length = exact(length)[..., None, None]
        return Gaussian(self.mean / length, self.covariance / length.square())


def sums_of(points: Float[Tensor, "b n d"], masses: Tensor | None) -> Float[Tensor, "b k"]:
    """(sum w, sum w y, sum w y y^T) of every problem, in float64, k = 1 + d + d^2; a sample of mass 0 is absent."""
    b, n, d = points.shape
    found = points.new_zeros(b, 0, dtype=torch.float64) if points.device.type != "mps" else torch.zeros(b, 0, dtype=torch.float64)
    total = found.new_zeros(b, 1 + d + d * d)
    size = max(1, BLOCK // max(1, b * d))
    for i in range(0, n, size):
        y = exact(points[:, i : i + size])
        weighted = y if masses is None else y * exact(masses[:, i : i + size])[..., None]
        mass = y.new_full((b, 1), float(y.shape[1])) if masses is None else exact(masses[:, i : i + size]).sum(1, keepdim=True)
        total += torch.cat([mass, weighted.sum(1), (weighted.mT @ y).flatten(1)], dim=1)
    return total


def gaussian_of(sums: Float[Tensor, "*b k"], d: int) -> Gaussian:
    """Moments from sums; the covariance is that of the samples as they are, divided by their mass and not by one less."""
    mass, first, second = sums.split([1, d, d * d], dim=-1)
    mean = (first / mass)[..., None, :]
    return Gaussian(mean, (second / mass).unflatten(-1, (d, d)) - mean.mT @ mean)


class Block(NamedTuple):
    """Sums over some steps, [2, k] of (real, generated), and how many generated samples they hold."""

    sums: Tensor
    count: int


class Moments:
    """What a `FrechetField` remembers, by feature: a queue of sums, or their exponential average. A `Memory`.

    It is plain sums in float64, [2, 1 + d + d^2] each; a queue has up to `BLOCKS` + 2 of them: 1.2 GB for d = 2048, 170 MB for d = 768.
    """

    def __init__(self):
        self._blocks: dict[str, list[Block]] = {}

    def __contains__(self, feature: str) -> bool:
        return feature in self._blocks

    def queued(self, feature: str, sums: Float[Tensor, "2 k"], count: int, window: int) -> Float[Tensor, "2 k"]:
        """Sums over the last steps, this one included, with at least `window` samples as soon as there are so many.

        Args:
            feature: name of what is compared.
            sums: of this step, over all processes.
            count: how many generated samples they are of.
            window: the least number of samples to be kept.
        """
        blocks = self._blocks.setdefault(feature, [])
        self._check(feature, sums)
        if blocks and blocks[-1].count + count <= window / BLOCKS:
            last = blocks.pop()
            sums, count = last.sums.to(sums.device) + sums, last.count + count
        blocks.append(Block(sums, count))
        while sum(block.count for block in blocks[1:]) >= window:
            del blocks[0]
        return torch.stack([block.sums.to(sums.device) for block in blocks]).sum(0)

    def averaged(self, feature: str, sums: Float[Tensor, "2 k"], decay: float) -> Float[Tensor, "2 k"]:
        """The average S <- decay S + (1 - decay) sums, from 0: masses are averaged alike, so quotients have no bias at the start."""
        self._check(feature, sums)
        before = self._blocks[feature][0].sums.to(sums.device) if feature in self else torch.zeros_like(sums)
        after = decay * before + (1 - decay) * sums
        self._blocks[feature] = [Block(after, 0)]
        return after

    def recall(self, feature: str) -> Tensor | None:
        """The sums as they are, [2, k]; None if there are none."""
        return torch.stack([block.sums for block in self._blocks[feature]]).sum(0) if self._blocks.get(feature) else None

    def _check(self, feature: str, sums: Tensor) -> None:
        for block in self._blocks.get(feature, [])[:1]:
            if block.sums.shape != sums.shape:
                raise ValueError(
                    f"feature {feature!r} had {block.sums.shape[1]} sums (1 + d + d^2) and now has {sums.shape[1]}: a memory belongs to one set of features"
                )

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and plain containers."""
        return {
            feature: {"sums": [b.sums.cpu() for b in blocks], "counts": [b.count for b in blocks]}
            for feature, blocks in self._blocks.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._blocks = {
            feature: [Block(sums.clone(), int(count)) for sums, count in zip(entry["sums"], entry["counts"], strict=True)]
            for feature, entry in state.items()
        }


def over_processes(sums: Float[Tensor, "2 k"], count: int, mean: Mean) -> tuple[Float[Tensor, "2 k"], float]:
    """Sums over all processes and the number of samples that they are of, in one message.

    `mean` gives quotients alone, from which no number of processes follows; it is taken from torch.distributed.
    """
    device, like = sums.device, sums.new_ones(1)
    totals = torch.cat([sums.flatten(), like])[:, None]
    means = mean(totals, sums.new_full((1,), float(count))).to(device)
    together = torch.distributed.is_available() and torch.distributed.is_initialized() and mean is not batch_mean
    number = (torch.distributed.get_world_size() if together else 1) / means[-1]  # means[-1] is processes / samples
    return means[:-1].reshape(sums.shape) * number, float(number)
