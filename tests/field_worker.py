"""Every field over two processes, for a test: python -m torch.distributed.run --nproc_per_node 2 field_worker.py FIELDS_AS_JSON

Each process holds half of the problems and sums over both; its velocities, units and strengths must be those of the whole.
"""

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from drifting_diffusers.fields import Situation, read_field, situated
from drifting_diffusers.losses import drift_loss


def summed(totals, weights):
    """A mean over the problems of all processes."""
    both = torch.cat([totals.sum(-1).flatten(), weights.sum()[None]])
    dist.all_reduce(both)
    return (both[:-1] / both[-1]).unflatten(0, totals.shape[:-1]) if totals.ndim > 1 else both[0] / both[1]


def step(field, samples, rows, **more):
    """The loss of these problems and its gradient, twice, so that what is remembered is used."""
    for at in range(2):
        x, positives, negatives, masses = (t[rows] for t in samples)
        x = (x + at).requires_grad_()
        now = situated(field, Situation(at, 10, "feature", torch.arange(4)[rows]))
        loss, drift = drift_loss(x, positives, negatives, negative_weights=masses, field=now, **more)
        loss.sum().backward()
    unit = drift.unit[rows] if drift.unit.ndim and "mean" not in more else drift.unit
    return x.grad, loss.detach(), unit


def error(ours, whole):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, whole, strict=True))


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, rng = dist.get_rank(), torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)[:, None, None]  # means of a part are far from those of all
    samples = [scale * torch.randn(4, n, 3, generator=rng, dtype=torch.float64) for n in (8, 10, 4)]
    samples.append(torch.rand(4, 4, generator=rng, dtype=torch.float64))
    mine, found = slice(2 * rank, 2 * rank + 2), {}
    for text in json.loads(sys.argv[1]):
        whole = [value[mine] if value.ndim and len(value) == 4 else value for value in step(read_field(text), samples, slice(None))]
        shared = step(read_field(text), samples, mine, mean=summed)
        alone = step(read_field(text), samples, mine)
        found[text] = [error(shared, whole), error(alone, whole)]
    everyone = [None, None]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        print("RESULT", json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
