"""Small classifiers: trained once, kept, the same again."""

import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers.classifiers import SmallClassifier, kept_classifier, train_classifier


def read():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 3
    images = torch.rand(256, 1, 8, 8, generator=rng) - 0.5
    images[torch.arange(256), 0, 2 * labels] += 0.5  # a bright row for every class
    return images, labels


def kept(file, **kwargs):
    return kept_classifier(file, read, channels=1, num_classes=3, width=4, **kwargs)


def test_a_classifier_learns():
    torch.manual_seed(0)
    model = train_classifier(*read(), generator=torch.Generator().manual_seed(0), width=8, epochs=20)
    images, labels = read()
    assert float((model(images).argmax(1) == labels).float().mean()) > 0.9
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="256 images do not fill one batch of 300"):
        train_classifier(images, labels, generator=torch.Generator(), batch_size=300)


def test_what_is_kept_is_not_trained_again(tmp_path):
    file = tmp_path / "new/judge.safetensors"
    first = kept(file, epochs=1)
    again = kept_classifier(file, lambda: 1 / 0, channels=1, num_classes=3, width=4)
    assert_close(again.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_the_seed_decides_and_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = kept(tmp_path / "a", seed=1, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert_close(kept(tmp_path / "b", seed=1, epochs=1).state_dict(), first.state_dict(), rtol=0, atol=0)
    assert not torch.equal(kept(tmp_path / "c", seed=2, epochs=1).stage1[0][0].weight, first.stage1[0][0].weight)
    torch.manual_seed(1)  # by hand
    by_hand = train_classifier(*read(), generator=torch.Generator().manual_seed(1), width=4, epochs=1)
    assert_close(by_hand.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_classes_that_no_image_shows_are_told_apart_too(tmp_path):
    file = tmp_path / "judge.safetensors"
    for _ in range(2):  # trained, then loaded
        model = kept_classifier(file, read, channels=1, num_classes=5, width=4, epochs=1)
        assert isinstance(model, SmallClassifier)
        assert model(read()[0][:2]).shape == (2, 5)
