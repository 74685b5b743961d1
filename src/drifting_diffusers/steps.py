"""The gradient of one training step, in one pass or, where activations do not fit into memory, in two."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .encoded import Samples
from .fields import Mean, Situation
from .objective import Measured
from .shapes import Float

Outcome = tuple[Tensor, dict[str, Measured]]
"""The loss of a step, and what each feature measured."""


@dataclass(frozen=True)
class Step:
    """What a step compares.

    Attributes:
        objective: features and field, a `DriftingObjective` or what is called like one.
        generate: the samples of some of its labels, [l, n, c, h, w], with a graph.
        positives: real samples of each label.
        negatives: unconditional ones, or none.
        weights: [l], their mass.
        situation: the step and its labels.
        mean: over the whole step, on all processes.
        together: computes something, or gives it up on all processes.
    """

    objective: Any
    generate: Callable[[slice], Float[Tensor, "l n c h w"]]
    positives: Samples
    negatives: Samples | None
    weights: Tensor | None
    situation: Situation
    mean: Mean
    together: Callable[[Callable], tuple]


def in_one_pass(step: Step, accelerator: Accelerator) -> Outcome:
    """Activations of all labels at once."""
    real = (step.positives, step.negatives, step.weights)
    compare = lambda: step.objective(step.generate(slice(None)), *real, mean=step.mean, situation=step.situation)
    loss, measured = step.together(compare)
    accelerator.backward(loss)
    return loss.detach(), measured


def in_two_passes(step: Step, accelerator: Accelerator, model: torch.nn.Module, labels: int, size: int) -> Outcome:
    """The same gradient with the activations of a few labels in memory at a time: first features, then each piece against its slopes.

    Args:
        step: what is compared.
        accelerator: of the training.
        model: the generator, as it is wrapped.
        labels: of the step, on this process.
        size: labels at a time.
    """
    objective = step.objective
    pieces = [slice(i, min(i + size, labels)) for i in range(0, labels, size)]
    generated = objective.encode_pieces(step.generate, labels, size)
    real = lambda samples: {} if samples is None else objective.encode(samples, at_once=size * samples.shape[1])
    attracting, repelling = real(step.positives), real(step.negatives)
    compare = lambda: objective.slopes(generated, attracting, repelling, step.weights, mean=step.mean, situation=step.situation)
    slopes, loss, measured = step.together(compare)
    del generated, attracting, repelling
    for piece in pieces:
        sync = contextlib.nullcontext() if piece is pieces[-1] else accelerator.no_sync(model)
        with sync:
            features = objective.problems(step.generate(piece))
            here = {name: slope.unflatten(0, (labels, -1))[piece].flatten(0, 1) for name, slope in slopes.items()}
            accelerator.backward(sum(((features[name] * slope).sum() for name, slope in here.items()), torch.zeros(())))
    return loss, measured
