"""Feature maps: shapes, gradients, and what the statistics see."""

import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers import MultiScaleStatistics, Pixels, Windows
from drifting_diffusers.features import FeatureMap, oriented_filters


def images(n=3, c=2, h=8, w=12):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(0))


def test_names_and_shapes():
    found = MultiScaleStatistics(mean_scales=(2, 4), edge_scales=(4,), orientations=3, widths=(1.0,))(images())
    assert {name: tuple(v.shape) for name, v in found.items()} == {"mean_2": (3, 1, 48), "mean_4": (3, 1, 12), "edges_4": (3, 1, 72)}
    assert tuple(Pixels()(images())["pixels"].shape) == (3, 1, 192)
    assert isinstance(Pixels(), FeatureMap)


def test_means_are_window_means_and_pixels_keep_their_order():
    x = images()
    assert_close(MultiScaleStatistics(mean_scales=(4,), edge_scales=())(x)["mean_4"][1, 0, 4], x[1, 0, 4:8, 4:8].mean())
    assert_close(Pixels()(x)["pixels"].reshape(x.shape), x)


def test_windows_overlap_and_keep_their_pixels():
    x = images(h=12, w=16)
    found = Windows(side=8, stride=4)(x)["windows_8"]
    assert found.shape == (3, 2 * 3, 2 * 64)
    assert_close(found[1, 4].reshape(2, 8, 8), x[1, :, 4:12, 4:12])


@pytest.mark.parametrize("size", [(12, 14), (4, 12)])
def test_windows_that_miss_the_border_are_refused(size):
    with pytest.raises(ValueError, match=r"stride of 4 .*stride that divides"):
        Windows(side=8, stride=4)(images(h=size[0], w=size[1]))


def test_every_image_by_itself():
    x = images()
    whole, one = MultiScaleStatistics()(x), MultiScaleStatistics()(x[1:2])
    for name in whole:
        assert_close(whole[name][1:2], one[name])


def test_filters_ignore_constants_and_see_their_own_direction():
    filters = oriented_filters((1.0, 1.8), 4)
    assert filters.shape[0] == 16
    assert_close(filters.sum((1, 2, 3)), torch.zeros(16), atol=1e-6, rtol=0)
    assert_close(filters.abs().sum((1, 2, 3)), torch.ones(16))
    across = torch.zeros(1, 1, 16, 16)
    across[..., 8:] = 1.0  # a step along x: seen by the first direction, not by the one at a right angle
    energy = MultiScaleStatistics((), (16,), widths=(1.0,), orientations=2)(across - across.mean())["edges_16"][0, 0]
    assert energy[0] > 2 * energy[2]


def test_edges_forgive_a_small_shift_that_pixels_do_not():
    stripe = torch.full((2, 1, 16, 16), -1.0)
    stripe[0, :, :, 5] = stripe[1, :, :, 6] = 1.0
    distance = lambda values: float((values[0] - values[1]).norm() / values.norm())
    assert distance(MultiScaleStatistics((), (8,))(stripe)["edges_8"]) < 0.2 * distance(Pixels()(stripe)["pixels"])


def test_gradients_are_finite_where_an_image_is_constant():
    x = torch.zeros(2, 1, 8, 8, requires_grad=True)
    sum(v.square().sum() for v in MultiScaleStatistics()(x).values()).backward()
    assert torch.isfinite(x.grad).all()


def test_windows_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match=r"windows of 5 pixels .*\(8, 12\)"):
        MultiScaleStatistics(mean_scales=(5,))(images())


def test_nothing_is_trained_or_saved():
    assert list(MultiScaleStatistics().parameters()) == []
    assert MultiScaleStatistics().state_dict() == {}
