r"""Which numbers are taken of generated samples, what they mean, and the one function that takes them.

Everything is computed on features of an extractor. A number is honest only beside the same number for real images, so `measure` is called with
held-out real ones as well.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .evaluation import (
    Moments,
    MomentsAccumulator,
    class_accuracy,
    energy_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    per_class,
    spread,
)
from .neighbours import density_coverage, memorisation, precision_recall
from .shapes import Float, Int

MOST_PAIRED = 10_000  # samples for what looks at all pairs twice, the energy distance: beyond that it costs minutes and gains no digit


@dataclass(frozen=True)
class FeatureSet:
    """Samples as an extractor sees them.

    Args:
        features: one vector per sample.
        labels: their classes.
        logits: of the extractor's own classifier, whatever its classes.
        judged: logits of a classifier of these classes.
    """

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"] | None = None
    logits: Float[Tensor, "n _"] | None = None
    judged: Float[Tensor, "n _"] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def take(self, chosen: Any) -> "FeatureSet":
        """Those at these positions."""
        of = lambda part: None if part is None else part[chosen]
        return FeatureSet(self.features[chosen], of(self.labels), of(self.logits), of(self.judged))


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        moments: of the features of all its images; a count of 0 is an unknown one.
        samples: some of the images, for what looks at neighbours; none where only moments are known.
        chosen: which of the images those are.
        description: what it was made of.
    """

    moments: Moments
    samples: FeatureSet | None
    description: dict[str, Any]
    chosen: Int[Tensor, " m"] | None = None


@dataclass(frozen=True)
class Metric:
    """One way of looking.

    Args:
        compute: from generated samples, reference, held-out samples and the extractor that saw them to numbers by name.
        gives: the names of those numbers, the first one first; empty for the Frechet distance, which its extractor names.
        better: where they should go.
        meaning: in one line.
        needs: what there must be: "samples" of the reference, "labels", "logits", "judged", "held_out", "many" of both sides, or enough for a "subset".
    """

    compute: Callable[[FeatureSet, Reference, FeatureSet | None, Any], dict[str, float]]
    gives: tuple[str, ...]
    better: Literal["lower", "higher", "as real"]
    meaning: str
    needs: frozenset[str] = frozenset()


def measure(
    generated: FeatureSet,
    reference: Reference,
    *,
    extractor: Any,
    metrics: Iterable[str] | None = None,
    held_out: FeatureSet | None = None,
) -> dict[str, float]:
    """The numbers of these metrics, by name; `frechet` appears under the extractor's name for it, "fid" for inception alone.

    Args:
        generated: samples; for a column of real numbers, other real ones.
        reference: what they are compared with.
        extractor: what made the features; its `distance_name` and `fewest` are read.
        metrics: names of `METRICS`; all that are possible if not given.
        held_out: real samples that are not in the reference.

    Raises:
        ValueError: for an unknown metric, or one that needs what is not there, and the sentence says what.
    """
    chosen = list(metrics) if metrics is not None else possible(generated, reference, extractor, held_out)
    found: dict[str, float] = {}
    for name in chosen:
        if name not in METRICS:
            raise ValueError(f"there is no metric {name!r}; the metrics are {', '.join(METRICS)}")
        missing = lacking(name, generated, reference, extractor, held_out)
        if missing:
            raise ValueError(f"{name} cannot be measured: {'; '.join(missing)}")
        found |= METRICS[name].compute(generated, reference, held_out, extractor)
    return found


def possible(generated: FeatureSet, reference: Reference, extractor: Any, held_out: FeatureSet | None) -> list[str]:
    """The metrics for which everything is there."""
    return [name for name in METRICS if not lacking(name, generated, reference, extractor, held_out)]


def lacking(name: str, generated: FeatureSet, reference: Reference, extractor: Any, held_out: FeatureSet | None) -> list[str]:
    """What a metric needs and does not have."""
    needs, samples, fewest = METRICS[name].needs, reference.samples, extractor.fewest
    there = {
        "samples": samples is not None,
        "labels": generated.labels is not None and (samples is None or samples.labels is not None),
        "logits": generated.logits is not None,
        "splits": -(-len(generated) // -(-len(generated) // 10)) == 10,
        "judged": generated.judged is not None,
        "held_out": held_out is not None,
        "held_out_judged": held_out is not None and held_out.judged is not None,
        "many": len(generated) >= fewest and (reference.moments.count or fewest) >= fewest,  # a count of 0 is unknown
        "near": samples is not None and min(len(generated), len(samples)) > NEIGHBOURS,
        "near_in_class": samples is not None and _smallest_class(samples) > NEIGHBOURS,
        "subset": len(generated) >= SUBSET and samples is not None and len(samples) >= SUBSET,
    }
    ways_out = {
        "samples": "the reference holds moments only; make it of a dataset",
        "labels": "there are no labels",
        "logits": "this extractor has no classifier",
        "splits": f"its 10 splits need a number of samples that divides into them, got {len(generated)}",
        "judged": "there is no classifier of these classes; train a judge",
        "held_out": "there are no held-out images",
        "held_out_judged": "there are no held-out images with a classifier of their classes",
        "many": f"a Frechet distance in this extractor needs {fewest} samples on both sides, got {len(generated)} and {reference.moments.count}",
        "near": f"neighbourhoods need more than {NEIGHBOURS} samples, got {len(generated)} and {0 if samples is None else len(samples)}",
        "near_in_class": f"neighbourhoods need more than {NEIGHBOURS} reference samples of every class",
        "subset": f"it draws subsets of {SUBSET} samples, got {len(generated)} and {0 if samples is None else len(samples)}",
    }
    return [ways_out[need] for need in sorted(needs) if not there[need]]


SUBSET = 1000  # samples per subset of the kernel distance (Binkowski 2018)
NEIGHBOURS = 5  # of density and coverage (Naeem 2020); precision and recall take 3


def _smallest_class(samples: FeatureSet) -> int:
    return 0 if samples.labels is None else int(samples.labels.unique(return_counts=True)[1].min())


def _samples(reference: Reference) -> FeatureSet:
    assert reference.samples is not None  # `lacking` has looked
    return reference.samples


def _frechet(generated: FeatureSet, reference: Reference, _: FeatureSet | None, extractor: Any) -> dict[str, float]:
    return {extractor.distance_name: frechet_distance(moments_of(generated.features), reference.moments)}


def _kernel(generated: FeatureSet, reference: Reference, *_: Any) -> dict[str, float]:
    return {"kid": kernel_distance(generated.features, _samples(reference).features, subset_size=SUBSET)[0]}


def _inception(generated: FeatureSet, *_: Any) -> dict[str, float]:
    assert generated.logits is not None
    return {"inception_score": inception_score(generated.logits)[0]}


def _precision(generated: FeatureSet, reference: Reference, *_: Any) -> dict[str, float]:
    precision, recall = precision_recall(generated.features, _samples(reference).features)
    return {"precision": precision, "recall": recall}


def _coverage(generated: FeatureSet, reference: Reference, *_: Any) -> dict[str, float]:
    density, coverage = density_coverage(generated.features, _samples(reference).features)
    return {"density": density, "coverage": coverage}


def _worst_coverage(generated: FeatureSet, reference: Reference, *_: Any) -> dict[str, float]:
    """Labels of the generated samples are not asked: a class that nobody draws is one that nothing covers."""
    real = _samples(reference)
    assert real.labels is not None
    covered = [density_coverage(generated.features, real.features[real.labels == label])[1] for label in real.labels.unique().tolist()]
    return {"coverage_worst_class": min(covered)}


def _energy(generated: FeatureSet, reference: Reference, *_: Any) -> dict[str, float]:
    return {"energy": energy_distance(generated.features[:MOST_PAIRED], _samples(reference).features[:MOST_PAIRED])}


def _class_energy(generated: FeatureSet, reference: Reference, *_: Any) -> dict[str, float]:
    real = _samples(reference)
    assert generated.labels is not None
    assert real.labels is not None
    found = per_class(energy_distance, generated.features, generated.labels, (real.features, real.labels)).values()
    return {"energy_per_class": sum(found) / len(found), "energy_worst_class": max(found)}


def _spread(generated: FeatureSet, *_: Any) -> dict[str, float]:
    assert generated.labels is not None
    found = per_class(spread, generated.features, generated.labels).values()
    return {"spread": sum(found) / len(found)}


def _accuracy(generated: FeatureSet, *_: Any) -> dict[str, float]:
    assert generated.judged is not None
    assert generated.labels is not None
    overall, classes = class_accuracy(generated.judged, generated.labels)
    return {"accuracy": overall, "accuracy_worst_class": min(classes.values())}


def _class_share(generated: FeatureSet, _: Reference, held_out: FeatureSet | None, __: Any) -> dict[str, float]:
    """No label of a sample is asked: a class that nobody draws is one that the judge hardly finds."""
    assert generated.judged is not None
    assert held_out is not None
    assert held_out.judged is not None
    classes = held_out.judged.shape[1]
    share = lambda judged: judged.argmax(1).bincount(minlength=classes).double() / len(judged)
    expected = share(held_out.judged)
    return {"class_share_worst": float((share(generated.judged) / expected)[expected > 0].min())}


def _memorised(generated: FeatureSet, reference: Reference, held_out: FeatureSet | None, _: Any) -> dict[str, float]:
    assert held_out is not None
    found = memorisation(generated.features, _samples(reference).features, held_out.features)
    return {"memorisation_ratio": found["ratio"], "memorisation_share": found["share_closer"]}


METRICS: dict[str, Metric] = {
    "frechet": Metric(_frechet, (), "lower", "Frechet distance of Gaussian fits of the features", frozenset({"many"})),
    "kid": Metric(_kernel, ("kid",), "lower", "squared kernel distance of the features, cubic kernel", frozenset({"samples", "subset"})),
    "inception_score": Metric(_inception, ("inception_score",), "higher", "how sure and how varied a classifier is", frozenset({"logits", "splits"})),
    "precision": Metric(_precision, ("precision", "recall"), "higher", "share of samples near real ones, and of real ones near samples",
                        frozenset({"samples", "near"})),
    "coverage": Metric(_coverage, ("density", "coverage"), "higher", "real samples near a sample, and share of real neighbourhoods reached",
                       frozenset({"samples", "near"})),
    "coverage_worst_class": Metric(_worst_coverage, ("coverage_worst_class",), "higher", "coverage of the class that is covered least",
                                   frozenset({"samples", "near", "near_in_class"})),
    "energy": Metric(_energy, ("energy",), "lower", "energy distance of the features", frozenset({"samples"})),
    "energy_per_class": Metric(_class_energy, ("energy_per_class", "energy_worst_class"), "lower",
                               "energy distance within each class: mean, and worst", frozenset({"samples", "labels"})),
    "spread": Metric(_spread, ("spread",), "as real", "mean distance of two samples of a class", frozenset({"labels"})),
    "accuracy": Metric(_accuracy, ("accuracy", "accuracy_worst_class"), "higher",
                       "share that a classifier puts into its class, and that of the worst class", frozenset({"labels", "judged"})),
    "class_share": Metric(_class_share, ("class_share_worst",), "as real", "the rarest class: its share of the samples over its share of held-out "
                          "images, as a classifier sees them", frozenset({"judged", "held_out_judged"})),
    "memorisation": Metric(_memorised, ("memorisation_ratio", "memorisation_share"), "as real", "nearest training sample: median distance over that "
                           "of held-out ones, and share nearer than 5 % of those", frozenset({"samples", "held_out"})),
}  # fmt: skip
METRIC_OF = {number: name for name, metric in METRICS.items() for number in metric.gives}
"""Which metric a number belongs to; what stands under another name is the Frechet distance of its extractor."""


def limited(n: int, most: int, *, seed: int = 0) -> Int[Tensor, " m"]:
    """At most so many of n positions, drawn with this seed, in their order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def moments_of(features: Float[Tensor, "n d"]) -> Moments:
    """Mean and covariance of features that are all here."""
    accumulator = MomentsAccumulator(features.shape[1])
    accumulator.update(features)
    return accumulator.compute()
