"""The FID network: every layer, the resize and the scaling against recordings of torch-fidelity with random weights.

`recorded/inception_torch_fidelity.npz` was made with torch-fidelity 0.4.0: `random_weights(InceptionV3(), seed=0)` was saved, loaded strictly by its
`FeatureExtractorInceptionV3`, and called on `drawn(side)`; every 64th feature and every 36th of `logits_unbiased` were kept.
"""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from drifting_diffusers import inception
from drifting_diffusers.inception import InceptionV3, tensorflow_resize

RECORDED = Path(__file__).parent / "recorded" / "inception_torch_fidelity.npz"
SIDES = (32, 64, 256, 299)
EXACT = {"atol": 3e-5, "rtol": 0}  # features around 1 to 2, logits around 3; measured between the two programs: at most 6e-6


def random_weights(network, seed):
    """A state dict in which every entry has its say and activations neither die nor explode."""
    generator = torch.Generator().manual_seed(seed)
    ranges = {"weight": (0.8, 1.2), "bias": (-0.3, 0.3), "running_mean": (-0.3, 0.3), "running_var": (0.5, 1.5)}
    state = {}
    for name, value in network.state_dict().items():
        limits = next((limits for end, limits in ranges.items() if name.endswith(end) and value.ndim == 1), None)
        if limits is not None:
            low, high = limits
            state[name] = low + (high - low) * torch.rand(value.shape, generator=generator)
        elif name.endswith("num_batches_tracked"):
            state[name] = value
        else:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
    return state


def drawn(side):
    """Two images: noise, and a smooth one with a little noise, as 8-bit levels."""
    generator = torch.Generator().manual_seed(side)
    noise = torch.randint(0, 256, (3, side, side), generator=generator)
    waves = (
        torch.sin(torch.linspace(0, 9, side))[:, None] * torch.cos(torch.linspace(0, 5, side)) * torch.tensor([60, 80, 100])[:, None, None]
    )
    return torch.stack([noise, (128 + waves + noise / 16).round().long()]).clamp(0, 255).to(torch.uint8)


def kept(found):
    return {"features": found["features"][:, ::64], "logits": found["logits"][:, ::36]}


@pytest.fixture(scope="module")
def network():
    found = InceptionV3()
    found.load_state_dict(random_weights(found, seed=0))
    return found


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("side", SIDES)
def test_it_is_the_network_of_torch_fidelity(network, recorded, side):
    found = network(drawn(side).float())
    assert found["features"].shape == (2, 2048)
    assert found["logits"].shape == (2, 1008)
    for name, values in kept(found).items():
        assert_close(values, recorded[f"{name}_{side}"], **EXACT)


def without_half_pixels(x, side):
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


def counting(pool, x, side, *, stride, padding, count_include_pad):
    return pool(x, side, stride=stride, padding=padding)


MUTATIONS = {
    "another resize": lambda network, patch: patch.setattr(inception, "tensorflow_resize", without_half_pixels),
    "a mean in the last block": lambda network, patch: patch.setattr(network.Mixed_7c, "pool", "mean"),
    "a max before it": lambda network, patch: patch.setattr(network.Mixed_7b, "pool", "max"),
    "padding counted": lambda network, patch: patch.setattr(inception.F, "avg_pool2d", partial(counting, F.avg_pool2d)),
    "epsilon": lambda network, patch: patch.setattr(network.Mixed_5b.branch1x1.bn, "eps", 1e-5),
    "the bias of the logits": lambda network, patch: patch.setattr(inception.F, "linear", partial(F.linear, bias=network.fc.bias)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_recordings_tell_every_convention(network, recorded, monkeypatch, mutation):
    MUTATIONS[mutation](network, monkeypatch)
    found = kept(network(drawn(64)[:1].float()))
    assert max((values - recorded[f"{name}_64"][:1]).abs().max() for name, values in found.items()) > 10 * EXACT["atol"]


@pytest.mark.parametrize("side", [32, 400])
def test_the_network_of_torch_fidelity_itself(network, tmp_path, side):
    """Live, where it is installed."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    witness = theirs.FeatureExtractorInceptionV3(
        "random", ["2048", "logits_unbiased"], feature_extractor_weights_path=tmp_path / "weights.pth"
    )
    features, logits = witness(drawn(side))
    found = network(drawn(side).float())
    assert_close(found["features"], features, **EXACT)
    assert_close(found["logits"], logits, **EXACT)


def test_the_resize_reads_where_tensorflow_reads():
    """By hand: two pixels to four read 0, 1/2, 1 and beyond the last, which is the last again; no half pixel."""
    row = torch.tensor([0.0, 8.0]).reshape(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert_close(tensorflow_resize(row, 4)[0, 0, 0], torch.tensor([0.0, 4.0, 8.0, 8.0]))
    assert_close(tensorflow_resize(row.mT, 4)[0, 0, :, 0], torch.tensor([0.0, 4.0, 8.0, 8.0]))
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    assert_close(tensorflow_resize(ramp, 3)[0, 0, 0], torch.tensor([0.0, 2.0, 4.0]))  # every second pixel, none in between is seen
    same = torch.rand(1, 1, 7, 7)
    assert tensorflow_resize(same, 7).equal(same)


def test_the_names_are_those_of_the_file(network):
    """A few of each kind: what torch-fidelity loaded strictly has all 566."""
    state = network.state_dict()
    assert len(state) == 566
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "fc.weight": (1008, 2048),
    }
    shapes |= {"Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3), "Mixed_7c.branch3x3dbl_3b.bn.running_var": (384,)}
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_precision_is_that_of_the_weights(network):
    levels = drawn(32)[:1].float()
    single, found = network(levels), copy.deepcopy(network).double()(levels)
    assert found["features"].dtype == torch.float64
    assert_close(found["features"].float(), single["features"], **EXACT)
