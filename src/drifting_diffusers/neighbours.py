r"""Which samples are close to which. N_k(S) is the union of balls B(s, r_k(s)) around the samples s of a set S, r_k(s) the distance to its k-th neighbour in S.

Precision is the share of generated samples in N_k(real), recall the share of real ones in N_k(generated); density counts the balls a generated
sample lies in, coverage the balls that hold one. A sample nearer to a training image than new real images are is a memory.

All distances are taken in float64 from features moved to the mean of one set, block by block. The error of a squared distance is then about
1e-15 (|x|^2 + |y|^2), where float32 has 1e-6 and calls a copy a neighbour; a block is 32 MB whatever the sets are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .shapes import Float, Int

ROWS, COLUMNS = 1000, 4000  # of one block of distances: 32 MB in float64
SAME = 1e-13  # squared distances below this share of |x|^2 + |y|^2 are rounding: such samples are one point, at distance 0
TIE = 1 + 1e-12  # a squared radius grows by this much, so that the neighbour which defines the radius is inside in spite of rounding


def finite(name: str, features: Tensor) -> Tensor:
    """The features, if there are any and all are numbers.

    Raises:
        ValueError: else, with the name, the shape and the first sample that is at fault.
    """
    if len(features) == 0:
        raise ValueError(f"{name} of shape {list(features.shape)} hold no sample: a meter needs some")
    right = features.isfinite().flatten(1).all(1) if features.ndim > 1 else features.isfinite()
    if not right.all():
        raise ValueError(
            f"{int((~right).sum())} of {len(features)} samples of {name} are NaN or infinite, the first is sample {int((~right).nonzero()[0])}: "
            "look at what made them; leaving them out would flatter the figure"
        )
    return features


def _comparable(**sets: Tensor) -> list[Tensor]:
    """The feature sets, refused where one is empty, not finite, or of another width than the first; from a device without float64 to the CPU."""
    widths = {name: features.shape[-1] for name, features in sets.items()}
    if len(set(widths.values())) > 1:
        shapes = ", ".join(f"{name} {list(features.shape)}" for name, features in sets.items())
        raise ValueError(f"features of different widths have no distance: {shapes}; take them from one extractor")
    return [finite(name, s.cpu() if s.device.type == "mps" else s) for name, s in sets.items()]


def squared_distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], centre: Float[Tensor, " d"]) -> Float[Tensor, "n m"]:
    """|x - y|^2 of every pair of one block in float64; a pair that differs by rounding alone is at 0 exactly."""
    x, y = x.double() - centre, y.double() - centre
    scale = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    squares = torch.addmm(scale, x, y.mT, alpha=-2)
    return squares.masked_fill_(squares <= SAME * scale, 0)


def blocks(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, rows: int = ROWS, columns: int = COLUMNS
) -> Iterator[tuple[slice, slice, Float[Tensor, "r c"]]]:
    """(rows, columns, squared distances of those) until every pair was seen; all columns of one set of rows first."""
    centre = y.mean(0, dtype=torch.float64)
    for i in range(0, len(x), rows):
        for j in range(0, len(y), columns):
            one, other = slice(i, min(i + rows, len(x))), slice(j, min(j + columns, len(y)))
            yield one, other, squared_distances(x[one], y[other], centre)


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "n d"], keys: Float[Tensor, "m d"], *, chunk: int = ROWS
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """For every query the nearest key: (distance [n], float64, in the unit of the features; its index [n]), of equally near keys the first.

    Every pair is looked at: n m d multiplications, 8 chunk (4000 + d) bytes beside the features. The result does not depend on `chunk`.

    Raises:
        ValueError: for features that are empty, not finite, or of different widths.
    """
    queries, keys = _comparable(queries=queries, keys=keys)
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for rows, columns, squares in blocks(queries, keys, rows=chunk):
        found, where = squares.min(1)
        closer = found < best[rows]
        index[rows] = torch.where(closer, where + columns.start, index[rows])
        best[rows] = torch.where(closer, found, best[rows])
    return best.sqrt(), index


def _squared_radii(name: str, x: Tensor, k: int) -> Float[Tensor, " n"]:
    """The squared distance of every sample to its k-th neighbour in its own set, itself left out."""
    if not 1 <= k < len(x):
        raise ValueError(
            f"{len(x)} samples of {name} have no neighbour number k = {k}: choose k from 1 to {len(x) - 1}, or take more samples"
        )
    kept = torch.full((len(x), k), torch.inf, dtype=torch.float64, device=x.device)
    for rows, columns, squares in blocks(x, x):
        itself = torch.arange(rows.start, rows.stop, device=x.device)[:, None] == torch.arange(columns.start, columns.stop, device=x.device)
        pool = torch.cat((kept[rows], squares.masked_fill_(itself, torch.inf)), 1)
        kept[rows] = pool.topk(k, dim=1, largest=False, sorted=True).values
    return kept[:, -1]


def _inside(points: Tensor, centres: Tensor, squared_radii: Tensor) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """In how many balls every point lies [n], and how many points every ball holds [m]; the surface belongs to the ball."""
    balls = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    held = torch.zeros(len(centres), dtype=torch.int64, device=points.device)
    reach = squared_radii * TIE
    for rows, columns, squares in blocks(points, centres):
        within = squares <= reach[columns]
        balls[rows] += within.sum(1)
        held[columns] += within.sum(0)
    return balls, held


def _share(yes: Tensor) -> float:
    return float(yes.double().mean())


@torch.no_grad()
def precision_recall(generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. 2019 (arXiv 1904.06991, equations 1 and 2), with its k = 3; each from 0 to 1, high is good.

    Precision: the share of generated samples that lie where real ones do. Recall: the share of real samples that lie where generated ones do;
    a missing class or a collapse lowers it. Swapping the sets swaps the figures. The paper takes 50,000 samples of each, in VGG-16 features.

    Bias: of two samples of one law neither figure is 1, and both depend on n, m and the dimension: compare only figures of equal n, m and k, and
    with the figure of real against real. An outlier has a large ball, which raises the precision of everything in it: density is steadier.

    Raises:
        ValueError: for features that are empty, not finite, of different widths, or not more than k.
    """
    generated, real = _comparable(generated=generated, real=real)
    precision, _ = _inside(generated, real, _squared_radii("real", real, k))
    recall, _ = _inside(real, generated, _squared_radii("generated", generated, k))
    return _share(precision > 0), _share(recall > 0)


@torch.no_grad()
def density_coverage(generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, k: int = 5) -> tuple[float, float]:
    """(density, coverage) of Naeem et al. 2020 (arXiv 2002.09797, equations 4 and 5), with its k = 5; high is good.

    Density: how many of the real samples' balls a generated sample lies in, over k; from 0, near 1 for one law, above 1 where generated samples
    crowd into the densest places. Coverage: the share of real samples whose ball holds a generated sample, from 0 to 1.

    Bias: for two samples of one law the density is 1 in the mean at any n, and the coverage 1 - ((m-1)...(m-k)) / ((n+m-1)...(n+m-k)), near
    1 - 2^-k at n = m: 0.97 at k = 5. Coverage grows with n, so compare figures of equal n, m and k. A surface belongs to its ball here.

    Raises:
        ValueError: for features that are empty, not finite, of different widths, or not more than k real ones.
    """
    generated, real = _comparable(generated=generated, real=real)
    balls, held = _inside(generated, real, _squared_radii("real", real, k))
    return float(balls.double().mean() / k), _share(held > 0)


@torch.no_grad()
def memorisation(
    generated: Float[Tensor, "n d"], training: Float[Tensor, "m d"], held_out: Float[Tensor, "k d"], *, quantile: float = 0.05
) -> dict[str, float]:
    """Whether generated samples lie nearer to the training set than new real samples do; distances in the unit of the features.

    Returns:
        `generated_distance`, `held_out_distance`: the median distance to the nearest training sample.
        `ratio`: the first over the second. Near 1 is good, near 0 the training set is recited; above 1 samples are far from all real images.
        `share_closer`: the share of generated samples at most as far from a training sample as the nearest `quantile` of the held-out ones. It is
            `quantile` (0.05) for samples that are as new as held-out images, and 1 for copies. It sees a few copies, which the ratio does not.

    Both distances fall as the training set grows. `held_out` must not have been trained on. Meehan, Chaudhuri and Dasgupta (arXiv 2004.05675)
    test the same distances against each other.

    Raises:
        ValueError: for features that are empty, not finite or of different widths, and when half of the held-out samples are in the training set.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile {quantile} is no share of the held-out samples: choose it from 0 to 1")
    generated, training, held_out = _comparable(generated=generated, training=training, held_out=held_out)
    (ours, _), (theirs, _) = nearest(generated, training), nearest(held_out, training)
    generated_distance, held_out_distance = float(ours.quantile(0.5)), float(theirs.quantile(0.5))
    if held_out_distance == 0:
        raise ValueError("half or more of the held-out samples are in the training set: hold out images that were not trained on")
    return {
        "generated_distance": generated_distance,
        "held_out_distance": held_out_distance,
        "ratio": generated_distance / held_out_distance,
        "share_closer": _share(ours <= theirs.quantile(quantile)),
    }
