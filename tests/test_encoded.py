"""What a step encodes: every distinct image once, in inference mode, into maps that are read one feature at a time; and no encoder is ever trained."""

import dataclasses
from functools import partial

import pytest
import torch
from test_field_names import EXAMPLES
from test_options import generator as moved
from test_trainer import images, one_accelerator_per_test, tiny_generator, trainer, weights
from torch import nn
from torch.testing import assert_close
from transformers import ConvNextV2Config, ConvNextV2Model

from drifting_diffusers import DriftingObjective, MultiScaleStatistics, Pixels
from drifting_diffusers.backbones import BackboneFeatures
from drifting_diffusers.bank import SampleBank
from drifting_diffusers.classifiers import SmallClassifier
from drifting_diffusers.draws import drawn_from, random_stream
from drifting_diffusers.encoded import Encoded, Repeated, converted, distinct_of, in_pieces
from drifting_diffusers.encoders import MaskedAutoencoder
from drifting_diffusers.features import networks_of
from drifting_diffusers.fields import Situation

__all__ = ["images", "one_accelerator_per_test"]


def encoder(dtype=torch.float32, channels=1):
    torch.manual_seed(0)
    return MaskedAutoencoder(channels, 32, (1, 2, 1, 1), num_classes=2).eval().requires_grad_(False).to(dtype)


def samples(labels, n, seed, repeats=False):
    rng = torch.Generator().manual_seed(seed)
    if not repeats:
        return torch.randn(labels, n, 1, 8, 8, generator=rng)
    return Repeated(torch.randn(n + 1, 1, 8, 8, generator=rng), torch.randint(n + 1, (labels, n), generator=rng))


class Counted(nn.Module):
    """Another feature map, with the number of images that it was given and whether in inference mode."""

    def __init__(self, feature_map):
        super().__init__()
        self.feature_map, self.seen = feature_map, []

    def forward(self, x):
        self.seen.append((len(x), torch.is_inference_mode_enabled()))
        return self.feature_map(x)


# -- halves, pieces, repeats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_that_are_read_are_the_features(dtype):
    objective = DriftingObjective([encoder(dtype).activations, Pixels()])
    objective.ignored = {"layer4", "layer1_mean"}
    x = samples(2, 3, 0)
    with torch.no_grad():
        expected, found = objective.problems(x), objective.encode(x)
    assert list(found) == list(expected)
    assert not objective.ignored & set(found)
    assert_close(dict(found), expected, rtol=0, atol=0)
    assert {values.dtype for key, values in found.maps.items() if "layer" in key} == {dtype}  # kept as the network computed them
    kept = sum(values.numel() * values.itemsize for values in found.maps.values())
    assert kept < sum(values.numel() * values.itemsize for values in expected.values()) / (1.4 if dtype == torch.float32 else 2.5)


def test_an_override_in_a_subclass_is_what_is_compared():
    class Half(MaskedAutoencoder):
        def activations(self, images, **options):
            return {name: values / 2 for name, values in super().activations(images, **options).items()}

    class Shifted(DriftingObjective):
        def features(self, images):
            return {name: values + 1 for name, values in super().features(images).items()}

    torch.manual_seed(0)
    model = Half(1, 32, (1, 1, 1, 1), num_classes=2).eval().requires_grad_(False)
    for objective in (DriftingObjective(model.activations), Shifted(Pixels())):
        x = samples(2, 3, 0)
        with torch.no_grad():
            assert_close(dict(objective.encode(x)), objective.problems(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 4, 6, 9])
def test_pieces_are_the_whole(size):
    x = samples(1, 6, 0)[0]
    objective = DriftingObjective([encoder().activations])
    with torch.no_grad():
        whole = objective._maps(x)[0]
        pieces, readings = in_pieces(lambda part: objective._maps(x[part]), 6, size)
    assert pieces.keys() == whole.keys() == {key for key, _ in readings.values()}
    assert_close(pieces, whole, rtol=1e-3, atol=1e-4)  # convolutions round by the size of a batch


def test_generated_labels_come_in_pieces():
    x, objective = samples(3, 4, 0), DriftingObjective([Pixels(), MultiScaleStatistics()])
    found = objective.encode_pieces(lambda part: x[part], 3, 2)
    assert_close(dict(found), objective.problems(x), rtol=0, atol=0)


def test_repeated_samples_stand_in_for_a_tensor():
    some = samples(3, 4, 0, repeats=True)
    assert some.shape == some.dense.shape == (3, 4, 1, 8, 8)
    assert (len(some), some.ndim) == (3, 5)
    assert_close(some[1:], some.dense[1:], rtol=0, atol=0)
    assert_close(some.mean(dim=(2, 3)), some.dense.mean(dim=(2, 3)))
    assert_close(torch.cat([some, some]), torch.cat([some.dense] * 2))
    assert_close(converted(some, lambda t: 2 * t).dense, 2 * some.dense)
    with pytest.raises(AttributeError, match=r"Tensor.*no attribute 'colour'"):
        _ = some.colour


def test_distinct_samples_are_where_they_are_said_to_be():
    for some in (samples(2, 3, 0), samples(2, 3, 0, repeats=True)):
        distinct, places = distinct_of(some)
        assert_close(distinct[places], some[:])


def test_repeats_are_the_same_problems():
    objective = DriftingObjective([encoder().activations, MultiScaleStatistics()])
    some = samples(3, 4, 0, repeats=True)
    with torch.no_grad():
        assert_close(dict(objective.encode(some)), objective.problems(some.dense), rtol=1e-5, atol=1e-5)


def test_an_emptied_mapping_lets_go_of_its_maps():
    found = DriftingObjective([encoder().activations]).encode(samples(2, 3, 0))
    assert isinstance(found, dict)
    assert isinstance(found, Encoded)
    with pytest.raises(TypeError, match="feature 'conv1' cannot be set"):
        found["conv1"] = torch.zeros(1, 1, 1)
    copied = {**found}
    assert copied.keys() == set(found) == dict(found.items()).keys()
    for name in list(found):
        before = len(found.maps)
        assert_close(found.pop(name), copied[name], rtol=0, atol=0)
        assert len(found.maps) in (before, before - 1)
    assert not found
    assert not found.maps


# -- draws


@pytest.mark.parametrize("n", [3, 30])
def test_draws_take_the_random_numbers_that_they_took(n):
    """Those of `draw`, class by class; what repeats, within a class or because a class comes twice, is there once."""
    bank = SampleBank(3, 8, (2,))
    rng = torch.Generator().manual_seed(0)
    bank.push(torch.randn(24, 2, generator=rng), torch.arange(24) % 3)
    labels = torch.tensor([2, 0, 2, 2])
    rngs = lambda: [random_stream(0, 1, slot) for slot in range(4)]
    found = drawn_from(bank, labels, n, rngs())
    expected = torch.cat([bank.draw(label[None], n, generator=rng) for label, rng in zip(labels, rngs(), strict=True)])
    assert isinstance(found, Repeated)
    assert_close(found.dense, expected, rtol=0, atol=0)
    assert len(found.distinct) == len(expected.flatten(0, 1).unique(dim=0)) < 4 * n
    alone = drawn_from(bank, labels[:2], 3, rngs()[:2])
    assert isinstance(alone, torch.Tensor)
    assert_close(
        alone,
        expected[:2] if n == 3 else torch.cat([bank.draw(c[None], 3, generator=r) for c, r in zip(labels[:2], rngs()[:2], strict=True)]),
    )


@pytest.mark.parametrize("changes", [{}, {"labels_per_microbatch": 1}, {"labels_per_microbatch": 2}], ids=str)
def test_every_distinct_real_image_is_encoded_once_per_step(changes, images, tmp_path):
    """More labels than classes: positives repeat too."""
    counted = Counted(Pixels())
    many = {"labels_per_step": 5, "unconditional_per_label": 6, "eval_steps": 0, "preview_steps": 0}
    run = trainer(images, tmp_path / "run", objective=DriftingObjective([counted]), **(many | changes))
    run._begin()
    for step in range(3):
        counted.seen.clear()
        run.training_step()
        drawn = run.real._draw(step)
        real = sum(n for n, inference in counted.seen if inference)
        distinct = sum(len(t.flatten(0, 1).unique(dim=0)) for t in (drawn.positives, drawn.negatives))
        assert real <= len(drawn.attracting.distinct) + len(drawn.repelling.distinct)
        assert distinct <= real < 5 * (4 + 6)
        size = changes.get("labels_per_microbatch", 5)
        assert max(n for n, inference in counted.seen if inference) <= size * 6  # memory is bounded as it was
    run._close()


# -- inference mode

NOW = Situation(3, 10)


@pytest.mark.filterwarnings("ignore:.*landmarks.*")
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_field_takes_what_inference_mode_made(name):
    """Loss and gradient, in one pass and in two, are those of real features that were made as usual."""
    field = EXAMPLES[name].replace("landmarks=3", "landmarks=4")
    make = lambda: DriftingObjective([Pixels(), MultiScaleStatistics()], field=field)
    y, n, masses = samples(3, 5, 1), samples(3, 4, 2, repeats=True), torch.tensor([0.5, 1.0, 2.0])
    masses = None if "frechet" in field else masses
    losses, gradients = [], []
    for inference in (False, True):
        objective, x = make(), samples(3, 4, 0).requires_grad_()
        if objective.observers:
            objective.observe(y.flatten(0, 1))
        if inference:
            loss, _ = objective(x, y, n, masses, situation=NOW)
        else:
            with torch.no_grad():
                real = objective.problems(y), objective.problems(n.dense)
            loss, _ = objective.compare(objective.problems(x), *real, masses, situation=NOW)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert torch.isfinite(gradients[0]).all()
    assert_close(losses[1], losses[0])
    assert_close(gradients[1], gradients[0])
    objective = make()
    if objective.observers:
        objective.observe(y.flatten(0, 1))
    pieces = objective.encode_pieces(lambda part: samples(3, 4, 0)[part], 3, 2)
    slopes, value, _ = objective.slopes(pieces, objective.encode(y), objective.encode(n), masses, situation=NOW)
    x = samples(3, 4, 0).requires_grad_()
    features = objective.problems(x)
    torch.autograd.backward(list(features.values()), [slopes[name] for name in features])
    assert_close(value, losses[0])
    assert_close(x.grad, gradients[0], rtol=1e-4, atol=1e-7)
    assert not pieces


# -- frozen encoders


@dataclasses.dataclass
class Wrapped:
    nets: list

    def __call__(self, x):
        return {f"n{i}": net(x).flatten(1)[:, None] for i, net in enumerate(self.nets)}


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return {"module": self.net(x).flatten(1)[:, None]}


NAMED = nn.Conv2d(1, 2, 3)
"""A network that a function finds in its module."""


def named(x, scale=1.0):
    return {"named": scale * NAMED(x).flatten(1)[:, None]}


def kept_waiting(net):
    return lambda x: {"closed": (lambda y: net(y))(x).flatten(1)[:, None]}


def backbone():
    config = ConvNextV2Config(num_channels=1, hidden_sizes=[4, 4], depths=[1, 1], num_stages=2, patch_size=2, image_size=8)
    return BackboneFeatures(ConvNextV2Model(config), image_mean=(0.5,), image_std=(0.5,), layers=(1, 2))


FEATURE_MAPS = {
    "encoder": lambda: (m := encoder().requires_grad_(), m),
    "activations": lambda: ((m := encoder().requires_grad_().train()).activations, m),
    "some activations": lambda: (partial((m := encoder().requires_grad_()).activations, every_block=None), m),
    "classifier": lambda: ((m := SmallClassifier(1, 3, width=8).train()).activations, m),
    "backbone": lambda: (m := backbone().requires_grad_(), m),
    "module": lambda: (m := Module(), m),
    "wrapped": lambda: (Wrapped([m := nn.Conv2d(1, 2, 3)]), m),
    "closed over": lambda: (kept_waiting(m := nn.Conv2d(1, 2, 3)), m),
    "named": lambda: (partial(named, scale=2.0), NAMED.requires_grad_()),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("changes", [{}, {"labels_per_microbatch": 1, "cache_features": "negatives"}], ids=["plain", "two passes"])
@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_no_encoder_is_ever_trained(kind, changes, images, tmp_path):
    feature_map, network = FEATURE_MAPS[kind]()
    quick = {"max_steps": 2, "eval_steps": 0, "preview_steps": 0, "save_steps": 9}
    assert any(p.requires_grad for p in network.parameters())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run = trainer(images, tmp_path / "run", generator=moved(), objective=DriftingObjective([feature_map]), **(quick | changes))
    asked = []
    for parameter in network.parameters():
        parameter.register_hook(asked.append) if parameter.requires_grad else None
    run.train()
    assert not asked
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert float(run.log_history[0]["grad_norm"]) > 0  # what is trained is


def test_networks_are_found_once_and_from_the_outside():
    net = Module()
    assert networks_of(partial(net.forward)) == [net]
    assert networks_of(Wrapped([net, net.net])) == [net]
    assert networks_of(lambda x: {"x": x}) == []
    assert networks_of(named) == [NAMED]


def test_a_feature_map_that_holds_the_generator_is_refused(images, tmp_path, as_users_see_it):
    generator = tiny_generator()
    with pytest.raises(ValueError, match="generator must be trainable"):
        trainer(images, tmp_path / "run", generator=generator, objective=DriftingObjective([lambda x: {"g": generator.patch_proj(x)}]))


# -- features in the bank of negatives


def test_cached_negatives_change_nothing_and_resume(images, tmp_path, capsys):
    objective = lambda: DriftingObjective([Pixels(), MultiScaleStatistics()])
    short = {"eval_steps": 0, "preview_steps": 0, "max_steps": 4}
    plain = trainer(images, tmp_path / "a", objective=objective(), **short)
    cached = trainer(images, tmp_path / "b", objective=objective(), cache_features="negatives", **short)
    assert (
        "cache_features='negatives' keeps features of 10 samples, 132 numbers of float32 each: 0.00 GB on cpu, " in capsys.readouterr().out
    )
    plain.train(), cached.train()
    assert cached.real.feed.negatives.samples.shape == (1, 10, 64 + 4 + 16 * 4)
    assert cached.real.feed.positives.samples.shape == (3, 8, 1, 8, 8)
    assert_close(weights(plain), weights(cached), rtol=1e-3, atol=1e-5)

    again = trainer(
        images, tmp_path / "c", objective=objective(), cache_features="negatives", **(short | {"max_steps": 2, "save_steps": 2})
    )
    again.train()
    longer = trainer(images, tmp_path / "c", objective=objective(), cache_features="negatives", **short)
    longer.train()
    assert_close(weights(longer), weights(cached), rtol=0, atol=0)
    assert_close(longer.real.feed.negatives.state_dict(), cached.real.feed.negatives.state_dict(), rtol=0, atol=0)
