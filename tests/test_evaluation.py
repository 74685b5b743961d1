"""The meters against closed forms, second implementations, invariances and their known bias; the accumulators against the whole at once."""

import math
import pickle
import subprocess
import sys
import warnings

import pytest
import scipy.linalg
import torch
from torch.testing import assert_close
from torchmetrics.image.fid import FrechetInceptionDistance

from drifting_diffusers import neighbours
from drifting_diffusers.classifiers import train_classifier
from drifting_diffusers.evaluation import (
    FeatureAccumulator,
    Moments,
    MomentsAccumulator,
    accuracy,
    class_accuracy,
    compare,
    energy_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    per_class,
    spread,
)


def normal(n, mean=0.0, d=1, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def test_energy_distance_of_shifted_gaussians():
    """For N(0,1) and N(s,1): 2 E|N(s,2)| - 2 E|N(0,2)|, with E|N(s,2)| = 2 exp(-s^2/4) / sqrt(pi) + s erf(s/2)."""
    shift = 1.5
    expected = 2 * (2 * math.exp(-(shift**2) / 4) / math.sqrt(math.pi) + shift * math.erf(shift / 2)) - 4 / math.sqrt(math.pi)
    assert energy_distance(normal(4000), normal(4000, shift, seed=1)) == pytest.approx(expected, rel=0.05)


def test_energy_distance_is_a_distance():
    x, y = normal(50, d=3), normal(40, 1.0, d=3, seed=1)
    assert energy_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert energy_distance(x, y) == pytest.approx(energy_distance(y, x))
    assert energy_distance(x, y) == pytest.approx(energy_distance(x.flip(0), y + 0.0))
    assert energy_distance(3 * x, 3 * y) == pytest.approx(3 * energy_distance(x, y))


def test_energy_distance_of_one_law_falls_with_n():
    """The bias that its docstring states: (1/n + 1/m) E|x - x'|, with E|x - x'| = 2 / sqrt(pi)."""
    for n in (20, 200):
        found = sum(energy_distance(normal(n, seed=2 * k), normal(n, seed=2 * k + 1)) for k in range(50)) / 50
        assert found == pytest.approx(2 / n * 2 / math.sqrt(math.pi), rel=0.25)


def test_spread():
    assert spread(torch.zeros(5, 3)) == pytest.approx(0, abs=1e-12)
    assert spread(torch.tensor([[0.0], [3.0], [6.0]])) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="got 1"):
        spread(torch.zeros(1, 3))


def test_per_class_pairs_classes_and_names_what_is_missing():
    x, labels = torch.tensor([[0.0], [1.0], [5.0], [9.0]]), torch.tensor([0, 0, 1, 1])
    assert per_class(spread, x, labels) == {0: pytest.approx(1.0), 1: pytest.approx(4.0)}
    with pytest.raises(ValueError, match="class 1"):
        per_class(energy_distance, x, labels, (x[:2], labels[:2]))


def test_compare_sees_collapse_and_shift():
    labels = torch.arange(2).repeat_interleave(50)
    real, other = normal(100, d=4).float(), normal(100, d=4, seed=1).float()
    same = compare((normal(100, d=4, seed=2).float(), labels), (real, labels), (other, labels))
    assert same["energy"] == pytest.approx(same["energy_real"], rel=0.6)
    shifted = compare((other + 2, labels), (real, labels), (other, labels))
    assert shifted["energy"] > 5 * shifted["energy_real"]
    collapsed = compare((torch.zeros(100, 4), labels), (real, labels), (other, labels))
    assert collapsed["spread"] < 1e-6 < collapsed["spread_real"]


def test_a_classifier_learns_what_can_be_told_apart():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(60)
    images = torch.full((180, 1, 12, 12), -1.0)
    for i, label in enumerate(labels.tolist()):
        images[i, :, 4 * label : 4 * label + 4] = 1.0  # a bar at one of three heights
    images += 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    calls = []
    model = train_classifier(
        images, labels, generator=torch.Generator().manual_seed(0), epochs=4, batch_size=30, on_step=lambda: calls.append(1)
    )
    assert accuracy(model, images, labels) > 0.95
    assert accuracy(model, images, (labels + 1) % 3) < 0.05
    assert len(calls) == 4 * 6
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="batch of 500"):
        train_classifier(images, labels, generator=torch.Generator(), batch_size=500)


def test_accuracy_does_not_depend_on_the_batch():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    images, labels = torch.randn(7, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1, 0, 0])
    assert_close(accuracy(model, images, labels, batch_size=2), accuracy(model, images, labels))


def test_energy_distance_and_spread_are_those_of_all_pairs_at_any_block_size(monkeypatch):
    x, y = normal(30, 1.0, d=4), normal(25, d=4, seed=1)
    between = lambda a, b: torch.tensor([[math.dist(p, q) for q in b.tolist()] for p in a.tolist()]).mean().item()
    expected = 2 * between(x, y) - between(x, x) - between(y, y)
    assert energy_distance(x, y) == pytest.approx(expected, abs=1e-6)  # the loop's mean is in float32
    assert spread(x) == pytest.approx(between(x, x) * 30 / 29, abs=1e-6)
    rotation = torch.linalg.qr(normal(4, d=4, seed=2)).Q
    whole = energy_distance(x, y)
    assert energy_distance(x @ rotation + 30, y @ rotation + 30) == pytest.approx(whole, abs=1e-12)
    monkeypatch.setattr(neighbours.blocks, "__kwdefaults__", {"rows": 7, "columns": 11})
    assert energy_distance(x, y) == pytest.approx(whole, abs=1e-13)


def test_class_accuracy_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    overall, classes = class_accuracy(logits, torch.tensor([0, 0, 1, 1]))
    assert (overall, classes) == (0.5, {0: 0.5, 1: 0.5})
    assert class_accuracy(logits, logits.argmax(1)) == (1.0, {0: 1.0, 1: 1.0, 2: 1.0})
    with pytest.raises(ValueError, match="labels from 0 to 3 for 3 logits"):
        class_accuracy(logits, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="NaN"):
        class_accuracy(logits * torch.nan, torch.tensor([0, 1, 2, 2]))


# -- the Frechet distance


def moments(x):
    return Moments(x.mean(0), x.T.cov(), len(x))


def gaussian(mean, covariance):
    return Moments(torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(covariance, dtype=torch.float64), 0)


def test_frechet_distance_of_gaussians_has_closed_forms():
    root = torch.linalg.qr(normal(6, d=6)).Q
    first, second = torch.rand(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    one, other = gaussian(torch.zeros(6), root * first @ root.T), gaussian(torch.arange(6), root * second @ root.T)
    commuting = 55 + (first.sqrt() - second.sqrt()).square().sum().item()  # 55 = 0 + 1 + 4 + 9 + 16 + 25
    assert frechet_distance(one, other) == pytest.approx(commuting, rel=1e-12)
    assert frechet_distance(one, gaussian(one.mean + 3, one.covariance)) == pytest.approx(54, rel=1e-12)  # a shift: |delta|^2
    assert frechet_distance(one, gaussian(one.mean, 4 * one.covariance)) == pytest.approx(one.covariance.trace().item(), rel=1e-12)


def test_frechet_distance_is_that_of_scipy_and_of_torchmetrics():
    x, y = normal(200, d=16) @ normal(16, d=16, seed=2), normal(150, 0.3, d=16, seed=1)
    a, b = moments(x), moments(y)
    product = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    by_scipy = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * product.real.trace()
    identity = torch.nn.Identity()
    identity.num_features = 16
    meter = FrechetInceptionDistance(identity).set_dtype(torch.float64)
    meter.update(x, real=True)
    meter.update(y, real=False)
    found = frechet_distance(a, b)
    assert found == pytest.approx(by_scipy.item(), rel=1e-10)
    assert found == pytest.approx(meter.compute().item(), rel=1e-10)


def test_frechet_distance_is_symmetric_and_blind_to_rotation_and_translation():
    x, y = normal(100, d=5), normal(80, 1.0, d=5, seed=1) * 2
    found, rotation = frechet_distance(moments(x), moments(y)), torch.linalg.qr(normal(5, d=5, seed=2)).Q
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(found, rel=1e-12)
    assert frechet_distance(moments(x @ rotation + 9), moments(y @ rotation + 9)) == pytest.approx(found, rel=1e-11)
    assert frechet_distance(moments(3 * x), moments(3 * y)) == pytest.approx(9 * found, rel=1e-12)


def test_frechet_distance_of_fewer_samples_than_dimensions_is_exact():
    """The trace of the root is the sum of singular values of X Y' of the centred samples, which needs no covariance."""
    x, y = normal(20, d=64), normal(30, 0.5, d=64, seed=1)
    a, b = moments(x), moments(y)
    cross = (x - a.mean) @ (y - b.mean).T / math.sqrt(19 * 29)
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * torch.linalg.svdvals(cross).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)
    assert 0 <= frechet_distance(a, a) < 1e-10
    assert frechet_distance(a, gaussian(a.mean, torch.zeros(64, 64))) == pytest.approx(a.covariance.trace().item(), rel=1e-12)
    assert frechet_distance(*[gaussian(torch.zeros(3), torch.zeros(3, 3))] * 2) == 0
    axes = [gaussian(torch.zeros(3), torch.diag(torch.eye(3)[i])) for i in (0, 1)]
    assert frechet_distance(*axes) == 2  # they share no direction


def test_frechet_distance_of_one_law_falls_about_as_one_over_n():
    """Its docstring's bias, d = 64: 1/n to first order is d / 2n for the means of n and n, and as much and more for the covariances."""
    found = {n: frechet_distance(moments(normal(n, d=64)), moments(normal(n, d=64, seed=1))) for n in (100, 200, 400, 800, 1600, 3200)}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found[100] > 20  # of a total variance of 64: real images look far from real images
    assert found[1600] / found[3200] == pytest.approx(2, rel=0.15)


@pytest.mark.usefixtures("as_users_see_it")
def test_frechet_distance_refuses_what_is_no_pair_of_moments():
    a, eye = moments(normal(9, d=3)), torch.eye(3)
    with pytest.raises(ValueError, match=r"\[3\], \[3, 3\], \[2\], \[2, 2\]"):
        frechet_distance(a, moments(normal(9, d=2)))
    with pytest.raises(ValueError, match="the mean of the second are NaN"):
        frechet_distance(a, gaussian([0, 0, math.nan], eye))
    with pytest.raises(ValueError, match="covariance of the first are NaN"):
        frechet_distance(gaussian(a.mean, eye * math.inf), a)
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(a, gaussian(a.mean, torch.diag(torch.tensor([1.0, 1.0, -1.0]))))


# -- accumulators


def accumulated(x, sizes):
    found = MomentsAccumulator(x.shape[1])
    for part in x.split(sizes):
        found.update(part)
    return found


def test_moments_are_exact_far_from_the_origin_at_any_batch_size():
    x = normal(1000, 30.0, d=5).float()
    expected = moments(x.double())
    for size in (1000, 64, 1):
        found = accumulated(x, size).compute()
        assert found.count == 1000
        assert_close(found.mean, expected.mean, rtol=1e-14, atol=0)
        assert_close(found.covariance, expected.covariance, rtol=0, atol=1e-13)


def test_moments_of_one_dimension_keep_their_axes():
    found = accumulated(normal(10), 4).compute()
    assert (found.mean.shape, found.covariance.shape) == ((1,), (1, 1))


def test_merged_resumed_and_copied_moments_are_those_of_the_whole():
    x = normal(100, 30.0, d=4)
    whole, first = accumulated(x, 10).compute(), accumulated(x[:37], 10)
    assert first.compute().count == 37  # and is not remembered
    resumed = MomentsAccumulator(4)
    resumed.load_state_dict(first.state_dict())
    assert_close(resumed.compute().covariance, moments(x[:37]).covariance)
    resumed.update(x[37:])
    first.merge_state(accumulated(x[37:], 10))
    copied = pickle.loads(pickle.dumps(first))
    for found in (resumed, first, copied):
        assert_close(tuple(found.compute()), tuple(whole), rtol=1e-12, atol=1e-13)
    first.reset()
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        first.compute()


@pytest.mark.usefixtures("as_users_see_it")
def test_accumulators_refuse_what_they_cannot_add():
    accumulator, x = MomentsAccumulator(3), normal(5, d=3)
    with pytest.raises(ValueError, match=r"\[5, 2\] in an accumulator of width 3"):
        accumulator.update(x[:, :2])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="5 of 5 samples of features are NaN or infinite, the first is sample 0"):
            accumulator.update(x * bad)
        with pytest.raises(ValueError, match="the first is sample 0"):
            FeatureAccumulator().update(x * bad, torch.arange(5))
    kept = FeatureAccumulator()
    with pytest.raises(ValueError, match="nothing was collected"):
        kept.compute()
    with pytest.raises(ValueError, match="'indices': 4"):
        kept.update(x, torch.arange(4))
    kept.update(x, torch.arange(5), labels=torch.arange(5))
    kept.update(x, torch.arange(5) + 5)
    with pytest.raises(ValueError, match=r"labels of widths \[0, 1\]"):
        kept.compute()
    twice = FeatureAccumulator()
    twice.update(x, torch.tensor([0, 1, 2, 2, 3]))
    with pytest.raises(ValueError, match="1 samples came twice, the first is 2"):
        twice.compute()


def test_features_come_in_the_order_of_their_indices():
    x, labels = normal(20, d=3).float(), torch.arange(20) % 7
    kept, other = FeatureAccumulator(), FeatureAccumulator()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for accumulator, part in ((kept, order[:3]), (kept, order[3:9]), (other, order[9:19])):
        accumulator.update(x[part], part, logits=2 * x[part], labels=labels[part])
    resumed = FeatureAccumulator()
    resumed.load_state_dict(kept.state_dict())
    assert len(resumed.compute().features) == 9
    resumed.merge_state(other)
    resumed.update(x[order[19:]], order[19:], logits=2 * x[order[19:]], labels=labels[order[19:]])
    found = resumed.compute()
    assert_close((found.features, found.indices, found.logits, found.labels), (x, torch.arange(20), 2 * x, labels))
    bare = FeatureAccumulator()
    bare.update(x[:1, :1], torch.tensor([5]))
    assert (bare.compute().features.shape, bare.compute().logits, bare.compute().labels) == ((1, 1), None, None)


TWO_RANKS = """
import os, sys, torch
from drifting_diffusers.evaluation import FeatureAccumulator, MomentsAccumulator
store, out = sys.argv[1:]
child = os.fork()  # after the imports, which take most of the time, and before torch has started a thread
rank = int(child == 0)
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) + 30
found = {}
for name, mine in (("uneven", [range(0, 20, 2), range(1, 30, 2)]), ("one has nothing", [range(0), range(30)])):
    moments, kept = MomentsAccumulator(3), FeatureAccumulator()
    for part in torch.tensor(list(mine[rank])).long().split(4):
        if len(part):
            moments.update(x[part])
            kept.update(x[part], part, labels=part % 5)
    found[name] = [tuple(moments.compute()), tuple(kept.compute())]
    kept.update(x[:1], torch.tensor([100 + rank]), labels=torch.tensor([1]))  # after gathering, a rank goes on with its own
    found[name].append(len(kept.compute().indices))
torch.save(found, out + str(rank))
torch.distributed.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_two_ranks_are_one(tmp_path):
    command = [sys.executable, "-c", TWO_RANKS, str(tmp_path / "store"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) + 30
    for rank in range(2):
        found = torch.load(tmp_path / f"out{rank}")
        for name, there in (("uneven", sorted([*range(0, 20, 2), *range(1, 30, 2)])), ("one has nothing", list(range(30)))):
            whole, kept, later = found[name]
            assert_close(whole, tuple(moments(x[there].double())), rtol=1e-13, atol=1e-13)
            assert_close(kept[:2] + kept[3:], (x[there], torch.tensor(there), torch.tensor(there) % 5))
            assert later == len(there) + 2


# -- KID and the Inception score


def kernel_by_loops(x, y):
    """The unbiased estimate of the squared MMD: no sample is paired with itself."""
    k = lambda a, b: (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3
    xs, ys = x.tolist(), y.tolist()
    own = lambda s: sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
    return own(xs) + own(ys) - 2 * sum(k(a, b) for a in xs for b in ys) / (len(xs) * len(ys))


def test_kernel_distance_of_whole_sets_is_that_of_plain_loops():
    x, y = normal(30, 0.5, d=4), normal(30, d=4, seed=1)
    mean, deviation = kernel_distance(x, y, subsets=3, subset_size=30)
    assert mean == pytest.approx(kernel_by_loops(x, y), rel=1e-12)
    assert deviation == pytest.approx(0, abs=1e-12)
    mean, deviation = kernel_distance(x, y, subsets=400, subset_size=10)
    assert mean == pytest.approx(kernel_by_loops(x, y), abs=4 * deviation / 20)
    assert kernel_distance(y, x, subsets=3, subset_size=30)[0] == pytest.approx(kernel_by_loops(x, y), rel=1e-12)


def test_kernel_distance_of_one_law_is_0_on_average_at_any_n():
    for n in (20, 80):
        found = torch.tensor(
            [kernel_distance(normal(n, d=4, seed=2 * i), normal(n, d=4, seed=2 * i + 1), subsets=1, subset_size=n)[0] for i in range(60)]
        )
        assert abs(found.mean()) < 3 * found.std() / math.sqrt(60)


def test_subset_meters_leave_the_global_generator_and_the_warnings_alone():
    x = normal(40, d=4)
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        runs = [(kernel_distance(x, x + 1, subset_size=20, seed=s), inception_score(x, splits=4, seed=s)) for s in (0, 0, 1)]
    assert not warned
    assert_close(torch.get_rng_state(), state)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]
    assert runs[0][1] != runs[2][1]


def test_inception_score_is_its_formula():
    logits = normal(60, d=5) * 2
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    scores = []
    for part in logits[order].split(20):
        p = part.exp() / part.exp().sum(1, keepdim=True)
        scores.append(math.exp((p * (p / p.mean(0)).log()).sum(1).mean()))
    mean, deviation = sum(scores) / 3, torch.tensor(scores, dtype=torch.float64).std().item()
    assert inception_score(logits, splits=3, seed=3) == pytest.approx((mean, deviation), rel=1e-10)


def test_inception_score_of_certain_classes_is_their_number():
    certain = (torch.eye(8) * 1e5).repeat(500, 1)  # the other probabilities are 0 in float64 too
    assert inception_score(certain, splits=2)[0] == pytest.approx(8, rel=0.01)
    assert inception_score(torch.zeros(40, 8), splits=4) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert inception_score(certain[:80], splits=10)[0] < inception_score(certain[:80], splits=2)[0] < 8  # its bias


@pytest.mark.usefixtures("as_users_see_it")
def test_subset_meters_say_when_there_are_too_few_samples():
    x = normal(50, d=4)
    with pytest.raises(ValueError, match="subset_size = 1000 with 50 and 40 samples: choose it from 2 to 40"):
        kernel_distance(x, x[:40])
    with pytest.raises(ValueError, match=r"\[50, 4\] and \[50, 3\]"):
        kernel_distance(x, x[:, :3])
    with pytest.raises(ValueError, match="samples of x are NaN"):
        kernel_distance(x * torch.nan, x, subset_size=10)
    with pytest.raises(ValueError, match="logits are NaN"):
        inception_score(x * torch.nan)
    for n, splits in ((50, 1), (5, 10), (11, 10)):
        with pytest.raises(ValueError, match=f"{n} samples do not fall into {splits} parts"):
            inception_score(x[:n], splits=splits)
