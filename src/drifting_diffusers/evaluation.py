r"""The meters. A drifting model is judged by distances between samples and held-out real images, because its loss is flat by construction.

All but the last take features [n, d], of any extractor: a figure means something only beside the extractor, n, and the same figure for real
images. What looks at single neighbours (precision, coverage, memorisation) is in `neighbours.py` and can be imported from here.

Two accumulators collect what the meters take, batch by batch and over the ranks of torch.distributed. They stay on the CPU unless moved with
`.to(device)`, as NCCL wants it.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from .neighbours import blocks, finite
from .neighbours import density_coverage as density_coverage
from .neighbours import memorisation as memorisation
from .neighbours import nearest as nearest
from .neighbours import precision_recall as precision_recall
from .shapes import Float, Int

# -- distances of samples


def _mean_distance(x: Tensor, y: Tensor) -> float:
    x, y = (s.cpu() if s.device.type == "mps" else s for s in (x.flatten(1), y.flatten(1)))  # there is no float64 on mps
    total = sum(squares.sqrt().sum() for _, _, squares in blocks(x, y))
    return float(total) / (len(x) * len(y))


@torch.no_grad()
def energy_distance(x: Float[Tensor, "n *shape"], y: Float[Tensor, "m *shape"]) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over the flattened samples, in their unit (Szekely and Rizzo 2013); at least 0, low is good.

    All pairs count, the pairs of a sample with itself too, so two samples of one distribution are (1/n + 1/m) E|x - x'| apart on average:
    compare it with the same figure for real images at the same n and m. In float64, by blocks: up to 0.5 GB beside samples of 3,000 numbers. NaN for NaN.
    """
    return 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)


@torch.no_grad()
def spread(x: Float[Tensor, "n *shape"]) -> float:
    """The mean distance of two different samples, in their unit; 0 for a collapsed class. Good is the figure of real images; no bias with n.

    Raises:
        ValueError: for fewer than two samples.
    """
    if len(x) < 2:
        raise ValueError(f"a spread needs at least 2 samples, got {len(x)}")
    return _mean_distance(x, x) * len(x) / (len(x) - 1)


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


@torch.no_grad()
def class_accuracy(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> tuple[float, dict[int, float]]:
    """The share of samples whose largest logit is that of their label, and the same for every class in `labels`; 0 to 1, high is good, no bias.

    Raises:
        ValueError: for no samples, logits that are not finite, and labels that are no column of the logits.
    """
    finite("logits", logits)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} for {logits.shape[1]} logits: is it another classifier's numbering?"
        )
    right = logits.argmax(1) == labels.to(logits.device)
    share = lambda yes: float(yes.double().mean())
    return share(right), {label: share(right[labels.to(logits.device) == label]) for label in labels.unique().tolist()}


# -- accumulators


class _Accumulator(Metric):
    """A torchmetrics metric whose value is what was collected, not a scalar.

    Three habits of `Metric` are wrong for that: it keeps the old value after `merge_state` and `load_state_dict`, it warns when a resumed one is
    computed before its next update, and it copies the value and drops axes of length 1.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(compute_with_cache=False, **options)

    @property
    def update_called(self) -> bool:
        """True: `compute` itself refuses to work on nothing."""
        return True

    def _wrap_compute(self, compute: Callable) -> Callable:
        def hidden(*args: Any) -> Callable:  # a function is left as it is
            value = compute(*args)
            return lambda: value

        wrapped = super()._wrap_compute(hidden)
        return lambda *args: wrapped(*args)()


class Moments(NamedTuple):
    """What a Gaussian fit of features is made of."""

    mean: Float[Tensor, " d"]  # float64
    covariance: Float[Tensor, "d d"]  # float64, unbiased: over n - 1
    count: int


class MomentsAccumulator(_Accumulator):
    """Mean and covariance of features in float64, by batches [n, d] of any size, over any number of ranks.

    Its state is one matrix [d + 2, d]: the count (d times), the mean, and the sum of squared deviations from the mean. Two states are merged by
    Chan, Golub and LeVeque's formula (1979), a batch into the state and a rank into the others alike. No raw squares are summed, so the error does
    not grow with the distance of the features from the origin; the order of batches and the number of ranks change the last digits alone.
    """

    full_state_update: bool | None = False
    state: Tensor

    def __init__(self, width: int, **options: Any) -> None:
        """Start with no feature; all will have this width d."""
        super().__init__(**options)
        self.add_state("state", torch.zeros(width + 2, width, dtype=torch.float64), dist_reduce_fx=_merge_states, persistent=True)

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Add a batch.

        Raises:
            ValueError: for features that are empty, not finite, or of another width.
        """
        width = self.state.shape[1]
        if features.shape[1] != width:
            raise ValueError(f"features {list(features.shape)} in an accumulator of width {width}: use one accumulator per extractor")
        for part in finite("features", features).detach().split(4096):  # 67 MB in float64 at width 2048, however large the batch is
            x = part.to(self.state.device).double()
            mean = x.mean(0)
            x = x - mean
            batch = torch.cat((torch.full_like(mean, len(x))[None], mean[None], x.mT @ x))
            self.state = _merge_states([self.state, batch])

    def compute(self) -> Moments:
        """The moments of all features of all ranks.

        Raises:
            ValueError: for fewer than two samples, which have no covariance.
        """
        count = int(self.state[0, 0])
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {count}")
        return Moments(self.state[1].clone(), self.state[2:] / (count - 1), count)


def _merge_states(states: Tensor | list[Tensor]) -> Tensor:
    merged, *others = states
    for other in others:
        (n, mean, deviations), (m, its_mean, its_deviations) = ((s[0], s[1], s[2:]) for s in (merged, other))
        total, shift = (n + m).clamp(min=1), its_mean - mean
        deviations = deviations + its_deviations + torch.outer(shift, shift) * (n * m / total)
        merged = torch.cat(((n + m)[None], (mean + shift * (m / total))[None], deviations))
    return merged


class Collected(NamedTuple):
    """Features in the order of their indices, whatever ranks and batches they came in."""

    features: Float[Tensor, "n d"]  # float32
    indices: Int[Tensor, " n"]  # ascending
    logits: Float[Tensor, "n k"] | None
    labels: Int[Tensor, " n"] | None


class FeatureAccumulator(_Accumulator):
    """Keeps features, and logits and labels if they are given, in float32 and int64; `compute` gives every rank those of all ranks.

    4 n (d + k) bytes on every rank: 410 MB for 50,000 features of width 2048, and as much again while ranks gather.
    """

    full_state_update: bool | None = False
    features: list[Tensor]
    indices: list[Tensor]
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("features", "indices", "logits", "labels"):
            self.add_state(name, [], dist_reduce_fx=None, persistent=True)

    def update(
        self,
        features: Float[Tensor, "n d"],
        indices: Int[Tensor, " n"],
        *,
        logits: Float[Tensor, "n k"] | None = None,
        labels: Int[Tensor, " n"] | None = None,
    ) -> None:
        """Add a batch; `indices` number the samples over all ranks, so that image 17 stands in one place on 1 or 8 of them.

        Raises:
            ValueError: for features or logits that are empty or not finite, and for tensors of different lengths.
        """
        finite("features", features)
        if logits is not None:
            finite("logits", logits)
        given = {"features": features, "indices": indices, "logits": logits, "labels": labels}
        lengths = {name: len(part) for name, part in given.items() if part is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"one index, and one label, per sample: got {lengths}")
        absent = features.new_zeros(len(features), 0)  # a state of width 0 says "none" to the other ranks
        for name, part in given.items():
            table = (absent if part is None else part).detach().flatten(1) if part is None or part.ndim > 1 else part.detach()[:, None]
            setattr(self, name, [*getattr(self, name), table.to(self.device, self._kept_as(name))])

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather; every rank joins with one table of two axes per state, an empty one if it has seen nothing, or the collective would hang."""
        for name in self._reductions:
            parts = getattr(self, name)
            empty = torch.zeros(0, 0, dtype=self._kept_as(name), device=self.device)
            setattr(self, name, [_joined(name, parts) if any(map(len, parts)) else empty])
        super().sync(*args, **options)

    def compute(self) -> Collected:
        """All samples of all ranks, by index.

        Raises:
            ValueError: when there is none, when an index came twice, and when some batches or ranks had logits or labels and others not.
        """
        if not any(map(len, self.features)):
            raise ValueError("nothing was collected: call `update` first")
        tables = {name: _joined(name, getattr(self, name)) for name in self._reductions}
        indices, order = tables["indices"][:, 0].sort()
        twice = indices[1:][indices[1:] == indices[:-1]]
        if len(twice):
            raise ValueError(
                f"{len(twice)} samples came twice, the first is {int(twice[0])}: number samples over all ranks, and do not pad the last batch"
            )
        logits, labels = tables["logits"][order], tables["labels"][order]
        return Collected(tables["features"][order], indices, logits if logits.shape[1] else None, labels[:, 0] if labels.shape[1] else None)

    @staticmethod
    def _kept_as(name: str) -> torch.dtype:
        return torch.float32 if name in ("features", "logits") else torch.int64


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    parts = [part for part in parts if len(part)]
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise ValueError(f"{name} of widths {widths} in one accumulator (0 is none): give every batch of every rank the same")
    return torch.cat(parts)


# -- distances of feature distributions


def _root(moments: Moments, name: str) -> Float[Tensor, "r d"]:
    """F with F'F the covariance; r is its numerical rank, so that rounding in its null space (whose root is 1e-8) does not count."""
    finite(f"the mean of {name}", moments.mean[None])
    covariance = finite(f"the covariance of {name}", moments.covariance).double()
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    largest = values[-1].clamp(min=0)
    if values[0] < -1e-5 * largest or values[-1] < 0:  # statistics that were stored in float32 have about -1e-7
        raise ValueError(
            f"the covariance of {name} has the eigenvalue {float(values[0]):.3g}, the largest is {float(values[-1]):.3g}: it is none"
        )
    kept = values > len(values) * torch.finfo(values.dtype).eps * largest
    return values[kept].sqrt()[:, None] * vectors[:, kept].mT


@torch.no_grad()
def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2), in squared units of the features; from 0, low is good (Heusel et al. 2017, equation 6).

    It is "FID" for Inception pool features only. The trace of the root is the sum of the singular values of S^1/2 S'^1/2, which needs no root of a
    product: exact for covariances of any rank, and never NaN. Error: about 1e-13 tr(S + S').

    Bias: positive, falling about as 1/n, and large: two samples of one law are far apart while n is not much above d. Compare figures of one n
    alone, and with real against real at that n; 50,000 is the custom.

    Raises:
        ValueError: for different dimensions, moments that are not finite, and a matrix that is no covariance.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape or a.covariance.shape != 2 * tuple(a.mean.shape):
        shapes = [list(t.shape) for t in (a.mean, a.covariance, b.mean, b.covariance)]
        raise ValueError(f"moments of shapes {shapes}: both need a mean [d] and a covariance [d, d] of one extractor")
    ours, theirs = _root(a, "the first"), _root(b, "the second").to(a.mean.device)
    overlap = torch.linalg.svdvals(ours @ theirs.mT).sum()  # of no values 0
    spreads = ours.square().sum() + theirs.square().sum() - 2 * overlap  # at least 0 in exact arithmetic
    shift = a.mean.double() - b.mean.double().to(a.mean.device)
    return float(shift.square().sum() + spreads.clamp(min=0))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """For torchmetrics' subset meters: the CPU's generator starts at `seed` and is put back; their warning of large buffers is not for us."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too, and nothing would put those back
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer", category=UserWarning)
        yield


@torch.no_grad()
def kernel_distance(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: the squared MMD under the kernel (x.y / d + 1)^3, unbiased, over random subsets (Binkowski et al. 2018, arXiv 1801.01401, section 4).

    Returns:
        Its mean, which is low for near distributions, 0 on average for equal ones (so it may be below 0) whatever n is, and its standard
        deviation over subsets, which share samples: it is no standard error. The unit is the kernel's, and depends on the extractor.

    In float64 (torchmetrics): 8 (n + m) d bytes beside the features.

    Raises:
        ValueError: for features that are not finite or of different widths, and for fewer than `subset_size` samples on a side.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features {list(x.shape)} and {list(y.shape)} are of different widths: take them from one extractor")
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(f"subset_size = {subset_size} with {len(x)} and {len(y)} samples: choose it from 2 to {min(len(x), len(y))}")
    with _seeded(seed):
        meter = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=subset_size, sync_on_compute=False)
        meter.update(finite("y", y).double(), real=True)
        meter.update(finite("x", x).double(), real=False)
        mean, deviation = meter.compute()
    return float(mean), float(deviation)


@torch.no_grad()
def inception_score(logits: Float[Tensor, "n k"], *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """E exp(E KL(p(y|x) | p(y))) over random splits, from 1 to k, and its standard deviation; high is good (Salimans et al. 2016, arXiv 1606.03498).

    The deviation is over splits - 1, where the original program divides by `splits`. No real image is seen: good is the score of real ones. It
    falls with fewer samples per split, to which p(y) is fitted; 5,000 is the custom. Named so for Inception's logits only. In float64 (torchmetrics).

    Raises:
        ValueError: for logits that are not finite, and for an n that does not fall into `splits` >= 2 parts.
    """
    n = len(finite("logits", logits))
    if splits < 2 or n < splits or math.ceil(n / math.ceil(n / splits)) != splits:
        raise ValueError(f"{n} samples do not fall into {splits} parts: choose `splits` from 2, such that it divides the number of samples")
    relative = (logits.double() - logits.double().amax(1, keepdim=True)).clamp(min=-700)  # below, p is 0 in float64 and 0 log 0 is NaN
    with _seeded(seed):
        meter = InceptionScore(nn.Identity(), splits=splits, sync_on_compute=False)
        meter.update(relative)
        mean, deviation = meter.compute()
    return float(mean), float(deviation)
