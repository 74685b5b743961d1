"""What goes wrong with a field is seen at once, on every process, and said in words."""

import contextlib
import dataclasses

import pytest
import torch
from test_field_names import EXAMPLES
from test_trainer import images, one_accelerator_per_test, trainer

from drifting_diffusers import DriftingConfig, DriftingObjective, Pixels
from drifting_diffusers.fields import Drift, MeanShiftField, Situation, batch_mean, read_field, situated
from drifting_diffusers.losses import NonFinite, drift_loss

__all__ = ["images", "one_accelerator_per_test"]

FAULTY = EXAMPLES | {"nystrom, both sides": "nystrom(temperatures=(0.2,), landmarks=3, repulsion='nystrom')"}


def samples(seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, positives, negatives = (torch.randn(2, n, 3, generator=rng) for n in (6, 5, 4))
    return {
        "generated": x,
        "positives": positives,
        "negatives": negatives,
        "positive_weights": torch.ones(2, 5),
        "negative_weights": torch.ones(2, 4),
    }


@pytest.mark.parametrize("what", ["generated", "positives", "negatives", "negative_weights"])
@pytest.mark.parametrize("name", FAULTY)
def test_a_value_that_is_not_finite_is_found_by_every_field(name, what):
    given = samples()
    given[what].view(-1)[1] = torch.nan
    field = situated(read_field(FAULTY[name]), Situation(1, 10))
    with pytest.raises(NonFinite, match=what):
        drift_loss(**given, field=field)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A velocity of NaN from sound samples."""

    def __call__(self, x, *, positives, negatives, mean=batch_mean, **_):
        return Drift(torch.full_like(x, torch.nan), torch.tensor(1.0), torch.tensor(1.0), torch.ones(1))


def test_a_velocity_that_is_not_finite_is_no_loss():
    with pytest.raises(NonFinite, match="the velocity of Broken is not finite, though all samples and masses are"):
        drift_loss(**samples(), field=Broken())


def test_a_side_without_mass_is_named():
    given = samples() | {"positive_weights": torch.zeros(2, 5)}
    with pytest.raises(NonFinite, match="all positive_weights are 0, and this field needs mass on every side"):
        drift_loss(**given, field=read_field("frechet"))


@pytest.mark.parametrize("text", ["drifting", "mean_shift(grouping='problem')", "lookahead(drifting(grouping='problem'))"])
@pytest.mark.parametrize("how", ["compare", "slopes"])
def test_every_process_asks_for_as_many_means_whatever_it_meets(text, how):
    """Or else a process that meets a NaN leaves the others waiting."""
    objective = DriftingObjective(Pixels(), text)
    rng, asked = torch.Generator().manual_seed(0), []
    draw = lambda n: {name: torch.randn(2, n, 3, generator=rng) for name in ("first", "second")}
    generated, positives = draw(6), draw(5)

    def counting(totals, weights):
        asked[-1] += 1
        return batch_mean(totals, weights)

    for bad in (False, True):
        asked.append(0)
        if bad:
            generated["first"][0, 0, 0] = torch.nan
        with pytest.raises(NonFinite, match="feature 'first'") if bad else contextlib.nullcontext():
            getattr(objective, how)(dict(generated), dict(positives), {}, mean=counting)
    assert asked[0] == asked[1]


def test_a_longer_run_is_another_one_where_a_schedule_lasts_the_run(tmp_path):
    of = lambda text, steps: DriftingConfig(str(tmp_path), field=text, max_steps=steps, warmup_steps=0)
    for text in ("friction(drifting)", "score(temperatures=(exponential(1.0, 0.1),))"):
        assert of(text, 20).differences(of(text, 10)) == {"max_steps": (20, 10)}
    for text in ("drifting", "friction(drifting, linear(0.0, 0.9, steps=5))", "score(temperatures=(constant(1.0),))"):
        assert of(text, 20).differences(of(text, 10)) == {}


@pytest.mark.parametrize("field", [3, 0.2, True, ["drifting"], {"drifting": {}}])
def test_a_config_takes_no_field_that_is_none(field, tmp_path, as_users_see_it):
    with pytest.raises(TypeError, match=r"field must be a field or its name, as in 'sinkhorn\(temperatures=\(0.05,\)\)', got"):
        DriftingConfig(str(tmp_path), field=field)


def test_what_a_field_refuses_is_refused_before_any_work(images, tmp_path):
    with pytest.raises(
        ValueError, match=r"the field cannot be called with 3 generated, 4 real and 2 unconditional samples per label: .*even"
    ):
        trainer(images, tmp_path / "run", field="sinkhorn")
    assert not (tmp_path / "run").exists()


class Plain:
    """A field that is no dataclass."""

    def __init__(self, strength):
        self.strength = strength

    def __call__(self, x, **more):
        return MeanShiftField()(x, **more)


def test_choices_of_a_field_that_is_no_dataclass_are_told_apart():
    describe = lambda strength: DriftingObjective(Pixels(), Plain(strength)).describe()["field"]
    assert describe(1.0) == {"class": "Plain", "strength": 1.0}
    assert describe(1.0) != describe(2.0)


def test_queries_that_landmarks_could_not_serve_are_logged(images, tmp_path):
    run = trainer(images, tmp_path / "run", field="friction(nystrom(temperatures=(0.2,), landmarks=3), 0.5)", max_steps=1)
    run.train()
    assert run.log_history[0]["clamped"] == run.objective.clamped["clamped"]
    assert "clamped" not in trainer(images, tmp_path / "other", max_steps=1).objective.clamped


def test_a_checkpoint_of_another_field_is_refused():
    state = DriftingObjective(Pixels(), "frechet(moments='average')").state_dict()
    with pytest.raises(ValueError, match="the checkpoint holds 1 memories of a field, and this field has 0"):
        DriftingObjective(Pixels()).load_state_dict(state)
