"""Averaged weights: the law, for several decays side by side; buffers; states; parameters that are sharded."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from drifting_diffusers.averaging import AveragedWeights, whole


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


def walk(model, steps):
    """Moves all weights about, and yields the new ones."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
            model[1].running_mean.add_(1)
            model[1].num_batches_tracked.add_(1)
        yield [parameter.detach().clone() for parameter in model.parameters()]


def test_every_decay_follows_its_own_law(model):
    """theta_n = decay^n theta_0 + (1 - decay) sum_k decay^(n - k) theta_k, from the first step on."""
    decays = (0.0, 0.5, 0.99)
    first, averages = [parameter.detach().clone() for parameter in model.parameters()], AveragedWeights(model, decays)
    seen = []
    for now in walk(model, 6):
        seen.append(now)
        averages.update(model)
    for decay in decays:
        for i, parameter in enumerate(averages.models[decay].parameters()):
            terms = [decay ** (6 - k) * (1 - decay) * now[i] for k, now in enumerate(seen, start=1)]
            assert_close(parameter.data, decay**6 * first[i] + sum(terms), rtol=1e-12, atol=1e-12)


def test_it_starts_at_the_initial_weights_and_is_no_part_of_the_network(model):
    averages = AveragedWeights(model, [0.9])
    assert_close(averages.models[0.9].state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in averages.models[0.9].parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    next(walk(model, 1))
    assert not torch.equal(averages.models[0.9][0].weight, model[0].weight)


def test_buffers_are_those_of_the_network(model):
    averages = AveragedWeights(model, [0.9, 0.5])
    for _ in walk(model, 2):
        averages.update(model)
    for averaged in averages.models.values():
        assert_close([*averaged.buffers()], [*model.buffers()], rtol=0, atol=0)


def test_a_state_goes_on_as_if_it_had_not_stopped(model):
    averages, others = AveragedWeights(model, [0.9, 0.5]), AveragedWeights(model, [0.5, 0.9])
    moves = walk(model, 4)
    for _ in range(2):
        next(moves)
        averages.update(model)
    others.load_state_dict(averages.state_dict())
    for _ in moves:
        averages.update(model)
        others.update(model)
    for decay in (0.9, 0.5):
        assert_close(others.models[decay].state_dict(), averages.models[decay].state_dict(), rtol=0, atol=0)


class Sharded(nn.Parameter):
    """As FSDP2's: what is here is a part, and the whole is gathered on demand."""

    def full_tensor(self):
        return self.everything


def test_a_sharded_parameter_is_gathered(model):
    averages = AveragedWeights(model, [0.5])
    before = model[0].weight.detach().clone()
    shard = Sharded(model[0].weight.detach()[:1])
    shard.everything = before + 2
    model[0].weight = shard
    assert whole(shard) is shard.everything
    assert whole(before) is before
    averages.update(model)
    assert_close(averages.models[0.5][0].weight, before + 1)
