"""The meters against closed forms and invariances."""

import math

import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers.classifiers import train_classifier
from drifting_diffusers.evaluation import accuracy, compare, energy_distance, per_class, spread


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
