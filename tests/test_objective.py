"""The objective: features of all labels and locations, one drift loss each, summed."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from drifting_diffusers import DriftingField, DriftingObjective, Pixels, drift_loss
from drifting_diffusers.fields import batch_mean
from drifting_diffusers.losses import NonFinite


def images(labels, n, seed):
    return torch.randn(labels, n, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class Rows(nn.Module):
    """Four locations of four channels."""

    def forward(self, x):
        return {"rows": x.flatten(1, 2)}


def test_pixels_alone_are_the_drift_loss_of_the_flattened_images():
    x, y = images(3, 4, 0).requires_grad_(), images(3, 5, 1)
    loss, measured = DriftingObjective(Pixels())(x, y)
    expected, drift = drift_loss(x.flatten(2), y.flatten(2))
    assert_close(loss, expected.mean())
    assert_close(measured["pixels"].strength, drift.strength)
    assert_close(measured["pixels"].distance, drift.distance)


def test_every_location_is_a_problem_and_features_are_summed():
    x, y = images(2, 4, 0), images(2, 5, 1)
    by_hand, _ = drift_loss(x[:, :, 0].transpose(1, 2).flatten(0, 1), y[:, :, 0].transpose(1, 2).flatten(0, 1))
    loss, _ = DriftingObjective([Rows(), Pixels()])(x, y)
    assert_close(loss, by_hand.mean() + DriftingObjective(Pixels())(x, y)[0])


def test_an_encoder_stands_for_its_activations():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def activations(self, x):
            return Rows()(self.weight * x)

    x, y, encoder = images(2, 4, 0), images(2, 5, 1), Encoder().train()
    objective = DriftingObjective(encoder)
    assert_close(objective(x, y)[0], DriftingObjective([encoder.activations])(x, y)[0])
    assert objective.describe() == DriftingObjective(encoder.activations).describe()
    objective.freeze(torch.device("cpu"))
    assert not encoder.training
    assert not encoder.weight.requires_grad


def test_negatives_carry_the_weight_of_their_label():
    x, y, n = images(2, 4, 0), images(2, 5, 1), images(2, 3, 2)
    masses = torch.tensor([0.0, 2.0])
    loss, _ = DriftingObjective(Rows())(x, y, n, masses)
    split = lambda t: t[:, :, 0].transpose(1, 2).flatten(0, 1)
    expected, _ = drift_loss(split(x), split(y), split(n), negative_weights=masses.repeat_interleave(4)[:, None].expand(8, 3))
    assert_close(loss, expected.mean())


def test_gradient_reaches_the_generated_images_alone():
    x, y, n = images(2, 4, 0).requires_grad_(), images(2, 5, 1).requires_grad_(), images(2, 3, 2).requires_grad_()
    DriftingObjective([Rows(), Pixels()])(x, y, n, torch.ones(2))[0].backward()
    assert x.grad.abs().sum() > 0
    assert y.grad is None
    assert n.grad is None


def test_two_passes_over_pieces_of_the_labels_give_the_gradient_of_one():
    """Through a feature map that is not linear; the scales of the labels differ, so each piece alone would have other means."""
    sizes = torch.tensor([0.3, 1.0, 3.0])[:, None, None, None, None]
    x, y, n = (images(3, count, seed) * sizes for count, seed in ((4, 0), (5, 1), (3, 2)))
    objective = DriftingObjective([lambda z: {"cubes": (z**3 + z).flatten(2)}, Pixels()])
    masses = torch.tensor([0.0, 1.0, 2.0])
    whole = x.clone().requires_grad_()
    loss, measured = objective(whole, y, n, masses)
    loss.backward()

    features = [objective.problems(piece) for piece in (x[:1], x[1:])]
    found = {name: torch.cat([piece[name] for piece in features]) for name in features[0]}
    shapes = {name: values.shape for name, values in found.items()}
    slopes, value, again = objective.slopes(found, objective.problems(y), objective.problems(n), masses)
    assert found == {}  # emptied on the way
    assert {name: slope.shape for name, slope in slopes.items()} == shapes
    assert_close(value, loss.detach())
    assert_close(again["cubes"].strength, measured["cubes"].strength)
    pieces = []
    for first, count in ((0, 1), (1, 2)):
        piece = x[first : first + count].clone().requires_grad_()
        features = objective.problems(piece)
        at = {name: slope.unflatten(0, (3, -1))[first : first + count].flatten(0, 1) for name, slope in slopes.items()}
        torch.autograd.backward(list(features.values()), [at[name] for name in features])
        pieces.append(piece.grad)
    assert_close(torch.cat(pieces), whole.grad, rtol=1e-5, atol=1e-9)


def test_a_feature_that_is_not_finite_is_named():
    broken = lambda z: {"pole": 1 / z.flatten(1)[:, None, :2], "pixels": z.flatten(1)[:, None]}
    x = images(2, 4, 0)
    x[0, 0, 0, 0, 0] = 0
    with pytest.raises(NonFinite, match=r"feature 'pole': generated holds 1 NaN or infinite values of 16"):
        DriftingObjective(broken)(x, images(2, 5, 1))


def test_half_precision_images_are_compared_in_float32():
    x, y = images(2, 4, 0), images(2, 5, 1)
    loss, measured = DriftingObjective(Pixels())(x.bfloat16(), y.bfloat16())
    assert loss.dtype == measured["pixels"].strength.dtype == torch.float32
    assert_close(loss, DriftingObjective(Pixels())(x.bfloat16().float(), y.bfloat16().float())[0])


def test_field_and_mean_are_passed_on():
    x, y = images(2, 4, 0), images(2, 5, 1)
    calls = []
    mean = lambda totals, weights: (calls.append(1), batch_mean(totals, weights))[1]
    objective = DriftingObjective(Pixels(), DriftingField(temperatures=(0.1, 0.3)))
    _, measured = objective(x, y, mean=mean)
    assert measured["pixels"].strength.shape == (2,)
    assert len(calls) == 2  # the mean distance, and the strengths of all temperatures in one message


def test_constant_features_are_found_and_left_out():
    feature_map = lambda x: {
        "constant": torch.full((len(x), 1, 2), 0.3),
        "rounding": 5 + 1e-7 * x.flatten(1)[:, None, :3],
        "pixels": x.flatten(1)[:, None],
    }
    objective = DriftingObjective(feature_map)
    assert objective.ignore_constant(images(1, 8, 0)[0]) == ["constant", "rounding"]
    assert list(objective(images(1, 4, 0), images(1, 4, 1))[1]) == ["pixels"]


def test_packed_features_are_the_features():
    x, y, n = images(2, 4, 0).requires_grad_(), images(2, 5, 1), images(2, 3, 2)
    objective = DriftingObjective([Rows(), Pixels()])
    packed = lambda t: objective.pack(t.flatten(0, 1)).unflatten(0, t.shape[:2])
    loss, measured = objective(x, packed(y), packed(n), torch.ones(2))
    expected, plain = objective(x, y, n, torch.ones(2))
    assert_close(loss, expected)
    assert_close(measured["rows"].strength, plain["rows"].strength)
    with pytest.raises(ValueError, match="32 numbers per image here, got 7"):
        objective(x, torch.zeros(2, 5, 7))


def test_bad_feature_maps_are_refused():
    with pytest.raises(ValueError, match="at least one feature map"):
        DriftingObjective([])
    with pytest.raises(ValueError, match=r"two feature maps give \['pixels'\]"):
        DriftingObjective([Pixels(), Pixels()])(images(1, 4, 0), images(1, 4, 1))
